"""embedding: reference against plain look-ups, kernel against exact products."""

import numpy as np
import pytest
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

from cupyq.ops.embedding import embedding

SCALE = 45.2548  # of the kind Gemma uses: the square root of the hidden size


@on_both
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_copies_rows(library, dtype, ids_dtype):
    table = random(1, (11, 24), dtype)
    for shape in ((), (0,), (7,), (2, 3), (2, 0, 3)):
        ids = np.random.default_rng(2).integers(0, 11, shape).astype(ids_dtype)
        y = host(embedding(move(library, ids), move(library, table)))
        assert y.shape == (*shape, 24) and y.dtype == dtype
        for index in np.ndindex(shape):
            assert same_bits(y[index], table[ids[index]])


def test_reference_scales_and_rounds_once():
    table, ids = random(1, (5, 9), float16), np.array([4, 0, 4])
    y = embedding(ids, table, scale=SCALE, dtype=np.float32)
    for row, column in np.ndindex(3, 9):
        assert y[row, column] == np.float32(float(np.float32(SCALE)) * float(table[ids[row], column]))
    assert embedding(ids, table, scale=3.0).dtype == np.float16


def products(table, ids, dtype):
    scale = np.float32(SCALE)
    exact = table[ids].astype(np.float64) * float(scale)
    return exact, (table[ids].astype(np.float32) * scale).astype(dtype)


def test_bound_rejects_wrong_rows_and_scales():
    table, ids = random(1, (50, 64), float16), np.random.default_rng(3).integers(0, 50, 40)
    exact, rounded = products(table, ids, float16)
    near(rounded, exact, rounded)
    for wrong in (products(table, (ids + 1) % 50, float16)[1], table[ids], (exact * (1 + 2**-9)).astype(np.float16)):
        with pytest.raises(AssertionError):
            near(wrong, exact, rounded)
            pytest.fail("not rejected")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, out_dtype",
    [(d, d) for d in FLOATS] + [(float16, float32), (bfloat16, float16), (float32, bfloat16)],
    ids=lambda d: d.name,
)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64], ids=["int32", "int64"])
def test_kernel(cupy, dtype, out_dtype, ids_dtype):
    for vocab, dim in [(1, 1), (5, 7), (5, 8), (5, 9), (33, 64), (4, 2047), (4, 2048), (4, 2056), (2, 64 * 2048 + 8)]:
        table, ids = (
            random(dim, (vocab, dim), dtype),
            np.random.default_rng(dim).integers(0, vocab, 6).astype(ids_dtype),
        )
        exact, rounded = products(table, ids, out_dtype)
        for shift in (0, 1) if dim == 64 else (0,):
            ids_, table_ = on_gpu(cupy, ids, shift), on_gpu(cupy, table, shift)
            out, check = banded(cupy, unwritten((6, dim), out_dtype), shift)
            assert embedding(ids_, table_, scale=SCALE, dtype=out_dtype, out=out) is out
            check()
            near(out.get(), exact, rounded)
            assert same_bits(out.get(), rounded)  # one fp32 product, one conversion: one right answer
            assert same_bits(embedding(ids_, table_, scale=SCALE, dtype=out_dtype).get(), out.get())


@pytest.mark.gpu
def test_many_rows(cupy):
    table, ids = random(1, (999, 8), float16), np.random.default_rng(2).integers(0, 999, 100_003)
    out, check = banded(cupy, unwritten((100_003, 8), float16))
    embedding(on_gpu(cupy, ids), on_gpu(cupy, table), out=out)
    check()
    assert same_bits(out.get(), table[ids])


@pytest.mark.gpu
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64], ids=["int32", "int64"])
def test_unknown_ids_become_nan(cupy, ids_dtype):
    table = random(1, (5, 16), float16)
    ids = np.array([0, -1, 4, 5, np.iinfo(ids_dtype).max, np.iinfo(ids_dtype).min, 2], ids_dtype)
    out, check = banded(cupy, np.zeros((7, 16), np.float16))
    embedding(on_gpu(cupy, ids), on_gpu(cupy, table), out=out)
    check()
    y = out.get()
    assert np.all(np.isnan(y[[1, 3, 4, 5]])) and same_bits(y[[0, 2, 6]], table[[0, 4, 2]])


def test_unknown_ids_are_named():
    table = np.ones((5, 2), np.float16)
    with pytest.raises(ValueError, match=r"ids\[1, 0\] is 5, outside the table of 5 rows: ids must be 0 to 4"):
        embedding(np.array([[0, 1], [5, -1]]), table)
    with pytest.raises(ValueError, match=r"ids\[0\] is -1"):
        embedding(np.array([-1], np.int32), table)


@on_both
def test_refusals(library):
    table, ids = np.ones((5, 5), np.float16), np.arange(5)

    def call(ids=ids, table=table, **options):
        return embedding(move(library, ids), move(library, table), **options)

    with pytest.raises(TypeError, match="ids must have dtype int32 or int64"):
        call(ids=ids.astype(np.int16))
    with pytest.raises(TypeError, match="table must have dtype"):
        call(table=table.astype(np.float64))
    with pytest.raises(ValueError, match="table must have 2 dimensions"):
        call(table=table[0])
    with pytest.raises(ValueError, match="out must have shape"):
        call(out=move(library, np.ones((4, 5), np.float16)))
    with pytest.raises(TypeError, match="out must have dtype float32"):
        call(dtype=np.float32, out=move(library, np.ones((5, 5), np.float16)))
    with pytest.raises(ValueError, match="table must be C-contiguous"):
        embedding(move(library, ids), move(library, table).T)
    there = move(library, table)
    with pytest.raises(ValueError, match="out overlaps table"):
        embedding(move(library, ids), there, out=there)
