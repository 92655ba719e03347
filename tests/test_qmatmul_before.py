"""Products that first apply a norm or a gate to their x: the bits of the two ops one after the other."""

import dataclasses

import numpy as np
import pytest
from kernel_checks import bfloat16, float16, float32, host, move, on_both, random, same_bits
from product_checks import compiled_first, fresh_workspace, parts, pin, ways
from random_layers import random_exl2, random_gptq

from cupyq import QMatrix, _kernels
from cupyq.ops import InputGate, InputNorm, gelu_mul, qmatmul, qmatmul_gated, relu_mul, rms_norm, silu_mul
from cupyq.ops.qmatmul import suits_input_gate
from cupyq.ops.qmatrix_join import JoinedQMatrix


def matrix(library, tensors):
    return QMatrix.from_tensors({key: move(library, value) for key, value in tensors.items()})


def one(library, **options):
    return matrix(library, random_exl2(np.random.default_rng(1), (4,), **dict(n=64, group_blocks=4) | options))


def random_norm(library, k, dtype=float16, weight_dtype=float32):
    weight = (1 + 0.2 * np.random.default_rng(k).standard_normal(k)).astype(weight_dtype)
    return InputNorm(move(library, weight), 1e-5, dtype)


def normed(x, norm):
    return rms_norm(x, norm.weight, eps=norm.eps, dtype=norm.dtype)


PAIRS = {
    "silu": silu_mul,
    "gelu": lambda gate, up: gelu_mul(gate, up, approximate="none"),
    "gelu_tanh": gelu_mul,
    "relu": relu_mul,
}


def halves(both):
    return both[..., : both.shape[-1] // 2].copy(), both[..., both.shape[-1] // 2 :].copy()


@on_both
def test_a_norm_and_a_gate_before_a_product(library):
    q = one(library)
    for dtype in (float16,) if library == "cupy" else (float16, float32):
        norm, x = random_norm(library, q.k, dtype), move(library, 3 * random(2, (2, 1, q.k), float32))
        y = qmatmul(x, q, before=norm)
        assert y.dtype == dtype and y.shape == (2, 1, 64)
        assert same_bits(host(y), host(qmatmul(normed(x, norm), q)))
        assert not np.allclose(host(y).astype(float32), host(qmatmul(x.astype(dtype), q)).astype(float32), atol=1e-2)
    both = move(library, random(3, (2, 3, 2 * q.k), float16))
    found = set()
    for activation, pair in PAIRS.items():
        y = qmatmul(both, q, before=InputGate(activation), dtype=float32)
        assert same_bits(host(y), host(qmatmul(pair(*halves(both)), q, dtype=float32)))
        found.add(host(y).tobytes())
    assert len(found) == 4 and y.shape == (2, 3, 64)


def cases(library):
    yield one(library, has_perm=False)
    yield JoinedQMatrix.from_matrices([layer.q for layer in parts(3, shares_order=True)])
    yield JoinedQMatrix.from_matrices([layer.q for layer in parts(2, shares_order=False)])
    yield matrix(library, random_gptq(np.random.default_rng(4), 4, k=320, n=64, groups=8))  # with padding


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(4))
def test_the_same_bits_on_every_way(case, cupy, monkeypatch):
    q = list(cases("cupy"))[case]
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (1, 9, 40) if way == "mma" else (70,):
            for dtype, result in ((float16, None), (bfloat16, float32)):
                workspace = fresh_workspace(cupy, q, rows)
                x = move("cupy", 2 * random(rows, (rows, q.k), float32))
                norm = random_norm("cupy", q.k, dtype)
                y = qmatmul(x, q, before=norm, dtype=result, workspace=workspace)
                plain = qmatmul(normed(x, norm), q, dtype=result, workspace=workspace)
                both = move("cupy", random(rows, (rows, 2 * q.k), dtype))
                residual = cupy.ones((rows, q.n), both.dtype if result is None else result)
                options = dict(residual=residual, dtype=result, workspace=workspace)
                gated = qmatmul(both, q, before=InputGate("silu"), **options)
                apart = qmatmul(silu_mul(*halves(both)), q, **options)
                if is_run:
                    assert same_bits(y.get(), plain.get()) and y.get().astype(float32).any()
                    assert same_bits(gated.get(), apart.get())


@pytest.mark.gpu
def test_a_norm_before_gate_and_up(cupy, monkeypatch):
    q = one("cupy")
    joined, norm = JoinedQMatrix.from_matrices([q, q]), random_norm("cupy", q.k)
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        rows = 3 if way == "mma" else 70
        x = move("cupy", random(rows, (rows, q.k), float32))
        y, apart = qmatmul_gated(x, joined, before=norm), qmatmul_gated(normed(x, norm), joined)
        if is_run:
            assert same_bits(y.get(), apart.get()) and y.get().any()


@pytest.mark.gpu
def test_a_pass_less_where_that_is_possible(cupy, monkeypatch):
    q = one("cupy")
    x, both, norm = cupy.ones((70, q.k), float32), cupy.ones((70, 2 * q.k), float16), random_norm("cupy", q.k)

    def launches(*arguments, **options):
        with _kernels.tracing() as launched:
            qmatmul(*arguments, **options)
        return [instance.expression.split("<")[0] for instance, _ in launched]

    for way in ways():
        pin(monkeypatch, way)
        assert suits_input_gate(70, q) == (way == "wgmma")
        if way == "wgmma":
            assert launches(x, q, before=norm) == ["arrange_normed", "qmatmul_wgmma"]
            assert launches(both, q, before=InputGate()) == ["arrange_gated", "qmatmul_wgmma"]
        else:
            assert launches(x, q, before=norm)[0] == "rms_norm" and "activate" in launches(both, q, before=InputGate())
    assert launches(x, q, before=norm, batch_invariant=True)[0] == "rms_norm"


@on_both
def test_refusals(library):
    q = one(library)
    joined, norm = JoinedQMatrix.from_matrices([q, q]), random_norm(library, q.k)
    x, half = move(library, np.ones((1, q.k), float32)), move(library, np.ones((1, q.k), float16))
    wrong = [
        (TypeError, "before.dtype must be", lambda: qmatmul(x, q, before=dataclasses.replace(norm, dtype=np.int32))),
        (ValueError, "exclude each other", lambda: qmatmul(x, q, before=norm, is_ordered=True)),
        (ValueError, "before.weight", lambda: qmatmul(x, q, before=dataclasses.replace(norm, weight=norm.weight[1:].copy()))),
        (TypeError, "x must have dtype", lambda: qmatmul(x.astype(np.float64), q, before=norm)),
        (TypeError, "before must be an InputNorm", lambda: qmatmul(x, q, before=norm.weight)),
        (ValueError, f"x must have {2 * q.k} as its last", lambda: qmatmul(half, q, before=InputGate())),
        (ValueError, "activation must be one of", lambda: qmatmul(half, q, before=InputGate("tanh"))),
        (TypeError, "before must be an InputNorm or None", lambda: qmatmul_gated(half, joined, before=InputGate())),
    ]
    for error, text, call in wrong:
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
