"""Sampling: the reference against plain loops and exact probabilities, the kernel against the reference, id for id."""

import importlib
import math

import ml_dtypes
import numpy as np
import pytest

from cupyq.ops.sampling import (
    SamplerTable,
    kept_weights,
    philox4x32,
    philox_bits,
    philox_uniform,
    pick_parts,
    sample,
    sample_workspace_size,
    token_weights,
)

module = importlib.import_module("cupyq.ops.sampling")
FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
INF, NAN = np.inf, np.nan

# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The three vectors of Random123's kat_vectors for philox4x32 with 10 rounds."""
    result = philox4x32(counter, key)
    assert result.dtype == np.uint32 and tuple(map(int, result)) == words
    assert np.array_equal(philox4x32([counter] * 3, key), [words] * 3)


def plain_philox_bits(seed, step):
    words, keys = [step & 0xFFFFFFFF, step >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for i in range(10):
        k0, k1 = (keys[0] + i * 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + i * 0xBB67AE85) & 0xFFFFFFFF
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [b >> 32 ^ words[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ words[3] ^ k1, a & 0xFFFFFFFF]
    return words[1] << 32 | words[0]


def test_philox_bits_and_uniform():
    pairs = [(0, 0), (1, 0), (0, 1), (-1, 5), (2**64 - 1, 2**64 - 1), (-(2**63), 2**32), (0x123456789ABCDEF, 2**40 + 7)]
    for seed, step in pairs:
        expected = plain_philox_bits(seed % 2**64, step)
        assert int(philox_bits(seed, step)) == expected
        assert float(philox_uniform(seed, step)) == (expected >> 11) / 2**53
    seeds, steps = np.arange(3)[:, None], np.arange(5)
    assert np.array_equal(philox_bits(seeds, steps), [[plain_philox_bits(s, t) for t in range(5)] for s in range(3)])
    values = philox_uniform(7, np.arange(100_000))
    assert 0 <= values.min() and values.max() < 1
    assert abs(values.mean() - 0.5) < 4 / math.sqrt(12 * values.size)


# --- weights and filters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-30, 0.01, 0.7, 1.0, 3.0, 1e30])
def test_token_weights_are_exponentials(temperature):
    row = np.random.default_rng(0).normal(0, 6, 20_000).astype(np.float32)
    row[:4] = -INF, -3e38, 3e-39, -0.0
    weights = token_weights(row, np.float32(temperature))
    exponent = (row.astype(np.float64) - float(row.max())) / float(np.float32(temperature)) / math.log(2)
    exact = 2.0 ** (40 + exponent)
    assert weights.dtype == np.uint64 and weights.max() == 1 << 40
    positive = exponent > -40 + 1e-4
    assert np.all(weights[exponent < -40 - 1e-4] == 0) and np.all(weights[positive] > 0)
    assert np.all(np.abs(weights[positive] - exact[positive]) <= 4e-6 * exact[positive] + 1)


def test_weights_at_the_ends_of_the_range():
    row = np.float32([3e38, -3e38, NAN, -INF])  # the distance of the first two overflows float32
    row[np.isnan(row)] = -INF
    assert token_weights(row, np.float32(1)).tolist() == [1 << 40, 0, 0, 0]
    halves = token_weights(-np.arange(42, dtype=np.float32) * np.float32(math.log(2)), np.float32(1))
    exact = 2.0 ** np.arange(40, 0, -1)
    assert np.all(np.abs(halves[:40] - exact) <= 4e-6 * exact + 1) and halves[39] > 0 and halves[41] == 0


def plain_kept(row, temperature, top_k, top_p, min_p):
    """Ids kept by the published definitions in float64, and how near the closest decision was."""
    largest = max(row)
    probability = [math.exp((x - largest) / temperature) for x in row]
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if top_k > 0:
        order = order[:top_k]
    margin = 1.0
    if top_p < 1:
        total = math.fsum(probability[i] for i in order)
        for count in range(1, len(order) + 1):
            share = math.fsum(probability[i] for i in order[:count]) / total
            margin = min(margin, abs(share - top_p))
            if share >= top_p:
                break
        order = order[:count]
    for i in order:
        if probability[i] != min_p * probability[order[0]]:
            margin = min(margin, abs(probability[i] / probability[order[0]] - min_p) if min_p else 1.0)
    return {i for i in order if probability[i] >= min_p * probability[order[0]]}, margin


def test_filters_keep_what_plain_loops_keep():
    random = np.random.default_rng(1)
    decided = 0
    for _ in range(400):
        row = random.normal(0, random.choice([0.5, 2.0]), random.integers(1, 40)).astype(np.float32)
        if random.random() < 0.3:
            row = np.round(row)  # many ties
        temperature = np.float32(random.choice([0.5, 1.0, 2.0]))
        top_k, top_p = int(random.choice([0, 1, 3, 10, 40, 100])), np.float32(random.choice([1.0, 0.9, 0.5, 1e-6]))
        min_p = np.float32(random.choice([0.0, 0.05, 0.5, 1.0]))
        expected, margin = plain_kept(row.tolist(), float(temperature), top_k, float(top_p), float(min_p))
        if margin > 1e-5:
            decided += 1
            assert set(np.flatnonzero(kept_weights(row, temperature, top_k, top_p, min_p))) == expected
    assert decided > 380


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.7}, [1, 3]),  # 0.4 + 0.3 reaches 0.7 (0.7 in float32 is below): the crossing token is kept
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"top_k": 2, "top_p": 0.5}, [1]),  # 0.4 / 0.7 of what top-k left; of the whole it would be 0.4
        ({"min_p": 0.6}, [1, 3]),
        ({"min_p": 0.8, "top_k": 3}, [1]),
        ({"top_p": 0.71, "min_p": 0.5}, [0, 1, 3]),
        ({"temperature": 0.5, "top_p": 0.5}, [1]),  # 0.16 / 0.30 after the temperature, 0.4 before
    ],
)
def test_filters_by_hand(settings, kept):
    """Probabilities 0.2, 0.4, 0.1, 0.3, with the first nudged up so that min_p 0.5 is decided."""
    row = np.log(np.array([[0.20001, 0.4, 0.1, 0.3]])).astype(np.float32)
    if settings.get("top_p") == 0.7:
        row[0, 3] += 1e-3
    drawn = sample(np.repeat(row, 400, axis=0), seed=3, step=np.arange(400), **settings)
    assert sorted(set(drawn.tolist())) == kept


def test_ties_are_broken_by_lowest_id():
    row = np.float32([[1, 2, 2, 2, 1, 2, 1]])
    draws = np.repeat(row, 300, axis=0)
    for settings, kept in [({"top_k": 2}, [1, 2]), ({"top_k": 5}, [0, 1, 2, 3, 5]), ({"top_p": 0.3}, [1, 2])]:
        assert sorted(set(sample(draws, seed=np.arange(300), **settings).tolist())) == kept
    assert sample(row, temperature=0)[0] == sample(row, top_k=1)[0] == 1
    zeros = np.tile(np.float32([-0.0, 0.0, 0.0]), (300, 1))
    assert set(sample(zeros, top_k=2, seed=np.arange(300)).tolist()) == {0, 1}
    assert sample(zeros[:1], temperature=0)[0] == 0


def test_draw_is_the_inverse_of_the_cumulative_weights():
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, (200, 33)).astype(np.float32)
    seeds, steps = random.integers(-(2**63), 2**63, 200), random.integers(0, 2**40, 200)
    drawn = sample(logits, top_k=9, seed=seeds, step=steps)
    for row, seed, step, result in zip(logits, seeds, steps, drawn, strict=True):
        weights = [int(w) for w in kept_weights(row, np.float32(1), 9, np.float32(1), np.float32(0))]
        target, id = plain_philox_bits(int(seed) % 2**64, int(step)) * sum(weights) >> 64, 0
        while target >= sum(weights[: id + 1]):
            id += 1
        assert result == id


# --- statistics -------------------------------------------------------------------------------------------------------


def chi_square_excess(drawn, probability):
    """Pearson's statistic over the limit that a true null passes in 999 of 1000 cases (Wilson-Hilferty)."""
    observed, expected = np.bincount(drawn, minlength=probability.size), drawn.size * probability
    if observed[probability == 0].any():
        return INF
    used = expected > 0
    freedom = np.count_nonzero(used) - 1
    statistic = np.sum((observed[used] - expected[used]) ** 2 / expected[used])
    return statistic / (freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3)


STATISTICS = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}


def exact_probability(row, temperature, top_k, top_p, min_p):
    kept, margin = plain_kept(row.tolist(), temperature, top_k, top_p, min_p)
    assert margin > 1e-4 and len(kept) > 3
    weights = np.array([math.exp(x / temperature) if i in kept else 0.0 for i, x in enumerate(row.tolist())])
    return weights / weights.sum()


def statistics_row():
    return np.random.default_rng(3).normal(0, 0.8, 33).astype(np.float32)


@pytest.mark.parametrize("what", ["seed", "step"])
def test_draws_follow_the_probabilities(what):
    row = statistics_row()
    drawn = sample(np.tile(row, (6000, 1)), **STATISTICS, **{what: np.arange(6000)})
    assert chi_square_excess(drawn, exact_probability(row, **STATISTICS)) < 1
    for wrong in ({"temperature": 0.9}, {"top_k": 0, "top_p": 0.99}, {"min_p": 0.1}):  # the test can fail
        assert chi_square_excess(drawn, exact_probability(row, **STATISTICS | wrong)) > 1


def test_rows_do_not_depend_on_their_batch():
    random = np.random.default_rng(4)
    logits = random.normal(0, 2, (40, 129)).astype(np.float32)
    settings = {
        "temperature": random.choice([0.0, 0.5, 1.0], 40),
        "top_k": random.choice([0, 1, 20], 40),
        "top_p": random.choice([1.0, 0.8], 40),
        "min_p": random.choice([0.0, 0.1], 40),
        "seed": random.integers(0, 2**63, 40),
        "step": random.integers(0, 1000, 40),
    }
    whole = sample(logits, **settings)
    alone = [sample(logits[r : r + 1], **{n: v[r].item() for n, v in settings.items()})[0] for r in range(40)]
    order = random.permutation(40)
    shuffled = sample(np.ascontiguousarray(logits[order]), **{n: v[order] for n, v in settings.items()})
    assert np.array_equal(whole, alone) and np.array_equal(whole[order], shuffled)


def test_seed_and_step_matter():
    logits = np.zeros((100, 1000), np.float32)
    results = [sample(logits, seed=a, step=b) for a, b in [(0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32), (-1, 0)]]
    for i, one in enumerate(results):
        assert np.all(one == one[0])  # one seed and step: one random number
        assert all(one[0] != other[0] for other in results[:i])
    assert len(set(sample(logits, seed=np.arange(100)).tolist())) > 80
    assert np.array_equal(sample(logits, seed=-1), sample(logits, seed=2**64 - 1))


# --- edges ------------------------------------------------------------------------------------------------------------

EDGES = [
    ([5.0], {"top_k": 1, "top_p": 1e-30, "min_p": 1.0}, {0}),
    ([1.0, 3.0, 2.0], {"top_k": 1}, {1}),
    ([1.0, 3.0, 2.0], {"top_k": 10**12, "top_p": 1e-30}, {1}),
    ([1.0, 3.0, 2.0], {"top_p": 5e-324}, {1}),
    ([1.0, 3.0, 3.0], {"min_p": 1.0}, {1, 2}),
    ([1.0, 1.0, 1.0], {"temperature": 1e-45}, {0, 1, 2}),
    ([1.0, 1.5, 1.0], {"temperature": 1e-45}, {1}),
    ([1.0, 1.5, 1.0], {"temperature": 1e-46}, {1}),
    ([-3e38, 3e38, -3e38], {"temperature": 3e38}, {1}),  # the distance is beyond float32: infinite
    ([0.0, -0.0, -1e-45], {}, {0, 1, 2}),
    ([-INF, 2.0, -INF, 2.0], {}, {1, 3}),
    ([NAN, 2.0, NAN, 2.0], {"top_k": 3}, {1, 3}),
    ([NAN, 2.0, INF, INF], {}, {2}),
    ([NAN, 2.0, INF, INF], {"temperature": 0.0}, {2}),
    ([NAN, -INF, NAN], {}, {-1}),
    ([NAN, -INF, NAN], {"temperature": 0.0}, {-1}),
    ([-INF, -INF], {"top_k": 1, "top_p": 0.5}, {-1}),
    ([-1e30, -1e30, -INF], {"top_p": 0.9}, {0, 1}),
    ([], {}, {-1}),
]


@pytest.mark.parametrize(("row", "settings", "kept"), EDGES)
def test_edges(row, settings, kept):
    with np.errstate(all="raise"):
        drawn = sample(np.tile(np.float32(row), (200, 1)), seed=np.arange(200), **settings)
    assert set(drawn.tolist()) == kept


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_are_widened_exactly(dtype):
    logits = np.random.default_rng(5).normal(0, 3, (50, 257)).astype(dtype)
    settings = {"top_k": 40, "top_p": 0.9, "seed": np.arange(50)}
    assert np.array_equal(sample(logits, **settings), sample(logits.astype(np.float32), **settings))


def test_out_and_empty():
    logits = np.random.default_rng(6).normal(0, 3, (5, 17)).astype(np.float32)
    out = np.full(7, -7, np.int32)
    result = sample(logits, seed=1, out=out[1:6])
    assert np.shares_memory(result, out) and out[0] == out[6] == -7
    assert result.dtype == np.int32 and np.array_equal(result, sample(logits, seed=1))
    assert sample(np.empty((0, 17), np.float32), seed=np.empty(0, np.int64)).shape == (0,)


BAD = [
    ({"temperature": -0.5}, ValueError, "temperature must be finite"),
    ({"temperature": NAN}, ValueError, "temperature"),
    ({"temperature": [1, 1, INF]}, ValueError, "temperature must be finite in float32, >= 0, got inf"),
    ({"temperature": 1e39}, ValueError, "temperature"),
    ({"temperature": "hot"}, TypeError, "temperature must be a real number"),
    ({"temperature": [1.0, 1.0]}, ValueError, r"temperature must be one number or have shape \(3,\)"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
    ({"top_k": [4, -2, 4]}, ValueError, "top_k must be at least 0, got -2"),
    ({"top_k": 2.5}, TypeError, "top_k must be an integer"),
    ({"top_k": np.ones(3)}, TypeError, "top_k must be an integer"),
    ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.01}, ValueError, "top_p"),
    ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1"),
    ({"min_p": 1.01}, ValueError, "min_p"),
    ({"seed": 2**64}, ValueError, "seed must be below"),
    ({"seed": -(2**63) - 1}, ValueError, "seed must be at least"),
    ({"seed": 1.0}, TypeError, "seed must be an integer"),
    ({"seed": np.ones((3, 1), int)}, ValueError, "seed must be one number or have shape"),
    ({"step": -1}, ValueError, "step must be at least 0"),
    ({"step": None}, TypeError, "step must be an integer"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        sample(np.zeros((3, 8), np.float32), **settings)


def bad_arrays(xp):
    good = xp.zeros((3, 8), np.float32)
    both = xp.zeros(24, np.float32)
    return [
        ({"logits": good.astype(np.float64)}, TypeError, "logits must have dtype"),
        ({"logits": good[0]}, ValueError, "logits must have 2 dimensions"),
        ({"logits": good[:, ::2]}, ValueError, "logits must be C-contiguous"),
        ({"logits": xp.zeros((1, 2**23 + 1), np.float16)}, ValueError, "logits must have at most 8388608 columns"),
        ({"logits": good, "out": xp.zeros(3, np.int64)}, TypeError, "out must have dtype int32"),
        ({"logits": good, "out": xp.zeros(4, np.int32)}, ValueError, "out must have shape"),
        ({"logits": both.reshape(3, 8), "out": both.view(np.int32)[:3]}, ValueError, "out overlaps logits"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_bad_arrays(case):
    arguments, error, message = bad_arrays(np)[case]
    with pytest.raises(error, match=message):
        sample(**arguments)


# --- kernel against reference -----------------------------------------------------------------------------------------


def batch(vocab, dtype, copies=2):
    """Logits and settings that reach every branch: spreads, ties, missing and infinite values, filters on and off."""
    random = np.random.default_rng(vocab)
    kinds, filters = 10, 8
    rows = kinds * filters * copies
    logits = random.normal(0, 3, (rows, vocab)).astype(np.float32)
    kind = np.arange(rows) % kinds
    logits[kind == 1] *= 0.01
    logits[kind == 2] = 1.25
    logits[kind == 3] = np.round(logits[kind == 3])
    few = random.random((rows, vocab)) < 0.5
    logits[(kind == 4)[:, None] & few] = -INF
    logits[(kind == 5)[:, None] & few] = NAN
    logits[kind == 6, vocab // 2] = INF
    logits[kind == 7] = np.where(few[kind == 7], NAN, -INF)
    logits[kind == 8] = np.where(few[kind == 8], -1e30, logits[kind == 8] * 10)
    which = np.arange(rows) // kinds % filters
    settings = {
        "temperature": np.where(which == 0, 0.0, random.choice([0.05, 0.7, 1.0, 1.5, 50.0], rows)),
        "top_k": np.where(np.isin(which, (2, 5, 6)), random.choice([1, 2, 20, 50, vocab // 2 + 1, vocab + 1], rows), 0),
        "top_p": np.where(np.isin(which, (3, 5, 6)), random.choice([1e-6, 0.3, 0.8, 0.95, 0.9999], rows), 1.0),
        "min_p": np.where(np.isin(which, (4, 6)), random.choice([0.01, 0.1, 1.0], rows), 0.0),
        "seed": random.integers(-(2**63), 2**63, rows),
        "step": random.integers(0, 2**40, rows),
    }
    with np.errstate(over="ignore"):
        return logits.astype(dtype), settings


def mutated(logits, settings, mutation):
    """Ids drawn by a wrong definition."""
    logits, settings = logits.astype(np.float32), dict(settings)
    rows, vocab = logits.shape
    if mutation == "ties by highest id":
        ids = mutated(np.ascontiguousarray(logits[:, ::-1]), settings, "")
        return np.where(ids < 0, -1, vocab - 1 - ids)
    if mutation == "top-k off by one":
        settings["top_k"] = np.where(settings["top_k"] > 1, settings["top_k"] - 1, settings["top_k"])
    elif mutation == "top-p slightly wrong":
        settings["top_p"] = np.where(settings["top_p"] < 1, settings["top_p"] * 0.99, 1.0)
    elif mutation == "no min-p":
        settings["min_p"] = 0.0
    elif mutation == "temperature last":
        settings["temperature"] = np.where(settings["temperature"] > 0, 1.0, 0.0)
    elif mutation == "NaN is zero":
        logits = np.nan_to_num(logits, nan=0.0, posinf=INF, neginf=-INF)
    elif mutation == "low half of the seed":
        settings["seed"] = settings["seed"] & 0xFFFFFFFF
    elif mutation == "low half of the step":
        settings["step"] = settings["step"] & 0xFFFFFFFF
    return sample(logits, **settings)


@pytest.mark.parametrize(
    "mutation",
    [
        "ties by highest id",
        "top-k off by one",
        "top-p slightly wrong",
        "no min-p",
        "temperature last",
        "NaN is zero",
        "low half of the seed",
        "low half of the step",
    ],
)
def test_the_kernel_test_bites(mutation):
    """The inputs of the kernel test tell the definition from its neighbours."""
    logits, settings = batch(129, np.float32)
    assert np.any(mutated(logits, settings, mutation) != sample(logits, **settings))


def between_sentinels(cupy, rows):
    held = cupy.full(rows + 64, -7, np.int32)
    return held, held[32 : rows + 32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 33, 127, 128, 129, 1024, 4095, 4096, 4097, 32000, 128256])
def test_kernel_draws_the_same_ids(cupy, vocab, dtype):
    logits, settings = batch(vocab, dtype, copies=2 if vocab < 10_000 else 1)
    expected = sample(logits, **settings)
    on_gpu = cupy.asarray(logits)
    held, out = between_sentinels(cupy, len(logits))
    assert sample(on_gpu, **settings, out=out) is out
    assert np.array_equal(out.get(), expected)
    assert np.all(held[:32].get() == -7) and np.all(held[-32:].get() == -7)
    again = sample(on_gpu, **settings)
    assert again.dtype == np.int32 and np.array_equal(again.get(), expected)
    assert np.array_equal(on_gpu.get().view(np.uint8), logits.view(np.uint8))


def test_parts_fill_the_gpu_and_no_more():
    assert [pick_parts(rows, 128256, 132) for rows in (1, 2, 32, 67, 500)] == [62, 62, 4, 1, 0]
    assert [pick_parts(1, vocab, 132) for vocab in (100, 4095, 4096, 1 << 23)] == [0, 1, 2, 128]
    for vocab in (4096, 5000, 5380, 5381, 128256):  # where rows are split there is room for what the parts say
        assert sample_workspace_size(3, vocab) >= 3 * module._ROW_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [2, 3, 40, 128])
@pytest.mark.parametrize(("vocab", "dtype"), [(4096, np.float32), (5003, FLOATS[2]), (32000, np.float16), (70_002, np.float32)])
def test_many_blocks_draw_the_same_ids(cupy, monkeypatch, vocab, dtype, parts):
    """Rows spread over so many blocks, some of them without tokens; nothing beyond the workspace is written."""
    monkeypatch.setattr(module, "pick_parts", lambda rows, vocab, sm_count: parts)
    logits, settings = batch(vocab, dtype, copies=1)
    if vocab > 5003:  # every kind of row is left
        logits, settings = logits[::3].copy(), {name: value[::3].copy() for name, value in settings.items()}
    expected = sample(logits, **settings)
    size = sample_workspace_size(*logits.shape)
    workspace = cupy.full(size + 32, 0xA5, np.uint8)
    held, out = between_sentinels(cupy, len(logits))
    for _ in range(2):  # whatever the workspace holds
        out.fill(-9)
        assert sample(cupy.asarray(logits), **settings, out=out, workspace=workspace[:size]) is out
        assert np.array_equal(out.get(), expected)
    assert np.all(held[:32].get() == -7) and np.all(held[-32:].get() == -7) and np.all(workspace[size:].get() == 0xA5)


@pytest.mark.gpu
def test_many_blocks_for_numbers_and_tables(cupy):
    """With numbers the host may leave launches out; settings of each kind alone, and rows that keep too many to be listed."""
    logits = np.random.default_rng(3).normal(0, 2, (2, 20_000)).astype(np.float32)
    logits[1] = np.round(logits[1])
    on_gpu, workspace = cupy.asarray(logits), cupy.empty(sample_workspace_size(2, 20_000), np.uint8)
    assert pick_parts(2, 20_000, 16) > 1
    for settings in (
        {"temperature": 0.0},
        {"top_k": 1},
        {},
        {"temperature": 0.7, "min_p": 0.05},
        {"temperature": 30.0},
        {"top_k": 40},
        {"top_k": 5000, "temperature": 3.0},
        {"top_p": 0.8},
        {"top_p": 0.99, "temperature": 9.0},
        {"top_k": 60, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    ):
        table = SamplerTable(2, cupy, **settings, seed=[5, 6])
        for step in range(4):
            expected = sample(logits, **settings, seed=[5, 6], step=step)
            assert np.array_equal(sample(on_gpu, **settings, seed=[5, 6], step=step, workspace=workspace).get(), expected)
            steps = cupy.full(2, step, np.int64)
            assert np.array_equal(sample(on_gpu, table=table, step=steps, workspace=workspace).get(), expected)


@pytest.mark.gpu
def test_kernel_on_a_million_tokens_and_on_many_rows(cupy):
    for vocab, rows, repeats in [(2**20 + 3, 2, 1), (2**20, 2, 1), (5, 1000, 100)]:
        random = np.random.default_rng(vocab)
        logits = random.normal(0, 4, (rows, vocab)).astype(np.float32)
        settings = {"top_k": random.choice([0, 3, 1000], rows), "seed": np.arange(rows)}
        drawn = sample(
            cupy.asarray(np.tile(logits, (repeats, 1))),
            top_p=0.95,
            **{name: np.tile(values, repeats) for name, values in settings.items()},
        )
        assert np.array_equal(drawn.get(), np.tile(sample(logits, top_p=0.95, **settings), repeats))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernel_on_unaligned_views(cupy, dtype):
    logits, settings = batch(1024, dtype, copies=1)
    expected = sample(logits, **settings)
    for shift in (1, 2, 3):
        memory = cupy.empty(logits.size + shift, logits.dtype)
        view = memory[shift:].reshape(logits.shape)
        view.set(logits)
        assert np.array_equal(sample(view, **settings).get(), expected)


@pytest.mark.gpu
def test_kernel_takes_settings_in_every_form(cupy):
    logits, settings = batch(1000, np.float32)
    on_gpu = cupy.asarray(logits)
    dtypes = dict.fromkeys(settings, np.float32) | {"top_k": np.int32, "seed": np.int64, "step": np.uint64}
    arrays = {name: cupy.asarray(value.astype(dtypes[name])) for name, value in settings.items()}
    assert np.array_equal(sample(on_gpu, **arrays).get(), sample(logits, **settings))
    for r in range(0, 160, 7):
        numbers = {name: value[r].item() for name, value in settings.items()}
        mixed = settings | {"top_p": numbers["top_p"], "seed": numbers["seed"]}
        assert np.array_equal(sample(on_gpu, **numbers).get(), sample(logits, **numbers))
        assert np.array_equal(sample(on_gpu, **mixed).get(), sample(logits, **mixed))


@pytest.mark.gpu
@pytest.mark.parametrize(("row", "settings", "kept"), EDGES)
def test_kernel_edges(cupy, row, settings, kept):
    drawn = sample(cupy.asarray(np.tile(np.float32(row), (200, 1))), seed=np.arange(200), **settings)
    assert set(drawn.get().tolist()) == kept


@pytest.mark.gpu
def test_kernel_draws_follow_the_probabilities(cupy):
    row = statistics_row()
    drawn = sample(cupy.asarray(np.tile(row, (200_000, 1))), **STATISTICS, seed=np.arange(200_000)).get()
    assert chi_square_excess(drawn, exact_probability(row, **STATISTICS)) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("has_workspace", [False, True])
def test_kernel_in_a_graph(cupy, has_workspace):
    """With out and settings on the device nothing is allocated and the host never waits: a graph can hold the op.

    Steps in an array make each replay draw anew, as a call with that step would.
    """
    logits = np.random.default_rng(8).normal(0, 2, (6, 5000)).astype(np.float32)
    on_gpu, steps, out = cupy.asarray(logits), cupy.zeros(6, np.int64), cupy.empty(6, np.int32)
    given = {"workspace": cupy.empty(sample_workspace_size(6, 5000), np.uint8)} if has_workspace else {}
    sample(on_gpu, top_k=50, top_p=0.9, step=steps, out=out, **given)  # compiles and loads before the capture
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        sample(on_gpu, top_k=50, top_p=0.9, step=steps, out=out, **given)
        graph = stream.end_capture()
        for step in range(3):
            steps.fill(step)
            graph.launch(stream)
            stream.synchronize()
            assert np.array_equal(out.get(stream=stream), sample(logits, top_k=50, top_p=0.9, step=step))


@pytest.mark.gpu
def test_same_errors_on_the_gpu(cupy):
    for settings, error, message in BAD:
        with pytest.raises(error, match=message):
            sample(cupy.zeros((3, 8), np.float32), **settings)
    for arguments, error, message in bad_arrays(cupy):
        with pytest.raises(error, match=message):
            sample(**arguments)
    logits = cupy.zeros((3, 8), np.float32)
    for name, wrong, error in [
        ("temperature", cupy.ones(3, np.float64), TypeError),
        ("top_k", cupy.ones(3, np.int64), TypeError),
        ("seed", cupy.ones(3, np.int32), TypeError),
        ("top_p", cupy.ones(4, np.float32), ValueError),
        ("min_p", cupy.ones(6, np.float32)[::2], ValueError),
    ]:
        with pytest.raises(error, match=name):
            sample(logits, **{name: wrong})
        with pytest.raises(TypeError, match=f"{name} is a CuPy array"):
            sample(logits.get(), **{name: wrong})
