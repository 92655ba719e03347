"""How ranks find each other: one process for all GPUs, or one for each, on one host or several, by the launcher's own door.

    mpirun      mpi4py (extra `mpi`) broadcasts what the ranks need to meet
    torchrun    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun        SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, and MASTER_ADDR, MASTER_PORT, which the job script exports
    none        one process, one rank; `group(n)` drives n GPUs from it

With an address NCCL meets by itself: where NCCL_COMM_ID=<host>:<port> is set, ncclGetUniqueId makes the same id of it on
every rank and rank 0 listens there (bootstrapGetUniqueId and ncclCommInitRank in NCCL's src/bootstrap.cc and src/init.cc).
NCCL then wants every host to have an interface in the subnet of that address (bootstrapNetInit, same file); mpirun has no
such limit.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import ipaddress
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cupyq import _device, _version
from cupyq._arrays import first_line, require_cupy
from cupyq._json_file import MAX_BYTES, read_bytes
from cupyq.errors import BackendError, FormatError
from cupyq.tp import nccl
from cupyq.tp.comm import Comm, gather_bytes, one_line, rank_names
from cupyq.tp.local import LocalComm, SoloComm
from cupyq.tp.sockets import SocketComm
from cupyq.tp.watch import Watch


@dataclass(frozen=True)
class Place:
    """Where a process stands among its job's processes, as its launcher says."""

    launcher: str  # "none", "mpi", "torchrun" or "srun"
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int | None = None  # on this host; None where the launcher does not say
    host: str | None = None  # rank 0's address, for those that do not come by MPI
    port: int | None = None
    job: str = ""  # the same on all ranks, other than that of any other job on the host
    world: Any = None  # MPI's communicator


def find_place(environ=os.environ):
    """The Place that the launcher's variables describe. ValueError names a variable that is missing or makes no sense.

    MPI comes first: mpirun within a Slurm job hands Slurm's variables on, which count other things. Sources: Open MPI
    (docs.open-mpi.org, "Environment variables set for MPI applications"), MPICH's Hydra (PMI_RANK, PMI_SIZE),
    torchrun (docs.pytorch.org/docs/stable/elastic/run.html), srun(1), "Output environment variables".
    """
    by_mpi = _mpi_size(environ)
    if by_mpi is not None and by_mpi > 1:
        if importlib.util.find_spec("mpi4py") is not None:
            return _place_of_mpi(by_mpi)
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            raise BackendError(
                f"mpirun started {by_mpi} processes, and mpi4py, by which they meet, is missing: pip install 'cupyq[mpi]'"
            )
    if "RANK" in environ and "WORLD_SIZE" in environ:
        # A restart by torchrun is a job of its own.
        parts = [environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
        place = _place_of(environ, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", parts)
        # The launcher itself listens at MASTER_PORT (torch/distributed/rendezvous.py, _torchelastic_use_agent_store).
        taken = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "NCCL_COMM_ID" not in environ
        return replace(place, port=place.port + 1) if taken and place.port is not None else place
    # Within a batch script Slurm sets the first two for the script itself, which is no rank: only srun makes steps.
    if {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"} <= environ.keys():
        parts = [environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        return _place_of(environ, "srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", parts)
    return Place("none")


def connect(ranks=None, timeout=60.0, *, backend="auto", same=None):
    """This process's Comm, once all ranks that the launcher started have met. Its GPU becomes the thread's current one.

    ranks: how many the caller expects; None takes the launcher's number. backend: "numpy" (TCP), "cupy" (NCCL), or "auto":
    "cupy" where there is a GPU. same: {name: text} of what must be equal on all ranks besides the version of cupyq, such as
    {"model": model_digest(path)}. Errors: ValueError for variables that make no sense, BackendError where a rank did not
    come within `timeout` seconds, died, or differs in `same`: the message names it.
    """
    place = find_place()
    if ranks is not None and ranks != place.ranks:
        if place.launcher == "none":
            raise ValueError(
                f"ranks is {ranks}, but no launcher started this process: use cupyq.tp.group({ranks}) to drive {ranks} GPUs "
                f"from it, or start `mpirun -n {ranks}`, `torchrun --nproc-per-node {ranks}` or `srun -n {ranks}`"
            )
        raise ValueError(f"ranks is {ranks}, but {place.launcher} started {place.ranks} processes: give both the same number")
    backend = _device.choose_backend(backend)
    if place.ranks == 1:
        return _alone(backend)
    comm = _join(place, backend, timeout)
    try:
        check_same(comm, {"cupyq version": _version.VERSION, **(same or {})})
    except BaseException as error:
        comm.abort(error)
        comm.close()
        raise
    return comm


def group(ranks, *, backend="auto", devices=None):
    """The Comms of `ranks` ranks within this process: threads on NumPy, one thread and `together` on GPUs.

    devices: the GPUs, one for each rank; None takes the first ones.
    """
    backend = _device.choose_backend(backend)
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if backend == "numpy":
        return LocalComm.group(ranks) if ranks > 1 else (SoloComm(),)
    devices = list(range(ranks)) if devices is None else list(devices)
    if len(devices) != ranks:
        raise ValueError(f"devices must name {ranks} GPUs, one for each rank, got {devices}")
    if max(devices) >= (usable := _device.count()):
        raise BackendError(f"{ranks} ranks need GPU {max(devices)}, and this process sees {usable}: use fewer ranks")
    return nccl.NcclComm.group(devices) if ranks > 1 else (SoloComm(require_cupy(), devices[0]),)


def check_same(comm, texts):
    """Raise BackendError on every rank, naming those that differ, unless `texts` ({name: text}) is equal on all.

    The names are the same on all ranks. Exchanges digests, by one all_gather of a few bytes.
    """
    names = sorted(texts)
    if not names:
        return
    found = gather_bytes(comm, b"".join(_fingerprint(str(texts[name])) for name in names))
    for index, name in enumerate(names):
        prints = [row[index * _PRINT_BYTES : (index + 1) * _PRINT_BYTES] for row in found]
        ((usual, votes),) = Counter(prints).most_common(1)  # of equally many the first: rank 0 counts as right
        if votes == comm.ranks:
            continue
        others = [rank for rank, text in enumerate(prints) if text != usual]
        raise BackendError(
            f"{rank_names(others)} of {comm.ranks} differ in {name}: {_readable(prints[others[0]])}, "
            f"the others have {_readable(usual)}: start all ranks with the same"
        )


def model_digest(folder):
    """A digest of a model folder that tells models apart without reading all of their weights.

    SHA-256 of config.json, and of each *.safetensors file its name, size, and 16 pieces of 64 KiB spread over it evenly:
    the header with all names, shapes and dtypes, and some of the weights. Where the folder lies does not matter.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if not weights or not config.is_file():
        raise FormatError(f"{folder} is no model folder: it lacks {'*.safetensors' if config.is_file() else 'config.json'}")
    digest.update(read_bytes(config, most_bytes=MAX_BYTES, hint="copy it again"))
    for path in weights:
        if not path.is_file():  # a pipe would be waited for
            raise FormatError(f"{path}: no regular file, expected a safetensors file; remove it or copy it again")
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek((size - min(size, _PIECE_BYTES)) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


_PIECES, _PIECE_BYTES = 16, 64 << 10
_PRINT_BYTES, _TEXT_BYTES = 64, 32


def _fingerprint(text):
    """SHA-256 of a text, and its first bytes for people."""
    content = text.encode(errors="replace")
    return hashlib.sha256(content).digest() + content[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def _readable(fingerprint):
    text = fingerprint[-_TEXT_BYTES:].rstrip(b"\0").decode(errors="replace")
    return repr(one_line(text[:12] + "..." if len(text) == _TEXT_BYTES else text))


# --- places -----------------------------------------------------------------------------------------------------------


def _mpi_size(environ):
    """How many processes an MPI launcher says it started, or None. srun sets PMI_* too, for programs without MPI."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _number(environ, "OMPI_COMM_WORLD_SIZE", 1)
    if "PMI_SIZE" in environ and "SLURM_STEP_ID" not in environ:
        return _number(environ, "PMI_SIZE", 1)
    return None


def _place_of_mpi(expected):
    try:
        MPI = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"mpi4py cannot be imported ({first_line(error)}): reinstall it for the MPI of your mpirun"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != expected:
        raise BackendError(
            f"mpirun started {expected} processes, and mpi4py sees {world.Get_size()}: it was built for another MPI; "
            "reinstall it: pip install --force-reinstall --no-binary mpi4py mpi4py"
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    job = world.bcast(f"mpi {socket.gethostname()} {os.getpid()} {time.time_ns()}", root=0)
    return Place("mpi", world.Get_rank(), expected, host.Get_rank(), host.Get_size(), job=job, world=world)


def _place_of(environ, launcher, rank, ranks, local_rank, local_ranks, job):
    count = _number(environ, ranks, 1)
    number = _number(environ, rank, 0, count)
    if count == 1:
        return Place(launcher)
    # What users set for NCCL is what they want.
    address = environ.get("NCCL_COMM_ID")
    if address is not None:
        host, _, port_text = address.rpartition(":")
        host, name = host.strip("[]"), "NCCL_COMM_ID"
    else:
        host, port_text, name = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", ""), "MASTER_PORT"
        if not host or not port_text:
            missing = "MASTER_ADDR" if not host else "MASTER_PORT"
            how = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
            raise ValueError(f"{missing} is missing, where {count} ranks meet; in the job script of Slurm: {how}")
    if not port_text.isdecimal() or not 0 < int(port_text) < 65535 or not host:
        raise ValueError(f"{name} must be {'host:port' if address else 'a port, 1 to 65534'}, got {address or port_text!r}")
    local = _number(environ, local_rank, 0) if local_rank in environ else number
    local_count = environ.get(local_ranks, "")
    return Place(
        launcher,
        number,
        count,
        local,
        int(local_count) if local_count.isdecimal() else None,
        host,
        int(port_text),
        job=" ".join([launcher, host, port_text, *job]),
    )


def _number(environ, name, low, end=None):
    text = environ.get(name, "")
    if not text.isdecimal() or int(text) < low or (end is not None and int(text) >= end):
        bounds = f"of at least {low}" if end is None else f"in {low}..{end - 1}"
        raise ValueError(f"{name} must be a number {bounds}, got {text!r}")
    return int(text)


# --- joining ----------------------------------------------------------------------------------------------------------

_connections: Counter[str] = Counter()  # of this process, by job: ranks connect in the same order, so the count is shared


def _alone(backend) -> Comm:
    if backend == "numpy":
        return SoloComm()
    cupy = require_cupy()
    return SoloComm(cupy, cupy.cuda.runtime.getDevice())


def _join(place, backend, timeout):
    _refuse_loopback(place)
    device = _device_of(place) if backend == "cupy" else None
    details = {"backend": backend}
    if device is not None:
        details["gpu"] = _gpu_name(device)
    job = f"{place.job} {_connections[place.job]}"
    _connections[place.job] += 1
    watch = Watch(job, place.rank, place.ranks, details=details)
    if device is not None:
        watch.probes.append(lambda: _shared_gpu(watch, place.rank, details["gpu"]))
    try:
        if backend == "numpy":
            return _join_by_tcp(place, job, timeout, watch)
        with _group_id(place) as group_id:
            comm = nccl.NcclComm.join(place.rank, place.ranks, group_id, device, timeout=timeout, watch=watch)
        require_cupy().cuda.Device(device).use()
        return comm
    except BaseException as error:
        watch.fail(str(error) if isinstance(error, BackendError) else f"rank {place.rank} failed: {error!r}")
        watch.close()
        raise


def _join_by_tcp(place, job, timeout, watch):
    server, host, port = None, place.host, place.port
    if place.world is not None:
        if place.rank == 0:
            is_one_host = place.local_ranks == place.ranks
            server = socket.create_server(("127.0.0.1" if is_one_host else "", 0), backlog=place.ranks)
            host = "127.0.0.1" if is_one_host else socket.gethostname()
            port = server.getsockname()[1]
        host, port = place.world.bcast((host, port), root=0)
    return SocketComm.connect(place.rank, place.ranks, host, port, job=job, timeout=timeout, server=server, watch=watch)


@contextlib.contextmanager
def _group_id(place):
    """The id of the ranks' NCCL group, for as long as they join it."""
    if place.world is not None:
        yield place.world.bcast(nccl.unique_id() if place.rank == 0 else None, root=0)
        return
    # Rank 0 reads the variable again when it joins. Afterwards it would only disturb other users of NCCL in this process.
    before = os.environ.get("NCCL_COMM_ID")
    address = f"[{place.host}]:{place.port}" if ":" in place.host else f"{place.host}:{place.port}"
    os.environ["NCCL_COMM_ID"] = address
    try:
        try:
            group_id = nccl.unique_id()
        except BackendError as error:
            raise BackendError(f"rank {place.rank} cannot use {address}, from MASTER_ADDR and MASTER_PORT: {error}") from None
        yield group_id
    finally:
        if before is None:
            del os.environ["NCCL_COMM_ID"]
        else:
            os.environ["NCCL_COMM_ID"] = before


def _device_of(place):
    """The GPU of a rank: its number on the host, or the only one where the launcher shows each rank its own."""
    usable = _device.count()
    if usable == 0:
        raise BackendError(f"rank {place.rank} on {socket.gethostname()} sees no GPU; run `cupyq doctor` there")
    if place.local_rank < usable:
        return place.local_rank
    if usable == 1:
        return 0
    raise BackendError(
        f"rank {place.rank} is number {place.local_rank} on {socket.gethostname()}, which shows it {usable} GPUs: "
        "start one rank a GPU"
    )


def _gpu_name(device):
    return f"{socket.gethostname()} {require_cupy().cuda.Device(device).pci_bus_id}"


def _shared_gpu(watch, rank, gpu):
    """NCCL hangs where two ranks share a GPU (user guide, "Creating a Communicator"): the cause, or None."""
    for other, details in watch.peers().items():
        if details.get("gpu") == gpu:
            low, high = sorted((rank, other))
            return f"ranks {low} and {high} use the same GPU: start one rank a GPU, or set CUDA_VISIBLE_DEVICES for each"
    return None


def _refuse_loopback(place):
    """Debian maps a host's own name to 127.0.1.1: rank 0 would listen where no other host reaches it."""
    if place.rank != 0 or place.host is None or place.local_ranks is None or place.local_ranks >= place.ranks:
        return
    try:
        found = {info[4][0] for info in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)}
    except OSError:
        raise ValueError(f"MASTER_ADDR={place.host} has no address on rank 0's host: give its address in the cluster") from None
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        raise ValueError(
            f"MASTER_ADDR={place.host} is {min(found)} on rank 0's host, which other hosts cannot reach: give its address there"
        )
