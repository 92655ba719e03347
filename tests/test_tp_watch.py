"""The watchdog, with real processes that are killed, stopped, leave and fail."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from cupyq.errors import BackendError, UnsupportedError
from cupyq.tp import watch as watch_module
from cupyq.tp.watch import Watch

# A rank that waits: it says that it is there, then what became of the job, and obeys words on its standard input.
RANK = """
import json, sys, threading, time
from cupyq.tp.watch import Watch

job, rank, ranks, folder, limit_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5])
try:
    watch = Watch(job, rank, ranks, folder=folder, interval_s=0.05, limit_s=limit_s, details={"gpu": f"gpu {rank}"})
except Exception as error:
    print(json.dumps({"refused": f"{type(error).__name__}: {error}"}), flush=True)
    sys.exit(3)
while len(watch.peers()) < ranks - 1 and not watch.failure:
    time.sleep(0.01)
print(json.dumps({"peers": {r: p["gpu"] for r, p in watch.peers().items()}}), flush=True)
words = []
threading.Thread(target=lambda: words.extend(iter(sys.stdin.readline, "")), daemon=True).start()
while not watch.failure and "close\\n" not in words:
    if "fail\\n" in words:
        watch.fail(f"rank {rank} failed: as told")
    time.sleep(0.01)
print(json.dumps({"failure": watch.failure}), flush=True)
if "close\\n" in words:
    watch.close()
    print(json.dumps({"closed": True}), flush=True)
while "end\\n" not in words:
    time.sleep(0.01)
watch.close()
"""


class Job:
    """Ranks of one job, each a process."""

    def __init__(self, folder, ranks, name="a job", limit_s=1.0):
        self.ranks, self.processes = ranks, []
        for rank in range(ranks):
            self.processes.append(self.start(folder, rank, name, limit_s))

    def start(self, folder, rank, name, limit_s=1.0):
        command = [sys.executable, "-c", RANK, name, str(rank), str(self.ranks), str(folder), str(limit_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self, rank):
        return json.loads(self.processes[rank].stdout.readline())

    def tell(self, rank, word):
        self.processes[rank].stdin.write(f"{word}\n")
        self.processes[rank].stdin.flush()

    def gather(self):
        """Wait until every rank has seen all others."""
        for rank in range(self.ranks):
            others = {str(r): f"gpu {r}" for r in range(self.ranks) if r != rank}
            assert self.hear(rank) == {"peers": others}

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait(10)
            process.stdin.close()
            process.stdout.close()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start_job(ranks, **options):
        jobs.append(Job(tmp_path, ranks, **options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.end()


def test_a_killed_rank_is_an_error_on_the_others(start):
    """Its process is not waited for: to the system it is a zombie, and no less dead."""
    job = start(3)
    job.gather()
    victim = job.processes[1]
    begin = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    for rank in (0, 2):
        failure = job.hear(rank)["failure"]
        assert failure.startswith(f"rank 1 (process {victim.pid} on ") and "died" in failure
    assert time.monotonic() - begin < 5
    assert victim.returncode is None


def test_a_stopped_rank_is_an_error_on_the_others(start):
    job = start(3, limit_s=0.7)
    job.gather()
    begin = time.monotonic()
    os.kill(job.processes[2].pid, signal.SIGSTOP)
    for rank in (0, 1):
        assert "rank 2" in (failure := job.hear(rank)["failure"]) and "no sign of life for 0.7 s" in failure
    assert 0.5 < time.monotonic() - begin < 8
    os.kill(job.processes[2].pid, signal.SIGCONT)
    assert job.hear(2)["failure"] == failure  # it hears what was said of it, and does not work on alone


def test_living_ranks_are_left_in_peace(start):
    job = start(2, limit_s=0.5)
    job.gather()
    time.sleep(1.2)
    for rank in range(2):
        job.tell(rank, "close")
        assert job.hear(rank) == {"failure": None}


def test_the_default_limit_keeps_the_promise():
    """A rank that stopped is an error on the others within 10 s."""
    defaults = Watch.__init__.__kwdefaults__
    assert defaults["limit_s"] + 2 * defaults["interval_s"] < 10


def test_a_cause_reaches_all_word_for_word(start):
    job = start(3)
    job.gather()
    job.tell(1, "fail")
    assert [job.hear(rank)["failure"] for rank in range(3)] == ["rank 1 failed: as told"] * 3


def test_a_rank_that_leaves_has_not_failed_and_the_last_removes_the_file(start, tmp_path):
    job = start(2)
    job.gather()
    assert len(list(tmp_path.iterdir())) == 1
    job.tell(0, "close")
    assert job.hear(0) == {"failure": None} and job.hear(0) == {"closed": True}
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) == 1
    job.tell(1, "close")
    assert job.hear(1) == {"failure": None} and job.hear(1) == {"closed": True}
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_job_left_does_not_count(start):
    before = start(2)
    before.gather()
    before.tell(0, "fail")
    assert before.hear(1)["failure"]
    before.end()
    after = start(2)
    after.gather()
    for rank in range(2):
        after.tell(rank, "close")
        assert after.hear(rank) == {"failure": None}


def test_a_rank_cannot_be_taken_twice(start, tmp_path):
    job = start(2)
    job.gather()
    job.processes.append(job.start(tmp_path, 1, "a job"))
    refused = job.hear(2)["refused"]
    assert refused.startswith(f"BackendError: rank 1 is already taken by process {job.processes[1].pid}")
    other = start(2, name="another job")
    other.gather()


# --- within one process -----------------------------------------------------------------------------------------------


def test_waiting_for_a_rank_that_has_left_is_a_failure(start, tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "_GRACE_S", 0.3)
    job = start(0)
    job.ranks = 2
    with Watch("leaving", 0, 2, folder=tmp_path, interval_s=0.05, details={"gpu": "gpu 0"}) as watch:
        job.processes = [job.start(tmp_path, 1, "leaving")]
        assert job.hear(0) == {"peers": {"0": "gpu 0"}}
        watch.check_waiting("barrier")
        job.tell(0, "close")
        deadline = time.monotonic() + 5
        with pytest.raises(BackendError, match="rank 1 closed while rank 0 waits in barrier"):
            while time.monotonic() < deadline:
                watch.check_waiting("barrier")
                time.sleep(0.02)


def test_probes_and_those_who_are_told(tmp_path):
    told = []
    with Watch("probes", 0, 1, folder=tmp_path, interval_s=0.02) as watch:
        watch.on_failure.append(told.append)
        watch.probes.append(lambda: "the network\nis gone" if told or time.monotonic() > begin + 0.1 else None)
        begin = time.monotonic()
        watch.check()
        with pytest.raises(BackendError, match="^the network is gone$"):
            while time.monotonic() < begin + 5:
                watch.check()
                time.sleep(0.01)
        watch.fail("later")
        assert watch.failure == "the network is gone"
    assert told == ["the network is gone"]
    watch.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_within_the_context_is_the_cause(tmp_path):
    with pytest.raises(KeyError), Watch("errors", 0, 1, folder=tmp_path) as watch:
        raise KeyError("x")
    assert watch.failure == "rank 0 failed: KeyError: 'x'"


def test_a_process_watches_a_job_once(tmp_path):
    with Watch("twice", 0, 2, folder=tmp_path):
        with pytest.raises(ValueError, match="already watched by this process"):
            Watch("twice", 1, 2, folder=tmp_path)
    with Watch("twice", 1, 2, folder=tmp_path):
        pass
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1, got 2"):
        Watch("twice", 2, 2, folder=tmp_path)


def test_long_and_foreign_words_fit_a_slot(tmp_path):
    with Watch("words", 0, 3, folder=tmp_path, details={"gpu": "名" * 500}) as watch:
        watch.fail("\U0001f4a5" * 1000)
        with open(watch.path, "rb") as file:
            content = file.read()
        assert len(content) == watch_module._SLOT_BYTES
        assert watch_module._parse(content)["cause"] == watch.failure


@pytest.mark.parametrize("content", [b"", b"   ", b'{"beats": 1, "sta', b"[1]", b'{"beats": 1}', b"\xff\xfe"])
def test_a_half_written_slot_is_no_news(content):
    assert watch_module._parse(content) is None


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("CUPYQ_WATCH_DIR", raising=False)
    monkeypatch.setattr(watch_module.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = watch_module._own_folder(None)
    assert folder.startswith(str(tmp_path)) and os.stat(folder).st_mode & 0o777 == 0o700
    owner = os.getuid()
    os.rename(folder, tmp_path / f"cupyq-{owner + 1}")
    monkeypatch.setattr(watch_module.os, "getuid", lambda: owner + 1)
    with pytest.raises(BackendError, match="belongs to another user: set CUPYQ_WATCH_DIR"):
        watch_module._own_folder(None)
    monkeypatch.setenv("CUPYQ_WATCH_DIR", str(tmp_path / "mine"))
    assert watch_module._own_folder(None) == str(tmp_path / "mine") and os.path.isdir(tmp_path / "mine")


def test_without_posix_locks_there_is_no_watch(monkeypatch, tmp_path):
    monkeypatch.setattr(watch_module, "fcntl", None)
    with pytest.raises(UnsupportedError, match="use one process"):
        Watch("none", 0, 1, folder=tmp_path)
