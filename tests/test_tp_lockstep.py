"""tp/lockstep.py: nothing that waits for other ranks is queued before all can be, by one thread and for all."""

import contextlib
import threading
import time

import numpy as np
import pytest
from tp_checks import in_threads, several_gpus  # noqa: F401

from cupyq import tp
from cupyq.errors import BackendError
from cupyq.tp.lockstep import Lockstep


class Rank:
    """What Lockstep asks of a communicator."""

    def __init__(self, rank, log):
        self.rank, self.log, self.failure = rank, log, None

    @contextlib.contextmanager
    def _grouped(self, comms):
        self.log.append(("begin", [comm.rank for comm in comms]))
        yield
        self.log.append(("end", threading.get_ident()))

    def check(self):
        if self.failure:
            raise BackendError(self.failure)

    def abort(self, reason):
        self.failure = f"rank {self.rank} failed: {reason}"


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_last_to_come_does_the_work_of_all_in_the_order_of_ranks(last):
    log, lockstep = [], Lockstep(3)
    ranks, came, returned = [Rank(rank, log) for rank in range(3)], [], []

    def thread(rank):
        for step in range(40):
            if rank == last:
                while len(came) < 3 * step + 2:
                    time.sleep(0.0001)
            came.append(rank)
            lockstep.come(
                ranks[rank], "sum", lambda step=step: log.append((step, rank, threading.get_ident(), len(came), len(returned)))
            )
            returned.append(rank)
        return threading.get_ident()

    threads = in_threads([lambda rank=rank: thread(rank) for rank in range(3)])
    assert len(log) == 40 * 5
    for step in range(40):
        begin, *works, end = log[5 * step : 5 * step + 5]
        assert begin == ("begin", [0, 1, 2]) and end == ("end", threads[last])
        assert [work[:3] for work in works] == [(step, rank, threads[last]) for rank in range(3)]
        for *_, here, gone in works:
            assert here == 3 * (step + 1)
            assert gone <= 3 * step


def test_different_calls_end_all():
    log, lockstep = [], Lockstep(2)
    calls = [lambda rank=rank: lockstep.come(Rank(rank, log), ("sum", "gather")[rank], log.append) for rank in range(2)]
    for error in in_threads(calls):
        assert isinstance(error, BackendError) and "came to different calls: sum, gather" in str(error)
    assert log == []
    with pytest.raises(BackendError, match="came to different calls"):
        lockstep.come(Rank(0, log), "sum", log.append)


def test_work_that_fails_ends_all():
    log, lockstep = [], Lockstep(2)

    def work():
        raise RuntimeError("no memory")

    errors = in_threads([lambda rank=rank: lockstep.come(Rank(rank, log), "sum", work) for rank in range(2)])
    assert sorted(type(error).__name__ for error in errors) == ["BackendError", "RuntimeError"]
    assert all("no memory" in str(error) for error in errors)


def test_a_rank_that_fails_or_never_comes():
    lockstep, waiting = Lockstep(2), Rank(0, [])
    threading.Timer(0.3, waiting.abort, ["rank 1 is gone"]).start()
    with pytest.raises(BackendError, match="rank 1 is gone"):
        lockstep.come(waiting, "sum", print)
    with pytest.raises(BackendError, match="waited 0.5 s for rank 1 in sum"):
        Lockstep(2, stall_s=0.5).come(Rank(0, []), "sum", print)


@pytest.mark.gpu
def test_ranks_that_take_memory_and_load_kernels_amid_exchanges(several_gpus, cupy):  # noqa: F811
    """CUDA waits for idle GPUs in these calls: rank 0 is far ahead by then, and its GPU waits for rank 1."""
    ranks = min(several_gpus, 4)

    def work(comm):
        total = cupy.zeros(4096, np.float16)
        for step in range(30):
            if comm.rank == ranks - 1:
                pinned = cupy.cuda.runtime.hostAlloc((1 << 20) + step, 0)
                memory = cupy.cuda.runtime.malloc(8 << 20)
                text = f'extern "C" __global__ void add_{step}(int* x) {{ x[0] += {step}; }}'
                cupy.RawModule(code=text).get_function(f"add_{step}")((1,), (1,), (cupy.zeros(1, np.int32),))
                cupy.cuda.runtime.free(memory)
                cupy.cuda.runtime.freeHost(pinned)
            comm.all_reduce(cupy.full(4096, step % 5, np.float16), total)
            gathered = comm.all_gather(total[: comm.rank + 1], axis=0, sizes=range(1, ranks + 1))
        comm.wait()
        return total.get(), gathered.get()

    start = time.monotonic()
    for total, gathered in tp.run(work, ranks, backend="cupy"):
        assert (total == 4 * ranks).all() and (gathered == 4 * ranks).all() and gathered.size == ranks * (ranks + 1) // 2
    assert time.monotonic() - start < 20
