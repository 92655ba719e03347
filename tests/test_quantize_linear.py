"""Quantized weights against plain GPTQ with an inverse Hessian, and their errors and tensors against what they claim."""

import numpy as np
import pytest

from cupyq.formats.exl2 import exl2_scales, unpack_exl2, validate_exl2
from cupyq.formats.gptq import gptq_scales, unpack_gptq, validate_gptq
from cupyq.layers.linear import Linear
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.reconstruct import reconstruct
from cupyq.quantize import linear as module
from cupyq.quantize.hessian import Hessian
from cupyq.quantize.layouts import Layout, Part
from cupyq.quantize.linear import quantize_linear, quantize_linear_gptq, round_linear

LAYOUTS = {
    "3": Layout((Part(3, 1.0, 64),)),
    "8+4": Layout((Part(8, 0.1, 32), Part(4, 0.9, 128))),
    "6+3+2": Layout((Part(6, 0.05, 32), Part(3, 0.2, 64), Part(2, 0.75, 64))),
    "5": Layout((Part(5, 1.0, 32),)),
}


def random_problem(k, n, tokens=None, seed=0):
    """(inputs float32 [tokens, k] with correlated features, weight float32 [k, n])"""
    generator = np.random.default_rng(seed)
    tokens = 3 * k if tokens is None else tokens
    x = generator.standard_normal((tokens, k)) @ (np.eye(k) + generator.standard_normal((k, k)) / np.sqrt(k))
    x *= np.exp(0.7 * generator.standard_normal(k))
    return x.astype(np.float32), (0.05 * generator.standard_normal((k, n))).astype(np.float32)


def prepared_for(x, xp=np, **options):
    hessian = Hessian(x.shape[1], xp)
    hessian.add(xp.asarray(x))
    return hessian.prepare(**options)


def host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def mean_squared_error(x, weight, values):
    return np.square(x.astype(np.float64) @ (weight.astype(np.float64) - host(values))).sum() / len(x)


def damped(x, prepared):
    """H + ridge in the order of `prepared`, float64."""
    x = x.astype(np.float64)[:, prepared.order]
    return x.T @ x / len(x) + np.diag(host(prepared.ridge))


def stored(tensors, bits=None):
    """(codes, scales, zeros, bits) of each row of W, in the model's order, float64 but for the codes."""
    if "q_weight" in tensors:
        layout, perm = validate_exl2(tensors)
        perm = np.arange(layout.k) if perm is None else perm
        group = np.repeat(np.arange(layout.group_count), layout.rows)
        rows = np.argsort(perm)
        codes, group = unpack_exl2(tensors["q_weight"], layout)[rows], group[rows]
        scales = exl2_scales(tensors["q_scale"], tensors["q_scale_max"])[group]
        row_bits = layout.bits[group, None]
        return codes.astype(int), scales.astype(float), 2.0 ** (row_bits - 1), row_bits
    layout = validate_gptq(tensors)
    codes, zeros = unpack_gptq(tensors, layout)
    row_bits = np.full((layout.k, 1), layout.bits)
    scales = gptq_scales(tensors["scales"])
    return codes.astype(int), scales[layout.row_group].astype(float), zeros[layout.row_group].astype(float), row_bits


def plain_gptq(x, weight, prepared, tensors):
    """GPTQ as its paper has it, by rows and with the Cholesky factor of the inverse, in float64, with the scales of `tensors`.

    Where a weight lies within a thousandth of a step of the middle between two levels, the code that `tensors` has is as
    good as the other. Returns (codes in the model's order, rows as they were when their turn came, the factor's diagonal).
    """
    given, scales, zeros, row_bits = (table[prepared.order] for table in stored(tensors))
    factor = np.linalg.cholesky(np.linalg.inv(damped(x, prepared))).T
    rows = np.zeros(scales.shape)
    rows[:, : weight.shape[1]] = weight[prepared.order]
    codes, turns = np.empty(rows.shape, int), np.empty_like(rows)
    for i in range(len(rows)):
        turns[i] = rows[i]
        level = np.where(scales[i] > 0, rows[i] / np.where(scales[i] > 0, scales[i], 1), 0) + zeros[i]
        nearest = np.clip(np.rint(level), 0, 2 ** row_bits[i] - 1)
        codes[i] = np.where(np.abs(np.abs(level - given[i]) - 0.5) < 1e-3, given[i], nearest)
        value = ((codes[i] - zeros[i]) * scales[i]).astype(np.float16).astype(float)
        rows[i:] -= factor[i, i:, None] * (rows[i] - value) / factor[i, i]
    unordered = np.empty_like(codes)
    unordered[prepared.order] = codes
    return unordered, turns, factor.diagonal()


def is_plain_gptq(x, weight, prepared, tensors):
    return np.array_equal(plain_gptq(x, weight, prepared, tensors)[0], stored(tensors)[0])


def check_claims(result, x, weight, prepared):
    """What the tensors decode to is `values`, and errors and bits are as claimed. Returns the matrix."""
    k, n = weight.shape
    padded = -(-n // 32) * 32
    matrix = QMatrix.from_tensors(result.tensors)
    assert matrix.shape == (k, padded)
    decoded = reconstruct(matrix)
    assert np.array_equal(decoded[:, :n], host(result.values)) and not decoded[:, n:].any()
    assert result.values.dtype == np.float32 and result.values.shape == (k, n)
    assert result.storage_bits == matrix.storage_bits == Linear(matrix).storage_bits

    difference = np.zeros((k, padded))
    difference[:, :n] = weight.astype(np.float64) - host(result.values)
    difference = difference[prepared.order]
    loss = np.einsum("kn,kj,jn", difference, damped(x, prepared), difference)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert abs(result.error - mean_squared_error(x, weight, result.values)) <= 2e-5 * loss
    return matrix


# --- EXL2 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n"), [(96, 40), (256, 64), (32, 1)])
def test_exl2_is_plain_gptq_and_what_it_claims(layout, k, n):
    x, weight = random_problem(k, n, seed=k + n)
    prepared = prepared_for(x)
    result = quantize_linear(weight, prepared, LAYOUTS[layout])
    check_claims(result, x, weight, prepared)
    assert is_plain_gptq(x, weight, prepared, result.tensors)
    groups = LAYOUTS[layout].groups(k)
    assert result.tensors["q_groups"][0::2].tolist() == [bits for bits, _ in groups]
    assert result.storage_bits == LAYOUTS[layout].storage_bits(k, -(-n // 32) * 32)
    order = np.argsort(result.tensors["q_invperm"])
    assert np.array_equal(order, prepared.order)


def test_a_wrong_recursion_is_noticed():
    """Codes of another damping, another order, no feedback, or with a few codes off by one are not plain GPTQ's."""
    x, weight = random_problem(96, 64, seed=1)
    hessian = Hessian(96)
    hessian.add(x)
    prepared = hessian.prepare()
    tensors = quantize_linear(weight, prepared, LAYOUTS["3"]).tensors
    assert is_plain_gptq(x, weight, prepared, tensors)
    for other in (hessian.prepare(0.05), hessian.prepare(act_order=False)):
        assert not is_plain_gptq(x, weight, other, tensors)
    assert not is_plain_gptq(x, weight, prepared, round_linear(weight, hessian.diagonal, LAYOUTS["3"]).tensors)
    changed = tensors | {"q_weight": tensors["q_weight"].copy()}
    changed["q_weight"][3, 10] ^= 1
    assert not is_plain_gptq(x, weight, prepared, changed)


def test_scales_are_searched_on_the_rows_as_they_stand(monkeypatch):
    """A group's target and weights are plain GPTQ's rows at its start and 1 / U_ii^2."""
    seen = []
    search = module.search_scales

    def recorded(target, weights, bits, **outputs):
        seen.append((target.copy(), weights.copy(), bits))
        return search(target, weights, bits, **outputs)

    monkeypatch.setattr(module, "search_scales", recorded)
    x, weight = random_problem(160, 32, seed=2)
    prepared = prepared_for(x)
    result = quantize_linear(weight, prepared, LAYOUTS["6+3+2"])
    assert [(bits, len(target)) for target, _, bits in seen] == LAYOUTS["6+3+2"].groups(160)
    _, turns, diagonal = plain_gptq(x, weight, prepared, result.tensors)
    first = 0
    for target, weights, _ in seen:
        assert np.allclose(target[0], turns[first], atol=1e-6)  # its later rows have not yet taken the errors of this group
        assert np.allclose(weights, diagonal[first : first + len(weights)] ** -2, rtol=1e-4)
        first += len(target)
    assert np.array_equal(seen[0][0], weight[prepared.order[: len(seen[0][0])]])


def test_error_feedback_pays():
    x, weight = random_problem(128, 64, seed=4)
    hessian = Hessian(128)
    hessian.add(x)
    rounded = round_linear(weight, hessian.diagonal, LAYOUTS["3"])
    fed_back = quantize_linear(weight, hessian.prepare(), LAYOUTS["3"])
    assert fed_back.error < 0.8 * mean_squared_error(x, weight, rounded.values)
    finer = [quantize_linear(weight, hessian.prepare(), LAYOUTS[name]).error for name in ("3", "8+4", "5")]
    assert finer == sorted(finer, reverse=True)


def test_rounding_takes_the_nearest_codes():
    x, weight = random_problem(96, 40, seed=5)
    x[:, 7] = 0
    hessian = Hessian(96)
    hessian.add(x)
    result = round_linear(weight, hessian.diagonal, LAYOUTS["8+4"])
    codes, scales, zeros, bits = (table[:, :40] if table.shape[1] > 40 else table for table in stored(result.tensors))
    assert np.array_equal(codes, np.clip(np.rint(weight / scales) + zeros, 0, 2**bits - 1))
    assert np.array_equal(reconstruct(QMatrix.from_tensors(result.tensors))[:, :40], result.values)
    squares = np.square(weight.astype(np.float64) - result.values).sum(axis=1)
    assert result.error == pytest.approx(hessian.diagonal @ squares, rel=1e-5)
    order = np.argsort(result.tensors["q_invperm"])
    assert (np.diff(hessian.diagonal[order]) <= 0).all() and order[-1] == 7


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens(tokens):
    x, weight = random_problem(96, 40, tokens=tokens)
    prepared = prepared_for(x)
    check_claims(quantize_linear(weight, prepared, LAYOUTS["5"]), x, weight, prepared)


def test_no_tokens():
    _, weight = random_problem(96, 40)
    result = quantize_linear(weight, Hessian(96).prepare(), LAYOUTS["5"])
    assert result.error == 0 and result.loss == pytest.approx(np.square(weight - result.values).sum(), rel=1e-5)
    assert np.abs(weight - result.values).max() < 0.02


def test_singular_hessians_and_dead_features():
    x, weight = random_problem(96, 40)
    x[:, 48:] = x[:, :48]
    x[:, [5, 60]] = 0
    for damping in (0.0, 0.01):
        prepared = prepared_for(x, damping=damping)
        assert set(prepared.order[-2:].tolist()) == {5, 60}
        result = quantize_linear(weight, prepared, LAYOUTS["3"])
        assert np.isfinite(result.values).all()
        check_claims(result, x, weight, prepared)


@pytest.mark.parametrize("weight", [np.zeros((64, 40), np.float32), np.full((64, 40), 1e-12, np.float32)])
def test_weights_of_zero(weight):
    x, _ = random_problem(64, 40)
    prepared = prepared_for(x)
    for result in (
        quantize_linear(weight, prepared, LAYOUTS["3"]),
        quantize_linear_gptq(weight, prepared, 4, 32, False, True),
        quantize_linear_gptq(weight, prepared, 4, 32, True, True),
    ):
        assert not result.values.any() and not reconstruct(QMatrix.from_tensors(result.tensors)).any()


def test_half_precision_weights_are_taken_exactly():
    import ml_dtypes

    x, weight = random_problem(96, 40)
    prepared = prepared_for(x)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = weight.astype(dtype)
        results = [quantize_linear(w, prepared, LAYOUTS["5"]) for w in (narrow, narrow.astype(np.float32))]
        assert results[0].tensors["q_weight"].tobytes() == results[1].tensors["q_weight"].tobytes()
        assert results[0].loss == results[1].loss


def test_weights_as_checkpoints_store_them():
    """[N, K], of which a transposed view is [K, N]."""
    x, weight = random_problem(96, 64)
    prepared = prepared_for(x)
    results = [quantize_linear(w, prepared, LAYOUTS["3"]) for w in (weight, np.ascontiguousarray(weight.T).T)]
    assert results[0].tensors["q_weight"].tobytes() == results[1].tensors["q_weight"].tobytes()
    assert results[1].values.flags.c_contiguous and np.array_equal(results[0].values, results[1].values)


def test_nothing_given_is_changed_and_repeats_agree():
    x, weight = random_problem(96, 40)
    prepared = prepared_for(x)
    before = weight.tobytes(), prepared.factor.tobytes(), prepared.weights.tobytes(), prepared.order.tobytes()
    results = [quantize_linear(weight, prepared, LAYOUTS["8+4"]) for _ in range(2)]
    assert before == (weight.tobytes(), prepared.factor.tobytes(), prepared.weights.tobytes(), prepared.order.tobytes())
    first, second = (result.tensors for result in results)
    assert first.keys() == second.keys() and all(first[key].tobytes() == second[key].tobytes() for key in first)
    assert results[0].loss == results[1].loss and results[0].tensors is first


def test_a_drifted_input_is_made_up_for():
    x, weight = random_problem(96, 40, tokens=600, seed=6)
    generator = np.random.default_rng(7)
    drifted = (x * (1 + 0.1 * generator.standard_normal(96)) + 0.1 * generator.standard_normal(x.shape)).astype(np.float32)

    def errors(original):
        hessian = Hessian(96)
        hessian.add(drifted, original)
        prepared = hessian.prepare()
        target = x.astype(np.float64) @ weight
        results = [quantize_linear(w, prepared, LAYOUTS["5"]) for w in (weight, prepared.corrected(weight))]
        return results, [np.square(drifted.astype(np.float64) @ r.values - target).mean() for r in results]

    _, (plain, corrected) = errors(x)
    assert corrected < 0.8 * plain
    same, _ = errors(drifted)
    assert same[0].tensors["q_weight"].tobytes() == same[1].tensors["q_weight"].tobytes()
    assert same[0].loss == same[1].loss


# --- sweeps -----------------------------------------------------------------------------------------------------------


def kept(x, xp=np, **options):
    return prepared_for(x, xp, keeps_matrix=True, **options)


def sweep_matrix(x, prepared):
    """H + 0.003 mean(diag H) in the order of `prepared`, float64."""
    x = x.astype(np.float64)[:, prepared.order]
    matrix = x.T @ x / len(x)
    return matrix + 0.003 * matrix.diagonal().mean() * np.eye(len(matrix))


def sweep_losses(x, weight, prepared, result):
    """tr(E^T H E) column by column, with the damping of sweeps."""
    error = (weight.astype(np.float64) - host(result.values))[prepared.order]
    return np.einsum("kn,kj,jn->n", error, sweep_matrix(x, prepared), error)


def descended(x, weight, prepared, before, after):
    """Codes after a sweep from the codes of `before`, one after another in float64; next to a middle, those of `after`."""
    matrix = sweep_matrix(x, prepared)
    codes, scales, zeros, row_bits = (table[prepared.order] for table in stored(before))
    given = stored(after)[0][prepared.order]
    rows = np.zeros(scales.shape)
    rows[:, : weight.shape[1]] = weight[prepared.order]
    error = rows - ((codes - zeros) * scales).astype(np.float16)
    for i in range(len(rows)):
        target = rows[i] + (matrix[i] @ error - matrix[i, i] * error[i]) / matrix[i, i]
        level = np.where(scales[i] > 0, target / np.where(scales[i] > 0, scales[i], 1), 0) + zeros[i]
        nearest = np.clip(np.rint(level), 0, 2 ** row_bits[i] - 1)
        codes[i] = np.where(np.abs(np.abs(level - given[i]) - 0.5) < 1e-3, given[i], nearest)
        error[i] = rows[i] - ((codes[i] - zeros[i]) * scales[i]).astype(np.float16)
    return codes[np.argsort(prepared.order)]


def quantizers(k):
    """{name: (weight, prepared, **options) -> QuantizedLinear}"""

    def exl2(layout):
        return lambda weight, prepared, **options: quantize_linear(weight, prepared, LAYOUTS[layout], **options)

    def gptq(bits, group_size, is_symmetric):
        return lambda weight, prepared, **options: quantize_linear_gptq(
            weight, prepared, bits, group_size, is_symmetric, True, **options
        )

    found = {layout: exl2(layout) for layout in LAYOUTS}
    return found | {"gptq": gptq(3, 32, False), "one group": gptq(4, -1, True)}


@pytest.mark.parametrize("name", quantizers(0))
@pytest.mark.parametrize(("k", "n"), [(96, 40), (160, 32)])
def test_a_sweep_is_coordinate_descent(name, k, n):
    x, weight = random_problem(k, n, seed=k)
    prepared, quantizer = kept(x), quantizers(k)[name]
    results = [quantizer(weight, prepared, sweeps=sweeps) for sweeps in range(3)]
    for before, after in zip(results, results[1:], strict=False):
        expected = descended(x, weight, prepared, before.tensors, after.tensors)
        assert np.array_equal(stored(after.tensors)[0], expected)
        assert not np.array_equal(stored(before.tensors)[0], expected)
        check_claims(after, x, weight, prepared)
        for tensor in before.tensors.keys() - {"q_weight", "qweight"}:
            assert after.tensors[tensor].tobytes() == before.tensors[tensor].tobytes(), tensor
    assert not np.array_equal(stored(results[2].tensors)[0], descended(x, weight, prepared, *[results[0].tensors] * 2))


@pytest.mark.parametrize("name", quantizers(0))
def test_sweeps_never_raise_the_loss(name):
    x, weight = random_problem(160, 64, seed=3)
    prepared, quantizer = kept(x), quantizers(160)[name]
    losses = [sweep_losses(x, weight, prepared, quantizer(weight, prepared, sweeps=sweeps)) for sweeps in range(6)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before * (1 + 1e-6)).all()
    assert losses[4].sum() < 0.985 * losses[0].sum()


def test_no_sweeps_are_the_recursion_alone():
    x, weight = random_problem(96, 40)
    first = quantize_linear(weight, prepared_for(x), LAYOUTS["3"])
    second = quantize_linear(weight, kept(x), LAYOUTS["3"], sweeps=0)
    assert all(second.tensors[key].tobytes() == tensor.tobytes() for key, tensor in first.tensors.items())
    assert (first.loss, first.error) == (second.loss, second.error)


def test_sweeps_over_dead_features_and_without_tokens():
    x, weight = random_problem(96, 40)
    x[:, 48:] = x[:, :48]
    x[:, [5, 60]] = 0
    check_claims(quantize_linear(weight, kept(x), LAYOUTS["3"], sweeps=4), x, weight, prepared_for(x))
    plain, swept = (quantize_linear(weight, Hessian(96).prepare(keeps_matrix=True), LAYOUTS["5"], sweeps=s) for s in (0, 4))
    assert np.array_equal(plain.values, swept.values) and swept.error == 0 and swept.loss == pytest.approx(plain.loss)
    zeros = np.zeros((96, 40), np.float32)
    assert not quantize_linear(zeros, kept(x), LAYOUTS["3"], sweeps=2).values.any()


def test_what_sweeps_cannot_do():
    x, weight = random_problem(96, 40)
    with pytest.raises(ValueError, match="prepared of q has no matrix.*keeps_matrix=True"):
        quantize_linear(weight, prepared_for(x), LAYOUTS["3"], sweeps=1, name="q")
    weight[:, 3] *= 1e8
    with pytest.raises(ValueError, match="weight of q: too large for fp16"):
        quantize_linear(weight, kept(x), LAYOUTS["3"], sweeps=4, name="q")


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "k"), [(4, 32, 96), (4, 64, 160), (4, 128, 256), (4, -1, 288), (3, 64, 96), (8, -1, 64)]
)
def test_gptq_is_plain_gptq_and_what_it_claims(bits, group_size, k, is_symmetric, act_order):
    x, weight = random_problem(k, 40, seed=k + bits)
    prepared = prepared_for(x, act_order=act_order)
    result = quantize_linear_gptq(weight, prepared, bits, group_size, is_symmetric, act_order)
    matrix = check_claims(result, x, weight, prepared)
    size = k if group_size == -1 else group_size
    assert matrix.bits == (bits,) and matrix.group_count == -(-k // size)
    tensors = result.tensors
    assert is_plain_gptq(x, weight, prepared, tensors)
    group = np.empty(k, int)
    group[prepared.order] = np.arange(k) // size
    assert tensors["g_idx"].dtype == np.int32 and np.array_equal(tensors["g_idx"], group)
    assert (np.diff(tensors["g_idx"]) >= 0).all() == (not act_order or size == k)
    zeros = unpack_gptq(tensors, validate_gptq(tensors))[1]
    assert (zeros == 1 << (bits - 1)).all() == is_symmetric
    wrapped = QMatrix.from_tensors(tensors, zeros="v1-wrapped")
    assert np.array_equal(reconstruct(wrapped), reconstruct(matrix))


@pytest.mark.parametrize("sign", [1, -1])
def test_gptq_columns_of_one_sign(sign):
    """The zero point is at an end of the codes, and 0 cannot be stored as zero - 1."""
    x, weight = random_problem(64, 40)
    weight = sign * (np.abs(weight) + 0.01)
    prepared = prepared_for(x, damping=10.0)  # hardly any feedback, which would change signs
    for bits in (2, 4, 8):
        check_claims(quantize_linear_gptq(weight, prepared, bits, 32, False, True), x, weight, prepared)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    x, weight = random_problem(96, 40)
    prepared = prepared_for(x)
    weight[70, 13] = value
    message = rf"weight of model\.layers\.1\.q_proj: {value} at input 70, output 13; repair"
    with pytest.raises(ValueError, match=message):
        quantize_linear(weight, prepared, LAYOUTS["3"], name="model.layers.1.q_proj")
    with pytest.raises(ValueError, match=message):
        quantize_linear_gptq(weight, prepared, 4, 32, True, True, name="model.layers.1.q_proj")


def test_weights_beyond_fp16_are_refused():
    x, weight = random_problem(64, 40)
    prepared = prepared_for(x)
    weight[:, 3] *= 1e8
    with pytest.raises(ValueError, match="weight of q: too large for fp16"):
        quantize_linear(weight, prepared, LAYOUTS["3"], name="q")


def test_wrong_arguments():
    x, weight = random_problem(96, 40)
    prepared = prepared_for(x)
    with pytest.raises(ValueError, match=r"weight of q: shape \(64, 40\), expected \[96, N\]"):
        quantize_linear(weight[:64], prepared, LAYOUTS["3"], name="q")
    with pytest.raises(TypeError, match="weight: dtype float64, expected float16, bfloat16 or float32"):
        quantize_linear(weight.astype(np.float64), prepared, LAYOUTS["3"])
    with pytest.raises(ValueError, match="weight of q: 40 rows, expected a multiple of 32"):
        quantize_linear(weight[:40], prepared_for(x[:, :40]), LAYOUTS["3"], name="q")
    with pytest.raises(ValueError, match="bits must be 2, 3, 4 or 8 for GPTQ, got 5"):
        quantize_linear_gptq(weight, prepared, 5, 32, True, True)
    for group_size in (0, 16, 48, -32):
        with pytest.raises(ValueError, match="group_size must be a multiple of 32, or -1"):
            quantize_linear_gptq(weight, prepared, 4, group_size, True, True)
    with pytest.raises(ValueError, match="make it with prepare\\(act_order=False\\)"):
        quantize_linear_gptq(weight, prepared, 4, 32, True, False)


@pytest.mark.parametrize("groups", [[(4, 64)], [(4, 48), (4, 48)], [(4, 160), (3, 32)], []])
def test_a_layout_that_does_not_fit_is_refused(groups):
    class Unfit:
        def groups(self, k):
            return groups

    x, weight = random_problem(192, 40)
    with pytest.raises(ValueError, match=r"layout of q: groups \[.*expected 32, 64, 96 or 128 rows in each and 192 in all"):
        quantize_linear(weight, prepared_for(x), Unfit(), name="q")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(96, 40), (256, 136)])
def test_linears_on_a_gpu(cupy, k, n):
    x, weight = random_problem(k, n, seed=8)
    prepared = prepared_for(x, cupy)
    on_host = prepared_for(x)
    for layout in LAYOUTS.values():
        result = quantize_linear(cupy.asarray(weight), prepared, layout)
        assert isinstance(result.values, cupy.ndarray)
        assert all(isinstance(tensor, np.ndarray) for tensor in result.tensors.values())
        check_claims(result, x, weight, prepared)
        assert is_plain_gptq(x, weight, prepared, result.tensors)
        assert result.loss <= 1.02 * quantize_linear(weight, on_host, layout).loss
        again = quantize_linear(cupy.asarray(weight), prepared, layout).tensors
        assert all(again[key].tobytes() == tensor.tobytes() for key, tensor in result.tensors.items())


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_gptq_linears_on_a_gpu(cupy, is_symmetric, act_order):
    for bits, group_size, k in ((4, 128, 256), (3, 64, 96), (8, -1, 288)):
        x, weight = random_problem(k, 40, seed=9)
        prepared = prepared_for(x, cupy, act_order=act_order)
        result = quantize_linear_gptq(cupy.asarray(weight), prepared, bits, group_size, is_symmetric, act_order)
        check_claims(result, x, weight, prepared)
        assert is_plain_gptq(x, weight, prepared, result.tensors)
        on_host = quantize_linear_gptq(weight, prepared_for(x, act_order=act_order), bits, group_size, is_symmetric, act_order)
        assert result.loss <= 1.02 * on_host.loss


@pytest.mark.gpu
@pytest.mark.parametrize("name", quantizers(0))
def test_sweeps_on_a_gpu(cupy, name):
    x, weight = random_problem(256, 72, seed=4)
    prepared, quantizer = kept(x, cupy), quantizers(256)[name]
    results = [quantizer(cupy.asarray(weight), prepared, sweeps=sweeps) for sweeps in (0, 1, 4)]
    expected = descended(x, weight, prepared, results[0].tensors, results[1].tensors)
    assert np.array_equal(stored(results[1].tensors)[0], expected)
    check_claims(results[2], x, weight, prepared)
    losses = [sweep_losses(x, weight, prepared, result).sum() for result in results]
    assert losses == sorted(losses, reverse=True)
    again = quantizer(cupy.asarray(weight), prepared, sweeps=4).tensors
    assert all(again[key].tobytes() == tensor.tobytes() for key, tensor in results[2].tensors.items())


@pytest.mark.gpu
def test_the_same_is_refused_on_a_gpu(cupy):
    x, weight = random_problem(96, 40)
    prepared = prepared_for(x, cupy)
    weight[70, 13] = np.nan
    with pytest.raises(ValueError, match="weight of q: nan at input 70, output 13"):
        quantize_linear(cupy.asarray(weight), prepared, LAYOUTS["3"], name="q")
    with pytest.raises(TypeError, match="weight is a NumPy array, prepared is a CuPy array"):
        quantize_linear(weight, prepared, LAYOUTS["3"])
