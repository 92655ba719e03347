"""remap_columns and remap_nibbles: against plain loops and recorded outputs."""

import numpy as np
import pytest
from conftest import golden
from kernel_checks import banded, host, move, on_both, on_gpu, same_bits

from cupyq.ops.remap import remap_columns, remap_nibbles

GOLDEN = golden("element")
PER_WORD = {remap_columns: 1, remap_nibbles: 8}
both_ops = pytest.mark.parametrize("op", PER_WORD, ids=lambda op: op.__name__)


def problem(seed, rows, words, per_word):
    generator = np.random.default_rng(seed)
    x = generator.integers(-(2**31), 2**31, (rows, words)).astype(np.int32)
    return x, generator.integers(0, max(words * per_word, 1), words * per_word).astype(np.int32)


def loop(x, index, per_word):
    """Python integers; an index outside gives 0."""
    y, bits = np.zeros(x.shape, np.uint32), 32 // per_word
    for r, row in enumerate(x.tolist()):
        for c, source in enumerate(index.tolist()):
            if 0 <= source < index.size:
                value = (row[source // per_word] >> (source % per_word * bits)) % 2**bits
                y[r, c // per_word] |= np.uint32(value << (c % per_word * bits))
    return y.view(np.int32)


@on_both
@both_ops
def test_against_a_loop(op, library):
    for rows, words in ((1, 1), (3, 5), (2, 40), (0, 3), (3, 0)):
        x, index = problem(words, rows, words, PER_WORD[op])
        y = host(op(move(library, x), move(library, index)))
        assert same_bits(y, loop(x, index, PER_WORD[op]))


@on_both
@pytest.mark.parametrize("case, op", [("tensor_remap", remap_columns), ("tensor_remap_4bit", remap_nibbles)])
def test_recorded_outputs(case, op, library):
    inputs, outputs, _ = GOLDEN[case]
    y = op(move(library, inputs["tensor"]), move(library, inputs["index"]))
    assert same_bits(host(y), outputs["tensor"])


@pytest.mark.gpu
@both_ops
def test_kernels(cupy, op):
    for rows, words in ((2, 127), (3, 128), (2, 129), (5, 4099), (70_001, 2)):
        x, index = problem(words, rows, words, PER_WORD[op])
        out, check = banded(cupy, np.full(x.shape, -1, np.int32), 1)
        x_, index_ = on_gpu(cupy, x, 1), on_gpu(cupy, index, 1)
        assert op(x_, index_, out=out) is out
        check()
        assert same_bits(out.get(), op(x, index))
        assert same_bits(x_.get(), x) and same_bits(index_.get(), index)


@pytest.mark.gpu
@both_ops
def test_an_index_outside_gives_zero(cupy, op):
    x, index = problem(7, 3, 9, PER_WORD[op])
    index[[0, 3, 5]] = (-1, index.size, 2**31 - 1)
    y = op(cupy.asarray(x), cupy.asarray(index)).get()
    assert same_bits(y, loop(x, index, PER_WORD[op]))


@both_ops
def test_numpy_refuses_an_index_outside(op):
    for wrong in (-1, 8 * PER_WORD[op]):
        x, index = problem(1, 2, 8, PER_WORD[op])
        index[3] = wrong
        with pytest.raises(ValueError, match=rf"index\[3\] is {wrong}, outside the columns 0 to {index.size - 1}"):
            op(x, index)


@on_both
def test_refusals(library):
    x, index = (move(library, a) for a in problem(1, 4, 8, 1))
    short = move(library, np.zeros(7, np.int32))
    for op in PER_WORD:
        with pytest.raises(TypeError, match="x must have dtype int32"):
            op(x.astype(np.float32), index)
        with pytest.raises(ValueError, match="x must have 2 dimensions"):
            op(index, index)
        with pytest.raises(ValueError, match="index must have shape"):
            op(x, short)
        with pytest.raises(TypeError, match="index must have dtype int32"):
            op(x, index.astype(np.int64))
    with pytest.raises(ValueError, match="out must have shape"):
        remap_columns(x, index, out=short)
    for out in (x, index.reshape(1, 8)):
        with pytest.raises(ValueError, match="out overlaps"):
            remap_columns(x[:1] if out is not x else x, index, out=out)
