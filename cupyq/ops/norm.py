"""Norms over the last axis, of whole rows (rms_norm, layer_norm) and of single heads (head_norm)."""

import itertools
import math

import numpy as np

from cupyq import _device
from cupyq._arrays import FLOATS, bfloat16, check, float16, float32, int32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, dtype_named, float64, int32_of, norm_epsilon, refuse_overlap, shown, store


@accepts_dlpack(replays=True)
def rms_norm(x, weight, *, eps=1e-6, dtype=None, residual=None, order=None, out=None):
    """y = x * weight / sqrt(mean(x**2, axis=-1) + eps), plus `residual` if there is one, or with columns in `order`

    x [..., dim] and weight [dim] may each be float16, bfloat16 or float32; y has x's shape and `dtype` (default:
    residual's, or x's without one); residual has y's shape and dtype. Sums are fp32 in a fixed order (float64 in the
    reference) and the result, residual included, is rounded once. `out` may be residual itself, or x where the dtypes
    agree. Models whose weights are stored minus one (Gemma) add the one before, in float32.
    order, int32 [count], excludes residual: column j of y [..., count] is that of order[j], 0 where order[j] is -1 (the
    stored row order of a QMatrix, `q.order`); NumPy refuses other numbers, the GPU takes them for -1. `out` then shares
    memory with nothing. Raises TypeError / ValueError for wrong dtypes, shapes, strides or a partial overlap of out and
    an input.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.

    >>> rms_norm(np.array([[3.0, 4.0]], np.float32), np.ones(2, np.float32), eps=0.0)
    array([[0.84852815, 1.1313709 ]], dtype=float32)
    """
    eps = norm_epsilon(eps)
    xp, out = _check_rows(x, weight, None, dtype, residual, order, out)
    if out.size == 0:
        return out
    if xp is np:
        store(out, rms_norm_reference(x, weight, eps, residual, order))
    else:
        _launch_rms_norm(x, weight, eps, residual, order, out)
    return out


def _check_rows(x, weight, bias, dtype, residual, order, out):
    """The checks that rms_norm and layer_norm share; the library, and `out` or a new array for y."""
    xp = namespace(x=x, weight=weight, bias=bias, residual=residual, order=order)
    check(x, "x", dtype=FLOATS)
    if x.ndim == 0:
        raise ValueError("x must have at least the dimension [dim], got shape ()")
    check(weight, "weight", dtype=FLOATS, shape=x.shape[-1:])
    if bias is not None:
        check(bias, "bias", dtype=weight.dtype, shape=weight.shape)
    asked = None if dtype is None else dtype_named(dtype)
    if residual is not None:
        check(residual, "residual", dtype=FLOATS if asked is None else asked, shape=x.shape)
    shape = x.shape
    if order is not None:
        _check_order(xp, order, residual, shape[-1])
        shape = (*shape[:-1], order.size)
    if asked is None:
        out = output(xp, out, shape, (x if residual is None else residual).dtype)
    else:
        out = output(xp, out, shape, asked)
        check(out, "out", dtype=FLOATS)
    if order is None:
        refuse_partial_overlap(out, x=x, weight=weight, bias=bias, residual=residual)
    else:
        refuse_overlap(out, "out", x=x, weight=weight, bias=bias, order=order)
    return xp, out


def _check_order(xp, order, residual, dim):
    check(order, "order", dtype=int32, ndim=1)
    if residual is not None:
        raise ValueError("order and residual are both given: a residual is added to rows in their own order, pass one of them")
    if dim == 0:
        raise ValueError("x must have at least one column to be put in order, got none")
    if xp is np and order.size and not -1 <= order.min() <= order.max() < dim:
        raise ValueError(f"order must hold -1 or columns of x below {dim}, got {order.min()} to {order.max()}")


def _in_order(y, order):
    """Columns order[0], order[1], ... of y, zeros where that is -1."""
    return y if order is None else np.where(order < 0, 0.0, y[..., order])


def rms_norm_reference(x, weight, eps, residual=None, order=None):
    x, weight = float64(x), float64(weight)
    y = _in_order(x * weight / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps), order)
    return y if residual is None else float64(residual) + y


def _launch_rms_norm(x, weight, eps, residual, order, out):
    dim, count = weight.size, out.shape[-1]
    warps = norm_warps(dim)
    vector = access_width(math.gcd(dim, count), x, weight, residual, order, out)
    sizes = (int32_of(dim), int32_of(count), np.float32(eps))
    kernel = _row_instance("rms_norm", x.dtype, weight.dtype, out.dtype, vector, warps, order is not None)
    launch(kernel, (x.size // dim,), (32 * warps,), (x, weight, residual, order, out, *sizes), _row_bytes(order, dim, out))


def _row_bytes(order, dim, out):
    """Shared memory of the kernels, which keep a row there to gather from."""
    if order is None:
        return 0
    limit = _device.current().shared_bytes_per_block - 1024
    if dim * out.itemsize > limit:
        raise ValueError(f"with order, rows must have at most {limit // out.itemsize} values on this GPU, got {dim}")
    return dim * out.itemsize


def norm_warps(dim):
    """Enough threads for a row to be loaded at once; so many for any number of rows, so that these do not change the bits."""
    return 1 if dim <= 256 else 8 if dim <= 2048 else 16


def _row_instance(name, x, weight, y, vector, warps, is_ordered=False):
    return instance(name, x, weight, y, vector, warps, is_ordered)


@accepts_dlpack(replays=True)
def layer_norm(x, weight, bias=None, *, eps=1e-5, dtype=None, residual=None, order=None, out=None):
    """y = (x - mean) * weight / sqrt(mean((x - mean)**2) + eps) + bias, means over the last axis, plus `residual`

    x [..., dim] and weight [dim] may each be float16, bfloat16 or float32; bias [dim] has weight's dtype; y has x's
    shape and `dtype` (default: residual's, or x's without one); residual has y's shape and dtype, or is None. The
    variance is the biased one, taken in a second pass from the deviations. Sums are fp32 in a fixed order (float64 in
    the reference) and the result, residual included, is rounded once. `out` may be residual itself, or x where the
    dtypes agree. order is that of `rms_norm`: y [..., count] then has the columns order[j], zeros for -1. Raises
    TypeError / ValueError for wrong dtypes, shapes, strides or a partial overlap of out and an input.
    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.

    >>> layer_norm(np.array([[1.0, 3.0]], np.float32), np.ones(2, np.float32), eps=0.0)
    array([[-1.,  1.]], dtype=float32)
    """
    eps = norm_epsilon(eps)
    xp, out = _check_rows(x, weight, bias, dtype, residual, order, out)
    if out.size == 0:
        return out
    if xp is np:
        store(out, layer_norm_reference(x, weight, bias, eps, residual, order))
    else:
        _launch_layer_norm(x, weight, bias, eps, residual, order, out)
    return out


def layer_norm_reference(x, weight, bias, eps, residual=None, order=None):
    x = float64(x)
    deviation = x - np.mean(x, axis=-1, keepdims=True)
    y = deviation * float64(weight) / np.sqrt(np.mean(deviation * deviation, axis=-1, keepdims=True) + eps)
    if bias is not None:
        y += float64(bias)
    y = _in_order(y, order)
    return y if residual is None else float64(residual) + y


def _launch_layer_norm(x, weight, bias, eps, residual, order, out):
    dim, count = weight.size, out.shape[-1]
    warps = norm_warps(dim)
    vector = access_width(math.gcd(dim, count), x, weight, bias, residual, order, out)
    sizes = (np.int32(dim), np.int32(count), np.float32(eps))
    kernel = _row_instance("layer_norm", x.dtype, weight.dtype, out.dtype, vector, warps, order is not None)
    launch(
        kernel, (x.size // dim,), (32 * warps,), (x, weight, bias, residual, order, out, *sizes), _row_bytes(order, dim, out)
    )


@accepts_dlpack(replays=True)
def head_norm(x, weight, bias=None, *, eps=1e-6, kind="rms", out=None):
    """y = rms_norm or layer_norm (`kind` "rms" or "layer") of each head of x, plus bias

    x [..., heads, head_dim] and weight [head_dim] or [heads, head_dim] may each be float16, bfloat16 or float32; bias
    has weight's shape and dtype; y has x's shape and dtype. Any head_dim. Sums are fp32 in a fixed order (float64 in
    the reference) and the result is rounded once. `out` may be x itself. Raises TypeError / ValueError for wrong
    dtypes, shapes, strides, an unknown kind or a partial overlap of out and an input.

    >>> head_norm(np.array([[3.0, 4.0], [0.0, 2.0]], np.float32), np.ones(2, np.float32), eps=0.0)
    array([[0.84852815, 1.1313709 ],
           [0.        , 1.4142135 ]], dtype=float32)
    """
    xp = namespace(x=x, weight=weight, bias=bias)
    eps = norm_epsilon(eps)
    if not isinstance(kind, str) or kind not in ("rms", "layer"):
        raise ValueError(f'kind must be "rms" or "layer", got {shown(kind)}')
    check(x, "x", dtype=FLOATS)
    if x.ndim < 2:
        raise ValueError(f"x must have at least the dimensions [heads, head_dim], got shape {x.shape}")
    check(weight, "weight", dtype=FLOATS)
    if weight.shape not in (x.shape[-1:], x.shape[-2:]):
        raise ValueError(f"weight must have shape {x.shape[-1:]} or {x.shape[-2:]}, as x's heads, got {weight.shape}")
    if bias is not None:
        check(bias, "bias", dtype=weight.dtype, shape=weight.shape)
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x, weight=weight, bias=bias)
    if x.size == 0:
        return out
    if xp is np:
        store(out, head_norm_reference(x, weight, bias, eps, kind))
    else:
        _launch_head_norm(x, weight, bias, eps, kind, out)
    return out


def head_norm_reference(x, weight, bias, eps, kind):
    if kind == "layer":
        return layer_norm_reference(x, weight, bias, eps)
    y = rms_norm_reference(x, weight, eps)
    return y if bias is None else y + float64(bias)


def _launch_head_norm(x, weight, bias, eps, kind, out):
    heads, head_dim = x.shape[-2:]
    rows = x.size // head_dim  # one warp each
    vector = access_width(head_dim, x, weight, bias, out)
    kernel = _head_instance(x.dtype, weight.dtype, kind == "rms", head_columns(head_dim, x, weight), vector)
    weight_rows = heads if weight.ndim == 2 else 1
    launch(
        kernel,
        ((rows + 3) // 4,),
        (128,),
        (x, weight, bias, out, np.int64(rows), np.int32(weight_rows), np.int32(head_dim), np.float32(eps)),
    )


def head_columns(head_dim, x, weight):
    """How many neighbouring values of a head one lane of its warp adds up at a time: the same at every address."""
    return math.gcd(head_dim, 16 // max(x.itemsize, weight.itemsize))


def _head_instance(x, weight, is_rms, columns, vector):
    return instance("head_norm", x, weight, is_rms, columns, vector)


INSTANCES = [
    *(_row_instance("rms_norm", x, w, w, 4 if float32 in (x, w) else 8, 16) for x, w in itertools.product(FLOATS, FLOATS)),
    *(_row_instance(name, float32, float32, y, 4, 16) for name in ("rms_norm", "layer_norm") for y in (float16, bfloat16)),
    *(_row_instance("rms_norm", float32, float16, float16, vector, 1) for vector in (1, 4)),
    _row_instance("rms_norm", float32, float16, float16, 4, 8),
    *(_row_instance("rms_norm", float32, w, y, 4, 16, True) for y in (float16, bfloat16) for w in (y, float32)),
    *(_row_instance("layer_norm", x, float16, float16, 4 if x == float32 else 8, 16) for x in (float16, float32)),
    _row_instance("layer_norm", bfloat16, bfloat16, bfloat16, 8, 16),
    _row_instance("layer_norm", float32, float32, float32, 1, 1),
    _row_instance("layer_norm", float32, float16, float16, 4, 16, True),
    *(_head_instance(x, x, kind, 8, 8) for x in (float16, bfloat16) for kind in (True, False)),
    _head_instance(float32, float32, True, 1, 1),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
