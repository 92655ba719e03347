"""The LoRA adapters a model has loaded, and what a caller says about which rows use them."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cupyq.errors import FormatError
from cupyq.layers.linear import Linear
from cupyq.layers.lora import Adapter, LoraWeights, LowRank, Selection

_KEPT_SELECTIONS = 64
_MOST = float(np.finfo(np.float32).max)


class AdapterTable:
    """Names to columns of a Selection's weights. A column that an unloaded adapter leaves is given to the next one."""

    def __init__(self, xp: Any):
        self._xp = xp
        self._columns: dict[str, int] = {}
        # Asked for at every step: made once, so that a step copies nothing from the host.
        self._selections: dict[tuple, Selection] = {}

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def load(
        self,
        folder: str | os.PathLike[str],
        name: str | None,
        scaling: float,
        linears: Mapping[str, Linear],
        arrays_of: Callable[[str, Linear, LowRank], tuple[np.ndarray, np.ndarray]],
    ) -> str:
        """Add an adapter's part to each Linear it changes; all or, where an error is raised, none of them.

        linears: by projection. arrays_of: (projection, Linear, what the file has for it) -> a and b for that Linear.
        """
        adapter = Adapter.from_peft(folder, scaling)
        name = adapter.name if name is None else name
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        if not name or name in self._columns:
            raise ValueError(f"name must be one that no loaded adapter has, got {name!r}; loaded: {self._listed()}")
        column = next(i for i in range(len(self._columns) + 1) if i not in self._columns.values())
        changed: list[tuple[Linear, LoraWeights]] = []
        for projection, pair in adapter.projections.items():
            linear = linears.get(projection)
            if linear is None:
                raise FormatError(
                    f"{pair.path}: tensor {pair.name_a!r}: the model has no linear layer {projection!r}; the adapter was "
                    "trained on another model"
                )
            a, b = (self._xp.asarray(array) for array in arrays_of(projection, linear, pair))
            weights = LoraWeights.of(a, b, column)
            changed.append((linear, weights if linear.lora is None else linear.lora.joined(weights)))
        for linear, weights in changed:
            linear.lora = weights
        self._columns[name] = column
        self._selections.clear()
        return name

    def unload(self, name: str, linears: Mapping[str, Linear]) -> None:
        """Take an adapter's part from every Linear."""
        column = self._column(name)
        for linear in linears.values():
            if linear.lora is not None and column in linear.lora.adapters:
                linear.lora = linear.lora.without(column)
        del self._columns[name]
        self._selections.clear()

    def select(self, adapters: Any, batch: int) -> Selection | None:
        """The Selection for what a caller passed as `adapters` (see Model.forward); None where no row uses any."""
        if isinstance(adapters, list):
            if len(adapters) != batch:
                raise ValueError(
                    f"adapters: a list of {len(adapters)}, expected {batch}, one choice for each row of ids; name several "
                    "adapters for all rows in a tuple or a dict"
                )
            rows = [self._choice(choice) for choice in adapters]
        else:
            rows = [self._choice(adapters)]
        if all(row == rows[0] for row in rows):
            rows = rows[:1]
        key = tuple(rows)
        if not any(key):
            return None
        selection = self._selections.get(key)
        if selection is None:
            weights = np.zeros((len(rows), max(self._columns.values()) + 1), np.float32)
            for request, row in enumerate(rows):
                for column, weight in row:
                    weights[request, column] = weight
            active = frozenset(np.flatnonzero(weights.any(axis=0)).tolist())
            selection = Selection(self._xp.asarray(weights), active)
            if len(self._selections) >= _KEPT_SELECTIONS:
                self._selections.clear()
            self._selections[key] = selection
        return selection

    def _choice(self, choice: Any) -> tuple[tuple[int, float], ...]:
        """((column, weight), ...) in order of None, a name, a tuple of names, or a dict of names and weights."""
        if choice is None:
            return ()
        if isinstance(choice, str):
            return ((self._column(choice), 1.0),)
        if isinstance(choice, tuple):
            if len({self._column(name) for name in choice}) != len(choice):
                raise ValueError(f"adapters: {choice!r} names an adapter twice: give it a weight, as in {{name: 2.0}}")
            choice = dict.fromkeys(choice, 1.0)
        if not isinstance(choice, dict):
            found = type(choice).__name__
            raise TypeError(f"adapters: a choice is None, a name, a tuple of names or a dict of names and weights, got {found}")
        weights = {}
        for name, weight in choice.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer, np.floating)):
                raise TypeError(f"adapters: the weight of {name!r} must be a number, got {type(weight).__name__}")
            if not math.isfinite(weight) or abs(weight) > _MOST:
                raise ValueError(f"adapters: the weight of {name!r} must be a finite float32, got {weight}")
            weights[self._column(name)] = float(weight)
        return tuple(sorted((column, weight) for column, weight in weights.items() if weight != 0))

    def _column(self, name: Any) -> int:
        if not isinstance(name, str):
            raise TypeError(f"adapters: the name of an adapter is a str, got {type(name).__name__}")
        if name not in self._columns:
            raise ValueError(f"no adapter {name!r} is loaded; loaded: {self._listed()}")
        return self._columns[name]

    def _listed(self) -> str:
        return ", ".join(map(repr, self._columns)) or "none"
