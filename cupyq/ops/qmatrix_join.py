"""Matrices side by side, W = [W_1 | W_2 | ...], multiplied by one input in one launch."""

from dataclasses import dataclass

import numpy as np

from cupyq.ops.matrix_table import MAX_JOINED, joined_rows
from cupyq.ops.qmatrix import QMatrix


@dataclass(frozen=True, eq=False)
class JoinedQMatrix:
    """Up to four matrices of one k, format and library, such as those of the query, key and value projections.

    Build one with `JoinedQMatrix.from_matrices`. `n` is the sum of theirs; `order` their common stored row order (None: the
    model's own), where `shares_order`.
    """

    is_frozen = True  # see _replay

    matrices: tuple
    kind: str
    k: int
    n: int
    xp: object
    shares_order: bool
    # On a GPU:
    order: object = None
    blocks: int = 0
    column_tiles: int = 0
    width_blocks: tuple = ()  # of width 8, 6, 5, 4, 3 and 2: about the mean of theirs, at least 1 where any has one
    rows: object = None  # numpy.void: struct Matrices

    @classmethod
    def from_matrices(cls, matrices):
        """The matrices of a sequence of QMatrix, in its order. TypeError / ValueError where they do not fit together."""
        matrices = tuple(matrices)
        if not 1 <= len(matrices) <= MAX_JOINED:
            raise ValueError(f"matrices must hold 1 to {MAX_JOINED} QMatrix, got {len(matrices)}")
        for index, q in enumerate(matrices):
            if not isinstance(q, QMatrix):
                raise TypeError(f"matrices[{index}] must be a QMatrix (see QMatrix.from_tensors), got {type(q).__name__}")
            for what, found, expected in zip(_TRAITS, _traits(q), _traits(matrices[0]), strict=True):
                if found != expected:
                    raise ValueError(f"matrices[{index}] has {what} {found}, matrices[0] {expected}: join those that agree")
        return _join(cls, matrices)

    @property
    def bias(self):
        """float32 [n], or None where no matrix has one."""
        if all(q.bias is None for q in self.matrices):
            return None
        xp = self.xp
        return xp.concatenate([xp.zeros(q.n, np.float32) if q.bias is None else q.bias for q in self.matrices])

    @property
    def dense(self):
        """float32 [k, n], NumPy only."""
        return np.concatenate([q.dense for q in self.matrices], axis=1)


_TRAITS = ("format", "k", "arrays of", "GPU", "blocks of rows")


def _traits(q):
    on_gpu = (q.tiles.words.device.id, q.tiles.layout.blocks) if q.tiles is not None else (None, None)
    return q.kind, q.k, q.xp.__name__, *on_gpu


def _join(cls, matrices):
    first = matrices[0]
    common = dict(matrices=matrices, kind=first.kind, k=first.k, n=sum(q.n for q in matrices), xp=first.xp)
    if first.xp is np:
        return cls(**common, shares_order=True)
    layouts = [q.tiles.layout for q in matrices]
    return cls(
        **common,
        shares_order=all(_is_same_order(layout.row, layouts[0].row) for layout in layouts[1:]),
        order=first.tiles.rows,
        blocks=layouts[0].blocks,
        column_tiles=sum(layout.column_tiles for layout in layouts),
        width_blocks=_mean_width_blocks(layouts),
        rows=joined_rows(matrices),
    )


def _mean_width_blocks(layouts):
    """Blocks by width, as many as each matrix has; of every width that any of them has at least one."""
    tiles = sum(layout.column_tiles for layout in layouts)
    counts = np.array([layout.width_blocks for layout in layouts]) * [[layout.column_tiles] for layout in layouts]
    mean = np.where(counts.any(axis=0), np.maximum(1, counts.sum(axis=0) // tiles), 0)
    mean[mean.argmax()] += layouts[0].blocks - mean.sum()
    return tuple(map(int, mean))


def _is_same_order(one, other):
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
