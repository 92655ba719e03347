"""A checkpoint whose tensors go by other names."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile, TensorInfo


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """What regular expressions and their replacements, used in order, make of a name."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


class RenamedCheckpoint:
    """A Checkpoint by the names that `renamed` makes of its own.

    FormatError where two tensors would have one name.
    """

    def __init__(self, checkpoint: Checkpoint, rules: Sequence[tuple[str, str]]):
        self._checkpoint = checkpoint
        self._stored: dict[str, str] = {}
        for stored in checkpoint.names:
            name = renamed(stored, rules)
            other = self._stored.setdefault(name, stored)
            if other != stored:
                path = checkpoint.file(stored).path
                raise FormatError(f"{path}: tensors {other!r} and {stored!r} are both the model's {name!r}; remove one of them")

    @property
    def folder(self) -> Path:
        return self._checkpoint.folder

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._stored)

    def stored_name(self, name: str) -> str:
        """The name in the file; `name` itself where there is no such tensor."""
        return self._stored.get(name, name)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def file(self, name: str) -> SafetensorsFile:
        return self._checkpoint.file(self.stored_name(name))

    def info(self, name: str) -> TensorInfo:
        return self._checkpoint.info(self.stored_name(name))

    def array(self, name: str) -> np.ndarray:
        return self._checkpoint.array(self.stored_name(name))

    def read_piece(self, name: str, begin: int, buffer: Any) -> None:
        self._checkpoint.read_piece(self.stored_name(name), begin, buffer)

    def total_bytes(self, names: Iterable[str]) -> int:
        return self._checkpoint.total_bytes(self.stored_name(name) for name in names)
