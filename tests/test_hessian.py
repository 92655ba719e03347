"""Hessians against plain sums, their factors against regressions, corrected weights against the normal equations."""

import math

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import host

from cupyq.quantize.hessian import Hessian, Prepared, prepare_rounding


def random_inputs(tokens, k, seed=0):
    """float32 [tokens, k] with correlated features of very different sizes."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((tokens, k)) @ (np.eye(k) + 0.3 * generator.standard_normal((k, k)))
    return (mixed * np.exp(generator.standard_normal(k))).astype(np.float32)


def gathered(*inputs, name="", xp=np):
    hessian = Hessian(inputs[0].shape[-1], xp, name=name)
    for x in inputs:
        hessian.add(x)
    return hessian


def damped(x, prepared):
    """H + ridge in the order of `prepared`, float64."""
    x = x.astype(np.float64)
    h = x.T @ x / len(x)
    return h[np.ix_(prepared.order, prepared.order)] + np.diag(host(prepared.ridge))


def is_product_of(factor, weights, matrix, tolerance=2e-6):
    """Whether matrix = (I + factor) diag(weights) (I + factor)^T, each entry measured by its two diagonal ones."""
    unit = np.eye(len(matrix)) + host(factor).astype(np.float64)
    size = np.sqrt(np.outer(matrix.diagonal(), matrix.diagonal()))
    return bool((np.abs(unit * host(weights).astype(np.float64) @ unit.T - matrix) <= tolerance * size).all())


def is_factored(x, prepared):
    return is_product_of(prepared.factor, prepared.weights, damped(x, prepared))


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_sum_against_a_plain_one(dtype):
    batches = [random_inputs(tokens, 5, seed).astype(dtype) for seed, tokens in enumerate((7, 1, 0, 20))]
    hessian = gathered(*batches)
    assert hessian.tokens == 28 and hessian.sum.dtype == np.float64 and hessian.cross is None
    rows = np.concatenate([batch.astype(np.float64) for batch in batches]).tolist()
    for i in range(5):
        assert hessian.diagonal[i] == pytest.approx(math.fsum(row[i] ** 2 for row in rows) / 28, rel=1e-6)
        for j in range(5):
            terms = [row[i] * row[j] for row in rows]
            assert abs(hessian.sum[i, j] - math.fsum(terms)) <= 1e-6 * math.fsum(map(abs, terms))


def test_long_inputs_are_summed_in_float64():
    """In float32 the sum would stop growing at 2^24."""
    hessian = gathered(np.full((1, 1), 4096, np.float32), *[np.ones((1, 1), np.float32)] * 1000)
    assert hessian.sum[0, 0] == 2**24 + 1000
    assert gathered(np.full((10_000, 1), 64, np.float32)).sum[0, 0] == 10_000 * 2**12


def test_every_leading_dimension_counts_tokens():
    x = random_inputs(12, 4)
    hessian = gathered(x.reshape(2, 6, 4))
    assert hessian.tokens == 12 and np.array_equal(hessian.sum, gathered(x).sum)


# --- the factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "k"), [(400, 96), (300, 33), (9, 1), (700, 300)])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_factors_give_the_hessian_back(tokens, k, act_order):
    x = random_inputs(tokens, k)
    prepared = gathered(x).prepare(0.01, act_order=act_order)
    assert prepared.k == k and prepared.damping == 0.01
    assert prepared.order.dtype == np.int64 and prepared.factor.dtype == prepared.weights.dtype == np.float32
    assert prepared.factor.flags.c_contiguous and not np.tril(prepared.factor).any()
    assert (prepared.weights > 0).all()
    mean_square = np.square(x.astype(np.float64)).mean(axis=0)
    assert np.allclose(prepared.ridge, 0.01 * mean_square.mean(), rtol=1e-6)
    ordered = mean_square[prepared.order]
    assert (np.diff(ordered) <= 0).all() if act_order else (prepared.order == np.arange(k)).all()
    assert is_factored(x, prepared)


def test_wrong_factors_are_rejected():
    x = random_inputs(400, 40)
    prepared = gathered(x).prepare()
    assert is_factored(x, prepared)
    matrix = damped(x, prepared)
    nudged = prepared.factor.copy()
    nudged[3, 30] *= 1.001
    for factor, weights in (
        (prepared.factor.T, prepared.weights),
        (-prepared.factor, prepared.weights),
        (nudged, prepared.weights),
        (prepared.factor, np.sqrt(prepared.weights)),
        (np.linalg.cholesky(matrix), prepared.weights),
    ):
        assert not is_product_of(factor, weights, matrix)
    assert not is_product_of(prepared.factor, prepared.weights, matrix - np.diag(prepared.ridge))


def test_the_factors_are_regressions():
    """D_k: what is left of feature k once all features after it have explained it; A[j, k]: what feature j gains from that."""
    k = 24
    x = random_inputs(200, k)
    prepared = gathered(x).prepare(0.05)
    matrix = damped(x, prepared)
    for column in range(k):
        later = slice(column + 1, k)
        coefficients = np.linalg.solve(matrix[later, later], matrix[later, column])
        left = matrix[column, column] - matrix[column, later] @ coefficients
        assert prepared.weights[column] == pytest.approx(left, rel=1e-4)
        gain = (matrix[:column, column] - matrix[:column, later] @ coefficients) / left
        size = np.sqrt(matrix.diagonal()[:column] / left)
        assert (np.abs(prepared.factor[:column, column] - gain) <= 1e-5 * size).all()


def test_equal_features_keep_their_order():
    x = np.ones((10, 6), np.float32) * np.array([1, 2, 1, 2, 0, 1], np.float32)
    assert gathered(x).prepare().order.tolist() == [1, 3, 0, 2, 5, 4]


def test_dead_features():
    x = random_inputs(200, 32)
    x[:, [3, 17]] = 0
    prepared = gathered(x).prepare()
    assert set(prepared.order[-2:].tolist()) == {3, 17} and is_factored(x, prepared)
    assert not prepared.factor[-2:].any() and not prepared.factor[:, -2:].any()
    assert np.allclose(prepared.weights[-2:], prepared.ridge[-2:])
    undamped = gathered(x).prepare(0.0)
    assert undamped.damping == 0 and undamped.weights[-2:].tolist() == [1, 1] and undamped.ridge[-2:].tolist() == [1, 1]
    assert not undamped.ridge[:-2].any() and is_factored(x, undamped)


def test_one_token():
    x = random_inputs(1, 64)
    prepared = gathered(x).prepare()
    assert prepared.damping == 0.01 and is_factored(x, prepared)


def test_no_tokens_give_the_identity():
    """As for an expert that no token chose."""
    for hessian in (Hessian(32), gathered(np.empty((0, 32), np.float32)), gathered(np.zeros((5, 32), np.float32))):
        prepared = hessian.prepare()
        assert prepared.order.tolist() == list(range(32))
        assert not prepared.factor.any() and (prepared.weights == 1).all() and (prepared.ridge == 1).all()


def test_a_singular_hessian_is_damped_until_it_can_be_factored():
    x = np.repeat(random_inputs(300, 16), 2, axis=1)
    prepared = gathered(x).prepare(0.0)
    assert 1e-6 <= prepared.damping <= 1e-3 and (prepared.ridge > 0).all() and is_factored(x, prepared)


def test_a_hessian_that_cannot_be_factored_is_named():
    hessian = gathered(random_inputs(100, 8), name="model.layers.3.mlp.down_proj")
    hessian.sum[0, 1] = hessian.sum[1, 0] = 1e12
    with pytest.raises(ValueError, match=r"Hessian of model\.layers\.3\.mlp\.down_proj: not positive definite.*damping 1000;"):
        hessian.prepare(0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_named(value):
    x = random_inputs(50, 8)
    x[20, 5] = value
    with np.errstate(invalid="ignore"):
        hessian = gathered(x, name="lm_head")
    with pytest.raises(ValueError, match="inputs of lm_head: feature 5 is NaN or infinite"):
        hessian.prepare()


def test_the_matrix_itself_is_kept_when_asked_for():
    x = random_inputs(200, 40)
    x[:, 6] = 0
    hessian = gathered(x)
    assert hessian.prepare().matrix is None
    for act_order in (True, False):
        prepared = hessian.prepare(0.05, act_order=act_order, keeps_matrix=True)
        ordered = x.astype(np.float64)[:, prepared.order]
        expected = ordered.T @ ordered / 200
        size = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
        assert prepared.matrix.dtype == np.float32 and prepared.matrix.flags.c_contiguous
        assert (np.abs(prepared.matrix - expected) <= 1e-6 * size).all()  # without the damping
        assert is_factored(x, prepared)


# --- weights of tokens ------------------------------------------------------------------------------------------------


def random_weights(tokens, seed=11):
    return np.exp(np.random.default_rng(seed).standard_normal(tokens)).astype(np.float32)


def test_weights_of_one_change_nothing():
    x, original, weight = drifted(300, 48, 20)
    gap = np.random.default_rng(1).standard_normal((300, 20)).astype(np.float32)
    plain, weighted = Hessian(48), Hessian(48)
    plain.add(x, original, gap=gap)
    weighted.add(x, original, gap=gap, weights=np.ones(300, np.float32))
    assert plain.tokens == weighted.tokens == plain.total == weighted.total == 300
    for name in ("sum", "cross", "gap"):
        assert getattr(plain, name).tobytes() == getattr(weighted, name).tobytes()
    first, second = (hessian.prepare(keeps_matrix=True) for hessian in (plain, weighted))
    for name in ("factor", "weights", "ridge", "cross", "gap", "matrix"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    assert first.corrected(weight).tobytes() == second.corrected(weight).tobytes()
    assert first.matrix.tobytes() == gathered(x).prepare(keeps_matrix=True).matrix.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_weighted_sums_against_plain_ones(dtype):
    """A token of weight 3 counts as three of weight 1."""
    numbers = np.random.default_rng(2)
    x, original = (random_inputs(30, 6, seed).astype(dtype) for seed in (0, 1))
    gap, counts = numbers.standard_normal((30, 4)).astype(np.float32), numbers.integers(0, 4, 30)
    hessian = Hessian(6)
    for part in (slice(0, 11), slice(11, 30)):
        shaped = {"weights": counts[part].astype(np.float32)[None], "gap": gap[part][None]}
        hessian.add(x[part][None], original[part][None], **shaped)
    assert hessian.tokens == 30 and hessian.total == pytest.approx(counts.sum(), rel=1e-6)
    again = [np.repeat(array.astype(np.float64), counts, axis=0) for array in (x, original, gap)]
    sums = again[0].T @ again[0], again[0].T @ (again[1] - again[0]), again[0].T @ again[2]
    for found, expected in zip((hessian.sum, hessian.cross, hessian.gap), sums, strict=True):
        assert found.dtype == np.float64 and np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.array_equal(hessian.sum, hessian.sum.T)
    assert np.allclose(hessian.diagonal, np.square(again[0]).mean(axis=0), rtol=1e-6)
    plain = Hessian(6)
    plain.add(x)
    assert np.abs(plain.sum - sums[0]).max() > 1e-3 * np.abs(sums[0]).max()


def test_weights_only_count_by_their_ratio():
    x, original, weight = drifted(200, 32, 8)
    gap, weights = np.ones((200, 8), np.float32), random_weights(200)
    found = []
    for factor in (1, 4):  # exact
        hessian = Hessian(32)
        hessian.add(x, original, weights=weights * np.float32(factor), gap=gap)
        prepared = hessian.prepare(keeps_matrix=True)
        found.append((prepared.matrix.tobytes(), prepared.ridge.tobytes(), prepared.corrected(weight).tobytes()))
    assert found[0] == found[1]


def test_tokens_that_count_for_nothing():
    hessian = Hessian(32)
    hessian.add(random_inputs(5, 32), weights=np.zeros(5, np.float32))
    assert (hessian.prepare().weights == 1).all() and not hessian.diagonal.any()


def test_rounding_needs_the_diagonal_only():
    x = random_inputs(60, 12)
    x[:, 4] = 0
    prepared = prepare_rounding(gathered(x).diagonal, 0.1)
    square = np.square(x.astype(np.float64)).mean(axis=0)
    assert prepared.order.tolist() == sorted(range(12), key=lambda i: -square[i]) and prepared.factor is None
    assert np.allclose(prepared.weights, square[prepared.order] + 0.1 * square.mean(), rtol=1e-6)
    assert (prepare_rounding(np.zeros(4)).weights == 1).all()


def test_wrong_arguments():
    hessian = Hessian(8, name="q")
    x = random_inputs(4, 8)
    with pytest.raises(ValueError, match=r"x of q: shape \(4, 7\), expected 8 features"):
        hessian.add(x[:, :7])
    with pytest.raises(TypeError, match="x of q: dtype float64, expected float16, bfloat16 or float32"):
        hessian.add(x.astype(np.float64))
    with pytest.raises(TypeError, match="x must be a NumPy or CuPy array"):
        hessian.add([1.0] * 8)
    with pytest.raises(ValueError, match="original of q: 3 tokens, expected 4"):
        hessian.add(x, x[:3])
    hessian.add(x)
    for more in ({"original": x}, {"weights": np.ones(4, np.float32)}, {"original": x, "gap": x}):
        with pytest.raises(ValueError, match="original, weights, gap of q: pass each with every call"):
            hessian.add(x, **more)
    hessian = Hessian(8, name="q")
    with pytest.raises(ValueError, match="gap of q: pass original too"):
        hessian.add(x, gap=x)
    with pytest.raises(ValueError, match="weights of q: 3 tokens, expected 4"):
        hessian.add(x, weights=np.ones(3, np.float32))
    with pytest.raises(TypeError, match="weights of q: dtype float64|weights of q: dtype float16"):
        hessian.add(x, weights=np.ones(4, np.float16))
    with pytest.raises(ValueError, match="gap of q: 5 tokens, expected 4"):
        hessian.add(x, x, gap=np.ones((5, 3), np.float32))
    assert hessian.tokens == 0 and not hessian.sum.any()
    hessian.add(x, x, gap=np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match="gap of q: 2 features, expected 3 as before"):
        hessian.add(x, x, gap=np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"weight: shape \(8, 5\), expected \(8, 3\)"):
        hessian.prepare().corrected(np.ones((8, 5), np.float32))
    for damping in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="damping must be a number of at least 0"):
            hessian.prepare(damping)


# --- corrected weights ------------------------------------------------------------------------------------------------


def drifted(tokens, k, n, seed=3):
    """(inputs of a quantized model, those of the original, weight)."""
    generator = np.random.default_rng(seed)
    original = random_inputs(tokens, k, seed)
    noise = 0.2 * generator.standard_normal((tokens, k)) @ generator.standard_normal((k, k)) / np.sqrt(k)
    x = (original * (1 + 0.1 * generator.standard_normal(k)) + noise).astype(np.float32)
    return x, original, generator.standard_normal((k, n)).astype(np.float32)


def with_originals(x, original, xp=np):
    hessian = Hessian(x.shape[1], xp)
    half = len(x) // 2
    hessian.add(x[:half], original[:half])
    hessian.add(x[half:], original[half:])
    return hessian


def normal_equations(x, original, weight, ridge):
    x, original, weight = (array.astype(np.float64) for array in (x, original, weight))
    left = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    return np.linalg.solve(left, x.T @ original @ weight / len(x) + ridge * weight)


def shrunk(weight, fitted, share):
    """Part of the way to what was fitted."""
    return weight + share * (fitted - weight)


@pytest.mark.parametrize("k", [16, 96, 300])
def test_corrected_weights_against_the_normal_equations(k):
    x, original, weight = drifted(2 * k + 100, k, 24)
    prepared = with_originals(x, original).prepare(0.01)
    corrected = prepared.corrected(weight)
    assert corrected.dtype == np.float32 and corrected.flags.c_contiguous
    ridge = float(prepared.ridge[0])
    assert prepared.share == pytest.approx(1 - k / (2 * k + 100))
    exact = shrunk(weight, normal_equations(x, original, weight, ridge), prepared.share)
    assert np.abs(corrected - exact).max() <= 2e-5 * np.abs(exact).max()
    for wrong in (weight, normal_equations(original, x, weight, ridge), normal_equations(x, original, weight, 2 * ridge)):
        wrong = shrunk(weight, wrong, prepared.share)
        assert np.abs(corrected - wrong).max() > 2e-4 * np.abs(exact).max()

    def error(candidate):
        return np.square(x @ candidate - original @ weight).mean()

    assert error(corrected) < 0.5 * error(weight)


def least_squares(x, original, weight, ridge, weights, gap, share):
    """argmin of mean of w |x W' - original W - share gap|^2 + ridge |W' - W|^2, from its rows, without normal equations."""
    x, original, weight, weights, gap = (array.astype(np.float64) for array in (x, original, weight, weights, gap))
    roots, root = np.sqrt(weights / weights.sum())[:, None], np.sqrt(ridge)
    rows = np.concatenate([roots * x, root * np.eye(x.shape[1])])
    targets = np.concatenate([roots * (original @ weight + share * gap), root * weight])
    return np.linalg.lstsq(rows, targets, rcond=None)[0]


@pytest.mark.parametrize("k", [32, 96])
def test_corrected_weights_are_the_weighted_least_squares(k):
    tokens, n = 3 * k, 24
    x, original, weight = drifted(tokens, k, n)
    weights = random_weights(tokens)
    gap = (x @ np.random.default_rng(5).standard_normal((k, n)) / k).astype(np.float32)
    hessian = Hessian(k)
    for part in (slice(0, k), slice(k, tokens)):
        hessian.add(x[part], original[part], weights=weights[part], gap=gap[part])
    prepared = hessian.prepare(0.01)
    corrected, ridge = prepared.corrected(weight), float(prepared.ridge[0])
    assert prepared.share == pytest.approx(2 / 3)
    exact = shrunk(weight, least_squares(x, original, weight, ridge, weights, gap, 0.5), 2 / 3)
    assert np.abs(corrected - exact).max() <= 2e-5 * np.abs(exact).max()
    for wrong in (
        least_squares(x, original, weight, ridge, weights, gap, 0.0),
        least_squares(x, original, weight, ridge, weights, gap, 1.0),
        least_squares(x, original, weight, ridge, weights, -gap, 0.5),
        least_squares(x, original, weight, ridge, np.ones(tokens), gap, 0.5),
        least_squares(x, original, weight, 2 * ridge, weights, gap, 0.5),
        least_squares(x, x, weight, ridge, weights, gap, 0.5),
        least_squares(x, original, weight, ridge, weights, gap, 0.5) + 0.1 * weight,
    ):
        wrong = shrunk(weight, wrong, 2 / 3)
        assert np.abs(corrected - wrong).max() > 2e-4 * np.abs(exact).max()


def test_few_tokens_are_not_trusted():
    """Of as many tokens as features, or fewer, anything could be fitted; of many, hardly anything is left out."""
    x, original, weight = drifted(4000, 32, 8)
    for tokens, share in ((31, 0), (32, 0), (40, 0.2), (320, 0.9), (4000, 0.992)):
        prepared = with_originals(x[:tokens], original[:tokens]).prepare()
        assert prepared.share == pytest.approx(share)
        assert np.array_equal(prepared.corrected(weight), weight) == (share == 0)
    # What was fitted to chance, here noise that x says nothing of, does other tokens harm.
    few, rest = slice(0, 40), slice(40, None)
    original = x + np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    prepared = with_originals(x[few], original[few]).prepare()

    def error(candidate):
        return np.square(x[rest] @ candidate - original[rest] @ weight).mean()

    fitted = normal_equations(x[few], original[few], weight, float(prepared.ridge[0]))
    assert error(weight) < error(prepared.corrected(weight)) < 0.7 * error(fitted)


def test_without_drift_a_weight_is_its_own_correction():
    x, _, weight = drifted(200, 64, 10)
    assert np.array_equal(with_originals(x, x.copy()).prepare().corrected(weight), weight)
    assert np.array_equal(gathered(x).prepare().corrected(weight), weight)
    assert np.array_equal(prepare_rounding(gathered(x).diagonal).corrected(weight), weight)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_hessians_on_a_gpu(cupy, dtype):
    x = random_inputs(3000, 200).astype(dtype)
    on_gpu = cupy.asarray(x)
    hessian = gathered(on_gpu[:2500], on_gpu[2500:], xp=cupy)
    expected = gathered(x.astype(np.float32))
    size = np.sqrt(np.outer(expected.sum.diagonal(), expected.sum.diagonal()))
    tolerance = 3e-6 if dtype == np.float32 else 3e-5  # tensor cores cut off partial sums where others round
    assert hessian.tokens == 3000 and (np.abs(hessian.sum.get() - expected.sum) <= tolerance * size).all()
    prepared = hessian.prepare(0.01)
    assert isinstance(prepared, Prepared) and isinstance(prepared.order, np.ndarray)
    assert isinstance(prepared.factor, cupy.ndarray) and not np.tril(prepared.factor.get()).any()
    summed = hessian.sum.get() / 3000
    matrix = summed[np.ix_(prepared.order, prepared.order)] + np.diag(prepared.ridge.get())
    assert is_product_of(prepared.factor, prepared.weights, matrix)
    again = gathered(on_gpu[:2500], on_gpu[2500:], xp=cupy).prepare(0.01)
    assert again.factor.tobytes() == prepared.factor.tobytes() and again.weights.tobytes() == prepared.weights.tobytes()


@pytest.mark.gpu
def test_singular_hessians_on_a_gpu(cupy):
    """CuPy's Cholesky reports nothing by itself."""
    x = np.repeat(random_inputs(300, 16), 2, axis=1)
    prepared = gathered(cupy.asarray(x), xp=cupy).prepare(0.0)
    assert 1e-6 <= prepared.damping <= 1e-3 and is_factored(x, prepared)
    hessian = gathered(cupy.asarray(random_inputs(100, 8)), name="head", xp=cupy)
    hessian.sum[0, 1] = hessian.sum[1, 0] = 1e12
    with pytest.raises(ValueError, match="Hessian of head: not positive definite"):
        hessian.prepare(0.01)
    assert (Hessian(32, cupy).prepare().weights == 1).all()
    with pytest.raises(TypeError, match="expected one of cupy"):
        Hessian(8, cupy).add(random_inputs(4, 8))


@pytest.mark.gpu
def test_corrected_weights_on_a_gpu(cupy):
    x, original, weight = drifted(700, 300, 24)
    prepared = with_originals(cupy.asarray(x), cupy.asarray(original), cupy).prepare(0.01)
    exact = shrunk(weight, normal_equations(x, original, weight, float(prepared.ridge[0])), 4 / 7)
    assert np.abs(prepared.corrected(cupy.asarray(weight)).get() - exact).max() <= 2e-5 * np.abs(exact).max()
    weights, gap = random_weights(700), np.tile(x[:, :1], 24)
    hessian = Hessian(300, cupy)
    hessian.add(*map(cupy.asarray, (x, original)), weights=cupy.asarray(weights), gap=cupy.asarray(gap))
    prepared = hessian.prepare(0.01, keeps_matrix=True)
    exact = shrunk(weight, least_squares(x, original, weight, float(prepared.ridge[0]), weights, gap, 0.5), 4 / 7)
    assert np.abs(prepared.corrected(cupy.asarray(weight)).get() - exact).max() <= 2e-5 * np.abs(exact).max()
    expected = Hessian(300)
    expected.add(x, original, weights=weights, gap=gap)
    matrix = expected.prepare(0.01, act_order=False, keeps_matrix=True).matrix
    matrix = matrix[np.ix_(prepared.order, prepared.order)]
    size = np.sqrt(np.outer(matrix.diagonal(), matrix.diagonal()))
    assert (np.abs(prepared.matrix.get() - matrix) <= 1e-5 * size).all() and prepared.matrix.flags.c_contiguous
    same = with_originals(cupy.asarray(x), cupy.asarray(x), cupy).prepare()
    assert np.array_equal(same.corrected(cupy.asarray(weight)).get(), weight)
