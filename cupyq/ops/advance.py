"""Drawn tokens into their texts, and the counters of a decoding step one further."""

import numpy as np

from cupyq._arrays import check, int32, namespace
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import refuse_overlap


@accepts_dlpack(writes=("positions", "lengths", "steps", "tokens", "history"), replays=True)
def advance(ids, positions, lengths, steps, tokens=None, history=None):
    """tokens[steps[b], b] = history[b, lengths[b]] = ids[b]; then positions, lengths and steps grow by 1

    What a decoding step changes besides the cache, on the device, so that the next one needs no host. ids, positions and
    lengths int32 [batch], steps int64 [batch]; tokens int32 [rows, batch] and history int32 [batch, columns] may be None. A
    token that falls outside of tokens or history is dropped there; counters grow all the same. Whatever is written is
    written in place, and None is returned. Raises TypeError / ValueError for wrong dtypes, shapes, strides or arguments
    that share memory.

    >>> ids, positions, lengths, steps = np.int32([7]), np.int32([2]), np.int32([3]), np.int64([0])
    >>> history = np.int32([[4, 5, 6, 0]])
    >>> advance(ids, positions, lengths, steps, history=history)
    >>> history.tolist(), positions.tolist(), lengths.tolist(), steps.tolist()
    ([[4, 5, 6, 7]], [3], [4], [1])
    """
    arrays = {"ids": ids, "positions": positions, "lengths": lengths, "steps": steps, "tokens": tokens, "history": history}
    xp = namespace(**arrays)
    check(ids, "ids", dtype=int32, ndim=1)
    batch = len(ids)
    for name in ("positions", "lengths"):
        check(arrays[name], name, dtype=int32, shape=(batch,), writes=True)
    check(steps, "steps", dtype=np.dtype(np.int64), shape=(batch,), writes=True)
    if tokens is not None:
        check(tokens, "tokens", dtype=int32, shape=(None, batch), writes=True)
    if history is not None:
        check(history, "history", dtype=int32, shape=(batch, None), writes=True)
    for name in ("positions", "lengths", "steps", "tokens", "history"):
        written = arrays.pop(name)
        if written is not None:
            refuse_overlap(written, name, **arrays)
    if batch == 0:
        return
    if xp is np:
        advance_reference(ids, positions, lengths, steps, tokens, history)
    else:
        _launch_advance(ids, positions, lengths, steps, tokens, history)


def advance_reference(ids, positions, lengths, steps, tokens, history):
    for b, token in enumerate(ids):
        if tokens is not None and 0 <= steps[b] < len(tokens):
            tokens[steps[b], b] = token
        if history is not None and 0 <= lengths[b] < history.shape[1]:
            history[b, lengths[b]] = token
    positions += 1
    lengths += 1
    steps += 1


def _launch_advance(ids, positions, lengths, steps, tokens, history):
    batch = len(ids)
    rows, columns = (0 if tokens is None else len(tokens)), (0 if history is None else history.shape[1])
    arguments = (ids, positions, lengths, steps, tokens, history, *map(np.int32, (batch, rows, columns)))
    launch(instance("advance"), (-(-batch // 128),), (128,), arguments)


INSTANCES = [instance("advance")]
"""The only one."""
