"""Which library an array belongs to, and the checks every op shares.

NumPy arrays select the reference, CuPy arrays the kernels. Arrays of other frameworks come through `_foreign`.
"""

import os
import sys
from typing import Any

import ml_dtypes
import numpy as np

from cupyq import _fork
from cupyq._recording import note_array
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


def new_array(xp, shape, dtype, *, zeros=False):
    """Memory that an op makes for one call, as its result or to work in: unset, or zeros."""
    make = xp.zeros if zeros else xp.empty
    array = make(shape, dtype)
    note_array(make, array)
    return array


def output(xp, out, shape, dtype, name="out"):
    """`out` after checking that it can take the result, or a new array where it is None."""
    if out is None:
        return new_array(xp, shape, dtype)
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
