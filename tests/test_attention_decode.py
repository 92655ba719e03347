"""Decoding: how keys are shared out, and attention_decode against the reference for every kind of cache."""

import itertools
import math
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, needs_cupy
from kernel_checks import sylvester

from cupyq import _device, _kernels
from cupyq.errors import UnsupportedError
from cupyq.formats import kv_cache
from cupyq.ops import attention_decode as module
from cupyq.ops.advance import advance
from cupyq.ops.attention import attention_reference
from cupyq.ops.attention_problem import AttentionProblem
from cupyq.ops.kv_codec import CacheCodes

float16, bfloat16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
DTYPES = [float16, bfloat16]
ULP = {float16: 2.0**-11, bfloat16: 2.0**-8}
KINDS = [("fp8", "fp8"), ("e4m3", "e4m3"), ("q4", "q4"), ("q8", "q8"), ("q8", "q4"), ("q4", "dense"), ("dense", "e4m3")]


def int32(*values):
    return np.array(values, np.int32)


# --- problems and oracles ---------------------------------------------------------------------------------------------


def problem_of(q, k, *, scale=None, causal=True, window=None, softcap=None, **tables):
    *_, heads, head_dim = q.shape
    pages, page_size, kv_heads, _ = k.shape
    starts, table = tables.get("query_starts"), tables.get("block_table")
    max_pages = 1 if table is None else table.shape[1]
    capacity = page_size * max_pages
    return AttentionProblem(
        batch=q.shape[0] if starts is None else starts.size - 1,
        most_queries=q.shape[1] if starts is None else q.shape[0],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        page_size=page_size,
        max_pages=max_pages,
        pages=pages,
        causal=causal,
        window=window,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        **tables,
    )


def reference_of(q, k, v, *, scale=None, causal=True, window=None, softcap=None, **tables):
    """Float64, from the values a cache decodes to."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = tables.pop("kv_lengths", None)
    if lengths is not None:
        table = tables.get("block_table")
        lengths = np.clip(lengths, 0, k.shape[1] * (1 if table is None else table.shape[1]))
    return attention_reference(q, k, v, scale, causal, window, softcap, lengths, **tables)


def stored(cache):
    """What a cache holds of its values or of their transform, each rounded as it is stored: float64, is_transformed."""
    if not isinstance(cache, CacheCodes):
        return cache.astype(np.float64), False
    codes, kind = cache.codes, cache.kind
    if kind in ("fp8", "e4m3"):
        return kv_cache.decode(codes, cache.scales, kind).reshape(cache.shape).astype(np.float64), False
    if kind == "q4":
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(cache.shape)
    centred = codes.astype(np.float32) - {"q4": 8, "q8": 128}[kind]
    scales = np.repeat(cache.scales.astype(np.float32), 32, axis=-1)
    return (centred * scales).astype(float16).astype(np.float64), True


def ideal(cache):
    """The values of a cache without the roundings of its decoder."""
    if isinstance(cache, CacheCodes) and cache.kind == "e4m3":
        return cache.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * cache.scales.astype(np.float64)
    values, is_transformed = stored(cache)
    return sylvester(values) / 32 if is_transformed else values


def gathered(cache, table, b):
    return cache[b] if table is None else cache[table[b]].reshape(-1, *cache.shape[2:])


def attend(q, k, v, *, scale=None, causal=True, window=None, softcap=None, round_weights=None, **tables):
    """Plain loops over sequences and heads: over float64, or float32 whose weights are rounded to a dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts, table, sinks = (tables.get(name) for name in ("query_starts", "block_table", "sinks"))
    rows = q.reshape(-1, *q.shape[-2:])
    if starts is None:
        starts = q.shape[1] * np.arange(q.shape[0] + 1)
    out = np.zeros(rows.shape, q.dtype)
    for b in range(len(starts) - 1):
        keys, values = gathered(k, table, b), gathered(v, table, b)
        length = len(keys) if tables.get("kv_lengths") is None else int(np.clip(tables["kv_lengths"][b], 0, len(keys)))
        count = int(starts[b + 1] - starts[b])
        position, j = length - count + np.arange(count)[:, None], np.arange(length)[None]
        mask = np.full((count, length), True)
        if causal:
            mask &= j <= position
        if window is not None:
            mask &= j > position - window
        used = np.flatnonzero(mask.any(axis=0))
        mask = mask[:, used]
        for h in range(rows.shape[1]):
            g = h // (rows.shape[1] // k.shape[2])
            scores = (rows[starts[b] : starts[b + 1], h] @ keys[used, g].T) * q.dtype.type(scale)
            if softcap is not None:
                scores = q.dtype.type(softcap) * np.tanh(scores / q.dtype.type(softcap))
            scores = np.where(mask, scores, -np.inf).astype(q.dtype)
            sink = np.full((count, 1), -np.inf if sinks is None else sinks[h], q.dtype)
            top = np.max(np.concatenate((scores, sink), axis=1), axis=1, keepdims=True)
            top = np.where(np.isinf(top), 0, top).astype(q.dtype)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
            if round_weights is not None:
                weights = weights.astype(round_weights).astype(q.dtype)
            out[starts[b] : starts[b + 1], h] = (weights @ values[used, g]) / np.where(total == 0, 1, total)
    return out.reshape(q.shape)


def verify_result(result, q, k, v, options):
    """Within twice the worst error of low-precision arithmetic and one rounding, per element and for the norm."""
    dtype, math_dtype = q.dtype, q.dtype if isinstance(v, np.ndarray) else float16
    exact = attend(q.astype(np.float64), ideal(k), ideal(v), **options)
    q_low, (keys, is_transformed) = q.astype(np.float32), stored(k)
    if is_transformed:  # q is transformed and rounded to float16, and meets what the cache stores
        q_low = (sylvester(q.astype(np.float64)) / 32).astype(float16).astype(np.float32)
    keys, (values, is_transformed) = keys.astype(np.float32), stored(v)
    values = values.astype(np.float32)
    low = attend(q_low, keys, values, round_weights=math_dtype, **options)
    if is_transformed:
        low = sylvester(low.astype(np.float64)) / 32
    low = low.astype(dtype).astype(np.float64)
    assert result.shape == q.shape and result.dtype == dtype
    result = result.astype(np.float64)
    exact_bound(result, exact, low, ulp=ULP[dtype])
    allowed = 2 * np.linalg.norm(low - exact) + ULP[dtype] * np.linalg.norm(exact)
    assert np.linalg.norm(result - exact) <= allowed, f"error {np.linalg.norm(result - exact):.3g}, allowed {allowed:.3g}"
    # The definition decodes with roundings inside of its transforms: as far from this as the ideal values are, and no further.
    definition = reference_of(q, k, v, **options)
    between = np.linalg.norm(definition - exact)
    assert np.linalg.norm(result - definition) <= allowed + between and between <= 6 * ULP[dtype] * np.linalg.norm(exact)


def cache_of(values, kind):
    if kind == "dense":
        return values
    codes, scales = kv_cache.encode(values.astype(float16), kind)
    codes = codes.reshape(kv_cache.code_shape(values.shape, kind))
    return CacheCodes(kind, codes, None if scales is None else scales.reshape(kv_cache.scale_shape(values.shape, kind)))


def make(rng, dtype, batch, seq, capacity, heads, kv_heads, head_dim, *, kinds=("dense", "dense"), sharpness=2.0):
    q = (sharpness * rng.standard_normal((batch, seq, heads, head_dim))).astype(dtype)
    shape = (batch, capacity, kv_heads, head_dim)
    return q, *(cache_of(rng.standard_normal(shape).astype(dtype), kind) for kind in kinds)


def poison(cache, slots):
    """Whatever may lie in unused slots (a mask [pages, page_size]): NaN, as far as the kind knows it."""
    if isinstance(cache, CacheCodes):
        cache.codes[slots] = 0xFF
        if cache.scales is not None:
            cache.scales[slots] = np.nan
    else:
        cache[slots] = np.nan


def unused_slots(q, k, window=None, kv_lengths=None, block_table=None, query_starts=None, **_):
    unused = np.full(k.shape[:2], True)
    batch = q.shape[0] if query_starts is None else query_starts.size - 1
    for b in range(batch):
        pages = int32(b) if block_table is None else block_table[b]
        count = q.shape[1] if query_starts is None else int(query_starts[b + 1] - query_starts[b])
        capacity = len(pages) * k.shape[1]
        length = capacity if kv_lengths is None else int(np.clip(kv_lengths[b], 0, capacity))
        for t in range(0 if window is None else max(0, length - count - window + 1), length):
            unused[pages[t // k.shape[1]], t % k.shape[1]] = False
    return unused


def paged(rng, cache, page_size, spare=3):
    """The same cache in pages at random places, and its table. The capacity is whole pages."""
    batch, capacity = cache.shape[:2]
    max_pages = capacity // page_size
    table = rng.permutation(batch * max_pages + spare)[: batch * max_pages].reshape(batch, max_pages).astype(np.int32)

    def moved(array):
        pages = np.zeros((batch * max_pages + spare, page_size, *array.shape[2:]), array.dtype)
        pages[table] = array.reshape(batch, max_pages, page_size, *array.shape[2:])
        return pages

    if isinstance(cache, CacheCodes):
        scales = None if cache.scales is None else moved(cache.scales)
        return CacheCodes(cache.kind, moved(cache.codes), scales), table
    return moved(cache), table


def uploaded(cupy, cache):
    if not isinstance(cache, CacheCodes):
        return cupy.asarray(cache)
    return CacheCodes(cache.kind, cupy.asarray(cache.codes), None if cache.scales is None else cupy.asarray(cache.scales))


def on_gpu(cupy, q, k, v, *, workspace=None, config=None, ahead_tiles=2, out=None, **options):
    """launch() with out between sentinels and the tables on the GPU."""
    for name in ("kv_lengths", "block_table", "query_starts", "sinks"):
        if options.get(name) is not None:
            options[name] = cupy.asarray(options[name])
    sentinel = np.full(q.size + 128, np.nan).astype(q.dtype)
    buffer = cupy.asarray(sentinel)
    out = buffer[64 : 64 + q.size].reshape(q.shape)
    problem = problem_of(q, k, **options)
    extra = {"ahead_tiles": ahead_tiles, "config": config}
    module.launch(problem, cupy.asarray(q), uploaded(cupy, k), uploaded(cupy, v), out, workspace, **extra)
    host = buffer.get()
    for edge in (host[:64], host[64 + q.size :]):
        assert edge.tobytes() == sentinel[:64].tobytes(), "written outside of out"
    return host[64 : 64 + q.size].reshape(q.shape)


def verify(cupy, q, k, v, **options):
    slots = unused_slots(q, k, **options)
    poison(k, slots)
    poison(v, slots)
    result = on_gpu(cupy, q, k, v, **options)
    for cache in (k, v):  # decoding all of it on the host shall not warn
        if isinstance(cache, CacheCodes):
            cache.codes[slots] = 0
            if cache.scales is not None:
                cache.scales[slots] = 0
        else:
            cache[slots] = 0
    for name in ("ahead_tiles", "config", "workspace"):
        options.pop(name, None)
    verify_result(result, q, k, v, options)
    return result


# --- how keys are shared out ------------------------------------------------------------------------------------------


def shares_in_the_kernel(problem, plan, lengths):
    """cu/attention_shares.cuh: the length of a share, then of each item of a head its first place among all tiles, and its
    tiles."""
    tiles = []
    for length in lengths:
        begin = 0 if problem.window is None else max(0, length - problem.most_queries - problem.window + 1)
        tiles.append(max(1, -(-length // 16) - min(begin, length) // 16))
    row_tiles = -(-problem.most_queries * problem.group // 16)
    sizes = np.repeat(tiles, row_tiles)
    begins = np.cumsum(sizes) - sizes
    if plan.most_shares == 0:
        return None, begins, sizes
    longest = int(sizes.max())
    length = max(
        min(plan.least_tiles, longest),
        -(-int(sizes.sum()) // plan.most_shares),
        int(np.ceil(np.sqrt(np.float32(longest * plan.part_rows) / np.float32(45)))),
    )
    return length, begins, sizes


def plans():
    rng = np.random.default_rng(1)
    for batch, kv_heads, group, seq in itertools.product([1, 3, 64, 600], [1, 8], [1, 4, 20], [1, 5]):
        for capacity, window in ((100, None), (5000, None), (5000, 300), (100_000, None)):
            lengths = rng.integers(0, capacity + 1, batch)
            q = np.broadcast_to(np.float16(0), (batch, seq, kv_heads * group, 64))
            k = np.broadcast_to(np.float16(0), (batch, capacity, kv_heads, 64))
            yield q, k, window, lengths


@pytest.mark.parametrize("sm_count", [1, 20, 132, 600])
def test_plans_hold_every_share(sm_count):
    """Blocks enough for all shares, and a place of its own for every part and every counter."""
    for q, k, window, lengths in plans():
        problem = problem_of(q, k, window=window)
        plan, heads = module.plan_shares(problem, 2 * sm_count), problem.kv_heads
        share, begins, sizes = shares_in_the_kernel(problem, plan, lengths.tolist())
        if share is None:
            assert plan.blocks == heads * len(sizes) and plan.parts == plan.counters == 0
            continue
        assert -(-sizes.sum() // share) * heads <= plan.blocks <= 2 * sm_count
        first, last = begins // share, (begins + sizes - 1) // share  # shares of each item
        slots, counters = [], []
        for item, head in itertools.product(np.flatnonzero(last > first), range(heads)):
            block = first[item] * heads + head
            counters.append(block)
            slots.append(2 * block + (begins[item] != share * first[item]))
            slots.extend(2 * (np.arange(first[item] + 1, last[item] + 1) * heads + head))
        assert len(set(slots)) == len(slots) and max(slots, default=0) < plan.parts == 2 * plan.blocks
        assert len(set(counters)) == len(counters) and max(counters, default=0) < plan.blocks == plan.counters
        assert plan.counters <= module._COUNTERS
        needed = module._COUNTERS + plan.parts * plan.part_floats(64)
        assert needed <= module.attention_workspace_size(64, sm_count=sm_count)


def test_what_is_not_split():
    """Too many sequences for every block to look at all, or too many tiles to count; and items of one short share."""
    for batch, capacity, splits in ((1, 4096, True), (512, 4096, True), (513, 4096, False), (1, 48, False)):
        q, k = (np.broadcast_to(np.float16(0), (batch, size, 8, 64)) for size in (1, capacity))
        plan = module.plan_shares(problem_of(q, k), 264)
        assert (plan.most_shares > 0) is splits
        assert plan.blocks == (264 if splits else 8 * batch)
    q, k = (np.broadcast_to(np.float16(0), (512, size, 8, 64)) for size in (1, 1 << 25))
    assert module.plan_shares(problem_of(q, k), 264).most_shares == 0
    # Not split, any sequence may have all of the rows.
    q, k = np.broadcast_to(np.float16(0), (6, 6, 64)), np.broadcast_to(np.float16(0), (4, 32, 2, 64))
    plan = module.plan_shares(problem_of(q, k, query_starts=int32(0, 2, 2, 4, 6), kv_lengths=int32(13, 24, 29, 14)), 264)
    assert plan.most_shares == 0 and plan.blocks == 2 * 4 * 2


def test_shares_of_an_h100():
    """Of sequences long enough all 264 blocks get a share but a few, and a part of four rows costs a quarter of sixteen's."""
    for lengths, seq, expected in (
        ([4096], 1, 8),
        ([1024], 1, 4),
        ([32768], 1, 63),
        ([4096] * 16, 1, 125),
        (np.linspace(1, 16384, 64).astype(int).tolist(), 1, 994),
        ([1024], 4, 5),
        ([40] * 7, 1, 3),
    ):
        q = np.empty((len(lengths), seq, 32, 128), np.float16)
        problem = problem_of(q, np.broadcast_to(np.float16(0), (len(lengths), 2 * max(lengths), 8, 128)))
        plan = module.plan_shares(problem, 264)
        share, _, sizes = shares_in_the_kernel(problem, plan, lengths)
        assert share == expected, (lengths, share, sizes.sum())


@pytest.mark.parametrize("arch", [*_device.TARGET_ARCHS, "sm_999"])
def test_tiles_fit_every_gpu(arch):
    limit = module.shared_bytes_limit(arch)
    for head_dim in range(8, 257, 8):
        config = module.pick_decode_config(head_dim, arch)
        assert config.shared_bytes(head_dim) <= limit and config.stages >= 2
    for head_dim, kinds in itertools.product((64, 128, 192, 256), KINDS):
        for has_many_items in (False, True):
            config = module.pick_decode_config(head_dim, arch, *kinds, has_many_items=has_many_items)
            assert config.shared_bytes(head_dim, *kinds) <= limit and config.stages >= 2


def test_blocks_of_an_h100_live_together():
    """228 KiB, of which 1 KiB a block is the system's: one of eight warps for few items, two of four warps for many."""
    for kinds in (("dense", "dense"), *KINDS):
        chosen = module.pick_decode_config(128, "sm_90a", *kinds)
        four = module.pick_decode_config(128, "sm_90a", *kinds, has_many_items=True)
        assert four.warps == 4 and chosen.warps == 8 and chosen.blocks_per_sm(128, "sm_90a", *kinds) == 1
        assert 2 * (four.shared_bytes(128, *kinds) + 1024) <= 228 * 1024 and four.blocks_per_sm(128, "sm_90a", *kinds) == 2
    assert module.DecodeConfig(4, 6).blocks_per_sm(128, "sm_90a") == 1
    assert module.DecodeConfig(4, 2).blocks_per_sm(256, "sm_90a") == module.DecodeConfig(2, 2).blocks_per_sm(128, "sm_75") == 1


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q8", "q4")], ids=str)
def test_wide_heads_do_not_spill(arch, kinds):
    """The widest accumulators, with the tiles each GPU gets; the common sizes are among INSTANCES."""
    needs_cupy()
    wanted = module._decode_instance(float16, 256, module.pick_decode_config(256, arch, *kinds), *kinds)
    _, _, log = _kernels.compile_instance(wanted, arch, ("--ptxas-options=-v",))
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"], f"{wanted} on {arch}: {log}"


def test_what_is_supported():
    q = np.empty((1, 1, 2, 96), np.float16)
    k = np.zeros((4, 1, 2, 96), np.float16)
    table = np.zeros((1, 4), np.int32)
    problem = problem_of(q, k, block_table=table)
    assert module.supports(problem, k, k)
    for cache, is_supported in ((cache_of(k, "fp8"), False), (cache_of(np.zeros((4, 1, 2, 64)), "q4"), False)):
        q = np.empty((1, 1, 2, cache.head_dim), np.float16)
        assert module.supports(problem_of(q, cache, block_table=table), cache, cache) is is_supported
    with pytest.raises(UnsupportedError, match="takes codes with a head_dim that is a multiple of 64"):
        module.launch(problem, q, cache_of(k, "fp8"), k, q, None)


# --- the oracles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_the_oracle_is_the_reference(kinds):
    """Plain attention over ideal values against the definition over decoded ones, and a wrong kind of product rejected."""
    rng = np.random.default_rng(2)
    q, k, v = make(rng, float16, 2, 3, 40, 4, 2, 64, kinds=kinds)
    options = {"kv_lengths": int32(40, 17), "window": 9, "sinks": np.array([0.5, -1, 2, 0], np.float32)}
    exact = attend(q.astype(np.float64), ideal(k), ideal(v), **options)
    verify_result(exact.astype(float16), q, k, v, options)
    for wrong in (
        attend(q.astype(np.float64), ideal(k), ideal(v), **options | {"sinks": None}),
        attend(q.astype(np.float64), ideal(k), ideal(v), **options | {"window": 10}),
        attend(q.astype(np.float64), ideal(k), ideal(v)[:, :, ::-1], **options),
        attend(q.astype(np.float64), ideal(k)[..., ::-1], ideal(v), **options),
    ):
        with pytest.raises(AssertionError):
            verify_result(wrong.astype(float16), q, k, v, options)


# --- kernels ----------------------------------------------------------------------------------------------------------

# batch, seq, capacity, heads, kv_heads, options
SHAPES = [
    (1, 1, 1, 1, 1, {}),
    (1, 1, 255, 4, 4, {}),
    (1, 1, 257, 8, 2, {"softcap": 2.0, "ahead_tiles": 0}),
    (3, 1, 300, 8, 1, {"kv_lengths": int32(256, 1, 300)}),
    (2, 2, 300, 6, 2, {"kv_lengths": int32(257, 1), "window": 33}),
    (1, 1, 2100, 12, 1, {"kv_lengths": int32(2065), "sinks": np.linspace(-3, 3, 12, dtype=np.float32)}),
    (2, 5, 600, 8, 2, {"kv_lengths": int32(600, 0), "sinks": np.linspace(-3, 9, 8, dtype=np.float32)}),
    (1, 16, 256, 9, 3, {"window": 100}),
    (1, 16, 256, 3, 1, {"causal": False, "scale": 0.3}),
    (1, 1, 700, 20, 1, {"kv_lengths": int32(650), "softcap": 20.0}),
]


@pytest.fixture
def kernels(cupy):
    """The kernels of the larger tests, compiled together: one after the other they would take a minute."""
    wanted, arch = [], _device.current().arch
    for dtype, head_dim, kinds in CODE_CASES + [(*case, ("dense", "dense")) for case in VALUE_CASES]:
        config = module.pick_decode_config(head_dim, arch, *kinds)
        wanted.append(module._decode_instance(dtype, head_dim, config, *kinds))
    _kernels.compile_all(wanted, arch)


VALUE_CASES = [(dtype, head_dim) for dtype in DTYPES for head_dim in (8, 64, 72, 128, 256)]
CODE_CASES = [
    *((float16, 128, kinds) for kinds in KINDS),
    *((float16, head_dim, kinds) for head_dim in (64, 192, 256) for kinds in KINDS[1:5:3]),  # e4m3, and q8 with q4
    *((bfloat16, 128, kinds) for kinds in KINDS[4:]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim", VALUE_CASES, ids=str)
def test_values_against_reference(cupy, kernels, dtype, head_dim):
    rng = np.random.default_rng(head_dim)
    for batch, seq, capacity, heads, kv_heads, options in SHAPES:
        verify(cupy, *make(rng, dtype, batch, seq, capacity, heads, kv_heads, head_dim), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim, kinds", CODE_CASES, ids=str)
def test_codes_against_reference(cupy, kernels, dtype, head_dim, kinds):
    rng = np.random.default_rng(3)
    for batch, seq, capacity, heads, kv_heads, options in SHAPES[1:] if head_dim == 128 else SHAPES[3:6]:
        verify(cupy, *make(rng, dtype, batch, seq, capacity, heads, kv_heads, head_dim, kinds=kinds), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("e4m3", "e4m3"), ("q8", "q4")], ids=str)
@pytest.mark.parametrize("page_size", [2, 8, 16, 256])
def test_pages_give_the_bits_of_a_contiguous_cache(cupy, page_size, kinds):
    rng = np.random.default_rng(page_size)
    for kv_heads, seq, options in ((2, 1, {}), (1, 3, {"window": 90}), (3, 1, {"softcap": 10.0})):
        lengths = int32(1000, 130, 1)
        q, k, v = make(rng, float16, 3, seq, 1024, 2 * kv_heads, kv_heads, 64, kinds=kinds)
        whole = on_gpu(cupy, q, k, v, kv_lengths=lengths, **options)
        k_pages, table = paged(np.random.default_rng(5), k, page_size)
        v_pages, same = paged(np.random.default_rng(5), v, page_size)
        assert table.tobytes() == same.tobytes()
        options = options | {"kv_lengths": lengths, "block_table": table}
        assert verify(cupy, q, k_pages, v_pages, **options).tobytes() == whole.tobytes()


@pytest.mark.gpu
def test_table_entries_outside_read_page_0(cupy):
    rng = np.random.default_rng(6)
    q, k, v = make(rng, float16, 1, 1, 64, 4, 2, 64)
    k, v = (np.concatenate((cache, rng.standard_normal(cache.shape).astype(float16))) for cache in (k, v))
    expected = on_gpu(cupy, q, k, v, block_table=int32(1, 0, 0, 0).reshape(1, 4))
    result = on_gpu(cupy, q, k, v, block_table=int32(1, -1, 2, 2**31 - 1).reshape(1, 4))
    assert result.tobytes() == expected.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q8", "q4")], ids=str)
def test_queries_of_different_lengths(cupy, kinds):
    rng = np.random.default_rng(7)
    for starts, heads, kv_heads in ((int32(0, 3, 3, 4, 16), 8, 2), (int32(0, 40, 41), 4, 4), (int32(0, 1), 20, 1)):
        batch = starts.size - 1
        _, k, v = make(rng, float16, batch, 1, 512, heads, kv_heads, 64, kinds=kinds)
        q = (2 * rng.standard_normal((int(starts[-1]), heads, 64))).astype(float16)
        lengths = int32(512, 9, 1, 300)[:batch]
        verify(cupy, q, k, v, query_starts=starts, kv_lengths=lengths)
        verify(cupy, q, k, v, query_starts=starts, kv_lengths=lengths, window=3)  # so few keys that none are split
        paged_k, table = paged(np.random.default_rng(8), k, 32)
        paged_v, _ = paged(np.random.default_rng(8), v, 32)
        options = {"block_table": table, "query_starts": starts, "kv_lengths": lengths, "window": 77}
        verify(cupy, q, paged_k, paged_v, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(cupy, dtype):
    rng = np.random.default_rng(9)
    for turn in range(30):
        batch, kv_heads, group = rng.integers(1, 5), rng.integers(1, 4), rng.choice([1, 2, 3, 4, 5, 8, 20])
        seq, capacity = rng.choice([1, 2, 3, 7, 16]), int(rng.integers(16, 60)) * 16
        heads = kv_heads * group
        options = {
            "causal": bool(rng.integers(4)),
            "window": None if rng.integers(2) else int(rng.integers(1, capacity + 9)),
            "softcap": None if rng.integers(3) else float(rng.uniform(0.5, 30)),
            "sinks": None if rng.integers(2) else rng.uniform(-5, 5, heads).astype(np.float32),
            "kv_lengths": rng.integers(0, capacity + 1, batch).astype(np.int32),
        }
        kinds = [("dense", "dense"), ("dense", "dense"), ("q8", "q4")][turn % 3]
        q, k, v = make(rng, dtype, batch, seq, capacity, heads, kv_heads, 64, kinds=kinds, sharpness=rng.choice([0.1, 2, 4]))
        if rng.integers(2):
            (k, table), (v, _) = (paged(np.random.default_rng(turn), cache, 16) for cache in (k, v))
            options["block_table"] = table
        verify(cupy, q, k, v, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q4", "q4")], ids=str)
def test_many_shares(cupy, kinds):
    """A long cache for one head, whose shares are as many as there may be; then a batch of unequal lengths."""
    rng = np.random.default_rng(10)
    q, k, v = make(rng, float16, 1, 1, 30_000, 3, 1, 64, kinds=kinds, sharpness=3.0)
    verify(cupy, q, k, v, kv_lengths=int32(29_003))
    q, k, v = make(rng, float16, 40, 1, 1024, 4, 2, 64, kinds=kinds)
    verify(cupy, q, k, v, kv_lengths=np.linspace(1, 1024, 40).astype(np.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q8", "q4")], ids=str)
def test_blocks_with_several_segments(cupy, kinds):
    """Several sequences a lane, some without keys, some without queries, and items of two row tiles: shares begin anywhere."""
    rng = np.random.default_rng(17)
    for batch, capacity, most in ((70, 160, 9), (33, 400, 3), (2, 900, 40), (300, 90, 3)):
        counts = rng.integers(0, most, batch)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        q, k, v = make(rng, float16, batch, 1, capacity, 8, 2, 64, kinds=kinds)
        q = (2 * rng.standard_normal((int(starts[-1]), 8, 64))).astype(float16)
        lengths = rng.integers(0, capacity + 1, batch).astype(np.int32)
        lengths[rng.integers(0, batch, batch // 8)] = 0
        verify(cupy, q, k, v, query_starts=starts, kv_lengths=lengths)
    q, k, v = make(rng, float16, 70, 2, 160, 24, 2, 64, kinds=kinds)
    verify(cupy, q, k, v, kv_lengths=rng.integers(0, 161, 70).astype(np.int32), window=75)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_lengths_that_the_kernel_before_changes(cupy, batch):
    """Blocks look at the lengths before advance() has ended, and must notice that they were others."""
    rng = np.random.default_rng(18)
    q, k, v = make(rng, float16, batch, 1, 200, 8, 2, 64)
    first = rng.integers(60, 65, batch).astype(np.int32) if batch > 1 else int32(62)
    out, workspace = cupy.empty((5, *q.shape), np.float16), cupy.zeros(module.attention_workspace_size(64), np.float32)
    arrays = q_gpu, k_gpu, v_gpu = [cupy.asarray(array) for array in (q, k, v)]
    lengths, ids, positions = cupy.asarray(first), cupy.zeros(batch, np.int32), cupy.zeros(batch, np.int32)
    steps, problem = cupy.zeros(batch, np.int64), problem_of(q, k, kv_lengths=lengths)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        module.launch(problem, *arrays, out[0], workspace)
        advance(ids, positions, lengths, steps)
        lengths.set(first, stream=stream)
        stream.begin_capture()
        for turn in range(5):
            module.launch(problem, q_gpu, k_gpu, v_gpu, out[turn], workspace)
            advance(ids, positions, lengths, steps)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    for turn, result in enumerate(out.get(stream=stream)):
        expected = on_gpu(cupy, q, k, v, kv_lengths=first + int32(turn))
        assert result.tobytes() == expected.tobytes(), f"step {turn}"


@pytest.mark.gpu
def test_more_sequences_than_are_planned(cupy):
    rng = np.random.default_rng(11)
    q, k, v = make(rng, float16, 1000, 1, 20, 4, 2, 64)
    verify(cupy, q, k, v, kv_lengths=rng.integers(0, 21, 1000).astype(np.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q8", "q4")], ids=str)
def test_same_bits_with_and_without_a_workspace(cupy, kinds, dtype):
    workspace = cupy.zeros(module.attention_workspace_size(128), np.float32)
    workspace[module._COUNTERS :] = math.nan
    rng = np.random.default_rng(12)
    for heads, kv_heads, seq in ((8, 2, 1), (20, 1, 3)):
        q, k, v = make(rng, dtype, 2, seq, 3000, heads, kv_heads, 128, kinds=kinds)
        for longest in (1, 300, 2900):
            lengths = int32(longest, longest // 3 + 1)
            results = {
                on_gpu(cupy, q, k, v, kv_lengths=lengths, workspace=given, **options).tobytes()
                for given, options in (
                    (None, {}),
                    (workspace, {}),
                    (None, {"ahead_tiles": 0}),
                )
            }
            assert len(results) == 1
            assert not workspace[: module._COUNTERS].get().view(np.uint32).any(), "a counter is left behind"


@pytest.mark.gpu
def test_every_config(cupy):
    rng = np.random.default_rng(13)
    for warps, stages, kinds in (
        (1, 2, ("dense", "dense")),
        (2, 2, ("q8", "q4")),
        (8, 2, ("dense", "dense")),
        (8, 6, ("q4", "q4")),
    ):
        arrays = make(rng, float16, 2, 1, 900, 8, 2, 64, kinds=kinds)
        verify(cupy, *arrays, kv_lengths=int32(900, 77), config=module.DecodeConfig(warps, stages))


@pytest.mark.gpu
def test_in_place(cupy):
    q, k, v = map(cupy.asarray, make(np.random.default_rng(14), float16, 2, 3, 1500, 8, 2, 64))
    problem, expected = problem_of(q, k), cupy.empty_like(q)
    module.launch(problem, q, k, v, expected, None)
    module.launch(problem, q, k, v, q, None)
    assert q.get().tobytes() == expected.get().tobytes()


@pytest.mark.gpu
def test_a_small_workspace_is_refused(cupy):
    q, k, v = map(cupy.asarray, make(np.random.default_rng(15), float16, 1, 1, 4096, 8, 2, 64))
    problem = problem_of(q, k)
    with pytest.raises(ValueError, match="workspace must have at least"):
        module.launch(problem, q, k, v, cupy.empty_like(q), cupy.zeros(100, np.float32))
    with pytest.raises(ValueError, match="workspace must begin at a multiple of 16 bytes"):
        shifted = cupy.zeros(module.attention_workspace_size(64) + 1, np.float32)[1:]
        module.launch(problem, q, k, v, cupy.empty_like(q), shifted)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q4", "q4")], ids=str)
def test_a_graph_replays_with_new_lengths_and_tables(cupy, kinds):
    """Nothing waits for the GPU or allocates when a workspace is given: one captured launch serves every step."""
    rng = np.random.default_rng(16)
    q, k, v = make(rng, float16, 2, 1, 2048, 8, 2, 64, kinds=kinds)
    (k, table_of_k), (v, _) = (paged(np.random.default_rng(1), cache, 64) for cache in (k, v))
    q_gpu, table, lengths = cupy.asarray(q), cupy.asarray(table_of_k), cupy.asarray(int32(2048, 2048))
    out, workspace = cupy.empty_like(q_gpu), cupy.zeros(module.attention_workspace_size(64), np.float32)

    k_gpu, v_gpu = (uploaded(cupy, cache) for cache in (k, v))
    problem = problem_of(q, k, kv_lengths=lengths, block_table=table)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        module.launch(problem, q_gpu, k_gpu, v_gpu, out, workspace)
        stream.begin_capture()
        module.launch(problem, q_gpu, k_gpu, v_gpu, out, workspace)
        module.launch(problem, q_gpu, k_gpu, v_gpu, out, workspace)
        graph = stream.end_capture()
        for new, rows in (((2048, 2048), table_of_k), ((77, 1), table_of_k[::-1].copy()), ((1025, 2000), table_of_k)):
            lengths.set(int32(*new), stream=stream)
            table.set(rows, stream=stream)
            graph.launch(stream)
            stream.synchronize()
            verify_result(out.get(stream=stream), q, k, v, {"kv_lengths": int32(*new), "block_table": rows})
