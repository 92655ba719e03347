"""Calls whose arguments lie in memory of their own, and what must hold of a call, however spoilt: it is right, or it says what
is wrong and has written nothing. On NumPy and on a GPU."""

import ctypes
import inspect
import linecache
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_checks import bfloat16, float16, float32, host, move

from cupyq import _capsules, ops
from cupyq.errors import CupyqError

# --- calls ------------------------------------------------------------------------------------------------------------

ERRORS = (ValueError, TypeError, CupyqError)


class Callee:
    """A function to call: its arguments, which of them it writes to, and how arguments in parts are put together."""

    errors: tuple = ERRORS
    spared: frozenset = frozenset()
    """Arguments that stay as they are."""

    def __init__(self, name, function):
        self.name, self.function = name, function
        self.parameters = inspect.signature(function).parameters
        self.writes = function.writes
        self.names = frozenset(self.parameters)
        """What its errors may name, besides the parts of arguments."""

    def run(self, arguments):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return self.function(**built(arguments))

    def may_write(self, argument):
        return argument.split(".")[0] in self.writes

    def again(self, argument, value):
        """An argument that is no array, for another call of the same meaning."""
        return value.make("numpy") if isinstance(value, OfLibrary) else value


@dataclass(frozen=True)
class OfLibrary:
    """An argument that is no array, such as a QMatrix: what makes it for a library."""

    make: Any


def _built(parts):
    if "kind" in parts:
        return ops.CacheCodes(**parts)
    if "eps" in parts:
        return ops.InputNorm(**parts)
    return ops.QMatrix.from_tensors(parts)


def built(arguments):
    """The arguments of an op, those in parts put together."""
    whole, parts = {}, {}
    for name, value in arguments.items():
        argument, _, part = name.partition(".")
        if part:
            parts.setdefault(argument, {})[part] = value
        else:
            whole[name] = value
    return whole | {argument: _built(values) for argument, values in parts.items()}


# --- placing ----------------------------------------------------------------------------------------------------------

BAND = 64
_SENTINEL = 0xA5

LAYOUTS = ("transposed", "reversed", "every second", "broadcast", "one byte off", "one element off")


@dataclass(frozen=True)
class Placed:
    """A value and how it comes: an array in memory of its own between bands, laid out in some way, perhaps in a wrapper."""

    value: Any
    layout: str = "plain"
    wrapper: str = ""
    shares: tuple = ()  # (argument, elements): its memory begins that many elements after that of another argument


class Exporter:
    """An array of some other framework, which has nothing but DLPack."""

    def __init__(self, array, device=None):
        self.array, self.device = array, device

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


class ReadOnlyExporter(Exporter):
    """An immutable array on a GPU, as JAX has them."""

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__(**options)
        name = _capsules._capsule_name(capsule)
        if name == b"dltensor_versioned":
            flags = ctypes.c_uint64.from_address(_capsules._capsule_pointer(capsule, name) + _capsules._FLAGS_OFFSET)
            flags.value |= _capsules._READ_ONLY
        return capsule


class Subclass(np.ndarray):
    """An array of a class derived from NumPy's, such as memmap, that behaves as NumPy's do."""


WRAPPERS = (
    "dlpack", "read-only", "read-only dlpack", "unknown device", "matrix", "masked", "subclass", "list", "other library",
)  # fmt: skip


def _strided(shape, layout, itemsize):
    """(strides, first byte, bytes in all) of an array laid out in some way."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    size = int(np.prod(shape)) * itemsize
    if layout == "transposed":
        strides = [itemsize] * len(shape)
        for axis in range(1, len(shape)):
            strides[axis] = strides[axis - 1] * max(shape[axis - 1], 1)
    elif layout == "reversed" and shape and shape[-1]:
        strides[-1] = -itemsize
        return strides, (shape[-1] - 1) * itemsize, size
    elif layout == "every second":
        return [2 * stride for stride in strides], 0, 2 * size
    elif layout == "broadcast" and shape:
        strides[0] = 0
    elif layout == "one byte off":
        return strides, 1, size + 1
    elif layout == "one element off":
        return strides, itemsize, size + itemsize
    return strides, 0, size


class Realized:
    """The arguments of a call in one library, and the memory they lie in."""

    def __init__(self):
        self.arguments, self.arrays, self.roots, self.starts = {}, {}, {}, {}

    def snapshot(self):
        return {name: host(root).copy() for name, root in self.roots.items()}


def realized(library, placed):
    """The Placed arguments in memory."""
    result = Realized()
    for name, item in placed.items():
        if not isinstance(item.value, np.ndarray):
            result.arguments[name] = item.value.make(library) if isinstance(item.value, OfLibrary) else item.value
    arrays = [name for name, item in placed.items() if isinstance(item.value, np.ndarray)]
    for name in sorted(arrays, key=lambda name: bool(placed[name].shares)):
        _place(library, name, placed[name], result, placed)
    return result


def _place(library, name, item, result, placed):
    value = item.value
    if value.dtype.hasobject:
        result.arguments[name] = result.arrays[name] = value
        return
    strides, first, size = _strided(value.shape, item.layout, value.itemsize)
    if item.shares and item.shares[0] in result.starts:
        other, elements = item.shares
        root = result.roots[other]
        first += result.starts[other] + elements * value.itemsize
    else:
        following = sum(i.value.nbytes * 2 + 16 for i in placed.values() if i.shares and i.shares[0] == name)
        root = np.full(BAND + size + following + BAND, _SENTINEL, np.uint8)
        root = move(library, root)
        result.roots[name] = root
        first += BAND
    result.starts[name] = first
    xp_array = _view(library, root, value.dtype, value.shape, strides, first)
    if name in result.roots and value.size:
        _fill(library, root, xp_array, value, strides, first)
    result.arrays[name] = xp_array
    result.arguments[name] = _wrapped(library, xp_array, item.wrapper)


def _view(library, root, dtype, shape, strides, first):
    if library == "numpy":
        return np.ndarray(shape, dtype, root, first, strides)
    import cupy

    return cupy.ndarray(shape, dtype, root.data + first, tuple(strides))


def _fill(library, root, array, value, strides, first):
    if library == "numpy":
        if value.ndim and 0 in strides:
            array[0] = value[0]
        else:
            array[...] = value
        return
    flat = host(root).copy()
    _fill("numpy", flat, np.ndarray(value.shape, value.dtype, flat, first, strides), value, strides, first)
    root.set(flat)


def _wrapped(library, array, wrapper):
    if wrapper == "dlpack":
        return Exporter(array)
    if wrapper == "unknown device":
        return Exporter(array, (12, 0))
    if wrapper.startswith("read-only") and library == "numpy":
        array = array.view()
        array.flags.writeable = False
        return Exporter(array) if wrapper == "read-only dlpack" else array
    if wrapper == "read-only dlpack":
        return ReadOnlyExporter(array)
    if wrapper == "matrix" and library == "numpy" and array.ndim == 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return array.view(np.matrix)
    if wrapper == "masked" and library == "numpy":
        return np.ma.MaskedArray(array, mask=np.arange(array.size).reshape(array.shape) % 2 == 0)
    if wrapper == "subclass" and library == "numpy":
        return array.view(Subclass)
    if wrapper == "list":
        return array.tolist()
    if wrapper == "other library" and library == "cupy":
        return array.get()
    return array


def well_formed(callee, realized_call, placed):
    """The arguments of the same call on NumPy, with plain arrays that share nothing."""
    copies = {}
    for name in realized_call.arguments:
        if name not in realized_call.arrays:
            copies[name] = callee.again(name, placed[name].value)
            continue
        array = host(realized_call.arrays[name])
        copies[name] = np.array(array, array.dtype.newbyteorder("="), copy=True, order="C", subok=False)
    return copies


# --- what must hold ---------------------------------------------------------------------------------------------------


def attempt(callee, placed, library="numpy"):
    """Call a function -> "right" or "refused". AssertionError where it is neither, or anything else was written.

    What is right is what the function makes of plain copies on NumPy. Where NumPy refuses values that a GPU, which does not
    read them back, leaves out, the GPU's answer is whatever its docstring says.
    """
    call = realized(library, placed)
    copies, before = well_formed(callee, call, placed), call.snapshot()
    try:
        results = callee.run(call.arguments)
    except Exception as error:
        assert_helpful(error, callee, placed)
        after = call.snapshot()
        changed = [root for root in before if before[root].tobytes() != after[root].tobytes()]
        assert not changed, f"{changed} changed before {error!r}"
        return "refused"
    after = call.snapshot()
    for argument, array in call.arrays.items():
        if callee.may_write(argument) and argument in call.starts:  # the bytes that are its elements may change
            root = argument if argument in call.roots else placed[argument].shares[0]
            place = array.shape, f"V{array.dtype.itemsize}", call.starts[argument], array.strides
            _bytes_of(before[root], *place)[...] = _bytes_of(after[root], *place)
    for root in before:
        where = np.flatnonzero(before[root] != after[root])
        assert not where.size, f"{root}: byte {where[0]} of its memory changed, which is not the op's to write"
    try:
        expected = callee.run(copies)
    except callee.errors as error:
        assert library != "numpy", f"accepted, but plain copies of the same values are refused: {error}"
        return "right"
    compare(callee, results, expected, call, copies)
    return "right"


def _bytes_of(root, shape, dtype, first, strides):
    return np.ndarray(shape, dtype, root, first, strides)


TOLERANCE = {float16: 4e-3, bfloat16: 3e-2, float32: 1e-4}
PRODUCT_TOLERANCE = TOLERANCE | {float32: 1e-3}
"""A kernel scales the sum of a group, NumPy its weights: 3e-4 apart, norm-wise, whatever the result is rounded to."""


def compare(callee, results, expected, call, copies):
    """Results and what was written in place, against those of the plain call."""
    pairs = [("result", *pair) for pair in zip(flat(results), flat(expected), strict=True)]
    written = [argument for argument in call.arrays if callee.may_write(argument) and argument != "workspace"]
    pairs += [(argument, call.arrays[argument], copies[argument]) for argument in written]
    for what, found, wanted in pairs:
        if not isinstance(wanted, np.ndarray):
            assert found == wanted, f"{what}: {found!r}, expected {wanted!r}"
            continue
        found = found.array if isinstance(found, Exporter) else found
        is_exact = isinstance(found, np.ndarray)
        found = np.asarray(host(found))
        found = found.astype(found.dtype.newbyteorder("="))
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), f"{what}: {found.dtype} {found.shape}"
        if is_exact or wanted.dtype not in TOLERANCE:
            both_nan = (found != found) & (wanted != wanted)
            same = found.tobytes() == wanted.tobytes() or np.all(both_nan | (found == wanted))
            may_differ = not is_exact and (callee.name, what) == ("qkv_append", "k_cache.codes")
            assert same or may_differ and near_codes(found, wanted), f"{what} differs from that of plain copies"
        else:
            a, b = found.astype(np.float64), wanted.astype(np.float64)
            bound = (PRODUCT_TOLERANCE if callee.name.startswith("qmatmul") else TOLERANCE)[wanted.dtype]
            limit = bound * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
            assert np.allclose(a, b, rtol=bound, atol=limit, equal_nan=True), f"{what} differs from NumPy's"


def near_codes(found, wanted):
    """Whether codes are those of keys that were normed and turned in another precision: a few are one step apart.

    A rounding to float16 falls to the other side for one value in thousands, and then moves what is encoded with it. In 15,000
    calls of qkv_append with fp32 for float64, of 3072 codes each, at most 4 differed, none by more than 1.
    """
    apart = np.abs(found.astype(np.int32) - wanted)
    return apart.max(initial=0) <= 1 and 256 * np.count_nonzero(apart) <= apart.size


def flat(results):
    if hasattr(results, "order") and hasattr(results, "tiles"):
        return [results.order, results.offsets, results.tiles]
    return list(results) if isinstance(results, tuple) else [results]


def assert_helpful(error, callee, placed):
    """One line that names an argument, raised on purpose: by a `raise` of cupyq's, and not from within NumPy or CuPy."""
    is_expected = isinstance(error, callee.errors) and not isinstance(error, (UnicodeError, np.exceptions.AxisError))
    assert is_expected, f"{type(error).__name__}: {error}"
    message = str(error)
    assert message and "\n" not in message and len(message) < 400, f"not one line: {message!r}"
    if isinstance(error, OSError):
        return  # the system's own words, with the file's name
    parts = {part for argument in placed for part in argument.split(".")}
    names = parts | callee.names
    said = set("".join(c if c.isalnum() or c == "_" else " " for c in message).split())
    assert names & said, f"names no argument: {message}"
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    file, line = trace.tb_frame.f_code.co_filename, linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    is_own = "/cupyq/" in file and line.strip().startswith("raise ")
    is_signature = isinstance(error, TypeError) and "unexpected keyword argument" in message
    assert is_own or is_signature, f"not raised on purpose ({file.rpartition('/')[2]}:{trace.tb_lineno}): {message}"
