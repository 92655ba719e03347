"""What a quantization did: bits and errors of every layer as a table and a picture, and how far the model moved."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from cupyq._json_file import read_json
from cupyq.generate.perplexity import perplexity
from cupyq.models.loader import load_model
from cupyq.quantize.walk import HEAD
from cupyq.quantize.writer import natural_key, write_atomically, write_json

FIGURE, TEXT, DATA = "quantization.svg", "quantization.md", "quantization.json"
"""Files of a quantized model's folder. They hold no times: the same run writes the same bytes."""
_MOST_BYTES, _MOST_COUNT = 64 << 20, 1 << 62


MEANING = """\
Relative output error: |y - y_quantized| / |y|, root of the means of the squares over the calibration tokens, of a linear layer
whose inputs are those that the quantized layers before it make. Worth: what the squared error adds to KL(source || quantized)
of a token, in nats, estimated by noise on the layer's outputs, as when bits were allocated. Nobody measured it of the head, nor
of GPTQ."""


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear layer."""

    name: str
    k: int
    n: int
    layout: str
    """Such as "3x.1g64+2x.9g64": widths, their shares of the rows, sizes of their groups."""
    storage_bits: int
    """Scales, permutation and bias included."""
    error: float
    """What rounding adds: mean over the calibration tokens, as they count, of the squared difference of all outputs from those
    of the weights that were to be rounded, which make up for errors of the inputs."""
    output: float
    """Mean over the calibration tokens, as they count, of the squared outputs."""
    tokens: int
    """That reached this layer: an expert sees its own only, and is lent others for errors and outputs (see `gather.lend`)."""
    nats: float | None = None
    """What `error` is worth: how much it adds to KL(source || quantized) of a token, as noise on the layer's outputs told (see
    `sensitivity`). None where that was not measured: of the head, and of GPTQ."""

    @classmethod
    def parse(cls, values: Any) -> "LinearReport | None":
        """Of values from a file; None where they are none of a report."""
        try:
            found = _parsed(cls, values)
        except (TypeError, ValueError):
            return None
        return found if found.k > 0 and found.n > 0 and found.error >= 0 and found.output >= 0 else None

    @property
    def bits_per_weight(self) -> float:
        return self.storage_bits / (self.k * self.n)

    @property
    def relative_error(self) -> float:
        """|y - y_quantized| / |y|, root of the means of the squares; 0 where the layer has no outputs but 0."""
        return math.sqrt(self.error / self.output) if self.output > 0 else 0.0


@dataclass(frozen=True)
class Comparison:
    """A quantized model beside its source, over windows of a text."""

    text: str
    """Which text."""
    perplexity: float
    source_perplexity: float
    kl: float
    """Mean KL(source || quantized) of a token, in nats."""
    top1: float
    """Share of the tokens where both hold the same one most likely."""
    tokens: int


def bits_per_weight(layers: Sequence[LinearReport]) -> float:
    """Mean over the decoder's linear layers, as `Model.bits_per_weight`: the head does not count."""
    decoder = [layer for layer in layers if layer.name != HEAD]
    return sum(layer.storage_bits for layer in decoder) / sum(layer.k * layer.n for layer in decoder)


def compare(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    windows: np.ndarray,
    text: str,
    *,
    backend: str = "auto",
    dtype: Any = None,
    on_windows: Callable[[int], Any] | None = None,
) -> Comparison:
    """Both models over windows of tokens, int32 [windows, length], of which tokens 1, 2, ... are predicted.

    text: what the windows are from. Both models are in memory at a time. Raises what `load_model` and `perplexity` raise.
    """
    model, original = (load_model(path, backend, dtype=dtype) for path in (folder, source))
    ids, length = windows.reshape(-1), windows.shape[1]
    measured = perplexity(model, ids, window=length, reference=original, on_windows=on_windows)
    plain = perplexity(original, ids, window=length)
    return Comparison(
        text, measured.perplexity, plain.perplexity, float(measured.kl or 0.0), float(measured.top1 or 0.0), measured.tokens
    )


def write_report(
    folder: Path, layers: Sequence[LinearReport], settings: Mapping[str, Any], title: str, comparison: Comparison | None
) -> None:
    """The files `TEXT`, `FIGURE` and `DATA` of a model folder."""
    write_atomically(folder / FIGURE, [figure(layers, title).encode()])
    write_atomically(folder / TEXT, [markdown(layers, settings, title, comparison).encode()])
    data = {
        "settings": dict(settings),
        "bits_per_weight": bits_per_weight(layers),
        "comparison": None if comparison is None else vars(comparison),
        "layers": [vars(layer) for layer in layers],
    }
    write_json(folder / DATA, data)


def read_report(folder: Path) -> tuple[dict[str, Any], list[LinearReport], Comparison | None] | None:
    """(settings, layers, comparison) of a folder that `write_report` wrote to, or None of any other."""
    try:
        data = read_json(folder / DATA, hint="", most_bytes=_MOST_BYTES)
        comparison = None if data["comparison"] is None else _parsed(Comparison, data["comparison"])
        layers = [LinearReport.parse(layer) for layer in data["layers"]]
        is_whole = isinstance(data["settings"], dict) and layers and None not in layers
        return (data["settings"], [layer for layer in layers if layer is not None], comparison) if is_whole else None
    except (ValueError, KeyError, TypeError):
        return None


def _parsed(kind: type, values: Any) -> Any:
    """A report's dataclass of values from a file; TypeError or ValueError for values it cannot have."""
    found = kind(**values)
    for field in dataclasses.fields(kind):
        value = getattr(found, field.name)
        if value is None and field.default is None:
            continue
        expected = field.type if field.type in (str, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, expected):
            raise TypeError(field.name)
        if field.type is not str and not abs(value) <= (_MOST_COUNT if field.type is int else 1e308):
            raise ValueError(field.name)
    return found


# --- for people -------------------------------------------------------------------------------------------------------


def summary(layers: Sequence[LinearReport], comparison: Comparison | None) -> list[str]:
    """A few lines."""
    decoder = [layer for layer in layers if layer.name != HEAD]
    worst = max(decoder, key=lambda layer: layer.relative_error)
    lines = [f"bits        {bits_per_weight(layers):.4f}   per weight of the decoder, scales and permutations included"]
    lines += [
        f"head        {layer.bits_per_weight:.4f}   bits per weight, {layer.layout}" for layer in layers if layer not in decoder
    ]
    error = f"{100 * worst.relative_error:.2f} %"
    lines.append(f"error       {error}   relative output error (root mean square), the largest: {worst.name}")
    nats = {layer.name: layer.nats for layer in decoder if layer.nats is not None}
    if nats:
        dearest = max(nats, key=lambda name: nats[name])
        lines.append(
            f"worth       {sum(nats.values()):.6f}   nats of KL per token, estimated, of all errors; most in {dearest}"
        )
    if comparison is not None:
        lines += [
            f"perplexity  {comparison.perplexity:.4f}   of the source {comparison.source_perplexity:.4f}, {comparison.text}",
            f"KL          {comparison.kl:.6f}   nats per token, from the source, over {comparison.tokens} tokens",
            f"top-1       {100 * comparison.top1:.2f} %  of the tokens have the same most likely one",
        ]
    return lines


def table(layers: Sequence[LinearReport]) -> list[str]:
    """Lines of a Markdown table, one row for each linear layer."""
    lines = [
        "| layer | K x N | bits per weight | layout | relative output error, % | worth, nats per token | tokens |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for layer in layers:
        size, bits, error = f"{layer.k} x {layer.n}", f"{layer.bits_per_weight:.3f}", f"{100 * layer.relative_error:.3f}"
        worth = "" if layer.nats is None else f"{layer.nats:.6f}"
        lines.append(f"| {layer.name} | {size} | {bits} | {layer.layout} | {error} | {worth} | {layer.tokens} |")
    return lines


def markdown(layers: Sequence[LinearReport], settings: Mapping[str, Any], title: str, comparison: Comparison | None) -> str:
    """The report as text: summary, picture, settings, table."""
    shown = (f"| {name} | {_shown(value)} |" for name, value in settings.items() if value is not None)
    parts = [f"# {title}", "", "```", *summary(layers, comparison), "```", "", f"![Bits and errors]({FIGURE})", ""]
    return "\n".join([*parts, "| setting | value |", "|---|---|", *shown, "", *table(layers), "", MEANING, ""])


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 200 else f"{text[:190]} ..."


# --- the picture ------------------------------------------------------------------------------------------------------

# Light to dark of one colour, so that order is read off without a legend and by people of every colour vision.
_RAMP = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_LOW_BITS, _HIGH_BITS = 2.0, 8.25
_LOW_ERROR, _HIGH_ERROR = 0.2, 50  # %; coloured, like worths, by their logarithm
_LOW_WORTH, _HIGH_WORTH = 0.001, 10  # thousandths of a nat
_LEFT, _TOP, _ROW, _GAP, _LEGEND = 190, 64, 20, 66, 120


@dataclass(frozen=True)
class _Panel:
    """One number of every linear layer."""

    title: str
    value: Callable[[LinearReport], float | None]
    share: Callable[[float], float]
    """Where on the ramp a value is, 0 to 1."""
    label: str
    """How a value is written in its cell, as a format."""
    legend: Sequence[tuple[str, float]]
    """(Text, value) of a few shades."""


def _on_logarithms(low: float, high: float) -> Callable[[float], float]:
    return lambda value: math.log(max(value, 1e-12) / low) / math.log(high / low)


_PANELS = (
    _Panel(
        "Bits per weight, scales and permutations included",
        lambda layer: layer.bits_per_weight,
        lambda bits: (bits - _LOW_BITS) / (_HIGH_BITS - _LOW_BITS),
        ".2f",
        [(f"{bits} bits", bits) for bits in (2, 3, 4, 6, 8)],
    ),
    _Panel(
        "Relative output error, % (root mean square, on the calibration text)",
        lambda layer: 100 * layer.relative_error,
        _on_logarithms(_LOW_ERROR, _HIGH_ERROR),
        ".1f",
        [(f"{error:g} %", error) for error in (0.5, 2, 5, 20, 50)],
    ),
    _Panel(
        "Worth of the error, thousandths of a nat per token (what it adds to KL, estimated)",
        lambda layer: None if layer.nats is None else 1000 * layer.nats,
        _on_logarithms(_LOW_WORTH, _HIGH_WORTH),
        ".2g",
        [(f"{worth:g}", worth) for worth in (0.01, 0.1, 1, 10)],
    ),
)


def figure(layers: Sequence[LinearReport], title: str) -> str:
    """The SVG text: bits, errors and what these are worth, of every linear layer: a column for each layer, a row for each
    projection."""
    cells, rows, columns = _grid(layers)
    panels = [panel for panel in _PANELS if any(panel.value(layer) is not None for layer in layers)]
    width_of_cell = 42 if len(columns) <= 24 else 24 if len(columns) <= 48 else 14
    depth = _ROW * len(rows)
    width = max(_LEFT + width_of_cell * len(columns) + _LEGEND, 560)
    height = _TOP + len(panels) * (depth + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="11" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 24, title, size=15, weight="bold", color="#111"),
    ]
    for number, panel in enumerate(panels):
        top = _TOP + number * (depth + _GAP)
        parts.append(_text(16, top - 12, panel.title, size=12, weight="bold", color="#111"))
        for line, row in enumerate(rows):
            parts.append(_text(_LEFT - 8, top + _ROW * line + 14, row, anchor="end"))
        for place, column in enumerate(columns):
            if len(columns) <= 24 or place % 4 == 0:
                parts.append(_text(_LEFT + width_of_cell * (place + 0.5), top + depth + 16, column, anchor="middle"))
        for layer, line, place in cells:
            parts += _cell(panel, layer, _LEFT + width_of_cell * place, top + _ROW * line, width_of_cell)
        for step, (text, value) in enumerate(panel.legend):
            x, y = _LEFT + width_of_cell * len(columns) + 16, top + 16 * step
            parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_color(panel.share(value))}" stroke="#BBB"/>')
            parts.append(_text(x + 18, y + 10, text))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(panel: _Panel, layer: LinearReport, x: int, y: int, width: int) -> list[str]:
    value = panel.value(layer)
    if value is None:
        return []
    dark = panel.share(value)
    tip = f"<title>{escape(f'{layer.name}: {layer.layout}, {layer.bits_per_weight:.3f} bits')}</title>"
    box = f'x="{x}" y="{y}" width="{width - 1}" height="{_ROW - 1}" fill="{_color(dark)}"'
    parts = [f'<rect class="cell" {box}>{tip}</rect>']
    if width >= 30:
        ink = "#111" if dark < 0.55 else "white"
        parts.append(_text(x + width / 2, y + 14, format(value, panel.label), anchor="middle", size=9, color=ink))
    return parts


def _grid(layers: Sequence[LinearReport]) -> tuple[list[tuple[LinearReport, int, int]], list[str], list[str]]:
    """([(layer, row, column)], names of the rows, names of the columns)."""
    places = []
    for layer in layers:
        parts = layer.name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        # model.layers.3.self_attn.q_proj is self_attn.q_proj of column 3; lm_head is alone in its row and column.
        column = "head" if index is None else parts[index]
        row = layer.name if index is None else ".".join(parts[index + 1 :])
        places.append((layer, row, column))
    rows = list(dict.fromkeys(row for _, row, _ in places))
    columns = sorted({column for _, _, column in places}, key=natural_key)
    if "head" in columns:
        columns.append(columns.pop(columns.index("head")))
    return [(layer, rows.index(row), columns.index(column)) for layer, row, column in places], rows, columns


def _color(share: float) -> str:
    """Of the ramp, from its beginning at 0 to its end at 1."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    low, high = _RAMP[first], _RAMP[first + 1]
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02X}" for a, b in zip(low, high, strict=True))


def _text(
    x: float, y: float, content: str, *, anchor: str = "start", size: int = 11, weight: str = "normal", color: str = "#333"
) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'
