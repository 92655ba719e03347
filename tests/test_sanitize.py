"""tools/sanitize.py and the cases it runs, with a stand-in for compute-sanitizer."""

import importlib
import os
import stat
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import sanitize
import sanitize_cases

from cupyq import _kernels, cli
from cupyq.ops.qmatmul_wgmma import INSTANCES

# Says what a sanitizer would of these parts, and never runs what it is given.
STAND_IN = f"""#!{sys.executable}
import os, sys, time
tool, part = sys.argv[2], " ".join(sys.argv)
print("noise", os.environ.get("SANITIZER"))
if "codes" in part:
    time.sleep(60)
errors = 3 if "mixtures" in part and tool == "initcheck" else 0
if "norms" in part:
    sys.exit(4)
if tool == "racecheck":
    print(f"========= RACECHECK SUMMARY: {{errors}} hazards displayed (0 errors, 0 warnings)")
else:
    print(f"========= ERROR SUMMARY: {{errors}} errors")
sys.exit(9 if errors else 1 if "test_rope" in part else 0)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "logs"


def test_all_that_is_good(stand_in, capsys):
    assert sanitize.main(["--logs", str(stand_in), "--only", "positions", "test_norm", "--jobs", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| part | memcheck | racecheck | initcheck | synccheck |"
    assert lines[2].startswith("| positions | 0 errors, ") and lines[3].count("0 errors") == 4
    assert lines[-1] == "8 of 8 without an error"
    assert len(list(stand_in.glob("*.log"))) == 8
    for tool in sanitize.TOOLS:
        assert f"noise {tool}\n" in (stand_in / f"{tool}-positions.log").read_text()


@pytest.mark.parametrize(
    ("part", "tool", "said"),
    [
        ("mixtures", "initcheck", "3 errors, "),
        ("norms", "memcheck", "no summary, exit 4"),
        ("test_rope", "racecheck", "0 errors, exit 1, "),
        ("codes", "synccheck", "not done after "),
    ],
)
def test_what_is_wrong_is_told(stand_in, capsys, part, tool, said):
    options = ["--logs", str(stand_in), "--tools", tool, "--minutes", "0.03" if part == "codes" else "1"]
    assert sanitize.main([*options, "--only", "positions", part]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith(f"| {part} | {said}") and lines[-1] == "1 of 2 without an error"


def test_every_lane_arrives_for_racecheck_alone(monkeypatch):
    monkeypatch.setattr(_kernels, "OPTIONS", before := _kernels.OPTIONS)
    for tool in ("", "memcheck"):
        monkeypatch.setenv("SANITIZER", tool)
        sanitize_cases.suit_tool()
        assert _kernels.OPTIONS == before
    monkeypatch.setenv("SANITIZER", "racecheck")
    sanitize_cases.suit_tool()
    assert _kernels.OPTIONS == (*before, "-DEVERY_LANE_ARRIVES=1")
    every, one = (_kernels.compile_instance(INSTANCES[-1], "sm_90a", options)[0] for options in ((), ("-UEVERY_LANE_ARRIVES",)))
    assert every != one


def test_products_of_cublas_begin_as_zeros_for_initcheck(monkeypatch):
    matmul, seen = importlib.import_module("cupyq.ops.matmul"), []
    monkeypatch.setattr(matmul, "_multiply_here", lambda cuda, device, out, *rest: seen.append(out.copy()))
    monkeypatch.setenv("SANITIZER", "initcheck")
    sanitize_cases.suit_tool()
    x, weight = np.ones((2, 3)), np.ones((4, 3))
    for transpose, bias, beta, zeros in ((True, None, 0.0, 4), (False, None, 0.0, 3), (True, x, 0.0, 0), (True, None, 0.5, 0)):
        matmul._multiply_here(None, 0, np.ones((2, 7)), x, weight, transpose, 2, bias, 1.0, beta)
        assert (seen[-1][:, 2 : 2 + zeros] == 0).all() and seen[-1].sum() == 2 * (7 - zeros)


def test_every_case_and_only_files_that_are_there_are_run():
    assert sorted(sanitize.CASES) == sorted(case.__name__ for case in (*sanitize_cases.CASES, *sanitize_cases.WHOLE))
    assert len(set(sanitize.FILES)) == len(sanitize.FILES)
    for name in sanitize.FILES:
        assert "mark.gpu" in (ROOT / f"tests/test_{name}.py").read_text(), name


def test_kernels_that_were_not_launched_are_named():
    every = set(cli.all_instances())
    lines, missing = sanitize_cases.coverage(every, "sm_90a")
    assert missing == [] and lines[1].endswith(f"in {len(every)} variants")
    without = {wanted for wanted in every if wanted.file != "rope" and not wanted.expression.startswith("attention_wgmma")}
    assert sanitize_cases.coverage(without, "sm_90a")[1] == ["attention_wgmma", "rope"]
    assert sanitize_cases.coverage(without, "sm_89")[1] == ["rope"]
    several = {w for w in every if not w.file.startswith("all_reduce")}
    assert sanitize_cases.coverage(several, "sm_90a")[1] == []


@pytest.mark.gpu
def test_the_kernels_of_older_gpus_are_taken_where_that_is_asked_for(cupy):
    from cupyq import ops

    _kernels.forget_loaded()
    queries, keys = (sanitize_cases.array(1, 40, 2, 64, dtype="float16") for _ in range(2))
    with sanitize_cases.before_hopper():
        ops.attention(queries, keys, keys)
    assert {wanted.file for wanted, _ in _kernels.loaded} == {"attention_prefill"}
    _kernels.forget_loaded()
