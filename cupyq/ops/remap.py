"""Gathers along the columns of packed tensors: what a changed order of columns does to q_weight and q_scale."""

import numpy as np

from cupyq._arrays import check, int32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats.bits import pack_cols, unpack_cols
from cupyq.ops._common import refuse_overlap


@accepts_dlpack
def remap_columns(x, index, *, out=None):
    """y[r, c] = x[r, index[c]]

    x int32 [rows, cols], index int32 [cols], y int32 [rows, cols]. An index outside 0 ... cols - 1 raises ValueError on
    NumPy; on the GPU, where reading the index back would stall it, its column becomes 0. `out` must not overlap x or
    index. Raises TypeError / ValueError for wrong dtypes, shapes or strides.

    >>> remap_columns(np.array([[10, 11, 12]], np.int32), np.array([2, 0, 0], np.int32))
    array([[12, 10, 10]], dtype=int32)
    """
    return _remap(x, index, out, 1, remap_columns_reference, _COLUMNS)


def remap_columns_reference(x, index):
    return x[:, index]


@accepts_dlpack
def remap_nibbles(x, index, *, out=None):
    """nibble c of y[r] = nibble index[c] of x[r], where nibble c is bits 4 * (c % 8) and up of word c // 8

    x int32 [rows, cols / 8], index int32 [cols], y int32 [rows, cols / 8]: `remap_columns` for 4-bit values, such as
    q_scale. An index outside 0 ... cols - 1 raises ValueError on NumPy; on the GPU its nibble becomes 0. `out` must not
    overlap x or index. Raises TypeError / ValueError for wrong dtypes, shapes or strides.

    >>> remap_nibbles(np.array([[0x76543210]], np.int32), np.array([7, 6, 5, 4, 3, 2, 1, 0], np.int32)) == 0x01234567
    array([[ True]])
    """
    return _remap(x, index, out, 8, remap_nibbles_reference, _NIBBLES)


def remap_nibbles_reference(x, index):
    return pack_cols(unpack_cols(x, 4, index.size)[:, index], 4)


def _remap(x, index, out, per_word, reference, kernel):
    xp = namespace(x=x, index=index)
    check(x, "x", dtype=int32, ndim=2)
    rows, words = x.shape
    check(index, "index", dtype=int32, shape=(words * per_word,))
    out = output(xp, out, x.shape, int32)
    refuse_overlap(out, "out", x=x, index=index)
    if xp is np:
        _check_index(index)
        out[...] = reference(x, index)
    elif out.size:
        arguments = (x, index, out, np.int32(rows), np.int32(words))
        launch(kernel, (-(-words // 128), min(rows, 65535)), (128,), arguments)
    return out


def _check_index(index):
    outside = (index < 0) | (index >= index.size)
    if outside.any():
        position = int(np.argmax(outside))
        raise ValueError(f"index[{position}] is {index[position]}, outside the columns 0 to {index.size - 1}")


_COLUMNS = instance("remap_columns", file="remap")
_NIBBLES = instance("remap_nibbles", file="remap")

INSTANCES = [_COLUMNS, _NIBBLES]
