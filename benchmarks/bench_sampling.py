"""Drawing tokens: verified against the reference, then timed.

    python benchmarks/bench_sampling.py [--rows 1,32] [--vocab 128256] [--dtype float32]

Times are replays of a CUDA graph (between CUDA events) over logits that together exceed the L2 cache. `limit` is one
streaming read of the logits at the bandwidth measured in the same run.
"""

import argparse
import json
import sys

import cupy
import numpy as np
from common import graph_microseconds, read_gigabytes_per_s

from cupyq import _device
from cupyq.ops.sampling import sample

COLD_BYTES = 200 * 2**20
FILTERS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def time_sample(batches, settings):
    """Microseconds per call, after comparing one batch with the reference id for id."""
    rows = batches[0].shape[0]
    seeds, steps, out = cupy.arange(rows, dtype=np.int64), cupy.zeros(rows, np.int64), cupy.empty(rows, np.int32)
    drawn = sample(batches[0], seed=seeds, step=steps, **settings).get()
    if not np.array_equal(drawn, sample(batches[0].get(), seed=np.arange(rows), **settings)):
        raise SystemExit(f"wrong result: {batches[0].shape}, {settings}")

    def run():
        for logits in batches:
            sample(logits, seed=seeds, step=steps, out=out, **settings)

    return graph_microseconds(run) / len(batches)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32", help="comma-separated")
    parser.add_argument("--vocab", default="128256", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    options = parser.parse_args()

    read = read_gigabytes_per_s()
    print(f"{_device.current().name}: streaming read {read:.0f} GB/s")
    print(f"{'rows':>5} {'vocab':>7} {'filters':>12} {'us':>8} {'limit us':>8} {'share':>6}")
    for vocab in map(int, options.vocab.split(",")):
        for rows in map(int, options.rows.split(",")):
            moved = rows * (vocab * np.dtype(options.dtype).itemsize + 4)
            random = cupy.random.default_rng(0)
            batches = [
                (3 * random.standard_normal((rows, vocab), dtype=np.float32)).astype(options.dtype)
                for _ in range(max(2, -(-COLD_BYTES // moved)))
            ]
            limit = moved / read / 1e3
            for name, settings in FILTERS.items():
                us = time_sample(batches, settings)
                print(f"{rows:>5} {vocab:>7} {name:>12} {us:8.1f} {limit:8.1f} {limit / us:6.1%}", flush=True)
                print(json.dumps(dict(rows=rows, vocab=vocab, filters=name, us=us, limit_us=limit)), file=sys.stderr)


if __name__ == "__main__":
    main()
