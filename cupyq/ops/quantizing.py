"""What turns weights into codes: packing, rounding to a grid, the search for its scale, the inner loop of GPTQ.

    code  = clamp(rint(x / scale) + qzero, 0, maxq)            fp32 division, ties to even
    value = RN16((code - qzero) * RN16(scale))                 RN16: rounded to float16

with qzero = 2**(bits-1) and maxq = 2**bits - 1 in EXL2. The values are what `reconstruct` gives for the packed codes.
A NaN quotient (0 / 0) gets the code maxq, as on the GPU, where minima and maxima drop NaN.
"""

import math

import numpy as np

from cupyq._arrays import check, float32, int32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats.bits import WIDTHS, pack_cols, pack_rows
from cupyq.ops._common import float64, real_number, refuse_overlap, store, vector_width, whole_number

_int16 = np.dtype(np.int16)
_LARGEST_LEVEL = 2048  # whole numbers up to here are exact in float16
_GRID_ROWS = 65535  # the most blocks along y


@accepts_dlpack
def pack_columns(codes, bits, *, out=None):
    """words = codes packed down the columns, `bits` bits each, as q_weight holds them (formats/bits.py)

    codes int16 [rows, cols], of which the low `bits` (2, 3, 4, 5, 6 or 8) bits are taken; rows * bits must fill whole
    32-bit words, as every multiple of 32 rows does. words int32 [rows * bits / 32, cols]; `out` must not overlap codes.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides or widths.

    >>> pack_columns(np.arange(8, dtype=np.int16)[:, None], 4) == 0x76543210
    array([[ True]])
    """
    xp = namespace(codes=codes)
    bits = whole_number(bits, "bits")
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
    check(codes, "codes", dtype=_int16, ndim=2)
    rows, cols = codes.shape
    if rows * bits % 32:
        raise ValueError(f"codes must have rows that fill whole 32-bit words, got {rows} rows of {bits} bits: pad them to 32")
    out = output(xp, out, (rows * bits // 32, cols), int32)
    refuse_overlap(out, "out", codes=codes)
    if out.size == 0:
        return out
    if xp is np:
        out[...] = pack_columns_reference(codes, bits)
    else:
        _launch_pack_columns(codes, bits, out)
    return out


def pack_columns_reference(codes, bits):
    return pack_rows(codes & ((1 << bits) - 1), bits)


def _launch_pack_columns(codes, bits, out):
    rows, cols = codes.shape
    units = rows * math.gcd(32, bits) // 32
    grid = (-(-cols // 128), min(units, _GRID_ROWS))
    launch(instance("pack_columns", bits), grid, (128,), (codes, out, np.int32(units), np.int32(cols)))


@accepts_dlpack
def pack_rows_4(scales, *, out=None):
    """words = scales - 1 packed along the rows, 4 bits each, as q_scale holds them

    scales int16 [groups, cols] with values 1 to 16, cols a multiple of 8; of scales - 1 the low 4 bits are taken. words
    int32 [groups, cols / 8]; `out` must not overlap scales. Raises TypeError / ValueError for wrong dtypes, shapes or
    strides.

    >>> pack_rows_4(np.arange(1, 9, dtype=np.int16)[None]) == 0x76543210
    array([[ True]])
    """
    xp = namespace(scales=scales)
    check(scales, "scales", dtype=_int16, ndim=2)
    groups, cols = scales.shape
    if cols % 8:
        raise ValueError(f"scales must have a multiple of 8 columns, got shape {scales.shape}: pad them")
    out = output(xp, out, (groups, cols // 8), int32)
    refuse_overlap(out, "out", scales=scales)
    if out.size == 0:
        return out
    if xp is np:
        out[...] = pack_rows_4_reference(scales)
    else:
        launch(instance("pack_rows_4"), (-(-out.size // 128),), (128,), (scales, out, np.int64(out.size)))
    return out


def pack_rows_4_reference(scales):
    return pack_cols((scales - 1) & 15, 4)


@accepts_dlpack(writes=("codes", "out"))
def quantize(x, scale, qzero, maxq, *, codes=None, out=None):
    """y = RN16((code - qzero) * RN16(scale)) with code = clamp(rint(x / scale) + qzero, 0, maxq), column by column

    x float32 [rows, cols], scale float32 [cols], 0 <= qzero <= maxq <= 2048 whole numbers; y float32 [rows, cols]. The
    codes are written to codes, int16 [rows, cols], if given. The chain of roundings is the contract (see the module):
    kernel and reference agree in every bit. Where x and scale are both 0 (or one is NaN) the code is maxq. `out` may be
    x. Raises TypeError / ValueError for wrong dtypes, shapes, strides or overlaps.
    Source: exllamav2 (quantize.cu).

    >>> quantize(np.array([[0.9, -3.0]], np.float32), np.array([0.5, 0.25], np.float32), 8, 15)
    array([[ 1., -2.]], dtype=float32)
    """
    xp = namespace(x=x, scale=scale, codes=codes)
    qzero, maxq = _levels(qzero, maxq)
    check(x, "x", dtype=float32, ndim=2)
    check(scale, "scale", dtype=float32, shape=x.shape[1:])
    out = output(xp, out, x.shape, float32)
    refuse_partial_overlap(out, x=x)
    refuse_overlap(out, "out", scale=scale)
    _check_codes(codes, x.shape, x=x, scale=scale, out=out)
    if x.size == 0:
        return out
    if xp is np:
        _store_quantized(*quantize_reference(x, scale, qzero, maxq), out, codes)
    else:
        _launch_quantize(x, scale, qzero, maxq, codes, out)
    return out


def _levels(qzero, maxq):
    """Both as ints; callers may hold them as floats."""
    qzero, maxq = real_number(qzero, "qzero"), real_number(maxq, "maxq")
    if not (0 <= qzero <= maxq <= _LARGEST_LEVEL and qzero == int(qzero) and maxq == int(maxq)):
        raise ValueError(
            f"qzero and maxq must be whole numbers with 0 <= qzero <= maxq <= {_LARGEST_LEVEL}, got {qzero!r} and {maxq!r}"
        )
    return int(qzero), int(maxq)


def _check_codes(codes, shape, **others):
    if codes is not None:
        check(codes, "codes", dtype=_int16, shape=shape, writes=True)
        refuse_overlap(codes, "codes", **others)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def quantize_reference(x, scale, qzero, maxq):
    """(values, codes), both float32."""
    codes = np.fmax(np.float32(0), np.fmin(np.float32(maxq), np.rint(x / scale) + np.float32(qzero)))
    # The product of two float16 values is exact in float32.
    return ((codes - np.float32(qzero)) * _to_float16(scale)).astype(np.float16).astype(np.float32), codes


def _to_float16(values):
    return values.astype(np.float16).astype(np.float32)


def _store_quantized(values, found, out, codes):
    out[...] = values
    if codes is not None:
        codes[...] = found


def _launch_quantize(x, scale, qzero, maxq, codes, out):
    rows, cols = x.shape
    vector = vector_width(cols, x, scale, codes, out)
    grid = (-(-cols // (128 * vector)), min(rows, _GRID_ROWS))
    sizes = (np.int32(rows), np.int32(cols), np.float32(qzero), np.float32(maxq))
    launch(instance("quantize", vector), grid, (128,), (x, scale, out, codes, *sizes))


@accepts_dlpack
def quantize_err(x, scale, qzero, maxq, err_norm, min_p, max_p, p_grid, *, out=None):
    """sums[i] = sum of |clamp(rint(x / s), -qzero, maxq - qzero) * s - x| ** err_norm, s = scale * p[i]

    with p[i] = min_p * (1 - i / p_grid) + max_p * i / p_grid, i = 0 ... p_grid: how well each multiple of the scales
    fits x. x float32 [rows, cols], scale float32 [cols], qzero and maxq as in `quantize`, err_norm > 0, p_grid >= 1;
    sums float32 [p_grid + 1]. fp32 in a fixed order on the GPU (float64 in the reference). Unlike in `quantize`,
    nothing is rounded to float16. `out` must not overlap the inputs. Raises TypeError / ValueError for wrong dtypes,
    shapes, strides or numbers.
    Source: exllamav2 (quantize.cu), whose sum runs in the order of arrival.

    >>> quantize_err(np.array([[1.0], [3.0]], np.float32), np.ones(1, np.float32), 2, 3, 2.0, 1.0, 2.0, 2)
    array([4. , 2.5, 2. ], dtype=float32)
    """
    xp = namespace(x=x, scale=scale)
    qzero, maxq = _levels(qzero, maxq)
    check(x, "x", dtype=float32, ndim=2)
    check(scale, "scale", dtype=float32, shape=x.shape[1:])
    p_grid = whole_number(p_grid, "p_grid")
    if not 1 <= p_grid < 2**24:
        raise ValueError(f"p_grid must be at least 1 (and below 2**24), got {p_grid}")
    err_norm, min_p, max_p = (
        real_number(value, name) for name, value in (("err_norm", err_norm), ("min_p", min_p), ("max_p", max_p))
    )
    if not 0 < err_norm < math.inf:
        raise ValueError(f"err_norm must be a positive number, got {err_norm!r}")
    out = output(xp, out, (p_grid + 1,), float32)
    refuse_overlap(out, "out", x=x, scale=scale)
    if x.size == 0:
        out[...] = 0
    elif xp is np:
        store(out, quantize_err_reference(x, scale, qzero, maxq, err_norm, min_p, max_p, p_grid))
    else:
        _launch_quantize_err(x, scale, qzero, maxq, err_norm, min_p, max_p, p_grid, out)
    return out


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def quantize_err_reference(x, scale, qzero, maxq, err_norm, min_p, max_p, p_grid):
    x, scale = float64(x), float64(scale)
    sums = []
    for i in range(p_grid + 1):
        s = scale * (min_p * (1 - i / p_grid) + max_p * (i / p_grid))
        nearest = np.fmax(-qzero, np.fmin(maxq - qzero, np.rint(x / s)))
        sums.append(np.sum(_power(np.abs(nearest * s - x), err_norm)))
    return np.array(sums)


def _power(base, exponent):
    """base ** exponent, for exponents such as 3.5 by products: `**` would take four fifths of the search's time."""
    if 2 * exponent != int(2 * exponent) or exponent > 8:
        return base**exponent
    power = np.sqrt(base) if exponent % 1 else np.ones_like(base)
    for _ in range(int(exponent)):
        power *= base
    return power


def _launch_quantize_err(x, scale, qzero, maxq, err_norm, min_p, max_p, p_grid, out):
    numbers = map(np.float32, (-qzero, maxq - qzero, err_norm, min_p, max_p))
    arguments = (x, scale, out, np.int64(x.size), np.int32(x.shape[1]), *numbers, np.int32(p_grid))
    launch(instance("quantize_err"), (p_grid + 1,), (1024,), arguments)


@accepts_dlpack(writes=("weights", "quant", "error", "codes"))
def quantize_range(weights, quant, error, scale, hessian_inv, qzero, maxq, a, b, *, codes=None):
    """The inner loop of GPTQ: quantize the rows a to b - 1 of weights, each error spread over the rows that follow.

    For c = a ... b - 1 in this order, with U = hessian_inv, the upper Cholesky factor of the inverse Hessian:

        quant[c], codes[c] = quantize(weights[c], scale, qzero, maxq)
        error[c] = (weights[c] - quant[c]) / U[c, c]
        weights[r] -= U[c, r] * error[c]  for all r >= c, so that weights[c] becomes quant[c] but for rounding

    weights, quant, error float32 [k, cols], scale float32 [cols], hessian_inv float32 [k, k], codes int16 [k, cols] or
    None; 0 <= a <= b <= k. Written in place: rows a ... b - 1 of quant, error and codes, rows from a on of weights; the
    written arrays must not overlap anything else. Rows before a and U below its diagonal are not read. fp32 on the GPU,
    every weight takes its updates in the order of c; float64 in the reference, rounded when done (codes come from the
    float32 value of a weight). Codes of the two may thus differ where a weight lies between two levels, and so does
    what follows in that column. Raises TypeError / ValueError for wrong dtypes, shapes, strides, overlaps or rows.
    Source: Frantar et al., GPTQ, arXiv 2210.17323; exllamav2 (quantize.cu, ext_quant.cpp).
    """
    xp = namespace(weights=weights, quant=quant, error=error, scale=scale, hessian_inv=hessian_inv, codes=codes)
    qzero, maxq = _levels(qzero, maxq)
    written = {"weights": weights, "quant": quant, "error": error}
    for name, array in written.items():
        check(array, name, dtype=float32, shape=(None, None) if name == "weights" else weights.shape, writes=True)
    k, cols = weights.shape
    check(scale, "scale", dtype=float32, shape=(cols,))
    check(hessian_inv, "hessian_inv", dtype=float32, shape=(k, k))
    a, b = _check_rows(a, b, k)
    _check_codes(codes, weights.shape, **written, scale=scale, hessian_inv=hessian_inv)
    while written:
        name, array = written.popitem()
        refuse_overlap(array, name, **written, scale=scale, hessian_inv=hessian_inv)
    if a == b or cols == 0:
        return
    if xp is np:
        quantize_range_reference(weights, quant, error, scale, hessian_inv, qzero, maxq, a, b, codes)
    else:
        _launch_quantize_range(weights, quant, error, scale, hessian_inv, qzero, maxq, a, b, codes)


def _check_rows(a, b, k):
    a, b = whole_number(a, "a"), whole_number(b, "b")
    if not 0 <= a <= b <= k:
        raise ValueError(f"a and b must be rows with 0 <= a <= b <= {k}, as weights has {k} rows, got {a} and {b}")
    return a, b


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def quantize_range_reference(weights, quant, error, scale, hessian_inv, qzero, maxq, a, b, codes):
    rows, u, errors = float64(weights[a:b]), float64(hessian_inv[a:b, a:]), np.empty((b - a, weights.shape[1]))
    for c in range(b - a):
        values, found = quantize_reference(rows[c].astype(np.float32), scale, qzero, maxq)
        _store_quantized(values, found, quant[a + c], None if codes is None else codes[a + c])
        errors[c] = (rows[c] - values) / u[c, c]
        rows[c:] -= u[c, c : b - a, None] * errors[c]
    weights[a:b], error[a:b] = rows, errors
    weights[b:] -= u[:, b - a :].T @ errors


_RANGE_ROWS = 64  # of cu/quantize_range.cu


def _launch_quantize_range(weights, quant, error, scale, hessian_inv, qzero, maxq, a, b, codes):
    k, cols = weights.shape
    sizes = (np.int32(k), np.int32(cols))
    levels = (np.float32(qzero), np.float32(maxq))

    def propagate(first, last, row, row_end):
        if row < row_end:
            grid = (-(-cols // 64), -(-(row_end - row) // 128))
            rows = map(np.int32, (first, last, row, row_end))
            launch(instance("propagate_error"), grid, (256,), (weights, error, hessian_inv, *sizes, *rows))

    for first in range(a, b, _RANGE_ROWS):
        last = min(first + _RANGE_ROWS, b)
        arrays = (weights, quant, error, codes, scale, hessian_inv)
        rows = (np.int32(first), np.int32(last - first))
        launch(instance("quantize_range"), (-(-cols // 32),), (256,), (*arrays, *sizes, *rows, *levels))
        propagate(first, last, last, b)
    propagate(a, b, b, k)


@accepts_dlpack(writes=("weights", "codes"))
def quantize_range_inplace(weights, scale, qzero, maxq, a, b, *, codes=None):
    """weights[a:b] = quantize(weights[a:b], scale, qzero, maxq), in place: rounding to nearest, no error is spread.

    weights float32 [k, cols], scale float32 [cols], codes int16 [k, cols] or None, whose rows a ... b - 1 are written;
    0 <= a <= b <= k. Exact as `quantize` is. Raises TypeError / ValueError for wrong dtypes, shapes, strides, overlaps
    or rows.
    """
    xp = namespace(weights=weights, scale=scale, codes=codes)
    qzero, maxq = _levels(qzero, maxq)
    check(weights, "weights", dtype=float32, ndim=2, writes=True)
    check(scale, "scale", dtype=float32, shape=weights.shape[1:])
    a, b = _check_rows(a, b, weights.shape[0])
    refuse_overlap(weights, "weights", scale=scale)
    _check_codes(codes, weights.shape, weights=weights, scale=scale)
    if a == b or weights.size == 0:
        return
    rows, row_codes = weights[a:b], None if codes is None else codes[a:b]
    if xp is np:
        quantize_range_inplace_reference(rows, scale, qzero, maxq, row_codes)
    else:
        _launch_quantize(rows, scale, qzero, maxq, row_codes, rows)


def quantize_range_inplace_reference(rows, scale, qzero, maxq, codes):
    _store_quantized(*quantize_reference(rows, scale, qzero, maxq), rows, codes)


INSTANCES = [
    *(instance("pack_columns", bits) for bits in WIDTHS),
    instance("pack_rows_4"),
    *(instance("quantize", vector) for vector in (1, 4)),
    instance("quantize_err"),
    instance("quantize_range"),
    instance("propagate_error"),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
