"""Quantized matrices: tiles, reconstruct and qmatmul, against the formats, recorded outputs of exllamav2 and float64."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from conftest import exact_bound, golden

from cupyq import FormatError, QMatrix
from cupyq.formats import exl2, gptq, tiles
from cupyq.ops.qmatmul import FUSED_ROWS, pick_config, qmatmul, qmatmul_workspace_size, reconstruct

module = importlib.import_module("cupyq.ops.qmatmul")  # the op of the same name hides the module

ULP = {np.dtype(np.float16): 2**-11, np.dtype(ml_dtypes.bfloat16): 2**-8}


def random_exl2(rng, widths, *, n, group_blocks=2, last_blocks=1, has_perm=True, has_bias=False):
    """Checkpoint tensors of a layer with two groups of every width and a shorter last one."""
    bits = [b for b in widths for _ in range(2)] + [widths[-1]]
    rows = [32 * group_blocks] * (2 * len(widths)) + [32 * last_blocks]
    k = sum(rows)
    codes = np.concatenate([rng.integers(0, 1 << b, (r, n)) for b, r in zip(bits, rows, strict=True)]).astype(np.uint8)
    scale_max = (0.3 + rng.random(len(bits))).astype(np.float16)
    perm = rng.permutation(k) if has_perm else None
    tensors = exl2.pack_exl2(codes, rng.integers(0, 16, (len(bits), n)), scale_max, bits, rows, perm)
    if has_bias:
        tensors["bias"] = rng.standard_normal(n).astype(np.float16)
    return tensors


def random_gptq(rng, bits, *, k, n, groups, act_order=False, version="v1", has_bias=False):
    row_group = np.arange(k) * groups // k
    if act_order:
        row_group = rng.integers(0, groups, k)  # groups of any size, in any order
    low = 1 if version == "v1" else 0
    zeros = rng.integers(low, low + (1 << bits), (groups, n))
    scales = (0.01 + 0.05 * rng.random((groups, n))).astype(np.float16)
    tensors = gptq.pack_gptq(rng.integers(0, 1 << bits, (k, n)), zeros, scales, row_group, bits, version)
    if has_bias:
        tensors["bias"] = rng.standard_normal(n).astype(np.float16)
    return tensors


def to_gpu(cupy, tensors):
    return {key: cupy.asarray(value) for key, value in tensors.items()}


MIXTURES = [(2,), (3,), (4,), (5,), (6,), (8,), (8, 6, 5, 4, 3, 2), (5, 4), (6, 3), (8, 2), (4, 3, 2)]


@pytest.mark.parametrize("widths", MIXTURES)
def test_tiles_hold_every_code_and_find_it_in_the_checkpoint(widths):
    rng = np.random.default_rng(1)
    tensors = random_exl2(rng, widths, n=72)
    layout, perm = exl2.validate_exl2(tensors)
    tile_layout = tiles.exl2_tiles(layout, perm)
    codes = exl2.unpack_exl2(tensors["q_weight"], layout)
    words = tiles.pack_tiles(codes, tile_layout)
    assert words.size == tile_layout.words
    np.testing.assert_array_equal(tiles.unpack_tiles(words, tile_layout), codes)
    packed = tensors["q_weight"].view(np.uint32)
    for row in rng.integers(0, layout.k, 20):
        bits, first = int(tile_layout.block_bits[row // 32]), int(tile_layout.bit_offset[row])
        read = np.zeros(72, np.uint32)
        for b in range(bits):
            read |= (packed[(first + b) // 32] >> np.uint32((first + b) % 32) & np.uint32(1)) << np.uint32(b)
        np.testing.assert_array_equal(read, codes[row])


def test_one_tile_lies_where_the_picture_says():
    """Plain loops over the picture in formats/tiles.py, for 4 and 6 bits."""
    rng = np.random.default_rng(2)
    for bits, planes in ((4, (4,)), (6, (4, 2))):
        tensors = random_exl2(rng, (bits,), n=32, has_perm=False)
        layout, perm = exl2.validate_exl2(tensors)
        tile_layout = tiles.exl2_tiles(layout, perm)
        codes = exl2.unpack_exl2(tensors["q_weight"], layout)
        words = [int(w) for w in tiles.pack_tiles(codes, tile_layout)]
        block = 3
        start = block * bits * 32
        for row in range(32):
            for column in range(32):
                g, c, t, i = column // 4, column % 4, row // 8, row % 8
                lane, pair, half = 4 * g + t, 4 * c + i // 2, i % 2
                value, shift, plane_start = 0, 0, start
                for width in planes:
                    word = words[plane_start + lane * width + pair // (16 // width)]
                    field = word >> (16 * half + pair % (16 // width) * width) & ((1 << width) - 1)
                    value |= field << shift
                    shift += width
                    plane_start += 32 * width
                assert value == codes[block * 32 + row, column]


def test_gptq_tiles_pad_groups_of_any_size():
    rng = np.random.default_rng(3)
    tensors = random_gptq(rng, 4, k=160, n=32, groups=4, act_order=True)
    layout = gptq.validate_gptq(tensors)
    tile_layout = tiles.gptq_tiles(layout)
    row = tile_layout.row
    assert sorted(row[row >= 0]) == list(range(160))
    for stored, original in enumerate(row):
        if original >= 0:
            assert tensors["g_idx"][original] == tile_layout.block_group[stored // 32]
    assert tiles.gptq_tiles(gptq.validate_gptq(random_gptq(rng, 4, k=160, n=32, groups=5))).row is None


@pytest.mark.parametrize("family", ["exl2_matrix", "gptq_matrix"])
def test_recorded_weights_and_products(family):
    for case, (inputs, outputs, arguments) in golden(family).items():
        check_golden(case, inputs, outputs, arguments, np)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["exl2_matrix", "gptq_matrix"])
def test_recorded_weights_and_products_on_the_gpu(family, cupy):
    for case, (inputs, outputs, arguments) in golden(family).items():
        check_golden(case, inputs, outputs, arguments, cupy)


def check_golden(case, inputs, outputs, arguments, xp):
    tensors = {key: xp.asarray(value) for key, value in inputs.items() if not key.startswith("a")}
    options = {"prescale": arguments["prescale"]} if "prescale" in arguments else {"group_size": arguments["group_size"]}
    q = QMatrix.from_tensors(tensors, **options, name=case)
    weight = on_host(reconstruct(q))
    np.testing.assert_array_equal(weight.view(np.uint16), outputs["weight"].view(np.uint16), err_msg=case)
    for rows in (1, 3, 8, 40):
        x = inputs[f"a{rows}"]
        exact = x.astype(np.float64) @ weight.astype(np.float64) + inputs.get("bias", np.float16(0)).astype(np.float64)
        y = on_host(qmatmul(xp.asarray(x), q)).astype(np.float64)
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        assert error < 6e-4, f"{case}, {rows} rows: {error}"


def on_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def test_reference_is_the_plain_sum():
    import math

    rng = np.random.default_rng(4)
    tensors = random_exl2(rng, (5, 3), n=16, has_bias=True)
    q = QMatrix.from_tensors(tensors)
    x = rng.standard_normal((2, q.k)).astype(np.float32)
    weight = reconstruct(q).astype(np.float64)
    y = qmatmul(x, q)
    for r in range(2):
        for c in range(16):
            exact = math.fsum([float(x[r, j]) * weight[j, c] for j in range(q.k)] + [float(tensors["bias"][c])])
            assert abs(y[r, c] - exact) <= 2**-23 * abs(exact) + 1e-12


def test_callers_arrays_stay_as_they_were():
    tensors = random_exl2(np.random.default_rng(5), (4, 3), n=32)
    before = {key: value.copy() for key, value in tensors.items()}
    reconstruct(QMatrix.from_tensors(tensors))
    for key, value in tensors.items():
        np.testing.assert_array_equal(value, before[key])


def bad_calls(xp, q, x):
    """(exception, text, call) that must come out alike on both backends."""
    wide = xp.zeros((2, q.k + 1), np.float16)
    return [
        (TypeError, "QMatrix", lambda: qmatmul(x, x)),
        (TypeError, "QMatrix", lambda: reconstruct(x)),
        (ValueError, "x must have", lambda: qmatmul(wide, q)),
        (TypeError, "x must have dtype", lambda: qmatmul(xp.zeros((2, q.k), np.int32), q)),
        (ValueError, "C-contiguous", lambda: qmatmul(xp.zeros((2, 2 * q.k), np.float16)[:, ::2], q)),
        (ValueError, "out must have shape", lambda: qmatmul(x, q, out=xp.zeros((3, q.n), np.float16))),
        (TypeError, "out must have dtype", lambda: qmatmul(x, q, out=xp.zeros((2, q.n), np.int32))),
        (TypeError, "out must have dtype", lambda: reconstruct(q, out=xp.zeros((q.k, q.n), np.float32))),
        (TypeError, "list", lambda: qmatmul([[1.0]], q)),
    ]


def test_bad_calls_get_clear_errors():
    q = QMatrix.from_tensors(random_exl2(np.random.default_rng(6), (4,), n=32))
    for error, text, call in bad_calls(np, q, np.zeros((2, q.k), np.float16)):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.gpu
def test_bad_calls_get_clear_errors_on_the_gpu(cupy):
    tensors = random_exl2(np.random.default_rng(6), (4,), n=32)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    x = cupy.zeros((2, q.k), np.float16)
    for error, text, call in bad_calls(cupy, q, x):
        with pytest.raises(error, match=text):
            call()
    with pytest.raises(TypeError, match="NumPy"):
        qmatmul(np.zeros((2, q.k), np.float16), q)
    with pytest.raises(ValueError, match="workspace"):
        wide = QMatrix.from_tensors(to_gpu(cupy, random_exl2(np.random.default_rng(6), (4,), n=32, group_blocks=16)))
        qmatmul(cupy.zeros((2, wide.k), np.float16), wide, workspace=cupy.zeros(1, np.float32))
    mixed = dict(to_gpu(cupy, tensors), q_scale=tensors["q_scale"])
    with pytest.raises(TypeError, match="q_weight is a CuPy array"):
        QMatrix.from_tensors(mixed)


def test_foreign_or_missing_tensors():
    with pytest.raises(FormatError, match="neither EXL2"):
        QMatrix.from_tensors({"weight": np.zeros((2, 2))}, name="layer")
    with pytest.raises(TypeError, match="dict"):
        QMatrix.from_tensors([1, 2])
    tensors = random_exl2(np.random.default_rng(7), (4,), n=32)
    with pytest.raises(ValueError, match="group_size"):
        QMatrix.from_tensors(tensors, group_size=32)
    del tensors["q_scale_max"]
    with pytest.raises(FormatError, match="layer.q_scale_max"):
        QMatrix.from_tensors(tensors, name="layer")


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 33, 64, 65, 1000])
@pytest.mark.parametrize(("n", "blocks"), [(8, 1), (4096, 128), (28672, 128), (128256, 256), (4096, 2048)])
def test_config_covers_the_product_and_fits_every_gpu(rows, n, blocks):
    for sm_count in (1, 40, 132):
        config = pick_config(rows, n, blocks, sm_count)
        assert config.slices * config.slice_blocks >= blocks > (config.slices - 1) * config.slice_blocks
        assert 1 <= config.chunk_blocks <= config.slice_blocks
        assert config.shared_bytes <= 64 * 1024  # Turing's limit
        if rows <= FUSED_ROWS:
            assert 8 * config.m_tiles >= rows


# --- on the GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("widths", MIXTURES)
def test_reconstruct_is_bit_exact(widths, cupy):
    rng = np.random.default_rng(8)
    for n in (8, 32, 40, 264):
        for has_perm in (False, True):
            tensors = random_exl2(rng, widths, n=n, has_perm=has_perm, last_blocks=3)
            guarded = cupy.full((tensors["q_invperm"].size + 2, n), np.nan, np.float16)
            q = QMatrix.from_tensors(to_gpu(cupy, tensors), prescale=0.7)
            reconstruct(q, out=guarded[1:-1])
            exact = exl2.dequantize_exl2(tensors, prescale=0.7)
            np.testing.assert_array_equal(guarded[1:-1].get().view(np.uint16), exact.view(np.uint16))
            assert cupy.isnan(guarded[0]).all() and cupy.isnan(guarded[-1]).all()


GPTQ_CASES = [
    dict(bits=bits, k=k, n=n, groups=groups, act_order=act_order, version=version)
    for bits in (2, 3, 4, 8)
    for k, n, groups, act_order in (
        (128, 32, 4, False),
        (160, 64, 4, True),
        (320, 96, 8, False),
        (96, 32, 1, False),
        (128, 32, 8, False),
    )
    for version in ("v1", "v2", "v1-wrapped")
]


@pytest.mark.gpu
def test_gptq_is_bit_exact_and_right(cupy):
    rng = np.random.default_rng(9)
    for case in GPTQ_CASES:
        tensors = random_gptq(rng, **case, has_bias=True)
        q = QMatrix.from_tensors(to_gpu(cupy, tensors), zeros=case["version"])
        weight = gptq.dequantize_gptq(tensors, zeros=case["version"])
        np.testing.assert_array_equal(reconstruct(q).get().view(np.uint16), weight.view(np.uint16), err_msg=str(case))
        for rows in (1, 5, 70):
            x = rng.standard_normal((rows, case["k"])).astype(np.float16)
            check_product(qmatmul(cupy.asarray(x), q).get(), x, weight, tensors["bias"])


def check_product(y, x, weight, bias=None):
    """Error at most twice that of a product of the same dtypes with fp32 sums, plus one rounding."""
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    if bias is not None:
        exact += bias.astype(np.float64)
    # A same-dtype product would hold the weights in x's dtype, and so does the reference.
    same = x.astype(np.float32) @ weight.astype(x.dtype).astype(np.float32) + (0 if bias is None else bias.astype(np.float32))
    exact_bound(y, exact, same.astype(y.dtype), ulp=ULP[y.dtype])
    error = np.linalg.norm(y.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < {2**-11: 6e-4, 2**-8: 4e-3}[ULP[y.dtype]], error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("widths", MIXTURES)
def test_products(widths, dtype, cupy):
    rng = np.random.default_rng(10)
    for n, group_blocks in ((8, 1), (136, 4), (1032, 9)):
        tensors = random_exl2(rng, widths, n=n, group_blocks=group_blocks, has_bias=n == 136, has_perm=n != 8)
        q = QMatrix.from_tensors(to_gpu(cupy, tensors))
        weight = exl2.dequantize_exl2(tensors)
        for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130):
            x = rng.standard_normal((rows, q.k)).astype(np.float32).astype(dtype)
            guarded = cupy.asarray(np.full((rows + 2, n), np.nan, dtype))
            y = qmatmul(cupy.asarray(x), q, out=guarded[1:-1])
            check_product(y.get(), x, weight, tensors.get("bias"))
            frame = guarded.get()[[0, -1]].astype(np.float32)
            assert np.isnan(frame).all()
            again = qmatmul(cupy.asarray(x), q)
            np.testing.assert_array_equal(again.get().view(np.uint16), y.get().view(np.uint16))
        # float32 results show the kernel's own arithmetic: the codes are exact, and their scales are not rounded into them.
        x = rng.standard_normal((3, q.k)).astype(np.float32).astype(dtype)
        exact = x.astype(np.float64) @ unrounded(tensors) + tensors.get("bias", np.float16(0)).astype(np.float64)
        y = qmatmul(cupy.asarray(x), q, dtype=np.float32).get()
        assert np.linalg.norm(y - exact) < 3e-6 * np.linalg.norm(exact)


def unrounded(tensors):
    """(code - zero) * scale in float64, rows in original order: the weights before their rounding to fp16."""
    layout, perm = exl2.validate_exl2(tensors)
    codes = exl2.unpack_exl2(tensors["q_weight"], layout).astype(np.float64)
    scales = exl2.exl2_scales(tensors["q_scale"], tensors["q_scale_max"]).astype(np.float64)
    zeros = np.repeat(2.0 ** (layout.bits - 1), layout.rows)
    stored = (codes - zeros[:, None]) * np.repeat(scales, layout.rows, axis=0)
    if perm is None:
        return stored
    weight = np.empty_like(stored)
    weight[perm] = stored
    return weight


@pytest.mark.gpu
def test_the_tolerance_bites(cupy):
    rng = np.random.default_rng(11)
    tensors = random_exl2(rng, (4,), n=64, group_blocks=4)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    weight = exl2.dequantize_exl2(tensors)
    x = rng.standard_normal((4, q.k)).astype(np.float16)
    y = qmatmul(cupy.asarray(x), q).get()
    check_product(y, x, weight)
    off_by_one = dict(tensors, q_scale=np.roll(tensors["q_scale"], 1, axis=0))
    wrong = {
        "another group's scale": exl2.dequantize_exl2(off_by_one),
        "columns shifted": np.roll(weight, 1, axis=1),
        "rows shifted": np.roll(weight, 1, axis=0),
        "no permutation": weight[tensors["q_invperm"]],
        "zero point off by one": (weight + np.abs(weight).max(axis=0) / 64).astype(np.float16),
    }
    for what, mutated in wrong.items():
        with pytest.raises(AssertionError):
            check_product(y, x, mutated)
            pytest.fail(f"{what} was not noticed", pytrace=False)


@pytest.mark.gpu
def test_workspace_is_left_as_found_and_capture_works(cupy):
    rng = np.random.default_rng(12)
    tensors = random_exl2(rng, (5, 4), n=256, group_blocks=32)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    workspace = cupy.zeros(qmatmul_workspace_size(q, 64), np.float32)
    x = cupy.asarray(rng.standard_normal((64, q.k)).astype(np.float16))
    plain = {rows: qmatmul(x[:rows], q).get() for rows in (1, 8, 20, 64)}
    for _ in range(3):
        for rows, expected in plain.items():
            np.testing.assert_array_equal(qmatmul(x[:rows], q, workspace=workspace).get(), expected)
    # Other shapes may use it in between: more columns, too few blocks to be sliced.
    others = [random_exl2(rng, (4,), n=2048, group_blocks=16), random_exl2(rng, (3,), n=4096, group_blocks=1)]
    others = [QMatrix.from_tensors(to_gpu(cupy, tensors)) for tensors in others]
    shared = cupy.zeros(max(qmatmul_workspace_size(matrix, 64) for matrix in (q, *others)), np.float32)
    assert len({pick_config(8, m.n, m.tiles.layout.blocks, 132).slices > 1 for m in (q, *others)}) == 2
    for _ in range(2):
        for matrix in (q, *others):
            inputs = cupy.asarray(rng.standard_normal((8, matrix.k)).astype(np.float16))
            expected = qmatmul(inputs, matrix).get()
            np.testing.assert_array_equal(qmatmul(inputs, matrix, workspace=shared).get(), expected)
    out = cupy.empty((1, q.n), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.use()
    try:
        qmatmul(x[:1], q, out=out, workspace=workspace)
        stream.synchronize()
        out.fill(0)
        stream.begin_capture()
        qmatmul(x[:1], q, out=out, workspace=workspace)
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
    finally:
        cupy.cuda.Stream.null.use()
    np.testing.assert_array_equal(out.get(), plain[1])


@pytest.mark.gpu
def test_long_inputs_and_odd_addresses(cupy):
    rng = np.random.default_rng(13)
    tensors = random_exl2(rng, (3,), n=40, group_blocks=64, has_perm=False)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    weight = exl2.dequantize_exl2(tensors)
    flat = rng.standard_normal(3 * q.k + 1).astype(np.float16)
    x = cupy.asarray(flat)[1:].reshape(3, q.k)  # 2 bytes past a 16-byte boundary
    check_product(qmatmul(x, q).get(), flat[1:].reshape(3, q.k), weight)
    many = cupy.asarray(rng.standard_normal((100_003, q.k)).astype(np.float16))
    y = qmatmul(many, q)
    rows = [0, 1, 50_000, 100_002]
    check_product(y[rows].get(), many[rows].get(), weight)
    assert qmatmul(many[:0], q).shape == (0, 40)


@pytest.mark.gpu
def test_infinities_and_nans_travel(cupy):
    tensors = random_exl2(np.random.default_rng(14), (4,), n=32)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    x = np.ones((3, q.k), np.float16)
    x[0, 5], x[1, 7] = np.nan, np.inf
    y = qmatmul(cupy.asarray(x), q).get()
    weight = exl2.dequantize_exl2(tensors)
    assert np.isnan(y[0]).all()
    nonzero = weight[7] != 0
    assert np.isinf(y[1][nonzero]).all() and np.isnan(y[1][~nonzero]).all()
    assert np.isfinite(y[2]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 100])  # the fused kernel, and dequantising for cuBLAS
def test_torch_in_torch_out_on_a_stream_of_its_own(rows, cupy):
    """The input is made behind a wait: work on any other stream would read zeros."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(15)
    tensors = random_exl2(rng, (5, 4), n=64)
    q = QMatrix.from_tensors({key: torch.from_numpy(value.copy()).cuda() for key, value in tensors.items()})
    x = rng.standard_normal((rows, q.k)).astype(np.float16)
    ready, late = torch.from_numpy(x).cuda(), torch.zeros(x.shape, dtype=torch.float16, device="cuda")
    qmatmul(ready, q)  # compiled and loaded
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(ready)
        y = qmatmul(late, q)
        was_pending = not stream.query()
    stream.synchronize()
    assert was_pending, "the wait ended before the launch: the test shows nothing"
    assert type(y) is torch.Tensor and y.dtype == torch.float16 and y.device == late.device
    check_product(y.cpu().numpy(), x, exl2.dequantize_exl2(tensors))


@pytest.mark.gpu
def test_jax_in_jax_out_on_another_stream(cupy):
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(16)
    tensors = random_exl2(rng, (6, 3), n=64)
    device = jax.devices("gpu")[0]
    q = QMatrix.from_tensors({key: jax.device_put(value, device) for key, value in tensors.items()})
    x = rng.standard_normal((5, q.k)).astype(np.float16)
    with cupy.cuda.Stream(non_blocking=True):
        y = qmatmul(jax.device_put(x, device) * 1, q) * 1  # queued on JAX's own stream before and after
    assert isinstance(y, jax.Array) and y.dtype == np.float16 and y.devices() == {device}
    check_product(np.asarray(y), x, exl2.dequantize_exl2(tensors))


@pytest.mark.gpu
def test_any_shape_of_thread_block_gives_the_product(cupy):
    """2 x 4 warps and 64 rows hand over exactly 48 KiB, which a static variable beside them must not push over the limit."""
    rng = np.random.default_rng(17)
    tensors = random_exl2(rng, (4,), n=200, group_blocks=8)
    q = QMatrix.from_tensors(to_gpu(cupy, tensors))
    weight = exl2.dequantize_exl2(tensors)
    for rows, m_tiles, warps_n, warps_k, slices in ((64, 8, 2, 4, 1), (64, 8, 1, 8, 2), (9, 2, 8, 1, 3), (1, 1, 4, 4, 4)):
        slice_blocks = -(-q.tiles.layout.blocks // slices)
        config = module.QmatmulConfig(m_tiles, warps_n, warps_k, slices, slice_blocks, min(slice_blocks, 5))
        x = rng.standard_normal((rows, q.k)).astype(np.float16)
        out = cupy.full((rows, q.n), np.nan, np.float16)
        module._launch_fused(cupy.asarray(x), q, out, rows, None, config)
        check_product(out.get(), x, weight)


@pytest.mark.gpu
def test_a_matrix_of_torch_tensors_is_built_on_torchs_stream(cupy):
    """Repacked elsewhere, it could be read by torch's next product before it is written."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(18)
    tensors = random_exl2(rng, (4,), n=64)
    given = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
    given |= {key: given[key].cuda() for key in ("q_weight", "q_scale")}
    QMatrix.from_tensors(given)  # compiled and loaded
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        q = QMatrix.from_tensors(given)
        was_pending, is_elsewhere = not stream.query(), not cupy.cuda.Stream.null.done
    stream.synchronize()
    assert was_pending, "the wait ended before the launch: the test shows nothing"
    assert not is_elsewhere
    np.testing.assert_array_equal(reconstruct(q).get().view(np.uint16), exl2.dequantize_exl2(tensors).view(np.uint16))


@pytest.mark.gpu
def test_bfloat16_scales_of_torch_are_taken(cupy):
    torch = pytest.importorskip("torch")
    tensors = random_gptq(np.random.default_rng(19), 4, k=64, n=32, groups=2)
    tensors["scales"] = tensors["scales"].astype(ml_dtypes.bfloat16)
    exact = gptq.dequantize_gptq(tensors)
    given = {key: torch.from_numpy(value.copy()) for key, value in tensors.items() if key != "scales"}
    given["scales"] = torch.from_numpy(tensors["scales"].view(np.int16).copy()).view(torch.bfloat16)
    for device in ("cpu", "cuda"):
        q = QMatrix.from_tensors({key: value.to(device) for key, value in given.items()})
        np.testing.assert_array_equal(on_host(reconstruct(q)).view(np.uint16), exact.view(np.uint16))
