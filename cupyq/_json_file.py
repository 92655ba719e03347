"""Small files that are read whole: text, and JSON objects. Nothing in them is trusted.

Whatever is wrong becomes a one-line FormatError that names the file. A file takes at most some 25 times its size in memory
while it is read, and no more than its reader's limit is read of it; pipes and devices are not opened.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cupyq.errors import FormatError

MAX_BYTES = 16 << 20
"""Of a file of settings; published ones stay below 1 MiB, tokenizers' below 10."""
MOST_DEPTH = 100
"""Of lists and objects: far from where Python gives up, as repr() and == do, too."""
_MOST_BRACKETS = 1_000_000  # objects and lists take the most memory for their bytes
_STRING = re.compile(r'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)  # or what is left of one: no place is looked at twice
_OPENING, _CLOSING = np.frombuffer(b"[{", np.uint8), np.frombuffer(b"]}", np.uint8)


def read_bytes(path: Path, *, most_bytes: int, hint: str) -> bytes:
    """All bytes of a regular file. hint: what to do where it cannot be opened; it ends the message."""
    try:
        # Looked at before it is opened: opening a pipe would wait for a writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            reason = "Is a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise FormatError(f"{path}: cannot be opened ({reason}); {hint}")
        with open(path, "rb") as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, most_bytes) + 1)
    except FormatError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{path}: cannot be opened ({reason}); {hint}") from None
    if len(raw) > most_bytes:
        size = f"{most_bytes >> 20} MiB" if most_bytes < 1 << 30 else f"{most_bytes >> 30} GiB"
        raise FormatError(f"{path}: larger than {size}, which no such file should be; {hint}")
    return raw


def read_text(path: Path, *, hint: str, most_bytes: int = MAX_BYTES) -> str:
    """All text of a file in UTF-8, without the mark that may begin it."""
    raw = read_bytes(path, most_bytes=most_bytes, hint=hint)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); {hint}") from None


def read_json(path: Path, *, hint: str, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Beyond what JSON itself says: no number that a float cannot hold, no half of a surrogate pair, no key that stands twice with
    two values, nothing nested more than 100 deep.
    """
    data = parse_json(read_text(path, hint=hint, most_bytes=most_bytes), str(path), hint)
    if not isinstance(data, dict):
        raise FormatError(f"{path}: holds a {type(data).__name__}, expected a JSON object; {hint}")
    return data


def parse_json(text: str, where: str, hint: str) -> Any:
    """The value of a JSON text, as `read_json` reads them; `where` begins messages, `hint` ends them."""
    brackets = text.count("[") + text.count("{")
    if brackets > _MOST_BRACKETS:
        raise FormatError(f"{where}: {brackets} lists and objects, expected at most {_MOST_BRACKETS}; {hint}")
    try:
        if brackets > MOST_DEPTH and _depth(text) > MOST_DEPTH:
            raise RecursionError
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise FormatError(f"{where}: not JSON that can be read (nested too deeply); {hint}") from None
    except UnicodeEncodeError:
        raise FormatError(f"{where}: not JSON that can be read (half a surrogate pair); {hint}") from None
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error}); {hint}") from None
    return data


def _depth(text: str) -> int:
    """How deeply lists and objects are nested."""
    raw = np.frombuffer(_STRING.sub("", text).encode("ascii", "replace"), np.uint8)
    steps = np.isin(raw, _OPENING).astype(np.int32) - np.isin(raw, _CLOSING)
    return int(np.cumsum(steps).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key[:80]!r} stands twice, with two values")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value
