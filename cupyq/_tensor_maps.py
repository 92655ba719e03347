"""Tensor maps: how the copy engine of Hopper and later finds boxes of an array (CUDA driver API, Tensor Map Object Management).

A map is 128 bytes that hold an array's address, shape and strides, and the shape of the boxes. A kernel takes maps by value, as
its first parameter, and at a multiple of 64 bytes: behind PADDING_BYTES, as the parameters of sm_90a begin at 0x210.
"""

import ctypes
import functools

import numpy as np

from cupyq import _launch
from cupyq._arrays import bfloat16, float16
from cupyq._kernels import is_tracing
from cupyq._recording import recording
from cupyq.errors import BackendError

MAP_BYTES = 128
PADDING_BYTES = 48

_TYPES = {float16: 6, bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3  # CUtensorMapSwizzle, CUtensorMapL2promotion


def tensor_maps(*maps):
    """Maps as one argument of a launch: each (array, shape, box), of `array` as a contiguous one of that shape.

    box: a number of elements along each axis, at most 256; the last one spans 128 bytes. What a box has outside of the
    array reads as zeros. Raises BackendError where the driver refuses.
    """
    if is_tracing():  # nothing is launched, and the arrays will not come back
        return np.void(bytes(PADDING_BYTES + len(maps) * MAP_BYTES))
    if recording.record is not None:
        recording.record.hidden += [_address(array) for array, _, _ in maps]
    packed = (_tensor_map(_address(array), array.dtype, shape, box) for array, shape, box in maps)
    return np.void(bytes(PADDING_BYTES) + b"".join(packed))


def _address(array):
    return array.data.ptr


@functools.lru_cache(maxsize=4096)  # the caches and buffers of a model come back with every call
def _tensor_map(address, dtype, shape, box):
    """The 128 bytes of a map."""
    memory = (ctypes.c_char * (MAP_BYTES + 64))()
    map_at = -(-ctypes.addressof(memory) // 64) * 64
    rank, itemsize = len(shape), dtype.itemsize
    strides = [itemsize * int(np.prod(shape[axis:], dtype=np.int64)) for axis in range(rank - 1, 0, -1)]
    sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
    steps = (ctypes.c_uint64 * (rank - 1))(*strides)
    sides = (ctypes.c_uint32 * rank)(*reversed(box))
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    status = _encoder()(
        map_at, _TYPES[dtype], rank, address, sizes, steps, sides, ones, 0, _SWIZZLE_128B, _L2_PROMOTION_256B, 0
    )
    if status:
        raise BackendError(
            f"no tensor map of an array {list(shape)} at {address:#x} in boxes {list(box)}: {_launch.error_text(status)}"
        )
    return ctypes.string_at(map_at, MAP_BYTES)


@functools.cache
def _encoder():
    encode = getattr(_launch.driver(), "cuTensorMapEncodeTiled", None)
    if encode is None:
        raise BackendError("the CUDA driver has no cuTensorMapEncodeTiled: install a driver for CUDA 12 or newer")
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    encode.argtypes = (pointer, ctypes.c_int, number, pointer, pointer, pointer, pointer, pointer, *[ctypes.c_int] * 4)
    return encode
