"""A figure of quantized products: share of the limit over the rows of x, beside the peers.

    cupyq bench qmatmul --out rows.jsonl
    python benchmarks/plot_qmatmul.py rows.jsonl [--bits 4] [--shape 8192x28672] [--out docs/figures/qmatmul.svg]

One panel for each shape at one kind of matrix (`--bits`), or, with `--shape`, one for each kind at one shape. Where a case
was measured more than once, the last row counts. Plain SVG, written here: nothing to install.
"""

import argparse
import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent

# Colours of Okabe and Ito, which people of every colour vision tell apart; and other marks, for those who see none.
SERIES = {  # key of a row: name, colour, mark
    "us": ("cupyq", "#0072B2", "circle"),
    "exllamav2_us": ("exllamav2", "#D55E00", "square"),
    "int4_us": ("PyTorch int4", "#CC79A7", "triangle"),
    "cublas_us": ("cuBLAS fp16, unquantized", "#6B6B6B", "diamond"),
}
WIDTH, HEIGHT, GAP_X, GAP_Y = 250, 150, 34, 62  # of a panel, and between panels
LEFT, TOP, RIGHT, BOTTOM = 56, 112, 18, 52


def read_rows(paths, family="qmatmul", key=("k", "n", "bits", "rows")):
    """{values of the key: row} of a family's rows in the files; the last one counts."""
    found = {}
    for path in paths:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError as error:
            raise SystemExit(f"{path}: {error.strerror}; give files that `cupyq bench {family} --out` wrote") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise SystemExit(
                    f"{path}:{number}: not a JSON object; give files that `cupyq bench {family} --out` wrote"
                ) from None
            if row.get("family") == family:
                found[tuple(row[name] for name in key)] = row
    if not found:
        raise SystemExit(f"{', '.join(map(str, paths))}: no rows of `cupyq bench {family}`")
    return found


def panels_of(found, bits, shape):
    """[(title, {key: [(rows, share)]})], in the order of the files."""
    groups = {}
    for (k, n, kind, _), row in found.items():
        if shape is None and kind == bits:
            groups.setdefault(f"{k} × {n}", []).append(row)
        elif shape == f"{k}x{n}":
            groups.setdefault(kind_name(kind), []).append(row)
    if not groups:
        shapes = sorted({f"{k}x{n}" for k, n, _, _ in found})
        kinds = list(dict.fromkeys(kind for _, _, kind, _ in found))
        raise SystemExit(f"nothing to draw; the files hold --shape {', '.join(shapes)} and --bits {', '.join(kinds)}")
    return [(title, {key: _points(rows, key) for key in SERIES}) for title, rows in groups.items()]


def _points(rows, key):
    return sorted((row["rows"], row["limit_us"] / row[key]) for row in rows if row.get(key))


def kind_name(kind):
    if kind.startswith("gptq"):
        return f"GPTQ {kind[4:].strip('-')}"
    return f"EXL2, {kind} bits"


# --- drawing ----------------------------------------------------------------------------------------------------------


def figure(panels, title, note):
    """The SVG text."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    width = LEFT + columns * WIDTH + (columns - 1) * GAP_X + RIGHT
    width = max(width, 640)
    height = TOP + lines * HEIGHT + (lines - 1) * GAP_Y + BOTTOM
    most = max(rows for _, series in panels for points in series.values() for rows, _ in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="11" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(LEFT - 34, 26, title, size=15, weight="bold", color="#111"),
        text(LEFT - 34, 46, note),
        *legend(LEFT - 34, 74),
    ]
    for number, (name, series) in enumerate(panels):
        x = LEFT + number % columns * (WIDTH + GAP_X)
        y = TOP + number // columns * (HEIGHT + GAP_Y)
        is_lowest = number + columns >= len(panels)
        parts += panel(x, y, name, series, most, number % columns == 0, is_lowest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x, y, content, *, anchor="start", size=11, weight="normal", color="#333"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{color}">{escape(content)}</text>'
    )


def legend(x, y):
    for name, color, shape in SERIES.values():
        yield f'<line x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
        yield mark(shape, x + 13, y, color)
        yield text(x + 32, y + 4, name)
        x += 48 + 6.2 * len(name)


def panel(x, y, name, series, most, is_leftmost, is_lowest):
    """Axes, grid and curves; rows on a logarithmic scale, shares from 0 to 100 %."""

    def at(rows, share):
        return x + WIDTH * math.log2(rows) / math.log2(max(most, 2)), y + HEIGHT * (1 - min(share, 1.05))

    yield text(x, y - 9, name, size=12, weight="bold", color="#111")
    for percent in (0, 25, 50, 75, 100):
        _, line = at(1, percent / 100)
        gray = "#E4E4E4" if percent else "#999"
        yield f'<line x1="{x}" x2="{x + WIDTH}" y1="{line:.1f}" y2="{line:.1f}" stroke="{gray}"/>'
        if is_leftmost:
            yield text(x - 7, line + 4, f"{percent} %", anchor="end")
    ticks = [2**power for power in range(0, 14, 2) if 2**power <= most]
    for rows in ticks:
        column, _ = at(rows, 0)
        yield f'<line x1="{column:.1f}" x2="{column:.1f}" y1="{y}" y2="{y + HEIGHT}" stroke="#F0F0F0"/>'
        yield f'<line x1="{column:.1f}" x2="{column:.1f}" y1="{y + HEIGHT}" y2="{y + HEIGHT + 4}" stroke="#999"/>'
        yield text(column, y + HEIGHT + 16, str(rows), anchor="middle")
    if is_lowest:
        yield text(x + WIDTH / 2, y + HEIGHT + 34, "rows of x", anchor="middle")
    for key, points in reversed(series.items()):  # cupyq on top
        _, color, shape = SERIES[key]
        where = [at(*point) for point in points]
        if where:
            line = " ".join(f"{column:.1f},{row:.1f}" for column, row in where)
            thickness = 2.4 if key == "us" else 1.6
            yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{thickness}" stroke-linejoin="round"/>'
            yield from (mark(shape, column, row, color) for column, row in where)


def mark(shape, x, y, color):
    edge = 'stroke="white" stroke-width="0.8"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{color}" {edge}/>'
    corners = {
        "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        "triangle": ((0, -4), (3.8, 3), (-3.8, 3)),
        "diamond": ((0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{color}" {edge}/>'


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON lines of `cupyq bench qmatmul --out`")
    parser.add_argument("--bits", default="4", help="kind of matrix of all panels; default 4")
    parser.add_argument("--shape", help="K x N of all panels, which then show the kinds")
    parser.add_argument("--out", default=str(ROOT / "docs/figures/qmatmul.svg"))
    options = parser.parse_args(arguments)
    found = read_rows(options.files)
    devices = ", ".join(dict.fromkeys(row["device"] for row in found.values()))
    what = kind_name(options.bits) if options.shape is None else options.shape.replace("x", " × ")
    panels = panels_of(found, options.bits, options.shape)
    note = (
        "Share of the limit: the weights' bytes at the speed of a streaming read, or the flops at that of a large fp16 product."
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(figure(panels, f"Quantized matrix products on {devices}: {what}", note), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
