"""Moving pages round a ring, and the common prefix of two prompts."""

import numpy as np
import pytest
from conftest import golden
from kernel_checks import banded, bfloat16, host, move, on_both, same_bits

from cupyq.ops.cache_pages import cache_rotate, count_match, cycles_of


def random_pages(seed, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(shape)


def rotated(cache, order):
    """One move after the other, on a list of pages."""
    pages = [page.tobytes() for page in cache]
    if order:
        first = pages[order[0]]
        for i in range(len(order) - 1):
            pages[order[i]] = pages[order[i + 1]]
        pages[order[-1]] = first
    return np.frombuffer(b"".join(pages), cache.dtype).reshape(cache.shape)


ORDERS = [
    [],
    [2],
    [2, 0],
    [0, 2, 1],
    [3, 1, 0, 2],
    [4, 3, 2, 1, 0],
    [5, 0, 6, 1, 4, 2],
    list(range(9)),
    [8, 1, 2, 3, 4, 5, 6, 7, 0],
    [1, 1],
    [0, 1, 0],
    [0, 1, 2, 0, 3],
    [0, 1, 2, 1, 3],
    [0, 1, 2, 3, 1],
    [0, 1, 2, 3, 0],
    [0, 1, 2, 3, 2],
    [0, 1, 2, 3, 4, 0, 5, 6, 7],
    [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
]


@on_both
def test_recorded(library):
    inputs, outputs, _ = golden("cache")["rotate"]
    cache = move(library, inputs["cache"].copy())
    assert cache_rotate(cache, move(library, inputs["order"])) is None
    assert same_bits(host(cache), outputs["cache"])


@on_both
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_moves_follow_each_other(library, order):
    before = random_pages(1, (9, 3, 5), np.float32)
    cache = move(library, before.copy())
    cache_rotate(cache, move(library, np.array(order, np.int32)))
    assert same_bits(host(cache), rotated(before, order))


def test_other_rotations_are_rejected():
    before = random_pages(1, (9, 3, 5), np.float32)
    for order in ([0, 2, 1], [8, 1, 2, 3, 4, 5, 6, 7, 0]):
        cache = before.copy()
        cache_rotate(cache, np.array(order, np.int32))
        assert not same_bits(cache, rotated(before, order[::-1]))
        assert not same_bits(cache, rotated(before, order[:-1]))


@on_both
def test_any_dtype_and_page(library):
    for dtype in (np.uint8, np.float16, bfloat16, np.int32, np.float64):
        for page in ((), (1,), (7,), (2, 3), (4, 8, 2), (257, 3)):
            before = random_pages(2, (6, *page), dtype)
            cache = move(library, before.copy())
            cache_rotate(cache, move(library, np.array([5, 0, 3, 2, 1], np.int32)))
            assert same_bits(host(cache), rotated(before, [5, 0, 3, 2, 1]))


@pytest.mark.gpu
def test_kernel_widths(cupy):
    """Words of 1 to 16 bytes, by page size and by address; blocks full and not; nothing beside the cache is written."""
    order = [5, 0, 3, 2, 1]
    for page_bytes in (1, 2, 4, 8, 16, 48, 255, 256, 257, 4080, 4096, 4112, 1 << 20):
        for shift in (0, 1, 2, 4, 8, 16):
            before = random_pages(3, (6, page_bytes), np.uint8)
            cache, check = banded(cupy, before, shift)
            cache_rotate(cache, cupy.asarray(np.array(order, np.int32)))
            check()
            assert same_bits(cache.get(), rotated(before, order))


@pytest.mark.gpu
def test_kernel_with_a_long_order(cupy):
    before = random_pages(4, (3001, 24), np.uint16)
    order = np.random.default_rng(5).permutation(3001).astype(np.int32)
    for length in (255, 256, 257, 3001):
        cache, check = banded(cupy, before)
        cache_rotate(cache, cupy.asarray(order[:length]))
        check()
        assert same_bits(cache.get(), rotated(before, order[:length].tolist()))


@pytest.mark.gpu
def test_kernel_with_a_page_outside_moves_nothing(cupy):
    before = random_pages(6, (6, 40), np.uint16)
    for page in (6, -1, np.iinfo(np.int32).max, np.iinfo(np.int32).min):
        for place, length in ((0, 1), (2, 5), (4, 5), (299, 300)):
            order = np.arange(length, dtype=np.int32) % 6
            order[place] = page
            cache, check = banded(cupy, before)
            cache_rotate(cache, cupy.asarray(order))
            check()
            assert same_bits(cache.get(), before)


@pytest.mark.gpu
def test_kernel_offsets_beyond_32_bits(cupy):
    cache = cupy.zeros((3, 2**30 + 16), np.uint8)
    cache[0, -1], cache[1, -1], cache[2, -1], cache[2, 0] = 1, 2, 3, 4
    cache_rotate(cache, cupy.asarray(np.array([2, 0, 1], np.int32)))
    assert cache[:, -1].get().tolist() == [2, 3, 1] and cache[:, 0].get().tolist() == [0, 4, 0]


@on_both
def test_refusals(library):
    cache, order = move(library, np.zeros((4, 6), np.float16)), move(library, np.zeros(2, np.int32))
    with pytest.raises(TypeError, match="order must have dtype int32"):
        cache_rotate(cache, move(library, np.zeros(2, np.int64)))
    with pytest.raises(ValueError, match="order must have 1 dimensions"):
        cache_rotate(cache, move(library, np.zeros((1, 2), np.int32)))
    with pytest.raises(ValueError, match="cache must be C-contiguous"):
        cache_rotate(cache[:, ::2], order)
    with pytest.raises(ValueError, match="cache must have at least"):
        cache_rotate(move(library, np.zeros((), np.float16)), order)
    both = move(library, np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="cache overlaps order"):
        cache_rotate(both, both[:2])
    with pytest.raises(TypeError, match="order"):
        cache_rotate(cache, [0, 1])
    cache_rotate(cache[:, :0].copy(), order)


def test_numpy_refuses_pages_outside():
    before = random_pages(7, (4, 6), np.float16)
    cache = before.copy()
    for page in (4, -1):
        with pytest.raises(ValueError, match=rf"order\[1\] must be 0 to 3, a page of cache, got {page}"):
            cache_rotate(cache, np.array([0, page, 2], np.int32))
    cache.flags.writeable = False
    with pytest.raises(ValueError, match="cache is read-only"):
        cache_rotate(cache, np.array([0, 1], np.int32))
    assert same_bits(cache, before)


def test_cycles_bring_every_page_to_its_place():
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 30):
        sources = rng.permutation(count)
        pages = np.arange(count)[:, None] * 10
        expected = pages[sources]
        cycles = cycles_of(sources.tolist())
        for cycle in cycles:
            cache_rotate(pages, np.array(cycle, np.int32))
        assert np.array_equal(pages, expected)
        moved = np.flatnonzero(sources != np.arange(count)).tolist()
        assert sorted(sum(cycles, [])) == moved  # each once, and no page that stays


# --- count_match ------------------------------------------------------------------------------------------------------


def test_recorded_count():
    inputs, _, arguments = golden("cache")["count_match"]
    assert count_match(inputs["a"], inputs["b"], arguments["max_a"]) == arguments["result"]


@pytest.mark.parametrize("seed", range(6))
def test_counts_as_a_loop_does(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        a, b = rng.integers(0, 2, rng.integers(0, 9)), rng.integers(0, 2, rng.integers(0, 9))
        limit = int(rng.integers(0, 10))
        expected = 0
        while expected < min(limit, len(a), len(b)) and a[expected] == b[expected]:
            expected += 1
        assert count_match(a, b, limit) == expected
        assert count_match(a[None], np.stack((b, 1 - b)), limit) == expected
        assert type(count_match(a, b, limit)) is int


def test_counts_without_rows():
    row = np.zeros((1, 5), np.int64)
    assert count_match(row, row[:0], 5) == count_match(row[:0], row, 5) == 0
    assert count_match(row, row, 0) == 0 and count_match(row, row, 99) == 5
    assert count_match(row, row, np.int64(3)) == 3


def test_count_refusals():
    a = np.zeros(3, np.int64)
    for arguments, kind, message in [
        ((a.astype(np.int32), a, 1), TypeError, "a must have dtype int64"),
        ((a, a.astype(np.float64), 1), TypeError, "b must have dtype int64"),
        ((a, a, -1), ValueError, "limit must be 0 or more, got -1"),
        ((a, a, 1.0), TypeError, "limit must be a whole number, got float"),
        ((a, np.zeros((), np.int64), 1), ValueError, r"b must have at least the dimension \[n\]"),
        ((np.zeros((3, 2), np.int64)[:, :1], a, 1), ValueError, "a must be C-contiguous"),
        ((a, [1, 2], 1), TypeError, "b must be a NumPy or CuPy array"),
    ]:
        with pytest.raises(kind, match=message):
            count_match(*arguments)


@pytest.mark.gpu
def test_count_refuses_the_gpu(cupy):
    a = cupy.zeros(3, np.int64)
    with pytest.raises(TypeError, match="a and b must be in host memory"):
        count_match(a, a, 1)
