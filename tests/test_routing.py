"""route, group_rows and combine_rows: references against plain loops, kernels against float64 and exactly."""

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

from cupyq.ops.routing import TILE_ROWS, RowGroups, combine_rows, group_rows, most_tiles, pick_tile_rows, route

# --- route ------------------------------------------------------------------------------------------------------------


def loop(row, top_k, renormalize):
    """Softmax over all experts, then the largest top_k (the lowest expert of equal ones), then renormalised."""
    row = [float(v) for v in row]
    exponentials = [math.exp(v - max(row)) for v in row]
    softmax = [e / math.fsum(exponentials) for e in exponentials]
    kept = sorted(sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k])
    total = math.fsum(softmax[e] for e in kept) if renormalize else 1.0
    return [softmax[e] / total for e in kept], kept


def by_loop(logits, top_k, renormalize=True):
    rows = [loop(row, top_k, renormalize) for row in logits]
    return np.array([weights for weights, _ in rows]), np.array([kept for _, kept in rows])


def in_float32(logits, top_k, renormalize=True):
    v = logits.astype(np.float32)
    softmax = np.exp(v - v.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    kept = np.take_along_axis(softmax, by_loop(logits, top_k)[1], axis=1)
    return kept / kept.sum(1, keepdims=True) if renormalize else kept


def tied(seed, shape, dtype):
    """Logits among which equal values are common."""
    return np.round(random(seed, shape, float32) * 4).astype(dtype) / dtype.type(2)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("count, top_k", [(1, 1), (4, 2), (8, 2), (60, 4), (60, 60)])
def test_route_reference_against_loops(dtype, count, top_k, renormalize):
    for logits in (random(count, (7, count), dtype, 2.0), tied(count, (7, count), dtype)):
        weights, experts = route(logits, top_k, renormalize=renormalize)
        exact, kept = by_loop(logits, top_k, renormalize)
        assert weights.shape == experts.shape == (7, top_k) and (weights.dtype, experts.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(experts, kept)
        np.testing.assert_allclose(weights, exact, rtol=2**-23, atol=0)
        if renormalize:
            np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        else:
            assert np.all(weights.sum(1) <= 1 + 1e-6)


def test_bound_rejects_wrong_weights():
    logits = tied(1, (200, 16), float32)
    (exact, _), rounded = by_loop(logits, 3), in_float32(logits, 3)
    near(rounded, exact, rounded)
    wrong = {
        "not renormalised": by_loop(logits, 3, renormalize=False)[0],
        "other experts": by_loop(-logits, 3)[0],
        "in the order of the weights": -np.sort(-exact, axis=1),
        "rows off by one": np.roll(exact, 1, axis=0),
    }
    for name, weights in wrong.items():
        with pytest.raises(AssertionError):
            near(weights.astype(np.float32), exact, rounded)
            pytest.fail(f"not rejected: {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_route_kernel(cupy, dtype):
    sizes = [(1, 1, 1), (7, 4, 2), (8, 8, 2), (9, 31, 3), (5, 32, 32), (17, 33, 2), (3, 60, 4), (9, 64, 6), (4, 65, 2)]
    sizes += [(16, 128, 8), (3, 129, 8), (2, 256, 8), (3, 512, 10), (3, 1024, 16), (2, 1000, 1000)]
    for index, (rows, count, top_k) in enumerate(sizes):
        for make in (random, tied):
            renormalize = index % 2 == 0 if make is random else index % 2 == 1
            logits = make(count, (rows, count), dtype)
            shift = rows % 2
            logits_ = on_gpu(cupy, logits, shift)
            weights, check_weights = banded(cupy, unwritten((rows, top_k), float32), shift)
            experts, check_experts = banded(cupy, np.full((rows, top_k), -7, np.int32), shift)
            found = route(logits_, top_k, renormalize=renormalize, weights=weights, experts=experts)
            assert found[0] is weights and found[1] is experts
            check_weights()
            check_experts()
            exact, kept = by_loop(logits, top_k, renormalize)
            np.testing.assert_array_equal(experts.get(), kept)
            near(weights.get(), exact, in_float32(logits, top_k, renormalize))
            again = route(logits_, top_k, renormalize=renormalize)
            assert same_bits(again[0].get(), weights.get()) and same_bits(again[1].get(), experts.get())
            assert same_bits(logits_.get(), logits), "an input changed"


@pytest.mark.gpu
def test_route_many_rows(cupy):
    logits = random(1, (100_003, 8), float16)
    weights, experts = route(on_gpu(cupy, logits), 2)
    exact, kept = by_loop(logits, 2)
    np.testing.assert_array_equal(experts.get(), kept)
    near(weights.get(), exact, in_float32(logits, 2))


@on_both
@pytest.mark.parametrize("renormalize", [True, False])
def test_route_of_what_is_not_finite(library, renormalize):
    """-Inf is an expert never to be used; a maximum that is not finite makes the row NaN, and that row alone."""
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[0, -inf, 1, -inf], [0, -inf, -inf, -inf], [5, 0, 1, nan], [0, inf, 1, 2], [-inf] * 4, [nan] * 4, [3, 3, 3, 3]],
        np.float32,
    )
    weights, experts = map(host, route(move(library, logits), 2, renormalize=renormalize))
    e = math.exp(-1)
    np.testing.assert_allclose(weights[0], [e / (1 + e), 1 / (1 + e)], rtol=1e-6)
    np.testing.assert_array_equal(weights[1], [1, 0])
    assert np.all(np.isnan(weights[2:6]))
    np.testing.assert_array_equal(weights[6], [0.5, 0.5] if renormalize else [0.25, 0.25])
    np.testing.assert_array_equal(experts, [[0, 2], *[[0, 1]] * 6])


@on_both
def test_route_of_large_logits(library):
    logits = np.array([[60000, 59999, -60000, 0]], np.float32)
    weights, experts = map(host, route(move(library, logits), 3))
    np.testing.assert_allclose(weights[0], [0.7310586, 0.26894143, 0], rtol=1e-6)
    np.testing.assert_array_equal(experts, [[0, 1, 3]])


@on_both
def test_route_refusals(library):
    def call(logits, top_k, **results):
        return route(move(library, logits), top_k, **{name: move(library, array) for name, array in results.items()})

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
    with pytest.raises(ValueError, match="weights must have shape"):
        call(logits, 2, weights=np.ones((4, 3), np.float32))
    with pytest.raises(TypeError, match="experts must have dtype int32"):
        call(logits, 2, experts=np.ones((3, 2), np.int64))
    square = move(library, np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="weights overlaps logits"):
        route(square, 4, weights=square)
    with pytest.raises(ValueError, match="weights overlaps experts"):
        route(square, 4, weights=(both := move(library, np.ones((4, 4), np.float32))), experts=both.view(np.int32))
    assert [array.shape for array in call(logits[:0], 2)] == [(0, 2), (0, 2)]


# --- group_rows -------------------------------------------------------------------------------------------------------


def routings(rows, num_experts, top_k):
    """[rows, top_k] experts, distinct within a row: at random, skewed to the first ones, and all rows alike."""
    rng = np.random.default_rng(rows)
    skewed = np.exp(-np.arange(num_experts) / 2.0)
    for probabilities in (None, skewed / skewed.sum() + 1e-9):
        draws = rng.random((rows, num_experts)) ** (1 / (1.0 if probabilities is None else probabilities))
        yield np.sort(np.argsort(-draws, axis=1, kind="stable")[:, :top_k], axis=1).astype(np.int32)
    yield np.tile(np.arange(num_experts - top_k, num_experts, dtype=np.int32), (rows, 1))


def grouped_by_loop(experts, num_experts, tile_rows):
    """(order, offsets, row tiles that are used), as lists."""
    order, offsets, tiles = [], [0], []
    for expert in range(num_experts):
        own = [pair for pair, e in enumerate(experts.reshape(-1).tolist()) if e == expert]
        while own:
            tiles.append([expert, len(order), min(tile_rows, len(own))])
            order += own[:tile_rows]
            own = own[tile_rows:]
        offsets.append(len(order))
    return order, offsets, tiles


def check_groups(groups, experts, num_experts):
    order, offsets, tiles = grouped_by_loop(experts, num_experts, groups.tile_rows)
    assert (groups.rows, groups.top_k, groups.num_experts) == (*experts.shape, num_experts)
    assert host(groups.order).tolist() == order and host(groups.offsets).tolist() == offsets
    found = host(groups.tiles).tolist()
    assert found[: len(tiles)] == tiles and found[len(tiles) :] == [[-1, 0, 0]] * (len(found) - len(tiles))


SIZES = [(1, 8, 2), (1, 1, 1), (3, 60, 4), (5, 3, 1), (40, 128, 8), (200, 8, 2), (257, 3, 3), (130, 1024, 4), (1500, 60, 4)]


@on_both
@pytest.mark.parametrize("rows, num_experts, top_k", SIZES)
def test_group_rows(library, rows, num_experts, top_k):
    for experts in routings(rows, num_experts, top_k):
        for tile_rows in (None, 8, 64):
            groups = group_rows(move(library, experts), num_experts, tile_rows=tile_rows)
            assert groups.tile_rows == (tile_rows or pick_tile_rows(rows * top_k, num_experts))
            check_groups(groups, experts, num_experts)


@pytest.mark.gpu
def test_group_rows_writes_its_results_alone(cupy):
    for rows, num_experts, top_k in SIZES:
        for experts in routings(rows, num_experts, top_k):
            pairs = rows * top_k
            shapes = ((pairs,), (num_experts + 1,), (most_tiles(pairs, num_experts, 16), 3))
            arrays, checks = zip(*(banded(cupy, np.full(shape, -7, np.int32)) for shape in shapes), strict=True)
            out = RowGroups(rows, top_k, 16, cupy, *arrays)
            groups = group_rows(cupy.asarray(experts), num_experts, tile_rows=16, out=out)
            assert groups.order is out.order and groups.tiles is out.tiles
            for check in checks:
                check()
            check_groups(groups, experts, num_experts)


@pytest.mark.gpu
def test_group_rows_of_very_many(cupy):
    experts = np.random.default_rng(0).integers(0, 8, (300_001, 2)).astype(np.int32)
    groups = group_rows(cupy.asarray(experts), 8)
    np.testing.assert_array_equal(groups.order.get(), np.argsort(experts.reshape(-1), kind="stable"))
    tiles = groups.tiles.get()
    used = tiles[tiles[:, 2] > 0]
    assert groups.tile_rows == 64 and np.all(tiles[len(used) :] == [-1, 0, 0])
    np.testing.assert_array_equal(np.bincount(used[:, 0], used[:, 2]), np.bincount(experts.reshape(-1)))
    np.testing.assert_array_equal(used[:, 1], np.cumsum(used[:, 2]) - used[:, 2])


@pytest.mark.gpu
def test_group_rows_leaves_out_what_is_out_of_range(cupy):
    experts = np.array([[0, 5], [-1, 2], [2, 3], [2**31 - 1, 0]], np.int32)
    groups = group_rows(cupy.asarray(experts), 4, tile_rows=8)
    assert groups.offsets.get().tolist() == [0, 2, 2, 4, 5] and groups.order.get()[:5].tolist() == [0, 7, 3, 4, 5]
    assert groups.tiles.get().tolist() == [[0, 0, 2], [2, 2, 2], [3, 4, 1], [-1, 0, 0]]


def test_most_tiles_is_reached_and_never_passed():
    for num_experts in (1, 2, 5):
        for pairs in range(40):
            for tile_rows in TILE_ROWS:
                counts = [1] * min(pairs, num_experts)
                if counts:
                    counts[0] += pairs - sum(counts)
                used = sum(-(-count // tile_rows) for count in counts)
                bound = most_tiles(pairs, num_experts, tile_rows)
                assert used <= bound <= used + (0 if (pairs - len(counts)) % tile_rows == 0 else 1)
    rng = np.random.default_rng(3)
    for _ in range(300):
        counts = rng.integers(0, 40, rng.integers(1, 9)) * (rng.random() < 0.8)
        for tile_rows in TILE_ROWS:
            assert (-(-counts // tile_rows)).sum() <= most_tiles(int(counts.sum()), len(counts), tile_rows)


@pytest.mark.parametrize(
    "pairs, num_experts, tile_rows", [(2, 8, 8), (64, 8, 8), (65, 8, 16), (2048, 128, 16), (400, 8, 64), (10**6, 8, 64)]
)
def test_a_tile_holds_a_fair_share(pairs, num_experts, tile_rows):
    assert pick_tile_rows(pairs, num_experts) == tile_rows


@on_both
def test_group_rows_refusals(library):
    experts = move(library, np.array([[0, 1], [2, 0]], np.int32))
    with pytest.raises(TypeError, match="experts must have dtype int32"):
        group_rows(move(library, np.zeros((2, 2), np.int64)), 3)
    with pytest.raises(ValueError, match="experts must have 2 dimensions"):
        group_rows(experts.reshape(-1), 3)
    for num_experts in (0, 1025):
        with pytest.raises(ValueError, match="num_experts must be 1 to 1024"):
            group_rows(experts, num_experts)
    with pytest.raises(ValueError, match="tile_rows must be one of 8, 16, 32, 64"):
        group_rows(experts, 3, tile_rows=24)
    with pytest.raises(TypeError, match="out must be the RowGroups"):
        group_rows(experts, 3, out=experts)
    with pytest.raises(ValueError, match="out.offsets must have shape"):
        group_rows(experts, 3, out=group_rows(experts, 4))
    empty = group_rows(experts[:0], 3)
    assert empty.tiles.shape == (0, 3) and host(empty.offsets).tolist() == [0] * 4


def test_group_rows_checks_experts_where_it_can():
    for wrong in (3, -1):
        with pytest.raises(ValueError, match="experts must hold 0 to 2"):
            group_rows(np.array([[0, wrong]], np.int32), 3)


# --- combine_rows -----------------------------------------------------------------------------------------------------


def combined_by_loop(y, weights):
    """Sums in float64 of the rows whose weight is not 0."""
    rows, top_k, cols = y.shape
    z = np.zeros((rows, cols))
    for r in range(rows):
        for c in range(cols):
            z[r, c] = math.fsum(float(weights[r, j]) * float(y[r, j, c]) for j in range(top_k) if weights[r, j] != 0)
    return z


def combine_case(seed, rows, top_k, cols, dtype):
    """Some weights are 0, and NaN and Inf stand there."""
    y, weights = random(seed, (rows, top_k, cols), dtype), np.abs(random(seed + 1, (rows, top_k), float32))
    idle = np.random.default_rng(seed).random(weights.shape) < 0.3
    weights[idle] = 0
    y[idle] = np.nan
    y[idle, ::2] = np.inf
    in_dtype = np.zeros((rows, cols), np.float32)
    for j in range(top_k):
        in_dtype += np.where(weights[:, j, None] == 0, np.float32(0), weights[:, j, None] * y[:, j].astype(np.float32))
    return y, weights, combined_by_loop(y, weights), in_dtype


@np.errstate(invalid="ignore")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_combine_reference_against_loops(dtype):
    for rows, top_k, cols in ((1, 1, 1), (3, 2, 17), (5, 8, 4), (0, 2, 3), (2, 0, 3)):
        y, weights, exact, _ = combine_case(rows, rows, top_k, cols, dtype)
        z = combine_rows(y, weights)
        assert z.shape == (rows, cols) and z.dtype == np.float32
        np.testing.assert_allclose(z, exact, rtol=2**-23, atol=1e-7)


@np.errstate(invalid="ignore")
def test_bound_rejects_wrong_sums():
    y, weights, exact, rounded = combine_case(3, 50, 3, 40, float16)
    near(rounded, exact, rounded)
    clean = np.where(np.isfinite(y), y, 0)
    for name, wrong in {
        "weights of the next row": combined_by_loop(clean, np.roll(weights, 1, axis=0)),
        "pairs in another order": combined_by_loop(clean[:, ::-1], weights),
        "without the last": combined_by_loop(clean[:, :-1], weights[:, :-1]),
        "columns off by one": np.roll(exact, 1, axis=1),
        "idle rows spread": exact + np.where(weights == 0, np.nan, 0).sum(1, keepdims=True),
    }.items():
        with pytest.raises(AssertionError):
            near(wrong.astype(np.float32), exact, rounded)
            pytest.fail(f"not rejected: {name}")


@pytest.mark.gpu
@np.errstate(invalid="ignore")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_combine_kernel(cupy, dtype):
    for rows, top_k, cols, shift in (
        (1, 1, 1, 0),
        (3, 2, 17, 1),
        (2, 8, 1024, 0),
        (5, 4, 1025, 0),
        (2, 2, 4096, 1),
        (1, 3, 66000, 0),
    ):
        y, weights, exact, rounded = combine_case(cols, rows, top_k, cols, dtype)
        y_, weights_ = on_gpu(cupy, y, shift), cupy.asarray(weights)
        out, check = banded(cupy, unwritten((rows, cols), float32), shift)
        assert combine_rows(y_, weights_, out=out) is out
        check()
        near(out.get(), exact, rounded)
        assert same_bits(combine_rows(y_, weights_).get(), out.get()), "a second run differs"
        assert same_bits(y_.get(), y), "an input changed"


@on_both
def test_combine_spreads_what_counts(library):
    """NaN and Inf of a row that has a weight, and a weight that is NaN, reach their row and no other."""
    y = np.ones((4, 2, 5), np.float16)
    y[0, 1, 2], y[1, 0, 3] = np.nan, np.inf
    weights = np.full((4, 2), 0.5, np.float32)
    weights[2, 1] = np.nan
    z = host(combine_rows(move(library, y), move(library, weights)))
    expected = np.ones((4, 5))
    expected[0, 2], expected[1, 3], expected[2] = np.nan, np.inf, np.nan
    np.testing.assert_array_equal(z, expected)


@on_both
def test_combine_refusals(library):
    y, weights = move(library, np.ones((3, 2, 4), np.float16)), move(library, np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="y must have 3 dimensions"):
        combine_rows(y[0], weights)
    with pytest.raises(TypeError, match="y must have dtype"):
        combine_rows(y.astype(np.float64), weights)
    with pytest.raises(ValueError, match="weights must have shape"):
        combine_rows(y, weights[:2])
    with pytest.raises(TypeError, match="weights must have dtype float32"):
        combine_rows(y, weights.astype(np.float16))
    with pytest.raises(TypeError, match="out must have dtype float32"):
        combine_rows(y, weights, out=move(library, np.ones((3, 4), np.float16)))
    wide = move(library, np.ones((2, 2, 4), np.float32))
    with pytest.raises(ValueError, match="out overlaps y"):
        combine_rows(wide, weights[:2], out=wide[0])
