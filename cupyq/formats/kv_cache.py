"""Keys and values of a cache in 8 or 4 bits: the bytes of exllamav2's FP8, Q4, Q6 and Q8 caches, and a scaled float8.

A tensor is float16 [batch, seq, kv_heads, head_dim] (paged: [pages, page_size, kv_heads, head_dim]) and is stored flat:
e below counts its values in C order.

    kind   codes, uint8                                             scales, float16    bits a value
    fp8    byte e = upper byte of value e                           none               8
    e4m3   byte e = code of value e                                 [e // head_dim]    8 + 16 / head_dim
    q8     byte e = code of value e                                 [e // 32]          8.5
    q4     nibble e % 2 (0 = low) of byte e // 2 = code of value e  [e // 32]          4.5

exllamav2's Q6 cache is q8 for keys and q4 for values.

fp8 cuts float16 to its sign, 5 exponent bits and upper 2 of 10 mantissa bits: toward zero, no scale, nothing saturates. Inf
stays Inf; a NaN whose upper 2 mantissa bits are 0 comes back as Inf.

e4m3 keeps one scale for the head_dim values of a token's head, and each value as a float8 (sign, 4 bits of exponent, 3 of
mantissa, largest 448):

    encode  a = max |x|    no rounding
            scale = a / 448 rounded to float16, then at least 2^-14 (no subnormals: they have few digits) and at most 146.125
                           (the next is 146.25, and 448 times that is beyond float16); 0 where a is 0
            code  = x / scale rounded to float32, then to the nearest float8, ties to even, saturating at 448
    decode  x = code * scale, rounded once to float16

Where a is 0 the codes are 0. An Inf or NaN makes the scale NaN (0x7fff) and the head's codes 0x7f: the whole head is NaN.

q4 (L = 8) and q8 (L = 128) work on chunks of 64 values, e // 64. Every step below is one rounding to float16:

    encode  t = H x      the chunk's 32 even values and its 32 odd values apart, each by the 32-point Sylvester-Hadamard
                         matrix H[r, c] = (-1)^popcount(r & c): five stages of butterflies, strides 1, 2, 4, 8, 16,
                             t[i], t[i + stride] = t[i] + t[i + stride], t[i] - t[i + stride]    for i without that bit
                         entry r of the even vector is then value 2 r of the chunk, of the odd vector 2 r + 1
            a = max |t|  over each 32 values in a row, e // 32; no rounding
            scale        = a / L                                        L is 8 for q4; for q8 it is 128
            code         = min(rint((t / a) * L + L), 2 L - 1)          t / a is rounded, then (...) * L + L once
    decode  t = (code - L) * scale
            x = (H t) / 32                                              the five stages again, then one multiplication

Where a is 0 the codes are 0, as of any t / a that is NaN, and decode to 0. A NaN in t makes the
scale NaN and so all 32 values (exllamav2 leaves NaN out of the maximum, which hides it); NaN is stored and returned as
0x7fff, CUDA's own. t may grow to 32 times the largest value: magnitudes from 2048 on may overflow to Inf, as in exllamav2.

Source: exllamav2 (cache.cu), and its recorded outputs, which this reproduces to the bit; e4m3 is the FP8 of arXiv 2209.05433.
"""

import math

import ml_dtypes
import numpy as np

KINDS = ("fp8", "q4", "q8", "e4m3")

CHUNK = 64
"""Values that are encoded together."""

GROUP = 32
"""Values that share a scale."""

LARGEST_E4M3 = 448.0
"""The largest float8 of kind e4m3."""

LEAST_SCALE, MOST_SCALE = 2.0**-14, 146.125
"""Bounds of the scales of kind e4m3, but for 0."""

_LEVELS = {"q4": 8, "q8": 128}
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_NAN = 0x7F
_NAN = np.array(0x7FFF, np.uint16).view(np.float16)

# Values per pass: temporaries stay in the L2 cache of one core.
_PASS_VALUES = 1 << 17


def code_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Shape of the codes of a tensor of that shape.

    >>> code_shape((1, 256, 8, 128), "q4"), scale_shape((1, 256, 8, 128), "q4")
    ((1, 256, 8, 64), (1, 256, 8, 4))
    """
    _check_kind(kind)
    return (*shape[:-1], shape[-1] // 2) if kind == "q4" else tuple(shape)


def scale_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...] | None:
    """Shape of the scales of a tensor of that shape; None for fp8, which has none."""
    _check_kind(kind)
    if kind == "e4m3":
        return (*shape[:-1], 1)
    return None if kind == "fp8" else (*shape[:-1], shape[-1] // GROUP)


def encode(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and scales of float16 values, both flat: uint8 [n or n/2], float16 [n/32] or None for fp8.

    x may have any shape; for q4 and q8 its n values must fill whole chunks of 64. For e4m3 its last dimension is head_dim, and
    the scales are [n / head_dim]. ValueError or TypeError says what is wrong. The argument is not changed.

    >>> x = ((37 * np.arange(64) % 101 - 50) / 16).astype(np.float16)
    >>> codes, scales = encode(x, "q4")
    >>> codes[:8].tobytes().hex(" "), scales.view(np.uint16)[0] == 0x4250
    ('79 97 9b 0e a4 86 8a 86', np.True_)
    """
    _check_kind(kind)
    if x.dtype != np.float16:
        raise TypeError(f"x: dtype {x.dtype}, expected float16; convert it first")
    x = np.ascontiguousarray(x)
    if kind == "e4m3":
        return _encode_e4m3(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    x = x.reshape(-1)
    if kind == "fp8":
        return (x.view(np.uint16) >> 8).astype(np.uint8), None
    if x.size % CHUNK:
        raise ValueError(f"x: {x.size} values, expected a multiple of {CHUNK}; pad x first")
    codes = np.empty(code_shape(x.shape, kind), np.uint8)
    scales = np.empty(x.size // GROUP, np.float16)
    values_per_byte = x.size // codes.size if x.size else 1
    for start in range(0, x.size, _PASS_VALUES):
        end = min(start + _PASS_VALUES, x.size)
        bytes_ = slice(start // values_per_byte, end // values_per_byte)
        codes[bytes_], scales[start // GROUP : end // GROUP] = _encode_part(x[start:end], kind)
    return codes, scales


@np.errstate(divide="ignore", invalid="ignore")
def _encode_e4m3(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = np.empty(x.shape, np.uint8), np.zeros((len(x), 1), np.float16)
    step = max(1, _PASS_VALUES // max(1, x.shape[1]))
    for start in range(0, len(x) if x.size else 0, step):
        part = x[start : start + step].astype(np.float32)
        largest = np.max(np.abs(part), axis=1, keepdims=True)
        scale = (largest / np.float32(LARGEST_E4M3)).astype(np.float16)
        scale = np.clip(scale, np.float16(LEAST_SCALE), np.float16(MOST_SCALE))
        scale = np.where(largest == 0, np.float16(0), np.where(np.isfinite(largest), scale, _NAN))
        quotients = np.clip(part / scale.astype(np.float32), np.float32(-LARGEST_E4M3), np.float32(LARGEST_E4M3))
        codes[start : start + step] = np.where(
            scale > 0, quotients.astype(_E4M3).view(np.uint8), np.where(scale == 0, np.uint8(0), np.uint8(_E4M3_NAN))
        )
        scales[start : start + step] = scale
    return codes.reshape(-1), scales.reshape(-1)


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def _encode_part(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    levels = np.float32(_LEVELS[kind])
    t = _hadamard(x.astype(np.float32)).reshape(-1, GROUP)
    largest = np.max(np.abs(t), axis=1, keepdims=True)
    # float32 carries more than twice float16's digits, so rounding its quotients and sums again gives the nearest float16.
    placed = _round(_round(t / largest) * levels + levels)
    codes = np.nan_to_num(np.minimum(np.rint(placed), 2 * levels - 1), nan=0.0).astype(np.uint8).reshape(-1)
    if kind == "q4":
        codes = codes[::2] | codes[1::2] << 4
    return codes, _with_one_nan((largest / levels).astype(np.float16)).reshape(-1)


def decode(codes: np.ndarray, scales: np.ndarray | None, kind: str) -> np.ndarray:
    """Inverse of `encode` but for its roundings: float16 [n]. codes and scales may have any shape; both are read flat.

    >>> codes, scales = encode(np.arange(64, dtype=np.float16), "q8")
    >>> decode(codes, scales, "q8")[:4]
    array([0.  , 0.75, 2.  , 2.75], dtype=float16)
    """
    _check_kind(kind)
    codes = np.ascontiguousarray(codes).reshape(-1)
    if codes.dtype != np.uint8:
        raise TypeError(f"codes: dtype {codes.dtype}, expected uint8")
    if kind == "fp8":
        if scales is not None:
            raise ValueError('scales: given, but kind "fp8" has none; pass None')
        return (codes.astype(np.uint16) << 8).view(np.float16)
    size = codes.size * (2 if kind == "q4" else 1)
    if kind != "e4m3" and size % CHUNK:
        raise ValueError(f"codes: {codes.size} bytes, expected a multiple of {codes.size * CHUNK // size}; pass whole chunks")
    if scales is None:
        count = "one for each head of" if kind == "e4m3" else size // GROUP
        raise ValueError(f'scales: None, expected {count} float16 values for kind "{kind}"')
    scales = np.ascontiguousarray(scales).reshape(-1)
    if scales.dtype != np.float16:
        raise TypeError(f"scales: dtype {scales.dtype}, expected float16")
    if kind == "e4m3":
        if codes.size % max(1, scales.size) or (scales.size == 0 and codes.size):
            raise ValueError(f"scales: {scales.size} values, expected one for each head of {codes.size} codes")
        return _decode_e4m3(codes, scales)
    if scales.size != size // GROUP:
        raise ValueError(f"scales: {scales.size} values, expected {size // GROUP} for {size} codes")
    x = np.empty(size, np.float16)
    values_per_byte = size // codes.size if size else 1
    for start in range(0, size, _PASS_VALUES):
        end = min(start + _PASS_VALUES, size)
        bytes_ = slice(start // values_per_byte, end // values_per_byte)
        x[start:end] = _decode_part(codes[bytes_], scales[start // GROUP : end // GROUP], kind)
    return x


@np.errstate(over="ignore", invalid="ignore")
def _decode_e4m3(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    x = np.empty((scales.size, codes.size // max(1, scales.size)), np.float16)
    step = max(1, _PASS_VALUES // max(1, x.shape[1]))
    values = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)  # of every code
    for start in range(0, len(x), step):
        part = codes.reshape(x.shape)[start : start + step]
        x[start : start + step] = values[part] * scales[start : start + step, None].astype(np.float32)
    return _with_one_nan(x).reshape(-1)


@np.errstate(over="ignore", invalid="ignore")
def _decode_part(codes: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    if kind == "q4":
        codes = np.stack((codes & 15, codes >> 4), axis=-1)
    centred = codes.reshape(-1, GROUP).astype(np.float32) - np.float32(_LEVELS[kind])
    t = _round(centred * scales.astype(np.float32)[:, None])
    return _with_one_nan((_hadamard(t.reshape(-1)) * np.float32(1 / 32)).astype(np.float16))


def _hadamard(values: np.ndarray) -> np.ndarray:
    """The even and the odd vector of each chunk times H: float32 [n] that holds float16 values, before and after."""
    # [pairs, chunks * 2]: a stage then adds and subtracts whole rows.
    t: np.ndarray = values.reshape(-1, CHUNK // 2, 2).swapaxes(0, 1).reshape(CHUNK // 2, -1)
    stride = 1
    while stride < CHUNK // 2:
        t = t.reshape(-1, 2, stride, t.shape[-1])
        t = np.stack((_round(t[:, 0] + t[:, 1]), _round(t[:, 0] - t[:, 1])), axis=1)
        stride *= 2
    return np.ascontiguousarray(t.reshape(CHUNK // 2, -1, 2).swapaxes(0, 1)).reshape(-1)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to float16, still in float32."""
    return values.astype(np.float16).astype(np.float32)


def _with_one_nan(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), _NAN, values)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}, expected one of {', '.join(KINDS)}")
