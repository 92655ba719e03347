"""A rank's part of a layer, read from a checkpoint: its bytes, and no others.

A tensor is row-major, so that a range of columns is a strided read, a run of bytes for every row: `StoredTensor` does it when
it is sliced. What `split` slices is what is read.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint
from cupyq.formats.stored import stored_tensors
from cupyq.tp.split import take_columns, take_rows

_TABLES = ("q_groups", "q_scale_max", "q_invperm", "g_idx")  # small, needed whole by every rank
_THREADS = 4
_THREADED_BYTES = 8 << 20  # below, one thread is as quick


class StoredTensor:
    """A tensor in a checkpoint, with the `shape` and `dtype` of an array; a slice of it is read into a new array."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        info = checkpoint.info(name)
        self.name, self.shape, self.dtype = name, info.shape, info.dtype
        self._checkpoint = checkpoint

    def __getitem__(self, key: slice | tuple[slice, slice]) -> np.ndarray:
        """tensor[rows] or tensor[rows, columns], each a slice of step 1."""
        slices = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(slices) <= min(2, len(self.shape)) or not all(isinstance(part, slice) for part in slices):
            raise TypeError(f"{self.name}: a StoredTensor of shape {list(self.shape)} takes up to 2 slices, got {key!r}")
        spans = [range(size)[part] for size, part in zip(self.shape, slices, strict=False)]
        if any(span.step != 1 for span in spans):
            raise ValueError(f"{self.name}: a StoredTensor takes slices of step 1, got {key!r}")
        rest = self.shape[len(spans) :]
        result = np.empty((*map(len, spans), *rest), self.dtype)
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        rows = spans[0]
        if len(spans) == 1 or len(spans[1]) == self.shape[1]:
            self._read_run(rows.start * row_bytes, result)
        else:
            self._read_strided(rows, row_bytes, spans[1].start * self.dtype.itemsize, result)
        return result

    def _read_run(self, begin: int, target: np.ndarray) -> None:
        """Neighbouring rows: one run of bytes, in pieces."""
        flat = target.reshape(-1).view(np.uint8)

        def read(first: int) -> None:
            self._checkpoint.read_piece(self.name, begin + first, flat[first : first + _THREADED_BYTES])

        _each(read, range(0, flat.size, _THREADED_BYTES))

    def _read_strided(self, rows: range, row_bytes: int, offset: int, target: np.ndarray) -> None:
        """A run of bytes of every row; threads take neighbouring rows, so that a disk has several reads to do at a time."""
        step = max(1, min(-(-len(rows) // _THREADS), len(rows) * _THREADED_BYTES // max(1, target.nbytes)))

        def read(first: int) -> None:
            for index in range(first, min(first + step, len(rows))):
                self._checkpoint.read_piece(self.name, rows[index] * row_bytes + offset, target[index])

        firsts = range(0, len(rows), step)
        if target.nbytes < _THREADED_BYTES:
            for first in firsts:
                read(first)
        else:
            _each(read, firsts)


def linear_tensors(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """Tensors of a linear layer by short name, for the functions of `split`: the small tables read, the others StoredTensors.

    Of a layer that is quantized and not, the quantized form, as `load_model` takes it. FormatError if there is none.
    """
    names = stored_tensors(checkpoint, key)
    if not names:
        checkpoint.info(f"{key}.weight")  # an error that names it
    tensors: dict[str, Any] = {}
    for short in (*names, "bias"):
        name = f"{key}.{short}"
        if name in checkpoint:
            tensors[short] = StoredTensor(checkpoint, name)
            if short in _TABLES:
                tensors[short] = tensors[short][:]
    return tensors


def read_columns(
    checkpoint: Checkpoint, key: str, columns: range | np.ndarray, *, group_size: int | None = None
) -> dict[str, Any]:
    """`take_columns` of a layer of the checkpoint. Of a range, only its bytes are read.

    Scattered columns have no bytes that could be read by themselves: all rows pass through memory, a few at a time.
    """
    with _named(checkpoint, key):
        return take_columns(linear_tensors(checkpoint, key), columns, group_size=group_size, name=key)


def read_rows(checkpoint: Checkpoint, key: str, rows: range | np.ndarray, *, group_size: int | None = None) -> dict[str, Any]:
    """`take_rows` of a layer of the checkpoint. Of a quantized layer, only blocks of 32 stored rows are read that hold some of
    these, and only groups' scales that they are in."""
    with _named(checkpoint, key):
        return take_rows(linear_tensors(checkpoint, key), rows, group_size=group_size, name=key)


@contextlib.contextmanager
def _named(checkpoint: Checkpoint, key: str) -> Iterator[None]:
    """Put the folder in front of format errors that begin with the layer."""
    try:
        yield
    except FormatError as error:
        if not str(error).startswith(key):
            raise
        raise FormatError(f"{checkpoint.folder}: {error}") from None


def _each(read: Callable[[int], None], begins: range) -> None:
    if len(begins) < 2:
        for begin in begins:
            read(begin)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, begins))
