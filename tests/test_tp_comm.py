"""Communicators: sums, gathers and broadcasts against plain loops, with threads, with TCP, with NCCL and a stand-in for it."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import gpu_count
from kernel_checks import bfloat16, float16, float32
from tp_checks import DeviceArray, StandInForNccl, free_port, in_threads, int32

from cupyq.errors import BackendError
from cupyq.tp import nccl
from cupyq.tp.comm import Comm, gather_bytes, one_line, rank_names, sum_in_rank_order, together
from cupyq.tp.local import LocalComm, SoloComm
from cupyq.tp.nccl import NcclComm
from cupyq.tp.sockets import SocketComm

# --- groups of every kind ---------------------------------------------------------------------------------------------


def on_all(comms, function):
    """function(comm) on every rank at the same time; raises what one of them raised."""
    results = in_threads([lambda comm=comm: function(comm) for comm in comms])
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def by_sockets(ranks, **options):
    port = free_port()
    joins = [lambda r=r: SocketComm.connect(r, ranks, "127.0.0.1", port, timeout=10, **options) for r in range(ranks)]
    comms = in_threads(joins)
    assert all(isinstance(comm, SocketComm) for comm in comms), comms
    return tuple(comms)


@pytest.fixture
def stand_in(monkeypatch):
    library = StandInForNccl()
    library.xp = library.cupy()
    monkeypatch.setattr(nccl, "require_cupy", lambda: library.xp)
    monkeypatch.setattr(nccl, "nccl", lambda: library)
    return library


def test_a_group_of_one_works_on_the_gpu_it_was_given(stand_in):
    with SoloComm(stand_in.xp, 3).on_device():
        assert stand_in.current_device() == 3
    with SoloComm().on_device():
        assert stand_in.current_device() == 0


def put(comm, array):
    """The array as one of the communicator's, contiguous and its own."""
    copy = np.array(array, order="C")
    if comm.device is None:
        return copy
    copy = copy.view(DeviceArray)
    copy.device = comm.device
    return copy


@pytest.fixture(params=["local", "sockets", "nccl"])
def make(request, monkeypatch):
    """make(ranks) -> the communicators of a group."""
    if request.param == "local":
        yield lambda ranks: LocalComm.group(ranks, stall_s=10)
    elif request.param == "nccl":
        library = request.getfixturevalue("stand_in")
        # GPU numbers other than the ranks, so that a mix-up shows.
        yield lambda ranks: NcclComm.group([(rank + 1) % ranks for rank in range(ranks)])
        assert all(name in ("allReduce", "allGather", "broadcast") for _, name in library.calls)
    else:
        made = []

        def connect(ranks):
            made.extend(comms := by_sockets(ranks, stall_s=10))
            return comms

        yield connect
        for comm in made:
            comm.close()


on_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 5])
on_floats = pytest.mark.parametrize("dtype", [float16, bfloat16, float32], ids=str)


def parts(seed, ranks, shape, dtype):
    """An array for each rank, of values whose sum depends on the order and on the width it is added in."""
    generator = np.random.default_rng(seed)
    scale = 10.0 ** generator.integers(-3, 4, (ranks, *shape))
    return (generator.standard_normal((ranks, *shape)) * scale).astype(dtype)


def plain_sum(values, dtype):
    """Element by element: 16-bit numbers in float32, float32 in Python's floats, in the order of the ranks."""
    result = np.empty(values.shape[1:], dtype)
    for place in np.ndindex(result.shape):
        column = [values[(rank, *place)] for rank in range(len(values))]
        if dtype == float32:
            total = float(column[0])
            for value in column[1:]:
                total += float(value)
        else:
            total = np.float32(column[0])
            for value in column[1:]:
                total = np.float32(total + np.float32(value))
        result[place] = np.asarray(total).astype(dtype)
    return result


def bits(array):
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


# --- what they do -----------------------------------------------------------------------------------------------------


@on_ranks
@on_floats
@pytest.mark.parametrize("shape", [(3, 7), (1,), (), (0, 4)])
def test_all_reduce(make, ranks, dtype, shape):
    values = parts(ranks, ranks, shape, dtype)
    exact = plain_sum(values, dtype)
    comms = make(ranks)

    def work(comm):
        array = put(comm, values[comm.rank])
        fresh = comm.all_reduce(array)
        given = put(comm, np.full(shape, 7, dtype))
        assert comm.all_reduce(array, given) is given
        assert fresh is not array and type(fresh) is type(array)
        assert comm.device is None or fresh.device == comm.device
        np.testing.assert_array_equal(bits(array), bits(values[comm.rank]))
        assert comm.all_reduce(array, array) is array  # in place, at last
        return fresh, given, array

    for results in on_all(comms, work):
        for result in results:
            assert result.dtype == dtype and result.shape == shape
            np.testing.assert_array_equal(bits(result), bits(exact))


@on_floats
def test_the_order_and_width_of_a_sum_show(dtype):
    """What plain_sum checks can be told from sums in another order, in another width, or rounded after each step."""
    values = parts(1, 5, (4000,), dtype)
    exact = plain_sum(values, dtype)
    np.testing.assert_array_equal(bits(sum_in_rank_order(list(values))), bits(exact))
    stepwise = values[0].copy()
    for value in values[1:]:
        stepwise += value
    assert np.any(bits(stepwise) != bits(exact))
    big, small = (2.0**60, 1.0) if dtype == float32 else (2.0**15, 2.0**-10)  # small is lost beside big
    big, small = np.array([big], dtype), np.array([small], dtype)
    assert sum_in_rank_order([big, small, -big]) == 0 and sum_in_rank_order([big, -big, small]) == small


def test_infinities_are_sums_too():
    huge = np.array([60000.0], float16)
    assert sum_in_rank_order([huge, huge]) == np.inf and sum_in_rank_order([huge, -huge]) == 0


@on_ranks
@pytest.mark.parametrize("dtype", [float16, bfloat16, float32, int32], ids=str)
def test_all_gather(make, ranks, dtype):
    values = (np.random.default_rng(2).standard_normal((ranks, 2, 3, 4)) * 100).astype(dtype)
    comms = make(ranks)

    def work(comm):
        array = put(comm, values[comm.rank])
        out = put(comm, np.zeros(values.shape, dtype))
        assert comm.all_gather(array, out) is out
        return [out, comm.all_gather(array), *(comm.all_gather(array, axis=axis) for axis in (0, 1, -1))]

    for stacked, fresh, *joined in on_all(comms, work):
        np.testing.assert_array_equal(bits(stacked), bits(values))
        np.testing.assert_array_equal(bits(fresh), bits(values))
        for axis, result in zip((0, 1, 2), joined, strict=True):
            np.testing.assert_array_equal(bits(result), bits(np.concatenate(values, axis)))
            assert result.flags.c_contiguous and result.dtype == dtype


@on_ranks
def test_every_rank_has_the_bytes_of_all(make, ranks):
    texts = [bytes([rank, 0, 255, 10 * rank]) * 65 for rank in range(ranks)]
    works = [lambda comm=comm: gather_bytes(comm, texts[comm.rank]) for comm in make(ranks)]
    assert in_threads(works) == [texts] * ranks


@pytest.mark.parametrize("rows", [1, 3, 0])
@pytest.mark.parametrize("sizes", [[2, 5, 1], [4, 0, 3], [0, 0, 2], [0, 0, 0]])
def test_all_gather_of_unequal_parts(make, rows, sizes):
    values = [np.random.default_rng(r).standard_normal((rows, size)).astype(float32) for r, size in enumerate(sizes)]

    def work(comm):
        array = put(comm, values[comm.rank])
        workspace = put(comm, np.full(rows * sum(sizes), np.nan, float32))
        out = put(comm, np.full((rows, sum(sizes)), np.nan, float32))
        comm.all_gather(array, out, axis=1, sizes=sizes, workspace=workspace)
        return out, comm.all_gather(array, axis=-1, sizes=tuple(sizes))

    for results in on_all(make(3), work):
        for result in results:
            np.testing.assert_array_equal(result, np.concatenate(values, 1))


@on_ranks
def test_broadcast(make, ranks):
    comms = make(ranks)
    for dtype in (float16, bfloat16, float32, int32):
        values = (np.random.default_rng(3).standard_normal((ranks, 5)) * 9).astype(dtype)
        for root in range(ranks):

            def work(comm, root=root, values=values):
                array = put(comm, values[comm.rank])
                assert comm.broadcast(array, root) is array
                return array

            for result in on_all(comms, work):
                np.testing.assert_array_equal(bits(result), bits(values[root]))


@on_ranks
def test_nobody_leaves_a_barrier_before_all_have_come(make, ranks):
    comms = make(ranks)
    here, lock = [], threading.Lock()

    def work(comm):
        seen = []
        for turn in range(3):
            time.sleep(0.01 * (comm.rank == turn % ranks))
            with lock:
                here.append(turn)
            comm.barrier()
            seen.append(here.count(turn))
        return seen

    assert on_all(comms, work) == [[ranks] * 3] * ranks


def test_a_long_message(make):
    """Longer than what sockets take at once."""
    comms = make(3)
    size = 3_000_001
    results = on_all(comms, lambda comm: comm.all_reduce(put(comm, np.full(size, comm.rank + 1, float32))))
    assert all(result.shape == (size,) and np.all(result == 6) for result in results)


def test_one_rank_alone():
    comm = SoloComm()
    array = np.arange(6, dtype=float32).reshape(2, 3)
    with comm:
        np.testing.assert_array_equal(comm.all_reduce(array), array)
        assert comm.all_reduce(array) is not array and comm.all_reduce(array, array) is array
        np.testing.assert_array_equal(comm.all_gather(array), array[None])
        np.testing.assert_array_equal(comm.all_gather(array, axis=1), array)
        assert comm.broadcast(array) is array
        comm.barrier()
        comm.wait()
        with pytest.raises(TypeError, match="dtype float16 or bfloat16 or float32, got float64"):
            comm.all_reduce(array.astype(np.float64))
    with pytest.raises(BackendError, match="closed"):
        comm.barrier()


# --- one thread for all -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "nccl"])
def make_here(request):
    if request.param == "local":
        return lambda ranks: LocalComm.group(ranks, stall_s=5)
    request.getfixturevalue("stand_in")
    return lambda ranks: NcclComm.group(list(range(ranks)))


@on_ranks
def test_one_thread_speaks_for_all(make_here, ranks):
    comms = make_here(ranks)
    values = parts(5, ranks, (2, 6), float32)
    arrays = [put(comm, values[comm.rank]) for comm in comms]
    for _ in range(2):
        with together(comms):
            sums = [comm.all_reduce(array) for comm, array in zip(comms, arrays, strict=True)]
            joined = [comm.all_gather(array, axis=1) for comm, array in zip(comms, arrays, strict=True)]
            for comm in comms:
                comm.barrier()
    for total, columns in zip(sums, joined, strict=True):
        np.testing.assert_array_equal(total, plain_sum(values, float32))
        np.testing.assert_array_equal(columns, np.concatenate(values, 1))
    with together(comms):
        for comm, array in zip(comms, arrays, strict=True):
            comm.broadcast(array, ranks - 1)
    assert all(np.array_equal(array, values[-1]) for array in arrays)


def test_together_does_not_forget_a_rank(make_here):
    comms = make_here(3)
    arrays = [put(comm, np.ones(2, float32)) for comm in comms]
    with pytest.raises(BackendError, match="rank 2 did not come to collective 0 before"), together(comms):
        for comm in comms[:2]:
            comm.all_reduce(arrays[comm.rank])
    for comm in comms:
        with pytest.raises(BackendError, match="rank 2 did not come"):
            comm.barrier()


def test_an_error_within_together_ends_the_group(make_here):
    comms = make_here(2)
    with pytest.raises(KeyError), together(comms):
        comms[0].barrier()
        raise KeyError("lost")
    for comm in comms:
        with pytest.raises(BackendError, match="KeyError"):
            comm.barrier()


def test_together_wants_one_kind_and_no_nesting():
    comms = LocalComm.group(2)
    with pytest.raises(TypeError, match="SoloComm"), together([*comms, SoloComm()]):
        pass
    with pytest.raises(TypeError, match="one kind"), together([]):
        pass
    with pytest.raises(ValueError, match="already open"), together(comms), together(comms):
        pass


# --- errors -----------------------------------------------------------------------------------------------------------


def test_arguments_that_make_no_sense(make):
    (comm,) = make(1)
    good = put(comm, np.ones((2, 3), float32))
    foreign = TypeError, "must be an array of"
    cases = [
        (lambda: comm.all_reduce(put(comm, np.ones(2))), TypeError, "dtype float16 or bfloat16 or float32, got float64"),
        (lambda: comm.all_reduce(put(comm, np.ones(2, int32))), TypeError, "got int32"),
        (lambda: comm.all_gather(put(comm, np.ones(2, np.int64))), TypeError, "or int32, got int64"),
        (lambda: comm.all_reduce([1.0]), *foreign),
        (lambda: comm.all_reduce(good.T), ValueError, "C-contiguous"),
        (lambda: comm.all_reduce(good, put(comm, np.ones(2, float32))), ValueError, "out must have shape"),
        (lambda: comm.all_reduce(good.reshape(-1)[:4], good.reshape(-1)[1:5]), ValueError, "overlaps array partly"),
        (lambda: comm.all_gather(good, good.reshape(1, 2, 3)), ValueError, "out overlaps array, which is still read"),
        (lambda: comm.all_gather(good, axis=2), ValueError, r"axis must lie in -2\.\.1"),
        (lambda: comm.all_gather(good, axis=0, sizes=[3]), ValueError, r"sizes must hold .* \[0\] being 2, got \[3\]"),
        (lambda: comm.all_gather(good, axis=0, sizes=[2, 2]), ValueError, "sizes must hold"),
        (lambda: comm.all_gather(good, sizes=[2]), ValueError, "give axis too"),
        (lambda: comm.all_gather(good, axis=1, workspace=put(comm, np.ones(5, float32))), ValueError, "workspace must have"),
        (lambda: comm.broadcast(good, 1), ValueError, r"root must lie in 0\.\.0, got 1"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    comm.barrier()  # and none of them has broken anything


def test_a_read_only_array_is_no_place_for_a_broadcast():
    comms = LocalComm.group(2, stall_s=5)
    frozen = np.ones(3, float32)
    frozen.flags.writeable = False

    def work(comm):
        return comm.broadcast(frozen if comm.rank == 0 else np.zeros(3, float32), 0)

    assert all(np.all(array == 1) for array in on_all(comms, work))
    with pytest.raises(ValueError, match="read-only"):
        comms[1].broadcast(frozen, 0)


def failures(comms, function):
    results = in_threads([lambda comm=comm: function(comm) for comm in comms])
    assert all(isinstance(result, BackendError) for result in results), results
    return [str(result) for result in results]


@pytest.fixture(params=["local", "sockets"])
def make_own(request):
    """Groups of cupyq's own making, which see what NCCL does not."""
    if request.param == "local":
        return lambda ranks, stall_s=10: LocalComm.group(ranks, stall_s=stall_s)
    return lambda ranks, stall_s=10: by_sockets(ranks, stall_s=stall_s)


@pytest.mark.parametrize(
    "other",
    [
        lambda comm: comm.all_reduce(np.ones(4, float32)),
        lambda comm: comm.all_reduce(np.ones(3, float16)),
        lambda comm: comm.all_gather(np.ones(3, float32)),
        lambda comm: comm.barrier(),
    ],
)
def test_ranks_that_make_different_calls_are_told(make_own, other):
    comms = make_own(3)
    found = failures(comms, lambda comm: other(comm) if comm.rank == 1 else comm.all_reduce(np.ones(3, float32)))
    assert len(set(found)) == 1 and "rank 1 came to collective 0 with" in found[0]
    assert failures(comms, lambda comm: comm.barrier()) == found


def test_an_error_on_one_rank_reaches_all(make_own):
    comms = make_own(3)

    def work(comm):
        with comm:
            comm.barrier()
            if comm.rank == 1:
                raise KeyError("gone\nwrong")
            comm.barrier()

    results = in_threads([lambda comm=comm: work(comm) for comm in comms])
    assert isinstance(results[1], KeyError)
    for result in (results[0], results[2]):
        assert isinstance(result, BackendError) and str(result) == r"rank 1 failed: KeyError: 'gone\nwrong'"


def test_a_rank_that_never_comes_is_named(make_own):
    comms = make_own(3, 0.5)
    begin = time.monotonic()
    found = failures([comms[0], comms[2]], lambda comm: comm.barrier())
    assert all("rank 1 did not come to barrier number 0 within 0.5 s" in text for text in found)
    assert time.monotonic() - begin < 5


def test_a_rank_that_leaves_early_is_named(make_own):
    comms = make_own(3)
    comms[1].close()
    comms[1].close()
    for text in failures([comms[0], comms[2]], lambda comm: comm.barrier()):
        assert "rank 1 closed" in text or "rank 1 went away" in text
    with pytest.raises(BackendError, match="rank 1 (has closed this|closed while)"):
        comms[1].barrier()


def test_the_first_cause_counts(make_own):
    comms = make_own(2)
    comms[0].abort("first")
    assert failures(comms, lambda comm: comm.barrier()) == ["rank 0 failed: first"] * 2
    comms[1].abort("second")
    assert failures(comms, lambda comm: comm.barrier()) == ["rank 0 failed: first"] * 2


def test_groups_of_no_rank():
    with pytest.raises(ValueError, match="at least 1"):
        LocalComm.group(0)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1, got 2"):
        Comm(2, 2)


def test_words():
    assert one_line("a\n  b") == "a b" and len(one_line("x" * 500)) == 200
    assert rank_names({3}) == "rank 3" and rank_names([2, 0]) == "ranks 0, 2"
    assert repr(LocalComm.group(2)[1]) == "LocalComm(rank 1 of 2)"


# --- TCP --------------------------------------------------------------------------------------------------------------


def test_those_who_do_not_come_are_named():
    port = free_port()
    begin = time.monotonic()
    joins = [lambda r=r: SocketComm.connect(r, 4, "127.0.0.1", port, timeout=0.7) for r in (0, 2)]
    for result in in_threads(joins):
        assert isinstance(result, BackendError) and "ranks 1, 3 of 4 did not come to 127.0.0.1" in str(result)
    with pytest.raises(BackendError, match="rank 0 did not answer rank 1 at 127.0.0.1"):
        SocketComm.connect(1, 2, "127.0.0.1", port, timeout=0.3)
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([(0, 3, ""), (1, 2, ""), (2, 3, "")], "rank 1 was started as one of 2 ranks, rank 0 as one of 3"),
        ([(0, 3, ""), (1, 3, ""), (1, 3, "")], "rank 1 came twice"),
    ],
)
def test_ranks_that_disagree_do_not_meet(arguments, message):
    port = free_port()
    joins = [lambda a=a: SocketComm.connect(a[0], a[1], "127.0.0.1", port, job=a[2], timeout=2) for a in arguments]
    results = in_threads(joins)
    assert all(isinstance(result, BackendError) for result in results), results
    assert message in str(results[0]) and any(message in str(result) for result in results[1:])


def test_strangers_are_sent_away():
    """Another job's rank, and something that speaks another language, come before the right one."""
    port = free_port()

    def strangers():
        with pytest.raises(BackendError, match="another job of cupyq uses this address"):
            SocketComm.connect(1, 2, "127.0.0.1", port, job="theirs", timeout=5)
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(b"GET / HTTP/1.1\r\nHost: nobody in particular\r\n\r\n")
        return SocketComm.connect(1, 2, "127.0.0.1", port, job="ours", timeout=5)

    comms = in_threads([lambda: SocketComm.connect(0, 2, "127.0.0.1", port, job="ours", timeout=10), strangers])
    assert all(isinstance(comm, SocketComm) for comm in comms), comms
    on_all(comms, lambda comm: comm.barrier())
    for comm in comms:
        comm.close()


def test_a_rank_that_is_sending_hears_the_cause():
    first, second = by_sockets(2)
    first.abort("why")
    first.close()
    with pytest.raises(BackendError, match="^rank 0 failed: why$"):
        second.all_reduce(np.ones(10_000_000, float32))
    second.close()


def test_a_port_in_use_is_an_error_for_people():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match="rank 0 cannot use 127.0.0.1:.*set MASTER_ADDR and MASTER_PORT"):
            SocketComm.connect(0, 2, "127.0.0.1", port, timeout=1)


# --- NCCL, by its stand-in --------------------------------------------------------------------------------------------


class WatchStandIn:
    """The watchdog's side that NcclComm talks to."""

    def __init__(self):
        self.failure, self.probes, self.on_failure, self.closed = None, [], [], False

    def fail(self, cause):
        if self.failure is None:
            self.failure = cause
            for tell in self.on_failure:
                tell(cause)

    def check(self):
        if self.failure:
            raise BackendError(self.failure)

    def check_waiting(self, what):
        self.check()

    def peers(self):
        return {2: {}}

    def close(self):
        self.closed = True


def watched_comm(library):
    watch = WatchStandIn()
    (communicator,) = library.NcclCommunicator.initAll([0])
    return NcclComm(communicator, 0, 1, 0, watch=watch, stall_s=0.3), communicator, watch


def test_a_failure_elsewhere_frees_the_gpu(stand_in):
    """The watchdog's thread aborts, so that kernels that wait for the dead rank end, and then so does who waits for them."""
    comm, communicator, watch = watched_comm(stand_in)
    stand_in.xp.event.done = False
    threading.Timer(0.05, lambda: watch.fail("rank 1 died")).start()
    with pytest.raises(BackendError, match="^rank 1 died$"):
        comm.wait()
    deadline = time.monotonic() + 5
    while communicator.state == "alive" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert communicator.state == "aborted"
    with pytest.raises(BackendError, match="^rank 1 died$"):
        comm.barrier()
    comm.close()
    assert communicator.state == "aborted" and watch.closed


def test_the_gpu_is_freed_whoever_hears_first(stand_in):
    """The rank's own thread may see the cause before the watchdog's thread has told the communicator."""
    comm, communicator, watch = watched_comm(stand_in)
    watch.failure = "rank 1 died"
    with pytest.raises(BackendError, match="^rank 1 died$"):
        comm.check()
    (tell,) = watch.on_failure
    tell(watch.failure)
    assert communicator.state == "aborted"


def test_waiting_is_for_the_stream_of_the_own_gpu(stand_in):
    comms = NcclComm.group([2, 0])
    for comm in comms:
        comm.wait()
    assert stand_in.recorded == [1002, 1000]


def test_a_wait_without_end_ends(stand_in):
    comm, communicator, watch = watched_comm(stand_in)
    stand_in.xp.event.done = False
    with pytest.raises(BackendError, match=r"rank 0 has waited 0\.3 s in wait"):
        comm.wait()
    assert communicator.state == "aborted" and watch.failure


def test_what_nccl_notices_becomes_a_cause(stand_in):
    comm, communicator, watch = watched_comm(stand_in)
    (probe,) = watch.probes
    assert probe() is None
    stand_in.async_error = "NCCL_ERROR_REMOTE_ERROR: remote process exited"
    assert "rank 0: NCCL reports NCCL_ERROR_REMOTE_ERROR" in probe()
    comm.abort("enough")
    assert probe() is None  # an aborted communicator is not asked again
    assert communicator.state == "aborted" and "rank 0 failed: enough" in watch.failure


def test_a_call_that_nccl_refuses_ends_the_group(stand_in):
    comm, communicator, watch = watched_comm(stand_in)

    def refuse(*_):
        raise stand_in.NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage")

    communicator.broadcast = refuse
    with pytest.raises(BackendError, match="rank 0: NCCL's broadcast failed .*INVALID_USAGE.*NCCL_DEBUG=WARN"):
        comm.broadcast(put(comm, np.ones(2, float32)))
    assert communicator.state == "aborted" and watch.failure


def test_closing_frees_the_communicator(stand_in):
    comm, communicator, watch = watched_comm(stand_in)
    with comm:
        comm.barrier()
    assert communicator.state == "destroyed" and watch.closed


def test_arrays_stay_on_their_gpus(stand_in):
    comms = NcclComm.group([0, 1])
    with pytest.raises(ValueError, match="array is on GPU 0, rank 1 on GPU 1"):
        comms[1].all_reduce(put(comms[0], np.ones(2, float32)))
    with pytest.raises(ValueError, match="out is on GPU 0, rank 1 on GPU 1"):
        comms[1].all_reduce(put(comms[1], np.ones(2, float32)), put(comms[0], np.ones(2, float32)))
    with pytest.raises(ValueError, match=r"each once .*\[0, 0\]"):
        NcclComm.group([0, 0])


def test_unequal_parts_are_one_group_of_broadcasts(stand_in):
    comms = NcclComm.group([0, 1])
    sizes = [3, 1]
    on_all(comms, lambda comm: comm.all_gather(put(comm, np.ones(sizes[comm.rank], float32)), axis=0, sizes=sizes))
    assert sorted(stand_in.calls) == [(0, "broadcast")] * 2 + [(1, "broadcast")] * 2


def test_processes_join(stand_in):
    """In threads, each of which would be a process with a GPU of its own."""
    joins = [lambda rank=rank: NcclComm.join(rank, 3, b"id", 2 - rank, timeout=10) for rank in range(3)]
    comms = in_threads(joins)
    assert [(comm.rank, comm.ranks, comm.device) for comm in comms] == [(0, 3, 2), (1, 3, 1), (2, 3, 0)], comms
    sums = on_all(comms, lambda comm: comm.all_reduce(put(comm, np.full(4, comm.rank, float32))))
    assert all(np.all(total == 3) and total.device == comm.device for total, comm in zip(sums, comms, strict=True))


def test_joining_does_not_wait_for_ever(stand_in):
    never = threading.Event()
    stand_in.NcclCommunicator = lambda ranks, group_id, rank: never.wait()
    begin = time.monotonic()
    with pytest.raises(
        BackendError, match=r"4 ranks did not meet within 0\.3 s; on this host there are ranks 1, 2, the others"
    ):
        NcclComm.join(1, 4, b"id", 0, timeout=0.3, watch=WatchStandIn())
    watch = WatchStandIn()
    threading.Timer(0.1, lambda: watch.fail("rank 2 died")).start()
    with pytest.raises(BackendError, match="^rank 2 died$"):
        NcclComm.join(1, 4, b"id", 0, timeout=20, watch=watch)
    assert time.monotonic() - begin < 5
    never.set()


def test_joining_says_what_nccl_said(stand_in):
    def refuse(ranks, group_id, rank):
        raise stand_in.NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")

    stand_in.NcclCommunicator = refuse
    with pytest.raises(BackendError, match=r"rank 1 of 2 \(NCCL_ERROR_SYSTEM_ERROR.*NCCL_DEBUG=WARN"):
        NcclComm.join(1, 2, b"id", 0)


def test_without_nccl_there_is_a_mend(monkeypatch):
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: 12090)))
    monkeypatch.setattr(nccl, "require_cupy", lambda: cupy)
    monkeypatch.setattr(nccl.importlib, "import_module", lambda name: SimpleNamespace(available=False))
    with pytest.raises(BackendError, match="pip install nvidia-nccl-cu12"):
        nccl.nccl()


# --- NCCL itself, on as many GPUs as there are ------------------------------------------------------------------------


@contextlib.contextmanager
def on_gpus():
    """CuPy, and the communicators of all GPUs, which this thread drives."""
    import cupy

    comms = NcclComm.group(range(gpu_count()))
    with contextlib.ExitStack() as stack:
        for comm in comms:
            stack.enter_context(comm)
        yield cupy, comms


def on_device(cupy, comm, array):
    with cupy.cuda.Device(comm.device):
        return cupy.asarray(array)


@pytest.mark.gpu
@on_floats
def test_nccl_all_reduce(dtype):
    """Small whole numbers, whose sums are exact in any order."""
    with on_gpus() as (cupy, comms):
        values = np.random.default_rng(7).integers(-8, 9, (len(comms), 3, 1001)).astype(dtype)
        exact = values.astype(np.float64).sum(0)
        arrays = [on_device(cupy, comm, values[comm.rank]) for comm in comms]
        with together(comms):
            sums = [comm.all_reduce(array) for comm, array in zip(comms, arrays, strict=True)]
        with together(comms):
            for comm, array in zip(comms, arrays, strict=True):
                comm.all_reduce(array, array)
        for comm, total, array in zip(comms, sums, arrays, strict=True):
            comm.wait()
            assert total.data.device_id == comm.device
            np.testing.assert_array_equal(total.get().astype(np.float64), exact)
            np.testing.assert_array_equal(array.get().astype(np.float64), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [float16, bfloat16, float32, int32], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_nccl_all_gather_and_broadcast(dtype, rows):
    with on_gpus() as (cupy, comms):
        sizes = [32 * (rank + 1) for rank in range(len(comms))]
        generator = np.random.default_rng(8)
        values = [(generator.standard_normal((rows, size)) * 100).astype(dtype) for size in sizes]
        arrays = [on_device(cupy, comm, values[comm.rank]) for comm in comms]
        equal = [on_device(cupy, comm, values[comm.rank][:, :32].copy()) for comm in comms]
        with together(comms):
            joined = [comm.all_gather(array, axis=1, sizes=sizes) for comm, array in zip(comms, arrays, strict=True)]
        with together(comms):
            stacked = [comm.all_gather(array) for comm, array in zip(comms, equal, strict=True)]
        with together(comms):
            columns = [comm.all_gather(array, axis=-1) for comm, array in zip(comms, equal, strict=True)]
        for comm, *found in zip(comms, joined, stacked, columns, strict=True):
            comm.wait()
            first = [value[:, :32] for value in values]
            for result, exact in zip(
                found, (np.concatenate(values, 1), np.stack(first), np.concatenate(first, 1)), strict=True
            ):
                np.testing.assert_array_equal(bits(result.get()), bits(np.ascontiguousarray(exact)))
        for root in range(len(comms)):
            targets = [on_device(cupy, comm, values[comm.rank][:, :32].copy()) for comm in comms]
            with together(comms):
                for comm, target in zip(comms, targets, strict=True):
                    comm.broadcast(target, root)
            for comm, target in zip(comms, targets, strict=True):
                comm.wait()
                np.testing.assert_array_equal(bits(target.get()), bits(values[root][:, :32].copy()))


@pytest.mark.gpu
def test_nccl_same_bits_on_all_ranks_and_runs():
    with on_gpus() as (cupy, comms):
        values = np.random.default_rng(9).standard_normal((len(comms), 4096)).astype(float16)
        found = set()
        for _ in range(3):
            arrays = [on_device(cupy, comm, values[comm.rank]) for comm in comms]
            with together(comms):
                for comm, array in zip(comms, arrays, strict=True):
                    comm.all_reduce(array, array)
            for comm, array in zip(comms, arrays, strict=True):
                comm.wait()
                found.add(array.get().tobytes())
        assert len(found) == 1


@pytest.mark.gpu
def test_nccl_barrier_and_end():
    with on_gpus() as (cupy, comms):
        with together(comms):
            for comm in comms:
                comm.barrier()
        for comm in comms:
            comm.abort("enough")
    for comm in comms:
        with pytest.raises(BackendError):
            comm.barrier()


@pytest.mark.gpu
def test_nccl_in_a_cuda_graph(cupy):
    """As many replays, as many sums."""
    with cupy.cuda.Device(0):
        (comm,) = NcclComm.group([0])
        with comm, cupy.cuda.Stream(non_blocking=True) as stream:
            array, out = cupy.ones(1000, float32), cupy.zeros(1000, float32)
            # What compiles and what sets up channels does so outside of the capture.
            comm.all_reduce(array, out)
            cupy.add(array, out, out=array)
            array.fill(1)
            out.fill(0)
            comm.wait()
            stream.begin_capture()
            comm.all_reduce(array, out)
            cupy.add(array, out, out=array)
            graph = stream.end_capture()
            for _ in range(3):
                graph.launch(stream)
            comm.wait()
            assert np.all(array.get() == 8) and np.all(out.get() == 4)


@pytest.mark.gpu
def test_nccl_says_what_is_wrong_with_arrays(cupy):
    (comm,) = NcclComm.group([0])
    with comm:
        with pytest.raises(TypeError, match="must be an array of cupy"):
            comm.all_reduce(np.ones(2, float32))
        with pytest.raises(TypeError, match="got float64"):
            comm.all_reduce(cupy.ones(2))
