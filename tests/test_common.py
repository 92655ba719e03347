"""ops/_common.py: what arguments of every op are checked by."""

import numpy as np
import pytest

from cupyq.ops._common import whole_number


@pytest.mark.parametrize("kind", [int, np.int8, np.int64, np.uint8, np.uint64])
def test_whole_numbers_of_every_kind_become_ints(kind):
    for bounds in ((), (7,), (0,), (0, 7), (7, 7), (-(1 << 40), 1 << 80)):
        found = whole_number(kind(7), "n", *bounds)
        assert found == 7 and type(found) is int


@pytest.mark.parametrize("value", [8.0, np.float64(8), True, np.True_, "8", None, np.array([8]), np.array(8), 8j, b"8"])
def test_what_is_no_whole_number(value):
    for bounds in ((), (1,), (1, 9)):
        with pytest.raises(TypeError, match=f"^count must be a whole number, got {type(value).__name__}$"):
            whole_number(value, "count", *bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0, (1,), "1 or more, got 0"),
        (np.uint8(0), (1,), "1 or more, got 0"),
        (-1, (0, 5), "from 0 to 5, got -1"),
        (6, (0, 5), "from 0 to 5, got 6"),
        (np.int8(-128), (0, 1 << 32), "from 0 to 4294967296, got -128"),
        (1 << 70, (0, 1 << 32), "from 0 to 4294967296, got 1180591620717411303424"),
    ],
)
def test_whole_numbers_out_of_range(value, bounds, expected):
    with pytest.raises(ValueError, match=f"^count must be {expected}$"):
        whole_number(value, "count", *bounds)
