"""Little-endian bit streams in 32-bit words: the packing that EXL2 and GPTQ share.

    value i of a stream   = stream bits [i*bits, (i+1)*bits), least significant bit first
    stream bit t          = bit t % 32 of word t // 32

`*_rows`: one stream runs down each column (q_weight, qweight). `*_cols`: one stream runs along each row (q_scale,
qzeros). Values of 3, 5 and 6 bits straddle word borders. Source: exllamav2 (qdq_*.cuh).
"""

from math import gcd

import numpy as np

WIDTHS = (2, 3, 4, 5, 6, 8)

# Values per pass: temporaries of the loops below stay in the L2 cache of one core.
_PASS_VALUES = 1 << 18


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned integers down the rows: codes [rows, cols] -> int32 [rows*bits//32, cols].

    `codes` is any integer array with 0 <= code < 2**bits; rows*bits must be a multiple of 32. The result holds unsigned
    words in int32, as checkpoints do. ValueError or TypeError names what is wrong. The argument is not changed.

    >>> [f"{int(word) & 0xffffffff:08x}" for word in pack_rows((7 * np.arange(32)[:, None] + 3) % 8, 3)[:, 0]]
    ['53977053', '70539770', '97705397']
    """
    return _pack(codes, bits, axis=0)


def unpack_rows(words: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Inverse of `pack_rows`: words int32 or uint32 [rows*bits//32, cols] -> uint8 [rows, cols]."""
    return _unpack(words, bits, rows, axis=0)


def pack_cols(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned integers along the columns: codes [rows, cols] -> int32 [rows, cols*bits//32].

    Rules as in `pack_rows`, with cols*bits a multiple of 32.
    """
    return _pack(codes, bits, axis=1)


def unpack_cols(words: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """Inverse of `pack_cols`: words int32 or uint32 [rows, cols*bits//32] -> uint8 [rows, cols]."""
    return _unpack(words, bits, cols, axis=1)


def _pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise ValueError(f"codes: shape {codes.shape}, expected 2 dimensions [rows, cols]")
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes: dtype {codes.dtype}, expected integers; round and convert them first")
    values_per_unit, words_per_unit = _unit(bits)
    length = codes.shape[axis]
    _check_length("codes", length, bits, axis)
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(
            f"codes: values {codes.min()} to {codes.max()} do not fit {bits} bits; expected 0 to {(1 << bits) - 1}"
        )
    shape = list(codes.shape)
    shape[axis] = length * bits // 32
    words = np.zeros(shape, np.uint32)
    sources, targets = _lanes(codes, values_per_unit, axis), _lanes(words, words_per_unit, axis)
    for part in _parts(codes.size // values_per_unit, sources.shape[1], values_per_unit):
        source, target = sources[:, part], targets[:, part]
        for i in range(values_per_unit):
            word, shift = divmod(i * bits, 32)
            value = source[i].astype(np.uint32)
            target[word] |= value << np.uint32(shift)
            if shift + bits > 32:
                target[word + 1] |= value >> np.uint32(32 - shift)
    return words.view(np.int32)


def _unpack(words: np.ndarray, bits: int, length: int, axis: int) -> np.ndarray:
    words = np.asarray(words)
    if words.ndim != 2:
        raise ValueError(f"words: shape {words.shape}, expected 2 dimensions")
    if words.dtype not in (np.dtype(np.int32), np.dtype(np.uint32)):
        raise TypeError(f"words: dtype {words.dtype}, expected int32 or uint32")
    values_per_unit, words_per_unit = _unit(bits)
    _check_length("rows" if axis == 0 else "cols", length, bits, axis)
    if words.shape[axis] * 32 != length * bits:
        raise ValueError(
            f"words: shape {words.shape}, expected {length * bits // 32} along axis {axis} for {length} values of {bits} bits"
        )
    shape = list(words.shape)
    shape[axis] = length
    codes = np.empty(shape, np.uint8)
    sources, targets = _lanes(words.view(np.uint32), words_per_unit, axis), _lanes(codes, values_per_unit, axis)
    mask = np.uint32((1 << bits) - 1)
    for part in _parts(codes.size // values_per_unit, sources.shape[1], values_per_unit):
        source, target = sources[:, part], targets[:, part]
        for i in range(values_per_unit):
            word, shift = divmod(i * bits, 32)
            value = source[word] >> np.uint32(shift)
            if shift + bits > 32:
                value |= source[word + 1] << np.uint32(32 - shift)
            target[i] = value & mask
    return codes


def _unit(bits: int) -> tuple[int, int]:
    """(values, words) of the smallest whole number of words that holds a whole number of values."""
    if bits not in WIDTHS:
        raise ValueError(f"bits: {bits!r}, expected one of {', '.join(map(str, WIDTHS))}")
    return 32 // gcd(32, bits), bits // gcd(32, bits)


def _check_length(argument: str, length: int, bits: int, axis: int) -> None:
    if length < 0 or length * bits % 32:
        what = "rows" if axis == 0 else "cols"
        raise ValueError(f"{argument}: {length} {what} of {bits} bits do not fill whole 32-bit words; pad {what} first")


def _lanes(array: np.ndarray, per_unit: int, axis: int) -> np.ndarray:
    """View of a contiguous [rows, cols] array as [per_unit, ...]: lane i holds the i-th member of every unit.

    Axis 1 is the first axis of the array (units of rows, or rows), so that slices of it are runs of memory.
    """
    rows, cols = array.shape
    if axis == 0:
        return array.reshape(rows // per_unit, per_unit, cols).transpose(1, 0, 2)
    return array.reshape(rows, cols // per_unit, per_unit).transpose(2, 0, 1)


def _parts(units: int, first_axis: int, values_per_unit: int) -> list[slice]:
    """Slices of the first axis with about _PASS_VALUES / values_per_unit units each."""
    if units == 0:
        return []
    step = max(1, _PASS_VALUES // values_per_unit * first_axis // units)
    return [slice(start, start + step) for start in range(0, first_axis, step)]
