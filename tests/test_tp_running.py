"""tp/running.py and the command line: one function on all ranks, as threads or as processes that a launcher started."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from tp_checks import free_port

from cupyq import doctor, tp
from cupyq.cli import main
from cupyq.errors import BackendError

LLAMA = ROOT / "tests/models/llama3-rope"
GENERATE = ["generate", str(LLAMA), "--tokens", "3,140,25", "--max-new-tokens", "6", "--backend", "numpy", "--json"]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_results_come_by_rank():
    def work(comm):
        return comm.rank, comm.ranks, float(comm.all_reduce(np.array([comm.rank + 1], np.float32))[0])

    assert tp.run(work, 3, backend="numpy") == [(0, 3, 6.0), (1, 3, 6.0), (2, 3, 6.0)]
    assert tp.run(work, 1, backend="numpy") == [(0, 1, 1.0)]


def test_an_error_of_one_rank_ends_all_and_is_the_one_raised():
    others = []

    def work(comm):
        if comm.rank == 1:
            raise KeyError("its own reason")
        try:
            comm.barrier()
        except BackendError as error:
            others.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(KeyError, match="its own reason"):
        tp.run(work, 3, backend="numpy")
    assert time.monotonic() - start < 10
    assert len(others) == 2 and all("rank 1 failed: KeyError: 'its own reason'" in text for text in others)


def test_an_interrupt_of_the_main_thread_ends_all(monkeypatch):
    ended = []

    def work(comm):
        try:
            while True:
                comm.check()
                time.sleep(0.01)
        except BackendError as error:
            ended.append(str(error))
            raise

    monkeypatch.setattr(tp.running, "_POLL_S", 0.05)
    joined = tp.running.threading.Thread.join

    def interrupt(thread, timeout=None):
        if thread.name.startswith("cupyq rank"):
            raise KeyboardInterrupt
        return joined(thread, timeout)

    monkeypatch.setattr(tp.running.threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tp.run(work, 2, backend="numpy")
    deadline = time.monotonic() + 10
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(ended) == 2 and all("KeyboardInterrupt in the main thread" in text for text in ended)


# --- the command line -------------------------------------------------------------------------------------------------


def last_object(text):
    return json.loads(text.splitlines()[-1])


def test_generate_on_threads(capsys):
    assert main([*GENERATE, "--greedy"]) == 0
    alone = last_object(capsys.readouterr().out)
    assert main([*GENERATE, "--greedy", "--tp", "3", "--tp-weights", "2,1,1"]) == 0
    output = capsys.readouterr()
    together = last_object(output.out)
    assert together["tokens"] == alone["tokens"] and together["prompt_tokens"] == [3, 140, 25]
    assert output.out.count("\n") == 1 and output.err.count("numpy on 3 ranks") == 1
    assert main([*GENERATE[:-1], "--greedy", "--tp", "2"]) == 0
    assert capsys.readouterr().out.split() == [",".join(map(str, alone["tokens"]))]
    assert main([*GENERATE, "--tp", "2", "--temperature", "1.5"]) == 0  # a seed that all ranks share
    assert len(last_object(capsys.readouterr().out)["tokens"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp"], "--tp: neither a GPU nor a launcher says how many parts to make of the model: give --tp 2, say"),
        (["--tp-weights", "2,1"], "--tp-weights is for --tp N: give that too"),
        (["--tp", "2", "--tp-weights", "2"], "weights must be 2 numbers, one for each rank, got 1"),
        (["--tp", "2", "--tp-weights", "a"], "expected numbers separated by commas, as in 3,1, got 'a'"),
        (["--tp", "0"], "expected 1 or more, got 0"),
        (["--tp", "99"], "intermediate_size 352 makes 11 parts of 32, fewer than 99 ranks: use at most 11"),
    ],
)
def test_wrong_ranks_are_one_line(capsys, monkeypatch, arguments, message):
    assert main([*GENERATE, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("cupyq: error: ") and message in output.err
    assert output.err.count("\n") == 1


def started(ranks, tmp_path, *arguments, program=("-m", "cupyq")):
    """Processes as torchrun starts them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
    place |= {"LOCAL_WORLD_SIZE": str(ranks), "CUPYQ_WATCH_DIR": str(tmp_path / "watch"), "OPENBLAS_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def test_generate_on_processes(tmp_path, capsys):
    """Rank 0 alone prints, and what it prints is what one process does."""
    assert main([*GENERATE, "--greedy"]) == 0
    alone = last_object(capsys.readouterr().out)
    processes = started(2, tmp_path, *GENERATE, "--greedy", "--tp")
    (first, error), (second, other) = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], (error, other)
    assert last_object(first)["tokens"] == alone["tokens"] and "numpy on 2 ranks" in error
    assert second == "" and other == ""
    assert list((tmp_path / "watch").iterdir()) == []


def test_processes_of_another_number_are_told(tmp_path):
    processes = started(2, tmp_path, *GENERATE, "--tp", "3")
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("ranks is 3, but torchrun started 2 processes: give both the same number" in error for _, error in outputs)


_KILLED = """
import os, signal, sys
from cupyq import tp
with tp.connect(backend="numpy") as comm:
    model = tp.load_model(sys.argv[1], comm)
    decoder = model.decoder(max_len=250)
    decoder.start([[1, 2, 3]])
    for step in range(240):
        if step == 5 and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        decoder.step()
"""


def test_a_rank_that_is_killed_between_steps_ends_the_others(tmp_path):
    """The survivors say which one it was, and do not hang."""
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    processes = started(3, tmp_path, program=[str(script), str(LLAMA)])
    processes[1].wait(timeout=60)
    start = time.monotonic()
    outputs = [process.communicate(timeout=30) for process in processes]
    assert time.monotonic() - start < 10
    assert [process.returncode for process in processes] == [1, -9, 1]
    for rank in (0, 2):
        assert "BackendError" in outputs[rank][1] and "rank 1" in outputs[rank][1].splitlines()[-1], outputs[rank][1]


def test_perplexity_on_threads(capsys):
    folder = ROOT / "examples/models/shakespeare"
    command = ["perplexity", str(folder), "--text", str(folder / "val.txt"), "--window", "16", "--max-windows", "2"]
    command += ["--backend", "numpy", "--json"]
    assert main(command) == 0
    alone = last_object(capsys.readouterr().out)
    assert main([*command, "--tp", "2", "--reference", str(folder)]) == 0
    output = capsys.readouterr()
    together = last_object(output.out)
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5) and together["top1"] == 1
    assert output.err.count("perplexity  ") == 1


# --- doctor -----------------------------------------------------------------------------------------------------------

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tPHB\tNODE\t0-31\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPXB\tNODE\tSYS\t X

Legend:

  X    = Self
"""


def test_links_of_the_topology():
    assert doctor.parse_links(TOPOLOGY) == {(0, 1): "NVLink x 18", (0, 2): "SYS", (1, 2): "PHB"}
    assert doctor.parse_links("") == doctor.parse_links("nvidia-smi has failed") == {}


def test_doctor_looks_at_what_ranks_need(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYQ_WATCH_DIR", str(tmp_path))
    assert main(["doctor", "--tp", "--json"]) == 0
    checks = {check["name"]: check for check in last_object(capsys.readouterr().out)["checks"]}
    assert {"launcher", "watch", "shm", "peers"} <= checks.keys()
    assert checks["launcher"]["ok"] and "--tp N makes threads" in checks["launcher"]["found"]
    assert checks["watch"]["ok"] and str(tmp_path) in checks["watch"]["found"]
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun: rank 1 of 4, number 1 on this host, meeting at head:29500" in doctor._launcher().found
    monkeypatch.delenv("MASTER_ADDR")
    checks = {check["name"]: check for check in doctor.diagnose(tp=True)["checks"]}
    assert not checks["launcher"]["ok"] and "MASTER_ADDR is missing" in checks["launcher"]["found"]
    assert "launcher" not in {check["name"] for check in doctor.diagnose()["checks"]}


def test_doctor_tells_sums_that_are_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "_gpu_count", lambda: 2)
    times = {4096: (7.2, True), 64 << 20: (700.0, False)}
    monkeypatch.setattr(tp, "run", lambda work, ranks, backend: [times] * ranks)
    check = doctor._exchange()
    assert not check.ok and check.found == "sums over 2 GPUs: 4 KiB 7 us, 64 MiB 700 us (96 GB/s on the bus)"
    assert "sums of 64 MiB are wrong" in check.mend
    diagnosis = {"ok": False, "backend": "cupy", "checks": [vars(check)]}
    assert "The GPUs do not work together" in doctor.report(diagnosis)


@pytest.mark.gpu
def test_doctor_on_gpus(capsys):
    from conftest import gpu_count

    diagnosis = doctor.diagnose(tp=True)
    checks = {check["name"]: check for check in diagnosis["checks"]}
    assert diagnosis["ok"] and ("exchange" in checks) == (gpu_count() > 1)
    if gpu_count() > 1:
        smallest, largest = (float(us) for us in re.findall(r" (?:4 K|64 M)iB (\d+) us", checks["exchange"]["found"]))
        assert smallest < 100 < largest  # what the GPUs take, not the host
