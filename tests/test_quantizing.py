"""Packing, rounding, the scale search and the GPTQ loop: against plain loops and recorded outputs, kernels against both."""

import math
import struct

import numpy as np
import pytest
from conftest import golden
from kernel_checks import banded, host, move, on_both, on_gpu, random, same_bits, unwritten

from cupyq.ops.quantizing import (
    pack_columns,
    pack_rows_4,
    quantize,
    quantize_err,
    quantize_range,
    quantize_range_inplace,
)

GOLDEN = golden("quant")
WIDTHS = (2, 3, 4, 5, 6, 8)


def recorded(prefix):
    """Parametrize over the recorded cases of one function: `prefix`, then nothing or a width."""
    names = [name for name in GOLDEN if name.removesuffix(name.split("_")[-1]).rstrip("_") == prefix or name == prefix]
    return pytest.mark.parametrize("case", names)


def moved(library, *arrays):
    return [None if a is None else move(library, a.copy()) for a in arrays]


def random_int16(seed, shape, low=-32768, high=32768):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


# --- packing ----------------------------------------------------------------------------------------------------------


def stream_words(values, bits):
    """One long Python integer, cut into words."""
    stream = sum((int(value) % 2**bits) << (i * bits) for i, value in enumerate(values))
    count = len(values) * bits // 32
    return np.array([stream >> (32 * word) & 0xFFFFFFFF for word in range(count)], np.uint32).view(np.int32)


@on_both
@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_columns_against_a_bit_stream(library, bits):
    unit = 32 // math.gcd(32, bits)
    for rows, cols in ((32, 1), (96, 3), (unit, 5), (0, 4), (32, 0)):
        codes = random_int16(rows + cols, (rows, cols))  # high bits set: only the low ones count
        words = host(pack_columns(move(library, codes), bits))
        assert words.dtype == np.int32 and words.shape == (rows * bits // 32, cols)
        for c in range(cols):
            assert same_bits(words[:, c].copy(), stream_words(codes[:, c], bits))


@on_both
@pytest.mark.parametrize("groups, cols", [(1, 8), (3, 40), (0, 8), (5, 0), (100, 1032)])
def test_pack_rows_4_against_a_bit_stream(library, groups, cols):
    scales = random_int16(groups, (groups, cols))
    words = host(pack_rows_4(move(library, scales)))
    assert words.dtype == np.int32 and words.shape == (groups, cols // 8)
    for g in range(groups):
        assert same_bits(words[g], stream_words(scales[g].astype(int) - 1, 4))


@on_both
@recorded("pack_columns")
def test_recorded_pack_columns(case, library):
    inputs, outputs, arguments = GOLDEN[case]
    assert same_bits(host(pack_columns(move(library, inputs["input"]), arguments["bits"])), outputs["output"])


@on_both
@recorded("pack_rows_4")
def test_recorded_pack_rows_4(case, library):
    inputs, outputs, _ = GOLDEN[case]
    assert same_bits(host(pack_rows_4(move(library, inputs["input"]))), outputs["output"])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_columns_kernel(cupy, bits):
    for rows, cols in ((32, 127), (64, 128), (32, 129), (2048, 1031), (2_100_000, 1)):
        codes = random_int16(rows, (rows, cols), 0, 2**bits)
        out, check = banded(cupy, np.full((rows * bits // 32, cols), -1, np.int32))
        assert pack_columns(on_gpu(cupy, codes, 1), bits, out=out) is out
        check()
        assert same_bits(out.get(), pack_columns(codes, bits))


@pytest.mark.gpu
def test_pack_rows_4_kernel(cupy):
    for groups, cols in ((1, 8), (3, 1016), (3, 1024), (3, 1032), (4001, 2048)):
        scales = random_int16(cols, (groups, cols), 1, 17)
        out, check = banded(cupy, np.full((groups, cols // 8), -1, np.int32))
        assert pack_rows_4(on_gpu(cupy, scales, 1), out=out) is out
        check()
        assert same_bits(out.get(), pack_rows_4(scales))


# --- quantize ---------------------------------------------------------------------------------------------------------


def rounded_to(kind, value):
    """A Python float rounded to float16 ("e") or float32 ("f")."""
    return struct.unpack(kind, struct.pack(kind, value))[0]


def quantize_one(x, scale, qzero, maxq):
    """(value, code): Python's floats and round(), which takes ties to even."""
    # A float64 quotient of two float32 numbers, rounded to float32, is the float32 quotient.
    level = round(rounded_to("f", float(x) / float(scale))) + qzero
    code = min(max(level, 0), maxq)
    return rounded_to("e", (code - qzero) * rounded_to("e", float(scale))), code


@on_both
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_against_a_loop(library, bits):
    x, scale = random(bits, (7, 33), np.float32), np.abs(random(9, 33, np.float32)) * np.float32(2 / 2**bits)
    x[0] = np.float32(1.5) * scale  # a tie wherever the product is exact
    qzero, maxq = 2 ** (bits - 1), 2**bits - 1
    x_, scale_, codes = moved(library, x, scale, np.full(x.shape, -7, np.int16))
    y = host(quantize(x_, scale_, qzero, maxq, codes=codes))
    assert y.dtype == np.float32
    for r, c in np.ndindex(x.shape):
        assert (y[r, c], host(codes)[r, c]) == quantize_one(x[r, c], scale[c], qzero, maxq)


@on_both
def test_quantize_ends_and_ties(library):
    """Ties to even; what is no number gets the code maxq, as 0 / 0 does; infinities the end they point to."""
    inf, nan = np.inf, np.nan
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 99.0, -99.0, inf, -inf, nan, 0.0, 1.0, -1.0]], np.float32)
    scale = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    expected = [8, 10, 10, 8, 6, 15, 0, 15, 0, 15, 15, 15, 0]
    codes = move(library, np.zeros(x.shape, np.int16))
    y = host(quantize(*moved(library, x, scale), 8, 15, codes=codes))
    assert host(codes)[0].tolist() == expected
    assert y[0].tolist() == [(code - 8) * s for code, s in zip(expected, scale, strict=True)]


@on_both
def test_quantize_rounds_twice_to_float16(library):
    """The scale first, then the product: one rounding of the exact product gives another value."""
    x, scale = np.array([[3.0]], np.float32), np.array([1 + 3 * 2.0**-12], np.float32)
    once, twice = rounded_to("e", 3 * float(scale[0])), rounded_to("e", 3 * rounded_to("e", float(scale[0])))
    assert host(quantize(*moved(library, x, scale), 8, 15))[0, 0] == twice != once


def quantize_kinds():
    return [name for name in GOLDEN if name.removeprefix("quantize_").isdigit()]


@on_both
@pytest.mark.parametrize("case", quantize_kinds())
def test_recorded_quantize(case, library):
    inputs, outputs, arguments = GOLDEN[case]
    x, scale, codes = moved(library, inputs["input"], inputs["scale"], outputs["out_q"] * 0)
    y = quantize(x, scale, arguments["qzero"], arguments["maxq"], codes=codes)
    assert same_bits(host(y), outputs["output"]) and same_bits(host(codes), outputs["out_q"])


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1])
def test_quantize_kernel(cupy, shift):
    for rows, cols in ((1, 1), (3, 3), (2, 4), (5, 127), (4, 130), (3, 512), (3, 516), (33, 4096), (70_000, 8)):
        x, scale = random(cols, (rows, cols), np.float32), np.abs(random(cols + 1, cols, np.float32)) / 4
        codes_expected = np.zeros(x.shape, np.int16)
        expected = quantize(x, scale, 8, 15, codes=codes_expected)
        x_, scale_ = on_gpu(cupy, x, shift), on_gpu(cupy, scale, shift)
        out, check_out = banded(cupy, unwritten(x.shape, np.dtype(np.float32)), shift)
        codes, check_codes = banded(cupy, np.full(x.shape, -1, np.int16), shift)
        assert quantize(x_, scale_, 8, 15, codes=codes, out=out) is out
        check_out()
        check_codes()
        assert same_bits(out.get(), expected) and same_bits(codes.get(), codes_expected)
        assert same_bits(x_.get(), x)
        assert same_bits(quantize(x_, scale_, 8, 15).get(), expected)
        assert quantize(x_, scale_, 8, 15, out=x_) is x_
        assert same_bits(x_.get(), expected)


# --- quantize_err -----------------------------------------------------------------------------------------------------


def err_loop(x, scale, qzero, maxq, err_norm, min_p, max_p, p_grid):
    sums = []
    for i in range(p_grid + 1):
        p = min_p + (max_p - min_p) * i / p_grid
        terms = []
        for r, c in np.ndindex(x.shape):
            s = float(scale[c]) * p
            level = min(max(round(float(x[r, c]) / s), -qzero), maxq - qzero)
            terms.append(abs(level * s - float(x[r, c])) ** err_norm)
        sums.append(math.fsum(terms))
    return sums


@on_both
@pytest.mark.parametrize("err_norm", [3.5, 2.0, 2.4, 0.5, 9.5])
def test_quantize_err_against_a_loop(library, err_norm):
    x, scale = random(1, (5, 7), np.float32), np.abs(random(2, 7, np.float32)) + np.float32(0.2)
    sums = host(quantize_err(*moved(library, x, scale), 4, 7, err_norm, 0.5, 1.5, 6))
    assert sums.dtype == np.float32
    np.testing.assert_allclose(sums, err_loop(x, scale, 4, 7, err_norm, 0.5, 1.5, 6), rtol=1e-5)


@on_both
def test_quantize_err_of_zero_scales_and_of_nothing(library):
    x, scale = np.array([[2.0, 0.0]], np.float32), np.zeros(2, np.float32)
    assert host(quantize_err(*moved(library, x, scale), 2, 3, 2.0, 0.7, 1.2, 3)).tolist() == [4.0] * 4
    for shape in ((0, 2), (3, 0)):
        nothing, scale = np.ones(shape, np.float32), np.ones(shape[1], np.float32)
        assert host(quantize_err(*moved(library, nothing, scale), 2, 3, 2.0, 0.7, 1.2, 3)).tolist() == [0.0] * 4


def recorded_err(case, library="numpy", **changes):
    inputs, outputs, arguments = GOLDEN[case]
    numbers = list((arguments | changes).values())
    return host(quantize_err(*moved(library, inputs["input"], inputs["scale"]), *numbers)), outputs["err"]


@on_both
@recorded("quantize_err")
def test_recorded_quantize_err(case, library):
    sums, expected = recorded_err(case, library)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert np.argmin(sums) == np.argmin(expected)


@recorded("quantize_err")
def test_recorded_sums_reject_wrong_searches(case):
    levels = {"maxq": GOLDEN[case][2]["maxq"] - 1} if case != "quantize_err_8" else {}  # 8 bits: nothing is clamped
    for wrong in ({"err_norm": 3.49}, {"min_p": 0.701}, {"max_p": 1.199}, levels):
        sums, expected = recorded_err(case, **wrong)
        assert not wrong or np.max(np.abs(sums / expected - 1)) > 1e-4, f"not rejected: {wrong}"


@pytest.mark.gpu
def test_quantize_err_kernel(cupy):
    for rows, cols, p_grid in ((1, 1, 1), (3, 5, 96), (1, 1023, 3), (32, 1024, 7), (7, 1025, 2), (128, 4096, 96)):
        x, scale = random(cols, (rows, cols), np.float32), np.abs(random(cols + 1, cols, np.float32)) / 2 + np.float32(0.1)
        numbers = (4, 7, 3.5, 0.7, 1.2, p_grid)
        out, check = banded(cupy, unwritten(p_grid + 1, np.dtype(np.float32)))
        assert quantize_err(on_gpu(cupy, x, 1), on_gpu(cupy, scale, 1), *numbers, out=out) is out
        check()
        np.testing.assert_allclose(out.get(), quantize_err(x, scale, *numbers), rtol=1e-5)
        again = quantize_err(on_gpu(cupy, x), on_gpu(cupy, scale), *numbers)
        assert same_bits(again.get(), out.get()), "a second run differs"


# --- quantize_range ---------------------------------------------------------------------------------------------------


def gptq_problem(seed, k, cols):
    """(weights, scale, upper Cholesky factor of an inverse Hessian), with NaN below the diagonal: nobody may read it."""
    generator = np.random.default_rng(seed)
    tokens = generator.standard_normal((2 * k, k)) @ (np.eye(k) + 0.3 * generator.standard_normal((k, k)) / math.sqrt(k))
    hessian = tokens.T @ tokens / (2 * k) + 0.1 * np.eye(k)
    u = np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32))
    u[np.tril_indices(k, -1)] = np.nan
    scale = (0.3 + 0.1 * generator.random(cols)).astype(np.float32)
    return random(seed + 1, (k, cols), np.float32), scale, u


def follow(weights, quant, u, a, b, dtype):
    """(weights after, errors, weights as their row was reached), given what the rows were quantized to."""
    w, u = weights.astype(dtype), u.astype(dtype)
    errors, reached = [], []
    for c in range(a, b):
        reached.append(w[c].copy())
        errors.append((w[c] - quant[c].astype(dtype)) / u[c, c])
        for r in range(c, len(w)):
            w[r] -= u[c, r] * errors[-1]
    return w, np.array(errors), np.array(reached)


def verify_range(before, after, scale, u, qzero, maxq, a, b):
    """Raise unless `after` = (weights, quant, error, codes) is what the loop makes of `before`.

    A weight near the middle between two levels may go either way, and all that follows in its column depends on it. So
    the quantized values are taken as given; the rest must follow from them, and each choice must be a nearest one.
    """
    weights, quant, error, codes = after
    for got, old in zip(after[1:], before[1:], strict=True):
        assert same_bits(got[:a], old[:a]) and same_bits(got[b:], old[b:]), "a row outside a ... b - 1 was written"
    assert same_bits(weights[:a], before[0][:a])
    exact = follow(before[0], quant, u, a, b, np.float64)
    rounded = follow(before[0], quant, u, a, b, np.float32)
    for got, right, usual in zip((weights, error[a:b]), exact, rounded, strict=False):
        allowed = 2 * np.max(np.abs(usual - right), initial=0) + 2.0**-22 * np.max(np.abs(before[0]))
        worst = np.max(np.abs(got - right), initial=0)
        assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"  # a NaN fails, too
    levels = np.clip(exact[2] / scale + qzero, 0, maxq)
    assert np.max(np.abs(codes[a:b] - levels)) <= 0.5 + 1e-4
    assert np.mean(codes[a:b] == np.rint(levels)) > 0.998 or codes[a:b].size < 500
    scale_16 = scale.astype(np.float16).astype(np.float32)
    assert same_bits(quant[a:b], ((codes[a:b] - qzero) * scale_16).astype(np.float16).astype(np.float32))


def range_state(weights):
    return [
        weights,
        np.full(weights.shape, 9, np.float32),
        np.full(weights.shape, 8, np.float32),
        np.full(weights.shape, 7, np.int16),
    ]


RANGES = [(1, 1, 0, 1), (5, 3, 1, 4), (70, 5, 3, 70), (96, 64, 32, 64), (130, 33, 0, 65), (200, 31, 5, 197)]


@on_both
@pytest.mark.parametrize("k, cols, a, b", RANGES)
def test_quantize_range_follows_the_loop(library, k, cols, a, b):
    weights, scale, u = gptq_problem(k, k, cols)
    before = range_state(weights)
    after = moved(library, *before)
    scale_, u_ = moved(library, scale, u)
    assert quantize_range(*after[:3], scale_, u_, 4, 7, a, b, codes=after[3]) is None
    verify_range(before, [host(array) for array in after], scale, u, 4, 7, a, b)
    without_codes = moved(library, *before)
    quantize_range(*without_codes[:3], scale_, u_, 4, 7, a, b)
    assert all(same_bits(host(one), host(two)) for one, two in zip(without_codes[:3], after[:3], strict=True))


def test_error_spreading_pays():
    """What the loop is for: the error seen through the Hessian is smaller than that of plain rounding."""
    weights, scale, u = gptq_problem(3, 96, 40)
    upper = np.triu(np.nan_to_num(u.astype(np.float64)))
    hessian = np.linalg.inv(upper.T @ upper)
    state = range_state(weights.copy())
    for a in range(0, 96, 32):
        quantize_range(*state[:3], scale, u, 8, 15, a, a + 32)
    plain = quantize(weights, scale, 8, 15)
    loss = [np.trace((weights - q).T.astype(np.float64) @ hessian @ (weights - q)) for q in (state[1], plain)]
    assert loss[0] < 0.8 * loss[1]


def test_cutting_a_range_changes_nothing():
    weights, scale, u = gptq_problem(4, 100, 20)
    whole, cut = range_state(weights.copy()), range_state(weights.copy())
    quantize_range(*whole[:3], scale, u, 8, 15, 0, 90, codes=whole[3])
    for a, b in ((0, 1), (1, 40), (40, 90)):
        quantize_range(*cut[:3], scale, u, 8, 15, a, b, codes=cut[3])
    assert same_bits(whole[3], cut[3]) and same_bits(whole[1], cut[1])
    np.testing.assert_allclose(cut[0], whole[0], atol=1e-6)


@on_both
@recorded("quantize_range")
def test_recorded_quantize_range(case, library):
    inputs, outputs, arguments = GOLDEN[case]
    before = [inputs["weights"], *(np.zeros_like(outputs[name]) for name in ("quant", "error", "out_q"))]
    after = moved(library, *before)
    scale, u = moved(library, inputs["scale"], inputs["hessian_inv"])
    quantize_range(*after[:3], scale, u, *arguments.values(), codes=after[3])
    after = [host(array) for array in after]
    verify_range(before, after, inputs["scale"], inputs["hessian_inv"], *arguments.values())
    assert same_bits(after[3], outputs["out_q"]), "a weight lies between two levels"
    for array, name in zip(after, ("weights", "quant", "error"), strict=False):
        np.testing.assert_allclose(array, outputs[name], atol=1e-5, rtol=1e-5)


def test_verification_rejects_wrong_loops():
    k, cols, a, b = 96, 40, 16, 64
    weights, scale, u = gptq_problem(5, k, cols)
    upper = np.triu(np.nan_to_num(u))
    before = range_state(weights)

    def result(mutate):
        state, settings = range_state(weights.copy()), {"u": upper.copy(), "scale": scale.copy(), "a": a, "b": b}
        mutate(settings)
        quantize_range(*state[:3], settings["scale"], settings["u"], 4, 7, settings["a"], settings["b"], codes=state[3])
        return state

    def no_trailing_update(settings):
        settings["u"][a:b, b:] = 0

    def diagonal_taken_as_one(settings):
        settings["u"][np.diag_indices(k)] = 1

    def no_update_inside(settings):
        settings["u"][a:b, a:b] *= np.eye(b - a, dtype=np.float32)

    def next_columns_scale(settings):
        settings["scale"] = np.roll(scale, 1)

    def a_row_less(settings):
        settings["b"] = b - 1

    verify_range(before, result(lambda settings: None), scale, u, 4, 7, a, b)
    for wrong in (no_trailing_update, diagonal_taken_as_one, no_update_inside, next_columns_scale, a_row_less):
        with pytest.raises(AssertionError):
            verify_range(before, result(wrong), scale, u, 4, 7, a, b)
            pytest.fail(f"not rejected: {wrong.__name__}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "k, cols, a, b",
    [(64, 1, 0, 64), (65, 63, 0, 65), (130, 65, 1, 130), (257, 129, 0, 129), (640, 1000, 128, 256), (300, 4, 0, 300)],
)
def test_quantize_range_kernel(cupy, k, cols, a, b):
    weights, scale, u = gptq_problem(k, k, cols)
    before = range_state(weights)
    banded_arrays = [banded(cupy, array, shift=1) for array in before]
    after = [array for array, _ in banded_arrays]
    scale_, u_ = on_gpu(cupy, scale, 1), on_gpu(cupy, u, 1)
    quantize_range(*after[:3], scale_, u_, 8, 15, a, b, codes=after[3])
    for _, check in banded_arrays:
        check()
    verify_range(before, [array.get() for array in after], scale, u, 8, 15, a, b)
    assert same_bits(scale_.get(), scale) and same_bits(u_.get(), u)
    again = [cupy.asarray(array) for array in before]
    quantize_range(*again[:3], scale_, u_, 8, 15, a, b, codes=again[3])
    assert all(same_bits(one.get(), two.get()) for one, two in zip(again, after, strict=True)), "a second run differs"
    cut = [cupy.asarray(array) for array in before]
    middle = (a + b) // 2
    for first, last in ((a, middle), (middle, b)):
        quantize_range(*cut[:3], scale_, u_, 8, 15, first, last, codes=cut[3])
    assert all(same_bits(one.get(), two.get()) for one, two in zip(cut, after, strict=True)), "cutting the range matters"


# --- quantize_range_inplace -------------------------------------------------------------------------------------------


@on_both
@recorded("quantize_range_inplace")
def test_recorded_quantize_range_inplace(case, library):
    inputs, outputs, arguments = GOLDEN[case]
    weights, scale, codes = moved(library, inputs["weights"], inputs["scale"], outputs["out_q"] * 0)
    assert quantize_range_inplace(weights, scale, *arguments.values(), codes=codes) is None
    assert same_bits(host(weights), outputs["weights"]) and same_bits(host(codes), outputs["out_q"])


@on_both
def test_quantize_range_inplace_writes_its_rows_only(library):
    for k, cols, a, b in ((5, 7, 1, 3), (40, 130, 0, 40), (3, 4, 2, 2)):
        weights, scale = random(k, (k, cols), np.float32), np.abs(random(1, cols, np.float32)) + np.float32(0.01)
        expected, expected_codes = weights.copy(), np.full(weights.shape, -7, np.int16)
        for r, c in np.ndindex(b - a, cols):
            expected[a + r, c], expected_codes[a + r, c] = quantize_one(weights[a + r, c], scale[c], 4, 7)
        for with_codes in (True, False):
            weights_, scale_, codes = moved(library, weights, scale, np.full(weights.shape, -7, np.int16))
            quantize_range_inplace(weights_, scale_, 4, 7, a, b, codes=codes if with_codes else None)
            assert same_bits(host(weights_), expected)
            assert not with_codes or same_bits(host(codes), expected_codes)


# --- both paths -------------------------------------------------------------------------------------------------------


@on_both
def test_empty_ranges_change_nothing(library):
    for k, cols, a, b in ((4, 3, 2, 2), (4, 3, 4, 4), (0, 3, 0, 0), (4, 0, 0, 4)):
        weights, scale, u = np.ones((k, cols), np.float32), np.ones(cols, np.float32), np.eye(k, dtype=np.float32)
        state = moved(library, *range_state(weights))
        scale_, u_ = moved(library, scale, u)
        quantize_range(*state[:3], scale_, u_, 4, 7, a, b, codes=state[3])
        quantize_range_inplace(state[0], scale_, 4, 7, a, b, codes=state[3])
        assert all(same_bits(host(one), two) for one, two in zip(state, range_state(weights), strict=True))
    y = quantize(*moved(library, np.ones((0, 3), np.float32), np.ones(3, np.float32)), 4, 7)
    assert y.shape == (0, 3) and y.dtype == np.float32


def F(*shape):
    return np.ones(shape, np.float32)


def I16(*shape):
    return np.ones(shape, np.int16)


RANGE = (F(6, 4), F(6, 4), F(6, 4), F(4), F(6, 6))
REFUSED = {
    "codes dtype": (TypeError, "codes must have dtype int16", pack_columns, (np.ones((32, 4), np.int32), 4), {}),
    "codes dimensions": (ValueError, "codes must have 2 dim", pack_columns, (I16(32), 4), {}),
    "codes rows": (ValueError, "codes must have rows that fill", pack_columns, (I16(16, 4), 3), {}),
    "bits": (ValueError, "bits must be one of", pack_columns, (I16(32, 4), 7), {}),
    "packed out": (ValueError, "out must have shape", pack_columns, (I16(32, 4), 4), {"out": np.ones((8, 4), np.int32)}),
    "scales dtype": (TypeError, "scales must have dtype int16", pack_rows_4, (F(2, 8),), {}),
    "scales columns": (ValueError, "scales must have a multiple of 8", pack_rows_4, (I16(2, 12),), {}),
    "x dtype": (TypeError, "x must have dtype float32", quantize, (I16(2, 4), F(4), 8, 15), {}),
    "x dimensions": (ValueError, "x must have 2 dim", quantize, (F(4), F(4), 8, 15), {}),
    "scale shape": (ValueError, "scale must have shape", quantize, (F(2, 4), F(3), 8, 15), {}),
    "qzero above maxq": (ValueError, "qzero and maxq must be whole", quantize, (F(2, 4), F(4), 16, 15), {}),
    "qzero not whole": (ValueError, "qzero and maxq must be whole", quantize, (F(2, 4), F(4), 7.5, 15), {}),
    "maxq NaN": (ValueError, "qzero and maxq must be whole", quantize, (F(2, 4), F(4), 8, math.nan), {}),
    "maxq too large": (ValueError, "qzero and maxq must be whole", quantize, (F(2, 4), F(4), 8, 4095), {}),
    "codes shape": (ValueError, "codes must have shape", quantize, (F(2, 4), F(4), 8, 15), {"codes": I16(4, 2)}),
    "out dtype": (TypeError, "out must have dtype", quantize, (F(2, 4), F(4), 8, 15), {"out": I16(2, 4)}),
    "p_grid": (ValueError, "p_grid must be at least 1", quantize_err, (F(2, 4), F(4), 8, 15, 3.5, 0.7, 1.2, 0), {}),
    "p_grid not whole": (TypeError, "p_grid must be a whole", quantize_err, (F(2, 4), F(4), 8, 15, 3.5, 0.7, 1.2, 9.0), {}),
    "err_norm": (ValueError, "err_norm must be a positive", quantize_err, (F(2, 4), F(4), 8, 15, 0.0, 0.7, 1.2, 9), {}),
    "sums": (ValueError, "out must have shape", quantize_err, (F(2, 4), F(4), 8, 15, 3.5, 0.7, 1.2, 9), {"out": F(9)}),
    "weights dtype": (TypeError, "weights must have dtype", quantize_range, (I16(6, 4), *RANGE[1:], 8, 15, 0, 6), {}),
    "quant shape": (ValueError, "quant must have shape", quantize_range, (F(6, 4), F(6, 5), *RANGE[2:], 8, 15, 0, 6), {}),
    "hessian shape": (ValueError, "hessian_inv must have shape", quantize_range, (*RANGE[:4], F(4, 4), 8, 15, 0, 6), {}),
    "rows turned": (ValueError, "a and b must be rows", quantize_range, (*RANGE, 8, 15, 3, 2), {}),
    "rows not whole": (TypeError, "b must be a whole number", quantize_range, (*RANGE, 8, 15, 0, 3.0), {}),
    "rows beyond": (ValueError, "a and b must be rows", quantize_range, (*RANGE, 8, 15, 0, 7), {}),
    "rows before": (ValueError, "a and b must be rows", quantize_range_inplace, (F(6, 4), F(4), 8, 15, -1, 2), {}),
    "range codes": (TypeError, "codes must have dtype", quantize_range, (*RANGE, 8, 15, 0, 6), {"codes": F(6, 4)}),
}


@on_both
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, library):
    error, message, op, arguments, options = REFUSED[case]
    options = {name: move(library, value) for name, value in options.items()}
    with pytest.raises(error, match=message):
        op(*(move(library, a) for a in arguments), **options)


@on_both
def test_refuses_overlaps(library):
    whole = move(library, F(12, 4))
    other, more, scale, u = moved(library, *RANGE[1:])
    with pytest.raises(ValueError, match="out overlaps x partly"):
        quantize(whole[:6], scale, 8, 15, out=whole[1:7])
    with pytest.raises(ValueError, match="overlaps weights"):
        quantize_range(whole[:6], whole[3:9], other, scale, u, 8, 15, 0, 6)
    with pytest.raises(ValueError, match="overlaps hessian_inv"):
        quantize_range(whole[:6], other, more, scale, whole.reshape(-1)[12:].reshape(6, 6), 8, 15, 0, 6)
    with pytest.raises(ValueError, match="weights overlaps scale"):
        quantize_range_inplace(whole, whole[1], 8, 15, 0, 6)
    codes = move(library, I16(32, 4))
    with pytest.raises(ValueError, match="out overlaps codes"):
        pack_columns(codes, 4, out=codes.view(np.int32).reshape(-1)[:16].reshape(4, 4))


def test_refuses_read_only_arrays():
    weights = F(6, 4)
    weights.flags.writeable = False
    with pytest.raises(ValueError, match="weights is read-only"):
        quantize_range(weights, *RANGE[1:], 8, 15, 0, 6)
    with pytest.raises(ValueError, match="weights is read-only"):
        quantize_range_inplace(weights, F(4), 8, 15, 0, 6)


@pytest.mark.gpu
def test_refuses_a_mix_of_libraries(cupy):
    with pytest.raises(TypeError, match="move one with"):
        quantize(cupy.asarray(F(2, 4)), F(4), 8, 15)
    with pytest.raises(TypeError, match="move one with"):
        quantize_range(*(cupy.asarray(array) for array in RANGE), 8, 15, 0, 6, codes=I16(6, 4))
