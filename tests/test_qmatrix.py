"""QMatrix: what it keeps of a checkpoint's tensors, and that it alters and holds none of them."""

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import host, on_both, same_bits
from random_layers import random_exl2, random_gptq

from cupyq import QMatrix
from cupyq.ops.reconstruct import reconstruct


def moved(xp, tensors):
    return {key: xp.asarray(value) for key, value in tensors.items()}


def module(library, request):
    return np if library == "numpy" else request.getfixturevalue("cupy")


@on_both
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_bias_is_kept_in_float32(library, dtype, request):
    xp = module(library, request)
    rng = np.random.default_rng(1)
    for n in (32, 1024):
        tensors = random_gptq(rng, 4, k=64, n=n, groups=2)
        bias = rng.standard_normal(n).astype(dtype)
        given, expected = xp.asarray(bias), bias.astype(np.float32)
        for q in (
            QMatrix.from_tensors(moved(xp, tensors | {"bias": bias})),
            QMatrix.from_tensors(moved(xp, tensors), bias=bias.copy()),
            QMatrix.from_tensors(moved(xp, tensors), bias=given),
        ):
            assert isinstance(q.bias, type(given)) and same_bits(host(q.bias), expected)
        given.view(np.uint8).fill(0)
        assert same_bits(host(q.bias), expected)


@on_both
def test_order_is_the_stored_one_on_a_gpu(library, request):
    xp = module(library, request)
    rng = np.random.default_rng(2)
    permuted = random_exl2(rng, (4, 3), n=32)
    padded = random_gptq(rng, 4, k=96, n=32, groups=2)
    plain = random_exl2(rng, (4, 3), n=32, has_perm=False)
    orders = [QMatrix.from_tensors(moved(xp, tensors)).order for tensors in (permuted, padded, plain)]
    assert orders[2] is None
    if xp is np:
        assert orders == [None] * 3
    else:
        assert same_bits(orders[0].get(), np.argsort(permuted["q_invperm"]).astype(np.int32))
        assert list(orders[1].get()) == [*range(48), *[-1] * 16, *range(48, 96), *[-1] * 16]


@on_both
def test_tensors_stay_as_they_were(library, request):
    xp = module(library, request)
    rng = np.random.default_rng(3)
    for tensors in (random_exl2(rng, (6, 2), n=40, has_bias=True), random_gptq(rng, 3, k=128, n=32, groups=4, act_order=True)):
        given = moved(xp, tensors)
        before = host(reconstruct(QMatrix.from_tensors(given))).copy()
        for key, value in tensors.items():
            assert same_bits(host(given[key]), value)
        if xp is not np:
            q = QMatrix.from_tensors(given)
            for value in given.values():
                value.fill(0)
            assert same_bits(host(reconstruct(q)), before)


@pytest.mark.gpu
def test_building_on_the_gpu_waits_for_nothing(cupy):
    """Behind a long wait on the stream, so that a synchronisation would show as a stream that is done."""
    rng = np.random.default_rng(4)
    tables = ("q_groups", "q_invperm", "q_scale_max", "g_idx")
    layers = [random_exl2(rng, (5, 4), n=64, has_bias=True), random_gptq(rng, 4, k=128, n=64, groups=4, has_bias=True)]
    layers = [{key: value if key in tables else cupy.asarray(value) for key, value in layer.items()} for layer in layers]
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long a = clock64(); while (clock64() - a < n); }', "spin"
    )
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for cycles in (0, 400_000_000):  # first everything is compiled, and the memory pools filled
            for layer in layers:
                spin((1,), (1,), (np.int64(cycles),))
                QMatrix.from_tensors(layer)
                was_pending = not stream.done
                stream.synchronize()
                assert was_pending or not cycles
