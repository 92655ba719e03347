"""GPTQ linear layers of 2, 3, 4 or 8 bits, with groups of any size and in any order.

    W[k, n] = RN16((q[k, n] - zero[g, n]) * scale[g, n])          g = row_group[k]

| tensor  | dtype         | shape        | meaning                                                            |
|---------|---------------|--------------|--------------------------------------------------------------------|
| qweight | I32           | [K*b/32, N]  | codes q, one little-endian bit stream down each column (`bits.py`)  |
| qzeros  | I32           | [G, N*b/32]  | stored zeros, one little-endian bit stream along each row           |
| scales  | F16, F32, BF16| [G, N]       | rounded to fp16 on reading                                          |
| g_idx   | I32           | [K]          | optional: group of each row. All zero with G > 1 means absent       |
| bias    | as scales     | [N]          | optional                                                           |

A part of a layer (`tp/split.py`) whose inputs are no multiple of 32 has rows of padding at the end of qweight. It then comes
with row_input, I32 [rows of qweight], which no checkpoint has: 0 to K - 1 and then -1. K does not count the padding.

Zeros come in conventions that the tensors do not tell apart ("checkpoint_format": "gptq_v2" in config.json does):
v1 stores zero - 1, v2 stores zero. A v1 zero is stored + 1 without wrapping, so 1 to 2^b. LoRAX and its Triton kernel
read v1 files with 2^b wrapped to 0, here "v1-wrapped": it differs for a stored 2^b - 1 only. RN16 rounds to the nearest
fp16, ties to even.
Source: exllamav2 0.3.2 (q_matrix.cu, ext.py) for 4 bits; AutoGPTQ (qlinear) for the other widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupyq.errors import FormatError
from cupyq.formats._tensors import check_input_count, check_tensor, frozen, host_values, label
from cupyq.formats.bits import pack_cols, pack_rows, unpack_cols, unpack_rows

GPTQ_WIDTHS = (2, 3, 4, 8)

_WORD_DTYPES = (np.int32, np.uint32)
_FLOAT_DTYPES = (np.float16, np.float32, ml_dtypes.bfloat16)


@dataclass(frozen=True, eq=False)
class GptqLayout:
    """Sizes and groups of one layer. The arrays are int32 and read-only."""

    k: int  # inputs: the rows of qweight, those of padding left out
    n: int
    bits: int
    group_count: int
    row_group: np.ndarray  # [K], group of each original row
    group_rows: np.ndarray  # [G], rows of each group; 0 where a group is unused
    perm: np.ndarray | None  # [K], stable sort by group: stored row j is original row perm[j]; None if already sorted


def validate_gptq(
    tensors: Mapping[str, Any],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    zeros: str = "v1",
    name: str = "",
) -> GptqLayout:
    """Check the tensors of a layer; returns its layout.

    Bits follow from the shapes; `bits`, if given, must agree. Rows belong to groups by g_idx where it counts, else
    row k to group k // group_size. Without group_size: K if G = 1, K / G if that is whole, else the smallest power of
    two with group_size * G >= K. group_size -1 means K. g_idx outranks group_size. Of all tensors but g_idx and row_input
    (NumPy arrays) only `.shape` and `.dtype` are read, so they may be on a GPU. None counts as absent; other names are
    ignored. K, padding included, must be a multiple of 32. FormatError names the tensor, prefixed by `name`; ValueError
    names an argument.
    """
    _check_convention("zeros", zeros)
    qweight = check_tensor(tensors, "qweight", name, _WORD_DTYPES, (None, None), "[K * bits / 32, N]")
    words, n = map(int, qweight.shape)
    qzeros = check_tensor(tensors, "qzeros", name, _WORD_DTYPES, (None, None), "[groups, N * bits / 32]")
    group_count, zero_words = map(int, qzeros.shape)
    if zero_words * 32 % n or zero_words * 32 // n not in GPTQ_WIDTHS:
        raise FormatError(
            f"{label(name, 'qzeros')}: {zero_words} words for {n} columns of qweight, expected columns * bits / 32 "
            "with bits 2, 3, 4 or 8"
        )
    found_bits = zero_words * 32 // n
    if bits is not None and bits != found_bits:
        raise FormatError(f"{label(name, 'qzeros')}: the shapes say {found_bits} bits, but bits={bits!r} was asked for")
    if words % found_bits:
        raise FormatError(
            f"{label(name, 'qweight')}: {words} rows of words, expected a multiple of {found_bits} "
            f"({found_bits} bits, K a multiple of 32)"
        )
    k = words * 32 // found_bits
    check_tensor(tensors, "scales", name, _FLOAT_DTYPES, (group_count, n), "[rows of qzeros, columns of qweight]")
    if tensors.get("bias") is not None:
        check_tensor(tensors, "bias", name, _FLOAT_DTYPES, (n,), "[columns of qweight]")

    row_group = _read_g_idx(tensors, name, k, group_count)
    if tensors.get("row_input") is not None:
        k = _count_inputs(tensors, name, k)
        row_group = None if row_group is None else row_group[:k]
    if row_group is None:
        size = _resolve_group_size(group_size, k, group_count, name)
        row_group = np.arange(k, dtype=np.int32) // np.int32(size)
    perm = None
    if (np.diff(row_group) < 0).any():
        # NumPy sorts 16-bit integers by radix, in a fifth of the time.
        keys = row_group.astype(np.uint16) if group_count <= 1 << 16 else row_group
        perm = frozen(np.argsort(keys, kind="stable").astype(np.int32))
    group_rows = np.bincount(row_group, minlength=group_count).astype(np.int32)
    return GptqLayout(k, n, found_bits, group_count, frozen(row_group), frozen(group_rows), perm)


def _count_inputs(tensors: Mapping[str, Any], name: str, rows: int) -> int:
    tensor = check_tensor(tensors, "row_input", name, (np.int32,), (rows,), "[rows packed in qweight]")
    values = host_values(tensor, "row_input", name)
    k = int((values != -1).sum())
    check_input_count(k, name)
    if not np.array_equal(values[:k], np.arange(k)):
        raise FormatError(f"{label(name, 'row_input')}: not 0, 1, ... and then -1 for padding; split the layer again")
    return k


def _read_g_idx(tensors: Mapping[str, Any], name: str, k: int, group_count: int) -> np.ndarray | None:
    """int32 [K], or None where there is no g_idx or it carries nothing (all zero with several groups)."""
    if tensors.get("g_idx") is None:
        return None
    tensor = check_tensor(tensors, "g_idx", name, (np.int32, np.uint32, np.int64), (k,), "[rows packed in qweight]")
    values = host_values(tensor, "g_idx", name)
    outside = (values < 0) | (values >= group_count)
    if outside.any():
        row = int(np.argmax(outside))
        raise FormatError(
            f"{label(name, 'g_idx')}: row {row} is in group {values[row]}, expected 0 to {group_count - 1}, the rows of qzeros"
        )
    if group_count > 1 and not values.any():
        return None
    return values.astype(np.int32)


def _resolve_group_size(group_size: int | None, k: int, group_count: int, name: str) -> int:
    given = group_size is not None
    if group_size is None:
        group_size = infer_group_size(k, group_count)
    elif group_size == -1:
        group_size = k
    elif group_size <= 0:
        raise ValueError(f"group_size: {group_size}, expected a positive number, -1 for one group, or None")
    needed = -(-k // group_size)
    if needed != group_count:
        advice = "pass the group_size of the checkpoint's config" if not given else "leave group_size out to infer it"
        raise FormatError(
            f"{label(name, 'qzeros')}: {group_count} groups, but {k} rows in groups of {group_size} make {needed}; {advice}"
        )
    return group_size


def infer_group_size(k: int, group_count: int) -> int:
    """Rows per group when neither g_idx nor a config tells: K / G if whole, else the next power of two above it."""
    if k % group_count == 0:
        return k // group_count
    return 1 << (-(-k // group_count) - 1).bit_length()


def gptq_scales(scales: np.ndarray, name: str = "") -> np.ndarray:
    """Scales as float16 [G, N], one rounding. FormatError where a finite scale is too large for fp16."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
    if scales.dtype != np.float16:
        lost = np.isinf(rounded) & np.isfinite(scales.astype(np.float32))
        if lost.any():
            group, column = np.argwhere(lost)[0].tolist()
            raise FormatError(
                f"{label(name, 'scales')}: {float(scales[group, column]):g} of group {group}, column {column} "
                "is above the fp16 maximum 65504"
            )
    return rounded


def unpack_gptq(tensors: Mapping[str, np.ndarray], layout: GptqLayout, *, zeros: str = "v1") -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [K, N] in original row order, true zeros int16 [G, N] as `zero_rule` says)."""
    offset, mask = zero_rule(zeros, layout.bits)
    rows = tensors["qweight"].shape[0] * 32 // layout.bits
    codes = unpack_rows(tensors["qweight"], layout.bits, rows)[: layout.k]
    stored = unpack_cols(tensors["qzeros"], layout.bits, layout.n).astype(np.int16)
    return codes, (stored + np.int16(offset)) & np.int16(mask)


def zero_rule(zeros: str, bits: int) -> tuple[int, int]:
    """(offset, mask) of a convention: the zero point is (stored + offset) & mask."""
    _check_convention("zeros", zeros)
    wrapped = (1 << bits) - 1
    return {"v1": (1, 2 * wrapped + 1), "v2": (0, wrapped), "v1-wrapped": (1, wrapped)}[zeros]


def dequantize_gptq(
    tensors: Mapping[str, np.ndarray],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    zeros: str = "v1",
    name: str = "",
) -> np.ndarray:
    """Weights W, float16 [K, N], rows in original order. Formula at the top; arguments as in `validate_gptq`."""
    layout = validate_gptq(tensors, bits=bits, group_size=group_size, zeros=zeros, name=name)
    codes, true_zeros = unpack_gptq(tensors, layout, zeros=zeros)
    scale = gptq_scales(tensors["scales"], name).astype(np.float32)
    zero = true_zeros.astype(np.float32)
    weights = np.empty((layout.k, layout.n), np.float16)
    for start in range(0, layout.k, 128):  # bounds the float32 temporaries
        rows = slice(start, start + 128)
        group = layout.row_group[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            # 9 significant bits times 11 are exact in float32, so the assignment is the only rounding.
            weights[rows] = (codes[rows] - zero[group]) * scale[group]
    return weights


def pack_gptq(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    row_group: np.ndarray | None,
    bits: int,
    version: str = "v1",
) -> dict[str, np.ndarray]:
    """Tensors of a layer as a checkpoint has them: qweight, qzeros, scales, and g_idx unless row_group is None.

    codes [K, N] integers in original row order, 0 to 2^bits - 1; zeros [G, N] true zero points, 1 to 2^bits for v1,
    0 to 2^bits - 1 for the other conventions; scales [G, N] float16, float32 or bfloat16, copied as they are; row_group [K]
    integers. ValueError, TypeError or FormatError says what does not fit. No argument is changed.
    """
    _check_convention("version", version)
    if bits not in GPTQ_WIDTHS:
        raise ValueError(f"bits: {bits!r}, expected 2, 3, 4 or 8")
    zeros = np.asarray(zeros)
    if zeros.dtype.kind not in "iu":
        raise TypeError(f"zeros: dtype {zeros.dtype}, expected integers; round and convert them first")
    lowest = 1 if version == "v1" else 0
    if zeros.size and (zeros.min() < lowest or zeros.max() >= lowest + (1 << bits)):
        raise ValueError(
            f"zeros: values {zeros.min()} to {zeros.max()}, expected {lowest} to {lowest + (1 << bits) - 1} "
            f"for {bits} bits in convention {version}"
        )
    tensors = {
        "qweight": pack_rows(codes, bits),
        "qzeros": pack_cols((zeros.astype(np.int32) - zero_rule(version, bits)[0]) & (1 << bits) - 1, bits),
        "scales": np.array(scales),
    }
    if row_group is not None:
        tensors["g_idx"] = np.asarray(row_group).astype(np.int32)
    # Without g_idx any group size that fits the counts is legal, which the reader is told or infers: check shapes only.
    checked = dict(tensors)
    checked.setdefault("g_idx", np.minimum(np.arange(np.shape(codes)[0]), len(zeros) - 1).astype(np.int32))
    validate_gptq(checked, bits=bits, zeros=version)
    return tensors


def _check_convention(argument: str, value: str) -> None:
    if value not in ("v1", "v2", "v1-wrapped"):
        raise ValueError(
            f"{argument}: {value!r}, expected 'v1' (zero - 1 is stored), 'v2' (zero is stored) or 'v1-wrapped' (modulo 2^bits)"
        )
