"""Keys and values of the tokens seen so far."""

import copy

import numpy as np


class KVCache:
    """k[layer] and v[layer], each [batch, capacity, kv_heads, head_dim]; the first `length` positions are filled.

    All rows of a batch have the same length. What a step needs on the device (where its tokens go, how many keys there
    are) is a row of a table made once, so that a step copies nothing from the host and waits for nothing.
    workspaces: those of a `Step` by their names, kept here as both belong to one stream of work.
    """

    def __init__(self, xp, *, batch, capacity, layers, kv_heads, head_dim, dtype, workspaces=None):
        for name, value in {"batch": batch, "capacity": capacity}.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.xp, self.batch, self.capacity = xp, int(batch), int(capacity)
        shape = (layers, self.batch, self.capacity, kv_heads, head_dim)
        self.k, self.v = (list(xp.zeros(shape, dtype)) for _ in range(2))
        self.workspaces = workspaces or {}
        self.length = 0
        # Row i: the number i, once per row of the batch.
        counts = np.arange(self.capacity + 1, dtype=np.int32)[:, None]
        self._counts = xp.asarray(np.ascontiguousarray(np.broadcast_to(counts, (self.capacity + 1, self.batch))))

    def row(self, index):
        """A cache of batch row `index` alone: its memory is shared, its length at first 0 and its own."""
        part = copy.copy(self)
        part.batch, part.length = 1, 0
        part.k, part.v = ([array[index : index + 1] for array in arrays] for arrays in (self.k, self.v))
        part._counts = self._counts[:, :1].copy()
        return part

    @property
    def nbytes(self):
        return sum(array.nbytes for array in (*self.k, *self.v))

    @property
    def positions(self):
        """int32 [batch] on the device: `length`, where the next token of each row goes."""
        return self._counts[self.length]

    def kv_lengths(self, new):
        """int32 [batch] on the device: keys of each row once `new` tokens have been appended."""
        return self._counts[self.length + new]

    def check_room(self, new):
        """ValueError unless `new` more tokens fit."""
        if self.length + new > self.capacity:
            raise ValueError(
                f"prompt longer than the cache: {new} tokens after {self.length} pass its capacity of {self.capacity}; "
                f"make one with new_cache(capacity={self.length + new})"
            )

    def advance(self, new):
        self.check_room(new)
        self.length += new

    def reset(self):
        """Forget all tokens; the memory stays."""
        self.length = 0

    def truncate(self, length):
        """Forget the tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be from 0 to {self.length}, what the cache holds, got {length}")
        self.length = length
