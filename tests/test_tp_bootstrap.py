"""How ranks find each other: the launchers' variables, real processes over TCP, two hosts, and what is wrong with a rank."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT, gpu_count
from tp_checks import StandInForNccl, in_threads

from cupyq.errors import BackendError, FormatError
from cupyq.tp import bootstrap
from cupyq.tp.bootstrap import Place, check_same, connect, find_place, group, model_digest
from cupyq.tp.local import LocalComm, SoloComm

# --- places -----------------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77"}


def placed(environ):
    place = find_place(environ)
    return place.launcher, place.rank, place.ranks, place.local_rank, place.local_ranks, place.host, place.port


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("none", 0, 1, 0, None, None, None)),
        (TORCHRUN | ADDRESS, ("torchrun", 3, 4, 1, 2, "node1", 29500)),
        # The launcher's own store listens at the port.
        (TORCHRUN | ADDRESS | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, ("torchrun", 3, 4, 1, 2, "node1", 29501)),
        (TORCHRUN | ADDRESS | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, ("torchrun", 3, 4, 1, 2, "node1", 29500)),
        (
            TORCHRUN | ADDRESS | {"TORCHELASTIC_USE_AGENT_STORE": "True", "NCCL_COMM_ID": "10.0.0.1:4000"},
            ("torchrun", 3, 4, 1, 2, "10.0.0.1", 4000),
        ),
        (TORCHRUN | {"NCCL_COMM_ID": "[fe80::1]:4000"}, ("torchrun", 3, 4, 1, 2, "fe80::1", 4000)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("torchrun", 0, 1, 0, None, None, None)),
        (SRUN | ADDRESS, ("srun", 5, 8, 1, None, "node1", 29500)),
        (SRUN | ADDRESS | {"SLURM_NTASKS_PER_NODE": "2"}, ("srun", 5, 8, 1, 2, "node1", 29500)),
        (SRUN | ADDRESS | TORCHRUN, ("torchrun", 3, 4, 1, 2, "node1", 29500)),  # torchrun within a step of Slurm
        # A batch script is no rank, whatever Slurm tells it about its job.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, ("none", 0, 1, 0, None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ("none", 0, 1, 0, None, None, None)),
        (SRUN | ADDRESS | {"PMI_SIZE": "8"}, ("srun", 5, 8, 1, None, "node1", 29500)),  # srun speaks PMI by itself
    ],
)
def test_places(environ, expected):
    assert placed(environ) == expected


def test_ranks_of_a_job_share_its_name_and_other_jobs_have_another():
    def job(environ):
        return find_place(environ).job

    torchrun = TORCHRUN | ADDRESS
    assert job(torchrun) == job(torchrun | {"RANK": "0", "LOCAL_RANK": "0"})
    others = [torchrun | change for change in ({"MASTER_PORT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, SRUN)]
    others[-1].pop("RANK")
    assert len({job(torchrun), *map(job, others)}) == 4
    assert job(SRUN | ADDRESS) != job(SRUN | ADDRESS | {"SLURM_STEP_ID": "1"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"MASTER_PORT": "1"}, "MASTER_ADDR is missing, where 4 ranks meet"),
        (SRUN | {"MASTER_ADDR": "node1"}, "MASTER_PORT is missing.*scontrol show hostnames"),
        (TORCHRUN | ADDRESS | {"RANK": "4"}, r"RANK must be a number in 0\.\.3, got '4'"),
        (TORCHRUN | ADDRESS | {"RANK": "-1"}, r"RANK must be a number in 0\.\.3, got '-1'"),
        (TORCHRUN | ADDRESS | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number of at least 1, got '0'"),
        (TORCHRUN | ADDRESS | {"LOCAL_RANK": "first"}, "LOCAL_RANK must be a number"),
        (TORCHRUN | ADDRESS | {"MASTER_PORT": "70000"}, "MASTER_PORT must be a port, 1 to 65534, got '70000'"),
        (TORCHRUN | {"NCCL_COMM_ID": "node1"}, "NCCL_COMM_ID must be host:port, got 'node1'"),
    ],
)
def test_variables_that_make_no_sense(environ, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_place(environ)
    assert "\n" not in str(caught.value)


MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}


def test_mpirun_without_mpi4py(monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    for environ in (MPI, MPI | SRUN | ADDRESS, {"PMI_SIZE": "3", "PMI_RANK": "0"}):
        with pytest.raises(BackendError, match=r"mpirun started 3 processes.*pip install 'cupyq\[mpi\]'"):
            find_place(environ)
    # Who exports the other variables needs no mpi4py.
    assert placed(MPI | TORCHRUN | ADDRESS)[:3] == ("torchrun", 3, 4)


def fake_mpi(monkeypatch, size, rank=2):
    host = SimpleNamespace(Get_rank=lambda: 1, Get_size=lambda: 2)
    world = SimpleNamespace(
        Get_size=lambda: size, Get_rank=lambda: rank, Split_type=lambda kind: host, bcast=lambda text, root: "the job"
    )
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: name)
    module = SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=0)
    monkeypatch.setattr(bootstrap.importlib, "import_module", lambda name: module)
    return world


def test_mpirun_with_mpi4py(monkeypatch):
    world = fake_mpi(monkeypatch, 3)
    # mpirun within a Slurm job hands on what Slurm told the node's first process.
    for environ in (MPI, MPI | SRUN | ADDRESS, {"PMI_SIZE": "3"}):
        assert find_place(environ) == Place("mpi", 2, 3, 1, 2, job="the job", world=world)
    fake_mpi(monkeypatch, 1)
    with pytest.raises(BackendError, match="mpirun started 3 processes, and mpi4py sees 1: it was built for another MPI"):
        find_place(MPI)


def test_mpi4py_without_a_library(monkeypatch):
    def no_library(name):
        raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open")

    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bootstrap.importlib, "import_module", no_library)
    with pytest.raises(BackendError, match=r"mpi4py cannot be imported \(cannot load MPI library\): reinstall"):
        find_place(MPI)


@pytest.fixture
def alone(monkeypatch):
    for name in (*TORCHRUN, *SRUN, *ADDRESS, *MPI, "PMI_SIZE", "NCCL_COMM_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_that_nobody_launched_is_alone(alone):
    comm = connect(backend="numpy")
    assert isinstance(comm, SoloComm) and (comm.rank, comm.ranks) == (0, 1)
    with pytest.raises(ValueError, match=r"ranks is 2.*cupyq.tp.group\(2\).*mpirun -n 2"):
        connect(2)
    alone.setenv("RANK", "0")
    alone.setenv("WORLD_SIZE", "1")
    assert isinstance(connect(1, backend="numpy"), SoloComm)
    with pytest.raises(ValueError, match="ranks is 4, but torchrun started 1 processes"):
        connect(4)


def test_groups_within_one_process():
    assert isinstance(group(1, backend="numpy")[0], SoloComm)
    comms = group(3, backend="numpy")
    assert [(type(comm), comm.rank, comm.ranks) for comm in comms] == [(LocalComm, rank, 3) for rank in range(3)]
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        group(0, backend="numpy")
    with pytest.raises(ValueError, match="devices must name 2 GPUs"):
        group(2, backend="cupy", devices=[0])
    with pytest.raises(BackendError, match="need GPU 98, and this process sees"):
        group(99, backend="cupy")


@pytest.mark.parametrize(
    ("local_rank", "usable", "device"), [(0, 1, 0), (1, 4, 1), (3, 1, 0), (2, 2, "start one rank a GPU"), (0, 0, "sees no GPU")]
)
def test_the_gpu_of_a_rank(monkeypatch, local_rank, usable, device):
    monkeypatch.setattr(bootstrap._device, "count", lambda: usable)
    place = Place("srun", 7, 8, local_rank)
    if isinstance(device, int):
        assert bootstrap._device_of(place) == device
    else:
        with pytest.raises(BackendError, match=device):
            bootstrap._device_of(place)


def test_two_ranks_on_one_gpu_are_noticed():
    watch = SimpleNamespace(peers=lambda: {0: {"gpu": "host 0:1"}, 2: {"gpu": "host 0:3"}})
    assert bootstrap._shared_gpu(watch, 1, "host 0:2") is None
    assert "ranks 1 and 2 use the same GPU" in bootstrap._shared_gpu(watch, 1, "host 0:3")


def test_the_address_of_nccl_is_set_while_ranks_join(monkeypatch):
    seen = []
    monkeypatch.setattr(bootstrap.nccl, "unique_id", lambda: seen.append(os.environ["NCCL_COMM_ID"]) or b"id")
    monkeypatch.delenv("NCCL_COMM_ID", raising=False)
    for host, text in (("node1", "node1:4000"), ("10.0.0.1", "10.0.0.1:4000"), ("fe80::1", "[fe80::1]:4000")):
        with bootstrap._group_id(Place("srun", 0, 2, host=host, port=4000)) as group_id:
            assert group_id == b"id" and os.environ["NCCL_COMM_ID"] == text == seen[-1]  # rank 0 reads it once more
        assert "NCCL_COMM_ID" not in os.environ
    monkeypatch.setenv("NCCL_COMM_ID", "mine:1")
    with pytest.raises(KeyError), bootstrap._group_id(Place("srun", 0, 2, host="mine", port=1)):
        raise KeyError
    assert os.environ["NCCL_COMM_ID"] == "mine:1"

    def refuse():
        raise BackendError("NCCL's get_unique_id failed")

    monkeypatch.setattr(bootstrap.nccl, "unique_id", refuse)
    with pytest.raises(BackendError, match="rank 1 cannot use nowhere:1, from MASTER_ADDR.*get_unique_id failed"):
        with bootstrap._group_id(Place("srun", 1, 2, host="nowhere", port=1)):
            pass
    assert os.environ["NCCL_COMM_ID"] == "mine:1"


def test_by_mpi_rank_0_alone_asks_nccl(monkeypatch):
    monkeypatch.setattr(bootstrap.nccl, "unique_id", lambda: b"id of rank 0")
    sent = []
    world = SimpleNamespace(bcast=lambda value, root: sent.append((value, root)) or b"id of rank 0")
    for rank in range(2):
        with bootstrap._group_id(Place("mpi", rank, 2, world=world)) as group_id:
            assert group_id == b"id of rank 0" and "NCCL_COMM_ID" not in os.environ
    assert sent == [(b"id of rank 0", 0), (None, 0)]


def test_rank_0_does_not_listen_where_nobody_reaches_it(monkeypatch):
    place = Place("srun", 0, 4, 0, 2, "127.0.1.1", 29500)
    with pytest.raises(ValueError, match="MASTER_ADDR=127.0.1.1 is 127.0.1.1 on rank 0's host, which other hosts cannot reach"):
        bootstrap._refuse_loopback(place)
    for fine in (
        Place("srun", 1, 4, 1, 2, "127.0.1.1", 29500),
        Place("srun", 0, 2, 0, 2, "127.0.1.1", 29500),
        Place("srun", 0, 4, 0, 2, "192.0.2.1", 29500),
        Place("mpi", 0, 4, 0, 2),
    ):
        bootstrap._refuse_loopback(fine)
    monkeypatch.setattr(bootstrap.socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror("unknown")))
    with pytest.raises(ValueError, match="has no address on rank 0's host"):
        bootstrap._refuse_loopback(place)


# --- the same on all ranks --------------------------------------------------------------------------------------------


def compare(texts_of_ranks):
    """What check_same says on each rank, None where it is content."""
    comms = LocalComm.group(len(texts_of_ranks), stall_s=10)
    said = [None] * len(comms)

    def work(comm):
        try:
            check_same(comm, texts_of_ranks[comm.rank])
        except BackendError as error:
            said[comm.rank] = str(error)

    threads = [threading.Thread(target=work, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return said


def test_ranks_that_agree():
    assert compare([{"model": "a" * 100, "config": "é"}] * 3) == [None] * 3
    assert compare([{}] * 2) == [None] * 2


@pytest.mark.parametrize(
    ("versions", "who", "found", "usual"),
    [
        (["0.1", "0.1", "0.2"], "rank 2 of 3", "'0.2'", "'0.1'"),
        (["0.2", "0.1", "0.1"], "rank 0 of 3", "'0.2'", "'0.1'"),
        (["0.1", "0.2"], "rank 1 of 2", "'0.2'", "'0.1'"),  # of two, rank 0 counts
        (["a", "b", "b", "a"], "ranks 1, 2 of 4", "'b'", "'a'"),
        (["x" * 64 + "1", "x" * 64 + "2"], "rank 1 of 2", "'xxxxxxxxxxxx...'", "'xxxxxxxxxxxx...'"),
    ],
)
def test_the_rank_that_differs_is_named_on_all(versions, who, found, usual):
    said = compare([{"model": "same", "version": version} for version in versions])
    assert set(said) == {f"{who} differ in version: {found}, the others have {usual}: start all ranks with the same"}


@pytest.fixture
def stand_in(monkeypatch):
    library = StandInForNccl()
    library.xp = library.cupy()
    for module in (bootstrap, bootstrap.nccl):
        monkeypatch.setattr(module, "require_cupy", lambda: library.xp)
    monkeypatch.setattr(bootstrap.nccl, "nccl", lambda: library)
    monkeypatch.setattr(bootstrap._device, "count", lambda: 3)
    return library


def test_a_rank_with_a_gpu_joins(stand_in, tmp_path, monkeypatch):
    """By the address, which only NCCL gets to see; the rank's GPU is the current one from then on."""
    monkeypatch.setenv("CUPYQ_WATCH_DIR", str(tmp_path))
    monkeypatch.delenv("NCCL_COMM_ID", raising=False)
    seen = []
    monkeypatch.setattr(stand_in, "get_unique_id", lambda: seen.append(os.environ["NCCL_COMM_ID"]) or b"id")
    place = Place("torchrun", 0, 1, 2, 1, "127.0.0.1", 4000, job="one rank")
    with bootstrap._join(place, "cupy", 10) as comm:
        assert (comm.rank, comm.ranks, comm.device) == (0, 1, 2) and seen == ["127.0.0.1:4000"]
        assert stand_in.current_device() == 2
        check_same(comm, {"a": "b"})
        (watched,) = tmp_path.iterdir()
        assert json.loads(watched.read_bytes())["gpu"].endswith(" 0000:02:00.0")
    assert list(tmp_path.iterdir()) == [] and "NCCL_COMM_ID" not in os.environ


def test_a_rank_that_cannot_join_leaves_nothing(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYQ_WATCH_DIR", str(tmp_path))
    place = Place("torchrun", 0, 2, 0, 2, "127.0.0.1", 4000, job="two ranks")
    with pytest.raises(BackendError, match=r"2 ranks did not meet within 0\.2 s; on this host there is rank 0, the others"):
        bootstrap._join(place, "cupy", 0.2)
    assert list(tmp_path.iterdir()) == []


def test_gpus_compare_digests_too(stand_in):
    """On GPUs other than the threads' current one."""
    comms = bootstrap.nccl.NcclComm.group([2, 0, 1])

    def work(comm):
        check_same(comm, {"model": "same"})
        check_same(comm, {"model": "other" if comm.rank == 1 else "same"})

    for result in in_threads([lambda comm=comm: work(comm) for comm in comms]):
        assert "rank 1 of 3 differ in model: 'other', the others have 'same'" in str(result)


@pytest.fixture
def model(tmp_path):
    def build(name, weights=b"\1" * 3_000_000, config='{"a": 1}', file="model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / file).write_bytes(weights)
        return folder

    return build


def test_model_digests(model):
    weights = bytearray(b"\1" * 3_000_000)
    base = model_digest(model("base"))
    assert base == model_digest(str(model("elsewhere")))
    changed = {}
    for name, place in {"first": 0, "last": -1, "sixth piece": (3_000_000 - 65536) * 5 // 15 + 7}.items():
        other = bytearray(weights)
        other[place] = 2
        changed[name] = model_digest(model(name, bytes(other)))
    changed["shorter"] = model_digest(model("shorter", bytes(weights[:-1])))
    changed["config"] = model_digest(model("config", config='{"a": 2}'))
    changed["name"] = model_digest(model("name", file="other.safetensors"))
    assert len({base, *changed.values()}) == 7
    assert model_digest(model("tiny", b"\1")) != model_digest(model("empty", b""))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FormatError, match="is no model folder: it lacks config.json"):
        model_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"lacks \*\.safetensors"):
        model_digest(tmp_path)


# --- real processes ---------------------------------------------------------------------------------------------------

# A rank: joins, adds its rank + 1 over all, and says what it got; then goes on adding until told to end or until it fails.
RANK = """
import json, os, sys, time
import numpy as np
from cupyq.tp.bootstrap import connect


def say(**words):
    os.write(1, (json.dumps(words) + "\\n").encode())  # at once, so that ranks do not mix their words


options = json.loads(sys.argv[1])
begin = time.monotonic()
try:
    with connect(options.get("ranks"), options.get("timeout", 20), backend="numpy", same=options.get("same")) as comm:
        total = comm.all_reduce(np.array([comm.rank + 1.0, 0.5], np.float32))
        joined = comm.all_gather(np.array([comm.rank], np.int32))
        say(rank=comm.rank, ranks=comm.ranks, sum=total.tolist(), joined=joined.ravel().tolist())
        while options.get("goes on"):
            begin = time.monotonic()
            comm.all_reduce(np.ones(1000, np.float32))
            time.sleep(0.01)
        comm.barrier()
except Exception as error:
    say(error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - begin)
    sys.exit(2)
"""


def free_ports():
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture
def launch(tmp_path):
    """launch(rank's variables, options) -> the process of a rank."""
    started = []

    def start(variables, options=None, script=RANK):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI", "MASTER_"))}
        environment = {**kept, "PYTHONPATH": str(ROOT), "CUPYQ_WATCH_DIR": str(tmp_path), **variables}
        command = [sys.executable, "-c", script, json.dumps(options or {})]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        process.stdout.close()


def by_torchrun(rank, ranks, port):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def by_srun(rank, ranks, port):
    counts = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(ranks), "SLURM_LOCALID": str(rank)}
    return counts | {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def hear(process):
    return json.loads(process.stdout.readline())


def expected(rank, ranks):
    return {"rank": rank, "ranks": ranks, "sum": [ranks * (ranks + 1) / 2, ranks / 2], "joined": list(range(ranks))}


@pytest.mark.parametrize("variables", [by_torchrun, by_srun])
def test_processes_meet(launch, variables, tmp_path):
    port = free_ports()
    processes = [launch(variables(rank, 3, port), {"ranks": 3}) for rank in range(3)]
    assert [hear(process) for process in processes] == [expected(rank, 3) for rank in range(3)]
    assert [process.wait(10) for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []  # the watchdog's file is gone


def test_processes_meet_beside_the_store_of_torchrun(launch):
    port = free_ports()
    with socket.create_server(("127.0.0.1", port)):
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
        processes = [launch(by_torchrun(rank, 2, port) | agent) for rank in range(2)]
        assert [hear(process) for process in processes] == [expected(rank, 2) for rank in range(2)]


# mpi4py as far as it is asked, with files for a network.
MPI4PY = """
import os, pickle, time
from pathlib import Path

COMM_TYPE_SHARED = 1


class Comm:
    calls = 0

    def Get_rank(self):
        return int(os.environ["OMPI_COMM_WORLD_RANK"])

    def Get_size(self):
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])

    def Split_type(self, kind):
        return self

    def bcast(self, value, root=0):
        self.calls += 1
        path = Path(__file__).parent / f"message{self.calls}"
        if self.Get_rank() == root:
            path.with_suffix(".part").write_bytes(pickle.dumps(value))
            path.with_suffix(".part").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return pickle.loads(path.read_bytes())


COMM_WORLD = Comm()
"""


def test_processes_meet_by_mpi(launch, tmp_path):
    package = tmp_path / "site" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "MPI.py").write_text(MPI4PY)
    path = f"{package.parent}{os.pathsep}{ROOT}"
    counts = [{"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": str(rank), "PYTHONPATH": path} for rank in range(3)]
    processes = [launch(variables) for variables in counts]
    assert [hear(process) for process in processes] == [expected(rank, 3) for rank in range(3)]


def test_a_rank_that_never_starts_is_named(launch):
    port = free_ports()
    processes = [launch(by_torchrun(rank, 3, port), {"timeout": 1.5}) for rank in (0, 2)]
    for process in processes:
        said = hear(process)
        assert said["error"].startswith("BackendError: rank 1 of 3 did not come to 127.0.0.1"), said
        assert said["seconds"] < 10


def test_without_rank_0_the_others_say_so(launch):
    said = hear(launch(by_torchrun(1, 2, free_ports()), {"timeout": 1}))
    assert "rank 0 did not answer rank 1" in said["error"] and "refused" in said["error"]


@pytest.mark.parametrize("fact", ["model", "config"])
def test_ranks_with_different_models_do_not_start(launch, fact):
    port = free_ports()
    same = {"model": "1" * 64, "config": "c"}
    facts = [same, same | {fact: "other"}, same]
    processes = [launch(by_torchrun(rank, 3, port), {"same": facts[rank]}) for rank in range(3)]
    for process in processes:
        assert f"BackendError: rank 1 of 3 differ in {fact}: 'other', the others have" in hear(process)["error"]


def test_ranks_of_different_versions_do_not_start(launch):
    port = free_ports()
    other = "import cupyq._version\ncupyq._version.VERSION = '9.9'\n" + RANK
    processes = [launch(by_torchrun(rank, 2, port), script=other if rank == 1 else RANK) for rank in range(2)]
    for process in processes:
        assert "rank 1 of 2 differ in cupyq version: '9.9', the others have" in hear(process)["error"]


def test_a_rank_killed_in_the_middle_is_an_error_on_all(launch):
    port = free_ports()
    processes = [launch(by_torchrun(rank, 3, port), {"goes on": True}) for rank in range(3)]
    for rank, process in enumerate(processes):
        assert hear(process) == expected(rank, 3)
    os.kill(processes[1].pid, signal.SIGKILL)
    for process in (processes[0], processes[2]):
        said = hear(process)
        assert said["error"].startswith("BackendError: rank 1 ") and said["seconds"] < 10, said
        assert "went away" in said["error"] or "died" in said["error"]
        assert process.wait(10) == 2


def test_rank_0_killed_in_the_middle_is_an_error_on_all(launch):
    port = free_ports()
    processes = [launch(by_torchrun(rank, 3, port), {"goes on": True}) for rank in range(3)]
    for rank, process in enumerate(processes):
        assert hear(process) == expected(rank, 3)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes[1:]:
        said = hear(process)
        assert said["error"].startswith("BackendError: rank 0 ") and said["seconds"] < 10, said


def test_a_stopped_rank_is_an_error_on_all(launch):
    """With the limits that users have."""
    port = free_ports()
    processes = [launch(by_torchrun(rank, 2, port), {"goes on": True}) for rank in range(2)]
    for rank, process in enumerate(processes):
        assert hear(process) == expected(rank, 2)
    os.kill(processes[1].pid, signal.SIGSTOP)
    said = hear(processes[0])
    assert "rank 1 (process" in said["error"] and "no sign of life" in said["error"] and said["seconds"] < 10, said


# --- two hosts --------------------------------------------------------------------------------------------------------

# Two network namespaces joined by a cable, which share nothing else that the ranks use. They end with their processes.
TWO_HOSTS = """
set -e
unshare --net sleep 60 & other=$!
trap 'touch $WATCH/cut; kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
ip link add left type veth peer name right
ip link set right netns $other
ip addr add 10.77.0.1/24 dev left
ip link set left up
ip link set lo up
there="nsenter --net --target $other"
$there ip addr add 10.77.0.2/24 dev right
$there ip link set right up
CUPYQ_WATCH_DIR=$WATCH/left RANK=0 LOCAL_RANK=0 "$@" & first=$!
CUPYQ_WATCH_DIR=$WATCH/left RANK=1 LOCAL_RANK=1 "$@" & second=$!
CUPYQ_WATCH_DIR=$WATCH/right RANK=2 LOCAL_RANK=0 $there "$@" & third=$!
echo "$third" > $WATCH/third
(until [ -e $WATCH/cut ]; do sleep 0.05; done; ip link set left down 2>/dev/null) &
wait $first || true
wait $second || true
wait $third || true
"""


def two_hosts(tmp_path, options):
    """The processes whose words are those of three ranks on two hosts, and whether they are namespaces.

    Without the right to make namespaces: three processes of one host which share no folder.
    """
    variables = {"WORLD_SIZE": "3", "WATCH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    rank = [sys.executable, "-c", RANK, json.dumps(options)]
    probe = ["unshare", "--net", "--map-root-user", "ip", "link", "add", "left", "type", "veth"]
    has_tools = all(map(shutil.which, ("unshare", "nsenter", "ip", "bash")))
    if are_namespaces := has_tools and subprocess.run(probe, capture_output=True).returncode == 0:
        variables |= {"MASTER_ADDR": "10.77.0.1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29501"}
        commands = [(["unshare", "--net", "--map-root-user", "bash", "-c", TWO_HOSTS, "hosts", *rank], {})]
    else:
        variables |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": str(free_ports())}
        folders = ("left", "left", "right")
        own = [{"RANK": str(r), "LOCAL_RANK": str(r), "CUPYQ_WATCH_DIR": str(tmp_path / folders[r])} for r in range(3)]
        commands = [(rank, variables) for variables in own]
    processes = [
        subprocess.Popen(command, env={**os.environ, **variables, **more}, stdout=subprocess.PIPE, text=True)
        for command, more in commands
    ]
    return processes, are_namespaces


def read_all(processes, count):
    """The next `count` words of the ranks: all through one process, or one of each."""
    sources = processes * count if len(processes) == 1 else processes[:count]
    return [hear(source) for source in sources]


def end_all(processes):
    for process in processes:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def test_ranks_on_two_hosts_meet(tmp_path):
    processes, _ = two_hosts(tmp_path, {})
    try:
        said = sorted(read_all(processes, 3), key=lambda words: words["rank"])
    finally:
        end_all(processes)
    assert said == [expected(rank, 3) for rank in range(3)]


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_fault_on_the_other_host_is_an_error_on_this_one(tmp_path, fault):
    """The hosts share no folder: the news come over the connection, or no more come over it."""
    processes, are_namespaces = two_hosts(tmp_path, {"goes on": True})
    try:
        assert all("sum" in words for words in read_all(processes, 3))
        gone = [2, 2]
        if are_namespaces and fault == "cut off":
            (tmp_path / "cut").touch()
            gone = [0, 2, 2]  # rank 2 lives, and misses the others
        else:
            os.kill(int((tmp_path / "third").read_text()) if are_namespaces else processes[2].pid, signal.SIGKILL)
        survivors = sorted(read_all(processes, len(gone)), key=lambda words: words["error"])
    finally:
        end_all(processes)
    for rank, words in zip(gone, survivors, strict=True):
        assert words["error"].startswith(f"BackendError: rank {rank} went away") and words["seconds"] < 10, words


# --- NCCL -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_nccl_makes_the_same_id_of_an_address_everywhere():
    """What the door by MASTER_ADDR stands on: 8 bytes of its magic number, then the address as a sockaddr_in."""
    place = Place("torchrun", 1, 2, host="127.0.0.1", port=29500)
    with bootstrap._group_id(place) as first, bootstrap._group_id(place) as second:
        assert first == second and len(first) == 128
        assert bytes(first)[8:16] == socket.AF_INET.to_bytes(2, "little") + (29500).to_bytes(2, "big") + bytes([127, 0, 0, 1])


# One process for each GPU. Rank 0 with no other rank joins a group of NCCL all the same.
GPU_RANK = """
import json, sys, time
import cupy
import numpy as np
from cupyq.errors import BackendError
from cupyq.tp import bootstrap

rank, ranks, port, victim = map(int, sys.argv[1:5])
place = bootstrap.Place("torchrun", rank, ranks, rank, ranks, "127.0.0.1", port, job=f"gpu test {port}")
try:
    with bootstrap._join(place, "cupy", 60) as comm:
        bootstrap.check_same(comm, {"port": str(port)})
        array = cupy.full(1000, rank + 1, np.float32)
        for _ in range(3):
            total = comm.all_reduce(array)
        joined = comm.all_gather(cupy.array([rank], np.int32))
        comm.barrier()
        print(json.dumps({"sum": float(total[0]), "joined": joined.ravel().tolist()}), flush=True)
        begin = time.monotonic()
        while victim:
            comm.all_reduce(array)
            comm.wait()
            begin = time.monotonic()
except BackendError as error:
    print(json.dumps({"error": str(error), "seconds": time.monotonic() - begin}), flush=True)
"""


def gpu_ranks(tmp_path, kills):
    ranks, port = gpu_count(), free_ports()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUPYQ_WATCH_DIR": str(tmp_path)}
    processes = []
    for rank in range(ranks):
        command = [sys.executable, "-c", GPU_RANK, *map(str, (rank, ranks, port, int(kills and ranks > 1)))]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return processes


@pytest.mark.gpu
@pytest.mark.parametrize("kills", [False, True])
def test_processes_with_a_gpu_each(tmp_path, kills):
    """Each rank adds over all; then, where there are several, the last is killed and the others say so."""
    processes = gpu_ranks(tmp_path, kills)
    ranks = len(processes)
    try:
        for process in processes:
            assert hear(process) == {"sum": ranks * (ranks + 1) / 2, "joined": list(range(ranks))}
        if kills and ranks > 1:
            os.kill(processes[-1].pid, signal.SIGKILL)
            for process in processes[:-1]:
                said = hear(process)
                assert f"rank {ranks - 1} (process" in said["error"] and said["seconds"] < 10, said
        for process in processes:
            process.wait(20)
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
            process.stdout.close()


@pytest.mark.gpu
def test_one_process_drives_all_gpus():
    comms = group(gpu_count())
    assert [comm.rank for comm in comms] == list(range(gpu_count()))
    assert all(comm.xp.__name__ == "cupy" for comm in comms)
    for comm in comms:
        comm.close()
