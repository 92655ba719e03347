"""All-reduce over the GPUs of this machine: NCCL and our kernels in CUDA graphs, 4 KB to 64 MB, beside what the links allow."""

import contextlib
import os
from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import float16, float32, require_cupy
from cupyq.bench.table import emit, number
from cupyq.errors import BackendError
from cupyq.ops.all_reduce import MOST_RANKS, Mailbox, all_reduce_reference
from cupyq.ops.elementwise import add
from cupyq.ops.norm import rms_norm
from cupyq.tp.comm import together
from cupyq.tp.nccl import NcclComm

SIZES = tuple(4096 << power for power in range(15))
QUICK_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20)
NORM_ROWS, NORM_DIM, NORM_LOOPS = (1, 4, 16), 8192, 50
_NAMES = ("NCCL us", "1-shot us", "2-shot us", "limit us")
COLUMNS = f"{'GPUs':>4} {'what':<12} {'bytes':>9} {' '.join(f'{name:>9}' for name in _NAMES)} {'in use':>8} {'GB/s':>6}"


@dataclass(frozen=True)
class Options:
    """Which numbers of GPUs and which sizes."""

    gpus: tuple
    sizes: tuple

    @classmethod
    def parse(cls, gpus=None, is_quick=False):
        """gpus: numbers of GPUs, None for 2, 4 and 8 as far as there are so many."""
        usable = _device.count()
        gpus = tuple(count for count in (2, 4, 8) if count <= usable) if gpus is None else tuple(gpus)
        if not gpus or max(gpus) > usable or min(gpus) < 2:
            raise BackendError(
                f"all-reduces take 2 GPUs or more, and this process sees {usable}, asked for {list(gpus)}: try --what decode"
            )
        return cls(gpus, QUICK_SIZES if is_quick else SIZES)


def run(options, out, lines=None):
    """([row], whether every sum was right); the table goes to `out`, JSON lines to `lines`."""
    rows = []
    for count in options.gpus:
        with _communicators(count) as (nccl_comms, comms):
            link = link_gigabytes_per_s(comms)
            start = _graph_us(comms, lambda comm, array: add(array, array, out=array), _arrays(comms, 2048), 100)
            print(
                f"{count} x {_device.current().name}: a GPU writes another's memory at {link:.0f} GB/s; a kernel that adds 4 KB"
                f" takes {start:.1f} us\n{COLUMNS}",
                file=out,
                flush=True,
            )
            found = [_size_row(nccl_comms, comms, size, link, start) for size in options.sizes]
            found += [_norm_row(nccl_comms, comms, rows_of_one, link, start) for rows_of_one in NORM_ROWS]
            for row in found:
                rows.append(row)
                emit(row, row_text(row), out, lines)
    return rows, all(row["is_right"] for row in rows)


@contextlib.contextmanager
def _communicators(count):
    """Of NCCL alone, and with peer memory where that works."""
    before = os.environ.get("CUPYQ_TP_PEER")
    with contextlib.ExitStack() as stack:
        os.environ["CUPYQ_TP_PEER"] = "0"
        try:
            alone = NcclComm.group(range(count))
        finally:
            os.environ.pop("CUPYQ_TP_PEER")
            if before is not None:
                os.environ["CUPYQ_TP_PEER"] = before
        both = NcclComm.group(range(count))
        for comm in (*alone, *both):
            stack.enter_context(comm)
        yield alone, both


def _values(rank, size):
    """Whole numbers of up to 50, whose sums float16 holds; other ones for each rank, and again after 101."""
    return np.resize((np.arange(101) * (rank + 3) % 101 - 50).astype(float16), size)


def _arrays(comms, size):
    found = []
    for comm in comms:
        with comm.on_device():
            found.append(require_cupy().asarray(_values(comm.rank, size)))
    return found


def _sums(ranks, size):
    return np.resize(all_reduce_reference([_values(rank, 101) for rank in range(ranks)]), size)


def captured(comms, streams, queue):
    """What queue() queues on the stream of each GPU: a graph for each, ready to be launched."""
    graphs = []
    for comm, stream in zip(comms, streams, strict=True):
        with comm.on_device():
            stream.synchronize()
            stream.begin_capture()
    queue()
    for comm, stream in zip(comms, streams, strict=True):
        with comm.on_device():
            graphs.append(stream.end_capture())
            graphs[-1].upload(stream)
            stream.synchronize()
    return graphs


def _graph_us(comms, work, arrays, loops, repeats=7, at_once=False):
    """Median microseconds of work(comm, array) on every GPU at the same time, as `loops` of them in a graph for each GPU.

    at_once: the work of all ranks goes within together().
    """
    cupy, streams = require_cupy(), []

    def queue():
        with together(comms) if at_once else contextlib.nullcontext():
            for comm, stream, array in zip(comms, streams, arrays, strict=True):
                with comm.on_device(), stream:
                    work(comm, array)

    for comm in comms:
        with comm.on_device():
            streams.append(cupy.cuda.Stream(non_blocking=True))
            cupy.cuda.get_current_stream().synchronize()  # the inputs may still be on their way
    queue()
    graphs, times = captured(comms, streams, lambda: [queue() for _ in range(loops)]), []
    for _ in range(repeats + 2):
        events = []
        for comm, stream, graph in zip(comms, streams, graphs, strict=True):
            with comm.on_device():
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record(stream)
                graph.launch(stream)
                end.record(stream)
                events.append((start, end))
        for comm, (_, end) in zip(comms, events, strict=True):
            with comm.on_device():
                end.synchronize()
        # The first GPU begins while the host still launches the others': the last one's time holds no such wait.
        times.append(min(1000 * cupy.cuda.get_elapsed_time(*pair) for pair in events))
    for comm in comms:
        comm.check()
    return float(np.median(times[2:])) / loops


def sum_us(ranks, values):
    """Of one sum of so many float32 values, as a layer's product ends in; None where NCCL's cannot be captured."""
    with contextlib.ExitStack() as stack:
        comms, arrays, target = [stack.enter_context(comm) for comm in NcclComm.group(range(ranks))], [], {}
        for comm in comms:
            with comm.on_device():
                arrays.append(require_cupy().zeros(values, float32))
                target[comm.rank] = require_cupy().empty(values, float32)
        return _nccl_us(comms, lambda comm, array: comm.all_reduce(array, target[comm.rank]), arrays, 100)


def _loops(size):
    return int(np.clip((32 << 20) // size, 5, 100))


def _nccl_us(comms, work, arrays, loops):
    """The work of all ranks at once, as NCCL needs it; None where it cannot be captured, and communicators are lost then."""
    if comms[0].failure is not None:
        return None
    try:
        return _graph_us(comms, work, arrays, loops, at_once=True)
    except (BackendError, RuntimeError):
        for comm in comms:
            comm.abort("a capture failed")
        return None


def _bus_gigabytes_per_s(row):
    """What a link carries at least, over the time of the kernel in use."""
    used_us = row[f"{row['in_use']}_us"]
    ranks = row["gpus"]
    return None if used_us is None else 2 * (ranks - 1) / ranks * row["bytes"] / used_us / 1e3


def _size_row(nccl_comms, comms, size, link, start):
    ranks = len(comms)
    arrays = _arrays(comms, size // 2)
    outs = _arrays(comms, size // 2)
    target = {comm.rank: out for comm, out in zip(comms, outs, strict=True)}
    exact = _sums(ranks, size // 2)
    row = {"family": "tp", "what": "all_reduce", "gpus": ranks, "bytes": size, "is_right": True}

    def check():
        row["is_right"] &= all(np.array_equal(out.get(), exact) for out in outs)
        for comm, out in zip(comms, outs, strict=True):
            with comm.on_device():
                out.fill(7)
                require_cupy().cuda.get_current_stream().synchronize()

    row["nccl_us"] = _nccl_us(nccl_comms, lambda c, a: c.all_reduce(a, target[c.rank]), arrays, _loops(size))
    if row["nccl_us"] is not None:
        check()
    peers = all(comm.peer_memory is not None for comm in comms)
    for way in ("one_shot", "two_shot"):
        row[f"{way}_us"] = None
        if peers and not (way == "one_shot" and size > Mailbox(ranks).one_shot_bytes):
            for comm, array in zip(comms, arrays, strict=True):
                with comm.on_device():
                    comm.peer_memory.all_reduce(array, target[comm.rank], way=way, is_empty=True)
                    require_cupy().cuda.get_current_stream().synchronize()
            forced = lambda c, a, way=way: c.peer_memory.all_reduce(a, target[c.rank], way=way)  # noqa: E731
            row[f"{way}_us"] = _graph_us(comms, forced, arrays, _loops(size))
            check()
    row["in_use"] = (comms[0].peer_memory.way_of(size) if peers else None) or "nccl"
    # At least: a kernel's start, and every GPU sends each byte of the others' shares once, and of its own sum.
    row["limit_us"] = start + 2 * (ranks - 1) / ranks * size / link / 1e3
    row["bus_gigabytes_per_s"] = _bus_gigabytes_per_s(row)
    return row


def _norm_row(nccl_comms, comms, rows, link, start):
    """Sum and norm, as a decoder's layer needs them: in one launch, and as one of NCCL's and one of rms_norm."""
    cupy, ranks = require_cupy(), len(comms)
    order = np.random.default_rng(1).permutation(NORM_DIM).astype(np.int32)
    arrays, given = [], {}
    for comm in comms:
        with comm.on_device():
            arrays.append(cupy.zeros((rows, NORM_DIM), float32))  # other sums of sums of sums would outgrow float32
            weight = cupy.asarray(np.ones(NORM_DIM, float32))
            given[comm.rank] = weight, cupy.asarray(order), cupy.empty((rows, NORM_DIM), float16)

    def once(comm, array):
        weight, order, out = given[comm.rank]
        return comm.all_reduce_norm(array, weight, eps=1e-5, dtype=float16, order=order, out=out)

    size = arrays[0].nbytes
    row = {"family": "tp", "what": "norm", "gpus": ranks, "bytes": size, "rows": rows, "one_shot_us": None, "two_shot_us": None}
    row["nccl_us"] = _nccl_us(nccl_comms, once, arrays, NORM_LOOPS)
    peers = all(comm.peer_memory is not None for comm in comms)
    way = comms[0].peer_memory.way_of(size) if peers else "nccl"  # of the sum, with the norm in its kernel or behind it
    if peers:
        row[f"{way}_us"] = _graph_us(comms, once, arrays, NORM_LOOPS, at_once=True)
    for comm, array in zip(comms, arrays, strict=True):
        with comm.on_device():
            array.set(_values(comm.rank, rows * NORM_DIM).astype(float32).reshape(rows, NORM_DIM))
            cupy.cuda.get_current_stream().synchronize()
    with together(comms):
        for comm, array in zip(comms, arrays, strict=True):
            once(comm, array)
    exact = _sums(ranks, rows * NORM_DIM).astype(float32).reshape(rows, NORM_DIM)
    expected = rms_norm(exact, np.ones(NORM_DIM, float32), eps=1e-5, order=order)
    row["is_right"] = True
    for comm, array in zip(comms, arrays, strict=True):
        comm.wait()
        row["is_right"] &= np.array_equal(array.get(), exact)
        row["is_right"] &= np.allclose(given[comm.rank][2].get(), expected, rtol=2**-10, atol=1e-6)
    row["is_right"] = bool(row["is_right"])
    row["in_use"] = way
    row["limit_us"] = start + 2 * (ranks - 1) / ranks * size / link / 1e3
    row["bus_gigabytes_per_s"] = _bus_gigabytes_per_s(row)
    return row


def link_gigabytes_per_s(comms, size=256 << 20):
    """Of a copy from the memory of the first GPU into that of the second."""
    cupy = require_cupy()
    first, second = comms[:2]
    with second.on_device():
        target = cupy.empty(size, np.uint8)
    with first.on_device():
        source = cupy.zeros(size, np.uint8)
        stream, times = cupy.cuda.Stream(non_blocking=True), []
        cupy.cuda.get_current_stream().synchronize()
        for _ in range(5):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            runtime = cupy.cuda.runtime
            runtime.memcpyPeerAsync(target.data.ptr, second.device, source.data.ptr, first.device, size, stream.ptr)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end))
    return size / min(times) / 1e6


def row_text(row):
    what = row["what"] if "rows" not in row else f"norm of {row['rows']}"
    times = " ".join(number(row[name], 9, 1) for name in ("nccl_us", "one_shot_us", "two_shot_us", "limit_us"))
    text = (
        f"{row['gpus']:>4} {what:<12} {row['bytes']:>9} {times} {row['in_use']:>8} {number(row['bus_gigabytes_per_s'], 6, 0)}"
    )
    return text if row["is_right"] else f"{text}  WRONG"


def gpu_counts(text):
    """`2,4` as numbers of GPUs; ValueError says what is wrong."""
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_RANKS for part in parts):
        raise ValueError(f"--gpus must be numbers of 1 to {MOST_RANKS} separated by commas, got {text!r}")
    return tuple(map(int, parts))
