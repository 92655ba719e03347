"""What becomes of CUDA where a process forks: the child cannot use it, and is told so.

CUDA does not survive a fork: in the child of a process that has used it every call fails, with "initialization error"
(CUDA runtime API, Device Management). Nothing in there points to the fork, and asking for the number of GPUs fails too, so a
model would be computed by NumPy without a word. A child of a process that has only imported cupyq, or CuPy, is not affected.
"""

import contextlib
import ctypes
import os
import sys
from typing import Any

from cupyq.errors import BackendError

_was_used = False  # CUDA, by this process right before it forked
_is_cut_off = False


def refuse():
    """BackendError where this process was forked from one that had used CUDA."""
    if _is_cut_off:
        raise BackendError(
            "no GPU can be used here: this process was forked from one that had used CUDA, which does not survive that; start "
            "processes by multiprocessing's 'spawn' or before the first use of a GPU, or compute with backend='numpy'"
        )


def is_cuda_used():
    """Whether this process has begun to use CUDA, through cupyq or not. Loads and begins nothing."""
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
        return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0  # before cuInit: CUDA_ERROR_NOT_INITIALIZED
    except (OSError, AttributeError):  # nobody has loaded it; a system without that flag has no CUDA
        return False


def _before_fork():
    global _was_used
    _was_used = is_cuda_used()


def _after_fork():
    global _is_cut_off
    if not _was_used:
        return
    _is_cut_off = True
    if (cupy := sys.modules.get("cupy")) is not None:
        # What asks CuPy for memory, as ops do for results, is told here; ValueError: within another allocator's context.
        with contextlib.suppress(AttributeError, ValueError):
            cupy.cuda.set_allocator(_no_memory)


def _no_memory(size):
    refuse()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
