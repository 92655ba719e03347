"""Markers, options and helpers every test shares, and the receipt that a run on a GPU leaves behind."""

import datetime
import functools
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
RECEIPT = ROOT / "tests/gpu_receipt.json"

# JAX would take three quarters of the GPU's memory when it first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail gpu tests where there is no GPU, not skip them")
    parser.addoption("--gpu-receipt", metavar="FILE", help="write GPU, versions, counts and source digest of this run")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs kernels; skipped where there is no GPU")


@functools.cache
def gpu_count():
    from cupyq import _device

    return _device.count()


@pytest.hookimpl(tryfirst=True)  # before -m and -k take tests away
def pytest_collection_modifyitems(config, items):
    config.stash[_COLLECTED] = sum("gpu" in item.keywords for item in items)


@pytest.hookimpl(tryfirst=True)  # before fixtures, some of which import CuPy
def pytest_runtest_setup(item):
    if "gpu" in item.keywords and gpu_count() == 0:
        if item.config.getoption("--require-gpu"):
            pytest.fail("--require-gpu was given and no GPU is usable here")
        pytest.skip("no GPU here")


HAS_CUPY = importlib.util.find_spec("cupy") is not None
collect_ignore = [] if HAS_CUPY else ["test_sanitize.py"]  # which imports tools that do


def needs_cupy():
    """Skips where CuPy, which compiles kernels without a GPU too, is not installed; `make test` installs it."""
    if not HAS_CUPY:
        pytest.skip("CuPy is not installed")


@pytest.fixture
def cupy():
    """The module, for gpu tests only."""
    import cupy

    return cupy


def _forget_calls():
    if "cupyq._replay" in sys.modules:
        sys.modules["cupyq._replay"].forget()


@pytest.fixture(autouse=True)
def _calls_are_made_anew():
    """A test that replaces what picks a kernel must not find the launches of another one, nor leave its own."""
    yield
    _forget_calls()


class _ForgettingPatch(pytest.MonkeyPatch):
    """Replaces something, in the midst of a test, and then no call is one before."""

    def setattr(self, *arguments, **options):
        _forget_calls()
        super().setattr(*arguments, **options)

    def undo(self):
        _forget_calls()
        super().undo()


@pytest.fixture
def monkeypatch():
    patch = _ForgettingPatch()
    yield patch
    patch.undo()


@pytest.fixture(autouse=True, scope="module")
def _return_gpu_memory():
    """A module's arrays go back to the driver, so that one module's pool is not missing in the next."""
    yield
    if "cupy" in sys.modules and gpu_count() > 0:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        sys.modules["cupy"].get_default_pinned_memory_pool().free_all_blocks()


# --- the receipt ------------------------------------------------------------------------------------------------------

_COLLECTED = pytest.StashKey[int]()  # gpu tests found, before any selection


def pytest_sessionfinish(session):
    """With -n the processes that find tests tell the one that counts what became of them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu tests"] = session.config.stash.get(_COLLECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[_COLLECTED] = getattr(node, "workeroutput", {}).get("gpu tests", 0)


def source_digests(root=ROOT):
    """{path: SHA-256} of every .py, .cu and .cuh file of cupyq/ and tests/, in the order of their paths."""
    paths = (path for folder in ("cupyq", "tests") for path in (root / folder).rglob("*"))
    files = {path.relative_to(root).as_posix(): path for path in paths if path.suffix in (".py", ".cu", ".cuh")}
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(files)}


def digest_of(digests):
    """One SHA-256 over the paths and digests of all files."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def receipt_state(receipt=RECEIPT, root=ROOT):
    """One line: whether the sources are those that a GPU last ran."""
    name = receipt.name
    if not receipt.exists():
        return f"{name}: missing; `make gpu` on a machine with a GPU writes it"
    recorded = json.loads(receipt.read_text())
    now = source_digests(root)
    where = "; ".join(_in_words(run) for run in recorded["runs"])
    if recorded["digest"] == digest_of(now):
        return f"{name}: matches the sources ({where})"
    before = recorded["files"]
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f"{name}: differs from the sources ({where}): {', '.join(changed[:5])}{more}; run `make gpu` again"


def _in_words(run):
    gpus = ", ".join(f"{run['gpus'].count(name)} x {name}" for name in dict.fromkeys(run["gpus"]))
    which = "" if run["tests"] == "all" else f" of {len(run['tests'])} files"
    return f"{gpus}, {run['date']}, {run['counts']['passed']} passed{which}"


def _chosen_tests(config):
    """ "all", or the files under tests/ that this run was given."""
    if config.args_source is not config.ArgsSource.ARGS:
        return "all"
    paths = sorted(Path(argument).resolve() for argument in config.args)
    return "all" if paths == [ROOT / "tests"] else [path.relative_to(ROOT).as_posix() for path in paths]


def _why_no_receipt(config, path, exitstatus, collected, counts):
    """The reason this run proves too little for a receipt, or None."""
    if gpu_count() == 0:
        return "there is no GPU"
    if exitstatus != 0 or counts["failed"]:
        return "not everything passed"
    if _chosen_tests(config) != "all" and not (path.exists() and receipt_state(path).startswith(f"{path.name}: matches")):
        return "only a part of tests/ was run, which adds to the receipt of a whole run of the same sources alone"
    if not collected or sum(counts.values()) != collected:
        return f"{sum(counts.values())} of {collected} gpu tests ran"
    return None


def _gpu_counts(reporter):
    """Outcomes of the gpu tests of this run; what fails outside them shows in the exit status."""
    counts = {}
    for outcome, categories in {"passed": ("passed",), "failed": ("failed", "error"), "skipped": ("skipped",)}.items():
        reports = (report for category in categories for report in reporter.stats.get(category, ()))
        counts[outcome] = len({report.nodeid for report in reports if "gpu" in getattr(report, "keywords", ())})
    return counts


def _driver_version():
    """Release of the NVIDIA driver, such as 580.159.04; None where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version_text(number):
    return f"{number // 1000}.{number % 1000 // 10}"


def write_receipt(path, counts, tests="all"):
    """Of a run of all tests; one of some of them, say those for several GPUs, is added to that of the same sources."""
    import cupy

    runtime = cupy.cuda.runtime
    digests = source_digests()
    run = {
        "tests": tests,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpus": [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())],
        "driver": _driver_version(),
        "cuda_of_driver": _version_text(runtime.driverGetVersion()),
        "cuda_of_runtime": _version_text(runtime.runtimeGetVersion()),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "counts": counts,
    }
    before = [] if tests == "all" else json.loads(path.read_text())["runs"]
    before = [other for other in before if (other["tests"], other["gpus"]) != (tests, run["gpus"])]
    receipt = {"digest": digest_of(digests), "runs": [*before, run], "files": digests}
    path.write_text(json.dumps(receipt, indent=1) + "\n")


def _golden_table(reporter):
    """Lines of what test_golden.py found: the worst error of each recorded case, here and in exllamav2."""
    cases = {}  # (case, measure) -> {library: error}
    for report in (report for category in ("passed", "failed") for report in reporter.stats.get(category, ())):
        for name, value in getattr(report, "user_properties", ()):
            if name == "golden":
                case, measure, library, ours, theirs = value
                cases.setdefault((case, measure), {}).update({library: ours, "exllamav2": theirs})
    if not cases:
        return
    columns = ("numpy", "cupy", "exllamav2")
    yield f"{'recorded case':<36}{'worst error':<34}" + "".join(f"{name:>12}" for name in columns)
    for (case, measure), errors in cases.items():
        numbers = (errors.get(name) for name in columns)
        yield f"{case:<36}{measure:<34}" + "".join(f"{'' if e is None else f'{e:.3g}':>12}" for e in numbers)


def _compile_receipt_state(reporter):
    """A line where test_repo.py had to compile all of a file, as compile_receipt.json does not cover it."""
    reports = (report for category in ("passed", "failed") for report in reporter.stats.get(category, ()))
    stale = {v for report in reports for name, v in getattr(report, "user_properties", ()) if name == "not in the receipt"}
    if stale:
        yield f"compile_receipt.json: does not cover {', '.join(sorted(stale))}; run `python tests/compile_checks.py`"


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    for line in (*_golden_table(terminalreporter), *_compile_receipt_state(terminalreporter)):
        terminalreporter.write_line(line)
    if path := config.getoption("--gpu-receipt"):
        counts = _gpu_counts(terminalreporter)
        if reason := _why_no_receipt(config, Path(path), exitstatus, config.stash.get(_COLLECTED, 0), counts):
            terminalreporter.write_line(f"no receipt written: {reason}")
        else:
            write_receipt(Path(path), counts, _chosen_tests(config))
            terminalreporter.write_line(f"receipt written: {path}")
    terminalreporter.write_line(receipt_state())


# --- helpers ----------------------------------------------------------------------------------------------------------


def golden(name):
    """{case: ({input name: array}, {output name: array}, arguments)} of tests/golden/<name>.safetensors."""
    from cupyq.formats.safetensors import SafetensorsFile

    file = SafetensorsFile(ROOT / "tests/golden" / f"{name}.safetensors")
    cases = {case: ({}, {}, arguments) for case, arguments in json.loads(file.metadata["cases"]).items()}
    for key in file.names:
        case, side, tensor = key.split("/")
        cases[case][0 if side == "in" else 1][tensor] = file.array(key)
    return cases


def exact_bound(result, exact, reference, *, ulp):
    """Raise unless result is as near to `exact` as twice the same-dtype reference's largest error plus one rounding.

    `ulp`: relative size of one rounding of the result's dtype (2**-11 float16, 2**-8 bfloat16, 2**-24 float32).
    """
    exact = np.asarray(exact, np.float64)
    error = np.abs(np.asarray(result, np.float64) - exact)
    allowed = 2 * np.max(np.abs(np.asarray(reference, np.float64) - exact), initial=0.0) + ulp * np.abs(exact)
    if error.size and not np.all(error <= allowed):
        worst = np.argmax(np.where(np.isnan(error), np.inf, error - allowed))
        limit = np.broadcast_to(allowed, error.shape).flat[worst]
        raise AssertionError(f"error {error.flat[worst]:.3g} at {worst}, allowed {limit:.3g}")
