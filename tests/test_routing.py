"""route: reference against plain loops, kernel against float64."""

import math

import numpy as np
import pytest
from kernel_checks import (
    FLOATS,
    banded,
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

from cupyq.ops.routing import route


def loop(row, top_k):
    """Softmax over all experts, then the largest top_k (the lowest expert of equal ones), then renormalised."""
    row = [float(v) for v in row]
    exponentials = [math.exp(v - max(row)) for v in row]
    softmax = [e / math.fsum(exponentials) for e in exponentials]
    kept = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
    total = math.fsum(softmax[e] for e in kept)
    return [softmax[e] / total if e in kept else 0.0 for e in range(len(row))]


def by_loop(logits, top_k):
    return np.array([loop(row, top_k) for row in logits], np.float64).reshape(logits.shape).T


def in_float32(logits, top_k):
    v = logits.astype(np.float32)
    softmax = np.exp(v - v.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    softmax[by_loop(logits, top_k).T == 0] = 0
    return (softmax / softmax.sum(1, keepdims=True)).T


def tied(seed, shape, dtype):
    """Logits among which equal values are common."""
    return np.round(random(seed, shape, float32) * 4).astype(dtype) / dtype.type(2)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("experts, top_k", [(1, 1), (4, 2), (8, 2), (60, 4), (60, 60)])
def test_reference_against_loops(dtype, experts, top_k):
    for logits in (random(experts, (7, experts), dtype, 2.0), tied(experts, (7, experts), dtype)):
        weights = route(logits, top_k)
        assert weights.shape == (experts, 7) and weights.dtype == np.float32 and weights.flags.c_contiguous
        np.testing.assert_allclose(weights, by_loop(logits, top_k), rtol=2**-23, atol=0)
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-6)
        assert np.all((weights > 0).sum(0) == top_k)


def test_bound_rejects_wrong_formulas():
    logits = tied(1, (200, 16), float32)
    exact, rounded = by_loop(logits, 3), in_float32(logits, 3)
    near(rounded, exact, rounded)
    v = logits.astype(np.float64)
    softmax = (np.exp(v) / np.exp(v).sum(1, keepdims=True)).T
    wrong = {
        "one expert more": by_loop(logits, 4),
        "ties to the highest": by_loop(logits[:, ::-1], 3)[::-1],
        "not renormalised": np.where(exact > 0, softmax, 0),
        "experts off by one": np.roll(exact, 1, axis=0),
        "rows off by one": np.roll(exact, 1, axis=1),
    }
    for name, weights in wrong.items():
        with pytest.raises(AssertionError):
            near(weights.astype(np.float32), exact, rounded)
            pytest.fail(f"not rejected: {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_kernel(cupy, dtype):
    sizes = [(1, 1, 1), (7, 4, 2), (8, 8, 2), (9, 31, 3), (5, 32, 32), (17, 33, 2), (3, 60, 4), (9, 64, 6), (4, 65, 2)]
    for rows, experts, top_k in [
        *sizes,
        (16, 128, 8),
        (3, 129, 8),
        (2, 256, 8),
        (3, 512, 10),
        (3, 1024, 16),
        (2, 1000, 1000),
    ]:
        for make in (random, tied):
            logits = make(experts, (rows, experts), dtype)
            shift = rows % 2
            logits_ = on_gpu(cupy, logits, shift)
            out, check = banded(cupy, unwritten((experts, rows), float32), shift)
            assert route(logits_, top_k, out=out) is out
            check()
            exact = by_loop(logits, top_k)
            near(out.get(), exact, in_float32(logits, top_k))
            np.testing.assert_array_equal(out.get() > 0, exact > 0)
            assert same_bits(route(logits_, top_k).get(), out.get()), "a second run differs"
            assert same_bits(logits_.get(), logits), "an input changed"


@pytest.mark.gpu
def test_many_rows(cupy):
    logits = random(1, (100_003, 8), float16)
    out, check = banded(cupy, unwritten((8, 100_003), float32))
    route(on_gpu(cupy, logits), 2, out=out)
    check()
    near(out.get(), by_loop(logits, 2), in_float32(logits, 2))


@on_both
def test_not_finite(library):
    """-Inf is an expert never to be used; a maximum that is not finite makes the row NaN, and that row alone."""
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[0, -inf, 1, -inf], [0, -inf, -inf, -inf], [nan, 0, 1, 2], [0, inf, 1, 2], [-inf] * 4, [3, 3, 3, 3]],
        np.float32,
    )
    weights = host(route(move(library, logits), 2)).T
    e = math.exp(-1)
    np.testing.assert_allclose(weights[0], [e / (1 + e), 0, 1 / (1 + e), 0], rtol=1e-6)
    np.testing.assert_array_equal(weights[1], [1, 0, 0, 0])
    assert np.all(np.isnan(weights[2:5]))
    np.testing.assert_array_equal(weights[5], [0.5, 0.5, 0, 0])


@on_both
def test_large_logits(library):
    logits = np.array([[60000, 59999, -60000, 0]], np.float32)
    np.testing.assert_allclose(host(route(move(library, logits), 3))[:, 0], [0.7310586, 0.26894143, 0, 0], rtol=1e-6)


@on_both
def test_refusals(library):
    def call(logits, top_k, **options):
        return route(move(library, logits), top_k, **options)

    logits = np.ones((3, 4), np.float16)
    with pytest.raises(TypeError, match="logits must have dtype"):
        call(logits.astype(np.int32), 2)
    with pytest.raises(ValueError, match="logits must have 2 dimensions"):
        call(logits[0], 2)
    for top_k in (0, 5, -1):
        with pytest.raises(ValueError, match="top_k must be 1 to 4"):
            call(logits, top_k)
    with pytest.raises(ValueError, match="at most 1024 experts"):
        call(np.ones((1, 1025), np.float16), 2)
    with pytest.raises(ValueError, match="out must have shape"):
        call(logits, 2, out=move(library, np.ones((3, 4), np.float32)))
    with pytest.raises(TypeError, match="out must have dtype float32"):
        call(logits, 2, out=move(library, np.ones((4, 3), np.float16)))
    square = move(library, np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="out overlaps logits"):
        route(square, 2, out=square)
    assert call(logits[:0], 2).shape == (4, 0)
