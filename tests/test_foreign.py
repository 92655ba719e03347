"""The edge where arrays of other frameworks enter and leave, one by one."""

import gc
import importlib.util
import threading
import time
import weakref
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cupyq import _capsules, _foreign
from cupyq._arrays import FLOATS, bfloat16, check, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq.ops.norm import rms_norm

FRAMEWORKS = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]

# --- DLPack -----------------------------------------------------------------------------------------------------------


class Foreign:
    """An array of a framework nobody knows: DLPack, and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@accepts_dlpack
def double(x, weight=None, *, out=None):
    """2 x, in place in out: the simplest op that has everything the edge looks at."""
    xp = namespace(x=x, weight=weight, out=out)
    out = output(xp, out, x.shape, x.dtype)
    out[...] = 2 * x
    return out


@accepts_dlpack(writes=("x",))
def double_in_place(x):
    """2 x in x, and nothing returned beside it."""
    check(x, "x", writes=True)
    x *= 2
    return x, x[:1], 3


def test_numpy_passes_untouched():
    x = np.arange(3, dtype=np.float32)
    out = np.empty_like(x)
    assert double(x, out=out) is out and out.tolist() == [0, 2, 4]
    assert double.__name__ == "double" and "in place in out" in double.__doc__


def test_an_unknown_framework_gets_numpy_back():
    x = np.arange(3, dtype=np.float32)
    result = double(Foreign(x))
    assert type(result) is np.ndarray and result.tolist() == [0, 2, 4]
    out = Foreign(np.empty_like(x))
    assert double(x, out=out) is out and out.array.tolist() == [0, 2, 4]
    assert double(Foreign(x), None, out=None).tolist() == [0, 2, 4]


def test_a_foreign_array_is_written_where_the_op_says_so():
    x = Foreign(np.arange(3, dtype=np.float32))
    whole, part, number = double_in_place(x)
    assert whole is x and x.array.tolist() == [0, 2, 4] and number == 3
    assert type(part) is np.ndarray and part.tolist() == [0]


def test_a_read_only_foreign_array_is_not_written():
    array = np.arange(3, dtype=np.float32)
    array.flags.writeable = False

    class ReadOnly(Foreign):
        def __dlpack__(self, *, max_version=None, **options):
            return self.array.__dlpack__(max_version=(1, 0), **options)

    with pytest.raises(ValueError, match="x is read-only"):
        double_in_place(ReadOnly(array))
    assert array.tolist() == [0, 1, 2]


def test_an_array_that_dlpack_cannot_carry_is_named():
    class Broken(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("cannot export\nat all")

    with pytest.raises(TypeError, match=r"weight \(Broken\) cannot be taken by DLPack: cannot export$"):
        double(np.zeros(3, np.float32), Broken(np.zeros(3)))


def test_wrong_arguments_raise_as_without_the_edge():
    with pytest.raises(TypeError, match="unexpected keyword"):
        double(np.zeros(3), weigth=3)
    with pytest.raises(TypeError, match="weigth"):
        double(Foreign(np.zeros(3)), weigth=3)


@pytest.mark.parametrize("versioned", [False, True])
def test_bfloat16_travels_through_dlpack_as_int16(versioned):
    """Both capsule layouts: out with the type code of bfloat16, and in again from it."""
    values = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)
    bits = values.view(np.int16)

    class Bfloat16(Foreign):
        dtype = "framework.bfloat16"

        def __dlpack__(self, **options):
            options = {"max_version": (1, 0)} if versioned else {}
            return _capsules.Retyped(self.array, _capsules.DLPACK_BFLOAT).__dlpack__(**options)

    with pytest.raises((BufferError, RuntimeError, TypeError)):
        np.from_dlpack(Bfloat16(bits))  # so the type code really is another one
    result = double(Bfloat16(bits))
    assert result.dtype == bfloat16 and result.tolist() == [3.0, -4.0, 6.0]
    assert values.tolist() == [1.5, -2.0, 3.0]


# --- views that are lent, with tensors that are pretended --------------------------------------------------------------


class Tensor:
    """Host memory that passes for a contiguous tensor of PyTorch on a GPU."""

    __module__ = "torch"

    def __init__(self, array, device=0):
        self.array, self.device, self.requires_grad, self.contiguous = array, device, False, True

    def __dlpack__(self, **options):
        raise BufferError("this way takes too long")

    def data_ptr(self):
        return self.array.ctypes.data

    def get_device(self):
        return self.device

    def is_contiguous(self):
        return self.contiguous

    def stride(self):
        return (1, 7)

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)


@pytest.fixture
def idle(monkeypatch):
    """The table of loans, empty, where CuPy's arrays are real ones and no GPU is needed, as nothing looks into them."""
    cupy = pytest.importorskip("cupy")
    current = SimpleNamespace(ptr=0)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device: current)
    monkeypatch.setattr(_foreign, "_require_gpu", lambda device, name: None)
    monkeypatch.setattr(_foreign, "_torch_stream", lambda device: 0)
    monkeypatch.setattr(_foreign, "_torch_dtypes", lambda: {np.dtype(name): np.dtype(name) for name in ("f2", "f4", "i4")})
    monkeypatch.setattr(_foreign, "_idle", {})
    return _foreign._idle


@accepts_dlpack
def looked_at(x, look=lambda view: None, *, out=None):
    """What `look` finds out about the view of x; out where it is given."""
    found = look(x)
    return found if out is None else out


def place(view):
    return id(view), view.data.ptr, view.shape, view.dtype, view.data.device_id


@accepts_dlpack
def place_of_second(x, second):
    return place(second)


def test_the_same_memory_gets_the_same_view_which_owns_no_tensor_between_calls(idle):
    memory = np.zeros((2, 3), np.float32)
    places = set()
    for _ in range(3):  # as a tensor that is kept, and as temporary ones at one address
        tensor = Tensor(memory)
        dropped = weakref.ref(tensor)
        places |= {looked_at(tensor, place), looked_at(tensor, place)}
        del tensor
        assert dropped() is None
    assert len(places) == 1 and len(idle) == 1
    assert places.pop()[1:] == (memory.ctypes.data, (2, 3), np.float32, 0)


def test_a_tensor_that_has_changed_gets_a_view_of_what_it_is_now(idle):
    tensor, other = Tensor(np.zeros((2, 3), np.float32)), np.ones((2, 3), np.float32)
    looked_at(tensor, place)
    arrays = [other, other[:1], other.reshape(3, 2), other.view(np.int32), other[1:]]
    for array in (*arrays, *arrays):  # anew, and from the table
        tensor.array = array
        assert looked_at(tensor, place)[1:] == (array.ctypes.data, array.shape, array.dtype, 0)
    assert len(idle) == 1 + len(arrays)
    for device in (0, 1, 0):  # of the second argument: the first one's becomes the current one
        tensor.device = device
        assert place_of_second(Tensor(other), tensor)[4] == device
    tensor.requires_grad = True
    with pytest.raises(ValueError, match="x requires a gradient"):
        looked_at(tensor, place)
    tensor.requires_grad, tensor.contiguous = False, False
    with pytest.raises(ValueError, match="x must be C-contiguous, got strides"):
        looked_at(tensor, place)
    tensor.array, tensor.contiguous = np.zeros((2, 3), np.float32), True
    assert looked_at(tensor, place)[1] == tensor.array.ctypes.data


def test_one_tensor_for_two_arguments_has_two_views_that_come_again(idle):
    tensor = Tensor(np.zeros(3, np.float32))
    for _ in range(3):
        assert looked_at(tensor, out=tensor) is tensor and len(idle) == 2
    assert len({id(loan.view) for loan in idle.values()}) == 2


KEPT = {
    "the view": lambda view: view,
    "a part": lambda view: view[1:],
    "another shape": lambda view: view.reshape(-1),
    "the transpose": lambda view: view.T,
    "other values": lambda view: view.view(np.int32),
    "the pointer": lambda view: view.data,
    "an array at the pointer": lambda view: type(view)(view.shape, view.dtype, view.data),
    "a pointer beyond": lambda view: view.data + 4,
    "the memory": lambda view: view.data.mem,
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_an_op_keeps_of_an_argument_owns_the_tensor_for_as_long_as_it_lives(idle, kept):
    tensor, held = Tensor(np.zeros((2, 3), np.float32)), []
    for _ in range(2):
        looked_at(tensor, lambda view: held.append(KEPT[kept](view)))
        assert not idle, "lent to another call while somebody has it"
    dropped = weakref.ref(tensor)
    del tensor
    assert dropped() is not None
    held.clear()
    assert dropped() is None


def test_what_an_op_does_not_keep_of_an_argument_does_not_count(idle):
    def look(view):
        for make in KEPT.values():
            make(view)

    looked_at(Tensor(np.zeros((2, 3), np.float32)), look)
    assert len(idle) == 1


def test_a_call_that_fails_lets_go_of_its_tensors(idle):
    tensor = Tensor(np.zeros(3, np.float32))
    dropped = weakref.ref(tensor)
    with pytest.raises(ZeroDivisionError):
        looked_at(tensor, lambda view: 1 // 0)
    del tensor
    gc.collect()
    assert dropped() is None and not idle


def test_a_view_is_lent_to_one_thread_at_a_time(idle):
    memory, used, shared = np.zeros(3, np.float32), set(), []

    def use(view):
        if id(view) in used:
            shared.append(view)
        used.add(id(view))
        time.sleep(0)  # the other threads' turn
        used.discard(id(view))

    def call():
        for _ in range(500):
            looked_at(Tensor(memory), use)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared and len(idle) == 1


def test_few_views_are_kept(idle, monkeypatch):
    monkeypatch.setattr(_foreign, "_MOST_IDLE", 4)
    memory = np.zeros(20, np.float32)
    for start in range(20):
        assert looked_at(Tensor(memory[start:]), place)[1] == memory.ctypes.data + 4 * start
        assert 1 <= len(idle) <= 4


# --- PyTorch and JAX, on the host and on a GPU ------------------------------------------------------------------------


def tensors(framework, device, *arrays):
    """The arrays as tensors of a framework, bfloat16 included; `device` is "cpu" or "gpu"."""
    if framework == "torch":
        import torch

        def convert(array):
            if array.dtype == bfloat16:
                return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
            return torch.from_numpy(array.copy())

        return [convert(array).to("cuda" if device == "gpu" else "cpu") for array in arrays]
    import jax

    return [jax.device_put(array, jax.devices(device)[0]) for array in arrays]


def values(tensor):
    """A tensor's values, as float64 on the host."""
    if type(tensor).__module__.split(".")[0] == "torch":
        return tensor.detach().cpu().double().numpy()
    return np.asarray(tensor).astype(np.float64)


def norm_inputs(dtype):
    rng = np.random.default_rng(5)
    return rng.standard_normal((7, 96)).astype(dtype), rng.standard_normal(96).astype(dtype)


def norm_expected(x, weight):
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return x * weight / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def assert_norm(result, x, weight):
    tolerance = {2: 2.0**-8 if x.dtype == bfloat16 else 2.0**-10, 4: 2.0**-21}[x.dtype.itemsize]
    np.testing.assert_allclose(values(result), norm_expected(x, weight), rtol=tolerance, atol=1e-7)


def kind(tensor):
    return type(tensor).__module__.split(".")[0]


def same_framework_in_and_out(framework, device, dtype):
    x, weight = norm_inputs(dtype)
    x_tensor, weight_tensor = tensors(framework, device, x, weight)
    result = rms_norm(x_tensor, weight_tensor)
    assert type(result) is type(x_tensor) and result.dtype == x_tensor.dtype
    assert tuple(result.shape) == x.shape and result.device == x_tensor.device
    assert_norm(result, x, weight)
    np.testing.assert_array_equal(values(x_tensor), x.astype(np.float64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tensors_on_the_host_come_back_as_tensors(framework, dtype):
    same_framework_in_and_out(framework, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tensors_on_the_gpu_come_back_as_tensors(framework, dtype):
    same_framework_in_and_out(framework, "gpu", dtype)


def torch_out_is_returned(device, dtype):
    x, weight = norm_inputs(dtype)
    x_tensor, weight_tensor, out = tensors("torch", device, x, weight, np.zeros_like(x))
    assert rms_norm(x_tensor, weight_tensor, out=out) is out
    assert_norm(out, x, weight)
    assert rms_norm(x_tensor, weight_tensor, out=x_tensor) is x_tensor  # in place
    assert_norm(x_tensor, x, weight)


def torch_refusals(device):
    import torch

    x, weight = tensors("torch", device, *norm_inputs(np.float32))
    with pytest.raises(ValueError, match=r"weight requires a gradient.*pass weight.detach\(\)"):
        rms_norm(x, torch.nn.Parameter(weight))
    with pytest.raises(ValueError, match=r"x must be C-contiguous, got strides .*pass x.contiguous\(\)"):
        rms_norm(x.T.contiguous().T, weight)
    with pytest.raises(TypeError, match="x must have dtype .* got float64"):
        rms_norm(x.double(), weight)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(x, weight[:-1].clone())


def jax_out_is_refused(device):
    x, weight, out = tensors("jax", device, *norm_inputs(np.float32), np.zeros((7, 96), np.float32))
    with pytest.raises(ValueError, match="out is a JAX array, which is immutable"):
        rms_norm(x, weight, out=out)
    assert not values(out).any()


if "torch" in FRAMEWORKS:

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_a_host_tensor_given_as_out_is_returned(dtype):
        torch_out_is_returned("cpu", dtype)

    def test_torch_tensors_on_the_host_that_are_refused():
        torch_refusals("cpu")

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_a_gpu_tensor_given_as_out_is_returned(dtype):
        torch_out_is_returned("gpu", dtype)

    @pytest.mark.gpu
    def test_torch_tensors_on_the_gpu_that_are_refused():
        torch_refusals("gpu")

    @pytest.mark.gpu
    def test_tensors_on_host_and_gpu_do_not_mix():
        x, weight = norm_inputs(np.float32)
        with pytest.raises(TypeError, match="x is a CuPy array, weight is a NumPy array"):
            rms_norm(*tensors("torch", "gpu", x), *tensors("torch", "cpu", weight))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_ops_run_on_the_stream_torch_works_on(cupy, dtype):
        """The input is made behind a long wait on a stream of its own: any other stream would read it too early."""
        import torch

        x, weight = norm_inputs(dtype)
        x_tensor, weight_tensor, zeros = tensors("torch", "gpu", x, weight, np.zeros_like(x))
        rms_norm(x_tensor, weight_tensor)  # compiled and loaded, so that the launch below comes at once
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # clock cycles, about 0.1 s
            zeros.copy_(x_tensor)
            result = rms_norm(zeros, weight_tensor)
            was_pending = not stream.query()
            doubled = result * 2
        stream.synchronize()
        assert was_pending, "the wait ended before the launch: the test shows nothing"
        assert_norm(result, x, weight)
        np.testing.assert_array_equal(values(doubled), 2 * values(result))
        assert cupy.cuda.get_current_stream().ptr == 0

    @pytest.mark.gpu
    def test_tensors_on_the_gpu_come_again_with_other_values_and_other_memory():
        """A view that is lent again is one of what the tensor is now."""
        import torch

        def check_double(tensor):
            assert torch.equal(double(tensor), tensor.detach() * 2)

        x, other = torch.randn(4, 6, device="cuda"), torch.randn(8, 6, device="cuda")
        for change in (
            lambda: None,
            lambda: x.add_(1),
            lambda: x.set_(other),
            lambda: x.resize_(2, 6),
            lambda: x.resize_(64, 6).fill_(3),
            lambda: x.set_(other[4:]),
            lambda: setattr(x, "data", torch.randn(4, 6, device="cuda")),
            lambda: setattr(x, "data", x.data.half()),
            lambda: setattr(x, "data", x.data.reshape(3, 8)),
        ):
            change()
            for _ in range(2):
                check_double(x)
        x.transpose_(0, 1)
        with pytest.raises(ValueError, match="x must be C-contiguous"):
            double(x)
        x.transpose_(0, 1)
        check_double(x)
        x.requires_grad_()
        with pytest.raises(ValueError, match="x requires a gradient"):
            double(x)
        check_double(x.requires_grad_(False))

    @pytest.mark.gpu
    def test_temporary_tensors_on_the_gpu_are_told_apart(cupy):
        import torch

        for i in range(300):
            x = torch.full((1 + i % 3, 8), float(i), device="cuda", dtype=(torch.float32, torch.float16)[i % 2])
            result = double(x)
            assert result.shape == x.shape and result.dtype == x.dtype and result.unique().tolist() == [2 * i]

    @pytest.mark.gpu
    def test_memory_of_a_dropped_tensor_is_torchs_again(cupy):
        import torch

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        x, weight = torch.ones(1024, 256, device="cuda"), torch.ones(256, device="cuda")
        for _ in range(2):
            rms_norm(x, weight, out=x)
        del x, weight
        assert torch.cuda.memory_allocated() == before

    @pytest.mark.gpu
    def test_a_part_of_an_argument_that_is_returned_keeps_its_memory(cupy):
        import torch

        before = torch.cuda.memory_allocated()
        x = torch.full((4, 1024), 3.0, device="cuda")
        size = torch.cuda.memory_allocated() - before
        whole, part, _ = double_in_place(x)
        assert whole is x and part.data_ptr() == x.data_ptr()
        del x, whole
        assert torch.cuda.memory_allocated() == before + size
        again = torch.zeros(4, 1024, device="cuda")  # where the memory would be, were it free
        assert part.unique().tolist() == [6] and not again.any()
        del part, again
        assert torch.cuda.memory_allocated() == before

    @pytest.mark.gpu
    def test_threads_that_call_at_once_on_one_tensor_and_their_own(cupy):
        import torch

        shared, wrong = torch.randn(5, 64, device="cuda"), []
        weight = torch.ones(64, device="cuda")
        expected = rms_norm(shared, weight)

        def call(number):
            out = torch.empty_like(shared)
            for i in range(200):
                x = torch.full((3, 8), float(i + number), device="cuda")
                if not torch.equal(double(x), 2 * x) or not torch.equal(rms_norm(shared, weight, out=out), expected):
                    wrong.append((number, i))

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


if "jax" in FRAMEWORKS:

    def test_a_jax_array_on_the_host_is_never_written():
        jax_out_is_refused("cpu")

    @pytest.mark.gpu
    def test_a_jax_array_on_the_gpu_is_never_written():
        jax_out_is_refused("gpu")

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_jax_arrays_are_taken_while_they_are_still_computed(dtype):
        """JAX queues work on streams of its own: the op waits for its input, and JAX for the op's result."""
        import jax

        x, weight = norm_inputs(dtype)
        x_tensor, weight_tensor, ones = tensors("jax", "gpu", x, weight, np.ones((2048, 2048), np.float32))

        @jax.jit
        def late(x, ones):
            for _ in range(20):
                ones = ones @ ones / 2048  # stays one
            return x * ones[0, 0].astype(x.dtype)

        late(x_tensor, ones).block_until_ready()
        for _ in range(5):
            result = rms_norm(late(x_tensor, ones), weight_tensor) * 1
            assert_norm(result, x, weight)

    @pytest.mark.gpu
    def test_jax_inputs_are_held_until_the_kernel_has_read_them(cupy):
        """A stream that waits stands for a busy GPU: the arrays are dropped while the op is still queued."""
        x, weight = norm_inputs(np.float32)
        x_tensor, weight_tensor = tensors("jax", "gpu", x, weight)
        rms_norm(x_tensor, weight_tensor)
        cupy.cuda.runtime.deviceSynchronize()
        rms_norm(x_tensor, weight_tensor)
        held = [array for _, arrays in _foreign._in_flight for array in arrays]
        assert any(array is x_tensor for array in held) and len(_foreign._in_flight) == 1


@pytest.mark.gpu
def test_cupy_arrays_run_on_the_current_stream(cupy):
    x, weight = norm_inputs(np.float32)
    x, weight = cupy.asarray(x), cupy.asarray(weight)
    expected = rms_norm(x, weight).get()
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()  # a launch on any other stream is not captured
        out = cupy.ndarray(x.shape, x.dtype, memptr=x.data)
        rms_norm(x, weight, out=out)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(x.get(), expected)
