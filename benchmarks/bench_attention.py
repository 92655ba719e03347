"""Attention against the limit and, where torch is importable, its scaled_dot_product_attention.

    python benchmarks/bench_attention.py [--heads 32] [--kv-heads 8] [--head-dim 128] [--configs]

Every row is verified against the NumPy reference on a few queries, then timed as replays of a CUDA graph. Decoding
rotates over caches that together exceed the L2 cache; its limit is one streaming read of K and V at the bandwidth
measured in the same run. The limit of prefill is its flops at the speed of a large fp16 product.
"""

import argparse
import importlib
import json
import sys
from unittest import mock

import cupy
import numpy as np

from cupyq import _device
from cupyq.bench.limits import cublas_tflops, read_gigabytes_per_s
from cupyq.bench.peers import torch_graph_microseconds, torch_or_none
from cupyq.bench.timing import graph_microseconds

family = importlib.import_module("cupyq.ops.attention")  # the op of the same name hides the module

COLD_BYTES = 200 * 2**20
# batch, queries, keys
PROBLEMS = [
    *[(1, 1, keys) for keys in (1024, 4096, 32768)],
    (16, 1, 4096),
    *[(1, seq, seq) for seq in (512, 2048, 4096, 16384)],
    (1, 512, 8192),
]
PREFILL_CONFIGS = [family.PrefillConfig(*c) for c in [(8, 64), (4, 64), (4, 32), (8, 32)]]
DECODE_CONFIGS = [family.DecodeConfig(*c) for c in [(4, 3), (4, 2), (4, 4), (2, 3), (2, 4)]]


def make(batch, seq, keys, options, copies):
    rng = cupy.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32).astype(np.float16)  # noqa: E731
    q = draw(batch, seq, options.heads, options.head_dim)
    cache = (batch, keys, options.kv_heads, options.head_dim)
    return q, [(draw(*cache), draw(*cache)) for _ in range(copies)]


def verify(q, k, v, out):
    """The last row's last queries: they see the most keys, and every key."""
    count = min(q.shape[1], 3)
    exact = family.attention_reference(
        q[-1:, -count:].get(), k[-1:].get(), v[-1:].get(), q.shape[-1] ** -0.5, True, None, None, None
    )
    error = np.linalg.norm(out[-1:, -count:].get() - exact) / np.linalg.norm(exact)
    if not error < 2e-3:
        raise SystemExit(f"wrong result: q {q.shape}, k {k.shape}, error {error}")


def time_attention(q, caches):
    out = cupy.empty_like(q)
    workspace = cupy.zeros(family.attention_workspace_size(q.shape[-1]), np.float32)

    def run():
        for k, v in caches:
            family.attention(q, k, v, out=out, workspace=workspace)

    run()
    verify(q, *caches[-1], out)
    return graph_microseconds(run) / len(caches)


def time_torch(q, caches):
    torch = torch_or_none()
    if torch is None or 1 < q.shape[1] < caches[0][0].shape[1]:  # torch aligns a causal mask at the top left
        return None
    q, *flat = (torch.from_dlpack(a).transpose(1, 2) for a in (q, *(a for pair in caches for a in pair)))
    is_causal = q.shape[2] > 1

    def run():
        for k, v in zip(flat[::2], flat[1::2], strict=True):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    try:
        return torch_graph_microseconds(torch, run) / len(caches)
    except (RuntimeError, TypeError) as error:
        print(f"torch: {error}", file=sys.stderr)
        return None


def best_config(q, caches):
    """Every sensible configuration, timed: what the pick_ functions should have chosen."""
    kind = "decode" if q.shape[1] <= 16 else "prefill"
    arch = _device.current().arch
    times = {}
    for config in DECODE_CONFIGS if kind == "decode" else PREFILL_CONFIGS:
        if config.shared_bytes(q.shape[-1]) <= family.shared_bytes_limit(arch):
            with mock.patch.object(family, f"pick_{kind}_config", lambda head_dim, arch, config=config: config):
                times[config] = time_attention(q, caches)
    return " ".join(f"{config}: {us:.1f}" for config, us in sorted(times.items(), key=lambda item: item[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--configs", action="store_true", help="also time every sensible choice of tiles")
    options = parser.parse_args()

    read, flops = read_gigabytes_per_s(), cublas_tflops()
    print(f"{_device.current().name}: streaming read {read:.0f} GB/s, fp16 product {flops:.0f} TFLOP/s")
    print("batch    seq   keys       us   GB/s TFLOP/s limit us  share    torch")
    for batch, seq, keys in PROBLEMS:
        moved = 4 * batch * keys * options.kv_heads * options.head_dim
        pairs = seq * (keys - seq) + seq * (seq + 1) / 2
        work = 4 * batch * pairs * options.heads * options.head_dim
        q, caches = make(batch, seq, keys, options, max(2, -(-COLD_BYTES // moved)) if seq == 1 else 1)
        us, torch_us = time_attention(q, caches), time_torch(q, caches)
        limit = max(moved / read / 1e3, work / flops / 1e6)
        peer = f"{torch_us:8.1f}" if torch_us else f"{'-':>8}"
        print(
            f"{batch:>5} {seq:>6} {keys:>6} {us:8.1f} {moved / us / 1e3:6.0f} {work / us / 1e6:7.0f} {limit:8.1f} "
            f"{limit / us:6.1%} {peer}",
            flush=True,
        )
        row = dict(batch=batch, seq=seq, keys=keys, us=us, limit_us=limit, torch_us=torch_us)
        print(json.dumps(row), file=sys.stderr)
        if options.configs:
            print(" " * 12 + best_config(q, caches), flush=True)


if __name__ == "__main__":
    main()
