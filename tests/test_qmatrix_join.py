"""JoinedQMatrix: what may be joined, what it says of its matrices and tells the kernels of them, and its products."""

import gc
import re
import weakref

import numpy as np
import pytest
from conftest import exact_bound
from kernel_checks import ROUNDING, bfloat16, float16, host, move, on_both, random, same_bits
from layer_checks import ACTIVATIONS
from product_checks import (
    Layer,
    check_product,
    compiled_first,
    fresh_workspace,
    gated_layers,
    ops_module,
    parts,
    pin,
    product,
    relative_error,
    ways,
)
from random_layers import random_exl2, random_gptq

from cupyq import QMatrix
from cupyq._kernels import SOURCE_FOLDER
from cupyq.ops.matrix_table import JOINED_ROWS, MAX_JOINED, TABLE_ROW
from cupyq.ops.qmatmul import GATES, qmatmul, qmatmul_gated
from cupyq.ops.qmatmul_config import COUNTERS, current_problem
from cupyq.ops.qmatrix_join import JoinedQMatrix
from cupyq.ops.reconstruct import reconstruct


def matrix(library, tensors):
    return QMatrix.from_tensors({key: move(library, value) for key, value in tensors.items()})


def three(library, *, seed=1, shared=True):
    """Of different widths and columns, 13 blocks each; the second has a bias."""
    rng = np.random.default_rng(seed)
    made = [
        random_exl2(rng, (5, 4), n=40, group_blocks=3),
        random_exl2(rng, (4,), n=8, group_blocks=6, has_bias=True),
        random_exl2(rng, (8, 6, 5, 4, 3, 2), n=72, group_blocks=1),
    ]
    if shared:
        made = [dict(tensors, q_invperm=made[0]["q_invperm"]) for tensors in made]
    return [matrix(library, tensors) for tensors in made]


@on_both
def test_what_it_says_of_its_matrices(library):
    matrices = three(library)
    joined = JoinedQMatrix.from_matrices(matrices)
    assert joined.matrices == tuple(matrices) and joined.xp is matrices[0].xp
    assert (joined.kind, joined.k, joined.n, joined.shares_order) == ("exl2", 416, 120, True)
    bias = host(joined.bias)
    assert bias.dtype == np.float32 and not bias[:40].any() and not bias[48:].any()
    assert same_bits(bias[40:48], host(matrices[1].bias)) and bias[40:48].all()
    assert JoinedQMatrix.from_matrices(matrices[::2]).bias is None
    if library == "numpy":
        assert same_bits(joined.dense, np.concatenate([reconstruct(q) for q in matrices], axis=1).astype(np.float32))
        assert joined.order is None
    else:
        assert joined.order is matrices[0].order and (joined.blocks, joined.column_tiles) == (13, 2 + 1 + 3)
        assert joined.width_blocks == (1, 1, 3, 6, 1, 1) and sum(joined.width_blocks) == joined.blocks


@pytest.mark.gpu
def test_orders_that_differ(cupy):
    rng = np.random.default_rng(2)
    permuted, plain, shared = three("cupy", seed=3)[0], [], three("cupy", seed=4)
    plain = [matrix("cupy", random_exl2(rng, (4,), n=32, group_blocks=6, has_perm=False)) for _ in range(2)]
    for matrices, expected in (
        (shared, True),
        (plain, True),
        ([permuted], True),
        (three("cupy", shared=False), False),
        ([permuted, plain[0]], False),
        ([plain[0], permuted], False),
        ([shared[0], shared[1], permuted], False),
    ):
        joined = JoinedQMatrix.from_matrices(matrices)
        assert joined.shares_order == expected
        assert not expected or joined.order is matrices[0].order


@pytest.mark.gpu
def test_what_the_kernels_are_told(cupy):
    matrices = three("cupy")
    joined = JoinedQMatrix.from_matrices(matrices)
    assert joined.rows.dtype == JOINED_ROWS
    rows = joined.rows["at"]
    assert rows["first_tile"].tolist() == [0, 2, 3, 0] and rows["first_column"].tolist() == [0, 40, 48, 0]
    assert rows["n"].tolist() == [40, 8, 72, 0] and rows["blocks"].tolist() == [13, 13, 13, 0]
    for row, q in zip(rows, matrices, strict=False):
        assert row["tiles"] == q.tiles.words.data.ptr and row["scales"] == q.tiles.scales.data.ptr
        assert row["block_group"] == q.tiles.block_group.data.ptr and row["rows"] == q.tiles.rows.data.ptr
        assert row["zeros"] == 0 and row["bias"] == (0 if q.bias is None else q.bias.data.ptr)
        assert row["groups"] == q.tiles.scales.shape[1] and tuple(row["width_blocks"]) == q.tiles.layout.width_blocks
        assert row["words_per_column_tile"] * -(-q.n // 32) == q.tiles.words.size
    assert not rows[3].tobytes().strip(b"\0")
    gptq = matrix("cupy", random_gptq(np.random.default_rng(5), 4, k=64, n=32, groups=2))
    assert JoinedQMatrix.from_matrices([gptq]).rows["at"][0]["zeros"] == gptq.tiles.zeros.data.ptr


def test_the_table_of_matrices_is_the_struct_of_the_kernels():
    """Names, order and sizes of its fields, without padding; and as many of them."""
    text = (SOURCE_FOLDER / "matrix.cuh").read_text()
    (fields,) = re.findall(r"struct alignas\(16\) Matrix \{(.*?)\n\};", text, re.DOTALL)
    found = []
    for line in re.sub(r"//[^\n]*", "", fields).split(";")[:-1]:
        pointer = "*" in line
        for name, count in re.findall(r"(\w+)(?:\[(\d+)\])?\s*(?:,|$)", line.strip()):
            found.append((name, 8 if pointer else 4 * int(count or 1)))
    offset = 0
    for (name, size), (field, (dtype, at)) in zip(found, TABLE_ROW.fields.items(), strict=True):
        assert (name, offset, size) == (field, at, dtype.itemsize)
        offset += dtype.itemsize
    assert offset == TABLE_ROW.itemsize and offset % 16 == 0
    assert re.findall(r"sizeof\(Matrix\) == (\d+)", text) == [str(offset)]
    assert re.findall(r"MAX_JOINED = (\d+);", text) == [str(MAX_JOINED)]
    assert JOINED_ROWS.itemsize == MAX_JOINED * TABLE_ROW.itemsize


@on_both
def test_what_does_not_fit_together_is_refused(library):
    rng = np.random.default_rng(6)
    exl2 = matrix(library, random_exl2(rng, (4,), n=32))
    gptq = matrix(library, random_gptq(rng, 4, k=exl2.k, n=32, groups=2))
    longer = matrix(library, random_exl2(rng, (4,), n=32, last_blocks=2))
    wrong = [
        (ValueError, "1 to 4 QMatrix, got 0", []),
        (ValueError, "1 to 4 QMatrix, got 5", [exl2] * 5),
        (TypeError, r"matrices\[1\] must be a QMatrix .* got ndarray", [exl2, np.zeros(3)]),
        (TypeError, r"matrices\[0\] must be a QMatrix .* got JoinedQMatrix", [JoinedQMatrix.from_matrices([exl2])]),
        (ValueError, r"matrices\[1\] has format gptq, matrices\[0\] exl2", [exl2, gptq]),
        (ValueError, r"matrices\[2\] has k 192, matrices\[0\] 160", [exl2, exl2, longer]),
    ]
    for error, text, matrices in wrong:
        with pytest.raises(error, match=text) as caught:
            JoinedQMatrix.from_matrices(matrices)
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_what_does_not_fit_together_on_a_gpu(cupy):
    rng = np.random.default_rng(7)
    tensors = random_exl2(rng, (4,), n=32)
    with pytest.raises(ValueError, match="arrays of"):
        JoinedQMatrix.from_matrices([matrix("cupy", tensors), matrix("numpy", tensors)])
    padded, whole = (matrix("cupy", random_gptq(rng, 4, k=320, n=32, groups=groups)) for groups in (8, 10))
    with pytest.raises(ValueError, match=r"matrices\[1\] has blocks of rows 16, matrices\[0\] 10"):
        JoinedQMatrix.from_matrices([whole, padded])


@on_both
def test_nothing_keeps_a_matrix_that_was_multiplied(library):
    """Nor the memory of its weights, once its owner drops it."""
    q = matrix(library, random_exl2(np.random.default_rng(8), (4,), n=32))
    joined = JoinedQMatrix.from_matrices([q, q])
    x = move(library, np.ones((2, q.k), np.float16))
    qmatmul(x, q)
    qmatmul(x, joined)
    dropped = weakref.ref(q)
    del q, joined
    gc.collect()
    assert dropped() is None


# --- their products ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shares_order", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_joined(count, shares_order, cupy, monkeypatch):
    layers = parts(count, shares_order=shares_order)
    joined = JoinedQMatrix.from_matrices([layer.q for layer in layers])
    assert joined.shares_order == shares_order
    order = joined.order.get()
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (1, 9, 40) if way == "mma" else (150,):
            x, residual = random(rows, (rows, joined.k), float16), random(rows, (rows, joined.n), float16, 10.0)
            workspace = fresh_workspace(cupy, joined, rows)
            plain = product(cupy, x, joined)
            more = product(cupy, x, joined, residual=residual, in_place=True, shift=rows % 2, workspace=workspace)
            if is_run:
                check_product(plain, x, *layers, rounds_weights=True)
                check_product(more, x, *layers, residual=residual, rounds_weights=True)
                assert not workspace[:COUNTERS].get().any()
            if shares_order:
                ordered = product(cupy, x[:, order], joined, is_ordered=True)
                if is_run:
                    check_product(ordered, x, *layers, rounds_weights=True)


@pytest.mark.gpu
def test_joined_gptq_and_bfloat16(cupy, monkeypatch):
    rng = np.random.default_rng(33)
    layers = [Layer("cupy", random_gptq(rng, bits, k=320, n=n, groups=8, has_bias=n == 32)) for bits, n in ((4, 32), (8, 64))]
    joined = JoinedQMatrix.from_matrices([layer.q for layer in layers])
    assert joined.shares_order and (joined.order.get() == -1).any()
    order = joined.order.get()
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (2, 20) if way == "mma" else (70,):
            x = random(rows, (rows, 320), bfloat16)
            ordered = np.where(order < 0, bfloat16.type(0), x[:, order])
            found = product(cupy, x, joined), product(cupy, ordered, joined, is_ordered=True)
            if is_run:
                for y in found:
                    check_product(y, x, *layers, rounds_weights=True)


def gate_and_up(activation, x, layers, rounds=False):
    """The formula in float64; `rounds`: gate and up have x's dtype in between."""
    products = [x.astype(np.float64) @ weight.astype(np.float64) + bias for weight, _, bias in layers]
    if rounds:
        products = [y.astype(x.dtype).astype(np.float64) for y in products]
    return ACTIVATIONS[activation](products[0]) * products[1]


def check_gated(y, x, layers, activation):
    exact = gate_and_up(activation, x, layers)
    same = gate_and_up(activation, x, [(weight.astype(x.dtype), None, bias) for weight, _, bias in layers], rounds=True)
    exact_bound(y, exact, same.astype(y.dtype), ulp=ROUNDING[y.dtype])
    assert relative_error(y, exact) < (1.2e-3 if y.dtype == float16 else 8e-3)


NEARLY = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}  # as far apart as float16 values are


@pytest.mark.gpu
@pytest.mark.parametrize("activation", GATES)
def test_gated(activation, cupy, monkeypatch):
    layers = gated_layers(40)
    joined = JoinedQMatrix.from_matrices([layer.q for layer in layers])
    order = joined.order.get()
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (1, 12, 40) if way == "mma" else (100,):
            x = random(rows, (rows, joined.k), float16)
            workspace = fresh_workspace(cupy, joined, rows)
            options = dict(op=qmatmul_gated, activation=activation, workspace=workspace)
            y, again = (product(cupy, x, joined, shift=shift, **options) for shift in (0, 3))
            ordered = product(cupy, x[:, order], joined, is_ordered=True, **options)
            if is_run:
                check_gated(y, x, layers, activation)
                check_gated(ordered, x, layers, activation)
                assert same_bits(again, y) and not workspace[:COUNTERS].get().any()
                for other in GATES.keys() - {activation, NEARLY.get(activation)}:
                    with pytest.raises(AssertionError):
                        check_gated(y, x, layers, other)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "shares_order", "dtype"),
    [("gptq", True, float16), ("gptq", False, float16), ("exl2", False, float16), ("exl2", True, bfloat16)],
)
def test_gated_of_other_matrices(kind, shares_order, dtype, cupy, monkeypatch):
    layers = gated_layers(41, kind, shares_order, n=96)
    joined = JoinedQMatrix.from_matrices([layer.q for layer in layers])
    assert joined.shares_order == shares_order
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for rows in (1, 20) if way == "mma" else (100,):
            x = random(rows, (rows, joined.k), dtype)
            y = product(cupy, x, joined, op=qmatmul_gated, workspace=fresh_workspace(cupy, joined, rows))
            if is_run:
                check_gated(y, x, layers, "silu")
                with pytest.raises(AssertionError):
                    check_gated(y, x, layers[::-1], "silu")


@pytest.mark.gpu
def test_gated_in_slices(cupy, monkeypatch):
    """Partial sums of gate and up wait for each other; long K, few columns."""
    pin(monkeypatch, "mma")
    rng = np.random.default_rng(42)
    made = [random_exl2(rng, (4,), n=40, group_blocks=64, last_blocks=2) for _ in range(2)]
    made[1]["q_invperm"] = made[0]["q_invperm"]
    layers = [Layer("cupy", dict(t, q_scale_max=(t["q_scale_max"] / np.float16(150)).astype(np.float16))) for t in made]
    joined = JoinedQMatrix.from_matrices([layer.q for layer in layers])
    assert ops_module.pick_config(current_problem(3, joined, is_gated=True)).slices > 1
    for is_run in compiled_first():
        for rows in (3, 16):
            x = random(rows, (rows, joined.k), float16)
            workspace = fresh_workspace(cupy, joined, rows)
            y, again = (product(cupy, x, joined, op=qmatmul_gated, workspace=workspace) for _ in range(2))
            if is_run:
                check_gated(y, x, layers, "silu")
                assert same_bits(again, y) and not workspace[:COUNTERS].get().any()
