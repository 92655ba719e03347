"""Counter-based random numbers: a pure function of seed and step, the same on NumPy and in kernels (cu/philox.cuh)."""

import numpy as np

_LOW32, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter, key):
    """Philox4x32-10: four random 32-bit words as a function of a counter [..., 4] and a key [..., 2], all uint32.

    Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.

    >>> philox4x32([0, 0, 0, 0], [0, 0])
    array([1713891541, 3781805453, 3159862348, 2600524760], dtype=uint32)
    """
    words = [np.asarray(counter, np.uint32)[..., i].astype(np.uint64) for i in range(4)]
    keys = [np.asarray(key, np.uint32)[..., i].astype(np.uint64) for i in range(2)]
    for _ in range(10):
        product_0, product_2 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            product_2 >> _SHIFT ^ words[1] ^ keys[0],
            product_2 & _LOW32,
            product_0 >> _SHIFT ^ words[3] ^ keys[1],
            product_0 & _LOW32,
        ]
        keys = [keys[0] + np.uint64(0x9E3779B9) & _LOW32, keys[1] + np.uint64(0xBB67AE85) & _LOW32]
    return np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)


def philox_bits(seed, step, word=0):
    """64 random bits of `step` under `seed` (numbers or arrays that broadcast): two words from `word`, the low one first."""
    seed, step = np.broadcast_arrays(_as_uint64(seed), _as_uint64(step))
    zero = np.zeros_like(step)
    words = philox4x32(
        np.stack([step & _LOW32, step >> _SHIFT, zero, zero], axis=-1), np.stack([seed & _LOW32, seed >> _SHIFT], axis=-1)
    ).astype(np.uint64)
    return words[..., word + 1] << _SHIFT | words[..., word]


def _as_uint64(value):
    return np.uint64(value % (1 << 64)) if isinstance(value, int) else np.asarray(value).astype(np.uint64)


def philox_uniform(seed, step):
    """Uniform numbers in [0, 1), float64: the upper 53 of the 64 bits `sample` draws with.

    >>> philox_uniform(0, 0)
    np.float64(0.8805201978886142)
    """
    return (philox_bits(seed, step) >> np.uint64(11)).astype(np.float64) * 2.0**-53
