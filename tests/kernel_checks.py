"""What the tests of kernels share: placing arrays, sentinel bands, and the bound on errors."""

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound

from cupyq import _device, _kernels

float16, bfloat16, float32 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32))
FLOATS = (float16, bfloat16, float32)

ROUNDING = {float16: 2.0**-11, bfloat16: 2.0**-8, float32: 2.0**-21}
"""Relative size of one rounding; for float32, 8 of 2**-24: its results carry every rounding of the fp32 chain."""

BAND = 64
_SENTINEL = 0xA5

on_both = pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])


def is_hopper():
    """Whether the current GPU takes the kernels of wgmma."""
    return _device.current().arch == "sm_90a"


def compile_on_hopper(forms):
    """Compile kernels of wgmma together, in parallel; other GPUs take other ones."""
    if is_hopper():
        _kernels.compile_all(dict.fromkeys(forms), "sm_90a")


def move(library, array):
    """The array on that library, without a change."""
    if library == "numpy" or not isinstance(array, np.ndarray):
        return array
    import cupy

    return cupy.asarray(array)


def host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def random(seed, shape, dtype, scale=1.0):
    """Normal values of the dtype."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32).astype(dtype)


def sylvester(x):
    """The 32-point transforms of the even and of the odd values of each 64, in float64: what q4 and q8 caches hold times 32."""
    matrix = np.array([[(-1.0) ** (r & c).bit_count() for c in range(32)] for r in range(32)])
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32, 2)
    return np.einsum("rc,...cp->...rp", matrix, pairs).reshape(x.shape)


def on_gpu(cupy, array, shift=0):
    """The array on the GPU, its first element `shift` elements beyond an aligned address."""
    padded = np.concatenate([np.zeros(shift, array.dtype), array.ravel()])
    return cupy.asarray(padded)[shift:].reshape(array.shape)


def banded(cupy, initial, shift=0):
    """(array on the GPU holding `initial`, check): check() raises unless the sentinels before and after it survived."""
    start, size, dtype = BAND + shift, initial.size, initial.dtype
    flat = np.full((start + size + BAND) * dtype.itemsize, _SENTINEL, np.uint8).view(dtype)
    flat[start : start + size] = initial.ravel()
    buffer = cupy.asarray(flat)

    def check():
        after = buffer.get()
        for band in (after[:start], after[start + size :]):
            assert np.all(band.view(np.uint8) == _SENTINEL), "the kernel wrote outside its output"

    return buffer[start : start + size].reshape(initial.shape), check


def unwritten(shape, dtype):
    return np.full(shape, np.nan, dtype)


def near(result, exact, rounded_reference):
    """Raise unless `result` is as good as fp32 arithmetic rounded once: per element, and (many elements) in the mean.

    exact: float64; rounded_reference: plain float32 NumPy arithmetic rounded to result's dtype.
    """
    assert result.shape == exact.shape and result.dtype == rounded_reference.dtype
    rounding = ROUNDING[result.dtype]
    exact_bound(result, exact, rounded_reference, ulp=rounding)
    if exact.size >= 1000:
        error, usual = (_root_mean_square(a.astype(np.float64) - exact) for a in (result, rounded_reference))
        allowed = 1.5 * usual + 2.0**-21 * _root_mean_square(exact)
        assert error <= allowed, f"mean error {error:.3g}, allowed {allowed:.3g}"


def _root_mean_square(values):
    return np.sqrt(np.mean(values * values))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
