"""How long a new process takes to its first token: `python -m cupyq.bench.first_token MODEL START` prints what came when.

START is the time (of `time.time`) at which the process was asked for. Each step is in seconds and does not count the others:
start (interpreter and imports), load (`load_model`, with the kernels it compiles), first token (prefill, sampling and the
token's way to the host). `first_token_seconds` runs it, with an empty kernel cache and then with a full one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cupyq.errors import BackendError

PROMPT = (1, 2, 3, 4)


def first_token_seconds(model, runs=2, backend="cupy"):
    """A list of dicts, one per new process; the first finds an empty kernel cache, the others what it left.

    Keys: start, load, first_token and total (all of it, to the end of the process) in seconds; kernels: files in the cache.
    """
    results = []
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as cupy_cache:
        # CuPy compiles small kernels of its own, and keeps them in a folder of its own.
        environment = os.environ | {"CUPYQ_CACHE_DIR": cache, "CUPY_CACHE_DIR": cupy_cache}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
        for _ in range(runs):
            start = time.time()
            command = [sys.executable, "-m", "cupyq.bench.first_token", str(model), repr(start), backend]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise BackendError(f"{model}: no first token in a new process: {reason}")
            total = time.time() - start
            kernels = len(list(Path(cache).glob("*.cubin")))
            results.append(json.loads(done.stdout.splitlines()[-1]) | {"total": total, "kernels": kernels})
    return results


def main(model, start, backend):
    from cupyq import load_model
    from cupyq.generate import SamplerSettings, generate

    moments = [float(start), time.time()]
    loaded = load_model(model, backend=backend)
    if backend == "cupy":
        loaded.xp.cuda.runtime.deviceSynchronize()
    moments.append(time.time())
    generate(loaded, PROMPT, max_new_tokens=1, settings=SamplerSettings.greedy())
    moments.append(time.time())
    steps = (after - before for before, after in zip(moments, moments[1:], strict=False))
    print(json.dumps(dict(zip(("start", "load", "first_token"), steps, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
