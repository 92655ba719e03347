"""What the benchmarks share: the limits of the machine, and timing by CUDA graph."""

import cupy
import numpy as np


def graph_microseconds(run, repeats=15):
    """Median time of run() as a replayed CUDA graph, in microseconds. `run` must not synchronise nor allocate unpooled."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run()
        run()
        stream.synchronize()
        stream.begin_capture()
        kept = run()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        times = []
        for _ in range(repeats):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(1000 * cupy.cuda.get_elapsed_time(start, end))
    del kept
    return float(np.median(times))


def eager_microseconds(run, repeats=15):
    """Median time of run(), launched call by call: for cuBLAS, which CuPy does not let into a graph.

    `run` should queue many calls, so that the GPU never waits for the host.
    """
    run()
    times = []
    for _ in range(repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * cupy.cuda.get_elapsed_time(start, end))
    return float(np.median(times))


_READ = r"""
extern "C" __global__ void read_all(const uint4 *x, unsigned *out, long long n) {
    unsigned sum = 0;
    long long step = (long long)gridDim.x * blockDim.x, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = __ldcs(x + i), b = __ldcs(x + i + step), c = __ldcs(x + i + 2 * step), d = __ldcs(x + i + 3 * step);
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < n; i += step) sum += x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    if (sum == 0x12345678u) *out = sum;
}
"""


def read_gigabytes_per_s(size_bytes=4 * 2**30):
    """Streaming read of `size_bytes`: the memory limit of a kernel that reads everything once."""
    data = cupy.zeros(size_bytes // 16 * 4, np.uint32)
    out = cupy.zeros(1, np.uint32)
    kernel = cupy.RawKernel(_READ, "read_all")
    sms = cupy.cuda.Device().attributes["MultiProcessorCount"]
    best = 1e30
    for blocks in (4, 8, 16):
        arguments = (data, out, np.int64(size_bytes // 16))
        best = min(best, graph_microseconds(lambda b=blocks, a=arguments: kernel((b * sms,), (512,), a)))
    return size_bytes / best / 1e3


def cublas_tflops(size=8192):
    """A large fp16 product of random data: the arithmetic limit."""
    from cupyq.ops.matmul import gemm

    rng = cupy.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32).astype(np.float16) for _ in range(2))
    out = cupy.empty((size, size), np.float16)
    return 2e-6 * size**3 / eager_microseconds(lambda: gemm(a, b, out))


def torch_or_none():
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def torch_graph_microseconds(torch, run, repeats=12):
    """`graph_microseconds` for a run() of PyTorch calls, as a graph of PyTorch's own."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return float(np.median(times))
