"""What the tests of appending to a cache share: caches full of something, arrays or CacheCodes alike."""

import numpy as np
from kernel_checks import banded, host, move, random, same_bits

from cupyq.ops.kv_codec import CacheCodes


def with_parts(cache, change):
    """The array, or the CacheCodes with each of its arrays, changed."""
    if not isinstance(cache, CacheCodes):
        return change(cache)
    return CacheCodes(cache.kind, change(cache.codes), None if cache.scales is None else change(cache.scales))


def copied(cache):
    return with_parts(cache, np.copy)


def moved(library, cache):
    """A copy of it on that library."""
    return with_parts(cache, lambda array: move(library, array.copy()))


def full_cache(seed, shape, kind, dtype):
    """A cache full of something: an array of dtype for kind "dense", else codes and scales as random bytes."""
    if kind == "dense":
        return random(seed, shape, dtype)
    empty, rng = CacheCodes.zeros(np, shape, kind), np.random.default_rng(seed)
    return with_parts(empty, lambda a: rng.integers(0, 256, a.nbytes, dtype=np.uint8).view(a.dtype).reshape(a.shape))


def same_cache(there, expected):
    if not isinstance(expected, CacheCodes):
        return same_bits(host(there), expected)
    pairs = [(there.codes, expected.codes)] + ([] if expected.scales is None else [(there.scales, expected.scales)])
    return all(same_bits(host(a), b) for a, b in pairs)


def banded_cache(cupy, cache, shift=0):
    """(cache on the GPU, check): each of its arrays as `banded` has it."""
    checks = []

    def place(array):
        there, check = banded(cupy, array, shift)
        checks.append(check)
        return there

    def check():
        for check_one in checks:
            check_one()

    return with_parts(cache, place), check
