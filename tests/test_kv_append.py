"""kv_append: both paths against plain loops; everything beside the written tokens must keep its bits."""

import importlib

import numpy as np
import pytest
from cache_checks import banded_cache, copied, full_cache, moved, same_cache
from kernel_checks import FLOATS, banded, bfloat16, float16, float32, host, move, on_both, on_gpu, random, same_bits

from cupyq.formats import kv_cache
from cupyq.ops.kv_append import as_float16, kv_append
from cupyq.ops.kv_codec import CacheCodes, kv_encode


def place(positions, b, i, cache_shape, table):
    """(row or page, slot) of token i of row b, or None where there is none."""
    position, size = int(positions[b]) + i, cache_shape[1]
    if table is None:
        return (b, position) if 0 <= position < size else None
    if not 0 <= position < table.shape[1] * size or not 0 <= table[b, position // size] < cache_shape[0]:
        return None
    return int(table[b, position // size]), position % size


def appended(cache, new, positions, table=None):
    """A copy of the cache with the new tokens that fit, by plain loops; codes token by token."""
    is_codes = isinstance(cache, CacheCodes)
    cache = copied(cache)
    for b, i in np.ndindex(new.shape[:2]):
        found = place(positions, b, i, cache.shape, table)
        if found is not None and is_codes:
            codes, scales = kv_cache.encode(as_float16(new[b, i]), cache.kind)
            cache.codes[found] = codes.reshape(cache.codes[found].shape)
            if scales is not None:
                cache.scales[found] = scales.reshape(cache.scales[found].shape)
        elif found is not None:
            cache[found] = new[b, i]
    return cache


def hard(seed, shape, dtype):
    """Values of many magnitudes, with heads of zeros, Inf, NaN and, for bfloat16 and float32, beyond float16."""
    x = random(seed, shape, dtype)
    heads = x.reshape(-1, shape[-1])
    with np.errstate(over="ignore"):
        for number, factor in ((1, 2.0**-20), (2, 2.0**9), (3, 0.0), (4, -0.0), (5, 2.0**14)):
            heads[number::11] = (heads[number::11].astype(np.float64) * factor).astype(np.float32).astype(dtype)
    heads[6::11, 0], heads[7::11, shape[-1] // 2], heads[8::11, -1] = np.inf, np.nan, -np.inf
    return x


@on_both
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("batch, seq, positions", [(1, 1, [0]), (2, 3, [0, 5]), (3, 1, [7, 0, 3]), (1, 8, [0])])
def test_appends(library, dtype, batch, seq, positions):
    k, v = random(1, (batch, seq, 2, 6), dtype), random(2, (batch, seq, 2, 6), dtype)
    k_cache, v_cache = random(3, (4, 8, 2, 6), dtype), random(4, (4, 8, 2, 6), dtype)
    positions = np.array(positions, np.int32)
    k_there, v_there = move(library, k_cache.copy()), move(library, v_cache.copy())
    assert kv_append(move(library, k), move(library, v), k_there, v_there, move(library, positions)) is None
    assert same_bits(host(k_there), appended(k_cache, k, positions))
    assert same_bits(host(v_there), appended(v_cache, v, positions))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_kernel_widths(cupy, dtype):
    """Every access width, through row sizes and misaligned views; nothing outside the caches is written."""
    for kv_heads, head_dim, shift in [(1, 1, 0), (1, 2, 0), (3, 4, 0), (1, 8, 0), (2, 64, 1), (2, 64, 4), (8, 128, 0)]:
        shape = (2, 3, kv_heads, head_dim)
        k, v = random(1, shape, dtype), random(2, shape, dtype)
        positions = np.array([0, 2], np.int32)
        k_cache, v_cache = random(3, (2, 5, kv_heads, head_dim), dtype), random(4, (2, 5, kv_heads, head_dim), dtype)
        k_there, check_k = banded(cupy, k_cache, shift)
        v_there, check_v = banded(cupy, v_cache, shift)
        kv_append(on_gpu(cupy, k, shift), on_gpu(cupy, v, shift), k_there, v_there, on_gpu(cupy, positions, shift))
        check_k()
        check_v()
        assert same_bits(k_there.get(), appended(k_cache, k, positions))
        assert same_bits(v_there.get(), appended(v_cache, v, positions))


@pytest.mark.gpu
def test_tokens_outside_are_dropped(cupy):
    k, v = random(1, (4, 3, 2, 8), np.float16), random(2, (4, 3, 2, 8), np.float16)
    k_cache, v_cache = random(3, (4, 5, 2, 8), np.float16), random(4, (4, 5, 2, 8), np.float16)
    positions = np.array([4, -2, np.iinfo(np.int32).max, np.iinfo(np.int32).min], np.int32)
    k_there, check_k = banded(cupy, k_cache)
    v_there, check_v = banded(cupy, v_cache)
    kv_append(*(cupy.asarray(a) for a in (k, v)), k_there, v_there, cupy.asarray(positions))
    check_k()
    check_v()
    assert same_bits(k_there.get(), appended(k_cache, k, positions))
    assert same_bits(v_there.get(), appended(v_cache, v, positions))


@pytest.mark.gpu
def test_many_tokens(cupy):
    k, v = random(1, (1, 70_001, 1, 4), np.float16), random(2, (1, 70_001, 1, 4), np.float16)
    k_there, check_k = banded(cupy, np.zeros((1, 70_005, 1, 4), np.float16))
    v_there, check_v = banded(cupy, np.zeros((1, 70_005, 1, 4), np.float16))
    kv_append(cupy.asarray(k), cupy.asarray(v), k_there, v_there, cupy.asarray(np.array([3], np.int32)))
    check_k()
    check_v()
    for there, new in ((k_there, k), (v_there, v)):
        assert same_bits(there.get()[:, 3:-1], new) and not there.get()[:, :3].any() and not there.get()[:, -1].any()


# (kinds, dtype, kv_heads, head_dim)
CODES = [
    (("q4", "q4"), float16, 2, 64),
    (("q8", "q8"), float16, 3, 128),
    (("q8", "q4"), bfloat16, 1, 192),
    (("q4", "q8"), float32, 2, 320),
    (("fp8", "fp8"), float16, 2, 12),
    (("fp8", "e4m3"), float32, 3, 7),
    (("e4m3", "e4m3"), float16, 8, 128),
    (("e4m3", "fp8"), bfloat16, 1, 9),
    (("e4m3", "q4"), bfloat16, 9, 64),
    (("dense", "e4m3"), float32, 2, 96),
    (("q8", "dense"), float16, 1, 64),
    (("dense", "dense"), bfloat16, 3, 10),
]
PLACES = [
    # seq, cache's rows or pages, its capacity or page size, positions, block table
    (1, 2, 5, [0, 4], None),
    (3, 3, 5, [2, 0], None),
    (2, 6, 4, [3, 6], [[5, 1, 0], [2, 3, 4]]),
    (9, 7, 3, [0, 1], [[5, 1, 0, 2], [2, 3, 4, 6]]),
    (1, 4, 256, [255, 256], [[3, 0], [2, 1], [0, 0]]),
]


@on_both
@pytest.mark.parametrize("kinds, dtype, kv_heads, head_dim", CODES, ids=lambda v: "-".join(v) if isinstance(v, tuple) else None)
def test_codes_and_pages(library, kinds, dtype, kv_heads, head_dim):
    for seq, pages, page_size, positions, table in PLACES:
        k, v = (hard(seed, (2, seq, kv_heads, head_dim), dtype) for seed in (1, 2))
        caches = [full_cache(i + 3, (pages, page_size, kv_heads, head_dim), kind, dtype) for i, kind in enumerate(kinds)]
        there = [moved(library, cache) for cache in caches]
        positions = np.array(positions, np.int32)
        table = None if table is None else np.array(table, np.int32)
        options = {} if table is None else {"block_table": move(library, table)}
        assert kv_append(move(library, k), move(library, v), *there, move(library, positions), **options) is None
        for found, cache, new in zip(there, caches, (k, v), strict=True):
            assert same_cache(found, appended(cache, new, positions, table))
            assert not same_cache(found, appended(cache, new, positions + 1, table))


@on_both
@pytest.mark.parametrize("kind", kv_cache.KINDS)
def test_codes_are_those_of_kv_encode(library, kind):
    """Of the same tokens in a float16 cache, contiguous."""
    k, v = (random(seed, (2, 3, 2, 64), float16) for seed in (1, 2))
    there = [moved(library, full_cache(i, (2, 7, 2, 64), kind, float16)) for i in (3, 4)]
    kv_append(move(library, k), move(library, v), *there, move(library, np.array([2, 2], np.int32)))
    for i, (found, new) in enumerate(zip(there, (k, v), strict=True)):
        staged, expected = np.zeros((2, 7, 2, 64), float16), full_cache(i + 3, (2, 7, 2, 64), kind, float16)
        staged[:, 2:5] = new
        kv_encode(staged, expected.codes, expected.scales, kind=kind, start=2, width=3)
        assert same_cache(found, expected)


def test_values_become_float16_first():
    x = np.array([1 + 2.0**-11, 70000.0, -1e-9, np.nan, -np.nan, 1 + 3 * 2.0**-11], np.float32)
    assert as_float16(x).view(np.uint16).tolist() == [0x3C00, 0x7C00, 0x8000, 0x7FFF, 0x7FFF, 0x3C02]
    half = np.array([np.nan], np.float16)
    assert as_float16(half) is half


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_misaligned_codes(cupy, shift):
    """Everything at odd addresses: the same bits, and nothing outside of the caches is written."""
    for kinds, dtype, kv_heads, head_dim in CODES:
        k, v = (hard(seed, (2, 3, kv_heads, head_dim), dtype) for seed in (1, 2))
        positions, table = np.array([3, 1], np.int32), np.array([[5, 1, 0], [2, 3, 4]], np.int32)
        caches = [full_cache(i + 3, (6, 4, kv_heads, head_dim), kind, dtype) for i, kind in enumerate(kinds)]
        there, checks = zip(*(banded_cache(cupy, cache, shift) for cache in caches), strict=True)
        tables = (on_gpu(cupy, positions, shift),), {"block_table": on_gpu(cupy, table, shift)}
        for _ in range(2):  # bits repeat
            kv_append(on_gpu(cupy, k, shift), on_gpu(cupy, v, shift), *there, *tables[0], **tables[1])
            for check in checks:
                check()
            for found, cache, new in zip(there, caches, (k, v), strict=True):
                assert same_cache(found, appended(cache, new, positions, table))


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q8", "q4"), ("e4m3", "e4m3")], ids="-".join)
def test_tables_that_lead_outside(cupy, kinds):
    """Tokens before the first, after the last, and of pages that are not there: the others are written, nothing else is."""
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    table = np.array([[0, 4], [-1, 1], [2, high], [low, 3], [0, 1], [3, 2]], np.int32)
    positions = np.array([3, 3, 2, 6, -2, high], np.int32)
    k, v = (hard(seed, (6, 4, 2, 64), float16) for seed in (1, 2))
    caches = [full_cache(i + 3, (4, 4, 2, 64), kind, float16) for i, kind in enumerate(kinds)]
    there, checks = zip(*(banded_cache(cupy, cache) for cache in caches), strict=True)
    kv_append(*(cupy.asarray(a) for a in (k, v)), *there, cupy.asarray(positions), block_table=cupy.asarray(table))
    for check in checks:
        check()
    for found, cache, new in zip(there, caches, (k, v), strict=True):
        expected = appended(cache, new, positions, table)
        assert same_cache(found, expected) and not same_cache(found, cache)


@pytest.mark.gpu
def test_many_tokens_as_codes(cupy):
    """More tokens than a grid is high, in pages of random order."""
    k, v = (random(seed, (1, 70_001, 1, 64), float16) for seed in (1, 2))
    table = np.random.default_rng(3).permutation(280).astype(np.int32)[None]
    caches = [CacheCodes.zeros(cupy, (280, 256, 1, 64), kind) for kind in ("q8", "q4")]
    kv_append(
        *(cupy.asarray(a) for a in (k, v)), *caches, cupy.asarray(np.array([3], np.int32)), block_table=cupy.asarray(table)
    )
    for cache, new in zip(caches, (k, v), strict=True):
        codes, scales = kv_cache.encode(new, cache.kind)
        for found, expected in ((cache.codes, codes), (cache.scales, scales)):
            rows = found.get()[table[0]].reshape(280 * 256, -1)
            assert same_bits(rows[3:70_004], expected.reshape(70_001, -1)) and not rows[:3].any() and not rows[70_004:].any()


@pytest.mark.gpu
def test_checking_refuses_on_the_gpu(cupy, monkeypatch):
    """CUPYQ_CHECK=1: the errors of NumPy, before anything is written."""
    # cupyq.ops.kv_append names the op, not its module.
    monkeypatch.setattr(importlib.import_module("cupyq.ops.kv_append"), "is_checking", lambda: True)
    k = cupy.asarray(np.ones((2, 3, 1, 64), np.float16))
    caches = [CacheCodes.zeros(cupy, (4, 4, 1, 64), "q8") for _ in range(2)]
    positions, table = np.array([0, 2], np.int32), np.array([[0, 1], [2, 4]], np.int32)
    with pytest.raises(ValueError, match=r"block_table\[1, 1\] must be 0 to 3, a page of the cache, got 4"):
        kv_append(k, k, *caches, cupy.asarray(positions), block_table=cupy.asarray(table))
    with pytest.raises(ValueError, match=r"positions\[1\] is 2: 3 tokens from there do not fit a cache of capacity 4"):
        kv_append(k, k, *caches, cupy.asarray(positions))
    assert not caches[0].codes.get().any()
    kv_append(k, k, *caches, cupy.asarray(positions), block_table=cupy.asarray(table[:, ::-1] % 4))


def test_numpy_refuses_what_does_not_fit():
    k = np.ones((2, 3, 1, 2), np.float16)
    for positions in ([0, 3], [0, -1]):
        caches = np.zeros((2, 5, 1, 2), np.float16), np.zeros((2, 5, 1, 2), np.float16)
        with pytest.raises(ValueError, match=r"positions\[1\] is -?\d: 3 tokens .* a cache of capacity 5"):
            kv_append(k, k, *caches, np.array(positions, np.int32))
        assert not caches[0].any() and not caches[1].any()  # nothing is written before the check


def test_numpy_refuses_tables_that_lead_outside():
    k = np.ones((2, 3, 1, 64), np.float16)
    for positions, table, message in [
        ([0, -1], [[0], [1]], r"positions\[1\] is -1: 3 tokens from there do not fit a cache of capacity 4"),
        ([0, 2], [[0], [1]], r"positions\[1\] is 2: 3 tokens from there do not fit a cache of capacity 4"),
        ([1, 1], [[0], [3]], r"block_table\[1, 0\] must be 0 to 2, a page of the cache, got 3"),
        ([1, 2], [[0, 0], [1, -1]], r"block_table\[1, 1\] must be 0 to 2, a page of the cache, got -1"),
    ]:
        caches = [CacheCodes.zeros(np, (3, 4, 1, 64), "q4"), np.zeros((3, 4, 1, 64), np.float16)]
        with pytest.raises(ValueError, match=message):
            kv_append(k, k, *caches, np.array(positions, np.int32), block_table=np.array(table, np.int32))
        assert not caches[0].codes.any() and not caches[1].any()  # nothing is written before the checks
    unused = np.array([[0, 99], [-5, 1]], np.int32)  # entries that no token needs may be anything
    kv_append(k, k, *caches, np.array([1, 4], np.int32), block_table=unused)


@on_both
def test_refuses_codes_and_tables(library):
    k, positions = move(library, np.ones((2, 3, 2, 64), np.float16)), move(library, np.zeros(2, np.int32))

    def call(k_cache=None, v_cache=None, **options):
        good = [moved(library, full_cache(i, (2, 5, 2, 64), "q8", None)) for i in (1, 2)]
        return kv_append(k, k, k_cache or good[0], v_cache or good[1], positions, **options)

    def codes(*shape, kind="q8"):
        return moved(library, full_cache(1, shape, kind, None))

    assert call() is None
    with pytest.raises(ValueError, match=r"k_cache must be codes of shape \(any, any, 2, 64\), got \(2, 5, 1, 64\)"):
        call(k_cache=codes(2, 5, 1, 64))
    with pytest.raises(ValueError, match=r"v_cache must be codes of shape \(2, 5, 2, 64\), got \(3, 5, 2, 64\)"):
        call(v_cache=codes(3, 5, 2, 64))
    with pytest.raises(ValueError, match="k_cache has room for a batch of 1, k has 2"):
        call(k_cache=codes(1, 5, 2, 64), v_cache=codes(1, 5, 2, 64, kind="q4"))
    both = codes(2, 5, 2, 64)
    with pytest.raises(ValueError, match="k_cache.codes overlaps v_cache.codes"):
        call(k_cache=both, v_cache=both)
    shared = CacheCodes("q8", move(library, np.zeros((2, 5, 2, 64), np.uint8)), both.scales)
    with pytest.raises(ValueError, match="k_cache.scales overlaps v_cache.scales"):
        call(k_cache=both, v_cache=shared)
    with pytest.raises(TypeError, match="block_table must have dtype int32"):
        call(block_table=move(library, np.zeros((2, 1), np.int64)))
    with pytest.raises(ValueError, match="block_table must have 2 dimensions"):
        call(block_table=move(library, np.zeros(2, np.int32)))
    with pytest.raises(ValueError, match="block_table has 1 rows, k has a batch of 2"):
        call(block_table=move(library, np.zeros((1, 1), np.int32)))
    with pytest.raises(TypeError, match="k_cache must be a NumPy or CuPy array"):
        call(k_cache="q8")


@on_both
def test_refusals(library):
    good = {
        "k": np.ones((2, 3, 2, 4), np.float16),
        "v": np.ones((2, 3, 2, 4), np.float16),
        "k_cache": np.ones((2, 5, 2, 4), np.float16),
        "v_cache": np.ones((2, 5, 2, 4), np.float16),
        "positions": np.zeros(2, np.int32),
    }

    def call(**changed):
        return kv_append(**{name: move(library, a) for name, a in (good | changed).items()})

    with pytest.raises(TypeError, match="k must have dtype"):
        call(k=good["k"].astype(np.int16))
    with pytest.raises(TypeError, match="v must have dtype float16"):
        call(v=good["v"].astype(np.float32))
    with pytest.raises(ValueError, match="v must have shape"):
        call(v=good["v"][:, :2].copy())
    with pytest.raises(TypeError, match="k_cache must have dtype float16"):
        call(k_cache=good["k_cache"].astype(np.float32))
    with pytest.raises(ValueError, match="k_cache must have shape"):
        call(k_cache=np.ones((2, 5, 1, 8), np.float16))
    with pytest.raises(ValueError, match="v_cache must have shape"):
        call(v_cache=np.ones((2, 6, 2, 4), np.float16))
    with pytest.raises(ValueError, match="k_cache has room for a batch of 1, k has 2"):
        call(k_cache=good["k_cache"][:1], v_cache=good["v_cache"][:1])
    with pytest.raises(TypeError, match="positions must have dtype int32"):
        call(positions=np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="positions must have shape"):
        call(positions=np.zeros(3, np.int32))
    both = move(library, good["k_cache"])
    with pytest.raises(ValueError, match="k_cache overlaps v_cache"):
        call(k_cache=both, v_cache=both)
    for empty in (good["k"][:0], good["k"][:, :0]):
        assert call(k=empty, v=empty, positions=np.zeros(len(empty), np.int32)) is None


def test_refuses_a_read_only_cache():
    k, cache = np.ones((1, 1, 1, 1), np.float16), np.ones((1, 1, 1, 1), np.float16)
    cache.flags.writeable = False
    with pytest.raises(ValueError, match="v_cache is read-only"):
        kv_append(k, k, cache.copy(), cache, np.zeros(1, np.int32))
    codes = CacheCodes.zeros(np, (1, 1, 1, 1), "e4m3")
    codes.scales.flags.writeable = False
    with pytest.raises(ValueError, match="k_cache.scales is read-only"):
        kv_append(k, k, codes, cache.copy(), np.zeros(1, np.int32))
