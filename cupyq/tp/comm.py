"""What ranks say to each other: sum, gather, broadcast, barrier. Here are the contract, its checks and the order of sums.

A rank holds one part of a model. `LocalComm` (threads, NumPy), `SocketComm` (processes, NumPy), `NcclComm` (GPUs) and
`SoloComm` (one rank) are its ways to the others; code written for `Comm` runs on each of them.
"""

import contextlib
import math

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, check, float16, float32, int32, output, refuse_partial_overlap
from cupyq._copies import to_host
from cupyq._kernels import is_tracing
from cupyq.errors import BackendError
from cupyq.ops._common import refuse_overlap
from cupyq.ops.norm import rms_norm

SUMMED = FLOATS
"""Dtypes `all_reduce` takes."""

MOVED = (*FLOATS, int32)
"""Dtypes `all_gather` and `broadcast` take."""

STALL_S = 600.0
"""How long a rank waits for the others in one collective. Loading or compiling on one of them may take minutes; a rank
that died or stopped is noticed within seconds by other means."""


class Comm:
    """One rank's end of a group of `ranks` ranks.

    Every rank calls the same collectives in the same order with arrays of the same dtype and shape. A rank that fails
    makes the others raise BackendError with the cause: leave by `with comm:` or call `abort`.

    rank, ranks: this rank's number, and how many there are. device: the GPU of this rank, None on the CPU.
    xp: the module, NumPy or CuPy, whose arrays it takes.
    """

    xp = np

    def __init__(self, rank, ranks, device=None):
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must lie in 0..{ranks - 1}, got {rank}")
        self.rank, self.ranks, self.device = rank, ranks, device
        self.failure = None  # why nothing can be said any more
        self._is_closed = False
        self._later = None  # within together(): what is to follow once every rank has spoken

    def all_reduce(self, array, out=None):
        """out = the sum of `array` over all ranks, the same bits on every rank.

        array: float16, bfloat16 or float32 of any shape, the same on all ranks; out: like it, or `array` itself.
        On the CPU the parts are added in the order of the ranks, 16-bit ones in float32, float32 in float64, with one
        rounding at the end; `tp.peer` adds in that order too, in float32; NCCL in one of its own, the same on every run.
        """
        self._check(array, SUMMED)
        out = self._output(out, array.shape, array.dtype)
        refuse_partial_overlap(out, array=array)
        self.check()
        self._all_reduce(array, out)
        return out

    def all_reduce_norm(self, array, weight, *, eps=1e-6, dtype=None, order=None, out=None):
        """Replace `array` by its sum over all ranks; returns rms_norm(array, weight, eps=eps, dtype=dtype, order=order) of it.

        array: float32 [..., dim], of the same shape on all ranks; weight, eps, dtype, order and out: as `ops.norm.rms_norm`
        takes them, out apart from the others. dtype, too, is the same on all ranks; order need not be. The sum is that of
        `all_reduce`. The same bits on every rank and every run; `tp.peer` adds up squares in another order than `rms_norm`.
        """
        self._check(array, (float32,), writes=True)
        self._check(weight, SUMMED, name="weight")
        if order is not None:
            self._check(order, (int32,), name="order")
            check(order, "order", ndim=1)
        check(weight, "weight", ndim=1, shape=array.shape[-1:])
        count = weight.size if order is None else order.size
        out = self._output(out, (*array.shape[:-1], count), array.dtype if dtype is None else np.dtype(dtype))
        check(out, "out", dtype=FLOATS)
        refuse_overlap(array, "array", weight=weight, order=order)
        refuse_overlap(out, "out", array=array, weight=weight, order=order)
        self.check()
        self._all_reduce_norm(array, weight, eps, order, out)
        return out

    def all_gather(self, array, out=None, *, axis=None, sizes=None, workspace=None):
        """out[r] = the `array` of rank r; with `axis`, the ranks' arrays joined along that axis.

        array: float16, bfloat16, float32 or int32. out: contiguous, [ranks, *array.shape], or with `axis` the shape of
        the joined array; it must not overlap `array`. sizes: with `axis`, each rank's length along it, where they
        differ; None: all have this one's. workspace: flat array of `out`'s size and dtype, which is used where the joined
        parts do not lie one behind the other in `out` (more than one row before `axis`); None allocates it.
        """
        self._check(array, MOVED)
        if axis is None:
            if sizes is not None:
                raise ValueError("sizes says how the ranks' parts differ along axis: give axis too")
            out = self._output(out, (self.ranks, *array.shape), array.dtype)
            rows, ends = 1, [array.size * (r + 1) for r in range(self.ranks)]
        else:
            axis, sizes = self._check_sizes(array, axis, sizes)
            before, after = array.shape[:axis], array.shape[axis + 1 :]
            out = self._output(out, (*before, sum(sizes), *after), array.dtype)
            rows = math.prod(before)
            ends = np.cumsum([rows * size * math.prod(after) for size in sizes]).tolist()
        if array.size:
            refuse_overlap(out, "out", array=array)
        self.check()
        flat = out.reshape(-1)
        if rows <= 1:
            self._all_gather(array, flat, ends)
            return out
        flat = self._output(workspace, (out.size,), out.dtype, "workspace")
        self._all_gather(array, flat, ends)

        def join():
            column = begin = 0
            for size, end in zip(sizes, ends, strict=True):
                part = flat[begin:end].reshape(*before, size, *after)
                out[(slice(None),) * axis + (slice(column, column + size),)] = part
                column, begin = column + size, end

        self._follow(join)
        return out

    def broadcast(self, array, root=0):
        """Write the `array` of rank `root` into that of every rank, and return it.

        array: float16, bfloat16, float32 or int32, of the same shape on all ranks; written on all but `root`.
        """
        self._check(array, MOVED, writes=self.rank != root)
        if not 0 <= root < self.ranks:
            raise ValueError(f"root must lie in 0..{self.ranks - 1}, got {root}")
        self.check()
        self._broadcast(array, root)
        return array

    def barrier(self):
        """Return once every rank has come here and, on a GPU, has done what its current stream held."""
        self.check()
        self._barrier()

    def adopt(self, graph):
        """What `launch` takes for a CUDA graph that holds collectives. The graph ends with this communicator."""
        return graph

    def launch(self, graph):
        """Queue a graph that was adopted on the current stream; every rank launches its own."""
        self.check()
        graph.launch()

    def wait(self):
        """Wait for this rank's current stream, watching the others meanwhile; on the CPU there is nothing to wait for.

        Call this, not `synchronize()`, before results are used: a rank that died makes it raise, not hang.
        """
        self.check()

    def check(self):
        """Raise BackendError where this or another rank has failed, or where this communicator is closed."""
        if self.failure is not None:
            raise BackendError(self.failure)
        if self._is_closed:
            raise BackendError(f"rank {self.rank} has closed this communicator: connect again")

    def on_device(self):
        """A context in which this rank's GPU is the current one: a thread may speak for several."""
        return contextlib.nullcontext()

    def abort(self, reason):
        """End the work of all ranks: each raises BackendError with `reason` in what it does now or next."""
        if self.failure is None and not self._is_closed:
            self._fail(f"rank {self.rank} failed: {one_line(reason)}")

    def close(self):
        """Leave the group. Every rank closes after the last collective; closing twice is allowed."""
        if not self._is_closed:
            self._is_closed = True
            self._close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            self.abort(f"{kind.__name__}: {error}")
        self.close()

    def __repr__(self):
        where = "" if self.device is None else f", GPU {self.device}"
        return f"{type(self).__name__}(rank {self.rank} of {self.ranks}{where})"

    # What a communicator provides. `ends`: where each rank's part ends in the flat result.

    def _all_reduce(self, array, out):
        raise BackendError(f"{type(self).__name__} cannot all_reduce")

    def _all_reduce_norm(self, array, weight, eps, order, out):
        if not is_tracing():
            self._all_reduce(array, array)
        self._follow(lambda: rms_norm(array, weight, eps=eps, dtype=out.dtype, order=order, out=out))

    def _follow(self, work):
        """Do it on this rank's device and present stream, once what was said before is there."""
        if self._later is None:
            with self.on_device():
                work()
        else:
            self._later.append(work)

    def _all_gather(self, array, flat, ends):
        raise BackendError(f"{type(self).__name__} cannot all_gather")

    def _broadcast(self, array, root):
        raise BackendError(f"{type(self).__name__} cannot broadcast")

    def _barrier(self):
        raise BackendError(f"{type(self).__name__} has no barrier")

    def _fail(self, cause):
        self.failure = cause

    def _close(self):
        pass

    @contextlib.contextmanager
    def _together(self, comms):
        yield

    def _check(self, array, dtypes, writes=False, name="array"):
        if not isinstance(array, self.xp.ndarray):
            raise TypeError(f"{name} must be an array of {self.xp.__name__} for {self!r}, got {type(array).__name__}")
        check(array, name, dtype=dtypes, writes=writes)

    def _output(self, out, shape, dtype, name="out"):
        with self.on_device():
            return output(self.xp, out, shape, dtype, name)

    def _check_sizes(self, array, axis, sizes):
        if not -array.ndim <= axis < array.ndim:
            raise ValueError(f"axis must lie in {-array.ndim}..{array.ndim - 1} for shape {array.shape}, got {axis}")
        axis %= array.ndim
        mine = array.shape[axis]
        sizes = [mine] * self.ranks if sizes is None else list(sizes)
        if len(sizes) != self.ranks or sizes[self.rank] != mine:
            raise ValueError(f"sizes must hold the lengths of {self.ranks} ranks, [{self.rank}] being {mine}, got {sizes}")
        return axis, sizes


@contextlib.contextmanager
def together(comms):
    """Within this context one thread speaks for all `comms` of its process: no collective waits for the others.

    The results are there when the context ends; until then inputs and outputs are left alone. Every rank must have come
    to every collective by then. `barrier` may be called too. Example: `with together(comms): for comm, array in zip(comms,
    arrays): comm.all_reduce(array, array)`. Source: NCCL user guide, "Management Of Multiple GPUs From One Thread"
    (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/groups.html).
    """
    comms = tuple(comms)
    if not comms or any(type(comm) is not type(comms[0]) for comm in comms):
        raise TypeError(f"comms must be communicators of one kind, got {[type(comm).__name__ for comm in comms]}")
    if any(comm._later is not None for comm in comms):
        raise ValueError("together() is already open for these communicators: leave it first")
    for comm in comms:
        comm._later = []
    try:
        with comms[0]._together(comms):
            yield
        for comm in comms:
            for follow in comm._later:
                follow()
    except BaseException as error:
        # Some ranks have spoken and some have not: no later collective could find its partners.
        for comm in comms:
            comm.abort(f"{type(error).__name__}: {error}")
        raise
    finally:
        for comm in comms:
            comm._later = None


def gather_bytes(comm, mine):
    """[the bytes of each rank], as many on each, a multiple of 4; waits for them."""
    with comm.on_device():
        found = comm.all_gather(comm.xp.asarray(np.frombuffer(mine, np.int32)))
    comm.wait()
    return [row.tobytes() for row in to_host(found)]


def sum_in_rank_order(parts):
    """The sum of the ranks' arrays as `Comm.all_reduce` defines it on the CPU; a new array."""
    dtype = parts[0].dtype
    total = parts[0].astype({float16: float32, bfloat16: float32}.get(dtype, np.float64))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are results like others
        for part in parts[1:]:
            total += part.astype(total.dtype)
        return total.astype(dtype)


def one_line(text):
    """A reason as it goes through error messages: one line of at most 200 characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def rank_names(ranks):
    """`[1]` -> "rank 1", `[1, 2]` -> "ranks 1, 2"."""
    ranks = sorted(ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
