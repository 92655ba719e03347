"""Attention: reference against plain loops, kernels against the reference, and proof that the bounds bite."""

import importlib
import itertools
import math
import re
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, needs_cupy
from kernel_checks import is_hopper, sylvester

from cupyq import _device, _kernels
from cupyq.formats import kv_cache
from cupyq.ops._common import is_checking
from cupyq.ops.attention import attention, attention_reference, attention_workspace_size
from cupyq.ops.kv_codec import CacheCodes

module = importlib.import_module("cupyq.ops.attention")  # the op of the same name hides the module
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), bfloat16, np.dtype(np.float32)]
ULP = {DTYPES[0]: 2.0**-11, DTYPES[1]: 2.0**-8, DTYPES[2]: 2.0**-24}


# --- oracles --------------------------------------------------------------------------------------------------------


def sees(i, j, seq, length, causal, window):
    """The mask, one pair at a time."""
    position = length - seq + i
    return j < length and (j <= position or not causal) and (window is None or j > position - window)


def sequences(q, k, v, kv_lengths=None, block_table=None, query_starts=None):
    """(place in q and out, queries, keys, values) of each sequence alone: its valid keys gathered token by token."""
    batch = len(q) if query_starts is None else len(query_starts) - 1
    k, v = decoded(k, q.dtype), decoded(v, q.dtype)
    page_size = k.shape[1]
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    for b in range(batch):
        place = b if query_starts is None else slice(int(query_starts[b]), int(query_starts[b + 1]))
        length = capacity if kv_lengths is None else int(np.clip(kv_lengths[b], 0, capacity))
        if block_table is None:
            yield place, q[place], k[b, :length], v[b, :length]
            continue
        keys, values = np.zeros((2, length, *k.shape[2:]), k.dtype)
        for t in range(length):
            page = page_of(block_table[b, t // page_size], len(k))
            keys[t], values[t] = k[page, t % page_size], v[page, t % page_size]
        yield place, q[place], keys, values


def page_of(entry, pages):
    """What the kernels make of an entry of a block table."""
    return np.where((entry >= 0) & (entry < pages), entry, 0)


def decoded(array, dtype):
    """The values of an array or of CacheCodes."""
    if not isinstance(array, CacheCodes):
        return array
    return kv_cache.decode(array.codes, array.scales, array.kind).reshape(array.shape).astype(dtype)


def plain_loops(q, k, v, scale=None, causal=True, window=None, softcap=None, sinks=None, **tables):
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros(q.shape)
    for place, queries, keys, values in sequences(q, k, v, **tables):
        for i, h in itertools.product(range(len(queries)), range(heads)):
            g = h // (heads // k.shape[2])
            scores = {}
            for j in range(len(keys)):
                if sees(i, j, len(queries), len(keys), causal, window):
                    s = scale * math.fsum(float(x) * float(y) for x, y in zip(queries[i, h], keys[j, g], strict=True))
                    scores[j] = s if softcap is None else softcap * math.tanh(s / softcap)
            if not scores:
                continue
            top = max(scores.values())
            weights = {j: math.exp(s - top) for j, s in scores.items()}
            total = math.fsum([*weights.values(), 0.0 if sinks is None else math.exp(float(sinks[h]) - top)])
            for c in range(head_dim):
                out[place][i, h, c] = math.fsum(w * float(values[j, g, c]) for j, w in weights.items()) / total
    return out


def transformed(q):
    """q as float32, once its transform was rounded to float16."""
    return (sylvester((sylvester(q) / 32).astype(np.float16)) / 32).astype(np.float32)


def same_dtype(q, k, v, scale=None, causal=True, window=None, softcap=None, sinks=None, meets_transform=False, **tables):
    """What plain low-precision code gets: float32 products and softmax, weights and result rounded to the dtype."""
    dtype = q.dtype
    q = transformed(q) if meets_transform and isinstance(k, CacheCodes) and k.kind in ("q4", "q8") else q
    heads, head_dim = q.shape[-2:]
    group = heads // k.shape[2]
    scale = np.float32(head_dim**-0.5 if scale is None else scale)
    out = np.zeros(q.shape, dtype)
    for place, queries, all_keys, all_values in sequences(q, k, v, **tables):
        seq, length = len(queries), len(all_keys)
        i, j = np.arange(seq)[:, None], np.arange(length)[None]
        mask = np.full((seq, length), True)
        if causal:
            mask &= j <= length - seq + i
        if window is not None:
            mask &= j > length - seq + i - window
        used = np.flatnonzero(mask.any(axis=0))
        mask = mask[:, used]
        if used.size == 0:
            continue
        for h in range(heads):
            keys, values = (a[used, h // group].astype(np.float32) for a in (all_keys, all_values))
            scores = (queries[:, h].astype(np.float32) @ keys.T) * scale
            if softcap is not None:
                scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
            scores = np.where(mask, scores, np.float32(-np.inf))
            sink = np.float32(-np.inf if sinks is None else sinks[h])
            top = np.maximum(scores.max(axis=1, keepdims=True), sink)
            top = np.where(np.isinf(top), np.float32(0), top)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
            sums = weights.astype(dtype).astype(np.float32) @ values
            out[place][:, h] = np.where(total == 0, np.float32(0), sums / np.where(total == 0, np.float32(1), total))
    return out


def assert_close(result, exact, reference):
    """Per element within twice the same-dtype reference's worst error plus one rounding, and the same for the norm."""
    dtype = reference.dtype
    assert result.shape == exact.shape and result.dtype == dtype
    result, reference = result.astype(np.float64), reference.astype(np.float64)
    exact_bound(result, exact, reference, ulp=ULP[dtype])
    error = np.linalg.norm(result - exact)
    allowed = 2 * np.linalg.norm(reference - exact) + ULP[dtype] * np.linalg.norm(exact)
    assert error <= allowed, f"error norm {error:.3g}, allowed {allowed:.3g}"


def make(rng, dtype, batch, seq, capacity, heads, kv_heads, head_dim, *, sharpness=2.0, batch_capacity=None):
    shape = (batch_capacity or batch, capacity, kv_heads, head_dim)
    q = (sharpness * rng.standard_normal((batch, seq, heads, head_dim))).astype(dtype)
    return q, rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)


def poison(q, k, v, causal=True, window=None, kv_lengths=None, block_table=None, query_starts=None, **_):
    """NaN in every cache slot that no query sees."""
    seen = np.zeros(k.shape[:2], bool)
    page_size = k.shape[1]
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    for b in range(len(q) if query_starts is None else len(query_starts) - 1):
        seq = q.shape[1] if query_starts is None else int(query_starts[b + 1] - query_starts[b])
        length = capacity if kv_lengths is None else int(np.clip(kv_lengths[b], 0, capacity))
        first = 0 if window is None else max(0, length - seq - window + 1)
        for t in range(first, length if seq else 0):
            page = b if block_table is None else page_of(block_table[b, t // page_size], k.shape[0])
            seen[page, t % page_size] = True
    for array in (k, v):
        if not isinstance(array, CacheCodes):
            array[~seen] = np.nan
        elif array.scales is None:
            array.codes[~seen] = 0x7F
        else:
            array.scales[~seen] = np.nan


def exact_of(q, k, v, scale=None, causal=True, window=None, softcap=None, sinks=None, **tables):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    table, starts, lengths = (tables.get(name) for name in ("block_table", "query_starts", "kv_lengths"))
    table = None if table is None else page_of(table, k.shape[0])
    capacity = k.shape[1] * (1 if table is None else table.shape[1])
    lengths = None if lengths is None else np.clip(lengths, 0, capacity)
    return attention_reference(q, k, v, scale, causal, window, softcap, lengths, sinks, table, starts)


def in_pages(rng, page_size, *arrays, spare=2):
    """Contiguous caches as pages in random places, and the block table; the same places for each array."""
    batch, capacity = arrays[0].shape[:2]
    columns = -(-capacity // page_size)
    table = rng.permutation(batch * columns + spare)[: batch * columns].reshape(batch, columns).astype(np.int32)
    pages = []
    for array in arrays:
        pages.append(np.full((batch * columns + spare, page_size, *array.shape[2:]), np.nan).astype(array.dtype))
        for b, t in itertools.product(range(batch), range(capacity)):
            pages[-1][table[b, t // page_size], t % page_size] = array[b, t]
    return *pages, table


def as_codes(array, kind):
    """An array as CacheCodes; "dense" leaves it as it is."""
    if kind == "dense":
        return array
    codes, scales = kv_cache.encode(np.nan_to_num(array.astype(np.float32)).astype(np.float16), kind)
    scales = None if scales is None else scales.reshape(kv_cache.scale_shape(array.shape, kind))
    return CacheCodes(kind, codes.reshape(kv_cache.code_shape(array.shape, kind)), scales)


OPTIONS = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 5},
    {"window": 5, "causal": False},
    {"softcap": 1.5},
    {"softcap": 30.0, "window": 4, "scale": 0.3},
    {"scale": 1.0},
]


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [None, (9, 4), (1, 0), (2, 3)], ids=str)
def test_reference_against_plain_loops(options, lengths):
    rng = np.random.default_rng(1)
    q, k, v = make(rng, np.float64, 2, 4, 9, 6, 2, 8)
    options = options | {"kv_lengths": None if lengths is None else np.array(lengths, np.int32)}
    expected = plain_loops(q, k, v, **options)
    np.testing.assert_allclose(exact_of(q, k, v, **options), expected, rtol=1e-12, atol=1e-14)
    poison(q, k, v, **options)
    np.testing.assert_allclose(exact_of(q, k, v, **options), expected, rtol=1e-12, atol=1e-14)


def all_at_once(rng, dtype, kinds=("dense", "dense"), *, heads=6, kv_heads=2, head_dim=64, page_size=4, most=9, sharpness=2.0):
    """A call with everything in it: sequences of different lengths (one without queries) in pages of codes, sinks, a window."""
    counts = rng.integers(1, most, 4)
    counts[1] = 0
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    lengths = (counts + rng.integers(0, 3 * page_size, 4)).astype(np.int32)
    lengths[2] = max(0, lengths[2] - 2 * counts[2])  # queries before the first key
    q, k, v = make(rng, dtype, 4, 1, int(lengths.max()) + 1, heads, kv_heads, head_dim)
    q = (sharpness * rng.standard_normal((starts[-1], heads, head_dim))).astype(dtype)
    k, v, table = in_pages(rng, page_size, k, v)
    options = {"block_table": table, "query_starts": starts, "kv_lengths": lengths}
    options["sinks"] = rng.standard_normal(heads).astype(np.float32) * 2
    options["window"] = int(rng.integers(2, 9))
    return (q, *(as_codes(array, kind) for array, kind in zip((k, v), kinds, strict=True))), options


KIND_PAIRS = [("dense", "dense"), ("fp8", "fp8"), ("e4m3", "e4m3"), ("q4", "q4"), ("q8", "q8"), ("q8", "q4"), ("dense", "e4m3")]


@pytest.mark.parametrize("kinds", KIND_PAIRS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_reference_of_tables_sinks_and_codes_against_plain_loops(dtype, kinds):
    (q, k, v), options = all_at_once(np.random.default_rng(20), dtype, kinds, heads=2, kv_heads=1, most=4)
    expected = plain_loops(q, k, v, **options)
    np.testing.assert_allclose(exact_of(q, k, v, **options), expected, rtol=1e-11, atol=1e-13)
    poison(q, k, v, **options)
    np.testing.assert_allclose(exact_of(q, k, v, **options), expected, rtol=1e-11, atol=1e-13)
    result = attention(q, k, v, **options)
    assert result.dtype == dtype and result.shape == q.shape
    np.testing.assert_allclose(result.astype(np.float64), expected, rtol=1.01 * ULP[dtype], atol=1e-7)


def test_a_sink_takes_its_share():
    """One key of score 0 and a sink of log 3: a quarter of the value is left. A sink of minus infinity takes nothing."""
    q, k, v = np.zeros((1, 1, 2, 8), np.float32), np.zeros((1, 1, 1, 8), np.float32), np.ones((1, 1, 1, 8), np.float32)
    result = attention(q, k, v, sinks=np.array([math.log(3), -math.inf], np.float32))
    np.testing.assert_allclose(result[0, 0, :, 0], [0.25, 1.0], rtol=1e-6)
    assert not attention(q, k[:, :0], v[:, :0], sinks=np.zeros(2, np.float32)).any()


def test_pages_and_starts_are_the_plain_call():
    """The same numbers, to the bit, whichever way a call says where queries and keys lie."""
    rng = np.random.default_rng(21)
    q, k, v = make(rng, np.float32, 2, 3, 10, 4, 2, 16)
    lengths = lengths_of(10, 7)
    expected = attention(q, k, v, kv_lengths=lengths).tobytes()
    pages_k, pages_v, table = in_pages(rng, 4, k, v)
    assert attention(q, pages_k, pages_v, kv_lengths=lengths, block_table=table).tobytes() == expected
    tokens, starts = q.reshape(6, 4, 16), lengths_of(0, 3, 6)
    assert attention(tokens, k, v, kv_lengths=lengths, query_starts=starts).tobytes() == expected
    shared = np.repeat(table[:1], 2, axis=0)  # both rows read the pages of the first
    twice = attention(q[:1].repeat(2, axis=0), pages_k, pages_v, kv_lengths=lengths_of(10, 10), block_table=shared)
    assert twice[0].tobytes() == twice[1].tobytes() == attention(q[:1], k[:1], v[:1])[0].tobytes()


def test_reference_in_blocks_is_the_reference(monkeypatch):
    q, k, v = make(np.random.default_rng(2), np.float64, 1, 37, 50, 4, 2, 8)
    whole = exact_of(q, k, v, window=11)
    monkeypatch.setattr(module, "_REFERENCE_SCORES", 1000)
    np.testing.assert_allclose(exact_of(q, k, v, window=11), whole, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_rounds_the_reference_once(dtype):
    q, k, v = make(np.random.default_rng(3), dtype, 2, 3, 7, 4, 1, 16, batch_capacity=3)
    lengths = np.array([7, 5], np.int32)
    exact = plain_loops(q, k[:2], v[:2], kv_lengths=lengths)
    result = attention(q, k, v, kv_lengths=lengths)
    assert result.dtype == dtype and result.shape == q.shape
    np.testing.assert_allclose(result.astype(np.float64), exact, rtol=1.01 * ULP[dtype], atol=1e-7)
    out = np.full_like(q, np.nan)
    assert attention(q, k, v, kv_lengths=lengths, out=out) is out
    assert out.tobytes() == result.tobytes()
    assert attention(q, k, v, kv_lengths=lengths, out=q) is q
    assert q.tobytes() == result.tobytes()


def test_a_window_counts_the_key_itself():
    """Query at position 4 with a window of 2 averages keys 3 and 4 (equal scores)."""
    q, k = np.zeros((1, 1, 1, 8), np.float32), np.zeros((1, 6, 1, 8), np.float32)
    v = np.repeat(np.array([1, 2, 4, 8, 16, 32], np.float32), 8).reshape(k.shape)
    lengths = np.array([5], np.int32)
    assert attention(q, k, v, window=2, kv_lengths=lengths)[0, 0, 0, 0] == 12
    assert attention(q, k, v, window=1, kv_lengths=lengths)[0, 0, 0, 0] == 16
    assert attention(q, k, v, kv_lengths=lengths)[0, 0, 0, 0] == np.float32(31 / 5)


def test_queries_before_the_first_key_give_zeros():
    q, k, v = make(np.random.default_rng(4), np.float32, 1, 4, 6, 2, 2, 8)
    result = attention(q, k, v, kv_lengths=np.array([2], np.int32))
    assert not result[0, :2].any() and result[0, 2:].all()
    assert not attention(q, k[:, :0], v[:, :0]).any()
    assert attention(q[:, :0], k, v).shape == (1, 0, 2, 8)


# --- the bounds bite ------------------------------------------------------------------------------------------------


def _interleaved(q, k):
    """q with its heads reordered, as if query head h used kv head h % kv_heads."""
    batch, seq, heads, head_dim = q.shape
    return q.reshape(batch, seq, -1, k.shape[2], head_dim).swapaxes(2, 3).reshape(q.shape)


WRONG = {
    "window one wider": lambda q, k, v, o: exact_of(q, k, v, **o | {"window": o["window"] + 1}),
    "window one narrower": lambda q, k, v, o: exact_of(q, k, v, **o | {"window": o["window"] - 1}),
    "no softcap": lambda q, k, v, o: exact_of(q, k, v, **o | {"softcap": None}),
    "no scale": lambda q, k, v, o: exact_of(q, k, v, **o | {"scale": 1.0}),
    "not causal": lambda q, k, v, o: exact_of(q, k, v, **o | {"causal": False}),
    "aligned at the top left": lambda q, k, v, o: exact_of(
        q, k, v, **o | {"kv_lengths": np.full_like(o["kv_lengths"], q.shape[1])}
    ),
    "one key short": lambda q, k, v, o: exact_of(q, k, v, **o | {"kv_lengths": o["kv_lengths"] - 1}),
    "heads interleaved": lambda q, k, v, o: exact_of(_interleaved(q, k), k, v, **o),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_references_are_rejected(wrong, dtype):
    q, k, v = make(np.random.default_rng(5), dtype, 1, 60, 200, 4, 2, 64)
    options = {"window": 50, "softcap": 20.0, "kv_lengths": np.array([190], np.int32)}
    exact, reference = exact_of(q, k, v, **options), same_dtype(q, k, v, **options)
    assert_close(attention(q, k, v, **options), exact, reference)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(WRONG[wrong](q, k, v, options).astype(dtype), exact, reference)


WRONG_TABLES = {
    "no sinks": lambda q, k, v, o: exact_of(q, k, v, **o | {"sinks": None}),
    "sinks scaled as scores are": lambda q, k, v, o: exact_of(q, k, v, **o | {"sinks": o["sinks"] / 8}),
    "sinks of other heads": lambda q, k, v, o: exact_of(q, k, v, **o | {"sinks": np.roll(o["sinks"], 1)}),
    "pages in order": lambda q, k, v, o: exact_of(q, k, v, **o | {"block_table": np.sort(o["block_table"], axis=1)}),
    "the table of another row": lambda q, k, v, o: exact_of(q, k, v, **o | {"block_table": np.roll(o["block_table"], 1, 0)}),
    "rows start one later": lambda q, k, v, o: exact_of(q, k, v, **o | {"query_starts": _later(o["query_starts"])}),
    "lengths of other rows": lambda q, k, v, o: exact_of(q, k, v, **o | {"kv_lengths": np.roll(o["kv_lengths"], 1)}),
    "codes of k one off": lambda q, k, v, o: exact_of(q, CacheCodes(k.kind, k.codes ^ 1, k.scales), v, **o),
    "scales of v of another token": lambda q, k, v, o: exact_of(
        q, k, CacheCodes(v.kind, v.codes, np.roll(v.scales, 1, 1)), **o
    ),
}


def _later(starts):
    return np.concatenate((starts[:1], np.minimum(starts[1:-1] + 1, starts[-1]), starts[-1:]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_wrong_tables_sinks_and_codes_are_rejected(wrong, dtype):
    (q, k, v), options = all_at_once(np.random.default_rng(22), dtype, ("q4", "e4m3"), most=30)
    k, v = (as_codes(np.nan_to_num(decoded(a, np.dtype(np.float32))), a.kind) for a in (k, v))  # a wrong page holds numbers
    options["window"] = None
    exact, reference = exact_of(q, k, v, **options), same_dtype(q, k, v, **options)
    assert_close(attention(q, k, v, **options), exact, reference)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(WRONG_TABLES[wrong](q, k, v, options).astype(dtype), exact, reference)


# --- arguments ------------------------------------------------------------------------------------------------------


def _bad_calls(xp):
    def zeros(*shape, dtype=np.float16):
        return xp.zeros(shape, dtype)

    q, k, lengths = zeros(2, 3, 4, 16), zeros(2, 8, 2, 16), zeros(2, dtype=np.int32)
    floats = zeros(2, 2, dtype=np.float32)
    odd_heads, narrow, wide, same = zeros(2, 8, 3, 16), zeros(1, 1, 1, 12), zeros(1, 1, 1, 264), zeros(2, 3, 4, 16)
    table, starts, tokens = zeros(2, 3, dtype=np.int32), zeros(3, dtype=np.int32), zeros(6, 4, 16)
    codes = CacheCodes("fp8", zeros(2, 8, 2, 16, dtype=np.uint8))
    over = CacheCodes("fp8", same.view(np.uint8).reshape(-1)[:512].reshape(2, 8, 2, 16))
    sinks = zeros(4, dtype=np.float32)
    apart = {"query_starts": starts, "kv_lengths": lengths}
    return {
        "dtype of q": (TypeError, "q must have dtype", (q.astype(np.float64), k, k), {}),
        "dtype of k": (TypeError, "k must have dtype float16", (q, k.astype(np.float32), k), {}),
        "dtype of v": (TypeError, "v must have dtype float16", (q, k, k.astype(np.float32)), {}),
        "q of 3 dimensions": (ValueError, "q must have 4 dimensions", (q[0], k, k), {}),
        "k of another head_dim": (ValueError, "k must have shape", (q, zeros(2, 8, 2, 8), k), {}),
        "v of another shape": (ValueError, "v must have shape", (q, k, zeros(2, 9, 2, 16)), {}),
        "too few batch rows": (ValueError, "k must have at least the 2 batch rows", (q, k[:1], k[:1]), {}),
        "kv_heads no divisor": (ValueError, "heads must be a multiple", (q, odd_heads, odd_heads), {}),
        "head_dim 12": (ValueError, "a multiple of 8 from 8 to 256", (narrow, narrow, narrow), {}),
        "head_dim 264": (ValueError, "a multiple of 8 from 8 to 256", (wide, wide, wide), {}),
        "k not contiguous": (ValueError, "k must be C-contiguous", (q, zeros(2, 8, 4, 16)[:, :, ::2], k), {}),
        "scale zero": (ValueError, "scale must be a positive", (q, k, k), {"scale": 0.0}),
        "scale nan": (ValueError, "scale must be a positive", (q, k, k), {"scale": math.nan}),
        "softcap": (ValueError, "softcap must be a positive", (q, k, k), {"softcap": -1.0}),
        "window zero": (ValueError, "window must be", (q, k, k), {"window": 0}),
        "window -1": (ValueError, "window must be", (q, k, k), {"window": -1}),
        "kv_lengths dtype": (TypeError, "kv_lengths must have dtype int32", (q, k, k), {"kv_lengths": q[:, 0, 0, 0]}),
        "kv_lengths shape": (ValueError, "kv_lengths must have shape", (q, k, k), {"kv_lengths": lengths[:1]}),
        "out dtype": (TypeError, "out must have dtype", (q, k, k), {"out": zeros(2, 3, 4, 16, dtype=np.float32)}),
        "out shape": (ValueError, "out must have shape", (q, k, k), {"out": k}),
        "out is k": (ValueError, "out overlaps k", (q, same, zeros(2, 3, 4, 16)), {"out": same}),
        "out is v": (ValueError, "out overlaps v", (q, zeros(2, 3, 4, 16), same), {"out": same}),
        "sinks dtype": (TypeError, "sinks must have dtype float32", (q, k, k), {"sinks": sinks.astype(np.float16)}),
        "sinks shape": (ValueError, r"sinks must have shape \(4\)", (q, k, k), {"sinks": sinks[:2]}),
        "block_table dtype": (TypeError, "block_table must have dtype int32", (q, k, k), {"block_table": q[:, :, 0, 0]}),
        "block_table rows": (ValueError, "block_table must have shape", (q, k, k), {"block_table": table[:1]}),
        "page size 6": (
            ValueError,
            "k must have pages of a power of two",
            (q, k[:, :6].copy(), k[:, :6].copy()),
            {"block_table": table},
        ),
        "query_starts with 4 dimensions": (ValueError, "q must have 3 dimensions", (q, k, k), apart),
        "query_starts dtype": (
            TypeError,
            "query_starts must have dtype int32",
            (tokens, k, k),
            apart | {"query_starts": sinks},
        ),
        "query_starts of none": (
            ValueError,
            "query_starts must have an entry",
            (tokens, k, k),
            apart | {"query_starts": starts[:1]},
        ),
        "query_starts alone": (ValueError, "kv_lengths must be given with", (tokens, k, k), {"query_starts": starts}),
        "query_starts of more rows": (ValueError, "k must have at least the 2", (tokens, k[:1], k[:1]), apart),
        "codes and float32": (
            TypeError,
            "q must have dtype float16 or bfloat16 where k",
            (q.astype(np.float32), codes, codes),
            {},
        ),
        "codes of another shape": (ValueError, "v must have shape", (q, zeros(2, 9, 2, 16), codes), {}),
        "codes of another head_dim": (ValueError, "k must have shape", (zeros(2, 3, 4, 8), codes, codes), {}),
        "out in the codes": (ValueError, "out overlaps v.codes", (q, k, over), {"out": same}),
        "workspace dtype": (TypeError, "workspace must have dtype float32", (q, k, k), {"workspace": lengths}),
        "workspace shape": (ValueError, "workspace must have 1 dim", (q, k, k), {"workspace": floats}),
    }


@pytest.mark.parametrize("case", _bad_calls(np))
def test_bad_arguments(case):
    error, message, arrays, options = _bad_calls(np)[case]
    with pytest.raises(error, match=message):
        attention(*arrays, **options)


@pytest.mark.parametrize("lengths", [(-1, 3), (3, 9)])
def test_numpy_refuses_lengths_outside_the_cache(lengths):
    q, k = np.zeros((2, 3, 4, 16), np.float16), np.zeros((2, 8, 2, 16), np.float16)
    with pytest.raises(ValueError, match=r"kv_lengths must lie in 0\.\.8"):
        attention(q, k, k, kv_lengths=np.array(lengths, np.int32))


TABLES = {
    "a page too far": ("block_table", [[0, 1], [2, 4]], "block_table must hold pages from 0 to 3, got 4 in row 1, entry 1"),
    "a negative page": ("block_table", [[-1, 1], [2, 3]], "block_table must hold pages from 0 to 3, got -1 in row 0, entry 0"),
    "a length": ("kv_lengths", [4, 9], r"kv_lengths must lie in 0..8, k's capacity, got 9 in row 1"),
    "starts from 1": ("query_starts", [1, 2, 6], "query_starts must go from 0 to 6, q's rows, got 1 at entry 0"),
    "starts to 5": ("query_starts", [0, 2, 5], "query_starts must go from 0 to 6, q's rows, got 5 at entry 2"),
    "falling starts": ("query_starts", [0, 8, 6], "query_starts must never fall, got 6 after 8 at entry 2"),
}


def bad_table(xp, case):
    """A call of two sequences in pages with one bad entry -> q, k, options, message."""
    name, entries, message = TABLES[case]
    tables = {"block_table": [[0, 1], [2, 3]], "kv_lengths": [8, 5], "query_starts": [0, 2, 6]} | {name: entries}
    options = {name: xp.asarray(np.array(entries, np.int32)) for name, entries in tables.items()}
    return xp.zeros((6, 4, 16), np.float16), xp.zeros((4, 4, 2, 16), np.float16), options, message


@pytest.mark.parametrize("case", TABLES)
def test_numpy_refuses_bad_tables(case):
    q, k, options, message = bad_table(np, case)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)


def test_checking_is_asked_for_by_the_environment(monkeypatch):
    for value, expected in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv("CUPYQ_CHECK", raising=False)
        if value is not None:
            monkeypatch.setenv("CUPYQ_CHECK", value)
        assert is_checking.__wrapped__() is expected


def test_entries_past_a_length_are_never_looked_at():
    q, k, options, _ = bad_table(np, "a page too far")
    options["kv_lengths"] = lengths_of(8, 4)
    assert not attention(q, k, k, **options).any()


# --- choices --------------------------------------------------------------------------------------------------------


def test_pick_kernel():
    float16, float32 = DTYPES[0], DTYPES[2]
    assert module.pick_kernel(float16, 1, 128, True, "sm_90a") == "decode"
    assert module.pick_kernel(float16, 16, 128, True, "sm_90a") == "decode"
    assert module.pick_kernel(float16, 16, 128, True, "sm_80", has_codes=True) == "decode"
    assert module.pick_kernel(float16, 17, 128, True, "sm_90a") == "wgmma"
    assert module.pick_kernel(bfloat16, 17, 64, True, "sm_90a") == "wgmma"
    assert module.pick_kernel(float16, 17, 128, True, "sm_90a", has_codes=True) == "wgmma"
    assert module.pick_kernel(float16, 17, 96, True, "sm_90a", has_codes=True) == "prefill"
    assert module.pick_kernel(float16, 17, 72, True, "sm_90a") == "prefill"
    assert module.pick_kernel(float16, 17, 128, True, "sm_90a", page_size=256) == "wgmma"
    assert module.pick_kernel(float16, 17, 128, True, "sm_90a", page_size=2) == "prefill"
    assert module.pick_kernel(float16, 17, 128, True, "sm_75") == "prefill"
    assert module.pick_kernel(float16, 17, 128, True, "sm_100a") == "prefill"
    assert module.pick_kernel(bfloat16, 17, 128, True, "sm_80") == "prefill"
    assert module.pick_kernel(bfloat16, 1, 128, True, "sm_75") == "simple"
    assert module.pick_kernel(float32, 1, 128, True, "sm_90a") == "simple"
    assert module.pick_kernel(float16, 1, 128, False, "sm_90a") == "simple"


@pytest.mark.parametrize("arch", [*_device.TARGET_ARCHS, "sm_999"])
def test_tiles_fit_every_gpu(arch):
    for head_dim in range(8, 257, 8):
        prefill = module.pick_prefill_config(head_dim, arch)
        assert prefill.shared_bytes(head_dim) <= module.shared_bytes_limit(arch)
        assert prefill.tile_keys % 16 == 0 and 16 * prefill.warps <= 4 * prefill.tile_keys


def test_what_a_kernel_is_told():
    """Sizes and options as kernels take them, from a call in pages and from a contiguous one."""
    q, k = np.zeros((5, 6, 64), np.float16), CacheCodes.zeros(np, (7, 16, 2, 64), "q4")
    tables = {"block_table": np.zeros((2, 3), np.int32), "query_starts": lengths_of(0, 2, 5), "kv_lengths": lengths_of(9, 9)}
    p = module._checked(q, k, k, None, True, None, None, sinks=None, **tables)
    assert (p.batch, p.most_queries, p.heads, p.kv_heads, p.group, p.head_dim) == (2, 5, 6, 2, 3, 64)
    assert (p.capacity, p.page_size, p.max_pages, p.pages, p.is_paged) == (48, 16, 3, 7, True)
    assert (p.kernel_window, p.kernel_softcap, p.scale) == (48, 0.0, 0.125)
    assert all(getattr(p, name) is table for name, table in tables.items())
    tables = dict.fromkeys(("sinks", "kv_lengths", "block_table", "query_starts"))
    q, k = np.zeros((3, 4, 2, 8), np.float32), np.zeros((5, 3000, 1, 8), np.float32)
    p = module._checked(q, k, k, 2, False, 70, 9, **tables)
    assert (p.batch, p.most_queries, p.capacity, p.page_size, p.max_pages, p.pages) == (3, 4, 3000, 3000, 1, 5)
    assert (p.causal, p.window, p.kernel_window, p.kernel_softcap) == (False, 70, 70, 9.0)
    assert not p.is_paged


def test_blocks_suffice_for_rows_of_any_lengths():
    """However tokens are shared out among sequences, their tiles are no more than the blocks launched."""
    rng = np.random.default_rng(23)
    for tokens, batch, tile in itertools.product([1, 15, 16, 17, 100, 1000], [1, 2, 5, 40], [16, 128]):
        problem = mock.Mock(query_starts=True, most_queries=tokens, batch=batch, heads=3)
        (blocks,) = module._grid(problem, tile)
        for _ in range(10):
            counts = np.diff(np.sort(rng.integers(0, tokens + 1, batch - 1)), prepend=0, append=tokens)
            assert 3 * int(np.sum(-(-counts // tile))) <= blocks


@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90a", "sm_100a"])
def test_wide_heads_do_not_spill(arch):
    """The widest accumulators, with the tiles each GPU gets; the common sizes are among INSTANCES."""
    needs_cupy()
    kinds = ("q8", "q4") if arch == "sm_75" else ()  # whose blocks are the smallest: a thread loads the most
    for wanted in (
        module._prefill_instance(DTYPES[0], 256, module.pick_prefill_config(256, arch), *kinds),
        module._simple_instance(DTYPES[2], 256),
    ):
        _, _, log = _kernels.compile_instance(wanted, arch, ("--ptxas-options=-v",))
        assert re.findall(r"(\d+) bytes spill stores", log) == ["0"], f"{wanted} on {arch}: {log}"


def test_tiles_of_an_h100():
    assert module.pick_prefill_config(128, "sm_90a") == module.PrefillConfig(warps=8, tile_keys=64)


# --- kernels --------------------------------------------------------------------------------------------------------


def on_gpu(cupy, q, k, v, *, offset=64, **options):
    """attention() on the GPU with every array in the middle of a buffer of NaN, `offset` values from its edges.

    NaN read from the edges would show in the result; NaN overwritten by the kernel would be missing afterwards.
    """
    for name in ("kv_lengths", "block_table", "query_starts", "sinks"):
        if options.get(name) is not None:
            options[name] = cupy.asarray(options[name])

    def bedded(array):
        buffer = np.full(array.size + 2 * offset, 0x7F if array.dtype == np.uint8 else np.nan).astype(array.dtype)
        buffer[offset : offset + array.size] = array.ravel()
        buffer = cupy.asarray(buffer)
        return buffer, buffer[offset : offset + array.size].reshape(array.shape)

    def bedded_cache(array):
        if not isinstance(array, CacheCodes):
            return bedded(array)[1]
        return CacheCodes(array.kind, bedded(array.codes)[1], None if array.scales is None else bedded(array.scales)[1])

    sentinel = np.full(q.shape, np.nan).astype(q.dtype)
    buffer, out = bedded(sentinel)
    assert attention(bedded(q)[1], bedded_cache(k), bedded_cache(v), out=out, **options) is out
    host = buffer.get()
    for edge in (host[:offset], host[offset + q.size :]):
        assert edge.tobytes() == sentinel.ravel()[:1].tobytes() * offset, "written outside of out"
    return host[offset : offset + q.size].reshape(q.shape)


def verify(cupy, q, k, v, meets_transform=False, **options):
    """Kernel against reference, with NaN where nobody may look. meets_transform: q is multiplied with transformed keys."""
    poison(q, k, v, **options)
    host = {name: value for name, value in options.items() if name not in ("offset", "workspace")}
    result = on_gpu(cupy, q, k, v, **options)
    assert_close(result, exact_of(q, k, v, **host), same_dtype(q, k, v, meets_transform=meets_transform, **host))
    return result


def takes_transformed(kernel, q):
    """Whether the kernel that takes so many tokens of head_dim 64 multiplies q4 and q8 keys as stored, with a transformed q."""
    return kernel == "chosen" and (len(q) <= module._DECODE_QUERIES or is_hopper())


@pytest.fixture
def force(monkeypatch):
    """force(name) makes attention() take that kernel wherever it is one that can; "chosen" is the one it takes itself."""
    pick = module.pick_kernel

    def force(kernel):
        def picked(*args, **keywords):
            chosen = pick(*args, **keywords)
            return chosen if kernel == "chosen" or chosen == "simple" else kernel

        monkeypatch.setattr(module, "pick_kernel", picked)

    return force


def lengths_of(*values):
    return np.array(values, np.int32)


# batch, seq, capacity, heads, kv_heads, options
SHAPES = [
    (1, 1, 1, 1, 1, {}),
    (1, 1, 255, 4, 4, {}),
    (1, 1, 257, 8, 2, {"softcap": 2.0}),
    (3, 1, 300, 8, 1, {"kv_lengths": lengths_of(256, 1, 300)}),
    (2, 2, 300, 6, 2, {"kv_lengths": lengths_of(257, 1), "window": 33}),
    (2, 5, 1100, 16, 2, {"kv_lengths": lengths_of(1100, 64)}),
    (1, 1, 2100, 12, 1, {"kv_lengths": lengths_of(2065)}),
    (1, 1, 700, 40, 2, {"kv_lengths": lengths_of(650)}),
    (1, 16, 256, 9, 3, {"window": 100}),
    (1, 16, 256, 3, 1, {"causal": False}),
    (1, 17, 17, 3, 1, {}),
    (2, 64, 300, 4, 4, {"kv_lengths": lengths_of(63, 300), "causal": False}),
    (2, 65, 300, 4, 1, {"kv_lengths": lengths_of(65, 30)}),
    (1, 127, 127, 3, 3, {"window": 1}),
    (1, 129, 257, 2, 2, {"window": 65, "softcap": 5.0}),
    (1, 255, 255, 8, 2, {}),
    (2, 256, 384, 4, 2, {"kv_lengths": lengths_of(384, 257), "window": 128}),
    (1, 257, 600, 3, 1, {"kv_lengths": lengths_of(513), "causal": False, "window": 70}),
]


# Each kind once for K and once for V; every pair is an instance to compile.
GPU_KINDS = [
    (DTYPES[0], ("dense", "dense")),
    (DTYPES[0], ("q4", "q8")),
    (DTYPES[0], ("fp8", "e4m3")),
    (DTYPES[1], ("q8", "q4")),
    (DTYPES[1], ("e4m3", "fp8")),
    (DTYPES[1], ("dense", "q8")),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
def test_kernels_against_reference(cupy, head_dim, dtype):
    rng = np.random.default_rng(head_dim)
    for batch, seq, capacity, heads, kv_heads, options in SHAPES:
        verify(cupy, *make(rng, dtype, batch, seq, capacity, heads, kv_heads, head_dim), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_random_shapes(cupy, dtype):
    rng = np.random.default_rng(7)
    for _ in range(40):
        batch, kv_heads, group = rng.integers(1, 4), rng.integers(1, 4), rng.choice([1, 2, 3, 4, 5, 8, 20])
        seq = rng.choice([1, 2, 3, 7, 15, 16, 17, 31, 33, 100])
        capacity = int(rng.integers(seq, 700))
        options = {
            "causal": bool(rng.integers(4)),
            "window": None if rng.integers(2) else int(rng.integers(1, capacity + 9)),
            "softcap": None if rng.integers(3) else float(rng.uniform(0.5, 30)),
            "kv_lengths": rng.integers(0, capacity + 1, batch).astype(np.int32),
        }
        sharpness = rng.choice([0.1, 2.0, 6.0])
        arrays = make(rng, dtype, batch, seq, capacity, kv_heads * group, kv_heads, 64, sharpness=sharpness)
        verify(cupy, *arrays, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kernel, head_dim", [("prefill", 64), ("prefill", 80), ("prefill", 256), ("simple", 64)])
def test_kernels_that_another_gpu_would_take(cupy, force, kernel, head_dim, dtype):
    """A Hopper GPU takes others for these calls."""
    force(kernel)
    rng = np.random.default_rng(24)
    for batch, seq, capacity, heads, kv_heads, options in SHAPES:
        verify(cupy, *make(rng, dtype, batch, seq, capacity, heads, kv_heads, head_dim), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, kinds", GPU_KINDS, ids=str)
@pytest.mark.parametrize("kernel", ["chosen", "prefill", "simple"])
def test_everything_at_once(cupy, force, kernel, dtype, kinds):
    """Sequences of different lengths in pages, of values or codes, with sinks and all kinds of masks."""
    force(kernel)
    rng = np.random.default_rng(25)
    for most, page_size in ((3, 1), (4, 16), (40, 4), (150, 16), (300, 64)):
        heads, kv_heads = (6, 2) if most % 4 else (4, 4)
        shape = {"heads": heads, "kv_heads": kv_heads, "most": most, "page_size": page_size}
        (q, k, v), options = all_at_once(rng, dtype, kinds, **shape)
        options["window"] = None if rng.integers(2) else int(rng.integers(1, 80))
        options["softcap"] = None if rng.integers(2) else float(rng.uniform(0.5, 30))
        options["causal"] = bool(rng.integers(4))
        verify(cupy, q, k, v, meets_transform=takes_transformed(kernel, q), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, kinds", GPU_KINDS, ids=str)
@pytest.mark.parametrize("kernel", ["prefill", "simple"])
def test_codes_give_the_bits_of_the_decoded_cache(cupy, force, kernel, dtype, kinds):
    force(kernel)
    q, k, v = make(np.random.default_rng(26), dtype, 2, 70, 300, 4, 2, 64)
    codes = [as_codes(array, kind) for array, kind in zip((k, v), kinds, strict=True)]
    options = {"kv_lengths": lengths_of(300, 111), "window": 150}
    expected = on_gpu(cupy, q, *(decoded(array, dtype) for array in codes), **options)
    assert on_gpu(cupy, q, *codes, **options).tobytes() == expected.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [3, 8])
def test_codes_at_odd_addresses(cupy, offset):
    rng = np.random.default_rng(27)
    for kinds in (("q4", "q8"), ("fp8", "e4m3")):
        (q, k, v), options = all_at_once(rng, DTYPES[0], kinds, most=30)
        verify(cupy, q, k, v, offset=offset, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["chosen", "prefill", "simple"])
def test_places_of_keys_and_queries_change_no_bit(cupy, force, kernel, dtype):
    """Contiguous or in pages of any size; rows of one length or starts that say the same."""
    force(kernel)
    rng = np.random.default_rng(28)
    for seq in (1, 5, 40, 130):
        q, k, v = make(rng, dtype, 2, seq, 330, 4, 2, 64)
        options = {"kv_lengths": lengths_of(330, 141), "sinks": rng.standard_normal(4).astype(np.float32)}
        expected = on_gpu(cupy, q, k, v, **options)
        smallest = 8 if kernel == "chosen" and seq > module._DECODE_QUERIES else 1  # for less another kernel is chosen
        for page_size in (smallest, 16, 256):
            pages_k, pages_v, table = in_pages(rng, page_size, k, v)
            result = on_gpu(cupy, q, pages_k, pages_v, block_table=table, **options)
            assert result.tobytes() == expected.tobytes(), (seq, page_size)
        tokens, starts = q.reshape(2 * seq, 4, 64), lengths_of(0, seq, 2 * seq)
        if seq == 1 or 2 * seq > 32:  # where both calls take the same kernel
            assert on_gpu(cupy, tokens, k, v, query_starts=starts, **options).tobytes() == expected.tobytes(), seq


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["chosen", "prefill", "simple"])
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("q8", "q4")], ids="-".join)
def test_bad_tables_on_the_gpu(cupy, force, monkeypatch, kernel, kinds):
    """Entries that name no page read page 0, starts are clamped; CUPYQ_CHECK=1 refuses both."""
    force(kernel)
    for most in (3, 60):
        (q, k, v), options = all_at_once(np.random.default_rng(29), DTYPES[0], kinds, most=most, page_size=16)
        table = options["block_table"]
        table[0, 0], table[3, 0] = -1, 2**31 - 1
        k, v = (
            as_codes(np.nan_to_num(decoded(a, np.dtype(np.float32)).astype(np.float16)), a.kind)
            if kinds[0] != "dense"
            else np.nan_to_num(a)
            for a in (k, v)
        )
        verify(cupy, q, k, v, meets_transform=takes_transformed(kernel, q), **options)
        for starts in (options["query_starts"] + 5, options["query_starts"][::-1].copy(), lengths_of(-9, -5, 2**30, 3, 4)):
            on_gpu(cupy, q, k, v, **options | {"query_starts": starts})
    monkeypatch.setattr(module, "is_checking", lambda: True)
    for case in TABLES:
        q, k, options, message = bad_table(cupy, case)
        with pytest.raises(ValueError, match=message):
            attention(q, k, k, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_sequences(cupy, dtype):
    """More sequences than a warp has lanes, some without queries or keys."""
    rng = np.random.default_rng(30)
    counts = rng.integers(0, 40, 100) * rng.integers(0, 2, 100)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    k, v = make(rng, dtype, 100, 1, 60, 2, 2, 64)[1:]
    q = rng.standard_normal((starts[-1], 2, 64)).astype(dtype)
    lengths = rng.integers(0, 61, 100).astype(np.int32)
    verify(cupy, q, k, v, query_starts=starts, kv_lengths=lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_cache(cupy, dtype):
    arrays = make(np.random.default_rng(8), dtype, 1, 1, 100_010, 3, 1, 64, sharpness=3.0)
    verify(cupy, *arrays, kv_lengths=lengths_of(100_003))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]], ids=str)
def test_many_rows(cupy, dtype):
    """More batch rows than grid y or z would take, the last ones verified; then a long prompt."""
    q, k, v = make(np.random.default_rng(9), dtype, 66_000, 1, 2, 1, 1, 8)
    result = on_gpu(cupy, q, k, v)
    assert not np.isnan(result.astype(np.float32)).any()
    last = [array[-1000:] for array in (q, k, v)]
    assert_close(result[-1000:], exact_of(*last), same_dtype(*last))
    verify(cupy, *make(np.random.default_rng(10), dtype, 1, 2500, 2600, 2, 1, 64), kv_lengths=lengths_of(2590))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq", [1, 30])
def test_arrays_at_odd_addresses(cupy, dtype, seq):
    arrays = make(np.random.default_rng(11), dtype, 2, seq, 100, 4, 2, 72)
    verify(cupy, *arrays, kv_lengths=lengths_of(99, 50), offset=3)


@pytest.mark.gpu
def test_lengths_outside_the_cache_are_clamped(cupy):
    arrays = make(np.random.default_rng(12), np.float16, 3, 2, 40, 4, 2, 64)
    result = verify(cupy, *arrays, kv_lengths=lengths_of(41, -7, 2**31 - 1))
    assert not result[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq", [1, 4, 100])
def test_same_bits_again_with_workspace_and_in_place(cupy, dtype, seq):
    q, k, v = map(cupy.asarray, make(np.random.default_rng(13), dtype, 2, seq, 1500, 8, 2, 64, batch_capacity=3))
    first = attention(q, k, v)
    assert first.dtype == dtype and first.shape == q.shape
    workspace = cupy.zeros(attention_workspace_size(64), np.float32)
    for _ in range(3):
        assert attention(q, k, v, workspace=workspace).get().tobytes() == first.get().tobytes()
    assert attention(q, k, v, out=q, workspace=workspace) is q
    assert q.get().tobytes() == first.get().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_workspace_serves_calls_of_many_sizes(cupy, dtype):
    """In turn, with the bits of calls without one."""
    workspace = cupy.zeros(attention_workspace_size(128), np.float32)
    rng = np.random.default_rng(17)
    for heads, kv_heads, seq in ((8, 2, 1), (8, 8, 1), (20, 1, 3)):
        q, k, v = map(cupy.asarray, make(rng, dtype, 2, seq, 5000, heads, kv_heads, 128))
        for longest in (1, 63, 65, 300, 1000, 4097):
            lengths = cupy.asarray(lengths_of(longest, longest // 3 + 1))
            results = {attention(q, k, v, kv_lengths=lengths, workspace=given).get().tobytes() for given in (workspace, None)}
            assert len(results) == 1


@pytest.mark.gpu
def test_a_crowd_of_rows(cupy):
    """So many batch rows that every multiprocessor has two blocks of four warps, with keys for several tiles a warp."""
    rows = 2 * _device.current().sm_count
    arrays = make(np.random.default_rng(18), np.float16, rows, 1, 200, 4, 1, 64)
    lengths = np.random.default_rng(19).integers(1, 201, rows).astype(np.int32)
    verify(cupy, *arrays, kv_lengths=lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("seq", [1, 40])
def test_a_graph_replays_with_new_lengths(cupy, seq):
    """Nothing waits for the GPU or allocates when out and workspace are given: the call can be captured."""
    arrays = make(np.random.default_rng(15), np.float16, 1, seq, 3000, 8, 2, 64)
    q, k, v = map(cupy.asarray, arrays)
    out, lengths = cupy.empty_like(q), cupy.asarray(lengths_of(3000))
    workspace = cupy.zeros(attention_workspace_size(64), np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        attention(q, k, v, kv_lengths=lengths, out=out, workspace=workspace)
        stream.begin_capture()
        attention(q, k, v, kv_lengths=lengths, out=out, workspace=workspace)
        graph = stream.end_capture()
        for length in (3000, 77, 1025):
            lengths.set(lengths_of(length), stream=stream)
            graph.launch(stream)
            stream.synchronize()
            options = {"kv_lengths": lengths_of(length)}
            assert_close(out.get(stream=stream), exact_of(*arrays, **options), same_dtype(*arrays, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("case", _bad_calls(np))
def test_bad_arguments_on_the_gpu(cupy, case):
    error, message, arrays, options = _bad_calls(cupy)[case]
    with pytest.raises(error, match=message):
        attention(*arrays, **options)


@pytest.mark.gpu
def test_empty_calls(cupy):
    q, k, v = map(cupy.asarray, make(np.random.default_rng(16), np.float16, 1, 4, 6, 2, 2, 8))
    nothing = cupy.empty((1, 0, 2, 8), np.float16)
    assert attention(nothing, k, v).shape == (1, 0, 2, 8)
    assert not attention(q, nothing, nothing).get().any()
