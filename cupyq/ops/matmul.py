"""Unquantised products, by cuBLAS: `matmul` for layers, `gemm` for the general form."""

import ctypes
import functools
import math
import os
import sys
import threading

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, check, first_line, float16, float32, namespace, output, require_cupy
from cupyq._copies import copy_values
from cupyq._device import arch_number, info
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, is_tracing, launch
from cupyq._recording import spoil
from cupyq.errors import BackendError
from cupyq.ops._common import dtype_named, float32_factor, float64, refuse_overlap, store, truth


@accepts_dlpack
def matmul(x, weight, *, transpose=False, bias=None, dtype=None, out=None):
    """y = x @ weight (+ bias), or x @ weight.T (+ bias) with transpose=True.

    x [..., k]; weight [k, n], or [n, k] with transpose=True as checkpoints store linear layers; both float16, bfloat16 or
    float32 and equal; bias [n] of any of these. y [..., n] has x's dtype, or float32 with dtype=float32. fp32 accumulation
    (no TF32) and one rounding; on the GPU the bias is rounded to y's dtype, then the product is accumulated onto it.
    `out` must not overlap the inputs.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides.
    """
    xp = namespace(x=x, weight=weight, bias=bias)
    check(x, "x", dtype=FLOATS)
    check(weight, "weight", dtype=x.dtype, ndim=2)
    transpose = truth(transpose, "transpose")
    k, n = weight.shape[::-1] if transpose else weight.shape
    check(x, "x", last=k)
    if k == 0:
        raise ValueError(f"weight has no rows to multiply by, its shape is {weight.shape}")
    if bias is not None:
        check(bias, "bias", dtype=FLOATS, shape=(n,))
    out = output(xp, out, (*x.shape[:-1], n), x.dtype if dtype is None else dtype_named(dtype))
    check(out, "out", dtype=(x.dtype, float32))
    refuse_overlap(out, "out", x=x, weight=weight, bias=bias)
    if out.size == 0:
        return out
    if xp is np:
        store(out, matmul_reference(x, weight, transpose, bias))
    else:
        rows = math.prod(x.shape[:-1])
        multiply_into(out.reshape(rows, n), x.reshape(rows, k), weight, transpose=transpose, bias=bias)
    return out


def matmul_reference(x, weight, transpose, bias):
    weight = float64(weight).T if transpose else float64(weight)
    # One 2-D product: BLAS takes it whole, where NumPy would multiply the matrices of a stack one by one.
    rows = math.prod(x.shape[:-1])
    y = float64(x).reshape(rows, x.shape[-1]) @ weight
    if bias is not None:
        y += float64(bias)
    return y.reshape(*x.shape[:-1], weight.shape[1])


@accepts_dlpack(writes=("c",))
def gemm(a, b, c, *, alpha=1.0, beta=0.0):
    """c = alpha * (a @ b) + beta * c, written into c, which is returned

    a [m, k], b [k, n] and c [m, n]: one dtype of float16, bfloat16, float32. alpha and beta are taken as float32. fp32
    accumulation (no TF32; float64 in the reference), one rounding; what does not fit becomes Inf. With beta = 0 the old
    values of c are not read, NaN among them is lost; with alpha = 0 a and b are not read. c must not overlap a or b.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides, factors that are not numbers, or an overlap.
    Source: BLAS's GEMM, Dongarra et al., ACM TOMS 16 (1990); cuBLAS on the GPU.

    >>> gemm(np.float32([[1, 2]]), np.float32([[3], [4]]), np.float32([[10]]), alpha=2.0, beta=0.5)
    array([[27.]], dtype=float32)
    """
    xp = namespace(a=a, b=b, c=c)
    check(a, "a", dtype=FLOATS, ndim=2)
    check(b, "b", dtype=a.dtype, ndim=2)
    check(b, "b", shape=(a.shape[1], None))
    check(c, "c", dtype=a.dtype, shape=(a.shape[0], b.shape[1]), writes=True)
    if a.shape[1] == 0:
        raise ValueError(f"a has no columns to multiply, its shape is {a.shape}")
    refuse_overlap(c, "c", a=a, b=b)
    alpha, beta = float32_factor(alpha, "alpha"), float32_factor(beta, "beta")
    if c.size == 0:
        return c
    if xp is np:
        store(c, gemm_reference(a, b, c, alpha, beta))
    else:
        multiply_into(c, a, b, alpha=alpha, beta=beta)
    return c


@np.errstate(invalid="ignore", over="ignore")
def gemm_reference(a, b, c, alpha, beta):
    y = np.zeros(c.shape) if alpha == 0 else float(alpha) * (float64(a) @ float64(b))
    return y if beta == 0 else y + float(beta) * float64(c)


# --- cuBLAS -----------------------------------------------------------------------------------------------------------

# Through ctypes, as CuPy's own wrapper refuses to be captured into a CUDA graph. The values are those of cublas_api.h and
# library_types.h.
_DATA_TYPES = {float16: 2, bfloat16: 14, float32: 0}
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1  # with tensor cores wherever they keep the arithmetic: GEMM_DEFAULT_TENSOR_OP is deprecated
_TRANSPOSED, _AS_STORED = 1, 0
# Partial sums of a split product stay in fp32; cuBLAS may otherwise round them to the type of the output.
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16


def multiply_into(out, x, weight, *, transpose=False, first_column=0, bias=None, alpha=1.0, beta=0.0):
    """out[:, first_column : first_column + columns] = alpha * x @ weight + beta * out, all 2-D CuPy arrays, without checks.

    cuBLAS is column-major: it computes out.T = weight.T @ x.T. A bias is written to out first and accumulated onto in fp32.
    cuBLAS chooses its kernel by the alignment of addresses, too: what does not begin at a multiple of 16 bytes is copied, so
    that the bits do not depend on where an array lies.
    """
    cuda, device_id = sys.modules["cupy"].cuda, x.data.device_id
    if device_id == cuda.runtime.getDevice():
        placed = _aligned(out)
        _multiply_here(cuda, device_id, placed, _aligned(x), _aligned(weight), transpose, first_column, bias, alpha, beta)
        if placed is not out:
            _copy(placed, out)
    else:
        with cuda.Device(device_id):
            multiply_into(out, x, weight, transpose=transpose, first_column=first_column, bias=bias, alpha=alpha, beta=beta)


def _aligned(array):
    if array.data.ptr % 16 == 0:
        return array
    return _copy(array, sys.modules["cupy"].empty(array.shape, array.dtype))


def _copy(array, to):
    if not is_tracing():
        copy_values(array, to)
    return to


def _multiply_here(cuda, device_id, out, x, weight, transpose, first_column, bias, alpha, beta):
    rows, k = x.shape
    weight_rows, weight_columns = weight.shape
    columns = weight_rows if transpose else weight_columns
    stride = out.shape[1]
    if bias is not None:
        fill_rows(bias, None, out, first_column, columns)
        beta = 1.0
    if is_tracing():
        return
    spoil()
    blas = _blas_of_this_thread(device_id)
    factors = _factors(alpha, beta)
    factors_at = ctypes.addressof(factors)
    status = blas.gemm(
        blas.handle_on(cuda.get_current_stream(device_id).ptr),
        _TRANSPOSED if transpose else _AS_STORED, _AS_STORED, columns, rows, k,
        factors_at, weight.data.ptr, _DATA_TYPES[weight.dtype], weight_columns,
        x.data.ptr, _DATA_TYPES[x.dtype], k,
        factors_at + 4, out.data.ptr + first_column * out.itemsize, _DATA_TYPES[out.dtype], stride,
        _COMPUTE_32F, _DEFAULT_ALGORITHM,
    )  # fmt: skip
    if status:
        _fail(status, f"multiply {rows} x {k} by {k} x {columns} in {x.dtype}")


@functools.lru_cache(maxsize=32)
def _factors(alpha, beta):
    """Both in memory for cuBLAS, which reads them during the call."""
    return (ctypes.c_float * 2)(alpha, beta)


_this_thread = threading.local()
_workspaces: dict[tuple[int, int], object] = {}  # by device and stream; kept, as captured graphs go on using them


def _blas_of_this_thread(device_id):
    try:
        return _this_thread.blas[device_id]
    except AttributeError:
        _this_thread.blas = {}
    except KeyError:
        pass
    return _this_thread.blas.setdefault(device_id, _Blas(device_id))


class _Blas:
    """A cuBLAS handle of one thread on one GPU, the current one.

    Not CuPy's handle: whatever CuPy does with that takes its workspace away, and it would keep the math mode set here.
    """

    def __init__(self, device_id):
        cupy = require_cupy()
        self._library = _cublas()
        cublas = cupy.cuda.cublas
        try:
            self._handle = cublas.create()
        except cublas.CUBLASError as error:
            raise BackendError(f"cuBLAS cannot start on GPU {device_id}: {error}") from None
        self._owner = cupy.cuda.device.Handle(self._handle, cublas.destroy)  # destroys it when the thread ends
        cublas.setMathMode(self._handle, _DISALLOW_REDUCED_PRECISION_REDUCTION)
        self._device_id = device_id
        self._workspace = None  # kept here too, for as long as cuBLAS may write there
        self.gemm = self._library.cublasGemmEx

    def handle_on(self, stream):
        """The handle, set to a stream.

        A workspace of the stream's own makes results the same on every run whatever other streams do ("Results
        Reproducibility" in NVIDIA's manual), and leaves nothing to allocate while a graph is captured.
        """
        workspace = _workspaces.get((self._device_id, stream))
        if workspace is None or workspace is not self._workspace:
            self._workspace = None
            if status := self._library.cublasSetStream_v2(self._handle, stream):
                _fail(status, "change to the current stream")
            workspace = _workspace(self._device_id, stream)  # set after the stream, which resets it
            if status := self._library.cublasSetWorkspace_v2(self._handle, workspace.data.ptr, workspace.size):
                _fail(status, "take a workspace")
            self._workspace = workspace
        return self._handle


def _workspace(device_id, stream):
    workspace = _workspaces.get((device_id, stream))
    if workspace is None:
        size = (32 if arch_number(info(device_id).arch) >= 90 else 4) << 20  # as NVIDIA's manual recommends
        workspace = _workspaces.setdefault((device_id, stream), sys.modules["cupy"].empty(size, np.uint8))
    return workspace


def forget_stream(device_id, stream):
    """Give back what is kept for products on a stream that is about to be destroyed."""
    _workspaces.pop((device_id, stream), None)


@functools.cache
def _cublas():
    """The cuBLAS that CuPy uses, with the signatures of what is called here."""
    cupy = require_cupy()
    try:
        # A symbol is looked for in the libraries that the named one was linked to as well, but on Windows. So this finds the
        # right one where PyTorch has loaded another.
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        library = ctypes.CDLL(f"cublas64_{major}.dll" if os.name == "nt" else cupy.cuda.cublas.__file__)
        number, pointer = ctypes.c_int, ctypes.c_void_p
        library.cublasSetStream_v2.argtypes = (pointer, pointer)
        library.cublasSetWorkspace_v2.argtypes = (pointer, pointer, ctypes.c_size_t)
        matrix = (pointer, number, number)
        factor = pointer
        library.cublasGemmEx.argtypes = (
            pointer, number, number, number, number, number, factor, *matrix, *matrix, factor, *matrix, number, number,
        )  # fmt: skip
        library.cublasGetStatusName.restype = ctypes.c_char_p
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"cuBLAS cannot be loaded ({first_line(error)}); install it with `pip install nvidia-cublas-cu12` "
            "(or `nvidia-cublas` for CUDA 13)"
        ) from None
    return library


def _fail(status, action):
    name = _cublas().cublasGetStatusName(status)
    raise BackendError(f"cuBLAS cannot {action}: {name.decode() if name else f'status {status}'}")


def fill_rows(bias, residual, out, first_column, columns):
    """out[:, first_column : ...] = bias + residual, what a product can be accumulated onto; either may be None."""
    rows, stride = out.shape
    arguments = (bias, residual, out, *map(np.int32, (rows, stride, first_column, columns)))
    launch(
        _fill_rows_instance(float32 if bias is None else bias.dtype, out.dtype),
        (-(-columns // 256), min(rows, 1024)),
        (256,),
        arguments,
    )


def _fill_rows_instance(bias, y):
    return instance("fill_rows", bias, y)


INSTANCES = [_fill_rows_instance(bias, y) for bias in FLOATS for y in FLOATS]
