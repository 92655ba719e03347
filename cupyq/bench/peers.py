"""The others that can multiply: cuBLAS on unquantized weights, PyTorch's int4 kernel, exllamav2's extension; and PyTorch's
attention, by FlashAttention 2 and by cuDNN.

PyTorch is imported here and nowhere else in the package, by name and only when a peer is asked for: a benchmark against it
cannot do without it.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np

from cupyq._arrays import float16, require_cupy
from cupyq.bench.timing import cold_copies, graph_microseconds, loops_for, settled_times

INT4_MAX_ROWS = 256
"""PyTorch's kernel reads the weights again for every few rows: beyond, its times only grow."""
_EXLLAMAV2_FUSED_ROWS = 32
_EXLLAMAV2_TUNING_CALLS = 201
_EXLLAMAV2_MOST_SCRATCH = 512 * 2**20  # values; as its Python package asks for


def torch_or_none():
    """PyTorch if it can be imported and sees a GPU."""
    try:
        torch = importlib.import_module("torch")
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
    return float(np.median(settled_times(graph.replay, functools.partial(_torch_event_times, torch), repeats)))


def _torch_event_times(torch, run, repeats):
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return times


class Cublas:
    """x @ W with weights of x's dtype; the faster of the two ways they may lie in memory, [K, N] and [N, K]."""

    def __init__(self, k, n, dtype):
        self.k, self.n = k, n
        values = np.random.default_rng(1).standard_normal(1_000_003) * k**-0.5
        # As numbers of 16 bits, which CuPy can copy, whatever they mean.
        pattern = values.astype(np.float32).astype(dtype).view(np.uint16)
        first = require_cupy().asarray(np.resize(pattern, k * n))
        self.weights = [first.copy().view(dtype) for _ in range(cold_copies(2 * k * n))]

    def microseconds(self, x, out, expected_us):
        """For x [rows, K] and out [rows, N]."""
        return min(self._microseconds(x, out, expected_us, is_transposed) for is_transposed in (False, True))

    def _microseconds(self, x, out, expected_us, is_transposed):
        from cupyq.ops import matmul

        shape = (self.n, self.k) if is_transposed else (self.k, self.n)
        weights = [weight.reshape(shape) for weight in self.weights]
        loops = loops_for(expected_us, len(weights))

        def run():
            for _ in range(loops):
                for weight in weights:
                    matmul(x, weight, transpose=is_transposed, out=out)

        return graph_microseconds(run, repeats=5) / (loops * len(weights))


class TorchInt4:
    """torch._weight_int4pack_mm: 4 bits, groups of 128, bfloat16 scales and zeros."""

    def __init__(self, torch, k, n):
        self.torch, self.k, self.n = torch, k, n
        self.packed = [
            torch._convert_weight_to_int4pack(torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
            for _ in range(cold_copies(k * n // 2))
        ]
        self.scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)

    def microseconds(self, rows, expected_us):
        """None where it is not worth waiting for."""
        if rows > INT4_MAX_ROWS:
            return None
        x = self.torch.rand(rows, self.k, device="cuda", dtype=self.torch.bfloat16)
        # It is slower by far than the limit for many rows.
        loops = loops_for(expected_us * max(1, rows / 8), len(self.packed))

        def run():
            for _ in range(loops):
                for weight in self.packed:
                    self.torch._weight_int4pack_mm(x, weight, 128, self.scales)

        return torch_graph_microseconds(self.torch, run, repeats=5) / (loops * len(self.packed))


class TorchAttention:
    """Causal attention of PyTorch by one of its backends, "flash" or "cudnn", over arrays that it takes as they are.

    What `scaled_dot_product_attention` can say goes through it. It aligns its causal mask at the first key and knows neither
    windows nor lengths: for those, the function under its flash backend is called (private: other versions may differ).
    """

    backends = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}

    def __init__(self, torch, backend, q, caches, lengths, window=None):
        """CuPy arrays q [batch, queries, heads, head_dim], caches [(k, v)] each [batch, keys, kv_heads, head_dim]."""
        self.torch, self.backend, self.window, self.dtype = torch, backend, window, q.dtype
        self.q = self._tensor(q)
        self.caches = [(self._tensor(k), self._tensor(v)) for k, v in caches]
        batch, queries, keys = *q.shape[:2], caches[0][0].shape[1]
        is_even = min(lengths) == keys
        self.is_plain = window is None and is_even and queries in (1, keys)
        self.has_kernel = self.is_plain or backend == "flash"
        self.starts = None
        if not is_even:
            steps = (torch.arange(batch + 1, dtype=torch.int32, device="cuda") * step for step in (queries, keys))
            self.starts = (*steps, torch.tensor(lengths, dtype=torch.int32, device="cuda"))

    def _tensor(self, array):
        """Numbers of 16 bits pass as such: bfloat16 has no name that both libraries know."""
        wanted = self.torch.float16 if array.dtype == float16 else self.torch.bfloat16
        return self.torch.from_dlpack(array.view(np.int16)).view(wanted)

    def _attend(self, k, v):
        torch, q = self.torch, self.q
        if self.is_plain:
            queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
            attention = torch.nn.functional.scaled_dot_product_attention
            return attention(queries, keys, values, is_causal=q.shape[1] > 1, enable_gqa=True).transpose(1, 2)
        left = None if self.window is None else self.window - 1
        options = {"window_size_left": left, "window_size_right": None if left is None else 0}
        starts, shape, sizes = (None, None), q.shape, (q.shape[1], k.shape[1])
        if self.starts is not None:
            q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
            *starts, options["seqused_k"] = self.starts
        # Then: no dropout, causal, no debug mask. It aligns the mask at the last key.
        found = torch.ops.aten._flash_attention_forward(q, k, v, *starts, *sizes, 0.0, True, False, **options)
        return found[0].reshape(shape)

    def output(self):
        """The result over the first cache, on the host."""
        with self._chosen():
            found = self._attend(*self.caches[0]).contiguous()
        return found.view(self.torch.int16).cpu().numpy().view(self.dtype)

    def microseconds(self, expected_us):
        loops = loops_for(expected_us, len(self.caches))

        def run():
            for _ in range(loops):
                for k, v in self.caches:
                    self._attend(k, v)

        with self._chosen():
            return torch_graph_microseconds(self.torch, run, repeats=7) / (loops * len(self.caches))

    @contextlib.contextmanager
    def _chosen(self):
        """No other backend may take over: where this one has no kernel, there is a RuntimeError."""
        kernels = importlib.import_module("torch.nn.attention")
        with warnings.catch_warnings(), kernels.sdpa_kernel(getattr(kernels.SDPBackend, self.backends[self.backend])):
            warnings.simplefilter("ignore")  # why each of the others has not been taken
            yield


def load_exllamav2(folder):
    """exllamav2's compiled extension, from the `exllamav2_ext*.so` in `folder` or, without one, as Python finds it; or None."""
    if torch_or_none() is None:
        return None
    if folder is None:
        try:
            return importlib.import_module("exllamav2_ext")
        except ImportError:
            return None
    files = sorted(Path(folder).glob("exllamav2_ext*.so"))
    if not files:
        raise ValueError(f"--exllamav2 {folder}: no exllamav2_ext*.so there; name the folder that exllamav2 was built in")
    specification = importlib.util.spec_from_file_location("exllamav2_ext", files[0])
    try:
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--exllamav2 {folder}: {files[0].name} cannot be loaded ({reason}); build it again") from None
    return module


class Exllamav2:
    """gemm_half_q_half of exllamav2 0.3.2 on matrices of the same tensors; launched call by call, as its users do.

    Its tuner times the first calls of a shape with events and waits for them, so it cannot be captured in a graph.
    """

    tuned: set[tuple[int, int, int]] = set()

    def __init__(self, extension, torch, kind, k, n, tensors):
        self.extension, self.torch, self.k, self.n = extension, torch, k, n
        self.is_gptq = kind.is_gptq
        max_dq_rows = _EXLLAMAV2_MOST_SCRATCH // n
        self.scratch = torch.empty(min(k * n, _EXLLAMAV2_MOST_SCRATCH), dtype=torch.half, device="cuda")
        self.kept, self.handles = [], []
        for _ in range(cold_copies(kind.weight_bytes(k, n))):
            arguments = self._arguments({name: self._own(tensor) for name, tensor in tensors.items()})
            self.kept.append(arguments)
            self.handles.append(extension.make_q_matrix(*arguments, self.scratch, max_dq_rows))

    def _own(self, tensor):
        """A copy: make_q_matrix rewrites what it is given."""
        if isinstance(tensor, np.ndarray):
            return self.torch.from_numpy(tensor.copy())
        return self.torch.from_dlpack(tensor).clone()

    def _arguments(self, w):
        """q_weight, q_perm, q_invperm, q_scale, q_scale_max, q_groups, q_group_map, qzeros, scales, g_idx, bias."""
        torch, absent = self.torch, self.torch.empty((1, 1), device="meta")
        if self.is_gptq:
            perms = [absent, absent]
            if "g_idx" in w:
                perms = [torch.empty(self.k, dtype=torch.short, device="cuda") for _ in range(2)]
            rest = [w["qzeros"], w["scales"], w.get("g_idx", absent)]
            return [w["qweight"], *perms, absent, absent, absent, absent, *rest, absent]
        inverse = w["q_invperm"].cuda()
        group_map = self.extension.make_group_map(w["q_groups"], w["q_weight"].shape[0]).cuda()
        scale_max, groups = (w["q_scale_max"] / 256).cuda(), w["q_groups"].cuda()
        perms = [torch.argsort(inverse).short(), inverse.short()]
        return [w["q_weight"], *perms, w["q_scale"], scale_max, groups, group_map, absent, absent, absent, absent]

    def product(self, x):
        """y of the first matrix, CuPy arrays."""
        cupy = require_cupy()
        y = cupy.empty((x.shape[0], self.n), float16)
        self.extension.gemm_half_q_half(self.torch.from_dlpack(x), self.handles[0], self.torch.from_dlpack(y), False)
        self.torch.cuda.synchronize()
        return y

    def microseconds(self, x, expected_us):
        rows = x.shape[0]
        x = self.torch.from_dlpack(x)
        y = self.torch.empty((rows, self.n), dtype=self.torch.half, device="cuda")
        # A call takes several times the limit, and costs the host about 8 us at least.
        loops = loops_for(max(4 * expected_us, 8), len(self.handles))

        def run(loops=loops):
            for _ in range(loops):
                for handle in self.handles:
                    self.extension.gemm_half_q_half(x, handle, y, False)

        tuning = (rows, self.k, self.n)
        if not self.is_gptq and rows <= _EXLLAMAV2_FUSED_ROWS and tuning not in self.tuned:
            self.tuned.add(tuning)
            run(-(-_EXLLAMAV2_TUNING_CALLS // len(self.handles)))
        run(1)
        self.torch.cuda.synchronize()
        times = settled_times(run, functools.partial(_torch_event_times, self.torch), 5)
        return float(np.median(times)) / (loops * len(self.handles))

    def close(self):
        for handle in self.handles:
            self.extension.free_q_matrix(handle)
        self.handles, self.kept = [], []


def free_memory():
    """What CuPy and PyTorch keep for later."""
    require_cupy().get_default_memory_pool().free_all_blocks()
    empty_torch_cache()


def empty_torch_cache():
    """Hand PyTorch's unused GPU memory back, for CuPy to have."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
