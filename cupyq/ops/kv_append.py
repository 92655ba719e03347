"""New keys and values into a contiguous cache."""

import numpy as np

from cupyq._arrays import FLOATS, accepts_dlpack, byte_bounds, check, int32, namespace
from cupyq._kernels import instance, launch
from cupyq.ops._common import refuse_overlap

_WORDS = {16: "uint4", 8: "uint2", 4: "uint32", 2: "uint16"}


@accepts_dlpack(writes=("k_cache", "v_cache"))
def kv_append(k, v, k_cache, v_cache, positions):
    """k_cache[b, positions[b] + i] = k[b, i] and v_cache[b, positions[b] + i] = v[b, i]

    k, v [batch, seq, kv_heads, head_dim]; k_cache, v_cache [at least batch, capacity, kv_heads, head_dim], written in
    place; all four of one dtype of float16, bfloat16, float32. positions int32 [batch]: where each row's first new
    token goes. Bits are copied, nothing else in the caches changes, and None is returned. A token outside the
    capacity raises ValueError on NumPy, before anything is written; on the GPU, where reading positions back would
    stall it, such tokens are dropped. Raises TypeError / ValueError for wrong dtypes, shapes, strides or overlapping
    arguments.

    >>> cache = np.zeros((1, 3, 1, 1), np.float32), np.zeros((1, 3, 1, 1), np.float32)
    >>> one = np.ones((1, 1, 1, 1), np.float32)
    >>> kv_append(one, 2 * one, *cache, np.array([1], np.int32))
    >>> cache[0].ravel(), cache[1].ravel()
    (array([0., 1., 0.], dtype=float32), array([0., 2., 0.], dtype=float32))
    """
    xp = namespace(k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions)
    check(k, "k", dtype=FLOATS, ndim=4)
    check(v, "v", dtype=k.dtype, shape=k.shape)
    batch = k.shape[0]
    check(k_cache, "k_cache", dtype=k.dtype, shape=(None, None, *k.shape[2:]), writes=True)
    check(v_cache, "v_cache", dtype=k.dtype, shape=k_cache.shape, writes=True)
    if k_cache.shape[0] < batch:
        raise ValueError(f"k_cache has room for a batch of {k_cache.shape[0]}, k has {batch}: make a larger cache")
    check(positions, "positions", dtype=int32, shape=(batch,))
    refuse_overlap(k_cache, "k_cache", k=k, v=v, v_cache=v_cache, positions=positions)
    refuse_overlap(v_cache, "v_cache", k=k, v=v, positions=positions)
    if k.size == 0:
        return
    if xp is np:
        check_capacity(positions, k.shape[1], k_cache.shape[1])
        kv_append_reference(k, v, k_cache, v_cache, positions)
    else:
        _launch_kv_append(k, v, k_cache, v_cache, positions)


def check_capacity(positions, seq, capacity):
    for row, position in enumerate(positions.tolist()):
        if position < 0 or position + seq > capacity:
            raise ValueError(
                f"positions[{row}] is {position}: {seq} tokens from there do not fit a cache of capacity {capacity}"
            )


def kv_append_reference(k, v, k_cache, v_cache, positions):
    seq = k.shape[1]
    for row, position in enumerate(positions.tolist()):
        k_cache[row, position : position + seq] = k[row]
        v_cache[row, position : position + seq] = v[row]


def _launch_kv_append(k, v, k_cache, v_cache, positions):
    batch, seq, kv_heads, head_dim = k.shape
    row_bytes = kv_heads * head_dim * k.itemsize
    word_bytes = 16
    while row_bytes % word_bytes or any(byte_bounds(a)[0] % word_bytes for a in (k, v, k_cache, v_cache)):
        word_bytes //= 2
    words = row_bytes // word_bytes
    threads = min(256, -(-words // 32) * 32)
    launch(
        instance("kv_append", _WORDS[word_bytes]),
        (batch * seq, 2),
        (threads,),
        (k, v, k_cache, v_cache, positions, np.int32(seq), np.int32(k_cache.shape[1]), np.int32(words)),
    )


INSTANCES = [instance("kv_append", word) for word in _WORDS.values()]
"""What `cupyq compile` builds ahead: every kind there is."""
