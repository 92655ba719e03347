"""The tile layout: every code where the picture says, found again in the checkpoint's words, and as the GPU writes it."""

import numpy as np
import pytest
from random_layers import MIXTURES, random_exl2, random_gptq, to_gpu

from cupyq import QMatrix
from cupyq.formats import exl2, gptq, tiles


def stored_codes(tensors):
    """(layout of the tiles, codes in stored order, 0 in padding rows) of a layer's tensors."""
    if "q_weight" in tensors:
        layout, perm = exl2.validate_exl2(tensors)
        return tiles.exl2_tiles(layout, perm), exl2.unpack_exl2(tensors["q_weight"], layout)
    layout = gptq.validate_gptq(tensors)
    tile_layout, codes = tiles.gptq_tiles(layout), gptq.unpack_gptq(tensors, layout)[0]
    if tile_layout.row is not None:
        codes = np.where(tile_layout.row[:, None] < 0, np.uint8(0), codes[tile_layout.row])
    return tile_layout, codes


def layers():
    rng = np.random.default_rng(1)
    for widths in MIXTURES:
        for n in (8, 72):
            yield random_exl2(rng, widths, n=n)
    yield random_exl2(rng, (4,), n=1000, group_blocks=1, has_perm=False)
    for bits in (2, 3, 4, 8):
        yield random_gptq(rng, bits, k=96, n=32, groups=1)
        yield random_gptq(rng, bits, k=96, n=32, groups=3)
        yield random_gptq(rng, bits, k=160, n=96, groups=4, act_order=True)
        yield random_gptq(rng, bits, k=288, n=32, groups=6)  # 48 rows each: order kept, but padded
        yield without_group(random_gptq(rng, bits, k=128, n=32, groups=4), 2)
    yield random_gptq(rng, 4, k=7392, n=112, groups=154, act_order=True)


def without_group(tensors, group):
    """The same tensors, but the rows of that group are in the next one, or the last one's in the first."""
    other = (group + 1) % len(tensors["scales"])
    tensors["g_idx"] = np.where(tensors["g_idx"] == group, other, tensors["g_idx"]).astype(np.int32)
    return tensors


def test_tiles_hold_every_code_and_find_it_in_the_checkpoint():
    rng = np.random.default_rng(2)
    for tensors in layers():
        layout, codes = stored_codes(tensors)
        words = tiles.pack_tiles(codes, layout)
        assert words.dtype == np.uint32 and words.size == layout.words
        np.testing.assert_array_equal(tiles.unpack_tiles(words, layout), codes)
        packed = tensors["q_weight" if "q_weight" in tensors else "qweight"].view(np.uint32)
        for row in rng.integers(0, layout.blocks * 32, 20):
            bits = int(layout.block_bits[row // 32])
            # 32 rows of b bits are b words of a column and b words a lane: in stored order both have as many before them.
            first = int(layout.block_start[row // 32]) + row % 32 * bits
            if layout.packed_row is not None:
                first = int(layout.packed_row[row]) * bits
            if first < 0:
                continue
            read = np.zeros(layout.n, np.uint32)
            for b in range(bits):
                read |= (packed[(first + b) // 32] >> np.uint32((first + b) % 32) & np.uint32(1)) << np.uint32(b)
            np.testing.assert_array_equal(read, codes[row])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_one_tile_lies_where_the_picture_says(bits):
    """Plain loops over the picture in formats/tiles.py."""
    codes = np.random.default_rng(3).integers(0, 1 << bits, (96, 64)).astype(np.uint8)
    layout = tiles.TileLayout(96, 64, np.full(3, bits, np.int32), np.zeros(3, np.int32), None, None)
    words = [int(w) for w in tiles.pack_tiles(codes, layout)]
    column_tile, block, whole = 1, 2, 16 // bits
    start = (3 * column_tile + block) * bits * 32
    lane_words = []  # [lane][word], out of the parts
    for lane in range(32):
        own, part_start = [], start
        for part in {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}[bits]:
            own += words[part_start + lane * part : part_start + (lane + 1) * part]
            part_start += 32 * part
        lane_words.append(own)
    for row in range(32):
        for column in range(32):
            j, h, t, e = row // 16, row // 8 % 2, row % 8 // 2, row % 2
            g, c = column // 4, column % 4
            own, pair = lane_words[4 * g + t], 4 * c + 2 * j + h
            if pair < whole * bits:
                value = own[pair // whole] >> (16 * e + pair % whole * bits) & ((1 << bits) - 1)
            else:
                value = sum((own[w] >> (16 * e + pair) & 1) << w for w in range(bits))
            assert value == codes[32 * block + row, 32 * column_tile + column]


def test_gptq_tiles_pad_groups_of_any_size():
    rng = np.random.default_rng(4)
    for tensors in (
        random_gptq(rng, 4, k=160, n=32, groups=4, act_order=True),
        random_gptq(rng, 4, k=288, n=32, groups=6),
        without_group(random_gptq(rng, 4, k=160, n=32, groups=5), 0),
        without_group(random_gptq(rng, 4, k=160, n=32, groups=5), 4),
    ):
        layout = tiles.gptq_tiles(gptq.validate_gptq(tensors))
        k, used = len(tensors["g_idx"]), np.unique(tensors["g_idx"])
        row = np.arange(k) if layout.row is None else layout.row
        assert sorted(row[row >= 0]) == list(range(k))
        assert layout.groups == len(used) and layout.blocks * 32 == len(row)
        for stored, original in enumerate(row):
            if original >= 0:
                assert tensors["g_idx"][original] == used[layout.block_group[stored // 32]]
        assert layout.block_group[0] == 0 and set(np.diff(layout.block_group)) <= {0, 1}
    assert tiles.gptq_tiles(gptq.validate_gptq(random_gptq(rng, 4, k=160, n=32, groups=5))).row is None


def test_blocks_are_counted_by_width():
    layout, _ = stored_codes(random_exl2(np.random.default_rng(5), (8, 6, 5, 4, 3, 2), n=40, group_blocks=3))
    assert layout.width_blocks == (6, 6, 6, 6, 6, 7)
    assert layout.words_per_column_tile == 32 * (6 * (8 + 6 + 5 + 4 + 3 + 2) + 2)
    assert list(layout.block_start[:2]) == [0, 256] and layout.block_start.dtype == np.int32
    assert (layout.column_tiles, layout.padded_n, layout.groups) == (2, 64, 13)
    assert list(layout.block_group[:4]) == [0, 0, 0, 1] and layout.block_group[-1] == 12


@pytest.mark.gpu
def test_the_gpu_writes_the_same_tiles(cupy):
    for tensors in layers():
        q = QMatrix.from_tensors(to_gpu(cupy, tensors))
        layout, codes = stored_codes(tensors)
        np.testing.assert_array_equal(q.tiles.words.get(), tiles.pack_tiles(codes, layout))
        if q.kind == "exl2":
            scales, zeros = exl2.exl2_scales(tensors["q_scale"], tensors["q_scale_max"]), None
        else:
            used = np.unique(tensors["g_idx"])
            scales, zeros = tensors["scales"][used], gptq.unpack_gptq(tensors, gptq.validate_gptq(tensors))[1][used]
        np.testing.assert_array_equal(q.tiles.scales.get(), tile_major(scales, layout))
        if zeros is None:
            assert q.tiles.zeros is None
        else:
            np.testing.assert_array_equal(q.tiles.zeros.get(), tile_major(zeros, layout))
        for name in ("block_bits", "block_start", "block_group"):
            np.testing.assert_array_equal(getattr(q.tiles, name).get(), getattr(layout, name))
        assert (q.order is None) == (layout.row is None)
        if q.order is not None:
            np.testing.assert_array_equal(q.order.get(), layout.row)
            assert q.order.dtype == np.int32


def tile_major(values, layout):
    """float16 [column tiles, groups, 32] of [groups, n], zero in the columns from n on."""
    padded = np.zeros((len(values), layout.padded_n), np.float16)
    padded[:, : layout.n] = values
    return padded.reshape(len(values), layout.column_tiles, 32).transpose(1, 0, 2)
