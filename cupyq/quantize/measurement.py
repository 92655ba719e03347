"""measurement.json: the error of every linear layer under the layouts of a menu, and the choice made from them.

    {"cupyq_measurement": 2, "source_sha256": ..., "unit": ..., "menu": [layout, ...], "linears": {name: {
        "tokens": that reached the layer, "output": mean square of its outputs, summed over them,
        "weight": what a unit of its error counts, "options": {layout: error}}}}

unit: of weight times error; "nats", what it adds to the KL of the predictions, or "share" of the mean square of the output. It
depends on the model and the calibration text, not on the bits asked for, and serves for any number of them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyq._json_file import read_json
from cupyq.errors import FormatError
from cupyq.quantize.allocate import allocate
from cupyq.quantize.gather import mean_square
from cupyq.quantize.hessian import Hessian
from cupyq.quantize.layouts import Layout
from cupyq.quantize.linear import quantize_linear
from cupyq.quantize.recording import LayerInput

_VERSION = 2
_UNITS = ("nats", "share")
_LEAST_ERROR, _MOST_NUMBER = 1e-300, 1e100  # whose logarithm exists, and products of which are finite
_MOST_LAYOUTS = 1000
MOST_BYTES = 64 << 20
"""Of a file of errors: four times those of 100 layers with 128 experts each."""
_DELETE = "delete it, and its part of the work is done again"
HINT = "take one that cupyq wrote, or leave it out"


@dataclass(frozen=True)
class Measurement:
    menu: tuple[Layout, ...]
    linears: Mapping[str, Mapping[str, Any]]
    unit: str
    source_sha256: str
    path: Path | None = None
    """Of the file it was read from."""

    @property
    def worths(self) -> dict[str, float]:
        """What a unit of error of each linear layer adds to the KL of the predictions, in nats; none where it is not known."""
        return {name: entry["weight"] for name, entry in self.linears.items()} if self.unit == "nats" else {}

    def allocate(self, names: Sequence[str], storage_bits: Callable[[str, Layout], int], budget: int) -> dict[str, Layout]:
        """{name: layout}, within `budget` bits the least sum of weighted errors; storage_bits(name, layout)."""
        options = [self._options(name, [storage_bits(name, layout) for layout in self.menu]) for name in names]
        found = allocate(options, budget)
        return {name: self.menu[choice] for name, choice in zip(names, found.choice, strict=True)}

    def _options(self, name: str, sizes: Sequence[int]) -> list[tuple[int, float]]:
        """(bits, weighted error) of each layout; the logarithms of errors that were not measured are interpolated."""
        entry = self.linears[name]
        errors = [entry["options"].get(layout.name) for layout in self.menu]
        known = sorted((bits, math.log(max(e, _LEAST_ERROR))) for bits, e in zip(sizes, errors, strict=True) if e is not None)
        places, logarithms = zip(*known, strict=True)
        filled = [
            math.exp(float(np.interp(bits, places, logarithms))) if error is None else error
            for bits, error in zip(sizes, errors, strict=True)
        ]
        return [(bits, entry["weight"] * error) for bits, error in zip(sizes, filled, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return {
            "cupyq_measurement": _VERSION,
            "source_sha256": self.source_sha256,
            "unit": self.unit,
            "menu": [layout.name for layout in self.menu],
            "linears": dict(self.linears),
        }

    @property
    def sha256(self) -> str:
        """Of what it says, however its file is written."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_file(cls, path: Path) -> "Measurement":
        """FormatError where the file is none, of another version, or damaged."""
        data = read_json(path, hint=HINT, most_bytes=MOST_BYTES)
        if data.get("cupyq_measurement") != _VERSION:
            raise FormatError(f"{path}: not a measurement of this version of cupyq: take a measurement.json that it wrote")
        try:
            menu = data["menu"]
            if not isinstance(menu, list) or len(menu) > _MOST_LAYOUTS or any(len(name) > 200 for name in menu):
                raise ValueError(f"menu is no list of at most {_MOST_LAYOUTS} layouts")
            found = cls(tuple(map(Layout.parse, menu)), data["linears"], data["unit"], data["source_sha256"], path)
            if found.unit not in _UNITS or not isinstance(found.source_sha256, str):
                raise ValueError(f"unit is {ascii(found.unit)[:60]}, source_sha256 {ascii(found.source_sha256)[:60]}")
            layouts = {layout.name for layout in found.menu}
            for name, entry in found.linears.items():
                check_numbers(name, [entry["weight"], *entry["options"].values()])
                if not entry["options"].keys() & layouts:
                    raise ValueError(f"{name} has no layout of the menu")
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise FormatError(f"{path}: damaged ({type(error).__name__}: {error}); leave it out to measure again") from None
        return found

    def check_names(self, names: Sequence[str]) -> None:
        """FormatError unless it is of these linear layers."""
        for found, place, expected in ((self.linears, "the model", set(names)), (names, "it", set(self.linears))):
            for name in found:
                if name not in expected:
                    what = f"measured on another model, or damaged: {name} is not in {place}"
                    raise FormatError(f"{self.path}: {what}; leave it out to measure this one")

    def check_source(self, source_sha256: str) -> None:
        """FormatError unless it is of a model with these weights."""
        if self.source_sha256 != source_sha256:
            raise FormatError(f"{self.path}: measured on a model of other weights: leave it out to measure this one")


def check_numbers(name: str, numbers: Iterable[Any]) -> None:
    """ValueError unless these are numbers from 0 on that can be calculated with."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= _MOST_NUMBER:
            raise ValueError(f"{name} has {ascii(number)[:60]}, expected numbers from 0 to {_MOST_NUMBER:g}")


def read_worths(path: Path, names: Sequence[str]) -> dict[str, float]:
    """What `sensitivity` found, of these linear layers, as an earlier process noted it."""
    found = read_json(path, hint=_DELETE)
    try:
        check_numbers("a layer", (found[name] for name in names))
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({type(error).__name__}: {error}); {_DELETE}") from None
    return {name: found[name] for name in names}


def read_errors(path: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `measure_input` found of a layer's linear layers, as an earlier process noted it."""
    found = read_json(path, hint=_DELETE, most_bytes=MOST_BYTES)
    try:
        for name, entry in found.items():
            check_numbers(name, [entry["tokens"], entry["output"], *entry["options"].values()])
        if set(found) != set(names):
            raise ValueError(f"of {', '.join(list(found)[:3]) or 'nothing'}, expected {', '.join(names[:3])}, ...")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({type(error).__name__}: {error}); {_DELETE}") from None
    return found


def measure_input(
    read: LayerInput, hessian: Hessian, tokens: int, menu: Sequence[Layout], count: int | None, damping: float
) -> dict[str, Any]:
    """{name: {"tokens", "output", "options"}} of the linear layers that share an input."""
    prepared = hessian.prepare(damping)
    found = {}
    for linear in read.linears:
        weight = linear.weight.T
        layouts = measured_layouts(menu, linear.k, linear.n, count)
        errors = {layout.name: quantize_linear(weight, prepared, layout, name=linear.name).error for layout in layouts}
        found[linear.name] = {"tokens": tokens, "output": mean_square(hessian, weight), "options": errors}
    return found


def measured_layouts(menu: Sequence[Layout], k: int, n: int, count: int | None) -> list[Layout]:
    """Which layouts to measure: all, or `count` of them, evenly spread over their sizes, from the smallest to the largest."""
    if count is None or count >= len(menu):
        return list(menu)
    by_size = sorted(menu, key=lambda layout: layout.storage_bits(k, n))
    return [by_size[i * (len(by_size) - 1) // (count - 1)] for i in range(count)]


def weighted(
    linears: Mapping[str, Mapping[str, Any]], total_tokens: int, sensitivities: Mapping[str, float] | None
) -> dict[str, dict[str, Any]]:
    """The entries of `measure_input` with "weight": what a unit of their error counts, for the tokens that reach them.

    An expert that none reached counts as if one had: others may, and bits that nobody misses are its own.
    sensitivities: KL of the predictions per unit of error (see `sensitivity`); None: errors count by their share of the output.
    """
    found = {}
    for name, entry in linears.items():
        count = 1 / entry["output"] if entry["output"] > 0 else 0.0
        if sensitivities is not None:
            count = sensitivities[name]
        found[name] = dict(entry, weight=count * (max(entry["tokens"], 1) / total_tokens))
    return found
