"""Where steps run: at once on NumPy, or on a stream of their own, whose work may be captured as CUDA graphs."""

import contextlib
import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cupyq import _fork, _kernels
from cupyq.ops.matmul import forget_stream


class _Collecting:
    """Whether Python may collect garbage: not while any thread captures."""

    lock = threading.Lock()
    captures = 0
    was_enabled = False


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """What is collected may give memory back to the driver, which a capture would not survive."""
    with _Collecting.lock:
        if _Collecting.captures == 0:
            _Collecting.was_enabled = gc.isenabled()
            gc.disable()
        _Collecting.captures += 1
    try:
        yield
    finally:
        with _Collecting.lock:
            _Collecting.captures -= 1
            if _Collecting.captures == 0 and _Collecting.was_enabled:
                gc.enable()


class HostQueue:
    """NumPy: what is queued is done at once."""

    has_graphs = False

    def entered(self) -> Any:
        return contextlib.nullcontext()

    def join(self) -> None:
        pass

    def memory_bytes(self) -> int:
        return 0

    def landing(self, batch: int) -> "_HostLanding":
        return _HostLanding()


class StreamQueue:
    """A stream, and a pool of memory that nobody else is given: graphs keep addresses, whatever Python has freed."""

    has_graphs = True

    def __init__(self, xp: Any, device_id: int):
        _fork.refuse()
        self.cuda, self.device_id = xp.cuda, device_id
        with self.cuda.Device(device_id):
            self.stream = self.cuda.Stream(non_blocking=True)
            self.pool = self.new_pool()
            self._event = self.cuda.Event(disable_timing=True)
        # Before the stream goes: those of models that are long gone would keep workspaces of megabytes.
        weakref.finalize(self, _forget_stream, device_id, self.stream.ptr).atexit = False

    def new_pool(self) -> Any:
        """Another pool of memory, for `entered`. What is free in it when the queue goes is given back."""
        pool = self.cuda.MemoryPool()
        # CuPy 14.2 leaves a kilobyte of host memory or more behind for a pool that ends with free blocks.
        weakref.finalize(self, pool.free_all_blocks).atexit = False
        return pool

    @contextlib.contextmanager
    def entered(self, pool: Any = None) -> Iterator[None]:
        """Work is queued here: behind what the caller's stream has, and before what it is given later.

        Its memory comes from `pool`, else from the queue's own.
        """
        _fork.refuse()
        malloc = (self.pool if pool is None else pool).malloc
        with self.cuda.Device(self.device_id):
            caller = self.cuda.get_current_stream()
            self._event.record(caller)
            self.stream.wait_event(self._event)
            try:
                with self.stream, self.cuda.using_allocator(malloc):
                    yield
            finally:
                self._event.record(self.stream)
                caller.wait_event(self._event)

    def join(self) -> None:
        """Order what is queued here and on the caller's stream before what either is given later."""
        with self.entered():
            pass

    def memory_bytes(self) -> int:
        return self.pool.total_bytes()

    def captured(self, compute: Callable[[], None]) -> Any:
        """The launches of compute() as a graph; nothing runs."""
        with without_collecting():
            self.stream.begin_capture()
            try:
                compute()
            except BaseException:
                with contextlib.suppress(Exception):
                    self.stream.end_capture()
                raise
        return self.stream.end_capture()

    def landing(self, batch: int) -> "_PinnedLanding":
        return _PinnedLanding(self, batch)


def _forget_stream(device_id: int, stream: int) -> None:
    _kernels.forget_stream(device_id, stream)
    forget_stream(device_id, stream)


class _HostLanding:
    """Tokens on their way to the host: they are there."""

    ahead = 0

    def send(self, tokens: np.ndarray) -> None:
        self._tokens = tokens.copy()

    def receive(self) -> np.ndarray:
        return self._tokens

    def close(self) -> None:
        pass


class _PinnedLanding:
    """Tokens on their way to the host, at most `ahead` + 1 at a time, copied beside the steps on another stream."""

    ahead = 2

    def __init__(self, queue: StreamQueue, batch: int):
        self._queue = queue
        places, cuda = self.ahead + 1, queue.cuda
        with cuda.Device(queue.device_id):
            self._stream = cuda.Stream(non_blocking=True)
            self._drawn = cuda.Event(disable_timing=True)
            self._arrived = [cuda.Event(disable_timing=True) for _ in range(places)]
        memory = cuda.alloc_pinned_memory(4 * places * batch)
        self._places = np.frombuffer(memory, np.int32, places * batch).reshape(places, batch)
        self._sent: deque[int] = deque()
        self._next = 0

    def send(self, tokens: Any) -> None:
        place, self._next = self._next, (self._next + 1) % len(self._places)
        with self._queue.cuda.Device(self._queue.device_id):
            self._drawn.record(self._queue.stream)
            self._stream.wait_event(self._drawn)
            tokens.get(stream=self._stream, out=self._places[place], blocking=False)
            self._arrived[place].record(self._stream)
        self._sent.append(place)

    def receive(self) -> np.ndarray:
        """The oldest of those that were sent, waited for."""
        place = self._sent.popleft()
        self._arrived[place].synchronize()
        return self._places[place].copy()

    def close(self) -> None:
        """Wait for all: the places must outlive the copies into them."""
        self._stream.synchronize()
