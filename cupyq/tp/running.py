"""One process for all ranks: a thread for each."""

import threading

from cupyq import _device
from cupyq.tp.bootstrap import connect, find_place, group
from cupyq.tp.comm import one_line
from cupyq.tp.lockstep import Lockstep

_POLL_S = 0.2


def run(function, ranks, *, backend="auto", devices=None):
    """[function(comm) of each rank], each called in a thread of its own with the rank's Comm.

    ranks, backend and devices are those of `group`. On GPUs, a thread's GPU is its current one. The same function is what a
    process of `mpirun` or `torchrun` calls with the Comm that `connect` gives it. An error in one thread ends the work of all,
    and is raised here.
    """
    comms = group(ranks, backend=backend, devices=devices)
    lockstep = Lockstep(ranks) if ranks > 1 else None
    for comm in comms:
        comm._lockstep = lockstep
    results, errors = [None] * ranks, []

    def work(comm):
        try:
            with comm.on_device(), comm:
                results[comm.rank] = function(comm)
                if not comm._is_closed:
                    comm.barrier()  # none leaves while another may still need its memory
        except BaseException as error:
            errors.append(error)  # the first one is the cause of the others
            _end_all(comms, f"rank {comm.rank} failed: {type(error).__name__}: {one_line(error)}")

    threads = [threading.Thread(target=work, args=(comm,), name=f"cupyq rank {comm.rank}", daemon=True) for comm in comms]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():  # in turns, as a signal is only seen between them
                thread.join(_POLL_S)
    except BaseException as error:  # a KeyboardInterrupt comes to this thread
        _end_all(comms, f"{type(error).__name__} in the main thread")
        raise
    if errors:
        raise errors[0]
    return results


def as_launched(function, ranks=None, backend="auto"):
    """function(comm) on every rank: those a launcher started, else threads -> what rank 0's returned; None on the others.

    ranks: how many; None: as many as the launcher started, or as this process has GPUs.
    """
    if find_place().ranks > 1:
        with connect(ranks, backend=backend) as comm:
            result = function(comm)
            comm.barrier()  # none leaves while another may still need it
            return result if comm.rank == 0 else None
    if ranks is None:
        if _device.choose_backend(backend) == "numpy":
            raise ValueError("--tp: neither a GPU nor a launcher says how many parts to make of the model: give --tp 2, say")
        ranks = _device.count()
    return run(function, ranks, backend=backend)[0]


def _end_all(comms, cause):
    for comm in comms:
        if comm.failure is None and not comm._is_closed:
            comm._fail(cause)
