"""The pictures of docs/explanation, drawn from what they show: python tools/draw_figures.py [FOLDER]

Where bits lie is found out by packing single bits with cupyq.formats, the layer is a shipped model's, and the points of the
roofline are the tables of docs/measured.md. So a picture that has become wrong differs from what this draws, and
tests/test_docs.py notices. Plain SVG, written here: nothing to install.
"""

import math
import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cupyq.formats import bits, exl2, tiles  # noqa: E402
from cupyq.formats.safetensors import Checkpoint  # noqa: E402

# Colours of Okabe and Ito, which people of every colour vision tell apart, and light ones of the same hues.
BLUE, ORANGE, GREEN, PINK, GRAY, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B", "#222"
PALE = {8: "#F6B48F", 6: "#F3D59A", 5: "#F7E6A6", 4: "#A9D3EC", 3: "#A8DCC9", 2: "#E7C3D6"}
LIGHT, LINE = "#EEF1F4", "#B8BEC4"
LAYER = "model.layers.0.mlp.down_proj"


# --- drawing ----------------------------------------------------------------------------------------------------------


def svg(width, height, title, parts):
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="#222">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{GRAY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def text(x, y, content, *, anchor="start", size=12, weight="normal", color=INK):
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{color}">'
        f"{escape(str(content))}</text>"
    )


def heading(title, note):
    """What a figure shows, and below it in gray what to look at."""
    return [text(20, 28, title, size=16, weight="bold"), text(20, 50, note, color=GRAY)]


def box(x, y, width, height, fill, *, line=LINE, thickness=1.0, round=0):
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}" fill="{fill}" stroke="{line}" '
        f'stroke-width="{thickness:g}"/>'
    )


def arrow(*points):
    return stroke(points, GRAY, 1.5, 'marker-end="url(#tip)"')


def stroke(points, color=LINE, width=1.0, more=""):
    places = " ".join(f"{round(x, 1):g},{round(y, 1):g}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width:g}" {more}/>'


# --- EXL2 -------------------------------------------------------------------------------------------------------------


def exl2_layer():
    """One real layer: rows by the strength of their inputs, groups of falling width, and the tensors that hold them."""
    with Checkpoint(ROOT / "examples/models/shakespeare-exl2-4.0") as checkpoint:
        tensors = {
            name: np.array(checkpoint.array(f"{LAYER}.{name}")) for name in ("q_groups", "q_weight", "q_scale", "q_invperm")
        }
    rows_of_words, n = tensors["q_weight"].shape
    layout = exl2.exl2_layout(tensors["q_groups"], rows_of_words, n)
    top, height = 84, 384
    scale = height / layout.k
    parts = [
        *heading(
            f"One layer in EXL2: {LAYER}, {layout.k} inputs, {n} outputs",
            "Rows are sorted by how strong their inputs are; the strongest get the widest codes.",
        ),
    ]
    # The model's order: each row has the colour of the group it goes to.
    group_of = np.repeat(np.arange(layout.group_count), layout.rows)
    parts.append(text(55, top - 10, "model's order", anchor="middle", weight="bold"))
    for row in range(0, layout.k, 4):
        fill = PALE[int(layout.bits[group_of[tensors["q_invperm"][row]]])]
        parts.append(box(20, top + row * scale, 70, 4 * scale + 0.2, fill, line="none"))
    parts.append(box(20, top, 70, height, "none"))
    parts += [
        arrow((96, top + height / 2), (158, top + height / 2)),
        text(127, top + height / 2 - 10, "q_invperm", anchor="middle", size=11),
    ]
    parts.append(text(240, top - 10, "stored order", anchor="middle", weight="bold"))
    for width, first, rows in zip(layout.bits, layout.first_row, layout.rows, strict=True):
        y = top + first * scale
        parts.append(box(164, y, 152, rows * scale, PALE[int(width)]))
        parts.append(text(240, y + rows * scale / 2 + 4, f"{rows} rows of {width} bits", anchor="middle", size=11))
    # Right: the tensors.
    x = 350
    parts.append(text(x, top - 10, "on the disk", weight="bold"))
    groups = " ".join(f"({b}, {w})" for b, w in list(zip(layout.bits, layout.first_word, strict=True))[:4])
    described = [
        ("q_weight", f"int32 [{rows_of_words}, {n}]", "the codes: one stream of bits down each column"),
        ("q_groups", f"int16 [{2 * layout.group_count}]", f"bits and first row of each group: {groups} ..."),
        ("q_scale", f"int32 [{layout.group_count}, {n // 8}]", "a code of 4 bits for each group and column, 8 in a word"),
        ("q_scale_max", f"float16 [{layout.group_count}]", "what the scales of a group are multiples of"),
        ("q_invperm", f"int32 [{layout.k}]", "model's row: where it is stored"),
    ]
    for number, (name, shape, meaning) in enumerate(described):
        y = top + 6 + number * 66
        parts += [
            box(x, y, 390, 54, LIGHT, line="none", round=4),
            text(x + 12, y + 22, name, weight="bold"),
            text(x + 110, y + 22, shape, color=BLUE),
            text(x + 12, y + 42, meaning, color=GRAY),
        ]
    total = exl2.exl2_size_bits(layout) / (layout.k * n)
    parts.append(text(x, top + height - 6, f"{total:.2f} bits a weight, everything counted", weight="bold"))
    return svg(760, top + height + 24, f"The parts of {LAYER} in EXL2", parts)


def places_of_bits(width):
    """{(word, bit): (code, bit of the code)} of 32 codes in one column, by packing one bit at a time."""
    found = {}
    for code in range(32):
        for bit in range(width):
            codes = np.zeros((32, 1), np.uint8)
            codes[code] = 1 << bit
            words = bits.pack_rows(codes, width).view(np.uint32)[:, 0]
            (word,) = np.flatnonzero(words)
            found[int(word), int(words[word]).bit_length() - 1] = (code, bit)
    return found


def exl2_bits():
    """32 codes of 3, 4 and 5 bits in their words; codes that stand in two words are marked."""
    cell, left, y = 20, 74, 96
    parts = [
        *heading(
            "32 codes of one column, as words of 32 bits",
            "A number is the code that the bit belongs to. Outlined: codes that go on in the next word.",
        ),
    ]
    for width in (3, 4, 5):
        places = places_of_bits(width)
        words_of = {}
        for (word, _), (code, _) in places.items():
            words_of.setdefault(code, set()).add(word)
        parts.append(text(20, y - 6, f"{width} bits: {width} words", weight="bold"))
        if width == 3:
            parts += [text(left + 3 * cell, y - 2, "left: bit 0", size=10, color=GRAY),
                      text(left + 32 * cell, y - 2, "right: bit 31", anchor="end", size=10, color=GRAY)]  # fmt: skip
        for word in range(width):
            top = y + 10 + word * 30
            parts.append(text(left - 10, top + 17, f"word {word}", anchor="end", size=11, color=GRAY))
            for start, count, code in runs([places[word, bit][0] for bit in range(32)]):
                is_cut = len(words_of[code]) > 1
                fill = PALE[width] if code % 2 else LIGHT
                line, thickness = (ORANGE, 2.2) if is_cut else (LINE, 1)
                parts.append(box(left + start * cell, top, count * cell, 25, fill, line=line, thickness=thickness))
                parts.append(text(left + (start + count / 2) * cell, top + 17, code, anchor="middle", size=11))
        y += 10 + width * 30 + 30
    return svg(left + 32 * cell + 20, y - 10, "Where the bits of EXL2 codes lie", parts)


def runs(values):
    """(start, length, value) of equal neighbours."""
    starts = [0, *(place for place in range(1, len(values)) if values[place] != values[place - 1]), len(values)]
    return [(a, b - a, values[a]) for a, b in zip(starts, starts[1:], strict=False)]


def exl2_scales():
    """The 16 scales that a group offers, and the weights that codes of 4 bits then stand for."""
    left, width = 140, 560
    parts = [
        *heading(
            "What a column can choose from",
            "scale = (s + 1)^2 * q_scale_max / 256, s from 0 to 15; weight = (code - 8) * scale",
        ),
        text(left - 16, 100, "16 scales", anchor="end", weight="bold"),
        text(left, 134, "0", anchor="middle", size=11, color=GRAY),
        text(left + width, 134, "q_scale_max", anchor="middle", size=11, color=GRAY),
        stroke([(left, 96), (left + width, 96)]),
    ]
    for s in range(16):
        x = left + width * (s + 1) ** 2 / 256
        parts.append(f'<circle cx="{x:g}" cy="96" r="5" fill="{BLUE}" stroke="white"/>')
        if s >= 5:
            parts.append(text(x, 82, f"s = {s}" if s == 15 else s, anchor="middle", size=11))
    middle = left + width / 2
    for number, (s, color) in enumerate(((15, BLUE), (11, GREEN), (7, ORANGE))):
        y = 176 + number * 34
        parts.append(text(left - 16, y + 4, f"weights, s = {s}", anchor="end", weight="bold", color=color))
        parts.append(stroke([(left, y), (left + width, y)], LIGHT))
        for code in range(16):
            x = middle + (code - 8) * (s + 1) ** 2 / 256 * width / 16
            parts.append(stroke([(x, y - 9), (x, y + 9)], color, 2))
    parts.append(text(middle, 280, "0", anchor="middle", size=11, color=GRAY))
    return svg(left + width + 50, 298, "Scales of EXL2", parts)


# --- tiles ------------------------------------------------------------------------------------------------------------


def tile_layout(*widths):
    """A layout of one column tile and a block of each width."""
    count = len(widths)
    numbers = np.arange(count, dtype=np.int32)
    return tiles.TileLayout(
        k=32 * count, n=32, block_bits=np.array(widths, np.int32), block_group=numbers, row=None, packed_row=None
    )


def place_in_tile(width, row, column, bit):
    """(lane, word of the lane, bit of the word) where a bit of a code lies, by packing it alone."""
    codes = np.zeros((32, 32), np.uint8)
    codes[row, column] = 1 << bit
    words = tiles.pack_tiles(codes, tile_layout(width))
    (index,) = np.flatnonzero(words)
    start = 0
    for before, part in zip(np.cumsum((0, *tiles.PARTS[width])), tiles.PARTS[width], strict=False):
        if index < start + 32 * part:
            lane, word = divmod(int(index) - start, part)
            return lane, int(before) + word, int(words[index]).bit_length() - 1
        start += 32 * part


def tile_lanes():
    """Which lane of a warp holds which weight of a tile."""
    cell, left, top = 17, 60, 92
    lanes = [[place_in_tile(4, row, column, 0)[0] for column in range(32)] for row in range(32)]
    parts = [
        *heading(
            "A tile: 32 rows by 32 columns of weights, shared out to the 32 lanes of a warp",
            "A number is the lane that holds the weight. What lane 0 and lane 22 hold is coloured.",
        ),
        text(left + 16 * cell, top - 12, "columns (outputs)", anchor="middle", size=11, color=GRAY),
        f'<text transform="translate({left - 34} {top + 16 * cell}) rotate(-90)" text-anchor="middle" font-size="11" '
        f'fill="{GRAY}">rows (inputs)</text>',
    ]
    for g in range(0, 8, 2):
        parts.append(box(left + 4 * g * cell, top, 4 * cell, 32 * cell, LIGHT, line="none"))
    parts.append('<g font-size="9" text-anchor="middle">')
    for row in range(32):
        if row % 8 == 0:
            parts.append(text(left - 8, top + row * cell + 13, row, anchor="end", size=10, color=GRAY))
        for column, lane in enumerate(lanes[row]):
            x, y = left + column * cell, top + row * cell
            if lane in (0, 22):
                parts.append(box(x, y, cell, cell, PALE[8] if lane == 0 else PALE[4], thickness=0.5))
            parts.append(f'<text x="{x + cell / 2:g}" y="{y + 12}">{lane}</text>')
    parts.append("</g>")
    for line in range(0, 33, 8):  # the pieces of one matrix instruction
        y = top + line * cell
        parts.append(stroke([(left, y), (left + 32 * cell, y)], INK, 1.6 if line % 16 == 0 else 0.8))
    x = left + 32 * cell + 24
    notes = [
        "4 neighbouring columns",
        "to each lane, so that",
        "results are stored as",
        "vectors;",
        "",
        "rows in pairs: the two",
        "halves of a 32-bit",
        "word;",
        "",
        "16 rows (thick lines)",
        "are the depth of one",
        "matrix instruction.",
    ]
    parts += [text(x, top + 16 + 18 * number, note, color=GRAY) for number, note in enumerate(notes)]
    return svg(x + 140, top + 32 * cell + 20, "Lanes of a tile", parts)


def tile_words():
    """The words of one lane, for 4, 3 and 6 bits."""
    cell, left, y = 20, 74, 96
    parts = [
        *heading(
            "The 32 weights of one lane, in its words",
            "A number is a pair of weights: its even row in the low half, its odd row in the high half. Outlined: spare bits.",
        ),
    ]
    first = {}  # pair -> its place in the tile: columns 0 to 3 of lane 0, rows 16 j + 8 h
    for c in range(4):
        for j in range(2):
            for h in range(2):
                first[4 * c + 2 * j + h] = (16 * j + 8 * h, c)
    for width in (4, 3, 6):
        places = {}
        for pair, (row, column) in first.items():
            for odd in (0, 1):
                for bit in range(width):
                    _, word, place = place_in_tile(width, row + odd, column, bit)
                    places[word, place] = (pair, bit)
        parts.append(text(20, y - 6, f"{width} bits: {width} words", weight="bold"))
        if width == 4:
            parts += [text(left + 3 * cell, y - 2, "left: bit 31", size=10, color=GRAY),
                      text(left + 32 * cell, y - 2, "right: bit 0", anchor="end", size=10, color=GRAY)]  # fmt: skip
        spare = {pair for pair in range(16) if len({word for (word, _), (one, _) in places.items() if one == pair}) > 1}
        for word in range(width):
            top = y + 10 + word * 30
            parts.append(text(left - 10, top + 17, f"word {word}", anchor="end", size=11, color=GRAY))
            shown = [(31 - place) // 16 * 100 + places[word, 31 - place][0] for place in range(32)]
            for start, count, value in runs(shown):
                pair = value % 100
                fill = PALE[width] if pair % 2 else LIGHT
                line, thickness = (ORANGE, 2.2) if pair in spare else (LINE, 1)
                parts.append(box(left + start * cell, top, count * cell, 25, fill, line=line, thickness=thickness))
                parts.append(text(left + (start + count / 2) * cell, top + 17, pair, anchor="middle", size=11))
            parts.append(stroke([(left + 16 * cell, top - 2), (left + 16 * cell, top + 27)], INK, 2))
        y += 10 + width * 30 + 30
    return svg(left + 32 * cell + 20, y - 10, "Words of a lane", parts)


def tile_runs():
    """A matrix of several widths in memory: column tiles one after the other, each from its first block to its last."""
    left, top, widths, columns = 130, 84, (8, 5, 5, 4, 4, 4, 4), 5
    parts = [
        *heading(
            "A matrix in memory",
            "A column tile is one unbroken run. Height: the bytes of a block; a block of b bits is b words to a lane.",
        ),
    ]
    unit = 8
    for column in range(columns):
        x, y = left + column * 122, top + 20
        parts.append(
            text(x + 50, top + 8, f"column tile {column}" if column < 4 else "...", anchor="middle", size=11, color=GRAY)
        )
        for block, width in enumerate(widths):
            parts.append(box(x, y, 100, width * unit, PALE[width]))
            if column == 0:
                parts.append(text(x - 12, y + width * unit / 2 + 4, f"block {block}: {width} bits", anchor="end", size=11))
            y += width * unit
        if column < columns - 1:
            parts.append(arrow((x + 50, y + 4), (x + 50, y + 18), (x + 111, y + 18), (x + 111, top + 12), (x + 121, top + 24)))
    bottom = top + 20 + sum(widths) * unit + 40
    parts.append(
        text(left, bottom, "A block is 32 rows of one width and one group; widths never rise from block to block.", color=GRAY)
    )
    return svg(left + columns * 122, bottom + 20, "A matrix in memory", parts)


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernel_overlap():
    """Two products, the second started before the first has ended: weights are read ahead, results are waited for."""
    left, row, unit = 90, 30, 0.88
    colors = {"read weights ahead": PALE[4], "wait": LIGHT, "multiply": PALE[8], "add up": PALE[6]}
    parts = [
        *heading(
            "A kernel reads its weights while the one before still works",
            "Weights are written by no kernel, so they need no waiting; activations do.",
        ),
    ]
    lines = [
        ("one after the other", [[("wait", 0, 0), ("read weights ahead", 0, 110), ("multiply", 110, 190), ("add up", 300, 50)],
                                 [("read weights ahead", 360, 110), ("multiply", 470, 190), ("add up", 660, 50)]]),
        ("overlapped", [[("read weights ahead", 0, 110), ("multiply", 110, 190), ("add up", 300, 50)],
                        [("read weights ahead", 210, 110), ("wait", 320, 30), ("multiply", 350, 190), ("add up", 540, 50)]]),
    ]  # fmt: skip
    y = 84
    for name, kernels in lines:
        parts.append(text(20, y + 12, name, weight="bold"))
        for number, steps in enumerate(kernels):
            parts.append(
                text(left - 12, y + 40 + number * (row + 6), f"kernel {number + 1}", anchor="end", size=11, color=GRAY)
            )
            for kind, start, length in steps:
                if length:
                    parts.append(
                        box(left + start * unit, y + 20 + number * (row + 6), length * unit, row, colors[kind], round=3)
                    )
        y += 116
    x = left
    for kind, fill in colors.items():
        parts += [box(x, y, 14, 14, fill), text(x + 20, y + 12, kind, size=11)]
        x += 50 + 7 * len(kind)
    return svg(left + 680, y + 30, "Overlapping kernels", parts)


def kernel_slices():
    """How a product of few rows is cut: column tiles to thread blocks, K to warps, and slices that are added in order."""
    left, top, width = 24, 86, 312
    parts = [
        *heading(
            "A product of few rows, cut",
            "Each warp streams its part of a column tile through a ring of its own in shared memory.",
        ),
        text(left + width / 2, top - 8, "weights: inputs by outputs", anchor="middle", size=11, color=GRAY),
    ]
    for column in range(6):
        for piece in range(2):
            fill = PALE[4] if (column + piece) % 2 else PALE[3]
            parts.append(box(left + column * 52, top + piece * 120, 52, 120, fill, line="white", thickness=2))
            for warp in range(4):
                y = top + piece * 120 + warp * 30
                parts.append(text(left + column * 52 + 26, y + 19, f"warp {warp}", anchor="middle", size=10))
                if warp:
                    parts.append(stroke([(left + column * 52, y), (left + column * 52 + 52, y)], "white"))
    for piece in range(2):
        parts.append(text(left + width + 12, top + piece * 120 + 64, f"slice {piece}"))
    x = left + width + 76
    for number, (title, notes) in enumerate(
        (
            ("within a thread block", ("warps share a column tile along K", "and add up in shared memory, in order")),
            (
                "between thread blocks",
                (
                    "slices of K write partial sums;",
                    "whichever comes last adds them,",
                    "slice 0 first: the same bits every run",
                ),
            ),
            ("at the store", ("bias, residual and activation in fp32,", "then one rounding")),
        )
    ):
        y = top + number * 88
        parts += [box(x, y, 316, 78, LIGHT, line="none", round=4), text(x + 12, y + 20, title, weight="bold")]
        parts += [text(x + 12, y + 38 + 15 * line, note, size=11, color=GRAY) for line, note in enumerate(notes)]
    return svg(x + 332, top + 270, "How a product of few rows is cut", parts)


# --- the roofline -----------------------------------------------------------------------------------------------------

SHAPES = {"4096 x 4096": (GREEN, "triangle"), "14336 x 4096": (PINK, "square"), "8192 x 28672": (BLUE, "circle")}


def measured_points():
    """({shape: {rows: microseconds}} at 4 bits, {rows: microseconds} of cuBLAS on 8192 x 28672, GB/s, TFLOP/s)."""
    page = (ROOT / "docs/measured.md").read_text(encoding="utf-8")
    part = page[page.index("\n## Products") : page.index("**On an H200**")]
    many = page[page.index("Many rows, 4 bits, the whole product") : page.index("**Dequantising or not.**")]
    bandwidth, flops = (
        float(number) for number in re.search(r"streaming read (\d+)\s+GB/s, fp16 product (\d+) TFLOP/s", part).groups()
    )
    found, cublas = {shape: {} for shape in SHAPES}, {}
    few = re.search(r"^\| 4 bits \|(.*)\|$", part, re.M)[1].split("|")
    for shape, cells in zip(SHAPES, few, strict=True):
        found[shape].update(zip((1, 4, 8, 16), (float(cell.split("(")[0]) for cell in cells.split("/")), strict=True))
    peers = re.search(r"^\| 8192 x 28672 \|[^|]*\|([^|]*)\|", part, re.M)[1]
    cublas.update(zip((1, 8, 16), map(float, peers.split("/")), strict=True))
    for shape in SHAPES:
        cells = re.search(rf"^\| {shape} \|(.*)\|$", many, re.M)[1].split("|")
        for rows, cell in zip((32, 64, 128, 256, 512, 1024, 4096), cells, strict=True):
            time, ratio = re.match(r" ([\d.]+) \(([\d.]+)\)", cell).groups()
            found[shape][rows] = float(time)
            if shape == "8192 x 28672":
                cublas[rows] = float(time) / float(ratio)
    return found, cublas, bandwidth, flops


def roofline():
    """Speed over the work per byte of weights, log by log, under what the machine allows."""
    found, cublas, bandwidth, flops = measured_points()
    left, top, width, height = 76, 88, 660, 360
    x_from, x_to, y_from, y_to = 0.9, 40000.0, 2.0, 1200.0

    def at(intensity, tflops):
        return (
            left + width * math.log(intensity / x_from) / math.log(x_to / x_from),
            top + height * (1 - math.log(tflops / y_from) / math.log(y_to / y_from)),
        )

    parts = [
        *heading(
            "Products with 4-bit weights under the roofline of an H100",
            f"Limits of the same run: {bandwidth:.0f} GB/s, {flops:.0f} TFLOP/s. Points: 1, 4, 8, 16, 32 ... 4096 rows of x.",
        ),
    ]
    for tflops in (3, 10, 30, 100, 300, 1000):
        _, y = at(x_from, tflops)
        parts += [
            stroke([(left, y), (left + width, y)], "#E4E4E4"),
            text(left - 8, round(y + 4, 1), tflops, anchor="end", size=11),
        ]
    for intensity in (1, 4, 16, 64, 256, 1024, 4096, 16384):
        x, _ = at(intensity, y_from)
        parts += [
            stroke([(x, top), (x, top + height)], "#F0F0F0"),
            text(round(x, 1), top + height + 18, intensity, anchor="middle", size=11),
        ]
    parts += [
        text(left + width / 2, top + height + 40, "operations for each byte of weights", anchor="middle", size=11),
        f'<text transform="translate(24 {top + height / 2}) rotate(-90)" text-anchor="middle" font-size="11">TFLOP/s</text>',
    ]
    ridge = flops * 1000 / bandwidth
    roof = [at(x_from, x_from * bandwidth / 1000), at(ridge, flops), at(x_to, flops)]
    parts.append(stroke(roof, INK, 2))
    series = [("8192 x 28672, cuBLAS on fp16 weights", GRAY, "diamond", cublas, "8192 x 28672", 16)]
    series += [(f"{shape}, cupyq", *SHAPES[shape], found[shape], shape, 4 + 4 / 128) for shape in SHAPES]
    for number, (name, color, shape_of_mark, times, shape, stored_bits) in enumerate(series):
        k, n = (int(side) for side in shape.split(" x "))
        points = [at(2 * rows * 8 / stored_bits, 2 * rows * k * n / time / 1e6) for rows, time in sorted(times.items())]
        parts.append(stroke(points, color, 1.6, 'stroke-linejoin="round"'))
        parts += [mark(shape_of_mark, x, y, color) for x, y in points]
        y = top + height - 22 - 22 * (len(series) - 1 - number)
        parts += [mark(shape_of_mark, left + width - 246, y - 4, color), text(left + width - 234, y, name, size=11)]
    return svg(left + width + 40, top + height + 60, "Roofline of products with 4-bit weights on an H100", parts)


def mark(shape, x, y, color):
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.8" fill="{color}" stroke="white" stroke-width="0.8"/>'
    corners = {
        "square": ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        "triangle": ((0, -4.2), (4, 3.2), (-4, 3.2)),
        "diamond": ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{color}" stroke="white" stroke-width="0.8"/>'


FIGURES = (exl2_layer, exl2_bits, exl2_scales, tile_lanes, tile_words, tile_runs, kernel_overlap, kernel_slices, roofline)


def main(arguments=None):
    """Write all figures; returns their names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    folder = Path(arguments[0]) if arguments else ROOT / "docs/figures"
    names = []
    for figure in FIGURES:
        names.append(f"{figure.__name__.replace('_', '-')}.svg")
        (folder / names[-1]).write_text(figure(), encoding="utf-8")
    return names


if __name__ == "__main__":
    print(*main(), sep="\n")
