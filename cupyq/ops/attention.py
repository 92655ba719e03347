"""Attention of queries to keys and values: new ones, or a cache, contiguous or in pages, as values or as codes."""

from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import (
    FLOATS,
    address_of,
    bfloat16,
    check,
    float16,
    float32,
    int32,
    namespace,
    output,
    refuse_partial_overlap,
)
from cupyq._device import shared_bytes_limit
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, is_tracing, launch
from cupyq._recording import spoil
from cupyq.formats import kv_cache
from cupyq.ops import attention_decode, attention_wgmma
from cupyq.ops._common import float64, is_checking, positive_number, refuse_overlap, truth, whole_number
from cupyq.ops.attention_decode import attention_workspace_size
from cupyq.ops.attention_problem import AttentionProblem
from cupyq.ops.kv_append import parts_of
from cupyq.ops.kv_codec import CacheCodes, cache_arrays

__all__ = ["attention", "attention_reference", "attention_workspace_size", "pick_kernel"]


@accepts_dlpack(replays=True)
def attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=True,
    window=None,
    softcap=None,
    sinks=None,
    kv_lengths=None,
    block_table=None,
    query_starts=None,
    out=None,
    workspace=None,
):
    """out[b, i, h] = sum_j w_j * v[b, j, g], w = softmax_j(softcapped(scale * q[b, i, h] . k[b, j, g])), g = h // group

    q [batch, seq, heads, head_dim], k and v [at least batch, capacity, kv_heads, head_dim]: a KV cache or just the new
    keys; group = heads / kv_heads, a whole number; head_dim a multiple of 8 up to 256; all three float16, bfloat16 or
    float32. The result has q's shape and dtype. Where q has 16 bits, k and v may each be `CacheCodes` of that shape
    instead, decoded to q's dtype on the way (kinds "q4" and "q8": head_dim a multiple of 64).

    kv_lengths, int32 [batch], counts the valid keys of each batch row including those of the queries at hand (default:
    capacity). Query i of row b stands at position p = kv_lengths[b] - seq + i and sees the keys j < kv_lengths[b] with
    j <= p where `causal`, and j > p - window where a window (a number of keys, its own included) is given. A query that
    sees no key gives zeros. softcapped(s) is softcap * tanh(s / softcap), taken before masking. scale defaults to
    head_dim**-0.5. sinks, float32 [heads]: a logit per head that joins the softmax's denominator and has no value.

    block_table, int32 [batch, max_pages]: k and v are pages [pages, page_size, kv_heads, head_dim], page_size a power of
    two; key j of row b is slot j % page_size of page block_table[b, j // page_size]; capacity = max_pages * page_size.
    Rows may share pages; entries past a row's length are never looked at.

    query_starts, int32 [batch + 1] from 0 to tokens, never falling: rows of different lengths. q and out are then [tokens,
    heads, head_dim]; row b owns the queries query_starts[b] to query_starts[b + 1], that many being its seq; kv_lengths
    must be given.

    Cache slots no query of the call sees may hold anything, NaN included. A NaN or infinity in a key or value that some
    query of a batch row sees may spread to its other queries.

    On the GPU lengths outside 0..capacity and starts outside 0..tokens are clamped, pages outside 0..pages - 1 become
    page 0, as checking would wait for the GPU. NumPy refuses them; so does the GPU where the environment says
    CUPYQ_CHECK=1, but not while a graph is captured.

    `workspace`, float32 [attention_workspace_size(head_dim)] or larger, is scratch memory, zero when first used; it may serve
    any calls one after the other, as its counters are zero again after each. With it and `out` nothing is allocated.
    A captured call serves all lengths that kv_lengths may hold later.

    Rounding: 16-bit types multiply on tensor cores with fp32 sums, softmax weights are rounded to the type before they
    meet v, the result is rounded once; float32 computes in fp32 throughout. Up to 16 queries of a row, on Hopper any number
    (head_dim 64, 128, 256), meet "q4" and "q8" as stored: q and the result are transformed, which equals decoding but for
    roundings. Same bits on every run, and wherever pages lie. `out` may be q itself, never k or v. Raises TypeError /
    ValueError for wrong dtypes, shapes, strides, options or overlaps.
    Sources: Dao, FlashAttention-2, arXiv 2307.08691; sliding_window of Hugging Face Transformers; attention sinks of its
    gpt_oss; pages as in vLLM, arXiv 2309.06180.

    >>> one = np.ones((1, 2, 1, 8), np.float32)
    >>> attention(one, one, np.stack([one[:, 0], 3 * one[:, 0]], axis=1))[0, :, 0, 0]
    array([1., 2.], dtype=float32)
    """
    tables = {"sinks": sinks, "kv_lengths": kv_lengths, "block_table": block_table, "query_starts": query_starts}
    xp = namespace(q=q, k=k, v=v, **tables, workspace=workspace)
    problem = _checked(q, k, v, scale, causal, window, softcap, **tables)
    if workspace is not None:
        check(workspace, "workspace", dtype=float32, ndim=1, writes=True)
    out = output(xp, out, q.shape, q.dtype)
    refuse_partial_overlap(out, q=q)
    refuse_overlap(out, "out", **cache_arrays(k=k, v=v), **tables, workspace=workspace)
    if q.size == 0:
        return out
    if xp is np:
        _check_tables(problem, q, kv_lengths, block_table, query_starts)
        out[...] = attention_reference(
            q, k, v, problem.scale, causal, problem.window, softcap, kv_lengths, sinks, block_table, query_starts
        )
    else:
        if is_checking():
            spoil()  # each call is checked anew
            if not is_tracing() and not xp.cuda.get_current_stream().is_capturing():
                _check_tables(problem, q, *(None if a is None else a.get() for a in (kv_lengths, block_table, query_starts)))
        _launch_attention(problem, q, k, v, out, workspace)
    return out


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(q, k, v, scale, causal, window, softcap, sinks, kv_lengths, block_table, query_starts):
    """The call as an AttentionProblem: raises for everything that shapes, dtypes and options tell."""
    check(q, "q", dtype=FLOATS, ndim=4 if query_starts is None else 3)
    *_, heads, head_dim = q.shape
    _check_cache(k, "k", q.dtype, (None, None, None, head_dim))
    _check_cache(v, "v", q.dtype, k.shape)
    pages, page_size, kv_heads, _ = k.shape
    if query_starts is None:
        batch, most_queries = q.shape[:2]
    else:
        check(query_starts, "query_starts", dtype=int32, ndim=1)
        if query_starts.size < 2:
            raise ValueError(f"query_starts must have an entry per sequence and one more, got shape {query_starts.shape}")
        if kv_lengths is None:
            raise ValueError("kv_lengths must be given with query_starts, got None: pass the valid keys of each sequence")
        batch, most_queries = query_starts.size - 1, q.shape[0]
    if block_table is None:
        capacity, max_pages = page_size, 1
        if pages < batch:
            raise ValueError(f"k must have at least the {batch} batch rows of q, got shape {k.shape}")
    else:
        check(block_table, "block_table", dtype=int32, shape=(batch, None))
        max_pages = block_table.shape[1]
        if page_size & (page_size - 1) or page_size == 0:
            raise ValueError(f"k must have pages of a power of two of tokens with a block_table, got shape {k.shape}")
        capacity = max_pages * page_size if pages else 0
        if capacity > np.iinfo(np.int32).max:
            raise ValueError(f"block_table must name fewer than 2**31 tokens a row, got {capacity}: make it narrower")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's, got {heads} and {kv_heads}")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"q must have a head_dim that is a multiple of 8 from 8 to 256, got {head_dim}: pad it")
    if window is not None and whole_number(window, "window") < 1:
        raise ValueError(f"window must be a number of keys from 1, or None for all, got {window}")
    if kv_lengths is not None:
        check(kv_lengths, "kv_lengths", dtype=int32, shape=(batch,))
    if sinks is not None:
        check(sinks, "sinks", dtype=float32, shape=(heads,))
    return AttentionProblem(
        batch=batch,
        most_queries=most_queries,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        page_size=page_size,
        max_pages=max_pages,
        pages=pages,
        causal=truth(causal, "causal"),
        window=None if window is None else min(int(window), np.iinfo(np.int32).max),
        scale=positive_number(head_dim**-0.5 if scale is None else scale, "scale"),
        softcap=None if softcap is None else positive_number(softcap, "softcap"),
        kv_lengths=kv_lengths,
        block_table=block_table,
        query_starts=query_starts,
        sinks=sinks,
    )


def _check_cache(array, name, dtype, shape):
    if not isinstance(array, CacheCodes):
        check(array, name, dtype=dtype, shape=shape)
        return
    if dtype == float32:
        raise TypeError(f"q must have dtype float16 or bfloat16 where {name} is a cache of codes, got {dtype}")
    if len(array.shape) != 4 or any(s not in (None, t) for s, t in zip(shape, array.shape, strict=True)):
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")


def _check_tables(problem, q, kv_lengths, block_table, query_starts):
    """Raise ValueError for an entry of the tables (on the host) that names something outside of the arrays."""
    capacity, page_size = problem.capacity, problem.page_size
    if kv_lengths is not None and (bad := np.flatnonzero((kv_lengths < 0) | (kv_lengths > capacity))).size:
        row = int(bad[0])
        raise ValueError(f"kv_lengths must lie in 0..{capacity}, k's capacity, got {kv_lengths[row]} in row {row}")
    if block_table is not None and capacity:
        for row, entries in enumerate(block_table):
            used = problem.max_pages if kv_lengths is None else -(-int(kv_lengths[row]) // page_size)
            if (bad := np.flatnonzero((entries[:used] < 0) | (entries[:used] >= problem.pages))).size:
                entry = int(bad[0])
                raise ValueError(
                    f"block_table must hold pages from 0 to {problem.pages - 1}, "
                    f"got {entries[entry]} in row {row}, entry {entry}"
                )
    if query_starts is not None:
        expected = [0, *query_starts[1:-1].tolist(), q.shape[0]]
        for row, (start, wanted) in enumerate(zip(query_starts.tolist(), expected, strict=True)):
            if start != wanted:
                raise ValueError(f"query_starts must go from 0 to {q.shape[0]}, q's rows, got {start} at entry {row}")
            if row and start < query_starts[row - 1]:
                raise ValueError(f"query_starts must never fall, got {start} after {query_starts[row - 1]} at entry {row}")


# --- the reference ----------------------------------------------------------------------------------------------------

_REFERENCE_SCORES = 1 << 22
_REFERENCE_QUERIES = 64  # of a block where each sees other keys: more would score many keys that are masked out


def attention_reference(q, k, v, scale, causal, window, softcap, kv_lengths, sinks=None, block_table=None, query_starts=None):
    """The definition, in float64. Queries go in blocks, so that no more than a few million scores exist at a time."""
    *_, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    capacity = k.shape[1] if block_table is None else k.shape[1] * block_table.shape[1]
    starts = q.shape[1] * np.arange(q.shape[0] + 1) if query_starts is None else query_starts
    q_rows = q.reshape(-1, heads, head_dim)
    out = np.zeros(q_rows.shape)
    sink = np.full((kv_heads, group, 1, 1), -np.inf) if sinks is None else float64(sinks).reshape(kv_heads, group, 1, 1)
    for b in range(len(starts) - 1):
        seq = int(starts[b + 1] - starts[b])
        length = capacity if kv_lengths is None else int(kv_lengths[b])
        positions = length - seq + np.arange(seq)
        begins = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
        ends = positions + 1 if causal else np.full_like(positions, length)
        # Slots outside of this are never touched: they may hold NaN.
        first, last = (int(begins[0]), int(ends[-1])) if seq else (0, 0)
        if last <= first:
            continue
        keys = float64(_stored(k, b, first, last, block_table, q.dtype)).transpose(1, 2, 0)  # [kv_heads, head_dim, keys]
        values = float64(_stored(v, b, first, last, block_table, q.dtype)).transpose(1, 0, 2)  # [kv_heads, keys, head_dim]
        block = max(1, _REFERENCE_SCORES // (heads * (last - first)))
        if causal or window is not None:
            block = min(block, _REFERENCE_QUERIES)
        for start in range(0, seq, block):
            rows = slice(start, min(start + block, seq))
            low, high = int(begins[rows.start]), int(ends[rows.stop - 1])
            if high <= low:
                continue
            here = slice(starts[b] + rows.start, starts[b] + rows.stop)
            queries = float64(q_rows[here]).reshape(-1, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
            count = queries.shape[2]
            scores = queries.reshape(kv_heads, group * count, head_dim) @ keys[:, :, low - first : high - first]
            scores = scores.reshape(kv_heads, group, count, -1)
            scores *= scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            j = np.arange(low, high)
            np.copyto(scores, -np.inf, where=(j < begins[rows, None]) | (j >= ends[rows, None]))
            top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
            top = np.where(top == -np.inf, 0.0, top)
            scores -= top
            weights = np.exp(scores, out=scores)
            total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - top)
            sums = weights.reshape(kv_heads, group * count, -1) @ values[:, low - first : high - first]
            result = sums.reshape(kv_heads, group, count, head_dim) / np.where(total == 0, 1.0, total)
            out[here] = result.transpose(2, 0, 1, 3).reshape(count, heads, head_dim)
    return out.reshape(q.shape)


def _stored(array, b, first, last, block_table, dtype):
    """Tokens first to last of sequence b, [tokens, kv_heads, head_dim], as a cache stores them, decoded to `dtype`."""
    if block_table is None:
        place = b, slice(first, last)
    else:
        tokens, page_size = np.arange(first, last), array.shape[1]
        place = block_table[b, tokens // page_size], tokens % page_size
    if not isinstance(array, CacheCodes):
        return array[place]
    scales = None if array.scales is None else array.scales[place]
    return kv_cache.decode(array.codes[place], scales, array.kind).reshape(last - first, *array.shape[2:]).astype(dtype)


# --- which kernel, with which tiles -----------------------------------------------------------------------------------

_DECODE_QUERIES = 16  # of a sequence: the most for attention_decode
_SIMPLE_ROWS = 16  # queries of a block of attention_simple


def pick_kernel(dtype, most_queries, head_dim, is_aligned, arch, has_codes=False, page_size=None):
    """Which kernel: "decode" packs the heads of a group and splits the keys, "wgmma" and "prefill" take many queries,
    "simple" goes without tensor cores. `page_size`: None without a block table."""
    if dtype == float32 or not is_aligned or (dtype == bfloat16 and _device.arch_number(arch) < 80):
        return "simple"
    if most_queries <= _DECODE_QUERIES:
        return "decode"
    if arch == "sm_90a" and attention_wgmma.supports(head_dim, page_size, has_codes):
        return "wgmma"
    return "prefill"


@dataclass(frozen=True)
class PrefillConfig:
    warps: int
    tile_keys: int

    def shared_bytes(self, head_dim):
        """Two stages of K and V; the queries lie under them where they fit into registers (head_dim <= 128)."""
        keys, queries = 4 * self.tile_keys, 16 * self.warps
        rows = max(keys, queries) if head_dim <= 128 else keys + queries
        return rows * 2 * (_padded(head_dim, 16) + 8)


def pick_prefill_config(head_dim, arch):
    choices = [(8, 64), (4, 32)] if head_dim <= 128 else [(8, 32), (4, 32), (2, 16)]
    configs = [PrefillConfig(*choice) for choice in choices]
    return next(config for config in configs if config.shared_bytes(head_dim) <= shared_bytes_limit(arch))


def _padded(head_dim, multiple):
    return -(-head_dim // multiple) * multiple


# --- launching --------------------------------------------------------------------------------------------------------


def _launch_attention(problem, q, k, v, out, workspace):
    has_codes = isinstance(k, CacheCodes) or isinstance(v, CacheCodes)
    arrays = (q, *cache_arrays(k=k, v=v).values(), out)
    is_aligned = not any([a is not None and address_of(a) % 16 for a in arrays])
    page_size = problem.page_size if problem.is_paged else None
    arch = _device.current().arch
    kernel = pick_kernel(q.dtype, problem.most_queries, problem.head_dim, is_aligned, arch, has_codes, page_size)
    if problem.capacity == 0:
        kernel = "simple"  # which reads no key then; others may want memory to name
    elif kernel == "decode" and not attention_decode.supports(problem, k, v):
        kernel = "prefill"
    elif kernel == "wgmma" and isinstance(k, CacheCodes) != isinstance(v, CacheCodes):
        kernel = "prefill"
    if kernel == "decode":
        attention_decode.launch(problem, q, k, v, out, workspace)
    elif kernel == "wgmma":
        attention_wgmma.launch(problem, q, k, v, out)
    elif kernel == "prefill":
        _launch_prefill(problem, q, k, v, out)
    else:
        _launch_simple(problem, q, k, v, out)


def _launch_prefill(problem, q, k, v, out):
    config = pick_prefill_config(problem.head_dim, _device.current().arch)
    wanted = _prefill_instance(q.dtype, problem.head_dim, config, parts_of(k)[0], parts_of(v)[0])
    shared = config.shared_bytes(problem.head_dim)
    launch(wanted, _grid(problem, 16 * config.warps), (32 * config.warps,), _arguments(problem, q, k, v, out), shared)


def _launch_simple(problem, q, k, v, out):
    padded = _padded(problem.head_dim, 32)
    shared = 4 * (_SIMPLE_ROWS * padded + 32 * (padded + 4) + _SIMPLE_ROWS * 32)
    wanted = _simple_instance(q.dtype, problem.head_dim, parts_of(k)[0], parts_of(v)[0])
    launch(wanted, _grid(problem, _SIMPLE_ROWS), (128,), _arguments(problem, q, k, v, out), shared)


def _grid(problem, tile_rows):
    """A block per tile of queries and head. Where only the device knows the rows of each sequence: as many as there may be."""
    if problem.query_starts is None:
        tiles = -(-problem.most_queries // tile_rows) * problem.batch
    else:
        tiles = problem.most_queries // tile_rows + problem.batch
    return (tiles * problem.heads,)


def _arguments(problem, q, k, v, out):
    sizes = (problem.batch, problem.most_queries, problem.heads, problem.kv_heads, problem.head_dim, problem.capacity)
    page_shift = problem.page_size.bit_length() - 1 if problem.is_paged else 0
    return (
        q,
        *parts_of(k)[1:],
        *parts_of(v)[1:],
        *(problem.kv_lengths, problem.block_table, problem.query_starts, problem.sinks),
        out,
        *map(np.int32, (*sizes, page_shift, problem.max_pages, problem.pages)),
        *map(np.int32, (problem.causal, problem.kernel_window)),
        *map(np.float32, (problem.scale, problem.kernel_softcap)),
    )


def _simple_instance(dtype, head_dim, k_kind="dense", v_kind="dense"):
    return instance("attention_simple", dtype, _padded(head_dim, 32), k_kind, v_kind)


def _prefill_instance(dtype, head_dim, config, k_kind="dense", v_kind="dense"):
    return instance("attention_prefill", dtype, _padded(head_dim, 16), config.warps, config.tile_keys, k_kind, v_kind)


def _instances(arch):
    yield _simple_instance(float32, 128)
    for dtype in (float16, bfloat16):
        for head_dim in (64, 128):
            yield _prefill_instance(dtype, head_dim, pick_prefill_config(head_dim, arch))
    for kinds in (("fp8", "fp8"), ("e4m3", "e4m3"), ("q4", "q4"), ("q8", "q4"), ("q8", "q8")):
        yield _prefill_instance(float16, 128, pick_prefill_config(128, arch), *kinds)


INSTANCES = list(_instances("sm_90a"))
"""What `cupyq compile` builds ahead; other sizes, and tiles for less shared memory, are compiled when first used."""
