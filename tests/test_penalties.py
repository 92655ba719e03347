"""Penalties: the reference against plain loops and recorded outputs, the kernel against the reference, bit for bit."""

import math

import ml_dtypes
import numpy as np
import pytest
from conftest import golden

from cupyq.ops.penalties import PenaltyTable, penalize, penalize_workspace_size

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
INF, NAN = np.inf, np.nan

# --- against plain loops ----------------------------------------------------------------------------------------------


def plain_said(logits, said, repetition=1.0, frequency=0.0, presence=0.0, sustain=-1, decay=0):
    """The walk from the newest token back, one token and one step at a time."""
    x, seen = dict(enumerate(logits)), set()
    left = len(said) if sustain == -1 else sustain
    r, f, p = repetition, frequency, presence
    for i in range(len(said) - 1, max(0, len(said) - left - decay) - 1, -1):
        token = said[i]
        if 0 <= token < len(logits):
            if token not in seen:
                seen.add(token)
                x[token] = x[token] / r if x[token] > 0 else x[token] * r
                x[token] -= p
            x[token] -= f
        left -= 1
        if left < 0:
            r, f, p = r + (1 - repetition) / decay, f - frequency / decay, p - presence / decay
    return [x[i] for i in range(len(logits))]


def plain_dry(logits, said, multiplier, base, allowed_length, max_ngram, range_, breakers):
    """Every end of the history, longest first, is looked for in it, where another token follows."""
    x = list(logits)
    said = said[-range_:] if range_ else said
    is_bad = [not 0 <= token < len(logits) or token in breakers for token in said]
    for m in range(min(max_ngram, len(said) - 1), allowed_length - 1, -1):
        end = said[len(said) - m :]
        if any(is_bad[len(said) - m :]):
            continue
        found = [i + m for i in range(len(said) - m) if said[i : i + m] == end and not is_bad[i + m]]
        if found:
            for place in found:
                x[said[place]] -= multiplier * base ** (m - allowed_length)
            break
    return x


def close(result, expected, rounding=2.0**-22):
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    scale = np.maximum(np.abs(expected), 1)
    return np.array_equal(np.isinf(result), np.isinf(expected)) and np.all(
        np.abs(result - expected)[np.isfinite(expected)] <= (rounding * scale)[np.isfinite(expected)]
    )


def random_said(random, vocab, length):
    """Some ids often, some outside the vocabulary."""
    said = random.integers(0, min(vocab, random.choice([3, 10, 1000])), length)
    return np.where(random.random(length) < 0.05, random.choice([-2, -1, vocab, 2**31 - 1], length), said)


def random_penalties(random):
    return {
        "repetition": random.choice([1.0, 0.5, 1.25, 3.0]).item(),
        "frequency": random.choice([0.0, 0.25, -0.5]).item(),
        "presence": random.choice([0.0, 0.5, -0.25]).item(),
        "sustain": random.choice([-1, 0, 1, 7, 1000]).item(),
        "decay": random.choice([0, 1, 8, 1000]).item(),
    }


def test_what_was_said_costs_what_plain_loops_say():
    random = np.random.default_rng(0)
    for _ in range(400):
        vocab = int(random.choice([1, 5, 50]))
        logits = random.normal(0, 4, vocab).astype(np.float32)
        said, settings = random_said(random, vocab, random.choice([0, 1, 2, 20, 60])), random_penalties(random)
        result = penalize(logits[None], said[None], **settings)
        assert close(result[0], plain_said(logits.tolist(), said.tolist(), **settings)), settings


def random_dry(random):
    return {
        "dry_multiplier": random.choice([0.5, 2.0]).item(),
        "dry_base": random.choice([1.0, 1.5]).item(),
        "dry_allowed_length": random.choice([1, 2, 4]).item(),
        "dry_max_ngram": random.choice([1, 3, 20]).item(),
        "dry_range": random.choice([0, 1, 2, 10, 1000]).item(),
    }


def test_repetitions_cost_what_plain_loops_say():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(500):
        vocab = int(random.choice([2, 4, 30]))
        logits = random.normal(0, 4, vocab).astype(np.float32)
        said, settings = random_said(random, vocab, random.choice([0, 1, 5, 20, 60])), random_dry(random)
        if random.random() < 0.6:
            said = np.concatenate([said, said])
        breakers = random.random(vocab) < random.choice([0.0, 0.2])
        result = penalize(logits[None], said[None], **settings, dry_breakers=breakers)
        names = ("multiplier", "base", "allowed_length", "max_ngram", "range")
        values = [settings[f"dry_{name}"] for name in names]
        expected = plain_dry(logits.tolist(), said.tolist(), *values, set(np.flatnonzero(breakers).tolist()))
        assert close(result[0], expected), settings
        hits += expected != logits.tolist()
    assert hits > 100


@pytest.mark.parametrize("case", range(4))
def test_recorded_repetition_penalties(case):
    """exllamav2's apply_rep_penalty, which adds up its steps in float32."""
    inputs, outputs, arguments = golden("sampling")[f"rep_{case}"]
    result = penalize(
        inputs["logits"],
        inputs["sequence"],
        repetition=arguments["penalty_max"],
        frequency=arguments["alpha_frequency"],
        presence=arguments["alpha_presence"],
        sustain=arguments["sustain"],
        decay=arguments["decay"],
    )
    assert close(result, outputs["logits"], rounding=2.0**-19)
    assert not np.array_equal(inputs["logits"], outputs["logits"])


@pytest.mark.parametrize(
    ("said", "settings", "expected"),
    [
        ([0, 2, 2], {"repetition": 2.0}, [1, 3, -2, 4]),
        ([0, 2, 2], {"frequency": 0.5}, [1.5, 3, -2, 4]),
        ([0, 2, 2], {"presence": 0.5}, [1.5, 3, -1.5, 4]),
        ([0, 2, 2], {"presence": 0.5, "sustain": 2}, [2, 3, -1.5, 4]),
        ([0, 1, 2, 3], {"presence": 1.0, "sustain": 0, "decay": 2}, [2, 3, -1.5, 3]),  # 3 in full, 2 by half, 1 not
        ([0, 1, 2, 3], {"presence": 1.0, "sustain": 1, "decay": 2}, [2, 2.5, -2, 3]),
        ([0, 1, 2, 3], {"presence": 1.0, "sustain": 0}, [2, 3, -1, 4]),
        ([0, 1, 2, 0, 1], {"dry_multiplier": 1.0}, [2, 3, -2, 4]),
        ([0, 1, 2, 0, 1, 3, 0, 1], {"dry_multiplier": 1.0}, [2, 3, -2, 3]),
        ([3, 0, 1, 2, 3, 0, 1], {"dry_multiplier": 1.0, "dry_base": 2.0}, [2, 3, -3, 4]),  # three match: 2 ** 1
        ([3, 0, 1, 2, 0, 1, 2, 3, 0, 1], {"dry_multiplier": 1.0}, [2, 3, -1 - 1.75, 4]),  # only the longest match counts
        ([0, 1, 2, 0, 1, 2, 0, 1], {"dry_multiplier": 1.0, "dry_max_ngram": 2}, [2, 3, -3, 4]),  # followed twice
        ([0, 1, 2, 0, 1], {"dry_multiplier": 1.0, "dry_allowed_length": 3}, [2, 3, -1, 4]),
        ([0, 1, 2, 0, 1], {"dry_multiplier": 1.0, "dry_range": 4}, [2, 3, -1, 4]),
        ([0, 1, 2, 0, 1], {"dry_multiplier": 1.0, "dry_breakers": np.array([1, 0, 0, 0], bool)}, [2, 3, -1, 4]),
        ([0, 1, 2, 0, 1], {"dry_multiplier": 1.0, "dry_breakers": np.array([0, 0, 1, 0], bool)}, [2, 3, -1, 4]),
        ([], {"bias": np.float32([1, 0, -1, -INF])}, [3, 3, -2, -INF]),
        ([], {"bias": np.float32([1, 9, 2, 5]), "bias_ids": np.int32([2, 7, 2, -1])}, [2, 3, 1, 4]),  # the last of two
        ([0], {"allowed": np.array([1, 0, 1, 0], bool), "presence": 1.0}, [1, -INF, -1, -INF]),
        ([0], {"allowed": np.array([[0, 1, 1, 1]], np.uint8), "bias": np.float32([9, 1, 0, 0])}, [-INF, 4, -1, 4]),
    ],
)
def test_by_hand(said, settings, expected):
    logits = np.float32([[2, 3, -1, 4]])
    result = penalize(logits, np.array([said], np.int64).reshape(1, -1), **settings)
    assert result.tolist() == [expected]
    assert logits.tolist() == [[2, 3, -1, 4]]


def test_lengths_and_rows():
    """Rows have histories, settings, biases and masks of their own; lengths are clamped."""
    random = np.random.default_rng(2)
    logits, history = random.normal(0, 3, (6, 40)).astype(np.float32), random.integers(-1, 41, (6, 30))
    lengths = np.int32([0, 7, 30, -3, 99, 12])
    settings = [random_penalties(random) | random_dry(random) for _ in range(6)]
    arrays = {name: np.array([row[name] for row in settings]) for name in settings[0]}
    masks = {"bias": random.normal(0, 1, (6, 40)).astype(np.float32), "allowed": random.random((6, 40)) < 0.7}
    whole = penalize(logits, history, lengths, **arrays, **masks)
    table = PenaltyTable(6, np, **arrays)
    assert np.array_equal(penalize(logits, history, lengths, table=table, **masks), whole)
    for r, length in enumerate((0, 7, 30, 0, 30, 12)):
        own = {name: value[r] for name, value in masks.items()}
        alone = penalize(logits[r : r + 1], history[r : r + 1, :length], **settings[r], **own)
        assert np.array_equal(alone[0], whole[r])
    assert "repetition" in repr(table)


@pytest.mark.parametrize("dtype", FLOATS)
def test_out(dtype):
    random = np.random.default_rng(3)
    logits, history = random.normal(0, 3, (3, 20)).astype(dtype), random.integers(0, 20, (3, 9))
    settings = {"repetition": 1.3, "frequency": 0.1, "bias": random.normal(0, 1, 20).astype(np.float32)}
    exact = penalize(logits.astype(np.float32), history, **settings)
    result = penalize(logits, history, **settings)
    assert result.dtype == dtype and np.array_equal(result, exact.astype(dtype))
    as_float32 = np.full((3, 20), NAN, np.float32)
    assert penalize(logits, history, **settings, out=as_float32) is as_float32 and np.array_equal(as_float32, exact)
    assert penalize(logits, history, **settings, out=logits) is logits and np.array_equal(logits, result)
    assert penalize(np.empty((0, 5), dtype), np.empty((0, 3), np.int64)).shape == (0, 5)
    assert penalize(np.empty((2, 0), dtype), np.empty((2, 3), np.int64)).shape == (2, 0)


def test_strange_logits_pass():
    logits = np.float32([[NAN, INF, -INF, 3e38]])
    with np.errstate(all="raise"):
        result = penalize(logits, np.array([[0, 1, 2, 3]]), repetition=0.5, presence=1.0)
    assert math.isnan(result[0, 0]) and result[0, 1:].tolist() == [INF, -INF, INF]


# --- errors -----------------------------------------------------------------------------------------------------------

BAD = [
    ({"repetition": 0.0}, ValueError, "repetition must be finite in float32, > 0, got 0.0"),
    ({"repetition": [1.0, NAN, 1.0]}, ValueError, "repetition must be finite"),
    ({"frequency": INF}, ValueError, "frequency must be finite in float32, got inf"),
    ({"presence": "much"}, TypeError, "presence must be a real number"),
    ({"sustain": -2}, ValueError, "sustain must be at least -1, got -2"),
    ({"decay": 1.5}, TypeError, "decay must be an integer"),
    ({"decay": [1, 2]}, ValueError, r"decay must be one number or have shape \(3,\)"),
    ({"dry_multiplier": -1.0}, ValueError, "dry_multiplier must be"),
    ({"dry_base": 0.5}, ValueError, "dry_base must be finite in float32, >= 1"),
    ({"dry_allowed_length": 0}, ValueError, "dry_allowed_length must be at least 1"),
    ({"dry_max_ngram": 0}, ValueError, "dry_max_ngram must be at least 1"),
    ({"dry_range": -1}, ValueError, "dry_range must be at least 0"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        penalize(np.zeros((3, 8), np.float32), np.zeros((3, 4), np.int32), **settings)
    assert "\n" not in str(caught.value)


def bad_arrays(xp):
    logits, history = xp.zeros((3, 8), np.float32), xp.zeros((3, 4), np.int32)
    memory = xp.zeros(48, np.float32)
    return [
        ({"logits": logits.astype(np.float64)}, TypeError, "logits must have dtype"),
        ({"logits": logits[0]}, ValueError, "logits must have 2 dimensions"),
        ({"history": history[:2]}, ValueError, "history must have shape"),
        ({"history": history.astype(np.float32)}, TypeError, "history must have dtype int32 or int64"),
        ({"history": xp.zeros((3, 2**24 + 1), np.int32)[:, ::2]}, ValueError, "history must be C-contiguous"),
        ({"lengths": xp.zeros(4, np.int32)}, ValueError, "lengths must have shape"),
        ({"lengths": xp.zeros(3, np.int64)}, TypeError, "lengths must have dtype int32"),
        ({"dry_breakers": xp.zeros(8, np.int32)}, TypeError, "dry_breakers must have dtype"),
        ({"bias": xp.zeros(7, np.float32)}, ValueError, "bias must have shape"),
        ({"bias": xp.zeros((2, 8), np.float32)}, ValueError, "bias must have shape"),
        ({"bias_ids": xp.zeros(2, np.int32)}, ValueError, "bias_ids is given without bias"),
        ({"bias_ids": xp.zeros(2, np.int32), "bias": xp.zeros(3, np.float32)}, ValueError, "bias must have shape"),
        ({"allowed": xp.zeros((2, 8), bool)}, ValueError, "allowed must have shape"),
        ({"out": xp.zeros((3, 8), np.float64)}, TypeError, "out must have dtype float32"),
        ({"logits": logits.astype(np.float16), "out": xp.zeros((3, 8), np.int16)}, TypeError, "out must have dtype float32"),
        ({"logits": memory[:24].reshape(3, 8), "out": memory[8:32].reshape(3, 8)}, ValueError, "out overlaps logits partly"),
        ({"bias": memory[:8], "out": memory[:24].reshape(3, 8)}, ValueError, "out overlaps bias"),
        ({"table": PenaltyTable(2, xp)}, ValueError, "table has 2 rows, logits 3"),
        ({"table": PenaltyTable(3, xp), "decay": 2}, ValueError, "decay and table are both given"),
    ], {"logits": logits, "history": history}


@pytest.mark.parametrize("case", range(19))
def test_bad_arrays(case):
    cases, good = bad_arrays(np)
    arguments, error, message = cases[case]
    with pytest.raises(error, match=message):
        penalize(**good | arguments)


# --- kernel against reference -----------------------------------------------------------------------------------------


def random_call(random, dtype, vocab, length):
    """Everything that penalize takes, for three rows."""
    rows = 3
    logits = random.normal(0, 4, (rows, vocab)).astype(np.float32)
    logits[random.random(logits.shape) < 0.02] = random.choice([INF, -INF, NAN])
    history = np.stack([random_said(random, vocab, length) for _ in range(rows)])
    if length > 8:
        history[:, length // 2 :] = history[:, : length - length // 2]
    settings = [random_penalties(random) | random_dry(random) for _ in range(rows)]
    arguments = {name: np.array([row[name] for row in settings]) for name in settings[0]}
    if random.random() < 0.3:
        arguments = {name: value[0].item() for name, value in arguments.items()}
    if random.random() < 0.7:
        arguments["lengths"] = random.integers(-1, length + 2, rows).astype(np.int32)
    if random.random() < 0.5:
        arguments["dry_breakers"] = random.random(vocab) < 0.1
    kind = random.integers(5)
    if kind < 2:
        arguments["bias"] = random.normal(0, 1, (rows, vocab) if kind else vocab).astype(np.float32)
    elif kind < 4:
        arguments["bias_ids"] = random.integers(-1, vocab + 1, (rows, 50) if kind == 2 else 50).astype(np.int32)
        arguments["bias"] = random.normal(0, 1, arguments["bias_ids"].shape).astype(np.float32)
    if random.random() < 0.4:
        arguments["allowed"] = random.random([(vocab,), (1, vocab), (rows, vocab)][random.integers(3)]) < 0.7
    return logits.astype(dtype), history.astype(random.choice([np.int32, np.int64])), arguments


def on_device(cupy, arguments):
    arrays = ("lengths", "dry_breakers", "bias", "bias_ids", "allowed")
    return {name: cupy.asarray(value) if name in arrays else value for name, value in arguments.items()}


def same(result, expected):
    """The same dtype and bits, but for those of NaN."""
    result = result if isinstance(result, np.ndarray) else result.get()
    is_nan = np.isnan(expected.astype(np.float32))
    wrong = (result.view(f"u{result.itemsize}") != expected.view(f"u{result.itemsize}")) & ~is_nan
    return result.dtype == expected.dtype and not wrong.any() and np.all(np.isnan(result.astype(np.float32)[is_nan]))


def wrong_settings():
    return {
        "one token too few": {"sustain": lambda v: np.maximum(v - 1, 0)},
        "decays too fast": {"decay": lambda v: np.maximum(v - 1, 0)},
        "presence for each time": {"presence": lambda v: v * 0, "frequency": lambda v: v + 0.25},
        "penalised the other way": {"repetition": lambda v: 1 / v},
        "one token longer": {"dry_allowed_length": lambda v: v + 1},
        "range off by one": {"dry_range": lambda v: np.where(v > 0, v + 1, 0)},
        "longer matches": {"dry_max_ngram": lambda v: v + 1},
    }


@pytest.mark.parametrize("wrong", wrong_settings())
def test_the_kernel_test_bites(wrong):
    """The inputs of the kernel test tell each setting from its neighbours."""
    random = np.random.default_rng([1025, 4])
    differs = False
    for length in (0, 1, 2, 3, 100, 1023, 1025, 3000):
        logits, history, arguments = random_call(random, np.float32, 1025, length)
        changed = {name: change(arguments[name]) for name, change in wrong_settings()[wrong].items()}
        differs |= not same(penalize(logits, history, **arguments | changed), penalize(logits, history, **arguments))
    assert differs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1025, 32000])
def test_kernel_gives_the_same_bits(cupy, vocab, dtype):
    random = np.random.default_rng([vocab, dtype(0).itemsize])
    for length in (0, 1, 2, 3, 100, 1023, 1025, 3000):
        logits, history, arguments = random_call(random, dtype, vocab, length)
        out_dtype = random.choice([np.dtype(dtype), np.dtype(np.float32)])
        expected = penalize(logits, history, **arguments, out=np.empty(logits.shape, out_dtype))
        said, given = cupy.asarray(history), on_device(cupy, arguments)
        held = cupy.full((5, vocab), NAN, np.float32).astype(out_dtype) if out_dtype != FLOATS[2] else None
        out = cupy.empty(logits.shape, out_dtype) if held is None else held[1:4]
        assert penalize(cupy.asarray(logits), said, **given, out=out) is out
        assert same(out, expected), arguments
        if held is not None:
            assert np.all(np.isnan(held[[0, 4]].get()))
        in_place = cupy.asarray(logits)
        penalize(in_place, said, **given, out=in_place)
        assert same(in_place, penalize(logits, history, **arguments))
        assert np.array_equal(said.get(), history)


@pytest.mark.gpu
def test_kernel_on_a_very_long_history(cupy):
    """100,000 tokens: distinct ones, and one and the same."""
    random = np.random.default_rng(4)
    logits = random.normal(0, 4, (2, 50_000)).astype(np.float32)
    history = random.integers(0, 50_000, (2, 100_000))
    history[1] = 7
    settings = {"repetition": 1.1, "frequency": 0.001, "sustain": 60_000, "decay": 30_000, "dry_multiplier": 1.0}
    result = penalize(cupy.asarray(logits), cupy.asarray(history), **settings)
    assert np.array_equal(result.get(), penalize(logits, history, **settings))


@pytest.mark.gpu
def test_kernel_with_tables_workspace_and_graph(cupy):
    random = np.random.default_rng(5)
    logits, history, arguments = random_call(random, np.float32, 5000, 500)
    settings = {name: arguments.pop(name) for name in list(arguments) if name in PenaltyTable.specification}
    expected = penalize(logits, history, **settings, **arguments)
    size = penalize_workspace_size(3, 5000, 500, arguments["bias_ids"].shape[-1] if "bias_ids" in arguments else 0)
    workspace = cupy.full(size + 32, 0xA5, np.uint8)
    arrays = on_device(cupy, arguments) | {"table": PenaltyTable(3, cupy, **settings), "workspace": workspace[:size]}
    on_gpu, said, out = cupy.asarray(logits), cupy.asarray(history), cupy.empty(logits.shape, np.float32)
    penalize(on_gpu, said, **arrays, out=out)
    assert same(out, expected) and np.all(workspace[size:].get() == 0xA5)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        penalize(on_gpu, said, **arrays, out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
        assert same(out.get(stream=stream), expected)
    with pytest.raises(ValueError, match=r"workspace must have at least \d+ bytes, got 8: see penalize_workspace_size"):
        penalize(on_gpu, said, presence=1.0, workspace=cupy.empty(8, np.uint8))


@pytest.mark.gpu
def test_same_errors_on_the_gpu(cupy):
    for settings, error, message in BAD:
        with pytest.raises(error, match=message):
            penalize(cupy.zeros((3, 8), np.float32), cupy.zeros((3, 4), np.int32), **settings)
    cases, good = bad_arrays(cupy)
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            penalize(**good | arguments)
    with pytest.raises(TypeError, match="logits is a CuPy array, history is a NumPy array"):
        penalize(good["logits"], good["history"].get())
