"""Parts of one linear layer, as checkpoint tensors: by columns (outputs) or by rows (inputs), exactly.

    columns    W[:, part] is the weights of the columns' part, bit for bit                  y[part] = x W_part
    rows       W[part, :] is the weights of the rows' part, bit for bit                     y = sum over ranks of x[part] W_part

A part is a layer of its own: tensors as a checkpoint has them, for `QMatrix.from_tensors`, or an array [n, k]. Words are
copied as they are, wherever the part has whole ones.

Rows of a quantized layer are stored in an order of their own, which spreads a range of inputs over all groups. The part
keeps its rows in the stored order and every group it has rows of. Kernels work on blocks of 32 rows of one group, so that a
group of which the part has, say, 50 rows is filled up to 64 by rows that have no input (`row_input` in formats/exl2.py and
gptq.py), at most 31 a group:

    stored      | group 0: a b a a b ... | group 1: b b a b a ... |
    part of a   | a a a ... pad          | a a ... pad            |

With a random order and groups of 128 the parts of 2, 4 and 8 ranks together are 1.2, 1.4 and 2 times the layer. Where whoever
computes the inputs is free in which ones a rank gets (intermediate features: any set, by `take_columns` of gate and up), a
range of the *stored* order costs no padding: `stored_features`.

Tensors are NumPy arrays, or anything that has their `shape`, `dtype` and slices of rows and columns (`reading.StoredTensor`),
but for the small tables (q_groups, q_scale_max, permutations, g_idx). Only what a part needs is read. Results are
C-contiguous, and may be views of the tensors.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import ml_dtypes
import numpy as np

from cupyq.errors import FormatError
from cupyq.formats._tensors import check_tensor
from cupyq.formats.bits import pack_cols, pack_rows, unpack_cols, unpack_rows
from cupyq.formats.exl2 import Exl2Layout, validate_exl2
from cupyq.formats.gptq import GptqLayout, validate_gptq

_WHOLE = ("q_scale_max", "q_groups", "q_invperm", "q_perm", "g_idx", "row_input")  # what parts by columns share
_FLOATS = (np.float16, np.float32, ml_dtypes.bfloat16)
_BLOCK = 32
_ROWS_AT_ONCE = 1024  # bounds the unpacked codes of a step


def take_columns(
    tensors: Mapping[str, Any], columns: Sequence[int] | np.ndarray, *, group_size: int | None = None, name: str = ""
) -> dict[str, Any]:
    """Tensors of some outputs of a layer: EXL2, GPTQ, or `weight` [n, k]; its bias alike. Column j of the part is columns[j].

    columns: a range, or distinct numbers in any order. EXL2: a multiple of 8. GPTQ: they fill whole words of qzeros (a multiple
    of 8 columns for 4 bits, of 32 for 3). group_size: of the checkpoint's config, for GPTQ without g_idx. ValueError: columns
    that fill no whole words, or outside the layer; FormatError names a tensor, prefixed by `name`.
    """
    layer = _Layer(tensors, group_size, name)
    return _columns_part(layer, _as_range(_check_choice("columns", columns, layer.n)))


def take_rows(
    tensors: Mapping[str, Any], rows: Sequence[int] | np.ndarray, *, group_size: int | None = None, name: str = ""
) -> dict[str, Any]:
    """Tensors of some inputs of a layer: EXL2, GPTQ, or `weight` [n, k]. Input j of the part is rows[j].

    rows: a range, or distinct numbers in any order, by the model's order of inputs; of a quantized layer, a multiple of 8. The
    bias goes with input 0, so that one part adds it. group_size: of the checkpoint's config, for GPTQ without g_idx. The part
    holds the groups it has rows of, and row_input where it is padded. ValueError: rows of another number, or outside the layer;
    FormatError names a tensor, prefixed by `name`.
    """
    layer = _Layer(tensors, group_size, name)
    return _rows_part(layer, _check_choice("rows", rows, layer.k))


def stored_features(
    tensors: Mapping[str, Any], rows: Sequence[int] | np.ndarray, *, group_size: int | None = None, name: str = ""
) -> np.ndarray:
    """Inputs of some stored rows, int64, ascending: for a range of these, what `take_rows` cuts with least padding.

    The stored order is that of EXL2's permutation, and for GPTQ the rows sorted by group; a plain weight's is the model's.
    Of ranges whose ends are multiples of 32, the parts of EXL2 have no padding, those of GPTQ no more than the layer itself
    has, where its groups are multiples of 32.
    """
    layer = _Layer(tensors, group_size, name)
    chosen = _check_choice("rows", rows, layer.k)
    order = layer.gptq.perm if layer.gptq is not None else layer.order
    return np.sort(chosen if order is None else order[order >= 0][chosen].astype(np.int64))


# --- checks -----------------------------------------------------------------------------------------------------------


class _Layer:
    """Tensors of one layer after the checks of its format, and its sizes."""

    def __init__(self, tensors: Mapping[str, Any], group_size: int | None, name: str):
        self.tensors, self.name = tensors, name
        self.exl2: Exl2Layout | None = None
        self.gptq: GptqLayout | None = None
        self.order: np.ndarray | None = None  # of EXL2: stored row -> input
        if tensors.get("q_weight") is not None:
            self.exl2, self.order = validate_exl2(tensors, name)
            self.k, self.n = self.exl2.k, self.exl2.n
        elif tensors.get("qweight") is not None:
            self.gptq = validate_gptq(tensors, group_size=group_size, name=name)
            self.k, self.n = self.gptq.k, self.gptq.n
        elif tensors.get("weight") is not None:
            weight = check_tensor(tensors, "weight", name, _FLOATS, (None, None), "[outputs, inputs]")
            self.n, self.k = map(int, weight.shape)
            if tensors.get("bias") is not None:
                check_tensor(tensors, "bias", name, _FLOATS, (self.n,), "[rows of weight]")
        else:
            where = f"{name}: " if name else ""
            raise FormatError(
                f"{where}neither EXL2 (q_weight, ...), nor GPTQ (qweight, ...), nor a weight, "
                f"found {sorted(tensors) or 'no tensors'}"
            )


def _check_choice(what: str, chosen: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(chosen)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise ValueError(f"{what}: {array.dtype} {list(array.shape)}, expected at least one whole number, in one dimension")
    array = array.astype(np.int64)
    if array.min() < 0 or array.max() >= count:
        raise ValueError(f"{what}: {array.min()} to {array.max()}, expected numbers from 0 to {count - 1}")
    if len(np.unique(array)) != len(array):
        raise ValueError(f"{what}: some occur twice, expected distinct ones")
    return array


# --- columns ----------------------------------------------------------------------------------------------------------


def _columns_part(layer: _Layer, columns: range | np.ndarray) -> dict[str, Any]:
    tensors, part = layer.tensors, {}
    if layer.exl2 is not None:
        _check_whole_words(layer, columns, 4)
        part["q_weight"] = _columns(tensors["q_weight"], columns)
        part["q_scale"] = _packed_columns(tensors["q_scale"], 4, columns)
    elif layer.gptq is not None:
        _check_whole_words(layer, columns, layer.gptq.bits)
        part["qweight"] = _columns(tensors["qweight"], columns)
        part["qzeros"] = _packed_columns(tensors["qzeros"], layer.gptq.bits, columns)
        part["scales"] = _columns(tensors["scales"], columns)
    else:
        part["weight"] = _rows(tensors["weight"], columns)
    part |= {short: tensors[short] for short in _WHOLE if tensors.get(short) is not None}
    if tensors.get("bias") is not None:
        part["bias"] = _rows(tensors["bias"], columns)
    return part


def _check_whole_words(layer: _Layer, columns: range | np.ndarray, bits: int) -> None:
    unit = 32 // gcd(32, bits)
    if len(columns) % unit:
        where = f"{layer.name}: " if layer.name else ""
        raise ValueError(
            f"{where}a part of {len(columns)} columns, expected a multiple of {unit}, as {bits}-bit scales or zeros fill words"
        )


def _packed_columns(words: Any, bits: int, columns: range | np.ndarray) -> np.ndarray:
    """Columns, as many as fill words, of codes whose streams run along the rows."""
    if isinstance(columns, range) and columns.start * bits % 32 == 0:
        return _columns(words, range(columns.start * bits // 32, columns.stop * bits // 32))
    whole = np.ascontiguousarray(words[:])
    codes = unpack_cols(whole, bits, whole.shape[1] * 32 // bits)
    return pack_cols(codes[:, columns.start : columns.stop] if isinstance(columns, range) else codes[:, columns], bits)


def _columns(tensor: Any, columns: range | np.ndarray) -> np.ndarray:
    if isinstance(columns, range):
        return np.ascontiguousarray(tensor[:, columns.start : columns.stop])
    rows = tensor.shape[0]
    result = np.empty((rows, len(columns)), tensor.dtype)
    for begin in range(0, rows, _ROWS_AT_ONCE):
        result[begin : begin + _ROWS_AT_ONCE] = tensor[begin : begin + _ROWS_AT_ONCE][:, columns]
    return result


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows_part(layer: _Layer, rows: np.ndarray) -> dict[str, Any]:
    tensors = layer.tensors
    if (layer.exl2 is not None or layer.gptq is not None) and len(rows) % 8:
        where = f"{layer.name}: " if layer.name else ""
        raise ValueError(f"{where}a part of {len(rows)} rows, expected a multiple of 8, which kernels read at a time")
    if layer.exl2 is not None:
        part = _exl2_rows(tensors, layer.exl2, layer.order, rows)
    elif layer.gptq is not None:
        part = _gptq_rows(tensors, layer.gptq, rows)
    else:
        part = {"weight": _columns(tensors["weight"], _as_range(rows))}
    if tensors.get("bias") is not None and (rows == 0).any():
        part["bias"] = _rows(tensors["bias"], range(layer.n))
    return part


def _exl2_rows(tensors: Mapping[str, Any], layout: Exl2Layout, order: np.ndarray | None, rows: np.ndarray) -> dict[str, Any]:
    stored = np.arange(layout.k) if order is None else order
    input_of = np.full(layout.k + 1, -1, np.int32)  # of the layer's inputs; the last is that of its own padding, -1
    input_of[rows] = np.arange(len(rows), dtype=np.int32)
    input_of_stored = input_of[stored]
    kept_of = [
        np.flatnonzero(input_of_stored[first : first + count] >= 0)
        for first, count in zip(layout.first_row.tolist(), layout.rows.tolist(), strict=True)
    ]
    groups = np.flatnonzero([len(kept) for kept in kept_of])
    bits = layout.bits[groups].astype(np.int64)
    padded = np.array([_padded(len(kept_of[group])) for group in groups])
    words = padded * bits // 32
    starts = np.cumsum(words) - words

    q_weight = np.empty((int(words.sum()), layout.n), tensors["q_weight"].dtype)
    row_input = np.full(int(padded.sum()), -1, np.int32)
    end = 0
    for group, start, count, width, size in zip(groups, starts, words, bits.tolist(), padded, strict=True):
        kept = kept_of[group]
        # A code of 2^(bits - 1) is a weight of 0.
        packed = _repacked(tensors["q_weight"], width, int(layout.first_word[group]), kept, 1 << (width - 1))
        q_weight[start : start + count] = packed.view(q_weight.dtype)
        row_input[end : end + len(kept)] = input_of_stored[int(layout.first_row[group]) + kept]
        end += int(size)

    part = {
        "q_weight": q_weight,
        "q_scale": _rows(tensors["q_scale"], _as_range(groups)),
        "q_scale_max": np.ascontiguousarray(tensors["q_scale_max"][groups]),
        "q_groups": np.stack([bits, starts], axis=1).astype(np.uint16).view(np.int16).reshape(-1),
    }
    if len(row_input) == len(rows):
        part["q_invperm"] = np.empty(len(rows), np.int32)
        part["q_invperm"][row_input] = np.arange(len(rows), dtype=np.int32)
    else:
        part["row_input"] = row_input
    return part


def _gptq_rows(tensors: Mapping[str, Any], layout: GptqLayout, rows: np.ndarray) -> dict[str, Any]:
    groups, row_group = np.unique(layout.row_group[rows], return_inverse=True)
    count, bits = _padded(len(rows)), layout.bits
    inputs = _as_range(rows)
    if isinstance(inputs, range) and inputs.start % _BLOCK == 0 and len(rows) == count:
        qweight = _rows(tensors["qweight"], range(inputs.start * bits // 32, inputs.stop * bits // 32))
    else:
        qweight = np.empty((count * bits // 32, layout.n), tensors["qweight"].dtype)
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            packed = _repacked(tensors["qweight"], bits, 0, rows[begin : begin + _ROWS_AT_ONCE], 0)
            first = begin * bits // 32
            qweight[first : first + len(packed)] = packed.view(qweight.dtype)
    g_idx = np.zeros(count, np.int32)
    g_idx[: len(rows)] = row_group
    used = _as_range(groups)
    part = {
        "qweight": qweight,
        "qzeros": _rows(tensors["qzeros"], used),
        "scales": _rows(tensors["scales"], used),
        "g_idx": g_idx,
    }
    if count > len(rows):
        part["row_input"] = np.where(np.arange(count) < len(rows), np.arange(count), -1).astype(np.int32)
    return part


def _repacked(words: Any, bits: int, first_word: int, rows: np.ndarray, padding: int) -> np.ndarray:
    """Words of some rows of a stream that starts at word `first_word`, filled up with codes `padding` to a multiple of 32."""
    blocks, block_of_row = np.unique(rows // _BLOCK, return_inverse=True)
    word_rows = first_word + bits * blocks[:, None] + np.arange(bits)
    packed = _rows(words, _as_range(word_rows.reshape(-1)))
    position = _BLOCK * block_of_row + rows % _BLOCK
    if len(rows) == _BLOCK * len(blocks) and np.array_equal(position, np.arange(len(rows))):
        return packed
    codes = np.full((_padded(len(rows)), packed.shape[1]), padding, np.uint8)
    codes[: len(rows)] = unpack_rows(packed, bits, _BLOCK * len(blocks))[position]
    return pack_rows(codes, bits)


def _padded(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


def _rows(tensor: Any, rows: range | np.ndarray) -> np.ndarray:
    """Rows of a tensor of one or two dimensions, read in runs of neighbours."""
    if isinstance(rows, range):
        return np.ascontiguousarray(tensor[rows.start : rows.stop])
    result = np.empty((len(rows), *tensor.shape[1:]), tensor.dtype)
    borders = np.flatnonzero(np.diff(rows) != 1) + 1
    for begin, end in zip([0, *borders.tolist()], [*borders.tolist(), len(rows)], strict=True):
        first = int(rows[begin])
        result[begin:end] = tensor[first : first + end - begin]
    return result


def _as_range(numbers: np.ndarray) -> range | np.ndarray:
    """The same numbers, as a range where they are neighbours in order."""
    if len(numbers) and (np.diff(numbers) == 1).all():
        return range(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
