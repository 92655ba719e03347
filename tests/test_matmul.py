"""Unquantised products: the reference against plain sums, cuBLAS against float64."""

import math

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, golden

from cupyq.ops.matmul import gemm, matmul, matmul_reference

ULP = {np.dtype(np.float16): 2**-11, np.dtype(ml_dtypes.bfloat16): 2**-8, np.dtype(np.float32): 2**-23}
DTYPES = list(ULP)


def random(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("transpose", [False, True])
def test_reference_is_the_plain_sum(transpose):
    rng = np.random.default_rng(0)
    x, bias = random(rng, np.float32, 2, 3, 17), random(rng, np.float32, 5)
    weight = random(rng, np.float32, *((5, 17) if transpose else (17, 5)))
    y = matmul(x, weight, transpose=transpose, bias=bias)
    assert y.shape == (2, 3, 5)
    for index in np.ndindex(2, 3, 5):
        column = weight[index[2]] if transpose else weight[:, index[2]]
        exact = math.fsum([float(a) * float(b) for a, b in zip(x[index[:2]], column, strict=True)] + [float(bias[index[2]])])
        assert abs(y[index] - exact) <= 2**-24 * abs(exact) + 1e-12


def bad_calls(xp):
    x, weight = xp.zeros((2, 8), np.float16), xp.zeros((8, 4), np.float16)
    return [
        (TypeError, "weight must have dtype float16", lambda: matmul(x, weight.astype(np.float32))),
        (ValueError, "x must have 6", lambda: matmul(x, xp.zeros((6, 4), np.float16))),
        (ValueError, "x must have 4", lambda: matmul(x, weight, transpose=True)),
        (ValueError, "weight must have 2", lambda: matmul(x, weight[0])),
        (ValueError, "bias must have shape", lambda: matmul(x, weight, bias=xp.zeros(5, np.float16))),
        (ValueError, "C-contiguous", lambda: matmul(x, xp.zeros((8, 8), np.float16)[:, ::2])),
        (ValueError, "out must have shape", lambda: matmul(x, weight, out=xp.zeros((2, 5), np.float16))),
        (TypeError, "out must have dtype", lambda: matmul(x, weight, dtype=np.int32)),
        (ValueError, "out overlaps x", lambda: matmul(weight, xp.zeros((4, 4), np.float16), out=weight)),
        (ValueError, "no rows", lambda: matmul(xp.zeros((2, 0), np.float16), xp.zeros((0, 4), np.float16))),
        (TypeError, "list", lambda: matmul([[1.0]], weight)),
    ]


def test_bad_calls_get_clear_errors():
    for error, text, call in bad_calls(np):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.gpu
def test_bad_calls_get_clear_errors_on_the_gpu(cupy):
    for error, text, call in bad_calls(cupy):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape):
    assert matmul(np.zeros(shape, np.float16), np.zeros((8, 4), np.float16)).shape == (*shape[:-1], 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_products(dtype, transpose, cupy):
    rng = np.random.default_rng(1)
    for rows, k, n in ((1, 1, 1), (1, 64, 33), (3, 257, 40), (130, 512, 264), (7, 4096, 8)):
        x, weight = random(rng, dtype, rows, k), random(rng, dtype, *((n, k) if transpose else (k, n)))
        for bias in (None, random(rng, np.float32, n), random(rng, dtype, n)):
            for result in {dtype, np.dtype(np.float32)}:
                guarded = cupy.asarray(np.full((rows + 2, n), np.nan, result))
                on_gpu = [None if a is None else cupy.asarray(a) for a in (x, weight, bias)]
                y = matmul(*on_gpu[:2], transpose=transpose, bias=on_gpu[2], dtype=result, out=guarded[1:-1]).get()
                assert np.isnan(guarded.get()[[0, -1]].astype(np.float32)).all()
                check_product(y, x, weight, transpose, bias)
                again = matmul(*on_gpu[:2], transpose=transpose, bias=on_gpu[2], dtype=result).get()
                assert again.tobytes() == y.tobytes()


def check_product(y, x, weight, transpose, bias):
    exact = matmul_reference(x, weight, transpose, bias)
    single = [a.astype(np.float32) for a in (x, weight.T if transpose else weight)]
    same = (single[0] @ single[1] + (0 if bias is None else bias.astype(np.float32))).astype(y.dtype)
    # A bias is rounded to y's dtype before the product is accumulated onto it.
    slack = 0 if bias is None else ULP[y.dtype] * np.abs(bias.astype(np.float64)).max()
    # fp32 sums may be taken in any order: Higham's probabilistic bound, of the order sqrt(k) roundings of the terms' sum.
    magnitude = np.abs(single[0]).astype(np.float64) @ np.abs(single[1]).astype(np.float64)
    slack += 2**-24 * 4 * np.sqrt(x.shape[-1]) * magnitude.max()
    error = np.abs(y.astype(np.float64) - exact)
    allowed = 2 * np.abs(same.astype(np.float64) - exact).max() + ULP[y.dtype] * np.abs(exact) + slack
    assert (error <= allowed).all(), f"error {error.max()}, allowed {allowed.max()}"


@pytest.mark.gpu
def test_the_tolerance_bites(cupy):
    rng = np.random.default_rng(2)
    x, weight, bias = random(rng, np.float16, 5, 256), random(rng, np.float16, 256, 64), random(rng, np.float16, 64)
    y = matmul(cupy.asarray(x), cupy.asarray(weight), bias=cupy.asarray(bias)).get()
    check_product(y, x, weight, False, bias)
    shifted = np.roll(weight, 1, axis=1)
    wrong_calls = [(x, shifted, bias), (x, weight, None), (x, weight, -bias), (x[::-1], weight, bias)]
    for a, b, c in wrong_calls:
        with pytest.raises(AssertionError):
            check_product(y, a, b, False, c)
            pytest.fail("not noticed", pytrace=False)


@pytest.mark.gpu
def test_many_rows(cupy):
    rng = np.random.default_rng(3)
    x, weight = random(rng, np.float16, 100_003, 64), random(rng, np.float16, 8, 64)
    y = matmul(cupy.asarray(x), cupy.asarray(weight), transpose=True, bias=cupy.zeros(8, np.float16)).get()
    check_product(y, x, weight, True, np.zeros(8, np.float16))


# --- gemm -------------------------------------------------------------------------------------------------------------

GEMM_CASES = [case for case in golden("element") if case.startswith("gemm_")]


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (1.0, 1.0), (-0.75, 2.5), (0.0, 1.0)])
def test_gemm_is_the_plain_sum(alpha, beta):
    rng = np.random.default_rng(1)
    a, b, c = random(rng, np.float32, 3, 17), random(rng, np.float32, 17, 5), random(rng, np.float32, 3, 5)
    before = c.copy()
    assert gemm(a, b, c, alpha=alpha, beta=beta) is c
    for i, j in np.ndindex(3, 5):
        exact = alpha * math.fsum(float(x) * float(y) for x, y in zip(a[i], b[:, j], strict=True)) + beta * float(before[i, j])
        assert abs(c[i, j] - exact) <= 2**-23 * abs(exact) + 1e-12


def check_gemm_golden(case, place):
    inputs, outputs, arguments = golden("element")[case]
    a, b, before = inputs["a"], inputs["b"], inputs["c"]
    c = gemm(place(a), place(b), place(before.copy()), **arguments)
    c = c if isinstance(c, np.ndarray) else c.get()
    exact = arguments["alpha"] * (a.astype(np.float64) @ b.astype(np.float64)) + arguments["beta"] * before.astype(np.float64)
    size = np.linalg.norm(exact)
    assert np.linalg.norm(c - exact) / size <= min(np.linalg.norm(outputs["c"] - exact) / size, 5e-4)


@pytest.mark.parametrize("case", GEMM_CASES)
def test_gemm_is_nearer_to_the_exact_product_than_the_recorded_one(case):
    check_gemm_golden(case, np.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMM_CASES)
def test_gemm_is_nearer_to_the_exact_product_than_the_recorded_one_on_the_gpu(cupy, case):
    check_gemm_golden(case, cupy.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_kernel_matches_the_reference(cupy, dtype):
    rng = np.random.default_rng(2)
    for m, k, n in ((1, 1, 1), (1, 300, 7), (5, 33, 129), (70, 64, 65)):
        for alpha, beta in ((1.0, 0.0), (0.5, -2.0), (0.0, 3.0)):
            a, b, c = (random(rng, dtype, *shape) for shape in ((m, k), (k, n), (m, n)))
            exact = alpha * (a.astype(np.float64) @ b.astype(np.float64)) + beta * c.astype(np.float64)
            reference = alpha * (a @ b).astype(np.float32) + beta * c.astype(np.float32)
            start = np.full_like(c, np.nan) if beta == 0 else c
            results = [
                gemm(cupy.asarray(a), cupy.asarray(b), cupy.asarray(start), alpha=alpha, beta=beta).get() for _ in range(2)
            ]
            assert results[0].tobytes() == results[1].tobytes()
            exact_bound(results[0], exact, reference.astype(dtype), ulp=ULP[dtype])


def bad_gemm_calls(xp):
    a, b, c = xp.zeros((2, 8), np.float16), xp.zeros((8, 4), np.float16), xp.zeros((2, 4), np.float16)
    return [
        (TypeError, "b must have dtype float16", lambda: gemm(a, b.astype(np.float32), c)),
        (ValueError, "b must have shape", lambda: gemm(a, b[:4], c)),
        (ValueError, "c must have shape", lambda: gemm(a, b, c[:1])),
        (TypeError, "alpha must be a number", lambda: gemm(a, b, c, alpha="1")),
        (TypeError, "beta must be a number", lambda: gemm(a, b, c, beta=None)),
        (ValueError, "no columns", lambda: gemm(a[:, :0].copy(), b[:0], c)),
        (ValueError, "c overlaps b", lambda: gemm(xp.zeros((8, 8), np.float16), b, b)),
    ]


def test_bad_gemm_calls_get_clear_errors():
    for error, text, call in bad_gemm_calls(np):
        with pytest.raises(error, match=text):
            call()
    read_only = np.zeros((2, 4), np.float16)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="c is read-only"):
        gemm(np.zeros((2, 8), np.float16), np.zeros((8, 4), np.float16), read_only)


@pytest.mark.gpu
def test_bad_gemm_calls_get_clear_errors_on_the_gpu(cupy):
    for error, text, call in bad_gemm_calls(cupy):
        with pytest.raises(error, match=text):
            call()
