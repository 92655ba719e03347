"""Settings of batched ops: each is one number for all rows or an array [rows], on the host or on the device."""

import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupyq._arrays import FLOATS, check, is_cupy, require_cupy
from cupyq._recording import spoil


class Setting(NamedTuple):
    """One setting: its default, the dtype kernels read it in (float32, int32 or uint64), and what values it may have."""

    default: Any
    dtype: Any = np.float32
    expected: str = ""
    is_valid: Callable[[Any], Any] | None = None
    """Real settings: true where a float64 array of values is right, as `expected` says."""
    least: int = 0
    """Whole settings: the least value."""


def normalise(specification, given, xp, rows):
    """{name: scalar or array [rows] of the setting's dtype}, checked where the values are on the host.

    `given` leaves out what has its default; such settings become scalars at no cost.
    """
    values = {}
    for name, setting in specification.items():
        value = given.get(name, setting.default)
        if value is setting.default:
            values[name] = _default_scalar(setting.default, setting.dtype)
        elif setting.dtype is np.float32:
            values[name] = _real(name, value, xp, rows, setting)
        else:
            values[name] = _integer(name, value, xp, rows, setting)
    return values


_scalars: dict[tuple, np.generic] = {}


def _default_scalar(value, dtype):
    key = value, dtype
    if key not in _scalars:
        _scalars[key] = dtype(value)
    return _scalars[key]


def _real(name, value, xp, rows, setting):
    """A float setting as a float32 scalar or array."""
    if is_cupy(value):
        return _on_device(name, value, xp, rows, (np.float32,))
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.dtype not in FLOATS:
        raise TypeError(f"{name} must be a real number or an array of them, got {_kind(value)}")
    _check_rows(name, array, rows)
    array = array.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = array.astype(np.float32)
        wrong = ~(setting.is_valid(array) & np.isfinite(rounded))
    if wrong.any():
        raise ValueError(f"{name} must be {setting.expected}, got {float(array[wrong].flat[0])!r}")
    return rounded if array.ndim else rounded[()]


def _integer(name, value, xp, rows, setting):
    """An integer setting: uint64 modulo 2**64, int32 clamped to its largest value (no vocabulary is larger)."""
    dtype, least = setting.dtype, setting.least
    if is_cupy(value):
        return _on_device(name, value, xp, rows, (np.int32,) if dtype is np.int32 else (np.int64, np.uint64))
    if np.ndim(value) == 0:
        try:
            number = operator.index(value.item() if isinstance(value, (np.ndarray, np.generic)) else value)
        except TypeError:
            raise TypeError(f"{name} must be an integer or an array of integers, got {_kind(value)}") from None
        smallest = largest = number
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be an integer or an array of integers, got {_kind(value)}")
        _check_rows(name, array, rows)
        smallest, largest = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if smallest < least:
        raise ValueError(f"{name} must be at least {least}, got {smallest}")
    if dtype is np.uint64 and largest >= 1 << 64:
        raise ValueError(f"{name} must be below 2**64, got {largest}")
    if np.ndim(value) == 0:
        return np.uint64(number % (1 << 64)) if dtype is np.uint64 else np.int32(min(number, (1 << 31) - 1))
    if dtype is np.uint64:
        return array.astype(np.uint64)
    return np.minimum(array, min((1 << 31) - 1, np.iinfo(array.dtype).max)).astype(np.int32)


def _on_device(name, value, xp, rows, dtypes):
    if xp is np:
        raise TypeError(f"logits is a NumPy array and {name} is a CuPy array: move one with cupy.asarray() or .get()")
    check(value, name, dtype=tuple(map(np.dtype, dtypes)), shape=(rows,))
    return value


def _check_rows(name, array, rows):
    if array.ndim and array.shape != (rows,):
        raise ValueError(f"{name} must be one number or have shape ({rows},), one per row of logits, got {array.shape}")


def _kind(value):
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def is_scalar(value):
    return isinstance(value, np.generic)


def may_be(values, name, condition):
    """False where the values of a setting are on the host and none of them meets the condition."""
    return is_cupy(values[name]) or bool(np.any(condition(values[name])))


def upload(values, tabled, specification, rows):
    """Settings ready for a launch on CuPy's current device -> (values, table or None).

    `tabled` settings (32 bits each) with an array among them become one table [rows, width], width a multiple of 8, a
    column each; else the table is None. All NumPy arrays travel in one copy. CuPy arrays are used as they are, but for
    those that go into the table.
    """
    cupy = require_cupy()
    has_table = not all(is_scalar(values[name]) for name in tabled)
    width = -(-len(tabled) // 8) * 8 if has_table else 0
    lines = [n for n, v in values.items() if isinstance(v, np.ndarray) and n not in tabled]
    if not has_table and not lines:
        return values, None
    words = rows * width // 2  # of 64 bits; the table comes first
    packed = np.zeros(words + len(lines) * rows, np.uint64)
    if has_table:
        table = packed[:words].view(np.uint32).reshape(rows, width)
        for column, name in enumerate(tabled):
            if not is_cupy(values[name]):
                table[:, column] = np.broadcast_to(values[name], rows).view(np.uint32)
    for i, name in enumerate(lines):
        packed[words + i * rows :][:rows].view(specification[name].dtype)[:rows] = values[name]
    spoil()
    on_device = cupy.asarray(packed)
    values = dict(values)
    for i, name in enumerate(lines):
        values[name] = on_device[words + i * rows :][:rows].view(specification[name].dtype)[:rows]
    if not has_table:
        return values, None
    table = on_device[:words].view(np.uint32).reshape(rows, width)
    for column, name in enumerate(tabled):
        if is_cupy(values[name]):
            table[:, column] = values[name].view(np.uint32)
    return values, table


class SettingTable:
    """Settings of an op for `rows` rows, checked and moved to the device once: steady decoding then uploads nothing.

    Table(rows, xp, **settings): xp is `numpy` or `cupy`; each setting is one number or an array [rows]. CuPy arrays are
    taken over as they stand now. Lives on CuPy's current device. Subclasses say which settings there are.
    """

    specification: dict[str, Setting] = {}
    tabled: tuple[str, ...] = ()
    """The settings that kernels read as one table where there is an array among them."""

    def __init__(self, rows, xp=np, **settings):
        name = type(self).__name__
        unknown = [setting for setting in settings if setting not in self.specification]
        if unknown:
            raise TypeError(f"{name} has no setting {unknown[0]!r}, only {', '.join(self.specification)}")
        if xp is not np and xp is not sys.modules.get("cupy", np):
            raise TypeError(f"xp must be numpy or cupy, got {xp!r}")
        if isinstance(rows, bool) or not isinstance(rows, (int, np.integer)) or rows < 0:
            raise ValueError(f"rows must be a whole number of 0 or more, got {rows!r}")
        self.rows, self.xp = int(rows), xp
        self.values = normalise(self.specification, settings, xp, rows)
        self.packed = None if xp is np or rows == 0 else upload(self.values, self.tabled, self.specification, rows)

    def __repr__(self):
        given = [n for n, v in self.values.items() if not (is_scalar(v) and v == self.specification[n].default)]
        return f"{type(self).__name__}({self.rows} rows, {self.xp.__name__}, {', '.join(given) or 'defaults'})"

    def values_for(self, rows, others):
        """The settings, for logits of that many rows, where no `others` were given besides the table."""
        if others:
            raise ValueError(f"{others[0]} and table are both given: put {others[0]} into the {type(self).__name__}")
        if self.rows != rows:
            raise ValueError(f"table has {self.rows} rows, logits {rows}: make a {type(self).__name__} for {rows} rows")
        return self.values


def given_settings(specification, arguments):
    """Those of an op's arguments that are settings and not their defaults."""
    given = {}
    for name, setting in specification.items():
        value = arguments[name]
        if type(value) is not type(setting.default) or value != setting.default:
            given[name] = value
    return given
