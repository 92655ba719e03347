"""Sums through memory that GPUs write for each other: plans, protocol, fall-back to NCCL; and on several GPUs the kernels."""

import collections
import ctypes
import io
import itertools
import os
import re
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, gpu_count
from kernel_checks import FLOATS, bfloat16, float16, float32, random, same_bits
from tp_checks import StandInForNccl, free_port, in_threads

from cupyq.bench import tp as bench
from cupyq.errors import BackendError
from cupyq.ops import all_reduce as kernels
from cupyq.ops.all_reduce import (
    PEER_TABLE,
    QUICK_NORM_ROWS,
    Mailbox,
    all_reduce_norm_reference,
    all_reduce_reference,
    choose_way,
    one_shot_blocks,
    two_shot_grid,
)
from cupyq.ops.norm import rms_norm
from cupyq.ops.qmatmul import WGMMA_ROWS
from cupyq.tp import nccl, peer
from cupyq.tp.comm import together
from cupyq.tp.layers import SUMMED_ROWS
from cupyq.tp.local import LocalComm, SoloComm
from cupyq.tp.nccl import NcclComm

HEADER = (ROOT / "cupyq/cu/all_reduce.cuh").read_text()
RANKS = range(2, 9)

# --- what lies where --------------------------------------------------------------------------------------------------


def test_the_table_is_the_struct_of_the_kernels():
    struct = re.search(r"struct alignas\(16\) PeerTable \{(.*?)\};", HEADER, re.DOTALL)[1]
    found = []
    for kind, names in re.findall(r"^\s*(uint64|int) ([^;]*);", struct, re.MULTILINE):
        for name in names.split(", "):
            name, _, length = name.partition("[")
            found.append((name, {"uint64": np.uint64, "int": np.int32}[kind], 8 if length else 1))
    described = [(n, PEER_TABLE[n].base.type, int(np.prod(PEER_TABLE[n].shape))) for n in PEER_TABLE.names]
    assert found == described
    assert PEER_TABLE.itemsize % 16 == 0 and not PEER_TABLE.isalignedstruct and PEER_TABLE.fields["rank"][1] == 96


@pytest.mark.parametrize("ranks", RANKS)
def test_no_two_parts_of_a_mailbox_overlap(ranks):
    constants = dict(re.findall(r"constexpr int (\w+) = (\w+);", HEADER))
    assert int(constants["most_ranks"]) == kernels.MOST_RANKS
    header_end = 128 + 4 * int(constants["kernels"]) * int(constants["most_blocks"])
    header_end += 2 * int(constants["most_blocks"]) * kernels.MOST_RANKS * 4
    mailbox = Mailbox(ranks)
    tables = mailbox.tables(1, range(1000, 1000 + ranks), 77, 2.5)
    parts = [(0, header_end)]
    for name in ("one_shot", "norm"):
        table = tables[name]
        parts.append((table["letters"], table["letters"] + 2 * table["blocks"] * ranks * table["capacity"] * 16))
    table = tables["two_shot"]
    parts.append((table["pieces"], table["pieces"] + 2 * table["blocks"] * ranks * table["capacity"] * 16))
    parts.append((mailbox.size, mailbox.size))
    for (_, end), (begin, _) in itertools.pairwise(parts):
        assert end <= begin and begin % 256 == 0
    assert mailbox.size % (2 << 20) == 0 and mailbox.size < 64 << 20
    for table in tables.values():
        assert list(table["mailboxes"]) == [*range(1000, 1000 + ranks), *[0] * (8 - ranks)]
        assert (table["host"], table["limit_ns"], table["rank"]) == (77, 2_500_000_000, 1)
        assert table["blocks"] <= int(constants["most_blocks"])


def test_a_mailbox_for_too_many_is_refused():
    for ranks in (1, 9):
        with pytest.raises(ValueError, match=rf"ranks must lie in 2..8 .* got {ranks}"):
            Mailbox(ranks)


# --- which kernel, and who takes what ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_the_way_depends_on_bytes_and_ranks(ranks):
    ways = [choose_way(1 << power, ranks) for power in range(28)]
    assert ways == sorted(ways, key=["one_shot", "two_shot", None].index)
    assert choose_way(64 << 10, ranks) == "one_shot" and choose_way(4 << 20, ranks) == "two_shot"
    assert choose_way(kernels.TWO_SHOT_BYTES[ranks] + 1, ranks) is None and choose_way(0, ranks) is None
    assert choose_way(64, 1) is None and choose_way(64, 9) is None
    assert kernels.ONE_SHOT_BYTES[ranks] <= Mailbox(ranks).one_shot_bytes


SIZES = (1, 2, 3, 5, 255, 1023, 1024, 1025, 4096, 70_001, 1 << 20)


@pytest.mark.parametrize("ranks", (2, 3, 5, 8))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_one_shot_takes_each_unit_once_and_within_its_letters(ranks, itemsize):
    for n in SIZES:
        if n * itemsize > Mailbox(ranks).one_shot_bytes:
            with pytest.raises(ValueError, match="array must have 1 to .* bytes for one shot"):
                one_shot_blocks(n, itemsize, ranks)
            continue
        blocks, units, taken = one_shot_blocks(n, itemsize, ranks), -(-n * itemsize // 8), collections.Counter()
        for block in range(blocks):
            places = 0  # among the letters of the block
            for begin in range(block * 256, units, blocks * 256):
                taken.update(range(begin, min(begin + 256, units)))
                places += 256
            assert 0 < places <= Mailbox(ranks).one_shot_units, "a block would send no letter, or more than it has place for"
        assert taken == collections.Counter(range(units))
    assert one_shot_blocks(32 << 10, 2, 2) == 32  # one unit for each thread
    for n in (0, -1):
        with pytest.raises(ValueError, match="array must have 1 to .* bytes for one shot"):
            one_shot_blocks(n, itemsize, ranks)


@pytest.mark.parametrize("ranks", (2, 3, 5, 8))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_two_shot_takes_each_unit_once_and_within_its_pieces(ranks, itemsize):
    for n in (*SIZES, 5 << 20):
        blocks, piece = two_shot_grid(n, itemsize, ranks)
        assert 1 <= piece <= Mailbox(ranks).piece_units and blocks <= 64
        assert blocks * ranks * piece * 16 <= kernels.TWO_SHOT_ROUND_BYTES
        units, covered = -(-n * itemsize // 16), []
        rounds = -(-units // (blocks * ranks * piece))
        for turn, block, rank in itertools.product(range(rounds), range(blocks), range(ranks)):
            begin = ((turn * blocks + block) * ranks + rank) * piece
            covered.append((min(begin, units), min(begin + piece, units)))
        assert covered[0][0] == 0 and covered[-1][1] == units
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(covered))
    with pytest.raises(ValueError, match="must have values"):
        two_shot_grid(0, 2, 2)


def test_norms_that_fit():
    fits = kernels.norm_fits
    assert all(fits(rows, dim, T) for rows in (1, 2) for dim in (16, 2880, 4096, 8192, 16384) for T in (float16, bfloat16))
    assert not fits(3, 4096, float16) and not fits(0, 4096, float16)
    assert not fits(1, 16400, float16) and not fits(1, 0, float16)
    assert not fits(1, 4104, float16)  # of no whole units for each of 8 blocks
    assert not fits(1, 4096, float32)
    assert QUICK_NORM_ROWS <= SUMMED_ROWS < WGMMA_ROWS[0]  # more rows arrange what is normed themselves


def test_the_launch_of_a_norm(monkeypatch):
    """Blocks, threads and units are those of the kernel's text."""
    text = (ROOT / "cupyq/cu/all_reduce_norm.cu").read_text()
    constants = dict(re.findall(r"(\w+) = (\d+)", text))
    assert int(constants["SHARERS"]) == kernels._NORM_SHARERS and int(constants["THREADS"]) == kernels._NORM_THREADS
    assert int(constants["TURNS"]) * kernels._NORM_THREADS == kernels._NORM_UNITS
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda *found: launched.append(found))
    table = Mailbox(2).tables(0, (1, 2), 3, 1.0)["norm"]
    x, weight, order = np.zeros((2, 64), float32), np.ones(64, float16), np.zeros(96, np.int32)
    for given in (order, None):
        y = np.zeros((2, 64 if given is None else 96), bfloat16)
        for is_empty in (False, True):
            kernels.launch_all_reduce_norm(x, weight, y, table, 2, 1e-5, order=given, is_empty=is_empty)
    expressions = [f"all_reduce_norm<half, bfloat16, 2, {is_ordered}>" for is_ordered in ("true", "true", "false", "false")]
    assert [kernel.expression for kernel, *_ in launched] == expressions
    assert [(grid, block) for _, grid, block, _ in launched] == [((16,), (512,)), ((8,), (512,))] * 2
    assert [[int(n) for n in values[5:7]] for *_, values in launched] == [[64, 96], [0, 96], [64, 64], [0, 64]]
    odd = np.zeros(65, float32)[1:]
    with pytest.raises(ValueError, match="array must start at a multiple of 8 bytes"):
        kernels.launch_all_reduce_norm(odd, weight, np.zeros(64, float16), table, 2, 1e-5)
    half = np.zeros(65, float16)[1:]
    with pytest.raises(ValueError, match="out must start at a multiple of 4 bytes"):
        kernels.launch_all_reduce_norm(x[0], weight, half, table, 2, 1e-5)
    kernels.launch_all_reduce_norm(x[0], weight, half, table, 2, 1e-5, order=order[:64])


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_reference_adds_in_rank_order_and_rounds_once(dtype):
    parts = [random(rank, (300,), dtype, 10.0 ** (rank % 3)) for rank in range(5)]
    expected = np.empty(300, dtype)
    for i in range(300):
        total = np.float32(parts[0][i])
        for part in parts[1:]:
            total = np.float32(np.float64(total) + np.float64(np.float32(part[i])))
        expected[i] = total
    assert same_bits(all_reduce_reference(parts), expected)
    if dtype == float32:
        assert not same_bits(all_reduce_reference(parts[::-1]), expected)
    else:
        rounded_often = parts[0]
        for part in parts[1:]:
            rounded_often = (rounded_often.astype(float32) + part.astype(float32)).astype(dtype)
        assert not same_bits(rounded_often, expected)


def test_the_norm_reference_is_the_sequence_of_ops():
    parts = [random(rank, (3, 64), float32) for rank in range(3)]
    weight = random(9, (64,), float16)
    order = np.concatenate([np.random.default_rng(1).permutation(64), [-1] * 5]).astype(np.int32)
    for given in (None, order):
        total, normed = all_reduce_norm_reference(parts, weight, 1e-5, given)
        assert same_bits(total, all_reduce_reference(parts))
        assert same_bits(normed.astype(float16), rms_norm(total, weight, eps=1e-5, dtype=float16, order=given))


# --- the protocol: every order of events of two ranks -----------------------------------------------------------------


def broken_orders(programs):
    """The events that find wrong memory in some order of two ranks' steps. programs[rank]: [(kind, place, value)].

    "write": memory[place] = value; "wait": until memory[place] == value; "read": it must hold value then.
    """
    seen, waiting, broken = set(), [((0, 0), ())], set()
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        counts, memory = state
        moves = 0
        for rank in range(2):
            if counts[rank] == len(programs[rank]):
                continue
            kind, place, value = programs[rank][counts[rank]]
            held = dict(memory).get(place)
            if kind == "wait" and held != value:
                continue
            if kind == "read" and held != value:
                broken.add((rank, place, value, held))
            moves += 1
            after = tuple(sorted({**dict(memory), place: value}.items())) if kind == "write" else memory
            waiting.append((tuple(c + (r == rank) for r, c in enumerate(counts)), after))
        if not moves and counts != tuple(map(len, programs)):
            broken.add("a rank waits for ever")
    return broken


def letters_program(rank, sets, threads=2, epochs=5):
    """Each launch: all threads send, then all wait for a letter (which is to read it); the next launch comes after all."""
    other, steps = 1 - rank, []
    for epoch in range(epochs):
        steps += [("write", (other, epoch % sets, t), epoch) for t in range(threads)]
        steps += [("wait", (rank, epoch % sets, t), epoch) for t in range(threads)]
    return steps


def pieces_program(rank, has_second_flag=True, epochs=4):
    """Each round: a piece and a flag; the others' piece; the sum and a flag; the others' sum."""
    other, steps = 1 - rank, []
    for epoch in range(epochs):
        for shot in range(2):
            steps.append(("write", (other, "piece", shot), (epoch, shot)))
            if shot == 0 or has_second_flag:
                steps += [("write", (other, "flag", shot), epoch), ("wait", (rank, "flag", shot), epoch)]
            steps.append(("read", (rank, "piece", shot), (epoch, shot)))
    return steps


def test_two_sets_of_letters_are_enough_and_one_is_not():
    assert broken_orders([letters_program(rank, 2) for rank in range(2)]) == set()
    assert broken_orders([letters_program(rank, 1) for rank in range(2)]) == {"a rank waits for ever"}


def test_one_set_of_pieces_is_enough_with_both_flags():
    assert broken_orders([pieces_program(rank) for rank in range(2)]) == set()
    assert broken_orders([pieces_program(rank, has_second_flag=False) for rank in range(2)])


# --- what every communicator offers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("result", FLOATS, ids=str)
@pytest.mark.parametrize("is_ordered", [False, True])
def test_sum_and_norm_are_the_ops_one_after_the_other(result, is_ordered):
    comms = LocalComm.group(3)
    parts, weight = [random(rank, (2, 1, 96), float32) for rank in range(3)], random(6, (96,), bfloat16)
    order = np.append(np.arange(95, -1, -1), -1).astype(np.int32) if is_ordered else None

    def work(comm):
        total, array = comm.all_reduce(parts[comm.rank]), parts[comm.rank].copy()
        expected = rms_norm(total, weight, eps=1e-5, dtype=result, order=order)
        out = np.full(expected.shape, np.nan, result)
        assert comm.all_reduce_norm(array, weight, eps=1e-5, dtype=result, order=order, out=out) is out
        assert same_bits(array, total) and same_bits(out, expected)
        array = parts[comm.rank].copy()
        mine = order if comm.rank else None  # a rank without the product takes part all the same
        assert same_bits(comm.all_reduce_norm(array, weight, order=mine), rms_norm(total, weight, order=mine))
        return True

    assert in_threads([lambda comm=comm: work(comm) for comm in comms]) == [True] * 3


def test_sum_and_norm_within_together():
    comms = LocalComm.group(2)
    arrays, weight = [np.ones((1, 4), float32) for _ in comms], np.ones(4, float32)
    with together(comms):
        found = [c.all_reduce_norm(x, weight, dtype=float16) for c, x in zip(comms, arrays, strict=True)]
    assert all(np.all(x == 2) for x in arrays) and all(np.allclose(y.astype(float32), 1, rtol=1e-3) for y in found)


def test_arrays_that_do_not_go_together_are_refused():
    comm = SoloComm()
    x, weight, order = np.ones((2, 4), float32), np.ones(4, float32), np.zeros(3, np.int32)
    with pytest.raises(TypeError, match="array must have dtype float32"):
        comm.all_reduce_norm(x.astype(float16), weight)
    with pytest.raises(ValueError, match="weight must have shape"):
        comm.all_reduce_norm(x, weight[:3])
    with pytest.raises(TypeError, match="order must have dtype int32"):
        comm.all_reduce_norm(x, weight, order=order.astype(np.int64))
    with pytest.raises(ValueError, match="out must have shape"):
        comm.all_reduce_norm(x, weight, order=order, out=np.empty((2, 4), float32))
    with pytest.raises(ValueError, match="out overlaps array"):
        comm.all_reduce_norm(x, weight, out=x)
    with pytest.raises(ValueError, match="array overlaps weight"):
        comm.all_reduce_norm(x, x[0])


# --- NcclComm with and without it -------------------------------------------------------------------------------------


class Runtime:
    """The calls of CUDA's runtime that peer.py makes, on host memory."""

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status):
            super().__init__(f"cudaError {status}")
            self.status = status

    def __init__(self):
        self.blocks, self.opened, self.enabled, self.lacking = {}, [], set(), set()
        self.current = lambda: 0

    def malloc(self, size):
        block = (ctypes.c_char * size)()
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def hostAlloc(self, size, flags):
        assert flags == 3
        return self.malloc(size)

    def free(self, address):
        del self.blocks[address]

    freeHost = free

    def memset(self, address, value, size):
        ctypes.memset(address, value, 4096)

    def deviceSynchronize(self):
        pass

    def ipcGetMemHandle(self, address):
        return address.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle):
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def ipcCloseMemHandle(self, address):
        self.opened.remove(address)

    def deviceCanAccessPeer(self, device, other):
        return (device, other) not in self.lacking

    def deviceEnablePeerAccess(self, other):
        if (pair := (self.current(), other)) in self.enabled:
            raise self.CUDARuntimeError(704)
        self.enabled.add(pair)

    def runtimeGetVersion(self):
        return 13000


class Kernels:
    """Launches on host memory: a sum is there once all ranks have launched theirs."""

    def __init__(self, ranks):
        self.ranks, self.launched, self.changed = ranks, [], threading.Condition()
        self.counts, self.arrays, self.wrong = collections.Counter(), collections.defaultdict(dict), False

    def launch_norm(self, x, weight, y, table, ranks, eps, *, order=None, is_empty=False):
        def finish(total, out):
            out[...] = total
            y[...] = rms_norm(total, np.asarray(weight), eps=eps, dtype=y.dtype, order=order)

        self.launch(x, x, table, ranks, "norm", is_empty=is_empty, finish=finish)

    def launch(self, x, y, table, ranks, way, *, is_empty=False, finish=None):
        rank = int(table["rank"])
        assert ranks == self.ranks and table["mailboxes"][rank] != 0
        with self.changed:
            self.launched.append((rank, way, is_empty))
            if is_empty:
                return
            waiting = self.arrays[self.counts[rank]]
            self.counts[rank] += 1
            waiting[rank] = x, y, finish
            if len(waiting) == ranks:
                total = all_reduce_reference([waiting[r][0] for r in range(ranks)])
                for _, out, finish_one in waiting.values():
                    if finish_one is not None:
                        finish_one(np.array(total), out)
                        continue
                    out[...] = total
                    out[-1:] += self.wrong
                waiting.clear()
                self.changed.notify_all()

    def synchronize(self):
        with self.changed:
            assert self.changed.wait_for(lambda: not any(self.arrays.values()), 10)


@pytest.fixture
def machine(monkeypatch):
    """(runtime, kernels(ranks)) under NcclComm: NCCL, CuPy and the kernels on host memory."""
    library, runtime = StandInForNccl(), Runtime()
    cupy = library.cupy()
    cupy.cuda.runtime = runtime
    runtime.current = library.current_device
    found = {}

    class Stream(type(cupy.cuda.get_current_stream())):
        def synchronize(self):
            found["kernels"].synchronize()

    cupy.cuda.get_current_stream = Stream
    cupy.ndarray.get = lambda self: np.array(self)
    monkeypatch.setattr(nccl, "require_cupy", lambda: cupy)
    monkeypatch.setattr(peer, "require_cupy", lambda: cupy)
    monkeypatch.setattr(nccl, "nccl", lambda: library)
    monkeypatch.delenv("CUPYQ_TP_PEER", raising=False)
    monkeypatch.setattr(peer, "TWO_SHOT_ROUND_BYTES", 2000)
    monkeypatch.setattr(peer, "_arch_number", lambda device: found.get("archs", {}).get(device, 90))

    def start(ranks, archs=()):
        found["kernels"], found["archs"] = Kernels(ranks), dict(enumerate(archs))
        monkeypatch.setattr(peer, "launch_all_reduce", found["kernels"].launch)
        monkeypatch.setattr(peer, "launch_all_reduce_norm", found["kernels"].launch_norm)
        return found["kernels"]

    yield runtime, start, library, cupy
    del cupy.ndarray.get


def on_device(cupy, comm, array):
    with comm.on_device():
        return cupy.asarray(array)


def check_loads(launches, ranks):
    """The test's two kernels are loaded once on each GPU, all before one waits for another."""
    loads, sums = launches.launched[: 2 * ranks], launches.launched[2 * ranks :]
    assert sorted(loads) == [(rank, way, True) for rank in range(ranks) for way in ("one_shot", "two_shot")]
    assert sums and not any(is_empty for *_, is_empty in sums)


def test_a_process_with_several_gpus_uses_peer_memory(machine, capsys, monkeypatch):
    monkeypatch.setitem(kernels.TWO_SHOT_BYTES, 3, 600 << 10)
    runtime, start, library, cupy = machine
    launches = start(3)
    comms = NcclComm.group([0, 1, 2])
    assert all(comm.peer_memory is not None for comm in comms)
    assert runtime.enabled == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert len(runtime.blocks) == 6  # mailboxes, and words of the host
    check_loads(launches, 3)
    launches.launched.clear()
    library.calls.clear()
    arrays = [on_device(cupy, comm, np.full(1000, comm.rank + 1, float16)) for comm in comms]
    residuals = [on_device(cupy, comm, np.full((2, 16), comm.rank + 2, float32)) for comm in comms]
    weights = [on_device(cupy, comm, np.full(16, 3, float32)) for comm in comms]
    with together(comms):
        sums = [comm.all_reduce(array) for comm, array in zip(comms, arrays, strict=True)]
        given = zip(comms, residuals, weights, strict=True)
        normed = [comm.all_reduce_norm(residual, weight, dtype=float16) for comm, residual, weight in given]
        assert launches.launched == []
    assert all(np.all(total == 6) for total in sums) and all(np.all(residual == 9) for residual in residuals)
    assert all(np.allclose(y.astype(float32), 3, rtol=1e-3) for y in normed)
    # All kernels are loaded before one waits for another, and each rank's first one comes before the second of any.
    empty, real = launches.launched[:6], launches.launched[6:]
    assert all(is_empty for *_, is_empty in empty) and not any(is_empty for *_, is_empty in real)
    assert [rank for rank, *_ in real] == [0, 1, 2, 0, 1, 2] and library.calls == []
    launches.launched.clear()
    with together(comms):
        for comm, array in zip(comms, arrays, strict=True):
            comm.all_reduce(array, sums[comm.rank])
    assert launches.launched == [(rank, "one_shot", False) for rank in range(3)]
    big = [on_device(cupy, comm, np.ones(kernels.TWO_SHOT_BYTES[3] // 2 + 1, float16)) for comm in comms]
    with together(comms):
        for comm, array in zip(comms, big, strict=True):
            comm.all_reduce(array, array)
    assert [name for _, name in library.calls] == ["allReduce"] * 3 and len(launches.launched) == 3
    for comm in comms:
        comm.close()
        comm.close()
    assert runtime.blocks == {} and capsys.readouterr().err == ""


def test_ranks_with_other_sizes_within_together(machine, monkeypatch):
    monkeypatch.setitem(kernels.TWO_SHOT_BYTES, 2, 600 << 10)
    _, start, _, cupy = machine
    start(2)
    comms = NcclComm.group([0, 1])
    with pytest.raises(BackendError, match="arrays of different sizes"), together(comms):
        comms[0].all_reduce(on_device(cupy, comms[0], np.ones(8, float16)))
        comms[1].all_reduce(on_device(cupy, comms[1], np.ones(kernels.TWO_SHOT_BYTES[2], float16)))
    assert all("different sizes" in comm.failure for comm in comms)


def test_a_kernel_that_gave_up_is_an_error(machine):
    runtime, start, _, cupy = machine
    start(3)
    comms = NcclComm.group([0, 1, 2])
    memory = comms[1].peer_memory
    assert memory.failure() is None
    comms[1].check()
    ctypes.c_uint32.from_address(memory._host + 4).value = kernels.GAVE_UP_WAITING | 0b101
    with pytest.raises(BackendError, match="rank 1 waited in vain for ranks 0, 2 in an all-reduce"):
        comms[1].all_reduce(on_device(cupy, comms[1], np.ones(8, float16)))
    assert ctypes.c_uint32.from_address(memory._host).value == 1  # and its kernels wait no longer
    comms[0].abort("no more")
    assert ctypes.c_uint32.from_address(comms[0].peer_memory._host).value == 1
    ctypes.c_uint32.from_address(comms[2].peer_memory._host + 4).value = kernels.GAVE_UP_STOPPED | 0b1
    with pytest.raises(BackendError, match="rank 2 was stopped while it waited for rank 0 in an all-reduce"):
        comms[2].wait()
    for comm in comms:
        comm.close()
    assert runtime.blocks == {} and memory.failure() is None


@pytest.mark.parametrize("wrong", ["access", "sums", "memory"])
def test_without_peer_memory_nccl_does_it_all_and_one_line_says_why(machine, capsys, wrong):
    runtime, start, library, cupy = machine
    launches = start(2)
    if wrong == "access":
        runtime.lacking.add((1, 0))
    elif wrong == "sums":
        launches.wrong = True
    else:
        runtime.ipcGetMemHandle = runtime.hostAlloc = lambda *_: (_ for _ in ()).throw(runtime.CUDARuntimeError(2))
    comms = NcclComm.group([0, 1])
    (line,) = capsys.readouterr().err.splitlines()
    reason = {"access": "GPU 1 has no access to the memory of GPU 0", "sums": "in a test, 1 of 1 sums by all_reduce_one_shot"}
    assert line.startswith("cupyq: all-reduces go through NCCL alone") and reason.get(wrong, "cudaError 2") in line
    assert runtime.blocks == {} and all(comm.peer_memory is None for comm in comms)
    arrays = [on_device(cupy, comm, np.ones(8, float16)) for comm in comms]
    with together(comms):
        for comm, array in zip(comms, arrays, strict=True):
            comm.all_reduce(array, array)
    assert all(np.all(array == 2) for array in arrays) and len(library.calls) == 2
    for comm in comms:
        comm.close()


@pytest.mark.parametrize("way", ["group", "join"])
@pytest.mark.parametrize("archs", [(90, 100), (90, 89)], ids=str)
def test_norms_go_by_clusters_where_all_gpus_have_them(machine, way, archs):
    runtime, start, library, cupy = machine
    start(2, archs)
    comms = NcclComm.group([0, 1]) if way == "group" else joined(library, 2)
    assert [comm.peer_memory.have_clusters for comm in comms] == [min(archs) >= 90] * 2
    assert [comm.peer_memory.fits_norm(2, 4096, float16) for comm in comms] == [min(archs) >= 90] * 2
    assert not any(comm.peer_memory.fits_norm(3, 4096, float16) for comm in comms)
    for comm in comms:
        comm.close()


def test_peer_memory_can_be_left_out(machine, capsys, monkeypatch):
    _, start, _, _ = machine
    launches = start(2)
    monkeypatch.setenv("CUPYQ_TP_PEER", "0")
    assert all(comm.peer_memory is None for comm in NcclComm.group([0, 1]))
    assert launches.launched == [] and capsys.readouterr().err == ""


def joined(library, ranks):
    joins = [lambda rank=rank: NcclComm.join(rank, ranks, b"id", rank, timeout=10) for rank in range(ranks)]
    comms = in_threads(joins)
    assert all(isinstance(comm, NcclComm) for comm in comms), comms
    return comms


def test_processes_open_each_others_memory(machine, capsys):
    runtime, start, library, cupy = machine
    launches = start(3)
    comms = joined(library, 3)
    assert all(comm.peer_memory is not None for comm in comms) and len(runtime.opened) == 6
    addresses = [comm.peer_memory.address for comm in comms]
    for comm in comms:
        assert list(comm.peer_memory._tables["norm"]["mailboxes"][:3]) == addresses
        assert all(table["limit_ns"] == peer.WAIT_S * 1e9 for table in comm.peer_memory._tables.values())
    check_loads(launches, 3)
    launches.launched.clear()

    def work(comm):
        out = comm.all_reduce(on_device(cupy, comm, np.full(9, comm.rank, float32)))
        launches.synchronize()
        return out.tolist()

    assert in_threads([lambda comm=comm: work(comm) for comm in comms]) == [[3.0] * 9] * 3
    assert len(launches.launched) == 3
    for comm in comms:
        comm.close()
    assert runtime.blocks == {} and runtime.opened == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", ["one cannot", "hosts", "open", "sums"])
def test_processes_agree_to_do_without(machine, capsys, monkeypatch, wrong):
    runtime, start, library, _ = machine
    launches = start(2)
    if wrong == "one cannot":
        handle_of = runtime.ipcGetMemHandle

        def refuse(address):
            if library.current_device() == 1:
                raise runtime.CUDARuntimeError(801)
            return handle_of(address)

        runtime.ipcGetMemHandle = refuse
    elif wrong == "hosts":
        numbers = itertools.count()
        monkeypatch.setattr(peer, "_host_digest", lambda: bytes([next(numbers)]) * 32)
    elif wrong == "open":
        runtime.ipcOpenMemHandle = lambda handle: (_ for _ in ()).throw(runtime.CUDARuntimeError(205))
    else:
        launches.wrong = True
    comms = joined(library, 2)
    (line,) = capsys.readouterr().err.splitlines()
    reason = {
        "one cannot": "rank 1: cudaError 801",
        "hosts": "several hosts",
        "open": "rank 0: cudaError 205",
        "sums": "rank 0: in a test",
    }
    assert reason[wrong] in line and all(comm.peer_memory is None for comm in comms)
    assert runtime.blocks == {} and runtime.opened == []


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_bench_says_what_it_needs(monkeypatch):
    assert bench.gpu_counts("1,2,4") == (1, 2, 4)
    for text in ("0", "2,", "nine", "9"):
        with pytest.raises(ValueError, match="--gpus must be numbers of 1 to 8"):
            bench.gpu_counts(text)
    monkeypatch.setattr(bench._device, "count", lambda: 5)
    assert bench.Options.parse().gpus == (2, 4) and bench.Options.parse((3,), True).sizes == bench.QUICK_SIZES
    for usable, asked in ((1, None), (3, (4,))):
        monkeypatch.setattr(bench._device, "count", lambda usable=usable: usable)
        with pytest.raises(BackendError, match=f"2 GPUs or more, and this process sees {usable}"):
            bench.Options.parse(asked)
    assert bench.SIZES[0] == 4096 and bench.SIZES[-1] == 64 << 20


def test_the_rows_of_the_bench_stand_under_their_names():
    row = {"gpus": 2, "what": "all_reduce", "bytes": 4096, "nccl_us": 12.34, "one_shot_us": 3.21, "two_shot_us": None}
    row |= {"limit_us": 1.5, "in_use": "one_shot", "bus_gigabytes_per_s": 7.0, "is_right": True}
    assert len(bench.row_text(row)) == len(bench.COLUMNS)
    assert bench.row_text(row).split() == ["2", "all_reduce", "4096", "12.3", "3.2", "-", "1.5", "one_shot", "7"]
    assert bench.row_text(row | {"is_right": False, "rows": 4}).endswith("WRONG")


# --- on several GPUs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4], ids="{} GPUs".format)
def comms(request):
    """The communicators of so many GPUs of this process, which use peer memory."""
    if gpu_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed, {gpu_count()} are here")
    found = NcclComm.group(range(request.param))
    for comm in found:
        assert comm.peer_memory is not None, "see the line on stderr"
    yield found
    for comm in found:
        comm.close()


def placed(cupy, comm, array, shift=0):
    with cupy.cuda.Device(comm.device):
        return cupy.asarray(np.concatenate([np.zeros(shift, array.dtype), array.ravel()]))[shift:].reshape(array.shape)


def waited(comms):
    for comm in comms:
        comm.wait()


def sum_forced(comms, arrays, outs, way):
    for is_empty in (True, False):
        for comm, array, out in zip(comms, arrays, outs, strict=True):
            with comm.on_device():
                comm.peer_memory.all_reduce(array, out, way=way, is_empty=is_empty)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_on_gpus(cupy, comms, dtype):
    """Sizes at the seams and random ones, in turn by both kernels, in place and not, at odd addresses too."""
    ranks, generator = len(comms), np.random.default_rng(1)
    most = Mailbox(ranks).one_shot_bytes // dtype.itemsize
    seams = [1, 2, 3, 4, 5, 8, 255, 1023, 1024, 1025, 4096, 128 * 256 * 4 + 1, most]
    sizes = [*seams, *np.exp(generator.uniform(0, np.log(1e6), 16)).astype(int)]
    for turn, size in enumerate(map(int, sizes)):
        values = [random((turn, rank), (size,), dtype, 4.0) for rank in range(ranks)]
        expected = all_reduce_reference(values)
        for way in ("one_shot", "two_shot"):
            if way == "one_shot" and size > most:
                continue
            shift = turn % 3
            arrays = [placed(cupy, comm, values[comm.rank], shift) for comm in comms]
            outs = arrays if turn % 2 else [placed(cupy, comm, np.full(size, np.nan, dtype), shift) for comm in comms]
            sum_forced(comms, arrays, outs, way)
            waited(comms)
            for out in outs:
                assert same_bits(out.get(), expected), (size, way)


@pytest.mark.gpu
def test_the_same_bits_on_repeat_and_through_the_communicator(cupy, comms):
    values = [random(rank, (20_000,), float16, 100.0) for rank in range(len(comms))]
    expected = all_reduce_reference(values)
    arrays = [placed(cupy, comm, values[comm.rank]) for comm in comms]
    outs = [placed(cupy, comm, np.zeros(20_000, float16)) for comm in comms]
    for _ in range(20):
        with together(comms):
            for comm, array, out in zip(comms, arrays, outs, strict=True):
                comm.all_reduce(array, out)
        waited(comms)
        assert all(same_bits(out.get(), expected) for out in outs)


def order_of(dim, seed):
    """A permutation of the columns, with some that are none among them and at the end."""
    mixed = np.random.default_rng(seed).permutation(np.append(np.arange(dim), [-1] * 24))
    return np.append(mixed, [-1] * 8).astype(np.int32)


def check_norm(cupy, comms, rows, dim, result, weight, is_ordered, seed=0, repeats=2):
    """The kernel, by together(), against the reference; the same bits on all ranks and repeats."""
    values = [random((rank, seed), (rows, dim), float32, 3.0) for rank in range(len(comms))]
    scales, order = random(seed, (dim,), weight), order_of(dim, seed) if is_ordered else None
    total, exact = all_reduce_norm_reference(values, scales, 1e-5, order)
    weights = [placed(cupy, comm, scales) for comm in comms]
    orders = [placed(cupy, comm, order) if is_ordered else None for comm in comms]
    found = set()
    for _ in range(repeats):
        arrays = [placed(cupy, comm, values[comm.rank]) for comm in comms]
        outs = [placed(cupy, comm, np.full(exact.shape, np.nan, result)) for comm in comms]
        assert all(comm.peer_memory.fits_norm(rows, dim, result) for comm in comms)
        with together(comms):
            for comm, array, scale, place, out in zip(comms, arrays, weights, orders, outs, strict=True):
                comm.all_reduce_norm(array, scale, eps=1e-5, dtype=result, order=place, out=out)
        waited(comms)
        for array, out in zip(arrays, outs, strict=True):
            assert same_bits(array.get(), total), (rows, dim, is_ordered)
            found.add(out.get().tobytes())
    assert len(found) == 1, (rows, dim, is_ordered)
    normed = np.frombuffer(found.pop(), result).reshape(exact.shape).astype(np.float64)
    # One rounding to 16 bits, of a value that is a few roundings of float32 from the exact one.
    rounding = np.abs(exact) * 2.0 ** (-8 if result == bfloat16 else -11) + np.abs(exact) * 2e-6 + 2.0**-25
    assert (np.abs(normed - exact) <= rounding).all(), (rows, dim, is_ordered)
    if is_ordered:
        assert not normed[:, order < 0].any() and (order < 0).sum() == 32
        if dim > 64:
            assert not (np.abs(np.roll(normed, 1, axis=1) - exact) <= rounding).all()


@pytest.fixture
def clusters(comms):
    if not all(comm.peer_memory.have_clusters for comm in comms):
        pytest.skip("these GPUs have no clusters of thread blocks")


@pytest.mark.gpu
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("dim", [4096, 8192, 5120, 2880, 16384, 16])
def test_sum_and_norm_on_gpus(cupy, comms, clusters, dim, is_ordered):
    for turn, rows in enumerate((1, 2, 2, 1, 1)):
        result, weight = ((float16, float32), (bfloat16, float32), (float16, float16), (bfloat16, bfloat16))[turn % 4]
        check_norm(cupy, comms, rows, dim, result, weight, is_ordered, seed=turn)


@pytest.mark.gpu
def test_sum_and_norm_of_what_the_kernel_does_not_take(cupy, comms):
    """More rows, odd widths, float32 results: all_reduce and rms_norm, the same bits."""
    for rows, dim, result in ((3, 512, float16), (17, 512, float16), (2, 4098, bfloat16), (1, 1, float16), (3, 64, float32)):
        values, scales = [random((rank, rows), (rows, dim), float32) for rank in range(len(comms))], random(1, (dim,), float32)
        arrays, totals = ([placed(cupy, comm, values[comm.rank]) for comm in comms] for _ in range(2))
        weights, outs = [placed(cupy, comm, scales) for comm in comms], []
        with together(comms):
            for comm, array, weight in zip(comms, arrays, weights, strict=True):
                outs.append(comm.all_reduce_norm(array, weight, eps=1e-5, dtype=result))
        with together(comms):
            for comm, total in zip(comms, totals, strict=True):
                comm.all_reduce(total, total)
        waited(comms)
        for comm, array, total, weight, out in zip(comms, arrays, totals, weights, outs, strict=True):
            with comm.on_device():
                expected = rms_norm(total, weight, eps=1e-5, dtype=result)
            assert same_bits(array.get(), total.get()) and same_bits(out.get(), expected.get()), (rows, dim)


@pytest.mark.gpu
def test_sums_and_norms_in_a_graph(cupy, comms, clusters):
    """As in a decoder: ordered and not, small and large in turn. Each replay begins with what the one before left."""
    ranks, shapes = len(comms), ((1, 8192), (2, 64), (1, 2880), (2, 4096), (1, 16))
    streams, kept = [], []
    for comm in comms:
        with comm.on_device():
            streams.append(cupy.cuda.Stream(non_blocking=True))
            cases = []
            for turn, (rows, dim) in enumerate(shapes):
                order = cupy.asarray(order_of(dim, turn)) if turn % 2 == 0 else None
                out = cupy.zeros((rows, dim if order is None else order.size), float16)
                cases.append((cupy.full((rows, dim), comm.rank + 1, float32), cupy.full(dim, 2, float32), order, out))
            kept.append(cases)
            cupy.cuda.Device().synchronize()

    def queue():
        with together(comms):
            for comm, stream, cases in zip(comms, streams, kept, strict=True):
                with comm.on_device(), stream:
                    for array, weight, order, out in cases:
                        comm.all_reduce_norm(array, weight, eps=0.0, dtype=float16, order=order, out=out)
        for comm, stream, cases in zip(comms, streams, kept, strict=True):
            with comm.on_device(), stream:
                for array, *_ in cases:
                    cupy.multiply(array, (comm.rank + 1) / sum(range(1, ranks + 1)), out=array)  # the part it began with

    queue()
    graphs = bench.captured(comms, streams, queue)
    for _ in range(300):
        for comm, stream, graph in zip(comms, streams, graphs, strict=True):
            with comm.on_device():
                graph.launch(stream)
    for stream in streams:
        stream.synchronize()
    for comm, cases in zip(comms, kept, strict=True):
        comm.check()
        for array, _, order, out in cases:
            assert np.allclose(array.get(), comm.rank + 1, rtol=1e-3)
            expected = np.full(out.shape, 2.0) if order is None else np.where(order.get() < 0, 0.0, 2.0)
            assert np.allclose(out.get(), expected, rtol=1e-3), out.shape


def assert_gives_up(cupy, comms, start, pattern):
    """The first of these ranks, whose kernels wait since `start`, soon says what it waited for; then all are closed."""
    with pytest.raises(BackendError, match=pattern):
        while time.monotonic() < start + 20:
            comms[0].check()
    cupy.cuda.Device().synchronize()
    assert time.monotonic() - start < 4
    for comm in comms:
        comm._fail("the test is over")
        comm.close()


@pytest.mark.gpu
def test_a_rank_that_never_comes_to_a_norm(cupy):
    if gpu_count() < 2:
        pytest.skip("2 GPUs are needed")
    comms = NcclComm.group([0, 1])
    first = comms[0].peer_memory
    if not first.have_clusters:
        pytest.skip("these GPUs have no clusters of thread blocks")
    array, weight = placed(cupy, comms[0], np.ones((16, 4096), float32)), placed(cupy, comms[0], np.ones(4096, float32))
    out, order = placed(cupy, comms[0], np.zeros((16, 4096), float16)), placed(cupy, comms[0], np.arange(4096, dtype=np.int32))
    with comms[0].on_device():
        first.all_reduce_norm(array, weight, out, 1e-5, order=order, is_empty=True)
        cupy.cuda.Device().synchronize()
        first.wait_for(1)
        start = time.monotonic()
        for _ in range(20):  # once one gave up, none waits
            first.all_reduce_norm(array, weight, out, 1e-5, order=order)
        assert_gives_up(cupy, comms, start, "waited in vain for rank 1")


@pytest.mark.gpu
def test_a_thousand_replays_of_a_graph(cupy, comms):
    """Every replay sums other values, of several sizes: what is old or comes early shows in the total."""
    sizes = (1, 3000, 70_000, 500_000)
    streams, kept = [], []
    for comm in comms:
        with comm.on_device():
            streams.append(cupy.cuda.Stream(non_blocking=True))
            arrays = [cupy.full(size, comm.rank, float32) for size in sizes]
            kept.append([(array, cupy.zeros_like(array), cupy.zeros_like(array)) for array in arrays])
            for array, out, total in kept[-1]:
                cupy.add(array, 0, out=array)
                cupy.add(total, out, out=total)
            cupy.cuda.Device().synchronize()

    def queue():
        with together(comms):
            for comm, stream, arrays in zip(comms, streams, kept, strict=True):
                with comm.on_device(), stream:
                    for array, out, _ in arrays:
                        comm.all_reduce(array, out)
        for comm, stream, arrays in zip(comms, streams, kept, strict=True):
            with comm.on_device(), stream:
                for array, out, total in arrays:
                    cupy.add(total, out, out=total)
                    cupy.add(array, 1, out=array)

    queue()
    graphs = bench.captured(comms, streams, queue)
    for _ in range(1000):
        for comm, stream, graph in zip(comms, streams, graphs, strict=True):
            with comm.on_device():
                graph.launch(stream)
    for stream in streams:
        stream.synchronize()
    for comm in comms:
        comm.check()
    ranks = len(comms)
    # Run k of 1001 adds ranks * k + 0 + 1 + ... to the total: up to 4 million, which float32 holds.
    expected = sum(ranks * k + ranks * (ranks - 1) // 2 for k in range(1001))
    for arrays in kept:
        for _, _, total in arrays:
            assert np.all(total.get() == expected)


@pytest.mark.gpu
def test_epochs_that_begin_again(cupy, comms):
    """Large, small and large messages while counters pass 2**29 and 2**31: no letter of the past is taken for a new one."""
    for start in ((1 << 29) - 3, (1 << 31) - 5):
        for comm in comms:
            with comm.on_device():
                epochs = np.full(3 * 128, start, np.uint32)  # of all three kernels
                runtime = cupy.cuda.runtime
                runtime.deviceSynchronize()
                runtime.memcpy(comm.peer_memory.address + 128, epochs.ctypes.data, epochs.nbytes, runtime.memcpyHostToDevice)
        for turn, size in enumerate([60_000, 5, 60_000, 5, 300, 60_000, 60_000, 1, 60_000]):
            values = [random((turn, rank), (size,), float32) for rank in range(len(comms))]
            for way in ("one_shot", "two_shot"):
                arrays = [placed(cupy, comm, values[comm.rank]) for comm in comms]
                sum_forced(comms, arrays, arrays, way)
                waited(comms)
                assert all(same_bits(array.get(), all_reduce_reference(values)) for array in arrays), (start, turn, way)
        for turn, dim in enumerate([8192, 16, 8192, 64, 4096, 16, 8192, 16384, 16]):
            if comms[0].peer_memory.have_clusters:
                check_norm(cupy, comms, 1 + turn % 2, dim, float16, float32, turn % 2 == 0, seed=turn)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_rank_that_never_comes(cupy, way, is_stopped):
    if gpu_count() < 2:
        pytest.skip("2 GPUs are needed")
    comms = NcclComm.group([0, 1])
    first = comms[0].peer_memory
    array = placed(cupy, comms[0], np.ones(5000, float16))
    with comms[0].on_device():
        first.all_reduce(array, array, way=way, is_empty=True)
        cupy.cuda.Device().synchronize()
        first.wait_for(30 if is_stopped else 1)
        start = time.monotonic()
        for _ in range(50):  # once one gave up, none waits
            first.all_reduce(array, array, way=way)
        if is_stopped:
            threading.Timer(0.5, first.stop).start()
        pattern = "stopped while it waited for rank 1" if is_stopped else "waited in vain for rank 1"
        assert_gives_up(cupy, comms, start, pattern)


@pytest.mark.gpu
def test_threads_that_are_late_and_allocate(cupy, comms):
    """A thread for each GPU, and new memory while the others wait: CUDA must not wait for their kernels meanwhile."""

    def work(comm):
        runtime, addresses = cupy.cuda.runtime, []
        with comm.on_device():
            for turn in range(6):
                if turn % comm.ranks == comm.rank:
                    time.sleep(0.1)
                    addresses.append(runtime.malloc(64 << 20))
                array = cupy.asarray(np.full(3000 * (turn + 1), comm.rank + turn, float32))
                comm.all_reduce(array, array)
                comm.wait()
                assert np.all(array.get() == comm.ranks * turn + comm.ranks * (comm.ranks - 1) // 2)
            comm.barrier()
            for address in addresses:
                runtime.free(address)
        return "done"

    start = time.monotonic()
    assert in_threads([lambda comm=comm: work(comm) for comm in comms]) == ["done"] * len(comms)
    assert time.monotonic() - start < 15


@pytest.mark.gpu
def test_no_memory_is_kept(cupy):
    if gpu_count() < 2:
        pytest.skip("2 GPUs are needed")

    def free():
        found = []
        for device in range(2):
            with cupy.cuda.Device(device):
                cupy.get_default_memory_pool().free_all_blocks()
                found.append(cupy.cuda.runtime.memGetInfo()[0])
        return found

    def once():
        memories = [peer.PeerMemory(rank, 2, rank) for rank in range(2)]
        for memory in memories:
            memory.connect([other.address for other in memories], 5.0)
        assert peer._test(memories) is None
        for memory in memories:
            memory.close()

    assert peer._enable_access([0, 1]) is None
    once()
    before = free()
    for _ in range(10):
        once()
    assert all(abs(after - start) < Mailbox(2).size for after, start in zip(free(), before, strict=True))


PROCESS = """
import os, signal, sys, time
import cupy, numpy as np
from cupyq.ops.all_reduce import all_reduce_reference
from cupyq.tp import connect

comm = connect(timeout=60, backend="cupy")
assert comm.peer_memory is not None
generators = [np.random.default_rng(rank) for rank in range(comm.ranks)]

def values(size, dtype):
    return [g.standard_normal(size).astype(dtype) for g in generators]

common = np.random.default_rng(99)
for turn in range(40):
    size, dtype = int(np.exp(common.uniform(0, 14))), [np.float16, np.float32][turn % 2]
    parts = values(size, dtype)
    time.sleep(0.02 * ((turn + comm.rank) % 3 == 0))
    found = comm.all_reduce(cupy.asarray(parts[comm.rank]))
    comm.wait()
    assert found.get().tobytes() == all_reduce_reference(parts).tobytes(), (turn, size)

with cupy.cuda.Stream(non_blocking=True) as stream:
    array, total = cupy.full(8192, comm.rank, np.float32), cupy.zeros(8192, np.float32)
    cupy.add(total, array, out=total)
    out = cupy.empty_like(array)
    comm.all_reduce(array, out)
    comm.wait()
    array.fill(comm.rank); total.fill(0)
    stream.begin_capture()
    for _ in range(10):
        comm.all_reduce(array, out)
        cupy.add(total, out, out=total)
        cupy.add(array, 1, out=array)
    graph = stream.end_capture()
    for _ in range(100):
        graph.launch(stream)
    comm.wait()
    ranks = comm.ranks
    assert np.all(total.get() == sum(ranks * k + ranks * (ranks - 1) // 2 for k in range(1000)))
    print("sums are right", flush=True)
    if "die" in sys.argv:
        start = time.monotonic()
        if comm.rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while time.monotonic() < start + 30:
                for _ in range(20):
                    graph.launch(stream)
                comm.wait()
        except Exception as error:
            print(f"{time.monotonic() - start:.1f} s: {type(error).__name__}: {error}", flush=True)
comm.close()
"""


def run_processes(ranks, *arguments):
    """[(exit status, stdout, stderr)] of PROCESS on so many GPUs."""
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), *arguments],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [(process.wait(120), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_process_for_each_gpu(cupy, ranks):
    if gpu_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, {gpu_count()} are here")
    for status, said, problems in run_processes(ranks):
        assert status == 0 and said.strip() == "sums are right", problems


@pytest.mark.gpu
def test_a_process_that_is_killed(cupy):
    if gpu_count() < 2:
        pytest.skip("2 GPUs are needed")
    *survivors, killed = run_processes(min(4, gpu_count()), "die")
    assert killed[0] == -9
    for _, said, problems in survivors:
        found = re.search(r"([\d.]+) s: BackendError: .*died", said)
        assert found, (said, problems)
        assert float(found[1]) < 10


@pytest.mark.gpu
def test_the_bench_on_gpus(cupy):
    if gpu_count() < 2:
        pytest.skip("2 GPUs are needed")
    out = io.StringIO()
    rows, is_right = bench.run(bench.Options((2,), (4096, 1 << 20)), out)
    assert is_right, out.getvalue()
    assert len(rows) == 5 and all(row["nccl_us"] > 0 and row["one_shot_us"] > 0 for row in rows)
    assert len(out.getvalue().splitlines()) == 7
