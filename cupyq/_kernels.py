"""CUDA sources to launchable kernels: NVRTC, an own disk cache, `cupy.RawModule`.

A kernel is one template instance of one function in one file of `cu/`, compiled to a cubin for one real architecture.
The cache key covers every source text, the options, the NVRTC version, the architecture and the instance: CuPy's own
key ignores the contents of included headers, and CuPy can neither compile without a driver nor target `sm_90a` with
CUDA 12. This is the only file that names RawModule. Why it is so: docs/design/0002-compilation.md.
"""

import contextlib
import functools
import hashlib
import os
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupyq import _arrays, _device
from cupyq.errors import BackendError

SOURCE_FOLDER = Path(__file__).parent / "cu"
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")

_C_TYPES = {_arrays.float16: "half", _arrays.bfloat16: "bfloat16", _arrays.float32: "float", _arrays.int32: "int"}


@dataclass(frozen=True, order=True)
class Instance:
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


def _nvrtc():
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
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cupyq"


def _target(arch):
    """The `--gpu-architecture` value and file suffix: a cubin, or PTX of the newest known target for an unknown GPU."""
    known = _nvrtc().getSupportedArchs()
    number = _device.arch_number(arch)
    if number in known:
        return arch, "cubin"
    older = [a for a in known if a <= number]
    if not older:
        raise BackendError(f"this NVRTC compiles for sm_{min(known)} and newer, not {arch}: take an older CUDA release")
    return f"compute_{max(older)}", "ptx"


def _cache_paths(wanted, arch):
    target, suffix = _target(arch)
    key = "\0".join((_sources()[1], *OPTIONS, str(_nvrtc().getVersion()), target, wanted.file, wanted.expression))
    stem = f"{wanted.expression.split('<')[0]}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    return cache_folder() / f"{stem}.{suffix}", cache_folder() / f"{stem}.name"


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
        raise BackendError(
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
        raise BackendError(
            f"cannot read the kernel cache {code_path.parent} ({error.strerror}); set CUPYQ_CACHE_DIR to a folder of your own"
        ) from None


def compile_instance(wanted, arch, options=()):
    """Compile one instance, bypassing the cache -> (cubin or PTX bytes, lowered name, compiler log)."""
    nvrtc = _nvrtc()
    texts, _ = _sources()
    if f"{wanted.file}.cu" not in texts:
        raise BackendError(f"no kernel source {wanted.file}.cu in {SOURCE_FOLDER}")
    target, suffix = _target(arch)
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


_locks: dict[Path, threading.Lock] = {}  # one per cache file, so that two threads never compile the same instance


def compiled(wanted, arch):
    """Path of the compiled instance and its lowered name, from the disk cache or compiled into it."""
    code_path, name_path = _cache_paths(wanted, arch)
    with _locks.setdefault(code_path, threading.Lock()):
        lowered = _cached_name(code_path, name_path)
        if lowered is None:
            with _announced(f"compiling {wanted} for {arch} (first use only)"):
                code, lowered, _ = compile_instance(wanted, arch)
            # The code file comes last: where it stands, so does the name.
            _write_atomically(name_path, lowered.encode())
            _write_atomically(code_path, code)
        return code_path, lowered


def compile_all(instances, arch, label="compiling kernels"):
    """Compile all instances that the cache lacks, in parallel. Returns how many were compiled."""
    missing = [wanted for wanted in dict.fromkeys(instances) if _cached_name(*_cache_paths(wanted, arch)) is None]
    if not missing:
        return 0
    with (
        _announced(f"{label}: {len(missing)} for {arch} (first use only)"),
        ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool,
    ):
        list(pool.map(lambda wanted: compiled(wanted, arch), missing))
    return len(missing)


_announcing = threading.Lock()


@contextlib.contextmanager
def _announced(what):
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

_trace: list[tuple[Instance, str]] | None = None  # while tracing: what was asked for


@contextlib.contextmanager
def tracing():
    """Within this context kernels are noted, not compiled nor launched: run a model once to learn what it needs."""
    global _trace
    outer, _trace = _trace, []
    try:
        yield _trace
    finally:
        _trace = outer


def launch(wanted, grid, block, arguments, shared_bytes=0):
    """Launch an instance on the device of its arrays and CuPy's current stream.

    `arguments`: CuPy arrays (C-contiguous), NumPy scalars (their dtype is the kernel's), or None for a null pointer.
    Bare Python numbers are refused: CuPy would pass an int as 64 bits and a float as a double.
    """
    cupy = sys.modules.get("cupy")
    array_type = () if cupy is None else cupy.ndarray
    device_id = None
    checked: list[object] = []
    for position, value in enumerate(arguments):
        if value is None:
            checked.append(_NULL)
        elif isinstance(value, np.generic):
            checked.append(value)
        elif isinstance(value, array_type):
            if not value.flags.c_contiguous:
                raise ValueError(f"{wanted}: argument {position} is not C-contiguous, strides {value.strides}")
            own_device = value.data.device_id
            if device_id is None:
                device_id = own_device
            elif device_id != own_device:
                raise ValueError(f"{wanted}: argument {position} is on GPU {own_device}, the first on {device_id}")
            checked.append(value)
        else:
            raise TypeError(f"{wanted}: argument {position} is a {type(value).__name__}: wrap numbers, as in np.int32(3)")
    if 0 in grid or 0 in block:
        raise ValueError(f"{wanted}: empty launch, grid {grid}, block {block}")
    if cupy is None or device_id is None:
        raise TypeError(f"{wanted}: no array among the arguments")
    arch = _device.info(device_id).arch
    if _trace is not None:
        _trace.append((wanted, arch))
    elif device_id == cupy.cuda.runtime.getDevice():
        _launch_here(wanted, arch, device_id, grid, block, tuple(checked), shared_bytes)
    else:
        with cupy.cuda.Device(device_id):
            _launch_here(wanted, arch, device_id, grid, block, tuple(checked), shared_bytes)


_NULL = np.uint64(0)


_shared_allowed: dict[tuple[Instance, int], int] = {}  # (instance, device) -> dynamic shared memory it may ask for


def _launch_here(wanted, arch, device_id, grid, block, arguments, shared_bytes):
    function = _function(wanted, arch)
    # Without being asked, the driver allows 48 KiB, of which a kernel's static arrays take their share.
    if shared_bytes > _shared_allowed.get((wanted, device_id), 0):
        function.max_dynamic_shared_size_bytes = shared_bytes
        _shared_allowed[wanted, device_id] = shared_bytes
    function(grid, block, arguments, shared_mem=shared_bytes)


@functools.cache
def _function(wanted, arch):
    # RawModule loads lazily and once per device, so one object serves every GPU of this architecture.
    code_path, lowered = compiled(wanted, arch)
    return _arrays.require_cupy().RawModule(path=str(code_path)).get_function(lowered)


def forget_loaded():
    """Drop the kernels loaded by this process (the disk cache stays): for tests and for timing cold starts."""
    _function.cache_clear()
    _shared_allowed.clear()
