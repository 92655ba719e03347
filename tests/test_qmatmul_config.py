"""How products with few rows are cut: every choice, for every problem, takes all of the weights once and fits the GPU."""

import functools
import importlib
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from cupyq import _device
from cupyq._kernels import SOURCE_FOLDER
from cupyq.ops.qmatmul_config import (
    COUNTERS,
    STEP_BLOCKS,
    Problem,
    candidate_configs,
    make_config,
    pick_config,
    widths_present,
)
from cupyq.ops.qmatmul_wgmma import wgmma_config, wgmma_workspace_parts
from cupyq.ops.qmatrix_join import MAX_JOINED

qmatmul = importlib.import_module("cupyq.ops.qmatmul")  # the op of the same name hides the module

SHARED_KIB = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
"""What a thread block may have (CUDA programming guide, compute capabilities)."""

SIZES = [
    *((4096, 4096), (4096, 6144), (14336, 4096), (4096, 28672), (8192, 28672), (28672, 8192), (4096, 128256)),
    *((32, 8), (96, 8), (96, 128256), (128, 32), (160, 40), (7392, 112), (10944, 1000), (29568, 8), (29568, 8192)),
    (65536, 1024),
]
WIDTHS = [((4,), False), ((2,), False), ((8, 6, 5, 4, 3, 2), False), ((4,), True), ((8,), True)]


def tiles_of(size):
    return -(-size // 32)


def problems():
    """Every size with every m, and with each of the other axes in turn: all together would be a million."""
    base = dict(widths=(4,), has_zeros=False, sm_count=132, arch_number=90)
    for k, n in SIZES:
        sizes = dict(column_tiles=tiles_of(n), blocks=tiles_of(k))
        for m in range(1, 65):
            yield Problem(m=m, **sizes, **base)
        for m, arch, sm_count in itertools.product((1, 5, 16, 33, 64), SHARED_KIB, (16, 40, 108, 160)):
            yield Problem(m=m, **sizes, **base | dict(arch_number=arch, sm_count=sm_count))
        for m, (widths, has_zeros), arch in itertools.product((1, 8, 9, 64), WIDTHS, SHARED_KIB):
            kind = dict(widths=widths, has_zeros=has_zeros, arch_number=arch)
            yield Problem(m=m, **sizes, **base | kind)
            for matrices in (2, MAX_JOINED):
                joined = dict(column_tiles=matrices * tiles_of(n), blocks=tiles_of(k), matrices=matrices)
                yield Problem(m=m, **joined, **base | kind)
                yield Problem(m=m, **joined, **base | kind, is_gated=matrices == 2)
        for m, row_tiles in itertools.product((8, 16, 64), (1, 7, 300)):
            yield Problem(m=m, **sizes, **base, row_tiles=row_tiles)


def constants():
    """{name: value} of the whole numbers that qmatmul.cuh and tiles.cuh define."""
    text = "".join((SOURCE_FOLDER / name).read_text() for name in ("qmatmul.cuh", "tiles.cuh"))
    return {name: int(value) for name, value in re.findall(r"^constexpr int (\w+) = (\d+);", text, re.MULTILINE)}


def layout(problem, config):
    """Bytes of shared memory as multiply_rows lays them out: rings, block tables, rows of x, sums handed over."""
    c, warps = constants(), config.warps_n * config.warps_k
    scales = c["STEP"] * 2 * c["TILE"] * (2 if problem.has_zeros else 1)
    ring = config.slots * (scales + c["STEP"] * max(problem.widths) * 4 * c["TILE"])
    steps = math.ceil(problem.blocks / c["STEP"])
    entries = c["STEP"] * (steps + 1)
    staged_rows = min(8, problem.m) if config.m_tiles == 1 else 8 * config.m_tiles
    stride = min(config.chunk_steps, steps) * (c["STEP"] * c["TILE"] * 2) + 16  # an odd multiple of 16 bytes
    is_direct = config.warps_k == 1 and not problem.is_gated
    handed = 0 if is_direct else warps * staged_rows * c["HANDED_STRIDE"] * 4
    return [warps * ring, problem.matrices * entries * 4, staged_rows * stride, handed]


@functools.cache
def covers(steps, slices, slice_steps, chunk_steps, warps_k):
    """Whether the warps of all slices and chunks take each step once, as share_of of qmatmul.cuh divides them."""
    taken, share = np.zeros(steps, np.int32), -(-chunk_steps // warps_k)
    for slice_ in range(slices):
        end = min((slice_ + 1) * slice_steps, steps)
        if slice_ * slice_steps >= end:
            return False  # nothing to do, and nobody would add it
        for chunk in range(slice_ * slice_steps, end, chunk_steps):
            chunk_end = min(chunk + chunk_steps, end)
            for warp in range(warps_k):  # always the same part of a chunk, so that no other warp's rows of x are overwritten
                first = min(chunk + warp * share, chunk_end)
                taken[first : min(first + share, chunk_end)] += 1
    return bool((taken == 1).all())


def check_config(problem, config):
    c, groups = config, -(-problem.column_tiles // config.warps_n)
    assert covers(problem.steps, c.slices, c.slice_steps, c.chunk_steps, c.warps_k)
    assert 1 <= c.chunk_steps <= c.slice_steps
    parts = layout(problem, c)
    assert all(part % 16 == 0 for part in parts) and c.shared_bytes == sum(parts)
    # A few static variables lie beside it, and the driver keeps 1 KiB.
    assert c.shared_bytes + 1024 <= SHARED_KIB[problem.arch_number] * 1024
    row_blocks = -(-problem.m // (8 * c.m_tiles))
    if problem.matrices == 1:  # of qmatmul_grouped, a thread block takes all rows of a row tile
        assert row_blocks == 1
    if c.slices > 1:
        assert groups * problem.row_tiles * row_blocks <= COUNTERS
    assert 1 <= c.thread_blocks <= groups * c.slices and c.thread_blocks <= 2 * problem.sm_count
    assert c.threads == 32 * c.warps_n * c.warps_k <= 1024 and 2 <= c.slots <= 8
    assert c.warps_n == 1 or c.warps_k == 1 or c.warps_k <= 15  # one named barrier each, beside that of all
    assert c.m_tiles in (1, 2, 4, 8)
    if problem.is_gated:
        assert c.warps_n % 2 == 0  # gate and up meet in one thread block


def test_every_problem_has_a_cut():
    for count, problem in enumerate(problems()):  # noqa: B007
        config = pick_config(problem)
        assert config is not None, problem
        try:
            check_config(problem, config)
        except AssertionError as error:
            raise AssertionError(f"{problem}: {config}") from error
    assert count > 10_000


def test_every_candidate_is_a_cut():
    chosen = 0
    for k, n in ((32, 8), (2080, 2104), (14336, 4096), (29568, 112), (4096, 128256)):
        for m, arch, (widths, has_zeros), matrices in itertools.product((1, 3, 12, 40, 64), (75, 80, 90), WIDTHS[1:4], (1, 2)):
            sizes = dict(column_tiles=matrices * tiles_of(n), blocks=tiles_of(k), matrices=matrices, sm_count=132)
            kind = dict(widths=widths, has_zeros=has_zeros, arch_number=arch)
            for options in ({}, {"is_gated": True}) if matrices == 2 else ({},):
                problem = Problem(m=m, **sizes, **kind, **options)
                configs = candidate_configs(problem)
                assert len(set(configs)) == len(configs)
                for config in configs:
                    check_config(problem, config)
                chosen += pick_config(problem) in configs
    assert chosen > 0


def test_the_choice_depends_on_the_problem_alone():
    some = list(problems())[::97]
    before = [pick_config(problem) for problem in some]
    pick_config.cache_clear()
    assert [pick_config(problem) for problem in reversed(some)][::-1] == before


def test_cuts_that_do_not_fit_are_none():
    problem = Problem(64, 128, 128, (8,), False, 132, 90)
    assert make_config(problem, 8, 8, 4, 8, 1) is None
    assert make_config(problem, 8, 2, 1, 2, 1, shared_limit=16 * 1024) is None


def test_the_checks_bite():
    problem = Problem(8, 128, 100, (4,), False, 132, 90)
    good = pick_config(problem)
    check_config(problem, good)
    wrong = [
        dict(slice_steps=good.slice_steps - 1, chunk_steps=good.slice_steps - 1),
        dict(chunk_steps=good.slice_steps + 1),
        dict(slices=good.slices + 1),
        dict(shared_bytes=good.shared_bytes - 16),
        dict(slots=good.slots + 1),
        dict(m_tiles=0),
        dict(thread_blocks=0),
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            check_config(problem, type(good)(**vars(good) | change))
            pytest.fail(f"not noticed: {change}", pytrace=False)


def test_the_constants_are_those_of_the_kernel():
    assert constants()["STEP"] == STEP_BLOCKS and constants()["TILE"] == 32
    assert widths_present((1, 0, 0, 7, 0, 2)) == (8, 4, 2)


class Sizes:
    """What the choice of a cut reads of a QMatrix, or of a JoinedQMatrix of several, on a GPU."""

    xp, kind, shares_order, order, width_blocks = None, "exl2", True, object(), (0, 0, 0, 1, 0, 0)

    def __init__(self, k, *ns):
        self.k, self.blocks, self.n = k, tiles_of(k), sum(ns)
        self.column_tiles = sum(map(tiles_of, ns))
        self.matrices = tuple(Sizes(k, n) for n in ns) if len(ns) > 1 else (self,)


NS = [(4096,), (4096, 1024, 1024), (14336, 14336), (1024,), (264,), (8, 8), (128256,), (2560, 2560)]
KS = (128, 4096, 14336, 29568)
GPUS = [("sm_75", 40), ("sm_80", 108), ("sm_86", 40), ("sm_90a", 132), ("sm_120", 160)]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("arch", "sm_count"), GPUS)
def test_the_workspace_is_enough(arch, sm_count, batch_invariant, monkeypatch):
    """For as many rows and for fewer, for all matrices at once and for each alone."""
    monkeypatch.setattr(_device, "current", lambda: SimpleNamespace(arch=arch, sm_count=sm_count))
    for k, ns in itertools.product(KS, NS):
        q = Sizes(k, *ns)
        needed = 0
        for m in range(1, qmatmul.FUSED_ROWS + 1):
            for part in {q, *q.matrices}:
                rows = min(m, qmatmul._invariant_rows(part)) if batch_invariant else m
                for config in configs_of(rows, part, batch_invariant):
                    needed = max(needed, sum(qmatmul.workspace_parts(rows, part, config)))
            size = qmatmul.qmatmul_workspace_size(q, m, batch_invariant=batch_invariant)
            assert size >= COUNTERS + needed, (k, ns, m)


@pytest.mark.parametrize("rows", [17, 100, 8192, 9000, 20000])
def test_the_workspace_is_enough_for_many_rows(rows, monkeypatch):
    """On Hopper, whose own kernel takes a workspace too."""
    monkeypatch.setattr(_device, "current", lambda: SimpleNamespace(arch="sm_90a", sm_count=132))
    for k, ns in itertools.product(KS, NS):
        q = Sizes(k, *ns)
        size = qmatmul.qmatmul_workspace_size(q, rows)
        for m, part in itertools.product({17, 31, 64, 100, 1000, 5000, 8192, rows - 1, rows}, {q, *q.matrices}):
            if m <= rows and qmatmul.pick_kernel(m, "sm_90a", part.k, part.n, m % 2 == 0) == "wgmma":
                parts = wgmma_workspace_parts(m, part.blocks, wgmma_config(part, m))
                assert size >= COUNTERS + sum(parts), (k, ns, m)


def configs_of(m, q, batch_invariant):
    if batch_invariant:
        yield qmatmul._invariant_config(m, q)
        return
    for is_gated in {False, len(q.matrices) == 2}:
        yield pick_config(qmatmul.current_problem(m, q, is_gated=is_gated))


@pytest.mark.parametrize(("arch", "sm_count"), GPUS)
def test_invariant_cuts_add_in_one_order(arch, sm_count, monkeypatch):
    """Whatever the number of rows: the same slices, chunks and warps. Only rows that are multiplied at a time may differ."""
    monkeypatch.setattr(_device, "current", lambda: SimpleNamespace(arch=arch, sm_count=sm_count))
    for k, ns, widths in itertools.product(KS, NS, ((0, 0, 0, 1, 0, 0), (1, 0, 0, 0, 0, 0), (1,) * 6)):
        q = Sizes(k, *ns)
        q.width_blocks = widths
        cuts = set()
        for m in (1, 2, 8, 9, 16, 17, 64, 100, 5000):
            config = qmatmul._invariant_config(m, q)
            cuts.add((config.warps_n, config.warps_k, config.slices, config.slice_steps, config.chunk_steps))
            rows = min(m, qmatmul._invariant_rows(q))
            problem = qmatmul.current_problem(rows, q)
            assert covers(problem.steps, config.slices, config.slice_steps, config.chunk_steps, config.warps_k)
            assert sum(layout(problem, config)) <= config.shared_bytes <= SHARED_KIB[problem.arch_number] * 1024 - 1024
            groups = -(-q.column_tiles // config.warps_n)
            assert config.slices == 1 or groups * -(-rows // (8 * config.m_tiles)) <= COUNTERS
        assert len(cuts) == 1, (k, ns, widths)
