"""Checks every op shares, and the edge where arrays of other frameworks enter and leave."""

import importlib.util
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cupyq import _arrays, _capsules
from cupyq._arrays import (
    FLOATS,
    accepts_dlpack,
    bfloat16,
    byte_bounds,
    check,
    namespace,
    output,
    refuse_partial_overlap,
)
from cupyq._copies import to_host
from cupyq.ops._common import access_width, vector_width
from cupyq.ops.norm import rms_norm

FRAMEWORKS = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# --- namespace --------------------------------------------------------------------------------------------------------


class Quantized:
    xp = np


def test_namespace_of_numpy_arrays():
    assert namespace(x=np.zeros(2), w=None, q=Quantized()) is np
    assert namespace(x=None, q=Quantized()) is np


@pytest.mark.parametrize("value", [[1.0], 1.0, "text", (1, 2)])
def test_namespace_refuses_what_is_no_array(value):
    with pytest.raises(TypeError, match=f"w must be a NumPy or CuPy array .*{type(value).__name__}") as error:
        namespace(x=np.zeros(2), w=value)
    one_line(error)


def test_namespace_needs_an_array():
    with pytest.raises(TypeError, match="must be an array, got None"):
        namespace(x=None, w=None)


@pytest.mark.gpu
def test_namespace_refuses_a_mix_of_libraries(cupy):
    on_gpu = cupy.zeros(2)
    assert namespace(x=on_gpu, w=None) is cupy
    with pytest.raises(TypeError, match="x is a CuPy array, w is a NumPy array: move one"):
        namespace(x=on_gpu, w=np.zeros(2))
    with pytest.raises(TypeError, match="q is a NumPy array, x is a CuPy array"):
        namespace(q=Quantized(), x=on_gpu)


# --- check, output, overlap -------------------------------------------------------------------------------------------


def test_arrays_come_to_the_host_and_those_there_stay():
    array = np.ones(3, np.float32)
    assert to_host(array) is array
    assert to_host(SimpleNamespace(get=lambda: array)) is array


def test_check_accepts_what_fits():
    x = np.zeros((2, 3), np.float16)
    check(x, "x", dtype=np.float16, shape=(2, 3), ndim=2, last=3, writes=True)
    check(x, "x", dtype=FLOATS, shape=(None, 3))
    check(np.zeros((2, 3), bfloat16), "x", dtype=FLOATS)
    check(np.zeros((0, 3)), "x", shape=(0, 3))
    check(np.zeros((4, 3))[1:2], "x")


@pytest.mark.parametrize(
    ("array", "asked", "error", "words"),
    [
        (np.zeros(3), {"dtype": FLOATS}, TypeError, "x must have dtype float16 or bfloat16 or float32, got float64"),
        (np.zeros(3), {"dtype": np.float16}, TypeError, "x must have dtype float16, got float64"),
        (np.zeros(3, np.float16), {"dtype": bfloat16}, TypeError, "x must have dtype bfloat16, got float16"),
        (np.zeros(3), {"shape": (4,)}, ValueError, r"x must have shape \(4\), got \(3,\)"),
        (np.zeros((2, 3)), {"shape": (None, 4)}, ValueError, r"x must have shape \(any, 4\), got \(2, 3\)"),
        (np.zeros((2, 3)), {"shape": (2,)}, ValueError, r"x must have shape \(2\), got \(2, 3\)"),
        (np.zeros((2, 3)), {"ndim": 3}, ValueError, r"x must have 3 dimensions, got shape \(2, 3\)"),
        (np.zeros((2, 3)), {"last": 2}, ValueError, r"x must have 2 as its last dimension, got shape \(2, 3\)"),
        (np.zeros(()), {"last": 2}, ValueError, r"x must have 2 as its last dimension, got shape \(\)"),
        (np.zeros((2, 3)).T, {}, ValueError, r"x must be C-contiguous, .* pass ascontiguousarray\(x\)"),
        (np.zeros(6)[::2], {}, ValueError, "x must be C-contiguous"),
        (np.frombuffer(b"1234", np.uint8), {"writes": True}, ValueError, "x is read-only and would be written"),
    ],
)
def test_check_names_what_is_wrong(array, asked, error, words):
    with pytest.raises(error, match=words) as raised:
        check(array, "x", **asked)
    one_line(raised)


def test_output_is_made_or_checked():
    made = output(np, None, (2, 3), bfloat16)
    assert made.shape == (2, 3) and made.dtype == bfloat16
    given = np.zeros((2, 3), np.float32)
    assert output(np, given, (2, 3), np.float32) is given
    with pytest.raises(TypeError, match="out must have dtype float16, got float32"):
        output(np, given, (2, 3), np.float16)
    with pytest.raises(ValueError, match="out must have shape"):
        output(np, given, (3, 2), np.float32)
    with pytest.raises(TypeError, match="result must be a NumPy or CuPy array"):
        output(np, [1.0], (1,), np.float32, name="result")
    given.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        output(np, given, (2, 3), np.float32)


@pytest.mark.gpu
def test_output_of_the_other_library_is_refused(cupy):
    with pytest.raises(TypeError, match="out must be an array of cupy, as the inputs are, got numpy"):
        output(cupy, np.zeros(2, np.float32), (2,), np.float32)
    with pytest.raises(TypeError, match="out must be an array of numpy, as the inputs are"):
        output(np, cupy.zeros(2, np.float32), (2,), np.float32)


def test_byte_bounds():
    x = np.zeros((4, 8), np.float16)
    low, high = byte_bounds(x)
    assert high - low == 64
    assert byte_bounds(x[1:3]) == (low + 16, low + 48)


def test_overlap_is_refused_unless_it_is_the_whole_array():
    memory = np.zeros(10, np.float32)
    x = memory[2:8]
    refuse_partial_overlap(x, x=x, none=None)
    refuse_partial_overlap(memory[2:8], x=x)
    refuse_partial_overlap(memory[:2], x=x)
    refuse_partial_overlap(memory[8:], x=x)
    for out in (memory[1:7], memory[3:9], memory[3:5], memory, x.view(np.int32), memory[7:]):
        with pytest.raises(ValueError, match="out overlaps x partly"):
            refuse_partial_overlap(out, other=np.zeros(3), x=x)


def test_the_width_of_an_access_divides_columns_and_addresses():
    """By the definition: halved until rows and first values of every array are multiples of it."""
    memory = np.zeros(256, np.uint8)
    base = -memory.ctypes.data % 64
    arrays = [
        memory[base + shift :][: 4 * dtype.itemsize].view(dtype) for dtype in FLOATS for shift in (0, 2, 4, 8, 12, 16, 32)
    ]
    for x in arrays:
        for y in (None, *arrays):
            given = [a for a in (x, y) if a is not None]
            for columns in (0, 1, 2, 4, 6, 12, 40, 256):
                width = 16 // max(a.itemsize for a in given)
                assert vector_width(columns, x, y, widest=width) == access_width(columns, x, y)
                while columns % width or any(a.ctypes.data % (width * a.itemsize) for a in given if width > 1):
                    width //= 2
                assert access_width(columns, x, y) == width


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
        held = [array for _, arrays in _arrays._in_flight for array in arrays]
        assert any(array is x_tensor for array in held) and len(_arrays._in_flight) == 1


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
