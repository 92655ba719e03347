"""Attention of many queries on Hopper: its tiles, tensor maps and order of work; the kernel against float64."""

import ctypes
import functools
import importlib
import types

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, needs_cupy
from kernel_checks import banded, compile_on_hopper, is_hopper, random

from cupyq import _kernels, _tensor_maps
from cupyq._device import shared_bytes_limit
from cupyq.errors import BackendError
from cupyq.ops import attention_wgmma as wgmma
from cupyq.ops.attention import attention
from cupyq.ops.attention_problem import AttentionProblem

module = importlib.import_module("cupyq.ops.attention")  # the op of the same name hides the module
float16, bfloat16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
ULP = {float16: 2.0**-11, bfloat16: 2.0**-8}
HEAD_DIMS = (64, 96, 128, 256)
Config = wgmma.AttentionWgmmaConfig


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_supported_sizes():
    assert [d for d in range(8, 264, 8) if wgmma.supports(d)] == list(HEAD_DIMS)
    assert wgmma.supports(128, 8) and wgmma.supports(128, 256) and not wgmma.supports(128, 4) and not wgmma.supports(80, 256)


def test_tiles_fit_shared_memory():
    for head_dim in HEAD_DIMS:
        config = wgmma.pick_attention_wgmma_config(head_dim)
        columns = -(-head_dim // 64) * 64
        rows = config.tile_rows * (1 if head_dim == 256 else 2) + 2 * config.stages * config.tile_keys
        assert config.shared_bytes(head_dim) == 1024 + 2 * columns * rows
        # 512: more than the barriers in static memory take.
        assert config.shared_bytes(head_dim) <= shared_bytes_limit("sm_90a") - 512
        assert config.tile_keys in (64, 128) and config.threads == 384


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_products_are_not_serialised(head_dim):
    """ptxas says so (C7510 and others) where it must wait for every single product, at half the speed."""
    needs_cupy()
    config = wgmma.pick_attention_wgmma_config(head_dim)
    for has_softcap in (False, True):
        wanted = wgmma.attention_wgmma_instance(float16, head_dim, config, has_softcap)
        log = _kernels.compile_instance(wanted, "sm_90a", ("--ptxas-options=-v",))[2]
        assert "Used 168 registers" in log and "serialized" not in log, log
        assert "0 bytes spill stores" in log, log


def test_turns_there_and_back_reach_each_item_once_and_share_the_work():
    """As find_item of cu/attention_wgmma.cu has it."""
    for items, grid in ((1, 1), (5, 5), (512, 132), (513, 132), (1000, 7)):
        blocks = [[] for _ in range(grid)]
        for b, mine in enumerate(blocks):
            turn = 0
            while (index := turn * grid + (grid - 1 - b if turn % 2 else b)) < items:
                mine.append(index)
                turn += 1
        assert sorted(sum(blocks, [])) == list(range(items))
    # A causal prompt of 2048 tokens and 32 heads: 16 tiles of queries, of which the last sees 16 tiles of keys.
    work = [sum(16 - index // 32 for index in range(512) if _block_of(index, 132) == b) for b in range(132)]
    assert max(work) <= 1.05 * sum(work) / 132


def _block_of(index, grid):
    return grid - 1 - index % grid if index // grid % 2 else index % grid


# --- tensor maps ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(monkeypatch):
    """What the driver would be asked for, and the status that it answers."""
    asked = types.SimpleNamespace(calls=[], status=0)

    def encode(at, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
        assert at % 64 == 0
        asked.calls.append((kind, address, list(sizes), list(strides), list(box), list(steps), interleave, swizzle, fill))
        ctypes.memset(at, len(asked.calls), 128)
        return asked.status

    monkeypatch.setattr(_tensor_maps, "_encoder", lambda: encode)
    monkeypatch.setattr(_tensor_maps, "_address", lambda array: array.ctypes.data)
    _tensor_maps._tensor_map.cache_clear()
    yield asked
    _tensor_maps._tensor_map.cache_clear()


def test_tensor_maps_describe_an_array(encoder):
    a, b = np.zeros((5, 7, 3, 128), float16), np.zeros((5, 3, 64), bfloat16)
    maps = _tensor_maps.tensor_maps((a, a.shape, (1, 4, 1, 64)), (b, b.shape, (5, 1, 64)), (a, a.shape, (1, 4, 1, 64)))
    assert isinstance(maps, np.void)
    # The third is the first again: nothing is asked for twice.
    assert maps.tobytes() == bytes(48) + b"\1" * 128 + b"\2" * 128 + b"\1" * 128
    address, other = a.ctypes.data, b.ctypes.data
    assert encoder.calls == [
        (6, address, [128, 3, 7, 5], [256, 768, 5376], [64, 1, 4, 1], [1] * 4, 0, 3, 0),
        (9, other, [64, 3, 5], [128, 384], [64, 1, 5], [1] * 3, 0, 3, 0),
    ]


def test_nobody_is_asked_for_maps_of_what_is_only_traced(encoder):
    a = np.zeros((5, 7, 3, 128), float16)
    with _kernels.tracing():
        traced = _tensor_maps.tensor_maps((a, a.shape, (1, 4, 1, 64)))
    assert not encoder.calls
    assert traced.dtype == _tensor_maps.tensor_maps((a, a.shape, (1, 4, 1, 64))).dtype


def test_tensor_maps_that_the_driver_refuses(encoder, monkeypatch):
    encoder.status = 1
    monkeypatch.setattr(_tensor_maps._launch, "error_text", lambda status: f"error {status}")
    with pytest.raises(
        BackendError, match=r"no tensor map of an array \[4, 2, 64\] at 0x[0-9a-f]+ in boxes \[128, 1, 64\]: error 1"
    ):
        _tensor_maps.tensor_maps((np.zeros((4, 2, 64), float16), (4, 2, 64), (128, 1, 64)))


def test_launch_describes_its_arrays(encoder, monkeypatch):
    seen = []
    monkeypatch.setattr(wgmma, "launch_kernel", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(wgmma._device, "current", lambda: types.SimpleNamespace(sm_count=132))
    q, out = np.zeros((2, 300, 8, 128), float16), np.zeros((2, 300, 8, 128), float16)
    k, v = np.zeros((9, 16, 2, 128), float16), np.zeros((9, 16, 2, 128), float16)
    table = np.zeros((2, 4), np.int32)
    problem = AttentionProblem(2, 300, 8, 2, 128, 64, 16, 4, 9, True, 50, 0.1, None, block_table=table)
    wgmma.launch(problem, q, k, v, out)
    assert [call[2] for call in encoder.calls] == [[128, 8, 600], [128, 2, 16, 9], [128, 2, 16, 9]]
    assert [call[4] for call in encoder.calls] == [[64, 1, 128], [64, 1, 16, 1], [64, 1, 16, 1]]
    ((wanted, grid, block, arguments, shared_bytes),) = seen
    assert wanted.expression == "attention_wgmma<half, 128, 128, 2, 2, true, false>"
    assert grid == (2 * 3 * 8,) and block == (384,) and shared_bytes == 1024 + 256 * (256 + 512)
    assert arguments[1] is out and arguments[3] is table and arguments[2] is arguments[4] is arguments[5] is None
    assert [int(n) for n in arguments[6:17]] == [48, 2, 600, 8, 2, 64, 16, 4, 9, 1, 50]
    # Sequences of their own lengths: as many items as there may be.
    tokens = q.reshape(600, 8, 128)
    ragged = AttentionProblem(2, 600, 8, 2, 128, 64, 16, 4, 9, True, None, 0.1, None, query_starts=np.zeros(3, np.int32))
    wgmma.launch(ragged, tokens, k, v, tokens)
    assert int(seen[1][3][6]) == (600 // 128 + 2) * 8 and seen[1][1] == (48,)


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances():
    forms = [
        wgmma.attention_wgmma_instance(dtype, d, wgmma.pick_attention_wgmma_config(d), has_softcap)
        for dtype in (float16, bfloat16)
        for d in HEAD_DIMS
        for has_softcap in (False, True)
    ]
    compile_on_hopper([*wgmma.INSTANCES, *forms])


class Case:
    """Sequences of `queries` queries and `lengths` keys; slots of the caches that nobody sees hold NaN."""

    def __init__(
        self, dtype, head_dim, queries, lengths, *, heads=4, kv_heads=2, page=None, is_ragged=False, causal=True, window=None,
        softcap=None, has_sinks=False, has_lengths=True, sharpness=2.0, seed=0,
    ):  # fmt: skip
        self.queries, self.lengths, self.group, self.has_lengths = queries, lengths, heads // kv_heads, has_lengths
        self.starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        self.options = {"causal": causal, "window": window, "softcap": softcap}
        self.is_ragged, self.is_paged = is_ragged, page is not None
        rows, batch = int(self.starts[-1]), len(queries)
        self.q = random(seed, (rows, heads, head_dim), dtype, sharpness)
        self.k, self.v = (
            [random(seed + 100 * which + b, (n, kv_heads, head_dim), dtype) for b, n in enumerate(lengths)] for which in (1, 2)
        )
        self.sinks = random(seed + 3, (heads,), np.dtype(np.float32), 3.0) if has_sinks else None
        size = page or max(lengths) + (9 if has_lengths else 0)
        columns = -(-max(lengths) // size) if page else 1
        pages = batch * columns + 2
        places = np.random.default_rng(seed).permutation(pages) if page else np.arange(pages)
        self.table = np.full((batch, columns), 2**31 - 1, np.int32)
        self.caches = [np.full((pages, size, kv_heads, head_dim), np.nan, dtype) for _ in range(2)]
        for b, (n, length) in enumerate(zip(queries, lengths, strict=True)):
            first = 0 if window is None else max(0, length - n - window + 1)
            for c in range(-(-length // size)):
                self.table[b, c] = place = places[b * columns + c]
                for cache, tokens in zip(self.caches, (self.k, self.v), strict=True):
                    part = tokens[b][c * size : (c + 1) * size].copy()
                    part[: max(0, first - c * size)] = np.nan
                    cache[place, : len(part)] = part

    def result(self, calculate=np.float64):
        """By the definition; in float32, as plain code of the dtype would: weights are rounded, the result is."""
        out, rounded = np.zeros(self.q.shape), calculate is np.float32
        causal, window, softcap = self.options.values()
        for b, length in enumerate(self.lengths):
            rows = slice(self.starts[b], self.starts[b + 1])
            i, j = np.arange(self.queries[b])[:, None], np.arange(length)[None]
            position = length - self.queries[b] + i
            mask = (j <= position) | (not causal)
            if window is not None:
                mask &= j > position - window
            used = np.flatnonzero(mask.any(axis=0))
            for h in range(self.q.shape[1] if used.size else 0):
                keys, values = (a[b][used, h // self.group].astype(calculate) for a in (self.k, self.v))
                scores = self.q[rows, h].astype(calculate) @ keys.T * calculate(self.q.shape[2] ** -0.5)
                if softcap is not None:
                    scores = calculate(softcap) * np.tanh(scores / calculate(softcap))
                sink = calculate(-np.inf if self.sinks is None else self.sinks[h])
                scores = np.where(mask[:, used], scores, calculate(-np.inf))
                top = np.maximum(scores.max(axis=1, keepdims=True), sink)
                top = np.where(np.isinf(top), calculate(0), top)
                weights = np.exp(scores - top)
                total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
                if rounded:
                    weights = weights.astype(self.q.dtype).astype(calculate)
                out[rows, h] = weights @ values / np.where(total == 0, calculate(1), total)
        return out.astype(self.q.dtype) if rounded else out

    def check(self, result):
        exact, reference = self.result(), self.result(np.float32)
        assert result.dtype == self.q.dtype
        result, reference, ulp = result.reshape(exact.shape).astype(np.float64), reference.astype(np.float64), ULP[self.q.dtype]
        exact_bound(result, exact, reference, ulp=ulp)
        error = np.linalg.norm(result - exact)
        allowed = 2 * np.linalg.norm(reference - exact) + ulp * np.linalg.norm(exact)
        assert error <= allowed, f"error norm {error:.3g}, allowed {allowed:.3g}"

    def arguments(self, cupy):
        """(q, k, v) and the options of attention()."""
        shape = self.q.shape if self.is_ragged else (len(self.queries), self.queries[0], *self.q.shape[1:])
        options = dict(self.options)
        if self.has_lengths:
            options["kv_lengths"] = cupy.asarray(np.array(self.lengths, np.int32))
        if self.is_paged:
            options["block_table"] = cupy.asarray(self.table)
        if self.is_ragged:
            options["query_starts"] = cupy.asarray(self.starts)
        if self.sinks is not None:
            options["sinks"] = cupy.asarray(self.sinks)
        return [cupy.asarray(self.q.reshape(shape)), *map(cupy.asarray, self.caches)], options

    def run(self, cupy):
        """attention(), in place and not, between bands, twice: the results on the host."""
        arrays, options = self.arguments(cupy)
        if is_hopper():
            page_size = arrays[1].shape[1] if self.is_paged else None
            queries = self.starts[-1] if self.is_ragged else self.queries[0]
            assert module.pick_kernel(self.q.dtype, queries, self.q.shape[-1], True, "sm_90a", False, page_size) == "wgmma"
        out, check = banded(cupy, np.full(arrays[0].shape, np.nan, self.q.dtype))
        attention(*arrays, out=out, **options)
        check()
        first = out.get()
        attention(*arrays, out=arrays[0], **options)
        assert np.array_equal(first.view(np.uint16), arrays[0].get().view(np.uint16)), "out may be q, and bits are the same"
        return first


SEAMS = [
    ([17], [17], {}),
    ([64], [64], {"has_lengths": False}),
    ([127], [127], {}),
    ([129], [257], {}),
    ([300, 300], [300, 1000], {}),
    ([128], [3000], {"has_lengths": False, "heads": 6, "kv_heads": 1}),
    ([700], [700], {"heads": 1, "kv_heads": 1, "sharpness": 20.0}),
    ([150, 150, 150], [513, 150, 0], {"causal": False}),
    ([150, 150], [120, 20], {}),
    ([200, 200], [200, 777], {"window": 1}),
    ([200], [900], {"window": 128, "has_sinks": True}),
    ([200], [900], {"window": 300, "causal": False}),
    ([140], [400], {"softcap": 5.0, "has_sinks": True}),
    ([130, 130], [130, 900], {"page": 256}),
    ([260], [900], {"page": 16, "window": 70, "has_sinks": True}),
    ([90] * 3, [100] * 3, {"page": 8}),
    ([17, 129, 1, 0, 64, 300], [17, 400, 5, 40, 64, 1100], {"page": 64, "is_ragged": True}),
    ([0, 40, 0], [0, 40, 9], {"is_ragged": True, "has_sinks": True}),
    ([1, 3, 130] * 14, [5, 3, 131] * 14, {"page": 128, "is_ragged": True}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [float16, bfloat16], ids=str)
def test_kernel(cupy, instances, dtype, head_dim):
    # The sizes meet every seam in float16 with head_dim 128, every third one elsewhere.
    step = 1 if (dtype, head_dim) == (float16, 128) else 3
    for queries, lengths, options in SEAMS[HEAD_DIMS.index(head_dim) % step :: step]:
        case = Case(dtype, head_dim, queries, lengths, **options)
        case.check(case.run(cupy))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_items_without_keys_leave_the_others_alone(cupy, instances, head_dim):
    """With 256, results go out by way of the memory where the queries of the next item arrive."""
    case = Case(float16, head_dim, [150] * 40, [120, 0, 20, 400, 0] * 8, heads=8, kv_heads=8)
    case.check(case.run(cupy))


@pytest.mark.gpu
def test_other_configs(cupy, instances):
    case = Case(float16, 64, [300, 300], [300, 1000])
    if not is_hopper():
        return case.check(case.run(cupy))
    (q, k, v), options = case.arguments(cupy)
    pages, size = k.shape[:2]
    lengths = options["kv_lengths"]
    problem = AttentionProblem(2, 300, 4, 2, 64, size, size, 1, pages, True, None, 64**-0.5, None, kv_lengths=lengths)
    for config in (Config(64, 4, 2), Config(128, 2, 2, takes_turns=False), Config(128, 3, 2)):
        out = cupy.asarray(np.full(q.shape, np.nan, float16))
        wgmma.launch(problem, q, k, v, out, config=config)
        case.check(out.get())


@pytest.mark.gpu
def test_pages_do_not_change_a_bit(cupy, instances):
    results = []
    for page, seed in ((None, 5), (256, 5), (32, 5)):
        case = Case(float16, 128, [200, 200], [1500, 333], page=page, seed=seed)
        results.append(case.run(cupy).view(np.uint16))
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.gpu
def test_tables_and_lengths_outside_of_the_arrays_are_clamped(cupy, instances):
    """Nothing to compare, as they are wrong: but nothing outside of the arrays is touched, and finite caches stay finite."""
    case = Case(float16, 128, [100, 60, 40], [256, 256, 256], page=64, is_ragged=True)
    (q, k, v), options = case.arguments(cupy)
    finite = [cupy.asarray(np.nan_to_num(a)) for a in case.caches]
    options["block_table"] = cupy.asarray(np.array([[-1, 2**31 - 1, -(2**31), 14]] * 3, np.int32))
    options["kv_lengths"] = cupy.asarray(np.array([2**31 - 1, -5, 256], np.int32))
    options["query_starts"] = cupy.asarray(np.array([-7, 100, 90, 10**6], np.int32))
    out, check = banded(cupy, np.zeros(q.shape, float16))
    attention(q, *finite, out=out, **options)
    check()
    assert np.isfinite(out.get()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["window", "shift", "sink", "group", "scale", "value"])
def test_the_bounds_bite(cupy, instances, change):
    case = Case(float16, 128, [200], [600], window=100, has_sinks=True)
    result = case.run(cupy)
    case.check(result)
    if change == "window":
        case.options["window"] = 101
    elif change == "shift":
        case.k[0] = np.roll(case.k[0], 1, axis=0)
    elif change == "sink":
        case.sinks += np.float32(0.05)
    elif change == "group":
        case.k[0] = case.k[0][:, ::-1]
    elif change == "scale":
        case.q = (case.q * np.float16(1.02)).astype(float16)
    else:
        case.v[0][450] += np.float16(0.5)
    with pytest.raises(AssertionError):
        case.check(result)


@pytest.mark.gpu
def test_a_graph_reads_lengths_and_tables_anew(cupy, instances):
    case = Case(float16, 128, [100, 100], [300, 200], page=64)
    arrays, options = case.arguments(cupy)
    out = cupy.asarray(np.full(arrays[0].shape, np.nan, float16))
    run = functools.partial(attention, *arrays, out=out, **options)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        run()
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        case.lengths = [250, 180]
        options["kv_lengths"].set(np.array(case.lengths, np.int32))
        graph.launch(stream)
        stream.synchronize()
    case.k, case.v = ([tokens[:n] for tokens, n in zip(a, case.lengths, strict=True)] for a in (case.k, case.v))
    case.check(out.get())
