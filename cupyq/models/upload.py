"""Tensors of a checkpoint to where they are used: views of the file for NumPy, a pipelined upload for CuPy.

Upload, with disk or page cache, host memory and bus busy at the same time:

    this thread      allocates the tensors of the next parts; builds from those that have arrived
    reader threads   each: file -> a pinned buffer, by a read or a conversion, then queues the buffer's copy
    copy stream      pinned buffer -> device

Memory, whatever the size of the checkpoint. Host: the pinned buffers, two for each of at most 8 threads, 64 MiB together,
which CuPy's pool of pinned memory keeps for the next load, and the small tables of the parts on the way. Device: beyond
what is built of the parts, AHEAD_BYTES of tensors on the way, the part being built and the one last begun, so that a
checkpoint is never on the GPU twice, packed and repacked.
"""

import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupyq._arrays import bfloat16, float16, float32, require_cupy
from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint

AHEAD_BYTES = 128 << 20  # twice the pinned buffers: threads find work while a part is built
BUFFER_BYTES = 4 << 20
_MOST_THREADS = 8
_ALIGNMENT = 256
_CONVERTED_AT_ONCE = 1 << 18  # values: temporaries stay in the cache of a core


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
    stream, and copies of what is wanted on the host. Use up or close the generator: it then waits for its threads and
    copies, after an error, too. FormatError names a tensor whose values do not fit the dtype wanted, or that cannot be read.
    """
    if xp is np:
        return ((part, {short: _view(checkpoint, w) for short, w in part.tensors.items()}) for part in parts)
    return _upload(checkpoint, parts)


def read_on_host(checkpoint: Checkpoint, wanted: Wanted) -> np.ndarray:
    """A new array with the values of a tensor."""
    info = checkpoint.info(wanted.name)
    target = np.empty(info.shape, wanted.dtype or info.dtype)
    _fill(checkpoint, wanted.name, 0, target.reshape(-1))
    return target


def new_arrays(checkpoint: Checkpoint, part: Any, new: Callable[..., Any]) -> dict[str, Any]:
    """A part's arrays by short name: read where wanted on the host, else as new(shape, dtype) makes them."""
    arrays: dict[str, Any] = {}
    for short, wanted in part.tensors.items():
        info = checkpoint.info(wanted.name)
        arrays[short] = read_on_host(checkpoint, wanted) if wanted.on_host else new(info.shape, wanted.dtype or info.dtype)
    return arrays


def _view(checkpoint: Checkpoint, wanted: Wanted) -> np.ndarray:
    source = checkpoint.array(wanted.name)
    if wanted.dtype is None or wanted.dtype == source.dtype:
        return source
    return converted(checkpoint, wanted.name, source, wanted.dtype)


def converted(checkpoint: Checkpoint, name: str, source: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A new array of `dtype` with the values of a tensor, or of a C-contiguous part of it."""
    target = np.empty(source.shape, dtype)
    _convert(checkpoint, name, source.reshape(-1), target.reshape(-1))
    return target


def _fill(checkpoint: Checkpoint, name: str, begin: int, target: np.ndarray) -> None:
    """target = the tensor's values from number `begin` on, converted to its dtype; 1-D."""
    stored = checkpoint.info(name).dtype
    if stored == target.dtype:
        checkpoint.read_piece(name, begin * stored.itemsize, target)
        return
    for first in range(0, target.size, _CONVERTED_AT_ONCE):
        piece = target[first : first + _CONVERTED_AT_ONCE]
        source = np.empty(piece.size, stored)
        checkpoint.read_piece(name, (begin + first) * stored.itemsize, source)
        _convert(checkpoint, name, source, piece)


def _convert(checkpoint: Checkpoint, name: str, source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, both 1-D. bfloat16 goes through float32, exactly, as its own cast hides overflows."""
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
    uploader = _Uploader(checkpoint, require_cupy())
    ahead: deque[_Started] = deque()
    try:
        for part in parts:
            ahead.append(uploader.start(part))
            # What the oldest part takes does not count, so that threads go on behind one of any size.
            while sum(started.part.nbytes for started in ahead) - ahead[0].part.nbytes > AHEAD_BYTES:
                yield uploader.finish(ahead[0])
                ahead.popleft()
        while ahead:
            yield uploader.finish(ahead[0])
            ahead.popleft()
    finally:
        uploader.close()
        ahead.clear()  # not before: the last copies into these arrays had to be done


class _Started(NamedTuple):
    """A part on its way."""

    part: Any
    arrays: dict[str, Any]
    batches: list[Future]


class _Piece(NamedTuple):
    """Neighbouring values of a tensor, and where they go."""

    name: str
    begin: int
    values: int
    dtype: np.dtype
    address: int  # on the device
    offset: int  # in the pinned buffer


class _Buffer:
    """Pinned memory, taken when it is first used, and an event behind the last copy out of it."""

    def __init__(self, cupy: Any):
        self.cupy = cupy
        # A thread that waits for the bus leaves its core to others, the compiler for one.
        self.is_copied = cupy.cuda.Event(block=True, disable_timing=True)
        self._bytes: np.ndarray | None = None

    @property
    def bytes(self) -> np.ndarray:
        if self._bytes is None:
            self._bytes = np.frombuffer(self.cupy.cuda.alloc_pinned_memory(BUFFER_BYTES), np.uint8, BUFFER_BYTES)
        return self._bytes


class _Uploader:
    """Reader threads, their pinned buffers, and the stream that copies them to the device."""

    def __init__(self, checkpoint: Checkpoint, cupy: Any):
        self.checkpoint, self.cupy = checkpoint, cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.is_free = cupy.cuda.Event(disable_timing=True)
        self.has_arrived = cupy.cuda.Event(disable_timing=True)
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self.buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()  # first in, first out: the longest copied first
        for _ in range(2 * threads):
            self.buffers.put(_Buffer(cupy))
        device = cupy.cuda.Device(cupy.cuda.runtime.getDevice())  # CuPy's current device belongs to a thread
        self.threads = ThreadPoolExecutor(threads, "cupyq-upload", initializer=device.use)

    def start(self, part: Any) -> _Started:
        """Allocate the arrays of a part, read those wanted on the host, and queue the others for the threads."""
        # Allocated here, on the current stream, so that memory this stream has just freed can be used again. The copy
        # stream must then wait for what is still queued here: it may read from that memory.
        arrays = new_arrays(self.checkpoint, part, self.cupy.empty)
        self.is_free.record(self.cupy.cuda.get_current_stream())
        self.stream.wait_event(self.is_free)
        return _Started(part, arrays, [self.threads.submit(self._bring, batch) for batch in _batches(part, arrays)])

    def finish(self, started: _Started) -> tuple[Any, dict[str, Any]]:
        """Wait until all copies of a part are queued, and make the current stream wait for their end."""
        for batch in started.batches:
            batch.result()
        self.has_arrived.record(self.stream)
        self.cupy.cuda.get_current_stream().wait_event(self.has_arrived)
        return started.part, started.arrays

    def close(self) -> None:
        """End the threads, whatever they have not begun is dropped, and wait for the copies that are queued."""
        self.threads.shutdown(wait=True, cancel_futures=True)
        self.stream.synchronize()

    def _bring(self, batch: list[_Piece]) -> None:
        """In a thread: read the pieces into a pinned buffer and queue the copies to the device."""
        buffer = self.buffers.get()
        try:
            buffer.is_copied.synchronize()  # returns at once for an event that was never recorded
            memory = buffer.bytes
            for piece in batch:
                staged = memory[piece.offset : piece.offset + piece.values * piece.dtype.itemsize]
                _fill(self.checkpoint, piece.name, piece.begin, staged.view(piece.dtype))
            runtime, start = self.cupy.cuda.runtime, memory.ctypes.data
            for piece in batch:
                nbytes = piece.values * piece.dtype.itemsize
                source, kind = start + piece.offset, runtime.memcpyHostToDevice
                runtime.memcpyAsync(piece.address, source, nbytes, kind, self.stream.ptr)
            buffer.is_copied.record(self.stream)
        finally:
            self.buffers.put(buffer)


def _batches(part: Any, arrays: Mapping[str, Any]) -> Iterator[list[_Piece]]:
    """The device arrays of a part in pieces, as many at a time as fit a pinned buffer."""
    batch: list[_Piece] = []
    used = 0
    for short, wanted in part.tensors.items():
        if wanted.on_host:
            continue
        target, begin = arrays[short], 0
        size, dtype, address = target.size, target.dtype, target.data.ptr
        while begin < size:
            count = min(size - begin, (BUFFER_BYTES - used) // dtype.itemsize)
            batch.append(_Piece(wanted.name, begin, count, dtype, address + begin * dtype.itemsize, used))
            begin += count
            used += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            if used >= BUFFER_BYTES:
                yield batch
                batch, used = [], 0
    if batch:
        yield batch


FLOAT_DTYPES = (float16, bfloat16, float32)
"""What unquantized tensors may be stored as."""
