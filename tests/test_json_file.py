"""_json_file.py: what is read, what is refused and in which words, and what both may cost."""

import json
import os
import time
import tracemalloc

import pytest

from cupyq._json_file import parse_json, read_bytes, read_json, read_text
from cupyq.errors import FormatError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.json"


def refused(path, content=None, **options):
    """What is said of a file: after its name, before the hint."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_json(path, hint="mend it", **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith("; mend it") and message.isprintable()
    return message.removeprefix(f"{path}: ").removesuffix("; mend it")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 1, "b": [1.5, None, True, "ключ 😀"]},
        {"a": {"b": {"c": []}}},
        {"": -(10**300)},
        {"deep": [[[[]]]]},
        {"[": ['"[' * 500, "]"], "b": [[]] * 200},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_json_writes_is_read(path, value, ascii_only):
    path.write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8-sig")
    assert read_json(path, hint="") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType, expected a JSON object"),
        (b'{"a": NaN}', "not JSON (NaN is not JSON)"),
        (b'{"a": -Infinity}', "not JSON (-Infinity is not JSON)"),
        (b'{"a": 1e999}', "not JSON (1e999 is too large for a number)"),
        (b'{"a": -1e999}', "not JSON (-1e999 is too large for a number)"),
        (b'{"a": 1, "a": 2}', "not JSON (the key 'a' stands twice, with two values)"),
        (b'{"b": {"\\n": 1, "\\n": [2]}}', "not JSON (the key '\\n' stands twice, with two values)"),
        (b'{"a": "\\ud800"}', "not JSON that can be read (half a surrogate pair)"),
        (b'{"\\uDFFF": 1}', "not JSON that can be read (half a surrogate pair)"),
        (b'{"a": "\xff"}', "not UTF-8 (invalid start byte at byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 (invalid continuation byte at byte 7)"),
        (b'{"a": "two\nlines"}', "not JSON (Invalid control character at: line 1 column 11 (char 10))"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "not JSON that can be read (nested too deeply)"),
        (b"[" * 100_000, "not JSON that can be read (nested too deeply)"),
        (b'{"a":' * 100_000, "not JSON that can be read (nested too deeply)"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"[]]}", "1000003 lists and objects, expected at most 1000000"),
    ],
)
def test_what_is_refused(path, content, message):
    assert refused(path, content) == message


def test_nesting_has_one_limit(path):
    """Whatever may be read may be shown and compared, too."""
    path.write_bytes(b'{"a": ' + b"[" * 99 + b'"[\\"{"' + b"]" * 99 + b"}")
    value = read_json(path, hint="")
    assert value == json.loads(path.read_bytes()) and repr(value).count("[") == 100


def test_a_number_of_too_many_digits(path):
    assert refused(path, b'{"a": ' + b"9" * 10_000 + b"}").startswith("not JSON (Exceeds the limit (4300")


def test_a_key_that_says_the_same_twice(path):
    path.write_text('{"a": {"b": 1}, "a": {"b": 1.0}}')
    assert read_json(path, hint="") == {"a": {"b": 1}}


def test_what_is_no_regular_file(path, tmp_path):
    assert refused(path) == "cannot be opened (No such file or directory)"
    assert refused(tmp_path) == "cannot be opened (Is a directory)"
    with pytest.raises(FormatError, match=r"a\\x00: cannot be opened \(.*embedded null.*\); mend it"):
        read_json(tmp_path / "a\0", hint="mend it")
    assert refused(tmp_path / ("a" * 300)) == "cannot be opened (File name too long)"
    path.symlink_to(path)
    assert refused(path) == "cannot be opened (Too many levels of symbolic links)"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert refused(path) == "cannot be opened (not a regular file)"
    path.unlink()
    os.mkfifo(path)  # without a writer: opened, it would wait for one
    assert refused(path) == "cannot be opened (not a regular file)"


def test_sizes_are_bounded(path):
    assert refused(path, b'{"a": 1}' + b" " * 100, most_bytes=100) == "larger than 0 MiB, which no such file should be"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    tracemalloc.start()
    assert refused(path) == "larger than 16 MiB, which no such file should be"
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, most_bytes=10, hint="") == b"x" * 10


@pytest.mark.parametrize("entry", [b"[],", b"{},", b'"aaaa",', b"300,", b"1.5,", b'{"a":1},'])
def test_memory_is_bounded_by_the_size(path, entry):
    count = 50_000
    path.write_bytes(b'{"a": [' + entry * count + b"1]}")
    tracemalloc.start()
    read_json(path, hint="")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * path.stat().st_size, peak / path.stat().st_size


def test_text_and_where(path):
    path.write_text("\ufeffa\r\nb", encoding="utf-8")
    assert read_text(path, hint="") == "a\r\nb"
    with pytest.raises(FormatError, match="^a.jsonl: line 3: not JSON .*; one object each$"):
        parse_json("{", "a.jsonl: line 3", "one object each")
    assert parse_json("3", "", "") == 3


@pytest.mark.parametrize("piece", ['\\"', '"\\\\', '"', '"a', "[", '{"a":', '"[', "\\"])
def test_time_is_bounded_by_the_size(piece):
    """Texts that are no JSON, or that a scan might go over again and again."""
    begin = time.process_time()
    with pytest.raises(FormatError):
        parse_json("[" * 101 + piece * 300_000, "a", "")
    assert time.process_time() - begin < 2
