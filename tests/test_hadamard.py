"""hadamard against plain sums; the matrices against their defining property and recorded outputs."""

import math

import numpy as np
import pytest
from conftest import golden
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

from cupyq.errors import UnsupportedError
from cupyq.ops.hadamard import hadamard, hadamard_matrix, paley_1, paley_2

GOLDEN = golden("element")


def sylvester(size):
    """The matrix from the bits of its indices, float64."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def transformed(x, size, scale, dtype):
    """The transform in `dtype`, by doubling: the first and the second half, then their sum and difference."""
    y = x.astype(dtype).reshape(-1, size)

    def recurse(values):
        if values.shape[1] == 1:
            return values
        half = values.shape[1] // 2
        low, high = recurse(values[:, :half]), recurse(values[:, half:])
        return np.concatenate([low + high, low - high], axis=1)

    return (recurse(y) * dtype(np.float32(scale))).reshape(x.shape)


# --- the transform ----------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_against_plain_sums(library, size):
    x = random(size, (2, 3, 2 * size), float32)
    y = host(hadamard(move(library, x), size, scale=0.5))
    assert y.dtype == np.float32 and y.shape == x.shape
    for r, s, block, i in np.ndindex(2, 3, 2, size):
        values = x[r, s, block * size : (block + 1) * size]
        terms = [float(v) * (-1) ** (i & j).bit_count() for j, v in enumerate(values)]
        expected, bound = 0.5 * math.fsum(terms), 2.0**-23 * math.fsum(map(abs, terms))
        assert abs(float(y[r, s, block * size + i]) - expected) <= bound


@pytest.mark.parametrize("size", [2, 32, 256])
def test_reference_is_the_matrix(size):
    x = random(size, (3, size), float32).astype(np.float64)
    near(hadamard(x.astype(np.float32), size), x @ sylvester(size), (x @ sylvester(size)).astype(np.float32))
    assert np.array_equal(hadamard_matrix(size), sylvester(size))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_twice_is_the_identity(dtype):
    x = random(3, (5, 1024), dtype)
    y = hadamard(hadamard(x, 512, scale=512**-0.5), 512, scale=512**-0.5)
    error = np.abs(y.astype(np.float64) - x.astype(np.float64))
    assert np.max(error) < {float16: 4e-3, bfloat16: 4e-2, float32: 1e-6}[dtype]


def test_bound_rejects_wrong_transforms():
    x = random(5, (4, 256), float16)
    exact, rounded = transformed(x, 256, 0.1, np.float64), transformed(x, 256, 0.1, np.float32).astype(float16)
    near(rounded, exact, rounded)
    wrong = {
        "blocks of half the size": transformed(x, 128, 0.1, np.float64),
        "no scale": transformed(x, 256, 1.0, np.float64),
        "another order": exact[:, ::-1],
        "a value lost": transformed(np.where(np.arange(256) == 77, 0, x), 256, 0.1, np.float64),
        "scale rounded to float16": transformed(x, 256, 1.0, np.float64) * float(np.float16(0.1)) * (1 + 2.0**-10),
    }
    for name, y in wrong.items():
        with pytest.raises(AssertionError):
            near(y.astype(float16), exact, rounded)
            pytest.fail(f"not rejected: {name}")


SIZES = [2**i for i in range(1, 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("size", SIZES)
def test_kernel(cupy, size, dtype):
    scale = size**-0.5
    team = max(1, 256 // max(1, size // 8))  # transforms that share a CUDA block
    for shape in ((1, size), (3, 2 * size), (2 * team + 1, size)):
        x = random(size, shape, dtype)
        exact, rounded = transformed(x, size, scale, np.float64), transformed(x, size, scale, np.float32).astype(dtype)
        for shift in (0, 1) if size in (2, 8, 1024) else (0,):
            x_ = on_gpu(cupy, x, shift)
            out, check = banded(cupy, unwritten(shape, dtype), shift)
            assert hadamard(x_, size, scale=scale, out=out) is out
            check()
            near(out.get(), exact, rounded)
            assert same_bits(x_.get(), x), "x changed"
            assert same_bits(hadamard(x_, size, scale=scale).get(), out.get()), "a second run differs"
            inside, check = banded(cupy, x, shift)
            assert hadamard(inside, size, scale=scale, out=inside) is inside
            check()
            assert same_bits(inside.get(), out.get()), "in place differs"


@pytest.mark.gpu
def test_many_rows(cupy):
    x = random(1, (300_001, 16), float16)
    out, check = banded(cupy, unwritten(x.shape, float16))
    hadamard(on_gpu(cupy, x), 16, out=out)
    check()
    near(out.get(), transformed(x, 16, 1.0, np.float64), transformed(x, 16, 1.0, np.float32).astype(float16))


@on_both
def test_large_values_do_not_overflow_on_the_way(library):
    x = np.zeros((1, 64), np.float16)
    x[0, :8] = (60000, 60000, 60000, 60000, -60000, -60000, -60000, -59968)
    y = host(hadamard(move(library, x), 64, scale=1 / 32))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y, transformed(x, 64, 1 / 32, np.float64).astype(np.float16))
    assert np.isinf(host(hadamard(move(library, x), 64))).any()


@on_both
def test_empty_and_refusals(library):
    def ones(*shape, dtype=np.float16):
        return move(library, np.ones(shape, dtype))

    assert hadamard(ones(0, 8), 8).shape == (0, 8) and hadamard(ones(2, 0), 8).shape == (2, 0)
    for size in (0, 1, 3, 12, -4, 65536):
        with pytest.raises(ValueError, match="size must be a power of two from 2 to 32768"):
            hadamard(ones(2, 65536), size)
    with pytest.raises(TypeError, match="size must be a whole number"):
        hadamard(ones(2, 8), 8.0)
    for shape in ((), (3, 12), (16, 1)):
        with pytest.raises(ValueError, match="x must have a multiple of size = 8"):
            hadamard(ones(*shape), 8)
    with pytest.raises(TypeError, match="x must have dtype"):
        hadamard(ones(2, 8, dtype=np.float64), 8)
    with pytest.raises(TypeError, match="out must have dtype"):
        hadamard(ones(2, 8), 8, out=ones(2, 8, dtype=np.float32))
    whole = ones(4, 8)
    with pytest.raises(ValueError, match="out overlaps x partly"):
        hadamard(whole[:3], 8, out=whole[1:])
    with pytest.raises(ValueError, match="x must be C-contiguous"):
        hadamard(ones(8, 8).T, 8)


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in GOLDEN if name.startswith("had_paley")])
def test_recorded_matrices(case):
    expected = GOLDEN[case][1]["h"]
    make = paley_2 if case.startswith("had_paley2") else paley_1
    assert same_bits(make(expected.shape[0]), expected)


PALEY_1 = (4, 8, 12, 20, 24, 32, 44, 48, 60, 108)
PALEY_2 = (12, 28, 36, 60, 76, 84, 108)


@pytest.mark.parametrize(
    "make, n",
    [(paley_1, n) for n in PALEY_1]
    + [(paley_2, n) for n in PALEY_2]
    + [(hadamard_matrix, n) for n in (1, 2, 4, 12, 20, 24, 28, 36, 40, 56, 76, 96, 128, 160, 1024)],
)
def test_rows_are_orthogonal(make, n):
    matrix = make(n)
    assert matrix.dtype == np.float16 and matrix.shape == (n, n) and np.all(np.abs(matrix) == 1)
    exact = matrix.astype(np.int64)
    assert np.array_equal(exact @ exact.T, n * np.eye(n, dtype=np.int64))


def test_constructions_come_in_order():
    assert np.array_equal(hadamard_matrix(12), paley_1(12)) and np.array_equal(hadamard_matrix(28), paley_2(28))
    doubled = np.kron(np.array([[1, 1], [1, -1]]), paley_1(12))
    assert np.array_equal(hadamard_matrix(24), doubled) and not np.array_equal(paley_1(24), doubled)


def test_sizes_without_a_matrix():
    for n in (-4, 0, 3, 6, 22):
        with pytest.raises(ValueError, match=f"there is no Hadamard matrix of {n} rows"):
            hadamard_matrix(n)
    with pytest.raises(TypeError, match="n must be a whole number"):
        hadamard_matrix(4.0)
    for n in (52, 92, 116, 156, 172, 188, 236):
        with pytest.raises(UnsupportedError, match=f"no construction for a Hadamard matrix of {n} rows"):
            hadamard_matrix(n)
    for n in (0, 2, 6, 10, 14, 16, 28):  # 13 and 9: not of the form, not a prime
        with pytest.raises(ValueError, match="n must be one more than a prime of the form"):
            paley_1(n)
    for n in (4, 8, 16, 20, 24, 52):
        with pytest.raises(ValueError, match="n must be twice one more than a prime of the form"):
            paley_2(n)
