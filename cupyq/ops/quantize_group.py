"""One group of rows to codes: the search for its scales, then its rows one after another, each error fed to the next.

With the Hessian H = (I + A) diag(D) (I + A)^T, A strictly upper triangular, rows are rounded in order to the level that
is nearest to t[r] = w[r] + sum over j < r of A[j, r] (w[j] - q[j]), and the loss is a plain sum:

    tr((W - Q)^T H (W - Q)) = sum over r of D[r] |t[r] - q[r]|^2

This is LDLQ (Chee et al., QuIP, arXiv 2307.13304), the same recursion as GPTQ's (Frantar et al., arXiv 2210.17323) but
without an inverse of H. All ops round every fp32 step by itself and sum in a fixed order, on a CPU as on a GPU: both give
the same bits, for finite arrays.
"""

from typing import NamedTuple

import numpy as np

from cupyq._arrays import byte_bounds, check, float16, float32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats.bits import WIDTHS
from cupyq.ops._common import byte_workspace, refuse_overlap, truth, whole_number

_uint8 = np.dtype(np.uint8)
_MOST_ROWS = 128

# Of cu/search_scales.cu and cu/scale_search.cuh.
SHARES = 24
_SLICE_COLS, _MAXIMA_COLS, _CHOSEN_COLS = 32, 256, 8192
_WARPS = 8


class _Search(NamedTuple):
    """Where a search looks: the shares of the plain scale, and how far the scales of columns lie above and below."""

    first_share: np.float32
    share_step: np.float32  # subtracted for the next share
    reach: np.float32  # the first s of a column is the least whose scale is so many times its plain scale
    window: int  # how many s are tried, downwards


def _search(first, last, shares, reach=0.0, window=0):
    return _Search(np.float32(first), np.float32((first - last) / (shares - 1)), np.float32(reach), window)


# On normal, Laplace and Student-t weights (rows 32 to 128), twice the candidates find errors lower by 0.1 % on average.
SEARCHES = {
    2: _search(1.2, 0.3, SHARES, 1.3, 8),
    3: _search(1.2, 0.4, SHARES, 1.2, 6),
    4: _search(1.2, 0.4, SHARES, 1.15, 4),
    **{bits: _search(1.2, 0.8, SHARES, 1.15, 3) for bits in (5, 6, 8)},
}
GPTQ_SHARES = 32
_GPTQ_SEARCHES = {
    2: _search(1.4, 0.3, GPTQ_SHARES),
    3: _search(1.2, 0.4, GPTQ_SHARES),
    4: _search(1.1, 0.5, GPTQ_SHARES),
    **{bits: _search(1.05, 0.7, GPTQ_SHARES) for bits in (5, 6, 8)},
}


def _check_bits(bits):
    bits = whole_number(bits, "bits")
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
    return bits


def _refuse_overlaps(written, **inputs):
    """`refuse_overlap` for each of `written`, {name: array or None}, with the inputs and with one another.

    A quantizer makes hundreds of thousands of calls: the bounds of an array are worked out once.
    """
    arrays = {name: array for name, array in (inputs | written).items() if array is not None}
    bounds = {name: byte_bounds(array) for name, array in arrays.items()}
    others = dict(bounds)
    for name in written:
        low, high = others.pop(name, (0, 0))
        for other, (start, end) in others.items():
            if start < high and low < end:
                refuse_overlap(arrays[name], name, **{other: arrays[other]})


def _check_rows(target, name):
    rows = target.shape[0]
    if not 1 <= rows <= _MOST_ROWS:
        raise ValueError(f"{name} must have 1 to {_MOST_ROWS} rows, got {rows}: cut it into blocks")


# --- scales of EXL2 ---------------------------------------------------------------------------------------------------


@accepts_dlpack(writes=("codes", "scale_max", "scales16", "workspace"))
def search_scales(target, weights, bits, *, codes=None, scale_max=None, scales16=None, workspace=None):
    """(codes, scale_max) of a group of EXL2: scale[c] = RN16((codes[c] + 1)^2 * RN16(scale_max / 256)) that fit it well

    They are searched for a small sum over r, c of weights[r] * (target[r, c] - level * scale[c])^2, level the nearest
    whole number from -2^(bits-1) to 2^(bits-1) - 1: of 24 values of scale_max, shares of the scale that the largest
    weight needs, the one with the least sum, where each column has taken the best of 3 to 8 codes near the one that its
    own largest weight needs. Of equals the first, so the larger, wins. (Levels times scales are not rounded to float16
    here.)

    target float32 [rows, n], 1 to 128 rows; weights float32 [rows], not negative; bits 2, 3, 4, 5, 6 or 8. codes uint8
    [n], 0 to 15, and scale_max float16 [1] (0 where all of target is), written where given, as is scales16 float16 [n],
    the scales themselves; none may overlap another or the inputs. `workspace`: uint8 of at least
    `search_scales_workspace_size(n)` bytes, without which a GPU allocates.
    Exact: the same bits on a CPU and a GPU, on every run, for finite arrays. Raises TypeError / ValueError for wrong
    dtypes, shapes, strides, widths or overlaps.
    Source of the format: exllamav2 (adaptivegptq.py), whose search has one share for all columns and the exponent 3.5.

    >>> search_scales(np.array([[0.5, -4.0], [1.5, 3.0]], np.float32), np.ones(2, np.float32), 4)
    (array([ 9, 14], dtype=uint8), array([0.566], dtype=float16))
    """
    xp = namespace(target=target, weights=weights, scales16=scales16)
    bits = _check_bits(bits)
    check(target, "target", dtype=float32, ndim=2)
    _check_rows(target, "target")
    rows, n = target.shape
    check(weights, "weights", dtype=float32, shape=(rows,))
    codes = output(xp, codes, (n,), _uint8, "codes")
    scale_max = output(xp, scale_max, (1,), float16, "scale_max")
    if scales16 is not None:
        check(scales16, "scales16", dtype=float16, shape=(n,), writes=True)
    written = {"codes": codes, "scale_max": scale_max, "scales16": scales16}
    if n == 0:
        _refuse_overlaps(written, target=target, weights=weights)
        scale_max[...] = 0
    elif xp is np:
        _refuse_overlaps(written, target=target, weights=weights)
        codes[...], scale_max[...] = search_scales_reference(target, weights, bits)
        if scales16 is not None:
            scales16[...] = _exl2_scales(codes, scale_max)
    else:
        workspace = byte_workspace(workspace, search_scales_workspace_size(n), target, "search_scales_workspace_size")
        _refuse_overlaps(written | {"workspace": workspace}, target=target, weights=weights)
        _launch_search_scales(target, weights, bits, codes, scale_max, scales16, workspace)
    return codes, scale_max


def _exl2_scales(codes, scale_max):
    factors, unit = codes.astype(np.float32) + np.float32(1), _rounded(scale_max.astype(np.float32) / np.float32(256))
    return (factors * factors * unit).astype(np.float16)


def search_scales_workspace_size(n):
    """Bytes `search_scales` needs on a GPU for n columns."""
    return sum(_workspace_parts(n))


def _workspace_parts(n):
    """Bytes of the totals, of the columns' maxima, of the candidates of scale_max, and of the codes of each."""
    return -(-n // _SLICE_COLS) * SHARES * 8, -(-n // _MAXIMA_COLS) * 4, SHARES * 2, SHARES * n


@np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore")
def search_scales_reference(target, weights, bits):
    search, n = SEARCHES[bits], target.shape[1]
    to_base = _to_base(bits)
    largest = np.fmax.reduce(np.abs(target), axis=0, initial=np.float32(0))
    scale_maxima = _candidates(largest.max() * to_base, search, SHARES)
    units = _rounded(scale_maxima / np.float32(256))[:, None]
    top = np.fmax(np.float32(1), np.fmin(np.float32(16), np.ceil(np.sqrt(largest * to_base * search.reach / units))))
    factors = np.maximum(np.float32(1), top[:, None] - np.arange(search.window, dtype=np.float32)[:, None])

    least, best = np.zeros((SHARES, n + -n % _SLICE_COLS), np.float32), np.empty((SHARES, n), np.uint8)
    for part in _column_parts(n, SHARES * search.window):
        s = factors[..., part]
        scales = _rounded(s * s * units[:, None])
        errors = _errors(target[:, part], weights, scales, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        part_least, part_best = errors[:, 0], s[:, 0]
        for w in range(1, search.window):
            is_less = errors[:, w] < part_least
            part_least, part_best = np.where(is_less, errors[:, w], part_least), np.where(is_less, s[:, w], part_best)
        least[:, :n][:, part], best[:, part] = part_least, part_best - 1
    totals = _totals(least)
    chosen = np.argmin(np.where(np.isnan(totals), np.inf, totals))
    return best[chosen], scale_maxima[chosen].astype(np.float16)


def _to_base(bits):
    """What makes the scale of a column of its largest weight: the range of levels is 2^bits - 1 wide."""
    return np.float32(2 / (2**bits - 1))


def _rounded(values):
    """Rounded to float16, in float32."""
    return values.astype(np.float16).astype(np.float32)


def _inverse(scales):
    return np.where(scales > 0, np.float32(1) / scales, np.float32(0))


def _candidates(plain, search, count):
    """The shares of a plain scale, [count, ...]."""
    steps = np.arange(count, dtype=np.float32).reshape(-1, *(1,) * np.ndim(plain))
    return _rounded(np.fmin(np.float32(65504), plain * (search.first_share - search.share_step * steps)))


def _column_parts(n, candidates):
    """Slices of columns, so that the arrays of all candidates of one stay in a core's cache."""
    width = max(_SLICE_COLS, 49152 // candidates)
    return [slice(first, min(first + width, n)) for first in range(0, n, width)]


def _errors(target, weights, scales, lowest, highest):
    """sums [..., n] over the rows, in order, of weights * (target - level * scales)^2, for scales [..., n]."""
    lowest, highest = np.float32(lowest), np.float32(highest)
    inverse, sums, off = _inverse(scales), np.zeros_like(scales), np.empty_like(scales)
    for x, weight in zip(target, weights, strict=True):
        np.multiply(inverse, x, out=off)
        np.rint(off, out=off)
        np.clip(off, lowest, highest, out=off)
        off *= scales  # exact: 8 bits times 11
        np.subtract(x, off, out=off)
        off *= off
        off *= weight
        sums += off
    return sums


def _totals(errors):
    """float64 sums of float32 [shares, 32 * slices], in the order of the kernels: trees over 32, slices by lanes between."""
    slices = _tree(errors.astype(np.float64).reshape(len(errors), -1, _SLICE_COLS))
    slices = np.pad(slices, ((0, 0), (0, -slices.shape[1] % 32)))
    return _tree(np.add.accumulate(slices.reshape(len(errors), -1, 32), axis=1)[:, -1])


def _tree(values):
    """The sum over the last 32, halves added to halves."""
    while values.shape[-1] > 1:
        values = values[..., : values.shape[-1] // 2] + values[..., values.shape[-1] // 2 :]
    return values[..., 0]


def _launch_search_scales(target, weights, bits, codes, scale_max, scales16, workspace):
    (rows, n), search = target.shape, SEARCHES[bits]
    ends = np.cumsum(_workspace_parts(n)).tolist()
    totals, maxima, candidates, chosen = (workspace[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True))
    sizes = (np.int32(rows), np.int32(n))
    numbers = (np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1), _to_base(bits), *search[:3])
    maxima_instance = instance("scale_maxima", file="search_scales")
    launch(maxima_instance, (-(-n // _MAXIMA_COLS),), (_MAXIMA_COLS,), (target, maxima, *sizes))
    arguments = (target, weights, maxima, totals, candidates, chosen, *sizes, *numbers)
    launch(instance("search_scales", search.window), (-(-n // _SLICE_COLS),), (32 * _WARPS,), arguments)
    choose = (totals, candidates, chosen, codes, scale_max, scales16, np.int32(n))
    launch(instance("choose_scales", file="search_scales"), (-(-n // _CHOSEN_COLS),), (32 * SHARES,), choose)


# --- scales of GPTQ ---------------------------------------------------------------------------------------------------


@accepts_dlpack(writes=("scales", "zeros"))
def search_scales_gptq(target, weights, bits, is_symmetric, *, scales=None, zeros=None):
    """(scales, zeros) of a group of GPTQ: of each column those that fit it best, for values (code - zero) * scale

    They are searched for a small sum over r of weights[r] * (target[r, c] - level * scale)^2, level the nearest whole
    number from -zero to 2^bits - 1 - zero: 32 shares of the scale whose levels reach just from one extreme of the column
    to the other; with `is_symmetric` the zero point is 2^(bits-1), otherwise the one the extremes (and 0) ask for or one
    of its neighbours. It is at least 1, so that files may hold zero - 1 (formats/gptq.py). Of equals the first wins.

    target float32 [rows, n], any number of rows; weights float32 [rows], not negative; bits 2, 3, 4, 5, 6 or 8. scales
    float16 [n] and zeros uint8 [n], written where given; they must not overlap the inputs. A column of zeros has the
    scale 0. Exact: the same bits on a CPU and a GPU, on every run, for finite arrays. Raises TypeError / ValueError for
    wrong dtypes, shapes, strides, widths or overlaps.

    >>> search_scales_gptq(np.array([[-1.0], [0.0], [6.5]], np.float32), np.ones(3, np.float32), 4, False)
    (array([0.5015], dtype=float16), array([2], dtype=uint8))
    """
    xp = namespace(target=target, weights=weights)
    bits, is_symmetric = _check_bits(bits), truth(is_symmetric, "is_symmetric")
    check(target, "target", dtype=float32, ndim=2)
    rows, n = target.shape
    if rows == 0:
        raise ValueError(f"target must have at least one row, got shape {target.shape}")
    check(weights, "weights", dtype=float32, shape=(rows,))
    scales = output(xp, scales, (n,), float16, "scales")
    zeros = output(xp, zeros, (n,), _uint8, "zeros")
    _refuse_overlaps({"scales": scales, "zeros": zeros}, target=target, weights=weights)
    if n == 0:
        return scales, zeros
    if xp is np:
        scales[...], zeros[...] = search_scales_gptq_reference(target, weights, bits, is_symmetric)
    else:
        _launch_search_scales_gptq(target, weights, bits, is_symmetric, scales, zeros)
    return scales, zeros


def _to_scale(bits, is_symmetric):
    """What makes a plain scale of the largest weight, or of the distance of the extremes."""
    return np.float32((2 if is_symmetric else 1) / (2**bits - 1))


@np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore")
def search_scales_gptq_reference(target, weights, bits, is_symmetric):
    search, n, maxq = _GPTQ_SEARCHES[bits], target.shape[1], np.float32(2**bits - 1)
    low = np.fmin.reduce(target, axis=0, initial=np.float32(0))
    high = np.fmax.reduce(target, axis=0, initial=np.float32(0))
    if is_symmetric:
        plain = np.maximum(high, np.abs(low)) * _to_scale(bits, is_symmetric)
        tried = np.full((1, n), 2 ** (bits - 1), np.float32)
    else:
        plain = (high - low) * _to_scale(bits, is_symmetric)
        nearest = np.clip(np.rint(-low * _inverse(plain)), np.float32(1), maxq)
        tried = np.clip(nearest + np.array([[0], [-1], [1]], np.float32), np.float32(1), maxq)
    candidates = _candidates(plain, search, GPTQ_SHARES)

    scales, zeros = np.empty(n, np.float16), np.empty(n, np.uint8)
    for part in _column_parts(n, GPTQ_SHARES):
        errors = [_errors(target[:, part], weights, candidates[:, part], -z[part], maxq - z[part]) for z in tried]
        # Shares first, their zero points within: argmin takes the first of equals in this order.
        errors = np.stack(errors, axis=1).reshape(-1, errors[0].shape[1])
        best = np.argmin(errors, axis=0)
        columns = np.arange(errors.shape[1])
        scales[part] = candidates[:, part][best // len(tried), columns]
        zeros[part] = tried[:, part][best % len(tried), columns]
    return scales, zeros


def _launch_search_scales_gptq(target, weights, bits, is_symmetric, scales, zeros):
    rows, n = target.shape
    levels = (np.float32(2 ** (bits - 1)), np.float32(2**bits - 1), _to_scale(bits, is_symmetric))
    arguments = (target, weights, scales, zeros, np.int32(rows), np.int32(n), *levels, *_GPTQ_SEARCHES[bits][:2])
    launch(instance("search_scales_gptq", 1 if is_symmetric else 3), (-(-n // _SLICE_COLS),), (32 * _WARPS,), arguments)


# --- codes ------------------------------------------------------------------------------------------------------------


@accepts_dlpack(writes=("codes", "error", "loss"))
def quantize_group(target, original, factor, loss_weights, scales16, bits, *, zeros=None, codes=None, error=None, loss=None):
    """(codes, error, loss) of a group of rows, rounded one after another, each error fed to the rows that follow

    For r = 0 ... rows - 1 in this order, in every column:

        t = target[r] + sum over j < r of factor[j, r] * error[j]
        codes[r] = clamp(rint(t / scale) + zero, 0, 2^bits - 1)
        q = RN16((codes[r] - zero) * scale), the value the run time decodes
        error[r] = original[r] - q,  loss += loss_weights[r] * (t - q)^2

    target float32 [rows, n], 1 to 128 rows: the original rows plus what earlier groups fed to them; original float32
    [rows, n]; factor float32 [rows, rows], read above its diagonal only; loss_weights float32 [rows]; scales16 float16
    [n], not negative; bits 2, 3, 4, 5, 6 or 8; zeros uint8 [n], or None: 2^(bits-1) as in EXL2.
    codes uint8 [rows, n], error float32 [rows, n] and loss float32 [n] are written where given; they must not overlap
    anything else. A scale of 0 gives the code of zero, the value 0.

    fp32, every step rounded: t / scale is t times the rounded 1 / scale, t takes its updates one by one in the order of
    j, and the losses of the rows r, r + 8, r + 16, ... are added up in order before those 8 sums are. Exact: the same
    bits on a CPU and a GPU, on every run, for finite arrays. Raises TypeError / ValueError for wrong dtypes, shapes,
    strides, widths or overlaps.
    Sources: Chee et al., QuIP, arXiv 2307.13304 (LDLQ); Frantar et al., GPTQ, arXiv 2210.17323.

    >>> w = np.array([[0.8], [0.8]], np.float32)
    >>> factor, ones = np.array([[0, 1], [0, 0]], np.float32), np.ones(2, np.float32)
    >>> codes, error, loss = quantize_group(w, w, factor, ones, np.array([0.5], np.float16), 2)
    >>> codes.ravel(), error.ravel(), loss
    (array([3, 3], dtype=uint8), array([0.3, 0.3], dtype=float32), array([0.45000002], dtype=float32))
    """
    xp = namespace(target=target, original=original, factor=factor, loss_weights=loss_weights, scales16=scales16, zeros=zeros)
    bits = _check_bits(bits)
    check(target, "target", dtype=float32, ndim=2)
    _check_rows(target, "target")
    rows, n = target.shape
    check(original, "original", dtype=float32, shape=(rows, n))
    check(factor, "factor", dtype=float32, shape=(rows, rows))
    check(loss_weights, "loss_weights", dtype=float32, shape=(rows,))
    check(scales16, "scales16", dtype=float16, shape=(n,))
    if zeros is not None:
        check(zeros, "zeros", dtype=_uint8, shape=(n,))
    inputs = dict(target=target, original=original, factor=factor, loss_weights=loss_weights, scales16=scales16, zeros=zeros)
    codes = output(xp, codes, (rows, n), _uint8, "codes")
    error = output(xp, error, (rows, n), float32, "error")
    loss = output(xp, loss, (n,), float32, "loss")
    _refuse_overlaps({"codes": codes, "error": error, "loss": loss}, **inputs)
    if n == 0:
        return codes, error, loss
    if xp is np:
        codes[...], error[...], loss[...] = quantize_group_reference(
            target, original, factor, loss_weights, scales16, bits, zeros
        )
    else:
        _launch_quantize_group(target, original, factor, loss_weights, scales16, bits, zeros, codes, error, loss)
    return codes, error, loss


@np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore")
def quantize_group_reference(target, original, factor, loss_weights, scales16, bits, zeros=None):
    (rows, n), scales = target.shape, scales16.astype(np.float32)
    zeros = np.full(n, 2 ** (bits - 1), np.float32) if zeros is None else zeros.astype(np.float32)
    lowest, highest, inverse = -zeros, np.float32(2**bits - 1) - zeros, _inverse(scales)
    codes, error, loss = np.empty((rows, n), np.uint8), np.empty((rows, n), np.float32), np.empty(n, np.float32)
    for part in _column_parts(n, 12):  # 4096 columns: fewer calls, which take most of the time
        t, scale, zero = target[:, part].copy(), scales[part], zeros[part]
        update, losses = np.empty_like(t), np.zeros((_WARPS, len(scale)), np.float32)
        for r in range(rows):
            code = np.fmax(lowest[part], np.fmin(highest[part], np.rint(t[r] * inverse[part]))) + zero
            value = _rounded((code - zero) * scale)
            off, left = t[r] - value, original[r, part] - value
            losses[r % _WARPS] += off * off * loss_weights[r]
            codes[r, part], error[r, part] = code, left
            if r + 1 < rows:
                np.multiply(factor[r, r + 1 :, None], left, out=update[r + 1 :])
                t[r + 1 :] += update[r + 1 :]
        loss[part] = np.add.accumulate(losses)[-1]
    return codes, error, loss


def _launch_quantize_group(target, original, factor, loss_weights, scales16, bits, zeros, codes, error, loss):
    rows, n = target.shape
    max_rows = 32 if rows <= 32 else 64 if rows <= 64 else _MOST_ROWS
    levels = (np.float32(2 ** (bits - 1)), np.float32(2**bits - 1))
    arrays = (target, original, factor, loss_weights, scales16, zeros, codes, error, loss)
    arguments = (*arrays, np.int32(rows), np.int32(n), *levels)
    launch(instance("quantize_group", max_rows), (-(-n // _SLICE_COLS),), (32 * _WARPS,), arguments)


INSTANCES = [
    instance("scale_maxima", file="search_scales"),
    *(instance("search_scales", window) for window in (3, 4, 6, 8)),
    instance("choose_scales", file="search_scales"),
    *(instance("search_scales_gptq", zeros_tried) for zeros_tried in (1, 3)),
    *(instance("quantize_group", max_rows) for max_rows in (32, 64, 128)),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
