"""Unquantised products, by cuBLAS: `matmul` for layers, `gemm` for the general form."""

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
    alpha, beta = _factor("alpha", alpha), _factor("beta", beta)
    if c.size == 0:
        return c
    if xp is np:
        store(c, gemm_reference(a, b, c, alpha, beta))
    else:
        multiply_into(c, a, b, alpha=alpha, beta=beta)
    return c


def _factor(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return np.float32(value)


@np.errstate(invalid="ignore", over="ignore")
def gemm_reference(a, b, c, alpha, beta):
    y = np.zeros(c.shape) if alpha == 0 else float(alpha) * (float64(a) @ float64(b))
    return y if beta == 0 else y + float(beta) * float64(c)


# cublasDataType / cublasComputeType values, from cublas_api.h and library_types.h
_DATA_TYPES = {float16: 2, bfloat16: 14, float32: 0}
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1
_TRANSPOSED, _AS_STORED = 1, 0


def multiply_into(out, x, weight, *, transpose=False, first_column=0, bias=None, alpha=1.0, beta=0.0):
    """out[:, first_column : first_column + columns] = alpha * x @ weight + beta * out, all 2-D CuPy arrays, without checks.

    cuBLAS is column-major: it computes out.T = weight.T @ x.T. A bias is written to out first and accumulated onto in fp32.
    """
    cupy = sys.modules["cupy"]
    rows, k = x.shape
    columns = weight.shape[0] if transpose else weight.shape[1]
    target = out.data.ptr + first_column * out.itemsize
    if bias is not None:
        _launch_fill_rows(bias, out, first_column, columns)
        beta = 1.0
    factors = np.array([alpha, beta], np.float32)  # cuBLAS reads them during the call
    with x.device:
        cupy.cuda.cublas.gemmEx(
            cupy.cuda.device.get_cublas_handle(), _TRANSPOSED if transpose else _AS_STORED, _AS_STORED, columns, rows, k,
            factors.ctypes.data, weight.data.ptr, _DATA_TYPES[weight.dtype], weight.shape[1],
            x.data.ptr, _DATA_TYPES[x.dtype], k,
            factors.ctypes.data + 4, target, _DATA_TYPES[out.dtype], out.shape[1], _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip


def _launch_fill_rows(bias, out, first_column, columns):
    rows, n = out.shape
    arguments = (bias, out, *map(np.int32, (rows, n, first_column, columns)))
    launch(_fill_rows_instance(bias.dtype, out.dtype), (-(-columns // 256), min(rows, 1024)), (256,), arguments)


def _fill_rows_instance(bias, y):
    return instance("fill_rows", bias, y)


INSTANCES = [_fill_rows_instance(bias, y) for bias in FLOATS for y in FLOATS]
