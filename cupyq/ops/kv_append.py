"""New keys and values into a cache: an array or codes, contiguous or in pages."""

import numpy as np

from cupyq._arrays import FLOATS, byte_bounds, check, float16, float32, int32, namespace
from cupyq._copies import to_host
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats import kv_cache
from cupyq.ops._common import int32_of, is_checking, overlap_error, vector_width
from cupyq.ops.kv_codec import CacheCodes, cache_arrays

_WORDS = {16: "uint4", 8: "uint2", 4: "uint32", 2: "uint16"}
_NAN = np.array(0x7FFF, np.uint16).view(np.float16)  # as kernels convert it


@accepts_dlpack(writes=("k_cache", "v_cache"), replays=True)
def kv_append(k, v, k_cache, v_cache, positions, *, block_table=None):
    """k_cache[b, positions[b] + i] = k[b, i] and v_cache[b, positions[b] + i] = v[b, i]

    k, v [batch, seq, kv_heads, head_dim], of one dtype of float16, bfloat16, float32. k_cache, v_cache [at least batch,
    capacity, kv_heads, head_dim], written in place: arrays of that dtype, whose bits are copied, or CacheCodes, each of a kind
    of its own, into which k or v, rounded to float16, are encoded as `kv_encode` does it. positions int32 [batch]: where each
    row's first new token goes. With block_table, int32 [at least batch, max_pages], the caches are pages [pages, page_size,
    kv_heads, head_dim], and token t of row b is slot t % page_size of page block_table[b, t // page_size]; rows that share a
    page must not write to it. Nothing else in the caches changes, and None is returned.

    A token outside the capacity, or in a page that is not there, raises ValueError on NumPy, before anything is written; on the
    GPU, where reading positions back would stall it, such tokens are dropped, unless CUPYQ_CHECK=1 asks for the same errors.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides or overlapping arguments.

    >>> cache = np.zeros((1, 3, 1, 1), np.float32), np.zeros((1, 3, 1, 1), np.float32)
    >>> one = np.ones((1, 1, 1, 1), np.float32)
    >>> kv_append(one, 2 * one, *cache, np.array([1], np.int32))
    >>> cache[0].ravel(), cache[1].ravel()
    (array([0., 1., 0.], dtype=float32), array([0., 2., 0.], dtype=float32))
    """
    caches = cache_arrays(k_cache=k_cache, v_cache=v_cache)
    xp = namespace(k=k, v=v, **caches, positions=positions, block_table=block_table)
    check(k, "k", dtype=FLOATS, ndim=4)
    check(v, "v", dtype=k.dtype, shape=k.shape)
    check_caches(k_cache, v_cache, k.dtype, k.shape[0], block_table, heads_shape=k.shape[2:])
    check(positions, "positions", dtype=int32, shape=(k.shape[0],))
    refuse_cache_overlaps(caches, k=k, v=v, positions=positions, block_table=block_table)
    if k.size == 0:
        return
    if xp is np or is_checking():
        check_capacity(positions, k.shape[1], k_cache.shape, block_table)
    if xp is np:
        kv_append_reference(k, v, k_cache, v_cache, positions, block_table)
    else:
        _launch_kv_append(k, v, k_cache, v_cache, positions, block_table)


# --- checks that qkv_append shares ------------------------------------------------------------------------------------


def check_caches(k_cache, v_cache, dtype, batch, block_table, heads_shape=(None, None)):
    """Both caches of one shape and of that dtype, or codes, with room for the batch: rows of their own, or of the table."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        shape = (None, None, *heads_shape) if name == "k_cache" else k_cache.shape
        if isinstance(cache, CacheCodes):
            check(cache.codes, f"{name}.codes", writes=True)
            if cache.scales is not None:
                check(cache.scales, f"{name}.scales", writes=True)
            if len(shape) != 4 or any(wanted not in (None, found) for wanted, found in zip(shape, cache.shape, strict=True)):
                expected = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
                raise ValueError(f"{name} must be codes of shape ({expected}), got {cache.shape}")
        else:
            check(cache, name, dtype=dtype, ndim=4, shape=None if shape == (None,) * 4 else shape, writes=True)
    if block_table is None:
        if k_cache.shape[0] < batch:
            raise ValueError(f"k_cache has room for a batch of {k_cache.shape[0]}, k has {batch}: make a larger cache")
        return
    check(block_table, "block_table", dtype=int32, ndim=2)
    if block_table.shape[0] < batch:
        raise ValueError(f"block_table has {block_table.shape[0]} rows, k has a batch of {batch}: one row is one sequence")


def refuse_cache_overlaps(caches, **read):
    """ValueError where the arrays of `caches`, {name: array}, overlap each other or what is read."""
    written, others = ([(name, *byte_bounds(a)) for name, a in arrays.items() if a is not None] for arrays in (caches, read))
    for number, (name, low, high) in enumerate(written):
        for other, start, end in (*others, *written[number + 1 :]):
            if start < high and low < end:
                raise overlap_error(name, other)


def check_capacity(positions, seq, cache_shape, block_table=None):
    """Raise ValueError unless every token has a place in the cache. Reads positions and block_table back from a GPU."""
    positions, table = to_host(positions), None if block_table is None else to_host(block_table)
    pages, page_size = cache_shape[:2]
    capacity = page_size if table is None else table.shape[1] * page_size
    for row, position in enumerate(positions.tolist()):
        if position < 0 or position + seq > capacity:
            raise ValueError(
                f"positions[{row}] is {position}: {seq} tokens from there do not fit a cache of capacity {capacity}"
            )
        if table is None:
            continue
        for logical in range(position // page_size, (position + seq - 1) // page_size + 1):
            if not 0 <= table[row, logical] < pages:
                raise ValueError(
                    f"block_table[{row}, {logical}] must be 0 to {pages - 1}, a page of the cache, got {table[row, logical]}"
                )


# --- reference --------------------------------------------------------------------------------------------------------


def kv_append_reference(k, v, k_cache, v_cache, positions, block_table=None):
    for new, cache in ((k, k_cache), (v, v_cache)):
        slots = _slots(positions, new.shape[1], cache.shape[1], block_table)
        if isinstance(cache, CacheCodes):
            codes, scales = kv_cache.encode(as_float16(new), cache.kind)
            _scatter(cache.codes, slots, codes)
            if scales is not None:
                _scatter(cache.scales, slots, scales)
        else:
            _scatter(cache, slots, new)


def _slots(positions, seq, page_size, block_table):
    """Places [batch * seq] of the new tokens among the flat tokens of the cache."""
    tokens = positions[:, None].astype(np.int64) + np.arange(seq)
    rows = np.arange(len(positions))[:, None]
    if block_table is None:
        return (rows * page_size + tokens).ravel()
    return (block_table[rows, tokens // page_size].astype(np.int64) * page_size + tokens % page_size).ravel()


def _scatter(cache, slots, new):
    cache.reshape(-1, *cache.shape[2:])[slots] = new.reshape(len(slots), *cache.shape[2:])


def as_float16(x):
    """x rounded to float16, with one NaN for all; float16 as it is."""
    if x.dtype == float16:
        return x
    with np.errstate(over="ignore"):
        rounded = x.astype(float32).astype(float16)
    return np.where(np.isnan(rounded), _NAN, rounded)


# --- launching --------------------------------------------------------------------------------------------------------


def _launch_kv_append(k, v, k_cache, v_cache, positions, block_table):
    batch, seq, kv_heads, head_dim = k.shape
    tables = (positions, block_table)
    places = (int32_of(seq), *place_sizes(k_cache, block_table))
    if isinstance(k_cache, CacheCodes) or isinstance(v_cache, CacheCodes):
        parts = (parts_of(k_cache), parts_of(v_cache))
        launch(
            _codes_instance(k.dtype, *(kind for kind, *_ in parts), codes_width(head_dim, k_cache, v_cache, k, v)),
            (batch * seq, 2),
            (32 * min(kv_heads, 8),),
            (k, v, *parts[0][1:], *parts[1][1:], *tables, *places, np.int32(kv_heads), np.int32(head_dim)),
        )
        return
    row_bytes = kv_heads * head_dim * k.itemsize
    word_bytes = vector_width(row_bytes // k.itemsize, k, v, k_cache, v_cache, widest=16 // k.itemsize) * k.itemsize
    words = row_bytes // word_bytes
    threads = min(256, -(-words // 32) * 32)
    launch(
        instance("kv_append", _WORDS[word_bytes]),
        (batch * seq, 2),
        (threads,),
        (k, v, k_cache, v_cache, *tables, *places, int32_of(words)),
    )


def place_sizes(cache, block_table):
    """(pages, page_size, max_pages) as kernels take them."""
    pages, page_size, *_ = cache.shape
    return int32_of(pages), int32_of(page_size), int32_of(1 if block_table is None else block_table.shape[1])


def parts_of(cache):
    """(kind, array or codes, scales or None) as kernels take them."""
    return (cache.kind, cache.codes, cache.scales) if isinstance(cache, CacheCodes) else ("dense", cache, None)


def codes_width(columns, k_cache, v_cache, *arrays):
    """Values that an access may take in every array and cache; more than 1 only where codes start at multiples of 8 bytes."""
    codes = [cache.codes for cache in (k_cache, v_cache) if isinstance(cache, CacheCodes)]
    if any(byte_bounds(array)[0] % 8 for array in codes):
        return 1
    return vector_width(columns, *arrays, *(cache for cache in (k_cache, v_cache) if not isinstance(cache, CacheCodes)))


def _codes_instance(dtype, k_kind, v_kind, vector):
    return instance("kv_append_codes", dtype, k_kind, v_kind, vector, file="kv_append")


INSTANCES = [
    *(instance("kv_append", word) for word in _WORDS.values()),
    *(_codes_instance(float16, kind, kind, 4) for kind in kv_cache.KINDS),
    _codes_instance(float16, "q8", "q4", 4),
    _codes_instance(float32, "dense", "e4m3", 1),
]
"""Arrays, and codes of every kind; other combinations are compiled when first used."""
