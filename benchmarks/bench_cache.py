"""Quantized caches: encoding and decoding tokens, verified against the reference, then timed.

    python benchmarks/bench_cache.py [--kv-heads 8] [--head-dim 128] [--page-size 256]

Times are replays of a CUDA graph (between CUDA events) over caches that together exceed the L2 cache. `GB/s` counts the
float16 values, codes and scales that a call reads and writes; `share` is that against a streaming read measured in the
same run. Contiguous rows are encoded and decoded whole; paged, a step appends one token to each sequence, a prompt is
encoded, and sequences are decoded whole, through a block table twice as wide as they need.
"""

import argparse
import json
import sys

import cupy
import numpy as np

from cupyq import _device, ops
from cupyq.bench.limits import read_gigabytes_per_s
from cupyq.bench.timing import graph_microseconds
from cupyq.formats.kv_cache import KINDS, code_shape, scale_shape

COLD_BYTES = 200 * 2**20
# batch, tokens of each sequence
CONTIGUOUS = [(1, 1024), (1, 32768), (16, 4096)]
PAGED = [(1, 4096), (16, 4096), (64, 1024)]


def make(shape, kind, copies):
    """Several (x, codes, scales) on the GPU, x of normal values and the cache what encoding gives."""
    random = cupy.random.default_rng(0)
    made = []
    for _ in range(copies):
        x = random.standard_normal(shape, dtype=np.float32).astype(np.float16)
        codes = cupy.zeros(code_shape(shape, kind), np.uint8)
        scales = None if kind == "fp8" else cupy.zeros(scale_shape(shape, kind), np.float16)
        ops.kv_encode(x, codes, scales, kind=kind, start=0, width=shape[1])
        made.append((x, codes, scales))
    return made


def value_bytes(kind):
    """Bytes that are moved for one value: float16, its code, its share of a scale."""
    return 2 + {"fp8": 1, "q4": 0.5 + 2 / 32, "q8": 1 + 2 / 32, "e4m3": 1 + 2 / 128}[kind]


def copies_for(values, kind):
    return max(2, int(-(-COLD_BYTES // (values * value_bytes(kind)))))


def verify(shape, kind, cache, encode, decode):
    """One cache on both libraries: the bytes of codes, scales and values must be the same."""
    x, codes, scales = cache
    codes, scales, back = cupy.zeros_like(codes), None if scales is None else cupy.zeros_like(scales), cupy.zeros_like(x)
    encode(x, codes, scales, cupy.asarray)
    decode(codes, scales, back, cupy.asarray)
    arrays = [codes, *([] if scales is None else [scales]), back]
    expected = [np.zeros(a.shape, a.dtype) for a in arrays]
    scales = None if scales is None else expected[1]
    encode(x.get(), expected[0], scales, np.asarray)
    decode(expected[0], scales, expected[-1], np.asarray)
    if any(a.get().tobytes() != b.tobytes() for a, b in zip(arrays, expected, strict=True)):
        raise SystemExit(f"wrong result: {kind}, {shape}")


def report(what, kind, batch, tokens, values, us, read):
    rate = values * value_bytes(kind) / us / 1e3
    print(f"{what:>20} {kind:>4} {batch:>5} {tokens:>6} {us:9.1f} {rate:8.0f} {rate / read:6.1%}", flush=True)
    row = dict(what=what, kind=kind, batch=batch, tokens=tokens, us=us, gigabytes_per_s=rate, share=rate / read)
    print(json.dumps(row), file=sys.stderr)


def contiguous(kind, batch, tokens, options, read):
    where = {"kind": kind, "start": 0, "width": tokens}
    shape = (batch, tokens, options.kv_heads, options.head_dim)
    values = int(np.prod(shape))
    small = (2, 65, options.kv_heads, options.head_dim)

    def verify_encode(x, codes, scales, asarray):
        ops.kv_encode(x, codes, scales, kind=kind, start=1, width=63)

    def verify_decode(codes, scales, x, asarray):
        ops.kv_decode(codes, scales, x, kind=kind, start=1, width=63)

    verify(small, kind, make(small, kind, 1)[0], verify_encode, verify_decode)
    caches = make(shape, kind, copies_for(values, kind))

    def encode():
        for x, codes, scales in caches:
            ops.kv_encode(x, codes, scales, **where)

    def decode():
        for x, codes, scales in caches:
            ops.kv_decode(codes, scales, x, **where)

    report("encode rows", kind, batch, tokens, values, graph_microseconds(encode) / len(caches), read)
    report("decode rows", kind, batch, tokens, values, graph_microseconds(decode) / len(caches), read)


def paged(kind, batch, tokens, options, read):
    page_size, token_values = options.page_size, options.kv_heads * options.head_dim
    per_sequence = -(-(tokens + 1) // page_size)
    shape = (batch * per_sequence, page_size, options.kv_heads, options.head_dim)
    pages = np.random.default_rng(0).permutation(shape[0]).reshape(batch, per_sequence)
    table = np.concatenate((pages, np.zeros_like(pages)), axis=1).astype(np.int32)
    none, ends = np.zeros(batch, np.int32), np.full(batch, tokens, np.int32)

    def verify_encode(x, codes, scales, asarray):
        ops.kv_encode_paged(x, codes, scales, kind=kind, lengths=asarray(none + 3), width=40, block_table=asarray(table))

    def verify_decode(codes, scales, x, asarray):
        ops.kv_decode_paged(codes, scales, x, kind=kind, lengths=asarray(none + 50), block_table=asarray(table))

    caches = make(shape, kind, copies_for(batch * tokens * token_values, kind))
    verify(shape, kind, caches[0], verify_encode, verify_decode)
    none, ends, table = map(cupy.asarray, (none, ends, table))

    def encode_step():
        for x, codes, scales in caches:
            ops.kv_encode_paged(x, codes, scales, kind=kind, lengths=ends, width=1, block_table=table)

    def encode_prompt():
        for x, codes, scales in caches:
            ops.kv_encode_paged(x, codes, scales, kind=kind, lengths=none, width=tokens, block_table=table)

    def decode():
        for x, codes, scales in caches:
            ops.kv_decode_paged(codes, scales, x, kind=kind, lengths=ends, block_table=table)

    for what, run, count in (("step", encode_step, 1), ("prompt", encode_prompt, tokens), ("decode", decode, tokens)):
        name = "decode pages" if what == "decode" else f"encode pages, {what}"
        us = graph_microseconds(run) / len(caches)
        report(name, kind, batch, tokens, batch * count * token_values, us, read)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=256)
    options = parser.parse_args()

    read = read_gigabytes_per_s()
    print(f"{_device.current().name}: streaming read {read:.0f} GB/s")
    print(f"{'':>20} {'kind':>4} {'batch':>5} {'tokens':>6} {'us':>9} {'GB/s':>8} {'share':>6}")
    for problems, measure in ((CONTIGUOUS, contiguous), (PAGED, paged)):
        for kind in KINDS:
            for batch, tokens in problems:
                measure(kind, batch, tokens, options, read)


if __name__ == "__main__":
    main()
