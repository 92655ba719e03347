"""Ranks as threads of one process on NumPy arrays, and the group of one rank: every parallel layer runs on a CPU."""

import contextlib
import threading
import time

import numpy as np

from cupyq.errors import BackendError
from cupyq.tp.comm import STALL_S, Comm, rank_names, sum_in_rank_order


class SoloComm(Comm):
    """The group of one rank: nothing is exchanged. Takes NumPy arrays, or with `xp=cupy` CuPy arrays."""

    def __init__(self, xp=np, device=None):
        super().__init__(0, 1, device)
        self.xp = xp

    def _all_reduce(self, array, out):
        if out is not array:
            out[...] = array

    def _all_gather(self, array, flat, ends):
        flat[...] = array.reshape(-1)

    def _broadcast(self, array, root):
        pass

    def _barrier(self):
        self.wait()

    def wait(self):
        self.check()
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    def on_device(self):
        return super().on_device() if self.device is None else self.xp.cuda.Device(self.device)


class _Room:
    """What the threads of a group share."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.changed = threading.Condition()
        self.meetings = {}  # number of the collective -> _Meeting, until every rank has come
        self.left = set()  # ranks that have closed
        self.failure = None


class _Meeting:
    """One collective: what each rank brought."""

    def __init__(self, ranks):
        self.brought = [None] * ranks  # (what they ask for, array, out)
        self.is_done = False

    def missing(self):
        return [rank for rank, brought in enumerate(self.brought) if brought is None]


class LocalComm(Comm):
    """A rank among threads of one process, on NumPy arrays. `LocalComm.group(ranks)` makes them."""

    def __init__(self, room, rank, stall_s):
        super().__init__(rank, room.ranks)
        self._room, self._stall_s = room, stall_s
        self._calls = 0

    @classmethod
    def group(cls, ranks, *, stall_s=STALL_S):
        """The communicators of `ranks` ranks, one for each thread. stall_s: how long one waits for the others."""
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        room = _Room(ranks)
        return tuple(cls(room, rank, stall_s) for rank in range(ranks))

    def check(self):
        self.failure = self.failure or self._room.failure
        super().check()

    def _all_reduce(self, array, out):
        self._meet(("all_reduce", array.dtype, array.shape), array, out)

    def _all_gather(self, array, flat, ends):
        self._meet(("all_gather", array.dtype, tuple(ends)), array, flat)

    def _broadcast(self, array, root):
        self._meet((f"broadcast from rank {root}", array.dtype, array.shape), array, array)

    def _barrier(self):
        self._meet(("barrier", None, ()), None, None)

    def _meet(self, wish, array, out):
        """Bring an array to the next collective; the last rank to come does the work for all."""
        room = self._room
        with room.changed:
            number, self._calls = self._calls, self._calls + 1
            meeting = room.meetings.setdefault(number, _Meeting(self.ranks))
            meeting.brought[self.rank] = (wish, array, out)
            if not meeting.missing():
                del room.meetings[number]
                self._work(meeting, number)
                room.changed.notify_all()
            elif self._later is None:
                self._wait_for(meeting, f"{wish[0]} number {number}")

    def _wait_for(self, meeting, what):
        room, deadline = self._room, time.monotonic() + self._stall_s
        while not meeting.is_done:
            self.check()
            if gone := room.left.intersection(meeting.missing()):
                self._fail(f"{rank_names(gone)} closed while rank {self.rank} waits in {what}")
            elif time.monotonic() > deadline:
                late = rank_names(meeting.missing())
                self._fail(f"{late} did not come to {what} within {self._stall_s:g} s, rank {self.rank} waits there")
            else:
                room.changed.wait(max(0.0, deadline - time.monotonic()))

    def _work(self, meeting, number):
        (wish, _, _), *others = meeting.brought
        for rank, (other, _, _) in enumerate(others, 1):
            if other != wish:
                self._fail(f"rank {rank} came to collective {number} with {_in_words(other)}, rank 0 with {_in_words(wish)}")
                self.check()
        kind, _, detail = wish
        arrays = [array for _, array, _ in meeting.brought]
        if kind == "all_reduce":
            total = sum_in_rank_order(arrays)
            for _, _, out in meeting.brought:
                out[...] = total
        elif kind == "all_gather":
            for _, _, flat in meeting.brought:
                for array, begin, end in zip(arrays, (0, *detail), detail, strict=False):
                    flat[begin:end] = array.reshape(-1)
        elif kind != "barrier":
            root = int(kind.split()[-1])
            for rank, array in enumerate(arrays):
                if rank != root:
                    array[...] = arrays[root]
        meeting.is_done = True

    @contextlib.contextmanager
    def _together(self, comms):
        yield
        room, here = self._room, {comm.rank for comm in comms}
        with room.changed:
            for number, meeting in sorted(room.meetings.items()):
                if missing := here.intersection(meeting.missing()):
                    raise BackendError(f"{rank_names(missing)} did not come to collective {number} before together() ended")
                self._wait_for(meeting, f"collective {number}")  # ranks of other threads may still come

    def _fail(self, cause):
        with self._room.changed:
            self._room.failure = self.failure = self._room.failure or cause
            self._room.changed.notify_all()

    def _close(self):
        with self._room.changed:
            self._room.left.add(self.rank)
            self._room.changed.notify_all()


def _in_words(wish):
    kind, dtype, detail = wish
    return kind if dtype is None else f"{kind} of {dtype} {detail}"
