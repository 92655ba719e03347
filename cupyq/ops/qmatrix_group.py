"""QMatrixGroup: the quantized matrices of several experts, as one table that a kernel reads."""

from dataclasses import dataclass, field

import numpy as np

from cupyq.ops.matrix_table import TABLE_ROW, write_row
from cupyq.ops.qmatrix import QMatrix


@dataclass(frozen=True, eq=False)
class QMatrixGroup:
    """Matrices of one format and size, one for each expert; their widths, groups and permutations may differ.

    Build one with `QMatrixGroup.from_matrices`. It keeps the matrices, as the table holds their addresses.
    """

    is_frozen = True  # see _replay

    matrices: tuple
    kind: str
    k: int
    n: int
    xp: object
    # On a GPU:
    column_tiles: int = 0
    blocks: int = 0  # of the matrix that has most
    width_blocks: tuple = ()  # the most blocks of width 8, 6, 5, 4, 3 and 2
    is_permuted: bool = False  # whether any stored row order differs from the model's
    table: object = field(default=None, repr=False)  # uint8: one TABLE_ROW for each matrix

    @classmethod
    def from_matrices(cls, matrices):
        """The group of a sequence of QMatrix. Raises TypeError / ValueError where they do not fit together."""
        matrices = tuple(matrices)
        if not matrices:
            raise ValueError("matrices must hold at least one QMatrix, got none")
        for index, q in enumerate(matrices):
            if not isinstance(q, QMatrix):
                raise TypeError(f"matrices[{index}] must be a QMatrix (see QMatrix.from_tensors), got {type(q).__name__}")
            for what, found, expected in zip(_TRAITS, _traits(q), _traits(matrices[0]), strict=True):
                if found != expected:
                    raise ValueError(f"matrices[{index}] has {what} {found}, matrices[0] {expected}: group those that agree")
        first = matrices[0]
        common = dict(matrices=matrices, kind=first.kind, k=first.k, n=first.n, xp=first.xp)
        if first.xp is np:
            return cls(**common)
        layouts = [q.tiles.layout for q in matrices]
        return cls(
            **common,
            column_tiles=layouts[0].column_tiles,
            blocks=max(layout.blocks for layout in layouts),
            width_blocks=tuple(map(max, zip(*(layout.width_blocks for layout in layouts), strict=True))),
            is_permuted=any(q.tiles.rows is not None for q in matrices),
            table=_table(matrices),
        )

    def __len__(self):
        return len(self.matrices)


_TRAITS = ("format", "k", "n", "arrays of", "GPU")


def _traits(q):
    return q.kind, q.k, q.n, q.xp.__name__, None if q.xp is np else q.tiles.words.device.id


def _table(matrices):
    rows = np.zeros(len(matrices), TABLE_ROW)
    for row, q in zip(rows, matrices, strict=True):
        write_row(row, q)
    with matrices[0].tiles.words.device:
        return matrices[0].xp.asarray(rows.view(np.uint8))
