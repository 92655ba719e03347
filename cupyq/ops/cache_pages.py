"""Whole pages of a cache: moving them round a ring, and how much of one prompt another shares."""

import numpy as np

from cupyq._arrays import byte_bounds, check, int32, namespace
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import refuse_overlap, whole_number

_WORDS = {16: "uint4", 8: "uint2", 4: "uint32", 2: "uint16", 1: "uint8"}


@accepts_dlpack(writes=("cache",))
def cache_rotate(cache, order):
    """page[order[i]] = page[order[i + 1]] for i = 0 to n - 2 in turn, then page[order[n - 1]] = what page[order[0]] was

    cache [pages, ...]: any dtype and page size, changed in place; its pages lie along the first axis. order int32 [n],
    any n; a page may occur again, as the moves follow each other. None is returned. An index that is not 0 to pages - 1
    raises ValueError on NumPy; on the GPU, where reading it back would stall it, nothing is moved at all then.
    No page of scratch is needed. Raises TypeError / ValueError for wrong dtypes, shapes or strides, or where order
    overlaps cache.

    >>> cache = np.array([[0], [10], [20], [30]])
    >>> cache_rotate(cache, np.array([3, 0, 2], np.int32))
    >>> cache.ravel().tolist()
    [20, 10, 30, 0]
    """
    xp = namespace(cache=cache, order=order)
    check(cache, "cache", writes=True)
    if cache.ndim == 0:
        raise ValueError("cache must have at least the dimension [pages], got shape ()")
    check(order, "order", dtype=int32, ndim=1)
    refuse_overlap(cache, "cache", order=order)
    if order.size == 0:
        return
    if xp is np:
        for i, page in enumerate(order.tolist()):
            if not 0 <= page < cache.shape[0]:
                raise ValueError(f"order[{i}] must be 0 to {cache.shape[0] - 1}, a page of cache, got {page}")
    if cache.size == 0:
        return
    if xp is np:
        cache_rotate_reference(cache, order)
    else:
        _launch_cache_rotate(cache, order)


def cache_rotate_reference(cache, order):
    first = cache[order[0]].copy()
    for to, source in zip(order[:-1], order[1:], strict=True):
        cache[to] = cache[source]
    cache[order[-1]] = first


def _launch_cache_rotate(cache, order):
    pages = cache.shape[0]
    page_bytes = cache.size // pages * cache.itemsize
    word_bytes = 16
    while page_bytes % word_bytes or byte_bounds(cache)[0] % word_bytes:
        word_bytes //= 2
    words = page_bytes // word_bytes
    arguments = (cache, order, np.int32(pages), np.int64(words), np.int32(order.size))
    launch(instance("cache_rotate", _WORDS[word_bytes]), (-(-words // 256),), (256,), arguments)


def cycles_of(sources):
    """[order, ...] of `cache_rotate` that give every page i what page sources[i] holds, a permutation of all pages.

    They are the cycles of two pages or more.

    >>> cycles_of([2, 1, 3, 0])
    [[0, 2, 3]]
    """
    cycles, seen = [], set()
    for first in range(len(sources)):
        cycle = [first]
        while first not in seen and sources[cycle[-1]] != first:
            cycle.append(sources[cycle[-1]])
        if len(cycle) > 1:
            cycles.append(cycle)
        seen.update(cycle)
    return cycles


@accepts_dlpack(writes=())
def count_match(a, b, limit):
    """The number of leading values that the first rows of a and b have in common, at most `limit`

    a, b: int64 [..., n], each of its own length, in host memory (NumPy, or CPU arrays by DLPack): the caches of prompts
    live there. limit: a whole number from 0 on. The result is an int. Raises TypeError / ValueError for wrong dtypes,
    shapes, strides, a limit below 0 or arrays on a GPU.

    >>> count_match(np.array([5, 6, 7, 8]), np.array([[5, 6, 9]]), 10)
    2
    """
    if namespace(a=a, b=b) is not np:
        raise TypeError("a and b must be in host memory, as prompts are compared there: pass a.get(), b.get()")
    for name, array in (("a", a), ("b", b)):
        check(array, name, dtype=np.dtype(np.int64))
        if array.ndim == 0:
            raise ValueError(f"{name} must have at least the dimension [n], got shape ()")
    return count_match_reference(a, b, whole_number(limit, "limit", 0))


def count_match_reference(a, b, limit):
    # Of an array without rows the first row is empty, whatever n is.
    size = min(limit, *(min(array.size, array.shape[-1]) for array in (a, b)))
    different = np.flatnonzero(a.reshape(-1)[:size] != b.reshape(-1)[:size])
    return int(different[0]) if different.size else size


INSTANCES = [instance("cache_rotate", word) for word in _WORDS.values()]
"""What `cupyq compile` builds ahead: every kind there is."""
