"""NVIDIA's compute-sanitizer over the cases of tools/sanitize_cases.py and over GPU tests, many processes at a time.

    python tools/sanitize.py --logs FOLDER                                all four tools over the cases
    python tools/sanitize.py --logs FOLDER --tests --tools memcheck       one of them over test files with small sizes as well
    python tools/sanitize.py --logs FOLDER --only codes test_norm         some of the cases and files

Every process has a log, FOLDER/TOOL-PART.log. Prints a table in Markdown and exits with 1 where a sanitizer saw an error, a
program failed, or one did not end in time. Fill the kernel cache first: python tools/sanitize_cases.py --compile
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

# The longest first, so that no process is left over at the end.
CASES = (
    *("exl2_models", "gptq_model", "routing_and_sampling", "quantized", "widths", "codes", "quantizing", "mixtures", "caches"),
    *("attentions", "adapters", "norms", "positions", "elementwise"),
)
FILES = (
    *("qmatmul", "attention", "ops", "quantizing", "golden", "norm", "sampling", "kv_codec", "qkv_append", "decoder"),
    *("attention_decode", "attention_wgmma", "kv_wgmma", "qmatmul_wgmma", "qmatmul_before", "arrange", "joined", "moe", "lora"),
    *("sampling_filters", "penalties", "activation", "hadamard", "kv_append", "quantize_group", "rope", "elementwise"),
    *("reconstruct", "routing", "cache_pages", "matmul", "cache", "qmatrix_join", "embedding", "remap", "advance", "layers"),
    *("kernels", "replay", "serve", "speculation"),
)
# Tests of sizes that a sanitizer would take hours for, and those that count time, memory, processes or references: where it
# stops, the sanitizer keeps Python's frames, and what is in them.
LEFT_OUT = (
    "beyond_32_bits or large or long or many_rows or huge or hundreds or every_page or every_length or itself or "
    "graphs_change or time or seconds or process or memory or thread or nothing_keeps"
)


class Outcome(NamedTuple):
    tool: str
    part: str
    errors: int | None
    """That the sanitizer saw; None where it did not say."""
    status: int | None
    """What the program exited with; None: it was ended as its time was up."""
    seconds: float

    @property
    def is_good(self):
        return self.errors == 0 and self.status == 0


def pytest_configure(config):
    """As a plugin of pytest: every array gets an allocation of its own. Decoders keep pools, as their graphs need them."""
    import cupy
    import sanitize_cases

    cupy.cuda.set_allocator(None)
    sanitize_cases.suit_tool()


def command(tool, part):
    """What runs a part, a case or the stem of a test file, under a tool."""
    python = [sys.executable, "tools/sanitize_cases.py", part]
    if part.startswith("test_"):
        options = "-q -m gpu --require-gpu -p no:cacheprovider -p sanitize".split()
        python = [sys.executable, "-m", "pytest", *options, "-k", f"not ({LEFT_OUT})", f"tests/{part}.py"]
    # The driver is asked for parameters beyond a kernel's last one, and says no: an error of its API, and meant.
    return ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *python]


def errors_in(log):
    """The number a sanitizer sums up with, or None."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", log)
    return sum(int(errors or hazards) for errors, hazards in found) if found else None


def run(tool, part, folder, minutes):
    path, start, status = folder / f"{tool}-{part}.log", time.monotonic(), None
    folders = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OPENBLAS_NUM_THREADS": "1", "SANITIZER": tool}
    with path.open("wb") as log:
        process = subprocess.Popen(command(tool, part), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return Outcome(tool, part, errors_in(path.read_text(errors="replace")), status, time.monotonic() - start)


def table(outcomes):
    """Lines of Markdown: a row for each part, a column for each tool."""
    tools = [tool for tool in TOOLS if any(outcome.tool == tool for outcome in outcomes)]
    yield f"| part | {' | '.join(tools)} |"
    yield f"|---|{'---|' * len(tools)}"
    by_place = {(outcome.part, outcome.tool): outcome for outcome in outcomes}
    for part in dict.fromkeys(outcome.part for outcome in outcomes):
        yield f"| {part} | {' | '.join(cell(by_place[part, tool]) for tool in tools)} |"


def cell(outcome):
    if outcome.status is None:
        return f"not done after {outcome.seconds:.0f} s"
    if outcome.errors is None:
        return f"no summary, exit {outcome.status}"
    said = f"{outcome.errors} errors" if outcome.status in (0, 9) else f"{outcome.errors} errors, exit {outcome.status}"
    return f"{said}, {outcome.seconds:.0f} s"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=Path, required=True, help="folder for the logs")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--tests", action="store_true", help="test files as well, behind the cases")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=(*CASES, *(f"test_{name}" for name in FILES)))
    parser.add_argument("--jobs", type=int, default=6, help="processes at a time, default 6: each takes up to 10 GB of the GPU")
    parser.add_argument("--minutes", type=float, default=8, help="after which a process is ended (default: 8)")
    options = parser.parse_args(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    parts = options.only or [*CASES, *(f"test_{name}" for name in FILES if options.tests)]
    pairs = [(tool, part) for part in parts for tool in options.tools]
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(lambda pair: run(*pair, options.logs, options.minutes), pairs):
            outcomes.append(outcome)
            print(f"{outcome.tool} {outcome.part}: {cell(outcome)}", file=sys.stderr, flush=True)
    print(*table(outcomes), sep="\n")
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    print(f"\n{len(outcomes) - len(bad)} of {len(outcomes)} without an error")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
