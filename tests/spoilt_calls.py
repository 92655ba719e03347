"""Ways to spoil a valid call: one argument of another shape, dtype, layout or value, or in the memory of another one."""

import functools
import importlib
import inspect
import warnings
from dataclasses import replace

import ml_dtypes
import numpy as np
from kernel_checks import move
from placed_calls import LAYOUTS, WRAPPERS, OfLibrary, Placed

DTYPES = tuple(
    np.dtype(d)
    for d in (
        bool, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32,
        np.float64, np.complex64, np.longdouble, object, "S4", "U2", "M8[s]", [("a", "f4"), ("b", "i4")], ">f4", ">f2", ">i4",
        ">i8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4,
    )
)  # fmt: skip

SCALARS = (
    None, "text", b"bytes", object(), [], [1.0], {}, (1, 2), 1.5, -1, -7, 0, 1, 2, 9, 2**31, -(2**31), 2**63, 2**70, 1j,
    float("nan"), float("inf"), float("-inf"), True, False, 1e300, -0.5, np.arange(2), np.float32(2), np.int64(3), np.array(2),
    np.array(float("nan")), "q4", "silu", "neox", np.float64, np.zeros((2, 2)), ...,
)  # fmt: skip

ANY_NUMBER = {
    ("gemm", "alpha"), ("gemm", "beta"), ("embedding", "scale"), ("hadamard", "scale"), ("quantize_err", "min_p"),
    ("quantize_err", "max_p"),
}  # fmt: skip
"""Factors: NaN and Inf are numbers like others there."""


def spoil_shape(choose, value):
    shape = list(value.shape)
    axis = choose(list(range(len(shape)))) if shape else None
    how = choose(["add", "drop", "0", "1", "more", "less", "double", "flat", "scalar", "swap"])
    if how == "add":
        return value[None]
    if axis is None:
        return value.reshape(1, 1)
    if how == "drop":
        return np.ascontiguousarray(np.take(value, 0, axis=axis)) if shape[axis] else value[None]
    if how == "flat":
        return value.reshape(-1)
    if how == "scalar":
        return np.zeros((), value.dtype)
    if how == "swap":
        return np.ascontiguousarray(value.swapaxes(axis, 0))
    count = {"0": 0, "1": 1, "more": shape[axis] + 1, "less": max(shape[axis] - 1, 0), "double": 2 * shape[axis]}[how]
    return np.resize(value, (*shape[:axis], count, *shape[axis + 1 :])).astype(value.dtype)


def spoil_dtype(choose, value):
    dtype = choose(DTYPES)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if dtype.names or dtype.kind in "MSU":
            return np.zeros(value.shape, dtype)
        try:
            return (value if value.dtype in DTYPES[:12] else value.astype(np.float32)).astype(dtype)
        except (TypeError, ValueError):
            return np.zeros(value.shape, dtype)


def spoil_contents(choose, value):
    value = value.copy()
    if not value.size:
        return value
    if value.dtype.kind in "MSUbO" or value.dtype.names or value.dtype == ml_dtypes.int4:
        return value
    if value.dtype.kind in "iu":
        info = np.iinfo(value.dtype)
        number = choose([info.max, info.min, 100, -1, 5, 0])
        number = min(max(number, info.min), info.max)
    else:
        number = choose([np.nan, np.inf, -np.inf, 0.0, 6e4, 3e38, -0.0])
    everywhere = choose([False, True])
    with np.errstate(all="ignore"):
        if everywhere:
            value[...] = number
        else:
            value.reshape(-1)[choose([0, value.size // 2, value.size - 1])] = number
    return value


KINDS = ("shape", "dtype", "layout", "wrapper", "contents", "alias", "scalar", "huge")


GPU_KINDS = ("layout", "wrapper", "alias", "scalar")
"""What a GPU's own path has to notice: shapes, dtypes and contents go through the checks that NumPy's go through."""


def spoilt(callee, placed, choose, kinds=KINDS, *, on_gpu=False):
    """(placed, what was done, whether the call may not succeed): one argument spoilt, on_gpu for a call with CuPy's arrays."""
    argument = choose(sorted(placed.keys() - callee.spared))
    item = placed[argument]
    if not isinstance(item.value, np.ndarray):
        if "scalar" not in kinds:
            return placed, "nothing", False
        index = choose(list(range(len(SCALARS))))
        wrong = SCALARS[index]
        done = f"{argument} = {wrong!r}"
        return placed | {argument: Placed(wrong)}, done, must_be_refused(callee, argument, item.value, wrong)
    kind = choose(list(kinds))
    if kind == "scalar":
        wrong = choose(["none", "text", "number", "object", "array of objects"])
        wrong = {"none": None, "text": "text", "number": float("nan"), "object": object(), "array of objects": [None]}[wrong]
        must = wrong is not None and not is_setting(callee.name, argument)
        return placed | {argument: Placed(wrong)}, f"{argument} = {wrong!r}", must
    if kind == "layout":
        layout = choose(list(LAYOUTS))
        must = on_gpu and layout == "one byte off" and item.value.size > 0 and item.value.itemsize > 1
        must = must and not is_setting(callee.name, argument) and argument not in _TABLES
        return placed | {argument: replace(item, layout=layout)}, f"{argument} {layout}", must
    if kind == "wrapper":
        wrapper = choose(list(WRAPPERS))
        read_only = ("read-only dlpack",) if on_gpu else ("read-only", "read-only dlpack")
        must = wrapper == "unknown device" or wrapper in read_only and callee.may_write(argument)
        return placed | {argument: replace(item, wrapper=wrapper)}, f"{argument} {wrapper}", must and "." not in argument
    if kind == "alias":
        others = [n for n, i in placed.items() if n != argument and isinstance(i.value, np.ndarray) and not i.shares]
        if not others or item.value.dtype.hasobject or any(i.shares for i in placed.values()):
            return placed, "nothing", False
        other, elements = choose(others), choose([0, 0, 1, -1, 3])
        if on_gpu and not (callee.may_write(argument) or callee.may_write(other)):
            return placed, "nothing", False  # what is read there could be any number
        if placed[other].value.dtype.hasobject or placed[other].layout != "plain":
            return placed, "nothing", False
        return placed | {argument: replace(item, shares=(other, elements))}, f"{argument} on {other} + {elements}", False
    if kind == "huge":
        shape = tuple(choose([2**20, 2**31, 2**40]) if i == 0 else n for i, n in enumerate(item.value.shape))
        if not shape or item.value.dtype.hasobject:
            return placed, "nothing", False
        return placed | {argument: Placed(Huge(item.value.dtype, shape))}, f"{argument} huge {shape}", True
    spoil = {"shape": spoil_shape, "dtype": spoil_dtype, "contents": spoil_contents}[kind]
    if item.value.dtype.hasobject or item.value.dtype.names:
        return placed, "nothing", False
    value = spoil(choose, item.value)
    done = f"{argument} {value.dtype} {value.shape}" if kind != "contents" else f"{argument} = {value.reshape(-1)[:3]}..."
    return placed | {argument: replace(item, value=value)}, done, False


_TABLES = ("q.q_groups", "q.q_invperm", "q.q_perm", "q.g_idx", "q.q_scale_max")  # travel through the host


class Huge(OfLibrary):
    """An array of a huge shape that all lies in one element."""

    def __init__(self, dtype, shape):
        super().__init__(functools.partial(self._made, dtype=dtype, shape=shape))

    @staticmethod
    def _made(library, dtype, shape):
        element = move(library, np.zeros((), dtype))
        if library == "numpy":
            return np.broadcast_to(element, shape)
        import cupy

        return cupy.broadcast_to(element, shape)


def is_setting(name, argument):
    """Settings of the sampler may be numbers or arrays."""
    if name not in ("sample", "penalize"):
        return False
    return argument in importlib.import_module(f"cupyq.ops.{'sampling' if name == 'sample' else 'penalties'}").SETTINGS


def must_be_refused(callee, argument, valid, wrong):
    """Whether a value in place of a valid one that is no array can never be right."""
    parameter = callee.parameters.get(argument)
    is_default = parameter is not None and parameter.default is not inspect.Parameter.empty and wrong is parameter.default
    if is_default or is_setting(callee.name, argument) or valid is None or isinstance(valid, bool) or "dtype" in argument:
        return False
    if isinstance(valid, (int, float)):
        is_odd = isinstance(wrong, float) and not np.isfinite(wrong)
        if is_odd:
            return (callee.name, argument) not in ANY_NUMBER
        if wrong is None:
            return True
        if argument in ("eps", "cap", "bound", "softcap", "err_norm", "window") or argument.endswith(".eps"):
            return isinstance(wrong, (int, float)) and wrong < 0 or isinstance(wrong, (str, list, dict, tuple, complex))
        return isinstance(wrong, (str, bytes, list, dict, tuple, complex)) or wrong is ...
    if isinstance(valid, str):
        return not isinstance(wrong, str) and not (wrong is None and argument == "style")
    return wrong is not None
