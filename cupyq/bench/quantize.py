"""`cupyq bench quantize`: the steps of the quantizer, from the kernels of a group to a decoder layer, against the limit."""

import functools
import math
import sys
import time
from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import first_line, float16, float32, namespace, require_cupy
from cupyq.bench.limits import Limits, measure_limits
from cupyq.bench.qmatmul import parse_shape
from cupyq.bench.shapes import shape_config
from cupyq.bench.table import Table, finite
from cupyq.bench.timing import eager_microseconds, graph_microseconds, wait
from cupyq.ops.quantize_group import (
    GPTQ_SHARES,
    SEARCHES,
    SHARES,
    quantize_group,
    quantize_group_reference,
    search_scales,
    search_scales_gptq,
    search_scales_gptq_reference,
    search_scales_reference,
    search_scales_workspace_size,
)
from cupyq.quantize.hessian import Hessian
from cupyq.quantize.layouts import MENU, Layout
from cupyq.quantize.linear import quantize_linear

LAYOUTS = ("2g128", "3x.5g64+2x.5g64", "4g32", "6g64")
"""Of each matrix, in place of all layouts that a measurement goes through: their mean stands for that of the menu."""
SWEEPS = 4
SLICE = 96
"""Columns of a kernel's problem that NumPy works out again."""
TOKENS = 2048
"""Of one batch that a Hessian takes in."""
_CALLS = 8  # of a kernel in a graph
_MOST_ERROR = 2e-4
_INSTRUCTIONS = 8  # of a candidate of the search, for each weight


@dataclass(frozen=True)
class Options:
    """What to measure; see `cupyq bench quantize --help`."""

    shape: str | None = "llama-3.1-8b"
    shapes: tuple[tuple[int, int], ...] = ()
    layouts: tuple[Layout, ...] = tuple(map(Layout.parse, LAYOUTS))
    tokens: int = 100 * 2048
    is_on_host: bool = False
    is_quick: bool = False

    @classmethod
    def parse(cls, shape=None, shapes=None, layouts=None, tokens=None, backend="auto", is_quick=False):
        """Names separated by commas become tuples; without shapes, those of the model. ValueError names the option."""
        if shape is not None and shapes is not None:
            raise ValueError("--shape and --shapes exclude each other: a model has its own matrices")
        name = None if shapes is not None else shape or "llama-3.1-8b"
        names = layouts.split(",") if layouts is not None else LAYOUTS[1:2] if is_quick else LAYOUTS
        try:
            chosen = tuple(map(Layout.parse, names))
        except ValueError as error:
            raise ValueError(f"--layouts: {error}") from None
        sizes = (
            tuple(map(parse_shape, shapes.split(","))) if name is None else tuple(dict.fromkeys(model_matrices(name).values()))
        )
        sizes = sizes[:1] if is_quick else sizes
        is_on_host = _device.choose_backend(backend) == "numpy"
        return cls(None if is_quick else name, sizes, chosen, tokens or cls.tokens, is_on_host, is_quick)


def model_matrices(shape):
    """{projection: (K, N)} of a decoder layer."""
    config = shape_config(shape)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    found = dict.fromkeys(("q", "o"), (hidden, hidden)) | dict.fromkeys(("k", "v"), (hidden, kv))
    return found | dict.fromkeys(("gate", "up"), (hidden, inner)) | {"down": (inner, hidden)}


# --- what the machine can do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Limits of this machine, measured in the run: products of each precision, which bound all arithmetic in it."""

    limits: Limits
    fp32_teraflops: float
    fp64_teraflops: float

    def microseconds(self, moved_bytes=0.0, fp16=0.0, fp32=0.0, fp64=0.0):
        """The least time for so many bytes, and so many floating-point operations of each kind one after another."""
        arithmetic = fp16 / self.limits.teraflops + fp32 / self.fp32_teraflops + fp64 / self.fp64_teraflops
        return max(moved_bytes / self.limits.gigabytes_per_s / 1e3, arithmetic / 1e6)

    def __str__(self):
        return f"{self.limits}; fp32 {self.fp32_teraflops:.0f}, fp64 {self.fp64_teraflops:.0f} TFLOP/s"


def measure_rates():
    return Rates(measure_limits(), product_teraflops(np.float32), product_teraflops(np.float64))


def product_teraflops(dtype, size=8192):
    """A large product of random data, as CuPy computes it: without tensor cores for fp32."""
    cupy = require_cupy()
    a, b = (cupy.random.default_rng(seed).standard_normal((size, size), dtype=dtype) for seed in range(2))
    return 2e-6 * size**3 / eager_microseconds(functools.partial(cupy.matmul, a, b, out=cupy.empty_like(a)), 5)


def search_flops(rows, n, bits):
    """Of `search_scales`. Half of an fp32 product's operations fit into the time of its instructions."""
    return 2 * _INSTRUCTIONS * SHARES * SEARCHES[bits].window * rows * n


def group_flops(rows, n):
    """Of `quantize_group`: a product and a sum, rounded one by one, for each pair of rows and each column."""
    return 2 * rows * (rows - 1) * n


def matrix_flops(groups, n, sweeps=0):
    """Of `quantize_linear`: fp32 products with what earlier rows lost, the searches, the groups' own recursions."""
    k, done, total = sum(rows for _, rows in groups), 0, 0
    for bits, rows in groups:
        total += 2 * done * rows * n + search_flops(rows, n, bits)
        total += group_flops(rows, n) + sweeps * (2 * k * rows * n + group_flops(rows, n))
        done += rows
    return total


# --- problems ---------------------------------------------------------------------------------------------------------


def random_inputs(xp, k, seed=0, dtype=float16):
    """TOKENS inputs with features of different sizes, hardly correlated."""
    rng = np.random.default_rng(seed)
    return xp.asarray((rng.standard_normal((TOKENS, k), np.float32) * np.exp(rng.standard_normal(k) / 2)).astype(dtype))


def random_weight(xp, k, n, seed=1, dtype=float16):
    rng = np.random.default_rng(seed)
    return xp.asarray((rng.standard_normal((k, n), np.float32) * np.float32(k**-0.5)).astype(dtype))


def host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def differs(found, expected):
    """How many values of arrays differ: 0 where all bits are those expected."""
    return float(sum((host(a) != b).sum() for a, b in zip(found, expected, strict=True)))


class QuantizeTable(Table):
    """Rows of (step, matrix, variant), with the wall time that a caller waits, or of kernels alone that of a graph."""

    columns = f"{'step':<22} {'matrix':>14} {'variant':>18} {'us':>12} {'limit us':>10} {'share':>7} {'error':>8}"

    def __init__(self, options, rates, out, lines):
        super().__init__(options, rates or "the host, NumPy: times without limits", None, out, lines)
        self.rates = rates
        self.xp = np if options.is_on_host else require_cupy()
        self.found = {}

    def attempt(self, function, *arguments):
        """Whatever fails, the other rows are worth having."""
        try:
            function(*arguments)
        except Exception as error:
            self.is_right = False
            what = " ".join([function.__name__, *(str(each) for each in arguments if isinstance(each, (int, str)))])
            print(f"{what}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
        if self.xp is not np:
            self.xp.get_default_memory_pool().free_all_blocks()

    def wall_microseconds(self, run, repeats=3):
        """Median time until the results are there."""
        run()
        times = []
        for _ in range(repeats):
            wait(self.xp)
            begin = time.perf_counter()
            run()
            wait(self.xp)
            times.append(1e6 * (time.perf_counter() - begin))
        return float(np.median(times))

    def kernel_microseconds(self, run):
        if self.xp is np:
            return self.wall_microseconds(run, 1)
        return graph_microseconds(lambda: [run() for _ in range(_CALLS)], 7) / _CALLS

    def row(self, step, shape, variant, us, error, most=_MOST_ERROR, **work):
        """work: as `Rates.microseconds` takes it."""
        limit_us = None if self.rates is None else self.rates.microseconds(**work)
        self.found[step, shape, variant] = us, limit_us
        self._add(step, "x".join(map(str, shape)), variant, us, limit_us, error, error <= most)

    def _add(self, step, matrix, variant, us, limit_us, error=0.0, is_right=True):
        row = {
            "family": "quantize",
            "device": "numpy" if self.rates is None else self.rates.limits.device,
            "step": step,
            "matrix": matrix,
            "variant": variant,
            "us": us,
            "limit_us": limit_us,
            "share": None if limit_us is None else limit_us / us,
            "error": finite(error),
        }
        self.add(row, row_text(row), is_right)

    # --- kernels of a group ---

    def measure_group(self, rows, n):
        xp, shape = self.xp, (rows, n)
        target, factor = random_weight(xp, rows, n, dtype=float32), random_weight(xp, rows, rows, 2, float32)
        weights = abs(random_weight(xp, rows, 1, 3, float32)).reshape(-1) + np.float32(0.1)
        part, small = xp.ascontiguousarray(target[:, :SLICE]), tuple(map(host, (target[:, :SLICE], factor, weights)))
        codes, scale_max = xp.empty(n, np.uint8), xp.empty(1, float16)
        workspace = xp.empty(search_scales_workspace_size(n), np.uint8)
        for bits in (2, 3, 4, 8):
            found = search_scales(part, weights, bits)
            error = differs(found, search_scales_reference(small[0], small[2], bits))
            outputs = {"codes": codes, "scale_max": scale_max, "workspace": workspace}
            us = self.kernel_microseconds(functools.partial(search_scales, target, weights, bits, **outputs))
            work = {"moved_bytes": 4 * rows * n, "fp32": search_flops(rows, n, bits)}
            self.row("search_scales", shape, f"{bits} bits", us, error, 0, **work)
        scales, zeros = xp.empty(n, float16), xp.empty(n, np.uint8)
        for is_symmetric in (True, False):
            found = search_scales_gptq(part, weights, 4, is_symmetric)
            error = differs(found, search_scales_gptq_reference(small[0], small[2], 4, is_symmetric))
            run = functools.partial(search_scales_gptq, target, weights, 4, is_symmetric, scales=scales, zeros=zeros)
            tried = GPTQ_SHARES * (1 if is_symmetric else 3)
            work = {"moved_bytes": 4 * rows * n, "fp32": 2 * _INSTRUCTIONS * tried * rows * n}
            name = "4 bits, sym" if is_symmetric else "4 bits, asym"
            self.row("search_scales_gptq", shape, name, self.kernel_microseconds(run), error, 0, **work)
        scales = xp.full(n, 0.5 * rows**-0.5, float16)
        found = quantize_group(part, part, factor, weights, scales[:SLICE], 4)
        expected = quantize_group_reference(small[0], small[0], *small[1:], host(scales[: part.shape[1]]), 4)
        outputs = {"codes": xp.empty(shape, np.uint8), "error": xp.empty(shape, float32), "loss": xp.empty(n, float32)}
        us = self.kernel_microseconds(functools.partial(quantize_group, target, target, factor, weights, scales, 4, **outputs))
        work = {"moved_bytes": 13 * rows * n, "fp32": group_flops(rows, n)}
        self.row("quantize_group", shape, "4 bits", us, differs(found, expected), 0, **work)

    # --- Hessians ---

    def measure_hessian(self, k):
        x, shape = random_inputs(self.xp, k), (k,)
        plain = Hessian(k, self.xp)
        plain.add(x)
        error = self._hessian_error(plain.sum, x, x)
        us = self.wall_microseconds(functools.partial(plain.add, x))
        batch = f"{TOKENS} tokens"
        # The sum is read and written, in fp64.
        self.row("Hessian", shape, batch, us, error, moved_bytes=16 * k**2, fp16=2 * TOKENS * k**2)
        hessian, original = Hessian(k, self.xp), random_inputs(self.xp, k, 4)
        weights = self.xp.ones(TOKENS, float32)
        hessian.add(x, original, weights=weights)
        error = self._hessian_error(hessian.cross, x, original.astype(float32) - x.astype(float32))
        us = self.wall_microseconds(functools.partial(hessian.add, x, original, weights=weights))
        while hessian.tokens < 2 * k:  # of fewer tokens than features, no correction is made
            hessian.add(x, original, weights=weights)
        self.row("Hessian and cross", shape, batch, us, error, moved_bytes=32 * k**2, fp32=4 * TOKENS * k**2)
        prepared = hessian.prepare(keeps_matrix=True)
        us = self.wall_microseconds(functools.partial(hessian.prepare, keeps_matrix=True))
        self.row("factors", shape, "", us, self._factor_error(prepared), moved_bytes=16 * k**2, fp64=k**3 / 3)
        return prepared

    def _hessian_error(self, total, x, y):
        """Of a sum x^T y, in some of its rows, norm-wise."""
        some = slice(0, SLICE)
        exact = x[:, some].astype(np.float64).T @ y.astype(np.float64)
        return self._relative(total[some], exact)

    def _factor_error(self, prepared):
        """Of (I + A) diag(D) (I + A)^T, in some of its rows."""
        xp, k = self.xp, prepared.k
        upper = prepared.factor.astype(np.float64)
        xp.fill_diagonal(upper, 1)
        found = (upper[:SLICE] * prepared.weights.astype(np.float64)) @ upper.T
        exact = prepared.matrix[:SLICE].astype(np.float64)
        rows = xp.arange(min(SLICE, k))
        exact[rows, rows] += prepared.ridge[:SLICE]
        return self._relative(found, exact)

    def _relative(self, found, exact):
        return float(namespace(found=found).linalg.norm(found - exact) / namespace(exact=exact).linalg.norm(exact))

    # --- matrices ---

    def measure_matrix(self, k, n, prepared):
        weight, shape = random_weight(self.xp, k, n), (k, n)
        us = self.wall_microseconds(functools.partial(prepared.corrected, weight))
        self.row("correction", shape, "", us, 0.0, fp32=4 * k**2 * n)
        for layout in self.options.layouts:
            for sweeps in (0, SWEEPS) if layout is self.options.layouts[-1] else (0,):
                run = functools.partial(quantize_linear, weight, prepared, layout, sweeps=sweeps)
                error = self._matrix_error(run(), weight, prepared)
                name = layout.name + (f", {sweeps} sweeps" if sweeps else "")
                self.row(
                    "matrix", shape, name, self.wall_microseconds(run, 2), error, fp32=matrix_flops(layout.groups(k), n, sweeps)
                )

    def _matrix_error(self, result, weight, prepared):
        """How far the error that is claimed is from tr(E^T H E), as a share of what the recursion minimises."""
        error = (weight.astype(float32) - result.values)[self.xp.asarray(prepared.order)]
        exact = float(((prepared.matrix @ error) * error).sum(dtype=np.float64))
        return abs(result.error - exact) / result.loss if math.isfinite(result.loss) and result.loss > 0 else math.inf

    # --- a layer ---

    def measure_layer(self, shape):
        """Sums of the rows above: without the passes of tokens through the layer, and the files."""
        matrices, batches = model_matrices(shape), self.options.tokens / TOKENS
        inputs = [matrices[name][:1] for name in ("q", "o", "gate", "down")]
        last = self.options.layouts[-1].name
        for step, hessian, layouts in (("measuring", "Hessian", len(MENU)), ("quantizing", "Hessian and cross", 1)):
            parts = [(batches, (hessian, k, f"{TOKENS} tokens")) for k in inputs] + [(1, ("factors", k, "")) for k in inputs]
            for size in matrices.values():
                share = layouts / len(self.options.layouts)
                parts += [(share, ("matrix", size, layout.name)) for layout in self.options.layouts]
                if layouts == 1:
                    parts += [
                        (1, ("correction", size, "")),
                        (1, ("matrix", size, f"{last}, {SWEEPS} sweeps")),
                        (-1, ("matrix", size, last)),
                    ]
            us, limit_us = (
                sum(count * self.found[key][i] for count, key in parts) if self.rates or i == 0 else None for i in range(2)
            )
            self._add(f"layer, {step}", shape, f"{self.options.tokens} tokens", us, limit_us)


def row_text(row):
    limit, share = ("-", "-") if row["limit_us"] is None else (f"{row['limit_us']:.1f}", f"{row['share']:.1%}")
    error = "nan" if row["error"] is None else f"{row['error']:.1e}"
    return f"{row['step']:<22} {row['matrix']:>14} {row['variant']:>18} {row['us']:>12.1f} {limit:>10} {share:>7} {error:>8}"


def run(options, out=None, lines=None):
    """Measure everything; returns (rows, whether all results were right). `lines`: a file for one JSON object per row."""
    out = sys.stdout if out is None else out
    table = QuantizeTable(options, None if options.is_on_host else measure_rates(), out, lines)
    for n in sorted({options.shapes[0][1], max(n for _, n in options.shapes)}):
        for rows in (128,) if options.is_quick else (32, 128):
            table.attempt(table.measure_group, rows, n)

    def measure_inputs(k):
        prepared = table.measure_hessian(k)
        for size in options.shapes:
            if size[0] == k:
                table.attempt(table.measure_matrix, *size, prepared)

    for k in dict.fromkeys(k for k, _ in options.shapes):
        table.attempt(measure_inputs, k)
    if options.shape is not None:
        table.attempt(table.measure_layer, options.shape)
    return table.rows, table.is_right
