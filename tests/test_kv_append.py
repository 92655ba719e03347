"""kv_append: both paths against plain loops; everything beside the written tokens must keep its bits."""

import numpy as np
import pytest
from kernel_checks import FLOATS, banded, host, move, on_both, on_gpu, random, same_bits

from cupyq.ops.kv_append import kv_append


def appended(cache, new, positions):
    """A copy of the cache with the new tokens that fit, by plain loops."""
    cache = cache.copy()
    for b, i in np.ndindex(new.shape[:2]):
        if 0 <= int(positions[b]) + i < cache.shape[1]:
            cache[b, int(positions[b]) + i] = new[b, i]
    return cache


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


def test_numpy_refuses_what_does_not_fit():
    k = np.ones((2, 3, 1, 2), np.float16)
    for positions in ([0, 3], [0, -1]):
        caches = np.zeros((2, 5, 1, 2), np.float16), np.zeros((2, 5, 1, 2), np.float16)
        with pytest.raises(ValueError, match=r"positions\[1\] is -?\d: 3 tokens .* a cache of capacity 5"):
            kv_append(k, k, *caches, np.array(positions, np.int32))
        assert not caches[0].any() and not caches[1].any()  # nothing is written before the check


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
