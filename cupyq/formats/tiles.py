"""The weight layout the kernels read: 32 x 32 tiles whose words are matrix-instruction fragments.

Rows are cut into *blocks* of 32 stored rows, columns into *column tiles* of 32. A block has one width and one group. Groups
whose size is no multiple of 32 (possible in GPTQ) are padded with rows that stand for no input: `row` is -1 there, and
kernels feed them zeros. Blocks are ordered by falling width. A column tile is one unbroken run of memory, block after block;
a block of width b takes b words per lane of a warp.

Within a tile, lane 4*g + t holds the 32 values of rows 8t..8t+7 (i) and columns 4g..4g+3 (c): the A operand of
mma.m16n8k16 for the transposed product. They form 16 pairs p = 4*c + i//2, even i in the low half, odd i in the high:

    width  planes   plane of w bits: w words per lane; word j holds pairs j*16/w ..., each in w bits of both halves,
    2      2        lowest pair in the lowest bits. A value is its planes' fields, the first plane least significant.
    3      2 1
    4      4            bit  31      28 27    24 23     20 19     16 | 15     12 11      8 7       4 3       0
    5      4 1        4-bit  p3 high  | p2 high | p1 high | p0 high  | p3 low  | p2 low  | p1 low  | p0 low      word 0
    6      4 2
    8      8

The words of a block are stored as parts of 4, 2 or 1 words per lane, [lane][words of the part], so that every load of a warp
is one contiguous run: width 6 is a 512-byte part and a 256-byte part. Device code: cu/tiles.cuh.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cupyq.formats.exl2 import Exl2Layout
from cupyq.formats.gptq import GptqLayout

TILE = 32
WIDTHS_IN_ORDER = (8, 6, 5, 4, 3, 2)
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}


@dataclass(frozen=True, eq=False)
class TileLayout:
    """Where every value of one matrix lies, in the tiles and in the checkpoint's packed words."""

    k: int
    n: int
    block_bits: np.ndarray  # int32 [blocks], never increasing
    block_group: np.ndarray  # int32 [blocks]
    row: np.ndarray | None  # int32 [32 * blocks]: stored row -> original row, -1 for padding; None where that is identity
    bit_offset: np.ndarray  # int64 [32 * blocks]: first bit in its column's packed stream, -1 for padding

    # Cached: kernels are launched with these numbers thousands of times a second.

    @cached_property
    def blocks(self) -> int:
        return len(self.block_bits)

    @cached_property
    def column_tiles(self) -> int:
        return -(-self.n // TILE)

    @cached_property
    def padded_n(self) -> int:
        return self.column_tiles * TILE

    @cached_property
    def width_blocks(self) -> tuple[int, ...]:
        """Number of blocks of width 8, 6, 5, 4, 3 and 2."""
        return tuple(int(np.count_nonzero(self.block_bits == bits)) for bits in WIDTHS_IN_ORDER)

    @cached_property
    def words_per_column_tile(self) -> int:
        return int(self.block_bits.sum()) * TILE

    @property
    def words(self) -> int:
        return self.words_per_column_tile * self.column_tiles


def exl2_tiles(layout: Exl2Layout, perm: np.ndarray | None) -> TileLayout:
    """Tiles of an EXL2 layer; perm as `validate_exl2` returns it."""
    group_blocks = layout.rows // TILE
    block_bits = np.repeat(layout.bits, group_blocks)
    offsets = [
        int(word) * 32 + int(bits) * np.arange(rows, dtype=np.int64)
        for word, bits, rows in zip(layout.first_word, layout.bits, layout.rows, strict=True)
    ]
    return TileLayout(
        k=layout.k,
        n=layout.n,
        block_bits=block_bits.astype(np.int32),
        block_group=np.repeat(np.arange(layout.group_count, dtype=np.int32), group_blocks),
        row=None if perm is None else np.asarray(perm, np.int32),
        bit_offset=np.concatenate(offsets),
    )


def gptq_tiles(layout: GptqLayout) -> TileLayout:
    """Tiles of a GPTQ layer: rows sorted by group, each group padded to whole blocks."""
    order = np.arange(layout.k, dtype=np.int32) if layout.perm is None else layout.perm
    group_blocks = -(-layout.group_rows // TILE)
    rows = np.full(int(group_blocks.sum()) * TILE, -1, np.int32)
    first_block = np.cumsum(group_blocks) - group_blocks
    first_row = np.cumsum(layout.group_rows) - layout.group_rows
    group = layout.row_group[order]
    rows[first_block[group] * TILE + np.arange(layout.k) - first_row[group]] = order
    return TileLayout(
        k=layout.k,
        n=layout.n,
        block_bits=np.full(int(group_blocks.sum()), layout.bits, np.int32),
        block_group=np.repeat(np.arange(layout.group_count, dtype=np.int32), group_blocks),
        row=None if np.array_equal(rows, np.arange(layout.k)) else rows,
        bit_offset=np.where(rows < 0, -1, rows.astype(np.int64) * layout.bits),
    )


def pack_tiles(codes: np.ndarray, layout: TileLayout) -> np.ndarray:
    """uint32 words of the codes: uint8 [32 * blocks, n] in stored order, anything in the padding rows."""
    padded = np.zeros((layout.blocks * TILE, layout.padded_n), np.uint32)
    padded[:, : layout.n] = codes
    # [blocks, t, i, column tiles, g, c] -> [column tiles, blocks, lane = (g, t), pair = (c, i // 2), half = i % 2]
    values = padded.reshape(layout.blocks, 4, 8, layout.column_tiles, 8, 4).transpose(3, 0, 4, 1, 5, 2)
    pairs = values.reshape(layout.column_tiles, layout.blocks, 32, 16, 2)
    pairs = pairs[..., 0] | pairs[..., 1] << np.uint32(16)
    runs = []
    for bits, blocks in _width_runs(layout):
        words = []
        shift = 0
        for width in PLANES[bits]:
            fields = pairs[:, blocks] >> np.uint32(shift) & np.uint32(((1 << width) - 1) * 0x10001)
            fields = fields.reshape(*fields.shape[:3], width, 16 // width)
            words.append(np.bitwise_or.reduce(fields << np.arange(0, 16, width, dtype=np.uint32), axis=-1))
            shift += width
        lane_words = np.concatenate(words, axis=-1)  # [column tiles, blocks, lane, word]
        borders = np.cumsum(PARTS[bits])[:-1]
        parts = [p.reshape(*p.shape[:2], -1) for p in np.split(lane_words, borders, axis=-1)]
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
        parts = [p.reshape(*p.shape[:2], TILE, -1) for p in np.split(run, borders, axis=-1)]
        lane_words = np.concatenate(parts, axis=-1)
        pairs, first, shift = np.zeros((*lane_words.shape[:3], 16), np.uint32), 0, 0
        for width in PLANES[bits]:
            fields = lane_words[..., first : first + width, None] >> np.arange(0, 16, width, dtype=np.uint32)
            fields = fields.reshape(*fields.shape[:3], 16) & np.uint32(((1 << width) - 1) * 0x10001)
            pairs = pairs | fields << np.uint32(shift)
            first, shift = first + width, shift + width
        values = np.stack([pairs & np.uint32(0xFFFF), pairs >> np.uint32(16)], axis=-1)
        # [column tiles, blocks, g, t, c, i] -> [blocks, row = (t, i), column = (column tile, g, c)]
        values = values.reshape(layout.column_tiles, count, 8, 4, 4, 8).transpose(1, 3, 5, 0, 2, 4)
        codes[blocks] = values.reshape(count, TILE, layout.padded_n)
    return codes.reshape(-1, layout.padded_n)[:, : layout.n]


def _width_runs(layout):
    """(bits, slice of blocks) of every width present, in storage order."""
    first = 0
    for bits, count in zip(WIDTHS_IN_ORDER, layout.width_blocks, strict=True):
        if count:
            yield bits, slice(first, first + count)
            first += count
