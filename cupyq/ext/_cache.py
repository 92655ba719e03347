"""Quantized caches of keys and values: cache of ops.md's index."""

import math

import numpy as np

from cupyq import ops
from cupyq._arrays import check, float16, namespace
from cupyq.ext._arrays import entry, integer, refuse_any_overlap
from cupyq.formats.kv_cache import code_shape, scale_shape

_UINT8 = np.dtype(np.uint8)
_KINDS = {4: ("q4", "q4"), 6: ("q8", "q4"), 8: ("q8", "q8")}  # of keys and of values, by wbits
_BLOCK = 512  # values that exllamav2 treats at a time; its callers round token ranges to whole blocks


@entry(arrays=("in_", "out"), writes=("out",))
def fp16_to_fp8(in_, out, batch_size, offset, width):
    """out = the high bytes of in_, for tokens offset to offset + width of the first batch_size rows

    in_ float16, out uint8, both [batch, seq, kv_heads, head_dim]. Nothing else is written.
    """
    ops.kv_encode(in_, out, None, kind="fp8", **_tokens(in_, batch_size, offset, width))


@entry(arrays=("in_", "out"), writes=("out",))
def fp8_to_fp16(in_, out, batch_size, offset, width):
    """out = the values whose high bytes are in_: fp16_to_fp8 reversed"""
    ops.kv_decode(in_, None, out, kind="fp8", **_tokens(out, batch_size, offset, width))


def _tokens(x, batch_size, offset, width):
    """The range as keywords of kv_encode and kv_decode.

    Callers round it outward to whole blocks of 512 values, which may lead past the end by less than a block: cut there.
    """
    rows, start = integer(batch_size, "batch_size", low=0), integer(offset, "offset", low=0)
    width = integer(width, "width", low=0)
    if x.ndim != 4:
        raise ValueError(f"a cache has 4 dimensions, [batch, seq, kv_heads, head_dim], got shape {x.shape}")
    batch, seq, heads, head_dim = x.shape
    if rows > batch:
        raise ValueError(f"batch_size must be at most {batch}, the rows of the cache, got {rows}")
    beyond = start + width - seq
    if 0 < beyond < _BLOCK // math.gcd(_BLOCK, heads * head_dim) and start <= seq:
        width -= beyond
    elif beyond > 0:
        raise ValueError(f"offset and width ask for tokens {start} to {start + width}, but the cache has {seq}")
    return {"rows": rows, "start": start, "width": width}


_ARRAYS = ("k_in", "k_out", "k_scales", "v_in", "v_out", "v_scales")


@entry(arrays=_ARRAYS, optional=("cache_seqlens", "block_table"), writes=("k_out", "k_scales", "v_out", "v_scales"))
def fp16_to_q_kv(
    k_in, k_out, k_scales, v_in, v_out, v_scales, batch_size, offset, width, page_size, cache_seqlens, block_table, wbits
):  # fmt: skip
    """Encode keys and values: float16 k_in and v_in to codes k_out, v_out and their scales

    wbits 4: both in 4 bits, 6: keys in 8 and values in 4, 8: both in 8. All [batch, seq, kv_heads, .]: head_dim values,
    head_dim or half as many uint8 codes, head_dim / 32 float16 scales.
    page_size 0: tokens offset to offset + width of the first batch_size rows. Otherwise the cache is seen as pages, and
    tokens cache_seqlens[b] to cache_seqlens[b] + width of every sequence b, whose pages block_table [batch, pages] names
    (int32 both), are encoded where they lie; batch_size and offset are not used.
    """
    kinds, tokens = _plan((k_in, k_out, k_scales), (v_in, v_out, v_scales), (batch_size, offset, width), page_size,
                          cache_seqlens, block_table, wbits)  # fmt: skip
    for kind, x, codes, scales in ((kinds[0], k_in, k_out, k_scales), (kinds[1], v_in, v_out, v_scales)):
        if page_size:
            ops.kv_encode_paged(
                *_paged(page_size, x, codes, scales), kind=kind, lengths=cache_seqlens, width=width, block_table=block_table
            )
        else:
            ops.kv_encode(x, codes, scales, kind=kind, **tokens)


@entry(arrays=_ARRAYS, optional=("cache_seqlens", "block_table"), writes=("k_out", "v_out"))
def q_to_fp16_kv(
    k_in, k_out, k_scales, v_in, v_out, v_scales, batch_size, offset, width, page_size, cache_seqlens, block_table, wbits
):  # fmt: skip
    """Decode keys and values: fp16_to_q_kv reversed, from codes k_in, v_in to float16 k_out, v_out

    With pages, tokens 0 to cache_seqlens[b] of every sequence b are decoded; width is not used then.
    """
    kinds, tokens = _plan((k_out, k_in, k_scales), (v_out, v_in, v_scales), (batch_size, offset, width), page_size,
                          cache_seqlens, block_table, wbits)  # fmt: skip
    for kind, codes, x, scales in ((kinds[0], k_in, k_out, k_scales), (kinds[1], v_in, v_out, v_scales)):
        if page_size:
            x, codes, scales = _paged(page_size, x, codes, scales)
            ops.kv_decode_paged(codes, scales, x, kind=kind, lengths=cache_seqlens, block_table=block_table)
        else:
            ops.kv_decode(codes, scales, x, kind=kind, **tokens)


def _plan(keys, values, tokens, page_size, cache_seqlens, block_table, wbits):
    """(kinds, range of tokens or None) after checking keys and values alike, so that nothing fails between the two."""
    if integer(wbits, "wbits") not in _KINDS:
        raise ValueError(f"wbits must be 4, 6 (keys 8, values 4) or 8, got {wbits}")
    kinds = _KINDS[wbits]
    page_size = integer(page_size, "page_size", low=0)
    named = {}
    for letter, kind, (x, codes, scales) in (("k", kinds[0], keys), ("v", kinds[1], values)):
        check(x, f"the float16 tensor of {letter}", dtype=float16, ndim=4, shape=keys[0].shape)
        check(codes, f"the codes of {letter}", dtype=_UINT8, shape=code_shape(x.shape, kind))
        check(scales, f"{letter}_scales", dtype=float16, shape=scale_shape(x.shape, kind))
        named |= {f"the float16 tensor of {letter}": x, f"the codes of {letter}": codes, f"{letter}_scales": scales}
    namespace(**named, cache_seqlens=cache_seqlens, block_table=block_table)
    refuse_any_overlap(**named)
    if not page_size:
        return kinds, _tokens(keys[0], *tokens)
    integer(tokens[2], "width", low=0)
    if cache_seqlens is None or block_table is None:
        raise ValueError("cache_seqlens and block_table are needed where page_size is given")
    batch, seq = keys[0].shape[:2]
    if seq % page_size:
        raise ValueError(f"page_size {page_size} does not divide the {seq} tokens of the cache")
    return kinds, None


def _paged(page_size, *arrays):
    """Each array [batch, seq, ...] as [pages, page_size, ...]."""
    return (array.reshape(array.shape[0] * array.shape[1] // page_size, page_size, *array.shape[2:]) for array in arrays)


@entry(arrays=("a", "b"))
def count_match(a, b, max_a):
    """The number of leading values that a and b have in common, at most max_a; both int64 on the host"""
    return ops.count_match(a, b, integer(max_a, "max_a", low=0))


@entry(arrays=("cache", "order"), optional=("temp",), writes=("cache",))
def cache_rotate(cache, order, temp):
    """page[order[i]] = page[order[i + 1]] in turn, and the last is what the first was; pages lie along cache's first axis

    cache of any dtype, order int32 [n]. temp, a page of scratch, is not needed.
    """
    ops.cache_rotate(cache, order)
