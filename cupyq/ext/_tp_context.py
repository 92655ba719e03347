"""Tensor parallelism as exllamav2 does it: one process, several GPUs, and all they exchange goes through host memory.

Every function begins with a point where the streams of the context and the caller's current ones wait for each other, and
ends with another, and so does every use of the page-locked buffers within: no copy can overtake a kernel or another copy,
and what the caller queues next finds the results. Only the host must wait by itself before it reads a buffer.

On NumPy arrays (a context without streams) the device numbers of the splits are mere names. On GPUs, too, several entries
of a split may share a device.
"""

import contextlib
import sys

import numpy as np

from cupyq._arrays import byte_bounds, check, float16, is_cupy
from cupyq.ext._arrays import integer
from cupyq.ext._handles import handles

KV, ID, VC, RS, Q = range(5)
"""broadcast_type: which split. Units are key-value heads, intermediate, vocabulary and hidden columns, query heads."""

SPLITS = ("kv_split", "id_split", "vc_split", "rs_split", "q_split")


def context_of(handle):
    """The TPContext behind the argument tp_context."""
    return handles.get(handle, "tp_context", "tp_context")


def device_of(array):
    """The GPU an array is on, or None."""
    return array.device.id if is_cupy(array) else None


class TPContext:
    """Who holds what, the host buffers all exchange goes through, and the streams the work is queued on."""

    def __init__(self, splits, pinned, streams):
        self.splits = splits  # by broadcast_type: tuples (device, begin, end)
        self._pinned = pinned  # uint8 [bytes] each
        self.streams = streams  # {device: CuPy stream}; empty where arrays are NumPy's

    def split(self, broadcast_type, name):
        """The entries of a split by its number."""
        code = integer(broadcast_type, name)
        if not 0 <= code < len(SPLITS):
            raise ValueError(f"{name} must be 0 (KV), 1 (ID), 2 (VC), 3 (RS) or 4 (Q), got {code}")
        if not self.splits[code]:
            raise ValueError(f"{name} {code} asks for {SPLITS[code]}, which make_tp_context was given empty")
        return self.splits[code]

    def host(self, buffer, dtype, shape, name):
        """The beginning of a host buffer as an array; `name` is what has to fit."""
        buffer = integer(buffer, "buffer")
        if not 0 <= buffer < len(self._pinned):
            raise ValueError(f"buffer must be one of the {len(self._pinned)} buffers of pinned_temp, from 0, got {buffer}")
        pinned, needed = self._pinned[buffer], int(np.prod(shape)) * dtype.itemsize
        if needed > pinned.size:
            raise ValueError(f"{name} takes {needed} bytes of pinned_temp[{buffer}], which has {pinned.size}: make it larger")
        return pinned[:needed].view(dtype).reshape(shape)

    def check_place(self, array, device, name, *, dtype=float16):
        """Raise unless the array is where an entry of a split says, and has one of the dtypes."""
        if not self.streams:
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name} must be a NumPy array, as make_tp_context got no streams, got {type(array).__name__}")
        elif not is_cupy(array):
            where = "a GPU" if device is None else f"GPU {device}"
            raise TypeError(f"{name} must be an array on {where}, got {type(array).__name__}: move it there")
        elif array.device.id != device:
            raise ValueError(f"{name} must be on GPU {device}, as the split says, got GPU {array.device.id}: move it there")
        check(array, name, dtype=dtype)

    def check_stream(self, device, name):
        """Raise where an array or matrix is on a device that has no stream."""
        if device is not None and self.streams and device not in self.streams:
            raise ValueError(f"{name} is on GPU {device}, for which make_tp_context got no stream")

    def check_matrix(self, matrix, device, name):
        """Raise unless the quantized matrix is where an entry of a split says."""
        if (matrix.xp is np) != (not self.streams):
            there = "on the host" if matrix.xp is np else "on a GPU"
            raise TypeError(f"{name} is a matrix {there}, and make_tp_context got {len(self.streams)} streams: make it anew")
        if self.streams and matrix.tiles.words.device.id != device:
            found = matrix.tiles.words.device.id
            raise ValueError(f"{name} must be a matrix on GPU {device}, as the split says, got GPU {found}")

    # --- order ---

    @contextlib.contextmanager
    def on(self, device):
        """Work within goes to this device, on the context's stream (the current one where it has none there)."""
        if not self.streams:
            yield None
            return
        cuda = sys.modules["cupy"].cuda
        with cuda.Device(device):
            own = self.streams.get(device)
            with cuda.get_current_stream() if own is None else own as stream:
                yield stream

    @contextlib.contextmanager
    def ordered(self, source=None):
        """Work within comes after all that callers have queued, and before all they will; source: an array they own."""
        if not self.streams:
            yield
            return
        cuda = sys.modules["cupy"].cuda
        devices = set(self.streams) | ({device_of(source)} - {None})
        callers = [(device, cuda.get_current_stream(device)) for device in sorted(devices)]
        own = {(device, stream.ptr) for device, stream in self.streams.items()}
        streams = [*self.streams.items(), *((d, stream) for d, stream in callers if (d, stream.ptr) not in own)]
        _join(streams)
        try:
            yield
        finally:
            _join(streams)

    def barrier(self, device=None):
        """All streams of the context, and the current one of `device`, wait for each other; the host does not."""
        streams = list(self.streams.items())
        if streams and device is not None and device not in self.streams:
            streams.append((device, sys.modules["cupy"].cuda.get_current_stream(device)))
        _join(streams)

    def wait(self):
        """The host waits for all that the context's streams have queued."""
        for device, stream in self.streams.items():
            with sys.modules["cupy"].cuda.Device(device):
                stream.synchronize()

    # --- copies ---

    def receive(self, source, host, column):
        """host[:, column : column + width] = source [rows, width], from its device's stream."""
        if isinstance(source, np.ndarray):
            host[:, column : column + source.shape[1]] = source
        elif source.size:
            runtime, (rows, width), item = sys.modules["cupy"].cuda.runtime, source.shape, source.itemsize
            target, pitch = host.ctypes.data + column * item, host.shape[1] * item
            with self.on(source.device.id) as stream:
                runtime.memcpy2DAsync(
                    target, pitch, source.data.ptr, width * item, width * item, rows, runtime.memcpyDeviceToHost, stream.ptr
                )

    def send(self, host, target):
        """The beginning of target = host, on target's device's stream."""
        if isinstance(target, np.ndarray):
            target.reshape(-1)[: host.size] = host.reshape(-1)
        elif host.size:
            runtime = sys.modules["cupy"].cuda.runtime
            with self.on(target.device.id) as stream:
                runtime.memcpyAsync(
                    target.data.ptr, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, stream.ptr
                )  # fmt: skip


def _join(streams):
    """What is queued from now on on any of these (device, stream) waits for what is queued already on all of them."""
    if len(streams) < 2:
        return
    cuda = sys.modules["cupy"].cuda

    def mark(device, stream):
        with cuda.Device(device):
            event = cuda.Event(disable_timing=True)
            event.record(stream)
        return event

    (hub_device, hub), *others = streams
    for event in [mark(*other) for other in others]:
        with cuda.Device(hub_device):
            hub.wait_event(event)
    all_of_it = mark(hub_device, hub)
    for device, stream in others:
        with cuda.Device(device):
            stream.wait_event(all_of_it)


# --- exchange -----------------------------------------------------------------------------------------------------------


def broadcast(context, buffer, source, targets):
    """Every target = source, by way of a host buffer."""
    host = context.host(buffer, source.dtype, (1, source.size), "source")
    if is_cupy(source):
        context.receive(source.reshape(1, -1), host, 0)
        context.barrier(source.device.id)
    elif byte_bounds(source) != byte_bounds(host):
        context.wait()  # copies from and to the buffer, and to source, may still be under way
        host[...] = source.reshape(1, -1)
    for target in targets:
        context.send(host, target)
    context.barrier()


def gather(context, host, parts, targets):
    """host [rows, columns] = its parts, (array [rows, width], first column) each; then every target = host."""
    for array, column in parts:
        context.receive(array, host, column)
    context.barrier()
    for target in targets:
        context.send(host, target)
    context.barrier()
