"""Tensors of a checkpoint to where they are used: views of the file for NumPy, a pipelined upload for CuPy.

Upload, with disk, host memory and bus busy at the same time:

    this thread    allocates the tensors of the next few parts; builds from those that have arrived
    reader thread  copies from the files into one of two pinned buffers, with several threads, converting where asked
    copy stream    pinned buffer -> device

Only `AHEAD` parts are on the way at any time, so that a checkpoint is never on the GPU twice, packed and repacked.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cupyq._arrays import bfloat16, float16, float32, require_cupy
from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint

AHEAD = 4
BUFFER_BYTES = 32 << 20
_PIECE_BYTES = 4 << 20  # what one thread copies at a time
_ALIGNMENT = 256


@dataclass(frozen=True)
class Wanted:
    """A tensor of the checkpoint, and how it is wanted."""

    name: str
    dtype: np.dtype | None = None
    """Convert to this dtype; None: as it is stored."""
    on_host: bool = False
    """A NumPy array even on the GPU path: tables that are looked at while building."""


class Part(Protocol):
    """Tensors that are used together."""

    @property
    def tensors(self) -> Mapping[str, Wanted]: ...

    @property
    def nbytes(self) -> int: ...


def read(checkpoint: Checkpoint, parts: Iterable[Any], xp: Any) -> Generator[tuple[Any, dict[str, Any]], None, None]:
    """Yield (part, its arrays by short name), in order.

    NumPy: read-only views of the file, or converted copies. CuPy: arrays that are ready for work queued on the current
    stream. Use up or close the generator. FormatError names a tensor whose values do not fit the dtype wanted.
    """
    if xp is np:
        return ((part, {short: _host(checkpoint, w) for short, w in part.tensors.items()}) for part in parts)
    return _upload(checkpoint, parts)


def _host(checkpoint: Checkpoint, wanted: Wanted) -> np.ndarray:
    source = checkpoint.array(wanted.name)
    if wanted.dtype is None or wanted.dtype == source.dtype:
        return source
    target = np.empty(source.shape, wanted.dtype)
    _convert(checkpoint, wanted.name, source.reshape(-1), target.reshape(-1))
    return target


def _convert(checkpoint: Checkpoint, name: str, source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, both 1-D. bfloat16 goes through float32, exactly, as its own cast hides overflows."""
    if source.dtype == target.dtype:
        target.view(np.uint8)[...] = source.view(np.uint8)
        return
    if source.dtype == bfloat16:
        source = source.astype(np.float32)
    try:
        with np.errstate(over="raise"):
            np.copyto(target, source, casting="unsafe")
    except FloatingPointError:
        raise FormatError(
            f"{checkpoint.file(name).path}: tensor {name!r}: holds values beyond the range of {target.dtype}; "
            "load the model with dtype='bfloat16'"
        ) from None


def _upload(checkpoint: Checkpoint, parts: Iterable[Any]) -> Generator[tuple[Any, dict[str, Any]], None, None]:
    cupy = require_cupy()
    stager = _Stager(checkpoint, cupy)
    reader = ThreadPoolExecutor(1, "cupyq-upload")
    ahead: deque[tuple[Any, dict[str, Any], Future]] = deque()

    def start(part: Any) -> None:
        # Allocated here, on the current stream, so that memory this stream has just freed can be used again. The copy
        # stream must then wait for what is still queued here: it may read from that memory.
        arrays: dict[str, Any] = {}
        for short, wanted in part.tensors.items():
            if wanted.on_host:
                arrays[short] = _host(checkpoint, wanted)
            else:
                info = checkpoint.info(wanted.name)
                arrays[short] = cupy.empty(info.shape, wanted.dtype or info.dtype)
        is_free = cupy.cuda.Event(disable_timing=True)
        is_free.record(cupy.cuda.get_current_stream())
        ahead.append((part, arrays, reader.submit(stager.fill, part, arrays, is_free)))

    def finish() -> tuple[Any, dict[str, Any]]:
        part, arrays, future = ahead[0]
        has_arrived = future.result()
        cupy.cuda.get_current_stream().wait_event(has_arrived)
        ahead.popleft()
        return part, arrays

    try:
        for part in parts:
            start(part)
            if len(ahead) > AHEAD:
                yield finish()
        while ahead:
            yield finish()
    finally:
        # `ahead` keeps its arrays alive until the last copy into them is done.
        reader.shutdown(wait=True, cancel_futures=True)
        stager.close()


class _Stager:
    """Two pinned buffers, filled one while the other is copied to the device."""

    def __init__(self, checkpoint: Checkpoint, cupy: Any):
        self.checkpoint, self.cupy = checkpoint, cupy
        self.device_id = cupy.cuda.runtime.getDevice()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        # The views hold the pinned memory.
        self.buffers = [np.frombuffer(cupy.cuda.alloc_pinned_memory(BUFFER_BYTES), np.uint8, BUFFER_BYTES) for _ in range(2)]
        self.events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self.current = self.used = 0
        self.threads = min(8, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.threads, "cupyq-read")

    def close(self) -> None:
        self.pool.shutdown(wait=True)
        self.stream.synchronize()

    def fill(self, part: Any, arrays: dict[str, Any], is_free: Any) -> Any:
        """Queue the copies of all device arrays of a part; returns the event that marks their end."""
        with self.cupy.cuda.Device(self.device_id):  # CuPy's current device belongs to a thread
            self.stream.wait_event(is_free)
            for short, wanted in part.tensors.items():
                if not wanted.on_host:
                    self._fill_array(wanted.name, arrays[short])
            has_arrived = self.cupy.cuda.Event(disable_timing=True)
            has_arrived.record(self.stream)
            return has_arrived

    def _fill_array(self, name: str, target: Any) -> None:
        source = self.checkpoint.array(name).reshape(-1)
        itemsize = target.dtype.itemsize
        begin = 0
        while begin < source.size:
            staged = self._room((source.size - begin) * itemsize)
            count = staged.size // itemsize
            self._read(name, source[begin : begin + count], staged[: count * itemsize].view(target.dtype))
            self.cupy.cuda.runtime.memcpyAsync(
                target.data.ptr + begin * itemsize,
                staged.ctypes.data,
                count * itemsize,
                self.cupy.cuda.runtime.memcpyHostToDevice,
                self.stream.ptr,
            )
            begin += count

    def _room(self, wanted_bytes: int) -> np.ndarray:
        """Free bytes of the current buffer, or of the other one once its last copy is done; up to `wanted_bytes`."""
        if BUFFER_BYTES - self.used < min(wanted_bytes, _PIECE_BYTES):
            self.events[self.current].record(self.stream)
            self.current, self.used = 1 - self.current, 0
            self.events[self.current].synchronize()  # returns at once for an event that was never recorded
        begin = self.used
        end = min(begin + wanted_bytes, BUFFER_BYTES)
        self.used = min(-(-end // _ALIGNMENT) * _ALIGNMENT, BUFFER_BYTES)
        return self.buffers[self.current][begin:end]

    def _read(self, name: str, source: np.ndarray, target: np.ndarray) -> None:
        """Copy out of the file's memory map: page faults and conversions run on all threads, as NumPy frees the GIL."""
        step = _PIECE_BYTES // target.itemsize
        begins = range(0, source.size, step)
        if len(begins) < 2:
            _convert(self.checkpoint, name, source, target)
            return

        def convert(begin: int) -> None:
            _convert(self.checkpoint, name, source[begin : begin + step], target[begin : begin + step])

        list(self.pool.map(convert, begins))


FLOAT_DTYPES = (float16, bfloat16, float32)
"""What unquantized tensors may be stored as."""
