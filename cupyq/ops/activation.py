"""Activations of the MLP and the logits' soft cap, element by element."""

import math

import numpy as np

from cupyq._arrays import FLOATS, accepts_dlpack, check, float32, namespace, output, refuse_partial_overlap
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, float64, store


@accepts_dlpack
def silu_mul(gate, up, *, out=None):
    """y = gate * sigmoid(gate) * up

    gate and up: one shape and one dtype of float16, bfloat16, float32, which y takes too. fp32 arithmetic (float64 in
    the reference), rounded once; what does not fit becomes Inf, and gate = -Inf gives NaN as the formula does. `out`
    may be gate or up. Raises TypeError / ValueError for wrong dtypes, shapes, strides or a partial overlap.
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
        _launch_elements(lambda vector: instance("silu_mul", gate.dtype, vector), gate, up, out)
    return out


@np.errstate(over="ignore", invalid="ignore")
def silu_mul_reference(gate, up):
    gate = float64(gate)
    return gate / (1 + np.exp(-gate)) * float64(up)


@accepts_dlpack
def gelu_mul(gate, up, *, approximate="tanh", out=None):
    """y = gelu(gate) * up, with `gelu`'s two forms

    Shapes, dtypes, rounding, aliasing and errors are those of `silu_mul`.

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
        _launch_elements(lambda vector: instance("gelu_mul", gate.dtype, approximate == "tanh", vector), gate, up, out)
    return out


@np.errstate(over="ignore", invalid="ignore")
def gelu_mul_reference(gate, up, approximate):
    return gelu_reference(gate, approximate) * float64(up)


@accepts_dlpack
def gelu(x, *, approximate="tanh", out=None):
    """y = x * Phi(x), Phi the normal distribution's cumulative function

    approximate "none" computes x / 2 * (1 + erf(x / sqrt(2))), "tanh" (the default)
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))). x and y: one dtype of float16, bfloat16, float32. fp32
    arithmetic (float64 in the reference), rounded once; x = -Inf gives NaN as the formulas do. `out` may be x. Raises
    TypeError / ValueError for wrong dtypes, shapes, strides, an unknown form or a partial overlap.
    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.

    >>> gelu(np.array([-1.0, 1.0], np.float32))
    array([-0.15880801,  0.841192  ], dtype=float32)
    """
    _check_approximate(approximate)
    xp = namespace(x=x)
    check(x, "x", dtype=FLOATS)
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x)
    if x.size == 0:
        return out
    if xp is np:
        store(out, gelu_reference(x, approximate))
    else:
        _launch_elements(lambda vector: instance("gelu", x.dtype, approximate == "tanh", vector), x, out)
    return out


@np.errstate(over="ignore", invalid="ignore")
def gelu_reference(x, approximate):
    x = float64(x)
    if approximate == "tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    # NumPy has no erf; erfc of the negated argument is the same sum without cancellation for negative x.
    return x / 2 * np.frompyfunc(math.erfc, 1, 1)(x / -math.sqrt(2)).astype(np.float64)


@accepts_dlpack
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
    xp = namespace(x=x)
    check(x, "x", dtype=FLOATS)
    if not 0 < np.float32(cap) < np.inf:
        raise ValueError(f"cap must be a positive finite number, got {cap}: leave softcap out where there is no cap")
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x)
    if x.size == 0:
        return out
    if xp is np:
        store(out, softcap_reference(x, cap))
    else:
        _launch_elements(lambda vector: instance("softcap", x.dtype, vector), x, out, scalars=(np.float32(cap),))
    return out


def softcap_reference(x, cap):
    cap = float(np.float32(cap))
    return cap * np.tanh(float64(x) / cap)


def _check_approximate(approximate):
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate must be "tanh" or "none", got {approximate!r}')


def _check_gated(gate, up, out):
    xp = namespace(gate=gate, up=up)
    check(gate, "gate", dtype=FLOATS)
    check(up, "up", dtype=gate.dtype, shape=gate.shape)
    out = output(xp, out, gate.shape, gate.dtype)
    refuse_partial_overlap(out, gate=gate, up=up)
    return xp, out


def _launch_elements(kernel_of, *arrays, scalars=()):
    size = arrays[0].size
    vector = access_width(size, *arrays)
    launch(kernel_of(vector), (-(-size // (256 * vector)),), (256,), (*arrays, np.int64(size), *scalars))


INSTANCES = [
    *(instance("silu_mul", dtype, 4 if dtype == float32 else 8) for dtype in FLOATS),
    *(instance("gelu_mul", dtype, True, 4 if dtype == float32 else 8) for dtype in FLOATS),
    instance("gelu_mul", FLOATS[0], False, 8),
    *(instance("gelu", FLOATS[0], is_tanh, 8) for is_tanh in (True, False)),
    *(instance("softcap", dtype, 4 if dtype == float32 else 8) for dtype in FLOATS),
    *(instance(name, float32, 1) for name in ("silu_mul", "softcap")),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
