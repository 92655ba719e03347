"""Calibration rows: windows of token ids, evenly spread over a text."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyq._json_file import parse_json, read_text
from cupyq.errors import BackendError, FormatError, UnsupportedError
from cupyq.generate.text import load_tokenizer
from cupyq.ops._common import whole_number

_MOST_BYTES = 1 << 30
_PIECE_CHARACTERS = 16  # for each token of a window: mostly some four windows
_PIECES_PER_ROW = 2


def calibration_rows(
    path: str | os.PathLike[str], tokenizer_folder: str | os.PathLike[str], *, rows: int, length: int, seed: int = 0
) -> np.ndarray:
    """int32 [rows, length]: the i-th row is a window somewhere in the i-th of `rows` equal parts of the text's tokens.

    path: a .txt file, UTF-8, or a .jsonl file, of which each line is an object with the key "text". tokenizer_folder: with
    the model's tokenizer.json. seed: where in its part each window begins. Windows never overlap, and run on from one
    document of a .jsonl file into the next; such documents get the special tokens that the tokenizer puts round a text, a
    .txt file, which windows mostly begin in the middle of, gets none.
    Of a text far longer than the rows, evenly spread pieces stand for all: documents, or a .txt file cut between lines.
    The same file, tokenizer and arguments give the same rows.
    FormatError names the file, and its line, that cannot be read; UnsupportedError: a file of another kind; BackendError: no
    package tokenizers; ValueError: a text with fewer than rows * length tokens.
    """
    rows, length = whole_number(rows, "rows", 1), whole_number(length, "length", 1)
    path = Path(path)
    enough = _PIECES_PER_ROW * _PIECE_CHARACTERS * rows * length
    documents, special = _read_documents(path, enough, _PIECE_CHARACTERS * length)
    tokens = _tokens(documents, _tokenizer(tokenizer_folder), special, enough, rows * length)
    if len(tokens) < rows * length:
        raise ValueError(
            f"{path}: {len(tokens)} tokens, but {rows} rows of {length} need {rows * length}: take a longer text, fewer rows "
            "or shorter ones"
        )
    return _windows(tokens, rows, length, seed)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows: the middle one of each of so many equal parts; all rows where there are no more."""
    if count >= len(rows):
        return rows
    return rows[[(2 * part + 1) * len(rows) // (2 * count) for part in range(count)]]


def _windows(tokens: np.ndarray, rows: int, length: int, seed: int) -> np.ndarray:
    bounds = np.array([row * len(tokens) // rows for row in range(rows + 1)])
    room = np.diff(bounds) - length
    # A product of plain uniform numbers: their stream is the same in every NumPy release.
    offsets = (np.random.Generator(np.random.PCG64(seed)).random(rows) * (room + 1)).astype(np.int64)
    return tokens[(bounds[:-1] + offsets)[:, None] + np.arange(length)]


def _tokenizer(folder: str | os.PathLike[str]) -> Any:
    try:
        return load_tokenizer(folder)
    except ImportError as error:
        raise BackendError(
            f"calibration takes the package tokenizers, which is missing or damaged ({error}): pip install tokenizers"
        ) from None


def _tokens(documents: Sequence[str], tokenizer: Any, special: bool, enough: int, needed: int) -> np.ndarray:
    """Token ids, int32, of the documents one after another, or of evenly spread ones with `enough` characters."""
    share = -(-len(documents) * enough // max(sum(map(len, documents)), 1))
    for kept in (min(share, len(documents)), len(documents)):
        chosen = [documents[index * len(documents) // kept] for index in range(kept)]
        encodings = tokenizer.encode_batch(chosen, add_special_tokens=special)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        tokens = np.concatenate(ids) if ids else np.empty(0, np.int32)
        if len(tokens) >= needed:
            break  # else tokens are so long that a part is too little
    return tokens


# --- files ------------------------------------------------------------------------------------------------------------


def _read_documents(path: Path, enough: int, piece: int) -> tuple[list[str], bool]:
    """The texts of a file in order, and whether each is a whole one, which special tokens belong to.

    A .txt file is one text, or pieces of `piece` characters if it has more than `enough`.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UnsupportedError(
            f"{path}: a text must be a .txt or a .jsonl file, not {path.suffix or 'a file without an ending'}; "
            'write it as JSON lines, {"text": ...} each'
        )
    text = read_text(path, hint="name a .txt or .jsonl file, or a part of it", most_bytes=_MOST_BYTES)
    if path.suffix == ".jsonl":
        return [_text_of(line, path, number) for number, line in _lines(text) if not line.isspace()], True
    return [text] if len(text) <= enough else _pieces(text, piece), False


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of all but empty ones, one in memory at a time."""
    number, begin = 1, 0
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        if end > begin:
            yield number, text[begin:end]
        number, begin = number + 1, end + 1


def _text_of(line: str, path: Path, number: int) -> str:
    entry = parse_json(line, f"{path}: line {number}", "each line must be one object")
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        found = f"a {type(entry).__name__}"
        if isinstance(entry, dict):
            found = f"an object with the keys {', '.join(map(repr, entry)) or '(none)'}"
            if "text" in entry:
                found = f"an object with a {type(text).__name__} as its 'text'"
        raise FormatError(f"{path}: line {number} is {found[:200]}, expected an object with a string as its 'text'")
    return text


def _pieces(text: str, size: int) -> list[str]:
    """The text in pieces of at most so many characters, which end with a line where one ends."""
    pieces, begin = [], 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + size) + 1 or begin + size
        pieces.append(text[begin:end])
        begin = end
    return pieces
