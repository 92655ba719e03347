"""The router of a mixture of experts."""

import numpy as np

from cupyq._arrays import FLOATS, accepts_dlpack, check, float16, float32, namespace, output
from cupyq._kernels import instance, launch
from cupyq.ops._common import float64, refuse_overlap, store

_MOST_EXPERTS = 1024


@accepts_dlpack
def route(logits, top_k, *, out=None):
    """weights[e, r] = softmax(logits[r])[e] for the top_k experts e of row r, renormalised to sum 1; 0 for the others

    logits [rows, experts]: float16, bfloat16 or float32, at most 1024 experts; weights: float32 [experts, rows],
    transposed so that each expert's weights are contiguous. Of equal logits the lowest expert is kept. The sum of the
    full softmax cancels, so exponentials and one sum over the kept experts are computed, in fp32 (float64 in the
    reference). A row whose maximum is not finite (NaN, +Inf or nothing but -Inf) becomes NaN. Raises TypeError /
    ValueError for wrong dtypes, shapes, strides, top_k outside 1 to experts or an out that overlaps logits.
    Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.1.

    >>> route(np.log(np.array([[1.0, 3.0, 2.0, 1.0]], np.float32)), 2).T
    array([[0. , 0.6, 0.4, 0. ]], dtype=float32)
    """
    xp = namespace(logits=logits)
    check(logits, "logits", dtype=FLOATS, ndim=2)
    rows, experts = logits.shape
    if experts > _MOST_EXPERTS:
        raise ValueError(f"logits must have at most {_MOST_EXPERTS} experts as its last dimension, got {experts}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 to {experts}, the experts of logits, got {top_k}")
    out = output(xp, out, (experts, rows), float32)
    refuse_overlap(out, "out", logits=logits)
    if rows == 0:
        return out
    if xp is np:
        store(out, route_reference(logits, top_k))
    else:
        _launch_route(logits, top_k, out)
    return out


@np.errstate(invalid="ignore")
def route_reference(logits, top_k):
    logits = float64(logits)
    largest = logits.max(axis=1, keepdims=True)
    kept = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, kept, np.exp(np.take_along_axis(logits, kept, axis=1) - largest), axis=1)
    return np.where(np.isfinite(largest), weights / weights.sum(axis=1, keepdims=True), np.nan).T


def _launch_route(logits, top_k, out):
    rows, experts = logits.shape
    kernel = _route_instance(logits.dtype, experts)
    launch(kernel, (-(-rows // 8),), (256,), (logits, out, np.int32(rows), np.int32(experts), np.int32(top_k)))


def _route_instance(dtype, experts):
    slots = 1  # experts a lane holds
    while 32 * slots < experts:
        slots *= 2
    return instance("route", dtype, slots)


INSTANCES = [
    *(_route_instance(dtype, 32) for dtype in FLOATS),
    *(_route_instance(float16, experts) for experts in (64, 128, _MOST_EXPERTS)),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
