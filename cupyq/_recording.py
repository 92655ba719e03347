"""What a call of an op does on a GPU, while somebody writes it down."""

import threading
from typing import Any

_MOST_BYTES = 64 << 20  # to hold at once what the op lets go of one after the other is no matter up to here


class Record:
    """A call: its launches (arguments of `_kernels.launch_here`, but its last), and the memory that it made for itself."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.made: list[tuple[Any, Any]] = []
        """(function of shape and dtype, the array)"""
        self.hidden: list[int] = []
        """Addresses that launches are given within what cannot be looked into."""


class _Recording(threading.local):
    """Of this thread. None: nobody writes."""

    record: Record | None = None


recording = _Recording()


def note_array(make, array):
    """A call made this array by make(shape, dtype)."""
    if (record := recording.record) is not None:
        record.made.append((make, array))
        if sum(array.nbytes for _, array in record.made) > _MOST_BYTES:
            spoil()


def spoil():
    """What follows is no launch of `_kernels`, or depends on values that the host has read: the call cannot come again."""
    recording.record = None
