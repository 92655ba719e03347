"""What this machine has, what it lacks, and the command that mends it: the checks behind `cupyq doctor`.

Nothing here raises: whatever goes wrong becomes a check that is not ok. Every import is inside a check, so that one broken
package does not hide the state of the others.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

_OLDEST_PYTHON = (3, 11)
_OLDEST_ARCH = 75
_ARCH_WITHOUT_GPU = "sm_90a"
_PROBE = 'extern "C" __global__ void probe(float* x) { x[threadIdx.x] = 1.0f; }'
_PACKAGES = ("ml_dtypes", "safetensors", "tokenizers", "tqdm")


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    mend: str | None = None
    """A command or an instruction; None where nothing is to be mended."""


def diagnose(tp: bool = False) -> dict:
    """{"ok": a backend is usable, "backend": "cupy" or "numpy", "checks": [{name, ok, found, mend}, ...]}

    tp: look at what several GPUs together need, too; where there are several, they must be able to work together to be ok.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns about conflicts and missing libraries that the checks report
        checks = [_guard("python", _python), _guard("numpy", _numpy), _guard("packages", _packages)]
        checks += [_guard("cupy", _cupy), _guard("driver", _driver), _guard("gpu", _gpu), _guard("nvrtc", _nvrtc)]
        checks += [_guard("headers", _headers), _guard("nccl", _nccl), _guard("cache", cache_check)]
        if _is_ok(checks, "cupy", "driver", "gpu", "nvrtc", "cache"):
            checks.append(_guard("kernel", _kernel))
        if tp:
            checks += [_guard("launcher", _launcher), _guard("watch", _watch), _guard("shm", _shm), _guard("peers", _peers)]
            if _is_ok(checks, "kernel", "nccl") and _gpu_count() > 1:
                checks.append(_guard("exchange", _exchange))
    has_numpy = _is_ok(checks, "python", "numpy", "packages")
    has_gpu = has_numpy and _is_ok(checks, "kernel")
    exchanges = all(check.ok for check in checks if check.name == "exchange")
    return {
        "ok": has_numpy and exchanges,
        "backend": "cupy" if has_gpu else "numpy",
        "checks": [asdict(check) for check in checks],
    }


def report(diagnosis: dict) -> str:
    """The diagnosis as lines for people."""
    lines = []
    for check in diagnosis["checks"]:
        lines.append(f"{'ok' if check['ok'] else '--':<4}{check['name']:<10}{check['found']}")
        if check["mend"]:
            lines.append(f"{'':<14}to mend: {check['mend']}")
    is_apart = any(check["name"] == "exchange" and not check["ok"] for check in diagnosis["checks"])
    if is_apart:
        lines.append("\nThe GPUs do not work together: mend the line exchange; each works alone.")
    elif not diagnosis["ok"]:
        lines.append("\nNothing can run yet: mend python, numpy and packages first.")
    elif diagnosis["backend"] == "cupy":
        lines.append("\nModels run on the GPU (backend cupy).")
    else:
        lines.append(
            "\nModels run on the CPU (backend numpy, the reference: slow). For a GPU, mend the lines marked -- from the top."
        )
    return "\n".join(lines)


def _is_ok(checks, *names):
    by_name = {check.name: check.ok for check in checks}
    return all(by_name.get(name, False) for name in names)


def _guard(name, check):
    try:
        return check()
    except Exception as error:
        return Check(
            name, False, f"{type(error).__name__}: {_one_line(error)}", "see the message; reinstalling the package often helps"
        )


def _one_line(error):
    return " ".join(str(error).split())[:300]


def _python():
    ok = sys.version_info >= _OLDEST_PYTHON
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    return Check(
        "python",
        ok,
        f"{platform.python_version()} on {platform.machine()}",
        None if ok else f"install Python {oldest} or newer",
    )


def _numpy():
    try:
        import numpy
    except ImportError as error:
        return Check("numpy", False, f"cannot be imported ({_one_line(error)})", "pip install 'numpy>=2.1.2'")
    ok = tuple(int(part) for part in re.findall(r"\d+", numpy.__version__)[:2]) >= (2, 1)
    return Check("numpy", ok, numpy.__version__, None if ok else "pip install 'numpy>=2.1.2'")


def _packages():
    missing, found = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", False, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", True, ", ".join(found))


def _cupy_wheels():
    """{distribution name: version} of everything installed that provides `cupy`."""
    wheels = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if re.fullmatch(r"cupy(-cuda\d+x?|-rocm-.*)?", name):
            wheels[name] = distribution.version
    return wheels


def _extra(cuda_major):
    """The extra of this package that brings CuPy and its libraries for a CUDA major."""
    return f"pip install 'cupyq[cuda{cuda_major}]'"


def _wanted_cuda():
    """12 or 13: the newest CUDA major the driver runs, 12 where that is unknown."""
    version = driver_cuda_version()
    return 13 if version is not None and version >= 13000 else 12


def _installed_cuda():
    """12 or 13: the CUDA major of the installed CuPy."""
    return 13 if any("cuda13" in name for name in _cupy_wheels()) else 12


def _cupy():
    from cupyq._arrays import is_absence

    wheels = _cupy_wheels()
    listed = ", ".join(f"{name} {version}" for name, version in sorted(wheels.items()))
    if len(wheels) > 1:
        # They install into one folder, so that each overwrote parts of the other.
        mend = f"pip uninstall -y {' '.join(sorted(wheels))} && {_extra(_wanted_cuda())}"
        return Check("cupy", False, f"several at once: {listed}", mend)
    try:
        import cupy

        if not hasattr(cupy, "ndarray"):
            raise ImportError("a folder with nothing of CuPy in it")
    except OSError as error:
        return Check(
            "cupy", False, f"cannot be imported ({_one_line(error)})", "set CUPY_CACHE_DIR to a folder that is writable"
        )
    except Exception as error:  # an installation that is broken raises whatever its remains run into
        if wheels:
            mend = f"pip install --force-reinstall {next(iter(wheels))}"
            return Check("cupy", False, f"{listed} cannot be imported ({_one_line(error)})", mend)
        if is_absence(error):
            return Check("cupy", False, "not installed", _extra(_wanted_cuda()))
        spec = importlib.util.find_spec("cupy")
        where = spec.origin or ", ".join(spec.submodule_search_locations)
        mend = f"remove or rename it, then {_extra(_wanted_cuda())}"
        return Check("cupy", False, f"{where} cannot be imported ({_one_line(error)})", mend)
    return Check("cupy", True, listed or f"{cupy.__version__} (built from source)")


def _load_driver():
    for name in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def driver_cuda_version():
    """The newest CUDA the driver runs, as 1000 x major + 10 x minor; None without a driver."""
    driver = _load_driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value


def _driver_release():
    """Such as "570.86.15", from NVML, or "" where it cannot be asked."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return ""


def _driver():
    version = driver_cuda_version()
    if version is None:
        mend = "on a machine with an NVIDIA GPU: install its driver (in a container: start it with --gpus all)"
        return Check("driver", False, "no NVIDIA driver (libcuda.so.1)", mend)
    release = _driver_release()
    cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
    found = f"{release}, runs up to {cuda}" if release else f"runs up to {cuda}"
    for name in _cupy_wheels():
        built_for = re.search(r"cuda(\d+)x", name)
        if built_for and int(built_for[1]) > version // 1000:
            mend = f"pip uninstall -y {name} && {_extra(12)}, or install a newer driver"
            return Check("driver", False, f"{found}, too old for {name}", mend)
    return Check("driver", True, found)


def _gpu():
    driver = _load_driver()
    if driver is None:
        return Check("gpu", False, "none: no driver", "mend the driver first")
    status, count = driver.cuInit(0), ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        mend = (
            f"unset CUDA_VISIBLE_DEVICES, which is {visible!r}"
            if visible is not None
            else "check nvidia-smi; it should list a GPU"
        )
        return Check("gpu", False, f"none (driver error {status})" if status else "none", mend)
    found, too_old = [], []
    for index in range(count.value):
        name, arch, memory = _describe_gpu(driver, index)
        found.append(f"{index}: {name}, sm_{arch}, {memory / 2**30:.0f} GiB")
        if arch < _OLDEST_ARCH:
            too_old.append(str(index))
    which = ", ".join(too_old)
    choose = f"GPU {which}: older than sm_{_OLDEST_ARCH}; choose another by CUDA_VISIBLE_DEVICES" if too_old else None
    return Check("gpu", "0" not in too_old, "; ".join(found), choose)


def _describe_gpu(driver, index):
    """Name, compute capability x 10 and bytes of memory, from the driver: works without CuPy."""
    device, value, memory = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_size_t(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(96)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return name.value.decode(), 10 * capability[0] + capability[1], memory.value


def _nvrtc():
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
    except Exception as error:
        try:
            import cupy.cuda  # noqa: F401
        except Exception:
            return Check("nvrtc", False, "not checked: it is reached through CuPy", "mend cupy first")
        return Check("nvrtc", False, f"cannot be loaded ({_one_line(error)})", _extra(_installed_cuda()))
    from cupyq import _device, _kernels

    arch = _device.current().arch if _device.count() else _ARCH_WITHOUT_GPU
    target, suffix = _kernels.target_of(arch)
    program = nvrtc.createProgram(_PROBE, "probe.cu", [], [])
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={target}",))
        size = len(nvrtc.getCUBIN(program) if suffix == "cubin" else nvrtc.getPTX(program))
    finally:
        nvrtc.destroyProgram(program)
    return Check(
        "nvrtc", size > 0, f"{major}.{minor}, compiles for {arch}" + ("" if suffix == "cubin" else f" through {target}")
    )


def _headers():
    """cupyq's kernels include none; CuPy's own do, such as those behind array arithmetic and conversions."""
    try:
        from cupy.cuda import get_cuda_path
    except Exception:
        return Check("headers", False, "not checked: CuPy cannot be imported", "mend cupy first")
    folders = [Path(get_cuda_path()) / "include"] if get_cuda_path() else []
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        folders += [Path(found) for found in [find_nvidia_header_directory("cudart")] if found]
    except ImportError:
        pass
    for folder in folders:
        if (folder / "cuda_fp16.h").is_file():
            return Check("headers", True, str(folder))
    return Check("headers", False, "cuda_fp16.h not found, which CuPy's own kernels include", _extra(_installed_cuda()))


def _nccl():
    try:
        from cupy.cuda import nccl
    except Exception:
        return Check("nccl", False, "not checked: CuPy cannot be imported", "mend cupy first")
    if not nccl.available:
        mend = f"pip install nvidia-nccl-cu{_installed_cuda()}"
        return Check("nccl", False, "not found (only several GPUs together need it)", mend)
    version = nccl.get_version()
    return Check("nccl", True, f"{version // 10000}.{version // 100 % 100}.{version % 100}")


def cache_check():
    """Whether compiled kernels can be kept, where, and how many there are."""
    from cupyq import _kernels

    try:
        folder = _kernels.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        reason = getattr(error, "strerror", None) or _one_line(error)
        where = getattr(error, "filename", None) or "the kernel cache"
        return Check("cache", False, f"{where}: not writable ({reason})", "set CUPYQ_CACHE_DIR to a folder that is writable")
    kernels = size = 0
    for path in folder.iterdir():
        if path.suffix in (".cubin", ".ptx"):
            kernels += 1
            size += path.stat().st_size
    return Check("cache", True, f"{folder}: {kernels} kernels, {size / 2**20:.1f} MiB")


def _kernel():
    """One real kernel, from source to result, against NumPy."""
    import cupy
    import numpy as np

    from cupyq.ops.norm import rms_norm

    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)
    weight = np.ones(128, np.float32)
    result = rms_norm(cupy.asarray(x), cupy.asarray(weight)).get()
    error = float(np.abs(result - rms_norm(x, weight)).max())
    ok = error < 1e-5
    mend = None if ok else "report it with this output: the GPU or its driver computes wrong results"
    return Check("kernel", ok, f"rms_norm ran on the GPU, largest error {error:.1e}", mend)


# --- several GPUs together --------------------------------------------------------------------------------------------

_EXCHANGED_BYTES = (4 << 10, 64 << 10, 1 << 20, 64 << 20)
_LEAST_SHM_BYTES = 64 << 20


def _launcher():
    """Which door the ranks would come in by, as this process sees it."""
    from cupyq.tp import find_place

    try:
        place = find_place()
    except Exception as error:
        return Check("launcher", False, _one_line(error), "see the message; or start without a launcher: --tp N")
    if place.ranks == 1:
        has_mpi = importlib.util.find_spec("mpi4py") is not None
        text = f"none: --tp N makes threads of one process (mpi4py is {'' if has_mpi else 'not '}installed, for mpirun)"
    else:
        text = f"{place.launcher}: rank {place.rank} of {place.ranks}, number {place.local_rank} on this host"
        text += "" if place.host is None else f", meeting at {place.host}:{place.port}"
    return Check("launcher", True, text)


def _watch():
    """Where the processes of a job on one host see whether the others live."""
    from cupyq.tp.watch import Watch

    with Watch(f"doctor {os.getpid()}", 0, 1) as watch:
        return Check("watch", True, f"{os.path.dirname(watch.path)} (CUPYQ_WATCH_DIR chooses another)")


def _shm():
    """NCCL exchanges through /dev/shm where GPUs do not reach each other, and containers often have little of it."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return Check("shm", False, "no /dev/shm", "in a container: start it with --shm-size=1g or --ipc=host")
    free = status.f_bavail * status.f_frsize
    ok = free >= _LEAST_SHM_BYTES
    mend = None if ok else "in a container: start it with --shm-size=1g or --ipc=host"
    return Check("shm", ok, f"/dev/shm has {free / 2**20:.0f} MiB free", mend)


def _gpu_count():
    from cupyq import _device

    return _device.count()


def _peers():
    """Which GPUs reach each other's memory, and by what link."""
    count = _gpu_count()
    if count < 2:
        return Check("peers", count > 0, f"{count or 'no'} GPU here: nothing to link", None if count else "mend gpu first")
    from cupy.cuda import runtime

    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [(a, b) for a, b in pairs if not (runtime.deviceCanAccessPeer(a, b) and runtime.deviceCanAccessPeer(b, a))]
    links = _links()
    kinds = sorted({links.get(pair, "link unknown") for pair in pairs if pair not in apart})
    names = {runtime.getDeviceProperties(index)["name"].decode() for index in range(count)}
    found = f"{len(pairs) - len(apart)} of {len(pairs)} pairs reach each other's memory" + (
        f" ({', '.join(kinds)})" if kinds else ""
    )
    if len(names) > 1:
        found += f"; GPUs differ ({', '.join(sorted(names))}): their results may differ in the last bit, take ones of a kind"
    if not apart:
        return Check("peers", True, found)
    which = ", ".join(f"{a}-{b}" for a, b in apart[:4]) + (" ..." if len(apart) > 4 else "")
    mend = f"GPUs {which} exchange through host memory, which works and is slow; nvidia-smi topo -p2p r says why"
    return Check("peers", False, found, mend)


def _links():
    """{(gpu, gpu): "NVLink x 18", "PIX", ...} as `nvidia-smi topo -m` names them; empty where it cannot be asked."""
    import subprocess

    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_links(done.stdout)


def parse_links(text):
    """What the matrix of `nvidia-smi topo -m` says of each pair of GPUs."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row[1:]]
    links = {}
    for a, row in enumerate(rows):
        for b in range(a + 1, min(len(rows), len(row) - 1)):
            kind = row[1 + b]
            links[a, b] = f"NVLink x {kind[2:]}" if kind.startswith("NV") else kind
    return links


def _exchange():
    """Sums over all GPUs, right and how quick."""
    from cupyq import tp
    from cupyq.tp.timing import timed_sums

    count = _gpu_count()
    times = tp.run(lambda comm: timed_sums(comm, _EXCHANGED_BYTES), count, backend="cupy")[0]
    wrong = [size for size, (_, ok) in times.items() if not ok]
    table = ", ".join(f"{_size(size)} {us:.0f} us" for size, (us, _) in times.items())
    largest = max(times)
    speed = 2 * (count - 1) / count * largest / times[largest][0] / 1e3
    mend = None
    if wrong:
        mend = f"sums of {_size(wrong[0])} are wrong: try NCCL_P2P_DISABLE=1, and turn off IOMMU or PCIe ACS on this machine"
    return Check("exchange", not wrong, f"sums over {count} GPUs: {table} ({speed:.0f} GB/s on the bus)", mend)


def _size(nbytes):
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
