"""Checks every op shares."""

from types import SimpleNamespace

import numpy as np
import pytest

from cupyq._arrays import (
    FLOATS,
    bfloat16,
    byte_bounds,
    check,
    namespace,
    output,
    refuse_partial_overlap,
)
from cupyq._copies import to_host
from cupyq.ops._common import access_width, vector_width


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# --- namespace --------------------------------------------------------------------------------------------------------


class Quantized:
    xp = np


def test_namespace_of_numpy_arrays():
    assert namespace(x=np.zeros(2), w=None, q=Quantized()) is np
    assert namespace(x=None, q=Quantized()) is np


@pytest.mark.parametrize("value", [[1.0], 1.0, "text", (1, 2)])
def test_namespace_refuses_what_is_no_array(value):
    with pytest.raises(TypeError, match=f"w must be a NumPy or CuPy array .*{type(value).__name__}") as error:
        namespace(x=np.zeros(2), w=value)
    one_line(error)


def test_namespace_needs_an_array():
    with pytest.raises(TypeError, match="must be an array, got None"):
        namespace(x=None, w=None)


@pytest.mark.gpu
def test_namespace_refuses_a_mix_of_libraries(cupy):
    on_gpu = cupy.zeros(2)
    assert namespace(x=on_gpu, w=None) is cupy
    with pytest.raises(TypeError, match="x is a CuPy array, w is a NumPy array: move one"):
        namespace(x=on_gpu, w=np.zeros(2))
    with pytest.raises(TypeError, match="q is a NumPy array, x is a CuPy array"):
        namespace(q=Quantized(), x=on_gpu)


# --- check, output, overlap -------------------------------------------------------------------------------------------


def test_arrays_come_to_the_host_and_those_there_stay():
    array = np.ones(3, np.float32)
    assert to_host(array) is array
    assert to_host(SimpleNamespace(get=lambda: array)) is array


def test_check_accepts_what_fits():
    x = np.zeros((2, 3), np.float16)
    check(x, "x", dtype=np.float16, shape=(2, 3), ndim=2, last=3, writes=True)
    check(x, "x", dtype=FLOATS, shape=(None, 3))
    check(np.zeros((2, 3), bfloat16), "x", dtype=FLOATS)
    check(np.zeros((0, 3)), "x", shape=(0, 3))
    check(np.zeros((4, 3))[1:2], "x")


@pytest.mark.parametrize(
    ("array", "asked", "error", "words"),
    [
        (np.zeros(3), {"dtype": FLOATS}, TypeError, "x must have dtype float16 or bfloat16 or float32, got float64"),
        (np.zeros(3), {"dtype": np.float16}, TypeError, "x must have dtype float16, got float64"),
        (np.zeros(3, np.float16), {"dtype": bfloat16}, TypeError, "x must have dtype bfloat16, got float16"),
        (np.zeros(3), {"shape": (4,)}, ValueError, r"x must have shape \(4\), got \(3,\)"),
        (np.zeros((2, 3)), {"shape": (None, 4)}, ValueError, r"x must have shape \(any, 4\), got \(2, 3\)"),
        (np.zeros((2, 3)), {"shape": (2,)}, ValueError, r"x must have shape \(2\), got \(2, 3\)"),
        (np.zeros((2, 3)), {"ndim": 3}, ValueError, r"x must have 3 dimensions, got shape \(2, 3\)"),
        (np.zeros((2, 3)), {"last": 2}, ValueError, r"x must have 2 as its last dimension, got shape \(2, 3\)"),
        (np.zeros(()), {"last": 2}, ValueError, r"x must have 2 as its last dimension, got shape \(\)"),
        (np.zeros((2, 3)).T, {}, ValueError, r"x must be C-contiguous, .* pass ascontiguousarray\(x\)"),
        (np.zeros(6)[::2], {}, ValueError, "x must be C-contiguous"),
        (np.frombuffer(b"1234", np.uint8), {"writes": True}, ValueError, "x is read-only and would be written"),
    ],
)
def test_check_names_what_is_wrong(array, asked, error, words):
    with pytest.raises(error, match=words) as raised:
        check(array, "x", **asked)
    one_line(raised)


def test_output_is_made_or_checked():
    made = output(np, None, (2, 3), bfloat16)
    assert made.shape == (2, 3) and made.dtype == bfloat16
    given = np.zeros((2, 3), np.float32)
    assert output(np, given, (2, 3), np.float32) is given
    with pytest.raises(TypeError, match="out must have dtype float16, got float32"):
        output(np, given, (2, 3), np.float16)
    with pytest.raises(ValueError, match="out must have shape"):
        output(np, given, (3, 2), np.float32)
    with pytest.raises(TypeError, match="result must be a NumPy or CuPy array"):
        output(np, [1.0], (1,), np.float32, name="result")
    given.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        output(np, given, (2, 3), np.float32)


@pytest.mark.gpu
def test_output_of_the_other_library_is_refused(cupy):
    with pytest.raises(TypeError, match="out must be an array of cupy, as the inputs are, got numpy"):
        output(cupy, np.zeros(2, np.float32), (2,), np.float32)
    with pytest.raises(TypeError, match="out must be an array of numpy, as the inputs are"):
        output(np, cupy.zeros(2, np.float32), (2,), np.float32)


def test_byte_bounds():
    x = np.zeros((4, 8), np.float16)
    low, high = byte_bounds(x)
    assert high - low == 64
    assert byte_bounds(x[1:3]) == (low + 16, low + 48)


def test_overlap_is_refused_unless_it_is_the_whole_array():
    memory = np.zeros(10, np.float32)
    x = memory[2:8]
    refuse_partial_overlap(x, x=x, none=None)
    refuse_partial_overlap(memory[2:8], x=x)
    refuse_partial_overlap(memory[:2], x=x)
    refuse_partial_overlap(memory[8:], x=x)
    for out in (memory[1:7], memory[3:9], memory[3:5], memory, x.view(np.int32), memory[7:]):
        with pytest.raises(ValueError, match="out overlaps x partly"):
            refuse_partial_overlap(out, other=np.zeros(3), x=x)


def test_the_width_of_an_access_divides_columns_and_addresses():
    """By the definition: halved until rows and first values of every array are multiples of it."""
    memory = np.zeros(256, np.uint8)
    base = -memory.ctypes.data % 64
    arrays = [
        memory[base + shift :][: 4 * dtype.itemsize].view(dtype) for dtype in FLOATS for shift in (0, 2, 4, 8, 12, 16, 32)
    ]
    for x in arrays:
        for y in (None, *arrays):
            given = [a for a in (x, y) if a is not None]
            for columns in (0, 1, 2, 4, 6, 12, 40, 256):
                width = 16 // max(a.itemsize for a in given)
                assert vector_width(columns, x, y, widest=width) == access_width(columns, x, y)
                while columns % width or any(a.ctypes.data % (width * a.itemsize) for a in given if width > 1):
                    width //= 2
                assert access_width(columns, x, y) == width
