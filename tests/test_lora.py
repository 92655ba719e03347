"""ops/lora.py: many adapters in one product, the reference against plain sums and the kernels against float64; and the layers
that hold them (reading adapters and whole models: test_adapters.py)."""

import math

import numpy as np
import pytest
from kernel_checks import FLOATS, ROUNDING, banded, bfloat16, float16, float32, host, move, on_both, on_gpu, random, same_bits

from cupyq import _device
from cupyq._kernels import compile_all
from cupyq.layers import Linear, LoraWeights, Selection
from cupyq.ops.lora import INSTANCES, lora, lora_reference, lora_workspace_size, pick_config

SAME = [(dtype, dtype) for dtype in FLOATS]
PAIRS = [*SAME, (float16, float32), (bfloat16, float32), (float32, float16), (float16, bfloat16)]  # of x and y


def problem(rows, k, n, ranks, choices, dtype, y_dtype=None, seed=0):
    """(y, x, a, b, rank_adapter, weights): adapters of the given ranks, side by side; choices [requests][adapters]."""
    total = sum(ranks)
    y, x = random(seed, (rows, n), y_dtype or dtype), random(seed + 1, (rows, k), dtype)
    a, b = random(seed + 2, (k, total), dtype, k**-0.5), random(seed + 3, (total, n), dtype)
    rank_adapter = np.repeat(np.arange(len(ranks), dtype=np.int32), ranks)
    return y, x, a, b, rank_adapter, np.asarray(choices, np.float32)


def in_double(y, x, a, b, rank_adapter, weights):
    """The definition, row by row, over the adapters that a row uses."""
    y, x, a, b = (array.astype(np.float64) for array in (y, x, a, b))
    result, share = y.copy(), len(x) // len(weights)
    for row in range(len(x)):
        for adapter, weight in enumerate(weights[row // share].astype(np.float64)):
            if weight != 0:
                columns = rank_adapter == adapter
                result[row] += weight * ((x[row] @ a[:, columns]) @ b[columns])
    return result


def magnitude(y, x, a, b, rank_adapter, weights):
    """What the sums would be if nothing cancelled: fp32 arithmetic errs in proportion to it."""
    parts = [np.abs(np.where(np.isfinite(p), p, 0)) for p in (array.astype(np.float64) for array in (y, x, a, b))]
    return in_double(*parts, rank_adapter, np.abs(weights))


def check(result, arguments):
    """One rounding of the result, beside what fp32 sums lose: 2**-20 of the magnitude is far below any single product."""
    exact, scale = in_double(*arguments), magnitude(*arguments)
    error = np.abs(result.astype(np.float64) - exact)
    rounding = {float32: 2.0**-24}.get(result.dtype, ROUNDING[result.dtype])
    # The smallest steps of float16, whose relative rounding grows below 2**-14.
    allowed = rounding * np.abs(exact) + 2.0**-20 * scale + (2.0**-25 if result.dtype == float16 else 0)
    assert np.all(error <= allowed), f"error {np.max(error / allowed):.3g} times what is allowed"


# --- the reference ----------------------------------------------------------------------------------------------------


def plain(y, x, a, b, rank_adapter, weights, row, column):
    """One element by exact sums of Python floats."""
    w = weights[row // (len(x) // len(weights))]
    terms = [float(y[row, column])]
    for j, adapter in enumerate(rank_adapter):
        if w[adapter] != 0:
            t = math.fsum(float(x[row, i]) * float(a[i, j]) for i in range(len(a)))
            terms.append(float(w[adapter]) * t * float(b[j, column]))
    return math.fsum(terms)


def test_reference_is_the_plain_sum():
    choices = [[1, 0, 0.5], [0, 0, 0], [-2, 1, 1]]
    arguments = problem(6, 17, 5, (2, 1, 8), choices, float32)
    exact = lora_reference(*arguments)
    doubled = in_double(*arguments)
    for row, column in np.ndindex(6, 5):
        expected = plain(*arguments, row, column)
        assert abs(exact[row, column] - expected) <= 1e-13 * magnitude(*arguments)[row, column]
        assert abs(doubled[row, column] - expected) <= 1e-13 * magnitude(*arguments)[row, column]
    y = arguments[0].copy()
    assert lora(y, *arguments[1:]) is y
    assert same_bits(y, exact.astype(np.float32))
    assert same_bits(y[2:4], arguments[0][2:4]) and not np.array_equal(y[0], arguments[0][0])


def test_rank_columns_may_lie_in_any_order():
    y, x, a, b, rank_adapter, weights = problem(4, 9, 6, (2, 3), [[1, 2], [0, 1]], float32)
    order = np.array([3, 0, 4, 2, 1])
    mixed = lora_reference(y, x, np.ascontiguousarray(a[:, order]), b[order], rank_adapter[order], weights)
    assert np.allclose(mixed, lora_reference(y, x, a, b, rank_adapter, weights), rtol=1e-13)


def test_workspaces_fit_any_choice_of_requests():
    for rows, k, ranks in ((1, 64, 8), (7, 4096, 16), (64, 14336, 100), (2048, 4096, 64), (100_000, 33, 1), (5, 1, 3)):
        size = lora_workspace_size(rows, k, ranks)
        for requests in (r for r in (1, 2, 5, 7, 64, rows) if rows % r == 0):
            for dtype in FLOATS:
                config = pick_config(rows, requests, k, ranks, dtype)
                assert config.slices * rows * ranks == size
                assert (config.slices - 1) * config.slice_k < k <= config.slices * config.slice_k
                assert config.slice_k % 64 == 0 and config.slices <= 32
    assert lora_workspace_size(0, 8, 8) == lora_workspace_size(8, 0, 8) == lora_workspace_size(8, 8, 0) == 0


# --- both -------------------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("rows", [3, 48])
def test_unused_adapters_do_not_spread(library, rows):
    """Inf and NaN in the part of an adapter that a request does not use; and the request that uses it gets them."""
    arguments = problem(rows, 40, 24, (3, 5), [[1, 0], [0, 0], [0, 1]], float16)
    y, x, a, b, rank_adapter, weights = arguments
    clean = in_double(*arguments)
    a, b, x = a.copy(), b.copy(), x.copy()
    a[7, 3:], b[4:], a[0, 5] = np.inf, np.nan, np.nan
    x[rows // 3 : 2 * rows // 3] = np.nan  # the second request uses no adapter
    result = host(lora(*(move(library, array) for array in (y.copy(), x, a, b, rank_adapter, weights))))
    first, second, third = np.split(result, 3)
    used = (y, arguments[1], arguments[2], arguments[3], rank_adapter, weights)
    check_rows = slice(0, rows // 3)
    error = np.abs(first.astype(np.float64) - clean[check_rows])
    assert np.all(error <= 2.0**-11 * np.abs(clean[check_rows]) + 2.0**-20 * magnitude(*used)[check_rows] + 2.0**-25)
    assert same_bits(second, y[rows // 3 : 2 * rows // 3])
    assert np.isnan(third).all()


@on_both
def test_nothing_to_add(library):
    for rows, k, n, ranks, adapters in ((0, 8, 4, 3, 2), (4, 8, 0, 3, 2), (4, 0, 4, 3, 2), (4, 8, 4, 0, 2), (4, 8, 4, 0, 0)):
        y = random(0, (rows, n), float16)
        x, a, b = np.zeros((rows, k), float16), np.zeros((k, ranks), float16), np.zeros((ranks, n), float16)
        rest = (x, a, b, np.zeros(ranks, np.int32), np.ones((2, adapters), np.float32))
        result = lora(*(move(library, array) for array in (y.copy(), *rest)))
        assert same_bits(host(result), y)
    y = random(0, (4, 4), float16)
    no_requests = (np.zeros((0, 8), float16), np.zeros((8, 1), float16), np.zeros((1, 4), float16), np.zeros(1, np.int32))
    lora(*(move(library, array) for array in (y[:0], *no_requests, np.zeros((0, 1), np.float32))))


def bad_calls(xp):
    def call(**changes):
        arrays = {
            "y": xp.zeros((4, 6), np.float16),
            "x": xp.zeros((4, 8), np.float16),
            "a": xp.zeros((8, 3), np.float16),
            "b": xp.zeros((3, 6), np.float16),
            "rank_adapter": xp.zeros(3, np.int32),
            "weights": xp.zeros((2, 1), np.float32),
        }
        return lora(**(arrays | changes))

    shared = xp.zeros(200, np.float16)
    return [
        (TypeError, "x must have dtype", lambda: call(x=xp.zeros((4, 8), np.int32))),
        (ValueError, "x must have 2 dimensions", lambda: call(x=xp.zeros((1, 4, 8), np.float16))),
        (TypeError, "a must have dtype float16", lambda: call(a=xp.zeros((8, 3), np.float32))),
        (ValueError, r"a must have shape \(8, any\)", lambda: call(a=xp.zeros((3, 8), np.float16))),
        (ValueError, r"b must have shape \(3, any\)", lambda: call(b=xp.zeros((6, 3), np.float16))),
        (ValueError, r"y must have shape \(4, 6\)", lambda: call(y=xp.zeros((4, 7), np.float16))),
        (TypeError, "y must have dtype", lambda: call(y=xp.zeros((4, 6), np.int32))),
        (ValueError, "y must be C-contiguous", lambda: call(y=xp.zeros((4, 12), np.float16)[:, ::2])),
        (TypeError, "rank_adapter must have dtype int32", lambda: call(rank_adapter=xp.zeros(3, np.int64))),
        (ValueError, r"rank_adapter must have shape \(3\)", lambda: call(rank_adapter=xp.zeros(4, np.int32))),
        (TypeError, "weights must have dtype float32", lambda: call(weights=xp.zeros((2, 1), np.float16))),
        (ValueError, "weights has 3 rows.*no multiple", lambda: call(weights=xp.zeros((3, 1), np.float32))),
        (ValueError, "weights has 0 rows.*no multiple", lambda: call(weights=xp.zeros((0, 1), np.float32))),
        (ValueError, "y overlaps x", lambda: call(y=shared[:24].reshape(4, 6), x=shared[20:52].reshape(4, 8))),
        (ValueError, "y overlaps b", lambda: call(y=shared[:24].reshape(4, 6), b=shared[20:38].reshape(3, 6))),
        (ValueError, "workspace must have 12 float32", lambda: call(workspace=xp.zeros(11, np.float32))),
        (TypeError, "workspace must have dtype float32", lambda: call(workspace=xp.zeros(99, np.float16))),
        (ValueError, "workspace overlaps x", lambda: call(x=shared[:32].reshape(4, 8), workspace=shared.view(np.float32))),
        (TypeError, "y must be a NumPy or CuPy array", lambda: call(y=[[0.0] * 6] * 4)),
    ]


def test_bad_calls_get_clear_errors():
    for error, text, call in bad_calls(np):
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
    y, x, a, b, rank_adapter, weights = problem(4, 8, 6, (2, 1), [[1, 1]], float16)
    for wrong in ([0, 0, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="rank_adapter must be from 0 to 1, as weights has 2 columns, got"):
            lora(y, x, a, b, np.array(wrong, np.int32), weights)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="y is read-only"):
        lora(y, x, a, b, rank_adapter, weights)


@pytest.mark.gpu
def test_bad_calls_get_clear_errors_on_the_gpu(cupy):
    for error, text, call in bad_calls(cupy):
        with pytest.raises(error, match=text):
            call()


# --- kernels ----------------------------------------------------------------------------------------------------------

RANKS = (1, 2, 8, 32, 64)

# rows, k, n, ranks of the adapters, choices of the requests
CASES = {
    "one of everything": (1, 1, 1, (1,), [[1]]),
    "decode": (1, 256, 136, (16,), [[0.5]]),
    "decode, K in slices": (1, 1100, 260, (16, 8), [[1, 0]]),
    "decode, mixed ranks, requests apart": (6, 576, 132, RANKS, [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5,
                                            [0, 2, 0, 0, 0.25], [1, 1, 1, 1, 1], [0, 0, -1, 0, 0]]),
    "decode, odd sizes": (3, 259, 67, (3, 5), [[1, 0], [0, 1], [1, 1]]),
    "few rows": (9, 515, 257, (4, 8), [[1, 1], [0, 1], [1, 0]]),
    "few rows, even sizes": (28, 512, 264, (8, 16, 24), [[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]]),
    "tile - 1": (30, 192, 512, (16, 16), [[1, 0], [0.5, 1]]),
    "tile": (32, 192, 512, (16, 16), [[1, 0], [0.5, 1]]),
    "tile + 1": (34, 192, 516, (16, 16), [[1, 0], [0.5, 1]]),
    "prefill, mixed ranks": (195, 640, 520, RANKS, [[0, 0, 0, 1, 1], [1, 2, 1, 0, 0], [0, 0, 1, 0, 0]]),
    "prefill, ranks by eights": (130, 328, 300, (64, 8, 72), [[1, 1, 1], [0, 0, 1]]),
    "prefill, odd sizes": (131, 331, 111, (1, 1, 5), [[1, 0, -1]]),
    "prefill, K odd": (40, 97, 36, (8, 8), [[1, 0.5]]),
    "prefill, K of one": (16, 1, 9, (2,), [[3]]),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "y_dtype"), PAIRS, ids=str)
def test_kernels(dtype, y_dtype, cupy):
    compile_all(INSTANCES, _device.current().arch)  # in parallel; nothing, where they are in the cache
    for name, (rows, k, n, ranks, choices) in CASES.items():
        arguments = problem(rows, k, n, ranks, choices, dtype, y_dtype)
        for shift in (0, 1) if dtype == y_dtype == float16 else (0,):
            rest = [on_gpu(cupy, array, shift) for array in arguments[1:4]] + [cupy.asarray(array) for array in arguments[4:]]
            y, check_bands = banded(cupy, arguments[0], shift)
            workspace = cupy.full(lora_workspace_size(rows, k, sum(ranks)), np.nan, np.float32)
            assert lora(y, *rest, workspace=workspace) is y
            check_bands()
            check(y.get(), arguments)
            again = cupy.asarray(arguments[0])
            lora(again, *rest)
            if shift == 0:
                assert same_bits(again.get(), y.get()), name
            for before, after in zip(arguments[1:], rest, strict=True):
                assert same_bits(after.get(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 70])
def test_thousands_of_ranks_of_which_few_are_used(rows, cupy):
    ranks = [1 + i % 40 for i in range(150)]  # 3,000 columns
    choices = np.zeros((2, 150))
    choices[0, [0, 3, 70, 149]], choices[1, [20, 21]] = 1, (0.5, -1)
    for dtype in (float16, bfloat16):
        arguments = problem(rows, 200, 80, ranks, choices, dtype)
        y = lora(*map(cupy.asarray, arguments))
        check(y.get(), arguments)
        everything = (*arguments[:5], np.full((1, 150), 0.1, np.float32))
        check(lora(*map(cupy.asarray, everything)).get(), everything)


@pytest.mark.gpu
def test_many_rows(cupy):
    for requests in (1, 4, 100_000):
        choices = (np.arange(2 * requests).reshape(requests, 2) % 3).astype(np.float32)
        arguments = problem(100_000, 24, 40, (8, 3), choices, float16)
        y = lora(*map(cupy.asarray, arguments)).get()
        picked = np.r_[0:50, 24_990:25_010, 65_530:65_540, 99_950:100_000]
        y0, x, a, b, rank_adapter, weights = arguments
        weights = weights[picked // (100_000 // requests)]
        check(y[picked], (y0[picked], x[picked], a, b, rank_adapter, weights))


@pytest.mark.gpu
def test_adapter_numbers_out_of_range_count_as_unused(cupy):
    y, x, a, b, rank_adapter, weights = problem(3, 64, 40, (8, 8), [[1, 1]], float16)
    wrong = rank_adapter.copy()
    wrong[8:12], wrong[12:] = 2, -1
    result = lora(*map(cupy.asarray, (y, x, a, b, wrong, weights))).get()
    check(result, (y, x, a, b, rank_adapter, np.array([[1, 0]], np.float32)))


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph(cupy):
    arguments = problem(4, 300, 72, (8, 4), [[1, 0], [0, 1], [1, 1], [0, 0]], float16)
    arrays = [cupy.asarray(array) for array in arguments]
    workspace = cupy.empty(lora_workspace_size(4, 300, 12), np.float32)
    lora(arrays[0].copy(), *arrays[1:], workspace=workspace)
    y, stream = arrays[0].copy(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        lora(y, *arrays[1:], workspace=workspace)
        graph = stream.end_capture()
        assert same_bits(y.get(), arguments[0])
        graph.launch()
        stream.synchronize()
    check(y.get(), arguments)


def wrong_references():
    """(name, arguments) -> arguments of a product that is wrong in one way."""

    def weight_of_the_next_request(y, x, a, b, r, w):
        return y, x, a, b, r, np.roll(w, 1, axis=0)

    def adapter_off_by_one_column(y, x, a, b, r, w):
        return y, x, a, b, np.roll(r, 1), w

    def rank_of_b_exchanged(y, x, a, b, r, w):
        return y, x, a, np.roll(b, 1, axis=0), r, w

    def columns_shifted(y, x, a, b, r, w):
        return y, x, a, np.roll(b, 1, axis=1), r, w

    def last_of_k_left_out(y, x, a, b, r, w):
        return y, x[:, :-1], a[:-1], b, r, w

    def weights_taken_as_one(y, x, a, b, r, w):
        return y, x, a, b, r, (w != 0).astype(np.float32)

    def y_overwritten(y, x, a, b, r, w):
        return np.zeros_like(y), x, a, b, r, w

    return [value for value in locals().values() if callable(value)]


@on_both
@pytest.mark.parametrize("wrong", wrong_references(), ids=lambda function: function.__name__)
def test_the_tolerance_bites(library, wrong):
    for name in ("decode, mixed ranks, requests apart", "prefill, mixed ranks"):
        rows, k, n, ranks, choices = CASES[name]
        arguments = problem(rows, k, n, ranks, np.array(choices) * 0.75, float16)
        y = host(lora(*(move(library, array.copy()) for array in arguments)))
        check(y, arguments)
        with pytest.raises(AssertionError, match="times what is allowed"):
            check(y, wrong(*arguments))


# --- layers -----------------------------------------------------------------------------------------------------------


def adapter(seed, k, n, rank, number, library="numpy", dtype=float32):
    a, b = random(seed, (k, rank), dtype, k**-0.5), random(seed + 50, (rank, n), dtype)
    return LoraWeights.of(move(library, a), move(library, b), number)


def selection(library, rows):
    weights = np.asarray(rows, np.float32)
    return Selection(move(library, weights), frozenset(np.flatnonzero(weights.any(axis=0)).tolist()))


@on_both
@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_adapters_are_joined_and_taken_apart(library, dtype):
    """The words of each stay as they are, in whichever order the adapters come and go."""
    one, two, three = (
        adapter(i, 12, 7, rank, number, library, dtype) for i, (rank, number) in enumerate(((3, 0), (1, 4), (2, 1)))
    )
    all_three = one.joined(two).joined(three)
    assert all_three.columns == (0, 0, 0, 4, 1, 1) and all_three.adapters == {0, 1, 4}
    assert host(all_three.rank_adapter).tolist() == [0, 0, 0, 4, 1, 1] and all_three.rank_adapter.dtype == np.int32

    def parts(*adapters):
        a = np.concatenate([host(x.a) for x in adapters], axis=1)
        return a, np.concatenate([host(x.b) for x in adapters])

    for weights, expected in (
        (all_three, parts(one, two, three)),
        (all_three.without(4), parts(one, three)),
        (all_three.without(0), parts(two, three)),
        (all_three.without(1).without(0), parts(two)),
    ):
        for array, wanted in zip((weights.a, weights.b), expected, strict=True):
            assert array.flags.c_contiguous and same_bits(host(array), wanted)
    assert two.without(4) is None


@on_both
def test_linear_adds_its_adapters(library):
    dtype = float16
    k, n = 24, 40
    weight, x = random(9, (n, k), dtype, k**-0.5), random(10, (2, 3, k), dtype)
    layer = Linear(move(library, weight), name="some.layer")
    base = host(layer(move(library, x)))
    chosen = selection(library, [[0.5, 1.0], [0, 0]])
    assert same_bits(host(layer(move(library, x), adapters=chosen)), base)  # none is loaded
    one, two = adapter(0, k, n, 4, 0, library, dtype), adapter(1, k, n, 2, 1, library, dtype)
    layer.lora = one.joined(two)
    y = host(layer(move(library, x), adapters=chosen))
    delta = sum(
        w * (x.astype(np.float64) @ host(z.a).astype(float)) @ host(z.b).astype(float) for w, z in ((0.5, one), (1, two))
    )
    assert y.dtype == dtype and same_bits(y[1], base[1])
    assert np.abs(y[0] - (base[0] + delta[0])).max() <= 2.0**-11 * np.abs(y).max()
    assert np.abs(y[0] - base[0]).max() > 0.1
    assert same_bits(host(layer(move(library, x))), base)
    assert same_bits(host(layer(move(library, x), adapters=selection(library, [[0, 0, 1.0]]))), base)  # others' adapter

    out = move(library, np.full((2, 3, n), np.nan, np.float32))
    assert layer(move(library, x), out=out, dtype=np.float32, adapters=chosen) is out
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    exact[0] += delta[0]
    assert np.abs(host(out) - exact).max() <= 1e-5  # added in float32: no rounding to 16 bits on the way
