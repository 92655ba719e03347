"""Where arrays of other frameworks (PyTorch, JAX, Numba, ...) enter and leave: by DLPack, the CUDA array interface, or address.

They pass through `accepts_dlpack`, which every public op carries: they become CuPy or NumPy views without a copy, the op runs
on the caller's stream, and the results go back as arrays of the caller's framework.
"""

import collections
import contextlib
import functools
import inspect
import math
import sys
from sys import getrefcount
from typing import Any

import numpy as np

from cupyq import _replay
from cupyq._arrays import bfloat16, first_line, is_cupy, require_cupy
from cupyq._capsules import DLPACK_BFLOAT, DLPACK_INT, Retyped, is_read_only
from cupyq._kernels import is_tracing
from cupyq._recording import recording
from cupyq.errors import BackendError

_CPU_DEVICES = (1, 3)  # DLPack device types: host memory, page-locked host memory
_GPU_DEVICES = (2, 13)  # memory of a CUDA GPU, managed memory
_INTERFACE = "__cuda_array_interface__"  # what arrays of Numba have in place of DLPack
_native_types: set[type] = set()  # those known to need no edge
_NOTHING: contextlib.AbstractContextManager = contextlib.nullcontext()


class _ForeignKinds(dict[type, bool]):
    """By type, whether its arrays need the edge."""

    def __missing__(self, kind):
        is_native = issubclass(kind, (np.ndarray, np.generic, getattr(sys.modules.get("cupy"), "ndarray", ())))
        self[kind] = not is_native and (hasattr(kind, "__dlpack__") or hasattr(kind, _INTERFACE))
        if not self[kind]:
            _native_types.add(kind)
        elif _package_of(kind) == "torch" and kind.__name__ in ("Tensor", "Parameter"):  # not what stands for one in a trace
            _replay.describers[kind] = _describe_tensor
        return self[kind]


_is_foreign = _ForeignKinds()


def _foreign_of(arguments):
    """Those of the arguments (a dict) that are foreign arrays, with their names."""
    return {name: value for name, value in arguments.items() if _is_foreign[type(value)]}


def accepts_dlpack(op=None, *, writes=("out", "workspace"), replays=False):
    """Decorator for public ops: arrays of any DLPack framework in, arrays of the same framework out.

    PyTorch, JAX and Numba callers get their own arrays back, and the very object they passed where the op wrote into it;
    callers from other frameworks get NumPy or CuPy arrays. Arrays on a GPU that speak no DLPack come by the CUDA array
    interface. `writes` names the arguments the op writes to; read-only arrays (such as JAX's) are refused there. NumPy
    and CuPy callers pay one type look-up per argument. `replays`: all that a call does on a GPU are launches that follow from
    what `_replay.key_of` looks at, so that calls which come again need not be looked at again.
    """
    if op is None:
        return functools.partial(accepts_dlpack, writes=writes, replays=replays)
    signature = inspect.signature(op)
    names, known = tuple(signature.parameters), frozenset(signature.parameters)
    positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in signature.parameters.values())

    @functools.wraps(op)
    def edge(*args, **kwargs):
        if _native_types.issuperset(map(type, args)) and _native_types.issuperset(map(type, kwargs.values())):
            return op(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False), **kwargs)
        foreign = _foreign_of(arguments)
        if not foreign:
            return op(*args, **kwargs)
        if len(args) > positional or len(arguments) < len(args) + len(kwargs) or not known.issuperset(kwargs):
            signature.bind(*args, **kwargs)  # raises; where nothing is wrong it would take longer than all the rest
        return _call_with_foreign(op, arguments, foreign, writes)

    edge.writes = frozenset(writes)  # type: ignore[attr-defined]
    return _replaying(op, edge, names) if replays else edge


def _replaying(op, edge, names):
    """`edge`, by which calls that come again are launched again. names: of the arguments."""

    @functools.wraps(edge)
    def again(*args, **kwargs):
        key = None if is_tracing() or recording.record is not None else _replay.key_of(op, args, kwargs)
        if key is None:
            return edge(*args, **kwargs)
        call = _replay.find(key)
        if call is None:
            return _replay.first_calls(key, names, edge.writes, edge, args, kwargs)
        cuda, device_id = sys.modules["cupy"].cuda, call.device_id
        if cuda.runtime.getDevice() != device_id:
            return edge(*args, **kwargs)
        pointer = _torch_stream(device_id) if call.is_foreign else None
        with (
            _NOTHING if pointer is None or cuda.get_current_stream(device_id).ptr == pointer else stream_at(pointer, device_id)
        ):
            result = call.again((*args, *kwargs.values()))
        if result is _replay.MISALIGNED:
            return edge(*args, **kwargs)
        return _export(result, "torch", {}) if call.is_foreign else result

    return again


def _describe_tensor(tensor):
    if tensor.requires_grad or not tensor.is_contiguous() or (device_id := tensor.get_device()) < 0:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.dtype, device_id


def _call_with_foreign(op, arguments, foreign, writes):
    name, first = next(iter(foreign.items()))
    framework = _framework(first)
    if framework == "torch" and (device_id := first.get_device()) >= 0:
        _require_gpu(device_id, name)
        return _call_on_torch(op, arguments, foreign, writes, device_id)
    with native(arguments, writes) as converted:
        originals = {id(converted[name]): value for name, value in foreign.items()}
        return _export(op(**converted), framework, originals)


def _call_on_torch(op, arguments, foreign, writes, device_id):
    """What `native` and the rest do for tensors of PyTorch on a GPU, in a fraction of the host's time."""
    cuda = sys.modules["cupy"].cuda
    if cuda.runtime.getDevice() != device_id:
        with cuda.Device(device_id):
            return _call_on_torch(op, arguments, foreign, writes, device_id)
    pointer = _torch_stream(device_id)
    if cuda.get_current_stream(device_id).ptr != pointer:
        with stream_at(pointer, device_id):
            return _call_on_torch(op, arguments, foreign, writes, device_id)
    originals, loans = _lend(arguments, foreign, writes)
    result = _export(op(**arguments), "torch", originals)
    arguments.clear()  # nothing else here refers to the views
    for loan in loans:
        loan.end()
    return result


@contextlib.contextmanager
def native(arguments, writes=()):
    """The arguments (a dict) with foreign arrays as NumPy or CuPy views, for work within this context.

    There, CuPy's current device and stream are the caller's, and foreign arrays live until what is queued has read them.
    """
    foreign = _foreign_of(arguments)
    if not foreign:
        yield arguments
        return
    framework = _framework(next(iter(foreign.values())))
    with _caller_stream(framework, foreign):
        converted = dict(arguments)
        for name, value in foreign.items():
            converted[name] = view_of(value, name, writes=name in writes)
        yield converted
        if framework != "torch":
            _hold_until_done(converted, foreign)


def _framework(array):
    return _package_of(array.__class__)


@functools.cache
def _package_of(kind):
    return kind.__module__.split(".")[0]


class _StreamHandle:
    """A raw stream pointer, as the CUDA stream protocol hands streams around."""

    def __init__(self, pointer):
        self.pointer = pointer

    def __cuda_stream__(self):
        return 0, self.pointer  # protocol version, cudaStream_t


@contextlib.contextmanager
def _caller_stream(framework, arrays):
    """Make the caller's device and stream CuPy's current ones while the op runs.

    PyTorch has a current stream per device: work is queued there. Other frameworks have no such notion; CuPy's current
    stream is used, and DLPack's stream handshake, or the stream that the CUDA array interface names, orders it behind the
    producer.
    """
    places = ((name, gpu_of(array, name)) for name, array in arrays.items())
    name, device_id = next((place for place in places if place[1] is not None), ("", None))
    if device_id is None:
        yield
        return
    _require_gpu(device_id, name)
    with require_cupy().cuda.Device(device_id):
        if framework == "torch":
            with stream_at(_torch_stream(device_id), device_id):
                yield
        else:
            yield


def gpu_of(array, name):
    """The number of the GPU that holds a foreign array; None for the host. TypeError where it is neither."""
    if _framework(array) == "torch":  # a hundredth of the time of asking by DLPack
        device_id = array.get_device()
        return None if device_id < 0 else device_id
    if not hasattr(array, "__dlpack__"):
        return _gpu_of_address(getattr(array, _INTERFACE)["data"][0], name)
    try:
        kind, device_id = array.__dlpack_device__()
    except AttributeError:  # what stands for an array while JAX compiles
        raise TypeError(
            f"{name} is a {type(array).__name__} without values: in jax.jit use cupyq.interop.jax_callback"
        ) from None
    if kind in _CPU_DEVICES:
        return None
    if kind not in _GPU_DEVICES:
        raise TypeError(f"{name} is on a device of DLPack's type {int(kind)}, neither the host nor a CUDA GPU: move it to one")
    return int(device_id)


def _gpu_of_address(address, name):
    """The number of the GPU whose memory an address is in; the current one for that of an empty array, 0."""
    runtime = require_cupy().cuda.runtime
    try:
        device_id = runtime.pointerGetAttributes(address).device if address else runtime.getDevice()
    except runtime.CUDARuntimeError as error:
        raise BackendError(f"{name} is on a GPU, and CuPy cannot use it: {first_line(error)}") from None
    if device_id < 0:
        raise TypeError(f"{name} is not in the memory of a CUDA GPU: move it to one")
    return device_id


@functools.cache
def _require_gpu(device_id, name):
    """Raise BackendError unless CuPy can use the GPU of that number."""
    cupy = require_cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"{name} is on GPU {device_id}, and CuPy finds none here: {first_line(error)}") from None
    if not 0 <= device_id < count:
        raise BackendError(f"{name} is on GPU {device_id}, and CuPy finds {count} GPUs here: check CUDA_VISIBLE_DEVICES")


def _torch_stream(device_id):
    torch = sys.modules["torch"]
    # What Triton and torch.compile call; the public way builds a Stream object for its address.
    address_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device_id).cuda_stream if address_of is None else address_of(device_id)


@functools.lru_cache(maxsize=64)
def stream_at(pointer, device_id):
    """CuPy's view of another library's stream; call within the stream's device. 0 is the default stream."""
    cupy = require_cupy()
    return cupy.cuda.Stream.from_external(_StreamHandle(pointer)) if pointer else cupy.cuda.Stream.null


def view_of(array, name="an array", *, writes=False):
    """A CuPy or NumPy view of another framework's array, whose values CuPy's current stream will find there."""
    framework = _framework(array)
    if framework == "torch":
        if array.requires_grad or not array.is_contiguous():
            _refuse_tensor(array, name)
        if (device_id := array.get_device()) >= 0 and (dtype := _torch_dtypes().get(array.dtype)) is not None:
            return _view_at(array.data_ptr(), tuple(array.shape), dtype, device_id, array)
    elif not hasattr(array, "__dlpack__"):
        return _view_of_interface(array, name, writes)
    elif writes and framework in ("jax", "jaxlib"):
        raise ValueError(f"{name} is a JAX array, which is immutable: leave {name} out and use the returned array")
    device_id = gpu_of(array, name)
    is_bfloat16 = str(getattr(array, "dtype", "")).endswith("bfloat16")
    if writes and device_id is not None and framework != "torch" and is_read_only(array):
        raise ValueError(f"{name} is read-only and would be written: pass a writable array")
    library = np if device_id is None else require_cupy()
    try:
        view = library.from_dlpack(Retyped(array, DLPACK_INT) if is_bfloat16 else array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} ({type(array).__name__}) cannot be taken by DLPack: {first_line(error)}") from None
    if writes and device_id is None and not view.flags.writeable:
        raise ValueError(f"{name} is read-only and would be written: pass a writable array")
    return view.view(bfloat16) if is_bfloat16 else view


def _refuse_tensor(tensor, name):
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, and cupyq records none: pass {name}.detach()")
    raise ValueError(f"{name} must be C-contiguous, got strides {tuple(tensor.stride())}: pass {name}.contiguous()")


@functools.cache
def _torch_dtypes():
    names = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
    torch = sys.modules["torch"]
    return {getattr(torch, name): np.dtype(name) for name in names} | {torch.bfloat16: bfloat16}


def _view_at(address, shape, dtype, device_id, owner, strides=None):
    """A CuPy view of memory of a GPU, which keeps `owner` alive: in a tenth of the time that DLPack takes.

    DLPack would order the consumer's stream behind the producer's. For a tensor of PyTorch they are one.
    """
    cuda = sys.modules["cupy"].cuda
    memory = cuda.UnownedMemory(address, math.prod(shape) * dtype.itemsize, owner, device_id)
    return sys.modules["cupy"].ndarray(shape, dtype, cuda.MemoryPointer(memory, 0), strides=strides)


def _view_of_interface(array, name, writes):
    """A CuPy view of what the CUDA array interface describes. CuPy's own would make the host wait for the array's stream.

    Source: CUDA Array Interface, version 3, https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html.
    """
    described = getattr(array, _INTERFACE)
    address, is_read_only = described["data"]
    if writes and is_read_only:
        raise ValueError(f"{name} is read-only and would be written: pass a writable array")
    if described.get("mask") is not None:
        raise TypeError(f"{name} has a mask, which no kernel reads: pass its values alone")
    shape, dtype = tuple(described["shape"]), np.dtype(described["typestr"])
    device_id = _gpu_of_address(address, name)
    if (stream := described.get("stream")) is not None:
        _wait_for(stream, device_id)
    return _view_at(address, shape, dtype, device_id, array, described.get("strides"))


def _wait_for(pointer, device_id):
    """Order CuPy's current stream behind what another one has been given; the host goes on."""
    cuda = sys.modules["cupy"].cuda
    current = cuda.get_current_stream(device_id)
    if pointer != (current.ptr or 1):  # cudaStreamLegacy, which CuPy calls 0
        event = cuda.Event(disable_timing=True)
        event.record(stream_at(pointer, device_id))
        current.wait_event(event)


# --- loans ------------------------------------------------------------------------------------------------------------

# Making a view takes longer than all else that a tensor costs, and calls come back to the same memory: weights, caches and
# workspaces, and activations, whose addresses PyTorch's allocator gives out again. So views of tensors are kept, by all that
# they depend on. One that is idle owns nothing, and nobody else has it. A call takes it out of the table, by which no other
# thread finds it, and until it is back it owns the tensor, as every view does. It goes back only where nothing refers to it
# or its memory any more: what an op has kept or returned of an argument owns the tensor for as long as it lives.

_idle: dict[tuple, "_Loan"] = {}
_MOST_IDLE = 4096


class _Loan:
    """A view of the memory that `key` describes: argument, address, shape, dtype and device number."""

    __slots__ = ("key", "owned", "view", "pointer", "memory", "alone")

    def __init__(self, key, dtype):
        _, address, shape, _, device_id = key
        self.key, self.owned = key, [None]  # a place for the tensor: CuPy's owner of memory cannot be exchanged
        self.view = _view_at(address, tuple(shape), dtype, device_id, self.owned)
        self.pointer, self.memory = self.view.data, self.view.data.mem
        self.alone = self.references()

    def references(self):
        """How many there are to the view and its memory, which arrays made of it share: fewest where no one else has any."""
        return getrefcount(self.view) + getrefcount(self.pointer) + getrefcount(self.memory)

    def end(self):
        if self.references() != self.alone:
            return
        self.owned[0] = None
        if len(_idle) >= _MOST_IDLE:
            _idle.clear()
        _idle[self.key] = self


def _lend(arguments, foreign, writes):
    """Put views into `arguments` -> {id of a view: the array}, and the loans, which end with the call."""
    originals, loans = {}, []
    for name, array in foreign.items():
        loan = _loan_of(array, name) if _framework(array) == "torch" else None
        if loan is None:
            view = view_of(array, name, writes=name in writes)
        else:
            view = loan.view
            loans.append(loan)
        arguments[name] = view
        originals[id(view)] = array
    return originals, loans


def _loan_of(tensor, name):
    """A loan that owns the tensor; None for a tensor on the host, or of a dtype that has to come by DLPack."""
    if tensor.requires_grad or not tensor.is_contiguous():
        _refuse_tensor(tensor, name)
    key = name, tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.get_device()
    loan = _idle.pop(key, None)
    if loan is None:
        dtype = _torch_dtypes().get(tensor.dtype)
        if dtype is None or tensor.get_device() < 0:
            return None
        loan = _Loan(key, dtype)
    loan.owned[0] = tensor
    return loan


# --- results ----------------------------------------------------------------------------------------------------------


def _export(result, framework, originals):
    if isinstance(result, tuple):
        return tuple(_export(item, framework, originals) for item in result)
    if id(result) in originals:
        return originals[id(result)]
    if not (isinstance(result, np.ndarray) or is_cupy(result)):
        return result
    if framework == "numba" and is_cupy(result) and result.dtype != bfloat16:  # which Numba has not
        return sys.modules["numba.cuda"].as_cuda_array(result, sync=False)  # sync: the host would wait for the stream
    if framework not in ("torch", "jax", "jaxlib"):
        return result
    bits = result.view(np.int16) if result.dtype == bfloat16 else result
    if framework == "torch":  # on whose stream the op ran: nothing has to wait, and asking for it again takes its time
        torch = sys.modules["torch"]
        tensor = torch.from_dlpack(bits.__dlpack__(stream=-1) if is_cupy(bits) else bits)
        return tensor if bits is result else tensor.view(torch.bfloat16)
    if isinstance(result, np.ndarray):
        return sys.modules["jax"].numpy.asarray(result)
    return sys.modules["jax"].dlpack.from_dlpack(bits if bits is result else Retyped(bits, DLPACK_BFLOAT))


_in_flight: collections.deque[Any] = collections.deque()


def _hold_until_done(converted, foreign):
    """Keep the caller's GPU arrays alive while the queued kernels read them.

    PyTorch reuses freed memory in the order of the stream the op ran on. Others, such as JAX, work on streams of their
    own and may reuse an array that was dropped right after the call, before our stream has come to the kernel.
    """
    if not any(is_cupy(converted[name]) for name in foreign):
        return
    while _in_flight and _in_flight[0][0].done:
        _in_flight.popleft()
    event = sys.modules["cupy"].cuda.Event(disable_timing=True)
    event.record()
    _in_flight.append((event, tuple(foreign.values())))
