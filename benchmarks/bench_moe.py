"""A mixture of experts, quantized: row groups against every expert on every row.

    python benchmarks/bench_moe.py [--shapes mixtral-8x7b,qwen-moe] [--bits 4] [--rows 1,8,64,512] [--tile-rows] [--gptq]

Every row is verified, then timed: the whole layer after the router's logits (routing, grouping, three products, the sum), as
replays of a CUDA graph over layers that together exceed the L2 cache several times. The limit is the bytes of the experts
that are in use over the streaming read measured in the same run, or their flops over the fp16 product.
"""

import argparse
import json
import sys

import cupy
import numpy as np

from cupyq.bench.limits import cublas_tflops, read_gigabytes_per_s
from cupyq.bench.random_matrices import Words, parse_kind, random_tensors, words_needed
from cupyq.bench.timing import cold_copies, graph_microseconds
from cupyq.layers import MLP, Linear, MoE
from cupyq.ops import QMatrix, combine_rows, group_rows, matmul, qmatmul_grouped, reconstruct, route
from cupyq.ops.routing import TILE_ROWS

SHAPES = {  # hidden, inner, experts, top_k
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "qwen-moe": (2048, 1408, 60, 4),
}


class GivenLogits:
    """In the router's place: the same random logits at every call."""

    def __init__(self, rows, experts, seed=0):
        self.logits = cupy.asarray(np.random.default_rng(seed).standard_normal((rows, experts)).astype(np.float32))

    def __call__(self, x, dtype=None, adapters=None):
        return self.logits


def make_layer(shape, options, words, seed):
    hidden, inner, experts, top_k = SHAPES[shape]
    kind = parse_kind(f"{'gptq' if options.gptq else ''}{options.bits}-g{options.group}{'-act' if options.gptq else ''}")

    def linear(k, n, number):
        return Linear(QMatrix.from_tensors(random_tensors(kind, k, n, words, cupy, seed=1000 * seed + number)))

    mlps = [
        MLP(linear(hidden, inner, 3 * e), linear(hidden, inner, 3 * e + 1), linear(inner, hidden, 3 * e + 2), "silu")
        for e in range(experts)
    ]
    return MoE(None, mlps, top_k)


def verify(layer, x, found):
    """Every expert's rows with its reconstructed weights, by cuBLAS."""
    weights, chosen = (array.get() for array in route(layer.router(x), layer.top_k))
    exact = np.zeros(found.shape, np.float32)
    for e, expert in enumerate(layer.experts):
        rows, slots = np.nonzero(chosen == e)
        if rows.size:
            own = x[cupy.asarray(rows)]
            gate, up = (matmul(own, reconstruct(part.weight), dtype=np.float32) for part in (expert.gate, expert.up))
            y = matmul(
                (gate / (1 + cupy.exp(-gate)) * up).astype(np.float16), reconstruct(expert.down.weight), dtype=np.float32
            )
            exact[rows] += weights[rows, slots, None] * y.get()
    error = float(np.linalg.norm(found.get() - exact) / np.linalg.norm(exact))
    if not error < 2e-3:
        raise SystemExit(f"wrong result: {len(layer.experts)} experts, {len(x)} rows: error {error}")


def limit_us(layer, chosen, read, flops):
    """Over the bytes of the experts in use, and the flops of all pairs."""
    used = [layer.experts[e] for e in np.unique(chosen)]
    moved = sum(linear.storage_bits / 8 for expert in used for linear in expert.linears())
    flop = 2 * chosen.size * sum(linear.k * linear.n for linear in used[0].linears())
    return max(moved / read / 1e3, flop / flops / 1e6)


def time_tile_rows(layers, x, weights, chosen):
    """Microseconds of the products alone, by tile height."""
    results = {}
    for tile_rows in TILE_ROWS:
        groups = group_rows(chosen, len(layers[0].experts), tile_rows=tile_rows)

        def run(groups=groups):
            for layer in layers:
                _, up, down = layer._groups
                inner = qmatmul_grouped(x, up, groups)
                combine_rows(qmatmul_grouped(inner, down, groups, dtype=np.float32), weights)

        results[tile_rows] = graph_microseconds(run) / len(layers)
    return results


def bench(shape, layers, rows, options, read, flops):
    hidden, _, experts, _ = SHAPES[shape]
    x = cupy.asarray(np.random.default_rng(rows).standard_normal((rows, hidden)).astype(np.float16) * np.float16(0.1))
    for seed, layer in enumerate(layers):
        layer.router = GivenLogits(rows, experts, seed)
    verify(layers[0], x, layers[0](x))
    routed = [(layer, *route(layer.router(x), layer.top_k)) for layer in layers]
    us = graph_microseconds(lambda: [layer(x) for layer in layers]) / len(layers)
    others = lambda: [layer._one_by_one(x, weights, chosen, None) for layer, weights, chosen in routed]  # noqa: E731
    every = graph_microseconds(others) / len(layers)
    limit = np.mean([limit_us(layer, chosen.get(), read, flops) for layer, _, chosen in routed])
    print(f"{shape:>14} {rows:>5} {us:9.1f} {limit:9.1f} {limit / us:6.1%} {every:16.1f} {every / us:6.1f}", flush=True)
    row = dict(shape=shape, rows=rows, bits=options.bits, us=us, limit_us=float(limit), every_expert_us=every)
    if options.tile_rows:
        row["tile_rows_us"] = time_tile_rows(layers, x, *routed[0][1:])
        print(" " * 20, {tile_rows: round(us, 1) for tile_rows, us in row["tile_rows_us"].items()}, flush=True)
    print(json.dumps(row), file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--bits", type=int, default=4, help="code width of every expert")
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--gptq", action="store_true", help="GPTQ with act-order instead of EXL2")
    parser.add_argument("--tile-rows", action="store_true", help="also time up, down and the sum for every tile height")
    options = parser.parse_args()

    read, flops = read_gigabytes_per_s(), cublas_tflops()
    print(
        f"{cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}: read {read:.0f} GB/s, fp16 product {flops:.0f} TFLOP/s"
    )
    print(f"{'shape':>14} {'rows':>5} {'us':>9} {'limit us':>9} {'share':>6} {'every expert us':>16} {'ratio':>6}")
    for shape in options.shapes.split(","):
        hidden, inner, experts, _ = SHAPES[shape]
        layer_bytes = 3 * hidden * inner * experts * options.bits // 8
        words = Words(cupy, words_needed(hidden, inner))
        layers = [make_layer(shape, options, words, seed) for seed in range(cold_copies(layer_bytes))]
        for rows in map(int, options.rows.split(",")):
            bench(shape, layers, rows, options, read, flops)
        del layers
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
