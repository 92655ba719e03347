"""Additions of the residual stream."""

import numpy as np

from cupyq._arrays import FLOATS, check, float16, float32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, float64, refuse_overlap, store


@accepts_dlpack(replays=True)
def add(x, y, *, out=None):
    """z = x + y, in x's dtype

    x and y: one shape, each float16, bfloat16 or float32 (a float32 residual stream takes float16 y). One addition in
    fp32 (float64 in the reference), rounded once; Inf and NaN as IEEE says. `out` may be x, or y where the dtypes
    agree. Raises TypeError / ValueError for wrong dtypes, shapes, strides or a partial overlap.

    >>> add(np.array([1.0, 2.0], np.float32), np.array([0.5, 0.5], np.float16))
    array([1.5, 2.5], dtype=float32)
    """
    xp = namespace(x=x, y=y)
    check(x, "x", dtype=FLOATS)
    check(y, "y", dtype=FLOATS, shape=x.shape)
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x, y=y)
    if x.size == 0:
        return out
    if xp is np:
        store(out, add_reference(x, y))
    else:
        _launch_add(x, y, out)
    return out


@np.errstate(invalid="ignore")
def add_reference(x, y):
    return float64(x) + float64(y)


def _launch_add(x, y, out):
    vector = access_width(x.size, x, y, out)
    kernel = instance("add", x.dtype, y.dtype, vector)
    launch(kernel, (-(-x.size // (256 * vector)),), (256,), (x, y, out, np.int64(x.size)))


@accepts_dlpack(replays=True)
def add_weighted(x, y, weights, *, out=None):
    """z[r, :] = x[r, :] + weights[r] * y[r, :], in x's dtype

    x and y [..., cols]: one shape, each float16, bfloat16 or float32; weights float32 [rows], one for each row of x
    seen as [rows, cols]. A row whose weight is exactly 0 is x's row, whatever y holds there (Inf and NaN included).
    One fused multiply-add in fp32 (float64 in the reference), rounded once. `out` may be x, or y where the dtypes
    agree. Raises TypeError / ValueError for wrong dtypes, shapes, strides or an overlap other than these.

    >>> add_weighted(np.ones((2, 1), np.float32), np.array([[4], [np.nan]], np.float32), np.array([0.5, 0], np.float32))
    array([[3.],
           [1.]], dtype=float32)
    """
    xp = namespace(x=x, y=y, weights=weights)
    check(x, "x", dtype=FLOATS)
    if x.ndim == 0:
        raise ValueError("x must have at least the dimension [cols], got shape ()")
    check(y, "y", dtype=FLOATS, shape=x.shape)
    check(weights, "weights", dtype=float32, shape=(int(np.prod(x.shape[:-1])),))
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x, y=y)
    refuse_overlap(out, "out", weights=weights)
    if x.size == 0:
        return out
    if xp is np:
        store(out, add_weighted_reference(x, y, weights))
    else:
        _launch_add_weighted(x, y, weights, out)
    return out


@np.errstate(invalid="ignore")
def add_weighted_reference(x, y, weights):
    x, weights = float64(x), float64(weights).reshape(*x.shape[:-1], 1)
    return np.where(weights == 0, x, x + weights * float64(y))


def _launch_add_weighted(x, y, weights, out):
    cols = x.shape[-1]
    vector = access_width(cols, x, y, out)
    chunks = min(-(-cols // (256 * vector)), 64)
    kernel = instance("add_weighted", x.dtype, y.dtype, vector)
    launch(kernel, (weights.size, chunks), (256,), (x, y, weights, out, np.int32(cols)))


INSTANCES = [
    instance(name, x, y, 4 if float32 in (x, y) else 8)
    for name in ("add", "add_weighted")
    for x, y in (*((dtype, dtype) for dtype in FLOATS), (float32, float16))
] + [instance("add", float16, float16, 1)]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
