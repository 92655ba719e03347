"""One group to codes: against scalar loops that round every step, against the identity of the loss, kernels bit for bit."""

import math
import struct

import numpy as np
import pytest
from kernel_checks import banded, host, move, on_both, on_gpu, random, same_bits, unwritten

from cupyq.formats.exl2 import exl2_scales
from cupyq.ops.quantize_group import (
    quantize_group,
    search_scales,
    search_scales_gptq,
    search_scales_workspace_size,
)

WIDTHS = (2, 3, 4, 5, 6, 8)


def f32(value):
    """A Python float rounded to float32: of float32 numbers, +, -, *, / and sqrt come out as fp32 arithmetic has them."""
    return struct.unpack("f", struct.pack("f", value))[0]


def f16(value):
    return struct.unpack("e", struct.pack("e", value))[0]


def heavy(seed, rows, n):
    """Columns of very different sizes with outliers, the third one all zero, and positive weights of the rows."""
    generator = np.random.default_rng(seed)
    target = generator.standard_t(5, (rows, n)) * np.exp(0.4 * generator.standard_normal(n)) * 0.02
    target[:, 2:3] = 0
    return target.astype(np.float32), np.exp(0.3 * generator.standard_normal(rows)).astype(np.float32)


def moved(library, *arrays):
    return [None if a is None else move(library, a.copy()) for a in arrays]


def squared_error(target, weights, scales, lowest, highest):
    """float64 sum of weights * (target - nearest level * scale)^2 in each column, for any shape of scales [..., n]."""
    target, scales = target.astype(np.float64), np.asarray(scales, np.float64)[..., None, :]
    levels = np.clip(np.rint(np.divide(target, scales, out=np.zeros(np.broadcast_shapes(target.shape, scales.shape)),
                                       where=scales > 0)), lowest, highest)  # fmt: skip
    return np.einsum("r,...rn->...n", weights.astype(np.float64), (target - levels * scales) ** 2)


# --- scales of EXL2 ---------------------------------------------------------------------------------------------------

# First and last of 24 shares, the reach of the first code tried, how many codes are tried.
SEARCH = {2: (1.2, 0.3, 1.3, 8), 3: (1.2, 0.4, 1.2, 6), 4: (1.2, 0.4, 1.15, 4)}
SEARCH |= {bits: (1.2, 0.8, 1.15, 3) for bits in (5, 6, 8)}


def column_error(column, weights, scale, lowest, highest):
    inverse, error = f32(1 / scale) if scale else 0.0, 0.0
    for x, weight in zip(column, weights, strict=True):
        level = min(max(round(f32(x * inverse)), lowest), highest)
        off = f32(x - level * scale)
        error = f32(error + f32(f32(off * off) * weight))
    return error


def search_loop(target, weights, bits, wrong=None):
    """(codes, scale_max) in Python's floats; `wrong` names a mistake to make."""
    first, last, reach, window = SEARCH[bits]
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    columns, weights = target.T.tolist(), weights.tolist()
    if wrong == "no weights":
        weights = [1.0] * len(weights)
    if wrong == "symmetric levels":
        lowest = -highest
    largest = [max(map(abs, column)) for column in columns]
    to_base, step = f32(2 / (2**bits - 1)), f32((first - last) / 23)
    plain, best = f32(max(largest) * to_base), None
    for i in range(24):
        scale_max = f16(min(65504.0, f32(plain * f32(f32(first) - f32(step * i)))))
        unit = scale_max / 256 if wrong == "256 not rounded" else f16(scale_max / 256)
        codes, errors = [], []
        for column, extreme in zip(columns, largest, strict=True):
            ratio = f32(f32(f32(extreme * to_base) * f32(reach)) / unit) if unit else math.inf
            top = max(1, math.ceil(min(16, f32(math.sqrt(ratio)))))
            tried = [max(1, top - w) for w in range(window)]
            scales = [f16((s if wrong == "linear codes" else s * s) * unit) for s in tried]
            found = [column_error(column, weights, scale, lowest, highest) for scale in scales]
            chosen = 0 if wrong == "plain codes" else found.index(min(found))
            codes.append(tried[chosen] - 1)
            errors.append(found[chosen])
        if best is None or math.fsum(errors) < best[0]:
            best = math.fsum(errors), codes, scale_max
    return np.array(best[1], np.uint8), np.array([best[2]], np.float16)


@on_both
@pytest.mark.parametrize("bits", WIDTHS)
def test_search_scales_against_a_loop(library, bits):
    # The unit of the last two is subnormal in float16, and 0.
    for rows, n, size in ((1, 1, 1.0), (5, 3, 1.0), (6, 35, 1.0), (7, 4, 1e-4 * 2**bits), (7, 4, 1e-6)):
        target, weights = heavy(rows + bits, rows, n)
        target *= np.float32(size)
        given = moved(library, target, weights)
        codes, scale_max = search_scales(*given, bits)
        expected_codes, expected_max = search_loop(target, weights, bits)
        assert same_bits(host(codes), expected_codes) and same_bits(host(scale_max), expected_max)
        (scales,) = moved(library, np.full(n, np.nan, np.float16))
        search_scales(*given, bits, scales16=scales)
        assert same_bits(host(scales), scales_of(expected_codes, expected_max))


@pytest.mark.parametrize("wrong", ["no weights", "symmetric levels", "256 not rounded", "linear codes", "plain codes"])
def test_the_loop_bites(wrong):
    target, weights = heavy(1, 12, 9)
    target, weights = target * np.float32(1e-2 if wrong == "256 not rounded" else 1), weights**5
    codes, scale_max = search_scales(target, weights, 3)
    assert same_bits(codes, search_loop(target, weights, 3)[0])
    expected_codes, expected_max = search_loop(target, weights, 3, wrong)
    assert not (same_bits(codes, expected_codes) and same_bits(scale_max, expected_max))


def exllamav2_scales(target, bits):
    """exllamav2's search (adaptivegptq.py): codes of the largest weights, one share of 97 for all columns, exponent 3.5."""
    target, maxq = target.astype(np.float64), 2**bits - 1
    base = (np.abs(target).max(0) + 1e-12) / (maxq / 2)
    s = np.clip(np.rint(16 * np.sqrt(base / base.max())), 1, 16)
    plain, errors = (s / 16) ** 2 * base.max(), []
    shares = [0.70 * (1 - i / 96) + 1.20 * (i / 96) for i in range(97)]
    for share in shares:
        levels = np.clip(np.rint(target / (plain * share)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append(np.sum(np.abs(levels * plain * share - target) ** 3.5))
    unit = np.float16(np.float16(base.max() * shares[int(np.argmin(errors))]) / 256)
    return (s**2 * np.float64(unit)).astype(np.float16)


def scales_of(codes, scale_max):
    """By formats/exl2.py, from the words of a file."""
    padded = np.pad(codes, (0, -len(codes) % 8)).astype(np.uint32).reshape(1, -1, 8)
    words = np.bitwise_or.reduce(padded << (4 * np.arange(8, dtype=np.uint32)), axis=2).view(np.int32)
    return exl2_scales(words, scale_max)[0, : len(codes)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "n"), [(32, 256), (128, 200)])
def test_searched_scales_are_good(bits, rows, n):
    """At most 0.97 of exllamav2's error; at most 1.5 % (groups of 32 at 8 bits: 5 %) above the best of a fine grid."""
    target, weights = heavy(bits, rows, n)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, scale_max = search_scales(target, weights, bits)
    error = squared_error(target, weights, scales_of(codes, scale_max), lowest, highest).sum()
    theirs = squared_error(target, weights, exllamav2_scales(target, bits), lowest, highest).sum()
    assert error <= 0.97 * theirs
    plain, s = np.abs(target).max() * 2 / (2**bits - 1), np.arange(1, 17)[:, None]
    fine = []
    for share in np.linspace(0.25, 1.3, 64):
        unit = np.float16(np.float16(plain * share) / 256)
        scales = np.broadcast_to((s * s * np.float64(unit)).astype(np.float16), (16, n))
        fine.append(squared_error(target, weights, scales, lowest, highest).min(0).sum())
    assert error <= (1.05 if (bits, rows) == (8, 32) else 1.015) * min(fine)


def test_search_scales_of_nothing_and_of_zeros():
    ones = np.ones(3, np.float32)
    codes, scale_max = search_scales(np.zeros((3, 0), np.float32), ones, 4)
    assert codes.shape == (0,) and scale_max == 0
    codes, scale_max = search_scales(np.zeros((3, 5), np.float32), ones, 4)
    assert scale_max == 0 and not scales_of(codes, scale_max).any()
    target, weights = heavy(3, 3, 5)
    codes, scale_max = search_scales(target * np.float32(2e38), weights, 4)
    assert scale_max == 65504


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
def test_search_scales_kernel(cupy, bits):
    shapes = [(1, 1), (31, 31), (32, 33), (64, 256), (65, 257), (128, 1025)]
    for rows, n in shapes + ([(96, 8193)] if bits in (2, 8) else []):
        target, weights = heavy(n, rows, n)
        expected = search_scales(target, weights, bits)
        target_, weights_ = on_gpu(cupy, target, 1), on_gpu(cupy, weights, 3)
        codes, check_codes = banded(cupy, np.full(n, 77, np.uint8), shift=1)
        scale_max, check_max = banded(cupy, unwritten(1, np.dtype(np.float16)), shift=1)
        scales, check_scales = banded(cupy, unwritten(n, np.dtype(np.float16)), shift=1)
        workspace, check_workspace = banded(cupy, np.full(search_scales_workspace_size(n), 0xFF, np.uint8))
        outputs = {"codes": codes, "scale_max": scale_max, "scales16": scales, "workspace": workspace}
        found = search_scales(target_, weights_, bits, **outputs)
        assert found[0] is codes and found[1] is scale_max
        for check in (check_codes, check_max, check_scales, check_workspace):
            check()
        assert same_bits(codes.get(), expected[0]) and same_bits(scale_max.get(), expected[1])
        assert same_bits(scales.get(), scales_of(*expected))
        assert same_bits(target_.get(), target) and same_bits(weights_.get(), weights)
        again = search_scales(target_, weights_, bits)
        assert same_bits(again[0].get(), expected[0]) and same_bits(again[1].get(), expected[1])


# --- scales of GPTQ ---------------------------------------------------------------------------------------------------

SEARCH_GPTQ = {2: (1.4, 0.3), 3: (1.2, 0.4), 4: (1.1, 0.5), 5: (1.05, 0.7), 6: (1.05, 0.7), 8: (1.05, 0.7)}


def search_gptq_loop(target, weights, bits, is_symmetric):
    maxq, (first, last) = 2**bits - 1, SEARCH_GPTQ[bits]
    step, scales, zeros = f32((first - last) / 31), [], []
    for column in target.T.tolist():
        low, high = min(0.0, *column, 0.0), max(0.0, *column, 0.0)
        if is_symmetric:
            plain, tried = f32(max(high, -low) * f32(2 / maxq)), [2 ** (bits - 1)]
        else:
            plain = f32(f32(high - low) * f32(1 / maxq))
            nearest = min(max(round(f32(-low * (f32(1 / plain) if plain else 0.0))), 1), maxq)
            tried = [min(max(nearest + z, 1), maxq) for z in (0, -1, 1)]
        best = None
        for i in range(32):
            scale = f16(min(65504.0, f32(plain * f32(f32(first) - f32(step * i)))))
            for zero in tried:
                error = column_error(column, weights.tolist(), scale, -zero, maxq - zero)
                if best is None or error < best[0]:
                    best = error, scale, zero
        scales.append(best[1])
        zeros.append(best[2])
    return np.array(scales, np.float16), np.array(zeros, np.uint8)


@on_both
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_search_scales_gptq_against_a_loop(library, bits, is_symmetric):
    for rows, n in ((1, 1), (5, 4), (9, 33), (130, 3)):
        target, weights = heavy(rows + bits, rows, n)
        target[:, -1] = np.abs(target[:, -1]) + np.float32(0.01)  # all of one sign: no zero point below 1 is given
        found = search_scales_gptq(*moved(library, target, weights), bits, is_symmetric)
        expected = search_gptq_loop(target, weights, bits, is_symmetric)
        assert all(same_bits(host(a), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_gptq_scales_are_good(bits):
    """Better than the scales of the extremes, whose zero points are rounded; asymmetric ones serve lopsided columns."""
    target, weights = heavy(bits, 128, 60)
    target += np.float32(0.01)
    errors = []
    for is_symmetric in (True, False):
        scales, zeros = search_scales_gptq(target, weights, bits, is_symmetric)
        levels = -zeros.astype(np.float64), 2.0**bits - 1 - zeros
        errors.append(squared_error(target, weights, scales, *levels).sum())
        low, high = np.minimum(target.min(0), 0), np.maximum(target.max(0), 0)
        if is_symmetric:
            assert np.all(zeros == 2 ** (bits - 1))
            low, high = -np.maximum(-low, high), np.maximum(-low, high)
        plain = (high - low) / (2**bits - 1)
        zero = np.rint(-low / plain) if not is_symmetric else np.full(60, 2.0 ** (bits - 1))
        usual = squared_error(target, weights, plain.astype(np.float16), -zero, 2**bits - 1 - zero).sum()
        assert errors[-1] < 0.97 * usual
        assert np.all((zeros >= 1) & (zeros < 2**bits))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_search_scales_gptq_kernel(cupy, is_symmetric):
    for bits, rows, n in ((2, 1, 1), (3, 127, 31), (4, 128, 32), (4, 129, 33), (8, 300, 65), (5, 32, 1000), (6, 64, 4099)):
        target, weights = heavy(n, rows, n)
        expected = search_scales_gptq(target, weights, bits, is_symmetric)
        target_, weights_ = on_gpu(cupy, target, 1), on_gpu(cupy, weights, 1)
        scales, check_scales = banded(cupy, unwritten(n, np.dtype(np.float16)), shift=1)
        zeros, check_zeros = banded(cupy, np.full(n, 77, np.uint8), shift=1)
        found = search_scales_gptq(target_, weights_, bits, is_symmetric, scales=scales, zeros=zeros)
        assert found[0] is scales and found[1] is zeros
        check_scales()
        check_zeros()
        assert same_bits(scales.get(), expected[0]) and same_bits(zeros.get(), expected[1])
        again = search_scales_gptq(target_, weights_, bits, is_symmetric)
        assert same_bits(again[0].get(), expected[0]) and same_bits(again[1].get(), expected[1])
        assert same_bits(target_.get(), target) and same_bits(weights_.get(), weights)


# --- codes ------------------------------------------------------------------------------------------------------------


def group_problem(seed, rows, n, bits):
    """(target, original, factor, loss weights, scales, zeros): NaN where the factor must not be read, two scales of 0."""
    target, weights = heavy(seed, rows, n)
    generator = np.random.default_rng(seed)
    original = target + random(seed + 1, (rows, n), np.float32, 0.004)
    factor = (generator.standard_normal((rows, rows)) * (0.6 / math.sqrt(rows))).astype(np.float32)
    factor[np.tril_indices(rows)] = np.nan
    scales = (np.abs(target).max(0) * generator.uniform(0.5, 1.2, n) * 2 / (2**bits - 1)).astype(np.float16)
    scales[n // 2 :: 40] = 0
    return target, original, factor, weights, scales, generator.integers(0, 2**bits, n).astype(np.uint8)


def group_loop(target, original, factor, weights, scales, bits, zeros=None, wrong=None):
    rows, n = target.shape
    codes, error, loss = np.empty((rows, n), np.uint8), np.empty((rows, n), np.float32), np.empty(n, np.float32)
    factor = np.nan_to_num(factor).T if wrong == "transposed" else factor
    for c in range(n):
        scale, zero = float(scales[c]), 2 ** (bits - 1) if zeros is None else int(zeros[c])
        inverse, errors, sums = f32(1 / scale) if scale else 0.0, [], [0.0] * 8
        for r in range(rows):
            t = float(target[r, c])
            for j in range(0 if wrong != "no feedback" else r, r):
                t = f32(t + f32(float(factor[j, r]) * errors[j]))
            code = min(max(round(f32(t * inverse)) + zero, 0), 2**bits - 1)
            q = (code - zero) * scale if wrong == "not rounded" else f16((code - zero) * scale)
            errors.append(f32(float(t if wrong == "error of t" else original[r, c]) - q))
            off = f32(t - q)
            term = f32(off * off) if wrong == "no loss weights" else f32(f32(off * off) * float(weights[r]))
            sums[r % 8] = f32(sums[r % 8] + term)
            codes[r, c], error[r, c] = code, errors[-1]
        total = 0.0
        for part in sums:
            total = f32(total + part)
        loss[c] = total
    return codes, error, loss


@on_both
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_group_against_a_loop(library, bits):
    for rows, n in ((1, 1), (3, 5), (33, 4), (65, 2), (9, 34)):
        *arrays, zeros = group_problem(rows + bits, rows, n, bits)
        for given in (None, zeros):
            expected = group_loop(*arrays, bits, given)
            *arrays_, given_ = moved(library, *arrays, given)
            found = quantize_group(*arrays_, bits, zeros=given_)
            assert all(same_bits(host(a), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("wrong", ["transposed", "no feedback", "not rounded", "error of t", "no loss weights"])
def test_the_loop_of_codes_bites(wrong):
    *arrays, _ = group_problem(5, 12, 6, 4)
    found, expected = quantize_group(*arrays, 4), group_loop(*arrays, 4, wrong=wrong)
    assert not all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def correlated(k, n):
    """(weights float64 [k, n], Hessian, A strictly upper, D) with H = (I + A) diag(D) (I + A)^T, in falling order of H."""
    generator = np.random.default_rng(k)
    tokens = generator.standard_normal((4 * k, k)) @ (np.eye(k) + 2.5 * generator.standard_normal((k, k)) / math.sqrt(k))
    hessian = tokens.T @ tokens / (4 * k)
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian = hessian[np.ix_(order, order)] + 0.01 * np.trace(hessian) / k * np.eye(k)
    lower = np.linalg.cholesky(hessian[::-1, ::-1])
    upper = lower[::-1, ::-1]
    root = np.diag(upper)
    return generator.standard_normal((k, n)), hessian, upper / root - np.eye(k), root**2


@on_both
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_losses_of_groups_add_up_to_the_error_of_the_output(library, bits):
    """Groups of 64, 32 and 96 rows as the quantizer takes them: tr(E^T H E), and less of it than rounding leaves."""
    weights, hessian, a, d = correlated(192, 40)
    w, a32, d32 = weights.astype(np.float32), a.astype(np.float32), d.astype(np.float32)
    error, losses, rounded = np.zeros_like(w), 0.0, np.zeros_like(w)
    for rows in (slice(0, 64), slice(64, 96), slice(96, 192)):
        target = (w[rows] + a32[: rows.start, rows].T @ error[: rows.start]).astype(np.float32)
        codes, scale_max = search_scales(*moved(library, target, d32[rows]), bits)
        scales = scales_of(host(codes), host(scale_max))
        block = np.ascontiguousarray(a32[rows, rows])
        codes, error_, loss = map(host, quantize_group(*moved(library, target, w[rows], block, d32[rows], scales), bits))
        error[rows], losses = error_, losses + loss.sum(dtype=np.float64)
        values = ((codes.astype(np.float32) - 2 ** (bits - 1)) * scales.astype(np.float32)).astype(np.float16)
        assert same_bits(error_, w[rows] - values.astype(np.float32))
        codes, scale_max = search_scales(w[rows].copy(), np.ones_like(d32[rows]), bits)
        scales = scales_of(codes, scale_max).astype(np.float32)
        levels = np.clip(np.rint(w[rows] / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rounded[rows] = w[rows] - levels * scales

    def trace(e):
        return np.einsum("kn,kj,jn->", e.astype(np.float64), hessian, e.astype(np.float64))

    assert losses == pytest.approx(trace(error), rel=1e-4)
    assert trace(error) < 0.6 * trace(rounded)


def test_codes_of_no_columns_and_of_what_lies_outside():
    empty, ones = np.zeros((3, 0), np.float32), np.ones(3, np.float32)
    codes, error, loss = quantize_group(empty, empty, np.zeros((3, 3), np.float32), ones, np.zeros(0, np.float16), 4)
    assert codes.shape == error.shape == (3, 0) and loss.shape == (0,)
    far = np.array([[-1e30, 1e30, -0.0]], np.float32)
    scales = np.array([1, 1, 0], np.float16)
    codes, error, _ = quantize_group(far, far, np.zeros((1, 1), np.float32), ones[:1], scales, 3)
    assert codes.tolist() == [[0, 7, 4]] and error[0, 2] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("has_zeros", [False, True])
def test_quantize_group_kernel(cupy, has_zeros):
    shapes = [
        (2, 1, 1),
        (3, 8, 31),
        (4, 31, 32),
        (5, 32, 33),
        (6, 33, 64),
        (8, 64, 65),
        (2, 65, 127),
        (3, 128, 300),
        (4, 127, 1),
    ]
    for bits, rows, n in [*shapes, (4, 128, 5000)]:
        *arrays, zeros = group_problem(n, rows, n, bits)
        zeros = zeros if has_zeros else None
        expected = quantize_group(*arrays, bits, zeros=zeros)
        inputs = [None if a is None else on_gpu(cupy, a, 1) for a in (*arrays, zeros)]
        initial = (np.full((rows, n), 77, np.uint8), unwritten((rows, n), np.float32), unwritten(n, np.float32))
        codes, error, loss = outputs = [banded(cupy, array, shift=1) for array in initial]
        given = dict(zeros=inputs[5], codes=codes[0], error=error[0], loss=loss[0])
        found = quantize_group(*inputs[:5], bits, **given)
        for result, (array, check), value in zip(found, outputs, expected, strict=True):
            assert result is array
            check()
            assert same_bits(array.get(), value)
        again = quantize_group(*inputs[:5], bits, zeros=inputs[5])
        assert all(same_bits(a.get(), b) for a, b in zip(again, expected, strict=True))
        for array, before in zip(inputs, (*arrays, zeros), strict=True):
            assert array is None or same_bits(array.get(), before)


# --- errors -----------------------------------------------------------------------------------------------------------


@on_both
def test_wrong_arguments(library):
    *arrays, zeros = group_problem(1, 4, 6, 4)
    *arrays, zeros = moved(library, *arrays, zeros)
    target, original, factor, weights, scales = arrays
    tall, tall_weights = moved(library, np.ones((129, 2), np.float32), np.ones(129, np.float32))
    flat, wide, double = moved(library, np.ones(3, np.float16), np.ones((4, 7), np.float32), np.ones((4, 6)))
    overlapping, halves = target.view(np.uint8)[0, :6], target.view(np.float16)[0, :6]
    none = target[:0]
    cases = [
        (lambda: search_scales(target, weights, 7), ValueError, "bits"),
        (lambda: search_scales(double, weights, 4), TypeError, "target"),
        (lambda: search_scales(target.T, weights, 4), ValueError, "target"),
        (lambda: search_scales(weights, weights, 4), ValueError, "target"),
        (lambda: search_scales(tall, tall_weights, 4), ValueError, "128 rows"),
        (lambda: search_scales(none, weights[:0], 4), ValueError, "target"),
        (lambda: search_scales(target, weights[:3], 4), ValueError, "weights"),
        (lambda: search_scales(target, weights, 4, codes=scales), TypeError, "codes"),
        (lambda: search_scales(target, weights, 4, codes=overlapping), ValueError, "codes overlaps target"),
        (lambda: search_scales(target, weights, 4, scale_max=flat), ValueError, "scale_max"),
        (lambda: search_scales(target, weights, 4, scales16=flat), ValueError, "scales16"),
        (lambda: search_scales(target, weights, 4, scales16=zeros), TypeError, "scales16"),
        (lambda: search_scales(target, weights, 4, scales16=halves), ValueError, "scales16 overlaps target"),
        (lambda: search_scales(target, weights, 4, scale_max=scales[2:3], scales16=scales), ValueError, "overlaps"),
        (lambda: search_scales_gptq(target, weights, 1, True), ValueError, "bits"),
        (lambda: search_scales_gptq(none, weights[:0], 4, True), ValueError, "target"),
        (lambda: search_scales_gptq(target, weights, 4, True, zeros=overlapping), ValueError, "zeros overlaps target"),
        (lambda: search_scales_gptq(target, weights, 4, True, scales=flat), ValueError, "scales"),
        (lambda: quantize_group(target, original, factor, weights, scales, 9), ValueError, "bits"),
        (lambda: quantize_group(target, wide, factor, weights, scales, 4), ValueError, "original"),
        (lambda: quantize_group(target, original, original, weights, scales, 4), ValueError, "factor"),
        (lambda: quantize_group(target, original, factor, weights[:2], scales, 4), ValueError, "loss_weights"),
        (lambda: quantize_group(target, original, factor, weights, weights, 4), TypeError, "scales16"),
        (lambda: quantize_group(target, original, factor, weights, scales, 4, zeros=scales), TypeError, "zeros"),
        (lambda: quantize_group(target, original, factor, weights, scales, 4, error=target), ValueError, "error overlaps"),
        (lambda: quantize_group(target, original, factor, weights, scales, 4, codes=zeros), ValueError, "codes"),
        (lambda: quantize_group(target, original, factor, weights, scales, 4, loss=target[0]), ValueError, "loss overlaps"),
    ]  # fmt: skip
    for call, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_short_workspace_is_refused(cupy):
    target, weights = (cupy.asarray(a) for a in heavy(1, 4, 6))
    for size, words in ((search_scales_workspace_size(6) - 1, "search_scales_workspace_size"), (0, "at least")):
        with pytest.raises(ValueError, match=words):
            search_scales(target, weights, 4, workspace=cupy.empty(size, np.uint8))
