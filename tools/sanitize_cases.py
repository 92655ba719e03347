"""Small, odd-sized calls of every op on the GPU, for compute-sanitizer: `make sanitize`.

    python tools/sanitize_cases.py                    everything
    python tools/sanitize_cases.py norms quantized    some of it, so that several processes can share it
    python tools/sanitize_cases.py --compile          only compile what is launched, in parallel: without a sanitizer, first

Values are checked by the tests; here the sanitizer watches for accesses out of bounds, races between threads, reads of
memory nobody wrote, and barriers not all threads reach. Each array gets an allocation of its own, as a pool would hide
a step past its end. The last lines tell which kernels were launched in how many variants, and name those that were not.
"""

import contextlib
import importlib
import itertools
import os
import sys
from pathlib import Path

import cupy
import numpy as np

import cupyq
from cupyq import _device, _kernels, cli, ops
from cupyq._arrays import FLOATS, bfloat16
from cupyq.bench.random_matrices import MIXTURES, Words, parse_kind, random_tensors
from cupyq.formats import kv_cache
from cupyq.formats.safetensors import Checkpoint
from cupyq.generate import SamplerSettings
from cupyq.serve import Generator, Job, NGramDraft

MODELS = Path(__file__).parent.parent / "examples/models"

rng = np.random.default_rng(0)


def array(*shape, dtype=np.float32):
    return cupy.asarray(rng.standard_normal(shape).astype(dtype))


def integers(high, *shape):
    return cupy.asarray(rng.integers(0, high, shape).astype(np.int32))


def norms(dtype):
    for rows, dim in ((1, 1), (3, 97), (2, 640), (5, 4096)):
        x, weight, bias = array(rows, dim, dtype=dtype), array(dim, dtype=dtype), array(dim, dtype=dtype)
        for residual in (None, array(rows, dim, dtype=dtype)):
            ops.rms_norm(x, weight, residual=residual)
            ops.layer_norm(x, weight, bias, residual=residual)
        for order in (integers(dim + 1, 32), integers(dim, 96) - 1):
            ops.rms_norm(x, weight, order=order)
            ops.layer_norm(x, weight, bias, order=order)
    for head_dim in (1, 72, 128):
        weight = array(head_dim, dtype=dtype)
        for kind in ("rms", "layer"):
            ops.head_norm(array(2, 3, 5, head_dim, dtype=dtype), weight, kind=kind)


def elementwise(dtype):
    for rows, columns in ((1, 1), (3, 33), (2, 1024)):
        x, y = array(rows, columns, dtype=dtype), array(rows, columns, dtype=dtype)
        ops.add(x, y)
        ops.add_weighted(x, y, cupy.abs(array(rows)))
        ops.silu(x)
        ops.gelu(x)
        ops.relu(x)
        ops.silu_mul(x, y)
        ops.gelu_mul(x, y, approximate="none")
        ops.relu_mul(x, y)
        ops.softcap(x, 30.0)
        ops.clamp(x, 0.5)
        ops.embedding(integers(7, 2, 3), array(7, columns, dtype=dtype))
        ops.matmul(x, array(columns, 5, dtype=dtype), bias=array(5, dtype=dtype))
        ops.gemm(x, array(columns, 5, dtype=dtype), array(rows, 5, dtype=dtype), alpha=0.5, beta=2.0)


def positions(dtype):
    sin, cos, start = array(64, 20), array(64, 20), cupy.asarray(np.array([0, 9], np.int32))
    for style in ("neox", "gptj"):
        ops.rope(array(2, 3, 5, 48, dtype=dtype), sin, cos, start, style=style)
    k, v = array(2, 3, 2, 40, dtype=dtype), array(2, 3, 2, 40, dtype=dtype)
    ops.kv_append(k, v, array(2, 16, 2, 40, dtype=dtype), array(2, 16, 2, 40, dtype=dtype), start)
    qkv, norm = array(2, 3, 9 * 48, dtype=dtype), array(48)
    caches = array(2, 16, 2, 48, dtype=dtype), array(2, 16, 2, 48, dtype=dtype)
    for style in ("neox", "gptj"):
        ops.qkv_append(qkv, *caches, sin, cos, start, heads=5, style=style, q_norm=norm, k_norm=norm)
    ops.qkv_append(qkv, *caches, None, None, start, heads=5, style=None)
    pages = cupy.asarray(np.array([[4, 0, 7], [1, 5, -1]], np.int32))
    for heads, head_dim, kinds in ((3, 64, ("q8", "q4")), (1, 128, ("q4", "q8")), (2, 44, ("e4m3", "fp8"))):
        k, v = array(2, 3, heads, head_dim, dtype=dtype), array(2, 3, heads, head_dim, dtype=dtype)
        caches = [ops.CacheCodes.zeros(cupy, (6, 7, heads, head_dim), kind) for kind in kinds]
        ops.kv_append(k, v, *caches, start, block_table=pages)
        ops.kv_append(k, v, *caches, start)
        qkv, norm = array(2, 3, (5 + 2 * heads) * head_dim, dtype=dtype), array(head_dim)
        ops.qkv_append(qkv, *caches, sin, cos, start, heads=5, k_norm=norm, block_table=pages)
        ops.qkv_append(qkv, *caches, None, None, start, heads=5, style=None)


def attentions(dtype):
    for seq, capacity, head_dim in ((1, 33, 64), (1, 700, 128), (3, 70, 40), (37, 90, 128), (70, 70, 256)):
        k, v = array(2, capacity, 2, head_dim, dtype=dtype), array(2, capacity, 2, head_dim, dtype=dtype)
        lengths = cupy.asarray(np.array([capacity, max(seq, capacity // 2)], np.int32))
        ops.attention(array(2, seq, 6, head_dim, dtype=dtype), k, v, kv_lengths=lengths, window=50, softcap=20.0)
        ops.attention(array(2, seq, 6, head_dim, dtype=dtype), k, v, kv_lengths=lengths)
    table, lengths = cupy.asarray(np.array([[4, 0, 7], [1, 5, -1]], np.int32)), cupy.asarray(np.array([45, 37], np.int32))
    for starts, kinds in (
        ([0, 3, 4], ("q8", "q4")),
        ([0, 40, 77], ("e4m3", "q8")),
        ([0, 0, 21], ("fp8", "fp8")),
        ([0, 40, 77], ()),
    ):
        caches = [ops.CacheCodes.zeros(cupy, (6, 16, 2, 64), kind) for kind in kinds if dtype != np.float32]
        k, v = caches or (array(6, 16, 2, 64, dtype=dtype), array(6, 16, 2, 64, dtype=dtype))
        tables = {"kv_lengths": lengths, "block_table": table, "query_starts": cupy.asarray(np.array(starts, np.int32))}
        ops.attention(array(starts[-1], 6, 64, dtype=dtype), k, v, sinks=array(6), **tables)


def routing_and_sampling(dtype):
    for rows, experts, top_k in ((5, 8, 2), (3, 100, 7), (600, 3, 1)):
        weights, chosen = ops.route(array(rows, experts, dtype=dtype), top_k)
        ops.group_rows(chosen, experts)
        ops.combine_rows(array(rows, top_k, 33, dtype=dtype), weights)
        ops.combine_rows(array(rows, top_k, 1032, dtype=dtype), weights)
    for vocabulary in (1, 1000, 5003):
        logits = array(3, vocabulary, dtype=dtype)
        ops.sample(logits, temperature=0.0)
        ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=np.arange(3))
        workspace = cupy.empty(ops.sample_workspace_size(3, vocabulary), np.uint8)
        for settings in ({"temperature": 0.0}, {"min_p": 0.01}, {"top_k": 50, "top_p": 0.9}, {"top_k": 3000}):
            ops.sample(logits, **settings, seed=np.arange(3), workspace=workspace)
        further = {"tfs": 0.99, "typical": 0.9, "mirostat_tau": 8.0, "mirostat_mu": cupy.full(3, 16, np.float32)}
        further |= {"top_a": 0.01, "max_temp": 1.5, "xtc_probability": 1.0, "xtc_threshold": 0.001, "smoothing": 0.1}
        first = {"top_ids": cupy.empty((3, 9), np.int32), "top_probabilities": cupy.empty((3, 9), np.float32)}
        for settings in ({"top_k": [0, 40, 3000]}, {"min_p": 0.5, "skew": [-0.5, 0.0, 0.5]}):
            ops.sample(logits, **settings, **further, **first, probabilities=cupy.empty(3, np.float32))
        history, flags = integers(vocabulary + 1, 3, 300), integers(2, vocabulary).astype(np.uint8)
        options = {"repetition": 1.1, "frequency": 0.1, "sustain": 90, "decay": 100, "dry_multiplier": 0.8}
        ops.penalize(logits, history, cupy.asarray(np.int32([0, 7, 300])), **options, dry_breakers=flags, out=logits)
        counters = [integers(9, 3) for _ in range(2)], cupy.arange(7, 10)
        ops.advance(integers(vocabulary, 3), *counters[0], counters[1], tokens=integers(9, 9, 3), history=integers(9, 3, 8))
        ops.penalize(logits, history, bias_ids=integers(vocabulary, 5), bias=array(5), allowed=flags, out=array(3, vocabulary))


def quantizing(dtype):
    ops.hadamard(array(3, 14, dtype=dtype), 2)
    for size in (8, 128, 1024, 8192, 32768):
        ops.hadamard(array(3, size, dtype=dtype), size)
    ops.remap_columns(integers(9, 3, 133), integers(133, 133))
    ops.remap_nibbles(integers(9, 3, 17), integers(136, 136))
    for rows, cols in ((32, 1), (96, 33), (160, 132)):
        codes = integers(256, rows, cols).astype(cupy.int16)
        for bits in (2, 3, 4, 5, 6, 8):
            ops.pack_columns(codes, bits)
        ops.pack_rows_4(integers(17, rows, 8).astype(cupy.int16))
        x, quant, error = array(rows, cols), array(rows, cols), array(rows, cols)
        scale = cupy.abs(array(cols)) + 0.1
        ops.quantize(x, scale, 8, 15, codes=codes)
        ops.quantize_err(x, scale, 8, 15, 3.5, 0.7, 1.2, 7)
        u = cupy.triu(array(rows, rows) * 0.1) + cupy.eye(rows, dtype=np.float32)
        ops.quantize_range(x, quant, error, scale, u, 8, 15, 3, rows - 7, codes=codes)
        ops.quantize_range(x, quant, error, scale, u, 8, 15, rows - 1, rows)
        ops.quantize_range_inplace(x, scale, 8, 15, 1, rows, codes=codes)
    for rows, n in ((1, 1), (32, 31), (41, 97), (64, 300), (128, 8200)):
        target, weights, factor = array(rows, n), cupy.abs(array(rows)), array(rows, rows) * 0.1
        for bits in (2, 3, 4, 8) if n < 1000 else (6,):
            workspace = cupy.empty(ops.search_scales_workspace_size(n), np.uint8)
            ops.search_scales(target, weights, bits, workspace=workspace)
            for is_symmetric in (True, False):
                scales, zeros = ops.search_scales_gptq(target, weights, bits, is_symmetric)
                ops.quantize_group(target, array(rows, n), factor, weights, scales, bits, zeros=None if is_symmetric else zeros)
    ops.search_scales_gptq(array(131, 33), cupy.abs(array(131)), 4, False)


def adapters(dtype):
    """Few and many rows of one and several requests, ranks in use and not, K in several slices, columns by the window."""
    for rows, requests, k, ranks, n in ((1, 1, 33, 1, 5), (3, 3, 640, 24, 260), (18, 3, 97, 9, 33), (150, 2, 577, 88, 513)):
        x, a, b = array(rows, k, dtype=dtype), array(k, ranks, dtype=dtype), array(ranks, n, dtype=dtype)
        chosen = cupy.asarray(np.array([[0.0, 1.0], [0.5, 0.0], [1.0, 2.0]], np.float32)[:requests])
        for y in (np.float32, dtype):
            ops.lora(array(rows, n, dtype=y), x, a, b, integers(2, ranks), chosen)
    many = integers(70, 1100)
    chosen = cupy.asarray((np.arange(140) % 9 == 0).astype(np.float32).reshape(2, 70))
    for rows in (2, 40):
        x, a, b = array(rows, 64, dtype=dtype), array(64, 1100, dtype=dtype), array(1100, 40, dtype=dtype)
        ops.lora(array(rows, 40, dtype=dtype), x, a, b, many, chosen)


def caches(dtype):
    """Chunks that end inside of a block, tokens whose chunks straddle them, pages of odd sizes, unaligned views."""
    lengths, table = cupy.asarray(np.array([0, 13], np.int32)), cupy.asarray(np.array([[4, 0, 2], [1, 5, 3]], np.int32))
    for kind in ("fp8", "q4", "q8", "e4m3"):
        for shape in ((6, 7, 1, 64), (6, 7, 3, 32), (6, 70, 2, 128)):
            x, codes = array(*shape, dtype=np.float16), cupy.zeros(kv_cache.code_shape(shape, kind), np.uint8)
            scales = None if kind == "fp8" else cupy.zeros(kv_cache.scale_shape(shape, kind), np.float16)
            ops.kv_encode(x, codes, scales, kind=kind, start=1, width=shape[1] - 2)
            ops.kv_decode(codes, scales, x, kind=kind, start=0, width=shape[1] - 1, rows=5)
            ops.kv_encode_paged(x, codes, scales, kind=kind, lengths=lengths, width=8, block_table=table)
            ops.kv_decode_paged(codes, scales, x, kind=kind, lengths=lengths, block_table=table)
        if kind in ("q4", "q8"):
            for chunks, shift in ((1, 0), (33, 0), (129, 1)):
                x = array(64 * chunks + shift, dtype=np.float16)[shift:]
                ops.decode_blocks(*ops.encode_blocks(x, kind), kind)
    for page in (1, 33, 4096):
        ops.cache_rotate(array(7, page, dtype=dtype), cupy.asarray(np.array([6, 0, 3, 1, 5, 2], np.int32)))
        ops.cache_rotate(array(7, page, dtype=dtype), cupy.asarray(np.array([6, 0, 7], np.int32)))
    ops.count_match(np.arange(5), np.arange(7), 6)


def quantized():
    """One layer of each width and format, from tensors to products of several heights."""
    for model in ("shakespeare-exl2-2.5", "shakespeare-exl2-4.0", "shakespeare-gptq-g32"):
        with Checkpoint(MODELS / model) as checkpoint:
            word = ".q_weight" if "exl2" in model else ".qweight"
            keys = [name.removesuffix(word) for name in checkpoint.names if name.endswith(word)]
            by_shape = {}
            for key in keys[:8]:
                tensors = {n.rpartition(".")[2]: checkpoint.array(n) for n in checkpoint.names if n.startswith(f"{key}.")}
                q = cupyq.QMatrix.from_tensors({name: cupy.asarray(value) for name, value in tensors.items()})
                by_shape.setdefault(q.shape, []).append(q)
                ops.reconstruct(q)
                for rows in (1, 7, 17, 64, 65):
                    for dtype in (np.float16, bfloat16):
                        x, y = array(rows, q.k, dtype=dtype), array(rows, q.n, dtype=dtype)
                        ops.qmatmul(x, q)
                        ops.qmatmul(x, q, residual=y, out=y)
                        ops.qmatmul(x, q, batch_invariant=True)
            for (k, _), matrices in by_shape.items():
                for parts in (matrices[:1] * 2, matrices[:2], matrices[:1] + matrices[-1:] * 3):
                    joined = ops.JoinedQMatrix.from_matrices(parts)
                    for rows in (1, 9, 40, 65):
                        x = array(rows, k, dtype=np.float16)
                        workspace = cupy.zeros(ops.qmatmul_workspace_size(joined, rows), np.float32)
                        ops.qmatmul(x, joined, workspace=workspace)
                        norm = ops.InputNorm(array(k), 1e-6, np.float16)
                        ops.qmatmul(array(rows, k), joined, before=norm)
                        ops.qmatmul(array(rows, 2 * k, dtype=np.float16), joined, before=ops.InputGate())
                        if len(parts) == 2:
                            ops.qmatmul_gated(x, joined, workspace=workspace)
                            ops.qmatmul_gated(array(rows, k), joined, before=norm)
                        if joined.shares_order:
                            ordered = array(rows, 32 * joined.blocks, dtype=np.float16)
                            ops.qmatmul(ordered, joined, is_ordered=True, dtype=np.float32)
                experts = ops.QMatrixGroup.from_matrices(matrices)
                for rows, tile_rows in ((1, None), (9, 8), (70, None), (70, 64)):
                    groups = ops.group_rows(integers(len(matrices), rows, 1), len(matrices), tile_rows=tile_rows)
                    for dtype in (np.float16, bfloat16):
                        ops.qmatmul_grouped(array(rows, k, dtype=dtype), experts, groups)


def late(*shape, dtype=np.float32):
    """An array that begins one element late, so that its rows are taken element by element."""
    return array(int(np.prod(shape)) + 1, dtype=dtype)[1:].reshape(shape)


def mixtures(dtype):
    """Arrays of several dtypes in one call, arrays that begin late, long rows, and other ids."""
    for other, dim in itertools.product(FLOATS, (97, 640, 4096, 8192)):
        x, weight, order = array(3, dim, dtype=dtype), array(dim, dtype=other), integers(dim + 1, 64)
        for result in FLOATS:
            for norm in (ops.rms_norm, ops.layer_norm):
                norm(x, weight, dtype=result)
                norm(x, weight, dtype=result, order=order)
        ops.add(x, array(3, dim, dtype=other))
        ops.add_weighted(x, array(3, dim, dtype=other), array(3))
    for other in FLOATS:
        ops.matmul(array(3, 40, dtype=dtype), array(40, 24, dtype=dtype), bias=array(24, dtype=other), dtype=np.float32)
        ops.matmul(array(3, 40, dtype=dtype), array(40, 24, dtype=dtype), bias=array(24, dtype=other))
        for dim in (64, 33):
            ops.embedding(integers(9, 4).astype(np.int64), array(9, dim, dtype=dtype), dtype=other, scale=1.5)
            ops.embedding(integers(11, 4) - 1, array(9, dim, dtype=dtype), dtype=other)
    x, y = late(3, 128, dtype=dtype), late(3, 128, dtype=dtype)
    ops.rms_norm(x, late(128, dtype=dtype))
    ops.layer_norm(x, late(128, dtype=dtype))
    ops.head_norm(x, late(128, dtype=dtype))
    ops.add(x, y)
    ops.hadamard(x, 128)
    ops.hadamard(array(2, 4096, dtype=dtype), 4096)
    ops.lora(y, x, late(128, 24, dtype=dtype), late(24, 128, dtype=dtype), integers(2, 24), array(1, 2))
    for rows, ranks in ((3, 64), (40, 64)):
        x, a, b = array(rows, 256, dtype=dtype), array(256, ranks, dtype=dtype), array(ranks, 128, dtype=dtype)
        for result in (np.float32, dtype):
            ops.lora(array(rows, 128, dtype=result), x, a, b, integers(2, ranks), array(1, 2))
    for gate, up in ((array(3, 1024, dtype=dtype), array(3, 1024, dtype=dtype)), (y, late(3, 128, dtype=dtype))):
        for approximate in ("none", "tanh"):
            ops.gelu(gate, approximate=approximate)
            ops.gelu_mul(gate, up, approximate=approximate)
        ops.silu_mul(gate, up)
        ops.softcap(gate, 30.0)
    for experts in (33, 64, 128, 256):
        ops.route(array(5, experts, dtype=dtype), 3)
    sin, cos, start = (array(64, 32, dtype=np.float16) for _ in range(2)), None, integers(9, 2)
    sin, cos = sin
    for style in ("neox", "gptj"):
        ops.rope(array(2, 3, 5, 64, dtype=dtype), sin, cos, start, style=style)
        ops.rope(late(2, 3, 5, 64, dtype=dtype), sin, cos, start, style=style)
    k, caches = late(2, 3, 2, 40, dtype=dtype), [late(2, 16, 2, 40, dtype=dtype) for _ in range(2)]
    ops.kv_append(k, late(2, 3, 2, 40, dtype=dtype), *caches, start)
    for head_dim in (2, 6, 12):  # which end at multiples of 4, 12 or 24 bytes
        k, v = array(2, 3, 1, head_dim, dtype=dtype), array(2, 3, 1, head_dim, dtype=dtype)
        ops.kv_append(k, v, array(2, 16, 1, head_dim, dtype=dtype), array(2, 16, 1, head_dim, dtype=dtype), start)
    for page in (3, 12):
        ops.cache_rotate(array(7, page, dtype=dtype), cupy.asarray(np.array([6, 0, 7, 3, 5, 4], np.int32)))
    for vocabulary in (70_000, 151_936):  # rows that several thread blocks share
        workspace = cupy.empty(ops.sample_workspace_size(2, vocabulary), np.uint8)
        logits = array(2, vocabulary, dtype=dtype)
        for settings in ({"temperature": 0.0}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.01}):
            ops.sample(logits, **settings, seed=np.arange(2), workspace=workspace)


@contextlib.contextmanager
def before_hopper():
    """On Hopper too, the kernels that older GPUs take."""
    modules = [importlib.import_module(f"cupyq.ops.{name}") for name in ("attention", "qmatmul")]
    for module in modules:
        real = module.pick_kernel
        module.pick_kernel = lambda *given, real=real: real(*("sm_89" if isinstance(a, str) else a for a in given))
        module.pick_kernel.real = real
    try:
        yield
    finally:
        for module in modules:
            module.pick_kernel = module.pick_kernel.real


def codes(dtype):
    """Caches of codes of every kind and arrays: appending, one query and many, few items and more than a GPU has places."""
    kinds = [(kind, kind) for kind in kv_cache.KINDS] + [("q8", "q4"), (None, "e4m3"), ("q8", None), (None, None)]
    start, table = integers(5, 2), cupy.asarray(np.array([[4, 0, 7, 3], [1, 5, -1, 2]], np.int32))
    norm, sin, cos = array(128, dtype=dtype), array(64, 64), array(64, 64)

    def cache(kind, *shape):
        return array(*shape, dtype=dtype) if kind is None else ops.CacheCodes.zeros(cupy, shape, kind)

    for pair, head_dim in itertools.product(kinds, (64, 128)):
        pages = [cache(kind, 8, 16, 2, head_dim) for kind in pair]
        k, v = array(2, 3, 2, head_dim, dtype=dtype), array(2, 3, 2, head_dim, dtype=dtype)
        ops.kv_append(k, v, *pages, start, block_table=table)
        ops.kv_append(late(2, 3, 2, head_dim, dtype=dtype), v, *pages, start)
        for style, heads in itertools.product(("neox", "gptj"), (4, 5)):
            qkv, tables = array(2, 3, (heads + 4) * head_dim, dtype=dtype), [t[:, : head_dim // 2].copy() for t in (sin, cos)]
            norms = {"q_norm": norm[:head_dim], "k_norm": norm[:head_dim]} if heads == 4 else {}
            ops.qkv_append(qkv, *pages, *tables, start, heads=heads, style=style, block_table=table, **norms)
        if dtype == np.float32 and pair != (None, None):
            continue  # attention takes codes with 16-bit queries alone
        lengths = cupy.asarray(np.array([61, 33], np.int32))
        few = [cache(kind, 8, 4, 2, head_dim) for kind in pair]  # tokens a page, below what the copy engine takes
        few_table = cupy.asarray(np.stack([np.arange(8), np.arange(8)[::-1]]).astype(np.int32))
        for seq in (1, 9, 30):
            queries = array(2, seq, 6, head_dim, dtype=dtype)
            ops.attention(queries, *pages, kv_lengths=lengths, block_table=table)
            ops.attention(queries, *pages, kv_lengths=lengths, block_table=table, softcap=20.0, window=20)
            ops.attention(queries, *few, kv_lengths=lengths // 2, block_table=few_table)
        with before_hopper():
            ops.attention(array(2, 30, 6, head_dim, dtype=dtype), *pages, kv_lengths=lengths, block_table=table)
        many = [cache(kind, 150, 40, 2, head_dim) for kind in pair]
        ops.attention(array(150, 1, 4, head_dim, dtype=dtype), *many, kv_lengths=integers(40, 150) + 1)
    for head_dim in (32, 96, 256):
        k, v = array(2, 70, 2, head_dim, dtype=dtype), array(2, 70, 2, head_dim, dtype=dtype)
        for seq, softcap in ((1, None), (40, None), (40, 15.0)):
            ops.attention(array(2, seq, 6, head_dim, dtype=dtype), k, v, softcap=softcap)
    x, packed = late(6, 7, 2, 64, dtype=np.float16), {}
    for kind in kv_cache.KINDS:
        packed = cupy.zeros(kv_cache.code_shape(x.shape, kind), np.uint8)
        scales = None if kind == "fp8" else cupy.zeros(kv_cache.scale_shape(x.shape, kind), np.float16)
        ops.kv_encode(x, packed, scales, kind=kind, start=1, width=5)
        ops.kv_decode(packed, scales, x, kind=kind, start=0, width=6, rows=5)


def widths():
    """Every width and kind of quantized matrix, biases of every dtype; rows for each kind of thread block."""
    words, seed = Words(cupy, 1 << 17), itertools.count()
    for kind in (*"234568", "4-g32", next(iter(MIXTURES)), "gptq-g32", "gptq8-g128", "gptq2-g64", "gptq-act"):
        for k, n, bias in ((256, 160, np.float16), (256, 160, bfloat16), (256, 160, np.float32), (1024, 128, None)):
            if bias not in (np.float16, None) and "gptq" not in kind:
                continue  # EXL2 has them in float16
            tensors = random_tensors(parse_kind(kind), k, n, words, cupy, next(seed))
            tensors |= {} if bias is None else {"bias": array(n, dtype=bias)}
            q = cupyq.QMatrix.from_tensors({name: cupy.asarray(value) for name, value in tensors.items()})
            ops.reconstruct(q)
            for rows, dtype in itertools.product((1, 8, 16, 32, 65, 130), (np.float16, bfloat16)):
                x = array(rows, k, dtype=dtype)
                ops.qmatmul(x, q)
                ops.qmatmul(x, q, dtype=np.float32)
                if bias is None:
                    ops.qmatmul(x, q, before=ops.InputNorm(array(k), 1e-6, dtype))
                    ops.qmatmul(array(rows, 2 * k, dtype=dtype), q, before=ops.InputGate())
            with before_hopper():
                for rows, dtype in itertools.product((32, 64, 65), (np.float16, bfloat16)):
                    ops.qmatmul(array(rows, k, dtype=dtype), q)


def exl2_models():
    for name, dtype in (("exl2-2.5", "float16"), ("exl2-4.0", "bfloat16")):
        use_model(name, dtype)


def gptq_model():
    use_model("gptq-g32", "float16")


def use_model(name, dtype):
    """A whole model: prompts, steps by graphs and launch by launch, every kind of cache, a generator whose jobs come and go."""
    ids = [rng.integers(2, 1000, 21).tolist() for _ in range(2)]
    rich = SamplerSettings(temperature=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, dry_multiplier=0.5, tfs=0.99)
    model = cupyq.load_model(MODELS / f"shakespeare-{name}", "cupy", dtype=dtype)
    model.forward(ids)
    for kind in ("fp16", *kv_cache.KINDS):
        cache = model.new_cache(batch=2, capacity=40, kind=kind)
        model.forward(ids, cache, last_only=True)
        model.forward([[5], [6]], cache)
    for kind, settings, graph in (("fp16", None, True), ("q8", rich, True), ("q4", SamplerSettings.greedy(), False)):
        decoder = model.decoder(2, 32, cache=kind, seed=1, settings=settings, graph=graph)
        decoder.start(ids)
        decoder.run(3)
    generator = Generator(model, cache_tokens=256, page_size=16, max_batch=4, chunk=32, cache="q6", draft=NGramDraft())
    for number, text in enumerate((*ids, ids[0][:9] * 3, ids[1][:18])):
        settings = rich if number % 2 else SamplerSettings.greedy()
        generator.add(Job(text, max_new_tokens=4 + number, stop_tokens=[], seed=number, settings=settings))
    for _ in generator:
        pass


CASES = (norms, elementwise, positions, attentions, routing_and_sampling, quantizing, adapters, caches, mixtures, codes)
WHOLE = (quantized, widths, exl2_models, gptq_model)  # which choose their dtypes

# Kernels that one GPU alone does not launch: what ranks exchange. Of the rest, one is for GPUs other than Hopper.
OF_SEVERAL_GPUS = {"all_reduce_one_shot", "all_reduce_two_shot", "all_reduce_norm"}
OF_HOPPER = {"attention_wgmma", "qmatmul_wgmma", "arrange_rows", "arrange_normed", "arrange_gated"}


def coverage(launched, arch):
    """Lines: how many variants of each kernel there were; and the kernels that should have been launched and were not."""
    variants = {}
    for wanted in launched:
        variants.setdefault(wanted.expression.partition("<")[0], set()).add(wanted)
    expected = {wanted.expression.partition("<")[0] for wanted in cli.all_instances()} - OF_SEVERAL_GPUS
    if arch != "sm_90a":
        expected -= OF_HOPPER
    lines = [", ".join(f"{name} {len(found)}" for name, found in sorted(variants.items()))]
    lines.append(f"{len(variants)} kernels in {sum(map(len, variants.values()))} variants")
    return lines, sorted(expected - set(variants))


def run(names):
    """The cases of these names, or all."""
    for case in (*CASES, *WHOLE):
        if names and case.__name__ not in names:
            continue
        for dtype in FLOATS if case in CASES else (None,):
            case(dtype) if case in CASES else case()
            cupy.cuda.runtime.deviceSynchronize()
            print(case.__name__, "" if dtype is None else np.dtype(dtype), flush=True)


def suit_tool():
    """What the tool that watches (SANITIZER) cannot see is written out for it, which costs time and changes no result."""
    tool = os.environ.get("SANITIZER")
    if tool == "racecheck":
        # Where lane 0 speaks for a warp whose lanes are together, the machine code has no instruction that says so, and what
        # the other lanes have read is taken for unordered. So every lane speaks for itself.
        _kernels.OPTIONS = (*_kernels.OPTIONS, "-DEVERY_LANE_ARRIVES=1")
    elif tool == "initcheck":
        # What cuBLAS writes is taken for unwritten, in CuPy's own products too (CUDA 13.0, Hopper). So there are zeros first.
        matmul = importlib.import_module("cupyq.ops.matmul")
        multiply = matmul._multiply_here

        def into_zeros(cuda, device_id, out, x, weight, transpose, first_column, bias, alpha, beta):
            if bias is None and beta == 0 and not _kernels.is_tracing():
                out[:, first_column : first_column + weight.shape[0 if transpose else 1]].fill(0)
            multiply(cuda, device_id, out, x, weight, transpose, first_column, bias, alpha, beta)

        matmul._multiply_here = into_zeros


def main(names):
    suit_tool()
    if names[:1] == ["--compile"]:
        alone = [case.__name__ for case in (*CASES, *WHOLE) if case not in (exl2_models, gptq_model)]
        with _kernels.tracing() as wanted:  # models look after themselves
            run(names[1:] or alone)
        count = _kernels.compile_all([instance for instance, _ in wanted], _device.current().arch)
        print(f"{count} kernels compiled")
        return 0
    cupy.cuda.set_allocator(None)
    run(names)
    lines, missing = coverage({wanted for wanted, _ in _kernels.loaded}, _device.current().arch)
    print(*lines, sep="\n")
    if missing and not names:
        print(f"never launched: {', '.join(missing)}")
    return int(bool(missing) and not names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
