"""Threads of one process in lockstep: all come before their GPUs exchange anything, and the last to come queues it for all.

A kernel that waits for another rank keeps its GPU busy until that rank's kernel runs. Meanwhile nobody in the process may
depend on an idle GPU, yet CUDA waits for one in many calls: loading a kernel, taking pinned or device memory, freeing it
(CUDA C++ programming guide, "Implicit Synchronization"). So no kernel that waits is queued before its partners can be, and
all are queued by one thread while the others stand still.
"""

import threading
import time

from cupyq.errors import BackendError
from cupyq.tp.comm import STALL_S, one_line, rank_names

_CHECK_S = 0.2  # how often a thread that waits here looks whether its rank has been told of a failure


class Lockstep:
    """Of `ranks` threads, one for each rank."""

    def __init__(self, ranks, stall_s=STALL_S):
        self._ranks, self._stall_s = ranks, stall_s
        self._condition = threading.Condition()
        self._here = {}  # rank -> (communicator, name, work)
        self._round = 0
        self._problem = None

    def come(self, comm, name, work):
        """work() of each rank, one after the other within `comm._grouped`, once all ranks have come with the same `name`."""
        with self._condition:
            self._refuse()
            self._here[comm.rank] = comm, name, work
            if len(self._here) == self._ranks:
                self._do_all()
                return
            this, deadline = self._round, time.monotonic() + self._stall_s
            while self._round == this and self._problem is None:
                self._condition.wait(_CHECK_S)
                comm.check()
                if self._round == this and time.monotonic() > deadline:
                    missing = rank_names(set(range(self._ranks)) - self._here.keys())
                    comm.abort(f"it has waited {self._stall_s:g} s for {missing} in {name}")
                    comm.check()
            self._refuse()

    def _do_all(self):
        here, self._here = [self._here[rank] for rank in range(self._ranks)], {}
        try:
            names = [name for _, name, _ in here]
            if len(set(names)) > 1:
                raise BackendError(f"the ranks came to different calls: {', '.join(names)}, in the order of ranks")
            comms = [comm for comm, _, _ in here]
            with comms[0]._grouped(comms):
                for _, _, work in here:
                    work()
        except BaseException as error:
            self._problem = one_line(error)
            raise
        finally:
            self._round += 1
            self._condition.notify_all()

    def _refuse(self):
        if self._problem is not None:
            raise BackendError(self._problem)
