"""A figure of attention: share of the limit beside PyTorch's kernels, and what a cache of codes takes of an fp16 cache's time.

    cupyq bench attention --out rows.jsonl
    python benchmarks/plot_attention.py rows.jsonl [--out docs/figures/attention.svg]

Left: contiguous fp16 caches, one group of bars for each problem. Right: decoding, one group for each problem that was
measured on caches of codes; a line across each bar marks its share of the bytes. Where a case was measured more than once, the
last row counts. Plain SVG, written here: nothing to install.
"""

import argparse
from pathlib import Path
from xml.sax.saxutils import escape

import plot_qmatmul
from plot_qmatmul import text

ROOT = Path(__file__).parent.parent

# Colours of Okabe and Ito, which people of every colour vision tell apart.
PEERS = {
    "us": ("cupyq", "#0072B2"),
    "flash_us": ("PyTorch, FlashAttention 2", "#D55E00"),
    "cudnn_us": ("PyTorch, cuDNN", "#6B6B6B"),
}
KINDS = {
    "paged": ("fp16 in pages", "#56B4E9"),
    "q8": ("q8", "#E69F00"),
    "e4m3": ("e4m3", "#009E73"),
    "fp8": ("fp8", "#D55E00"),
    "q6": ("q6", "#CC79A7"),
    "q4": ("q4", "#0072B2"),
}
WIDTH, NAMES, BAR, SPACE = 180, 134, 11, 14  # of a panel, of the names left of it, of a bar, between groups
LEFT, TOP, BOTTOM = 22, 118, 56


def read_rows(paths):
    """{(problem, heads, kv_heads, dtype, cache, page_size): row} of the attention rows in the files."""
    return plot_qmatmul.read_rows(paths, "attention", ("problem", "heads", "kv_heads", "dtype", "cache", "page_size"))


def shares(found):
    """[(problem, [(share of the limit, colour, None)])] of contiguous fp16 caches."""
    groups = []
    for row in found.values():
        if row["cache"] == "fp16" and row["page_size"] is None:
            groups.append((row["problem"], [(row["limit_us"] / row[key], PEERS[key][1], None) for key in PEERS if row[key]]))
    return groups


def times_of_codes(found):
    """[(problem, [(share of an fp16 cache's time, colour, share of its bytes)])] where fewer queries than 16 read a cache."""
    groups = {}
    for row in found.values():
        kind = row["cache"] if row["page_size"] is None else "paged" if row["cache"] == "fp16" else None
        if kind in KINDS and row["queries"] <= 16:
            # Decoding is bound by bytes: its limits are to each other as they are.
            plain = next((r for r in found.values() if _is_plain(r, row)), None)
            bytes_share = None if plain is None else row["limit_us"] / plain["limit_us"]
            groups.setdefault(row["problem"], {})[kind] = (row["of_fp16"], KINDS[kind][1], bytes_share)
    return [(problem, [bars[kind] for kind in KINDS if kind in bars]) for problem, bars in groups.items()]


def _is_plain(row, other):
    same = ("problem", "heads", "kv_heads", "dtype")
    return row["cache"] == "fp16" and row["page_size"] is None and all(row[name] == other[name] for name in same)


# --- drawing ----------------------------------------------------------------------------------------------------------


def figure(panels, title, note):
    """The SVG text of panels [(title, legend, groups, most)], side by side."""
    height = TOP + BOTTOM + max(panel_height(groups) for _, _, groups, _ in panels)
    width = max(LEFT + len(panels) * (NAMES + WIDTH + 40), 720)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="11" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(LEFT, 26, title, size=15, weight="bold", color="#111"),
        text(LEFT, 46, note),
    ]
    for number, (name, legend, groups, most) in enumerate(panels):
        parts += panel(LEFT + number * (NAMES + WIDTH + 40), name, legend, groups, most)
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel_height(groups):
    return sum(BAR * len(bars) + SPACE for _, bars in groups)


def panel(x, name, legend, groups, most):
    """Names on the left, bars from 0 to `most` on the right of them."""
    yield text(x, 76, name, size=12, weight="bold", color="#111")
    place = x
    for label, color in legend:
        yield f'<rect x="{place:.1f}" y="88" width="10" height="10" fill="{color}"/>'
        yield text(place + 14, 97, label)
        place += 28 + 6 * len(label)
    left, bottom = x + NAMES, TOP + panel_height(groups)
    for percent in range(0, round(100 * most) + 1, 25):
        column = left + WIDTH * percent / 100 / most
        gray = "#E4E4E4" if percent else "#999"
        yield f'<line x1="{column:.1f}" x2="{column:.1f}" y1="{TOP - 6}" y2="{bottom}" stroke="{gray}"/>'
        yield text(column, bottom + 16, f"{percent} %", anchor="middle")
    y = TOP
    for problem, bars in groups:
        yield text(left - 8, y + BAR * len(bars) / 2 + 4, problem, anchor="end")
        for value, color, line in bars:
            length = WIDTH * min(value, most) / most
            yield f'<rect class="bar" x="{left}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{color}"/>'
            yield text(left + length + 4, y + BAR - 3, f"{100 * value:.0f}", size=9)
            if line is not None:
                column = left + WIDTH * min(line, most) / most
                ends = f'x1="{column:.1f}" x2="{column:.1f}" y1="{y - 1}" y2="{y + BAR - 1}"'
                yield f'<line {ends} stroke="#111" stroke-width="1.4"/>'
            y += BAR
        y += SPACE


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON lines of `cupyq bench attention --out`")
    parser.add_argument("--out", default=str(ROOT / "docs/figures/attention.svg"))
    options = parser.parse_args(arguments)
    found = read_rows(options.files)
    rows = list(found.values())
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    panels = [("Share of the limit, fp16 caches", list(PEERS.values()), shares(found), 1.0)]
    if codes := times_of_codes(found):
        panels.append(("Time on other caches, of that on a contiguous fp16 one", list(KINDS.values()), codes, 1.25))
    note = "Limit: keys and values at the speed of a streaming read, or the flops at that of a large fp16 product."
    heads = f"{rows[0]['heads']} query heads, {rows[0]['kv_heads']} heads of keys and values"
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(figure(panels, f"Attention on {devices}: {heads}", note), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
