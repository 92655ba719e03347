"""Which library an array belongs to, the checks every op shares, and the one place where DLPack arrays enter and leave.

NumPy arrays select the reference, CuPy arrays the kernels. Arrays of other frameworks (PyTorch, JAX, Numba, ...) pass
through `accepts_dlpack`, which every public op carries: they become CuPy or NumPy views without a copy, the op runs on the
caller's stream, and the results go back as arrays of the caller's framework.
"""

import collections
import contextlib
import functools
import inspect
import math
import os
import sys
from typing import Any

import ml_dtypes
import numpy as np

from cupyq import _fork
from cupyq._capsules import DLPACK_BFLOAT, DLPACK_INT, Retyped, is_read_only
from cupyq.errors import BackendError

float16 = np.dtype(np.float16)
float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
int32 = np.dtype(np.int32)

FLOATS = (float16, bfloat16, float32)
"""The dtypes activations and weights may have."""


def require_cupy():
    """The `cupy` module, or a BackendError that says how to get it."""
    try:
        import cupy

        if not hasattr(cupy, "ndarray"):  # Python imports a folder without files as well, such as an uninstalled CuPy left
            raise ImportError(f"nothing is in {', '.join(getattr(cupy, '__path__', ['it']))}")
    except OSError as error:  # CuPy creates a folder below HOME when it is imported
        raise BackendError(
            f"CuPy cannot be imported ({first_line(error)}); if HOME is not writable, set CUPY_CACHE_DIR to a folder that is"
        ) from None
    except Exception as error:
        if is_absence(error):
            mend = "install it with `pip install 'cupyq[cuda12]'` or `'cupyq[cuda13]'`"
        else:  # an installation that is broken raises whatever its remains run into
            mend = "`cupyq doctor` says what mends it"
        raise BackendError(f"CuPy cannot be imported ({first_line(error)}); {mend}") from None
    return cupy


def is_absence(error):
    """Whether importing CuPy failed with this because it is not installed, rather than broken."""
    return isinstance(error, ModuleNotFoundError) and error.name == "cupy"


def first_line(error):
    """The first line of an exception's text that says something: libraries frame theirs with empty lines and rules."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if any(map(str.isalnum, line))), type(error).__name__)


def is_cupy(array):
    """True for CuPy arrays. Does not import CuPy: where nobody has imported it, no array can be CuPy's."""
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


def namespace(**arrays):
    """The module (`numpy` or `cupy`) all the given arrays belong to; `None` values are skipped.

    Objects with an `xp` attribute (such as QMatrix) count as what that says. Raises TypeError for foreign objects and
    for a mix of the two libraries, ValueError for CuPy arrays on different devices: nothing is ever moved silently.
    """
    xp = first = device = None
    cupy: Any = sys.modules.get("cupy")
    cupy_array = getattr(cupy, "ndarray", ())
    for name, array in arrays.items():
        if array is None:
            continue
        if isinstance(array, np.ndarray):
            this = np
        elif isinstance(array, cupy_array):
            this = cupy
            this_device = array.data.device_id  # array.device.id builds an object
            if device is None:
                device = this_device
            elif device != this_device:
                raise ValueError(f"{name} is on GPU {this_device}, {first} on GPU {device}: move them to one device")
        elif hasattr(array, "xp"):
            this = array.xp
        else:
            raise TypeError(f"{name} must be a NumPy or CuPy array (or come by DLPack), got {type(array).__name__}")
        if xp is None:
            xp, first = this, name
        elif xp is not this:
            kinds = {True: "a NumPy array", False: "a CuPy array"}
            raise TypeError(
                f"{first} is {kinds[xp is np]}, {name} is {kinds[this is np]}: move one with cupy.asarray() or .get()"
            )
    if xp is None:
        raise TypeError(f"{next(iter(arrays), 'an argument')} must be an array, got None")
    return xp


def check(array, name, *, dtype=None, shape=None, ndim=None, last=None, writes=False):
    """Raise unless `array` is C-contiguous and has the dtype(s), shape, ndim and last size asked for.

    None in `shape` matches any size. `writes`: the array must also be writable.
    """
    if type(array) not in _array_types:
        admit(array, name)
    if dtype is not None and array.dtype is not dtype:
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if array.dtype not in dtypes:
            expected = " or ".join(str(np.dtype(d)) for d in dtypes)
            raise TypeError(f"{name} must have dtype {expected}, got {array.dtype}")
    if shape is not None and (found := array.shape) != shape and not _is_shape(found, shape):
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    if last is not None and (array.ndim == 0 or array.shape[-1] != last):
        raise ValueError(f"{name} must have {last} as its last dimension, got shape {array.shape}")
    is_on_host = isinstance(array, np.ndarray)
    if not (array.flags.c_contiguous if is_on_host else array._c_contiguous):  # CuPy's flags take ten times as long
        raise ValueError(f"{name} must be C-contiguous, got strides {array.strides}: pass ascontiguousarray({name})")
    if not is_on_host and array.data.ptr % array.itemsize:  # NumPy reads those, kernels cannot
        raise ValueError(f"{name} must begin at a multiple of its {array.itemsize} bytes a value: pass {name}.copy()")
    if writes and is_on_host and not array.flags.writeable:
        raise ValueError(f"{name} is read-only and would be written: pass a writable array")


_array_types: set[type] = {np.ndarray}  # those seen whose arrays mean what they hold

if hasattr(os, "register_at_fork"):  # seen anew: CuPy's arrays may be of no use in the child
    os.register_at_fork(after_in_child=_array_types.clear)


def admit(array, name):
    """Remember the type of an array. TypeError for what is none, and where `*` or a mask would give other results."""
    if isinstance(array, (np.matrix, np.ma.MaskedArray)):
        raise TypeError(f"{name} must be a plain array, got {type(array).__name__}: pass numpy.asarray({name})")
    if not (isinstance(array, np.ndarray) or is_cupy(array)):
        raise TypeError(f"{name} must be a NumPy or CuPy array (or come by DLPack), got {type(array).__name__}")
    if is_cupy(array):
        _fork.refuse()
    _array_types.add(type(array))


def _is_shape(found, shape):
    return len(shape) == len(found) and all(s is None or s == t for s, t in zip(shape, found, strict=True))


def output(xp, out, shape, dtype, name="out"):
    """`out` after checking that it can take the result, or a new array where it is None."""
    if out is None:
        return xp.empty(shape, dtype)
    if not isinstance(out, xp.ndarray) and namespace(**{name: out}) is not xp:
        raise TypeError(f"{name} must be an array of {xp.__name__}, as the inputs are, got {type(out).__module__}")
    check(out, name, dtype=dtype, shape=shape, writes=True)
    return out


def byte_bounds(array):
    """First and one-past-last address of a C-contiguous array."""
    address = address_of(array)
    return address, address + array.nbytes


def address_of(array):
    """Where the first value of an array of NumPy or CuPy lies."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def refuse_partial_overlap(out, **inputs):
    """Raise ValueError where `out` shares memory with an input without being that input exactly."""
    low, high = byte_bounds(out)
    for name, array in inputs.items():
        if array is None or array is out:
            continue
        start = address_of(array)
        if start < high and low < (end := start + array.nbytes) and (start, end, array.dtype) != (low, high, out.dtype):
            raise ValueError(f"out overlaps {name} partly: pass {name} itself or separate memory")


# --- the DLPack edge ------------------------------------------------------------------------------------------------

_CPU_DEVICES = (1, 3)  # DLPack device types: host memory, page-locked host memory
_GPU_DEVICES = (2, 13)  # memory of a CUDA GPU, managed memory
_INTERFACE = "__cuda_array_interface__"  # what arrays of Numba have in place of DLPack
_foreign_types: dict[type, bool] = {}  # type -> whether it needs the edge
_native_types: set[type] = set()  # those that do not


def _is_foreign(value):
    kind = type(value)
    known = _foreign_types.get(kind)
    if known is None:
        native = isinstance(value, (np.ndarray, np.generic)) or is_cupy(value)
        known = _foreign_types[kind] = not native and (hasattr(kind, "__dlpack__") or hasattr(kind, _INTERFACE))
        if not known:
            _native_types.add(kind)
    return known


def accepts_dlpack(op=None, *, writes=("out", "workspace")):
    """Decorator for public ops: arrays of any DLPack framework in, arrays of the same framework out.

    PyTorch, JAX and Numba callers get their own arrays back, and the very object they passed where the op wrote into it;
    callers from other frameworks get NumPy or CuPy arrays. Arrays on a GPU that speak no DLPack come by the CUDA array
    interface. `writes` names the arguments the op writes to; read-only arrays (such as JAX's) are refused there. NumPy
    and CuPy callers pay one type look-up per argument.
    """
    if op is None:
        return functools.partial(accepts_dlpack, writes=writes)
    signature = inspect.signature(op)
    names, known = tuple(signature.parameters), frozenset(signature.parameters)
    positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in signature.parameters.values())

    @functools.wraps(op)
    def edge(*args, **kwargs):
        if _native_types.issuperset(map(type, args)) and _native_types.issuperset(map(type, kwargs.values())):
            return op(*args, **kwargs)
        if not any(map(_is_foreign, (*args, *kwargs.values()))):
            return op(*args, **kwargs)
        given = dict(zip(names, args, strict=False))
        if len(args) > positional or not given.keys().isdisjoint(kwargs) or not known.issuperset(kwargs):
            signature.bind(*args, **kwargs)  # raises; where nothing is wrong it would take longer than all the rest
        return _call_with_foreign(op, given | kwargs, writes)

    return edge


def _call_with_foreign(op, arguments, writes):
    first = next(filter(_is_foreign, arguments.values()))
    framework = _framework(first)
    if framework == "torch" and (device_id := first.get_device()) >= 0:
        return _call_on_torch(op, arguments, writes, device_id)
    with native(arguments, writes) as converted:
        originals = {id(converted[name]): value for name, value in arguments.items() if _is_foreign(value)}
        return _export(op(**converted), framework, originals)


def _call_on_torch(op, arguments, writes, device_id):
    """What `native` and the rest do for tensors of PyTorch on a GPU, in half of the host's time."""
    foreign = [(name, value) for name, value in arguments.items() if _is_foreign(value)]
    _require_gpu(device_id, foreign[0][0])
    cuda = require_cupy().cuda
    if cuda.runtime.getDevice() != device_id:
        with cuda.Device(device_id):
            return _call_on_torch(op, arguments, writes, device_id)
    pointer = _torch_stream(device_id)
    if cuda.get_current_stream(device_id).ptr != pointer:
        with stream_at(pointer, device_id):
            return _call_on_torch(op, arguments, writes, device_id)
    originals = {}
    for name, value in foreign:
        arguments[name] = view = view_of(value, name, writes=name in writes)
        originals[id(view)] = value
    return _export(op(**arguments), "torch", originals)


@contextlib.contextmanager
def native(arguments, writes=()):
    """The arguments (a dict) with foreign arrays as NumPy or CuPy views, for work within this context.

    There, CuPy's current device and stream are the caller's, and foreign arrays live until what is queued has read them.
    """
    foreign = {name: value for name, value in arguments.items() if _is_foreign(value)}
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
        if array.requires_grad:
            raise ValueError(f"{name} requires a gradient, and cupyq records none: pass {name}.detach()")
        if not array.is_contiguous():
            raise ValueError(f"{name} must be C-contiguous, got strides {tuple(array.stride())}: pass {name}.contiguous()")
        if (device_id := array.get_device()) >= 0 and (dtype := _torch_dtypes().get(array.dtype)) is not None:
            return _view_of_torch(array, dtype, device_id)
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


@functools.cache
def _torch_dtypes():
    names = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
    torch = sys.modules["torch"]
    return {getattr(torch, name): np.dtype(name) for name in names} | {torch.bfloat16: bfloat16}


def _view_of_torch(tensor, dtype, device_id):
    """A CuPy view of a contiguous tensor on a GPU, in a tenth of the time that DLPack takes.

    DLPack would order the consumer's stream behind the producer's. Here they are one: the op runs on PyTorch's stream.
    """
    cupy = sys.modules["cupy"]
    shape = tuple(tensor.shape)
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.numel() * dtype.itemsize, tensor, device_id)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def _view_of_interface(array, name, writes):
    """A CuPy view of what the CUDA array interface describes. CuPy's own would make the host wait for the array's stream.

    Source: CUDA Array Interface, version 3, https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html.
    """
    cupy = require_cupy()
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
    memory = cupy.cuda.UnownedMemory(address, math.prod(shape) * dtype.itemsize, array, device_id)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides=described.get("strides"))


def _wait_for(pointer, device_id):
    """Order CuPy's current stream behind what another one has been given; the host goes on."""
    cuda = sys.modules["cupy"].cuda
    current = cuda.get_current_stream(device_id)
    if pointer != (current.ptr or 1):  # cudaStreamLegacy, which CuPy calls 0
        event = cuda.Event(disable_timing=True)
        event.record(stream_at(pointer, device_id))
        current.wait_event(event)


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
    producer = Retyped(result.view(np.int16), DLPACK_BFLOAT) if result.dtype == bfloat16 else result
    if framework == "torch":  # on whose stream the op ran: nothing has to wait, and asking for it again takes its time
        return sys.modules["torch"].from_dlpack(producer.__dlpack__(stream=-1) if is_cupy(result) else producer)
    if isinstance(result, np.ndarray):
        return sys.modules["jax"].numpy.asarray(result)
    return sys.modules["jax"].dlpack.from_dlpack(producer)


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
