"""Activations of the MLP, the logits' soft cap and the bounds of q, k and v, element by element."""

import math

import numpy as np

from cupyq._arrays import FLOATS, check, float16, float32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, float64, positive_number, shown, store

_LOWEST = np.finfo(np.float64).min


@accepts_dlpack(replays=True)
def silu(x, *, out=None):
    """y = x * sigmoid(x)

    x and y: one shape and one dtype of float16, bfloat16, float32. fp32 arithmetic (float64 in the reference), rounded
    once; x = -Inf gives the limit, -0, and NaN stays NaN. `out` may be x. Raises TypeError / ValueError for wrong
    dtypes, shapes, strides or a partial overlap.
    Source: Elfwing, Uchibe and Doya, Sigmoid-Weighted Linear Units, arXiv 1702.03118.

    >>> silu(np.array([0.0, 1.0, -np.inf], np.float32))
    array([ 0.       ,  0.7310586, -0.       ], dtype=float32)
    """
    xp, out = _check(x, out)
    if x.size == 0:
        return out
    if xp is np:
        store(out, silu_reference(x))
    else:
        launch_activate("SILU", x, None, out)
    return out


@np.errstate(over="ignore")
def silu_reference(x):
    x = np.maximum(float64(x), _LOWEST)  # -Inf / (1 + Inf) would be NaN
    return x / (1 + np.exp(-x))


@accepts_dlpack(replays=True)
def gelu(x, *, approximate="tanh", out=None):
    """y = x * Phi(x), Phi the normal distribution's cumulative function

    approximate "none" computes x / 2 * (1 + erf(x / sqrt(2))), "tanh" (the default)
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))). Shapes, dtypes, rounding, Inf and NaN, aliasing and errors
    are those of `silu`; an unknown form is a ValueError too.
    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.

    >>> gelu(np.array([-1.0, 1.0], np.float32))
    array([-0.15880801,  0.841192  ], dtype=float32)
    """
    _check_approximate(approximate)
    xp, out = _check(x, out)
    if x.size == 0:
        return out
    if xp is np:
        store(out, gelu_reference(x, approximate))
    else:
        launch_activate(_GELU[approximate], x, None, out)
    return out


@np.errstate(over="ignore")
def gelu_reference(x, approximate):
    x = np.maximum(float64(x), _LOWEST)  # -Inf * (1 - 1) would be NaN
    if approximate == "tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    # NumPy has no erf; erfc of the negated argument is the same sum without cancellation for negative x.
    return x / 2 * np.frompyfunc(math.erfc, 1, 1)(x / -math.sqrt(2)).astype(np.float64)


@accepts_dlpack(replays=True)
def relu(x, *, out=None):
    """y = x where x >= 0, 0 where x < 0

    -0 and NaN stay as they are. Shapes, dtypes, aliasing and errors are those of `silu`; nothing is rounded.

    >>> relu(np.array([-1.0, 2.0], np.float32))
    array([0., 2.], dtype=float32)
    """
    xp, out = _check(x, out)
    if x.size == 0:
        return out
    if xp is np:
        store(out, relu_reference(x))
    else:
        launch_activate("RELU", x, None, out)
    return out


def relu_reference(x):
    x = float64(x)
    return np.where(x < 0, 0.0, x)


@accepts_dlpack(replays=True)
def silu_mul(gate, up, *, out=None):
    """y = silu(gate) * up

    gate and up: one shape and one dtype of float16, bfloat16, float32, which y takes too. fp32 arithmetic (float64 in
    the reference), rounded once; what does not fit becomes Inf; silu(-Inf) is -0, Inf * 0 is NaN. `out` may be gate or
    up. Raises TypeError / ValueError for wrong dtypes, shapes, strides or a partial overlap.
    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

    >>> silu_mul(np.array([0.0, 1.0], np.float32), np.array([5.0, 2.0], np.float32))
    array([0.       , 1.4621172], dtype=float32)
    """
    xp, out = _check_gated(gate, up, out)
    if out.size == 0:
        return out
    if xp is np:
        store(out, silu_mul_reference(gate, up))
    else:
        launch_activate("SILU", gate, up, out)
    return out


@np.errstate(over="ignore", invalid="ignore")
def silu_mul_reference(gate, up):
    return silu_reference(gate) * float64(up)


@accepts_dlpack(replays=True)
def gelu_mul(gate, up, *, approximate="tanh", out=None):
    """y = gelu(gate) * up, with `gelu`'s two forms

    Shapes, dtypes, rounding, aliasing and errors are those of `silu_mul`; approximate is `gelu`'s.

    >>> gelu_mul(np.array([1.0], np.float32), np.array([2.0], np.float32), approximate="none")
    array([1.6826895], dtype=float32)
    """
    _check_approximate(approximate)
    xp, out = _check_gated(gate, up, out)
    if out.size == 0:
        return out
    if xp is np:
        store(out, gelu_mul_reference(gate, up, approximate))
    else:
        launch_activate(_GELU[approximate], gate, up, out)
    return out


@np.errstate(over="ignore", invalid="ignore")
def gelu_mul_reference(gate, up, approximate):
    return gelu_reference(gate, approximate) * float64(up)


@accepts_dlpack(replays=True)
def relu_mul(gate, up, *, out=None):
    """y = relu(gate) * up

    Shapes, dtypes, rounding, aliasing and errors are those of `silu_mul`.

    >>> relu_mul(np.array([-1.0, 3.0], np.float32), np.array([2.0, 2.0], np.float32))
    array([0., 6.], dtype=float32)
    """
    xp, out = _check_gated(gate, up, out)
    if out.size == 0:
        return out
    if xp is np:
        store(out, relu_mul_reference(gate, up))
    else:
        launch_activate("RELU", gate, up, out)
    return out


@np.errstate(over="ignore", invalid="ignore")
def relu_mul_reference(gate, up):
    return relu_reference(gate) * float64(up)


def activation_reference(x, activation):
    """Of "silu", "gelu" (erf), "gelu_tanh" or "relu", by the names of model configurations."""
    if activation in ("gelu", "gelu_tanh"):
        return gelu_reference(x, "tanh" if activation == "gelu_tanh" else "none")
    return {"silu": silu_reference, "relu": relu_reference}[activation](x)


def _check(x, out):
    xp = namespace(x=x)
    check(x, "x", dtype=FLOATS)
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x)
    return xp, out


def _check_gated(gate, up, out):
    xp = namespace(gate=gate, up=up)
    check(gate, "gate", dtype=FLOATS)
    check(up, "up", dtype=gate.dtype, shape=gate.shape)
    out = output(xp, out, gate.shape, gate.dtype)
    refuse_partial_overlap(out, gate=gate, up=up)
    return xp, out


def _check_approximate(approximate):
    if not isinstance(approximate, str) or approximate not in ("tanh", "none"):
        raise ValueError(f'approximate must be "tanh" or "none", got {shown(approximate)}')


_GELU = {"tanh": "GELU_TANH", "none": "GELU"}


def launch_activate(function, x, up, out):
    vector = access_width(x.size, x, up, out)
    launch(
        _activate_instance(x.dtype, function, up is not None, vector), *_grid(x.size, vector), (x, up, out, np.int64(x.size))
    )


def _activate_instance(dtype, function, is_gated, vector):
    return instance("activate", dtype, function, is_gated, vector)


def _grid(size, vector):
    return (-(-size // (256 * vector)),), (256,)


@accepts_dlpack(replays=True)
def softcap(x, cap, *, out=None):
    """y = cap * tanh(x / cap)

    x and y: one dtype of float16, bfloat16, float32; cap: a positive number, taken as float32. fp32 arithmetic
    (float64 in the reference) with the accurate tanh, rounded once; +-Inf gives +-cap, NaN stays NaN. `out` may be x.
    Raises TypeError / ValueError for wrong dtypes, strides, a cap that is not positive and finite or a partial
    overlap.
    Source: Gemma 2, arXiv 2408.00118, section 2.

    >>> softcap(np.array([1.0, np.inf], np.float32), 30.0)
    array([ 0.9996298, 30.       ], dtype=float32)
    """
    cap = positive_number(cap, "cap")
    xp, out = _check(x, out)
    if x.size == 0:
        return out
    if xp is np:
        store(out, softcap_reference(x, cap))
    else:
        _launch_softcap(x, cap, out)
    return out


def softcap_reference(x, cap):
    cap = float(np.float32(cap))
    return cap * np.tanh(float64(x) / cap)


def _launch_softcap(x, cap, out):
    vector = access_width(x.size, x, out)
    launch(instance("softcap", x.dtype, vector), *_grid(x.size, vector), (x, out, np.int64(x.size), np.float32(cap)))


@accepts_dlpack(replays=True)
def clamp(x, bound, *, out=None):
    """y = min(max(x, -bound), bound)

    x and y: one dtype of float16, bfloat16, float32; bound: a positive number, taken as float32 and then rounded to x's
    dtype. Nothing else is rounded; NaN stays NaN. `out` may be x. Raises TypeError / ValueError for wrong dtypes, strides,
    a bound that is not positive and finite or a partial overlap.
    Source: DBRX's attention, `clip_qkv`.

    >>> clamp(np.array([1.0, -np.inf], np.float32), 8.0)
    array([ 1., -8.], dtype=float32)
    """
    bound = positive_number(bound, "bound")
    xp, out = _check(x, out)
    if x.size == 0:
        return out
    if xp is np:
        store(out, clamp_reference(x, bound))
    else:
        _launch_clamp(x, bound, out)
    return out


def clamp_reference(x, bound):
    bound = float(np.float32(bound))
    return np.clip(float64(x), -bound, bound)


def _launch_clamp(x, bound, out):
    vector = access_width(x.size, x, out)
    launch(instance("clamp", x.dtype, vector), *_grid(x.size, vector), (x, out, np.int64(x.size), np.float32(bound)))


INSTANCES = [
    *(_activate_instance(dtype, "SILU", True, 4 if dtype == float32 else 8) for dtype in FLOATS),
    *(_activate_instance(dtype, "GELU_TANH", True, 4 if dtype == float32 else 8) for dtype in FLOATS),
    *(_activate_instance(float16, function, True, 8) for function in ("GELU", "RELU")),
    *(_activate_instance(float16, function, False, 8) for function in ("SILU", "GELU", "GELU_TANH", "RELU")),
    *(instance("softcap", dtype, 4 if dtype == float32 else 8) for dtype in FLOATS),
    _activate_instance(float32, "SILU", True, 1),
    instance("softcap", float32, 1),
    *(instance("clamp", dtype, 4 if dtype == float32 else 8) for dtype in FLOATS),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
