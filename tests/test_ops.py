"""Every public op called in ways nobody should: what it answers is right, or an error that names the argument and left all
memory as it was.

`CUPYQ_CALLS=20000 pytest tests/test_ops.py -k spoilt` tries so many calls of every op, others each time; with
CUPYQ_CALLS_LOG=FILE it notes there how many there were and what became of them.
"""

import collections
import itertools
import json
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import gpu_count
from hypothesis import HealthCheck, note, settings
from hypothesis import given as given_examples
from hypothesis import strategies as st
from kernel_checks import host, move, on_both
from op_calls import CALLS, Maker, experts, joined, matrix, op_named, valid_call
from placed_calls import Callee, Exporter, OfLibrary, Placed, ReadOnlyExporter, Realized, attempt, compare
from spoilt_calls import GPU_KINDS, spoilt
from test_repo import public_ops

from cupyq import _capsules, ops
from cupyq.formats import kv_cache

_USUAL = 100
EXAMPLES = int(os.environ.get("CUPYQ_CALLS", _USUAL))
"""Calls of every op."""


def noted(name, counts):
    if log := os.environ.get("CUPYQ_CALLS_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps({"op": name, **counts}) + "\n")


def tried(name, body, examples):
    """Run body(choose, counts) for many random choices; the same ones every time, unless CUPYQ_CALLS asks for more."""
    counts = collections.Counter()

    @settings(
        max_examples=examples,
        derandomize=EXAMPLES == _USUAL,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given_examples(st.data())
    def example(data):
        body(lambda items: items[data.draw(st.integers(0, len(items) - 1))], counts)

    try:
        example()
    finally:
        noted(name, counts)


def test_every_op_is_called():
    assert {name for _, name in public_ops()} == set(CALLS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_spoilt_call_is_right_or_says_what_is_wrong(name):
    op = op_named(name)

    def body(choose, counts):
        placed = {key: Placed(value) for key, value in valid_call(name, Maker(choose, choose(range(2**16)))).items()}
        spoils, must_fail = choose((1, 1, 1, 2, 2, 0)), False
        for _ in range(spoils):
            placed, what, cannot_be_right = spoilt(op, placed, choose)
            must_fail = must_fail or cannot_be_right
            note(what)
        outcome = attempt(op, placed)
        counts["calls"] += 1
        counts[outcome] += 1
        assert spoils or outcome == "right", "the valid call is refused"
        assert not (must_fail and spoils == 1 and outcome == "right"), "accepted, and cannot be right"

    tried(name, body, EXAMPLES)


# --- what was found once ----------------------------------------------------------------------------------------------


def test_settings_of_small_integers():
    logits = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    expected = ops.sample(logits, top_k=[1, 2, 100], seed=5)
    for dtype in (np.int8, np.uint8, np.int16, np.uint64):
        assert ops.sample(logits, top_k=np.array([1, 2, 100], dtype), seed=5).tolist() == expected.tolist()


def test_outputs_of_sample_that_overlap():
    memory = np.zeros(64, np.int32)
    results = {"out": memory[:3], "probabilities": memory[3:6].view(np.float32), "top_ids": memory[6:9].reshape(3, 1)}
    results |= {"top_probabilities": memory[9:12].view(np.float32).reshape(3, 1), "xtc_mask": memory[12:22].view(np.uint8)}
    logits = np.zeros((3, 40), np.float32)
    ops.sample(logits, **results)
    for name, other in itertools.permutations(results, 2):
        start = results[other].view(np.int32).reshape(-1)
        wrong = np.ndarray(results[name].shape, results[name].dtype, memory, (start.ctypes.data - memory.ctypes.data))
        with pytest.raises(ValueError, match="overlaps"):
            ops.sample(logits, **results | {name: wrong})


def test_a_window_beyond_every_length():
    q = np.random.default_rng(0).standard_normal((1, 3, 1, 8)).astype(np.float32)
    assert np.array_equal(ops.attention(q, q, q, window=2**70), ops.attention(q, q, q))


def test_arrays_whose_operators_differ():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for wrong in (np.ma.MaskedArray(x, x > 2), x.view(np.matrix)):
        with pytest.raises(TypeError, match="up must be a plain array"):
            ops.silu_mul(x, wrong)
        with pytest.raises(TypeError, match="out must be a plain array"):
            ops.silu(x, out=wrong)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

ON_GPU = sorted(CALLS.keys() - {"count_match"})  # prompts are compared on the host


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_spoilt_call_on_a_gpu(name, cupy):
    """On the default stream and on another one; kernels of float16 alone, which other tests have compiled."""
    op, streams = op_named(name), (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True))

    def body(choose, counts):
        placed = {n: Placed(v) for n, v in valid_call(name, Maker(choose, choose(range(99)), (np.float16,))).items()}
        spoils, must_fail = choose((1, 0)), False
        for _ in range(spoils):
            placed, what, must_fail = spoilt(op, placed, choose, GPU_KINDS, on_gpu=True)
            note(what)
        with choose(streams):
            outcome = attempt(op, placed, "cupy")
        assert spoils or outcome == "right", "the valid call is refused"
        assert not (must_fail and outcome == "right"), "accepted, and cannot be right"

    tried(f"{name} on a GPU", body, 6)
    cupy.cuda.runtime.deviceSynchronize()  # an access out of bounds would be reported here


@pytest.mark.gpu
def test_a_read_only_array_of_a_gpu_is_not_written(cupy):
    x = cupy.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="out is read-only and would be written"):
        ops.silu(x, out=ReadOnlyExporter(cupy.zeros_like(x)))
    assert np.array_equal(ops.silu(ReadOnlyExporter(x)).get(), ops.silu(x).get())


@pytest.mark.gpu
def test_arrays_of_two_gpus(cupy):
    """An op runs where its arrays are, whatever GPU is current, and refuses a mixture."""
    if gpu_count() < 2:
        pytest.skip("2 GPUs are needed")
    x = _floats(3, 8)
    with cupy.cuda.Device(1):
        there, ones, y = cupy.asarray(x), cupy.ones(8, np.float32), cupy.zeros((3, 8), np.float32)
    with cupy.cuda.Device(0):
        here = cupy.asarray(x)
        assert ops.rms_norm(there, ones, out=y) is y
        assert np.allclose(y.get(), ops.rms_norm(x, np.ones(8, np.float32)), rtol=1e-5)
        for call in (lambda: ops.add(here, there), lambda: ops.silu(here, out=there), lambda: ops.rms_norm(here, ones)):
            with pytest.raises(ValueError, match="on GPU [01]"):
                call()


def test_a_read_only_mark_is_read():
    """Of capsules as a GPU's arrays would give them; NumPy's take no stream."""

    class WithoutStream(Exporter):
        def __dlpack__(self, *, stream, **options):
            return self.array.__dlpack__(**options)

    x = np.zeros(3, np.float32)
    assert not _capsules.is_read_only(WithoutStream(x))
    x.flags.writeable = False
    assert _capsules.is_read_only(WithoutStream(x))


# --- the checks can fail ----------------------------------------------------------------------------------------------


def _add(x, y, *, out=None):
    out = np.empty_like(x) if out is None else out
    out[...] = x + y
    return out


def _writes_past_its_output(x, y, *, out=None):
    result = _add(x, y, out=out)
    if out is not None:
        np.lib.stride_tricks.as_strided(out.reshape(-1), (out.size + 1,), (out.itemsize,))[-1] = 1
    return result


def _writes_to_an_input(x, y, *, out=None):
    result = _add(x, y, out=out)
    y.flat[0] += 1
    return result


def _writes_before_it_raises(x, y, *, out=None):
    _add(x, y, out=out)
    raise ValueError("out was written")


def _raises_from_numpy(x, y, *, out=None):
    return x + np.zeros((7, 11))


def _raises_another_error(x, y, *, out=None):
    raise IndexError("x is out of range")


def _names_nothing(x, y, *, out=None):
    raise ValueError("wrong shape")


def _says_much(x, y, *, out=None):
    raise ValueError("x is\nwrong")


def _forgets_an_element(x, y, *, out=None):
    result = _add(x, y, out=out)
    result.flat[-1] = 0 if out is not None else result.flat[-1]
    return result


WRONG_OPS = [
    _writes_past_its_output, _writes_to_an_input, _writes_before_it_raises, _raises_from_numpy, _raises_another_error,
    _names_nothing, _says_much, _forgets_an_element,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_OPS, ids=lambda op: op.__name__[1:])
def test_a_wrong_op_would_be_seen(wrong):
    x, y = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    placed = {"x": Placed(x), "y": Placed(y), "out": Placed(np.zeros((2, 3), np.float32))}
    op, calls = Callee("add", ops.add), []

    def add(**arguments):
        calls.append(arguments)  # the second call is that of plain copies, and has to be right
        return (wrong if len(calls) == 1 else ops.add)(**arguments)

    assert attempt(op, placed) == "right"
    op.function = add
    with pytest.raises(AssertionError):
        attempt(op, placed)


class OnGpu:
    """An array of CuPy, as far as a comparison looks at it."""

    def __init__(self, array):
        self.array = array

    def get(self):
        return self.array


def test_wrong_codes_of_a_gpu_would_be_seen():
    """Of the keys that qkv_append normed and turned a few codes may be off by one, of the values, which it copies, none."""
    wanted = {f"{cache}.codes": np.full((6, 4, 2, 64), 100, np.uint8) for cache in ("k_cache", "v_cache")}

    def is_right(argument, step, count):
        call = Realized()
        call.arrays = {name: OnGpu(codes.copy()) for name, codes in wanted.items()}
        call.arrays[argument].array.flat[:count] = 100 + step
        try:
            compare(op_named("qkv_append"), None, None, call, wanted)
        except AssertionError:
            return False
        return True

    assert is_right("k_cache.codes", 1, 12) and is_right("k_cache.codes", -1, 12)
    assert not is_right("k_cache.codes", 1, 13) and not is_right("k_cache.codes", 2, 1)
    assert not is_right("v_cache.codes", 1, 1)


# --- NaN and Inf ------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """A NaN at `index` of `argument`: what it must reach of each result, and (`may`) beyond which it never comes."""

    op: str
    arguments: dict[str, Any]
    argument: str
    index: tuple[int, ...]
    must: dict[Any, Any]  # {number of a result, or argument written in place: index, None for nothing}
    may: dict[Any, Any] | None = None


def _floats(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def _spreads():
    everything, element = np.s_[...], np.s_[1, 2]
    for op, more in (("silu", {}), ("gelu", {}), ("relu", {}), ("softcap", {"cap": 3.0}), ("clamp", {"bound": 0.5})):
        yield Spread(op, {"x": _floats(3, 5)} | more, "x", (1, 2), {0: element})
    yield Spread("gelu", {"x": _floats(3, 5), "approximate": "none"}, "x", (1, 2), {0: element})
    for op, argument in itertools.product(("silu_mul", "gelu_mul", "relu_mul"), ("gate", "up")):
        yield Spread(op, {"gate": _floats(3, 5), "up": -_floats(3, 5)}, argument, (1, 2), {0: element})
    for argument in ("x", "y"):
        yield Spread("add", {"x": _floats(3, 5), "y": _floats(3, 5)}, argument, (1, 2), {0: element})
    weighted = {"x": _floats(3, 5), "y": _floats(3, 5), "weights": np.float32([1, 2, 0])}
    yield Spread("add_weighted", weighted, "x", (1, 2), {0: element})
    yield Spread("add_weighted", weighted, "y", (1, 2), {0: element})
    yield Spread("add_weighted", weighted, "y", (2, 2), {0: None})
    yield Spread("add_weighted", weighted, "weights", (1,), {0: np.s_[1]})
    yield Spread("embedding", {"ids": np.int32([3, 0, 3, 1]), "table": _floats(5, 6)}, "table", (3, 2), {0: np.s_[::2, 2]})

    product = {"x": _floats(3, 6), "weight": _floats(6, 5), "bias": _floats(5)}
    for argument, index, must in (("x", (1, 2), np.s_[1]), ("weight", (2, 3), np.s_[:, 3]), ("bias", (3,), np.s_[:, 3])):
        yield Spread("matmul", product, argument, index, {0: must})
    for beta, c in ((2.0, np.s_[1, 2]), (0.0, None)):
        arguments = {"a": _floats(3, 6), "b": _floats(6, 5), "c": _floats(3, 5), "beta": beta}
        for argument, index, must in (("a", (1, 2), np.s_[1]), ("b", (2, 3), np.s_[:, 3]), ("c", (1, 2), c)):
            yield Spread("gemm", arguments, argument, index, {"c": must})

    for op in ("rms_norm", "layer_norm"):
        arguments = {"x": _floats(3, 8), "weight": _floats(8), "residual": _floats(3, 8)}
        yield Spread(op, arguments, "x", (1, 2), {0: np.s_[1]})
        yield Spread(op, arguments, "weight", (2,), {0: np.s_[:, 2]})
        yield Spread(op, arguments, "residual", (1, 2), {0: element})
        ordered = {"x": _floats(3, 8), "weight": _floats(8), "order": np.int32([7, -1, 2, 0])}
        yield Spread(op, ordered, "x", (1, 5), {0: np.s_[1, [0, 2, 3]]})
        yield Spread(op, ordered, "weight", (2,), {0: np.s_[:, 2]})
    yield Spread("layer_norm", {"x": _floats(3, 8), "weight": _floats(8), "bias": _floats(8)}, "bias", (2,), {0: np.s_[:, 2]})
    for kind in ("rms", "layer"):
        heads = {"x": _floats(2, 3, 8), "weight": _floats(3, 8), "bias": _floats(3, 8), "kind": kind}
        yield Spread("head_norm", heads, "x", (1, 2, 3), {0: np.s_[1, 2]})
        yield Spread("head_norm", heads, "weight", (2, 3), {0: np.s_[:, 2, 3]})
        yield Spread("head_norm", heads, "bias", (2, 3), {0: np.s_[:, 2, 3]})

    for style, pair in (("neox", [1, 5]), ("gptj", [2, 3])):
        turned = {"x": _floats(2, 3, 2, 10), "sin": _floats(9, 4), "cos": _floats(9, 4), "positions": np.int32([0, 4])}
        turned["style"] = style
        yield Spread("rope", turned, "x", (1, 2, 1, pair[0]), {0: np.s_[1, 2, 1, pair]})
        yield Spread("rope", turned, "x", (1, 2, 1, 9), {0: np.s_[1, 2, 1, 9]})
        for table in ("sin", "cos"):
            yield Spread("rope", turned, table, (5, 1), {0: np.s_[1, 1, :, pair]})
            yield Spread("rope", turned, table, (8, 1), {0: None})

    yield Spread("combine_rows", {"y": _floats(3, 2, 5), "weights": _floats(3, 2)}, "y", (1, 0, 2), {0: element})
    yield Spread("combine_rows", {"y": _floats(3, 2, 5), "weights": _floats(3, 2)}, "weights", (1, 0), {0: np.s_[1]})
    none = {"y": _floats(3, 2, 5), "weights": np.zeros((3, 2), np.float32)}
    yield Spread("combine_rows", none, "y", (1, 0, 2), {0: None})
    routed, row = {"logits": _floats(3, 7), "top_k": 2}, np.s_[1]
    yield Spread("route", routed, "logits", (1, 3), {0: row, 1: None}, {0: row, 1: row})
    yield Spread("hadamard", {"x": _floats(3, 16), "size": 8}, "x", (1, 9), {0: np.s_[1, 8:]})

    # Rows 0 and 1 use the adapter 1 alone, rows 2 and 3 both; rank column 0 belongs to the adapter 0.
    adapted = {"y": _floats(4, 5), "x": _floats(4, 7), "a": _floats(7, 3), "b": _floats(3, 5)}
    adapted |= {"rank_adapter": np.int32([0, 1, 1]), "weights": np.float32([[0, 1], [1, 2]])}
    for argument, index, must in (
        ("y", (1, 2), np.s_[1, 2]), ("x", (1, 2), np.s_[1]), ("a", (3, 0), np.s_[2:]), ("a", (3, 1), everything),
        ("b", (0, 2), np.s_[2:, 2]), ("b", (1, 2), np.s_[:, 2]), ("weights", (1, 0), np.s_[2:]),
    ):  # fmt: skip
        yield Spread("lora", adapted, argument, index, {"y": must})

    # Query i of batch row 1 stands at position 2 + i of 5 keys; the sixth is beyond its length.
    seen = {"q": _floats(2, 3, 4, 8), "k": _floats(2, 6, 2, 8), "v": _floats(2, 6, 2, 8), "kv_lengths": np.int32([6, 5])}
    row = {0: np.s_[1, :, 2:]}
    yield Spread("attention", seen, "q", (1, 1, 3, 2), {0: np.s_[1, 1, 3]})
    yield Spread("attention", seen, "k", (1, 3, 1, 2), {0: np.s_[1, 1:, 2:]}, row)
    yield Spread("attention", seen, "v", (1, 3, 1, 2), {0: np.s_[1, 1:, 2:, 2]}, row)
    yield Spread("attention", seen, "k", (1, 5, 1, 2), {0: None})
    yield Spread("attention", seen, "v", (1, 5, 1, 2), {0: None})
    yield Spread("attention", seen | {"window": 2}, "v", (1, 0, 1, 2), {0: None}, row)
    yield Spread("attention", seen | {"sinks": _floats(4)}, "sinks", (2,), {0: np.s_[:, :, 2]})

    caches = {"k_cache": _floats(2, 6, 2, 4), "v_cache": _floats(2, 6, 2, 4), "positions": np.int32([0, 2])}
    new = {"k": _floats(2, 3, 2, 4), "v": _floats(2, 3, 2, 4)} | caches
    yield Spread("kv_append", new, "k", (1, 2, 0, 3), {"k_cache": np.s_[1, 4, 0, 3], "v_cache": None})
    yield Spread("kv_append", new, "v", (1, 2, 0, 3), {"v_cache": np.s_[1, 4, 0, 3], "k_cache": None})
    qkv = {"qkv": _floats(2, 3, 6 * 4), **caches, "sin": None, "cos": None, "style": None, "heads": 2}
    q, k, v = {0: np.s_[1, 2, 1, 1]}, {"k_cache": np.s_[1, 4, 1, 1]}, {"v_cache": np.s_[1, 4, 1, 1]}
    nothing = {0: None, "k_cache": None, "v_cache": None}
    for place, must in ((5, q), (13, k), (21, v)):
        yield Spread("qkv_append", qkv, "qkv", (1, 2, place), nothing | must)
    normed = qkv | {"q_norm": _floats(4), "k_norm": _floats(4)}
    yield Spread("qkv_append", normed, "qkv", (1, 2, 5), nothing | {0: np.s_[1, 2, 1]})
    yield Spread("qkv_append", normed, "qkv", (1, 2, 13), nothing | {"k_cache": np.s_[1, 4, 1]})
    appended = np.s_[[0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 3, 4], :, 1]
    yield Spread("qkv_append", normed, "k_norm", (1,), nothing | {"k_cache": appended})

    tables = {"logits": _floats(3, 9), "history": np.int32([[1, 2]] * 3)}
    yield Spread("penalize", tables, "logits", (1, 2), {0: element})
    biased = tables | {"bias_ids": np.int32([4, 7]), "bias": _floats(2), "repetition": 1.2}
    yield Spread("penalize", biased, "bias", (1,), {0: np.s_[:, 7]})

    levels = {"scale": np.abs(_floats(5)) + np.float32(0.1), "qzero": 8, "maxq": 15}
    quantized = {"x": _floats(4, 5), **levels}
    yield Spread("quantize", quantized, "x", (1, 2), {0: None}, {0: element})
    yield Spread("quantize", quantized, "scale", (2,), {0: np.s_[:, 2]})
    searched = quantized | {"err_norm": 2.0, "min_p": 0.5, "max_p": 1.0, "p_grid": 3}
    yield Spread("quantize_err", searched, "x", (1, 2), {0: everything})
    column = np.s_[:, 2]
    spread = {"weights": _floats(4, 5), "quant": _floats(4, 5), "error": _floats(4, 5), **levels, "a": 0, "b": 4}
    spread["hessian_inv"] = np.triu(_floats(4, 4)) + 2 * np.eye(4, dtype=np.float32)
    may = {name: np.s_[1:, 2] for name in ("weights", "quant", "error")}
    yield Spread("quantize_range", spread, "weights", (1, 2), {"error": np.s_[1:, 2]}, may)
    may = {"weights": np.s_[1:3, 2]}
    yield Spread("quantize_range_inplace", {"weights": _floats(4, 5), **levels, "a": 1, "b": 3}, "weights", (1, 2), {}, may)
    group = {"target": _floats(4, 5), "original": _floats(4, 5), "factor": _floats(4, 4), "bits": 4}
    group |= {"loss_weights": np.abs(_floats(4)), "scales16": np.abs(_floats(5, dtype=np.float16))}
    yield Spread("quantize_group", group, "target", (1, 2), {2: np.s_[2]}, {0: column, 1: column, 2: np.s_[2]})
    yield Spread("quantize_group", group, "original", (1, 2), {1: np.s_[1:2, 2]}, {0: column, 1: column, 2: np.s_[2]})
    best = {"target": _floats(4, 5), "weights": np.abs(_floats(4)), "bits": 4, "is_symmetric": True}
    yield Spread("search_scales_gptq", best, "target", (1, 2), {}, {0: np.s_[2], 1: np.s_[2]})

    half = np.float16
    for op, q, name in (("qmatmul", matrix, "q"), ("qmatmul_gated", joined, "joined")):
        multiplied = {"x": _floats(3, 160, dtype=half), name: OfLibrary(q)}
        yield Spread(op, multiplied, "x", (1, 7), {0: np.s_[1]})
    added = {"x": _floats(3, 160, dtype=half), "q": OfLibrary(matrix), "residual": _floats(3, 64, dtype=half)}
    yield Spread("qmatmul", added, "residual", (1, 2), {0: element})
    groups = OfLibrary(lambda library: ops.group_rows(move(library, np.int32([[0], [1], [0]])), 2))
    grouped = {"x": _floats(3, 160, dtype=half), "matrices": OfLibrary(experts), "groups": groups}
    yield Spread("qmatmul_grouped", grouped, "x", (1, 7), {0: np.s_[1]})

    # A head of 128 is one of e4m3, and two chunks of q4 and q8, whose values are transformed together.
    stays, head, chunk = _floats(2, 3, 2, 128, dtype=half), np.s_[1, 2, 1], np.s_[1, 2, 1, 64:]
    for kind, must in {"fp8": np.s_[1, 2, 1, 70], "e4m3": head, "q4": chunk, "q8": chunk}.items():
        codes, scales = encoded(stays, kind)
        if scales is not None:
            where = (1, 2, 1, scales.shape[-1] - 1)
            arguments = {"codes": codes, "scales": scales, "x": stays, "kind": kind, "start": 1, "width": 2}
            yield Spread("kv_decode", arguments, "scales", where, {"x": must})
        yield Spread("encoded and decoded", {"x": stays, "kind": kind}, "x", (1, 2, 1, 70), {0: must})
    blocks = {"kind": "q8", **dict(zip(("codes", "scales"), ops.encode_blocks(stays, "q8"), strict=True))}
    yield Spread("decode_blocks", blocks, "scales", (3,), {0: np.s_[64:128]})
    cache = {"cache": _floats(4, 3), "order": np.int32([0, 2, 1])}
    yield Spread("cache_rotate", cache, "cache", (2, 1), {"cache": np.s_[0, 1]}, {"cache": np.s_[[0, 2], 1]})


def encoded(x, kind):
    xp = np if isinstance(x, np.ndarray) else __import__("cupy")
    shape = kv_cache.scale_shape(x.shape, kind)
    codes = xp.zeros(kv_cache.code_shape(x.shape, kind), np.uint8)
    scales = None if shape is None else xp.zeros(shape, np.float16)
    ops.kv_encode(x, codes, scales, kind=kind, start=0, width=x.shape[1])
    return codes, scales


def _through_a_cache(x, kind):
    codes, scales = encoded(x, kind)
    result = x.copy()
    ops.kv_decode(codes, scales, result, kind=kind, start=0, width=x.shape[1])
    return result


NOT_FLOAT = {
    "advance": "counts", "count_match": "compares tokens", "group_rows": "sorts numbers", "pack_columns": "packs codes",
    "pack_rows_4": "packs codes", "remap_columns": "moves words", "remap_nibbles": "moves words", "reconstruct": "formats",
}  # fmt: skip
ELSEWHERE = {
    "sample": "test_a_nan_is_never_drawn", "search_scales": "its scales depend on all of a group; finite arrays are asked for",
    "kv_encode": "encoded and decoded", "kv_encode_paged": "its code is kv_encode's", "kv_decode_paged": "as kv_decode",
    "encode_blocks": "its code is kv_encode's",
}  # fmt: skip

SPREADS = list(_spreads())


def test_every_float_op_says_where_a_nan_goes():
    assert {spread.op for spread in SPREADS} | NOT_FLOAT.keys() | ELSEWHERE.keys() == set(CALLS) | {"encoded and decoded"}


def _results(spread, library, value):
    """{number of a result or argument written in place: array on the host} with that value in its place."""
    arguments = {}
    for name, given in spread.arguments.items():
        arguments[name] = given.make(library) if isinstance(given, OfLibrary) else given
        if isinstance(given, np.ndarray):
            given = given.copy()
            if name == spread.argument and value is not None:
                given[spread.index] = value
            arguments[name] = move(library, given)
    with np.errstate(all="ignore"):
        call = _through_a_cache if spread.op == "encoded and decoded" else getattr(ops, spread.op)
        results = call(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    found = {n: host(result) for n, result in enumerate(results) if result is not None}
    written = set() if spread.op == "encoded and decoded" else op_named(spread.op).writes
    return found | {name: host(array) for name, array in arguments.items() if name in written and array is not None}


def _mask(array, index):
    mask = np.zeros(array.shape, bool)
    if index is not None:
        mask[index] = True
    return mask


@on_both
@pytest.mark.parametrize("number", range(len(SPREADS)), ids=[f"{s.op}-{s.argument}-{n}" for n, s in enumerate(SPREADS)])
def test_a_nan_reaches_what_depends_on_it_and_nothing_else(number, library):
    spread = SPREADS[number]
    before, after = (_results(spread, library, value) for value in (None, np.nan))
    for result, index in {**dict.fromkeys(spread.may or {}), **spread.must}.items():
        must, may = _mask(after[result], index), _mask(after[result], (spread.may or spread.must).get(result))
        if after[result].dtype.kind not in "iu":
            assert np.isnan(after[result][must]).all(), f"it is lost in {result}"
        if result == spread.argument:  # written in place: where the NaN was put and stays is a change of its own
            may[spread.index] |= spread.op not in ("gemm", "cache_rotate", "quantize_range", "quantize_range_inplace")
        assert before[result][~may].tobytes() == after[result][~may].tobytes(), f"{result} changed beyond what depends on it"


@on_both
@pytest.mark.parametrize(
    ("op", "more", "x", "expected"),
    [
        ("silu", {}, [np.inf, -np.inf], [np.inf, -0.0]),
        ("gelu", {"approximate": "tanh"}, [np.inf, -np.inf], [np.inf, -0.0]),
        ("gelu", {"approximate": "none"}, [np.inf, -np.inf], [np.inf, -0.0]),
        ("relu", {}, [np.inf, -np.inf], [np.inf, 0.0]),
        ("softcap", {"cap": 3.0}, [np.inf, -np.inf], [3.0, -3.0]),
        ("clamp", {"bound": 0.5}, [np.inf, -np.inf], [0.5, -0.5]),
        ("add", {"y": [1.0, np.inf, np.inf]}, [np.inf, -np.inf, np.inf], [np.inf, np.nan, np.inf]),
        ("silu_mul", {"up": [0.0, 2.0, np.inf]}, [np.inf, -np.inf, np.inf], [np.nan, -0.0, np.inf]),
        ("relu_mul", {"up": [0.0, 2.0, -1.0]}, [np.inf, -np.inf, np.inf], [np.nan, 0.0, -np.inf]),
        ("hadamard", {"size": 2}, [np.inf, 1.0, np.inf, np.inf], [np.inf, np.inf, np.inf, np.nan]),
        ("rms_norm", {"weight": [1.0, 2.0]}, [np.inf, 1.0], [np.nan, 0.0]),
        ("layer_norm", {"weight": [1.0, 2.0]}, [np.inf, 1.0], [np.nan, np.nan]),
        ("matmul", {"weight": [[1.0, -2.0, 1.0], [1.0, 1.0, -np.inf]]}, [np.inf, 1.0], [np.inf, -np.inf, np.nan]),
        ("add", {"y": [3e38]}, [3e38], [np.inf]),
    ],
)
def test_infinities_follow_ieee(op, more, x, expected, library):
    first = "gate" if op.endswith("_mul") else "x"
    more = {name: move(library, np.float32(value)) if isinstance(value, list) else value for name, value in more.items()}
    with np.errstate(all="ignore"):
        found = host(getattr(ops, op)(**{first: move(library, np.float32(x))}, **more))
    assert np.array_equal(found, np.float32(expected), equal_nan=True)
    zeros = np.float32(expected) == 0
    assert np.array_equal(np.signbit(found[zeros]), np.signbit(np.float32(expected)[zeros]))


@on_both
def test_a_nan_is_never_drawn(library):
    logits = _floats(4, 9)
    with_nan, without = logits.copy(), logits.copy()
    with_nan[1, np.argmax(logits[1])], without[1, np.argmax(logits[1])] = np.nan, -np.inf
    for settings_ in ({"temperature": 0.0}, {"seed": 5}, {"top_k": 3, "top_p": 0.9, "seed": 5}, {"tfs": 0.9, "seed": 5}):
        drawn, expected = (host(ops.sample(move(library, x), **settings_)) for x in (with_nan, without))
        assert drawn.tolist() == expected.tolist() and drawn[1] != np.argmax(logits[1])
