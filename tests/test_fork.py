"""_fork.py: children of processes that had used CUDA, or had not, on a GPU and with a CUDA that is only pretended."""

import ctypes
import os
import subprocess
import sys

import pytest
from conftest import ROOT, needs_cupy

from cupyq import _fork
from cupyq.errors import BackendError

MODEL = ROOT / "examples/models/shakespeare-exl2-4.0"

# Forks; in the child every entry of `calls` is tried, and what became of it printed, a line each. The parent goes on behind it.
CHILD = """
sys.stdout.flush()
if (child := os.fork()) == 0:
    signal.alarm(60)  # what hangs ends
    for name, call in calls.items():
        try:
            print(name, "gave", call())
        except Exception as error:
            print(name, "raised", type(error).__name__, error)
    sys.stdout.flush()
    os._exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

START = f"""
import os, signal, sys, threading
import cupyq
import numpy as np
from cupyq import _device, _fork, _kernels
MODEL = {str(MODEL)!r}
"""

NO_GPU = "raised BackendError no GPU can be used here: this process was forked from one that had used CUDA"


def run(code, **environment):
    """The lines that a process of its own printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", START + code], **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


NUMPY_CALLS = """
calls["numpy op"] = lambda: cupyq.ops.add(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32)).tolist()
calls["numpy model"] = lambda: cupyq.load_model(MODEL, backend="numpy").forward([1, 2]).shape
"""

NUMPY_LINES = ["numpy op gave [[2.0, 2.0]]", "numpy model gave (1, 2, 1024)"]

# A CuPy array, of which nothing is read; and what uses the GPU.
PRETENDED = """
import cupy
memory = cupy.cuda.UnownedMemory(0x7F0000001000, 1 << 20, None, 0)
array = cupy.ndarray((2, 4), np.float32, cupy.cuda.MemoryPointer(memory, 0))
cupyq._arrays.admit(array, "array")  # as an op did before the fork
calls = {
    "count": _device.count,
    "current": _device.current,
    "load": lambda: cupyq.load_model(MODEL),
    "op": lambda: cupyq.ops.add(array, array, out=array),
    "launch": lambda: _kernels.launch(_kernels.instance("add"), (1,), (32,), (array,)),
    "memory": lambda: cupy.empty(4),
}
"""


def test_a_child_of_a_process_that_used_cuda_is_told_so():
    """Also where CuPy alone would compute: it is asked for memory, and raises what cupyq has it raise."""
    needs_cupy()
    code = "_fork.is_cuda_used = lambda: True\n" + PRETENDED + "calls.pop('launch')" + NUMPY_CALLS + CHILD
    lines = run(code + "_fork.refuse()\nprint('parent', _device.count())")
    assert [line.split(" raised ")[0] for line in lines[:5]] == ["count", "current", "load", "op", "memory"]
    for line in lines[:5]:
        assert NO_GPU in line and "'spawn'" in line and "backend='numpy'" in line
    assert lines[5:8] == [*NUMPY_LINES, "child 0"] and lines[8].startswith("parent ")


def test_so_are_its_own_children():
    code = "_fork.is_cuda_used = lambda: os.getpid() == parent\nparent = os.getpid()\n"
    nested = CHILD.replace("\n", "\n    ")
    lines = run(f"{code}calls = {{'count': _device.count}}\nif os.fork() == 0:\n    {nested}\n    os._exit(0)\nos.wait()")
    assert len(lines) == 2 and lines[0].startswith(f"count {NO_GPU}") and lines[1] == "child 0"


def test_a_child_of_a_process_that_imported_cupyq_is_not_affected():
    needs_cupy()
    lines = run("import cupy\ncalls = {'refuse': _fork.refuse}" + NUMPY_CALLS + CHILD, CUDA_VISIBLE_DEVICES="")
    assert lines == ["refuse gave None", *NUMPY_LINES, "child 0"]


def test_a_child_does_not_wait_for_threads_that_it_does_not_have(tmp_path):
    """One that was compiling when the process forked, and held the locks of its kernel and of the announcement."""
    needs_cupy()
    code = """
from cupyq.ops.norm import INSTANCES
wanted = INSTANCES[0]
real, begun = _kernels.compile_instance, threading.Event()
def never(*arguments):
    begun.set()
    threading.Event().wait()
_kernels.compile_instance = never
threading.Thread(target=lambda: _kernels.compiled(wanted, "sm_80"), daemon=True).start()
begun.wait()
_kernels.compile_instance = real
assert _kernels._announcing.locked()
def names():
    with _kernels.announced("work"):
        assert _kernels._announcing.locked()
    return _kernels.compiled(wanted, "sm_80")[0].suffix
calls = {"compiled": names}
"""
    lines = run(code + CHILD + "sys.stdout.flush()\nos._exit(0)", CUPYQ_CACHE_DIR=str(tmp_path))
    assert lines == ["compiled gave .cubin", "child 0"]


class Library:
    """libcuda as far as is_cuda_used() asks it."""

    def __init__(self, status):
        self.status = status

    def cuDeviceGetCount(self, count):
        count._obj.value = 0
        return self.status


@pytest.mark.parametrize(("status", "is_used"), [(0, True), (3, False), (100, False)])  # success, not initialized, no device
def test_the_driver_is_asked_and_never_loaded(monkeypatch, status, is_used):
    def library(name, mode):
        assert name == "libcuda.so.1" and mode == os.RTLD_NOLOAD
        return Library(status)

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert _fork.is_cuda_used() is is_used


def test_without_a_driver_nobody_has_used_cuda(monkeypatch):
    def library(name, mode):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert _fork.is_cuda_used() is False
    monkeypatch.delattr(os, "RTLD_NOLOAD")
    assert _fork.is_cuda_used() is False


def test_what_was_not_forked_may_use_a_gpu(monkeypatch):
    _fork.refuse()
    monkeypatch.setattr(_fork, "_is_cut_off", True)
    with pytest.raises(BackendError, match="forked from one that had used CUDA") as error:
        _fork.refuse()
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_a_child_computes_on_the_gpu_where_its_parent_only_imported():
    code = """
import cupy
calls = {
    "used": lambda: _fork.is_cuda_used(),
    "op": lambda: cupyq.ops.add(cupy.ones((1, 2), np.float32), cupy.ones((1, 2), np.float32)).get().tolist(),
    "model": lambda: (model := cupyq.load_model(MODEL)).backend + str(model.forward([1, 2]).shape),
    "used by now": lambda: _fork.is_cuda_used(),
}
"""
    lines = run(code + CHILD)
    expected = ["used gave False", "op gave [[2.0, 2.0]]", "model gave cupy(1, 2, 1024)", "used by now gave True", "child 0"]
    assert lines == expected


@pytest.mark.gpu
def test_a_child_of_a_process_that_used_the_gpu_is_told_so():
    """In seconds, whatever it calls; and the parent goes on, with the same results."""
    code = """
import cupy
from cupyq.generate import generate
assert not _fork.is_cuda_used()
model = cupyq.load_model(MODEL)
assert _fork.is_cuda_used()
array = cupy.ones((2, 64), np.float32)
decoder = model.decoder(max_len=64, seed=1)
decoder.start([[1, 2, 3]])
before = decoder.run(8).get().tolist()
expected = model.forward([1, 2, 3]).get()
calls = {
    "count": _device.count,
    "load": lambda: cupyq.load_model(MODEL),
    "op": lambda: cupyq.ops.rms_norm(array, array[0]),
    "op in place": lambda: cupyq.ops.add(array, array, out=array),
    "forward": lambda: model.forward([1, 2, 3]),
    "step": decoder.step,
    "decoder": lambda: model.decoder(max_len=64),
    "generate": lambda: generate(model, [1, 2, 3], max_new_tokens=4),
}
"""
    after = """
decoder.start([[1, 2, 3]])
print("parent", decoder.run(8).get().tolist() == before, (model.forward([1, 2, 3]).get() == expected).all())
"""
    lines = run(code + NUMPY_CALLS + CHILD + after)
    assert len(lines) == 12
    for line in lines[:8]:
        assert NO_GPU in line
    assert lines[8:] == [*NUMPY_LINES, "child 0", "parent True True"]
