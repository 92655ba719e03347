"""How kernels are told of quantized matrices: the structures of cu/matrix.cuh."""

import numpy as np

MAX_JOINED = 4

_POINTERS = ("tiles", "scales", "zeros", "block_group", "rows", "bias")
_SIZES = ("blocks", "groups", "n", "first_tile", "first_column")

TABLE_ROW = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [("words_per_column_tile", np.int32), ("width_blocks", np.int32, 6)]
    + [(name, np.int32) for name in _SIZES]
)
"""struct Matrix of cu/matrix.cuh."""

JOINED_ROWS = np.dtype([("at", TABLE_ROW, MAX_JOINED)])
"""struct Matrices of cu/matrix.cuh."""


def write_row(row, q, first_tile=0, first_column=0):
    """Describe the QMatrix `q` in a TABLE_ROW. It holds addresses: the matrix must outlive it."""
    tiles, layout = q.tiles, q.tiles.layout
    arrays = (tiles.words, tiles.scales, tiles.zeros, tiles.block_group, tiles.rows, q.bias)
    for name, array in zip(_POINTERS, arrays, strict=True):
        row[name] = 0 if array is None else array.data.ptr
    row["words_per_column_tile"] = layout.words_per_column_tile
    row["width_blocks"] = layout.width_blocks
    for name, size in zip(_SIZES, (layout.blocks, layout.groups, q.n, first_tile, first_column), strict=True):
        row[name] = size


def joined_rows(matrices):
    """numpy.void, struct Matrices: up to MAX_JOINED matrices side by side, to be passed by value."""
    value = np.zeros((), JOINED_ROWS)
    first_tile = first_column = 0
    for row, q in zip(value["at"], matrices, strict=False):
        write_row(row, q, first_tile, first_column)
        first_tile += q.column_tiles
        first_column += q.n
    return value[()]


def moved(rows, columns):
    """A copy of what joined_rows made, for matrices whose results begin so many columns further on."""
    value = np.frombuffer(bytearray(rows.tobytes()), JOINED_ROWS)[0]
    value["at"]["first_column"] += columns
    return value
