"""The watchdog of ranks in processes: one that died, stopped or failed becomes an error on the others within seconds.

The ranks of a job share a small file: on one host in the temporary folder, across hosts where CUPYQ_WATCH_DIR names a
folder all of them see. Rank r owns slot r: it holds a lock on it while its process lives, which the kernel drops however
the process ends, and writes a beat into it several times a second, which stops when the process is stopped. Across hosts
without a common folder each host watches its own ranks; the others then learn of a death from the communicator.
"""

import hashlib
import json
import os
import socket
import tempfile
import threading
import time

try:
    import fcntl
except ImportError:  # Windows has other file locks
    fcntl = None  # type: ignore[assignment]

from cupyq.errors import BackendError, UnsupportedError
from cupyq.tp.comm import one_line, rank_names

_SLOT_BYTES = 2048
_GATE = 1 << 40  # this byte's lock serializes joining and leaving; locks may lie past the end of a file
_GRACE_S = 2.0  # a rank may close a moment before another one reads the result of the last collective

_open_paths: set[str] = set()  # POSIX drops all of a process's locks on a file when it closes any descriptor of it


class Watch:
    """Watches the other ranks of a job, and shows them that this one lives.

    job: a name that all ranks of the job share and no other job on the host has at the same time. limit_s: a rank whose
    beat stands still that long counts as stopped; death is noticed within `interval_s`. details: short texts the others
    can read in `peers()` (the GPU, for example). `check()` raises BackendError with the cause once there is one;
    `on_failure` functions are called with it, from the watching thread. Write `with Watch(...)` or call `close`.

    Locks are those of POSIX (fcntl(2)): held by a process, not handed on by fork, dropped when it ends.
    """

    def __init__(self, job, rank, ranks, *, folder=None, interval_s=0.25, limit_s=8.0, details=None):
        if fcntl is None:
            raise UnsupportedError("ranks in several processes need POSIX file locks, which this system lacks: use one process")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must lie in 0..{ranks - 1}, got {rank}")
        self.rank, self.ranks = rank, ranks
        self.failure = None
        self.on_failure = []
        self.probes = []  # called at every beat; what they return, if anything, is the cause of a failure
        self._interval_s, self._limit_s = interval_s, limit_s
        details = {name: one_line(text) for name, text in (details or {}).items()}
        self._slot = {"pid": os.getpid(), "host": socket.gethostname(), **details}
        self._beats = 0
        self._state = ("running", None)
        self._peers = {}  # rank -> its last slot, once it has been here
        self._changed_at = {}  # rank -> when its beat last moved
        self._left_at = {}
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self.path = os.path.join(_own_folder(folder), hashlib.sha256(str(job).encode()).hexdigest()[:24])
        self._file = self._join()
        self._thread = threading.Thread(target=self._run, name="cupyq watch", daemon=True)
        self._thread.start()

    # --- for the rank that is watched and watches ---

    def check(self):
        """Raise BackendError if some rank has failed."""
        if self.failure is not None:
            raise BackendError(self.failure)

    def check_waiting(self, what):
        """`check()` for a rank that waits for the others in `what`: there, one that has left is a failure as well."""
        self.check()
        now = time.monotonic()
        if gone := [rank for rank, since in list(self._left_at.items()) if now - since > _GRACE_S]:
            self.fail(f"{rank_names(gone)} closed while rank {self.rank} waits in {what}")
            self.check()

    def fail(self, cause):
        """Tell every rank the cause, this one's `on_failure` included. The first cause counts."""
        with self._mutex:
            if self.failure is not None or self._state[0] == "closed":
                return
            self.failure = one_line(cause)
            self._state = ("failed", self.failure)
            self._write()
        for tell in list(self.on_failure):
            tell(self.failure)

    def peers(self):
        """{rank: details} of the other ranks that have been seen here so far, living or not."""
        return dict(self._peers)

    def close(self):
        """Leave the job. The last one to leave removes the file."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        with self._mutex:
            if self._file is None:
                return
            self._state = ("closed", None) if self.failure is None else self._state
            self._write()
            self._leave()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            self.fail(f"rank {self.rank} failed: {kind.__name__}: {error}")
        self.close()

    # --- the file ---

    def _join(self):
        """The open file, with this rank's slot locked and filled."""
        if self.path in _open_paths:
            raise ValueError(f"job is already watched by this process ({self.path}): give each connection its own name")
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(file, fcntl.LOCK_EX, 1, _GATE)
            if _is_at(file, self.path):
                break
            os.close(file)  # the last rank of an earlier job removed it in between
        try:
            if self._is_alive(self.rank, file):
                other = _parse(os.pread(file, _SLOT_BYTES, self.rank * _SLOT_BYTES)) or {}
                raise BackendError(
                    f"rank {self.rank} is already taken by process {other.get('pid', 'unknown')}: start each rank once, "
                    "or end the processes of the earlier run"
                )
            # Written before it is locked: with the lock, what an earlier job left there would count.
            self._file = file
            self._write()
            fcntl.lockf(file, fcntl.LOCK_EX, 1, self.rank * _SLOT_BYTES)
        except BaseException:
            os.close(file)
            raise
        fcntl.lockf(file, fcntl.LOCK_UN, 1, _GATE)
        _open_paths.add(self.path)
        return file

    def _leave(self):
        file, self._file = self._file, None
        fcntl.lockf(file, fcntl.LOCK_EX, 1, _GATE)
        others = (rank for rank in range(self.ranks) if rank != self.rank)
        if _is_at(file, self.path) and not any(self._is_alive(rank, file) for rank in others):
            os.unlink(self.path)
        os.close(file)  # and with it all locks
        _open_paths.discard(self.path)

    def _write(self):
        """Called with the mutex held, but for the first time."""
        if self._file is None:
            return
        state, cause = self._state
        text = json.dumps({**self._slot, "beats": self._beats, "state": state, "cause": cause}, ensure_ascii=False)
        os.pwrite(self._file, text.encode(errors="replace").ljust(_SLOT_BYTES), self.rank * _SLOT_BYTES)

    def _is_alive(self, rank, file=None):
        """Whether another process holds the lock of a rank's slot."""
        file = self._file if file is None else file
        try:
            # Shared, so that two ranks that ask at the same time do not take each other for the owner.
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank * _SLOT_BYTES)
        except OSError:
            return True
        fcntl.lockf(file, fcntl.LOCK_UN, 1, rank * _SLOT_BYTES)
        return False

    # --- the thread ---

    def _run(self):
        before = time.monotonic()
        while not self._stop.wait(self._interval_s):
            now = time.monotonic()
            if now - before > self._limit_s / 2:
                # This process stood still itself (a debugger, a frozen container), and the others perhaps with it.
                self._changed_at = dict.fromkeys(self._changed_at, now)
            before = now
            with self._mutex:
                self._beats += 1
                self._write()
            if self.failure is None and (cause := self._look(now)) is not None:
                self.fail(cause)

    def _look(self, now):
        """The cause of a failure, or None."""
        content = os.pread(self._file, self.ranks * _SLOT_BYTES, 0)
        for rank in range(self.ranks):
            if rank == self.rank or rank in self._left_at:
                continue
            is_alive = self._is_alive(rank)
            found = _parse(content[rank * _SLOT_BYTES : (rank + 1) * _SLOT_BYTES])
            if not is_alive:
                # Its last words may be younger than `content`.
                found = _parse(os.pread(self._file, _SLOT_BYTES, rank * _SLOT_BYTES))
            known = self._peers.get(rank)
            if known is None and not is_alive:
                continue  # not there yet; the slot may hold what an earlier job left
            if known is None or (found is not None and found["beats"] != known["beats"]):
                self._changed_at[rank] = now
            found = self._peers[rank] = found or known or {"beats": None, "state": "running"}
            if found["state"] == "failed":
                return found["cause"]
            where = f"rank {rank} (process {found.get('pid')} on {found.get('host')})"
            if not is_alive and found["state"] == "closed":
                self._left_at[rank] = now
            elif not is_alive:
                return f"{where} died: its own output says why"
            elif now - self._changed_at[rank] > self._limit_s:
                return f"{where} has given no sign of life for {self._limit_s:g} s: it is stopped or hangs"
        # After the slots: where a rank died, that says more than the connection that broke with it.
        return next((cause for probe in list(self.probes) if (cause := probe()) is not None), None)


def _parse(content):
    """A slot's values; None where it is empty or half written."""
    try:
        slot = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return slot if isinstance(slot, dict) and {"beats", "state", "cause"} <= slot.keys() else None


def _is_at(file, path):
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _own_folder(folder):
    """The folder of the job files, made for this user alone where it is the default."""
    folder = folder or os.environ.get("CUPYQ_WATCH_DIR")
    if folder:
        os.makedirs(folder, exist_ok=True)
        return folder
    folder = os.path.join(tempfile.gettempdir(), f"cupyq-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise BackendError(f"{folder} belongs to another user: set CUPYQ_WATCH_DIR to a folder of your own")
    return folder
