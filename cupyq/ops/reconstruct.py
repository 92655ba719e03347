"""The weights of a quantized matrix as numbers: for callers, and for products of many rows."""

import numpy as np

from cupyq._arrays import bfloat16, float16, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats.tiles import TILE
from cupyq.ops._common import vector_width
from cupyq.ops.qmatrix import QMatrix


@accepts_dlpack
def reconstruct(q, *, out=None):
    """W float16 [k, n]: the weights of the QMatrix `q` as the format defines them, bit for bit, rows in the model's order.

    EXL2: RN16((code - 2**(bits-1)) * scale), GPTQ: RN16((code - zero) * scale). The bias is not part of W.
    Raises TypeError for anything but a QMatrix, ValueError / TypeError for an unfit out.
    """
    if not isinstance(q, QMatrix):
        raise TypeError(f"q must be a QMatrix (see QMatrix.from_tensors), got {type(q).__name__}")
    out = output(q.xp, out, (q.k, q.n), float16)
    if q.xp is np:
        out[...] = reconstruct_reference(q)
    else:
        launch_reconstruct(q, out, 0)
    return out


def reconstruct_reference(q):
    return q.dense


def launch_reconstruct(q, out, first_column, stored_order=False):
    """Columns first_column, a multiple of 32, and following of W into out, float16 or bfloat16.

    out [k, columns] in the model's row order; with stored_order [32 * blocks, columns], where `q.order` tells whose row each
    one is, and the rows of padding (-1) are zero. Values of bfloat16 are those of float16, rounded once more.
    """
    tiles, layout = q.tiles, q.tiles.layout
    columns = out.shape[1]
    sizes = (first_column // TILE, columns, layout.blocks, layout.groups, layout.words_per_column_tile)
    column_tiles = -(-columns // TILE)
    launch(
        _reconstruct_instance(out.dtype, tiles.zeros is not None),
        (-(-column_tiles // _COLUMN_TILES), -(-layout.blocks // _ROW_BLOCKS)),
        (32 * _COLUMN_TILES * _ROW_BLOCKS,),
        (
            tiles.words, tiles.scales, tiles.zeros, tiles.block_bits, tiles.block_start, tiles.block_group, tiles.rows, out,
            *map(np.int32, sizes), np.bool_(stored_order), np.bool_(vector_width(columns, out) == 4),
        ),
    )  # fmt: skip


_COLUMN_TILES, _ROW_BLOCKS = 4, 2
"""Of a thread block, a tile for each warp: `tiles_across` and `tiles_down` of the kernel."""


def _reconstruct_instance(dtype, has_zeros):
    return instance("reconstruct", dtype, has_zeros)


INSTANCES = [_reconstruct_instance(dtype, has_zeros) for dtype in (float16, bfloat16) for has_zeros in (False, True)]
