"""Which library an array belongs to, the checks every op shares, and the one place where DLPack arrays enter and leave.

NumPy arrays select the reference, CuPy arrays the kernels. Arrays of other frameworks (PyTorch, JAX, ...) pass through
`accepts_dlpack`, which every public op carries: they become CuPy or NumPy views without a copy, the op runs on the
caller's stream, and the results go back as arrays of the caller's framework.
"""

import collections
import contextlib
import ctypes
import functools
import inspect
import sys
from typing import Any

import ml_dtypes
import numpy as np

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
    if dtype is not None:
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
    if not is_contiguous(array):
        raise ValueError(f"{name} must be C-contiguous, got strides {array.strides}: pass ascontiguousarray({name})")
    if not isinstance(array, np.ndarray) and array.data.ptr % array.itemsize:  # NumPy reads those, kernels cannot
        raise ValueError(f"{name} must begin at a multiple of its {array.itemsize} bytes a value: pass {name}.copy()")
    if writes and isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} is read-only and would be written: pass a writable array")


_array_types: set[type] = {np.ndarray}  # those seen whose arrays mean what they hold


def admit(array, name):
    """Remember the type of an array. TypeError for what is none, and where `*` or a mask would give other results."""
    if isinstance(array, (np.matrix, np.ma.MaskedArray)):
        raise TypeError(f"{name} must be a plain array, got {type(array).__name__}: pass numpy.asarray({name})")
    if not (isinstance(array, np.ndarray) or is_cupy(array)):
        raise TypeError(f"{name} must be a NumPy or CuPy array (or come by DLPack), got {type(array).__name__}")
    _array_types.add(type(array))


def _is_shape(found, shape):
    return len(shape) == len(found) and all(s is None or s == t for s, t in zip(shape, found, strict=True))


def is_contiguous(array):
    """Whether an array of NumPy or CuPy is C-contiguous."""
    # CuPy's flags are an object, which takes ten times as long to ask.
    return array.flags.c_contiguous if isinstance(array, np.ndarray) else array._c_contiguous


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
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address, address + array.nbytes


def refuse_partial_overlap(out, **inputs):
    """Raise ValueError where `out` shares memory with an input without being that input exactly."""
    low, high = byte_bounds(out)
    for name, array in inputs.items():
        if array is None or array is out:
            continue
        start, end = byte_bounds(array)
        if start < high and low < end and (start, end, array.dtype) != (low, high, out.dtype):
            raise ValueError(f"out overlaps {name} partly: pass {name} itself or separate memory")


# --- the DLPack edge ------------------------------------------------------------------------------------------------

_CPU_DEVICES = (1, 3)  # DLPack device types: host memory, page-locked host memory
_GPU_DEVICES = (2, 13)  # memory of a CUDA GPU, managed memory
_foreign_types: dict[type, bool] = {}  # type -> whether it needs the edge
_native_types: set[type] = set()  # those that do not


def _is_foreign(value):
    kind = type(value)
    known = _foreign_types.get(kind)
    if known is None:
        native = isinstance(value, (np.ndarray, np.generic)) or is_cupy(value)
        known = _foreign_types[kind] = hasattr(kind, "__dlpack__") and not native
        if not known:
            _native_types.add(kind)
    return known


def accepts_dlpack(op=None, *, writes=("out", "workspace")):
    """Decorator for public ops: arrays of any DLPack framework in, arrays of the same framework out.

    PyTorch and JAX callers get their own arrays back, and the very object they passed where the op wrote into it;
    callers from other frameworks get NumPy or CuPy arrays. `writes` names the arguments the op writes to; read-only
    arrays (such as JAX's) are refused there. NumPy and CuPy callers pay one type look-up per argument.
    """
    if op is None:
        return functools.partial(accepts_dlpack, writes=writes)
    signature = inspect.signature(op)

    @functools.wraps(op)
    def edge(*args, **kwargs):
        if _native_types.issuperset(map(type, args)) and _native_types.issuperset(map(type, kwargs.values())):
            return op(*args, **kwargs)
        if not any(map(_is_foreign, (*args, *kwargs.values()))):
            return op(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        return _call_with_foreign(op, bound.arguments, writes)

    return edge


def _call_with_foreign(op, arguments, writes):
    framework = _framework(next(filter(_is_foreign, arguments.values())))
    with native(arguments, writes) as converted:
        originals = {id(converted[name]): value for name, value in arguments.items() if _is_foreign(value)}
        return _export(op(**converted), framework, originals)


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
            converted[name] = _import(value, name, writes=name in writes)
        yield converted
        if framework != "torch":
            _hold_until_done(converted, foreign)


def _framework(array):
    return type(array).__module__.split(".")[0]


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
    stream is used and DLPack's stream handshake orders it behind the producer.
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
    kind, device_id = array.__dlpack_device__()
    if kind in _CPU_DEVICES:
        return None
    if kind not in _GPU_DEVICES:
        raise TypeError(f"{name} is on a device of DLPack's type {int(kind)}, neither the host nor a CUDA GPU: move it to one")
    return int(device_id)


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


def _import(array, name, *, writes):
    framework = _framework(array)
    if writes and framework in ("jax", "jaxlib"):
        raise ValueError(f"{name} is a JAX array, which is immutable: leave {name} out and use the returned array")
    if framework == "torch" and array.requires_grad:
        raise ValueError(f"{name} requires a gradient, and cupyq records none: pass {name}.detach()")
    if framework == "torch" and not array.is_contiguous():
        raise ValueError(f"{name} must be C-contiguous, got strides {tuple(array.stride())}: pass {name}.contiguous()")
    device_id = gpu_of(array, name)
    if framework == "torch" and device_id is not None and (dtype := _torch_dtypes().get(array.dtype)) is not None:
        return _view_of_torch(array, dtype, device_id)
    is_bfloat16 = str(getattr(array, "dtype", "")).endswith("bfloat16")
    if writes and device_id is not None and framework != "torch" and _is_read_only(array):
        raise ValueError(f"{name} is read-only and would be written: pass a writable array")
    library = np if device_id is None else require_cupy()
    try:
        view = library.from_dlpack(_Retyped(array, _DLPACK_INT) if is_bfloat16 else array)
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


def _export(result, framework, originals):
    if isinstance(result, tuple):
        return tuple(_export(item, framework, originals) for item in result)
    if id(result) in originals:
        return originals[id(result)]
    if not (isinstance(result, np.ndarray) or is_cupy(result)):
        return result
    if framework not in ("torch", "jax", "jaxlib"):
        return result
    producer = _Retyped(result.view(np.int16), _DLPACK_BFLOAT) if result.dtype == bfloat16 else result
    if framework == "torch":
        return sys.modules["torch"].from_dlpack(producer)
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


# Neither NumPy nor CuPy imports or exports bfloat16 by DLPack, as neither has such a dtype of its own. The bits travel
# as int16, with the type code in the capsule exchanged on the way: no copy, and every framework's stream rules hold.

_DLPACK_INT, _DLPACK_BFLOAT = 0, 4  # DLDataTypeCode of dlpack.h

# Offset of DLTensor.dtype.code by capsule name: data pointer (8 bytes), device (8) and ndim (4) stand before it in a
# DLTensor; a DLManagedTensorVersioned has version (8), context (8), deleter (8) and flags (8) before the DLTensor.
_TYPE_CODE_OFFSETS = {b"dltensor": 20, b"dltensor_versioned": 52}

_FLAGS_OFFSET, _READ_ONLY = 24, 1  # of a DLManagedTensorVersioned

_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _is_read_only(array):
    """Whether an array on a GPU is marked as read-only, as DLPack can from version 1 on; CuPy's import passes over the mark."""
    try:
        capsule = array.__dlpack__(stream=-1, max_version=(1, 0))  # -1: nothing waits for anything
    except (BufferError, TypeError):  # knows version 0 alone, which has no mark
        return False
    name = _capsule_name(capsule)
    if name not in _TYPE_CODE_OFFSETS or name == b"dltensor":
        return False
    return bool(ctypes.c_uint64.from_address(_capsule_pointer(capsule, name) + _FLAGS_OFFSET).value & _READ_ONLY)


class _Retyped:
    """A DLPack producer that announces the elements of another one as a different type of the same size."""

    def __init__(self, array, type_code):
        self._array, self._type_code = array, type_code

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options):
        capsule = self._array.__dlpack__(**options)
        name = _capsule_name(capsule)
        ctypes.c_uint8.from_address(_capsule_pointer(capsule, name) + _TYPE_CODE_OFFSETS[name]).value = self._type_code
        return capsule


def to_host(array):
    """The array where it is NumPy's, else a copy on the host, which waits for what the current stream holds."""
    return array if isinstance(array, np.ndarray) else array.get()


def copy_values(source, target):
    """target[...] = source, contiguous arrays of one size and dtype; CuPy would compile a kernel for this."""
    if isinstance(target, np.ndarray):
        target[...] = source
    else:
        target.data.copy_from_device_async(source.data, target.nbytes)
