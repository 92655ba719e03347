"""What the machine can do at most, measured: a streaming read, and a large fp16 product."""

from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import require_cupy
from cupyq.bench.timing import eager_microseconds, graph_microseconds


@dataclass(frozen=True)
class Limits:
    """Of one machine, measured in the run whose numbers are compared with them."""

    device: str
    gigabytes_per_s: float
    teraflops: float

    def microseconds(self, moved_bytes, flops):
        """The least time a problem can take: its bytes at the speed of the read, or its flops at that of the product."""
        return max(moved_bytes / self.gigabytes_per_s / 1e3, flops / self.teraflops / 1e6)

    def __str__(self):
        return f"{self.device}: streaming read {self.gigabytes_per_s:.0f} GB/s, fp16 product {self.teraflops:.0f} TFLOP/s"


def measure_limits():
    return Limits(_device.current().name, read_gigabytes_per_s(), cublas_tflops())


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


def read_gigabytes_per_s(size_bytes=None):
    """Streaming read of `size_bytes` (4 GiB, or a quarter of the memory): the limit of a kernel that reads everything once."""
    cupy = require_cupy()
    device = _device.current()
    size_bytes = min(4 * 2**30, device.memory_bytes // 4) // 16 * 16 if size_bytes is None else size_bytes
    data = cupy.zeros(size_bytes // 4, np.uint32)
    out = cupy.zeros(1, np.uint32)
    kernel = cupy.RawKernel(_READ, "read_all")
    best = 1e30
    for blocks in (4, 8, 16):
        grid, arguments = (blocks * device.sm_count,), (data, out, np.int64(size_bytes // 16))
        best = min(best, graph_microseconds(lambda grid=grid, arguments=arguments: kernel(grid, (512,), arguments)))
    del data
    cupy.get_default_memory_pool().free_all_blocks()
    return size_bytes / best / 1e3


def cublas_tflops(size=8192):
    """A large fp16 product of random data: the arithmetic limit."""
    from cupyq.ops import gemm

    cupy = require_cupy()
    rng = cupy.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32).astype(np.float16) for _ in range(2))
    out = cupy.empty((size, size), np.float16)
    return 2e-6 * size**3 / eager_microseconds(lambda: gemm(a, b, out))
