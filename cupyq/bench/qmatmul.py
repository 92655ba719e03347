"""`cupyq bench qmatmul`: quantized products of every width, against the limit and the peers."""

import math
import sys
from dataclasses import dataclass

import numpy as np

from cupyq import _device, _kernels
from cupyq._arrays import bfloat16, first_line, float16, float32, require_cupy
from cupyq.bench import peers
from cupyq.bench.limits import Limits, measure_limits
from cupyq.bench.random_matrices import Kind, Words, parse_kind, random_tensors, words_needed
from cupyq.bench.table import Table, finite
from cupyq.bench.timing import cold_copies, graph_microseconds, loops_for
from cupyq.ops import QMatrix, matmul, qmatmul, qmatmul_workspace_size, reconstruct
from cupyq.ops.qmatmul_config import COUNTERS

SHAPES = ("4096x4096", "4096x6144", "14336x4096", "4096x28672", "8192x28672", "28672x8192", "4096x128256")
KINDS = ("2", "3", "4", "5", "6", "8", "2.5", "4.65", "gptq-g32", "gptq-g128", "gptq-act")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
QUICK = {"shapes": ("4096x4096", "14336x4096", "8192x28672"), "bits": ("2", "4", "gptq-act"), "rows": (1, 8, 16, 64, 1024)}
PEERS = ("cublas", "int4", "exllamav2")

ALLOWED_ERROR = {float16: 6e-4, bfloat16: 5e-3}
"""Norm-wise, of a result against the float32 product of the reconstructed weights."""
SAMPLED_ROWS = 8
"""Rows of a result that are verified, the first and the last among them."""


@dataclass(frozen=True)
class Options:
    """What to measure; see `cupyq bench qmatmul --help`."""

    shapes: tuple[tuple[int, int], ...]
    kinds: tuple[Kind, ...]
    rows: tuple[int, ...]
    dtype: np.dtype
    peers: tuple[str, ...]
    exllamav2: str | None = None

    @classmethod
    def parse(cls, shapes=None, bits=None, rows=None, dtype="float16", peers=None, exllamav2=None, is_quick=False):
        """From comma-separated text. ValueError names the option that cannot be read."""
        default = QUICK if is_quick else {"shapes": SHAPES, "bits": KINDS, "rows": ROWS}
        chosen = PEERS if peers is None else () if peers == "none" else tuple(peers.split(","))
        for peer in chosen:
            if peer not in PEERS:
                raise ValueError(f"--peers: {peer!r} is not one of {', '.join(PEERS)}, none")
        return cls(
            shapes=tuple(map(parse_shape, shapes.split(",") if shapes else default["shapes"])),
            kinds=tuple(map(parse_kind, bits.split(",") if bits else default["bits"])),
            rows=tuple(sorted(map(parse_rows, rows.split(",") if rows else default["rows"]))),
            dtype={"float16": float16, "bfloat16": bfloat16}[dtype],
            peers=chosen,
            exllamav2=exllamav2,
        )


def parse_shape(text):
    k, separator, n = text.partition("x")
    if not separator or not k.isdigit() or not n.isdigit() or not int(k) or not int(n) or int(k) % 32 or int(n) % 32:
        raise ValueError(f"--shapes: {text!r}, expected K x N as in 4096x14336, both multiples of 32")
    return int(k), int(n)


def parse_rows(text):
    if not str(text).isdigit() or int(text) < 1:
        raise ValueError(f"--rows: {text!r}, expected numbers of 1 or more separated by commas")
    return int(text)


def product_flops(rows, k, n):
    """A multiplication and an addition for every weight and row."""
    return 2 * rows * k * n


# --- one matrix, several times ----------------------------------------------------------------------------------------


def random_rows(rows, k, dtype, xp):
    """x [rows, k]: normal values that repeat after about a million, in no step with the rows."""
    values = np.random.default_rng(2).standard_normal(1_000_003).astype(np.float32).astype(dtype)
    return xp.asarray(np.resize(values, (rows, k)))


def sampled_rows(rows):
    """Which rows of a result are verified."""
    return sorted({round(position) for position in np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS))})


class Exact:
    """Rows of x times the reconstructed weights in float32, on the host; computed at once for all numbers of rows."""

    def __init__(self, q, x, row_counts):
        cupy = require_cupy()
        wanted = sorted({row for count in row_counts for row in sampled_rows(count)})
        picked = np.concatenate([x[row : row + 1].get() for row in wanted]).astype(np.float32)
        y = matmul(cupy.asarray(picked), reconstruct(q).astype(np.float32)).get()
        self.rows = dict(zip(wanted, y, strict=True))

    def error(self, y):
        """Norm-wise error of a result, in its sampled rows; infinite where it holds what is no number."""
        difference = total = 0.0
        for row in sampled_rows(y.shape[0]):
            exact = self.rows[row].astype(np.float64)
            difference += np.square(y[row : row + 1].get()[0].astype(np.float64) - exact).sum()
            total += np.square(exact).sum()
        error = float(np.sqrt(difference / total))
        return error if math.isfinite(error) else math.inf


class Products:
    """Matrices of one shape and kind, and what a product of them needs beside x."""

    def __init__(self, kind, k, n, tensors, row_counts, dtype, copies=None):
        cupy = require_cupy()
        self.k, self.n = k, n
        copies = cold_copies(kind.weight_bytes(k, n)) if copies is None else copies
        self.matrices = [QMatrix.from_tensors(tensors) for _ in range(copies)]
        self.out = cupy.empty((max(row_counts), n), dtype)
        self.workspace = cupy.zeros(0, float32)
        for rows in row_counts:
            self.reserve(rows)

    def reserve(self, rows, values=0):
        """Make the workspace large enough for products of so many rows, and for so many values behind the counters."""
        size = max(qmatmul_workspace_size(self.matrices[0], rows), COUNTERS + values)
        if size > self.workspace.size:
            self.workspace = require_cupy().zeros(size, float32)

    def product(self, x, q):
        """y = x @ q in the array that every product of this shape writes."""
        return qmatmul(x, q, out=self.out[: x.shape[0]], workspace=self.workspace)

    def verified(self, x):
        """y of the first matrix, in an array of NaN before: what is not written shows."""
        self.out[: x.shape[0]].view(np.uint8).fill(0xFF)
        return self.product(x, self.matrices[0])

    def microseconds(self, x, expected_us, repeats=7):
        """Of one product, as a decode step runs it: back to back in one graph, out and workspace given."""
        loops = loops_for(expected_us, len(self.matrices))

        def run():
            for _ in range(loops):
                for q in self.matrices:
                    self.product(x, q)

        return graph_microseconds(run, repeats) / (loops * len(self.matrices))


# --- the table --------------------------------------------------------------------------------------------------------


def run(options, out=None, lines=None):
    """Measure everything; returns (rows, whether all results were right). `lines`: a file for one JSON object per row."""
    out = sys.stdout if out is None else out
    torch = peers.torch_or_none() if {"int4", "exllamav2"} & set(options.peers) else None
    extension = peers.load_exllamav2(options.exllamav2) if torch and "exllamav2" in options.peers else None
    if options.exllamav2 and extension is None:
        raise ValueError("--exllamav2: needs PyTorch with a GPU and exllamav2 among --peers")
    limits = measure_limits()
    table = QmatmulTable(options, limits, torch, extension, out, lines)
    compile_ahead(options)
    for k, n in options.shapes:
        table.measure_shape(k, n)
        peers.free_memory()
    return table.rows, table.is_right


def compile_ahead(options):
    """All kernels at once and in parallel: one after the other they would take minutes."""
    cupy = require_cupy()
    with _kernels.tracing() as wanted:
        for k, n in options.shapes:
            words = Words(cupy, words_needed(k, n))
            x = cupy.empty((max(options.rows), k), options.dtype)
            for kind in options.kinds:
                tensors = random_tensors(kind, k, n, words, cupy)
                products = Products(kind, k, n, tensors, options.rows, options.dtype, copies=1)
                reconstruct(products.matrices[0])
                for rows in options.rows:
                    products.product(x[:rows], products.matrices[0])
            del words, x, tensors, products
            peers.free_memory()
    _kernels.compile_all([instance for instance, _ in wanted], _device.current().arch, "compiling for the benchmark")


class QmatmulTable(Table):
    """The rows of every shape, kind and number of rows."""

    columns = (
        f"{'K x N':>13} {'bits':>9} {'rows':>5} {'us':>9} {'rate':>12} {'limit us':>9} {'share':>6} "
        f"{'cuBLAS':>7} {'int4':>6} {'exllama':>7} {'error':>8}"
    )

    def __init__(self, options: Options, limits: Limits, torch, extension, out, lines):
        super().__init__(options, limits, torch, out, lines)
        self.extension = extension

    def measure_shape(self, k, n):
        cupy, options = require_cupy(), self.options
        words = Words(cupy, words_needed(k, n))
        x = random_rows(max(options.rows), k, options.dtype, cupy)
        half = x if x.dtype == float16 else cupy.asarray(x.get().astype(float16))  # exllamav2 takes nothing else
        shared = self._shape_peers(k, n, x)
        peers.free_memory()
        for kind in options.kinds:
            try:
                self._measure_kind(kind, k, n, random_tensors(kind, k, n, words, cupy), x, half, shared)
            except Exception as error:  # whatever it is, the other rows are worth having
                self.is_right = False
                print(f"{k}x{n}, {kind.name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            peers.free_memory()

    def _measure_kind(self, kind, k, n, tensors, x, half, shared):
        products = Products(kind, k, n, tensors, self.options.rows, x.dtype)
        exact = Exact(products.matrices[0], x, self.options.rows)
        other = self._exllamav2(kind, k, n, tensors)
        try:
            for rows in self.options.rows:
                self._measure(kind, products, exact, shared[rows], x[:rows], other, half[:rows])
        finally:
            if other is not None:
                other.close()

    def _shape_peers(self, k, n, x):
        """{rows: {"cublas_us": ..., "int4_us": ...}}: what depends on the shape only."""
        cupy, found = require_cupy(), {rows: {} for rows in self.options.rows}
        if "cublas" in self.options.peers:
            cublas, y = peers.Cublas(k, n, x.dtype), cupy.empty((x.shape[0], n), x.dtype)
            for rows in self.options.rows:
                expected = self.limits.microseconds(2 * k * n, product_flops(rows, k, n))
                found[rows]["cublas_us"] = cublas.microseconds(x[:rows], y[:rows], expected)
            del cublas, y
        if self.torch is not None and "int4" in self.options.peers and k % 128 == 0:
            try:
                int4 = peers.TorchInt4(self.torch, k, n)
                for rows in self.options.rows:
                    expected = self.limits.microseconds(k * n / 2, product_flops(rows, k, n))
                    found[rows]["int4_us"] = int4.microseconds(rows, expected)
            except (RuntimeError, AttributeError) as error:  # a private function of PyTorch: absent in some versions
                print(f"torch int4: {first_line(error)}", file=sys.stderr, flush=True)
        return found

    def _exllamav2(self, kind, k, n, tensors):
        is_known = not kind.is_gptq or kind.parts[0][0] == 4  # of GPTQ it has 4 bits only
        if self.extension is None or not is_known:
            return None
        try:
            return peers.Exllamav2(self.extension, self.torch, kind, k, n, tensors)
        except Exception as error:  # another version's functions, say: the other columns are worth having
            print(f"exllamav2: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            self.extension = None
            return None

    def _measure(self, kind, products, exact, shared, x, other, half):
        rows, k, n = x.shape[0], products.k, products.n
        moved, flops = kind.product_bytes(rows, k, n), product_flops(rows, k, n)
        limit_us = self.limits.microseconds(moved, flops)
        error = exact.error(products.verified(x))
        us = products.microseconds(x, 1.5 * limit_us)
        row = {
            "family": "qmatmul",
            "device": self.limits.device,
            "k": k,
            "n": n,
            "bits": kind.name,
            "layout": kind.layout,
            "rows": rows,
            "dtype": str(x.dtype),
            "us": us,
            "gigabytes_per_s": moved / us / 1e3,
            "teraflops": flops / us / 1e6,
            "limit_us": limit_us,
            "share": limit_us / us,
            "cublas_us": shared.get("cublas_us"),
            "int4_us": shared.get("int4_us"),
            "exllamav2_us": None,
            "error": finite(error),
            "exllamav2_error": None,
        }
        if other is not None:
            row["exllamav2_error"] = finite(exact.error(other.product(half)))
            row["exllamav2_us"] = other.microseconds(half, limit_us)
        self.add(row, row_text(row), is_right=error <= ALLOWED_ERROR[x.dtype])


def row_text(row):
    """A row of the table; peers as how many times as long they take."""
    is_memory_bound = row["gigabytes_per_s"] > row["teraflops"] * 4
    rate = f"{row['gigabytes_per_s']:.0f} GB/s" if is_memory_bound else f"{row['teraflops']:.0f} TFLOP/s"
    ratios = (row[f"{peer}_us"] for peer in PEERS)
    cublas, int4, exllamav2 = ("-" if us is None else f"{us / row['us']:.2f}x" for us in ratios)
    shape = f"{row['k']}x{row['n']}"
    error = "nan" if row["error"] is None else f"{row['error']:.1e}"
    return (
        f"{shape:>13} {row['bits']:>9} {row['rows']:>5} {row['us']:>9.1f} {rate:>12} {row['limit_us']:>9.1f} "
        f"{row['share']:>6.1%} {cublas:>7} {int4:>6} {exllamav2:>7} {error:>8}"
    )
