"""EXL2 linear layers: K x N weights of mixed width, stored in groups of rows.

    scale[g, n]     = RN16((s[g, n] + 1)^2 * RN16(q_scale_max[g] * prescale / 256))       s: 4-bit codes in q_scale
    W[perm[j], n]   = RN16((q[j, n] - 2^(bits[g] - 1)) * scale[g, n])                     g: group of stored row j

A *stored row* is a row of the packed matrix, an *original row* an input feature of the model; perm maps stored to
original. RN16 rounds to the nearest fp16, ties to even. Effective bits per weight: see `exl2_size_bits`.

| tensor      | dtype | shape    | meaning                                                                 |
|-------------|-------|----------|-------------------------------------------------------------------------|
| q_weight    | I32   | [R, N]   | codes q, one little-endian bit stream down each column (`bits.py`)       |
| q_scale     | I32   | [G, N/8] | 4-bit codes s, column n in bits 4*(n%8).. of word n//8                    |
| q_scale_max | F16   | [G]      | not yet divided by 256                                                   |
| q_groups    | I16   | [2G]     | pairs (bits, first row of q_weight), read as unsigned                     |
| q_invperm   | I32   | [K]      | original row -> stored row; q_perm, its inverse, may stand in its place   |
| bias        | F16   | [N]      | optional                                                                 |
| row_input   | I32   | [rows]   | never in a checkpoint: in place of q_invperm where rows are padding       |

A part of a layer (`tp/split.py`) may keep a few rows of a group, and its groups are filled up to multiples of 32: row_input
is the input of each stored row, -1 for a row that has none. K then counts the others.

Source: exllamav2 0.3.2 (q_matrix.cu, ext.py, adaptivegptq.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupyq.errors import FormatError
from cupyq.formats._tensors import check_input_count, check_tensor, frozen, host_values, label
from cupyq.formats.bits import WIDTHS, pack_cols, pack_rows, unpack_cols, unpack_rows

MAX_ROWS = 65536  # the permutation is unsigned 16-bit wherever it is used

_WORD_DTYPES = (np.int32, np.uint32)
_PERM_DTYPES = (np.int16, np.uint16, np.int32, np.uint32)
_IS_WIDTH = np.isin(np.arange(max(WIDTHS) + 2), WIDTHS)


@dataclass(frozen=True)
class Exl2Segment:
    """A run of neighbouring groups of one width; its rows form one unbroken bit stream per column."""

    bits: int
    first_row: int  # first stored row
    rows: int
    first_word: int  # first row of q_weight

    @property
    def words(self) -> int:
        return self.rows * self.bits // 32


@dataclass(frozen=True, eq=False)
class Exl2Layout:
    """Sizes and groups of one layer. The arrays are int32 [G] and read-only."""

    k: int  # inputs: the stored rows, those of padding left out
    n: int
    bits: np.ndarray
    rows: np.ndarray
    first_row: np.ndarray  # first stored row of each group
    first_word: np.ndarray  # first row of q_weight of each group
    segments: tuple[Exl2Segment, ...]

    @property
    def group_count(self) -> int:
        return len(self.bits)

    @property
    def stored_rows(self) -> int:
        return int(self.first_row[-1]) + int(self.rows[-1])


def exl2_layout(q_groups: np.ndarray, q_weight_rows: int, n: int, name: str = "") -> Exl2Layout:
    """Layout from the group table, int16 [2G] on the host, and the shape [q_weight_rows, n] of q_weight.

    FormatError unless G >= 1, every width is 2, 3, 4, 5, 6 or 8, widths never increase (kernels decode the widths in
    that fixed order), first rows start at 0 and strictly increase within q_weight, every group has a multiple of 32
    rows, and K <= 65536.
    """
    where = label(name, "q_groups")
    table = np.asarray(q_groups)
    if table.ndim != 1 or table.size == 0 or table.size % 2 or table.dtype not in (np.int16, np.uint16):
        raise FormatError(f"{where}: {table.dtype} {list(table.shape)}, expected int16 [2 * groups], groups above 0")
    table = table.view(np.uint16)
    bits, first_word = table[0::2].astype(np.int64), table[1::2].astype(np.int64)

    def refuse(bad: np.ndarray, what: str, values: np.ndarray, expected: str) -> None:
        if bad.any():
            group = int(np.argmax(bad))
            raise FormatError(f"{where}: group {group} has {what} {values[group]}, expected {expected}")

    # Slices, not np.diff and np.isin: a model has hundreds of layers, and these take five times as long on such short tables.
    refuse(~_IS_WIDTH[np.minimum(bits, len(_IS_WIDTH) - 1)], "bit width", bits, "2, 3, 4, 5, 6 or 8")
    previous = bits[np.maximum(np.arange(len(bits)) - 1, 0)]
    refuse(bits > previous, "bit width", bits, "widths that never increase; convert the model again")
    if first_word[0] != 0:
        raise FormatError(f"{where}: group 0 starts at row {first_word[0]} of q_weight, expected 0")
    words = np.append(first_word[1:], q_weight_rows) - first_word
    refuse(words <= 0, "a q_weight row count of", words, f"first rows that rise and stay below {q_weight_rows}")
    refuse(words % bits != 0, "a q_weight row count of", words, "a multiple of its bit width, as 32 rows make a block")
    rows = words * 32 // bits
    end_row = np.cumsum(rows)
    k = int(end_row[-1])
    if k > MAX_ROWS:
        raise FormatError(f"{where}: the groups hold {k} rows, expected at most {MAX_ROWS}, a 16-bit permutation")
    first_row = end_row - rows

    starts = [0, *np.flatnonzero(bits != previous).tolist(), len(bits)]
    segments = tuple(
        Exl2Segment(int(bits[a]), int(first_row[a]), int(end_row[b - 1] - first_row[a]), int(first_word[a]))
        for a, b in zip(starts, starts[1:], strict=False)
    )
    bits, rows, first_row, first_word = (frozen(a.astype(np.int32)) for a in (bits, rows, first_row, first_word))
    return Exl2Layout(k, int(n), bits, rows, first_row, first_word, segments)


def validate_exl2(tensors: Mapping[str, Any], name: str = "") -> tuple[Exl2Layout, np.ndarray | None]:
    """Check the tensors of a layer; returns its layout and perm.

    perm is int32 [stored rows], stored row -> original row, -1 for padding, or None for the identity. Of q_weight,
    q_scale, q_scale_max and bias only `.shape` and `.dtype` are read, so they may be on a GPU; q_groups, q_invperm, q_perm
    and row_input are NumPy arrays. q_invperm and q_perm may both be absent (identity), and must agree where both are given;
    row_input takes the place of both. 16-bit permutations are read as unsigned. None counts as absent; other names are
    ignored. FormatError names the tensor, prefixed by `name`.
    """
    q_weight = check_tensor(tensors, "q_weight", name, _WORD_DTYPES, (None, None), "[R, N]")
    q_weight_rows, n = map(int, q_weight.shape)
    if n % 8:
        raise FormatError(f"{label(name, 'q_weight')}: {n} columns, expected a multiple of 8 (q_scale words hold 8)")
    q_groups = check_tensor(tensors, "q_groups", name, (np.int16, np.uint16), (None,), "[2 * groups]")
    layout = exl2_layout(host_values(q_groups, "q_groups", name), q_weight_rows, n, name)
    groups = layout.group_count
    check_tensor(tensors, "q_scale", name, _WORD_DTYPES, (groups, n // 8), "[groups in q_groups, q_weight columns / 8]")
    check_tensor(tensors, "q_scale_max", name, (np.float16,), (groups,), "[groups in q_groups]")
    if tensors.get("bias") is not None:
        check_tensor(tensors, "bias", name, (np.float16,), (n,), "[columns of q_weight]")

    if tensors.get("row_input") is not None:
        row_input = _row_input(tensors, name, layout.k)
        return replace(layout, k=int((row_input >= 0).sum())), row_input

    perm = inverse = None
    if tensors.get("q_invperm") is not None:
        inverse = _permutation(tensors, "q_invperm", name, layout.k)
        perm = np.empty_like(inverse)
        perm[inverse] = np.arange(layout.k, dtype=np.int32)
    if tensors.get("q_perm") is not None:
        given = _permutation(tensors, "q_perm", name, layout.k)
        if perm is not None and not np.array_equal(perm, given):
            raise FormatError(
                f"{label(name, 'q_perm')}: not the inverse of q_invperm, first at row {int(np.argmax(perm != given))}; "
                "pass one of the two"
            )
        perm = given
    if perm is None or np.array_equal(perm, np.arange(layout.k)):
        return layout, None
    return layout, frozen(perm)


def _row_input(tensors: Mapping[str, Any], name: str, stored_rows: int) -> np.ndarray:
    for other in ("q_invperm", "q_perm"):
        if tensors.get(other) is not None:
            raise FormatError(f"{label(name, 'row_input')}: given beside {other}, whose place it takes; pass one of the two")
    tensor = check_tensor(tensors, "row_input", name, (np.int32,), (stored_rows,), "[rows in q_groups]")
    values = host_values(tensor, "row_input", name)
    inputs = values[values != -1]
    check_input_count(inputs.size, name)
    if not np.array_equal(np.sort(inputs), np.arange(inputs.size)):
        raise FormatError(
            f"{label(name, 'row_input')}: expected each input from 0 on once, and -1 for padding; split the layer again"
        )
    return frozen(values.copy())


def _permutation(tensors: Mapping[str, Any], short: str, name: str, k: int) -> np.ndarray:
    tensor = check_tensor(tensors, short, name, _PERM_DTYPES, (k,), "[rows in q_groups]")
    values = host_values(tensor, short, name)
    if values.dtype == np.int16:
        values = values.view(np.uint16)
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() >= k:
        row = int(np.argmax((values < 0) | (values >= k)))
        raise FormatError(f"{label(name, short)}: entry {row} is {values[row]}, expected 0 to {k - 1}")
    counts = np.bincount(values, minlength=k)
    if (counts != 1).any():
        raise FormatError(
            f"{label(name, short)}: not a permutation, {int(np.argmax(counts == 0))} does not occur; convert the model again"
        )
    return values.astype(np.int32)


def group_map(layout: Exl2Layout) -> np.ndarray:
    """int16 [2K]: for stored row j of group g, map[2j] = g and map[2j+1] = rows left in the group, counting row j.

    Both are unsigned 16-bit numbers in int16 (a lone group of 65536 rows starts at 0). Source: exllamav2
    (ext_qmatrix.cpp, make_group_map).
    """
    group = np.repeat(np.arange(layout.group_count), layout.rows)
    end = (layout.first_row + layout.rows)[group]
    return np.stack([group, end - np.arange(layout.stored_rows)], axis=1).astype(np.uint16).view(np.int16).reshape(-1)


def exl2_scales(q_scale: np.ndarray, q_scale_max: np.ndarray, prescale: float = 1.0) -> np.ndarray:
    """Scales, float16 [G, N]: RN16((s + 1)^2 * RN16(q_scale_max * (prescale / 256))).

    q_scale int32 [G, N/8], q_scale_max float16 [G] as in the checkpoint. prescale / 256 is one float64 number; each
    RN16 is one rounding of the exact product, subnormals included. Neither argument is changed.
    """
    codes = unpack_cols(q_scale, 4, q_scale.shape[1] * 8)
    factor = np.square(codes + np.float32(1))
    group_max = scale_base(q_scale_max, prescale)
    with np.errstate(over="ignore", invalid="ignore"):
        # 8 significant bits times 11 are exact in float32, so the conversion is the only rounding.
        return (factor * group_max.astype(np.float32)[:, None]).astype(np.float16)


def scale_base(q_scale_max: np.ndarray, prescale: float = 1.0) -> np.ndarray:
    """The factor of a group's scales, float16 [G]: RN16(q_scale_max * (prescale / 256)). Inf and NaN travel on."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (q_scale_max.astype(np.float64) * (float(prescale) / 256)).astype(np.float16)


def unpack_exl2(q_weight: np.ndarray, layout: Exl2Layout) -> np.ndarray:
    """Codes q, uint8 [stored rows, N], in stored order."""
    codes = np.empty((layout.stored_rows, layout.n), np.uint8)
    for segment in layout.segments:
        words = q_weight[segment.first_word : segment.first_word + segment.words]
        codes[segment.first_row : segment.first_row + segment.rows] = unpack_rows(words, segment.bits, segment.rows)
    return codes


def dequantize_exl2(tensors: Mapping[str, np.ndarray], prescale: float = 1.0, name: str = "") -> np.ndarray:
    """Weights W, float16 [K, N], rows in original order, bit for bit as exllamav2 reconstructs them.

    The formula is at the top of this file; checks are those of `validate_exl2`. The bias is not part of W.
    """
    layout, perm = validate_exl2(tensors, name)
    scales = exl2_scales(tensors["q_scale"], tensors["q_scale_max"], prescale)
    codes = unpack_exl2(tensors["q_weight"], layout)
    has_padding = layout.stored_rows > layout.k  # whose index, -1, is then that of one more row
    weights = np.empty((layout.k + has_padding, layout.n), np.float16)
    for group in range(layout.group_count):
        first, rows = int(layout.first_row[group]), int(layout.rows[group])
        zero = np.float32(1 << (int(layout.bits[group]) - 1))
        scale = scales[group].astype(np.float32)
        for start in range(first, first + rows, 128):  # bounds the float32 temporaries
            stored = slice(start, min(start + 128, first + rows))
            with np.errstate(over="ignore", invalid="ignore"):
                # 8 significant bits times 11 are exact in float32, so the assignment is the only rounding.
                values = ((codes[stored] - zero) * scale).astype(np.float16)
            weights[stored if perm is None else perm[stored]] = values
    return weights[: layout.k]


def pack_exl2(
    codes: np.ndarray,
    scale_codes: np.ndarray,
    scale_max: np.ndarray,
    group_bits: Sequence[int] | np.ndarray,
    group_rows: Sequence[int] | np.ndarray,
    perm: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Tensors of a layer as a checkpoint has them: q_weight, q_scale, q_scale_max, q_groups, q_invperm.

    codes [K, N] integers in stored order, each within its group's width; scale_codes [G, N] in 0..15; scale_max
    float16 [G], not divided by 256; group_bits, group_rows [G]; perm [K] stored -> original (None: identity).
    ValueError, TypeError or FormatError says what does not fit. No argument is changed.
    """
    codes, scale_codes, scale_max = np.asarray(codes), np.asarray(scale_codes), np.asarray(scale_max)
    bits, rows = np.asarray(group_bits, np.int64), np.asarray(group_rows, np.int64)
    if bits.ndim != 1 or bits.shape != rows.shape or bits.size == 0:
        raise ValueError(f"group_bits, group_rows: shapes {bits.shape} and {rows.shape}, expected the same [groups]")
    if codes.ndim != 2 or rows.sum() != codes.shape[0]:
        raise ValueError(f"codes: shape {codes.shape}, expected [{rows.sum()}, N], the sum of group_rows")
    if (rows <= 0).any() or (rows % 32).any() or codes.shape[0] > MAX_ROWS:
        raise ValueError(f"group_rows: {rows.tolist()[:8]}, expected multiples of 32 with a sum of at most {MAX_ROWS}")
    if scale_max.dtype != np.float16:
        raise TypeError(f"scale_max: dtype {scale_max.dtype}, expected float16; quantise against the rounded value")
    words = rows * bits // 32
    table = np.stack([bits, np.cumsum(words) - words], axis=1).astype(np.uint16).view(np.int16).reshape(-1)
    layout = exl2_layout(table, int(words.sum()), codes.shape[1])
    parts = [pack_rows(codes[s.first_row : s.first_row + s.rows], s.bits) for s in layout.segments]
    inverse = np.arange(layout.k, dtype=np.int32)
    if perm is not None:
        perm = _permutation({"perm": np.asarray(perm).astype(np.int32)}, "perm", "", layout.k)
        inverse[perm] = np.arange(layout.k, dtype=np.int32)
    tensors = {
        "q_weight": np.concatenate(parts),
        "q_scale": pack_cols(scale_codes, 4),
        "q_scale_max": scale_max.copy(),
        "q_groups": table,
        "q_invperm": inverse,
    }
    validate_exl2(tensors)
    return tensors


def exl2_size_bits(layout: Exl2Layout, has_bias: bool = False) -> int:
    """Bits of a layer as the EXL2 optimiser counts them: sum(rows*N*bits) + (16 + 32 + 4*N) * G + 32*K (+ 16*N).

    K counts inputs, rows the stored ones. Divide by K*N for bits per weight.
    """
    codes = sum(segment.rows * segment.bits for segment in layout.segments) * layout.n
    return codes + (16 + 32 + 4 * layout.n) * layout.group_count + 32 * layout.k + (16 * layout.n if has_bias else 0)
