"""rms_norm, layer_norm and head_norm: references against plain loops and recorded outputs, kernels against float64."""

import itertools
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

from cupyq.ops.norm import head_norm, layer_norm, rms_norm

ONE_ROUNDING = {float16: 2.0**-11, bfloat16: 2.0**-8, float32: 2.0**-24}


def rms_loop(row, weight, eps):
    mean_square = math.fsum(float(v) ** 2 for v in row) / len(row)
    return [float(v) * float(w) / math.sqrt(mean_square + eps) for v, w in zip(row, weight, strict=True)]


def layer_loop(row, weight, eps):
    mean = math.fsum(map(float, row)) / len(row)
    variance = math.fsum((float(v) - mean) ** 2 for v in row) / len(row)
    return [(float(v) - mean) * float(w) / math.sqrt(variance + eps) for v, w in zip(row, weight, strict=True)]


def in_float64(x, weight, bias, eps, kind, residual=None):
    """The formula over the last axis, from float64 copies."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    for addend in (bias, residual):
        y = y if addend is None else y + addend.astype(np.float64)
    return y


def in_float32(x, weight, bias, eps, kind, dtype, residual=None):
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x * weight / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
    for addend in (bias, residual):
        y = y if addend is None else y + addend.astype(np.float32)
    return y.astype(dtype)


def run(kind, x, weight, bias, eps, **options):
    return layer_norm(x, weight, bias, eps=eps, **options) if kind == "layer" else rms_norm(x, weight, eps=eps, **options)


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, loop", [("rms", rms_loop), ("layer", layer_loop)])
def test_reference_against_loops(kind, loop):
    x, weight, bias = random(1, (2, 3, 19), float32, 0.05), random(2, 19, float32), random(3, 19, float32)
    bias = bias if kind == "layer" else None
    y = run(kind, x, weight, bias, 1e-3)
    assert y.dtype == np.float32 and y.shape == x.shape
    for index in np.ndindex(2, 3):
        expected = np.array(loop(x[index], weight, 1e-3)) + (0 if bias is None else bias.astype(np.float64))
        np.testing.assert_allclose(y[index], expected, rtol=2**-23, atol=1e-9)


@pytest.mark.parametrize("kind, loop", [("rms", rms_loop), ("layer", layer_loop)])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_residual_against_loops(kind, loop, dtype):
    x, weight, bias = random(1, (5, 19), float16, 0.05), random(2, 19, float32), random(3, 19, float32)
    bias = bias if kind == "layer" else None
    residual = random(4, x.shape, dtype, 3.0)
    y = run(kind, x, weight, bias, 1e-3, residual=residual)
    assert y.dtype == dtype, "the result takes residual's dtype"
    for row in range(5):
        normed = np.array(loop(x[row], weight, 1e-3)) + (0 if bias is None else bias.astype(np.float64))
        expected = residual[row].astype(np.float64) + normed
        np.testing.assert_allclose(y[row].astype(np.float64), expected, rtol=1.01 * ONE_ROUNDING[dtype], atol=1e-12)
    inside, out = residual.copy(), unwritten(x.shape, dtype)
    assert run(kind, x, weight, bias, 1e-3, residual=inside, out=inside) is inside
    assert run(kind, x, weight, bias, 1e-3, residual=residual, out=out) is out
    assert same_bits(inside, y) and same_bits(out, y)


@pytest.mark.parametrize("kind, loop", [("rms", rms_loop), ("layer", layer_loop)])
@pytest.mark.parametrize("per_head", [False, True])
def test_head_reference_against_loops(kind, loop, per_head):
    x, shape = random(4, (5, 3, 11), float16), (3, 11) if per_head else (11,)
    weight, bias = random(5, shape, float32), random(6, shape, float32)
    y = head_norm(x, weight, bias, eps=1e-2, kind=kind)
    assert y.dtype == np.float16
    for row, head in np.ndindex(5, 3):
        w, b = (a[head] if per_head else a for a in (weight, bias))
        expected = np.array(loop(x[row, head], w, 1e-2)) + b.astype(np.float64)
        np.testing.assert_allclose(y[row, head], expected, rtol=2**-11, atol=1e-7)


GOLDEN = sorted(golden("norm").items())


@on_both
@pytest.mark.parametrize("case", [name for name, _ in GOLDEN])
def test_recorded_outputs(case, library):
    inputs, outputs, arguments = dict(GOLDEN)[case]
    x, weight, eps, expected = inputs["x"], inputs["w"], arguments["epsilon"], outputs["y"]
    bias = inputs.get("b")
    x_, weight_ = move(library, x), move(library, weight)
    if case.startswith("head"):
        y = head_norm(x_, weight_, eps=eps, kind="rms" if arguments["rms"] else "layer")
    else:
        kind = case.split("_")[0]
        y = run(kind, x_, weight_, move(library, bias), eps, dtype=expected.dtype)
    y, expected = host(y), expected.astype(np.float64)
    assert y.dtype == outputs["y"].dtype
    if y.dtype == np.float32:
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
        return
    # Both results are within half a unit in the last place of the exact value, so at most one unit apart; the recorded
    # layer norm rounds once more before it adds its bias.
    unit = np.spacing(np.abs(outputs["y"])).astype(np.float64)
    before_bias = 0 if bias is None else np.spacing(np.abs(expected - bias.astype(np.float64)).astype(np.float16))
    assert np.all(np.abs(y - expected) <= unit + before_bias)
    assert np.mean(y == expected) > (0.98 if bias is None else 0.6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bound_rejects_wrong_formulas(kind):
    x, weight, bias, eps = random(7, (9, 300), float16, 0.02), random(8, 300, float16), random(9, 300, float16), 1e-4
    exact, rounded = in_float64(x, weight, bias, eps, kind), in_float32(x, weight, bias, eps, kind, float16)
    near(rounded, exact, rounded)
    unbiased = in_float64(x, weight, bias, eps, kind) - bias.astype(np.float64)
    wrong = {
        "no eps": in_float64(x, weight, bias, 0.0, kind),
        "weight off by one column": in_float64(x, np.roll(weight, 1), bias, eps, kind),
        "bias off by one column": unbiased + np.roll(bias, 1).astype(np.float64),
        "no bias": unbiased,
        "mean over one column less": in_float64(x[:, :-1], weight[:-1], bias[:-1], eps, kind),
    }
    for name, y in wrong.items():
        columns = slice(0, y.shape[1])
        with pytest.raises(AssertionError):
            near(y.astype(np.float16), exact[:, columns], rounded[:, columns])
            pytest.fail(f"not rejected: {name}")


def order_of(dim, count, seed=0):
    """Columns in some order, with repetitions where count > dim, and a few -1."""
    order = np.random.default_rng(seed).permutation(np.arange(max(dim, count)) % dim)[:count].astype(np.int32)
    order[[i for i in (0, count // 2, count - 1) if count > 3]] = -1
    return order


def ordered(y, order):
    """Column after column."""
    columns = [np.zeros(y.shape[:-1], y.dtype) if c < 0 else y[..., c] for c in order.tolist()]
    return np.stack(columns, axis=-1) if columns else np.empty((*y.shape[:-1], 0), y.dtype)


@on_both
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dim, count", [(19, 32), (64, 64), (257, 96), (1, 32), (40, 3), (8, 0)])
def test_order_picks_columns_of_the_norm(library, kind, dim, count):
    x, weight, order = random(1, (2, 3, dim), float16), random(2, dim, float32), order_of(dim, count)
    bias = random(3, dim, float32) if kind == "layer" else None
    x_, weight_, bias_, order_ = (move(library, a) for a in (x, weight, bias, order))
    y = host(run(kind, x_, weight_, bias_, 1e-3, order=order_, dtype=float32))
    plain = host(run(kind, x_, weight_, bias_, 1e-3, dtype=float32))
    np.testing.assert_allclose(y, ordered(plain, order), rtol=1e-5, atol=1e-6)
    if library == "numpy":
        assert same_bits(y, ordered(plain, order))
    assert not y[..., order < 0].any()
    if count:  # picking other columns would be seen
        assert not np.allclose(np.roll(y, 1, axis=-1), y) or dim == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x_dtype, dtype", [(float32, float16), (bfloat16, bfloat16), (float16, float32)], ids=lambda d: d.name)
def test_ordered_kernels(cupy, kind, x_dtype, dtype):
    for rows, dim, count in [
        (1, 32, 32),
        (3, 7, 32),
        (2, 255, 256),
        (5, 2048, 2080),
        (2, 4096, 4128),
        (2, 8200, 64),
        (1, 64, 9001),
    ]:
        x, weight, order = random(dim, (rows, dim), x_dtype), random(dim + 1, dim, float32), order_of(dim, count)
        bias = random(dim + 2, dim, float32) if kind == "layer" and dim % 3 else None
        exact = ordered(in_float64(x, weight, bias, 1e-4, kind), order)
        rounded = ordered(in_float32(x, weight, bias, 1e-4, kind, dtype), order)
        for shift in (0, 1) if dim == 32 else (0,):
            arrays = [None if a is None else on_gpu(cupy, a, shift) for a in (x, weight, bias)]
            out, check = banded(cupy, unwritten((rows, count), dtype), shift)
            assert run(kind, *arrays, 1e-4, order=on_gpu(cupy, order, shift), dtype=dtype, out=out) is out
            check()
            near(out.get(), exact, rounded)
            again = run(kind, *arrays, 1e-4, order=on_gpu(cupy, order), dtype=dtype)
            assert shift or same_bits(again.get(), out.get()), "a second run differs"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_columns_that_are_none_become_zero(cupy, kind):
    """The kernel trusts no order: what lies outside of x is not read."""
    info, x = np.iinfo(np.int32), random(1, (3, 40), float32)
    order = np.array([0, 40, info.max, info.min, -2, 39, 1 << 20, 7] * 4, np.int32)
    y = run(kind, cupy.asarray(x), cupy.asarray(random(2, 40, float32)), None, 1e-3, order=cupy.asarray(order)).get()
    is_column = (order >= 0) & (order < 40)
    assert not y[:, ~is_column].any() and y[:, is_column].all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bound_rejects_wrong_residuals(kind):
    x, weight, eps = random(7, (9, 300), float16), random(8, 300, float16), 1e-4
    residual = random(9, x.shape, float32, 10.0)
    exact = in_float64(x, weight, None, eps, kind, residual)
    rounded = in_float32(x, weight, None, eps, kind, float32, residual)
    near(rounded, exact, rounded)
    normed = exact - residual
    wrong = {
        "no residual": normed,
        "residual twice": exact + residual,
        "residual off by one column": normed + np.roll(residual, 1, axis=1),
        "residual of the row before": normed + np.roll(residual, 1, axis=0),
        "the norm rounded to float16 first": residual + normed.astype(np.float16),
        "residual through float16": residual.astype(np.float16) + normed,
        "the norm of the sum": in_float64(x + residual, weight, None, eps, kind),
    }
    for name, y in wrong.items():
        with pytest.raises(AssertionError):
            near(y.astype(np.float32), exact, rounded)
            pytest.fail(f"not rejected: {name}")


# --- kernels ----------------------------------------------------------------------------------------------------------

SIZES = [
    (1, 1),
    (3, 7),
    (5, 8),
    (3, 9),
    (7, 64),
    (4, 255),
    (4, 256),
    (4, 257),
    (3, 264),
    (3, 2056),
    (2, 8191),
    (2, 8192),
]
DTYPES = [
    (float16, float16, float16),
    (bfloat16, bfloat16, bfloat16),
    (float32, float32, float32),
    (float32, float16, float16),
    (bfloat16, float32, float16),
    (float16, bfloat16, float32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x_dtype, weight_dtype, dtype", DTYPES, ids=lambda d: d.name)
def test_row_kernels(cupy, kind, x_dtype, weight_dtype, dtype):
    for rows, dim in SIZES:
        x, weight = random(dim, (rows, dim), x_dtype), random(dim + 1, dim, weight_dtype)
        x[0] *= x_dtype.type(0.01)  # a row where eps counts
        bias = random(dim + 2, dim, weight_dtype) if kind == "layer" and dim % 3 else None
        exact, rounded = in_float64(x, weight, bias, 1e-4, kind), in_float32(x, weight, bias, 1e-4, kind, dtype)
        for shift in (0, 1) if dim in (8, 264) else (0,):
            arrays = [None if a is None else on_gpu(cupy, a, shift) for a in (x, weight, bias)]
            out, check = banded(cupy, unwritten(x.shape, dtype), shift)
            assert run(kind, *arrays, 1e-4, dtype=dtype, out=out) is out
            check()
            near(out.get(), exact, rounded)
            again = run(kind, *arrays, 1e-4, dtype=dtype)
            assert same_bits(again.get(), out.get()), "a second run differs"
            assert same_bits(arrays[0].get(), x) and same_bits(arrays[1].get(), weight), "an input changed"
        if x_dtype == dtype:
            inside, check = banded(cupy, x)
            assert run(kind, inside, *arrays[1:], 1e-4, out=inside) is inside
            check()
            near(inside.get(), exact, rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x_dtype", FLOATS, ids=lambda d: d.name)
def test_every_pairing_of_dtypes(cupy, kind, x_dtype):
    """Of x, weight and y, with a residual of y's dtype and without."""
    for weight_dtype, dtype in itertools.product(FLOATS, FLOATS):
        x, weight = random(1, (4, 264), x_dtype), random(2, 264, weight_dtype)
        bias = random(3, 264, weight_dtype) if kind == "layer" else None
        x_, weight_, bias_ = (None if a is None else on_gpu(cupy, a) for a in (x, weight, bias))
        for residual in (None, random(4, x.shape, dtype, 3.0)):
            exact = in_float64(x, weight, bias, 1e-4, kind, residual)
            rounded = in_float32(x, weight, bias, 1e-4, kind, dtype, residual)
            given = None if residual is None else on_gpu(cupy, residual)
            out, check = banded(cupy, unwritten(x.shape, dtype))
            run(kind, x_, weight_, bias_, 1e-4, residual=given, out=out, dtype=dtype)
            check()
            near(out.get(), exact, rounded)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x_dtype, dtype", [(float16, float32), (bfloat16, bfloat16)], ids=lambda d: d.name)
def test_residual_kernels(cupy, kind, x_dtype, dtype):
    for rows, dim in SIZES:
        x, weight = random(dim, (rows, dim), x_dtype), random(dim + 1, dim, float32)
        bias = random(dim + 2, dim, float32) if kind == "layer" and dim % 3 else None
        residual = random(dim + 3, x.shape, dtype, 3.0)
        exact = in_float64(x, weight, bias, 1e-4, kind, residual)
        rounded = in_float32(x, weight, bias, 1e-4, kind, dtype, residual)
        for shift in (0, 1) if dim in (8, 264) else (0,):
            x_, weight_, bias_ = (None if a is None else on_gpu(cupy, a, shift) for a in (x, weight, bias))
            # Into the residual itself, into memory of its own, and over x.
            inside, check = banded(cupy, residual, shift)
            assert run(kind, x_, weight_, bias_, 1e-4, residual=inside, out=inside) is inside
            check()
            near(inside.get(), exact, rounded)
            assert same_bits(x_.get(), x), "an input changed"
            given = on_gpu(cupy, residual, shift)
            out, check = banded(cupy, unwritten(x.shape, dtype), shift)
            run(kind, x_, weight_, bias_, 1e-4, residual=given, out=out)
            check()
            assert same_bits(out.get(), inside.get()) and same_bits(given.get(), residual)
            if x_dtype == dtype:
                over, check = banded(cupy, x, shift)
                run(kind, over, weight_, bias_, 1e-4, residual=given, out=over)
                check()
                assert same_bits(over.get(), inside.get()), "over x differs"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_many_rows(cupy, kind):
    x, weight = random(1, (100_003, 16), float16), random(2, 16, float16)
    out, check = banded(cupy, unwritten(x.shape, float16))
    run(kind, on_gpu(cupy, x), on_gpu(cupy, weight), None, 1e-5, out=out)
    check()
    near(out.get(), in_float64(x, weight, None, 1e-5, kind), in_float32(x, weight, None, 1e-5, kind, float16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("x_dtype, weight_dtype", [(d, d) for d in FLOATS] + [(float16, float32)], ids=lambda d: d.name)
def test_head_kernel(cupy, kind, x_dtype, weight_dtype):
    for rows, heads, head_dim in [(1, 1, 1), (3, 5, 7), (2, 3, 64), (5, 7, 80), (2, 4, 128), (1, 33, 256), (2, 3, 257)]:
        x = random(head_dim, (rows, heads, head_dim), x_dtype, 0.1)
        for shape in ((head_dim,), (heads, head_dim)):
            weight = random(1, shape, weight_dtype)
            bias = random(2, shape, weight_dtype) if head_dim % 2 == 0 else None
            exact = in_float64(x, weight, bias, 1e-4, kind)
            rounded = in_float32(x, weight, bias, 1e-4, kind, x_dtype)
            for shift in (0, 1) if head_dim == 64 else (0,):
                x_, weight_, bias_ = (None if a is None else on_gpu(cupy, a, shift) for a in (x, weight, bias))
                out, check = banded(cupy, unwritten(x.shape, x_dtype), shift)
                assert head_norm(x_, weight_, bias_, eps=1e-4, kind=kind, out=out) is out
                check()
                near(out.get(), exact, rounded)
                inside, check = banded(cupy, x, shift)
                head_norm(inside, weight_, bias_, eps=1e-4, kind=kind, out=inside)
                check()
                assert same_bits(inside.get(), out.get()), "in place differs"
                aligned = head_norm(*(None if a is None else cupy.asarray(a) for a in (x, weight, bias)), eps=1e-4, kind=kind)
                assert same_bits(aligned.get(), out.get()), "the bits depend on addresses"


# --- both paths -------------------------------------------------------------------------------------------------------


@on_both
def test_empty(library):
    weight = move(library, np.ones(8, np.float16))
    for op in (rms_norm, layer_norm):
        y = op(move(library, np.ones((0, 8), np.float16)), weight)
        assert y.shape == (0, 8) and y.dtype == np.float16
        assert op(move(library, np.ones((3, 0), np.float16)), move(library, np.ones(0, np.float16))).shape == (3, 0)
    assert head_norm(move(library, np.ones((2, 0, 8), np.float16)), weight).shape == (2, 0, 8)


def X(shape=(2, 3, 8), dtype=np.float16):
    return np.ones(shape, dtype)


W = np.ones(8, np.float16)
REFUSED = {
    "x dtype": (TypeError, "x must have dtype", rms_norm, (X(dtype=np.float64), W), {}),
    "x scalar": (ValueError, "x must have at least", rms_norm, (X(()), np.ones(1, np.float16)), {}),
    "weight dtype": (TypeError, "weight must have dtype", rms_norm, (X(), W.astype(np.int32)), {}),
    "weight shape": (ValueError, "weight must have shape", layer_norm, (X(), np.ones(7, np.float16)), {}),
    "bias dtype": (TypeError, "bias must have dtype", layer_norm, (X(), W, W.astype(np.float32)), {}),
    "bias shape": (ValueError, "bias must have shape", layer_norm, (X(), W, np.ones(4, np.float16)), {}),
    "out dtype": (TypeError, "out must have dtype", rms_norm, (X(), W), {"out": X(dtype=np.float32)}),
    "dtype": (TypeError, "out must have dtype", layer_norm, (X(), W), {"dtype": np.float64}),
    "out shape": (ValueError, "out must have shape", layer_norm, (X(), W), {"out": X((2, 3, 9))}),
    "residual dtype": (TypeError, "residual must have dtype", rms_norm, (X(), W), {"residual": X(dtype=np.int32)}),
    "residual not of dtype": (
        TypeError,
        "residual must have dtype float16",
        layer_norm,
        (X(), W),
        {"residual": X(dtype=np.float32), "dtype": np.float16},
    ),
    "out not of residual's dtype": (
        TypeError,
        "out must have dtype float32",
        rms_norm,
        (X(), W),
        {"residual": X(dtype=np.float32), "out": X()},
    ),
    "residual shape": (ValueError, "residual must have shape", rms_norm, (X(), W), {"residual": X((3, 8))}),
    "order dtype": (TypeError, "order must have dtype int32", rms_norm, (X(), W), {"order": np.zeros(32, np.int64)}),
    "order shape": (ValueError, "order must have 1 dim", layer_norm, (X(), W), {"order": np.zeros((1, 32), np.int32)}),
    "order and residual": (
        ValueError,
        "order and residual are both given",
        rms_norm,
        (X(), W),
        {"order": np.zeros(32, np.int32), "residual": X()},
    ),
    "out not of order's size": (
        ValueError,
        "out must have shape",
        layer_norm,
        (X(), W),
        {"order": np.zeros(32, np.int32), "out": X()},
    ),
    "no columns to order": (
        ValueError,
        "x must have at least one column",
        rms_norm,
        (X((3, 0)), W[:0]),
        {"order": np.zeros(32, np.int32)},
    ),
    "kind": (ValueError, "kind must be", head_norm, (X(), W), {"kind": "batch"}),
    "head weight": (ValueError, "weight must have shape", head_norm, (X(), np.ones((2, 8), np.float16)), {}),
    "head bias": (ValueError, "bias must have shape", head_norm, (X(), W, np.ones((3, 8), np.float16)), {}),
    "one dimension": (ValueError, "x must have at least", head_norm, (X((8,)), W), {}),
}


@on_both
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, library):
    error, message, op, arrays, options = REFUSED[case]
    options = {name: move(library, value) for name, value in options.items()}
    with pytest.raises(error, match=message):
        op(*(move(library, a) for a in arrays), **options)


@on_both
def test_refuses_strides_and_overlap(library):
    whole = move(library, np.ones((4, 8), np.float16))
    weight = move(library, W)
    for op in (rms_norm, layer_norm, head_norm):
        with pytest.raises(ValueError, match="x must be C-contiguous"):
            op(whole.T, move(library, np.ones(4, np.float16)))
        with pytest.raises(ValueError, match="out overlaps x partly"):
            op(whole[:3], weight, out=whole[1:])
    for op in (rms_norm, layer_norm):
        with pytest.raises(ValueError, match="out overlaps residual partly"):
            op(move(library, np.ones((3, 8), np.float16)), weight, residual=whole[:3], out=whole[1:])
        with pytest.raises(ValueError, match="residual must be C-contiguous"):
            op(move(library, np.ones((8, 4), np.float16)), move(library, np.ones(4, np.float16)), residual=whole.T)


@on_both
def test_order_refuses_to_work_in_place(library):
    x, weight, order = (move(library, a) for a in (X((4, 8)), W, np.arange(8, dtype=np.int32)))
    for op in (rms_norm, layer_norm):
        with pytest.raises(ValueError, match="out overlaps x"):
            op(x, weight, order=order, out=x)


def test_numpy_names_an_order_outside():
    for wrong in (8, -2):
        with pytest.raises(ValueError, match="order must hold -1 or columns of x below 8, got"):
            rms_norm(X(), W, order=np.array([0, wrong] * 16, np.int32))


@pytest.mark.gpu
def test_refuses_a_mix_of_libraries(cupy):
    with pytest.raises(TypeError, match="move one with"):
        rms_norm(cupy.asarray(X()), W)
    with pytest.raises(TypeError, match="out must be an array of cupy"):
        rms_norm(cupy.asarray(X()), cupy.asarray(W), out=X())


def test_refuses_a_read_only_out():
    out = X()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        rms_norm(X(), W, out=out)
