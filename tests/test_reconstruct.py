"""The weights of quantized matrices, bit for bit as the formats define them."""

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import banded, host, on_both, same_bits
from random_layers import MIXTURES, random_exl2, random_gptq, to_gpu

from cupyq import QMatrix
from cupyq.formats import exl2, gptq
from cupyq.ops.reconstruct import launch_reconstruct, reconstruct

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def check_reconstruct(cupy, q, exact, shift=0):
    """In the model's order and in the stored one, whole and from the 33rd column on, as float16 and as bfloat16."""
    out, check_bands = banded(cupy, np.full(exact.shape, np.nan, np.float16), shift)
    assert reconstruct(q, out=out) is out
    check_bands()
    assert same_bits(out.get(), exact)
    order = np.arange(q.k) if q.order is None else q.order.get()
    stored = np.where(order[:, None] < 0, np.float16(0), exact[order])
    for dtype in (np.float16, bfloat16):
        for first in (0, 32):
            if first >= q.n:
                continue
            for stored_order, expected in ((False, exact), (True, stored)):
                expected = np.ascontiguousarray(expected[:, first : first + 64]).astype(dtype)
                out, check_bands = banded(cupy, np.full(expected.shape, np.nan, dtype), shift)
                launch_reconstruct(q, out, first, stored_order=stored_order)
                check_bands()
                assert same_bits(out.get(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", MIXTURES)
def test_exl2_is_bit_exact(widths, cupy):
    rng = np.random.default_rng(1)
    for n, has_perm, group_blocks, shift in ((8, True, 1, 0), (112, False, 3, 8), (264, True, 2, 1), (1000, True, 1, 0)):
        tensors = random_exl2(rng, widths, n=n, has_perm=has_perm, group_blocks=group_blocks)
        q = QMatrix.from_tensors(to_gpu(cupy, tensors), prescale=0.7)
        check_reconstruct(cupy, q, exl2.dequantize_exl2(tensors, prescale=0.7), shift)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["v1", "v2", "v1-wrapped"])
def test_gptq_is_bit_exact(bits, version, cupy):
    rng = np.random.default_rng(2)
    for k, n, groups, act_order in (
        (96, 32, 1, False),
        (96, 96, 3, False),
        (288, 32, 6, False),
        (160, 64, 4, True),
        (320, 1024, 8, True),
    ):
        tensors = random_gptq(rng, bits, k=k, n=n, groups=groups, act_order=act_order, version=version)
        q = QMatrix.from_tensors(to_gpu(cupy, tensors), zeros=version)
        check_reconstruct(cupy, q, gptq.dequantize_gptq(tensors, zeros=version))


@pytest.mark.gpu
def test_other_shapes_of_gptq(cupy):
    """Thousands of rows in groups of 48, zeros of 256, columns that are four to the tile, a group without rows."""
    rng = np.random.default_rng(3)
    tensors = random_gptq(rng, 4, k=7392, n=112, groups=154, act_order=True)
    check_reconstruct(cupy, QMatrix.from_tensors(to_gpu(cupy, tensors)), gptq.dequantize_gptq(tensors))

    codes, scales = rng.integers(0, 256, (96, 36)), np.full((3, 36), 0.011, np.float16)
    zeros = np.full((3, 36), 256)
    zeros[1] = rng.integers(1, 257, 36)
    tensors = gptq.pack_gptq(codes, zeros, scales, np.arange(96) // 32, 8)
    check_reconstruct(cupy, QMatrix.from_tensors(to_gpu(cupy, tensors)), gptq.dequantize_gptq(tensors), shift=4)

    scales[2] = np.inf  # of a group nobody is in
    tensors = gptq.pack_gptq(codes, zeros, scales, rng.integers(0, 2, 96), 8)
    weight = gptq.dequantize_gptq(tensors)
    assert np.isfinite(weight).all()
    check_reconstruct(cupy, QMatrix.from_tensors(to_gpu(cupy, tensors)), weight)


@pytest.mark.gpu
def test_infinite_scales_leave_padding_zero(cupy):
    """Rows of padding meet a zero of x, which an infinity would make a NaN."""
    rng = np.random.default_rng(4)
    tensors = random_gptq(rng, 4, k=96, n=32, groups=4)
    tensors["scales"][1] = np.inf
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    out = cupy.asarray(np.full((4 * 32, 32), np.nan, np.float16))
    launch_reconstruct(q, out, 0, stored_order=True)
    order = q.order.get()
    assert (out.get()[order < 0] == 0).all() and (order < 0).sum() == 32
    assert not np.isfinite(out.get()[order >= 0]).all()


@pytest.mark.gpu
def test_a_wrong_weight_is_noticed(cupy):
    tensors = random_exl2(np.random.default_rng(5), (5, 3), n=40)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    exact = exl2.dequantize_exl2(tensors)
    wrong = {
        "another group's scale": exl2.dequantize_exl2(dict(tensors, q_scale=np.roll(tensors["q_scale"], 1, axis=0))),
        "columns shifted": np.roll(exact, 1, axis=1),
        "no permutation": exact[tensors["q_invperm"]],
        "one last bit": np.where(np.arange(exact.size).reshape(exact.shape) == 77, np.nextafter(exact, np.float16(9)), exact),
    }
    for what, mutated in wrong.items():
        with pytest.raises(AssertionError):
            check_reconstruct(cupy, q, mutated)
            pytest.fail(f"{what} was not noticed", pytrace=False)


@on_both
def test_matrix_and_out_are_checked(library, request):
    tensors = random_exl2(np.random.default_rng(6), (4,), n=32)
    xp = np if library == "numpy" else request.getfixturevalue("cupy")
    q = QMatrix.from_tensors({key: xp.asarray(value) for key, value in tensors.items()})
    with pytest.raises(TypeError, match="QMatrix"):
        reconstruct(tensors["q_weight"])
    with pytest.raises(TypeError, match="out must have dtype"):
        reconstruct(q, out=xp.zeros((q.k, q.n), np.float32))
    with pytest.raises(ValueError, match="out must have shape"):
        reconstruct(q, out=xp.zeros((q.n, q.k), np.float16))
    weight = reconstruct(q)
    assert weight.shape == (q.k, q.n) and weight.dtype == np.float16
    assert same_bits(host(weight), exl2.dequantize_exl2(tensors))
