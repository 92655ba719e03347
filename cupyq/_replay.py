"""Calls that come again: the launches of an op, kept by all that they depend on and launched again (docs/design/0009).

A key is made of where the arrays of a call lie, of their shapes and dtypes, and of all other arguments. What a call launches
follows from it, by the promise of an op that says `accepts_dlpack(replays=True)`. A call is kept the second time that its key
comes, if it did nothing but launch, on memory of its arguments and of arrays that `_arrays.new_array` made.
"""

import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupyq import _kernels
from cupyq._recording import Record, recording

_MOST = 4096
_FROZEN_DEPTH = 4  # of objects within objects, at the end of which there are arrays
_ALIGNMENT = 512  # of new memory, from CuPy's pool and PyTorch's: kernels are chosen by it

_SEEN, _NEVER = object(), object()  # what is known of a call that has come once, and of one that is not to be kept
_known: dict[tuple, Any] = {}
MISALIGNED = object()

# --- keys -------------------------------------------------------------------------------------------------------------


class _Describers(dict):
    """By type, what makes the part of a key for a value; None for types of which no call is kept."""

    def __missing__(self, kind):
        describe = None
        cupy = sys.modules.get("cupy")
        if cupy is not None and kind is getattr(cupy, "ndarray", None):
            describe = _describe_array
        elif kind is float:
            describe = _describe_float
        elif issubclass(kind, np.generic):
            describe = kind.tobytes
        elif issubclass(kind, (int, str, type(None), type, np.dtype)):
            describe = _describe_plain
        elif is_frozen(kind):
            describe = _describe_object
        if describe is not None or issubclass(kind, np.ndarray):  # CuPy may be imported later on
            self[kind] = describe
        return describe


def _describe_array(array):
    memory = array.data
    return memory.ptr, memory.device_id, array.shape, array.dtype.num, array._c_contiguous


def _describe_float(value):
    return value or str(value)  # 0.0 and -0.0 are equal


def _describe_plain(value):
    return value


def _describe_object(value):
    return id(value)


def is_frozen(kind):
    """Whether objects of a type never change, so that one stands for what it holds: frozen dataclasses, and who says so."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen or getattr(kind, "is_frozen", False) is True


describers = _Describers()


def key_of(op, args, kwargs):
    """What stands for a call; None where it is not to be kept, as for arrays of NumPy."""
    parts = [op, *kwargs]
    for value in args:
        kind = type(value)
        describe = describers[kind]
        if describe is None or (part := describe(value)) is None and value is not None:
            return None
        parts += (kind, part)
    for value in kwargs.values():
        kind = type(value)
        describe = describers[kind]
        if describe is None or (part := describe(value)) is None and value is not None:
            return None
        parts += (kind, part)
    return tuple(parts)


# --- calls ------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What is launched again."""

    launches: list[tuple]
    makers: tuple[Callable[[], Any], ...]
    """Of the arrays that every call makes anew: its results, and what it works in."""
    uses: list[list[tuple[int, int, int]]]
    """For every launch, where their memory goes: which of them, position of the argument, bytes from its beginning."""
    results: tuple[int, ...]
    """Their places among the arguments and what is made anew."""
    is_tuple: bool
    owners: tuple[Any, ...]
    """Weak references to the objects it was made with: where one is gone, another object may have its number."""
    device_id: int
    is_foreign: bool
    """Whether tensors are among its arguments, whose stream is the caller's."""

    def again(self, arguments):
        """What the op returns for these arguments, once all is launched on CuPy's current stream, on the GPU of the call.

        MISALIGNED, and nothing is launched, where new memory begins elsewhere than the kernels were chosen for.
        """
        made = [make() for make in self.makers]
        addresses = [_address_of(array) for array in made]
        for address in addresses:
            if address % _ALIGNMENT:
                return MISALIGNED
        cuda = sys.modules["cupy"].cuda
        for (wanted, device_id, layout, grid, block, values, shared_bytes), uses in zip(self.launches, self.uses, strict=True):
            if uses:
                values = values.copy()  # other threads launch with them, too
                for which, position, offset in uses:
                    values[position] = addresses[which] + offset
            _kernels.launch_here(wanted, device_id, layout, grid, block, values, shared_bytes, cuda)
        if self.is_tuple:
            return tuple([(*arguments, *made)[place] for place in self.results])
        return (*arguments, *made)[self.results[0]] if self.results else None


def find(key):
    """The Call of a key, or None."""
    call = _known.get(key)
    if type(call) is not Call:
        return None
    for owner in call.owners:
        if owner() is None:
            _known.pop(key, None)
            return None
    return call


def first_calls(key, edge, args, kwargs):
    """edge(*args, **kwargs), which is kept if it may be."""
    known = _known.get(key)
    if known is not _SEEN:
        if known is None:
            if len(_known) >= _MOST:
                forget()
            _known[key] = _SEEN
        return edge(*args, **kwargs)
    recording.record = Record()
    try:
        result = edge(*args, **kwargs)
        record = recording.record
    finally:
        recording.record = None
    _known[key] = _NEVER if record is None else _call_of((*args, *kwargs.values()), record, result) or _NEVER
    return result


def _call_of(arguments, record, result):
    """The Call that does with these arguments what was recorded; None where launching alone would not do it."""
    is_tuple = isinstance(result, tuple)
    results = result if is_tuple else () if result is None else (result,)
    makers = [functools.partial(make, array.shape, array.dtype) for make, array in record.made]
    places = []
    for item in results:
        place = _place_of(item, arguments, record.made)
        if place is None:
            return None
        if _is_tensor(item) and place >= len(arguments):
            makers[place - len(arguments)] = functools.partial(
                sys.modules["torch"].empty, tuple(item.shape), dtype=item.dtype, device=item.device
            )
        places.append(place)
    uses, devices = _uses_of(record, arguments), {launch[1] for launch in record.launches}
    if uses is None or len(devices) != 1:
        return None
    try:
        owners = tuple(weakref.ref(value) for value in arguments if describers[type(value)] is _describe_object)
    except TypeError:  # an object of slots
        return None
    is_foreign = any(map(_is_tensor, arguments))
    return Call(record.launches, tuple(makers), uses, tuple(places), is_tuple, owners, devices.pop(), is_foreign)


def _place_of(item, arguments, made):
    """Where a result is among the arguments and what was made, itself or as a tensor that is a view of all of it."""
    for place, value in enumerate(arguments):
        if item is value:
            return place
    for place, (_, array) in enumerate(made, len(arguments)):
        if item is array or _is_tensor(item) and (item.data_ptr(), tuple(item.shape)) == (array.data.ptr, array.shape):
            return place
    return None


def _is_tensor(value):
    return hasattr(value, "data_ptr")


def _uses_of(record, arguments):
    """For every launch the uses of what was made; None where there was other memory, or where addresses may be elsewhere."""
    owned = [bounds for value in arguments for bounds in _bounds(value, _FROZEN_DEPTH)]
    made = [next(_bounds(array, 0)) for _, array in record.made]
    if any(low <= address < high for address in record.hidden for low, high in made):
        return None
    return None if None in (uses := [_uses_in(launch, owned, made) for launch in record.launches]) else uses


def _uses_in(launch, owned, made):
    _, _, layout, _, _, values, _ = launch
    uses = []
    for position, value in enumerate(values):
        address = value if position in layout.arrays else 0
        if made and any(low <= word < high for word in _words_in(value) for low, high in made):
            return None
        if not address or any(low <= address < high for low, high in owned):
            continue
        which = next((i for i, (low, high) in enumerate(made) if low <= address < high), None)
        if which is None:
            return None
        uses.append((which, position, address - made[which][0]))
    return uses


def _words_in(value):
    """The numbers in an argument that may be addresses: of a structure, or given as such."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint64, len(value) // 8).tolist()
    return [int(value)] if isinstance(value, np.uint64) else []


def _bounds(value, depth):
    """(first, one past the last) address of every array in a value."""
    if _is_tensor(value):
        yield value.data_ptr(), value.data_ptr() + value.numel() * value.element_size()
    elif hasattr(value, "data") and hasattr(value.data, "ptr"):
        yield value.data.ptr, value.data.ptr + value.nbytes
    elif depth:
        items = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else ()
        for item in getattr(value, "__dict__", {}).values() if is_frozen(type(value)) else items:
            yield from _bounds(item, depth - 1)


def _address_of(array):
    return array.data_ptr() if _is_tensor(array) else array.data.ptr


def forget():
    """Keep no call: for tests that put something else in place of what picks a kernel."""
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
