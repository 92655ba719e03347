"""Unquantised products: the reference against plain sums, cuBLAS against float64."""

import contextlib
import ctypes
import importlib
import math
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, golden, needs_cupy
from kernel_checks import same_bits

from cupyq.errors import BackendError
from cupyq.ops.matmul import gemm, matmul, matmul_reference, multiply_into

module = importlib.import_module("cupyq.ops.matmul")

ULP = {np.dtype(np.float16): 2**-11, np.dtype(ml_dtypes.bfloat16): 2**-8, np.dtype(np.float32): 2**-23}
DTYPES = list(ULP)


def random(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("transpose", [False, True])
def test_reference_is_the_plain_sum(transpose):
    rng = np.random.default_rng(0)
    x, bias = random(rng, np.float32, 2, 3, 17), random(rng, np.float32, 5)
    weight = random(rng, np.float32, *((5, 17) if transpose else (17, 5)))
    y = matmul(x, weight, transpose=transpose, bias=bias)
    assert y.shape == (2, 3, 5)
    for index in np.ndindex(2, 3, 5):
        column = weight[index[2]] if transpose else weight[:, index[2]]
        exact = math.fsum([float(a) * float(b) for a, b in zip(x[index[:2]], column, strict=True)] + [float(bias[index[2]])])
        assert abs(y[index] - exact) <= 2**-24 * abs(exact) + 1e-12


def bad_calls(xp):
    x, weight = xp.zeros((2, 8), np.float16), xp.zeros((8, 4), np.float16)
    return [
        (TypeError, "weight must have dtype float16", lambda: matmul(x, weight.astype(np.float32))),
        (ValueError, "x must have 6", lambda: matmul(x, xp.zeros((6, 4), np.float16))),
        (ValueError, "x must have 4", lambda: matmul(x, weight, transpose=True)),
        (ValueError, "weight must have 2", lambda: matmul(x, weight[0])),
        (ValueError, "bias must have shape", lambda: matmul(x, weight, bias=xp.zeros(5, np.float16))),
        (ValueError, "C-contiguous", lambda: matmul(x, xp.zeros((8, 8), np.float16)[:, ::2])),
        (ValueError, "out must have shape", lambda: matmul(x, weight, out=xp.zeros((2, 5), np.float16))),
        (TypeError, "out must have dtype", lambda: matmul(x, weight, dtype=np.int32)),
        (ValueError, "out overlaps x", lambda: matmul(weight, xp.zeros((4, 4), np.float16), out=weight)),
        (ValueError, "no rows", lambda: matmul(xp.zeros((2, 0), np.float16), xp.zeros((0, 4), np.float16))),
        (TypeError, "list", lambda: matmul([[1.0]], weight)),
    ]


def test_bad_calls_get_clear_errors():
    for error, text, call in bad_calls(np):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.gpu
def test_bad_calls_get_clear_errors_on_the_gpu(cupy):
    for error, text, call in bad_calls(cupy):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape):
    assert matmul(np.zeros(shape, np.float16), np.zeros((8, 4), np.float16)).shape == (*shape[:-1], 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_products(dtype, transpose, cupy):
    rng = np.random.default_rng(1)
    for rows, k, n in ((1, 1, 1), (1, 64, 33), (3, 257, 40), (130, 512, 264), (7, 4096, 8)):
        x, weight = random(rng, dtype, rows, k), random(rng, dtype, *((n, k) if transpose else (k, n)))
        for bias in (None, random(rng, np.float32, n), random(rng, dtype, n)):
            for result in {dtype, np.dtype(np.float32)}:
                guarded = cupy.asarray(np.full((rows + 2, n), np.nan, result))
                on_gpu = [None if a is None else cupy.asarray(a) for a in (x, weight, bias)]
                y = matmul(*on_gpu[:2], transpose=transpose, bias=on_gpu[2], dtype=result, out=guarded[1:-1]).get()
                assert np.isnan(guarded.get()[[0, -1]].astype(np.float32)).all()
                check_product(y, x, weight, transpose, bias)
                again = matmul(*on_gpu[:2], transpose=transpose, bias=on_gpu[2], dtype=result).get()
                assert again.tobytes() == y.tobytes()


def check_product(y, x, weight, transpose, bias):
    exact = matmul_reference(x, weight, transpose, bias)
    single = [a.astype(np.float32) for a in (x, weight.T if transpose else weight)]
    same = (single[0] @ single[1] + (0 if bias is None else bias.astype(np.float32))).astype(y.dtype)
    # A bias is rounded to y's dtype before the product is accumulated onto it.
    slack = 0 if bias is None else ULP[y.dtype] * np.abs(bias.astype(np.float64)).max()
    # fp32 sums may be taken in any order: Higham's probabilistic bound, of the order sqrt(k) roundings of the terms' sum.
    magnitude = np.abs(single[0]).astype(np.float64) @ np.abs(single[1]).astype(np.float64)
    slack += 2**-24 * 4 * np.sqrt(x.shape[-1]) * magnitude.max()
    error = np.abs(y.astype(np.float64) - exact)
    allowed = 2 * np.abs(same.astype(np.float64) - exact).max() + ULP[y.dtype] * np.abs(exact) + slack
    assert (error <= allowed).all(), f"error {error.max()}, allowed {allowed.max()}"


@pytest.mark.gpu
def test_the_tolerance_bites(cupy):
    rng = np.random.default_rng(2)
    x, weight, bias = random(rng, np.float16, 5, 256), random(rng, np.float16, 256, 64), random(rng, np.float16, 64)
    y = matmul(cupy.asarray(x), cupy.asarray(weight), bias=cupy.asarray(bias)).get()
    check_product(y, x, weight, False, bias)
    shifted = np.roll(weight, 1, axis=1)
    wrong_calls = [(x, shifted, bias), (x, weight, None), (x, weight, -bias), (x[::-1], weight, bias)]
    for a, b, c in wrong_calls:
        with pytest.raises(AssertionError):
            check_product(y, a, b, False, c)
            pytest.fail("not noticed", pytrace=False)


@pytest.mark.gpu
def test_many_rows(cupy):
    rng = np.random.default_rng(3)
    x, weight = random(rng, np.float16, 100_003, 64), random(rng, np.float16, 8, 64)
    y = matmul(cupy.asarray(x), cupy.asarray(weight), transpose=True, bias=cupy.zeros(8, np.float16)).get()
    check_product(y, x, weight, True, np.zeros(8, np.float16))


@pytest.mark.gpu
def test_partial_sums_are_not_rounded_to_float16(cupy):
    """A sum whose parts leave float16's range, in both directions, and which is small: fp32 holds them exactly."""
    k = 65536
    for rows, n in ((1, 8), (4, 64), (16, 256), (100, 96)):
        x, weight = np.full((rows, k), 2, np.float16), np.full((k, n), 2, np.float16)
        weight[k // 2 :] = -2
        x[:, -1] = 1
        y = matmul(cupy.asarray(x), cupy.asarray(weight)).get()
        assert (y == 2).all(), f"{rows} x {n}: {np.unique(y.astype(np.float32))}"


# --- cuBLAS -----------------------------------------------------------------------------------------------------------


class FakeBlas:
    """cuBLAS in host memory, for float32: notes what is called, and multiplies as the manual says."""

    def __init__(self):
        self.calls, self.handles, self.workspaces, self.status, self.math_modes = [], [], [], {}, {}

    def create(self):
        self.handles.append(len(self.handles) + 100)
        return self.handles[-1]

    def destroy(self, handle):
        self.calls.append(("destroy", handle))

    def setMathMode(self, handle, mode):
        self.math_modes[handle] = mode

    def cublasSetStream_v2(self, handle, stream):
        self.calls.append(("stream", handle, stream))
        return self.status.pop("stream", 0)

    def cublasSetWorkspace_v2(self, handle, address, size):
        self.calls.append(("workspace", handle, address, size))
        return self.status.pop("workspace", 0)

    def cublasGetStatusName(self, status):
        return {13: b"CUBLAS_STATUS_EXECUTION_FAILED"}.get(status)

    def cublasGemmEx(
        self, handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, how
    ):
        self.calls.append(("gemm", handle))
        assert (op_b, a_type, b_type, c_type, compute, how) == (0, 0, 0, 0, 68, -1)

        def columns(address, leading, rows, count):  # of a column-major matrix
            values = (ctypes.c_float * (leading * (count - 1) + rows)).from_address(address)
            return np.lib.stride_tricks.as_strided(np.frombuffer(values, np.float32), (rows, count), (4, 4 * leading))

        first = columns(a, lda, *((k, m) if op_a else (m, k)))
        scale, keep = (ctypes.c_float.from_address(address).value for address in (alpha, beta))
        out = columns(c, ldc, m, n)
        out[...] = scale * (first.T if op_a else first) @ columns(b, ldb, k, n) + (keep * out if keep else 0)
        return self.status.pop("gemm", 0)


@pytest.fixture
def blas(monkeypatch):
    """CuPy arrays in host memory, made by `blas.array`, and a cuBLAS that reads them. `blas.stream` is the current stream."""
    needs_cupy()
    import cupy

    fake = FakeBlas()
    fake.stream, fake.device = 0, 0

    class Handle:
        def __init__(self, handle, destroy):
            self.handle, self.destroy = handle, destroy

    def array(values, device=0):
        values = np.array(values)
        memory = cupy.cuda.UnownedMemory(values.ctypes.data, max(values.nbytes, 1), values, device)
        return cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(memory, 0)), values

    def empty(size, dtype):
        fake.workspaces.append(size)
        return array(np.empty(1, dtype))[0]  # nobody writes to it

    @contextlib.contextmanager
    def device(number):
        outer, fake.device = fake.device, number
        yield
        fake.device = outer

    fake.array, fake.CUBLASError = array, RuntimeError
    monkeypatch.setitem(vars(cupy.cuda), "cublas", fake)
    monkeypatch.setattr(cupy.cuda, "Device", device)
    monkeypatch.setattr(cupy.cuda.device, "Handle", Handle)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: fake.device)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda number: SimpleNamespace(ptr=fake.stream))
    monkeypatch.setattr(cupy, "empty", empty)
    monkeypatch.setattr(module, "info", lambda number: SimpleNamespace(arch="sm_90a" if number == 0 else "sm_89"))
    monkeypatch.setattr(module, "_cublas", lambda: fake)
    monkeypatch.setattr(module, "_this_thread", threading.local())
    monkeypatch.setattr(module, "_workspaces", {})
    return fake


@pytest.mark.parametrize("transpose", [False, True])
def test_the_call_of_cublas(blas, transpose):
    rng = np.random.default_rng(4)
    for rows, k, n in ((1, 1, 1), (1, 7, 3), (5, 2, 6), (4, 4, 4)):
        x, x_host = blas.array(random(rng, np.float32, rows, k))
        weight, weight_host = blas.array(random(rng, np.float32, *((n, k) if transpose else (k, n))))
        out, out_host = blas.array(random(rng, np.float32, rows, n + 4))
        before = out_host.copy()
        product = x_host @ (weight_host.T if transpose else weight_host)

        multiply_into(out, x, weight, transpose=transpose, first_column=3)
        np.testing.assert_allclose(out_host[:, 3 : 3 + n], product, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.delete(out_host, range(3, 3 + n), 1), np.delete(before, range(3, 3 + n), 1))

        out_host[...] = before
        multiply_into(out, x, weight, transpose=transpose, first_column=2, alpha=2.0, beta=-0.5)
        np.testing.assert_allclose(out_host[:, 2 : 2 + n], 2 * product - before[:, 2 : 2 + n] / 2, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.delete(out_host, range(2, 2 + n), 1), np.delete(before, range(2, 2 + n), 1))


def multiply_once(blas, device=0):
    arrays = [blas.array(np.ones((2, 2), np.float32), device) for _ in range(3)]
    multiply_into(*(array for array, _ in arrays))
    assert (arrays[0][1] == 2).all()


def test_every_stream_has_a_workspace_and_every_thread_a_handle(blas):
    for stream in (0, 0, 7, 0):
        blas.stream = stream
        multiply_once(blas)
    # The stream only where it changes, and the workspace after it, as the stream resets it.
    assert [call[0] for call in blas.calls] == [
        "stream", "workspace", "gemm", "gemm", "stream", "workspace", "gemm", "stream", "workspace", "gemm",
    ]  # fmt: skip
    addresses = [call[2] for call in blas.calls if call[0] == "workspace"]
    assert addresses[0] == addresses[2] != addresses[1]
    thread = threading.Thread(target=multiply_once, args=(blas,))
    thread.start()
    thread.join()
    assert blas.handles == [100, 101] and [call[1] for call in blas.calls[-3:]] == [101] * 3
    multiply_once(blas, device=1)
    assert blas.handles == [100, 101, 102] and blas.device == 0
    assert blas.workspaces == [32 << 20, 32 << 20, 4 << 20]  # Hopper twice, the other GPU once
    assert set(blas.math_modes.values()) == {16}  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION


def test_the_workspace_of_a_stream_goes_with_it(blas):
    """A stream may get the address of one that is gone: cuBLAS must not write into what was that one's workspace."""
    blas.stream = 7
    multiply_once(blas)
    old = module._workspaces[0, 7]
    module.forget_stream(0, 7)
    module.forget_stream(0, 8)  # on which nothing was multiplied
    assert module._workspaces == {}
    assert module._this_thread.blas[0]._workspace is old  # which cuBLAS may write to still
    del blas.calls[:]
    multiply_once(blas)
    multiply_once(blas)
    assert [call[0] for call in blas.calls] == ["stream", "workspace", "gemm", "gemm"]
    new = module._workspaces[0, 7]
    assert new is module._this_thread.blas[0]._workspace is not old
    assert blas.calls[1][2] == new.data.ptr != old.data.ptr


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("stream", "cuBLAS cannot change to the current stream: CUBLAS_STATUS_EXECUTION_FAILED"),
        ("workspace", "cuBLAS cannot take a workspace: CUBLAS_STATUS_EXECUTION_FAILED"),
        ("gemm", "cuBLAS cannot multiply 2 x 2 by 2 x 2 in float32: CUBLAS_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_refusal_of_cublas_is_explained(blas, step, says):
    multiply_once(blas)
    blas.stream, blas.status = 5, {step: 13}
    with pytest.raises(BackendError, match=f"^{says}$"):
        multiply_once(blas)
    del blas.calls[:]
    multiply_once(blas)  # a stream that was not taken is set again
    assert ("stream" in [call[0] for call in blas.calls]) == (step != "gemm")


def test_without_cublas_the_error_names_the_mend(monkeypatch):
    needs_cupy()
    import cupy

    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: 12090)
    monkeypatch.setitem(vars(cupy.cuda), "cublas", SimpleNamespace(__file__="/nowhere/cublas.so"))
    module._cublas.cache_clear()
    try:
        with pytest.raises(BackendError, match="cuBLAS cannot be loaded .*/nowhere.*pip install nvidia-cublas-cu12") as error:
            module._cublas()
    finally:
        module._cublas.cache_clear()
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_product_replays_the_same_bits(cupy, dtype):
    rng = np.random.default_rng(5)
    cases = []
    for rows, k, n in ((1, 4096, 1024), (16, 4096, 256), (200, 512, 640)):
        x, weight = (cupy.asarray(random(rng, dtype, *shape)) for shape in ((rows, k), (n, k)))
        bias = cupy.asarray(random(rng, dtype, n))
        eager = matmul(x, weight, transpose=True, bias=bias)
        cases.append((x, weight, bias, eager.get(), cupy.zeros_like(eager)))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        for x, weight, bias, _, out in cases:
            matmul(x, weight, transpose=True, bias=bias, out=out)
        graph = stream.end_capture()
        assert not any(out.view(np.uint8).any() for *_, out in cases)  # capturing computed nothing
        for _ in range(2):
            for *_, out in cases:
                out.view(np.uint8).fill(255)
            graph.launch(stream)
            stream.synchronize()
            for *_, eager, out in cases:
                assert out.get().tobytes() == eager.tobytes()


@pytest.mark.gpu
def test_streams_and_threads_do_not_disturb_each_other(cupy):
    """The same bits, whatever runs beside: products that cuBLAS splits along k need a workspace of their own."""
    rng = np.random.default_rng(6)
    x, weight = (cupy.asarray(random(rng, np.float16, *shape)) for shape in ((16, 16384), (16384, 256)))
    expected = matmul(x, weight).get().tobytes()
    outs = [cupy.empty((16, 256), np.float16) for _ in range(40)]
    cupy.cuda.runtime.deviceSynchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]

    def work(share):
        for i, out in enumerate(share):
            with streams[i % 2]:
                matmul(x, weight, out=out)

    threads = [threading.Thread(target=work, args=(share,)) for share in (outs[:20], outs[20:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cupy.cuda.runtime.deviceSynchronize()
    assert {out.get().tobytes() for out in outs} == {expected}


@pytest.mark.gpu
def test_bits_do_not_depend_on_addresses(cupy):
    """cuBLAS alone would take other kernels for arrays at odd addresses."""
    rng = np.random.default_rng(7)
    x, weight, bias = random(rng, np.float16, 100, 256), random(rng, np.float16, 256, 72), random(rng, np.float32, 72)
    expected = matmul(*map(cupy.asarray, (x, weight)), bias=cupy.asarray(bias)).get()
    for shift in (1, 3, 8):

        def moved(array, shift=shift):
            whole = cupy.empty(array.size + shift, array.dtype)
            whole[shift:] = cupy.asarray(array.reshape(-1))
            return whole[shift:].reshape(array.shape)

        out = moved(np.full((100, 72), np.nan, np.float16))
        assert matmul(moved(x), moved(weight), bias=cupy.asarray(bias), out=out) is out
        assert same_bits(out.get(), expected)


# --- gemm -------------------------------------------------------------------------------------------------------------

GEMM_CASES = [case for case in golden("element") if case.startswith("gemm_")]


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (1.0, 1.0), (-0.75, 2.5), (0.0, 1.0)])
def test_gemm_is_the_plain_sum(alpha, beta):
    rng = np.random.default_rng(1)
    a, b, c = random(rng, np.float32, 3, 17), random(rng, np.float32, 17, 5), random(rng, np.float32, 3, 5)
    before = c.copy()
    assert gemm(a, b, c, alpha=alpha, beta=beta) is c
    for i, j in np.ndindex(3, 5):
        exact = alpha * math.fsum(float(x) * float(y) for x, y in zip(a[i], b[:, j], strict=True)) + beta * float(before[i, j])
        assert abs(c[i, j] - exact) <= 2**-23 * abs(exact) + 1e-12


def check_gemm_golden(case, place):
    inputs, outputs, arguments = golden("element")[case]
    a, b, before = inputs["a"], inputs["b"], inputs["c"]
    c = gemm(place(a), place(b), place(before.copy()), **arguments)
    c = c if isinstance(c, np.ndarray) else c.get()
    exact = arguments["alpha"] * (a.astype(np.float64) @ b.astype(np.float64)) + arguments["beta"] * before.astype(np.float64)
    size = np.linalg.norm(exact)
    assert np.linalg.norm(c - exact) / size <= min(np.linalg.norm(outputs["c"] - exact) / size, 5e-4)


@pytest.mark.parametrize("case", GEMM_CASES)
def test_gemm_is_nearer_to_the_exact_product_than_the_recorded_one(case):
    check_gemm_golden(case, np.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMM_CASES)
def test_gemm_is_nearer_to_the_exact_product_than_the_recorded_one_on_the_gpu(cupy, case):
    check_gemm_golden(case, cupy.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_kernel_matches_the_reference(cupy, dtype):
    rng = np.random.default_rng(2)
    for m, k, n in ((1, 1, 1), (1, 300, 7), (5, 33, 129), (70, 64, 65)):
        for alpha, beta in ((1.0, 0.0), (0.5, -2.0), (0.0, 3.0)):
            a, b, c = (random(rng, dtype, *shape) for shape in ((m, k), (k, n), (m, n)))
            exact = alpha * (a.astype(np.float64) @ b.astype(np.float64)) + beta * c.astype(np.float64)
            reference = alpha * (a @ b).astype(np.float32) + beta * c.astype(np.float32)
            start = np.full_like(c, np.nan) if beta == 0 else c
            results = [
                gemm(cupy.asarray(a), cupy.asarray(b), cupy.asarray(start), alpha=alpha, beta=beta).get() for _ in range(2)
            ]
            assert results[0].tobytes() == results[1].tobytes()
            exact_bound(results[0], exact, reference.astype(dtype), ulp=ULP[dtype])


def bad_gemm_calls(xp):
    a, b, c = xp.zeros((2, 8), np.float16), xp.zeros((8, 4), np.float16), xp.zeros((2, 4), np.float16)
    return [
        (TypeError, "b must have dtype float16", lambda: gemm(a, b.astype(np.float32), c)),
        (ValueError, "b must have shape", lambda: gemm(a, b[:4], c)),
        (ValueError, "c must have shape", lambda: gemm(a, b, c[:1])),
        (TypeError, "alpha must be a number", lambda: gemm(a, b, c, alpha="1")),
        (TypeError, "beta must be a number", lambda: gemm(a, b, c, beta=None)),
        (ValueError, "no columns", lambda: gemm(a[:, :0].copy(), b[:0], c)),
        (ValueError, "c overlaps b", lambda: gemm(xp.zeros((8, 8), np.float16), b, b)),
    ]


def test_bad_gemm_calls_get_clear_errors():
    for error, text, call in bad_gemm_calls(np):
        with pytest.raises(error, match=text):
            call()
    read_only = np.zeros((2, 4), np.float16)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="c is read-only"):
        gemm(np.zeros((2, 8), np.float16), np.zeros((8, 4), np.float16), read_only)


@pytest.mark.gpu
def test_bad_gemm_calls_get_clear_errors_on_the_gpu(cupy):
    for error, text, call in bad_gemm_calls(cupy):
        with pytest.raises(error, match=text):
            call()
