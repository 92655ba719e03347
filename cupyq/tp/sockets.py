"""Ranks as processes on NumPy arrays, joined by TCP: tensor parallelism on CPUs, and what the launchers' door is tested with.

Every rank holds one connection to rank 0, which adds, joins and hands on: simple and exact, not fast. GPUs use NCCL. All
ranks of a job are trusted, as they are by NCCL: use it within a cluster's own network.
"""

import contextlib
import hashlib
import select
import socket
import struct
import time

import numpy as np

from cupyq.errors import BackendError
from cupyq.tp.comm import STALL_S, Comm, one_line, rank_names, sum_in_rank_order

_GREETING = struct.Struct("<8s16sII")  # what follows, digest of the job's name, rank, ranks
_MAGIC = b"cupyq-1\0"
_HEADER = struct.Struct("<16sQQ")  # digest of what is asked for, number of the collective, bytes of payload
_FAILED = b"failed".ljust(16, b"\0")
_READY = b"ready".ljust(16, b"\0")
_POLL_S = 0.1  # how often a rank that waits looks at the watchdog
_HEAR_S = 5.0
_PIECE = 1 << 20


class SocketComm(Comm):
    """A rank in a process of its own, on NumPy arrays. `SocketComm.connect(...)` on every rank makes the group."""

    def __init__(self, rank, ranks, links, *, watch=None, stall_s=STALL_S):
        super().__init__(rank, ranks)
        self._links = links  # rank -> socket: on rank 0 all the others, elsewhere rank 0
        self._watch, self._stall_s = watch, stall_s
        self._calls = 0
        self._has_failed = False  # and told the others

    @classmethod
    def connect(cls, rank, ranks, host, port, *, job="", timeout=60.0, server=None, watch=None, stall_s=STALL_S):
        """Join the group of `ranks` ranks that meets at `host`:`port`, where rank 0 listens.

        server: on rank 0 the listening socket, where there is one. BackendError names who did not come within `timeout`
        seconds, or came with another number of ranks.
        """
        meet = _accept_all if rank == 0 else _reach_first
        try:
            links = meet(_Meeting(rank, ranks, host, port, job, time.monotonic() + timeout, timeout, watch), server)
        except OSError as error:
            raise BackendError(f"rank {rank} cannot use {host}:{port} ({error}): set MASTER_ADDR and MASTER_PORT") from None
        return cls(rank, ranks, links, watch=watch, stall_s=stall_s)

    def check(self):
        if self.failure is None and self._watch is not None:
            self.failure = self._watch.failure
        super().check()

    def _all_reduce(self, array, out):
        def work(parts):
            total = sum_in_rank_order([array, *(np.frombuffer(part, array.dtype).reshape(array.shape) for part in parts[1:])])
            return [_bytes(total)] * self.ranks

        result = self._exchange(("all_reduce", array.dtype, array.shape), _bytes(array), work)
        _bytes(out)[:] = result

    def _all_gather(self, array, flat, ends):
        def work(parts):
            return [b"".join(parts)] * self.ranks

        result = self._exchange(("all_gather", array.dtype, tuple(ends)), _bytes(array), work)
        _bytes(flat)[:] = result

    def _broadcast(self, array, root):
        def work(parts):
            return [b"" if rank == root else parts[root] for rank in range(self.ranks)]

        mine = _bytes(array) if self.rank == root else b""
        result = self._exchange((f"broadcast from rank {root}", array.dtype, array.shape), mine, work)
        if self.rank != root:
            _bytes(array)[:] = result

    def _barrier(self):
        self._exchange(("barrier", None, ()), b"", lambda parts: [b""] * self.ranks)

    def _exchange(self, wish, mine, work):
        """Send this rank's bytes to rank 0, which answers each rank with what `work` makes of all of them."""
        number, self._calls = self._calls, self._calls + 1
        what = f"{wish[0]} number {number}"
        kind = hashlib.sha256(repr(wish).encode()).digest()[:16]
        # Rank 0 sees who is late and tells the others: they wait a little longer, to hear it.
        deadline = time.monotonic() + self._stall_s + (0 if self.rank == 0 else _HEAR_S)
        try:
            if self.rank != 0:
                self._send(0, kind, number, mine, what, deadline)
                return self._receive(0, kind, number, what, deadline)
            parts = [bytes(mine), *(self._receive(rank, kind, number, what, deadline) for rank in range(1, self.ranks))]
            answers = work(parts)
            for rank in range(1, self.ranks):
                self._send(rank, kind, number, answers[rank], what, deadline)
            return answers[0]
        except _Gone as gone:
            went = f"rank {gone.rank} went away while rank {self.rank} was in {what}: its own output says why"
            self._fail(_heard(self._links[gone.rank]) or went)
        except BackendError as error:
            self._fail(str(error))
        self.check()

    def _send(self, rank, kind, number, payload, what, deadline):
        self._wait(rank, what, deadline, writing=_HEADER.pack(kind, number, len(payload)))
        self._wait(rank, what, deadline, writing=payload)

    def _receive(self, rank, kind, number, what, deadline):
        found, other, size = _HEADER.unpack(self._wait(rank, what, deadline, reading=_HEADER.size))
        payload = self._wait(rank, what, deadline, reading=size)
        if found == _FAILED:
            raise BackendError(payload.decode(errors="replace"))
        if (found, other) != (kind, number):
            raise BackendError(
                f"rank {rank} came to collective {other} with another operation, dtype or shape than rank {self.rank}, "
                f"which is in {what}: every rank must make the same calls"
            )
        return payload

    def _wait(self, rank, what, deadline, *, reading=0, writing=b""):
        """Move bytes over one link, watching the others, and return what was read."""

        def watch():
            self.check()
            if self._watch is not None:
                self._watch.check_waiting(what)
            if time.monotonic() > deadline:
                raise BackendError(
                    f"rank {rank} did not come to {what} within {self._stall_s:g} s, rank {self.rank} waits there"
                )

        return _move(self._links[rank], rank, watch, reading, writing)

    def _fail(self, cause):
        if self._has_failed:
            return
        self._has_failed = True
        super()._fail(self.failure or one_line(cause))
        if self._watch is not None:
            self._watch.fail(self.failure)
            self.failure = self._watch.failure or self.failure
        text = self.failure.encode(errors="replace")
        for rank, link in self._links.items():
            try:
                _move(link, rank, _give_up, writing=_HEADER.pack(_FAILED, 0, len(text)) + text)
            except (_Gone, _Busy):
                pass  # it cannot be told this way

    def _close(self):
        for link in self._links.values():
            link.close()
        if self._watch is not None:
            self._watch.close()


class _Gone(Exception):
    """The process at the other end of a link has ended."""

    def __init__(self, rank):
        self.rank = rank


class _Busy(Exception):
    """The process at the other end of a link does not read just now."""


def _give_up():
    raise _Busy


def _is_ready(link, event):
    poll = select.poll()  # select() stops at descriptor 1024
    poll.register(link.fileno(), event)
    return bool(poll.poll(_POLL_S * 1000))


def _heard(link):
    """The cause that the other end sent before it went, or None: it may have come while this rank was sending."""
    try:
        content = b"".join(iter(lambda: link.recv(_PIECE), b""))
    except OSError:
        return None
    if len(content) < _HEADER.size or not content.startswith(_FAILED):
        return None
    return content[_HEADER.size :].decode(errors="replace")


def _bytes(array):
    """An array's bytes, as a view; NumPy's own buffers do not know bfloat16."""
    return array.reshape(-1).view(np.uint8).data


def _move(link, rank, watch, reading=0, writing=b""):
    """Write all of `writing`, then read `reading` bytes, calling `watch` whenever the link is not ready for a while."""
    link.setblocking(False)
    writing, received = memoryview(writing), bytearray()
    try:
        while writing:
            if _is_ready(link, select.POLLOUT):
                with contextlib.suppress(BlockingIOError):  # ready a moment ago
                    writing = writing[link.send(writing[:_PIECE]) :]
            else:
                watch()
        while len(received) < reading:
            if _is_ready(link, select.POLLIN):
                with contextlib.suppress(BlockingIOError):
                    piece = link.recv(min(_PIECE, reading - len(received)))
                    if not piece:
                        raise _Gone(rank)
                    received += piece
            else:
                watch()
    except (OSError, ValueError):  # ValueError: the socket is closed here
        raise _Gone(rank) from None
    return received


# --- meeting ----------------------------------------------------------------------------------------------------------


class _Meeting:
    """Where and when the ranks meet."""

    def __init__(self, rank, ranks, host, port, job, deadline, timeout, watch):
        self.rank, self.ranks, self.host, self.port = rank, ranks, host, port
        self.job = hashlib.sha256(str(job).encode()).digest()[:16]
        self.deadline, self.timeout, self._watch = deadline, timeout, watch

    def check(self):
        if self._watch is not None:
            self._watch.check_waiting("connect")

    def is_over(self):
        return time.monotonic() > self.deadline


def _accept_all(meeting, server):
    """On rank 0: the links to all other ranks."""
    links = {}
    family = socket.getaddrinfo(meeting.host, meeting.port, type=socket.SOCK_STREAM)[0][0] if server is None else None
    server = server or socket.create_server((meeting.host, meeting.port), family=family, backlog=meeting.ranks)
    try:
        with server:
            server.settimeout(_POLL_S)
            while len(links) < meeting.ranks - 1:
                meeting.check()
                if meeting.is_over():
                    late = rank_names(set(range(1, meeting.ranks)) - links.keys())
                    raise BackendError(
                        f"{late} of {meeting.ranks} did not come to {meeting.host}:{meeting.port} within "
                        f"{meeting.timeout:g} s: start every rank, with the same MASTER_ADDR and MASTER_PORT"
                    )
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    continue
                _greet(meeting, link, links)
    except BaseException as error:
        text = one_line(error).encode(errors="replace")
        for link in links.values():
            _last_words(link, text)
        raise
    for rank, link in links.items():
        _move(link, rank, _give_up, writing=_HEADER.pack(_READY, 0, 0))
    return links


def _greet(meeting, link, links):
    """Take in the rank at the other end of a new connection; strangers are sent away."""
    link.settimeout(2.0)
    try:
        greeting = link.recv(_GREETING.size, socket.MSG_WAITALL)
        magic, job, rank, ranks = _GREETING.unpack(greeting)
    except (OSError, struct.error):
        link.close()
        return
    if magic != _MAGIC or job != meeting.job:
        _last_words(link, b"another job of cupyq uses this address: give each its own MASTER_PORT")
        return
    problem = None
    if ranks != meeting.ranks:
        problem = f"rank {rank} was started as one of {ranks} ranks, rank 0 as one of {meeting.ranks}: give all the same number"
    elif not 0 < rank < ranks or rank in links:
        problem = f"rank {rank} came twice: give each process its own rank"
    if problem:
        _last_words(link, problem.encode())
        raise BackendError(problem)
    _set_up(link)
    links[rank] = link


def _set_up(link):
    """Small messages go at once; a host that vanishes without a word (power, cable) breaks the link within 7 s (tcp(7))."""
    options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 7000}
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has them all
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _last_words(link, text):
    try:
        _move(link, None, _give_up, writing=_HEADER.pack(_FAILED, 0, len(text)) + text)
        link.close()
    except (_Gone, _Busy):
        pass


def _reach_first(meeting, _):
    """On the others: the link to rank 0, once all have come."""
    reason = None
    while True:
        meeting.check()
        if meeting.is_over():
            raise BackendError(
                f"rank 0 did not answer rank {meeting.rank} at {meeting.host}:{meeting.port} within {meeting.timeout:g} s "
                f"({reason}): check that it runs and that MASTER_ADDR is its host"
            )
        try:
            link = socket.create_connection((meeting.host, meeting.port), timeout=2.0)
            break
        except OSError as error:  # not listening yet, or its name is not known yet
            reason = one_line(error)
            time.sleep(0.05)
    _set_up(link)

    def watch():
        meeting.check()
        # Rank 0 says who is missing when its time is over: hear it.
        if time.monotonic() > meeting.deadline + _HEAR_S:
            raise BackendError(
                f"rank 0 at {meeting.host}:{meeting.port} has not gathered all ranks within {meeting.timeout:g} s"
            )

    try:
        greeting = _GREETING.pack(_MAGIC, meeting.job, meeting.rank, meeting.ranks)
        found, _, size = _HEADER.unpack(_move(link, 0, watch, _HEADER.size, greeting))
        text = _move(link, 0, watch, size)
    except _Gone:
        raise BackendError(
            f"what answers at {meeting.host}:{meeting.port} is not rank 0, or has ended: look there, or set another MASTER_PORT"
        ) from None
    if found != _READY:
        raise BackendError(text.decode(errors="replace"))
    return {0: link}
