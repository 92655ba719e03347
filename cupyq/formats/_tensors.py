"""Checks on the tensors of one layer. Only `.shape` and `.dtype` are read, so the tensors may live on a GPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cupyq.errors import FormatError


def label(name: str, short: str) -> str:
    """Name of a tensor in messages: `short` with the layer's name in front, if it has one."""
    return f"{name}.{short}" if name else short


def check_tensor(
    tensors: Mapping[str, Any], short: str, name: str, dtypes: tuple[Any, ...], shape: tuple[int | None, ...], why: str
) -> Any:
    """tensors[short], if it is there with one of `dtypes` and `shape` (None: any size above 0); else FormatError.

    `why` says in words where the expected shape comes from.
    """
    tensor = tensors.get(short)
    if tensor is None:
        raise FormatError(f"{label(name, short)}: missing, expected shape {why}; the checkpoint is incomplete")
    allowed = [np.dtype(dtype) for dtype in dtypes]
    if tensor.dtype not in allowed:
        raise FormatError(f"{label(name, short)}: dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))}")
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(
        size == wanted if wanted is not None else size > 0 for size, wanted in zip(found, shape, strict=True)
    )
    if not fits:
        wanted_text = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
        raise FormatError(
            f"{label(name, short)}: shape {list(found)}, expected [{wanted_text}], that is {why}; "
            "check that all tensors come from the same layer"
        )
    return tensor


def check_input_count(count: int, name: str) -> None:
    """FormatError unless row_input leaves a multiple of 8 inputs, which kernels read 8 at a time."""
    if count == 0 or count % 8:
        raise FormatError(
            f"{label(name, 'row_input')}: {count} inputs, expected a multiple of 8 above 0; split the layer at multiples of 8"
        )


def host_values(tensor: Any, short: str, name: str) -> np.ndarray:
    """The tensor, if it is a NumPy array; TypeError otherwise, since a silent copy from a GPU would synchronise it."""
    if not isinstance(tensor, np.ndarray):
        raise TypeError(
            f"{label(name, short)}: {type(tensor).__name__}, expected a NumPy array; copy it with cupy.asnumpy first"
        )
    return tensor


def frozen(array: np.ndarray) -> np.ndarray:
    """The array, marked read-only: layouts are values."""
    array.setflags(write=False)
    return array
