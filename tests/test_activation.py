"""Activations, alone and times up, and softcap: references against math and recorded outputs, kernels against float64."""

import math

import numpy as np
import pytest
from conftest import golden
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

from cupyq.ops.activation import clamp, gelu, gelu_mul, relu, relu_mul, silu, silu_mul, softcap


def silu_of(x):
    return x / (1 + math.exp(-x))


def gelu_tanh_of(x):
    return x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf_of(x):
    return x * math.erfc(-x / math.sqrt(2)) / 2


def relu_of(x):
    return 0.0 if x < 0 else x


def cap_of(x):
    return 5 * math.tanh(x / 5)


def clamp_of(x):
    return -5.0 if x < -5 else 5.0 if x > 5 else x


# name -> (op of x and up, gated?, the scalar function)
OPS = {
    "silu": (lambda x, up, **o: silu(x, **o), False, silu_of),
    "relu": (lambda x, up, **o: relu(x, **o), False, relu_of),
    "relu_mul": (lambda x, up, **o: relu_mul(x, up, **o), True, relu_of),
    "silu_mul": (lambda x, up, **o: silu_mul(x, up, **o), True, silu_of),
    "gelu_mul": (lambda x, up, **o: gelu_mul(x, up, **o), True, gelu_tanh_of),
    "gelu_mul none": (lambda x, up, **o: gelu_mul(x, up, approximate="none", **o), True, gelu_erf_of),
    "gelu": (lambda x, up, **o: gelu(x, **o), False, gelu_tanh_of),
    "gelu none": (lambda x, up, **o: gelu(x, approximate="none", **o), False, gelu_erf_of),
    "softcap": (lambda x, up, **o: softcap(x, 5.0, **o), False, cap_of),
    "clamp": (lambda x, up, **o: clamp(x, 5.0, **o), False, clamp_of),
}


def in_float64(name, x, up):
    _, is_gated, function = OPS[name]
    y = np.array([function(v) for v in x.astype(np.float64).ravel().tolist()], np.float64).reshape(x.shape)
    return y * up.astype(np.float64) if is_gated else y


def in_float32(name, x, up):
    """Plain float32 NumPy arithmetic, rounded to x's dtype."""
    v = x.astype(np.float32)
    if name.startswith("silu"):
        y = v / (1 + np.exp(-v))
    elif name.startswith("relu"):
        y = np.maximum(v, np.float32(0))
    elif name == "softcap":
        y = np.float32(5) * np.tanh(v / np.float32(5))
    elif name == "clamp":
        y = np.clip(v, -5, 5)
    elif name.endswith("none"):
        erf = np.array([math.erf(a) for a in (v * np.float32(math.sqrt(0.5))).ravel().tolist()], np.float32)
        y = np.float32(0.5) * v * (1 + erf.reshape(v.shape))
    else:
        y = np.float32(0.5) * v * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (v + np.float32(0.044715) * v**3)))
    return (y * up.astype(np.float32) if OPS[name][1] else y).astype(x.dtype)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_reference_against_math(name, dtype):
    x, up = random(1, (5, 301), dtype, 4.0), random(2, (5, 301), dtype)
    y = OPS[name][0](x, up)
    assert y.dtype == dtype
    near(y, in_float64(name, x, up), in_float32(name, x, up))


@on_both
@pytest.mark.parametrize("case", ["softcap_f16", "softcap_f32"])
def test_recorded_softcap(case, library):
    inputs, outputs, arguments = golden("element")[case]
    y, expected = host(softcap(move(library, inputs["x"]), arguments["scale"])), outputs["y"]
    assert y.dtype == expected.dtype
    # Recorded with fp32 tanh; one rounding on either side.
    np.testing.assert_allclose(y, expected.astype(np.float64), rtol=2**-10 if y.dtype == np.float16 else 1e-6, atol=1e-6)
    assert np.mean(y == expected) > (0.98 if y.dtype == np.float16 else 0.4)


@on_both
def test_inf_and_nan(library):
    for dtype in FLOATS:
        x = move(library, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 60000, -60000, -200], np.float32).astype(dtype))
        ones = move(library, np.ones(8, dtype))
        for name, (op, _, _) in OPS.items():
            y = host(op(x, ones)).astype(np.float64)
            assert np.isnan(y[2]), name
            assert y[3] == 0 and y[4] == 0 and np.signbit(y[4]) and not np.signbit(y[3]), name
            if name in ("softcap", "clamp"):
                np.testing.assert_array_equal(y[[0, 1, 5, 6, 7]], [5, -5, 5, -5, -5])
            else:
                assert y[0] == np.inf and y[1] == 0 and y[5] == float(host(x)[5]) and abs(y[6]) < 1e-30, name
                assert abs(y[7]) < 1e-30, name
                # -Inf is the limit of what goes before it; times up it follows IEEE's rules for a zero.
                lowest = move(library, np.array([np.finfo(np.float32).min], np.float32))
                if dtype == float32:
                    assert host(op(lowest, ones[:1]))[0] == 0, name
        assert np.isinf(host(silu_mul(x, x)).astype(np.float64)[5]) == (dtype == float16)  # 60000^2 needs more range
        infinite = move(library, np.full(8, np.inf, np.float32).astype(dtype))
        for op in (silu_mul, gelu_mul, relu_mul):
            y = host(op(x, infinite)).astype(np.float64)
            assert y[0] == y[5] == np.inf and np.isnan(y[1:5]).all(), op


@on_both
def test_relu_is_exact(library):
    """Nothing is rounded, and the sign of zero stays."""
    for dtype in FLOATS:
        x = random(3, 4099, dtype, 100.0)
        x[:2] = [-0.0, np.finfo(dtype).tiny if dtype != FLOATS[1] else 1e-38]
        expected = np.array([relu_of(v) for v in x.astype(np.float64).tolist()]).astype(dtype)
        assert same_bits(host(relu(move(library, x))), expected)
        ones = np.ones(x.shape, dtype)
        assert same_bits(host(relu_mul(move(library, x), move(library, ones))), expected)


@on_both
def test_clamp_is_exact(library):
    for dtype in FLOATS:
        x = random(3, 4099, dtype, 100.0)
        x[:3] = [-0.0, 30.0, -30.0]
        expected = np.array([min(max(v, -30.0), 30.0) for v in x.astype(np.float64).tolist()]).astype(dtype)
        assert same_bits(host(clamp(move(library, x), 30.0)), expected)


@pytest.mark.parametrize("dtype", [float16, float32], ids=lambda d: d.name)
def test_bound_rejects_wrong_formulas(dtype):
    x, up = random(1, (9, 300), dtype, 2.0), random(2, (9, 300), dtype)
    wrong = {
        "gelu": [in_float64("silu_mul", x, np.ones_like(up)), in_float64("gelu", np.roll(x, 1), up)],
        "silu_mul": [in_float64("silu_mul", a, b) for a, b in ((up, x), (x, np.roll(up, 1)))],
        "silu": [in_float64("gelu", x, up), in_float64("silu_mul", x, up), in_float64("relu", x, up)],
        "relu": [x.astype(np.float64), np.abs(x.astype(np.float64)), in_float64("silu", x, up)],
        "relu_mul": [in_float64("relu_mul", a, b) for a, b in ((up, x), (x, np.roll(up, 1)))],
        "clamp": [x.astype(np.float64), np.clip(x.astype(np.float64), -4.9, 4.9), np.minimum(x.astype(np.float64), 5)],
        "softcap": [x.astype(np.float64), 5.01 * np.tanh(x.astype(np.float64) / 5.01)],
    }
    if dtype == float32:  # the two forms differ by less than float16 can tell
        wrong["gelu none"] = [in_float64("gelu", x, up)]
        wrong["gelu_mul"] = [in_float64("gelu_mul none", x, up)]
    for name, results in wrong.items():
        exact, rounded = in_float64(name, x, up), in_float32(name, x, up)
        near(rounded, exact, rounded)
        for y in results:
            with pytest.raises(AssertionError):
                near(y.astype(dtype), exact, rounded)
                pytest.fail(f"not rejected: {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_kernels(cupy, name, dtype):
    op, is_gated, _ = OPS[name]
    for size in (1, 3, 7, 8, 9, 2047, 2048, 2056):
        x, up = random(size, size, dtype, 4.0), random(size + 1, size, dtype)
        exact, rounded = in_float64(name, x, up), in_float32(name, x, up)
        for shift in (0, 1) if size == 2048 else (0,):
            x_, up_ = on_gpu(cupy, x, shift), on_gpu(cupy, up, shift)
            out, check = banded(cupy, unwritten(size, dtype), shift)
            assert op(x_, up_, out=out) is out
            check()
            near(out.get(), exact, rounded)
            assert same_bits(op(x_, up_).get(), out.get()), "a second run differs"
            assert same_bits(x_.get(), x) and same_bits(up_.get(), up), "an input changed"
            for initial, position in ((x, 0), (up, 1))[: 1 + is_gated]:
                inside, check = banded(cupy, initial, shift)
                arguments = [x_, up_]
                arguments[position] = inside
                op(*arguments, out=inside)
                check()
                assert same_bits(inside.get(), out.get()), "in place differs"


@pytest.mark.gpu
def test_many_elements(cupy):
    x, up = random(1, (1031, 1027), float16, 2.0), random(2, (1031, 1027), float16)
    out, check = banded(cupy, unwritten(x.shape, float16))
    silu_mul(on_gpu(cupy, x), on_gpu(cupy, up), out=out)
    check()
    near(out.get(), in_float64("silu_mul", x, up), in_float32("silu_mul", x, up))


@on_both
def test_empty(library):
    empty = move(library, np.ones((0, 8), np.float16))
    for op, _, _ in OPS.values():
        assert op(empty, empty).shape == (0, 8)


def gelu_of_overlap(array):
    return gelu(array[:2], out=array[1:])


E8 = np.ones((2, 8), np.float16)
REFUSED = {
    "gate dtype": (TypeError, "gate must have dtype", lambda m: silu_mul(m(E8.astype(np.int32)), m(E8))),
    "up dtype": (TypeError, "up must have dtype float16", lambda m: silu_mul(m(E8), m(E8.astype(np.float32)))),
    "up shape": (ValueError, "up must have shape", lambda m: gelu_mul(m(E8), m(np.ones((2, 9), np.float16)))),
    "out dtype": (TypeError, "out must have dtype", lambda m: silu_mul(m(E8), m(E8), out=m(E8.astype(np.float32)))),
    "out shape": (ValueError, "out must have shape", lambda m: gelu(m(E8), out=m(np.ones(8, np.float16)))),
    "approximate": (ValueError, "approximate must be", lambda m: gelu(m(E8), approximate="sigmoid")),
    "approximate mul": (ValueError, "approximate must be", lambda m: gelu_mul(m(E8), m(E8), approximate=None)),
    "x dtype": (TypeError, "x must have dtype", lambda m: relu(m(E8.astype(np.float64)))),
    "silu out": (ValueError, "out must have shape", lambda m: silu(m(E8), out=m(np.ones((3, 8), np.float16)))),
    "relu up": (ValueError, "up must have shape", lambda m: relu_mul(m(E8), m(E8[:1]))),
    "cap 0": (ValueError, "cap must be a positive", lambda m: softcap(m(E8), 0.0)),
    "cap nan": (ValueError, "cap must be a positive", lambda m: softcap(m(E8), math.nan)),
    "cap inf": (ValueError, "cap must be a positive", lambda m: softcap(m(E8), math.inf)),
    "bound 0": (ValueError, "bound must be a positive", lambda m: clamp(m(E8), 0.0)),
    "bound inf": (ValueError, "bound must be a positive", lambda m: clamp(m(E8), math.inf)),
    "strides": (ValueError, "x must be C-contiguous", lambda m: softcap(m(E8).T, 1.0)),
    "overlap": (ValueError, "out overlaps x partly", lambda m: gelu_of_overlap(m(np.ones((3, 4), np.float16)))),
}


@on_both
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, library):
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call(lambda array: move(library, array))


def test_float32_stays_float32():
    for op in (silu, gelu, relu):
        assert op(np.ones(3, np.float32)).dtype == float32
