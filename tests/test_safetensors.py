"""The safetensors reader: files of the reference writer, hostile files, random damage, and the progress bar."""

import gc
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import same_bits

from cupyq._progress import progress
from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile, TensorInfo

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "examples" / "models"


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header, data=b"", length=None):
    """A file with this header: a dict, or text, or bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def write(folder, *arguments, name="file.safetensors", **keywords):
    path = folder / name
    path.write_bytes(file_bytes(*arguments, **keywords))
    return path


def refused(path):
    """The message with which a file is refused: one line that starts with the path."""
    with pytest.raises(FormatError) as caught:
        with SafetensorsFile(path) as file:
            for name in file.names:
                file.array(name)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and len(message) < 700
    return message


NATIVE = [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.float16, np.uint32, np.int32, np.float32]
NATIVE += [np.uint64, np.int64, np.float64]


def test_files_of_the_reference_writer(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {np.dtype(dtype).name: rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in NATIVE}
    tensors |= {"scalar": np.array(2.5), "none": np.zeros((0, 4), np.float16), "": np.ones(1), "ключ\n": np.zeros(2)}
    path = tmp_path / "all.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"a": "b"})
    with SafetensorsFile(path) as file:
        assert set(file.names) == set(tensors) and file.metadata == {"a": "b"}
        for name, expected in tensors.items():
            assert name in file
            assert same_bits(file.array(name), expected)
            info = file.info(name)
            assert info == TensorInfo(name, expected.dtype, expected.shape, info.start, info.start + expected.nbytes)
            assert path.read_bytes()[info.start : info.end] == expected.tobytes() and info.nbytes == expected.nbytes
        assert "other" not in file


SMALL_FLOATS = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_floats_numpy_lacks(tmp_path, dtype):
    expected = np.array([[0.5, -1, 2], [3, -448, 0.0]]).astype(SMALL_FLOATS[dtype])
    path = write(tmp_path, {"t": entry(dtype, [2, 3], 0, expected.nbytes)}, expected.tobytes())
    with SafetensorsFile(path) as file:
        assert same_bits(file.array("t"), expected)


def test_arrays_are_read_only_views_that_outlive_the_file(tmp_path):
    header = json.dumps({"t": entry("F32", [1000], 0, 4000)})
    path = write(tmp_path, header + " " * (-len(header) % 8), bytes(4000))
    with open(path, "r+b") as writer:
        with SafetensorsFile(path) as file:
            first, second = file.array("t"), file.array("t")
            assert np.shares_memory(first, second)
        start = path.stat().st_size - 4000
        writer.seek(start)
        writer.write(np.float32(7).tobytes())
        writer.flush()
        assert first[0] == 7, "a view shows what is in the file"
    assert not first.flags.writeable
    with pytest.raises(ValueError):
        first[0] = 1
    with pytest.raises(ValueError, match="the file was closed; open it again"):
        file.array("t")
    with pytest.raises(ValueError, match="the file was closed"):
        file.read_into("t", bytearray(4000))


def test_misaligned_data_is_copied(tmp_path):
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9), "c": entry("F64", [0], 9, 9)}
    values = np.array([1.5, -2], np.float32)
    for padding in range(8):
        text = json.dumps(header) + " " * padding
        with SafetensorsFile(write(tmp_path, text, b"\x05" + values.tobytes())) as file:
            array = file.array("b")
            assert array.flags.aligned and not array.flags.writeable and same_bits(array, values)
            assert file.array("a").tolist() == [5] and file.array("c").shape == (0,)


def test_smallest_file_and_zero_sizes(tmp_path):
    with SafetensorsFile(write(tmp_path, {})) as file:
        assert file.names == () and file.metadata == {}
    header = {"b": entry("F16", [0, 2**61], 4, 4), "a": entry("F32", [], 0, 4), "c": entry("I8", [2, 0, 3], 0, 0)}
    with SafetensorsFile(write(tmp_path, header, bytes(4))) as file:
        shapes = {name: file.array(name).shape for name in file.names}
    assert shapes == {"b": (0, 2**61), "a": (), "c": (2, 0, 3)}


OPEN_ERRORS = [
    (b"", "0 bytes long"),
    (b"1234567", "7 bytes long"),
    ((-1).to_bytes(8, "little", signed=True) + b"{}", "header length 18446744073709551615, expected at most 100000000"),
    ((2**63).to_bytes(8, "little") + b"{}", "header length 9223372036854775808"),
    (file_bytes("{}", length=100_000_001), "header length 100000001, expected at most 100000000"),
    (file_bytes("{}", length=3), "header length 3, expected 2 to 2 in a file of 10 bytes"),
    (file_bytes("{}", length=1), "header length 1, expected 2"),
    (file_bytes("{}", length=0), "header length 0"),
    (b"PK\x03\x04 a zip file of pickles", "header length"),
    (file_bytes("[]"), r"header starts with b'\[', expected '{'"),
    (file_bytes(" {}"), "header starts with b' '"),
    (file_bytes(b"\xef\xbb\xbf{}"), "header starts with"),
    (file_bytes(b'{"\xff":1}'), "header is not UTF-8 at byte 10"),
    (file_bytes("{'a':1}"), "header is not JSON"),
    (file_bytes('{"a":'), "header is not JSON"),
    (file_bytes("{}x"), "header is not JSON"),
    (file_bytes('{"a":NaN}'), r"header is not JSON \(NaN"),
    (file_bytes('{"a":' + "9" * 10_000 + "}"), "header is not JSON"),
    (file_bytes('{"a":' + "[" * 200_000), "header JSON is nested too deeply"),
    (file_bytes('{"a":' * 200_000), "header JSON is nested too deeply"),
    (file_bytes('{"a":{},"a":{}}'), "tensor 'a': the header names it twice"),
    (file_bytes('{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}'), "tensor 'dtype': .* twice"),
    (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ in the header is not a map of strings"),
    (file_bytes({"__metadata__": [1]}), "__metadata__ in the header is not a map of strings"),
    (file_bytes({}, b"x"), "1 bytes follow the last tensor, expected none"),
]


@pytest.mark.parametrize(("content", "message"), OPEN_ERRORS, ids=[message[:40] for _, message in OPEN_ERRORS])
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert re.search(message, refused(path))


ENTRY_ERRORS = [
    (1, "header entry is not a JSON object"),
    ([], "header entry is not a JSON object"),
    (None, "header entry is not a JSON object"),
    ({}, "header entry lacks 'dtype'"),
    ({"dtype": "F32", "shape": [2]}, "header entry lacks 'data_offsets'"),
    ({"dtype": "F32", "data_offsets": [0, 8]}, "header entry lacks 'shape'"),
    (entry("F31", [2], 0, 8), "dtype 'F31', expected one of BOOL, "),
    (entry("f32", [2], 0, 8), "dtype 'f32', expected one of"),
    (entry(["F32"], [2], 0, 8), "dtype ['F32'], expected one of"),
    (entry({"F32": 1}, [2], 0, 8), "dtype {...}, expected one of"),
    (entry(None, [2], 0, 8), "dtype None"),
    (entry("F32", 2, 0, 8), "shape 2, expected a list"),
    (entry("F32", {"0": 2}, 0, 8), "shape {...}, expected a list"),
    (entry("F32", [-2], 0, 8), "shape [-2], expected sizes from 0"),
    (entry("F32", [-1, -2], 0, 8), "shape [-1, -2], expected sizes"),
    (entry("F32", [2.0], 0, 8), "shape [2.0], expected sizes"),
    (entry("F32", [True, 2], 0, 8), "shape [True, 2], expected sizes"),
    (entry("F32", ["2"], 0, 8), "shape ['2'], expected sizes"),
    (entry("F32", [None], 0, 8), "shape [None], expected sizes"),
    (entry("F32", [[2]], 0, 8), "shape [[...]], expected sizes"),
    (entry("F32", [1] * 33, 0, 8), "expected a list of at most 32 sizes"),
    (entry("F32", [10**4000], 0, 8), "characters)], expected sizes from 0 to 2^63 - 1"),
    (entry("F32", [2**63], 0, 8), "expected sizes from 0 to 2^63 - 1"),
    (entry("F32", [2**62], 0, 8), "passes 2^63 bytes"),
    (entry("F32", [0, 2**62], 0, 0), "passes 2^63 bytes"),
    (entry("U8", [2**32, 2**32], 0, 0), "passes 2^63 bytes"),
    (entry("U8", [2**32 + 1] * 2, 0, 8), "passes 2^63 bytes"),
    (entry("F32", [3], 0, 8), "data_offsets span 8 bytes, but shape [3] of F32 takes 12"),
    (entry("F16", [2], 0, 8), "data_offsets span 8 bytes, but shape [2] of F16 takes 4"),
    (entry("F32", [], 0, 8), "data_offsets span 8 bytes, but shape [] of F32 takes 4"),
    (entry("F32", [0], 0, 8), "data_offsets span 8 bytes, but shape [0] of F32 takes 0"),
    (entry("F32", [2], 0, 12), "data_offsets [0, 12], expected 0 <= begin <= end <= 8"),
    (entry("F32", [2], 8, 0), "data_offsets [8, 0], expected"),
    (entry("F32", [2], -8, 0), "data_offsets [-8, 0], expected"),
    (entry("F32", [2], 2**70, 2**70 + 8), "data_offsets [1180591620717411303424, "),
    (entry("F32", [2], 0.0, 8), "data_offsets [0.0, 8], expected two whole numbers"),
    (entry("F32", [2], False, 8), "data_offsets [False, 8], expected two whole numbers"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [8]}, "data_offsets [8], expected two whole numbers"),
    ({"dtype": "F32", "shape": [2], "data_offsets": "08"}, "data_offsets '08', expected two whole numbers"),
    ({"dtype": "F32", "shape": [2], "data_offsets": {"0": 8}}, "data_offsets {...}, expected two whole numbers"),
    (entry("F32", [1], 4, 8), "a hole of 4 bytes lies before it"),
    (entry("BOOL", [8], 0, 8), "BOOL data holds the byte 255, expected 0 or 1"),
]


@pytest.mark.parametrize(("value", "message"), ENTRY_ERRORS, ids=[message[:40] for _, message in ENTRY_ERRORS])
def test_damaged_entries(tmp_path, value, message):
    found = refused(write(tmp_path, {"layer.weight": value}, b"\xff" * 8))
    assert "tensor 'layer.weight': " in found and message in found


LAYOUT_ERRORS = [
    ({"a": entry("U8", [5], 0, 5), "b": entry("U8", [4], 4, 8)}, "tensor 'b': overlaps tensor 'a'"),
    ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 0, 8)}, "tensor 'b': overlaps tensor 'a'"),
    ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [0], 4, 4)}, "tensor 'b': overlaps tensor 'a'"),
    ({"b": entry("U8", [5], 3, 8), "a": entry("U8", [2], 0, 2)}, "tensor 'b': a hole of 1 bytes lies before it"),
    ({"a": entry("U8", [7], 0, 7)}, "1 bytes follow the last tensor"),
    ({"a": entry("U8", [9], 0, 9)}, "tensor 'a': data_offsets [0, 9], expected 0 <= begin <= end <= 8"),
]


@pytest.mark.parametrize(("header", "message"), LAYOUT_ERRORS)
def test_overlaps_and_holes(tmp_path, header, message):
    assert message in refused(write(tmp_path, header, bytes(8)))


def test_hostile_names_stay_on_one_short_line(tmp_path):
    assert "tensor 'a\\nb\\x1b[31m'" in refused(write(tmp_path, {"a\nb\x1b[31m": 1}))
    assert "(100002 characters)" in refused(write(tmp_path, {"n" * 100_000: 1}))
    assert "tensor '\\ud800': the name holds half a surrogate pair" in refused(write(tmp_path, '{"\\ud800": {}}'))


def test_hostile_values_are_not_spelled_out(tmp_path):
    deep = '{"a":{"dtype":"F32","data_offsets":[0,0],"shape":' + "[" * 900 + "]" * 900 + "}}"
    assert "shape [[...]]" in refused(write(tmp_path, deep)) or "nested" in refused(write(tmp_path, deep))
    long = '{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + "1," * 10**6 + "1]}}"
    assert "shape [1, 1, 1, 1, 1, 1, 1, 1, ...], expected a list of at most 32" in refused(write(tmp_path, long))


def test_paths_that_are_no_files(tmp_path):
    assert "a folder, expected a safetensors file" in refused(tmp_path)
    assert "cannot be opened (No such file or directory)" in refused(tmp_path / "absent.safetensors")
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    assert "a special file" in refused(fifo)
    with pytest.raises(FormatError, match="cannot be opened"):
        SafetensorsFile("a\0b")


def test_unknown_tensor(tmp_path):
    with SafetensorsFile(write(tmp_path, {"a": entry("U8", [1], 0, 1)}, b"x")) as file:
        for call in (file.array, file.info, lambda name: file.read_into(name, bytearray(1))):
            with pytest.raises(FormatError, match=r"file\.safetensors: no tensor 'b' among its 1"):
                call("b")


def test_a_million_names_take_seconds(tmp_path):
    parts = (f'"model.layer.{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(10**6))
    path = write(tmp_path, "{" + ",".join(parts) + "}", bytes(10**6))
    begin = time.process_time()
    with SafetensorsFile(path) as file:
        assert gc.isenabled()
        assert len(file.names) == 10**6 and file.array("model.layer.999999").tolist() == [0]
    assert time.process_time() - begin < 30


@pytest.mark.parametrize("filler", ["{},", "[],", "1,"])
def test_a_header_of_nothing_is_refused_before_it_is_parsed(tmp_path, filler):
    count = 30 * 10**6 if filler == "1," else 5 * 10**6
    path = write(tmp_path, '{"a":[' + filler * count + "1]}")
    begin = time.process_time()
    message = refused(path)
    assert f"header has {count} commas" in message and "split the file" in message
    assert time.process_time() - begin < 5


def valid_file():
    rng = np.random.default_rng(1)
    arrays = {"a.weight": rng.random((3, 4)).astype(np.float16), "b": np.arange(5, dtype=np.int32), "c": np.array(True)}
    arrays["empty"] = np.zeros((0, 3), np.float32)
    return bytearray(safetensors.numpy.save(arrays, metadata={"format": "np"}))


VALID = valid_file()
TOKENS = [b"-1", b"1e9", b"true", b"null", b"[]", b"{}", b'"', b",", b"\\u0000", b"\xff", b"9" * 30, b'"F64"', b'"b"']


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_random_damage_reads_or_is_refused(tmp_path_factory, data):
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert", "delete", "token"]))
        if kind == "byte" and place < len(content):
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=9))
        elif kind == "delete":
            del content[place : place + data.draw(st.integers(1, 9))]
        elif kind == "token":
            content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.sampled_from(TOKENS))
        if data.draw(st.booleans()) and len(content) >= 8:  # keep the length right, so that the JSON is reached
            end = content.rfind(b"}}") + 2
            content[:8] = max(end - 8, 0).to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        with SafetensorsFile(path) as file:
            for name in file.names:
                array = file.array(name)
                assert array.nbytes == file.info(name).nbytes <= len(content)
                array.tobytes()
    except FormatError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def big_file(folder):
    data = np.random.default_rng(2).integers(0, 256, 21 * 2**20 + 13, dtype=np.uint8)
    header = {"a": entry("U8", [3], 0, 3), "big": entry("U8", [data.size - 3], 3, data.size)}
    return write(folder, header, data.tobytes()), data[3:]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("preadv", [True, False])
def test_read_into(tmp_path, monkeypatch, threads, preadv):
    if not preadv:
        monkeypatch.delattr(os, "preadv")
    path, expected = big_file(tmp_path)
    with SafetensorsFile(path) as file:
        guarded = np.full(expected.size + 64, 0xAA, np.uint8)
        file.read_into("big", guarded[32:-32], threads=threads)
        np.testing.assert_array_equal(guarded[32:-32], expected)
        assert (guarded[:32] == 0xAA).all() and (guarded[-32:] == 0xAA).all()
        for buffer in (bytearray(3), memoryview(bytearray(3)), np.zeros((3, 1), np.uint8)):
            file.read_into("a", buffer, threads=threads)
            assert bytes(buffer) == file.array("a").tobytes()


@pytest.mark.parametrize("preadv", [True, False])
def test_read_piece(tmp_path, monkeypatch, preadv):
    if not preadv:
        monkeypatch.delattr(os, "preadv")
    path, expected = big_file(tmp_path)
    with SafetensorsFile(path) as file:
        for begin, size in ((0, 1), (0, expected.size), (12345, 4097), (expected.size - 7, 7), (expected.size, 0), (5, 0)):
            guarded = np.full(size + 64, 0xAA, np.uint8)
            file.read_piece("big", begin, guarded[32 : 32 + size])
            np.testing.assert_array_equal(guarded[32 : 32 + size], expected[begin : begin + size])
            assert (guarded[:32] == 0xAA).all() and (guarded[32 + size :] == 0xAA).all()
        for begin, size in ((-1, 1), (expected.size, 1), (1, expected.size), (0, expected.size + 1)):
            with pytest.raises(ValueError, match=rf"begin: {begin} and {size} bytes .* tensor 'big'"):
                file.read_piece("big", begin, np.zeros(size, np.uint8))
        with pytest.raises(FormatError, match="no tensor 'absent'"):
            file.read_piece("absent", 0, bytearray(1))
        with pytest.raises(ValueError, match="buffer: read-only or strided"):
            file.read_piece("a", 0, b"abc")
    with pytest.raises(ValueError, match="the file was closed"):
        file.read_piece("a", 0, bytearray(1))


def test_a_failing_read_is_named(tmp_path, monkeypatch):
    path, _ = big_file(tmp_path)

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    with SafetensorsFile(path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(FormatError, match=r"file\.safetensors: tensor 'a': cannot be read .Input/output error"):
            file.read_piece("a", 0, bytearray(3))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    path, expected = big_file(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][: 3 << 20]], at))
    with SafetensorsFile(path) as file:
        buffer = np.zeros(expected.size, np.uint8)
        file.read_into("big", buffer)
        np.testing.assert_array_equal(buffer, expected)


def test_read_into_arrays_of_every_kind(tmp_path):
    values = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    header = {"t": entry("BF16", [2, 3], 0, 12), "none": entry("F32", [0], 12, 12)}
    with SafetensorsFile(write(tmp_path, header, values.tobytes())) as file:
        for target in (np.zeros((2, 3), ml_dtypes.bfloat16), np.zeros(6, np.float16), np.zeros(12, np.uint8)):
            file.read_into("t", target)
            assert target.tobytes() == values.tobytes()
        file.read_into("none", bytearray())
        file.read_into("none", np.zeros((0, 7)))


READ_ERRORS = [
    (bytearray(2), "buffer: 2 bytes, expected 3, the size of tensor 'a'"),
    (bytearray(4), "buffer: 4 bytes, expected 3"),
    (bytes(3), "buffer: read-only or strided"),
    (np.zeros(6, np.uint8)[::2], "buffer: a read-only or strided array"),
    (memoryview(bytearray(6))[::2], "buffer: read-only or strided"),
    (np.frombuffer(bytes(3), np.uint8), "buffer: a read-only or strided array"),
]


@pytest.mark.parametrize(("buffer", "message"), READ_ERRORS)
def test_read_into_errors(tmp_path, buffer, message):
    with SafetensorsFile(write(tmp_path, {"a": entry("U8", [3], 0, 3)}, b"abc")) as file:
        with pytest.raises(ValueError, match=message):
            file.read_into("a", buffer)
        with pytest.raises(ValueError, match="threads: 0, expected 1 or more"):
            file.read_into("a", bytearray(3), threads=0)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path, expected = big_file(tmp_path)
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(FormatError, match=r"file\.safetensors: tensor 'big': ends 100 bytes early"):
            file.read_into("big", np.zeros(expected.size, np.uint8))


def test_checkpoint_merges_files(tmp_path):
    write(tmp_path, {"b": entry("U8", [1], 0, 1)}, b"\x02", name="b.safetensors")
    write(tmp_path, {"a": entry("U8", [1], 0, 1)}, b"\x01", name="a.safetensors")
    (tmp_path / "._a.safetensors").write_bytes(b"what macOS leaves behind")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"c": "../../secret"}}')
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ("a", "b")
        assert [checkpoint.array(name).tolist() for name in checkpoint.names] == [[1], [2]]
        assert "a" in checkpoint and "c" not in checkpoint
        assert checkpoint.file("b").path.name == "b.safetensors"
        assert checkpoint.info("b").shape == (1,) and checkpoint.total_bytes(["a", "b"]) == 2
        buffer = bytearray(1)
        checkpoint.read_into("b", buffer)
        assert buffer == b"\x02"
        checkpoint.read_piece("a", 0, buffer)
        assert buffer == b"\x01"
        with pytest.raises(FormatError, match=r"no tensor 'c' in its 2 \*\.safetensors"):
            checkpoint.array("c")
    with pytest.raises(ValueError, match="closed"):
        checkpoint.array("a")


def test_checkpoint_refuses_a_tensor_of_two_files(tmp_path):
    for name in ("one", "two"):
        header = {"twice": entry("U8", [1], 0, 1), name: entry("U8", [1], 1, 2)}
        write(tmp_path, header, b"xy", name=f"{name}.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.array("one").tolist() == checkpoint.array("two").tolist() == [ord("y")]
        for call in (checkpoint.array, checkpoint.info, lambda name: checkpoint.read_into(name, bytearray(1))):
            with pytest.raises(FormatError, match=r"one\.safetensors: tensor 'twice' is also in two\.safetensors; remove"):
                call("twice")


def test_checkpoint_folder_errors(tmp_path):
    with pytest.raises(FormatError, match=r"no \*\.safetensors file; convert .* pickles \(\.bin, \.pt\) are never read"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FormatError, match=r"no \*\.safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(FormatError, match="missing, expected a folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(FormatError, match="a file, expected a folder"):
        Checkpoint(tmp_path / "pytorch_model.bin")
    write(tmp_path, {}, name="a.safetensors")
    write(tmp_path, {}, b"x", name="b.safetensors")
    with pytest.raises(FormatError, match=r"b\.safetensors: 1 bytes follow"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("model", sorted(path.name for path in MODELS.iterdir()))
def test_example_models_open(model):
    """Against the reference reader: same names, same bytes."""
    with Checkpoint(MODELS / model) as checkpoint:
        files = sorted((MODELS / model).glob("*.safetensors"))
        expected = {}
        for path in files:
            if path.name in ("model.safetensors", "output.safetensors"):
                expected |= safetensors.numpy.load_file(path)
        assert len(expected) >= 39 and set(expected) <= set(checkpoint.names)
        for name, array in expected.items():
            assert same_bits(checkpoint.array(name), array)


class Sized:
    def __init__(self, nbytes):
        self.nbytes = nbytes


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_on_a_terminal_after_one_second(monkeypatch):
    items = [Sized(10), Sized(20)]
    quick = Terminal()
    monkeypatch.setattr(sys, "stderr", quick)
    assert list(progress(items, 30, "loading")) == items
    assert quick.getvalue() == ""

    slow = Terminal()
    monkeypatch.setattr(sys, "stderr", slow)
    for item in progress(items, 30, "loading"):
        time.sleep(1.1 if item is items[0] else 0)
    assert "loading" in slow.getvalue() and "33%" in slow.getvalue()


@pytest.mark.parametrize("force", [False, True])
def test_progress_without_a_terminal(monkeypatch, force):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress([Sized(1)], 1, "loading", force=force):
        time.sleep(1.1)
    assert ("loading" in stream.getvalue()) == force
