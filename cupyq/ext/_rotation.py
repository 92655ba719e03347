"""exllamav2's way of giving RoPE its tables and positions, in terms of `cupyq.ops.rope`."""

import collections
import functools
import sys
import threading

import numpy as np

from cupyq import ops
from cupyq._arrays import byte_bounds, check, float16, int32, namespace
from cupyq.ext._arrays import integer

_FAR = 2**29  # beyond every table, and twice it is an int32


class Rotation:
    """The rotation of `seq` tokens in each of `batch` rows. Every check that needs no q or k has passed."""

    def __init__(self, sin, cos, past_len, offsets, *, batch, seq, head_dim, style):
        """sin, cos float16 [..., positions, R], a value for each column; for past_len and offsets see `rope_`."""
        xp = namespace(sin=sin, cos=cos, offsets=offsets)
        check(sin, "sin", dtype=float16)
        check(cos, "cos", dtype=float16, shape=sin.shape)
        if sin.ndim < 2 or sin.size == 0 or sin.shape[-1] % 2 or sin.shape[-1] > head_dim:
            raise ValueError(
                f"sin must have shape (..., positions, R), R even and at most head_dim {head_dim}, got {sin.shape}"
            )
        if offsets is not None:
            check(offsets, "offsets", dtype=int32, shape=(batch,))
        self.style = style
        columns = sin.shape[-1]
        table_len = sin.size // columns
        if style == "neox":
            # Only the first half of each row is read. Seen as rows of half the width, those are the even ones.
            self.sin, self.cos = sin.reshape(2 * table_len, columns // 2), cos.reshape(2 * table_len, columns // 2)
        else:
            self.sin, self.cos = _one_value_per_pair(sin.reshape(-1, columns), cos.reshape(-1, columns))
        self.positions = _positions(xp, past_len, offsets, batch, seq, table_len, 2 if style == "neox" else 1)

    def __call__(self, x):
        """Turn x [batch, seq, heads, head_dim], in place."""
        ops.rope(x, self.sin, self.cos, self.positions, style=self.style, out=x)


def _positions(xp, past_len, offsets, batch, seq, table_len, step):
    """int32 [batch, seq]: `step` times each token's position. Negative positions become 0, as exllamav2's do.

    Those beyond the table raise ValueError where the host knows them; on a GPU they stay beyond, which `rope` makes NaN.
    """
    past_len = integer(past_len, "past_len")
    if past_len == -1 and offsets is None:
        raise ValueError("past_len is -1, which asks for offsets, and they are absent")
    if not -_FAR < past_len < _FAR:
        raise ValueError(f"past_len must be within the table of {table_len} positions, got {past_len}")
    if offsets is None:
        last = past_len + seq - 1
        if seq and batch and last >= table_len:
            raise ValueError(
                f"past_len {past_len} puts the last of {seq} tokens at {last}, outside the {table_len} positions of sin"
            )
        cupy = sys.modules.get("cupy")
        where = (None, None) if xp is np else (cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)
        return _known_positions(xp, past_len, batch, seq, step, where)
    # exllamav2's -1 means no past beside the offsets, which are then taken as 0 where they are negative.
    first = xp.clip(offsets, np.int32(0 if past_len == -1 else -_FAR), np.int32(_FAR))
    if past_len not in (-1, 0):
        first += np.int32(past_len)
    positions = first[:, None]
    if seq != 1:
        positions = positions + xp.arange(seq, dtype=np.int32)
    if xp is np and positions.size and positions.max() >= table_len:
        row, token = (int(i) for i in np.argwhere(positions >= table_len)[0])
        raise ValueError(
            f"past_len and offsets put token {token} of row {row} at {positions[row, token]}, outside the {table_len} "
            "positions of sin"
        )
    positions = xp.clip(positions, np.int32(0), np.int32(table_len))
    positions *= np.int32(step)
    return positions


@functools.lru_cache(maxsize=32)
def _known_positions(xp, past_len, batch, seq, step, where):
    """As above without offsets: all layers of a step ask for the same. `where` (device, stream) keeps others' apart."""
    row = np.maximum(past_len + np.arange(seq), 0).astype(np.int32) * np.int32(step)
    return xp.asarray(np.ascontiguousarray(np.broadcast_to(row, (batch, seq))))


# --- tables of the interleaved style ----------------------------------------------------------------------------------

_MAX_TABLES = 16
_tables: collections.OrderedDict[tuple, tuple] = collections.OrderedDict()
_tables_lock = threading.Lock()


def _one_value_per_pair(sin, cos):
    """The even columns of both tables, whose odd ones must repeat them.

    On a GPU looking at the values stalls, so what was once found stays, together with the tables it came from: their
    memory is not used for others meanwhile. Tables changed in place afterwards are not seen.
    """
    if isinstance(sin, np.ndarray):
        return _even_columns(sin, "sin"), _even_columns(cos, "cos")
    key = (sin.device.id, byte_bounds(sin), byte_bounds(cos), sin.shape)
    with _tables_lock:
        found = _tables.get(key)
        if found is None:
            stream = sys.modules["cupy"].cuda.get_current_stream()
            found = _even_columns(sin, "sin"), _even_columns(cos, "cos"), sin, cos
            stream.synchronize()  # later calls may come on other streams
            _tables[key] = found
            while len(_tables) > _MAX_TABLES:
                _tables.popitem(last=False)
        else:
            _tables.move_to_end(key)
    return found[:2]


def _even_columns(table, name):
    xp = namespace(table=table)
    even = xp.ascontiguousarray(table[:, 0::2])
    if bool((even != table[:, 1::2]).any()):
        raise ValueError(f"{name} must hold one value for both columns of each pair (2i, 2i + 1) in the interleaved style")
    return even
