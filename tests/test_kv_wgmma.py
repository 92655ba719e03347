"""Attention of many queries over caches of codes on Hopper: memory, choices, and the kernel against float64 for every kind."""

import importlib
import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import needs_cupy
from kernel_checks import banded, compile_on_hopper, is_hopper
from test_attention_decode import cache_of, int32, paged, poison, problem_of, unused_slots, uploaded, verify_result

from cupyq import _kernels
from cupyq._device import shared_bytes_limit
from cupyq.ops import attention_wgmma as wgmma
from cupyq.ops.attention import attention
from cupyq.ops.kv_codec import CacheCodes

module = importlib.import_module("cupyq.ops.attention")  # the op of the same name hides the module
float16, bfloat16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
KINDS = [("fp8", "fp8"), ("e4m3", "e4m3"), ("q4", "q4"), ("q8", "q8"), ("q8", "q4")]
HEAD_DIMS = (64, 128, 256)

# dtype, head_dim, kinds of keys and values
FORMS = [
    *((float16, 128, kinds) for kinds in KINDS),
    *((float16, head_dim, kinds) for head_dim in (64, 256) for kinds in KINDS[1:5:3]),
    (float16, 64, ("q4", "q8")),
    (bfloat16, 128, ("q8", "q4")),
    (bfloat16, 128, ("e4m3", "fp8")),
    (bfloat16, 64, ("fp8", "q8")),
]


# --- sizes and choices ------------------------------------------------------------------------------------------------


def test_codes_fit_shared_memory():
    for head_dim, kinds in itertools.product(HEAD_DIMS, itertools.product(("fp8", "e4m3", "q4", "q8"), repeat=2)):
        config = wgmma.pick_attention_wgmma_config(head_dim)
        rows = config.tile_rows * (1 if head_dim == 256 else 2) + 2 * config.stages * config.tile_keys
        codes = sum({"fp8": 1, "e4m3": 1, "q4": 0.5, "q8": 1}[kind] * head_dim for kind in kinds)
        scales = sum(head_dim / 16 for kind in kinds if kind in ("q4", "q8"))
        barriers = 8 * (2 + 4 * config.stages)
        expected = 2 * head_dim * rows + config.tile_keys * (codes + scales) + barriers
        assert config.shared_bytes(head_dim, *kinds) == expected <= shared_bytes_limit("sm_90a")


def test_which_codes_take_the_kernel():
    assert [d for d in range(8, 264, 8) if wgmma.supports(d, has_codes=True)] == list(HEAD_DIMS)
    assert wgmma.supports(128, 1, has_codes=True)  # no tensor map: pages may be of any size
    assert module.pick_kernel(float16, 17, 128, True, "sm_90a", has_codes=True, page_size=2) == "wgmma"
    assert module.pick_kernel(float16, 17, 96, True, "sm_90a", has_codes=True) == "prefill"
    assert module.pick_kernel(float16, 17, 128, True, "sm_80", has_codes=True) == "prefill"


@pytest.mark.parametrize("kinds", [("q8", "q8"), ("e4m3", "q4")], ids=str)
def test_products_are_not_serialised_and_nothing_spills(kinds):
    needs_cupy()
    for head_dim, has_softcap in ((64, True), (128, False), (128, True)):
        config = wgmma.pick_attention_wgmma_config(head_dim)
        wanted = wgmma.attention_wgmma_instance(float16, head_dim, config, has_softcap, *kinds)
        log = _kernels.compile_instance(wanted, "sm_90a", ("--ptxas-options=-v",))[2]
        assert "Used 168 registers" in log and "serialized" not in log, log
        assert "0 bytes spill stores" in log, log


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances():
    compile_on_hopper(
        wgmma.attention_wgmma_instance(dtype, head_dim, wgmma.pick_attention_wgmma_config(head_dim), has_softcap, *kinds)
        for dtype, head_dim, kinds in FORMS
        for has_softcap in (False, True)
    )


def make(
    seed, dtype, head_dim, kinds, queries, lengths, *, heads=4, kv_heads=2, page=None, is_ragged=False, spare=9, **options
):
    """(q, k, v), options: sequences of `queries` queries and `lengths` keys, in caches with room for `spare` more."""
    rng = np.random.default_rng(seed)
    batch, capacity = len(queries), max(lengths) + spare
    if page:
        capacity = -(-capacity // page) * page
    rows = sum(queries)
    q = (2 * rng.standard_normal((rows, heads, head_dim))).astype(dtype)
    k, v = (cache_of(rng.standard_normal((batch, capacity, kv_heads, head_dim)).astype(dtype), kind) for kind in kinds)
    if options.pop("has_sinks", False):
        options["sinks"] = (3 * rng.standard_normal(heads)).astype(np.float32)
    if spare:
        options["kv_lengths"] = int32(*lengths)
    if is_ragged:
        options["query_starts"] = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    else:
        q = q.reshape(batch, queries[0], heads, head_dim)
    if page:
        state = rng.bit_generator.state
        k, table = paged(rng, k, page)
        rng.bit_generator.state = state  # the same places for values
        v, options["block_table"] = paged(rng, v, page)
        assert np.array_equal(table, options["block_table"])
    return (q, k, v), options


def run(cupy, arrays, options):
    """attention() between bands, twice, the second in place: the result on the host. Unseen slots hold NaN meanwhile."""
    q, k, v = arrays
    slots = unused_slots(q, k, **{name: value for name, value in options.items() if name not in ("causal", "softcap", "sinks")})
    for cache in (k, v):
        poison(cache, slots)
    on_gpu = [uploaded(cupy, cache) for cache in (k, v)]
    for cache in (k, v):  # decoding all of it on the host shall not warn
        cache.codes[slots] = 0
        if cache.scales is not None:
            cache.scales[slots] = 0
    given = {name: cupy.asarray(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    if is_hopper():
        rows = len(q) if "query_starts" in options else q.shape[1]
        page_size = k.shape[1] if "block_table" in options else None
        assert module.pick_kernel(q.dtype, rows, q.shape[-1], True, "sm_90a", True, page_size) == "wgmma"
    out, check = banded(cupy, np.full(q.shape, np.nan, q.dtype))
    queries = cupy.asarray(q)
    attention(queries, *on_gpu, out=out, **given)
    check()
    first = out.get()
    attention(queries, *on_gpu, out=queries, **given)
    assert first.tobytes() == queries.get().tobytes(), "out may be q, and bits are the same"
    return first


def verify(cupy, arrays, options):
    result = run(cupy, arrays, options)
    verify_result(result, *arrays, options)
    return result


SEAMS = [
    ([17], [17], {}),
    ([64], [64], {"spare": 0}),
    ([127], [127], {}),
    ([129], [257], {}),
    ([40, 40, 40], [255, 256, 257], {}),
    ([20], [4097], {"heads": 2, "kv_heads": 1}),
    ([300, 300], [300, 1000], {}),
    ([128], [2000], {"spare": 0, "heads": 6, "kv_heads": 1}),
    ([150, 150, 150], [513, 150, 0], {"causal": False}),
    ([150, 150], [120, 20], {}),
    ([200, 200], [200, 777], {"window": 1}),
    ([200], [900], {"window": 128, "has_sinks": True}),
    ([200], [900], {"window": 300, "causal": False}),
    ([140], [400], {"softcap": 5.0, "has_sinks": True}),
    ([130, 130], [130, 900], {"page": 256}),
    ([260], [900], {"page": 16, "window": 70, "has_sinks": True}),
    ([90] * 3, [100] * 3, {"page": 2, "softcap": 20.0}),
    ([17, 129, 1, 0, 64, 300], [17, 400, 5, 40, 64, 1100], {"page": 64, "is_ragged": True}),
    ([0, 40, 0], [0, 40, 9], {"is_ragged": True, "has_sinks": True}),
    ([1, 3, 130] * 14, [5, 3, 131] * 14, {"page": 128, "is_ragged": True, "heads": 2, "kv_heads": 1}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("form", range(len(FORMS)), ids=lambda i: "-".join(map(str, FORMS[i])))
def test_codes_against_reference(cupy, instances, form):
    # The sizes meet every seam in float16 with head_dim 128 and q4 keys, or q8 keys and q4 values; every third one elsewhere.
    dtype, head_dim, kinds = FORMS[form]
    step = 1 if (dtype, head_dim) == (float16, 128) and kinds in (("q4", "q4"), ("q8", "q4")) else 3
    for i, (queries, lengths, options) in enumerate(SEAMS[form % step :: step]):
        verify(cupy, *make(i, dtype, head_dim, kinds, queries, lengths, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("q4", "q4"), ("e4m3", "e4m3")], ids=str)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_items_without_keys_leave_the_others_alone(cupy, instances, kinds, head_dim):
    """More items than multiprocessors: what one item leaves in shared memory meets the next one."""
    kinds = kinds if head_dim == 128 or kinds[0] == "e4m3" else ("q8", "q4")
    verify(cupy, *make(1, float16, head_dim, kinds, [150] * 40, [120, 0, 20, 400, 0] * 8, heads=8, kv_heads=8))


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_pages_do_not_change_a_bit(cupy, instances, kinds):
    (q, k, v), options = make(5, float16, 128, kinds, [200, 200], [1500, 333], spare=36)
    expected = run(cupy, (q, k, v), options)
    for page, seed in ((256, 1), (256, 2), (16, 3), (1, 4)):
        pages_k, table = paged(np.random.default_rng(seed), k, page)
        pages_v, same = paged(np.random.default_rng(seed), v, page)
        assert np.array_equal(table, same)
        result = run(cupy, (q, pages_k, pages_v), options | {"block_table": table})
        assert result.tobytes() == expected.tobytes(), (page, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_tables_and_lengths_outside_of_the_arrays_are_clamped(cupy, instances, kinds):
    """Nothing to compare, as they are wrong: but nothing outside of the arrays is touched, and finite caches stay finite."""
    (q, k, v), _ = make(6, float16, 128, kinds, [100, 60, 40], [256, 256, 256], page=64, is_ragged=True, spare=0)
    options = {
        "block_table": int32([-1, 2**31 - 1, -(2**31), 14], [0, 1, 2, 3], [4, 5, 6, 10**6]),
        "kv_lengths": int32(2**31 - 1, -5, 256),
        "query_starts": int32(-7, 100, 90, 10**6),
    }
    out, check = banded(cupy, np.zeros(q.shape, float16))
    given = {name: cupy.asarray(value.reshape(3, 4) if name == "block_table" else value) for name, value in options.items()}
    attention(cupy.asarray(q), uploaded(cupy, k), uploaded(cupy, v), out=out, **given)
    check()
    assert np.isfinite(out.get()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [("q8", "q4"), ("e4m3", "e4m3")], ids=str)
@pytest.mark.parametrize("change", ["window", "shift", "sink", "group", "scale", "value"])
def test_the_bounds_bite(cupy, instances, kinds, change):
    arrays, options = make(7, float16, 128, kinds, [200], [600], window=100, has_sinks=True)
    result = verify(cupy, arrays, options)
    q, k, v = arrays
    if change == "window":
        options["window"] = 101
    elif change == "shift":
        k = CacheCodes(k.kind, np.roll(k.codes, 1, axis=1), np.roll(k.scales, 1, axis=1))
    elif change == "sink":
        options["sinks"] += np.float32(0.5)
    elif change == "group":
        k = CacheCodes(k.kind, k.codes[:, :, ::-1].copy(), k.scales[:, :, ::-1].copy())
    elif change == "scale":
        q = (q * np.float16(1.02)).astype(float16)
    else:
        v.scales[0, 450] *= np.float16(1.5)
    with pytest.raises(AssertionError):
        verify_result(result, q, k, v, options)


@pytest.mark.gpu
def test_a_cache_of_values_beside_one_of_codes(cupy):
    """Another kernel takes it."""
    (q, k, v), options = make(8, float16, 128, ("q4", "q4"), [70], [300])
    values = np.random.default_rng(9).standard_normal(v.shape).astype(float16)
    problem = problem_of(q, k, **options)
    assert problem.head_dim == 128
    given = {name: cupy.asarray(value) for name, value in options.items()}
    result = attention(cupy.asarray(q), uploaded(cupy, k), cupy.asarray(values), **given)
    assert np.isfinite(result.get()).all()
