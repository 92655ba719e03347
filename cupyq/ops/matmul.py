"""Unquantised products, by cuBLAS."""

import math
import sys

import numpy as np

from cupyq._arrays import FLOATS, accepts_dlpack, bfloat16, check, float16, float32, namespace, output
from cupyq._kernels import instance, launch
from cupyq.ops._common import float64, refuse_overlap, store


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
    k, n = weight.shape[::-1] if transpose else weight.shape
    check(x, "x", last=k)
    if k == 0:
        raise ValueError(f"weight has no rows to multiply by, its shape is {weight.shape}")
    if bias is not None:
        check(bias, "bias", dtype=FLOATS, shape=(n,))
    out = output(xp, out, (*x.shape[:-1], n), x.dtype if dtype is None else np.dtype(dtype))
    check(out, "out", dtype=(x.dtype, float32))
    refuse_overlap(out, "out", x=x, weight=weight, bias=bias)
    if out.size == 0:
        return out
    if xp is np:
        store(out, matmul_reference(x, weight, transpose, bias))
    else:
        rows = math.prod(x.shape[:-1])
        gemm(x.reshape(rows, k), weight, out.reshape(rows, n), transpose=transpose, bias=bias)
    return out


def matmul_reference(x, weight, transpose, bias):
    weight = float64(weight).T if transpose else float64(weight)
    # One 2-D product: BLAS takes it whole, where NumPy would multiply the matrices of a stack one by one.
    rows = math.prod(x.shape[:-1])
    y = float64(x).reshape(rows, x.shape[-1]) @ weight
    if bias is not None:
        y += float64(bias)
    return y.reshape(*x.shape[:-1], weight.shape[1])


# cublasDataType / cublasComputeType values, from cublas_api.h and library_types.h
_DATA_TYPES = {float16: 2, bfloat16: 14, float32: 0}
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1
_TRANSPOSED, _AS_STORED = 1, 0
_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def gemm(x, weight, out, *, transpose=False, first_column=0, bias=None):
    """out[:, first_column : first_column + columns] = x @ weight (+ bias), all 2-D CuPy arrays, without checks.

    cuBLAS is column-major: it computes out.T = weight.T @ x.T. A bias is written to out first and accumulated onto in fp32.
    """
    cupy = sys.modules["cupy"]
    rows, k = x.shape
    columns = weight.shape[0] if transpose else weight.shape[1]
    target = out.data.ptr + first_column * out.itemsize
    beta = _ZERO
    if bias is not None:
        _launch_fill_rows(bias, out, first_column, columns)
        beta = _ONE
    with x.device:
        cupy.cuda.cublas.gemmEx(
            cupy.cuda.device.get_cublas_handle(), _TRANSPOSED if transpose else _AS_STORED, _AS_STORED, columns, rows, k,
            _ONE.ctypes.data, weight.data.ptr, _DATA_TYPES[weight.dtype], weight.shape[1],
            x.data.ptr, _DATA_TYPES[x.dtype], k,
            beta.ctypes.data, target, _DATA_TYPES[out.dtype], out.shape[1], _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip


def _launch_fill_rows(bias, out, first_column, columns):
    rows, n = out.shape
    arguments = (bias, out, *map(np.int32, (rows, n, first_column, columns)))
    launch(_fill_rows_instance(bias.dtype, out.dtype), (-(-columns // 256), min(rows, 1024)), (256,), arguments)


def _fill_rows_instance(bias, y):
    return instance("fill_rows", bias, y)


INSTANCES = [_fill_rows_instance(bias, y) for bias in FLOATS for y in FLOATS]
