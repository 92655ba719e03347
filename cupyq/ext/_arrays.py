"""Where arguments of the extension's functions enter: arrays of any library, absent ones, lists and dicts of them."""

import contextlib
import functools
import inspect
import numbers
import sys

import numpy as np

from cupyq._arrays import byte_bounds, is_cupy
from cupyq._foreign import gpu_of, native

_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})
_PLAIN_ITEMS = frozenset({bool, int, float, str, bytes, list, tuple})  # what begins a list that holds no arrays


def entry(function=None, *, arrays=(), optional=(), writes=(), unused=(), flags=()):
    """Decorator for the extension's functions: tensors of any DLPack library in, NumPy and CuPy arrays inside.

    Arrays may also be items of lists, tuples and dicts. A tensor on torch's meta device becomes None, which is what an
    absent one is. The function runs on the caller's device and stream (cupyq._foreign.native).
    `arrays` names arguments that must be arrays, `optional` those that may be absent. `writes` names the arguments that
    are written, or is a function of the arguments (a dict) that does: they must be contiguous and writable, as the
    caller must see the result. What is only read may have any strides, and is copied where it is not contiguous.
    `unused` names arguments that are accepted for exllamav2's sake and never looked at, `flags` those whose truth counts.
    """
    if function is None:
        return functools.partial(entry, arrays=arrays, optional=optional, writes=writes, unused=unused, flags=flags)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def edge(*args, **kwargs):
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        for name in unused:
            if name in arguments:
                arguments[name] = None
        for name in flags:
            if name in arguments:
                arguments[name] = _truth(arguments[name], name)
        written = writes(arguments) if callable(writes) else writes
        places = _places(arguments, written)
        for name in (*arrays, *optional):
            _check_kind(arguments.get(name), name, name in optional)
        if not places:
            return function(**arguments)
        with _entered(places) as converted:
            for (container, key, *_), array in zip(places, converted, strict=True):
                container[key] = array
            return function(**arguments)

    return edge


def _places(arguments, written):
    """[(container, key, label, array, is written)] of every array; absent ones are replaced by None at once.

    Lists, tuples and dicts that hold arrays are replaced by copies, as their items will be.
    """
    places = []
    for name, value in list(arguments.items()):
        kind = type(value)
        if kind in _PLAIN:
            continue
        container, items = arguments, ((name, name, value),)
        if kind in (list, tuple):
            if not value or type(value[0]) in _PLAIN_ITEMS:
                continue
            container = arguments[name] = list(value)
            items = [(i, f"{name}[{i}]", item) for i, item in enumerate(container)]
        elif kind is dict:
            container = arguments[name] = dict(value)
            items = [(key, f"{name}[{key!r}]", item) for key, item in container.items()]
        for key, label, item in items:
            if getattr(item, "is_meta", False):
                container[key] = None
            elif is_array(item):
                places.append((container, key, label, _prepared(item, label, name in written), name in written))
    return places


def is_array(value):
    """Whether the value is an array of some library; NumPy's scalars are numbers."""
    return hasattr(type(value), "__dlpack__") and not isinstance(value, np.generic)


def _check_kind(value, name, is_optional):
    if not is_array(value) and not (value is None and is_optional):
        what = "an array, or None where it is absent" if is_optional else "an array"
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def _truth(value, name):
    try:
        return bool(value)
    except (TypeError, ValueError):  # an array of several values
        raise TypeError(f"{name} must be true or false, got {type(value).__name__}") from None


def _prepared(array, label, is_written):
    """The array, or where it is only read a contiguous one; what is written must be contiguous and writable."""
    is_native = isinstance(array, np.ndarray) or is_cupy(array)
    contiguous = array.flags.c_contiguous if is_native else getattr(array, "is_contiguous", lambda: True)()
    if is_written:
        if not contiguous:
            raise ValueError(f"{label} is written in place, so it must be C-contiguous: pass a contiguous array")
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError(f"{label} is read-only and would be written: pass a writable array")
        return array
    if is_native:
        return array if contiguous else _contiguous(array)
    if getattr(array, "requires_grad", False):  # reading a parameter records nothing
        array = array.detach()
    return array if contiguous else array.contiguous()


def _contiguous(array):
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)
    with array.device:
        return sys.modules["cupy"].ascontiguousarray(array)


@contextlib.contextmanager
def _entered(places):
    """The arrays of `places` as NumPy and CuPy arrays. Within, the first GPU's device and stream are the current ones."""
    converted = [place[3] for place in places]
    groups = {}  # GPU, or None for the host -> indices of foreign arrays
    first = None
    for index, array in enumerate(converted):
        if isinstance(array, np.ndarray):
            continue
        if is_cupy(array):
            device = array.device.id
        else:
            device = gpu_of(array, places[index][2])
            groups.setdefault(device, []).append(index)
        first = device if first is None else first
    with contextlib.ExitStack() as stack:
        # The device entered last is the current one: that must be the first GPU.
        for device in sorted(groups, key=lambda device: (device is not None, device == first)):
            named = {places[index][2]: converted[index] for index in groups[device]}
            written = {places[index][2] for index in groups[device] if places[index][4]}
            arrays = stack.enter_context(native(named, written))
            for index in groups[device]:
                converted[index] = arrays[places[index][2]]
        if first is not None:
            stack.enter_context(sys.modules["cupy"].cuda.Device(first))
        yield converted


def fill(target, values):
    """target = values, a NumPy array of its dtype and shape, wherever target is."""
    if isinstance(target, np.ndarray):
        target[...] = values
    else:
        stream = sys.modules["cupy"].cuda.get_current_stream()
        target.set(values, stream=stream)
        stream.synchronize()  # `values` may be written or freed again


def settle(xp):
    """Wait for what was queued here: what a handle holds is used later, perhaps on other streams."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def refuse_any_overlap(**arrays):
    """ValueError where two of the arrays share memory."""
    spans = sorted((*byte_bounds(array), name) for name, array in arrays.items() if array.size)
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise ValueError(f"{name} and {other} overlap: pass separate memory")


# --- numbers ----------------------------------------------------------------------------------------------------------


def integer(value, name, *, low=None):
    """The argument as an int; TypeError unless it is one, ValueError below `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be {low} or more, got {value}")
    return int(value)


def number(value, name):
    """The argument as a float; TypeError unless it is a number, ValueError unless it is a finite one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)
