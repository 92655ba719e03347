"""Quantized products with many rows on Hopper: how they are cut, and the kernel against float64."""

import math

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, needs_cupy
from kernel_checks import is_hopper

from cupyq import QMatrix, _kernels
from cupyq.formats import exl2, gptq
from cupyq.ops import qmatmul_wgmma as wgmma
from cupyq.ops.qmatmul_config import COUNTERS
from cupyq.ops.qmatrix_join import JoinedQMatrix
from cupyq.ops.reconstruct import reconstruct

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ULP = {np.dtype(np.float16): 2**-11, BFLOAT16: 2**-8}
ONLY_4, EVERY = (0, 0, 0, 64, 0, 0), (3, 5, 7, 64, 2, 1)


def segments(config):
    """[thread block: [(item, begin, end, thread blocks that share the item)]], as Schedule of cu/qmatmul_wgmma.cu has it."""
    blocks = []
    whole = config.waves * config.thread_blocks
    for block in range(config.thread_blocks):
        found = [(w * config.thread_blocks + block, 0, config.stages, 1) for w in range(config.waves)]
        run, end = block * config.run_stages, (config.items - whole) * config.stages
        end = min(run + config.run_stages, end)
        while run < end:
            shared, begin = divmod(run, config.stages)
            stop = min(config.stages, begin + end - run)
            first = shared * config.stages // config.run_stages
            last = ((shared + 1) * config.stages - 1) // config.run_stages
            assert first <= block <= last
            found.append((whole + shared, begin, stop, last - first + 1))
            run += stop - begin
        blocks.append(found)
    return blocks


@pytest.mark.parametrize("m", [1, 24, 64, 65, 200, 1000, 4096, 20000])
@pytest.mark.parametrize(
    ("ns", "width_blocks"), [((4096,), ONLY_4), ((28672,), EVERY), ((40,), ONLY_4), ((4096, 1024, 1000), EVERY)]
)
def test_a_cut_takes_every_stage_once(m, ns, width_blocks):
    for sm_count, has_zeros in ((132, False), (114, True), (3, False)):
        configs = wgmma.candidate_wgmma_configs(m, ns, width_blocks, has_zeros, sm_count)
        assert wgmma.pick_wgmma_config(m, ns, width_blocks, has_zeros, sm_count) in configs
        for config in configs[:: 1 if m < 2000 else 4]:
            stages = -(-sum(width_blocks) // 2)
            items = -(-m // config.rows) * sum(math.ceil(n / (128 * config.warpgroups_n)) for n in ns)
            taken = np.zeros((items, stages), np.int32)
            sharing = np.zeros(items, np.int32)
            of_blocks = segments(config)
            for found in of_blocks:
                for item, begin, end, _ in found:
                    taken[item, begin:end] += 1
                    sharing[item] += 1
                assert sum(0 < begin for _, begin, _, _ in found) <= 1  # one place for a part that is not an item's first
                assert sum(begin == 0 and end < stages for _, begin, end, _ in found) <= 1
                assert all(parts == 1 for _, begin, end, parts in found if begin == 0 and end == stages)
            assert (taken == 1).all()
            assert (sharing.max() > 1) <= config.is_shared
            for found in of_blocks:
                assert all(sharing[item] == parts for item, _, _, parts in found)
            assert config.thread_blocks <= sm_count
            assert not config.is_shared or 2 * config.shared_items <= COUNTERS
            assert config.shared_bytes <= wgmma.SHARED_BYTES - 512
            # The parities of its barriers tell too little apart in shorter rings.
            assert config.ring >= 3 if config.warpgroups_n == 2 else config.ring >= 6 and config.ring % 2 == 0


def test_large_products_keep_every_multiprocessor_busy():
    """Not more than 12 % beyond the time of products on all of them, in the units of the model's longest thread block."""
    for m, n, blocks in ((256, 28672, 256), (1024, 28672, 256), (4096, 8192, 896), (4096, 4096, 128)):
        config = wgmma.pick_wgmma_config(m, (n,), (0, 0, 0, blocks, 0, 0), False, 132)
        longest = config.waves * config.stages + min(config.run_stages, config.shared_items * config.stages)
        even = m * n * config.stages / (config.rows * 128 * config.warpgroups_n) / 132
        assert longest <= 1.12 * even, config


@pytest.mark.parametrize("rows", [64, 128])
def test_products_are_not_serialised(rows):
    """ptxas says so (C7510 and others) where it must wait for every single product, at half the speed."""
    needs_cupy()
    wanted = wgmma.wgmma_instance(np.float16, False, ONLY_4, rows, 2)
    log = _kernels.compile_instance(wanted, "sm_90a", ("--ptxas-options=-v",))[2]
    assert "Used 168 registers" in log and "serialized" not in log, log


# --- on the GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances():
    """Compiled together, in parallel. None where there is no Hopper GPU: there the kernel is never launched."""
    if not is_hopper():
        return None
    sizes = [(rows, warpgroups_n) for rows in (32, 64, 128) for warpgroups_n in (1, 2)]
    forms = [wgmma.wgmma_instance(dtype, False, ONLY_4, *size) for dtype in (np.dtype(np.float16), BFLOAT16) for size in sizes]
    wanted = list(dict.fromkeys([*wgmma.INSTANCES, *forms]))
    _kernels.compile_all(wanted, "sm_90a")
    return wanted


def random_exl2(rng, k, n, widths, *, group=64, has_perm=True, has_bias=False):
    rows = [group] * (k // group) + ([k % group] if k % group else [])
    bits = [widths[i * len(widths) // len(rows)] for i in range(len(rows))]
    codes = np.concatenate([rng.integers(0, 1 << b, (r, n)) for b, r in zip(bits, rows, strict=True)]).astype(np.uint8)
    scale_max = (2.0 ** (3 - np.array(bits)) * (0.3 + rng.random(len(bits)))).astype(np.float16)
    perm = rng.permutation(k) if has_perm else None
    tensors = exl2.pack_exl2(codes, rng.integers(0, 16, (len(bits), n)), scale_max, bits, rows, perm)
    if has_bias:
        tensors["bias"] = rng.standard_normal(n).astype(np.float16)
    return tensors


def on_gpu(cupy, tensors):
    return QMatrix.from_tensors({key: cupy.asarray(value) for key, value in tensors.items()})


def cut(q, m, sm_count, **choices):
    ns = tuple(matrix.n for matrix in q.matrices)
    config = wgmma.make_wgmma_config(m, ns, q.width_blocks, q.kind == "gptq", sm_count, **choices)
    assert config is not None
    return config


def product(cupy, q, x, config, *, dtype=None, residual=None):
    """The result as a NumPy array; sentinels round it, the counters and a second run are checked."""
    m = x.shape[0]
    dtype = np.dtype(dtype or x.dtype)
    pad = 16 // dtype.itemsize
    size = wgmma.wgmma_workspace_parts(m, q.blocks, config)
    workspace = cupy.full(COUNTERS + sum(size), np.nan, np.float32)
    workspace[:COUNTERS] = 0
    given = cupy.asarray(x)
    results = []
    for _ in range(2):
        guarded = cupy.asarray(np.full(m * q.n + 2 * pad, np.nan, dtype))
        out = guarded[pad:-pad].reshape(m, q.n)
        if residual is not None:
            out[...] = cupy.asarray(residual)
        wgmma.launch_wgmma(given, q, out, m, workspace, config=config, residual=None if residual is None else out)
        frame = guarded.get().astype(np.float32)
        assert np.isnan(frame[:pad]).all() and np.isnan(frame[-pad:]).all()
        assert not workspace[:COUNTERS].get().view(np.uint32).any()
        results.append(out.get())
    assert results[0].tobytes() == results[1].tobytes()
    return results[0]


def check_product(y, x, weight, added=0.0):
    """As near float64 as twice a product of the same dtypes with fp32 sums, plus one rounding. `added`: bias, residual.

    float32 results show the sums of the tensor cores themselves, which drop bits that IEEE additions keep.
    """
    rounded = weight.astype(x.dtype)
    exact = x.astype(np.float64) @ rounded.astype(np.float64) + added
    if y.dtype == np.float32:
        assert np.linalg.norm(y - exact) < 1e-5 * np.linalg.norm(exact)
        assert np.abs(y - exact).max() < 1e-4 * np.sqrt(np.mean(exact**2))
        return
    same = (x.astype(np.float32) @ rounded.astype(np.float32) + np.float32(added)).astype(y.dtype)
    exact_bound(y, exact, same, ulp=ULP[y.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
@pytest.mark.parametrize(("rows", "warpgroups_n"), [(32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)])
def test_products_of_every_form(rows, warpgroups_n, dtype, instances, cupy):
    if instances is None:
        return
    rng = np.random.default_rng(3)
    form, shortest = dict(rows=rows, warpgroups_n=warpgroups_n), 3 if warpgroups_n == 2 else 6
    tensors = random_exl2(rng, 480, 328, (4,), has_bias=True)  # an odd number of blocks, a part of a tile
    q, weight = on_gpu(cupy, tensors), exl2.dequantize_exl2(tensors)
    bias = tensors["bias"].astype(np.float64)
    cuts = ((1, 132, dict(waves=0, runs=1)), (130, 132, dict(waves=0, runs=2)), (300, 5, dict(waves=0, runs=None)))
    for m, sm_count, choices in (*cuts, (500, 3, dict(waves=1, runs=None)), (500, 2, dict(waves=0, runs=None, ring=shortest))):
        config = cut(q, m, sm_count, **form, **choices)
        x = rng.standard_normal((m, 480)).astype(np.float32).astype(dtype)
        check_product(product(cupy, q, x, config), x, weight, bias)
        check_product(product(cupy, q, x, config, dtype=np.float32), x, weight, bias)
        residual = rng.standard_normal((m, 328)).astype(np.float32).astype(dtype)
        check_product(product(cupy, q, x, config, residual=residual), x, weight, bias + residual.astype(np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_products_of_every_width_and_of_gptq(dtype, instances, cupy):
    if instances is None:
        return
    rng = np.random.default_rng(4)
    tensors = random_exl2(rng, 544, 264, (8, 6, 5, 4, 3, 2), group=32)
    matrices = [(on_gpu(cupy, tensors), exl2.dequantize_exl2(tensors))]
    for act_order in (False, True):
        row_group = rng.integers(0, 5, 352) if act_order else np.arange(352) // 64
        codes, scales = rng.integers(0, 16, (352, 264)), (0.01 + 0.05 * rng.random((6, 264))).astype(np.float16)
        packed = gptq.pack_gptq(codes, rng.integers(1, 17, (6, 264)), scales, row_group, 4, "v1")
        matrices.append((on_gpu(cupy, packed), gptq.dequantize_gptq(packed)))
    for q, weight in matrices:
        np.testing.assert_array_equal(reconstruct(q).get(), weight)
        for m, sm_count, choices in ((100, 132, dict(waves=0, runs=1)), (300, 5, dict(waves=0, runs=None))):
            x = rng.standard_normal((m, q.k)).astype(np.float32).astype(dtype)
            config = cut(q, m, sm_count, rows=128, warpgroups_n=2, **choices)
            y = product(cupy, q, x, config, dtype=np.float32)
            check_product(y, x, weight)
            wrong = {
                "rows shifted": np.roll(weight, 1, axis=0),
                "columns shifted": np.roll(weight, 1, axis=1),
                "a block of 32 rows late": np.roll(weight, 32, axis=0),
                "one row of W left out": np.where(np.arange(q.k)[:, None] == 7, np.float16(0), weight),
            }
            for what, mutated in wrong.items():
                with pytest.raises(AssertionError):
                    check_product(y, x, mutated)
                    pytest.fail(f"{what} was not noticed", pytrace=False)


@pytest.mark.gpu
def test_products_side_by_side(instances, cupy):
    if instances is None:
        return
    rng = np.random.default_rng(5)
    tensors = [random_exl2(rng, 512, n, (4,), has_perm=False, has_bias=n == 40) for n in (264, 40, 128)]
    matrices = [on_gpu(cupy, t) for t in tensors]
    weight = np.concatenate([exl2.dequantize_exl2(t) for t in tensors], axis=1)
    bias = np.zeros(432)
    bias[264:304] = tensors[1]["bias"]
    joined = JoinedQMatrix.from_matrices(matrices)
    x = rng.standard_normal((90, 512)).astype(np.float16)
    for sm_count in (132, 7):
        for warpgroups_n in (2, 1):
            runs = 1 if sm_count == 132 else None
            config = cut(joined, 90, sm_count, rows=64, warpgroups_n=warpgroups_n, waves=0, runs=runs)
            check_product(product(cupy, joined, x, config), x, weight, bias)
    # One after the other, into columns of the same array; x given in stored order already.
    out = cupy.full((90, 440), np.nan, np.float16)
    for q, first in zip(matrices, (4, 268, 308), strict=True):
        wgmma.launch_wgmma(cupy.asarray(x), q, out, 90, is_ordered=True, y_stride=440, first_column=first)
    found = out.get()
    check_product(found[:, 4:436], x, weight, bias)
    assert np.isnan(found[:, :4]).all() and np.isnan(found[:, 436:]).all()


@pytest.mark.gpu
def test_picked_cuts_of_larger_products(instances, cupy):
    if instances is None:
        return
    rng = np.random.default_rng(6)
    tensors = random_exl2(rng, 2048, 2048, (4,), group=128)
    q, weight = on_gpu(cupy, tensors), exl2.dequantize_exl2(tensors)
    for m in (24, 64, 129, 512, 1025):
        x = rng.standard_normal((m, 2048)).astype(np.float16)
        check_product(product(cupy, q, x, wgmma.wgmma_config(q, m)), x, weight)
    x = rng.standard_normal((3, 2048)).astype(np.float16)
    x[0, 5], x[1, 7] = np.nan, np.inf
    y = product(cupy, q, x, wgmma.wgmma_config(q, 3))
    assert np.isnan(y[0]).all() and np.isfinite(y[2]).all()
    assert np.isinf(y[1][weight[7] != 0]).all() and np.isnan(y[1][weight[7] == 0]).all()


def test_only_aligned_results_are_taken():
    out = np.zeros(8 * 8 + 8, np.float16)
    out = out[(-out.ctypes.data // 2) % 8 :]
    assert wgmma.suits_wgmma(out[:64].reshape(8, 8))
    assert not wgmma.suits_wgmma(out[1:65].reshape(8, 8))
    assert not wgmma.suits_wgmma(out[:48].reshape(8, 6))
    assert not wgmma.suits_wgmma(out[:64].reshape(8, 8), y_stride=10)
