"""Ranks on GPUs, joined by NCCL: one process for each GPU, or one process and one thread for several.

Where the GPUs can write each other's memory, all-reduces up to some size go that way instead (peer.py).

Written for `cupy.cuda.nccl` of CuPy 14 and NCCL 2.18 or newer. In CuPy's class the constructor, `destroy` and `abort` run
without the interpreter's lock, so a thread beside them can watch (cupy_backends/cuda/libs/nccl.pyx).
"""

import contextlib
import functools
import importlib
import threading
import time
import warnings
import weakref

import numpy as np

from cupyq._arrays import bfloat16, first_line, float16, float32, int32, require_cupy
from cupyq._kernels import is_tracing
from cupyq._recording import spoil
from cupyq.errors import BackendError
from cupyq.tp import peer
from cupyq.tp.comm import STALL_S, Comm, one_line, rank_names

_POLL_S = 0.0001  # how often wait() looks: the time of a small all-reduce is tens of microseconds
_BUSY_S = 2.0  # a call of NCCL that takes longer hangs, and only an abort frees it


def nccl():
    """CuPy's module of NCCL, or a BackendError that says how to get it."""
    cupy = require_cupy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy explains its absence in ten lines
        module = importlib.import_module("cupy.cuda.nccl")
    if not module.available:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        raise BackendError(f"NCCL is missing, which joins several GPUs: pip install nvidia-nccl-cu{major}")
    return module


def unique_id():
    """The bytes that make communicators one group: one rank asks, all use them."""
    return _call("get_unique_id", nccl().get_unique_id)


class _Adopted:
    """A CUDA graph that ends with its communicator, whoever holds this."""

    def __init__(self, graph):
        self.graph = graph


class NcclComm(Comm):
    """A rank on a GPU. `NcclComm.group(devices)` drives several from one process, `NcclComm.join(...)` one from each.

    Work is queued on the CuPy current stream of the rank's device and ordered by it, so it can be captured in a CUDA graph;
    nothing waits but `barrier` and `wait`. In one process and thread collectives go within `together(comms)`. One stream of
    a device at a time: before another one has its turn, with a graph too, the work of the first has ended (`wait`).

    peer_memory: the PeerMemory that the GPUs write for each other; None where NCCL does all the work.
    """

    def __init__(self, communicator, rank, ranks, device, *, watch=None, stall_s=STALL_S):
        super().__init__(rank, ranks, device)
        self.xp = require_cupy()
        self._nccl = nccl()
        self._communicator = communicator
        self._watch, self._stall_s = watch, stall_s
        self._lock = threading.Lock()  # an abort from the watchdog frees what a call uses
        self._calls = 0
        self._abort_once = threading.Lock()
        self._aborting = None  # the thread that aborts, once something failed
        self.peer_memory = None
        self._launches = []  # within together(): (stream, launch, is it new to this GPU) of kernels that exchange by it
        self._graphs = weakref.WeakSet()  # those of adopt() that somebody still has
        self._lockstep = None  # with the other ranks' threads, where this process has them
        names = {float16: "FLOAT16", bfloat16: "BFLOAT16", float32: "FLOAT32", int32: "INT32"}
        self._types = {dtype: getattr(self._nccl, f"NCCL_{name}") for dtype, name in names.items()}
        with self.xp.cuda.Device(device):
            self._token = self.xp.zeros(1, np.int32)  # what a barrier sums
        if watch is not None:
            watch.probes.append(self._probe)
            watch.on_failure.append(self._fail)

    @classmethod
    def group(cls, devices):
        """Communicators of one process, one for each of these GPUs; use them within `together`."""
        devices = [int(device) for device in devices]
        if len(set(devices)) != len(devices) or not devices:
            raise ValueError(f"devices must name GPUs, each once (NCCL takes one rank for each GPU), got {devices}")
        found = _call("initAll", nccl().NcclCommunicator.initAll, devices)
        comms = tuple(
            cls(comm, rank, len(devices), device) for rank, (comm, device) in enumerate(zip(found, devices, strict=True))
        )
        for comm, memory in zip(comms, peer.group(comms) or (), strict=False):
            comm.peer_memory = memory
        return comms

    @classmethod
    def join(cls, rank, ranks, group_id, device, *, timeout=60.0, watch=None, stall_s=STALL_S):
        """This process's communicator, once all `ranks` processes have called with the same `group_id`.

        BackendError after `timeout` seconds: NCCL itself would wait for ever for a rank that never starts.
        """
        cupy, module = require_cupy(), nccl()
        result = {}

        def start():
            try:
                with cupy.cuda.Device(device):
                    result["communicator"] = module.NcclCommunicator(ranks, group_id, rank)
            except Exception as error:
                result["error"] = error

        thread = threading.Thread(target=start, name="cupyq NCCL init", daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout
        while thread.is_alive():
            thread.join(0.05)
            if watch is not None:
                watch.check_waiting("connect")
            if thread.is_alive() and time.monotonic() > deadline:
                raise BackendError(_who_is_missing(rank, ranks, timeout, watch))
        if "error" in result:
            raise BackendError(f"NCCL could not join rank {rank} of {ranks} ({first_line(result['error'])}): {_HOW_TO_SEE}")
        comm = cls(result["communicator"], rank, ranks, device, watch=watch, stall_s=stall_s)
        try:
            comm.peer_memory = peer.join(comm)
        except BaseException as error:
            comm.abort(error)
            comm.close()
            raise
        return comm

    def check(self):
        if self.failure is None and self._watch is not None:
            self.failure = self._watch.failure
        if self.failure is None and self.peer_memory is not None and (cause := self.peer_memory.failure()) is not None:
            self._fail(cause)
        super().check()

    def wait(self):
        with self.on_device():
            event = self.xp.cuda.Event(disable_timing=True)
            event.record(self.xp.cuda.get_current_stream())
        self._wait_for(event, "wait")

    def _wait_for(self, event, what):
        deadline = time.monotonic() + self._stall_s
        while not event.done:
            self.check()
            if self._watch is not None:
                self._watch.check_waiting(what)
            if time.monotonic() > deadline:
                self._stop(f"rank {self.rank} has waited {self._stall_s:g} s in {what}: some rank did not make the same calls")
            time.sleep(_POLL_S)
        self.check()

    def adopt(self, graph):
        adopted = _Adopted(graph)
        self._graphs.add(adopted)
        return adopted

    def launch(self, graph):
        self.check()
        self._in_turn("a graph", graph.graph.launch)

    def _all_reduce(self, array, out):
        memory = self.peer_memory
        if memory is not None and memory.way_of(array.nbytes):
            self._exchange("sum", functools.partial(memory.all_reduce, array, out), array, out)
            return
        source, target = array.data.ptr, out.data.ptr
        kind = self._types[array.dtype]
        self._queue(("allReduce", source, target, array.size, kind, self._nccl.NCCL_SUM))

    def _all_reduce_norm(self, array, weight, eps, order, out):
        memory = self.peer_memory
        if memory is None or not memory.fits_norm(array.size // max(1, weight.size), weight.size, out.dtype):
            super()._all_reduce_norm(array, weight, eps, order, out)
            return
        work = functools.partial(memory.all_reduce_norm, array, weight, out, eps, order=order)
        if is_tracing():  # it is noted
            work(is_empty=True)
            return
        self._exchange("norm", work, array, weight, out, *(() if order is None else (order,)))

    def _exchange(self, name, launch, *arrays):
        """Queue one kernel that exchanges by peer memory, by launch(is_empty=...). name, arrays: what decides which it is."""
        self.check()
        spoil()
        self._calls += 1
        kind = name, *((array.dtype, array.shape, array.data.ptr % 32) for array in arrays)
        is_new = self.peer_memory.needs_loading(kind)
        if self._later is not None:
            with self.on_device():
                self._launches.append((self.xp.cuda.get_current_stream(), launch, is_new))
            return
        if is_new and self._lockstep is not None:
            with self.on_device():
                launch(is_empty=True)
        self._in_turn(name, functools.partial(launch, is_empty=False))

    def _in_turn(self, name, work):
        """Do what makes the GPU wait for other ranks, on this device's current stream."""
        if self._lockstep is None or self._later is not None:
            with self.on_device():
                work()
            return
        self._lockstep.come(self, name, self._placed(work))

    def _placed(self, work):
        """`work` for another time or thread: on the stream that is this device's current one now."""
        with self.on_device():
            stream = self.xp.cuda.get_current_stream()

        def placed():
            with self.on_device(), stream:
                work()

        return placed

    def _all_gather(self, array, flat, ends):
        kind, item = self._types[array.dtype], array.dtype.itemsize
        if all(end == array.size * (rank + 1) for rank, end in enumerate(ends)):
            self._queue(("allGather", array.data.ptr, flat.data.ptr, array.size, kind))
            return
        # NCCL gathers equal parts only. Unequal ones are broadcasts of every rank in one group, which it runs as one.
        parts = []
        for rank, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            if begin < end:
                target = flat.data.ptr + begin * item
                source = array.data.ptr if rank == self.rank else target
                parts.append(("broadcast", source, target, end - begin, kind, rank))
        self._queue(*parts)

    def _broadcast(self, array, root):
        self._queue(("broadcast", array.data.ptr, array.data.ptr, array.size, self._types[array.dtype], root))

    def _barrier(self):
        token = self._token.data.ptr
        self._queue(("allReduce", token, token, 1, self._types[int32], self._nccl.NCCL_SUM))
        self._follow(self.wait)

    def _follow(self, work):
        if self._later is None:
            super()._follow(work)
        else:
            self._later.append(self._placed(work))

    def _queue(self, *operations):
        """Queue operations of NCCL, each (name, *arguments) and all as one, on this device's current stream."""
        self.check()
        spoil()
        self._calls += 1
        self._in_turn(" ".join(name for name, *_ in operations), functools.partial(self._call_all, operations))

    def _call_all(self, operations):
        with self._lock:
            self.check()
            stream = self.xp.cuda.get_current_stream().ptr
            try:
                with self._grouped() if len(operations) > 1 else contextlib.nullcontext():
                    for name, *arguments in operations:
                        getattr(self._communicator, name)(*arguments, stream)
                return
            except _NCCL_ERRORS as error:
                problem = one_line(error)
        self._stop(f"rank {self.rank}: NCCL's {operations[0][0]} failed ({problem}): {_HOW_TO_SEE}")

    @contextlib.contextmanager
    def _grouped(self, comms=()):
        """A group of NCCL's. Where it goes wrong, its end may wait for calls that nobody made: aborting `comms` frees it."""
        _call("groupStart", self._nccl.groupStart)
        try:
            yield
        except BaseException as error:
            causes = [f"rank {comm.rank} failed: {type(error).__name__}: {error}" for comm in comms]
            rescue = threading.Timer(_BUSY_S, lambda: [c._fail(text) for c, text in zip(comms, causes, strict=True)])
            rescue.daemon = True
            rescue.start()
            with contextlib.suppress(*_NCCL_ERRORS):
                self._nccl.groupEnd()
            rescue.cancel()
            raise
        _call("groupEnd", self._nccl.groupEnd)

    @contextlib.contextmanager
    def _together(self, comms):
        # NCCL launches on all devices at the end of the group: before it, the first would wait for the others.
        with self._grouped(comms):
            before = {comm: comm._calls for comm in comms}
            yield
            done = {comm.rank: comm._calls - count for comm, count in before.items()}
            if len(set(done.values())) > 1:
                fewest = min(done.values())
                late = rank_names(rank for rank, count in done.items() if count == fewest)
                raise BackendError(f"{late} did not come to collective {fewest} before together() ended")
            _launch_in_turn(comms)

    def _check(self, array, dtypes, writes=False, name="array"):
        super()._check(array, dtypes, writes, name)
        self._check_device(array, name)

    def _output(self, out, shape, dtype, name="out"):
        out = super()._output(out, shape, dtype, name)
        self._check_device(out, name)
        return out

    def on_device(self):
        return self.xp.cuda.Device(self.device)

    def _check_device(self, array, name):
        if array.data.device_id != self.device:
            raise ValueError(f"{name} is on GPU {array.data.device_id}, rank {self.rank} on GPU {self.device}: move it there")

    def _probe(self):
        """What NCCL has noticed by itself, such as a connection to another host that broke; None while all is well."""
        if self._aborting is not None or self._is_closed or not self._lock.acquire(blocking=False):
            return None
        try:
            self._communicator.check_async_error()
        except _NCCL_ERRORS as error:
            return f"rank {self.rank}: NCCL reports {one_line(error)}, so some other rank or its network failed: {_HOW_TO_SEE}"
        finally:
            self._lock.release()
        return None

    def _stop(self, cause):
        self._fail(cause)
        self.check()

    def _fail(self, cause):
        """Free the GPU of kernels that wait for a rank which will not come; called by the watchdog's thread as well."""
        with self._abort_once:
            if self._aborting is not None:
                return
            super()._fail(self.failure or one_line(cause))
            # NCCL's abort first stops its kernels, then waits for the end of every CUDA graph that holds some: a decoder's
            # lives on in whoever has the error to handle, who must not wait for it in turn.
            self._aborting = threading.Thread(target=self._abort, name=f"cupyq NCCL abort {self.rank}", daemon=True)
            self._aborting.start()
        if self.peer_memory is not None:
            self.peer_memory.stop()
        if self._watch is not None:
            self._watch.fail(self.failure)

    def _abort(self):
        # A call that holds the lock for long hangs inside NCCL, and returns when it is aborted.
        is_held = self._lock.acquire(timeout=_BUSY_S)
        # Source: NCCL user guide, ncclCommAbort "frees resources ... aborts any uncompleted operations".
        with contextlib.suppress(*_NCCL_ERRORS):  # the cause is known already
            self._communicator.abort()
        if is_held:
            self._lock.release()

    def _close(self):
        adopted = list(self._graphs)
        if adopted and self.failure is None:
            with self.on_device():
                self.xp.cuda.runtime.deviceSynchronize()  # while the watchdog still frees it where another rank dies
        for graph in adopted:
            graph.graph = None
        if self._watch is not None:
            self._watch.close()
        if self.peer_memory is not None:
            memory, self.peer_memory = self.peer_memory, None
            memory.close()
        ending = self._aborting
        if ending is None:  # waits, too, for graphs that were not adopted
            ending = threading.Thread(target=self._destroy, name=f"cupyq NCCL end {self.rank}", daemon=True)
            ending.start()
        ending.join(_BUSY_S)

    def _destroy(self):
        with self._lock, contextlib.suppress(*_NCCL_ERRORS):
            self._communicator.destroy()


# NcclError and CUDARuntimeError are RuntimeErrors; for a status that is missing in its table of names CuPy raises KeyError.
_NCCL_ERRORS = (RuntimeError, KeyError)

_HOW_TO_SEE = "NCCL_DEBUG=WARN shows its own words"


def _launch_in_turn(comms):
    """What `together` has held back, first the first of each rank. Loading a kernel may wait for a GPU: none waits before."""
    launches = [comm._launches for comm in comms]
    for comm in comms:
        comm._launches = []
    if len(set(map(len, launches))) > 1:
        raise BackendError("within together() the ranks came to all_reduce with arrays of different sizes")
    for is_empty in (True, False):
        for turn in zip(*launches, strict=True):
            for comm, (stream, launch, is_new) in zip(comms, turn, strict=True):
                if is_new or not is_empty:
                    with comm.on_device(), stream:
                        launch(is_empty=is_empty)


def _call(name, function, *arguments):
    try:
        return function(*arguments)
    except _NCCL_ERRORS as error:
        raise BackendError(f"NCCL's {name} failed ({first_line(error)}): {_HOW_TO_SEE}") from None


def _who_is_missing(rank, ranks, timeout, watch):
    here = {rank, *(watch.peers() if watch is not None else ())}
    text = f"{ranks} ranks did not meet within {timeout:g} s; on this host there "
    text += f"{'is' if len(here) == 1 else 'are'} {rank_names(here)}"
    return f"{text}, the others never came: start every rank, with an address of rank 0 in a network all hosts share"
