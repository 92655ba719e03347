"""Checked access to the keys of a JSON file; what does not fit is named with its file and key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from cupyq.errors import FormatError, UnsupportedError

REQUIRED = object()
"""The default of a key that must be there."""


class Keys:
    """Checked access to the keys of one JSON object; `prefix` names the object within the file.

    spelled: keys that the file has under another name.
    """

    def __init__(self, path: Path, data: Mapping[str, Any], prefix: str = "", spelled: Mapping[str, str] | None = None):
        self.path, self.data, self.prefix, self.spelled = path, data, prefix, spelled or {}

    def where(self, key: str) -> str:
        return f"{self.path}: {self.prefix}{self.spelled.get(key, key)}"

    def refuse(self, key: str, expected: str) -> NoReturn:
        if key not in self.data:
            raise FormatError(f"{self.where(key)}: missing, expected {expected}")
        raise FormatError(f"{self.where(key)}: found {show(self.data[key])}, expected {expected}")

    def unsupported(self, key: str, what: str) -> NoReturn:
        raise UnsupportedError(f"{self.where(key)}: {show(self.data[key])} is not supported; {what}")

    def has(self, key: str) -> bool:
        """Present and not null, which means the same as absent."""
        return self.data.get(key) is not None

    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        if not self.has(key) and default is not REQUIRED:
            return default
        value = self.data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, low: float = 0.0, high: float = 1e12) -> Any:
        """A finite number above `low`."""
        if not self.has(key) and default is not REQUIRED:
            return default
        value = self.data.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value <= high:
            self.refuse(key, f"a number above {low:g}, at most {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        if not isinstance(self.data[key], bool):
            self.refuse(key, "true or false")
        return self.data[key]

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        if not self.has(key) and default is not REQUIRED:
            return default
        value = self.data.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def within(self, key: str) -> "Keys":
        """The JSON object under a key; an empty one where it is absent."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "a JSON object or null")
        return Keys(self.path, value or {}, f"{self.prefix}{self.spelled.get(key, key)}.")


def show(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:70]}... ({len(text)} characters)"
