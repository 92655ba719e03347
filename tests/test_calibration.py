"""quantize/calibration.py: which tokens of a text become calibration rows, and what is said about files that will not do."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cupyq.errors import BackendError, FormatError, UnsupportedError
from cupyq.generate import encode, load_tokenizer
from cupyq.quantize import calibration
from cupyq.quantize.calibration import calibration_rows, spread

SHAKESPEARE = ROOT / "examples/models/shakespeare"
START = 20000


@pytest.fixture
def numbers(tmp_path):
    """A folder with a tokenizer that makes token i of the word i, and puts token 20000 before a text."""
    vocabulary = {str(i): i for i in range(START)} | {"<s>": START}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", START)])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def counting(path, count, separator=" "):
    path.write_text(separator.join(map(str, range(count))))
    return path


def places(rows):
    """Where each row begins in the text that counts; AssertionError unless it counts on from there."""
    first = rows[:, 0]
    assert np.array_equal(rows, first[:, None] + np.arange(rows.shape[1]))
    return first.tolist()


def test_each_row_is_a_window_in_its_part_of_the_text(tmp_path, numbers):
    path = counting(tmp_path / "text.txt", 1000)
    seen = set()
    for seed in range(20):
        rows = calibration_rows(path, numbers, rows=7, length=100, seed=seed)
        assert rows.dtype == np.int32 and rows.shape == (7, 100)
        for row, begin in enumerate(places(rows)):
            assert row * 1000 // 7 <= begin <= (row + 1) * 1000 // 7 - 100
            seen.add(begin - row * 1000 // 7)
        assert np.array_equal(rows, calibration_rows(path, numbers, rows=7, length=100, seed=seed))
    assert len(seen) > 25  # of 43 offsets, by 140 draws
    assert {0, 1, 2} & seen and {41, 42} & seen


def test_a_text_of_just_enough_tokens_is_taken_whole(tmp_path, numbers):
    path = counting(tmp_path / "text.txt", 700)
    assert np.array_equal(calibration_rows(path, numbers, rows=7, length=100, seed=3).reshape(-1), np.arange(700))
    assert places(calibration_rows(path, numbers, rows=1, length=700)) == [0]


def test_every_offset_is_drawn(tmp_path, numbers):
    path = counting(tmp_path / "text.txt", 4)
    assert {places(calibration_rows(path, numbers, rows=1, length=2, seed=seed))[0] for seed in range(20)} == {0, 1, 2}


def test_some_of_the_rows_are_spread_over_all():
    """The middle ones of equal parts: never twice the same, and as near to the first row as to the last."""
    rows = np.arange(100)[:, None]
    assert spread(rows, 2)[:, 0].tolist() == [25, 75] and spread(rows, 1)[:, 0].tolist() == [50]
    for total in range(1, 24):
        for count in range(1, total + 3):
            found = spread(np.arange(total), count)
            assert len(found) == min(count, total) == len(set(found.tolist()))
            gaps = np.diff([-1, *found, total])
            assert (np.diff(found) > 0).all() and abs(gaps[0] - gaps[-1]) <= 1 and gaps.max() - gaps[1:-1].min(initial=99) <= 1


def test_a_package_that_is_missing(tmp_path, numbers, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r"^calibration takes the package tokenizers, which is missing or damaged .*: pip install tokenizers$"
    with pytest.raises(BackendError, match=message):
        calibration_rows(counting(tmp_path / "text.txt", 700), numbers, rows=1, length=4)


def test_a_file_is_read_without_room_for_the_largest(tmp_path, numbers):
    path = counting(tmp_path / "text.txt", 700)
    tracemalloc.start()
    try:
        calibration_rows(path, numbers, rows=1, length=4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_text_too_short(tmp_path, numbers):
    path = counting(tmp_path / "text.txt", 699)
    with pytest.raises(ValueError, match=r"text.txt: 699 tokens, but 7 rows of 100 need 700: take a longer text"):
        calibration_rows(path, numbers, rows=7, length=100)
    path.write_text("")
    with pytest.raises(ValueError, match="0 tokens, but 1 rows of 1 need 1"):
        calibration_rows(path, numbers, rows=1, length=1)
    path = path.with_suffix(".jsonl")
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="0 tokens, but"):
        calibration_rows(path, numbers, rows=1, length=1)


def test_windows_of_a_real_text():
    text = (SHAKESPEARE / "val.txt").read_bytes().decode()
    ids = encode(load_tokenizer(SHAKESPEARE), text, special=False)
    rows = calibration_rows(SHAKESPEARE / "val.txt", SHAKESPEARE, rows=8, length=512, seed=1)
    whole = np.array(ids, np.int32)
    for number, row in enumerate(rows):
        begin, end = number * len(ids) // 8, (number + 1) * len(ids) // 8
        assert any(np.array_equal(whole[at : at + 512], row) for at in range(begin, end - 511))
    other = calibration_rows(SHAKESPEARE / "val.txt", SHAKESPEARE, rows=8, length=512, seed=2)
    assert not np.array_equal(rows, other)


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_follow_each_other_with_their_special_tokens(tmp_path, numbers):
    path = tmp_path / "text.jsonl"
    texts = [" ".join(map(str, range(10 * i, 10 * i + 10))) for i in range(6)]
    lines = [json.dumps({"text": text, "id": 1}) for text in texts]
    path.write_bytes("\r\n".join([*lines[:3], "", *lines[3:], ""]).encode())
    expected = [token for i in range(6) for token in [START, *range(10 * i, 10 * i + 10)]]
    rows = calibration_rows(path, numbers, rows=2, length=33)
    assert rows.reshape(-1).tolist() == expected


def test_a_text_file_gets_no_special_tokens(tmp_path, numbers):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff1 2 3\r\n4".encode())  # a byte order mark is none of the text
    assert calibration_rows(path, numbers, rows=1, length=4).tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="4 tokens, but"):
        calibration_rows(path, numbers, rows=1, length=5)


def test_a_unicode_line_separator_ends_no_line(tmp_path, numbers):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "1\u20282\x85" + "3"}, ensure_ascii=False), encoding="utf-8")
    assert calibration_rows(path, numbers, rows=1, length=4).tolist() == [[START, 1, 2, 3]]


# --- long texts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """Characters that were tokenized, one number for each time."""
    counts = []

    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def encode_batch(self, texts, add_special_tokens):
            counts.append(sum(map(len, texts)))
            return self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(calibration, "load_tokenizer", lambda folder: Counting(load_tokenizer(folder)))
    return counts


def test_of_a_long_text_evenly_spread_pieces_are_tokenized(tmp_path, numbers, encoded):
    path = counting(tmp_path / "text.txt", START, separator="\n")
    rows = calibration_rows(path, numbers, rows=5, length=16)
    assert len(encoded) == 1 and 32 * 5 * 16 <= encoded[0] < 1.2 * 32 * 5 * 16 < path.stat().st_size / 20
    # A window may run on from one piece into the next, but never count badly within a piece.
    assert np.count_nonzero(np.diff(rows, axis=1) != 1) <= 5
    assert all(abs(row[0] - number * START / 5) < START / 5 for number, row in zip(np.arange(5) + 0.5, rows, strict=True))
    assert np.array_equal(rows, calibration_rows(path, numbers, rows=5, length=16))


def test_of_many_documents_evenly_spread_ones_are_tokenized(tmp_path, numbers, encoded):
    path = tmp_path / "text.jsonl"
    documents = [{"text": " ".join(map(str, range(10 * i, 10 * i + 10)))} for i in range(2000)]
    path.write_text("\n".join(map(json.dumps, documents)))
    rows = calibration_rows(path, numbers, rows=5, length=11)
    assert len(encoded) == 1 and encoded[0] < path.stat().st_size / 20
    for number, row in zip(np.arange(5) + 0.5, rows, strict=True):
        assert np.all(np.abs(row[row != START] - number * START / 5) < START / 5)


def test_a_text_of_long_tokens_is_tokenized_whole(tmp_path, numbers, encoded):
    """Where words are so long that the pieces are too little."""
    path = tmp_path / "text.txt"
    path.write_text((" " * 100).join(map(str, range(100))))
    rows = calibration_rows(path, numbers, rows=2, length=50)
    assert len(encoded) == 2 and rows.reshape(-1).tolist() == list(range(100))
    with pytest.raises(ValueError, match="100 tokens, but 2 rows of 51 need 102"):
        calibration_rows(path, numbers, rows=2, length=51)


def test_pieces_are_the_text():
    text = "".join(f"{'x' * (i % 23)}\n" for i in range(200)) + "y" * 95 + "\n\n" + "z"
    pieces = calibration._pieces(text, 20)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 20
    assert sum(not piece.endswith("\n") for piece in pieces) < 40
    assert calibration._pieces("", 20) == []


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.parquet", "text", "text.TXT"])
def test_other_kinds_of_files(tmp_path, numbers, name):
    counting(tmp_path / name, 10)
    with pytest.raises(UnsupportedError, match=r"a text must be a \.txt or a \.jsonl file, not") as found:
        calibration_rows(tmp_path / name, numbers, rows=1, length=1)
    assert "\n" not in str(found.value) and name in str(found.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"line 2: not JSON \(.*\); each line must be one object"),
        ("[" * 100000, r"line 2: not JSON that can be read \(nested too deeply\)"),
        ('"text"', "line 2 is a str, expected an object with a string as its 'text'"),
        ('{"content": "a", "id": 1}', "line 2 is an object with the keys 'content', 'id', expected an object"),
        ("{}", r"line 2 is an object with the keys \(none\), expected an object"),
        ('{"text": 7}', "line 2 is an object with a int as its 'text'"),
        ('{"text": null}', "line 2 is an object with a NoneType as its 'text'"),
        (r'{"text": "\ud800"}', r"line 2: not JSON that can be read \(half a surrogate pair\)"),
        ('{"text": "a", "text": "b"}', "line 2: not JSON .the key 'text' stands twice, with two values"),
    ],
)
def test_lines_that_are_no_documents(tmp_path, numbers, line, message):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "1 2"}\n' + line + "\n")
    with pytest.raises(FormatError, match=message) as found:
        calibration_rows(path, numbers, rows=1, length=1)
    assert str(path) in str(found.value) and "\n" not in str(found.value) and len(str(found.value)) < 500


def test_files_that_cannot_be_read(tmp_path, numbers, monkeypatch):
    path = tmp_path / "text.txt"
    with pytest.raises(FormatError, match=r"text.txt: cannot be opened \(No such file or directory\)"):
        calibration_rows(path, numbers, rows=1, length=1)
    path.write_bytes(b"1 2 \xff")
    with pytest.raises(FormatError, match=r"text.txt: not UTF-8 \(invalid start byte at byte 4\); name a .txt"):
        calibration_rows(path, numbers, rows=1, length=1)
    counting(path, 10)
    with pytest.raises(FormatError, match=r"tokenizer.json: missing"):
        calibration_rows(path, tmp_path, rows=1, length=1)
    monkeypatch.setattr(calibration, "_MOST_BYTES", 18)
    with pytest.raises(
        FormatError, match="text.txt: larger than 0 MiB, which no such file should be; name a .txt or .jsonl file, or a part"
    ):
        calibration_rows(path, numbers, rows=1, length=1)
    monkeypatch.setattr(calibration, "_MOST_BYTES", 19)
    assert calibration_rows(path, numbers, rows=1, length=10).tolist() == [list(range(10))]


@pytest.mark.parametrize(
    "sizes, kind", [((0, 1), ValueError), ((1, -1), ValueError), ((True, 1), TypeError), ((1, 1.0), TypeError)]
)
def test_rows_and_length_are_counts(tmp_path, numbers, sizes, kind):
    with pytest.raises(kind, match="(rows|length) must be (1 or more|a whole number), got"):
        calibration_rows(counting(tmp_path / "text.txt", 10), numbers, rows=sizes[0], length=sizes[1])
