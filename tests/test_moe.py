"""MoE and qmatmul_grouped: against plain loops in float64, and kernels against them, for any routing."""

import itertools
import math
import time

import numpy as np
import pytest
from conftest import exact_bound, golden
from kernel_checks import ROUNDING, banded, bfloat16, float16, float32, host, move, on_both, random, same_bits, unwritten
from random_layers import random_exl2, random_gptq
from test_layers import ACTIVATIONS
from test_routing import routings

from cupyq.formats.exl2 import dequantize_exl2
from cupyq.formats.gptq import dequantize_gptq
from cupyq.layers import MLP, Linear, MoE, RMSNorm
from cupyq.layers.lora import LoraWeights, Selection
from cupyq.ops.elementwise import add
from cupyq.ops.qmatmul import qmatmul, qmatmul_workspace_size
from cupyq.ops.qmatmul_config import COUNTERS, Problem, pick_config
from cupyq.ops.qmatmul_grouped import qmatmul_grouped, qmatmul_grouped_workspace_size
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.qmatrix_group import QMatrixGroup
from cupyq.ops.routing import TILE_ROWS, combine_rows, group_rows, route

# --- experts ----------------------------------------------------------------------------------------------------------

MIXTURES = {(8, 6, 5, 4, 3, 2): 1, (4,): 6, (5, 4): 3, (4, 3, 2): 2, (6, 3): 3}  # widths: blocks of a group, out of 13


def exl2_pool(rng, *, n, scale=1, mixtures=MIXTURES):
    """Checkpoint tensors of one size, k = 32 * (12 * scale + 1), some permuted, some with a bias; k is no multiple of 64."""
    for index, (widths, blocks) in enumerate(mixtures.items()):
        yield random_exl2(rng, widths, n=n, group_blocks=blocks * scale, has_perm=index % 3 != 1, has_bias=index % 2 == 1)


def gptq_pool(rng, *, n, k=160):
    """Groups of any number of rows, so matrices of several padded heights, and three widths."""
    for index, (bits, act_order) in enumerate(((4, True), (4, False), (3, True), (8, True), (4, True))):
        yield random_gptq(rng, bits, k=k, n=n, groups=5, act_order=act_order, has_bias=index % 2 == 0)


def scaled(tensors, factor):
    key = "q_scale_max" if "q_weight" in tensors else "scales"
    return dict(tensors, **{key: (tensors[key] * np.float16(factor)).astype(np.float16)})


def many(pool, count):
    """`count` experts, no two alike, of a few that are packed once."""
    pool = list(pool)
    return [scaled(pool[e % len(pool)], 0.3 + 0.7 * ((e // len(pool) + 1) / (count // len(pool) + 1))) for e in range(count)]


def weight_of(tensors):
    return (dequantize_exl2 if "q_weight" in tensors else dequantize_gptq)(tensors)


def matrix_of(library, tensors):
    return QMatrix.from_tensors({key: move(library, value) for key, value in tensors.items()})


def group_of(library, experts):
    return QMatrixGroup.from_matrices([matrix_of(library, tensors) for tensors in experts])


def by_pair(x, weights, experts, chosen):
    """y[r, j] = x[r (, j)] @ W (+ bias) of expert chosen[r, j], pair by pair, in the dtype of the weights."""
    y = np.empty((*chosen.shape, weights[0].shape[1]), weights[0].dtype)
    for r, row in enumerate(chosen):
        for j, expert in enumerate(row):
            y[r, j] = (x[r, j] if x.ndim == 3 else x[r]).astype(y.dtype) @ weights[expert]
            if "bias" in experts[expert]:
                y[r, j] += experts[expert]["bias"]
    return y


class Oracle:
    """The weights of experts in float64, and rounded to a dtype in float32, as a product of that dtype would have them."""

    def __init__(self, experts, dtype):
        weights = [weight_of(tensors) for tensors in experts]
        self.experts = experts
        self.exact = [weight.astype(np.float64) for weight in weights]
        self.rounded = [weight.astype(dtype).astype(np.float32) for weight in weights]

    def check(self, y, x, chosen):
        """Error at most twice that of a product with such weights and fp32 sums, plus one rounding."""
        exact, same = (by_pair(x, weights, self.experts, chosen) for weights in (self.exact, self.rounded))
        exact_bound(y, exact, same.astype(y.dtype), ulp=ROUNDING[y.dtype])
        error = np.linalg.norm(y.astype(np.float64) - exact) / np.linalg.norm(exact)
        assert error < {2**-11: 6e-4, 2**-8: 4e-3}[ROUNDING[y.dtype]], error


# --- qmatmul_grouped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [exl2_pool, gptq_pool])
@pytest.mark.parametrize("count, rows, top_k", [(1, 3, 1), (3, 1, 2), (8, 9, 2), (60, 5, 4)])
def test_reference_is_the_plain_sum(pool, count, rows, top_k):
    rng = np.random.default_rng(count)
    experts = many(pool(rng, n=32), count)
    matrices, weights = group_of("numpy", experts), Oracle(experts, float32).exact
    assert len(matrices) == count and matrices.n == 32
    for chosen in routings(rows, count, top_k):
        groups = group_rows(chosen, count)
        for shape in ((rows, matrices.k), (rows, top_k, matrices.k)):
            x = random(rows, shape, float32)
            y = qmatmul_grouped(x, matrices, groups)
            assert y.shape == (rows, top_k, 32) and y.dtype == np.float32
            np.testing.assert_allclose(y, by_pair(x, weights, experts, chosen), rtol=1e-5, atol=1e-6)


CASES = {
    "every width": (exl2_pool, dict(n=40), 5, float16),
    "every width, bfloat16": (exl2_pool, dict(n=136), 60, bfloat16),
    "sliced": (exl2_pool, dict(n=8, scale=6), 8, float16),
    "4 bits": (exl2_pool, dict(n=264, mixtures={(4,): 6}), 128, float16),
    "gptq": (gptq_pool, dict(n=96), 8, float16),
    "gptq, bfloat16": (gptq_pool, dict(n=32, k=1120), 3, bfloat16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_grouped_products(cupy, case):
    """Every routing, every tile height, both shapes of x; the same bits on every run; nothing written beside."""
    pool, options, count, dtype = CASES[case]
    experts = many(pool(np.random.default_rng(1), **options), count)
    matrices, oracle = group_of("cupy", experts), Oracle(experts, dtype)
    sizes = [(1, 1, None), (1, 2, None), (9, 2, None), (3, 2, 64), (20, 1, 16), (40, min(4, count), 8), (200, 2, None)]
    for rows, top_k, tile_rows in sizes:
        for index, chosen in enumerate(routings(rows, count, min(top_k, count))):
            chosen_ = cupy.asarray(chosen)
            groups = group_rows(chosen_, count, tile_rows=tile_rows)
            shape = (rows, matrices.k) if index % 2 == 0 else (*chosen.shape, matrices.k)
            x = random(rows, shape, dtype)
            out, check = banded(cupy, unwritten((*chosen.shape, matrices.n), dtype))
            assert qmatmul_grouped(cupy.asarray(x), matrices, groups, out=out) is out
            check()
            oracle.check(out.get(), x, chosen)
            again = qmatmul_grouped(cupy.asarray(x), matrices, group_rows(chosen_, count, tile_rows=tile_rows))
            assert same_bits(again.get(), out.get()), "a second run differs"


@pytest.mark.gpu
def test_float32_results_and_an_odd_address(cupy):
    experts = many(exl2_pool(np.random.default_rng(2), n=40, mixtures={(4,): 6}), 4)
    experts = [{key: value for key, value in tensors.items() if key != "q_invperm"} for tensors in experts]
    matrices = group_of("cupy", experts)
    assert not matrices.is_permuted
    (chosen, *_), x = routings(7, 4, 2), random(3, (7 * matrices.k + 1,), float16)
    odd, whole = cupy.asarray(x)[1:].reshape(7, -1), cupy.asarray(x[1:].reshape(7, -1))
    groups = group_rows(cupy.asarray(chosen), 4)
    narrow, wide = qmatmul_grouped(odd, matrices, groups), qmatmul_grouped(odd, matrices, groups, dtype=np.float32)
    assert same_bits(qmatmul_grouped(whole, matrices, groups).get(), narrow.get())
    Oracle(experts, float16).check(narrow.get(), x[1:].reshape(7, -1), chosen)
    assert wide.dtype == np.float32 and same_bits(wide.get().astype(np.float16), narrow.get())


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others(cupy):
    """For one number of rows, tile height and GPU: whatever the other rows are and wherever they go, the same bits."""
    experts = many(exl2_pool(np.random.default_rng(3), n=8, scale=6), 8)
    matrices, rng = group_of("cupy", experts), np.random.default_rng(4)
    x, chosen = random(5, (20, matrices.k), float16), next(routings(20, 8, 2))
    before = qmatmul_grouped(cupy.asarray(x), matrices, group_rows(cupy.asarray(chosen), 8)).get()
    for _ in range(4):
        other, elsewhere = random(rng.integers(99), x.shape, float16), rng.integers(0, 8, chosen.shape).astype(np.int32)
        other[[0, 7, 19]], elsewhere[[0, 7, 19]] = x[[0, 7, 19]], chosen[[0, 7, 19]]
        after = qmatmul_grouped(cupy.asarray(other), matrices, group_rows(cupy.asarray(elsewhere), 8)).get()
        assert same_bits(after[[0, 7, 19]], before[[0, 7, 19]])


@pytest.mark.gpu
def test_the_tolerance_bites(cupy):
    experts = many(exl2_pool(np.random.default_rng(6), n=64), 8)
    (_, chosen, _), k = routings(30, 8, 2), 416
    x = random(7, (30, k), float16)
    y = qmatmul_grouped(cupy.asarray(x), group_of("cupy", experts), group_rows(cupy.asarray(chosen), 8)).get()
    Oracle(experts, float16).check(y, x, chosen)
    wrong = {
        "the next expert": (experts[1:] + experts[:1], y, x),
        "the other one of the row": (experts, y[:, ::-1].copy(), x),
        "the next row": (experts, y, np.roll(x, 1, axis=0)),
        "columns shifted": (experts, np.roll(y, 1, axis=2), x),
        "without bias": ([{key: t[key] for key in t if key != "bias"} for t in experts], y, x),
        "one permutation for all": ([dict(t, q_invperm=experts[0]["q_invperm"]) for t in experts], y, x),
    }
    for name, (others, found, rows) in wrong.items():
        with pytest.raises(AssertionError):
            Oracle(others, float16).check(found, rows, chosen)
            pytest.fail(f"not rejected: {name}", pytrace=False)


@pytest.mark.gpu
def test_workspace_is_left_as_found_and_capture_works(cupy):
    experts = many(exl2_pool(np.random.default_rng(8), n=64, scale=6), 8)
    matrices = group_of("cupy", experts)
    cases = []
    for rows in (1, 30):
        chosen, x = cupy.asarray(next(routings(rows, 8, 2))), cupy.asarray(random(rows, (rows, matrices.k), float16))
        groups = group_rows(chosen, 8)
        cases.append((x, chosen, groups, qmatmul_grouped(x, matrices, groups).get()))
    single = matrices.matrices[0]
    size = max(qmatmul_grouped_workspace_size(matrices, groups) for _, _, groups, _ in cases)
    workspace = cupy.zeros(max(size, qmatmul_workspace_size(single, 8)), np.float32)
    plain = qmatmul(cases[1][0][:8], single).get()
    for _ in range(3):
        for x, _, groups, expected in cases:
            assert same_bits(qmatmul_grouped(x, matrices, groups, workspace=workspace).get(), expected)
            assert same_bits(qmatmul(cases[1][0][:8], single, workspace=workspace).get(), plain)

    x, chosen, groups, expected = cases[0]
    y, z, weights = cupy.empty((1, 2, 64), np.float16), cupy.empty((1, 64), np.float32), cupy.ones((1, 2), np.float32)

    def run():
        group_rows(chosen, 8, out=groups)
        qmatmul_grouped(x, matrices, groups, out=y, workspace=workspace)
        combine_rows(y, weights, out=z)

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        run()
        stream.synchronize()
        y.fill(0)
        z.fill(0)
        stream.begin_capture()
        run()
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
    assert same_bits(y.get(), expected)
    np.testing.assert_array_equal(z.get(), expected.astype(np.float32).sum(axis=1))


@pytest.mark.parametrize("sm_count", [1, 40, 132])
@pytest.mark.parametrize("row_tiles", [1, 7, 300])
def test_config_takes_a_row_tile_whole_and_has_its_counters(sm_count, row_tiles):
    """What is more to a cut: test_qmatmul_config.py."""
    for tile_rows, (n, blocks) in itertools.product(TILE_ROWS, ((8, 1), (1408, 64), (14336, 128), (4096, 448))):
        for widths, arch in itertools.product(((4,), (8, 6, 5, 4, 3, 2)), (75, 80, 86, 90)):
            problem = Problem(tile_rows, -(-n // 32), blocks, widths, False, sm_count, arch, row_tiles=row_tiles)
            config = pick_config(problem)
            assert 8 * config.m_tiles >= tile_rows
            assert config.slices == 1 or -(-n // (32 * config.warps_n)) * row_tiles <= COUNTERS
    # One row, two experts: enough thread blocks for a large GPU.
    config = pick_config(Problem(8, 128, 448, (4,), False, 132, 90, row_tiles=2))
    assert 2 * -(-128 // config.warps_n) * config.slices >= 132 * 3 // 4


@on_both
def test_groups_refuse_what_does_not_fit_together(library):
    rng = np.random.default_rng(9)
    exl2 = matrix_of(library, random_exl2(rng, (4,), n=32))
    with pytest.raises(ValueError, match="at least one QMatrix"):
        QMatrixGroup.from_matrices([])
    with pytest.raises(TypeError, match=r"matrices\[1\] must be a QMatrix"):
        QMatrixGroup.from_matrices([exl2, np.zeros(3)])
    other = random_gptq(rng, 4, k=exl2.k, n=32, groups=2)
    with pytest.raises(ValueError, match=r"matrices\[1\] has format gptq, matrices\[0\] exl2"):
        QMatrixGroup.from_matrices([exl2, matrix_of(library, other)])
    for tensors, text in ((random_exl2(rng, (4,), n=64), "n 64"), (random_exl2(rng, (4,), n=32, last_blocks=2), "k 192")):
        with pytest.raises(ValueError, match=rf"matrices\[2\] has {text}"):
            QMatrixGroup.from_matrices([exl2, exl2, matrix_of(library, tensors)])


@on_both
def test_refusals(library):
    rng = np.random.default_rng(10)
    matrices = group_of(library, [random_exl2(rng, (4,), n=32) for _ in range(3)])
    pair = QMatrixGroup.from_matrices(matrices.matrices[:2])
    groups = group_rows(move(library, np.array([[0, 1], [1, 2]], np.int32)), 3)
    x = move(library, np.zeros((2, matrices.k), np.float16))
    wrong = [
        (TypeError, "matrices must be a QMatrixGroup", (x, matrices.matrices, groups), {}),
        (TypeError, "groups must be RowGroups", (x, matrices, groups.order), {}),
        (TypeError, "x must have dtype", (x.astype(np.float64), matrices, groups), {}),
        (ValueError, "x must have 160 as its last", (x[:, :-1].copy(), matrices, groups), {}),
        (ValueError, r"x must have shape \(2, 160\) or \(2, 2, 160\)", (x[:1], matrices, groups), {}),
        (ValueError, "groups are for 3 experts and matrices for 2", (x, pair, groups), {}),
        (ValueError, "out must have shape", (x, matrices, groups), {"out": move(library, np.zeros((2, 32), np.float16))}),
        (TypeError, "out must have dtype", (x, matrices, groups), {"dtype": np.int32}),
    ]  # fmt: skip
    for error, text, arguments, options in wrong:
        with pytest.raises(error, match=text):
            qmatmul_grouped(*arguments, **options)
    empty = group_rows(move(library, np.zeros((0, 2), np.int32)), 3)
    assert qmatmul_grouped(x[:0], matrices, empty).shape == (0, 2, 32)


@pytest.mark.gpu
def test_refusals_on_the_gpu_alone(cupy):
    rng = np.random.default_rng(11)
    matrices = group_of("cupy", [random_exl2(rng, (4,), n=32, group_blocks=20) for _ in range(3)])
    groups, x = group_rows(cupy.zeros((2, 2), np.int32), 3), cupy.zeros((2, matrices.k), np.float16)
    with pytest.raises(ValueError, match="workspace must have"):
        qmatmul_grouped(x, matrices, groups, workspace=cupy.zeros(1, np.float32))
    with pytest.raises(TypeError, match="NumPy"):
        qmatmul_grouped(x.get(), matrices, groups)
    with pytest.raises(ValueError, match="arrays of numpy, matrices"):
        QMatrixGroup.from_matrices([matrices.matrices[0], matrix_of("numpy", random_exl2(rng, (4,), n=32, group_blocks=20))])


# --- the layer --------------------------------------------------------------------------------------------------------

HIDDEN, INNER = 160, 288


def plain_experts(count, seed=0, bias=False, is_gated=True):
    """[(gate, up, down)] as dicts of an unquantized weight [n, k] and perhaps a bias."""
    rng = np.random.default_rng(seed)

    def tensors(k, n):
        made = {"weight": (rng.standard_normal((n, k)) * k**-0.5).astype(np.float32)}
        return made | ({"bias": rng.standard_normal(n).astype(np.float32)} if bias else {})

    return [
        (tensors(HIDDEN, INNER) if is_gated else None, tensors(HIDDEN, INNER), tensors(INNER, HIDDEN)) for _ in range(count)
    ]


def quantized_experts(count, kind="exl2", seed=0):
    """The same of EXL2 tensors with several mixtures of widths, or of GPTQ ones, some with act-order; outputs of order 1."""
    rng = np.random.default_rng(seed)

    def pool(k, n):
        if kind == "gptq":
            for act_order in (True, False):
                yield scaled(random_gptq(rng, 4, k=k, n=n, groups=3, act_order=act_order, has_bias=act_order), 0.3)
        else:
            for widths in ((4,), (5, 4), (3,), (6, 2)):
                group_blocks = (k // 32 - 1) // (2 * len(widths))
                last_blocks = k // 32 - 2 * len(widths) * group_blocks
                made = random_exl2(
                    rng, widths, n=n, group_blocks=group_blocks, last_blocks=last_blocks, has_bias=widths == (3,)
                )
                yield scaled(made, k**-0.5)

    parts = (many(pool(HIDDEN, INNER), count), many(pool(HIDDEN, INNER), count), many(pool(INNER, HIDDEN), count))
    return list(zip(*parts, strict=True))


def linear_of(library, tensors, dtype=float32):
    if tensors is None:
        return None
    if "weight" not in tensors:
        return Linear(matrix_of(library, tensors))
    weight, bias = (
        None if tensors.get(key) is None else move(library, tensors[key].astype(dtype)) for key in ("weight", "bias")
    )
    return Linear(weight, bias)


def make_moe(library, experts, top_k, *, activation="silu", renormalize=True, dtype=float32, router_bias=None):
    router = {"weight": random(99, (len(experts), HIDDEN), float32, HIDDEN**-0.5), "bias": router_bias}
    mlps = [MLP(*(linear_of(library, tensors, dtype) for tensors in parts), activation) for parts in experts]
    return MoE(linear_of(library, router, dtype), mlps, top_k, renormalize=renormalize)


def plain_moe(moe, experts, x, *, activation="silu", extra=lambda expert, part, row, x: 0.0):
    """The layer's sum row by row in float64, for the logits that its router gives."""
    logits = host(moe.router(x, dtype=np.float32))
    x = host(x).astype(np.float64)
    dense = [[None if t is None else t["weight"].T if "weight" in t else weight_of(t) for t in parts] for parts in experts]
    total = np.zeros((len(x), HIDDEN))
    for row, exponentials in enumerate(np.exp(logits.astype(np.float64))):
        chosen = sorted(range(len(experts)), key=lambda e: (-logits[row, e], e))[: moe.top_k]
        whole = math.fsum(exponentials[chosen] if moe.renormalize else exponentials)

        def product(expert, part, x, row=row):
            tensors = experts[expert][part]
            return x @ dense[expert][part].astype(np.float64) + tensors.get("bias", 0.0) + extra(expert, part, row, x)

        for e in chosen:
            up = product(e, 1, x[row])
            inner = ACTIVATIONS[activation](up if experts[e][0] is None else product(e, 0, x[row]))
            total[row] += exponentials[e] / whole * product(e, 2, inner if experts[e][0] is None else inner * up)
    return total


def close(found, expected, tolerance):
    error = np.linalg.norm(host(found).astype(np.float64) - expected) / np.linalg.norm(expected)
    return error <= tolerance


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_is_the_weighted_sum_of_the_chosen_experts(top_k, renormalize):
    """All of it in plain arithmetic, router included."""
    experts, x = plain_experts(5, bias=True), random(1, (2, 7, HIDDEN), float32)
    moe = make_moe("numpy", experts, top_k, renormalize=renormalize)
    found = moe(x)
    assert found.shape == x.shape and found.dtype == np.float32
    for row, y in zip(x.reshape(-1, HIDDEN).astype(np.float64), found.reshape(-1, HIDDEN), strict=True):
        logits = row @ moe.router.weight.astype(np.float64).T
        chosen = sorted(range(5), key=lambda e: -logits[e])[:top_k]
        softmax = np.exp(logits) / np.exp(logits).sum()
        expected = 0.0
        for e in chosen:
            gate, up, down = experts[e]
            gate, up = (row @ part["weight"].astype(np.float64).T + part["bias"] for part in (gate, up))
            weight = softmax[e] / (softmax[chosen].sum() if renormalize else 1.0)
            inner = gate / (1 + np.exp(-gate)) * up
            expected = expected + weight * (inner @ down["weight"].astype(np.float64).T + down["bias"])
        assert close(y, expected, 1e-5)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_of_every_form(activation, is_gated):
    for experts in (plain_experts(4, 2, is_gated=is_gated), quantized_experts(4)):
        experts = experts if is_gated else [(None, *parts[1:]) for parts in experts]
        moe, x = make_moe("numpy", experts, 2, activation=activation), random(3, (6, HIDDEN), float32)
        found = moe(x)
        assert close(found, plain_moe(moe, experts, x, activation=activation), 1e-5)
        for other in ACTIVATIONS.keys() - {activation}:
            assert not close(found, plain_moe(moe, experts, x, activation=other), 1e-5)
        assert len(moe.linears()) == (12 if is_gated else 8) and moe.router not in moe.linears()


@pytest.mark.parametrize("kind", ["exl2", "gptq"])
@pytest.mark.parametrize("count, top_k", [(1, 1), (3, 2), (60, 4)])
def test_quantized_experts(kind, count, top_k):
    experts = quantized_experts(count, kind)
    moe = make_moe("numpy", experts, top_k)
    for rows in (1, 30):
        x = random(rows, (rows, HIDDEN), float32)
        exact = plain_moe(moe, experts, x)
        assert close(moe(x), exact, 1e-5)
        assert not close(moe(x), np.roll(exact, 1, axis=0), 1e-3) or rows == 1
    assert moe(x[:0]).shape == (0, HIDDEN)


@on_both
def test_experts_that_cannot_be_grouped_run_one_by_one(library):
    mixtures = {
        "some unquantized": quantized_experts(2) + plain_experts(2),
        "two formats": quantized_experts(2) + quantized_experts(2, "gptq"),
    }
    dtype, tolerance = (float32, 1e-5) if library == "numpy" else (float16, 2e-3)
    for name, experts in mixtures.items():
        moe, x = make_moe(library, experts, 2, dtype=dtype), move(library, random(4, (9, HIDDEN), dtype))
        assert close(moe(x), plain_moe(moe, experts, x), tolerance), name


@on_both
@pytest.mark.parametrize("make", [plain_experts, quantized_experts])
def test_an_expert_that_does_not_count_cannot_spoil_a_sum(library, make):
    """Its logit is -Inf, so its weight is 0 where it is among the top_k, and all it makes is NaN."""
    experts = make(4, seed=5)
    spoilt = [
        parts if e < 2 else (*parts[:2], parts[2] | {"bias": np.full(HIDDEN, np.nan, np.float16)})
        for e, parts in enumerate(experts)
    ]
    dtype = float32 if library == "numpy" else float16
    x = move(library, random(6, (5, HIDDEN), dtype))
    never = np.array([0, 0, -np.inf, -np.inf], np.float32)
    expected = make_moe(library, experts, 2, dtype=dtype, router_bias=never)(x)
    found = make_moe(library, spoilt, 3, dtype=dtype, router_bias=never)(x)
    assert np.isfinite(host(expected)).all() and same_bits(host(found), host(expected))


class Blind(MLP):
    """An expert that makes NaN of the rows that did not choose it, and notes whether it saw any."""

    def __init__(self, mlp, rows):
        super().__init__(mlp.gate, mlp.up, mlp.down, mlp.activation)
        self.rows, self.saw_others = rows, False

    def __call__(self, x, adapters=None):
        y = super().__call__(x, adapters)
        is_blind = (host(x)[:, None] == self.rows).all(-1).any(-1)
        self.saw_others |= bool(is_blind.any())
        for row in np.flatnonzero(is_blind).tolist():
            y[row] = np.nan
        return y


@on_both
def test_experts_on_rows_that_are_not_theirs(library):
    """Where they run on all rows, what they make of others does not count. NumPy passes such rows over, adapters aside."""
    dtype, experts = (float32 if library == "numpy" else float16), plain_experts(4)
    rows = random(13, (16, HIDDEN), dtype)
    x = move(library, rows)
    moe = make_moe(library, experts, 2, dtype=dtype)
    expected, (_, chosen) = host(moe(x)).astype(np.float64), map(host, route(moe.router(x, dtype=np.float32), 2))
    zeros = [move(library, np.zeros(shape, dtype)) for shape in ((HIDDEN, 1), (1, INNER))]
    adapters = Selection(move(library, np.ones((1, 1), np.float32)), frozenset({0}))
    for e in range(4):
        moe = make_moe(library, experts, 2, dtype=dtype)
        moe.experts[e] = blind = Blind(moe.experts[e], rows[(chosen != e).all(1)])
        assert close(moe(x), expected, 1e-6) and blind.saw_others == (library == "cupy")
        moe.experts[e].gate.lora = LoraWeights.of(*zeros, 0)
        assert close(moe(x, adapters=adapters), expected, 1e-6) and blind.saw_others


@on_both
@pytest.mark.parametrize("make", [plain_experts, quantized_experts])
def test_a_row_that_overflows_spoils_no_other(library, make):
    dtype = float32 if library == "numpy" else float16
    moe, x = make_moe(library, make(4, seed=7), 2, dtype=dtype), random(8, (6, HIDDEN), dtype)
    spoilt = x.copy()
    spoilt[2] = np.nan
    before, after = (host(moe(move(library, array))) for array in (x, spoilt))
    others = [0, 1, 3, 4, 5]
    assert np.isnan(after[2]).all() and same_bits(after[others], before[others])


@on_both
@pytest.mark.parametrize("make", [plain_experts, quantized_experts])
def test_adapters_of_experts(library, make):
    """The rows of the requests that select an adapter get its delta, in the experts that have one."""
    dtype, tolerance = (float32, 1e-5) if library == "numpy" else (float16, 3e-3)
    experts = make(4, seed=9)
    moe, x = make_moe(library, experts, 2, dtype=dtype), move(library, random(10, (6, HIDDEN), dtype))
    plain = host(moe(x))
    deltas = {}
    for e, part, name, n in ((0, 1, "up", INNER), (2, 2, "down", HIDDEN), (3, 0, "gate", INNER)):
        linear = getattr(moe.experts[e], name)
        a, b = random(20 + e, (linear.k, 4), dtype, 0.1), random(30 + e, (4, n), dtype, 0.5)
        deltas[e, part] = a.astype(np.float64) @ b.astype(np.float64)
        linear.lora = LoraWeights.of(move(library, a), move(library, b), 1)
    weights = np.array([[0, 0.5], [0, 0], [3, 2]], np.float32)  # three requests of two rows; adapter 0 is nowhere loaded

    def extra(expert, part, row, x):
        return weights[row // 2, 1] * (x @ deltas[expert, part]) if (expert, part) in deltas else 0.0

    found = host(moe(x, adapters=Selection(move(library, weights), frozenset({0, 1}))))
    assert close(found, plain_moe(moe, experts, x, extra=extra), tolerance)
    assert close(found[2:4], plain[2:4].astype(np.float64), tolerance) and not close(
        found[:2], plain[:2].astype(np.float64), 0.01
    )
    elsewhere = host(moe(x, adapters=Selection(move(library, weights), frozenset({0}))))
    assert same_bits(elsewhere, plain) and same_bits(host(moe(x)), plain)


@on_both
@pytest.mark.parametrize("case", ["moe_4_2", "moe_8_2"])
def test_recorded_blocks(library, case):
    """Norm, experts and residual as exllamav2 computes them."""
    inputs, outputs, arguments = golden("blocks")[case]

    def matrix(name):
        return Linear(matrix_of(library, {key[len(name) + 1 :]: inputs[key] for key in inputs if key.startswith(f"{name}.")}))

    experts = [MLP(matrix(f"w1.{e}"), matrix(f"w3.{e}"), matrix(f"w2.{e}"), "silu") for e in range(arguments["num_experts"])]
    moe = MoE(Linear(move(library, inputs["gate"])), experts, arguments["top_k"])
    x = move(library, inputs["x"])
    y = add(x, moe(RMSNorm(move(library, inputs["layernorm"]), arguments["epsilon"])(x)))
    assert y.dtype == np.float16 and close(y, outputs["x"].astype(np.float64), 3e-3)
    assert not close(x, outputs["x"].astype(np.float64), 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, count, top_k, dtype",
    [
        ("exl2", 8, 2, float16),
        ("exl2", 60, 4, float16),
        ("exl2", 3, 1, bfloat16),
        ("gptq", 8, 2, float16),
        ("gptq", 128, 4, float16),
        ("gptq", 1, 1, bfloat16),
    ],
)
def test_quantized_experts_on_the_gpu(cupy, kind, count, top_k, dtype):
    experts = quantized_experts(count, kind)
    moe = make_moe("cupy", experts, top_k, dtype=dtype)
    for rows in (1, 2, 9, 200):
        x = random(rows, (rows, HIDDEN), dtype)
        x[rows // 2 :] = x[-1]  # skewed: half of the rows choose alike
        found = moe(cupy.asarray(x))
        assert isinstance(found, cupy.ndarray) and found.dtype == np.float32 and found.shape == x.shape
        assert close(found, plain_moe(moe, experts, cupy.asarray(x)), 2e-3 if dtype == float16 else 1.5e-2)
        assert same_bits(moe(cupy.asarray(x)).get(), found.get()), "a second run differs"
    assert moe(cupy.asarray(x[:0])).shape == (0, HIDDEN)


@pytest.mark.gpu
def test_the_ways_to_run_experts_agree(cupy):
    """In row groups, and every expert on every row."""
    experts = quantized_experts(8)
    moe, x = make_moe("cupy", experts, 2, dtype=float16), cupy.asarray(random(11, (50, HIDDEN), float16))
    weights, chosen = route(moe.router(x, dtype=np.float32), 2)
    one_by_one = moe._one_by_one(x, weights, chosen, None).get()
    assert close(moe(x), one_by_one.astype(np.float64), 1e-3)
    plain = make_moe("cupy", plain_experts(8), 2, dtype=float16)
    assert close(plain(x), plain_moe(plain, plain_experts(8), x), 2e-3)


@pytest.mark.gpu
def test_a_layer_queues_its_work_and_asks_the_gpu_nothing(cupy):
    """The call returns while the stream still waits for what stands before it."""
    moe, x = make_moe("cupy", quantized_experts(8), 2, dtype=float16), cupy.asarray(random(12, (20, HIDDEN), float16))
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        expected = moe(x).get()  # compiled, loaded, and memory in the stream's pool
        stream.launch_host_func(time.sleep, 0.5)
        found = moe(x)
        was_pending = not stream.done
        stream.synchronize()
    assert was_pending, "the layer waited for the GPU"
    assert same_bits(found.get(), expected)
