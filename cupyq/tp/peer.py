"""Memory that the GPUs of one host write for each other: small all-reduces in a few microseconds, where NCCL takes tens.

Each rank keeps a mailbox (ops/all_reduce.py lays it out, cu/all_reduce.cuh says what travels through it). Within a process the
others use its address, between processes a handle of CUDA IPC. Before anything relies on it, all ranks sum known values. Where
that or anything before fails, NCCL does all the work, and one line on stderr says why. CUPYQ_TP_PEER=0 leaves it out.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import struct
import sys
from pathlib import Path

import numpy as np

from cupyq import _device
from cupyq._arrays import first_line, float16, require_cupy
from cupyq.errors import BackendError
from cupyq.ops.all_reduce import (
    GAVE_UP_STOPPED,
    MOST_RANKS,
    TWO_SHOT_ROUND_BYTES,
    Mailbox,
    choose_way,
    launch_all_reduce,
    launch_all_reduce_norm,
    norm_fits,
)
from cupyq.tp.comm import gather_bytes, one_line, rank_names

WAIT_S = 30.0
"""How long a kernel waits for the other ranks. Those that died are noticed sooner, by the watchdog; a rank that compiles a
kernel first may be that late."""

_TEST_WAIT_S = 10.0
_TEXT_BYTES = 160
_CARD = struct.Struct(f"<64s32si{_TEXT_BYTES}s")  # what a process tells of itself: IPC handle, host, architecture, problem
_CLUSTERS_FROM = 90  # the oldest architecture with clusters of thread blocks
_HOST_ALLOC = 0x01 | 0x02  # cudaHostAllocPortable, cudaHostAllocMapped: every GPU may read and write it
_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled
# CuPy's errors of the runtime and of the driver are RuntimeErrors.
_CUDA_ERRORS = (RuntimeError,)


class PeerMemory:
    """One rank's mailbox, and the way to those of the others.

    The memory comes from CUDA itself, not from CuPy's pool: IPC shares whole allocations. `close` gives it back. A graph that
    was captured with it must not be launched after that.
    """

    def __init__(self, rank, ranks, device):
        self.rank, self.ranks, self.device = rank, ranks, device
        self.mailbox = Mailbox(ranks)
        self.address = self._host = 0
        self.have_clusters = False  # whether the GPUs of all ranks do: they agree in what depends on it
        self._opened = []  # addresses of other processes' mailboxes
        self._tables = {}
        self._loaded = set()  # kernels that this GPU has
        self._runtime = require_cupy().cuda.runtime
        try:
            with self.on_device():
                self.address = self._runtime.malloc(self.mailbox.size)
                self._runtime.memset(self.address, 0, self.mailbox.size)
                self._host = self._runtime.hostAlloc(4096, _HOST_ALLOC)
                ctypes.memset(self._host, 0, 4096)
                self._runtime.deviceSynchronize()
        except BaseException:
            self.close()
            raise

    def handle(self):
        """What another process opens the mailbox with."""
        with self.on_device():
            return bytes(self._runtime.ipcGetMemHandle(self.address))

    def open(self, handles):
        """The addresses of all ranks' mailboxes, of which other processes gave these handles."""
        with self.on_device():
            for rank, handle in enumerate(handles):
                if rank != self.rank:
                    self._opened.append(self._runtime.ipcOpenMemHandle(handle))
        others = iter(self._opened)
        return [self.address if rank == self.rank else next(others) for rank in range(self.ranks)]

    def connect(self, addresses, wait_s):
        """Use the mailboxes at these addresses. wait_s: how long a kernel waits for the other ranks.

        Compiles and loads the kernels of the test as well, so that no rank is late for it.
        """
        self._tables = self.mailbox.tables(self.rank, addresses, self._host, wait_s)
        with self.on_device():
            array = require_cupy().asarray(np.zeros(16, float16))
            for way in ("one_shot", "two_shot"):
                self.all_reduce(array, array, way=way, is_empty=True)
            self._runtime.deviceSynchronize()

    def wait_for(self, wait_s):
        """How long kernels wait for the other ranks from now on."""
        self._tables = {name: table.copy() for name, table in self._tables.items()}
        for table in self._tables.values():
            table["limit_ns"] = int(wait_s * 1e9)

    # --- work; on the current stream, within this rank's device ---

    def way_of(self, size_bytes):
        """The kernel that sums so many bytes, or None where NCCL does."""
        return choose_way(size_bytes, self.ranks)

    def fits_norm(self, rows, dim, dtype):
        """Whether `all_reduce_norm` had best do so many float32 rows, to be normed into `dtype`: the same on all ranks."""
        return self.have_clusters and norm_fits(rows, dim, dtype)

    def all_reduce(self, array, out, *, way=None, is_empty=False):
        """out = the sum of array over the ranks."""
        way = way or self.way_of(array.nbytes)
        launch_all_reduce(array, out, self._tables[way], self.ranks, way, is_empty=is_empty)

    def all_reduce_norm(self, array, weight, out, eps, *, order=None, is_empty=False):
        """array = its sum over the ranks; out = rms_norm of it, its columns in `order` where that is given."""
        table = self._tables["norm"]
        launch_all_reduce_norm(array, weight, out, table, self.ranks, eps, order=order, is_empty=is_empty)

    def needs_loading(self, kind):
        """Whether a kind of launch is new here; once."""
        is_new = kind not in self._loaded
        self._loaded.add(kind)
        return is_new

    # --- failures ---

    def stop(self):
        """Let no kernel wait any longer. A store to memory: any thread may call this."""
        if self._host:
            ctypes.c_uint32.from_address(self._host).value = 1

    def failure(self):
        """Why a kernel gave up waiting, or None. Results since then are meaningless."""
        word = ctypes.c_uint32.from_address(self._host + 4).value if self._host else 0
        if word == 0:
            return None
        missing = rank_names(rank for rank in range(self.ranks) if word >> rank & 1)
        if word & GAVE_UP_STOPPED:
            return f"rank {self.rank} was stopped while it waited for {missing} in an all-reduce"
        return f"rank {self.rank} waited in vain for {missing} in an all-reduce: some rank did not make the same calls"

    def close(self):
        """Give the memory back, once this GPU's work is done. Closing twice is allowed."""
        with contextlib.suppress(*_CUDA_ERRORS), self.on_device():
            if self.address:
                self._runtime.deviceSynchronize()
        opened, self._opened = self._opened, []
        for address in opened:
            with contextlib.suppress(*_CUDA_ERRORS), self.on_device():
                self._runtime.ipcCloseMemHandle(address)
        address, self.address = self.address, 0
        host, self._host = self._host, 0
        self._tables = {}
        with contextlib.suppress(*_CUDA_ERRORS), self.on_device():
            if address:
                self._runtime.free(address)
            if host:
                self._runtime.freeHost(host)

    def on_device(self):
        """A context in which this rank's GPU is the current one."""
        return require_cupy().cuda.Device(self.device)


def group(comms):
    """A PeerMemory for each of the communicators of one process, or None after a line that says why not."""
    devices = [comm.device for comm in comms]
    if not _is_wanted(len(comms)):
        return None
    memories = []
    try:
        problem = _enable_access(devices)
        if problem is None:
            memories += [PeerMemory(comm.rank, comm.ranks, comm.device) for comm in comms]
            oldest = min(map(_arch_number, devices))
            for memory in memories:
                memory.have_clusters = oldest >= _CLUSTERS_FROM
                memory.connect([other.address for other in memories], _TEST_WAIT_S)
            problem = _test(memories)
    except _CUDA_ERRORS + (AttributeError, BackendError) as error:
        problem = first_line(error)
    if problem is None:
        return memories
    for memory in memories:
        memory.stop()
    for memory in memories:
        memory.close()
    _announce(problem)
    return None


def join(comm):
    """This process's PeerMemory among those of the other ranks, or None on all of them after a line of rank 0 that says why.

    Every rank calls it, on the host or hosts of all; what they tell each other goes through `comm.all_gather`.
    """
    if comm.ranks < 2:
        return None
    memory, problem, handle, arch = None, None, b"", 0
    try:
        if not _is_wanted(comm.ranks):
            problem = (
                "CUPYQ_TP_PEER=0" if comm.ranks <= MOST_RANKS else f"there are {comm.ranks} ranks, at most {MOST_RANKS} can"
            )
        else:
            memory = PeerMemory(comm.rank, comm.ranks, comm.device)
            handle, arch = memory.handle(), _arch_number(comm.device)
    except _CUDA_ERRORS + (AttributeError,) as error:
        problem = first_line(error)
    cards = gather_bytes(comm, _CARD.pack(handle, _host_digest(), arch, _text(problem)))
    handles, hosts, archs, problems = zip(*map(_CARD.unpack, cards), strict=True)
    problem = _first_problem(problems)
    if problem is None and len(set(hosts)) > 1:
        problem = "the ranks are on several hosts"
    if problem is None:
        problem = _agree(comm, lambda: memory.connect(memory.open(handles), _TEST_WAIT_S))
    if problem is None:
        problem = _agree(comm, lambda: _test([memory]))
    if problem is None:
        memory.have_clusters = min(archs) >= _CLUSTERS_FROM
        return memory
    if memory is not None:
        memory.close()
    if comm.rank == 0:
        _announce(problem)
    return None


def _arch_number(device):
    return _device.arch_number(_device.info(device).arch)


def _is_wanted(ranks):
    return 2 <= ranks <= MOST_RANKS and os.environ.get("CUPYQ_TP_PEER") != "0"


def _announce(problem):
    if os.environ.get("CUPYQ_TP_PEER") != "0":
        print(f"cupyq: all-reduces go through NCCL alone, as GPUs cannot use each other's memory: {problem}", file=sys.stderr)


def _enable_access(devices):
    """Let each GPU reach the memory of the others; what hinders it, or None."""
    cupy = require_cupy()
    runtime = cupy.cuda.runtime
    pairs = [(device, other) for device in devices for other in devices if device != other]
    for device, other in pairs:
        if not runtime.deviceCanAccessPeer(device, other):
            return f"GPU {device} has no access to the memory of GPU {other}"
    for device, other in pairs:
        with cupy.cuda.Device(device):
            try:
                runtime.deviceEnablePeerAccess(other)
            except runtime.CUDARuntimeError as error:
                if error.status != _ALREADY_ENABLED:
                    raise
    return None


def _test(memories):
    """Sum known values by both kernels, also in shapes that leave no block or piece full; what was wrong, or None.

    Sums of whole numbers that float16 holds: right in any order, but not with a value that is missing, old or from elsewhere.
    """
    cupy = require_cupy()
    ranks = memories[0].ranks
    cases = [("one_shot", 1), ("one_shot", 5003), ("one_shot", 4), ("one_shot", 40_000), ("two_shot", 70_001)]
    cases += [("two_shot", TWO_SHOT_ROUND_BYTES // 2 + 4099), ("one_shot", 129), ("two_shot", 7), ("one_shot", 5003)]
    arrays = {}
    for memory in memories:
        with memory.on_device():
            for index, (_, size) in enumerate(cases):
                values = (np.arange(size) * (index + 1) % 199 + memory.rank).astype(float16)
                arrays[memory.rank, index] = cupy.asarray(values), cupy.asarray(np.full(size, np.nan, float16))
    for index, (way, _) in enumerate(cases):
        for memory in memories:
            with memory.on_device():
                memory.all_reduce(*arrays[memory.rank, index], way=way)
    for memory in memories:
        with memory.on_device():
            cupy.cuda.get_current_stream().synchronize()
        if memory.failure() is not None:
            return f"in a test, {memory.failure()}"
    for index, (way, size) in enumerate(cases):
        expected = (np.arange(size) * (index + 1) % 199 * ranks + ranks * (ranks - 1) // 2).astype(float16)
        for memory in memories:
            with memory.on_device():
                found = arrays[memory.rank, index][1].get()
            if not np.array_equal(found, expected):
                wrong = np.flatnonzero(found != expected)
                what = f"{len(wrong)} of {size} sums by all_reduce_{way}"
                return f"in a test, {what} were wrong on rank {memory.rank}, the first at {wrong[0]}"
    for memory in memories:
        memory.wait_for(WAIT_S)
    return None


def _agree(comm, action):
    """Do it on every rank; the problem of the first rank that has one, or None, the same on all."""
    try:
        problem = action()
    except _CUDA_ERRORS + (AttributeError, BackendError) as error:
        problem = first_line(error)
    return _first_problem(gather_bytes(comm, _text(problem)))


def _first_problem(texts):
    found = next(((rank, text) for rank, text in enumerate(texts) if any(text)), None)
    return None if found is None else f"rank {found[0]}: {found[1].rstrip(bytes(1)).decode(errors='replace')}"


def _text(problem):
    return one_line(problem or "").encode(errors="replace")[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def _host_digest():
    """The same for the processes of one running system; CUDA IPC reaches no further."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = b""
    return hashlib.sha256(platform.node().encode(errors="replace") + b"\0" + boot).digest()
