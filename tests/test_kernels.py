"""The compilation pipeline and its cache, without a GPU; launching, with one."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, needs_cupy

from cupyq import _arrays, _device, _kernels, _launch
from cupyq._kernels import Instance, compile_all, compile_instance, compiled, instance
from cupyq.errors import BackendError

WANTED = instance("scale", np.float32, 2)

SOURCE = """
#include "factor.cuh"
template <typename T, int times> __global__ void scale(T *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = y[i] * (T)(times * FACTOR);
}
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A cu/ folder of this test's own, with one kernel and one header."""
    needs_cupy()
    folder = tmp_path / "cu"
    folder.mkdir()
    (folder / "scale.cu").write_text(SOURCE)
    (folder / "factor.cuh").write_text("#define FACTOR 3\n")
    monkeypatch.setattr(_kernels, "SOURCE_FOLDER", folder)
    _kernels._sources.cache_clear()
    yield folder
    _kernels._sources.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def compilations(monkeypatch):
    """The instances compiled during the test."""
    seen = []

    def counted(wanted, arch, options=()):
        seen.append((wanted, arch))
        return compile_instance(wanted, arch, options)

    monkeypatch.setattr(_kernels, "compile_instance", counted)
    return seen


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


# --- names ------------------------------------------------------------------------------------------------------------


def test_instance_spells_template_arguments():
    assert str(instance("f")) == "f"
    arguments = (np.float16, _arrays.bfloat16, np.dtype(np.float32), np.int32, 8, True, False, "Custom")
    assert str(instance("f", *arguments)) == "f<half, bfloat16, float, int, 8, true, false, Custom>"
    assert instance("f").file == "f"
    assert instance("f", 1, file="g") == Instance("g", "f<1>")


def test_instance_refuses_a_dtype_without_a_device_type():
    with pytest.raises(KeyError):
        instance("f", np.complex64)


@pytest.mark.parametrize(
    ("arch", "number"), [("sm_75", 75), ("sm_90a", 90), ("sm_100a", 100), ("sm_100f", 100), ("sm_120", 120)]
)
def test_arch_number(arch, number):
    assert _device.arch_number(arch) == number


@pytest.mark.parametrize("arch", ["90", "sm_", "sm_abc", "compute_90", "sm_90x", "SM_90", "sm_9 0", ""])
def test_arch_number_refuses_other_text(arch):
    with pytest.raises(ValueError, match="sm_90a"):
        _device.arch_number(arch)


def test_arch_of_a_compute_capability():
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)]
    archs = "sm_75 sm_80 sm_86 sm_89 sm_90a sm_100a sm_103a sm_110a sm_120"
    assert [_device.arch_of(*capability) for capability in capabilities] == archs.split()


def test_the_backend_is_what_was_asked_for_or_what_there_is(monkeypatch):
    for count, found in ((0, "numpy"), (1, "cupy")):
        monkeypatch.setattr(_device, "count", lambda count=count: count)
        assert [_device.choose_backend(backend) for backend in ("auto", "numpy", "cupy")] == [found, "numpy", "cupy"]
    with pytest.raises(ValueError, match="backend must be 'auto', 'numpy' or 'cupy', got 'torch'"):
        _device.choose_backend("torch")


def test_every_target_arch_is_what_its_gpu_reports():
    for arch in _device.TARGET_ARCHS:
        number = _device.arch_number(arch)
        assert _device.arch_of(number // 10, number % 10) == arch


# --- compiling --------------------------------------------------------------------------------------------------------


def test_compile_gives_an_elf_file_and_the_lowered_name(sources):
    code, lowered, _ = compile_instance(WANTED, "sm_90a")
    assert code[:4] == b"\x7fELF"
    assert lowered.startswith("_Z") and "scale" in lowered and lowered.encode() in code


def test_an_unknown_newer_arch_gets_ptx_of_the_newest_known_one(sources, cache):
    path, lowered = compiled(WANTED, "sm_999")
    text = path.read_text()
    known = _kernels.load_nvrtc().getSupportedArchs()
    assert path.suffix == ".ptx" and lowered in text
    assert f".target sm_{max(known)}\n" in text


def test_an_unknown_arch_between_known_ones_gets_ptx_of_the_next_older(sources, monkeypatch):
    class Older:
        def getSupportedArchs(self):
            return [86, 75, 90]

    monkeypatch.setattr(_kernels, "load_nvrtc", Older)
    assert _kernels.target_of("sm_89") == ("compute_86", "ptx")
    assert _kernels.target_of("sm_90a") == ("sm_90a", "cubin")
    assert _kernels.target_of("sm_120") == ("compute_90", "ptx")


def test_an_arch_that_nvrtc_has_dropped_is_refused(sources):
    with pytest.raises(BackendError, match="sm_20") as error:
        compile_instance(WANTED, "sm_20")
    one_line(error)


def test_a_compile_error_shows_the_log(sources, cache):
    (sources / "scale.cu").write_text("__global__ void scale(float *y) { y[0] = misspelt; }")
    _kernels._sources.cache_clear()
    with pytest.raises(BackendError) as error:
        compiled(instance("scale"), "sm_80")
    assert re.search(r"scale does not compile for sm_80:\n.*scale\.cu\(1\).*misspelt", str(error.value), re.DOTALL)
    assert list(cache.glob("*")) == []


def test_a_missing_source_is_named(sources):
    with pytest.raises(BackendError, match=r"absent\.cu"):
        compile_instance(instance("absent"), "sm_80")


def run_without(module, statement, **environment):
    """Run `statement` where importing `module` fails -> its stdout."""
    code = f"import sys; sys.modules[{module!r}] = None\nfrom cupyq import _kernels, _arrays, _device\n{statement}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


CATCH = """
try:
    _kernels.compile_instance(_kernels.instance("rms_norm"), "sm_80")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_without_nvrtc_the_error_names_the_mend(sources, cache, monkeypatch):
    """CuPy opens the library at the first call and raises a text of several lines where it cannot."""
    from cupy.cuda import nvrtc

    def unavailable():
        raise RuntimeError("\nCuPy failed to load libnvrtc.so.12: OSError: no such file\n\nReason: ...")

    monkeypatch.setattr(nvrtc, "getVersion", unavailable)
    for call in (lambda: compile_instance(WANTED, "sm_80"), lambda: compiled(WANTED, "sm_80")):
        with pytest.raises(BackendError, match="NVRTC.*failed to load libnvrtc.so.12") as error:
            call()
        assert "pip install nvidia-cuda-nvrtc-cu12" in one_line(error)


def test_without_cupy_the_error_names_the_mend():
    lines = run_without("cupy", CATCH).splitlines()
    assert len(lines) == 1 and lines[0].startswith("BackendError CuPy cannot be imported")
    assert "pip install 'cupyq[cuda12]'" in lines[0]
    assert run_without("cupy", "print(_device.count())").split() == ["0"]


def test_a_home_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    home = str(tmp_path / "file" / "home")
    lines = run_without("nothing", CATCH, HOME=home, CUPY_CACHE_DIR="").splitlines()
    # CuPy either does without the folder or says why not; both on one line.
    assert len(lines) == 1 and lines[0].startswith("BackendError")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('libcublas.so.12: no such file')", "libcublas.so.12: no such file"),
        ("import numpy\nnumpy.what_went_away", "no attribute 'what_went_away'"),
        ("raise RuntimeError('two\\nlines')", "two"),
        ("", "nothing is in "),  # as in a folder that uninstalling left, which is imported all the same
    ],
)
def test_a_broken_cupy_is_reported_and_numpy_computes(tmp_path, text, reason):
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(text)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    (line,) = run_without("nothing", CATCH, PYTHONPATH=path).splitlines()
    assert line.startswith("BackendError CuPy cannot be imported (") and reason in line and "`cupyq doctor`" in line
    # Nobody learns otherwise that a GPU is left unused: counted twice, said once.
    counted = "import warnings\nwith warnings.catch_warnings(record=True) as said:\n    warnings.simplefilter('default')\n"
    counted += "    for _ in range(2): count = _device.count()\nprint(count, len(said), said[0].message)"
    line = run_without("nothing", counted, PYTHONPATH=path)
    assert line.startswith("0 1 CuPy cannot be imported (") and line.endswith("NumPy computes\n")
    ops = "import numpy as np, cupyq\n_device.count()\nones = np.ones((1, 8), np.float32)\n"
    ops += "print(cupyq.ops.rms_norm(ones, ones[0]).sum() > 7.9, _arrays.is_cupy(ones))"
    assert run_without("nothing", ops, PYTHONPATH=path) == "True False\n"
    doctor = (
        "from cupyq import doctor\nprint(*(check['found'] for check in doctor.diagnose()['checks'] if check['name'] == 'cupy'))"
    )
    found = run_without("nothing", f"{doctor}\nprint(doctor._cupy().mend)", PYTHONPATH=path)
    assert "cannot be imported (" in found and "pip install" in found


def test_a_user_without_a_home_is_told_where_kernels_may_go(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "CUPYQ_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def nobody(user):
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(BackendError, match="no home folder .* set CUPYQ_CACHE_DIR"):
        _kernels.cache_folder()


def test_the_first_line_of_an_error_says_something():
    framed = ImportError("\n================\nFailed to import CuPy.\n\nOriginal error:\n  ...\n")
    assert _arrays.first_line(framed) == "Failed to import CuPy."
    assert _arrays.first_line(ImportError("")) == "ImportError"


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_key_covers_everything_that_changes_the_code(sources, cache, monkeypatch):
    def key(wanted=WANTED, arch="sm_90a"):
        _kernels._sources.cache_clear()
        return _kernels._cache_paths(wanted, arch)[0].name

    keys = [key()]
    assert key() == keys[0]
    (sources / "factor.cuh").write_text("#define FACTOR 4\n")
    keys.append(key())
    (sources / "unused.cuh").write_text("")
    keys.append(key())
    (sources / "unused.cuh").rename(sources / "renamed.cuh")
    keys.append(key())
    (sources / "scale.cu").write_text(SOURCE + "\n")
    keys.append(key())
    keys.append(key(wanted=instance("scale", np.float32, 3)))
    keys.append(key(wanted=Instance("other", WANTED.expression)))
    keys.append(key(arch="sm_80"))
    keys.append(key(arch="sm_998"))
    keys.append(key(arch="sm_999"))
    monkeypatch.setattr(_kernels, "OPTIONS", (*_kernels.OPTIONS, "--use_fast_math"))
    keys.append(key())
    nvrtc = _kernels.load_nvrtc()

    class Newer:
        getSupportedArchs = staticmethod(nvrtc.getSupportedArchs)
        getVersion = staticmethod(lambda: (99, 0))

    monkeypatch.setattr(_kernels, "load_nvrtc", Newer)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_text_moved_from_one_file_to_another_changes_the_key(sources, cache):
    (sources / "a.cuh").write_text("12")
    (sources / "b.cuh").write_text("3")
    _kernels._sources.cache_clear()
    before = _kernels._sources()[1]
    (sources / "a.cuh").write_text("1")
    (sources / "b.cuh").write_text("23")
    _kernels._sources.cache_clear()
    assert _kernels._sources()[1] != before


def test_a_hit_compiles_and_writes_nothing(sources, cache, compilations, monkeypatch):
    first = compiled(WANTED, "sm_80")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.iterdir()}

    def refuse(path, data):
        pytest.fail(f"wrote {path}")

    monkeypatch.setattr(_kernels, "_write_atomically", refuse)
    cache.chmod(0o555)
    assert compiled(WANTED, "sm_80") == first
    assert compile_all([WANTED, WANTED], "sm_80") == 0
    cache.chmod(0o755)
    assert compilations == [(WANTED, "sm_80")]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.iterdir()} == before
    assert first[0].read_bytes()[:4] == b"\x7fELF" and "scale" in first[1]


def test_the_cache_can_be_moved(sources, cache, compilations, monkeypatch):
    lowered = compiled(WANTED, "sm_80")[1]
    moved = cache.with_name("moved")
    shutil.move(cache, moved)
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(moved))
    path, name = compiled(WANTED, "sm_80")
    assert path.parent == moved and name == lowered and len(compilations) == 1


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("CUPYQ_CACHE_DIR", "/first")
    monkeypatch.setenv("XDG_CACHE_HOME", "/second")
    monkeypatch.setenv("HOME", "/third")
    assert str(_kernels.cache_folder()) == "/first"
    monkeypatch.delenv("CUPYQ_CACHE_DIR")
    assert str(_kernels.cache_folder()) == "/second/cupyq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(_kernels.cache_folder()) == "/third/.cache/cupyq"


def test_files_of_the_cache_are_readable_by_others(sources, cache):
    old = os.umask(0o022)
    try:
        path, _ = compiled(WANTED, "sm_80")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.with_suffix(".name").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("damage", ["no name", "empty name", "empty code", "no code"])
def test_a_half_written_entry_is_compiled_again(sources, cache, compilations, damage):
    path, lowered = compiled(WANTED, "sm_80")
    code = path.read_bytes()
    target = path if damage.endswith("code") else path.with_suffix(".name")
    target.unlink() if damage.startswith("no") else target.write_bytes(b"")
    assert compile_all([WANTED], "sm_80") == 1
    assert compiled(WANTED, "sm_80") == (path, lowered)
    assert path.read_bytes() == code and len(compilations) == 2


def test_leftovers_of_killed_processes_are_harmless(sources, cache):
    path, name_path = _kernels._cache_paths(WANTED, "sm_80")
    cache.mkdir()
    leftovers = [cache / f".{path.name}-1234-abcd", cache / f".{name_path.name}-1234-abcd"]
    for leftover in leftovers:
        leftover.write_bytes(b"half a fi")
    assert compiled(WANTED, "sm_80")[0].read_bytes()[:4] == b"\x7fELF"
    assert sorted(cache.iterdir()) == sorted([path, name_path, *leftovers])


def test_a_failed_write_leaves_no_temporary_file(sources, cache, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_kernels.os, "replace", full)
    with pytest.raises(BackendError, match="No space left on device") as error:
        compiled(WANTED, "sm_80")
    assert "CUPYQ_CACHE_DIR" in one_line(error)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_explained(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendError, match="kernel cache") as error:
        compiled(WANTED, "sm_80")
    assert str(tmp_path / "file" / "cache") in one_line(error) and "CUPYQ_CACHE_DIR" in one_line(error)


def deny_reading(cache, monkeypatch):
    """As in another user's folder; a test that runs as root can read them all."""

    def denied(path, **options):
        raise PermissionError(13, "Permission denied")

    _kernels._cache_paths(WANTED, "sm_80")
    monkeypatch.setattr(type(cache), "stat", denied)
    return "Permission denied"


def test_a_cache_that_cannot_be_read_is_explained(sources, cache, monkeypatch):
    reason = deny_reading(cache, monkeypatch)
    with pytest.raises(BackendError, match=reason) as error:
        compiled(WANTED, "sm_80")
    assert "CUPYQ_CACHE_DIR" in one_line(error)


# What may be wrong with a cache; each does it and returns what is said of it.


def read_only(cache, monkeypatch):
    """Root may write to folders of any mode: so this refuses what a mode would refuse others."""

    def refused(path, data):
        raise OSError(30, "Read-only file system")

    cache.mkdir()
    monkeypatch.setattr(type(cache), "write_bytes", refused)
    return "Read-only file system"


def full_when_written(cache, monkeypatch):
    """What is written goes to a device that is always full."""
    cache.mkdir()
    monkeypatch.setattr(type(cache), "write_bytes", lambda path, data: Path("/dev/full").open("wb", 0).write(data))
    return "No space left on device"


def full_after_the_name(cache, monkeypatch):
    """The name of a kernel still fits, its code does not."""
    cache.mkdir()
    real = type(cache).write_bytes

    def write(path, data):
        if ".name" in path.name:
            return real(path, data)
        real(path, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(cache), "write_bytes", write)
    return "No space left on device"


def file_in_its_place(cache, monkeypatch):
    cache.write_text("not a folder")
    return "File exists|Not a directory"


def said_of_the_cache(text):
    """The one line about it; compiling may take long enough to be announced as well."""
    (line,) = (line for line in text.splitlines() if "kernel cache" in line)
    return line


@pytest.mark.parametrize("trouble", [read_only, full_when_written, full_after_the_name, file_in_its_place, deny_reading])
def test_without_a_cache_kernels_are_compiled_in_memory(sources, cache, compilations, monkeypatch, capsys, trouble):
    """Once in a process, with one line that says so however many kernels there are."""
    others = [instance("scale", np.float32, i) for i in (3, 4)]
    whole = [compile_instance(wanted, "sm_80")[:2] for wanted in (WANTED, *others)]
    reason = trouble(cache, monkeypatch)
    assert compile_all([WANTED, others[0]], "sm_80") == 2
    assert [_kernels.loadable(wanted, "sm_80") for wanted in (WANTED, *others)] == whole
    assert [_kernels.loadable(wanted, "sm_80") for wanted in (WANTED, *others)] == whole
    assert compile_all([WANTED, *others], "sm_80") == 0
    assert sorted(compilations) == sorted((wanted, "sm_80") for wanted in (WANTED, *others))
    line = said_of_the_cache(capsys.readouterr().err)
    assert re.fullmatch(
        rf"cupyq: cannot (read|write to) the kernel cache {cache} \(({reason})\); set CUPYQ_CACHE_DIR to a (writable folder|"
        "folder of your own); until then every process compiles its kernels anew",
        line,
    )
    if trouble is full_after_the_name:
        assert {path.suffix for path in cache.iterdir()} == {".name"}
        monkeypatch.undo()  # and where there is room again, another process finds no half of a kernel
        _kernels.forget_loaded()
        monkeypatch.setattr(_kernels, "SOURCE_FOLDER", sources)
        monkeypatch.setenv("CUPYQ_CACHE_DIR", str(cache))
        path, lowered = compiled(WANTED, "sm_80")
        assert (path.read_bytes(), lowered) == whole[0]


def test_a_kernel_is_loaded_from_memory(driver, monkeypatch):
    """With what a launch sets on it; by CuPy's own classes, which ask the driver."""
    import cupy

    seen = []

    class Module:
        def load(self, code):
            seen.append(code)

        def get_function(self, name):
            seen.append(name)
            return SimpleNamespace(ptr=77)

    monkeypatch.setattr(_kernels, "loadable", lambda wanted, arch: (b"code", "lowered"))
    monkeypatch.setattr(cupy.cuda.function, "Module", Module)
    fake = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, funcSetAttribute=lambda *arguments: seen.append(arguments)
    )
    monkeypatch.setattr(cupy.cuda, "driver", fake)
    for _ in range(2):
        _kernels.launch(WANTED, (1,), (32,), (fake_array(4),), 60_000)
    assert seen == [b"code", "lowered", (77, 8, 60_000)]
    assert [launched[0] for launched in driver.launched] == [77, 77]


def test_many_processes_fill_one_cache(sources, cache):
    code = f"""
from pathlib import Path
from cupyq import _kernels
_kernels.SOURCE_FOLDER = Path({str(sources)!r})
wanted = [_kernels.instance("scale", "float", i) for i in range(6)]
print(_kernels.compile_all(wanted, "sm_80"))
print(sorted(name for _, name in (_kernels.compiled(w, "sm_80") for w in wanted)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUPYQ_CACHE_DIR": str(cache)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert outputs[0][1] == outputs[1][1] and outputs[0][1].count("scale") == 6
    assert len(list(cache.glob("*.cubin"))) == len(list(cache.glob("*.name"))) == 6
    assert list(cache.glob(".*")) == []
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cache.glob("*.cubin"))


def run_with_sources(sources, cache, code, **options):
    """A process that fills `cache` with kernels of `sources`."""
    code = f"from pathlib import Path\nfrom cupyq import _kernels\n_kernels.SOURCE_FOLDER = Path({str(sources)!r})\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUPYQ_CACHE_DIR": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes, **options)


LISTED = """
wanted = [_kernels.instance("scale", "float", i) for i in range(24)]
print("begins", flush=True)
print(_kernels.compile_all(wanted, "sm_80"), sum("scale" in _kernels.compiled(w, "sm_80")[1] for w in wanted))
"""


def test_a_process_killed_amid_compiling_leaves_a_cache_that_works(sources, cache):
    """Killed at several moments, at least one of which finds it at work; the next one has what is whole and does the rest."""
    for _ in range(8):
        process = run_with_sources(sources, cache, LISTED)
        assert process.stdout.readline() == "begins\n"
        while process.poll() is None and not list(cache.glob("*")):  # .name, .cubin or what will be renamed
            time.sleep(0.0005)
        process.kill()
        rest = process.communicate(timeout=60)[0]
        if process.returncode == -signal.SIGKILL and rest == "":
            break
        shutil.rmtree(cache)
    assert process.returncode == -signal.SIGKILL and rest == ""
    whole = {path.name for path in cache.glob("*.cubin")}
    assert all(
        path.read_bytes()[:4] == b"\x7fELF" and path.with_suffix(".name").stat().st_size for path in cache.glob("*.cubin")
    )
    process = run_with_sources(sources, cache, LISTED)
    output, errors = process.communicate(timeout=120)
    assert output.split() == ["begins", str(24 - len(whole)), "24"] and "kernel cache" not in errors
    assert len(list(cache.glob("*.cubin"))) == 24


def test_a_limit_on_the_size_of_files_is_as_a_full_disk(sources, cache):
    """Here the system itself cuts the writing short: after 64 bytes, of which names have fewer and code has more."""
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
wanted = [_kernels.instance("scale", "float", i) for i in range(3)]
print(_kernels.compile_all(wanted, "sm_80"), {_kernels.loadable(w, "sm_80")[0][1:4] for w in wanted})
"""
    output, errors = run_with_sources(sources, cache, code).communicate(timeout=120)
    assert output == "3 {b'ELF'}\n"
    assert "File too large" in said_of_the_cache(errors)
    assert list(cache.glob("*.cubin")) == [] and list(cache.glob(".*")) == []


def test_threads_compile_an_instance_once(sources, cache, compilations):
    results = []
    threads = [threading.Thread(target=lambda: results.append(compiled(WANTED, "sm_80"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1 and len(set(results)) == 1 and len(results) == 4


def test_compile_all_counts_what_was_missing(sources, cache):
    wanted = [instance("scale", "float", i) for i in range(3)]
    compiled(wanted[0], "sm_80")
    assert compile_all([*wanted, wanted[1]], "sm_80") == 2
    assert compile_all(wanted, "sm_80") == 0
    assert compile_all(wanted[:1], "sm_86") == 1


def test_compile_all_reports_an_error(sources, cache):
    with pytest.raises(BackendError, match="does not compile"):
        compile_all([WANTED, instance("scale", "Unknown", 1)], "sm_80")


# --- the progress line ------------------------------------------------------------------------------------------------


def test_waiting_is_announced_after_a_second(sources, cache, monkeypatch, capsys):
    def slow(wanted, arch, options=()):
        time.sleep(1.3)
        return b"code", "name", ""

    monkeypatch.setattr(_kernels, "compile_instance", slow)
    compiled(WANTED, "sm_80")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cupyq: compiling scale<float, 2> for sm_80 (first use only) ..."
    assert re.fullmatch(r"cupyq: done in 1\.[3-9] s", lines[1]) and len(lines) == 2
    compile_all([instance("scale", "float", i) for i in range(2)], "sm_80")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cupyq: compiling kernels: 2 for sm_80 (first use only) ..." and len(lines) == 2


def test_quick_work_is_silent(sources, cache, monkeypatch, capsys):
    monkeypatch.setattr(_kernels, "compile_instance", lambda wanted, arch, options=(): (b"code", "name", ""))
    compiled(WANTED, "sm_80")
    time.sleep(1.2)
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_announcement(sources, cache, monkeypatch, capsys):
    def fail(wanted, arch, options=()):
        raise BackendError("broken")

    monkeypatch.setattr(_kernels, "compile_instance", fail)
    with pytest.raises(BackendError, match="broken"):
        compiled(WANTED, "sm_80")
    time.sleep(1.2)
    assert capsys.readouterr() == ("", "")
    assert not _kernels._announcing.locked()


# --- launching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(sources, cache):
    """The test's own kernel, with nothing of it left loaded afterwards."""
    _kernels.forget_loaded()
    yield
    _kernels.forget_loaded()


def test_launch_without_an_array_is_refused():
    with pytest.raises(TypeError, match="no array"):
        _kernels.launch(WANTED, (1,), (1,), (np.int32(1), None))
    with pytest.raises(TypeError, match="argument 0 is a ndarray"):
        _kernels.launch(WANTED, (1,), (1,), (np.zeros(3, np.float32),))


TABLE = np.dtype([("address", np.uint64), ("numbers", np.int32, 2)])

# NumPy scalars and how C has them.
SCALARS = [
    (np.bool_(True), ctypes.c_bool),
    (np.int8(-3), ctypes.c_int8),
    (np.uint8(250), ctypes.c_uint8),
    (np.int16(-300), ctypes.c_int16),
    (np.uint16(65000), ctypes.c_uint16),
    (np.int32(-70000), ctypes.c_int32),
    (np.uint32(2**32 - 5), ctypes.c_uint32),
    (np.int64(-(2**40)), ctypes.c_int64),
    (np.uint64(2**64 - 7), ctypes.c_uint64),
    (np.longlong(2**41), ctypes.c_longlong),
    (np.float32(0.1), ctypes.c_float),
    (np.float64(0.1), ctypes.c_double),
]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, from cuda.h."""

    _fields_ = [
        *((f"{what}{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "XYZ"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


class FakeDriver:
    """Takes launches as the driver would, and notes them: (function, grid, block, shared bytes, stream, bytes, overlaps)."""

    def __init__(self):
        self.launched, self.statuses, self.parameters = [], [], None
        # As ctypes would call the library: from C memory alone.
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self.launch)

    def launch(self, config, function, parameters, extra):
        config = LaunchConfig.from_address(config)
        words = (ctypes.c_size_t * 5).from_address(extra)
        status = self.statuses.pop(0) if self.statuses else 0
        if parameters or (words[0], words[2], words[4]) != (1, 2, 0):  # CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE, _END
            return 1
        overlaps = False
        if config.attribute_count:
            attribute = (ctypes.c_int * 18).from_address(config.attributes)
            overlaps = (attribute[0], attribute[2]) == (6, 1)  # PROGRAMMATIC_STREAM_SERIALIZATION, allowed
        if status == 0:
            packed = ctypes.string_at(words[1], ctypes.c_size_t.from_address(words[3]).value)
            grid = (config.gridX, config.gridY, config.gridZ)
            block = (config.blockX, config.blockY, config.blockZ)
            self.launched.append((function, grid, block, config.shared_bytes, config.stream or 0, packed, overlaps))
        return status

    def cuGetErrorName(self, status, text):
        text._obj.value = {1: b"CUDA_ERROR_INVALID_VALUE"}.get(status)

    def cuGetErrorString(self, status, text):
        text._obj.value = {1: b"invalid argument"}.get(status)

    def cuFuncGetParamInfo(self, function, position, offset, size):
        if self.parameters is None or position.value >= len(self.parameters):
            return 1
        offset._obj.value, size._obj.value = self.parameters[position.value]
        return 0


@pytest.fixture
def driver(monkeypatch):
    """A driver without a GPU that notes launches. Its `device`, `stream` and `arch` are the current ones."""
    needs_cupy()
    import cupy

    fake = FakeDriver()
    fake.device, fake.stream, fake.arch, fake.contexts = 0, 0, "sm_90a", 0
    fake.shared = []

    class Kernel:
        def __init__(self, name):
            self.kernel = SimpleNamespace(ptr=1000 * fake.device + len(name))

        def __setattr__(self, name, value):
            if name == "max_dynamic_shared_size_bytes":
                fake.shared.append(value)
            super().__setattr__(name, value)

    @contextlib.contextmanager
    def device(number):
        outer, fake.device = fake.device, number
        yield
        fake.device = outer

    def make_context():
        fake.contexts += 1

    monkeypatch.setattr(_launch, "driver", lambda: fake)
    monkeypatch.setattr(_kernels, "loadable", lambda wanted, arch: ("path", str(wanted)))
    monkeypatch.setattr(_device, "info", lambda number: SimpleNamespace(arch=fake.arch))
    monkeypatch.setattr(cupy, "RawModule", lambda path: SimpleNamespace(get_function=Kernel))
    monkeypatch.setattr(cupy.cuda, "Device", device)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: fake.device)
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", make_context)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda number: SimpleNamespace(ptr=fake.stream))
    _kernels.forget_loaded()
    yield fake
    _kernels.forget_loaded()


def fake_array(*shape, dtype=np.float32, device=0, address=0x7F0000001000):
    """A CuPy array at an address that nobody reads."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, 1 << 20, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def as_c_has_it(values):
    """The bytes of a C structure with these members."""
    fields = [(f"_{i}", kind) for i, (_, kind) in enumerate(values)]
    structure = type("Parameters", (ctypes.Structure,), {"_fields_": fields})
    end = getattr(structure, f"_{len(values) - 1}").offset + ctypes.sizeof(values[-1][1])
    return bytes(structure(*(value.item() if isinstance(value, np.generic) else value for value, _ in values)))[:end]


def test_arguments_lie_as_c_lays_them_out(driver):
    rng = np.random.default_rng(0)
    pointer = (0x7F0000001000, ctypes.c_void_p)
    for _ in range(50):
        chosen = [SCALARS[i] for i in rng.integers(len(SCALARS), size=12)]
        given = [fake_array(4), *(value for value, _ in chosen), None, chosen[0][0]]
        _kernels.launch(WANTED, (1,), (1,), given)
        assert driver.launched[-1][5] == as_c_has_it([pointer, *chosen, (0, ctypes.c_void_p), chosen[0]])


def test_values_of_16_bits_and_structures_are_passed_as_they_are(driver):
    table = np.array((5, (6, -7)), TABLE)[()]
    arguments = (np.bool_(True), np.float16(1.5), _arrays.bfloat16.type(-2), fake_array(2), np.int8(9), table, np.int32(8))
    _kernels.launch(WANTED, (1,), (1,), arguments)
    packed = driver.launched[0][5]
    assert packed[:6] == b"\1\0" + np.float16(1.5).tobytes() + b"\x00\xc0" and packed[6:8] == b"\0\0"
    assert packed[8:16] == (0x7F0000001000).to_bytes(8, "little") and packed[16] == 9
    assert packed[32:48] == table.tobytes() and packed[48:] == (8).to_bytes(4, "little")
    for size in (64, 32, 64, 16):  # of one type, as NumPy sees it
        _kernels.launch(
            WANTED, (1,), (1,), (fake_array(2), np.full((), bytes([size] * size), (np.void, size))[()], np.int32(3))
        )
        assert driver.launched[-1][5][16:] == bytes([size] * size) + (3).to_bytes(4, "little")
    for wrong, text in ((np.zeros((), (np.void, 24))[()], "24 bytes: pad it"), (np.complex64(1), "which no kernel takes")):
        with pytest.raises((TypeError, ValueError), match=rf"^scale<float, 2>: argument 1 is a \w+.*{text}"):
            _kernels.launch(WANTED, (1,), (1,), (fake_array(2), wrong))
    with pytest.raises(ValueError, match="at most 4096"):
        _kernels.launch(WANTED, (1,), (1,), (fake_array(2), np.zeros((), (np.void, 4096))[()]))


def test_the_configuration_of_a_launch(driver):
    driver.stream = 0x1234567890
    _kernels.launch(WANTED, (3,), (64, 2), (fake_array(4),), 70_000)
    _kernels.launch(WANTED, (np.int64(3), 65535, 5), (1, 2, 3), (fake_array(4),), 60_000)
    _kernels.launch(instance("other"), (2**31 - 1,), (32,), (fake_array(4),))
    name = len(str(WANTED))
    address = (0x7F0000001000).to_bytes(8, "little")
    assert driver.launched == [
        (name, (3, 1, 1), (64, 2, 1), 70_000, driver.stream, address, False),
        (name, (3, 65535, 5), (1, 2, 3), 60_000, driver.stream, address, False),
        (len("other"), (2**31 - 1, 1, 1), (32, 1, 1), 0, driver.stream, address, False),
    ]
    assert driver.shared == [70_000]  # asked for once, as the second launch needs less


def test_a_launch_goes_to_the_device_of_its_arrays(driver):
    _kernels.launch(WANTED, (1,), (1,), (fake_array(4, device=1), fake_array(2, device=1)))
    _kernels.launch(WANTED, (1,), (1,), (fake_array(4),))
    name = len(str(WANTED))
    assert [launched[0] for launched in driver.launched] == [1000 + name, name] and driver.device == 0
    with pytest.raises(ValueError, match="argument 2 is on GPU 1, the first on 0"):
        _kernels.launch(WANTED, (1,), (1,), (fake_array(4), np.int32(1), fake_array(4, device=1)))


@pytest.mark.parametrize(
    ("error", "text", "grid", "block", "arguments"),
    [
        (ValueError, "argument 1 is not C-contiguous", (1,), (1,), lambda: (fake_array(2), fake_array(4, 4).T)),
        (TypeError, r"argument 1 is a int: wrap numbers, as in np.int32\(3\)", (1,), (1,), lambda: (fake_array(2), 3)),
        (TypeError, "argument 1 is a str", (1,), (1,), lambda: (fake_array(2), "3")),
        (TypeError, "no array among the arguments", (1,), (1,), lambda: (None, np.int32(3))),
        (ValueError, r"empty launch, grid \(0, 2\)", (0, 2), (1,), lambda: (fake_array(2),)),
        (ValueError, "empty launch", (1,), (0,), lambda: (fake_array(2),)),
        (ValueError, r"grid \(1, 1, 1, 1\) and block \(1,\) must be up to three", (1, 1, 1, 1), (1,), lambda: (fake_array(2),)),
        (ValueError, r"grid \(-1,\) and", (-1,), (1,), lambda: (fake_array(2),)),
        (ValueError, r"grid \(4294967296,\)", (2**32,), (1,), lambda: (fake_array(2),)),
        (ValueError, r".*block \(2.5,\)", (1,), (2.5,), lambda: (fake_array(2),)),
    ],
)
def test_launches_that_cannot_be_meant_are_refused(driver, error, text, grid, block, arguments):
    for _ in range(2):  # the second time from what was kept of the first
        with pytest.raises(error, match=f"^scale<float, 2>: {text}") as raised:
            _kernels.launch(WANTED, grid, block, arguments())
        one_line(raised)
    assert driver.launched == []


def test_a_refusal_of_the_driver_is_explained(driver):
    driver.statuses = [1, 999]
    with pytest.raises(BackendError) as error:
        _kernels.launch(WANTED, (3,), (2048,), (fake_array(4),), 100)
    assert one_line(error) == (
        "scale<float, 2> cannot be launched: CUDA_ERROR_INVALID_VALUE (invalid argument); grid (3,), block (2048,), 100 bytes "
        "of dynamic shared memory, GPU 0"
    )
    with pytest.raises(BackendError, match="CUDA error 999"):
        _kernels.launch(WANTED, (3,), (2048,), (fake_array(4),))


def test_the_first_launch_of_a_thread_makes_the_context_current(driver):
    driver.statuses = [201]
    _kernels.launch(WANTED, (1,), (1,), (fake_array(4),))
    assert driver.contexts == 1 and len(driver.launched) == 1
    driver.statuses = [201, 201]
    with pytest.raises(BackendError, match="CUDA error 201"):
        _kernels.launch(WANTED, (1,), (1,), (fake_array(4),))


def test_arguments_that_are_not_the_kernels_are_refused(driver):
    driver.parameters = [(0, 8), (8, 4), (16, 8)]
    right = (fake_array(4), np.int32(1), np.int64(2))
    _kernels.launch(WANTED, (1,), (1,), right)
    for wrong, text in (
        ((fake_array(4), np.int64(1), np.int64(2)), r"argument 1 has 8 bytes at offset 8, the kernel's parameter 4 bytes at 8"),
        (
            (fake_array(4), np.int32(1), np.int32(2)),
            r"argument 2 has 4 bytes at offset 12, the kernel's parameter 8 bytes at 16",
        ),
        (right[:2], "2 arguments were given, the kernel takes more"),
        ((*right, None), "4 arguments were given, the kernel takes 3"),
    ):
        with pytest.raises(TypeError, match=f"^scale<float, 2>: {text}") as error:
            _kernels.launch(WANTED, (1,), (1,), wrong)
        one_line(error)
    assert len(driver.launched) == 1
    driver.parameters = None  # an older driver
    _kernels.launch(WANTED, (1,), (1,), right[:2])
    assert len(driver.launched) == 2


def test_threads_share_a_stream_without_mixing_their_arguments(driver):
    def work(number):
        for i in range(200):
            _kernels.launch(WANTED, (number + 1,), (1,), (fake_array(4), np.int32(number), np.int64(i)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {number: [] for number in range(4)}
    for _, grid, _, _, _, packed, _ in driver.launched:
        assert grid[0] == 1 + int.from_bytes(packed[8:12], "little")
        seen[grid[0] - 1].append(int.from_bytes(packed[16:24], "little"))
    assert all(numbers == list(range(200)) for numbers in seen.values())


def test_what_launch_takes_from_cupy_is_there():
    needs_cupy()
    array = fake_array(4, 4)
    assert array._c_contiguous and not array.T._c_contiguous and array[1:]._c_contiguous
    _arrays.check(array, "x")
    with pytest.raises(ValueError, match="x must be C-contiguous"):
        _arrays.check(array.T, "x")


# --- overlap ----------------------------------------------------------------------------------------------------------

AWARE = """
#include "ptx.cuh"
__global__ void aware(int *y) { wait_for_previous_kernel(); let_next_kernel_start(); }
"""


@pytest.fixture
def aware_sources(sources):
    """The file `aware` waits for the previous kernel, `through` in a header; `scale` and `said` do not."""
    shutil.copy(ROOT / "cupyq/cu/ptx.cuh", sources)
    shutil.copy(ROOT / "cupyq/cu/types.cuh", sources)
    (sources / "aware.cu").write_text(AWARE)
    (sources / "inner.cuh").write_text("__device__ void begin() { wait_for_previous_kernel(); }\n")
    (sources / "outer.cuh").write_text('#include "ptx.cuh"\n#include "inner.cuh"\n')
    (sources / "through.cu").write_text('#include "outer.cuh"\n__global__ void through(int *y) { begin(); }\n')
    said = "// wait_for_previous_kernel()\n/* wait_for_previous_kernel()\n wait_for_previous_kernel() */\n"
    (sources / "said.cu").write_text(f'#include "ptx.cuh"\n{said}__global__ void said(int *y) {{}}\n')
    _kernels._sources.cache_clear()
    return sources


def test_waiting_is_read_from_the_sources(aware_sources):
    names = ("aware", "through", "scale", "said")
    assert [_kernels.is_overlap_aware(name) for name in names] == [True, True, False, False]


def overlaps(driver, *names, stream=0, device=0):
    """Launch these kernels -> for each whether it may overlap with the one before."""
    del driver.launched[:]
    driver.stream = stream
    for name in names:
        _kernels.launch(instance(name), (1,), (1,), (fake_array(4, device=device),))
    return [launched[-1] for launched in driver.launched]


def test_kernels_overlap_where_both_are_aware(driver, aware_sources):
    names = ("aware", "aware", "through", "scale", "aware", "said", "said", "aware", "aware")
    assert overlaps(driver, *names) == [False, True, True, False, False, False, False, False, True]


def test_every_stream_and_device_has_its_own_order(driver, aware_sources):
    assert overlaps(driver, "aware", stream=1) == [False]
    assert overlaps(driver, "scale", stream=2) == [False]
    assert overlaps(driver, "aware", stream=1) == [True]
    assert overlaps(driver, "aware", "aware", stream=2) == [False, True]
    assert overlaps(driver, "aware", stream=1, device=1) == [False]
    assert overlaps(driver, "aware", stream=1, device=1) == [True]


def test_a_launch_that_failed_changes_nothing(driver, aware_sources):
    overlaps(driver, "scale")
    driver.statuses = [1]
    with pytest.raises(BackendError):
        overlaps(driver, "aware")
    assert overlaps(driver, "aware", "aware") == [False, True]
    driver.statuses = [1]
    with pytest.raises(BackendError):
        overlaps(driver, "scale")
    assert overlaps(driver, "aware") == [True]


@pytest.mark.parametrize(("arch", "allowed"), [("sm_75", False), ("sm_89", False), ("sm_90a", True), ("sm_100a", True)])
def test_overlap_needs_hopper(driver, aware_sources, arch, allowed):
    driver.arch = arch
    assert overlaps(driver, "aware", "aware") == [False, allowed]


@pytest.mark.parametrize(("value", "allowed"), [("0", False), ("1", True), ("", True)])
def test_overlap_can_be_switched_off(driver, aware_sources, monkeypatch, value, allowed):
    monkeypatch.setenv("CUPYQ_OVERLAP", value)
    assert overlaps(driver, "aware", "aware") == [False, allowed]


def braced(code, start):
    """The text between the brace or parenthesis that opens at or after `start` and its partner; where the partner stands."""
    opening = re.compile(r"[({]").search(code, start)
    closing = {"(": ")", "{": "}"}[opening[0]]
    depth, at = 1, opening.end()
    while depth:
        depth += {opening[0]: 1, closing: -1}.get(code[at], 0)
        at += 1
    return code[opening.end() : at - 1], at


def functions_of(code, marker):
    """{name: [(name of the last parameter, body)]} of the functions that a marker such as __global__ introduces."""
    found = {}
    for match in re.finditer(marker, code):
        heading = re.compile(
            r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)|[^(){};])*?\b(?!__launch_bounds__)(\w+)\s*\("
        ).match(code, match.end())
        if heading:
            parameters, end = braced(code, heading.end() - 1)
            if re.match(r"\s*(const\s*)?\{", code[end:]):
                last = re.search(r"(\w*)\s*$", parameters)[1]
                found.setdefault(heading[1], []).append((last, braced(code, end)[0]))
    return found


LAMBDA = re.compile(r"(?:(\w+)\s*=\s*)?\[[^\[\]]*\]\s*(?:\([^()]*\)\s*)?(?:->\s*[\w:]+\s*)?(?=\{)")


def called_with(code, at):
    """The name of the function among whose arguments the place `at` is, or None."""
    depth = 0
    for i in range(at - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(code[i], 0)
        if depth < 0:
            name = re.search(r"(\w+)\s*(<[^(){};]*>)?\s*$", code[:i])
            return name and name[1]
    return None


def without_inner_functions(body, functions):
    """The body without what runs elsewhere: structs and lambdas. Returns it and `functions` with the lambdas that have a name.

    A lambda that waits, given to a function as its last argument, is taken to be called there.
    """
    functions = dict(functions)
    while match := re.search(r"\bstruct\s+\w+\s*(?=\{)", body):
        body = body[: match.start()] + body[braced(body, match.end())[1] :]
    while match := LAMBDA.search(body):
        inner, end = braced(body, match.end())
        callee = called_with(body, match.start())
        if match[1]:
            functions[match[1]] = [("", inner)]
        elif callee in functions and waits_first(inner, functions):
            functions[callee] = [
                (last, re.sub(rf"\b{last}\(\)", "wait_for_previous_kernel()", text)) for last, text in functions[callee]
            ]
        body = body[: match.start()] + body[end:]
    return body, functions


def waits_first(body, functions):
    """Whether a body comes to wait_for_previous_kernel(), and to no return before."""
    body, functions = without_inner_functions(body, functions)
    for match in re.finditer(r"\b(\w+)\b(?=(\s*(?:<[^(){};]*>)?\s*\()?)", body):
        if match[1] == "wait_for_previous_kernel":
            before = body[: match.start()].rstrip()
            return not before or before[-1] in ";{}"  # not under a bare `if`
        if match[1] == "return":
            return False
        if match[2] and match[1] in functions:
            inner = [text for _, text in functions[match[1]]]
            if "wait_for_previous_kernel" in "".join(inner):
                return all(waits_first(text, {**functions, match[1]: []}) for text in inner)
    return False


def kernels_that_do_not_wait(name, texts):
    """Kernels of an overlap-aware file whose text does not come to the wait, or returns before."""

    def included(name):
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", texts[name], flags=re.DOTALL)
        headers = [header for header in re.findall(r'#include "(\w+\.cuh)"', code) if header != "ptx.cuh"]
        return "".join(map(included, headers)) + code

    code = included(name)
    functions = functions_of(code, "__device__")
    kernels = functions_of(code, "__global__")
    assert sum(map(len, kernels.values())) == code.count("__global__") > 0, name
    return [kernel for kernel, bodies in kernels.items() if not all(waits_first(body, functions) for _, body in bodies)]


def test_every_kernel_of_an_overlap_aware_file_waits_before_it_returns():
    texts = {path.name: path.read_text() for path in (ROOT / "cupyq/cu").glob("*.cu*")}
    aware = [name for name in texts if name.endswith(".cu") and _kernels.is_overlap_aware(name.removesuffix(".cu"))]
    assert {"rms_norm.cu", "qmatmul.cu", "rope.cu"} <= set(aware)
    assert {name: found for name in aware if (found := kernels_that_do_not_wait(name, texts))} == {}


def test_what_writes_the_constants_of_a_matrix_is_not_overlap_aware():
    """Kernels read them ahead of their wait, so that the one after such a writer has to start after its end."""
    assert not _kernels.is_overlap_aware("repack")


@pytest.mark.parametrize(
    ("body", "is_right"),
    [
        ("wait_for_previous_kernel(); if (n == 0) return; y[0] = 1;", True),
        ("int i = n; { wait_for_previous_kernel(); } return;", True),
        ("begin(n); return;", True),
        ("begin<float>(n); return;", True),
        ("auto twice = [&](int i) { return 2 * i; }; int i = twice(n); wait_for_previous_kernel();", True),
        ("struct Two { int a; __device__ int get() { return a; } }; wait_for_previous_kernel();", True),
        ("auto start = [&] { wait_for_previous_kernel(); }; start(); return;", True),
        ("run(n, [] { wait_for_previous_kernel(); });", True),
        ("y[0] = plain(n); wait_for_previous_kernel();", True),
        ("", False),
        ("y[0] = 1;", False),
        ("if (n == 0) return; wait_for_previous_kernel();", False),
        ("if (n == 0) wait_for_previous_kernel(); y[0] = 1;", False),
        ("late(n);", False),
        ("if (n) return; begin(n);", False),
        ("auto start = [&] { wait_for_previous_kernel(); }; return; start();", False),
        ("auto start = [&] { wait_for_previous_kernel(); }; y[0] = 1;", False),
        ("auto start = [&] { if (n) return; wait_for_previous_kernel(); }; start();", False),
        ("run_late(n, [] { wait_for_previous_kernel(); });", False),
        ("run(n, [] {}); // wait_for_previous_kernel();", False),
    ],
)
def test_a_kernel_that_does_not_wait_would_be_seen(body, is_right):
    header = """
    template <typename T> __device__ __forceinline__ void begin(int n) { wait_for_previous_kernel(); if (n) return; }
    __device__ int plain(int n) { return n; }
    __device__ void late(int n) { if (n) return; wait_for_previous_kernel(); }
    template <typename First> __device__ void run(int n, First first) { int i = n; first(); if (i) return; }
    template <typename First> __device__ void run_late(int n, First first) { if (n) return; first(); }
    """
    kernel = f"template <int a> __global__ void __launch_bounds__(32 * (a + 1), 1) tested(int *y, int n) {{ {body}\n}}"
    texts = {"h.cuh": header, "tested.cu": f'#include "ptx.cuh"\n#include "h.cuh"\n{kernel}\n'}
    assert kernels_that_do_not_wait("tested.cu", texts) == ([] if is_right else ["tested"])


# --- launching on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_launch_runs_a_kernel(loaded, cupy):
    y = cupy.arange(1000, dtype=cupy.float32)
    _kernels.launch(WANTED, (4,), (256,), (y, np.int32(999)))
    expected = np.arange(1000, dtype=np.float32) * np.where(np.arange(1000) < 999, 6, 1)
    np.testing.assert_array_equal(y.get(), expected)


@pytest.mark.gpu
def test_launch_follows_the_current_stream_and_replays_in_a_graph(loaded, cupy):
    y = cupy.ones(8, dtype=cupy.float32)
    _kernels.launch(WANTED, (1,), (32,), (y, np.int32(8)))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        _kernels.launch(WANTED, (1,), (32,), (y, np.int32(8)))
        graph = stream.end_capture()
        assert y.get()[0] == 6  # capturing launched nothing
        graph.launch(stream)
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(y.get(), np.full(8, 6.0**3, np.float32))


EVERY_KIND = """
struct alignas(16) Table { unsigned long long address; int numbers[2]; };
__global__ void every_kind(const int *x, bool b, signed char i8, Table table, unsigned char u8, short i16, unsigned short u16,
    int i32, const int *nothing, unsigned int u32, long long i64, unsigned short half_bits, float f32, unsigned long long u64,
    unsigned short bfloat16_bits, double f64, double *y) {
    double values[] = {(double)x[1], (double)b, (double)i8, (double)(table.address % 1000), (double)table.numbers[0],
        (double)table.numbers[1], (double)u8, (double)i16, (double)u16, (double)i32, (double)(nothing == nullptr), (double)u32,
        (double)i64, (double)half_bits, (double)f32, (double)(u64 % 1000), (double)bfloat16_bits, f64};
    for (int i = 0; i < 18; i++) y[i] = values[i];
}
"""


@pytest.mark.gpu
def test_every_kind_of_argument_arrives(loaded, sources, cupy):
    (sources / "every_kind.cu").write_text(EVERY_KIND)
    _kernels._sources.cache_clear()
    x, y = cupy.asarray(np.array([3, 1234567], np.int32)), cupy.zeros(18)
    table = np.array((10**12 + 7, (6, -8)), TABLE)[()]
    arguments = (
        x, np.bool_(True), np.int8(-3), table, np.uint8(250), np.int16(-300), np.uint16(65000), np.int32(-70000), None,
        np.uint32(2**32 - 5), np.int64(-(2**40)), np.float16(1.5), np.float32(0.1), np.uint64(2**64 - 1),
        _arrays.bfloat16.type(-2), np.float64(0.1), y,
    )  # fmt: skip
    _kernels.launch(instance("every_kind"), (1,), (1,), arguments)
    assert y.get().tolist() == [
        1234567, 1, -3, 7, 6, -8, 250, -300, 65000, -70000, 1, 2**32 - 5, -(2**40), 0x3E00, float(np.float32(0.1)), 615,
        0xC000, 0.1,
    ]  # fmt: skip


@pytest.mark.gpu
def test_arguments_of_another_size_are_refused(loaded, cupy):
    """As the driver tells the parameters of a kernel, from CUDA 12.4 on."""
    if not hasattr(_launch.driver(), "cuFuncGetParamInfo"):
        return
    y = cupy.ones(4, dtype=cupy.float32)
    for arguments, text in (
        ((y, np.int64(4)), "argument 1 has 8 bytes at offset 8, the kernel's parameter 4 bytes at 8"),
        ((y,), "1 arguments were given, the kernel takes more"),
        ((y, np.int32(4), np.int32(4)), "3 arguments were given, the kernel takes 2"),
    ):
        with pytest.raises(TypeError, match=text):
            _kernels.launch(WANTED, (1,), (32,), arguments)
    assert y.get().tolist() == [1] * 4


@pytest.mark.gpu
def test_what_the_driver_refuses_is_explained(loaded, cupy):
    y = cupy.ones(4, dtype=cupy.float32)
    with pytest.raises(BackendError, match=r"^scale<float, 2> cannot be launched: CUDA_ERROR_INVALID_VALUE .*block \(2048,\)"):
        _kernels.launch(WANTED, (1,), (2048,), (y, np.int32(4)))
    with pytest.raises(BackendError, match=r"^scale<float, 2>: GPU 0 does not give it 1000000 bytes of shared memory"):
        _kernels.launch(WANTED, (1,), (32,), (y, np.int32(4)), 1_000_000)
    _kernels.launch(
        WANTED, (1,), (32,), (y, np.int32(4)), 100_000 if _device.current().shared_bytes_per_block > 1e5 else 50_000
    )
    assert y.get().tolist() == [6] * 4


@pytest.mark.gpu
def test_a_new_thread_launches(loaded, cupy):
    y = cupy.ones(4, dtype=cupy.float32)
    cupy.cuda.runtime.deviceSynchronize()
    failures = []

    def work():
        try:
            _kernels.launch(WANTED, (1,), (32,), (y, np.int32(4)))
            cupy.cuda.runtime.deviceSynchronize()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == [] and y.get().tolist() == [6] * 4


CHAIN = """
#include "ptx.cuh"
// y[i] = 3 x[i] + x[neighbour], where the neighbour is the work of another block. Some blocks are late.
__global__ void aware(const unsigned *x, unsigned *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (blockIdx.x % 7 == 3) __nanosleep(2000);
    if (i < n) y[i] = 3 * x[i] + x[(i + n / 2 + 1) % n];
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", ["0", "1"])
def test_a_chain_of_overlapping_kernels_is_computed_in_order(loaded, aware_sources, cupy, monkeypatch, overlap):
    (aware_sources / "aware.cu").write_text(CHAIN)
    plain = re.sub(r"(wait_for_previous|let_next)_kernel\w*\(\);", "", CHAIN).replace("aware", "plain")
    (aware_sources / "plain.cu").write_text(plain)
    _kernels._sources.cache_clear()
    monkeypatch.setenv("CUPYQ_OVERLAP", overlap)
    monkeypatch.setattr(_kernels, "_is_overlap_allowed", spy := Spy(_kernels._is_overlap_allowed))
    n, names = 100_000, ("aware", "aware", "aware", "plain", "aware", "aware")
    x = np.arange(n, dtype=np.uint32)
    expected = [x]
    for _ in range(2 * 10 * len(names)):
        expected.append(3 * expected[-1] + np.roll(expected[-1], -(n // 2 + 1)))

    a, b = cupy.asarray(x), cupy.zeros(n, np.uint32)

    def run(a, b):
        for _ in range(10):
            for name in names:
                _kernels.launch(instance(name), (-(-n // 256),), (256,), (a, b, np.int32(n)))
                a, b = b, a
        return a

    result = run(a, b)  # loads, and computes half of the chain
    np.testing.assert_array_equal(result.get(), expected[len(expected) // 2])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        run(a, b)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(result.get(), expected[-1])
    hopper = _device.arch_number(_device.current().arch) >= 90
    assert spy.results == [overlap == "1" and hopper] * 2


class Spy:
    """Calls a function and keeps what it returned."""

    def __init__(self, function):
        self.function, self.results = function, []

    def __call__(self, *arguments):
        self.results.append(self.function(*arguments))
        return self.results[-1]


@pytest.mark.gpu
def test_two_streams_do_not_wait_for_each_other(loaded, cupy):
    """Each has its own order, and its own memory for what is launched."""
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    ys = [cupy.ones(1000, dtype=cupy.float32) for _ in streams]
    cupy.cuda.runtime.deviceSynchronize()
    for _ in range(15):
        for count, stream, y in zip((1000, 500), streams, ys, strict=True):
            with stream:
                _kernels.launch(WANTED, (4,), (256,), (y, np.int32(count)))
    cupy.cuda.runtime.deviceSynchronize()
    for count, y in zip((1000, 500), ys, strict=True):
        np.testing.assert_array_equal(y.get(), np.where(np.arange(1000) < count, 6.0**15, 1).astype(np.float32))


@pytest.mark.gpu
def test_a_kernel_from_memory_runs(loaded, cupy, cache, monkeypatch, capsys):
    read_only(cache, monkeypatch)
    y = cupy.ones(1000, dtype=cupy.float32)
    _kernels.launch(WANTED, (4,), (256,), (y, np.int32(900)))
    _kernels.launch(WANTED, (4,), (256,), (y, np.int32(1000)), 60_000)  # more shared memory than is given unasked
    np.testing.assert_array_equal(y.get(), np.where(np.arange(1000) < 900, 36, 6).astype(np.float32))
    assert list(cache.iterdir()) == [] and "Read-only file system" in said_of_the_cache(capsys.readouterr().err)


@pytest.mark.gpu
def test_ptx_of_an_unknown_arch_loads(loaded, cupy, monkeypatch):
    """As on a GPU newer than NVRTC: PTX of the newest architecture this NVRTC and this GPU share."""
    real = _device.current().arch
    nvrtc = _kernels.load_nvrtc()
    older = [number for number in nvrtc.getSupportedArchs() if number < _device.arch_number(real)]

    class Older:
        def __getattr__(self, name):
            return (lambda: older) if name == "getSupportedArchs" else getattr(nvrtc, name)

    monkeypatch.setattr(_kernels, "load_nvrtc", Older)
    assert compiled(WANTED, real)[0].suffix == ".ptx"
    y = cupy.ones(4, dtype=cupy.float32)
    _kernels.launch(WANTED, (1,), (32,), (y, np.int32(4)))
    np.testing.assert_array_equal(y.get(), np.full(4, 6, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [3, 3.0, True, "3", [3]])
def test_launch_refuses_bare_python_values(loaded, cupy, value):
    y = cupy.ones(4, dtype=cupy.float32)
    with pytest.raises(TypeError, match=r"argument 1 is a \w+: wrap numbers, as in np.int32\(3\)"):
        _kernels.launch(WANTED, (1,), (32,), (y, value))
    assert y.get().tolist() == [1] * 4


@pytest.mark.gpu
def test_launch_refuses_strided_arrays_and_empty_grids(loaded, cupy):
    y = cupy.ones((4, 4), dtype=cupy.float32)
    with pytest.raises(ValueError, match="argument 0 is not C-contiguous"):
        _kernels.launch(WANTED, (1,), (32,), (y.T, np.int32(4)))
    with pytest.raises(ValueError, match="empty launch"):
        _kernels.launch(WANTED, (0,), (32,), (y, np.int32(4)))
    assert y.get().tolist() == [[1] * 4] * 4


@pytest.mark.gpu
def test_tracing_notes_and_does_not_launch(loaded, cupy, compilations):
    y = cupy.ones(4, dtype=cupy.float32)
    with _kernels.tracing() as seen:
        _kernels.launch(WANTED, (1,), (32,), (y, np.int32(4)))
    assert seen == [(WANTED, _device.current().arch)]
    assert y.get().tolist() == [1] * 4 and compilations == []


@pytest.mark.gpu
def test_device_info_is_that_of_the_gpu(cupy):
    info = _device.current()
    assert info.arch.startswith("sm_") and info.sm_count > 0 and info.name
    assert info.shared_bytes_per_block >= 48 * 1024 and info.memory_bytes > info.l2_bytes > 0
    assert _device.count() >= 1
