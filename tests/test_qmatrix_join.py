"""JoinedQMatrix: what may be joined, what it says of its matrices, and what it tells the kernels of them."""

import gc
import re
import weakref

import numpy as np
import pytest
from kernel_checks import host, move, on_both, same_bits
from random_layers import random_exl2, random_gptq

from cupyq import QMatrix
from cupyq._kernels import SOURCE_FOLDER
from cupyq.ops.matrix_table import JOINED_ROWS, MAX_JOINED, TABLE_ROW
from cupyq.ops.qmatmul import qmatmul
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
