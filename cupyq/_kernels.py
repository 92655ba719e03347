"""CUDA sources to kernels at work: NVRTC, an own disk cache, `cupy.RawModule`, and launches that may overlap.

A kernel is one template instance of one function in one file of `cu/`, compiled to a cubin for one real architecture.
The cache key covers every source text, the options, the NVRTC version, the architecture and the instance: CuPy's own
key ignores the contents of included headers, and CuPy can neither compile without a driver nor target `sm_90a` with
CUDA 12. This is the only file that names RawModule. Why it is so: docs/design/0002-compilation.md.
"""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cupyq import _arrays, _device, _fork, _launch
from cupyq._recording import recording, spoil
from cupyq.errors import BackendError

SOURCE_FOLDER = Path(__file__).parent / "cu"
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")

_C_TYPES = {_arrays.float16: "half", _arrays.bfloat16: "bfloat16", _arrays.float32: "float", _arrays.int32: "int"}


class Instance(NamedTuple):  # which hashes faster than a dataclass: it is looked up at every launch
    """One template instance: the `.cu` file's stem and the C++ expression that names the kernel."""

    file: str
    expression: str

    def __str__(self):
        return self.expression


@functools.lru_cache(maxsize=None, typed=True)  # asked for at every launch; typed, as True is not 1 in C++
def instance(name, *template_arguments, file=None):
    """The Instance of kernel `name` with template arguments given as dtypes, ints, bools or C++ text."""
    expression = f"{name}<{', '.join(map(_c_text, template_arguments))}>" if template_arguments else name
    return Instance(file or name, expression)


def _c_text(argument):
    if isinstance(argument, bool):
        return "true" if argument else "false"
    if isinstance(argument, (int, str)):
        return str(argument)
    return _C_TYPES[np.dtype(argument)]


# --- compiling --------------------------------------------------------------------------------------------------------


@functools.cache
def _sources():
    """Every source text by file name, and one digest over all of them."""
    texts = {path.name: path.read_text() for path in sorted(SOURCE_FOLDER.glob("*.cu*"))}
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
    return texts, digest.hexdigest()


def load_nvrtc():
    """The module cupy.cuda.nvrtc; BackendError where it cannot be loaded."""
    _arrays.require_cupy()
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise BackendError(
            f"NVRTC, CUDA's run-time compiler, cannot be loaded ({_arrays.first_line(error)}); "
            "install it with `pip install nvidia-cuda-nvrtc-cu12` (or `nvidia-cuda-nvrtc` for CUDA 13)"
        ) from None
    return nvrtc


def cache_folder():
    """Where compiled kernels live: $CUPYQ_CACHE_DIR, else $XDG_CACHE_HOME/cupyq, else ~/.cache/cupyq."""
    if folder := os.environ.get("CUPYQ_CACHE_DIR"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "cupyq"
    try:
        return Path("~/.cache/cupyq").expanduser()
    except RuntimeError:  # a user of a container that /etc/passwd does not know
        raise BackendError("no home folder to keep compiled kernels in; set CUPYQ_CACHE_DIR to a writable folder") from None


def target_of(arch):
    """The `--gpu-architecture` value and file suffix: a cubin, or PTX of the newest known target for an unknown GPU."""
    known = load_nvrtc().getSupportedArchs()
    number = _device.arch_number(arch)
    if number in known:
        return arch, "cubin"
    older = [a for a in known if a <= number]
    if not older:
        raise BackendError(f"this NVRTC compiles for sm_{min(known)} and newer, not {arch}: take an older CUDA release")
    return f"compute_{max(older)}", "ptx"


def _cache_paths(wanted, arch):
    target, suffix = target_of(arch)
    key = "\0".join((_sources()[1], *OPTIONS, str(load_nvrtc().getVersion()), target, wanted.file, wanted.expression))
    stem = f"{wanted.expression.split('<')[0]}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    return cache_folder() / f"{stem}.{suffix}", cache_folder() / f"{stem}.name"


class _CacheError(BackendError):
    """The disk cache cannot be read or written."""


def _write_atomically(path, data):
    """Other processes see the whole file or none: write beside it, then rename."""
    # Not tempfile: its files are private to the user, and a cache may be filled by one user for others.
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _CacheError(
            f"cannot write to the kernel cache {path.parent} ({error.strerror}); set CUPYQ_CACHE_DIR to a writable folder"
        ) from None


def _cached_name(code_path, name_path):
    """The lowered name of an instance the cache holds, else None."""
    try:
        # An empty file is what a power cut may leave of a renamed one.
        if code_path.stat().st_size == 0:
            return None
        return name_path.read_text() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _CacheError(
            f"cannot read the kernel cache {code_path.parent} ({error.strerror}); set CUPYQ_CACHE_DIR to a folder of your own"
        ) from None


def compile_instance(wanted, arch, options=()):
    """Compile one instance, bypassing the cache -> (cubin or PTX bytes, lowered name, compiler log)."""
    nvrtc = load_nvrtc()
    texts, _ = _sources()
    if f"{wanted.file}.cu" not in texts:
        raise BackendError(f"no kernel source {wanted.file}.cu in {SOURCE_FOLDER}")
    target, suffix = target_of(arch)
    headers = [name for name in texts if name.endswith(".cuh")]
    program = nvrtc.createProgram(
        texts[f"{wanted.file}.cu"],
        f"{wanted.file}.cu",
        [texts[name].encode() for name in headers],
        [name.encode() for name in headers],
    )
    try:
        nvrtc.addNameExpression(program, wanted.expression)
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={target}", *OPTIONS, *options))
        except nvrtc.NVRTCError:
            raise BackendError(f"{wanted} does not compile for {arch}:\n{nvrtc.getProgramLog(program)}") from None
        lowered = nvrtc.getLoweredName(program, wanted.expression)
        code = nvrtc.getCUBIN(program) if suffix == "cubin" else nvrtc.getPTX(program)
        log = nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    as_bytes = code if isinstance(code, bytes) else code.encode()
    return as_bytes, lowered if isinstance(lowered, str) else lowered.decode(), log


def compiled(wanted, arch):
    """Path of the compiled instance and its lowered name, from the disk cache or compiled into it; else BackendError."""
    code, lowered, trouble = _obtained(wanted, arch)
    if trouble is not None:
        raise BackendError(trouble)
    return code, lowered


def loadable(wanted, arch):
    """As `compiled`; where the disk cache cannot be used, of which one line on stderr tells, the code stands for its path."""
    code, lowered, trouble = _obtained(wanted, arch)
    if trouble is not None and _told.setdefault(cache_folder(), mark := object()) is mark:
        print(f"cupyq: {trouble}; until then every process compiles its kernels anew", file=sys.stderr, flush=True)
    return code, lowered


_locks: dict[Path, threading.Lock] = {}  # one per cache file, so that two threads never compile the same instance
_in_memory: dict[Path, tuple[bytes, str, str]] = {}  # by the path where the disk cache would have it
_told: dict[Path, object] = {}  # the folders of which somebody was told


def _obtained(wanted, arch):
    """(path, lowered name, None), or (code, lowered name, what is wrong) where the disk cache cannot be used."""
    code_path, name_path = _cache_paths(wanted, arch)
    with _locks.setdefault(code_path, threading.Lock()):
        if code_path in _in_memory:
            return _in_memory[code_path]
        lowered = trouble = None
        try:
            lowered = _cached_name(code_path, name_path)
        except _CacheError as error:
            trouble = str(error)
        if lowered is not None:
            return code_path, lowered, None
        with announced(f"compiling {wanted} for {arch} (first use only)"):
            code, lowered, _ = compile_instance(wanted, arch)
        if trouble is None:
            try:
                # The code file comes last: where it stands, so does the name.
                _write_atomically(name_path, lowered.encode())
                _write_atomically(code_path, code)
                return code_path, lowered, None
            except _CacheError as error:
                trouble = str(error)
        _in_memory[code_path] = code, lowered, trouble
        return _in_memory[code_path]


def _is_missing(wanted, arch):
    paths = _cache_paths(wanted, arch)
    try:
        return paths[0] not in _in_memory and _cached_name(*paths) is None
    except _CacheError:
        return True


def compile_all(instances, arch, label="compiling kernels"):
    """Compile all instances that the cache lacks, in parallel. Returns how many were compiled."""
    missing = [wanted for wanted in dict.fromkeys(instances) if _is_missing(wanted, arch)]
    if not missing:
        return 0
    with (
        announced(f"{label}: {len(missing)} for {arch} (first use only)"),
        ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool,
    ):
        list(pool.map(lambda wanted: loadable(wanted, arch), missing))
    return len(missing)


_announcing = threading.Lock()


@contextlib.contextmanager
def announced(what):
    """Say on stderr what takes so long, once it has taken a second. Nested announcements stay silent."""
    if not _announcing.acquire(blocking=False):
        yield
        return
    start = time.perf_counter()
    timer = threading.Timer(1.0, lambda: print(f"cupyq: {what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
        if (seconds := time.perf_counter() - start) > 1.0:
            print(f"cupyq: done in {seconds:.1f} s", file=sys.stderr, flush=True)
    finally:
        timer.cancel()
        _announcing.release()


# --- launching --------------------------------------------------------------------------------------------------------


class _Tracing(threading.local):
    """What this thread asked for while it traces; other threads launch on."""

    noted: list[tuple[Instance, str]] | None = None


_tracing = _Tracing()


@contextlib.contextmanager
def tracing():
    """Within this context this thread's kernels are noted, not compiled nor launched: to learn what a model needs."""
    outer, _tracing.noted = _tracing.noted, []
    try:
        yield _tracing.noted
    finally:
        _tracing.noted = outer


def is_tracing():
    """Whether this thread traces, so that nothing is computed."""
    return _tracing.noted is not None


def launch(wanted, grid, block, arguments, shared_bytes=0):
    """Launch an instance on the device of its arrays and CuPy's current stream.

    `arguments`: CuPy arrays (C-contiguous), NumPy scalars (their dtype is the kernel's), structured ones among them (passed
    by value, to a `struct alignas(16)`), or None for a null pointer. Bare Python numbers are refused: they have no size.
    """
    kinds = tuple(map(type, arguments))
    layout = _layouts.get(kinds) or _new_layout(wanted, kinds, arguments)
    values = list(arguments)
    device_id = None
    for position in layout.arrays:
        array = values[position]
        if not array._c_contiguous:  # array.flags takes ten times as long
            raise ValueError(f"{wanted}: argument {position} is not C-contiguous, strides {array.strides}")
        memory = array.data
        if memory.device_id != device_id:
            if device_id is not None:
                raise ValueError(f"{wanted}: argument {position} is on GPU {memory.device_id}, the first on {device_id}")
            device_id = memory.device_id
        values[position] = memory.ptr
    for position in layout.nulls:
        values[position] = 0
    for position in layout.structures:
        values[position] = values[position].tobytes()
        if len(values[position]) != layout.places[position][1]:  # a type may have any size
            layout = _new_layout(wanted, kinds, arguments)
    if 0 in grid or 0 in block:
        raise ValueError(f"{wanted}: empty launch, grid {grid}, block {block}")
    if _tracing.noted is not None:
        _tracing.noted.append((wanted, _device.info(device_id).arch))
        return
    cuda = sys.modules["cupy"].cuda
    if device_id == cuda.runtime.getDevice():
        if (record := recording.record) is not None:
            record.launches.append((wanted, device_id, layout, grid, block, values, shared_bytes))
        launch_here(wanted, device_id, layout, grid, block, values, shared_bytes, cuda)
    else:
        spoil()  # it may have been chosen for the current GPU
        with cuda.Device(device_id):
            launch_here(wanted, device_id, layout, grid, block, values, shared_bytes, cuda)


_layouts: dict[tuple, _launch.Layout] = {}  # by the types of the arguments, and the sizes of structures if there are any


def _new_layout(wanted, kinds, arguments):
    sizes = [value.dtype.itemsize for value in arguments if isinstance(value, np.void)]
    layout = _layouts.get((*kinds, *sizes))
    if layout is None:
        cupy = sys.modules.get("cupy")
        try:
            layout = _launch.layout_of(arguments, () if cupy is None else cupy.ndarray)
            if not layout.arrays:
                raise TypeError("no array among the arguments")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{wanted}: {error}") from None
        _layouts[(*kinds, *sizes)] = _layouts[kinds] = layout
    return layout


class _FromMemory:
    """What RawModule gives for a file, of code that is in none: on the current device."""

    def __init__(self, code, lowered):
        self._cuda = _arrays.require_cupy().cuda
        module = self._cuda.function.Module()
        module.load(code)
        self.kernel = module.get_function(lowered)

    def _allow_shared_bytes(self, size):
        driver = self._cuda.driver
        driver.funcSetAttribute(self.kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)

    max_dynamic_shared_size_bytes = property(fset=_allow_shared_bytes)


class _Loaded:
    """A kernel on one device: what a launch needs to know of it."""

    def __init__(self, wanted, arch):
        code, lowered = loadable(wanted, arch)
        if isinstance(code, bytes):
            self.kernel = _FromMemory(code, lowered)
        else:  # CuPy loads it into the current device when its address is asked for
            self.kernel = _arrays.require_cupy().RawModule(path=str(code)).get_function(lowered)
        self.address = self.kernel.kernel.ptr
        self.is_overlap_aware = _is_overlap_allowed(arch) and is_overlap_aware(wanted.file)
        self.shared_bytes = 0  # dynamic shared memory it may ask for, beyond what the driver allows without being asked
        self.layouts = set()  # those that fit its parameters


loaded: dict[tuple[Instance, int], _Loaded] = {}
_queues: dict[tuple[int, int], _launch.Queue] = {}  # by device and stream


def launch_here(wanted, device_id, layout, grid, block, values, shared_bytes, cuda):
    kernel = loaded.get((wanted, device_id))
    if kernel is None:
        kernel = loaded.setdefault((wanted, device_id), _Loaded(wanted, _device.info(device_id).arch))
    # Without being asked, the driver allows 48 KiB, of which a kernel's static arrays take their share.
    if shared_bytes > kernel.shared_bytes:
        try:
            kernel.kernel.max_dynamic_shared_size_bytes = shared_bytes
        except cuda.driver.CUDADriverError as error:
            raise BackendError(
                f"{wanted}: GPU {device_id} does not give it {shared_bytes} bytes of shared memory: {error}"
            ) from None
        kernel.shared_bytes = shared_bytes
    if layout not in kernel.layouts:
        try:
            _launch.check_parameters(kernel.address, layout)
        except TypeError as error:
            raise TypeError(f"{wanted}: {error}") from None
        kernel.layouts.add(layout)
    stream = cuda.get_current_stream(device_id).ptr
    queue = _queues.get((device_id, stream))
    if queue is None:
        _fork.refuse()
        queue = _queues.setdefault((device_id, stream), _launch.Queue(stream))
    with queue.lock:
        overlaps = queue.is_overlap_aware and kernel.is_overlap_aware
        try:
            status = queue.launch(kernel.address, layout, grid, block, shared_bytes, values, overlaps)
        except ValueError as error:
            raise ValueError(f"{wanted}: {error}") from None
        if status == _launch.INVALID_CONTEXT:  # the first work of this thread on a GPU
            cuda.runtime.memGetInfo()  # makes the device's context that of the thread, as CuPy does it
            status = queue.launch(kernel.address, layout, grid, block, shared_bytes, values, overlaps)
        if status == 0:
            queue.is_overlap_aware = kernel.is_overlap_aware
    if status:
        raise BackendError(
            f"{wanted} cannot be launched: {_launch.error_text(status)}; grid {grid}, block {block}, {shared_bytes} bytes of "
            f"dynamic shared memory, GPU {device_id}"
        )


# Overlap (programmatic dependent launch). From sm_90 on, a kernel may be launched so that its blocks start while the one
# before it in the stream still runs; `wait_for_previous_kernel()` in its code then waits for that kernel's end and results.
#
# A kernel that waits before it touches anything that other kernels write is *overlap-aware*. It is launched so where the
# kernel launched before it on the same stream, through this module, is overlap-aware too:
# - It reads ahead of its wait only the constants of a QMatrix. Those are written by the kernels of repack.cu, which are not
#   overlap-aware: the next kernel starts after they are complete, in the ordinary way.
# - An overlap-aware kernel may let the next one start at once: several kernels of a stream then have blocks on the GPU, of
#   which all but the first wait. Each ends after its wait, so after the one before it: what a wait returns to is complete.
# - Kernels that others launch in between (CuPy, cuBLAS) write no constants, and the wait waits for them as well. Copies,
#   events and graphs end before the next kernel starts: only kernels overlap.
# Capturing changes nothing: a graph keeps an overlap as an edge of its own kind.


def _is_overlap_allowed(arch):
    return os.environ.get("CUPYQ_OVERLAP") != "0" and _device.arch_number(arch) >= 90


def is_overlap_aware(file):
    """Whether the kernels of cu/<file>.cu, or a header that it includes, call wait_for_previous_kernel()."""
    texts = _sources()[0]
    files, seen = [f"{file}.cu"], {"ptx.cuh"}  # ptx.cuh defines it
    while files:
        name = files.pop()
        if name in seen or name not in texts:
            continue
        seen.add(name)
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", texts[name], flags=re.DOTALL)
        if "wait_for_previous_kernel()" in code:
            return True
        files += re.findall(r'#include "(\w+\.cuh)"', code)
    return False


def forget_stream(device_id, stream):
    """Drop what is kept for launches on a stream that is about to be destroyed."""
    _queues.pop((device_id, stream), None)


def forget_loaded():
    """Drop the kernels loaded by this process (the disk cache stays): for tests and for timing cold starts."""
    loaded.clear()
    _queues.clear()
    _in_memory.clear()
    _told.clear()


def _after_fork():
    """In the child nobody is left to let go of the locks that other threads held."""
    global _announcing
    _announcing = threading.Lock()
    _locks.clear()
    _queues.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
