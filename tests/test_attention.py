"""Attention: reference against plain loops, kernels against the reference, and proof that the bounds bite."""

import importlib
import itertools
import math
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound

from cupyq import _device, _kernels
from cupyq.ops.attention import attention, attention_reference, attention_workspace_size, kv_length_bucket

module = importlib.import_module("cupyq.ops.attention")  # the op of the same name hides the module
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), bfloat16, np.dtype(np.float32)]
ULP = {DTYPES[0]: 2.0**-11, DTYPES[1]: 2.0**-8, DTYPES[2]: 2.0**-24}


# --- oracles --------------------------------------------------------------------------------------------------------


def sees(i, j, seq, length, causal, window):
    """The mask, one pair at a time."""
    position = length - seq + i
    return j < length and (j <= position or not causal) and (window is None or j > position - window)


def plain_loops(q, k, v, scale=None, causal=True, window=None, softcap=None, kv_lengths=None):
    batch, seq, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros(q.shape)
    for b, i, h in itertools.product(range(batch), range(seq), range(heads)):
        g = h // (heads // k.shape[2])
        length = k.shape[1] if kv_lengths is None else int(kv_lengths[b])
        scores = {}
        for j in range(k.shape[1]):
            if sees(i, j, seq, length, causal, window):
                s = scale * math.fsum(float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, g], strict=True))
                scores[j] = s if softcap is None else softcap * math.tanh(s / softcap)
        if not scores:
            continue
        top = max(scores.values())
        weights = {j: math.exp(s - top) for j, s in scores.items()}
        total = math.fsum(weights.values())
        for c in range(head_dim):
            out[b, i, h, c] = math.fsum(w * float(v[b, j, g, c]) for j, w in weights.items()) / total
    return out


def same_dtype(q, k, v, scale=None, causal=True, window=None, softcap=None, kv_lengths=None):
    """What plain low-precision code gets: float32 products and softmax, weights and result rounded to the dtype."""
    batch, seq, heads, head_dim = q.shape
    group = heads // k.shape[2]
    scale = np.float32(head_dim**-0.5 if scale is None else scale)
    out = np.zeros(q.shape, q.dtype)
    for b in range(batch):
        length = k.shape[1] if kv_lengths is None else int(np.clip(kv_lengths[b], 0, k.shape[1]))
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
            keys, values = (a[b, used, h // group].astype(np.float32) for a in (k, v))
            scores = (q[b, :, h].astype(np.float32) @ keys.T) * scale
            if softcap is not None:
                scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
            scores = np.where(mask, scores, np.float32(-np.inf))
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - np.where(np.isinf(top), np.float32(0), top))
            total = weights.sum(axis=1, keepdims=True)
            sums = weights.astype(q.dtype).astype(np.float32) @ values
            out[b, :, h] = np.where(total == 0, np.float32(0), sums / np.where(total == 0, np.float32(1), total))
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


def poison(q, k, v, causal=True, window=None, kv_lengths=None, **_):
    """NaN in every cache slot that no query sees."""
    batch, seq = q.shape[:2]
    for b in range(k.shape[0]):
        length = 0 if b >= batch else k.shape[1] if kv_lengths is None else int(np.clip(kv_lengths[b], 0, k.shape[1]))
        first = 0 if window is None else max(0, length - seq - window + 1)
        for array in (k, v):
            array[b, :first] = np.nan
            array[b, length:] = np.nan


def exact_of(q, k, v, scale=None, causal=True, window=None, softcap=None, kv_lengths=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = None if kv_lengths is None else np.clip(kv_lengths, 0, k.shape[1])
    return attention_reference(q, k, v, scale, causal, window, softcap, lengths)


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
    result = attention(q, k, v, kv_lengths=lengths, max_kv_length=7)
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


# --- arguments ------------------------------------------------------------------------------------------------------


def _bad_calls(xp):
    def zeros(*shape, dtype=np.float16):
        return xp.zeros(shape, dtype)

    q, k, lengths = zeros(2, 3, 4, 16), zeros(2, 8, 2, 16), zeros(2, dtype=np.int32)
    floats = zeros(2, 2, dtype=np.float32)
    odd_heads, narrow, wide, same = zeros(2, 8, 3, 16), zeros(1, 1, 1, 12), zeros(1, 1, 1, 264), zeros(2, 3, 4, 16)
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
        "max_kv_length": (ValueError, "max_kv_length must be", (q, k, k), {"max_kv_length": 2.5}),
        "kv_lengths dtype": (TypeError, "kv_lengths must have dtype int32", (q, k, k), {"kv_lengths": q[:, 0, 0, 0]}),
        "kv_lengths shape": (ValueError, "kv_lengths must have shape", (q, k, k), {"kv_lengths": lengths[:1]}),
        "out dtype": (TypeError, "out must have dtype", (q, k, k), {"out": zeros(2, 3, 4, 16, dtype=np.float32)}),
        "out shape": (ValueError, "out must have shape", (q, k, k), {"out": k}),
        "out is k": (ValueError, "out overlaps k", (q, same, zeros(2, 3, 4, 16)), {"out": same}),
        "out is v": (ValueError, "out overlaps v", (q, zeros(2, 3, 4, 16), same), {"out": same}),
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


# --- choices --------------------------------------------------------------------------------------------------------


def test_pick_kernel():
    float16, float32 = DTYPES[0], DTYPES[2]
    assert module.pick_kernel(float16, 1, True, "sm_90a") == "decode"
    assert module.pick_kernel(float16, 16, True, "sm_90a") == "decode"
    assert module.pick_kernel(float16, 17, True, "sm_90a") == "prefill"
    assert module.pick_kernel(float16, 17, True, "sm_75") == "prefill"
    assert module.pick_kernel(bfloat16, 17, True, "sm_80") == "prefill"
    assert module.pick_kernel(bfloat16, 1, True, "sm_75") == "simple"
    assert module.pick_kernel(float32, 1, True, "sm_90a") == "simple"
    assert module.pick_kernel(float16, 1, False, "sm_90a") == "simple"


@pytest.mark.parametrize("arch", [*_device.TARGET_ARCHS, "sm_999"])
def test_tiles_fit_every_gpu(arch):
    for head_dim in range(8, 257, 8):
        prefill = module.pick_prefill_config(head_dim, arch)
        assert prefill.shared_bytes(head_dim) <= module.shared_bytes_limit(arch)
        assert prefill.tile_keys % 16 == 0 and 16 * prefill.warps <= 4 * prefill.tile_keys
        for is_crowded in (False, True):
            decode = module.pick_decode_config(head_dim, arch, is_crowded)
            assert decode.shared_bytes(head_dim) <= module.shared_bytes_limit(arch)
            assert decode.stages >= 2


@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90a", "sm_100a"])
def test_wide_heads_do_not_spill(arch):
    """The widest accumulators, with the tiles each GPU gets; the common sizes are among INSTANCES."""
    for wanted in (
        module._prefill_instance(DTYPES[0], 256, module.pick_prefill_config(256, arch)),
        module._decode_instance(DTYPES[0], 256, module.pick_decode_config(256, arch)),
        module._simple_instance(DTYPES[2], 256),
    ):
        _, _, log = _kernels.compile_instance(wanted, arch, ("--ptxas-options=-v",))
        assert re.findall(r"(\d+) bytes spill stores", log) == ["0"], f"{wanted} on {arch}: {log}"


def test_tiles_of_an_h100():
    assert module.pick_prefill_config(128, "sm_90a") == module.PrefillConfig(warps=8, tile_keys=64)
    assert module.pick_decode_config(128, "sm_90a") == module.DecodeConfig(warps=8, stages=3)
    # In a crowd two decode blocks live on one multiprocessor: 228 KiB, of which 1 KiB a block is the system's.
    crowded = module.pick_decode_config(128, "sm_90a", is_crowded=True)
    assert crowded.warps == 4 and 2 * (crowded.shared_bytes(128) + 1024) <= 228 * 1024


def test_splits_fill_the_gpu_and_no_more():
    assert module.pick_splits(8, 4096, 4, 132) == 16
    assert module.pick_splits(8, 256, 4, 132) == 4
    assert module.pick_splits(8, 0, 4, 132) == 1
    assert module.pick_splits(1, 256, 16, 132) == 4
    assert module.pick_splits(1, 4096, 16, 132) == 24  # more would leave more to add than they save
    assert module.pick_splits(1000, 32768, 4, 132) == module.pick_splits(5000, 32768, 4, 16000) == 1
    for blocks, keys, sms in itertools.product([1, 3, 8, 100, 131, 265], [1, 64, 65, 5000, 100_003], [1, 20, 132]):
        for rows in (1, 4, 16):
            splits = module.pick_splits(blocks, keys, rows, sms)
            assert splits == 1 or (blocks * splits <= sms and blocks <= module._COUNTERS)
            assert (splits - 1) * 64 < max(keys, 1)
            needed = module._COUNTERS + rows * blocks * splits * (128 + 2)
            assert splits == 1 or needed <= attention_workspace_size(128, sm_count=sms)


def shares_in_the_kernel(tiles, rows, splits):
    """share_count of cu/attention_decode.cu, in its float32."""
    useful = int(np.sqrt(np.float32(32) * np.float32(tiles) / np.float32(rows))) + 1
    return max(1, min(splits, useful, (tiles + 3) // 4))


def test_any_bound_that_holds_gives_the_same_shares():
    """So a graph captured for a bucket, an exact bound and none at all compute the same bits."""
    for keys, rows, blocks in itertools.product([0, 1, 64, 65, 300, 1000, 4096, 31_337], [1, 3, 4, 8, 16], [1, 8, 100]):
        of_bounds = set()
        for bound in (keys, keys + 1, kv_length_bucket(keys, 40_000), 40_000):
            splits = module.pick_splits(blocks, bound, rows, 132)
            of_bounds |= {shares_in_the_kernel(-(-keys // 16), r, splits) for r in [rows]}
        assert len(of_bounds) == 1, (keys, rows, blocks, of_bounds)


def test_buckets():
    assert [kv_length_bucket(n, 10_000) for n in (0, 1, 256, 257, 512, 513, 8193)] == [256, 256, 256, 512, 512, 1024, 10_000]
    assert kv_length_bucket(5, 100) == kv_length_bucket(500, 100) == 100 and kv_length_bucket(5, 0) == 0
    for length in range(1, 3000):
        bucket = kv_length_bucket(length, 3000)
        assert bucket >= length and kv_length_bucket(bucket, 3000) == bucket


# --- kernels --------------------------------------------------------------------------------------------------------


def on_gpu(cupy, q, k, v, *, offset=64, **options):
    """attention() on the GPU with every array in the middle of a buffer of NaN, `offset` values from its edges.

    NaN read from the edges would show in the result; NaN overwritten by the kernel would be missing afterwards.
    """
    if options.get("kv_lengths") is not None:
        options["kv_lengths"] = cupy.asarray(options["kv_lengths"])

    def bedded(array):
        buffer = np.full(array.size + 2 * offset, np.nan).astype(array.dtype)
        buffer[offset : offset + array.size] = array.ravel()
        buffer = cupy.asarray(buffer)
        return buffer, buffer[offset : offset + array.size].reshape(array.shape)

    sentinel = np.full(q.shape, np.nan).astype(q.dtype)
    buffer, out = bedded(sentinel)
    assert attention(*(bedded(array)[1] for array in (q, k, v)), out=out, **options) is out
    host = buffer.get()
    for edge in (host[:offset], host[offset + q.size :]):
        assert edge.tobytes() == sentinel.ravel()[:1].tobytes() * offset, "written outside of out"
    return host[offset : offset + q.size].reshape(q.shape)


def verify(cupy, q, k, v, **options):
    """Kernel against reference, with NaN where nobody may look."""
    poison(q, k, v, **options)
    host = {name: value for name, value in options.items() if name not in ("max_kv_length", "offset", "workspace")}
    result = on_gpu(cupy, q, k, v, **options)
    assert_close(result, exact_of(q, k, v, **host), same_dtype(q, k, v, **host))
    return result


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
            "max_kv_length": None if rng.integers(2) else int(rng.integers(0, capacity + 1)),
        }
        sharpness = rng.choice([0.1, 2.0, 6.0])
        arrays = make(rng, dtype, batch, seq, capacity, kv_heads * group, kv_heads, 64, sharpness=sharpness)
        verify(cupy, *arrays, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_kv_length", [None, 10])
def test_a_long_cache(cupy, dtype, max_kv_length):
    arrays = make(np.random.default_rng(8), dtype, 1, 1, 100_010, 3, 1, 64, sharpness=3.0)
    verify(cupy, *arrays, kv_lengths=lengths_of(100_003), max_kv_length=max_kv_length)


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
    workspace[module._COUNTERS :] = math.nan
    for _ in range(3):
        assert attention(q, k, v, workspace=workspace).get().tobytes() == first.get().tobytes()
        assert not workspace[: module._COUNTERS].get().view(np.uint32).any(), "a counter is left behind"
    assert attention(q, k, v, out=q, workspace=workspace) is q
    assert q.get().tobytes() == first.get().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_bound_that_holds_gives_the_same_bits(cupy, dtype):
    """And one workspace serves calls of many sizes in turn."""
    workspace = cupy.zeros(attention_workspace_size(128), np.float32)
    rng = np.random.default_rng(17)
    for heads, kv_heads, seq in ((8, 2, 1), (8, 8, 1), (20, 1, 3)):
        q, k, v = map(cupy.asarray, make(rng, dtype, 2, seq, 5000, heads, kv_heads, 128))
        for longest in (1, 63, 65, 300, 1000, 4097):
            lengths = cupy.asarray(lengths_of(longest, longest // 3 + 1))
            results = {
                attention(q, k, v, kv_lengths=lengths, max_kv_length=bound, workspace=given).get().tobytes()
                for bound, given in itertools.product((longest, kv_length_bucket(longest, 5000), None), (workspace, None))
            }
            assert len(results) == 1


@pytest.mark.gpu
def test_a_crowd_of_rows(cupy):
    """So many batch rows that every multiprocessor has two blocks of four warps, with keys for several tiles a warp."""
    rows = 2 * _device.current().sm_count
    arrays = make(np.random.default_rng(18), np.float16, rows, 1, 200, 4, 1, 64)
    lengths = np.random.default_rng(19).integers(1, 201, rows).astype(np.int32)
    verify(cupy, *arrays, kv_lengths=lengths)


@pytest.mark.gpu
def test_a_small_workspace_is_refused(cupy):
    q, k, v = map(cupy.asarray, make(np.random.default_rng(14), np.float16, 1, 1, 4096, 8, 2, 64))
    with pytest.raises(ValueError, match="workspace must have at least"):
        attention(q, k, v, workspace=cupy.zeros(100, np.float32))
    with pytest.raises(ValueError, match="workspace must begin at a multiple of 8 bytes"):
        attention(q, k, v, workspace=cupy.zeros(attention_workspace_size(64) + 1, np.float32)[1:])


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
