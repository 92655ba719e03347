"""Products with quantized weights, in all their forms: against plain loops, float64, each other and themselves."""

import hashlib
import itertools
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import bfloat16, float16, float32, host, move, on_both, random, same_bits
from layer_checks import ACTIVATIONS
from product_checks import (
    EVERY,
    Layer,
    check_product,
    compiled_first,
    exl2_layer,
    fresh_workspace,
    gated_layers,
    ops_module,
    parts,
    pin,
    product,
    relative_error,
    ways,
)
from random_layers import MIXTURES, random_exl2, random_gptq, to_gpu

from cupyq import FormatError, QMatrix, _device
from cupyq.formats import exl2, gptq
from cupyq.ops.qmatmul import FUSED_ROWS, GATES, qmatmul, qmatmul_gated, qmatmul_workspace_size
from cupyq.ops.qmatmul_config import COUNTERS, candidate_configs, current_problem
from cupyq.ops.qmatrix_join import JoinedQMatrix
from cupyq.ops.reconstruct import reconstruct

FEW_ROWS = (1, 3, 8, 9, 16, 17, 33, 64)

# --- the definition ---------------------------------------------------------------------------------------------------


def plain_product(x, layer, r, c):
    return math.fsum([float(a) * float(w) for a, w in zip(x[r], layer.weight[:, c], strict=True)] + [layer.bias[c]])


def test_reference_is_the_plain_sum():
    layer, x = exl2_layer("numpy", 4, (5, 3), n=16, has_bias=True), random(4, (2, 288), float32)
    residual = random(5, (2, 16), float32)
    y, more = qmatmul(x, layer.q), qmatmul(x, layer.q, residual=residual)
    for r, c in itertools.product(range(2), range(16)):
        exact = plain_product(x, layer, r, c)
        assert abs(y[r, c] - exact) <= 2**-23 * abs(exact) + 1e-12
        exact += float(residual[r, c])
        assert abs(more[r, c] - exact) <= 2**-23 * abs(exact) + 1e-12
    in_place = residual.copy()
    assert qmatmul(x, layer.q, residual=in_place, out=in_place) is in_place and same_bits(in_place, more)


def test_joined_matrices_are_side_by_side():
    layers = [exl2_layer("numpy", n, widths, n=n, has_bias=n == 32) for widths, n in (((5, 3), 16), ((4, 2), 32), ((6, 2), 8))]
    joined, x = JoinedQMatrix.from_matrices([layer.q for layer in layers]), random(6, (2, 3, 288), float16)
    residual = random(7, (2, 3, 56), float16)
    expected = np.concatenate([qmatmul(x, layer.q, dtype=np.float32) for layer in layers], axis=-1)
    assert same_bits(qmatmul(x, joined, dtype=np.float32), expected)
    y = qmatmul(x, joined, residual=residual)
    assert y.shape == (2, 3, 56) and y.dtype == np.float16
    np.testing.assert_allclose(y, expected + residual.astype(np.float32), rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("activation", GATES)
def test_gated_reference_is_the_plain_formula(activation):
    gate, up = (exl2_layer("numpy", seed, (4, 3), n=24, has_bias=seed == 8) for seed in (8, 9))
    joined, x = JoinedQMatrix.from_matrices((gate.q, up.q)), random(8, (3, 288), float32, 0.02)
    y = qmatmul_gated(x, joined, activation=activation)
    assert y.shape == (3, 24) and y.dtype == np.float32
    for r, c in itertools.product(range(3), range(24)):
        g, u = plain_product(x, gate, r, c), plain_product(x, up, r, c)
        exact = float(ACTIVATIONS[activation](np.float64(g))) * u
        assert abs(y[r, c] - exact) <= 1e-6 * abs(exact) + 1e-12
    assert same_bits(qmatmul_gated(x, joined), y) == (activation == "silu")


@on_both
def test_shapes_of_x(library):
    layer = exl2_layer(library, 10, (4, 2), n=32)
    joined = JoinedQMatrix.from_matrices((layer.q, layer.q))
    k = layer.q.k
    for shape in ((k,), (1, k), (2, 3, k), (0, k), (2, 0, k)):
        x = move(library, random(1, shape, float16))
        expected = (x.size // k, 32)
        y, both, gated = qmatmul(x, layer.q), qmatmul(x, joined), qmatmul_gated(x, joined)
        assert y.shape == gated.shape == (*shape[:-1], 32) and both.shape == (*shape[:-1], 64)
        flat = host(qmatmul(x.reshape(-1, k), layer.q))
        assert flat.shape == expected and same_bits(host(y).reshape(expected), flat)
        assert same_bits(np.ascontiguousarray(host(both).reshape(-1, 64)[:, 32:]), flat) or library == "cupy"


@on_both
def test_is_ordered_takes_rows_in_their_stored_order(library):
    """On NumPy matrices have none of their own."""
    rng = np.random.default_rng(11)
    for tensors in (random_exl2(rng, (4, 3), n=32), random_gptq(rng, 4, k=96, n=32, groups=2, act_order=True)):
        layer, x = Layer(library, tensors), random(2, (5, 288 if "q_weight" in tensors else 96), float16)
        order = None if layer.q.order is None else host(layer.q.order)
        assert (order is None) == (library == "numpy")
        ordered = x if order is None else np.where(order < 0, np.float16(0), x[:, order])
        y = host(qmatmul(move(library, np.ascontiguousarray(ordered)), layer.q, is_ordered=True))
        check_product(y, x, layer)
        assert library == "cupy" or same_bits(y, qmatmul(x, layer.q))


def test_callers_arrays_stay_as_they_were():
    layer, x = exl2_layer("numpy", 5, (4, 3), n=32), random(3, (2, 288), float16)
    before = {key: value.copy() for key, value in (layer.tensors | {"x": x}).items()}
    qmatmul(x, layer.q)
    for key, value in (layer.tensors | {"x": x}).items():
        np.testing.assert_array_equal(value, before[key])


# --- refusals ---------------------------------------------------------------------------------------------------------


@on_both
def test_bad_calls_get_clear_errors(library, request):
    xp = np if library == "numpy" else request.getfixturevalue("cupy")
    q, narrow = (exl2_layer(library, 6, (4,), n=n).q for n in (32, 8))
    joined, uneven = JoinedQMatrix.from_matrices((q, q)), JoinedQMatrix.from_matrices((q, narrow))
    k, x = q.k, xp.zeros((2, q.k), np.float16)
    buffer = xp.zeros(2 * k + 64, np.float16)
    inside = buffer[: 2 * k].reshape(2, k)  # an x that shares memory with the outs below
    y, shifted = buffer[:64].reshape(2, 32), buffer[32:96].reshape(2, 32)
    wrong = [
        (TypeError, "q must be a QMatrix", lambda: qmatmul(x, x)),
        (TypeError, "q must be a QMatrix .* or JoinedQMatrix, got tuple", lambda: qmatmul(x, (q, q))),
        (ValueError, f"x must have {k} as its last", lambda: qmatmul(xp.zeros((2, k + 1), np.float16), q)),
        (TypeError, "x must have dtype", lambda: qmatmul(xp.zeros((2, k), np.int32), q)),
        (ValueError, "x must be C-contiguous", lambda: qmatmul(xp.zeros((2, 2 * k), np.float16)[:, ::2], q)),
        (ValueError, "out must have shape", lambda: qmatmul(x, q, out=xp.zeros((3, 32), np.float16))),
        (ValueError, r"out must have shape \(2, 64\)", lambda: qmatmul(x, joined, out=xp.zeros((2, 32), np.float16))),
        (TypeError, "out must have dtype", lambda: qmatmul(x, q, out=xp.zeros((2, 32), np.int32))),
        (TypeError, "out must have dtype", lambda: qmatmul(x, q, dtype=np.float64)),
        (TypeError, "list", lambda: qmatmul([[1.0]], q)),
        (ValueError, "out overlaps x", lambda: qmatmul(inside, q, out=y)),
        (ValueError, "out overlaps x", lambda: qmatmul_gated(inside, joined, out=y)),
        (TypeError, "residual must have dtype float16", lambda: qmatmul(x, q, residual=xp.zeros((2, 32), np.float32))),
        (TypeError, "residual must have dtype float32", lambda: qmatmul(x, q, residual=y, dtype=np.float32)),
        (ValueError, "residual must have shape", lambda: qmatmul(x, q, residual=xp.zeros((1, 32), np.float16))),
        (ValueError, "residual must have shape", lambda: qmatmul(x, joined, residual=y)),
        (ValueError, "residual must be C-contiguous", lambda: qmatmul(x, q, residual=xp.zeros((2, 64), np.float16)[:, ::2])),
        (ValueError, "out overlaps residual partly", lambda: qmatmul(x, q, residual=shifted, out=y)),
        (TypeError, "joined must be a JoinedQMatrix of two", lambda: qmatmul_gated(x, q)),
        (TypeError, "joined must be a JoinedQMatrix of two", lambda: qmatmul_gated(x, uneven)),
        (TypeError, "of two", lambda: qmatmul_gated(x, JoinedQMatrix.from_matrices((q, q, q)))),
        (ValueError, "activation must be one of silu, .*'tanh'", lambda: qmatmul_gated(x, joined, activation="tanh")),
        (TypeError, "out must have", lambda: qmatmul_gated(x, joined, out=xp.zeros((2, 32), np.float32))),
        (ValueError, "x must have", lambda: qmatmul_gated(xp.zeros((2, k + 32), np.float16), joined)),
        (TypeError, "q must be a QMatrix", lambda: reconstruct(x)),
        (TypeError, "out must have dtype", lambda: reconstruct(q, out=xp.zeros((k, 32), np.float32))),
    ]  # fmt: skip
    for number, (error, text, call) in enumerate(wrong):
        with pytest.raises(error, match=text) as caught:
            call()
            pytest.fail(f"call {number} was not refused: {text}", pytrace=False)
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_bad_calls_that_only_a_gpu_has(cupy):
    layer = exl2_layer("cupy", 6, (4,), n=32, group_blocks=16)
    q, x = layer.q, cupy.zeros((2, layer.q.k), np.float16)
    joined = JoinedQMatrix.from_matrices((q, exl2_layer("cupy", 7, (4,), n=32, group_blocks=16).q))
    enough = qmatmul_workspace_size(joined, 100)
    workspace = cupy.zeros(enough + 8, np.float32)
    overlapping = workspace[COUNTERS:].view(np.float16)[: x.size].reshape(x.shape)
    on_out = workspace.view(np.float16)[:64].reshape(2, 32)
    wrong = [
        (TypeError, "NumPy", lambda: qmatmul(x.get(), q)),
        (TypeError, "x must have dtype float16 or bfloat16", lambda: qmatmul(x.astype(np.float32), q)),
        (ValueError, "workspace must have", lambda: qmatmul(x, q, workspace=cupy.zeros(1, np.float32))),
        (TypeError, "workspace must have dtype", lambda: qmatmul(x, q, workspace=workspace.view(np.int32))),
        (ValueError, "workspace must have 1 dim", lambda: qmatmul(x, q, workspace=workspace[:64].reshape(2, 32))),
        (ValueError, "multiple of 16 bytes", lambda: qmatmul(x, q, workspace=workspace[1:])),
        (ValueError, "workspace overlaps x", lambda: qmatmul(overlapping, q, workspace=workspace)),
        (ValueError, "workspace overlaps out", lambda: qmatmul(x, q, out=on_out, workspace=workspace)),
        (ValueError, "workspace overlaps residual", lambda: qmatmul(x, q, residual=on_out, workspace=workspace)),
        (ValueError, "workspace must have", lambda: qmatmul_gated(x, joined, workspace=cupy.zeros(1, np.float32))),
        (ValueError, "is_ordered needs", lambda: qmatmul(x, joined, is_ordered=True)),
        (ValueError, "is_ordered needs", lambda: qmatmul_gated(x, joined, is_ordered=True)),
    ]  # fmt: skip
    for number, (error, text, call) in enumerate(wrong):
        with pytest.raises(error, match=text):
            call()
            pytest.fail(f"call {number} was not refused: {text}", pytrace=False)
    mixed = dict(to_gpu(cupy, layer.tensors), q_scale=layer.tensors["q_scale"])
    with pytest.raises(TypeError, match="q_weight is a CuPy array"):
        QMatrix.from_tensors(mixed)


@pytest.mark.gpu
def test_a_workspace_is_checked_on_every_way(cupy, monkeypatch):
    layer = exl2_layer("cupy", 6, (4,), n=32)
    x = cupy.zeros((70, layer.q.k), np.float16)
    for way in ways():
        if way != "dequantise":  # which needs none
            pin(monkeypatch, way)
            for workspace in (cupy.zeros(COUNTERS, np.float32), cupy.zeros(2**20, np.float32)[1:]):
                with pytest.raises(ValueError, match="workspace must"):
                    qmatmul(x, layer.q, workspace=workspace)


def test_foreign_or_missing_tensors():
    with pytest.raises(FormatError, match="neither EXL2"):
        QMatrix.from_tensors({"weight": np.zeros((2, 2))}, name="layer")
    with pytest.raises(TypeError, match="dict"):
        QMatrix.from_tensors([1, 2])
    tensors = random_exl2(np.random.default_rng(7), (4,), n=32)
    with pytest.raises(ValueError, match="group_size"):
        QMatrix.from_tensors(tensors, group_size=32)
    del tensors["q_scale_max"]
    with pytest.raises(FormatError, match="layer.q_scale_max"):
        QMatrix.from_tensors(tensors, name="layer")


# --- every kind of matrix ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("widths", "dtype"),
    [(widths, float16) for widths in MIXTURES] + [(widths, bfloat16) for widths in ((3,), (4,), (8,), EVERY)],
)
def test_few_rows(widths, dtype, cupy, monkeypatch):
    """One row more or less than each kernel takes; some at odd addresses, some added to a residual; the same bits again."""
    pin(monkeypatch, "mma")
    layers = [
        exl2_layer("cupy", n, widths, n=n, group_blocks=blocks, has_bias=n == 136, has_perm=n != 8)
        for n, blocks in ((8, 1), (136, 4))
    ]
    for is_run in compiled_first():
        for layer, rows in itertools.product(layers, FEW_ROWS):
            x, n = random(rows, (rows, layer.q.k), dtype), layer.q.n
            residual = random(n, (rows, n), dtype, 10.0) if rows % 8 else None
            options = dict(residual=residual, in_place=rows > 3, shift=rows % 3) if rows % 8 else {}
            y, again = (product(cupy, x, layer.q, **options) for _ in range(2))
            if is_run:
                check_product(y, x, layer, residual=residual)
                assert same_bits(y, again)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(2,), (3,), (8,), EVERY])
@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_float32_results_show_the_arithmetic(widths, dtype, cupy, monkeypatch):
    """Few rows: codes are exact, and their scales are not rounded into them. Many: weights are rounded to x's dtype."""
    layer = exl2_layer("cupy", 12, widths, n=136, group_blocks=4, has_bias=True)
    x, residual = random(12, (70, layer.q.k), dtype), random(13, (70, 136), float32, 10.0)
    weights = {"mma": layer.unrounded.astype(np.float64)}
    weights["wgmma"] = weights["dequantise"] = layer.weight.astype(dtype).astype(np.float64)
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (3,) if way == "mma" else (70,):
            y = product(cupy, x[:rows], layer.q, dtype=np.float32)
            more = product(cupy, x[:rows], layer.q, residual=residual[:rows], in_place=True, dtype=np.float32)
            if is_run:
                exact = x[:rows].astype(np.float64) @ weights[way] + layer.bias
                assert relative_error(y, exact) < (3e-6 if way == "mma" else 1e-5)
                assert relative_error(more, exact + residual[:rows]) < (3e-6 if way == "mma" else 1e-5)


GPTQ_CASES = [
    dict(bits=bits, k=k, n=n, groups=groups, act_order=act_order)
    for bits in (2, 3, 4, 8)
    for k, n, groups, act_order in (
        (128, 32, 4, False),  # groups of 32
        (1280, 96, 10, False),  # of 128
        (320, 96, 8, False),  # of 40: padded
        (128, 32, 8, False),  # of 16: four to a step, and all padded
        (160, 64, 4, True),
        (96, 32, 1, False),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["v1", "v2", "v1-wrapped"])
def test_gptq(version, cupy, monkeypatch):
    rng = np.random.default_rng(9)
    layers = [Layer("cupy", random_gptq(rng, **case, version=version, has_bias=True), zeros=version) for case in GPTQ_CASES]
    pin(monkeypatch, "mma")
    for layer in layers:
        assert same_bits(reconstruct(layer.q).get(), layer.weight)
    for is_run in compiled_first():
        for layer, (rows, dtype) in itertools.product(layers, ((1, float16), (5, bfloat16), (9, float16), (40, float16))):
            if dtype == float16 or layer.q.bits in ((4,), (8,)):
                x = random(rows, (rows, layer.q.k), dtype)
                y = product(cupy, x, layer.q)
                if is_run:
                    check_product(y, x, layer)


@pytest.mark.gpu
def test_the_tolerance_bites(cupy):
    layer = exl2_layer("cupy", 11, (4,), n=64, group_blocks=4, has_bias=True)
    x, residual = random(11, (4, layer.q.k), float16), random(12, (4, 64), float16, 30.0)
    y = qmatmul(cupy.asarray(x), layer.q, residual=cupy.asarray(residual)).get()
    check_product(y, x, layer, residual=residual)
    weight = layer.weight
    off_by_one = dict(layer.tensors, q_scale=np.roll(layer.tensors["q_scale"], 1, axis=0))
    wrong = {
        "another group's scale": exl2.dequantize_exl2(off_by_one),
        "columns shifted": np.roll(weight, 1, axis=1),
        "rows shifted": np.roll(weight, 1, axis=0),
        "no permutation": weight[layer.tensors["q_invperm"]],
        "zero point off by one": (weight + np.abs(weight).max(axis=0) / 64).astype(np.float16),
    }
    for what, mutated in wrong.items():
        with pytest.raises(AssertionError):
            check_product(y, x, (mutated, mutated, layer.bias), residual=residual)
            pytest.fail(f"{what} was not noticed", pytrace=False)
    for what, bias, added in (("bias", 0 * layer.bias, residual), ("residual", layer.bias, 0 * residual)):
        with pytest.raises(AssertionError):
            check_product(y, x, (weight, layer.unrounded, bias), residual=added)
            pytest.fail(f"a missing {what} was not noticed", pytrace=False)


# --- every size -------------------------------------------------------------------------------------------------------

# k: group_blocks, last_blocks of random_exl2 with one width
ODD_K = {96: (1, 1), 7392: (115, 1), 10944: (170, 2), 29568: (460, 4)}


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(96, 8), (96, 128256), (7392, 112), (10944, 1000), (29568, 8), (29568, 112)])
def test_odd_sizes(k, n, cupy, monkeypatch):
    """Few and many rows on every kernel; of very many only some are looked at."""
    blocks, last_blocks = ODD_K[k]
    layer = exl2_layer("cupy", k, (4,), n=n, group_blocks=blocks, last_blocks=last_blocks)
    assert layer.q.shape == (k, n)
    x = np.resize(random(k, (61, k), float16), (2049, k))
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (0, 1, 3, 17) if way == "mma" else (0, 1, 3, 17, 2049):
            out = cupy.full((rows, n), np.nan, np.float16)
            qmatmul(cupy.asarray(x[:rows]), layer.q, out=out)
            shown = [r for r in (0, 1, 2, 16, 1023, 2047, 2048) if r < rows]
            if is_run and shown:
                check_product(out[shown].get(), x[shown], layer)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [*MIXTURES[:6], EVERY])
def test_long_sums_stay_accurate(widths, cupy, monkeypatch):
    """K = 29568 in every width; and where x is staged in several chunks, which few rows of it need not be."""
    shares = {1: ODD_K[29568], 6: (76, 12)}
    blocks, last_blocks = shares[len(widths)]
    layer = exl2_layer("cupy", 29, widths, n=112, group_blocks=blocks, last_blocks=last_blocks)
    assert layer.q.k == 29568
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (1, 8, 40) if way == "mma" else (100,):
            x = random(rows, (rows, layer.q.k), float16)
            y = product(cupy, x, layer.q)
            if is_run:
                check_product(y, x, layer)


@pytest.mark.gpu
def test_very_many_rows_and_odd_addresses(cupy):
    layer = exl2_layer("cupy", 13, (3,), n=40, group_blocks=64, has_perm=False)
    many = cupy.tile(cupy.asarray(random(13, (1009, layer.q.k), float16)), (100, 1))[:100_003]
    rows = [0, 1, 50_000, 100_002]
    check_product(qmatmul(many, layer.q)[rows].get(), many[rows].get(), layer)
    x = random(14, (3, layer.q.k), float16)
    assert same_bits(product(cupy, x, layer.q, shift=1), product(cupy, x, layer.q))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 40, 100])
def test_infinities_and_nans_travel(rows, cupy):
    layer = exl2_layer("cupy", 14, (4,), n=32)
    x = np.ones((rows, layer.q.k), np.float16)
    x[0, 5], x[1, 7] = np.nan, np.inf
    y = qmatmul(cupy.asarray(x), layer.q).get()
    assert np.isnan(y[0]).all()
    nonzero = layer.weight[7] != 0
    assert np.isinf(y[1][nonzero]).all() and np.isnan(y[1][~nonzero]).all()
    assert np.isfinite(y[2:]).all()


# --- every way to multiply --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("widths", "dtype"), [((4,), float16), (EVERY, float16), ((2,), float16), ((4,), bfloat16), (EVERY, bfloat16)]
)
def test_many_rows(widths, dtype, cupy, monkeypatch):
    layer = exl2_layer("cupy", 20, widths, n=136, group_blocks=4, has_bias=True)
    order = layer.q.order.get()
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()[1:]):
        pin(monkeypatch, way)
        for rows in (65, 300):
            x, residual = random(rows, (rows, layer.q.k), dtype), random(20, (rows, 136), dtype, 10.0)
            plain, again = (product(cupy, x, layer.q) for _ in range(2))
            more = product(cupy, x, layer.q, residual=residual)
            in_place = product(cupy, x, layer.q, residual=residual, in_place=True)
            odd = product(cupy, x, layer.q, residual=residual, shift=1)
            ordered = product(cupy, x[:, order], layer.q, is_ordered=True)
            if is_run:
                for y, added in ((plain, None), (ordered, None), (more, residual), (odd, residual)):
                    check_product(y, x, layer, residual=added, rounds_weights=True)
                assert same_bits(again, plain) and same_bits(in_place, more)


@pytest.mark.gpu
def test_weights_in_chunks_of_columns(cupy, monkeypatch):
    """Where all of them would take too much scratch memory."""
    monkeypatch.setattr(ops_module, "_MAX_SCRATCH_BYTES", 2 * 416 * 32)
    pin(monkeypatch, "dequantise")
    layers = [exl2_layer("cupy", seed, (5, 4), n=72, group_blocks=3, has_bias=True) for seed in (21, 22)]
    joined = JoinedQMatrix.from_matrices([layer.q for layer in layers])
    x, residual = random(21, (70, 416), float16), random(22, (70, 144), float16)
    check_product(product(cupy, x, joined), x, *layers, rounds_weights=True)
    check_product(product(cupy, x, joined, residual=residual), x, *layers, residual=residual, rounds_weights=True)


@pytest.mark.gpu
def test_as_it_is_called(cupy):
    """No kernel chosen by the test: each number of rows goes the way that is its own here."""
    layer = exl2_layer("cupy", 23, (4,), n=264, group_blocks=6, has_bias=True)
    for is_run in compiled_first():
        workspace = fresh_workspace(cupy, layer.q, 600)
        for rows in (1, 2, 4, 7, 16, 17, 32, 33, 64, 65, 128, 129, 600):
            x, residual = random(rows, (rows, layer.q.k), float16), random(rows, (rows, 264), float16)
            y = product(cupy, x, layer.q, residual=residual, workspace=workspace)
            if is_run:
                check_product(y, x, layer, residual=residual, rounds_weights=True)
                assert not workspace[:COUNTERS].get().any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 12, 40])
def test_every_candidate_is_right(rows, cupy, monkeypatch):
    """Each cut that a sweep may time: results, what lies beside them, and counters that are zero again."""
    pin(monkeypatch, "mma")
    sm_count = _device.current().sm_count
    n = 8 * (4 * (sm_count // 2) - 1)  # so many column tiles, the last of them not whole, that two slices fill the GPU
    layer = exl2_layer("cupy", 24, (4,), n=n, group_blocks=32, has_bias=True)
    x = random(rows, (rows, layer.q.k), float16)
    found = candidate_configs(current_problem(rows, layer.q))
    assert {config.slices > 1 for config in found} == {False, True}
    if rows > 8:  # fewer kernels to compile: those of one depth
        found = list({(c.warps_n, c.warps_k, c.slices, c.thread_blocks): c for c in found}.values())
    for is_run in compiled_first():
        for config in found:
            monkeypatch.setattr(ops_module, "pick_config", lambda problem, config=config: config)
            size = COUNTERS + sum(ops_module.workspace_parts(rows, layer.q, config))
            workspace = cupy.full(size, np.nan, np.float32)
            workspace[:COUNTERS] = 0
            y = product(cupy, x, layer.q, workspace=workspace)
            if is_run:
                check_product(y, x, layer)
                assert not workspace[:COUNTERS].get().any(), config


# --- the same bits ----------------------------------------------------------------------------------------------------


def products_to_repeat():
    """Of every kind, in slices and not, in float16 and bfloat16."""
    import cupy

    layers = [exl2_layer("cupy", 50, (5, 4), n=64, group_blocks=64), exl2_layer("cupy", 51, (3,), n=1032)]
    layers.append(Layer("cupy", random_gptq(np.random.default_rng(52), 4, k=4096, n=96, groups=32, act_order=True)))
    joined = JoinedQMatrix.from_matrices([layer.q for layer in parts(3, shares_order=True)])
    for q in (*(layer.q for layer in layers), joined):
        for rows, dtype in ((1, float16), (8, bfloat16), (40, float16), (200, float16)):
            yield qmatmul(cupy.asarray(random(rows, (rows, q.k), dtype)), q).get()
    pair = JoinedQMatrix.from_matrices([layer.q for layer in gated_layers(40)])
    yield qmatmul_gated(cupy.asarray(random(3, (3, pair.k), float16)), pair).get()


def digest_of_products():
    digest = hashlib.sha256()
    for y in products_to_repeat():
        digest.update(y.tobytes())
    return digest.hexdigest()


@pytest.mark.gpu
def test_other_processes_get_the_same_bits(cupy):
    for _ in compiled_first():
        expected = digest_of_products()
    command = [sys.executable, "-c", "import test_qmatmul; print(test_qmatmul.digest_of_products())"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [(child.communicate(timeout=120)[0].strip(), child.returncode) for child in children]
    assert found == [(expected, 0)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["one chunk", "several chunks", "sliced", "bfloat16", "gptq", "joined", "orders differ"])
def test_a_row_does_not_depend_on_the_others(case, cupy):
    """batch_invariant: the bits of every row are those it has alone, whatever the number of rows; the workspace suffices."""
    rng = np.random.default_rng(60)
    layers = {
        "one chunk": lambda: [exl2_layer("cupy", 60, EVERY, n=1032)],
        "several chunks": lambda: [exl2_layer("cupy", 61, (4,), n=40, group_blocks=460, last_blocks=4)],
        "sliced": lambda: [exl2_layer("cupy", 62, (4,), n=264, group_blocks=32, has_bias=True)],
        "bfloat16": lambda: [exl2_layer("cupy", 63, (4,), n=264, group_blocks=32)],
        "gptq": lambda: [Layer("cupy", random_gptq(rng, 4, k=1120, n=96, groups=35, act_order=True))],
        "joined": lambda: parts(4, shares_order=True),
        "orders differ": lambda: parts(3, shares_order=False),
    }[case]()
    q = layers[0].q if len(layers) == 1 else JoinedQMatrix.from_matrices([layer.q for layer in layers])
    dtype = bfloat16 if case == "bfloat16" else float16
    x, residual = random(60, (100, q.k), dtype), random(61, (100, q.n), dtype)
    x_, residual_ = cupy.asarray(x), cupy.asarray(residual)
    for is_run in compiled_first():
        by_count = {}
        for m in (1, 7, 16, 40, 100):
            workspace = fresh_workspace(cupy, q, m, batch_invariant=True)
            options = dict(residual=residual[:m], batch_invariant=True, workspace=workspace)
            by_count[m] = product(cupy, x[:m], q, **options)
            assert not is_run or not workspace[:COUNTERS].get().any()
        if is_run:
            check_product(by_count[100], x, *layers, residual=residual)
            for m, y in by_count.items():
                assert same_bits(y, by_count[100][:m]), f"{m} rows"
            for r in (6, 39, 77, 99):
                alone = qmatmul(x_[r : r + 1], q, residual=residual_[r : r + 1], batch_invariant=True)
                assert same_bits(alone.get()[0], by_count[100][r])
            apart = qmatmul(x_[5:45], q, residual=residual_[5:45], batch_invariant=True).get()  # rows elsewhere in their tiles
            assert same_bits(apart, by_count[100][5:45])


@pytest.mark.gpu
def test_many_invariant_rows_of_a_sliced_product(cupy):
    """More row tiles times column tiles than there are counters."""
    tiles = max(1, _device.current().sm_count * 2 // 5 - 2)
    layer = exl2_layer("cupy", 64, (4,), n=32 * tiles, group_blocks=40)
    m = 16 * (COUNTERS // tiles + 2)
    x = random(64, (m, layer.q.k), float16)
    workspace = fresh_workspace(cupy, layer.q, m, batch_invariant=True)
    found = [qmatmul(cupy.asarray(x), layer.q, batch_invariant=True, workspace=w).get() for w in (None, workspace)]
    assert same_bits(*found) and not workspace[:COUNTERS].get().any()
    assert same_bits(found[0][-9:], qmatmul(cupy.asarray(x[-9:]), layer.q, batch_invariant=True).get())
    check_product(found[0][::97], x[::97], layer)


# --- workspaces, streams and other frameworks -------------------------------------------------------------------------


@pytest.mark.gpu
def test_workspace_is_left_as_found_and_capture_works(cupy):
    layer = exl2_layer("cupy", 12, (5, 4), n=256, group_blocks=32)
    x = cupy.asarray(random(12, (300, layer.q.k), float16))
    workspace = fresh_workspace(cupy, layer.q, 300)
    plain = {rows: qmatmul(x[:rows], layer.q).get() for rows in (1, 8, 20, 64, 300)}
    for _, (rows, expected) in itertools.product(range(3), plain.items()):
        assert same_bits(qmatmul(x[:rows], layer.q, workspace=workspace).get(), expected)
        assert not workspace[:COUNTERS].get().any()
    out = cupy.empty((1, layer.q.n), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.use()
    try:
        qmatmul(x[:1], layer.q, out=out, workspace=workspace)
        stream.synchronize()
        out.fill(0)
        stream.begin_capture()
        qmatmul(x[:1], layer.q, out=out, workspace=workspace)
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
    finally:
        cupy.cuda.Stream.null.use()
    assert same_bits(out.get(), plain[1])


@pytest.mark.gpu
def test_one_workspace_serves_products_of_any_shapes_in_turn(cupy):
    """Of more columns, of too few blocks to be sliced, joined ones, gated ones."""
    sizes = (((5, 4), 256, 32), ((4,), 2048, 16), ((3,), 4096, 1))
    layers = [exl2_layer("cupy", n, widths, n=n, group_blocks=blocks) for widths, n, blocks in sizes]
    pair, apart = (
        JoinedQMatrix.from_matrices([layer.q for layer in made]) for made in (gated_layers(40), parts(3, shares_order=False))
    )
    matrices = [*(layer.q for layer in layers), pair, apart]
    assert len({ops_module.pick_config(current_problem(8, q)).slices > 1 for q in matrices}) == 2
    shared = cupy.full(max(qmatmul_workspace_size(q, FUSED_ROWS) for q in matrices), np.nan, np.float32)
    shared[:COUNTERS] = 0
    for _, q, rows in itertools.product(range(2), matrices, (1, 8, 40)):
        x = cupy.asarray(random(rows, (rows, q.k), float16))
        for op in (qmatmul, qmatmul_gated) if q is pair else (qmatmul,):
            assert same_bits(op(x, q, workspace=shared).get(), op(x, q).get())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 100])  # the fused kernel, and one for many rows
def test_torch_in_torch_out_on_a_stream_of_its_own(rows, cupy):
    """The input is made behind a wait: work on any other stream would read zeros."""
    torch = pytest.importorskip("torch")
    tensors = random_exl2(np.random.default_rng(15), (5, 4), n=64)
    q = QMatrix.from_tensors({key: torch.from_numpy(value.copy()).cuda() for key, value in tensors.items()})
    x = random(15, (rows, q.k), float16)
    ready, late = torch.from_numpy(x).cuda(), torch.zeros(x.shape, dtype=torch.float16, device="cuda")
    qmatmul(ready, q)  # compiled and loaded
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(ready)
        y = qmatmul(late, q)
        was_pending = not stream.query()
    stream.synchronize()
    assert was_pending, "the wait ended before the launch: the test shows nothing"
    assert type(y) is torch.Tensor and y.dtype == torch.float16 and y.device == late.device
    check_product(y.cpu().numpy(), x, Layer("numpy", tensors))


@pytest.mark.gpu
def test_torch_residual_in_place(cupy):
    torch = pytest.importorskip("torch")
    layer, x, residual = exl2_layer("cupy", 17, (4,), n=64), random(17, (2, 160), float16), random(18, (2, 64), float16)
    y = torch.from_numpy(residual.copy()).cuda()
    assert qmatmul(torch.from_numpy(x).cuda(), layer.q, residual=y, out=y) is y
    check_product(y.cpu().numpy(), x, layer, residual=residual)


@pytest.mark.gpu
def test_jax_in_jax_out_on_another_stream(cupy):
    jax = pytest.importorskip("jax")
    tensors = random_exl2(np.random.default_rng(16), (6, 3), n=64)
    device = jax.devices("gpu")[0]
    q = QMatrix.from_tensors({key: jax.device_put(value, device) for key, value in tensors.items()})
    x = random(16, (5, q.k), float16)
    with cupy.cuda.Stream(non_blocking=True):
        y = qmatmul(jax.device_put(x, device) * 1, q) * 1  # queued on JAX's own stream before and after
    assert isinstance(y, jax.Array) and y.dtype == np.float16 and y.devices() == {device}
    check_product(np.asarray(y), x, Layer("numpy", tensors))


@pytest.mark.gpu
def test_a_matrix_of_torch_tensors_is_built_on_torchs_stream(cupy):
    """Repacked elsewhere, it could be read by torch's next product before it is written."""
    torch = pytest.importorskip("torch")
    tensors = random_exl2(np.random.default_rng(18), (4,), n=64)
    given = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
    given |= {key: given[key].cuda() for key in ("q_weight", "q_scale")}
    QMatrix.from_tensors(given)  # compiled and loaded
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        q = QMatrix.from_tensors(given)
        was_pending, is_elsewhere = not stream.query(), not cupy.cuda.Stream.null.done
    stream.synchronize()
    assert was_pending, "the wait ended before the launch: the test shows nothing"
    assert not is_elsewhere
    assert same_bits(reconstruct(q).get(), exl2.dequantize_exl2(tensors))


@pytest.mark.gpu
def test_bfloat16_scales_of_torch_are_taken(cupy):
    torch = pytest.importorskip("torch")
    tensors = random_gptq(np.random.default_rng(19), 4, k=64, n=32, groups=2)
    tensors["scales"] = tensors["scales"].astype(ml_dtypes.bfloat16)
    exact = gptq.dequantize_gptq(tensors)
    given = {key: torch.from_numpy(value.copy()) for key, value in tensors.items() if key != "scales"}
    given["scales"] = torch.from_numpy(tensors["scales"].view(np.int16).copy()).view(torch.bfloat16)
    for device in ("cpu", "cuda"):
        q = QMatrix.from_tensors({key: value.to(device) for key, value in given.items()})
        assert same_bits(host(reconstruct(q)), exact)
