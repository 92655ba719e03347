"""The integers that make_q_matrix, make_q_attn, ... give out, and the objects behind them.

exllamav2 hands out addresses, which crash when they are stale. These are keys of a table: nothing but a handle that was
given out, for the kind asked for and not yet freed, finds an object. A number is never given out twice.
"""

import itertools
import threading

_MAKERS = {
    "q_matrix": "make_q_matrix",
    "q_attn": "make_q_attn",
    "q_mlp": "make_q_mlp",
    "q_moe_mlp": "make_q_moe_mlp",
    "tp_context": "make_tp_context",
}

_FIRST = 1 << 40  # far from counts, sizes and device numbers, which are then never taken for a handle


class Handles:
    """A table from handles to objects; every method may be called from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers = itertools.count(_FIRST)
        self._entries = {}  # handle -> (kind, object)

    def add(self, kind, value):
        """A new handle for `value`, of one of the kinds above."""
        with self._lock:
            handle = next(self._numbers)
            self._entries[handle] = kind, value
        return handle

    def get(self, handle, kind, name):
        """The object behind a handle; ValueError naming the argument unless it is a live one of this kind."""
        # bool is an int to Python, and True would find entry 1.
        if type(handle) is not int:
            raise ValueError(f"{name} must be a handle from {_MAKERS[kind]}, got {type(handle).__name__}")
        found, value = self._entries.get(handle, (None, None))
        if found is None:
            raise ValueError(f"{name} must be a handle from {_MAKERS[kind]}, but {handle} was freed or never given out")
        if found != kind:
            raise ValueError(f"{name} must be a handle from {_MAKERS[kind]}, but {handle} came from {_MAKERS[found]}")
        return value

    def free(self, handle, kind, name):
        """Forget a handle; the object lives on where others hold it. ValueError as in `get`."""
        with self._lock:
            self.get(handle, kind, name)
            del self._entries[handle]


handles = Handles()
