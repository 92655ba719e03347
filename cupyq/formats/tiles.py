"""The weight layout the kernels read: 32 x 32 tiles whose words are matrix-instruction fragments.

Rows are cut into *blocks* of 32 stored rows, columns into *column tiles* of 32. A block has one width and one group. Groups
whose size is no multiple of 32 (possible in GPTQ, and in parts of a layer) are padded with rows that stand for no input: `row`
is -1 there, and kernels feed them zeros. Blocks are ordered by falling width, and their groups rise by 0 or 1 from block to
block. A column tile is one unbroken run of memory, block after block; a block of width b takes b words per lane of a warp.

Within a tile, lane 4*g + t holds columns 4g..4g+3 (c) and rows 16j + 8h + 2t + e (j, h, e: 0 or 1): the A operands of
mma.m16n8k16 and wgmma for the transposed product. They form 16 pairs p = 4c + 2j + h, e = 0 in the low half of a 32-bit
word, e = 1 in the high half. For every width b, with whole = 16 // b:

    word w, w < b     pairs w*whole ... w*whole + whole-1, in b bits of both halves each, the first in the lowest bits
    its spare bits    bit p of a half, p >= whole*b, is bit w of pair p: one such pair for 3 and 5 bits, four for 6 bits

    3 bits            bit 31  30   28 27   25 24   22 21   19 18   16 | 15  14   12 11    9 8     6 5     3 2     0
    word 1            of p15 | p9    | p8    | p7    | p6    | p5     | same for the low values

The words of a block are stored as parts of 4, 2 or 1 words per lane, [lane][words of the part], so that every load of a warp
is one contiguous run: width 6 is a 512-byte part and a 256-byte part. Scales and zeros lie [column tile, group, 32], so that
those of a tile are one run too. Device code: cu/tiles.cuh.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cupyq.formats.exl2 import Exl2Layout
from cupyq.formats.gptq import GptqLayout

TILE = 32
WIDTHS_IN_ORDER = (8, 6, 5, 4, 3, 2)
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}


@dataclass(frozen=True, eq=False)
class TileLayout:
    """Where every value of one matrix lies, in the tiles and in the checkpoint's packed words."""

    k: int
    n: int
    block_bits: np.ndarray  # int32 [blocks], never increasing
    block_group: np.ndarray  # int32 [blocks]: counts only groups that have rows
    row: np.ndarray | None  # int32 [32 * blocks]: stored row -> original row, -1 for padding; None where that is identity
    packed_row: np.ndarray | None  # the same, to the row of the packed streams

    # Cached: kernels are launched with these numbers thousands of times a second.

    @cached_property
    def blocks(self) -> int:
        return len(self.block_bits)

    @cached_property
    def groups(self) -> int:
        return int(self.block_group[-1]) + 1

    @cached_property
    def column_tiles(self) -> int:
        return -(-self.n // TILE)

    @cached_property
    def padded_n(self) -> int:
        return self.column_tiles * TILE

    @cached_property
    def block_start(self) -> np.ndarray:
        """int32 [blocks]: first word inside a column tile."""
        return ((np.cumsum(self.block_bits) - self.block_bits) * TILE).astype(np.int32)

    @cached_property
    def width_blocks(self) -> tuple[int, ...]:
        """Number of blocks of width 8, 6, 5, 4, 3 and 2."""
        counts = np.bincount(self.block_bits, minlength=9)
        return tuple(int(counts[bits]) for bits in WIDTHS_IN_ORDER)

    @cached_property
    def words_per_column_tile(self) -> int:
        return int(self.block_bits.sum()) * TILE

    @property
    def words(self) -> int:
        return self.words_per_column_tile * self.column_tiles


def exl2_tiles(layout: Exl2Layout, perm: np.ndarray | None) -> TileLayout:
    """Tiles of an EXL2 layer; perm as `validate_exl2` returns it."""
    group_blocks = layout.rows // TILE
    return TileLayout(
        k=layout.k,
        n=layout.n,
        block_bits=np.repeat(layout.bits, group_blocks),
        block_group=np.repeat(np.arange(layout.group_count, dtype=np.int32), group_blocks),
        row=perm,
        packed_row=None,
    )


def gptq_tiles(layout: GptqLayout) -> TileLayout:
    """Tiles of a GPTQ layer: rows sorted by group, each group padded to whole blocks, groups without rows left out."""
    group_blocks = -(-layout.group_rows // TILE)
    blocks = int(group_blocks.sum())
    used = group_blocks[group_blocks > 0]
    rows = None
    if layout.perm is not None or blocks * TILE != layout.k:
        order = np.arange(layout.k, dtype=np.int32) if layout.perm is None else layout.perm
        rows = np.full(blocks * TILE, -1, np.int32)
        padding = group_blocks * TILE - layout.group_rows
        rows[np.arange(layout.k) + np.repeat(np.cumsum(padding) - padding, layout.group_rows)] = order
    return TileLayout(
        k=layout.k,
        n=layout.n,
        block_bits=np.full(blocks, layout.bits, np.int32),
        block_group=np.repeat(np.arange(len(used), dtype=np.int32), used),
        row=rows,
        packed_row=rows,
    )


def pack_tiles(codes: np.ndarray, layout: TileLayout) -> np.ndarray:
    """uint32 words of the codes: uint8 [32 * blocks, n] in stored order, anything in the padding rows."""
    padded = np.zeros((layout.blocks * TILE, layout.padded_n), np.uint32)
    padded[:, : layout.n] = codes
    # [blocks, j, h, t, e, column tiles, g, c] -> [column tiles, blocks, lane = (g, t), pair = (c, j, h), e]
    values = padded.reshape(layout.blocks, 2, 2, 4, 2, layout.column_tiles, 8, 4).transpose(5, 0, 6, 3, 7, 1, 2, 4)
    pairs = values.reshape(layout.column_tiles, layout.blocks, 32, 16, 2)
    pairs = pairs[..., 0] | pairs[..., 1] << np.uint32(16)
    runs = []
    for bits, blocks in _width_runs(layout):
        whole = 16 // bits
        fields = pairs[:, blocks, :, : whole * bits] & np.uint32(((1 << bits) - 1) * 0x10001)
        fields = fields.reshape(*fields.shape[:3], bits, whole) << np.arange(0, whole * bits, bits, dtype=np.uint32)
        words = np.bitwise_or.reduce(fields, axis=-1)  # [column tiles, blocks, lane, word]
        for p in range(whole * bits, 16):
            bit_of_word = pairs[:, blocks, :, p, None] >> np.arange(bits, dtype=np.uint32) & np.uint32(0x10001)
            words |= bit_of_word << np.uint32(p)
        parts = [part.reshape(*part.shape[:2], -1) for part in np.split(words, np.cumsum(PARTS[bits])[:-1], axis=-1)]
        runs.append(np.concatenate(parts, axis=-1).reshape(layout.column_tiles, -1))
    return np.concatenate(runs, axis=1).reshape(-1)


def unpack_tiles(words: np.ndarray, layout: TileLayout) -> np.ndarray:
    """Inverse of `pack_tiles`: uint8 [32 * blocks, n] in stored order."""
    columns = words.view(np.uint32).reshape(layout.column_tiles, -1)
    codes = np.empty((layout.blocks, TILE, layout.padded_n), np.uint8)
    start = 0
    for bits, blocks in _width_runs(layout):
        count = blocks.stop - blocks.start
        run = columns[:, start : start + count * bits * TILE].reshape(layout.column_tiles, count, bits * TILE)
        start += count * bits * TILE
        borders = np.cumsum(PARTS[bits])[:-1] * TILE
        parts = [part.reshape(*part.shape[:2], TILE, -1) for part in np.split(run, borders, axis=-1)]
        lane_words = np.concatenate(parts, axis=-1)
        whole = 16 // bits
        fields = lane_words[..., None] >> np.arange(0, whole * bits, bits, dtype=np.uint32)
        pairs = np.zeros((layout.column_tiles, count, TILE, 16), np.uint32)
        pairs[..., : whole * bits] = fields.reshape(*fields.shape[:3], -1) & np.uint32(((1 << bits) - 1) * 0x10001)
        for p in range(whole * bits, 16):
            spare = lane_words >> np.uint32(p) & np.uint32(0x10001)
            pairs[..., p] = np.bitwise_or.reduce(spare << np.arange(bits, dtype=np.uint32), axis=-1)
        values = np.stack([pairs & np.uint32(0xFFFF), pairs >> np.uint32(16)], axis=-1)
        # [column tiles, blocks, g, t, c, j, h, e] -> [blocks, row = (j, h, t, e), column = (column tile, g, c)]
        values = values.reshape(layout.column_tiles, count, 8, 4, 4, 2, 2, 2).transpose(1, 5, 6, 3, 7, 0, 2, 4)
        codes[blocks] = values.reshape(count, TILE, layout.padded_n)
    return codes.reshape(-1, layout.padded_n)[:, : layout.n]


def _width_runs(layout):
    """(bits, slice of blocks) of every width present, in storage order."""
    first = 0
    for bits, count in zip(WIDTHS_IN_ORDER, layout.width_blocks, strict=True):
        if count:
            yield bits, slice(first, first + count)
            first += count
