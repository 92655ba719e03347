"""Reading tensors from files and reordering their columns: safetensors of ops.md's index."""

import os

import numpy as np

from cupyq import ops
from cupyq._arrays import check, int32
from cupyq.ext._arrays import entry, fill, integer

_CHUNK_BYTES = 64 * 2**20  # of host memory on the way to a GPU


@entry(arrays=("target",), writes=("target",))
def stloader_read(filename, offset, size, target):
    """The `size` bytes of the file at `offset` become the first bytes of target, which may be on the host or on a GPU

    OSError where the file cannot be read, ValueError where it or the target is too small; target is then as before,
    unless the file shrinks while it is read.
    """
    offset, size = integer(offset, "offset", low=0), integer(size, "size", low=0)
    if isinstance(filename, int) or not isinstance(filename, (str, bytes, os.PathLike)):
        raise TypeError(f"filename must be a path, got {type(filename).__name__}")
    if size > target.nbytes:
        raise ValueError(f"target must have room for {size} bytes, it has {target.nbytes}")
    if os.path.exists(filename) and not (os.path.isfile(filename) or os.path.isdir(filename)):
        # Opening a pipe would wait for a writer.
        raise OSError(f"filename {os.fsdecode(filename)!r} is no regular file: name a safetensors file")
    with open(filename, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if offset + size > found:
            raise ValueError(f"filename {os.fsdecode(filename)!r} has {found} bytes, {size} at {offset} are beyond its end")
        if size == 0:
            return
        file.seek(offset)
        flat = target.reshape(-1).view(np.uint8)[:size]
        if isinstance(flat, np.ndarray):
            _read_into(file, flat)
        else:
            _read_to_gpu(file, flat)


def _read_into(file, flat):
    view = memoryview(flat)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise OSError(f"{file.name}: the file ended {len(view) - done} bytes early; it was changed while being read")
        done += count


def _read_to_gpu(file, flat):
    buffer = np.empty(min(flat.size, _CHUNK_BYTES), np.uint8)
    for start in range(0, flat.size, buffer.size):
        part = buffer[: min(buffer.size, flat.size - start)]
        _read_into(file, part)
        fill(flat[start : start + part.size], part)


@entry(arrays=("tensor", "index"), writes=("tensor",))
def tensor_remap(tensor, index):
    """tensor[r, c] becomes the old tensor[r, index[c]]; tensor int32 [R, C], index int32 [C], each 0 to C - 1"""
    check(tensor, "tensor", dtype=int32, ndim=2)
    tensor[...] = ops.remap_columns(tensor, index)


@entry(arrays=("tensor", "index"), writes=("tensor",))
def tensor_remap_4bit(tensor, index):
    """As tensor_remap, with nibbles for columns: tensor int32 [R, C/8], nibble c % 8 of word c / 8; index int32 [C]"""
    check(tensor, "tensor", dtype=int32, ndim=2)
    tensor[...] = ops.remap_nibbles(tensor, index)
