"""Quantized products against the limit, cuBLAS fp16 and, where torch is importable, its int4 kernel.

    python benchmarks/bench_qmatmul.py [--shapes 4096x4096,14336x4096] [--bits 4,3,2] [--rows 1,4,8,16,64] [--configs]

Every row is verified, then timed as replays of a CUDA graph over matrices that together exceed the L2 cache several times.
The limit of a problem is its bytes over the streaming read measured in the same run, or its flops over the fp16 product.
"""

import argparse
import importlib
import json
import sys

import cupy
import numpy as np
from common import (
    cublas_tflops,
    eager_microseconds,
    graph_microseconds,
    read_gigabytes_per_s,
    torch_graph_microseconds,
    torch_or_none,
)

from cupyq import QMatrix, _device
from cupyq.ops.matmul import gemm

family = importlib.import_module("cupyq.ops.qmatmul")  # the op of the same name hides the module

SHAPES = ("4096x4096", "4096x6144", "14336x4096", "4096x28672", "8192x28672", "28672x8192")
COLD_BYTES = 400 * 2**20


def random_matrix(k, n, bits, group, seed, has_perm=True, is_gptq=False):
    """A QMatrix of random codes, made on the GPU: timing needs no meaningful weights, only valid ones."""
    rng = cupy.random.default_rng(seed)
    groups = k // group
    if is_gptq:
        order = np.random.default_rng(seed).permutation(k) if has_perm else np.arange(k)
        return QMatrix.from_tensors(
            {
                "qweight": rng.integers(0, 2**32, (k * bits // 32, n), dtype=np.uint32).view(np.int32),
                "qzeros": rng.integers(0, 2**32, (groups, n * bits // 32), dtype=np.uint32).view(np.int32),
                "scales": (rng.random((groups, n), np.float32) / 100).astype(np.float16),
                "g_idx": (order // group).astype(np.int32),
            }
        )
    words = group * bits // 32
    table = np.stack([np.full(groups, bits), np.arange(groups) * words], axis=1).astype(np.int16).reshape(-1)
    random_words = lambda *shape: rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.int32)  # noqa: E731
    return QMatrix.from_tensors(
        {
            "q_weight": random_words(groups * words, n),
            "q_scale": random_words(groups, n // 8),
            "q_scale_max": np.full(groups, 0.02, np.float16),
            "q_groups": table,
            "q_invperm": np.random.default_rng(seed).permutation(k).astype(np.int32) if has_perm else None,
        }
    )


def verify(q, x):
    weight = family.reconstruct(q).astype(np.float32)
    exact = x.astype(np.float32) @ weight
    y = family.qmatmul(x, q).astype(np.float32)
    error = float(cupy.linalg.norm(y - exact) / cupy.linalg.norm(exact))
    if not error < 1e-3:
        raise SystemExit(f"wrong result: {q.k} x {q.n}, {q.bits} bits, {x.shape[0]} rows: error {error}")


def time_qmatmul(matrices, x, config=None):
    rows = x.shape[0]
    out = cupy.empty((rows, matrices[0].n), np.float16)
    size = family.qmatmul_workspace_size(matrices[0], min(rows, family.FUSED_ROWS))
    if config is not None:
        size = family.COUNTERS + sum(family._workspace_parts(matrices[0], rows, config))
    workspace = cupy.zeros(size, np.float32)

    def run():
        for q in matrices:
            if config is not None:
                family._launch_fused(x, q, out, rows, workspace, config)
            elif rows <= family.FUSED_ROWS:
                family.qmatmul(x, q, out=out, workspace=workspace)
            else:
                family.qmatmul(x, q, out=out)

    return (graph_microseconds if rows <= family.FUSED_ROWS else eager_microseconds)(run) / len(matrices)


def time_cublas(k, n, x):
    weights = [cupy.random.default_rng(i).random((k, n), np.float32).astype(np.float16) for i in range(copies(2 * k * n))]
    out = cupy.empty((x.shape[0], n), np.float16)
    return eager_microseconds(lambda: [gemm(x, w, out) for w in weights]) / len(weights)


def time_torch_int4(k, n, rows):
    torch = torch_or_none()
    if torch is None or rows > 64:
        return None
    try:
        packed = [
            torch._convert_weight_to_int4pack(torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
            for _ in range(copies(k * n // 2))
        ]
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        x = torch.rand(rows, k, device="cuda", dtype=torch.bfloat16)
        run = lambda: [torch._weight_int4pack_mm(x, w, 128, scales) for w in packed]  # noqa: E731
        return torch_graph_microseconds(torch, run) / len(packed)
    except (RuntimeError, AttributeError) as error:
        print(f"torch int4: {error}", file=sys.stderr)
        return None


def copies(matrix_bytes):
    return max(2, -(-COLD_BYTES // matrix_bytes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="K x N, comma-separated")
    parser.add_argument("--bits", default="4", help="code widths")
    parser.add_argument("--rows", default="1,4,8,16,64,256,1024", help="rows of x")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--configs", action="store_true", help="time every sensible QmatmulConfig and print the best")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--gptq", action="store_true", help="GPTQ matrices instead of EXL2")
    parser.add_argument("--no-perm", action="store_true", help="matrices without activation order")
    options = parser.parse_args()

    read, flops = read_gigabytes_per_s(), cublas_tflops()
    print(f"{_device.current().name}: streaming read {read:.0f} GB/s, fp16 product {flops:.0f} TFLOP/s")
    head = f"{'K x N':>14} {'bits':>4} {'rows':>5} {'us':>8} {'GB/s':>6} {'limit us':>8} {'share':>6}"
    print(f"{head} {'cuBLAS':>7} {'int4':>7}")
    for shape in options.shapes.split(","):
        k, n = map(int, shape.split("x"))
        peers = {}
        for bits in map(int, options.bits.split(",")):
            moved = k * n * bits / 8 + k // options.group * n * 2
            matrices = [
                random_matrix(k, n, bits, options.group, seed, not options.no_perm, options.gptq)
                for seed in range(copies(int(moved)))
            ]
            for rows in map(int, options.rows.split(",")):
                x = cupy.asarray(np.random.default_rng(0).standard_normal((rows, k)).astype(np.float16))
                verify(matrices[0], x)
                if rows not in peers and not options.no_peers:
                    peers[rows] = time_cublas(k, n, x), time_torch_int4(k, n, rows)
                limit = max(moved / read / 1e3, 2e-6 * rows * k * n / flops)
                row = dict(k=k, n=n, bits=bits, rows=rows, limit_us=limit)
                if options.configs and rows <= family.FUSED_ROWS:
                    row |= best_config(matrices, x)
                else:
                    row["us"] = time_qmatmul(matrices, x)
                cublas, int4 = peers.get(rows, (None, None))
                numbers = [f"{value:7.1f}" if value else "      -" for value in (cublas, int4)]
                print(
                    f"{shape:>14} {bits:>4} {rows:>5} {row['us']:8.1f} {moved / row['us'] / 1e3:6.0f} {limit:8.1f} "
                    f"{limit / row['us']:6.1%} {' '.join(numbers)} {row.get('config', '')}",
                    flush=True,
                )
                print(json.dumps(row | {"cublas_us": cublas, "int4_us": int4}), file=sys.stderr)
            del matrices
            cupy.get_default_memory_pool().free_all_blocks()


def best_config(matrices, x):
    """The quickest of a small sweep of thread-block shapes and slice counts."""
    blocks = matrices[0].tiles.layout.blocks
    results = []
    for warps_n, warps_k in ((4, 2), (4, 1), (2, 4), (1, 8), (4, 4), (8, 1)):
        for factor in (1, 2, 4, 6):
            column_blocks = -(-matrices[0].n // (32 * warps_n))
            slices = max(1, factor * 132 // column_blocks)
            if slices > max(1, blocks // (2 * warps_k)):
                continue
            slice_blocks = -(-blocks // slices)
            m_tiles = next(t for t in (1, 2, 4, 8) if 8 * t >= x.shape[0])
            for chunk in {min(slice_blocks, kib * 2 // m_tiles - 1) for kib in (48, 96)}:
                config = family.QmatmulConfig(m_tiles, warps_n, warps_k, -(-blocks // slice_blocks), slice_blocks, chunk)
                if config not in [c for _, c in results]:
                    results.append((time_qmatmul(matrices, x, config), config))
    us, config = min(results, key=lambda r: r[0])
    return {"us": us, "config": f"{config.warps_n}x{config.warps_k} slices {config.slices} chunk {config.chunk_blocks}"}


if __name__ == "__main__":
    main()
