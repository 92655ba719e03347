"""Hostile files for everything that reads one: `python tools/fuzz.py TARGET --minutes 60 --seed N`.

    python tools/fuzz.py config --minutes 10           one reader
    python tools/fuzz.py all --minutes 60 --seed 1     60 minutes, shared by all
    python tools/fuzz.py config --replay FILE          what a reader makes of a case that was kept

Cases are made from others by the mutators of tests/fuzz_mutators.py. One that reaches lines of cupyq in an order that none did
before, or another message, is kept and mutated on. FOLDER/TARGET/corpus holds what was kept, FOLDER/TARGET/found the cases that
broke a promise (see tests/fuzz_targets.py: problem_of), the first of each kind; FOLDER/runs.jsonl has a line for each run.
With --engine atheris, Google's libFuzzer for Python chooses instead (pip install atheris; the mutators are the same).
"""

import argparse
import gc
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ["RUST_BACKTRACE"] = "0"  # of tokenizers, whose panics are caught but say so

# fuzz_targets is imported later: with it comes cupyq, whose import atheris wants to see.
from fuzz_mutators import from_text, mutate, to_text, write  # noqa: E402

_PACKAGE = str(ROOT / "cupyq") + os.sep
_MOST_STUCK_S = 60


class Lines:
    """Pairs of lines of cupyq that were run one after the other, over all calls."""

    def __init__(self):
        self.seen, self.new, self._codes = set(), 0, {}

    def __enter__(self):
        self.new = 0
        sys.settrace(self._call)

    def __exit__(self, *exception):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        code = frame.f_code
        key = self._codes.get(code)
        if key is None:
            key = self._codes[code] = len(self._codes) + 1 if code.co_filename.startswith(_PACKAGE) else 0
        if key == 0:
            return None
        last = 0

        def line(frame, event, argument):
            nonlocal last
            if event == "line":
                pair = (key, last, frame.f_lineno)
                last = frame.f_lineno
                if pair not in self.seen:
                    self.seen.add(pair)
                    self.new += 1
            return line

        return line


class Run:
    """One target, its cases and its findings."""

    def __init__(self, target, folder, seed):
        self.target, self.rng = target, random.Random(f"{target.name} {seed}")
        self.corpus, self.found = folder / target.name / "corpus", folder / target.name / "found"
        for path in (self.corpus, self.found):
            path.mkdir(parents=True, exist_ok=True)
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared))
        self.case_folder = self.scratch / "case"
        self.lines, self.said, self.kinds = Lines(), set(), {}
        self.executions, self.slowest = 0, 0.0
        self.pool = [*target.seeds(), *(from_text(path.read_text()) for path in sorted(self.corpus.glob("*.json")))]

    def execute(self, case):
        """Whether it did what none did before."""
        from fuzz_targets import problem_of

        write(self.case_folder, case)
        begin = time.perf_counter()
        with self.lines:
            problem, said = problem_of(self.target, self.case_folder)
        self.slowest = max(self.slowest, time.perf_counter() - begin)
        self.executions += 1
        if problem is not None:
            self._note(problem, case)
        said = re.sub(r"'.*'|`.*`|[0-9.]+", "#", said)[:90]
        is_new = bool(self.lines.new) or said not in self.said
        self.said.add(said)
        return is_new

    def _note(self, problem, case):
        place = re.search(r"\([\w?.:]+\)$", problem)
        kind = f"{re.sub('[0-9]+', '#', problem.split(':')[0])[:40]} {place[0] if place else ''}"
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if self.kinds[kind] == 1:
            print(f"{self.target.name}: {problem}", flush=True)
            self._keep(self.found, case, problem)

    def _keep(self, folder, case, problem=None):
        text = to_text(case)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        path.write_text(text)
        if problem is not None:
            path.with_suffix(".txt").write_text(problem + "\n")

    def run(self, seconds):
        from fuzz_targets import words

        end, vocabulary = time.monotonic() + seconds, words(self.target)
        for case in self.pool:
            self.execute(case)
        while time.monotonic() < end:
            # The latest are the least explored.
            low = len(self.pool) // 2 if self.rng.random() < 0.5 else 0
            case = mutate(self.rng.choice(self.pool[low:]), self.rng, vocabulary, self.rng.choice(self.pool))
            if self.execute(case):
                self.pool.append(case)
                self._keep(self.corpus, case)
            if self.executions % 500 == 0:
                gc.collect()

    def atheris(self, seconds, at_end):
        import atheris
        from fuzz_targets import words

        seeds, vocabulary = self.pool, words(self.target)

        def decoded(data):
            try:
                return from_text(data.decode("latin-1"))
            except (ValueError, KeyError, AttributeError):
                return seeds[0]

        end = time.monotonic() + seconds

        def one(data):
            self.execute(decoded(data))
            if time.monotonic() > end:  # libFuzzer would leave without a word
                at_end()
                os._exit(0)

        def change(data, limit, seed):
            case = mutate(decoded(data), random.Random(seed), vocabulary, seeds[seed % len(seeds)])
            text = to_text(case).encode("latin-1", "replace")
            return text if len(text) <= limit else data

        for case in seeds:
            self._keep(self.corpus, case)
        options = ["-max_len=1048576", "-rss_limit_mb=8192", "-timeout=60"]
        atheris.Setup([sys.argv[0], *options, str(self.corpus)], one, custom_mutator=change)
        atheris.Fuzz()


def worker(arguments):
    """One run in this process."""
    if arguments.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["cupyq"]):
            from fuzz_targets import TARGETS, little_memory
    else:
        from fuzz_targets import TARGETS, little_memory

    run = Run(TARGETS[arguments.target], arguments.folder, arguments.seed)
    (arguments.folder / "scratch").write_text(str(run.scratch))
    begin = time.monotonic()

    def note():
        line = {
            "target": arguments.target,
            "engine": arguments.engine,
            "seed": arguments.seed,
            "executions": run.executions,
            "minutes": round((time.monotonic() - begin) / 60, 2),
            "kept": len(run.pool),
            "pairs of lines": len(run.lines.seen),
            "slowest_s": round(run.slowest, 2),
            "found": run.kinds,
        }
        with open(arguments.folder / "runs.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    with little_memory():
        if arguments.engine == "atheris":
            run.lines.__class__.__enter__ = lambda self: None  # atheris watches the lines itself
            run.atheris(60 * arguments.minutes, note)
        else:
            run.run(60 * arguments.minutes)
            note()
    shutil.rmtree(run.scratch)  # where a case ended this process, its folder is left


def replay(arguments):
    from fuzz_targets import TARGETS, little_memory, problem_of

    with tempfile.TemporaryDirectory() as folder, little_memory():
        for path in arguments.replay:
            write(Path(folder) / "case", from_text(Path(path).read_text()))
            problem, said = problem_of(TARGETS[arguments.target], Path(folder) / "case")
            print(f"{path}: {problem or f'as promised: {said}'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="name of a target, or 'all'")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="default: build/fuzz")
    parser.add_argument("--engine", choices=("lines", "atheris"), default="lines")
    parser.add_argument("--replay", nargs="+", metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments)

    from fuzz_targets import TARGETS

    allowed = [*TARGETS] if arguments.replay else ["all", *TARGETS]
    if arguments.target not in allowed:
        parser.error(f"target: {arguments.target!r}, expected one of {', '.join(allowed)}")
    if arguments.replay:
        return replay(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    for name in names:
        # A process of its own: a reader that crashes or hangs the interpreter ends this one alone.
        share = arguments.minutes / len(names)
        options = ["--minutes", str(share), "--seed", str(arguments.seed), "--folder", str(arguments.folder)]
        command = [sys.executable, __file__, name, *options, "--engine", arguments.engine, "--worker"]
        try:
            code = subprocess.run(command, timeout=60 * share + _MOST_STUCK_S).returncode
        except subprocess.TimeoutExpired:
            code = "stuck"
        if code:
            scratch = Path((arguments.folder / "scratch").read_text())
            print(f"{name}: the process ended with {code}; its last case is in {scratch}", flush=True)


if __name__ == "__main__":
    main()
