"""Kernel launches by the CUDA driver: the arguments as a kernel finds them, and one call of cuLaunchKernelEx.

CuPy's own launch takes 9 us of host time for eight arguments and cannot set launch attributes. Here a launch is one
`struct.pack_into` of its configuration and arguments, into memory that is laid out once per stream, and one call of the
driver through ctypes. Which checks come first, and which kernel it is: `_kernels.launch`.
"""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq._arrays import bfloat16
from cupyq.errors import BackendError

INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used the GPU before


@functools.cache
def driver():
    """The CUDA driver library, with the signatures of what is called here."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
        pointer, text = ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p)
        library.cuLaunchKernelEx.argtypes = (pointer, pointer, pointer, pointer)
        library.cuGetErrorName.argtypes = library.cuGetErrorString.argtypes = (ctypes.c_int, text)
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"the CUDA driver {name} cannot launch kernels ({error}): install a driver for CUDA 12 or newer"
        ) from None
    return library


def error_text(status):
    """Such as `CUDA_ERROR_INVALID_VALUE (invalid argument)`."""
    name, meaning = ctypes.c_char_p(), ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    driver().cuGetErrorString(status, ctypes.byref(meaning))
    if not (name.value and meaning.value):
        return f"CUDA error {status}"
    return f"{name.value.decode()} ({meaning.value.decode()})"


# --- arguments --------------------------------------------------------------------------------------------------------

# CUlaunchConfig of cuda.h: grid and block, the bytes of dynamic shared memory, the stream, the address and number of the
# launch attributes. The size of the arguments follows, and the arguments themselves.
_CONFIGURATION = "<7I4xQQI4xQ"
_ARGUMENT_BYTES = 4096  # what a kernel may take on every architecture

_CODES = {np.dtype(code): code for code in "?bBhHiIqQefd"}  # NumPy and struct use the same letters


@dataclass(frozen=True, eq=False)  # eq=False: two layouts are the same if they are one
class Layout:
    """Where the arguments of a launch lie, for one sequence of their types: as C++ lays out the parameters of a kernel."""

    pack_into: Callable  # writes configuration, size and arguments
    arrays: tuple[int, ...]  # the positions of CuPy arrays: their addresses are packed
    nulls: tuple[int, ...]  # of None: 0 is packed
    structures: tuple[int, ...]  # of values that are packed as their bytes
    places: tuple[tuple[int, int], ...]  # offset and size of each argument
    size: int


def layout_of(arguments, array_type):
    """The Layout of these arguments. TypeError / ValueError, without the kernel's name, for what no kernel takes."""
    text, places, end = _CONFIGURATION, [], 0
    positions: dict[str, list[int]] = {"array": [], "null": [], "structure": []}
    for position, value in enumerate(arguments):
        kind, code, size, alignment = _described(position, value, array_type)
        if kind:
            positions[kind].append(position)
        padding = -end % alignment
        text += f"{padding}x{code}"
        places.append((end + padding, size))
        end += padding + size
    if end > _ARGUMENT_BYTES:
        raise ValueError(f"the arguments take {end} bytes, a kernel at most {_ARGUMENT_BYTES}")
    arrays, nulls, structures = map(tuple, positions.values())
    return Layout(struct.Struct(text).pack_into, arrays, nulls, structures, tuple(places), end)


def _described(position, value, array_type):
    """What an argument needs before it is packed ("": nothing), how struct writes it, its bytes and its alignment."""
    if value is None:
        return "null", "Q", 8, 8
    if isinstance(value, array_type):
        return "array", "Q", 8, 8
    if not isinstance(value, np.generic):
        raise TypeError(f"argument {position} is a {type(value).__name__}: wrap numbers, as in np.int32(3)")
    size = value.dtype.itemsize
    if code := _CODES.get(value.dtype):
        return "", code, size, size
    if value.dtype == bfloat16:
        return "structure", "2s", 2, 2
    if isinstance(value, np.void):
        if size % 16:  # as sizeof(alignas(16) struct ...) is
            raise ValueError(f"argument {position} is a structure of {size} bytes: pad it to a multiple of 16")
        return "structure", f"{size}s", size, 16
    raise TypeError(f"argument {position} is a {type(value).__name__}, which no kernel takes")


def check_parameters(function, layout):
    """TypeError, without the kernel's name, where the arguments do not lie as the parameters of the loaded kernel do.

    A 32-bit number for a 64-bit parameter would otherwise show as wrong results. Drivers before CUDA 12.4 cannot tell.
    """
    query = getattr(driver(), "cuFuncGetParamInfo", None)
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()

    def place_of(position):
        known = query(ctypes.c_void_p(function), ctypes.c_size_t(position), ctypes.byref(offset), ctypes.byref(size)) == 0
        return (offset.value, size.value) if known else None

    if query is None or place_of(0) is None:
        return
    for position, place in enumerate(layout.places):
        expected = place_of(position)
        if expected is None:
            raise TypeError(f"{len(layout.places)} arguments were given, the kernel takes {position}")
        if place != expected:
            raise TypeError(
                f"argument {position} has {place[1]} bytes at offset {place[0]}, the kernel's parameter {expected[1]} bytes at "
                f"{expected[0]}: pass the C++ type of the parameter"
            )
    if place_of(len(layout.places)) is not None:
        raise TypeError(f"{len(layout.places)} arguments were given, the kernel takes more")


# --- launching --------------------------------------------------------------------------------------------------------

_ONES = ((1, 1, 1), (1, 1), (1,), ())  # what completes a grid or block of so many dimensions

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_ATTRIBUTE = struct.Struct("<i4xi60x")  # CUlaunchAttribute: id, then a union of 64 bytes
_EXTRA = struct.Struct("<5Q")  # see cuLaunchKernel: 1, address of the arguments, 2, address of their size, 0
_ATTRIBUTE_AT, _EXTRA_AT, _CONFIGURATION_AT = 0, 80, 128
_SIZE_AT, _ARGUMENTS_AT = 128 + 56, 128 + 64


class Queue:
    """The launches of one stream: the lock that keeps their order, and the memory that describes one to the driver."""

    def __init__(self, stream):
        self.lock = threading.Lock()
        self.is_overlap_aware = False  # whether the last kernel launched here was; see _kernels
        self._stream = stream
        self._memory = bytearray(_ARGUMENTS_AT + _ARGUMENT_BYTES)
        self._pinned: Any = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)  # keeps it where it is
        address = ctypes.addressof(self._pinned)
        _ATTRIBUTE.pack_into(self._memory, _ATTRIBUTE_AT, _PROGRAMMATIC_STREAM_SERIALIZATION, 1)
        _EXTRA.pack_into(self._memory, _EXTRA_AT, 1, address + _ARGUMENTS_AT, 2, address + _SIZE_AT, 0)
        self._attribute = address + _ATTRIBUTE_AT
        self._extra = address + _EXTRA_AT
        self._configuration = address + _CONFIGURATION_AT
        self._launch = driver().cuLaunchKernelEx

    def launch(self, function, layout, grid, block, shared_bytes, values, overlaps):
        """Queue a kernel -> the driver's status. Hold the lock. `overlaps`: it may start before the last one has ended."""
        try:
            layout.pack_into(
                self._memory, _CONFIGURATION_AT, *grid, *_ONES[len(grid)], *block, *_ONES[len(block)], shared_bytes,
                self._stream, self._attribute, overlaps, layout.size, *values,
            )  # fmt: skip
        except (struct.error, IndexError, TypeError):
            raise ValueError(f"grid {grid} and block {block} must be up to three whole numbers each, below 2**32") from None
        return self._launch(self._configuration, function, None, self._extra)
