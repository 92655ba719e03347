"""Time to the first token: new processes, once with an empty and then with a full kernel cache.

    python benchmarks/bench_first_token.py [MODEL ...]

Interpreter and imports, loading with the kernels it compiles, and one token; all from the start to the end of a process.
"""

import os
import sys
from pathlib import Path

from cupyq.bench.first_token import first_token_seconds

EXAMPLES = Path(__file__).parent.parent / "examples/models"
DEFAULT = ("shakespeare", "shakespeare-exl2-4.0", "shakespeare-gptq-g32")


def main():
    steps = ("start", "load", "first_token", "total")
    print(f"{os.cpu_count()} cores; seconds\n{'model':>32} {'cache':>6} {' '.join(f'{step:>11}' for step in steps)} kernels")
    for model in sys.argv[1:] or [str(EXAMPLES / name) for name in DEFAULT]:
        for cache, found in zip(("empty", "full", "full"), first_token_seconds(model, runs=3), strict=True):
            times = " ".join(f"{found[step]:11.2f}" for step in steps)
            print(f"{Path(model).name:>32} {cache:>6} {times} {found['kernels']:7}", flush=True)


if __name__ == "__main__":
    main()
