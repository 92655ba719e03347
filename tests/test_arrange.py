"""Rows arranged as images for the products of Hopper: how they are shared out, references, and kernels to the bit."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from kernel_checks import banded, bfloat16, float16, float32, is_hopper, on_gpu, random, unwritten

from cupyq import QMatrix, _device, _kernels
from cupyq.formats import exl2
from cupyq.ops import arrange
from cupyq.ops import qmatmul_wgmma as wgmma
from cupyq.ops.activation import launch_activate
from cupyq.ops.norm import rms_norm
from cupyq.ops.qmatmul_config import COUNTERS

FUNCTIONS = {
    "SILU": lambda x: x / (1 + math.exp(-x)),
    "GELU": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "GELU_TANH": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "RELU": lambda x: max(x, 0.0),
}


def random_order(rng, k, blocks):
    """Every column once and -1 for the other stored rows."""
    order = np.full(32 * blocks, -1, np.int32)
    order[rng.permutation(32 * blocks)[:k]] = rng.permutation(k)
    return order


def place(row, column, rows):
    """Where the images have a value: [row block, stage, row, place in the row]."""
    r, j = row % rows, column % 64
    return row // rows, column // 64, r, (j // 8 ^ r % 8) * 8 + j % 8


# --- references -------------------------------------------------------------------------------------------------------


def test_images_are_where_the_formula_says():
    rng = np.random.default_rng(1)
    x = rng.integers(1, 60000, (5, 160)).astype(np.uint16)
    for order, blocks in ((None, 5), (random_order(rng, 160, 6), 6)):
        images = arrange.arrange_rows_reference(x, order, blocks, 32)
        assert images.shape == (1, 3, 32, 64)
        for row in range(32):
            for at in range(192):
                source = -1 if at >= 32 * blocks else at if order is None else order[at]
                expected = x[row, source] if row < 5 and source >= 0 else 0
                assert images[place(row, at, 32)] == expected


@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_references_of_a_norm_and_of_gates(dtype):
    """Against one value at a time; float64 within its own errors before the one rounding."""
    rng = np.random.default_rng(2)
    m, k, blocks, rows = 35, 96, 4, 32
    x, weight, up = random(3, (m, k), float32, 3.0), random(4, k, float32), random(5, (m, k), dtype)
    gate = x.astype(dtype)
    ulp = 2.0**-11 if dtype == float16 else 2.0**-8
    for order in (random_order(rng, k, blocks), None):
        found = {"NORM": arrange.arrange_normed_reference(x, weight, 0.25, dtype, order, blocks, rows)}
        for function in FUNCTIONS:
            found[function] = arrange.arrange_gated_reference(gate, up, function, order, blocks, rows)
        for row in range(m):
            scale = 1 / math.sqrt(math.fsum(float(v) ** 2 for v in x[row]) / k + 0.25)
            for at in range(32 * blocks):
                c = order[at] if order is not None else at if at < k else -1
                for name, images in found.items():
                    value = float(images[place(row, at, rows)])
                    if c < 0:
                        assert value == 0
                    elif name == "NORM":
                        assert value == pytest.approx(float(x[row, c]) * float(weight[c]) * scale, rel=ulp, abs=1e-7)
                    else:
                        expected = FUNCTIONS[name](float(gate[row, c])) * float(up[row, c])
                        assert value == pytest.approx(expected, rel=ulp, abs=1e-7)
        for images in found.values():
            assert images.dtype == dtype and images.shape == (2, 2, 32, 64)
            assert not images[1, :, 3:].any()


# --- how rows are shared out ------------------------------------------------------------------------------------------


def device(sm_count, shared_kib, arch="sm_90a"):
    return _device.DeviceInfo(0, "", arch, sm_count, shared_kib * 1024, 1 << 20, 1 << 30)


@pytest.mark.parametrize("k", [64, 4096, 14336, 28672, 53248, 60000])
@pytest.mark.parametrize("image_rows", [32, 64, 512, 4096])
def test_thread_blocks_are_all_at_work_at_once(k, image_rows):
    stages = -(-k // 64)
    for gpu in (device(132, 227), device(108, 163), device(3, 227)):
        for has_order in (True, False):
            for threads, most_blocks in ((512, 2), (512, 4), (32, 32)):
                cut = arrange.cut_rows(image_rows, stages, 2 * k + 16, threads, has_order, most_blocks, gpu)
                row_blocks, parts = cut.grid
                part_bytes = -(-stages // parts) * 128 if has_order else 0
                assert cut.threads == threads and cut.shared_bytes == 2 * k + 16 + part_bytes
                fitting = min(most_blocks, (gpu.shared_bytes_per_block + 1024) // (cut.shared_bytes + 1024))
                assert fitting >= 1
                assert 1 <= row_blocks <= image_rows
                assert row_blocks * parts < fitting * gpu.sm_count + parts  # at most one round
                assert row_blocks == image_rows or row_blocks * parts >= fitting * gpu.sm_count
                assert parts <= stages
                if image_rows >= 2 * gpu.sm_count and k <= 28672:
                    assert parts == 1  # none reads a row twice


def test_rows_that_are_too_long_have_no_cut():
    cut = functools.partial(arrange.cut_rows, threads=512, has_order=True, most_blocks=2)
    assert cut(32, 1000, 128016, device=device(132, 227)) is not None
    assert cut(32, 1000, 128016, device=device(132, 99)) is None
    # The columns of a row and the row do not fit: each part has the row and some of the columns.
    assert cut(4096, 1000, 128016, device=device(132, 227)).grid[1] == 2


def test_a_product_may_have_its_images_from_another_kernel(monkeypatch):
    """arrange gets the order, the images' memory and the rows of one; without it, x is arranged."""
    called, launched = [], []
    monkeypatch.setattr(wgmma, "launch_arrange_rows", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(wgmma, "launch", lambda wanted, *rest: launched.append(wanted))
    config = wgmma.make_wgmma_config(70, (256,), (0, 0, 0, 4, 0, 0), False, 132, rows=64, warpgroups_n=2, waves=0, runs=1)
    q = SimpleNamespace(
        blocks=4, order="order", rows=None, n=256, matrices=(None,), kind="exl2", width_blocks=(0, 0, 0, 4, 0, 0), xp=np
    )
    out = np.zeros((70, 256), np.float16)
    for is_ordered, order in ((False, "order"), (True, None)):
        options = dict(config=config, is_ordered=is_ordered)
        wgmma.launch_wgmma(out, q, out, 70, **options)
        (x, given, images, m, blocks, rows) = called.pop()
        assert x is out and (given, images.nbytes, m, blocks, rows) == (order, 2 * 2 * 64 * 128, 70, 4, 64)
        wgmma.launch_wgmma(None, q, out, 70, arrange=lambda *a: called.append(a), dtype=bfloat16, **options)
        (given, images, rows) = called.pop()
        assert (given, images.nbytes, rows) == (order, 2 * 2 * 64 * 128, 64)
        assert "half" in str(launched[-2]) and "bfloat16" in str(launched[-1])


# --- on the GPU -------------------------------------------------------------------------------------------------------


def images_of(cupy, launched, m, blocks, rows):
    """What launched(images) writes, as uint16 [row blocks, stages, rows, 64]; sentinels and a second run are checked."""
    shape = (-(-m // rows), -(-blocks // 2), rows, 64)
    results = []
    for _ in range(2):
        images, check = banded(cupy, unwritten(math.prod(shape) // 2, float32))
        launched(images)
        check()
        results.append(images.get())
    assert results[0].tobytes() == results[1].tobytes()
    return results[0].view(np.uint16).reshape(shape)


def on_the_gpu(cupy, order):
    return None if order is None else cupy.asarray(order)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [(2, 1), (1,), ()])
def test_images_on_the_gpu(slots, cupy, monkeypatch):
    """With rows in shared memory, two or one of a thread block, and from where they are."""
    monkeypatch.setattr(arrange, "SLOTS", slots)
    rng = np.random.default_rng(2)
    for k, blocks, has_order, offset in (
        (96, 3, False, 0),
        (96, 3, False, 1),
        (160, 6, True, 0),
        (160, 5, True, 1),
        (8, 1, True, 0),
        (4128, 129, True, 0),
        (28672, 896, True, 8),
        (60000, 1875, True, 0),  # in parts, as columns and row do not fit
        (65536, 2048, True, 0),  # columns are no 16-bit numbers
    ):
        order = random_order(rng, k, blocks) if has_order else None
        many = ((600, 64),) if k < 5000 else ()  # more than one row for a thread block
        for m, rows in ((1, 32), (33, 32), (131, 128), *many):
            if m > 33 and k > 30000:
                continue
            x = rng.integers(0, 60000, (m, k)).astype(np.uint16)
            given, column = on_gpu(cupy, x, offset), on_the_gpu(cupy, order)
            launched = functools.partial(arrange.launch_arrange_rows, given, column, m=m, blocks=blocks, rows=rows)
            found = images_of(cupy, launched, m, blocks, rows)
            np.testing.assert_array_equal(found, arrange.arrange_rows_reference(x, order, blocks, rows))


NORMED = [(float32, float32, float16), (float32, float32, bfloat16), (float16, float16, float16), (bfloat16, float32, bfloat16)]
NORMED_SIZES = [  # m, k, blocks, rows, elements that x is off an aligned address; more rows than thread blocks
    (4100, 96, 3, 32, 0),
    (1, 1056, 34, 64, 0),
    (700, 1056, 33, 128, 1),
    (300, 4128, 129, 32, 0),
    (3, 28672, 896, 32, 0),
]


@pytest.fixture(scope="module")
def instances():
    """Compiled together, in parallel."""
    sizes = [(1, 4), (1, 8), (8, 4), (8, 8), (8, 1), (16, 4), (16, 8)]
    normed = [
        arrange._normed_instance(*types, vector, warps)
        for types in NORMED
        for warps, vector in sizes
        if vector in (1, 16 // max(np.dtype(t).itemsize for t in types))
    ]
    gated = [arrange._gated_instance(t, function, v) for t in (float16, bfloat16) for function in FUNCTIONS for v in (8, 1)]
    _kernels.compile_all([*arrange.INSTANCES, *normed, *gated], _device.current().arch)


@pytest.mark.gpu
@pytest.mark.parametrize(("x_dtype", "weight_dtype", "dtype"), NORMED)
def test_a_norm_arranged_has_the_bits_of_both_kernels(x_dtype, weight_dtype, dtype, instances, cupy):
    rng = np.random.default_rng(6)
    for m, k, blocks, rows, offset in NORMED_SIZES:
        x, weight = random(7, (m, k), x_dtype, 5.0), random(8, k, weight_dtype)
        x[m // 2] = 0
        given, scale = on_gpu(cupy, x, offset), cupy.asarray(weight)
        normed = rms_norm(given, scale, eps=1e-5, dtype=dtype).get()
        for order in (random_order(rng, k, blocks), *([None] if k == 32 * blocks else [])):
            launched = functools.partial(
                arrange.launch_arrange_normed, given, scale, 1e-5, dtype, on_the_gpu(cupy, order), m=m, blocks=blocks, rows=rows
            )
            found = images_of(cupy, launched, m, blocks, rows)
            expected = arrange.arrange_rows_reference(normed, order, blocks, rows)
            np.testing.assert_array_equal(found, expected.view(np.uint16))
        if order is None:  # the two may round to either side
            reference = arrange.arrange_normed_reference(x, weight, 1e-5, dtype, None, blocks, rows)
            rounding = 2.0**-10 if dtype == float16 else 2.0**-7
            np.testing.assert_allclose(*(a.astype(np.float64) for a in (found.view(dtype), reference)), rounding, 1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [float16, bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gated_product_arranged_has_the_bits_of_both_kernels(function, dtype, instances, cupy):
    rng = np.random.default_rng(9)
    long = ((2, 28672, 896, 32, 0),) if function == "SILU" else ()
    for m, k, blocks, rows, offset in ((33, 96, 3, 32, 0), (131, 160, 6, 128, 1), (300, 4128, 129, 64, 0), *long):
        gate, up = random(10, (m, k), dtype, 4.0), random(11, (m, k), dtype)
        gate[0, :3] = [np.inf, -np.inf, np.nan]
        gates, ups = on_gpu(cupy, gate, offset), on_gpu(cupy, up)
        product = cupy.empty((m, k), dtype)
        launch_activate(function, gates, ups, product)
        for order in (random_order(rng, k, blocks), *([None] if k == 32 * blocks else [])):
            column = on_the_gpu(cupy, order)
            launched = functools.partial(
                arrange.launch_arrange_gated, gates, ups, function, column, m=m, blocks=blocks, rows=rows
            )
            found = images_of(cupy, launched, m, blocks, rows)
            expected = arrange.arrange_rows_reference(product.get(), order, blocks, rows)
            np.testing.assert_array_equal(found, expected.view(np.uint16))


@pytest.mark.gpu
def test_products_of_a_norm_and_of_a_gate(cupy):
    """launch_wgmma with these kernels: the bits of the product of their result."""
    if not is_hopper():
        return
    rng = np.random.default_rng(12)
    k, n, m = 480, 264, 100
    codes, scales = rng.integers(0, 16, (k, n)).astype(np.uint8), rng.integers(0, 16, (4, n))
    sizes, maxima = [128, 128, 128, 96], np.full(4, 0.3, np.float16)
    tensors = exl2.pack_exl2(codes, scales, maxima, [4] * 4, sizes, rng.permutation(k))
    q = QMatrix.from_tensors({name: cupy.asarray(value) for name, value in tensors.items()})
    x, weight = cupy.asarray(random(13, (m, k), float32)), cupy.asarray(random(14, k, float32))
    gate, up = cupy.asarray(random(15, (m, k), bfloat16)), cupy.asarray(random(16, (m, k), bfloat16))
    gated = cupy.empty((m, k), bfloat16)
    launch_activate("SILU", gate, up, gated)

    def by_norm(order, images, rows):
        arrange.launch_arrange_normed(x, weight, 1e-6, float16, order, images, m, q.blocks, rows)

    def by_gate(order, images, rows):
        arrange.launch_arrange_gated(gate, up, "SILU", order, images, m, q.blocks, rows)

    for whole, arranged in ((rms_norm(x, weight, dtype=float16), by_norm), (gated, by_gate)):
        results = []
        for given, options in ((whole, {}), (None, dict(arrange=arranged, dtype=whole.dtype))):
            out = cupy.asarray(unwritten((m, n), whole.dtype))
            parts = wgmma.wgmma_workspace_parts(m, q.blocks, wgmma.wgmma_config(q, m))
            workspace = cupy.full(COUNTERS + sum(parts), np.nan, np.float32)
            workspace[:COUNTERS] = 0
            wgmma.launch_wgmma(given, q, out, m, workspace, **options)
            results.append(out.get())
        assert results[0].tobytes() == results[1].tobytes()
        assert np.isfinite(results[0].astype(np.float32)).all() and results[0].any()
