"""Rows of the embedding table."""

import numpy as np

from cupyq._arrays import FLOATS, check, float16, float32, int32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, dtype_named, float32_factor, float64, refuse_overlap, store

_IDS = (int32, np.dtype(np.int64))


@accepts_dlpack(replays=True)
def embedding(ids, table, *, scale=1.0, dtype=None, out=None):
    """y[..., :] = scale * table[ids[...]]

    ids: int32 or int64 of any shape; table [vocab, dim]: float16, bfloat16 or float32; y [*ids.shape, dim] has
    `dtype` (default: table's). scale is taken as float32; the product is fp32 (float64 in the reference), rounded
    once, and exact where scale is 1 and the dtypes agree. An id outside the table raises ValueError on NumPy; on the
    GPU, where reading ids back would stall it, its row becomes NaN. Raises TypeError / ValueError for wrong dtypes,
    shapes, strides or an out that overlaps ids or table.

    >>> embedding(np.array([2, 0]), np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], np.float32), scale=10.0)
    array([[40., 50.],
           [ 0., 10.]], dtype=float32)
    """
    xp = namespace(ids=ids, table=table)
    check(ids, "ids", dtype=_IDS)
    check(table, "table", dtype=FLOATS, ndim=2)
    out = output(xp, out, (*ids.shape, table.shape[1]), table.dtype if dtype is None else dtype_named(dtype))
    check(out, "out", dtype=FLOATS)
    refuse_overlap(out, "out", ids=ids, table=table)
    scale = float32_factor(scale, "scale")
    if out.size == 0:
        return out
    if xp is np:
        _check_ids(ids, table.shape[0])
        store(out, embedding_reference(ids, table, scale))
    else:
        _launch_embedding(ids, table, scale, out)
    return out


def _check_ids(ids, vocab):
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        position = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"ids[{', '.join(map(str, position))}] is {ids[position]}, outside the table of {vocab} rows: "
            f"ids must be 0 to {vocab - 1}"
        )


def embedding_reference(ids, table, scale):
    return float(np.float32(scale)) * float64(table[ids])


def _launch_embedding(ids, table, scale, out):
    vocab, dim = table.shape
    vector = access_width(dim, table, out)
    chunks = min(-(-dim // (256 * vector)), 64)
    kernel = _embedding_instance(ids.dtype, table.dtype, out.dtype, vector)
    launch(kernel, (ids.size, chunks), (256,), (ids, table, out, np.int32(vocab), np.int32(dim), np.float32(scale)))


def _embedding_instance(ids, table, y, vector):
    return instance("embedding", "int" if ids == int32 else "int64", table, y, vector)


INSTANCES = [
    *(_embedding_instance(int32, dtype, dtype, 4 if dtype == float32 else 8) for dtype in FLOATS),
    *(_embedding_instance(ids, float16, float32, 4) for ids in _IDS),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
