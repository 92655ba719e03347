"""The compilation pipeline and its cache, without a GPU; launching, with one."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT

from cupyq import _arrays, _device, _kernels
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
    known = _kernels._nvrtc().getSupportedArchs()
    assert path.suffix == ".ptx" and lowered in text
    assert f".target sm_{max(known)}\n" in text


def test_an_unknown_arch_between_known_ones_gets_ptx_of_the_next_older(sources, monkeypatch):
    class Older:
        def getSupportedArchs(self):
            return [86, 75, 90]

    monkeypatch.setattr(_kernels, "_nvrtc", Older)
    assert _kernels._target("sm_89") == ("compute_86", "ptx")
    assert _kernels._target("sm_90a") == ("sm_90a", "cubin")
    assert _kernels._target("sm_120") == ("compute_90", "ptx")


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
    nvrtc = _kernels._nvrtc()

    class Newer:
        getSupportedArchs = staticmethod(nvrtc.getSupportedArchs)
        getVersion = staticmethod(lambda: (99, 0))

    monkeypatch.setattr(_kernels, "_nvrtc", Newer)
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
    for call in (lambda: compiled(WANTED, "sm_80"), lambda: compile_all([WANTED], "sm_80")):
        with pytest.raises(BackendError, match="kernel cache") as error:
            call()
        assert str(tmp_path / "file" / "cache") in one_line(error) and "CUPYQ_CACHE_DIR" in one_line(error)


def test_a_cache_that_cannot_be_read_is_explained(sources, cache, monkeypatch):
    """As another user's folder would be; a test that runs as root can read them all."""

    def denied(path, **options):
        raise PermissionError(13, "Permission denied")

    _kernels._cache_paths(WANTED, "sm_80")
    monkeypatch.setattr(type(cache), "stat", denied)
    with pytest.raises(BackendError, match="Permission denied") as error:
        compiled(WANTED, "sm_80")
    assert "CUPYQ_CACHE_DIR" in one_line(error)


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


@pytest.mark.gpu
def test_ptx_of_an_unknown_arch_loads(loaded, cupy, monkeypatch):
    """As on a GPU newer than NVRTC: PTX of the newest architecture this NVRTC and this GPU share."""
    real = _device.current().arch
    nvrtc = _kernels._nvrtc()
    older = [number for number in nvrtc.getSupportedArchs() if number < _device.arch_number(real)]

    class Older:
        def __getattr__(self, name):
            return (lambda: older) if name == "getSupportedArchs" else getattr(nvrtc, name)

    monkeypatch.setattr(_kernels, "_nvrtc", Older)
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
