"""Calls that come again: the launches of an op, kept by all that they depend on and launched again (docs/design/0009).

A key is made of where the arrays of a call lie, of their shapes and dtypes, and of all other arguments. What a call launches
follows from it, by the promise of an op that says `accepts_dlpack(replays=True)`. A call is kept the second time that its key
comes, if it did nothing but launch, on memory of its arguments and of arrays that `_arrays.new_array` made.
"""

import dataclasses
import functools
import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupyq import _kernels
from cupyq._arrays import is_cupy
from cupyq._recording import Record, recording

_MOST = 4096  # calls that are kept, that have come once, and that are not kept
_DEPTH = 4  # of objects within objects, at the end of which there are arrays
_ALIGNMENT = 512  # of new memory: kernels are chosen by it

# --- keys -------------------------------------------------------------------------------------------------------------


class _Describers(dict):
    """By type, what makes the part of a key for a value, None for one of which no call is kept. None for all of a type."""

    def __missing__(self, kind):
        describe = None
        if is_cupy_type(kind):
            describe = _describe_array
        elif kind is float:
            describe = _describe_float
        elif issubclass(kind, np.generic):
            describe = kind.tobytes
        elif issubclass(kind, (int, str, type(None), type, np.dtype, types.ModuleType)):
            describe = _describe_plain
        elif "is_frozen" in vars(kind):  # its objects never change, and are kept longer than for a call
            describe = id
        elif "__dataclass_params__" in vars(kind) and kind.__dataclass_params__.frozen:
            describe = functools.partial(_describe_fields, tuple(field.name for field in dataclasses.fields(kind)))
        if describe is not None or issubclass(kind, np.ndarray):  # CuPy may be imported later on
            self[kind] = describe
        return describe


def is_cupy_type(kind):
    return kind is getattr(sys.modules.get("cupy"), "ndarray", None)


def _describe_array(array):
    if not array._c_contiguous:
        return None
    memory = array.data
    return memory.ptr, memory.device_id, array.shape, array.dtype


def _describe_float(value):
    return value or str(value)  # 0.0 and -0.0 are equal


def _describe_plain(value):
    return value


def _describe_fields(names, value):
    fields = [getattr(value, name) for name in names]
    return None if any(describers[type(field)] is id for field in fields) else _described(fields)


def _described(values):
    """The types and descriptions of values; None where one has none."""
    parts = []
    for value in values:
        kind = type(value)
        describe = describers[kind]
        if describe is None or (part := describe(value)) is None and value is not None:
            return None
        parts += (kind, part)
    return tuple(parts)


describers = _Describers()


def key_of(op, args, kwargs):
    """What stands for a call; None where it is not to be kept, as for arrays of NumPy."""
    parts = _described((*args, *kwargs.values()))
    return None if parts is None else (op, *kwargs, *parts)


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
    """Weak references to the objects it was made with, with whose end it goes: another object may get their number."""
    device_id: int
    is_foreign: bool
    """Whether tensors are among its arguments, whose stream is the caller's and whose kind the results are."""

    def again(self, arguments):
        """What the op returns for these arguments, once all is launched on CuPy's current stream, on the GPU of the call.

        MISALIGNED, and nothing is launched, where new memory begins elsewhere than the kernels were chosen for.
        """
        made = [make() for make in self.makers]
        for array in made:
            if array.data.ptr % _ALIGNMENT:
                return MISALIGNED
        cuda = sys.modules["cupy"].cuda
        for (wanted, device_id, layout, grid, block, values, shared_bytes), uses in zip(self.launches, self.uses, strict=True):
            if uses:
                values = values.copy()  # other threads launch with them, too
                for which, position, offset in uses:
                    values[position] = made[which].data.ptr + offset
            _kernels.launch_here(wanted, device_id, layout, grid, block, values, shared_bytes, cuda)
        values = (*arguments, *made)
        if self.is_tuple:
            return tuple([values[place] for place in self.results])
        return values[self.results[0]] if self.results else None


MISALIGNED = object()

_known: dict[tuple, Call] = {}
# By hash, as keys take much more memory. Two with one hash do no harm: a call is recorded early, or not kept.
_seen: set[int] = set()  # calls that have come once
_not_kept: set[int] = set()

find = _known.get
"""The Call of a key, or None."""


def first_calls(key, names, writes, edge, args, kwargs):
    """edge(*args, **kwargs), which is kept if it may be. names: of the arguments; writes: of those that it writes to."""
    number = hash(key)
    if number in _not_kept:
        return edge(*args, **kwargs)
    if number not in _seen:
        _add(number, _seen)
        return edge(*args, **kwargs)
    recording.record = Record()
    try:
        result = edge(*args, **kwargs)
        record = recording.record
    finally:
        recording.record = None
    arguments = dict(zip(names, args, strict=False), **kwargs)
    call = None if record is None else _call_of(key, arguments, writes, record, result)
    if call is None:
        _add(number, _not_kept)
    else:
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = call
    _seen.discard(number)
    return result


def _add(number, numbers):
    if len(numbers) >= _MOST:
        numbers.clear()
    numbers.add(number)


def _call_of(key, arguments, writes, record, result):
    """The Call that does with these arguments what was recorded; None where launching alone would not do it."""
    values, is_tuple = tuple(arguments.values()), isinstance(result, tuple)
    written = [value if name in writes else None for name, value in arguments.items()]
    candidates = (*written, *(array for _, array in record.made), *values)  # `out` before an input of the same memory
    places = []
    for item in result if is_tuple else () if result is None else (result,):
        place = next((i for i, value in enumerate(candidates) if value is not None and _is_all_of(item, value)), None)
        if place is None:
            return None
        places.append(place if place < len(values) + len(record.made) else place - len(values) - len(record.made))
    uses, devices = _uses_of(record, values), {launch[1] for launch in record.launches}
    if uses is None or len(devices) != 1:
        return None
    makers = tuple(functools.partial(make, array.shape, array.dtype) for make, array in record.made)
    owners = tuple(
        weakref.ref(value, functools.partial(_drop, _known, key)) for value in values if describers[type(value)] is id
    )
    return Call(record.launches, makers, uses, tuple(places), is_tuple, owners, devices.pop(), any(map(_is_tensor, values)))


def _drop(known, key, _):
    known.pop(key, None)


def _is_all_of(item, value):
    """Whether a result is this value, or a tensor that is a view of all of it."""
    if item is value or not (_is_tensor(item) and is_cupy(value)):
        return item is value
    return (item.data_ptr(), tuple(item.shape)) == (value.data.ptr, value.shape)


def _is_tensor(value):
    return hasattr(value, "data_ptr")


def _uses_of(record, arguments):
    """For every launch the uses of what was made; None where there was other memory, or where addresses may be elsewhere."""
    owned = [bounds for value in arguments for bounds in _bounds(value, _DEPTH)]
    made = [next(_bounds(array, 0)) for _, array in record.made]
    if any(low <= address < high for address in record.hidden for low, high in made):
        return None
    uses = []
    for _, _, layout, _, _, values, _ in record.launches:
        if any(low <= word < high for value in values for word in _words_in(value) for low, high in made):
            return None
        uses.append([])
        for position in layout.arrays:
            address = values[position]
            if address == 0 or any(low <= address < high for low, high in owned):
                continue
            which = next((i for i, (low, high) in enumerate(made) if low <= address < high), None)
            if which is None:
                return None
            uses[-1].append((which, position, address - made[which][0]))
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
    elif is_cupy(value):
        if value._c_contiguous:
            yield value.data.ptr, value.data.ptr + value.nbytes
    elif depth:
        for item in _items_of(value):
            yield from _bounds(item, depth - 1)


def _items_of(value):
    if isinstance(value, (tuple, list)):
        return value
    is_ours = dataclasses.is_dataclass(value) or "is_frozen" in vars(type(value))
    return (value if isinstance(value, dict) else vars(value) if is_ours else {}).values()


def forget():
    """Keep no call: where something else is put in place of what picks a kernel."""
    for table in (_known, _seen, _not_kept):
        table.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
