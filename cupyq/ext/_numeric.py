"""Hadamard matrices, products, norms, RoPE and the soft cap: hadamard, gemm, norm, rope, element of ops.md's index.

rms_norm_tp is in _tp.py. Norms follow IEEE: an Inf or NaN in a row shows in its result. (exllamav2 reads both as 65504.)
"""

import numpy as np

from cupyq import ops
from cupyq._arrays import check, float16, float32
from cupyq.ext._arrays import entry, integer, number
from cupyq.ext._rotation import Rotation

# --- hadamard ---------------------------------------------------------------------------------------------------------


@entry(arrays=("h",), writes=("h",))
def had_paley(h):
    """h = the Paley I Hadamard matrix of its size; h float16 [n, n] on the host, n - 1 a prime that is 3 modulo 4"""
    h[...] = ops.paley_1(_side(h))


@entry(arrays=("h",), writes=("h",))
def had_paley2(h):
    """h = the Paley II Hadamard matrix of its size; h float16 [n, n] on the host, n / 2 - 1 a prime that is 1 modulo 4"""
    h[...] = ops.paley_2(_side(h))


def _side(h):
    _check_on_host("h", h)
    check(h, "h", dtype=float16, ndim=2)
    if h.shape[0] != h.shape[1]:
        raise ValueError(f"h must be square, got shape {h.shape}")
    return h.shape[0]


def _check_on_host(name, array):
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be on the host, got {type(array).__module__}.{type(array).__name__}")


# --- gemm -------------------------------------------------------------------------------------------------------------


@entry(arrays=("a", "b", "c"), writes=("c",))
def gemm_half_half_half(a, b, c, alpha, beta, force_cublas):
    """c = alpha a b + beta c; float16 [m, k], [k, n], [m, n]. fp32 sums and factors, one rounding. force_cublas: no effect"""
    check(a, "a", dtype=float16)
    ops.gemm(a, b, c, alpha=number(alpha, "alpha"), beta=number(beta, "beta"))


# --- norm -------------------------------------------------------------------------------------------------------------


@entry(arrays=("x", "w", "y"), writes=("y",))
def rms_norm(x, w, y, epsilon):
    """y = x w / sqrt(mean(x^2) + epsilon) over the last axis; x and y float16 or float32 [..., dim], w float16 [dim]"""
    check(x, "x", dtype=(float16, float32))
    check(w, "w", dtype=float16)
    check(y, "y", dtype=(float16, float32))
    ops.rms_norm(x, w, eps=number(epsilon, "epsilon"), dtype=y.dtype, out=y)


@entry(arrays=("x", "w"), writes=("x",))
def rms_norm_(x, w, epsilon):
    """rms_norm in place"""
    check(x, "x", dtype=(float16, float32))
    check(w, "w", dtype=float16)
    ops.rms_norm(x, w, eps=number(epsilon, "epsilon"), out=x)


@entry(arrays=("x", "w", "y"), optional=("b",), writes=("y",))
def layer_norm(x, w, b, y, epsilon):
    """y = (x - mean) w / sqrt(variance + epsilon) (+ b) over the last axis; float16, x and y [..., dim], w and b [dim]"""
    check(x, "x", dtype=float16)
    check(w, "w", dtype=float16)
    ops.layer_norm(x, w, b, eps=number(epsilon, "epsilon"), out=y)


@entry(arrays=("x", "w"), optional=("b",), writes=("x",))
def layer_norm_(x, w, b, epsilon):
    """layer_norm in place"""
    check(x, "x", dtype=float16)
    check(w, "w", dtype=float16)
    ops.layer_norm(x, w, b, eps=number(epsilon, "epsilon"), out=x)


@entry(arrays=("x", "w", "y"), optional=("b",), writes=("y",), flags=("rms",))
def head_norm(x, w, b, y, epsilon, rms):
    """y = the RMS norm (rms true) or layer norm of each head (+ b)

    float16; x and y [..., heads, head_dim], w and b [heads, head_dim], b None where there is none.
    """
    check(x, "x", dtype=float16)
    check(w, "w", dtype=float16, ndim=2)
    ops.head_norm(x, w, b, eps=number(epsilon, "epsilon"), kind="rms" if rms else "layer", out=y)


@entry(arrays=("x", "w"), optional=("b",), writes=("x",), flags=("rms",))
def head_norm_(x, w, b, epsilon, rms):
    """head_norm in place"""
    check(x, "x", dtype=float16)
    check(w, "w", dtype=float16, ndim=2)
    ops.head_norm(x, w, b, eps=number(epsilon, "epsilon"), kind="rms" if rms else "layer", out=x)


# --- rope -------------------------------------------------------------------------------------------------------------


@entry(arrays=("x", "sin", "cos"), optional=("offsets",), writes=("x",), flags=("neox_style",))
def rope_(x, sin, cos, past_len, num_heads, head_dim, offsets, neox_style):
    """Rotate x, float16 [batch, ...] with num_heads * head_dim values to a token, in place

    sin, cos float16 [..., positions, R], R at most head_dim: of R columns, neox_style reads the first half, the
    interleaved style takes pairs of equal values. offsets int32 [batch] or None. Token t of row b is at past_len + t +
    offsets[b], or, with past_len = -1, at t + max(offsets[b], 0); at 0 where that is negative. A position beyond the
    tables raises ValueError where the host knows it; elsewhere the token becomes NaN. Each value is rounded once.
    """
    heads, head_dim = integer(num_heads, "num_heads", low=1), integer(head_dim, "head_dim", low=1)
    check(x, "x", dtype=float16)
    batch = x.shape[0] if x.ndim else 0
    if x.ndim < 2 or (batch and x.size % (batch * heads * head_dim)):
        raise ValueError(f"x must be [batch, ...] with tokens of {heads} heads of {head_dim} values, got shape {x.shape}")
    seq = x.size // (batch * heads * head_dim) if batch else 0
    style = "neox" if neox_style else "gptj"
    rotation = Rotation(sin, cos, past_len, offsets, batch=batch, seq=seq, head_dim=head_dim, style=style)
    if x.size:
        rotation(x.reshape(batch, seq, heads, head_dim))


@entry(arrays=("mrope_pos_ids", "ids"), writes=("mrope_pos_ids",))
def gen_mrope_pos_ids(mrope_pos_ids, ids, merge_size, spans, grids):
    """mrope_pos_ids = the positions of text and images, returns the next free one: see `cupyq.ops.mrope_positions`

    mrope_pos_ids int64 [3, length] and ids int64 [n], both on the host; spans (first id, end) and grids (time, height,
    width) of the images.
    """
    for name, array in (("mrope_pos_ids", mrope_pos_ids), ("ids", ids)):
        _check_on_host(name, array)
    check(mrope_pos_ids, "mrope_pos_ids", dtype=np.dtype(np.int64), shape=(3, None))
    if not isinstance(spans, (list, tuple)) or not isinstance(grids, (list, tuple)):
        raise TypeError(f"spans and grids must be lists, got {type(spans).__name__} and {type(grids).__name__}")
    positions, following = ops.mrope_positions(ids, merge_size, spans, grids, mrope_pos_ids.shape[1])
    mrope_pos_ids[...] = positions
    return following


# --- element ----------------------------------------------------------------------------------------------------------


@entry(arrays=("x",), writes=("x",))
def softcap_(x, scale):
    """x = scale tanh(x / scale), in place; x float16 or float32, scale any number but 0"""
    check(x, "x", dtype=(float16, float32))
    scale = number(scale, "scale")
    if scale == 0:
        raise ValueError("scale must not be 0: leave softcap_ out where there is no cap")
    ops.softcap(x, abs(scale), out=x)  # the formula is even in scale
