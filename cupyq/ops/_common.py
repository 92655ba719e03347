"""What several op families share."""

import functools
import os

import numpy as np

from cupyq._arrays import address_of, byte_bounds, check, new_array, require_cupy


def float64(array):
    """A float64 copy: the arithmetic of every reference."""
    return array.astype(np.float64)


def vector_width(columns, *arrays, widest=4):
    """The most values one access can take in every array: their rows and first addresses must be multiples of it."""
    places = columns | widest  # all powers of two: the lowest bit that is set anywhere is what divides them all
    for array in arrays:
        if array is not None:
            place, beside = divmod(address_of(array), array.itemsize)
            places |= 1 if beside else place
    return places & -places


def access_width(columns, *arrays):
    """`vector_width` whose widest dtype travels in at most 16 bytes: 4 values of float32, 8 of the 16-bit types."""
    return vector_width(columns, *arrays, widest=16 // max([a.itemsize for a in arrays if a is not None]))


def refuse_overlap(written, name, **inputs):
    """Raise ValueError where `written` shares any memory with an input: for ops that cannot work in place."""
    low, high = byte_bounds(written)
    for other, array in inputs.items():
        if array is None:
            continue
        start = address_of(array)
        if start < high and low < start + array.nbytes:
            raise overlap_error(name, other)


def overlap_error(name, other):
    return ValueError(f"{name} overlaps {other}, which is still read: pass separate memory")


# A size as kernels take it. Making one takes four times as long as finding one that was made.
int32_of = functools.lru_cache(maxsize=1 << 14)(np.int32)


@functools.cache
def is_checking():
    """Whether CUPYQ_CHECK=1 asks ops to read tables and lengths back from the GPU and refuse bad entries. Read once."""
    return os.environ.get("CUPYQ_CHECK", "") not in ("", "0")


def byte_workspace(workspace, size, like, size_name):
    """`workspace`, uint8, if it holds `size` bytes, or new memory of them on the GPU of `like`; `size_name` tells the size."""
    if workspace is None:
        with like.device:
            return new_array(require_cupy(), size, np.uint8)
    check(workspace, "workspace", dtype=np.dtype(np.uint8), ndim=1, writes=True)
    if workspace.size < size:
        raise ValueError(f"workspace must have at least {size} bytes, got {workspace.size}: see {size_name}")
    if byte_bounds(workspace)[0] % 8:
        raise ValueError("workspace must start at a multiple of 8 bytes: pass an array of its own")
    return workspace


def whole_number(value, name, least=None, most=None):
    """`value` as an int, from `least` on and, beside a `least`, up to `most`.

    TypeError for anything but whole numbers, floats such as 8.0 and booleans included; ValueError for one out of range.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    value = int(value)
    if least is not None and (value < least or (most is not None and value > most)):
        bounds = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def real_number(value, name):
    """`value` as a float; TypeError for anything that is not one real number, ValueError where no float64 holds it."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that float64 holds, got one of {value.bit_length()} bits") from None


def positive_number(value, name):
    """`value` as a float that float32 holds above 0 and below Inf; TypeError / ValueError for anything else."""
    value = real_number(value, name)
    if not _LEAST_FLOAT32 <= value <= _LARGEST_FLOAT32:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return value


def norm_epsilon(value, name="eps"):
    """What a norm adds to a mean of squares: a float from 0 on, finite in float32. TypeError / ValueError otherwise."""
    value = real_number(value, name)
    if not 0 <= value <= _LARGEST_FLOAT32:
        raise ValueError(f"{name} must be a finite number of 0 or more, got {value}")
    return value


_LEAST_FLOAT32 = float(np.finfo(np.float32).smallest_subnormal)
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def float32_factor(value, name):
    """`value` rounded to float32, where NaN and Inf are factors as others are; TypeError for anything that is no number."""
    with np.errstate(over="ignore"):
        return np.float32(real_number(value, name))


def truth(value, name):
    """`value` as a bool; TypeError for anything but True and False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def shown(value):
    """A wrong value as an error message can show it, on one line."""
    return repr(value) if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def dtype_named(dtype, name="dtype"):
    """`dtype` as a NumPy dtype; TypeError for what names none."""
    try:
        return np.dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a dtype, such as numpy.float32, got {shown(dtype)}") from None


def store(out, values):
    """Round `values` once into `out`; what does not fit becomes Inf, as IEEE says, without a warning."""
    with np.errstate(over="ignore"):
        out[...] = values
