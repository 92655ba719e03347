"""Ops on arrays of PyTorch, JAX, Numba and CuPy: the same bits, in order without the host, in graphs, in jits, in one pool.

How arrays enter and leave one by one is in test_foreign.py.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import bfloat16, float16, float32, random, same_bits
from random_layers import random_exl2

import cupyq
from cupyq import _arrays, _foreign, interop, ops
from cupyq._arrays import check
from cupyq._foreign import accepts_dlpack
from cupyq.errors import BackendError

int32 = np.dtype(np.int32)


@pytest.fixture
def torch(cupy):
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("this PyTorch finds no GPU")
    return module


@pytest.fixture
def jax(cupy):
    module = pytest.importorskip("jax")
    try:
        module.devices("gpu")
    except RuntimeError:
        pytest.skip("this JAX finds no GPU")
    return module


@pytest.fixture
def numba(cupy):
    """numba.cuda"""
    module = pytest.importorskip("numba.cuda", exc_type=ImportError)
    if not module.is_available():
        pytest.skip("this Numba finds no GPU")
    return module


def one_line(raised):
    assert "\n" not in str(raised.value)


# --- the same bits from every framework -------------------------------------------------------------------------------

NORM = {"x": random(0, (7, 96), float16), "weight": random(1, (96,), float16)}
GATED = {"gate": random(2, (3, 160), float32), "up": random(3, (3, 160), float32)}
ROPE = {
    "x": random(4, (2, 3, 4, 64), float16),
    "sin": random(5, (16, 32), float32),
    "cos": random(6, (16, 32), float32),
    "positions": np.array([3, 9], int32),
}
ATTENTION = {
    "q": random(7, (2, 1, 8, 64), float16),
    "k": random(8, (2, 40, 2, 64), float16),
    "v": random(9, (2, 40, 2, 64), float16),
    "kv_lengths": np.array([40, 17], int32),
}
APPEND = {
    "k": random(10, (2, 1, 2, 64), float16),
    "v": random(11, (2, 1, 2, 64), float16),
    "k_cache": random(12, (2, 5, 2, 64), float16),
    "v_cache": random(13, (2, 5, 2, 64), float16),
    "positions": np.array([4, 0], int32),
}
LOGITS = {"logits": random(14, (3, 500), float32, 3.0)}
MATRIX = random_exl2(np.random.default_rng(15), (4, 3), n=64, has_bias=True)
PRODUCT = {"x": random(16, (5, 32 * 9), float16), **MATRIX}


def product(x, **tensors):
    return ops.qmatmul(x, cupyq.QMatrix.from_tensors(tensors))


def appended(k, v, k_cache, v_cache, positions):
    assert ops.kv_append(k, v, k_cache, v_cache, positions) is None
    return k_cache, v_cache


PROBLEMS = {
    "rms_norm": (ops.rms_norm, NORM),
    "silu_mul": (ops.silu_mul, GATED),
    "rope": (ops.rope, ROPE),
    "qmatmul": (product, PRODUCT),
    "attention": (ops.attention, ATTENTION),
    "sample": (functools.partial(ops.sample, temperature=0.9, top_p=0.8, seed=4), LOGITS),
    "kv_append": (appended, APPEND),
}
IN_PLACE = {"kv_append"}


def on_framework(name, array):
    """A copy of the array on the GPU, as an array of that framework."""
    if name == "torch":
        import torch

        return torch.from_numpy(array.copy()).cuda()
    if name == "jax":
        import jax

        return jax.device_put(array, jax.devices("gpu")[0])
    if name == "numba":
        from numba import cuda

        return cuda.to_device(array)
    import cupy

    copied = cupy.asarray(array)
    return Interface(copied) if name == "interface" else copied


def on_host(array):
    """Its values as a NumPy array, waited for."""
    if isinstance(array, Interface):
        return array.array.get()
    if hasattr(array, "copy_to_host"):  # of Numba
        return array.copy_to_host()
    if hasattr(array, "cpu"):
        return array.cpu().numpy()
    return array.get() if hasattr(array, "get") else np.asarray(array)


class Interface:
    """A CuPy array that speaks the CUDA array interface alone, and says on which stream its values come about."""

    def __init__(self, array, stream=None, is_read_only=False, **more):
        self.array, self.stream, self.is_read_only, self.more = array, stream, is_read_only, more

    @property
    def __cuda_array_interface__(self):
        described = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.data.ptr, self.is_read_only),
            "version": 3,
        }
        return described | ({} if self.stream is None else {"stream": self.stream}) | self.more


def package(array):
    return type(array).__module__.split(".")[0]


@functools.cache
def expected_bits(problem):
    function, inputs = PROBLEMS[problem]
    result = function(**{key: on_framework("cupy", value) for key, value in inputs.items()})
    results = result if isinstance(result, tuple) else (result,)
    return [array.get() for array in results]


@pytest.mark.gpu
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("framework", ["torch", "jax", "numba", "interface"])
def test_an_op_gives_the_bits_that_it_gives_on_cupy_arrays(framework, problem, request):
    if framework != "interface":
        request.getfixturevalue(framework)
    function, inputs = PROBLEMS[problem]
    if framework == "jax" and problem in IN_PLACE:
        arrays = {key: on_framework("jax", value) for key, value in inputs.items()}
        with pytest.raises(ValueError, match="k_cache is a JAX array, which is immutable"):
            function(**arrays)
        assert all(same_bits(on_host(arrays[key]), value) for key, value in inputs.items())
        return
    arrays = {key: on_framework(framework, value) for key, value in inputs.items()}
    result = function(**arrays)
    results = result if isinstance(result, tuple) else (result,)
    home = {"interface": "test_interop" if problem in IN_PLACE else "cupy", "jax": "jaxlib"}.get(framework, framework)
    assert {package(array) for array in results} <= {home, "jax" if framework == "jax" else home}
    for array, wanted in zip(results, expected_bits(problem), strict=True):
        assert same_bits(on_host(array), wanted)
    if problem not in IN_PLACE:  # inputs are as they were
        assert all(same_bits(on_host(arrays[key]), value) for key, value in inputs.items())


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "numba", "interface"])
def test_what_is_given_as_out_is_written_and_returned(framework, request):
    if framework != "interface":
        request.getfixturevalue(framework)
    arrays = {key: on_framework(framework, value) for key, value in NORM.items()}
    out = on_framework(framework, np.zeros_like(NORM["x"]))
    assert ops.rms_norm(**arrays, out=out) is out
    assert same_bits(on_host(out), expected_bits("rms_norm")[0])


@pytest.mark.gpu
def test_an_empty_array_comes_by_the_interface(cupy):
    empty = Interface(cupy.empty((0, 96), float16))
    assert ops.rms_norm(empty, on_framework("cupy", NORM["weight"])).shape == (0, 96)


# --- order without the host -------------------------------------------------------------------------------------------


def spin(cupy, milliseconds=100):
    """A kernel for CuPy's current stream that takes at least so long."""
    source = """extern "C" __global__ void spin(long long nanoseconds) {
        long long start, now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
        do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (now - start < nanoseconds);
    }"""
    cupy.RawKernel(source, "spin")((1,), (1,), (np.int64(milliseconds * 1_000_000),))


@pytest.mark.gpu
def test_a_step_on_a_side_stream_of_torch_is_queued_and_not_waited_for(torch, cupy):
    """The input is written behind a long kernel; every op reads what the one before it wrote."""
    matrix = cupyq.QMatrix.from_tensors({key: on_framework("torch", value) for key, value in MATRIX.items()})
    x, weight = (on_framework("torch", random(20, shape, float16)) for shape in ((5, matrix.k), (matrix.k,)))
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()

    def step():
        normed = ops.rms_norm(late, weight)
        y = ops.qmatmul(normed, matrix)
        return ops.silu_mul(y, y)

    with torch.cuda.stream(stream):
        late.copy_(x)
        expected = step()  # kernels are loaded, and the pool has memory for this stream
        torch.cuda.synchronize()
        expected = expected.clone()
        late.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # clock cycles, about 0.5 s
        late.copy_(x)
        result = step()
        done.record(stream)
        was_pending = not done.query()
    done.synchronize()
    assert was_pending, "the host waited for the GPU, or the wait was over before the launches"
    assert torch.equal(result, expected) and expected.abs().sum() > 0


@pytest.mark.gpu
def test_an_op_waits_for_the_stream_that_the_interface_names_and_the_host_does_not(cupy):
    weight, values = on_framework("cupy", NORM["weight"]), on_framework("cupy", NORM["x"])
    late = cupy.zeros_like(values)
    with cupy.cuda.Stream(non_blocking=True):
        spin(cupy, 0)  # compiled
    side, mine = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    out = cupy.zeros_like(values)
    cupy.cuda.runtime.deviceSynchronize()
    with side:
        spin(cupy, 500)  # longer than a busy machine keeps the host from its work
        late.data.copy_from_device_async(values.data, values.nbytes)
    with mine:
        ops.rms_norm(Interface(late, side.ptr), weight, out=out)
        was_pending = not side.done
        mine.synchronize()
    assert was_pending, "the host waited for the stream of the array"
    assert same_bits(out.get(), expected_bits("rms_norm")[0])


@pytest.mark.gpu
def test_arrays_of_numba_on_a_stream_of_its_own_are_in_order(numba, cupy):
    stream, expected = numba.stream(), expected_bits("rms_norm")[0]
    weight = on_framework("numba", NORM["weight"])
    ops.rms_norm(on_framework("numba", NORM["x"]), weight)  # loads the kernel
    values = cupy.asarray(NORM["x"])
    cupy.cuda.Device().synchronize()
    for _ in range(2):
        x = numba.device_array(values.shape, values.dtype, stream=stream)
        place = x.__cuda_array_interface__["data"][0]
        with (its := cupy.cuda.Stream.from_external(_foreign._StreamHandle(int(stream)))):
            spin(cupy, 300)
        # What Numba copies from the host it waits for.
        cupy.cuda.runtime.memcpyAsync(place, values.data.ptr, values.nbytes, cupy.cuda.runtime.memcpyDeviceToDevice, its.ptr)
        assert not its.done
        result = ops.rms_norm(x, weight)
        assert not its.done
        assert package(result) == "numba" and same_bits(result.copy_to_host(), expected)


# --- graphs of PyTorch ------------------------------------------------------------------------------------------------


def decoding_step(torch):
    """(inputs to be refilled, results, function that computes those into memory of their own)"""
    tensors = {key: on_framework("torch", value) for key, value in MATRIX.items()}
    matrix = cupyq.QMatrix.from_tensors(tensors)
    x, weight = torch.zeros(5, matrix.k, dtype=torch.float16, device="cuda"), torch.ones(matrix.k, device="cuda").half()
    normed, y = torch.empty_like(x), torch.empty(5, matrix.n, dtype=torch.float16, device="cuda")
    product_space = torch.zeros(ops.qmatmul_workspace_size(matrix, 5), dtype=torch.float32, device="cuda")
    caches = [torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda") for _ in range(2)]
    position, length = (torch.full((1,), value, dtype=torch.int32, device="cuda") for value in (0, 1))
    attended = torch.empty(1, 1, 5, 64, dtype=torch.float16, device="cuda")
    attention_space = torch.zeros(ops.attention_workspace_size(64), dtype=torch.float32, device="cuda")

    def step():
        ops.rms_norm(x, weight, out=normed)
        ops.qmatmul(normed, matrix, out=y, workspace=product_space)
        heads = y.view(1, 1, 5, 64)
        ops.kv_append(heads[:, :, :1], heads[:, :, 1:2], *caches, position)
        ops.attention(heads, *caches, kv_lengths=length, out=attended, workspace=attention_space)

    return x, (normed, y, attended, *caches), step


@pytest.mark.gpu
def test_ops_given_out_are_captured_by_torch_and_replayed_on_new_inputs(torch):
    x, results, step = decoding_step(torch)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()  # loads the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (30, 31):
        x.copy_(torch.from_numpy(random(seed, tuple(x.shape), float16)))
        step()
        torch.cuda.synchronize()
        expected = [array.clone() for array in results]
        for array in results:
            array.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for array, wanted in zip(results, expected, strict=True):
            assert torch.equal(array, wanted) and wanted.abs().sum() > 0


@pytest.mark.gpu
def test_ops_without_out_are_captured_where_cupy_allocates_from_torch(torch, cupy):
    """What they return is memory of the graph, which keeps its address and its values."""
    x, weight = (on_framework("torch", value) for value in NORM.values())
    with cupy.cuda.using_allocator(interop.torch_allocator()):
        ops.silu(ops.rms_norm(x, weight))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.silu(ops.rms_norm(x, weight))
        others = [torch.full_like(x, 7) for _ in range(50)]  # what would take the memory if the graph did not hold it
        for seed in (32, 33):
            x.copy_(torch.from_numpy(random(seed, tuple(x.shape), float16)))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(result, ops.silu(ops.rms_norm(x, weight)))
        assert all(torch.all(other == 7) for other in others)


# --- one pool of memory -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cupy_takes_memory_from_torch_and_gives_it_back(torch, cupy):
    torch.cuda.init()
    before, pool = torch.cuda.memory_allocated(), cupy.get_default_memory_pool().used_bytes()
    with cupy.cuda.using_allocator(interop.torch_allocator()):
        array = cupy.zeros(1 << 20, np.uint8)
        assert torch.cuda.memory_allocated() == before + (1 << 20)
        assert cupy.get_default_memory_pool().used_bytes() == pool
        view = array[:100].reshape(10, 10)
        del array
        assert torch.cuda.memory_allocated() == before + (1 << 20)
        assert cupy.empty(0, np.uint8).size == 0
    assert not view.any()  # it outlives the allocator's use
    del view
    assert torch.cuda.memory_allocated() == before
    assert interop.torch_allocator() is interop.torch_allocator()


@pytest.mark.gpu
def test_results_on_torch_memory_leak_nothing(torch, cupy):
    matrix = cupyq.QMatrix.from_tensors({key: on_framework("torch", value) for key, value in MATRIX.items()})
    x, weight = on_framework("torch", PRODUCT["x"]), torch.ones(matrix.k, device="cuda").half()
    with cupy.cuda.using_allocator(interop.torch_allocator()):
        result = ops.qmatmul(ops.rms_norm(x, weight), matrix)
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(100):
            result = ops.qmatmul(ops.rms_norm(x, weight), matrix)
        assert torch.cuda.memory_allocated() == allocated and torch.cuda.memory_reserved() == reserved
        size = result.numel() * 2
        del result
        assert torch.cuda.memory_allocated() <= allocated - size


@pytest.mark.gpu
def test_memory_belongs_to_the_stream_that_the_op_ran_on(torch, cupy):
    """A block that torch freed on one stream is not given out on another before the first is done with it."""
    x, weight = (on_framework("torch", value) for value in NORM.values())
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with cupy.cuda.using_allocator(interop.torch_allocator()):
        for stream in streams:
            with torch.cuda.stream(stream):
                ops.rms_norm(x, weight)
        torch.cuda.synchronize()
        addresses = []
        for stream in streams:
            with torch.cuda.stream(stream):
                first = ops.rms_norm(x, weight)
                address = first.data_ptr()
                del first
                again = ops.rms_norm(x, weight)
                assert again.data_ptr() == address
                addresses.append(address)
                del again
    torch.cuda.synchronize()
    assert addresses[0] != addresses[1]


@pytest.mark.gpu
def test_too_much_memory_is_the_error_that_cupy_raises(torch, cupy):
    with cupy.cuda.using_allocator(interop.torch_allocator()):
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating") as raised:
            cupy.empty(1 << 45, np.uint8)
    assert isinstance(raised.value.__cause__, torch.cuda.OutOfMemoryError)


@pytest.mark.gpu
def test_a_process_ends_in_peace_with_arrays_on_torch_memory_and_graphs_of_a_model(torch):
    """A decoder's graph keeps its own pool: the same tokens, whoever gives CuPy the rest of its memory."""
    code = """
import cupy, torch, cupyq
from cupyq import interop

def drawn():
    decoder = model.decoder(batch=1, max_len=32, seed=5)
    first = decoder.start([[1, 2, 3]])
    return [*first.get().tolist(), *decoder.run(8).get()[0].tolist()], decoder

folder = "examples/models/shakespeare-exl2-4.0"
model = cupyq.load_model(folder, backend="cupy")
before, _ = drawn()
cupy.cuda.set_allocator(interop.torch_allocator())
model = cupyq.load_model(folder, backend="cupy")
assert torch.cuda.memory_allocated() > 1 << 18
x = torch.ones(4, 64, device="cuda")
kept = [cupyq.ops.rms_norm(x, torch.ones(64, device="cuda")), cupy.ones(3)]
after, decoder = drawn()
assert before == after, (before, after)
print("done")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "rror" not in done.stderr and "xception" not in done.stderr, done.stderr


class StandInForTorch:
    """What the allocator asks of PyTorch."""

    __version__ = "2.11.0"

    class OutOfMemoryError(RuntimeError):
        pass

    def __init__(self, is_available=True):
        self.calls = []
        self.cuda = SimpleNamespace(
            is_available=lambda: is_available,
            init=lambda: self.calls.append("init"),
            caching_allocator_alloc=self.take,
            caching_allocator_delete=lambda address: self.calls.append(("delete", address)),
            memory_allocated=lambda device: 100 + device,
            OutOfMemoryError=self.OutOfMemoryError,
        )

    def take(self, size, device, stream):
        if size > 1000:
            raise self.OutOfMemoryError("tried to allocate\nmuch")
        self.calls.append(("alloc", size, device, stream))
        return 4096 + size


class StandInForCupy(SimpleNamespace):
    class OutOfMemoryError(MemoryError):
        pass

    def __init__(self):
        self.streams = {0: 11, 1: 12}
        super().__init__(
            ndarray=_HostArray,
            cuda=SimpleNamespace(
                get_current_stream=lambda device: SimpleNamespace(ptr=self.streams[device]),
                PythonFunctionAllocator=lambda malloc, free: SimpleNamespace(malloc=(malloc, free)),
                memory=SimpleNamespace(OutOfMemoryError=self.OutOfMemoryError),
            ),
        )


@pytest.fixture
def stand_ins(monkeypatch):
    """(torch, cupy) as the allocator finds them."""
    torch, cupy = StandInForTorch(), StandInForCupy()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(interop, "require_cupy", lambda: cupy)
    interop.torch_allocator.cache_clear()
    yield torch, cupy
    interop.torch_allocator.cache_clear()


def test_the_allocator_takes_memory_for_the_current_stream_of_the_device(stand_ins, monkeypatch):
    torch, cupy = stand_ins
    at_exit = []
    monkeypatch.setattr(interop.atexit, "register", lambda *call: at_exit.append(call))
    malloc, free = interop.torch_allocator()
    assert malloc(512, 1) == 4608
    cupy.streams[0] = 0
    malloc(7, 0)
    free(4608, 1)
    assert torch.calls == ["init", ("alloc", 512, 1, 12), ("alloc", 7, 0, 0), ("delete", 4608)]
    with pytest.raises(cupy.OutOfMemoryError, match="2000, 101") as raised:
        malloc(2000, 1)
    assert type(raised.value.__cause__) is torch.OutOfMemoryError
    for function, *arguments in at_exit:
        function(*arguments)
    free(4608, 1)  # the interpreter ends: the memory goes with the process
    assert len(torch.calls) == 4


def test_torch_that_is_absent_or_has_no_gpu_is_named(stand_ins, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", StandInForTorch(is_available=False))
    with pytest.raises(BackendError, match="PyTorch 2.11.0 finds no GPU to allocate from") as raised:
        interop.torch_allocator()
    one_line(raised)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match="PyTorch cannot be imported .*: install it") as raised:
        interop.torch_allocator()
    one_line(raised)


def test_jax_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.buffer_callback", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(BackendError, match="JAX with jax.experimental.buffer_callback cannot be imported") as raised:
        interop.jax_callback(ops.silu, np.zeros(3))
    one_line(raised)


# --- the CUDA array interface, by a stand-in for CuPy on host memory --------------------------------------------------


class _HostArray(np.ndarray):
    """Host memory as CuPy would view that of a GPU."""

    def __new__(cls, shape, dtype, memptr, strides=None):
        memory = memptr[0]
        content = (ctypes.c_char * memory.size).from_address(memory.ptr) if memory.size else bytearray()
        return super().__new__(cls, shape, dtype, content, 0, strides)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0, mem=SimpleNamespace())

    @property
    def _c_contiguous(self):
        return self.flags.c_contiguous


class Stream:
    def __init__(self, ptr, log):
        self.ptr, self.log = ptr, log

    def wait_event(self, event):
        self.log.append(f"{self.ptr} waits for {event.recorded_on}")


class StandInForCudaArrays:
    """CuPy on host memory: which stream waits for which is noted, and nothing there makes the host wait."""

    def __init__(self, monkeypatch, current):
        self.log, self.current = [], Stream(current, None)
        self.current.log = self.log
        self.ndarray, outer = _HostArray, self

        class Event:
            def __init__(self, disable_timing):
                assert disable_timing

            def record(self, stream=None):
                self.recorded_on = (stream or outer.current).ptr

            done = False

        self.device = 0
        runtime = SimpleNamespace(
            getDevice=lambda: self.device,
            pointerGetAttributes=lambda address: SimpleNamespace(device=0),
            CUDARuntimeError=RuntimeError,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Event=Event,
            Device=self.entered_device,
            get_current_stream=lambda device=None: self.current,
            UnownedMemory=lambda ptr, size, owner, device: SimpleNamespace(ptr=ptr, size=size, owner=owner),
            MemoryPointer=lambda memory, offset: (memory, offset),
        )
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setattr(_foreign, "require_cupy", lambda: self)
        monkeypatch.setattr(_foreign, "_require_gpu", lambda device, name: None)
        monkeypatch.setattr(_foreign, "stream_at", self.stream_at)
        for module, known in ((_arrays, "_array_types"), (_foreign, "_in_flight"), (_foreign, "_idle")):
            monkeypatch.setattr(module, known, type(getattr(module, known))())

    @contextlib.contextmanager
    def entered_device(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    def stream_at(self, pointer, device):
        """A stream that is current within `with`."""
        outer, stream = self, Stream(pointer, self.log)

        class Entered(Stream):
            def __enter__(self):
                self.before, outer.current = outer.current, stream

            def __exit__(self, *error):
                outer.current = self.before

        return Entered(pointer, self.log)


class OnHost:
    """A NumPy array that passes for one of a GPU by the interface."""

    def __init__(self, array, **more):
        self.array, self.more = array, more

    @property
    def __cuda_array_interface__(self):
        data = (self.array.ctypes.data, self.more.get("read_only", False))
        described = {"shape": self.array.shape, "typestr": self.array.dtype.str, "data": data, "version": 3}
        return described | {"strides": self.array.strides, "stream": None, "mask": None} | self.more


@accepts_dlpack
def double(x, *, out=None):
    """2 x, in place in out."""
    check(x, "x")
    out = np.empty_like(x) if out is None else out
    np.multiply(x, 2, out=out)
    return out


@pytest.mark.parametrize(
    ("stream", "current", "waits"),
    [
        (None, 0, []),
        (1, 0, []),  # both the legacy default stream
        (1, 33, ["33 waits for 1"]),
        (33, 33, []),
        (77, 0, ["0 waits for 77"]),
        (2, 0, ["0 waits for 2"]),
    ],
)
def test_the_stream_of_an_interface_is_waited_for_on_the_gpu(monkeypatch, stream, current, waits):
    cupy = StandInForCudaArrays(monkeypatch, current)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = double(OnHost(values, stream=stream))
    assert np.asarray(result).tolist() == (2 * values).tolist() and cupy.log == waits
    out = OnHost(np.zeros_like(values))
    assert double(OnHost(values), out=out) is out and out.array.tolist() == (2 * values).tolist()


class Tensor:
    """A NumPy array that passes for a contiguous tensor of PyTorch on GPU 1."""

    __module__ = "torch"
    requires_grad = False

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options):
        raise BufferError("this way takes too long")

    def get_device(self):
        return 1

    def is_contiguous(self):
        return True

    def data_ptr(self):
        return self.array.ctypes.data

    def numel(self):
        return self.array.size


@pytest.mark.parametrize(("device", "stream"), [(1, 55), (0, 55), (1, 0)])
def test_an_op_on_tensors_runs_on_their_device_and_on_the_stream_that_torch_works_on(monkeypatch, device, stream):
    cupy = StandInForCudaArrays(monkeypatch, 0)
    cupy.device, before, seen = device, cupy.current, []
    torch = SimpleNamespace(_C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: stream if device == 1 else None))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(_foreign, "_torch_dtypes", lambda: {np.dtype(np.float32): np.dtype(np.float32)})

    @accepts_dlpack
    def triple(x, factor, *, out=None):
        seen.append((cupy.device, cupy.current.ptr, type(x), factor))
        np.multiply(x, factor, out=out)
        return out, factor

    x, out = Tensor(np.arange(3, dtype=np.float32)), Tensor(np.zeros(3, np.float32))
    result, factor = triple(x, factor=3, out=out)
    assert result is out and factor == 3 and out.array.tolist() == [0, 3, 6]
    assert triple(x, 2, out=out)[0] is out and out.array.tolist() == [0, 2, 4]
    assert seen == [(1, stream, _HostArray, 3), (1, stream, _HostArray, 2)]
    assert cupy.device == device and cupy.current is before
    for wrong in (lambda: triple(x, 2, 3, out=out), lambda: triple(x, 2, x=x), lambda: triple(x, 2, end=out)):
        with pytest.raises(TypeError, match="too many positional|multiple values|unexpected keyword"):
            wrong()
    with pytest.raises(TypeError, match="factor"):
        triple(x, out=out)
    assert len(seen) == 2


def test_arrays_of_an_interface_that_are_refused(monkeypatch):
    cupy = StandInForCudaArrays(monkeypatch, 0)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    cases = [
        ({"x": OnHost(values), "out": OnHost(values, read_only=True)}, ValueError, "out is read-only and would be written"),
        ({"x": OnHost(values, mask=object())}, TypeError, "x has a mask"),
        ({"x": OnHost(values.T)}, ValueError, "x must be C-contiguous, got strides"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words) as raised:
            double(**arguments)
        one_line(raised)
    cupy.cuda.runtime.pointerGetAttributes = lambda address: SimpleNamespace(device=-2)
    with pytest.raises(TypeError, match="x is not in the memory of a CUDA GPU") as raised:
        double(OnHost(values))
    one_line(raised)
    assert values.tolist() == [[0, 1, 2], [3, 4, 5]]


# --- inside functions of JAX ------------------------------------------------------------------------------------------


def check_inside_a_jit(jax, device, problem, expected):
    """The op between other work of one compiled function, called twice: no values are left over from the first."""
    function, inputs = PROBLEMS[problem]
    arrays = [jax.device_put(value, device) for value in inputs.values()]
    like = jax.ShapeDtypeStruct(expected.shape, expected.dtype)

    @jax.jit
    def compiled(*arrays):
        inner = interop.jax_callback(lambda *arrays, out: function(**dict(zip(inputs, arrays, strict=True)), out=out), like)
        return inner(*(array + array.dtype.type(0) for array in arrays)) * 1

    for _ in range(2):
        result = compiled(*arrays)
        assert result.dtype == expected.dtype and same_bits(np.asarray(result), expected)
    assert all(same_bits(np.asarray(array), value) for array, value in zip(arrays, inputs.values(), strict=True))


def check_aliases(jax, device):
    """kv_append inside a jit: the caches that come out are new ones with the tokens in them."""
    k, v, *caches, positions = (jax.device_put(value, device) for value in APPEND.values())
    expected = {key: value.copy() for key, value in APPEND.items()}
    ops.kv_append(**expected)

    @jax.jit
    def append(k, v, k_cache, v_cache, positions):
        def write(k, v, k_cache, v_cache, positions, out):
            ops.kv_append(k, v, *out, positions)

        aliases = {2: 0, 3: 1}
        return interop.jax_callback(write, (k_cache, v_cache), input_output_aliases=aliases)(k, v, k_cache, v_cache, positions)

    for result, name in zip(append(k, v, *caches, positions), ("k_cache", "v_cache"), strict=True):
        assert same_bits(np.asarray(result), expected[name])
    assert same_bits(np.asarray(caches[0]), APPEND["k_cache"])


def check_pure_callback(jax, device, function):
    """A host function inside a jit: values come to the host and go back."""
    x, weight = (jax.device_put(value, device) for value in NORM.values())
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return np.asarray(jax.jit(lambda x, weight: jax.pure_callback(function, like, x, weight) * 1)(x, weight))


if importlib.util.find_spec("jax"):

    @pytest.mark.parametrize("problem", ["rms_norm", "silu_mul", "rope", "attention"])
    def test_an_op_inside_a_jit_on_the_host(problem):
        import jax

        function, inputs = PROBLEMS[problem]
        check_inside_a_jit(jax, jax.devices("cpu")[0], problem, function(**inputs))

    def test_bfloat16_inside_a_jit_on_the_host():
        import jax

        x = jax.device_put(random(40, (3, 32), bfloat16), jax.devices("cpu")[0])
        result = jax.jit(lambda x: interop.jax_callback(ops.silu, x)(x))(x)
        assert same_bits(np.asarray(result), ops.silu(np.asarray(x)))

    def test_caches_inside_a_jit_on_the_host():
        import jax

        check_aliases(jax, jax.devices("cpu")[0])

    def test_inputs_of_a_callback_on_the_host_are_not_writable():
        import jax

        x = jax.device_put(NORM["x"], jax.devices("cpu")[0])
        inner = interop.jax_callback(lambda x, out: ops.silu(x, out=x), x)
        with pytest.raises(Exception, match="out is read-only and would be written"):
            jax.block_until_ready(inner(x))

    def test_an_op_without_a_callback_inside_a_jit_says_what_to_use():
        import jax

        with pytest.raises(TypeError, match=r"x is a \w+ without values: in jax.jit use cupyq.interop.jax_callback") as raised:
            jax.jit(ops.silu)(NORM["x"])
        assert "\n" not in str(raised.value).split("\n----")[0]

    def test_an_op_as_a_pure_callback_on_the_host():
        import jax

        found = check_pure_callback(jax, jax.devices("cpu")[0], ops.rms_norm)
        assert same_bits(found, ops.rms_norm(**NORM))


@pytest.mark.gpu
@pytest.mark.parametrize("problem", ["rms_norm", "silu_mul", "rope", "attention", "sample"])
def test_an_op_inside_a_jit_on_the_gpu(jax, problem):
    check_inside_a_jit(jax, jax.devices("gpu")[0], problem, expected_bits(problem)[0])


@pytest.mark.gpu
def test_a_product_with_bound_weights_inside_a_jit(jax):
    matrix = cupyq.QMatrix.from_tensors({key: on_framework("jax", value) for key, value in MATRIX.items()})
    like = jax.ShapeDtypeStruct((5, matrix.n), np.float16)
    inner = interop.jax_callback(lambda x, out: ops.qmatmul(x, matrix, out=out), like)
    result = jax.jit(lambda x: inner(x) * 1)(on_framework("jax", PRODUCT["x"]))
    assert same_bits(np.asarray(result), expected_bits("qmatmul")[0])


@pytest.mark.gpu
def test_bfloat16_inside_a_jit_on_the_gpu(jax, cupy):
    values = random(40, (3, 32), bfloat16)
    x = jax.device_put(values, jax.devices("gpu")[0])
    result = jax.jit(lambda x: interop.jax_callback(ops.silu, x)(x))(x)
    assert same_bits(np.asarray(result), ops.silu(cupy.asarray(values)).get())


@pytest.mark.gpu
def test_caches_inside_a_jit_on_the_gpu(jax):
    check_aliases(jax, jax.devices("gpu")[0])


@pytest.mark.gpu
def test_a_callback_runs_where_xla_has_come_to_it(jax, cupy):
    """On XLA's stream, behind what computes its input and before what reads its result: many times over."""
    ones = jax.device_put(np.ones((1024, 1024), np.float32), jax.devices("gpu")[0])
    x, weight = (on_framework("jax", value) for value in NORM.values())
    streams = set()

    def norm(x, weight, out):
        streams.add(cupy.cuda.get_current_stream().ptr)
        ops.rms_norm(x, weight, out=out)

    @jax.jit
    def late(x, weight, ones):
        for _ in range(10):
            ones = ones @ ones / 1024  # stays one
        return interop.jax_callback(norm, x)(x * ones[0, 0].astype(x.dtype), weight) * 1

    for _ in range(5):
        assert same_bits(np.asarray(late(x, weight, ones)), expected_bits("rms_norm")[0])
    assert streams and 0 not in streams, "XLA works on streams of its own"
    assert cupy.cuda.get_current_stream().ptr == 0


@pytest.mark.gpu
def test_a_pure_callback_may_use_the_gpu(jax, cupy):
    def norm(x, weight):
        return ops.rms_norm(cupy.asarray(np.asarray(x)), cupy.asarray(np.asarray(weight))).get()

    found = check_pure_callback(jax, jax.devices("gpu")[0], norm)
    assert same_bits(found, expected_bits("rms_norm")[0])
