"""What the current GPU is: its architecture, size and limits."""

import functools
import warnings
from dataclasses import dataclass

from cupyq import _fork
from cupyq._arrays import is_absence, require_cupy
from cupyq.errors import BackendError

TARGET_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
"""The architectures every kernel is compiled for in the tests."""


@dataclass(frozen=True)
class DeviceInfo:
    id: int
    name: str
    arch: str
    sm_count: int
    shared_bytes_per_block: int
    l2_bytes: int
    memory_bytes: int


def arch_of(major, minor):
    """The real architecture of a compute capability, with the `a` that unlocks wgmma and its successors."""
    return f"sm_{major}{minor}{'a' if major in (9, 10, 11) else ''}"


def arch_number(arch):
    """`"sm_90a"` -> 90."""
    digits = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not digits.isdigit():
        raise ValueError(f"architecture must look like sm_90a, got {arch!r}")
    return int(digits)


_SHARED_KIB = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}


def shared_bytes_limit(arch):
    """Shared memory a block may ask for on an architecture (CUDA programming guide, compute capabilities)."""
    return _SHARED_KIB.get(arch_number(arch), 99) * 1024


def count():
    """Number of usable GPUs: 0 without CuPy, driver or device; a CuPy that is broken is warned of.

    Never an error, but for a process forked from one that had used CUDA: BackendError.
    """
    _fork.refuse()
    try:
        cupy = require_cupy()
    except BackendError as error:
        # Otherwise a machine with a GPU would compute with NumPy without a word, where HOME is read-only, say.
        if not is_absence(error.__context__):
            warnings.warn(f"{error}; without it, NumPy computes", stacklevel=2)
        return 0
    try:
        return cupy.cuda.runtime.getDeviceCount()
    except Exception:
        # CuPy raises its own error types here (no driver, driver too old, no device): all mean the same, no GPU.
        return 0


def choose_backend(backend):
    """ "numpy" or "cupy": `backend`, or for "auto" what this machine has. ValueError for any other."""
    if backend not in ("auto", "numpy", "cupy"):
        raise ValueError(f"backend must be 'auto', 'numpy' or 'cupy', got {backend!r}")
    if backend == "auto":
        return "cupy" if count() else "numpy"
    return backend


def current():
    """DeviceInfo of CuPy's current device. Raises BackendError where there is none."""
    _fork.refuse()
    cupy = require_cupy()
    try:
        device_id = cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"no usable GPU ({error}); run `cupyq doctor` to see what is missing") from None
    return info(device_id)


@functools.cache
def info(device_id):
    """DeviceInfo of one GPU, read once."""
    properties = require_cupy().cuda.runtime.getDeviceProperties(device_id)
    return DeviceInfo(
        id=device_id,
        name=properties["name"].decode(),
        arch=arch_of(properties["major"], properties["minor"]),
        sm_count=properties["multiProcessorCount"],
        shared_bytes_per_block=properties["sharedMemPerBlockOptin"],
        l2_bytes=properties["l2CacheSize"],
        memory_bytes=properties["totalGlobalMem"],
    )
