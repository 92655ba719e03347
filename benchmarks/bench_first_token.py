"""Time to the first token: a new process, once with an empty and then with a warm kernel cache.

    python benchmarks/bench_first_token.py [MODEL ...]

Wall time of `cupyq generate MODEL --tokens ... --max-new-tokens 1`: interpreter, imports, loading,
kernels and one forward pass.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples/models"
DEFAULT = ("shakespeare", "shakespeare-exl2-4.0", "shakespeare-gptq-g32")


def seconds_to_first_token(model, cache):
    command = [sys.executable, "-m", "cupyq", "generate", model, "--tokens", "1,2,3,4", "--max-new-tokens", "1", "--greedy"]
    command += ["--backend", "cupy"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CUPYQ_CACHE_DIR": cache})
    return time.perf_counter() - start


def main():
    print(f"{os.cpu_count()} cores\n{'model':>32} {'empty s':>8} {'warm s':>8} {'again s':>8} {'kernels':>8}")
    for model in sys.argv[1:] or [str(EXAMPLES / name) for name in DEFAULT]:
        with tempfile.TemporaryDirectory() as cache:
            times = [seconds_to_first_token(model, cache) for _ in range(3)]
            kernels = len(list(Path(cache).glob("*.cubin")))
        print(f"{Path(model).name:>32} {' '.join(f'{t:8.2f}' for t in times)} {kernels:8}", flush=True)


if __name__ == "__main__":
    main()
