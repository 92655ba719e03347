"""cupyq.ext with arrays nobody should pass: right results, or an error of cupyq's own that left all memory as it was.

The good calls, and what single arguments of the wrong kind do, are in test_ext_hostile.py; here layouts, overlaps, dtypes,
shapes, contents and wrappers are spoilt, two at a time too, as test_ops.py does it with the ops.
"""

import inspect

import numpy as np
import pytest
import spoilt_calls
from hypothesis import note
from op_calls import CALLS
from placed_calls import ERRORS, Callee, Placed, attempt
from spoilt_calls import spoilt
from test_ext_hostile import NAMES, Good
from test_ops import EXAMPLES, tried

import cupyq.ext as ext_c
from cupyq import ops

WRITES = {"fast_copy_cpu": ("dst",)}
"""What functions that no decorator knows write to."""

OP_ARGUMENTS = frozenset().union(*(inspect.signature(getattr(ops, name)).parameters for name in CALLS))
"""Functions that are ops of other names say what is wrong in the words of these."""


def _is_array(value):
    return isinstance(value, np.ndarray)


KINDS = tuple(kind for kind in spoilt_calls.KINDS if kind != "huge")
"""What is only read may have any strides here and is copied: of arrays of 2**40 elements no copy can be made."""


class ExtCallee(Callee):
    """A function of the extension. Items of lists and dicts of arrays are arguments in parts: `x_list.0`."""

    errors = (*ERRORS, OSError)
    spared = frozenset({"iterations"})  # a large number of them is no mistake, and takes its time

    def __init__(self, name, good):
        self.name, self.function, self.good = name, getattr(ext_c, name), good
        self.parameters = inspect.signature(self.function).parameters
        writes = inspect.getclosurevars(self.function).nonlocals.get("writes", WRITES.get(name, ()))
        self.names = frozenset(self.parameters) | OP_ARGUMENTS
        self.writes = writes if callable(writes) else lambda arguments: writes
        self.written, self.containers = frozenset(), {}

    def fresh(self):
        """The arguments of a good call, in parts."""
        parts = {}
        for name, value in getattr(self.good, self.name)().items():
            items = dict(enumerate(value)) if isinstance(value, list) else value
            if isinstance(items, dict) and items and all(map(_is_array, items.values())):
                self.containers[name] = type(value)
                parts |= {f"{name}.{key}": item for key, item in items.items()}
            else:
                parts[name] = value
        return parts

    def placed(self):
        """A good call, and what it writes to."""
        self.start = self.fresh()
        self.written = frozenset(self.writes(self._whole(self.start)))
        return {name: Placed(value) for name, value in self.start.items()}

    def _whole(self, arguments):
        whole = {name: value for name, value in arguments.items() if "." not in name}
        for container, kind in self.containers.items():
            items = {int(n.split(".")[1]): v for n, v in arguments.items() if n.startswith(f"{container}.")}
            whole[container] = list(items.values()) if kind is list else items
        return whole

    def run(self, arguments):
        with np.errstate(all="ignore"):
            result = self.function(**self._whole(arguments))
        # Handles are new ones every time, and so are the random choices of an annealing.
        return None if self.name.startswith("make_") or self.name == "sim_anneal" else result

    def may_write(self, argument):
        return argument.split(".")[0] in self.written

    def again(self, argument, value):
        return self.fresh()[argument] if value is self.start.get(argument) else value


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.filterwarnings("ignore")
def test_a_spoilt_call_is_right_or_says_what_is_wrong(name, tmp_path):
    def body(choose, counts):
        callee = ExtCallee(name, Good("numpy", tmp_path))
        placed = callee.placed()
        spoils = choose((1, 1, 1, 2, 2, 0))
        for _ in range(spoils):
            placed, what, _ = spoilt(callee, placed, choose, KINDS)
            note(what)
        outcome = attempt(callee, placed)
        counts["calls"] += 1
        counts[outcome] += 1
        assert spoils or outcome == "right", "the good call is refused"

    tried(f"ext.{name}", body, EXAMPLES // 2)
