"""`cupyq bench attention`: decoding and prompts over caches of every kind, against the limit and PyTorch's kernels."""

import contextlib
import functools
import math
import sys
from dataclasses import dataclass

import numpy as np

from cupyq import _device, _kernels
from cupyq._arrays import bfloat16, first_line, float16, float32, int32, require_cupy
from cupyq.bench import peers
from cupyq.bench.limits import measure_limits
from cupyq.bench.table import Table, finite
from cupyq.bench.timing import COLD_FACTOR, cold_copies, graph_microseconds, loops_for
from cupyq.layers.cache import CACHE_KINDS
from cupyq.ops.attention import attention, attention_workspace_size
from cupyq.ops.kv_codec import CacheCodes, kv_decode, kv_encode

PEERS = ("flash", "cudnn")
PAGE_SIZE = 256
WINDOW = 4096

ALLOWED_ERROR = {float16: 3e-3, bfloat16: 1.2e-2}
"""Norm-wise, against float32 over the decoded values. A key that is left out of 32768 shows as 5.5e-3 and more."""
SAMPLES = 8
"""Queries whose results are verified, the first and the last among them."""


@dataclass(frozen=True)
class Problem:
    """Causal attention: the last `queries` tokens of each sequence, `lengths` keys in each, seen through a window or not."""

    lengths: tuple[int, ...]
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def batch(self):
        return len(self.lengths)

    @property
    def capacity(self):
        return max(self.lengths)

    @property
    def is_prompt(self):
        """Whether all keys are those of the queries."""
        return self.queries == min(self.lengths) == self.capacity

    @property
    def name(self):
        shortest, longest = min(self.lengths), self.capacity
        keys = str(longest) if shortest == longest else f"{shortest}..{longest}"
        if self.is_prompt:
            text = f"prompt {keys}" if self.batch == 1 else f"prompt {self.batch} x {keys}"
        else:
            text = f"{'decode' if self.queries == 1 else f'{self.queries} new'} {self.batch} x {keys}"
        return text + (f", d {self.head_dim}" if self.head_dim != 128 else "") + (f", w {self.window}" if self.window else "")

    def pairs(self):
        """Queries times the keys each of them sees."""
        total = 0
        for length in self.lengths:
            seen = np.arange(length - self.queries, length, dtype=np.int64) + 1
            total += int((seen if self.window is None else np.minimum(seen, self.window)).sum())
        return total

    def flops(self):
        """A multiplication and an addition for every pair, head and dimension, for the scores and again for the result."""
        return 4 * self.pairs() * self.heads * self.head_dim

    def moved_bytes(self, kind="fp16"):
        """What must be read and written once: the keys and values that some query sees, the queries, the result."""
        most = math.inf if self.window is None else self.queries + self.window - 1
        tokens = sum(min(length, most) for length in self.lengths)
        values = tokens * self.kv_heads * self.head_dim
        cached = sum(values * value_bytes(codes, self.head_dim) for codes in CACHE_KINDS[kind])
        return int(cached) + 2 * 2 * self.batch * self.queries * self.heads * self.head_dim


def value_bytes(codes, head_dim):
    """Bytes of one value of a cache, with its share of a scale."""
    return {None: 2, "fp8": 1, "e4m3": 1 + 2 / head_dim, "q4": 0.5 + 2 / 32, "q8": 1 + 2 / 32}[codes]


@dataclass(frozen=True)
class Options:
    """What to measure; see `cupyq bench attention --help`."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: np.dtype = float16
    kinds: tuple[str, ...] = tuple(CACHE_KINDS)
    peers: tuple[str, ...] = PEERS
    is_quick: bool = False

    @classmethod
    def parse(cls, heads=32, kv_heads=8, head_dim=128, dtype="float16", caches=None, peers=None, is_quick=False):
        """Names separated by commas become tuples. ValueError names the option that cannot be read."""
        if heads % kv_heads:
            raise ValueError(f"--heads: {heads}, expected a multiple of --kv-heads {kv_heads}")
        if head_dim % 8 or head_dim > 256:
            raise ValueError(f"--head-dim: {head_dim}, expected a multiple of 8 up to 256")
        chosen = PEERS if peers is None else () if peers == "none" else tuple(peers.split(","))
        for peer in chosen:
            if peer not in PEERS:
                raise ValueError(f"--peers: {peer!r} is not one of {', '.join(PEERS)}, none")
        kinds = ("fp16", "q4") if is_quick else tuple(CACHE_KINDS)
        kinds = kinds if caches is None else tuple(caches.split(","))
        for kind in kinds:
            if kind not in CACHE_KINDS:
                raise ValueError(f"--cache: {kind!r} is not one of {', '.join(CACHE_KINDS)}")
            if head_dim % 64 and {"q4", "q8"} & set(CACHE_KINDS[kind]):
                raise ValueError(f"--cache: {kind} needs a head size that is a multiple of 64, got --head-dim {head_dim}")
        dtype = {"float16": float16, "bfloat16": bfloat16}[dtype]
        return cls(heads, kv_heads, head_dim, dtype, kinds, chosen, is_quick)

    def table(self):
        """[(Problem, [(kind, whether in pages)])]: every problem with the caches it is measured on."""

        def problem(lengths, queries=1, head_dim=self.head_dim, window=None):
            return Problem(tuple(lengths), queries, self.heads, self.kv_heads, head_dim, window)

        def prompt(length, **options):
            return problem([length], length, **options)

        plain, paged, q4 = ("fp16", False), ("fp16", True), ("q4", False)
        every = [(kind, False) for kind in CACHE_KINDS]
        table = [
            (problem([4096]), [*every, paged]),
            (problem([4096] * 16), [*every, paged, ("q4", True)]),
            (problem([32768]), [*every, paged]),
            (prompt(2048), [plain]),
            (prompt(4096), [*every, paged]),
            (prompt(16384), [plain, paged]),
        ]
        if not self.is_quick:
            table += [(problem([32768], head_dim=size), [plain, q4]) for size in (64, 256)]
            table += [(problem([4096] * 16, head_dim=size), [plain]) for size in (64, 256)]
            table += [(prompt(4096, head_dim=size), [plain]) for size in (64, 256)]
            table += [
                (problem([32768], window=WINDOW), [plain, paged]),
                (prompt(16384, window=WINDOW), [plain]),
                (problem(unequal_lengths(64, 16384)), [plain, paged, q4]),
                (problem([4096], 4), [plain, q4]),
                (problem([4096], 16), [plain, q4]),
                (problem([8192], 512), [plain]),
            ]
        wanted = [(found, [variant for variant in variants if variant[0] in self.kinds]) for found, variants in table]
        return [(found, variants) for found, variants in wanted if variants]


def unequal_lengths(batch, longest):
    """From 1 to `longest` in equal steps, in no order: neighbours share no length."""
    steps = np.linspace(1, longest, batch).round().astype(int)
    return tuple(np.random.default_rng(0).permutation(steps).tolist())


# --- keys and values --------------------------------------------------------------------------------------------------


@functools.cache
def _pattern(dtype):
    """Normal values that repeat in no step with heads and tokens, as numbers of 16 bits, which CuPy can copy."""
    values = np.random.default_rng(2).standard_normal((1 << 22) - 3).astype(np.float32)
    return values.astype(dtype).view(np.uint16)


def random_values(shape, dtype, begin):
    """An array of `shape` on the GPU, of normal values; another `begin` gives others."""
    cupy = require_cupy()
    flat = cupy.empty(math.prod(shape), np.uint16)
    part = cupy.asarray(np.roll(_pattern(dtype), -begin))
    for first in range(0, flat.size, part.size):
        flat[first : first + part.size] = part[: flat.size - first]
    return flat.view(dtype).reshape(shape)


def encoded(x, kind):
    """float16 x [.., .., kv_heads, head_dim] as CacheCodes of that kind."""
    made = CacheCodes.zeros(require_cupy(), x.shape, kind)
    kv_encode(x, made.codes, made.scales, kind=kind, start=0, width=x.shape[1])
    return made


class Caches:
    """Several copies of one cache of keys and values, so that a loop over them reads memory and not the L2 cache.

    `pairs`: [(k, v)], arrays or CacheCodes; `table`: the block table where they are in pages, else None.
    """

    def __init__(self, problem, dtype, kind="fp16", is_paged=False, copies=None):
        cupy = require_cupy()
        self.problem, self.dtype = problem, dtype
        shape = (problem.batch, problem.capacity, problem.kv_heads, problem.head_dim)
        self.table = None
        if is_paged:
            pages = problem.batch * problem.capacity // PAGE_SIZE
            order = np.random.default_rng(1).permutation(pages).astype(np.int32)
            self.table = cupy.asarray(order.reshape(problem.batch, -1))
            shape = (pages, PAGE_SIZE, *shape[2:])
        moved = problem.moved_bytes(kind)
        if copies is None:
            copies = 1 if moved > COLD_FACTOR * _device.current().l2_bytes else cold_copies(moved)
        self.pairs = [
            tuple(self._made(shape, codes, begin) for codes, begin in zip(CACHE_KINDS[kind], (0, 1 << 20), strict=True))
            for _ in range(copies)
        ]

    def _made(self, shape, codes, begin):
        x = random_values(shape, self.dtype if codes is None else float16, begin)
        return x if codes is None else encoded(x, codes)

    def sequence(self, row):
        """(k, v) of one batch row, float32 [length, kv_heads, head_dim] on the host: the values the kernel is to see."""
        return tuple(self._decoded(array, row)[: self.problem.lengths[row]] for array in self.pairs[0])

    def _decoded(self, array, row):
        if isinstance(array, CacheCodes):
            codes, scales = self._rows(array.codes, row), None if array.scales is None else self._rows(array.scales, row)
            decoded = require_cupy().zeros((*codes.shape[:3], array.head_dim), float16)
            kv_decode(codes, scales, decoded, kind=array.kind, start=0, width=codes.shape[1])
        else:
            decoded = self._rows(array, row)
        return decoded.get().astype(np.float32).reshape(-1, self.problem.kv_heads, self.problem.head_dim)

    def _rows(self, part, row):
        """What belongs to one batch row: a view, or the pages that the block table names, gathered."""
        if self.table is None:
            return part[row : row + 1]
        # As plain numbers: CuPy gathers those of every size, but has no bfloat16.
        return part.view(np.uint16 if part.dtype.itemsize == 2 else np.uint8)[self.table[row]].view(part.dtype)


# --- verifying --------------------------------------------------------------------------------------------------------


def expected(q, k, v, window=None):
    """softmax(q . k / sqrt(head_dim)) v of one query [heads, head_dim] that sees all of k and v, or the last `window` of it."""
    k, v = (k, v) if window is None else (k[-window:], v[-window:])
    heads, head_dim = q.shape
    grouped = q.astype(np.float32).reshape(k.shape[1], -1, head_dim)
    scores = grouped @ k.transpose(1, 2, 0) * np.float32(head_dim**-0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v.transpose(1, 0, 2)).reshape(heads, head_dim)


def sampled_queries(problem):
    """{batch row: [queries]}: which results are verified, SAMPLES in all or a few less."""
    total = problem.batch * problem.queries
    chosen = sorted({round(place) for place in np.linspace(0, total - 1, min(total, SAMPLES))})
    found = {}
    for place in chosen:
        found.setdefault(place // problem.queries, []).append(place % problem.queries)
    return found


class Exact:
    """What the sampled queries should give over a cache, computed once for all that read it."""

    def __init__(self, problem, q, caches):
        self.rows = {}
        for row, queries in sampled_queries(problem).items():
            k, v = caches.sequence(row)
            asked = q[row : row + 1].get()[0]
            for query in queries:
                seen = problem.lengths[row] - problem.queries + query + 1
                self.rows[row, query] = expected(asked[query], k[:seen], v[:seen], problem.window)

    def error(self, out):
        """Norm-wise error of a result [batch, queries, heads, head_dim] on the host; infinite where any of it is no number."""
        difference = total = 0.0
        for (row, query), exact in self.rows.items():
            difference += np.square(out[row, query].astype(np.float64) - exact).sum()
            total += np.square(exact, dtype=np.float64).sum()
        error = float(np.sqrt(difference / total))
        return error if math.isfinite(error) and np.isfinite(out.astype(np.float32)).all() else math.inf


# --- timing -----------------------------------------------------------------------------------------------------------


class Calls:
    """Calls of attention() as a decode step makes them: out and workspace given, lengths on the device."""

    def __init__(self, problem, q):
        cupy = require_cupy()
        self.problem, self.q, self.out = problem, q, cupy.empty(q.shape, q.dtype)
        self.workspace = cupy.zeros(attention_workspace_size(problem.head_dim), float32)
        self.lengths = cupy.asarray(np.array(problem.lengths, int32))

    def attend(self, caches, k, v):
        # A prompt needs no lengths, and PyTorch's has none; what is read from a cache has some.
        is_bare = self.problem.is_prompt and caches.table is None
        return attention(
            self.q,
            k,
            v,
            window=self.problem.window,
            kv_lengths=None if is_bare else self.lengths,
            block_table=caches.table,
            out=self.out,
            workspace=self.workspace,
        )

    def verified(self, caches):
        """The result over the first copy, on the host, in an array of NaN before: what is not written shows."""
        self.out.view(np.uint8).fill(0xFF)
        return self.attend(caches, *caches.pairs[0]).get()

    def microseconds(self, caches, expected_us, repeats=7):
        loops = loops_for(expected_us, len(caches.pairs))

        def run():
            for _ in range(loops):
                for k, v in caches.pairs:
                    self.attend(caches, k, v)

        return graph_microseconds(run, repeats) / (loops * len(caches.pairs))


# --- the table --------------------------------------------------------------------------------------------------------


def run(options, out=None, lines=None):
    """Measure everything; returns (rows, whether all results were right). `lines`: a file for one JSON object per row."""
    out = sys.stdout if out is None else out
    torch = peers.torch_or_none() if options.peers else None
    limits = measure_limits()
    table = AttentionTable(options, limits, torch, out, lines)
    compile_ahead(options)
    for problem, variants in options.table():
        table.measure_problem(problem, variants)
        peers.free_memory()
    return table.rows, table.is_right


def compile_ahead(options):
    """All kernels at once and in parallel: one after the other they would take minutes."""
    with _kernels.tracing() as wanted:
        for problem, variants in options.table():
            for kind, is_paged in variants:
                with contextlib.suppress(Exception):  # what cannot be launched is told where it is measured
                    caches = Caches(problem, options.dtype, kind, is_paged, copies=1)
                    Calls(problem, random_queries(problem, options.dtype)).attend(caches, *caches.pairs[0])
                    if kind != "fp16":
                        caches.sequence(0)  # decodes it
                caches = None
                peers.free_memory()
    _kernels.compile_all([instance for instance, _ in wanted], _device.current().arch, "compiling for the benchmark")


def random_queries(problem, dtype):
    return random_values((problem.batch, problem.queries, problem.heads, problem.head_dim), dtype, 1 << 21)


class AttentionTable(Table):
    """The rows of every problem and cache."""

    columns = (
        f"{'problem':<24} {'cache':>10} {'us':>9} {'rate':>12} {'limit us':>9} {'share':>6} "
        f"{'flash':>6} {'cuDNN':>6} {'of fp16':>7} {'error':>8}"
    )

    def measure_problem(self, problem, variants):
        """The rows of one problem. Peers, and what each variant is compared with: arrays that lie in a row, in this run."""
        try:
            calls, plain = Calls(problem, random_queries(problem, self.options.dtype)), Caches(problem, self.options.dtype)
            exact = Exact(problem, calls.q, plain)
            error = exact.error(calls.verified(plain))
            plain_us = calls.microseconds(plain, 1.5 * self._limit(problem, "fp16"))
            shared = self._peers(problem, calls.q, plain, exact)
        except Exception as error:  # whatever it is, the other problems are worth having
            self._fail(problem.name, error)
            return
        if ("fp16", False) in variants:
            self._add(problem, "fp16", False, plain_us, plain_us, shared, error)
        del plain
        peers.free_memory()
        for kind, is_paged in variants:
            if (kind, is_paged) != ("fp16", False):
                try:
                    us, error = self._measure(problem, calls, kind, is_paged)
                    self._add(problem, kind, is_paged, us, plain_us, shared, error)
                except Exception as error:
                    self._fail(f"{problem.name}, {cache_name(kind, is_paged)}", error)
                peers.free_memory()

    def _fail(self, name, error):
        self.is_right = False
        print(f"{name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)

    def _limit(self, problem, kind):
        return self.limits.microseconds(problem.moved_bytes(kind), problem.flops())

    def _measure(self, problem, calls, kind, is_paged):
        caches = Caches(problem, self.options.dtype, kind, is_paged)
        error = Exact(problem, calls.q, caches).error(calls.verified(caches))
        return calls.microseconds(caches, 1.5 * self._limit(problem, kind)), error

    def _peers(self, problem, q, plain, exact):
        """{"flash_us": ..., "flash_error": ..., ...}: PyTorch on the same arrays; None where it has no kernel for them."""
        found = {f"{peer}_{what}": None for peer in PEERS for what in ("us", "error")}
        for peer in self.options.peers if self.torch is not None else ():
            try:
                other = peers.TorchAttention(self.torch, peer, q, plain.pairs, problem.lengths, problem.window)
                if not other.has_kernel:
                    continue
                found[f"{peer}_error"] = finite(exact.error(other.output()))
                found[f"{peer}_us"] = other.microseconds(2 * self._limit(problem, "fp16"))
            except Exception as error:  # it refuses some shapes, and its private functions change
                print(f"torch {peer}, {problem.name}: {first_line(error)}", file=sys.stderr, flush=True)
        return found

    def _add(self, problem, kind, is_paged, us, plain_us, shared, error):
        moved, flops, limit_us = problem.moved_bytes(kind), problem.flops(), self._limit(problem, kind)
        is_right = error <= ALLOWED_ERROR[self.options.dtype]
        row = {
            "family": "attention",
            "device": self.limits.device,
            "problem": problem.name,
            "batch": problem.batch,
            "queries": problem.queries,
            "keys": problem.capacity,
            "mean_keys": sum(problem.lengths) / problem.batch,
            "heads": problem.heads,
            "kv_heads": problem.kv_heads,
            "head_dim": problem.head_dim,
            "window": problem.window,
            "cache": kind,
            "page_size": PAGE_SIZE if is_paged else None,
            "dtype": str(self.options.dtype),
            "us": us,
            "gigabytes_per_s": moved / us / 1e3,
            "teraflops": flops / us / 1e6,
            "limit_us": limit_us,
            "share": limit_us / us,
            "of_fp16": us / plain_us,
            "error": finite(error),
        } | shared
        self.add(row, row_text(row), is_right)


def cache_name(kind, is_paged):
    return kind + (" paged" if is_paged else "")


def row_text(row):
    """A row of the table; peers as how many times as long they take, `of fp16` as the share of a contiguous cache's time."""
    rate = f"{row['teraflops']:.0f} TFLOP/s" if row["queries"] > 16 else f"{row['gigabytes_per_s']:.0f} GB/s"
    ratios = (row[f"{peer}_us"] for peer in PEERS)
    flash, cudnn = ("-" if us is None else f"{us / row['us']:.2f}x" for us in ratios)
    error = "nan" if row["error"] is None else f"{row['error']:.1e}"
    cache = cache_name(row["cache"], row["page_size"] is not None)
    return (
        f"{row['problem']:<24} {cache:>10} {row['us']:>9.1f} {rate:>12} {row['limit_us']:>9.1f} {row['share']:>6.1%} "
        f"{flash:>6} {cudnn:>6} {row['of_fp16']:>7.2f} {error:>8}"
    )
