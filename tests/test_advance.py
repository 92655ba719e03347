"""ops/advance.py by hand, and the kernel against its reference."""

import itertools

import numpy as np
import pytest
from kernel_checks import host

from cupyq.ops.advance import advance


def counters():
    return (
        np.array([7, 8, 9], np.int32),
        np.array([4, 0, 2], np.int32),
        np.array([5, 1, 3], np.int32),
        np.array([0, 2, 1], np.int64),
    )


def advanced(xp, tokens=True, history=True):
    """[positions, lengths, steps, tokens, history] afterwards, on the host."""
    ids, positions, lengths, steps = map(xp.asarray, counters())
    tokens = xp.zeros((2, 3), np.int32) if tokens else None
    history = xp.full((3, 5), -1, np.int32) if history else None
    assert advance(ids, positions, lengths, steps, tokens, history) is None
    assert host(ids).tolist() == [7, 8, 9]
    return [None if array is None else host(array).tolist() for array in (positions, lengths, steps, tokens, history)]


def test_advance_by_hand():
    """Text 0 is full, text 1 has no place left among the tokens: there nothing is written, and counters grow."""
    counted = [[5, 1, 3], [6, 2, 4], [1, 3, 2]]
    tokens, history = [[7, 0, 0], [0, 0, 9]], [[-1] * 5, [-1, 8, -1, -1, -1], [-1, -1, -1, 9, -1]]
    assert advanced(np) == [*counted, tokens, history]
    assert advanced(np, tokens=False) == [*counted, None, history]
    assert advanced(np, history=False) == [*counted, tokens, None]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: np.zeros(3, np.int64)}, TypeError, "ids must have dtype int32"),
        ({1: np.zeros(2, np.int32)}, ValueError, r"positions must have shape \(3\)"),
        ({3: np.zeros(3, np.int32)}, TypeError, "steps must have dtype int64"),
        ({4: np.zeros((2, 4), np.int32)}, ValueError, r"tokens must have shape \(any, 3\)"),
        ({5: np.zeros((2, 4), np.int32)}, ValueError, r"history must have shape \(3, any\)"),
    ],
)
def test_advance_refuses_what_does_not_fit(changes, error, message):
    arguments = [*counters(), None, None]
    for place, array in changes.items():
        arguments[place] = array
    with pytest.raises(error, match=message):
        advance(*arguments)


def test_advance_refuses_shared_memory():
    ids, positions, lengths, steps = counters()
    with pytest.raises(ValueError, match="positions overlaps ids"):
        advance(ids, ids, lengths, steps)
    with pytest.raises(ValueError, match="lengths overlaps history"):
        advance(ids, positions, lengths, steps, history=lengths.reshape(3, 1))


@pytest.mark.gpu
def test_advance_on_the_gpu_matches_the_reference(cupy):
    for tokens, history in itertools.product((True, False), repeat=2):
        assert advanced(cupy, tokens, history) == advanced(np, tokens, history)
    batch = 1000
    arrays = [np.arange(batch, dtype=np.int32) for _ in range(3)] + [np.zeros(batch, np.int64), np.zeros((1, batch), np.int32)]
    on_device = [cupy.asarray(array) for array in arrays]
    advance(*arrays)
    advance(*on_device)
    assert all(np.array_equal(host(found), expected) for found, expected in zip(on_device, arrays, strict=True))
