"""Drawing tokens: verified against the reference, then timed.

    python benchmarks/bench_sampling.py [--rows 1,32] [--vocab 128256] [--dtype float32]

Times are replays of a CUDA graph (between CUDA events) over logits that together exceed the L2 cache; `call` is the time
the host needs to queue one call, eagerly: with numbers, with NumPy arrays as settings (an upload per call), and with a
prepared SamplerTable. `limit` is one streaming read of the logits at the bandwidth measured in the same run.
"""

import argparse
import json
import sys
import time

import cupy
import numpy as np

from cupyq import _device
from cupyq.bench.limits import read_gigabytes_per_s
from cupyq.bench.timing import graph_microseconds
from cupyq.ops import PenaltyTable, SamplerTable, penalize, penalize_workspace_size, sample, sample_workspace_size

COLD_BYTES = 200 * 2**20
HISTORY = 2048
FILTERS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
EVERYTHING = FILTERS["all"] | {"smoothing": 0.2, "top_a": 0.01, "tfs": 0.98, "typical": 0.97, "mirostat_tau": 4.0}
EVERYTHING |= {"min_temp": 0.5, "max_temp": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.1, "skew": 0.1}
FURTHER = {
    "every filter": EVERYTHING,
    "without top-k, top-p": EVERYTHING | {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "smoothing": 0.0},
    "typical": {"typical": 0.95},
    "tail-free": {"tfs": 0.95},
    "skew": {"skew": 0.2},
}
PENALTIES = {"repetition": 1.1, "frequency": 0.1, "presence": 0.1, "sustain": 1000, "decay": 1000, "dry_multiplier": 0.8}


class Call:
    """One call of sample, after penalize where that is asked for, with everything on the device."""

    def __init__(self, rows, vocab, settings, has_penalties):
        self.settings = settings
        self.table = SamplerTable(rows, cupy, **settings, seed=np.arange(rows))
        self.penalties = PenaltyTable(rows, cupy, **PENALTIES) if has_penalties else None
        random = np.random.default_rng(0)
        # Text repeats itself: half of it is said twice.
        said = random.integers(0, vocab, (rows, HISTORY // 2))
        self.history = cupy.asarray(np.tile(said, (1, 2)).astype(np.int32))
        self.mu = cupy.empty(rows, np.float32)
        self.steps, self.out = cupy.zeros(rows, np.int64), cupy.empty(rows, np.int32)
        self.workspace = cupy.empty(sample_workspace_size(rows, vocab), np.uint8)
        self.scratch = cupy.empty(penalize_workspace_size(rows, vocab, HISTORY), np.uint8)
        self.penalized = cupy.empty((rows, vocab), np.float32)

    def __call__(self, logits):
        if self.penalties is not None:
            logits = penalize(logits, self.history, table=self.penalties, out=self.penalized, workspace=self.scratch)
        sample(logits, table=self.table, step=self.steps, mirostat_mu=self.mu, out=self.out, workspace=self.workspace)

    def expected(self, logits):
        if self.penalties is not None:
            logits = penalize(logits, self.history.get(), **PENALTIES, out=np.empty(logits.shape, np.float32))
        rows = len(logits)
        return sample(logits, **self.settings, seed=np.arange(rows), mirostat_mu=np.full(rows, 8, np.float32))


def time_call(batches, settings, has_penalties=False):
    """Microseconds per call, after comparing one batch with the reference id for id."""
    call = Call(*batches[0].shape, settings, has_penalties)
    call.mu.fill(8)
    call(batches[0])
    if not np.array_equal(call.out.get(), call.expected(batches[0].get())):
        raise SystemExit(f"wrong result: {batches[0].shape}, {settings}")

    def run():
        for logits in batches:
            call(logits)

    return graph_microseconds(run) / len(batches)


def host_microseconds(logits, settings):
    """Time to queue one call, with numbers, with NumPy arrays and with a table."""
    rows = len(logits)
    seeds, mu, out = cupy.arange(rows), cupy.full(rows, 8, np.float32), cupy.empty(rows, np.int32)
    arrays = {name: np.full(rows, value) for name, value in settings.items()}
    kinds = {"numbers": settings | {"seed": seeds}, "arrays": arrays | {"seed": np.arange(rows)}}
    kinds["table"] = {"table": SamplerTable(rows, cupy, **settings, seed=seeds)}
    times = {}
    for kind, arguments in kinds.items():
        best = 1e30
        for _ in range(20):
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for step in range(20):
                sample(logits, **arguments, step=step, mirostat_mu=mu, out=out)
            best = min(best, (time.perf_counter() - start) / 20)
        times[kind] = 1e6 * best
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32", help="comma-separated")
    parser.add_argument("--vocab", default="128256", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    options = parser.parse_args()

    read = read_gigabytes_per_s()
    print(f"{_device.current().name}: streaming read {read:.0f} GB/s")
    print(f"{'rows':>5} {'vocab':>7} {'filters':>26} {'us':>8} {'limit us':>8} {'share':>6}")
    for vocab in map(int, options.vocab.split(",")):
        for rows in map(int, options.rows.split(",")):
            moved = rows * (vocab * np.dtype(options.dtype).itemsize + 4)
            random = cupy.random.default_rng(0)
            batches = [
                (3 * random.standard_normal((rows, vocab), dtype=np.float32)).astype(options.dtype)
                for _ in range(max(2, -(-COLD_BYTES // moved)))
            ]
            limit = moved / read / 1e3

            def report(name, us, rows=rows, vocab=vocab, limit=limit):
                print(f"{rows:>5} {vocab:>7} {name:>26} {us:8.1f} {limit:8.1f} {limit / us:6.1%}", flush=True)
                print(json.dumps(dict(rows=rows, vocab=vocab, filters=name, us=us, limit_us=limit)), file=sys.stderr)

            for name, settings in (FILTERS | FURTHER).items():
                report(name, time_call(batches, settings))
            report("every filter and penalty", time_call(batches, EVERYTHING, has_penalties=True))
            for name in ("all", "every filter"):
                for kind, us in host_microseconds(batches[0], (FILTERS | FURTHER)[name]).items():
                    report(f"call: {name}, {kind}", us)


if __name__ == "__main__":
    main()
