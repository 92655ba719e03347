"""add and add_weighted: references against plain sums, kernels against float64."""

import itertools
import math

import numpy as np
import pytest
from kernel_checks import (
    FLOATS,
    banded,
    bfloat16,
    float16,
    float32,
    host,
    move,
    near,
    on_both,
    on_gpu,
    random,
    same_bits,
    unwritten,
)

from cupyq.ops.elementwise import add, add_weighted

PAIRS = list(itertools.product(FLOATS, FLOATS))


def weighted_in(dtype, x, y, weights):
    """The formula in that dtype's arithmetic; rows of weight 0 are x's."""
    x, y, weights = x.astype(dtype), y.astype(dtype), weights.astype(dtype)[:, None]
    with np.errstate(invalid="ignore"):
        return np.where(weights == 0, x, x + weights * y)


@pytest.mark.parametrize("x_dtype, y_dtype", PAIRS, ids=lambda d: d.name)
def test_references_against_loops(x_dtype, y_dtype):
    x, y = random(1, (4, 7), x_dtype), random(2, (4, 7), y_dtype)
    weights = np.array([0.3, 0.0, -2.0, 1.0], np.float32)
    sums, weighted = add(x, y), add_weighted(x, y, weights)
    assert sums.dtype == weighted.dtype == x_dtype
    for r, c in np.ndindex(4, 7):
        exact = math.fsum([float(x[r, c]), float(y[r, c])])
        assert float(sums[r, c]) == float(np.array(exact, np.float32).astype(x_dtype))
        exact = math.fsum([float(x[r, c]), float(weights[r]) * float(y[r, c])])
        assert float(weighted[r, c]) == float(np.array(exact, np.float32).astype(x_dtype))


@on_both
def test_ieee(library):
    x = move(library, np.array([60000, np.inf, np.inf, np.nan, -0.0], np.float16))
    y = move(library, np.array([60000, 1, -np.inf, 1, -0.0], np.float16))
    z = host(add(x, y))
    assert z[0] == np.inf and z[1] == np.inf and np.isnan(z[2]) and np.isnan(z[3]) and z[4] == 0 and np.signbit(z[4])


@on_both
def test_zero_weight_hides_the_row(library):
    for dtype, shape in itertools.product(FLOATS, [(4, 8), (4, 3)]):
        x, y = random(1, shape, dtype), random(2, shape, dtype)
        y[1], y[3, :2] = np.nan, np.inf
        weights = np.array([1.0, 0.0, np.nan, -0.0], np.float32)
        z = host(add_weighted(move(library, x), move(library, y), move(library, weights)))
        assert same_bits(z[1], x[1]) and same_bits(z[3], x[3])
        assert np.all(np.isnan(z[2].astype(np.float32)))
        np.testing.assert_array_equal(z[0], (x[0].astype(np.float32) + y[0].astype(np.float32)).astype(dtype))
        in_place = move(library, x.copy())
        add_weighted(in_place, move(library, y), move(library, weights), out=in_place)
        assert same_bits(host(in_place), z)


def test_bound_rejects_wrong_formulas():
    x, y, weights = random(1, (40, 33), float16), random(2, (40, 33), float16), random(3, 40, float32)
    exact, rounded = weighted_in(np.float64, x, y, weights), weighted_in(np.float32, x, y, weights).astype(np.float16)
    near(rounded, exact, rounded)
    for wrong in (
        weighted_in(np.float64, x, y, np.roll(weights, 1)),
        weighted_in(np.float64, x, np.roll(y, 1, axis=1), weights),
        weighted_in(np.float64, y, x, weights),
        weighted_in(np.float16, x, y, weights),  # rounds the product too
    ):
        with pytest.raises(AssertionError):
            near(wrong.astype(np.float16), exact, rounded)
            pytest.fail("not rejected")


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype, y_dtype", PAIRS, ids=lambda d: d.name)
def test_add_kernel(cupy, x_dtype, y_dtype):
    for size in (1, 3, 7, 8, 9, 2047, 2048, 2056):
        x, y = random(size, size, x_dtype), random(size + 1, size, y_dtype)
        exact = x.astype(np.float64) + y.astype(np.float64)
        rounded = (x.astype(np.float32) + y.astype(np.float32)).astype(x_dtype)
        for shift in (0, 1) if size == 2048 else (0,):
            x_, y_ = on_gpu(cupy, x, shift), on_gpu(cupy, y, shift)
            out, check = banded(cupy, unwritten(size, x_dtype), shift)
            assert add(x_, y_, out=out) is out
            check()
            near(out.get(), exact, rounded)
            assert same_bits(out.get(), rounded)  # one fp32 addition has one right answer
            inside, check = banded(cupy, x, shift)
            add(inside, y_, out=inside)
            check()
            assert same_bits(inside.get(), rounded)
            if x_dtype == y_dtype:
                inside, check = banded(cupy, y, shift)
                add(x_, inside, out=inside)
                check()
                assert same_bits(inside.get(), rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype, y_dtype", PAIRS, ids=lambda d: d.name)
def test_add_weighted_kernel(cupy, x_dtype, y_dtype):
    for rows, cols in [(1, 1), (3, 7), (5, 8), (3, 9), (4, 2047), (4, 2048), (3, 2056)]:
        x, y, weights = random(cols, (rows, cols), x_dtype), random(2, (rows, cols), y_dtype), random(3, rows, float32)
        weights[rows // 2] = 0
        exact = weighted_in(np.float64, x, y, weights)
        rounded = weighted_in(np.float32, x, y, weights).astype(x_dtype)
        for shift in (0, 1) if cols == 2048 else (0,):
            x_, y_, weights_ = on_gpu(cupy, x, shift), on_gpu(cupy, y, shift), on_gpu(cupy, weights, shift)
            out, check = banded(cupy, unwritten(x.shape, x_dtype), shift)
            assert add_weighted(x_, y_, weights_, out=out) is out
            check()
            near(out.get(), exact, rounded)
            inside, check = banded(cupy, x, shift)
            add_weighted(inside, y_, weights_, out=inside)
            check()
            assert same_bits(inside.get(), out.get()), "in place differs"
            if x_dtype == y_dtype:
                inside, check = banded(cupy, y, shift)
                add_weighted(x_, inside, weights_, out=inside)
                check()
                assert same_bits(inside.get(), out.get()), "in place of y differs"


@pytest.mark.gpu
@pytest.mark.parametrize("rows, cols", [(100_003, 8), (2, 64 * 2048 + 8)])
def test_large(cupy, rows, cols):
    x, y, weights = random(1, (rows, cols), float16), random(2, (rows, cols), float16), random(3, rows, float32)
    out, check = banded(cupy, unwritten(x.shape, float16))
    add_weighted(on_gpu(cupy, x), on_gpu(cupy, y), on_gpu(cupy, weights), out=out)
    check()
    exact, rounded = weighted_in(np.float64, x, y, weights), weighted_in(np.float32, x, y, weights).astype(np.float16)
    near(out.get(), exact, rounded)


@on_both
def test_empty_and_leading_dimensions(library):
    def m(array):
        return move(library, array)

    x = np.ones((2, 3, 4), np.float32)
    z = host(add_weighted(m(x), m(x), m(np.arange(6, dtype=np.float32))))
    np.testing.assert_array_equal(z[..., 0], 1 + np.arange(6).reshape(2, 3))
    assert add(m(x[:0]), m(x[:0])).shape == (0, 3, 4)
    assert add_weighted(m(x[:0]), m(x[:0]), m(np.ones(0, np.float32))).shape == (0, 3, 4)
    assert host(add(m(np.ones((), np.float32)), m(np.ones((), np.float32)))) == 2


A = np.ones((2, 8), np.float16)
R = np.ones(2, np.float32)
REFUSED = {
    "x dtype": (TypeError, "x must have dtype", lambda m: add(m(A.astype(np.float64)), m(A))),
    "y dtype": (TypeError, "y must have dtype", lambda m: add(m(A), m(A.astype(np.int32)))),
    "y shape": (ValueError, "y must have shape", lambda m: add(m(A), m(A[0]))),
    "out dtype": (TypeError, "out must have dtype", lambda m: add(m(A), m(A), out=m(A.astype(np.float32)))),
    "strides": (ValueError, "x must be C-contiguous", lambda m: add(m(A).T, m(A).T)),
    "weights dtype": (
        TypeError,
        "weights must have dtype",
        lambda m: add_weighted(m(A), m(A), m(R.astype(np.float16))),
    ),
    "weights shape": (
        ValueError,
        r"weights must have shape \(2\)",
        lambda m: add_weighted(m(A), m(A), m(np.ones(3, "f"))),
    ),
    "weights strided": (
        ValueError,
        "weights must be C-contiguous",
        lambda m: add_weighted(m(A), m(A), m(np.ones((2, 2), np.float32))[:, 0]),
    ),
    "out is weights": (
        ValueError,
        "out overlaps weights",
        lambda m: (lambda w: add_weighted(m(np.ones((2, 1), "f")), m(np.ones((2, 1), "f")), w, out=w.reshape(2, 1)))(m(R)),
    ),
    "x scalar": (
        ValueError,
        "x must have at least",
        lambda m: add_weighted(m(np.ones((), "f")), m(np.ones((), "f")), m(np.ones(1, "f"))),
    ),
}


@on_both
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, library):
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call(lambda array: move(library, array))


def test_residual_stream_dtypes():
    x, y = np.ones(4, np.float32), np.full(4, 2**-12, np.float16)
    assert np.all(add(x, y) == 1 + 2**-12) and np.all(add(x.astype(bfloat16), y).astype(np.float32) == 1)
