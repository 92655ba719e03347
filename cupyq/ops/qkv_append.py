"""The step between the projections and attention: head norms, rotation and the cache, in one launch."""

import math

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, check, float16, float32, int32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats.kv_cache import KINDS
from cupyq.ops._common import is_checking, norm_epsilon, refuse_overlap, shown, store, whole_number
from cupyq.ops.kv_append import (
    check_caches,
    check_capacity,
    codes_width,
    kv_append_reference,
    parts_of,
    place_sizes,
    refuse_cache_overlaps,
)
from cupyq.ops.kv_codec import cache_arrays
from cupyq.ops.norm import head_columns, head_norm_reference
from cupyq.ops.rope import check_positions, rope_reference


@accepts_dlpack(writes=("out", "k_cache", "v_cache"), replays=True)
def qkv_append(
    qkv,
    k_cache,
    v_cache,
    sin,
    cos,
    positions,
    *,
    heads,
    style="neox",
    q_norm=None,
    k_norm=None,
    eps=1e-6,
    block_table=None,
    out=None,
):
    """q = rope(head_norm(q)), k_cache[b, positions[b] + i] = rope(head_norm(k[b, i])), v_cache[...] = v[b, i]

    qkv [batch, seq, (heads + 2 * kv_heads) * head_dim]: float16, bfloat16 or float32, the heads of q, then those of k, then
    those of v. k_cache and v_cache [at least batch, capacity, kv_heads, head_dim], arrays of qkv's dtype or CacheCodes, or
    with block_table their pages, are written as `kv_append` does; nothing else in them changes. sin and cos [table_len,
    rotary_dim / 2], both float32 or float16, and `style` "neox" or "gptj" are those of `rope`; with style None nothing turns
    and both are None. q_norm, k_norm: weights of `head_norm` with `eps`, [head_dim] or one row for each head, both of one
    dtype, or None for no norm. positions int32 [batch]: token i of row b stands at positions[b] + i, in the tables and in the
    caches.
    -> q, of qkv's dtype, [batch, seq, heads, head_dim]. The bits are those of head_norm, rope and kv_append one after the
    other: a norm and a rotation round once each. `out`, for q, shares memory with nothing. A position outside the tables or
    the caches raises ValueError on NumPy, before anything is written; on the GPU tokens outside the caches are dropped,
    unless CUPYQ_CHECK=1 asks for that error, and what stands outside the tables becomes NaN. Raises TypeError / ValueError
    for wrong dtypes, shapes, strides, an unknown style or overlapping arguments.

    >>> caches = np.zeros((1, 2, 1, 2), np.float32), np.zeros((1, 2, 1, 2), np.float32)
    >>> sin, cos = np.array([[0.0], [1.0]], np.float32), np.array([[1.0], [0.0]], np.float32)
    >>> row = np.array([[[3, 4, 5, 6, 7, 8]]], np.float32)
    >>> qkv_append(row, *caches, sin, cos, np.array([1], np.int32), heads=1).ravel()
    array([-4.,  3.], dtype=float32)
    >>> caches[0].ravel(), caches[1].ravel()
    (array([ 0.,  0., -6.,  5.], dtype=float32), array([0., 0., 7., 8.], dtype=float32))
    """
    caches = cache_arrays(k_cache=k_cache, v_cache=v_cache)
    others = {"qkv": qkv, "sin": sin, "cos": cos, "positions": positions, "q_norm": q_norm, "k_norm": k_norm}
    others["block_table"] = block_table
    xp = namespace(**others, **caches)
    batch, seq, kv_heads, head_dim = _check_arrays(qkv, k_cache, v_cache, positions, heads, block_table)
    _check_tables(sin, cos, style, head_dim)
    _check_norms(q_norm, k_norm, heads, kv_heads, head_dim)
    eps = norm_epsilon(eps)
    out = output(xp, out, (batch, seq, heads, head_dim), qkv.dtype)
    refuse_overlap(out, "out", **others, **caches)
    refuse_cache_overlaps(caches, **others)
    if qkv.size == 0:
        return out
    if xp is np or is_checking():
        check_capacity(positions, seq, k_cache.shape, block_table)
    if xp is np:
        if style is not None:
            check_positions(positions, seq, sin.shape[0])
        qkv_append_reference(qkv, k_cache, v_cache, sin, cos, positions, style, q_norm, k_norm, eps, block_table, out)
    else:
        _launch_qkv_append(qkv, k_cache, v_cache, sin, cos, positions, style, q_norm, k_norm, eps, block_table, out)
    return out


def _check_arrays(qkv, k_cache, v_cache, positions, heads, block_table):
    """(batch, seq, kv_heads, head_dim)."""
    check(qkv, "qkv", dtype=FLOATS, ndim=3)
    batch, seq, width = qkv.shape
    check_caches(k_cache, v_cache, qkv.dtype, batch, block_table)
    kv_heads, head_dim = k_cache.shape[2:]
    if whole_number(heads, "heads") < 1 or kv_heads < 1 or head_dim < 1:
        raise ValueError(f"heads must be 1 or more, as k_cache's heads and columns, got {heads} and {k_cache.shape[2:]}")
    if width != (heads + 2 * kv_heads) * head_dim:
        expected = f"({heads} + 2 * {kv_heads}) * {head_dim} = {(heads + 2 * kv_heads) * head_dim}"
        raise ValueError(f"qkv must have {expected} columns, those of all heads of q, k and v, got {width}")
    check(positions, "positions", dtype=int32, shape=(batch,))
    return batch, seq, kv_heads, head_dim


def _check_tables(sin, cos, style, head_dim):
    if style is None:
        if sin is not None or cos is not None:
            raise ValueError("style None turns nothing: pass None as sin and cos, or a style")
        return
    if not isinstance(style, str) or style not in ("neox", "gptj"):
        raise ValueError(f'style must be "neox", "gptj" or None for no rotation, got {shown(style)}')
    if sin is None or cos is None:
        raise ValueError(f'style "{style}" needs both sin and cos, as rope_tables makes them; style None turns nothing')
    check(sin, "sin", dtype=(float32, float16), ndim=2)
    check(cos, "cos", dtype=sin.dtype, shape=sin.shape)
    if 2 * sin.shape[1] > head_dim:
        raise ValueError(f"sin has {sin.shape[1]} columns, one per pair, but k_cache's head_dim {head_dim} has fewer pairs")


def _check_norms(q_norm, k_norm, heads, kv_heads, head_dim):
    for name, weight, rows in (("q_norm", q_norm, heads), ("k_norm", k_norm, kv_heads)):
        if weight is None:
            continue
        check(weight, name, dtype=FLOATS)
        if weight.shape not in ((head_dim,), (rows, head_dim)):
            raise ValueError(f"{name} must have shape ({head_dim},) or ({rows}, {head_dim}), as the heads, got {weight.shape}")
    if q_norm is not None and k_norm is not None and q_norm.dtype != k_norm.dtype:
        raise TypeError(f"k_norm must have dtype {q_norm.dtype}, as q_norm, got {k_norm.dtype}")


def qkv_append_reference(qkv, k_cache, v_cache, sin, cos, positions, style, q_norm, k_norm, eps, block_table, out):
    batch, seq, _ = qkv.shape
    heads, (kv_heads, head_dim) = out.shape[2], k_cache.shape[2:]
    by_head = qkv.reshape(batch, seq, heads + 2 * kv_heads, head_dim)
    q, k, v = by_head[:, :, :heads].copy(), by_head[:, :, heads:-kv_heads].copy(), by_head[:, :, -kv_heads:]
    for x, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            store(x, head_norm_reference(x, weight, None, eps, "rms"))
        if style is not None:
            store(x, rope_reference(x, sin, cos, positions, style))
    out[...] = q
    kv_append_reference(k, v, k_cache, v_cache, positions, block_table)


def _launch_qkv_append(qkv, k_cache, v_cache, sin, cos, positions, style, q_norm, k_norm, eps, block_table, out):
    batch, seq, heads, head_dim = out.shape
    kv_heads = k_cache.shape[2]
    table_len, pairs = (-1, 0) if style is None else sin.shape
    weight = k_norm if q_norm is None else q_norm
    # A head's columns and its pairs both fall into whole accesses.
    vector = codes_width(math.gcd(head_dim, pairs), k_cache, v_cache, qkv, sin, cos, q_norm, k_norm, out)
    columns = vector if weight is None else head_columns(head_dim, qkv, weight)
    (k_kind, *k_parts), (v_kind, *v_parts) = parts_of(k_cache), parts_of(v_cache)
    types = (qkv.dtype, float32 if style is None else sin.dtype, qkv.dtype if weight is None else weight.dtype)
    norm_rows = [1 if w is None or w.ndim == 1 else len(w) for w in (q_norm, k_norm)]
    sizes = map(np.int32, (seq, heads, kv_heads, head_dim, pairs, table_len))
    ends = (*map(np.int32, norm_rows), np.float32(eps))
    caches = (*k_parts, *v_parts)
    launch(
        _instance(*types, style != "gptj", columns, vector, k_kind, v_kind),
        (batch * seq, -(-(heads + 2 * kv_heads) // 4)),
        (128,),
        (
            qkv,
            sin,
            cos,
            positions,
            block_table,
            q_norm,
            k_norm,
            out,
            *caches,
            *sizes,
            *place_sizes(k_cache, block_table),
            *ends,
        ),
        0 if weight is None and k_kind == "dense" else 4 * head_dim * qkv.itemsize,
    )


def _instance(dtype, table, weight, is_neox, columns, vector, k_kind="dense", v_kind="dense"):
    return instance("qkv_append", dtype, table, weight, is_neox, columns, vector, k_kind, v_kind)


INSTANCES = [
    *(_instance(dtype, float32, weight, True, 4, 4) for dtype in (float16, bfloat16) for weight in (dtype, float32)),
    _instance(float16, float32, float16, False, 4, 4),
    _instance(float16, float32, float16, True, 8, 4),
    _instance(float32, float32, float32, True, 4, 4),
    _instance(float16, float16, float32, False, 1, 1),
    *(_instance(float16, float32, float16, True, 4, 4, kind, kind) for kind in KINDS),
    _instance(bfloat16, float32, bfloat16, True, 4, 4, "q8", "q4"),
]
"""With norms and without, arrays and codes of every kind; other combinations are compiled when first used."""
