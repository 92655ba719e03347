"""How products with few rows are cut into thread blocks: a pure function of sizes, widths and the GPU."""

import dataclasses
import functools
from dataclasses import dataclass

from cupyq import _device
from cupyq.formats.tiles import TILE, WIDTHS_IN_ORDER

STEP_BLOCKS = 4
"""Row blocks of a step, what a warp copies at a time (cu/qmatmul.cuh)."""

COUNTERS = 1024
"""Counters at the start of every workspace, one per group of column tiles. Always so many, whatever the product, so that one
workspace serves products of any shapes in turn."""

_HANDED_STRIDE = 36


@dataclass(frozen=True)
class QmatmulConfig:
    """8 * m_tiles rows and 32 * warps_n columns to an item of a thread block of warps_n * warps_k warps, each of which reads
    `slots` steps ahead; K in `slices`, x staged `chunk_steps` at a time; `thread_blocks` work through the items."""

    m_tiles: int
    warps_n: int
    warps_k: int
    slots: int
    slices: int
    slice_steps: int
    chunk_steps: int
    thread_blocks: int
    shared_bytes: int

    def staged_rows(self, m):
        """Rows of shared memory for m rows of x."""
        return staged_rows(m, self.m_tiles)

    @property
    def threads(self):
        return 32 * self.warps_n * self.warps_k


@dataclass(frozen=True)
class Problem:
    """What a cut depends on: rows of x, column tiles and row blocks of the weights, the code widths present, and the GPU."""

    m: int
    column_tiles: int
    blocks: int
    widths: tuple
    has_zeros: bool
    sm_count: int
    arch_number: int
    matrices: int = 1
    is_gated: bool = False
    row_tiles: int = 1  # thread blocks for other rows, which share the GPU

    @property
    def steps(self):
        return -(-self.blocks // STEP_BLOCKS)

    @property
    def slot_bytes(self):
        return STEP_BLOCKS * (2 * TILE * (2 if self.has_zeros else 1) + max(self.widths) * 4 * TILE)

    @property
    def shared_limit(self):
        return _device.shared_bytes_limit(f"sm_{self.arch_number}")


def widths_present(width_blocks):
    return tuple(bits for bits, count in zip(WIDTHS_IN_ORDER, width_blocks, strict=True) if count)


def staged_rows(m, m_tiles):
    return min(m, 8) if m_tiles == 1 else 8 * m_tiles


def make_config(problem, m_tiles, warps_n, warps_k, slots, slices, *, shared_limit=None, per_sm=1):
    """The config of these choices, or None where shared memory does not suffice."""
    steps = problem.steps
    slice_steps = -(-steps // max(1, min(slices, steps)))
    slices = -(-steps // slice_steps)
    rows, warps = staged_rows(problem.m, m_tiles), warps_n * warps_k
    ring = warps * slots * problem.slot_bytes
    table = problem.matrices * STEP_BLOCKS * (steps + 1) * 4
    is_direct = warps_k == 1 and not problem.is_gated
    handed = 0 if is_direct else warps * rows * _HANDED_STRIDE * 4
    room = (problem.shared_limit if shared_limit is None else shared_limit) - 1024 - ring - table - handed
    chunk_steps = min(slice_steps, (room // (16 * rows) - 1) // (16 * TILE // 32))
    if chunk_steps < min(2, slice_steps):
        return None
    # All of K at once, or chunks of about the same length.
    chunk_steps = -(-slice_steps // -(-slice_steps // chunk_steps))
    stride = min(chunk_steps, steps) * 16 | 1
    shared = ring + table + handed + rows * stride * 16
    groups = -(-problem.column_tiles // warps_n)
    thread_blocks = min(groups * slices, per_sm * problem.sm_count)
    return QmatmulConfig(m_tiles, warps_n, warps_k, slots, slices, slice_steps, chunk_steps, thread_blocks, shared)


_SHAPES = {
    1: ((1, 8), (1, 12), (1, 16), (2, 4), (2, 8), (4, 4), (7, 1), (7, 2), (8, 2), (14, 1)),
    2: ((1, 8), (2, 4), (2, 8), (4, 2), (4, 4), (7, 2), (8, 1), (8, 2)),
    4: ((2, 4), (4, 2), (7, 1), (8, 1)),
    8: ((2, 4), (4, 2), (7, 1), (8, 1)),
}
"""(warps_n, warps_k) worth timing, by m_tiles."""


def candidate_configs(problem):
    """Every cut worth timing."""
    m_tiles = tiles_for(problem.m)
    found = {}
    for warps_n, warps_k in _SHAPES[m_tiles]:
        if problem.is_gated and warps_n % 2:
            continue
        groups = -(-problem.column_tiles // warps_n)
        slots = {max(2, min(8, ring * 1024 // (warps_n * warps_k * problem.slot_bytes))) for ring in (48, 72, 110)}
        for slices in {1, max(1, problem.sm_count // groups), max(1, 2 * problem.sm_count // groups)}:
            if slices > 1 and (groups > COUNTERS or slices > max(1, problem.steps // warps_k)):
                continue
            for count in slots:
                for limit, per_sm in ((problem.shared_limit // 2, 1), (problem.shared_limit // 2, 2), (None, 1)):
                    config = make_config(problem, m_tiles, warps_n, warps_k, count, slices, shared_limit=limit, per_sm=per_sm)
                    if config is not None:
                        found[config] = None
    return list(found)


def tiles_for(m):
    return next(tiles for tiles in (1, 2, 4, 8) if 8 * tiles >= min(m, 64))


def _shapes_for(problem):
    """(warps_n, warps_k) in order of preference, from the sweeps of docs/measured.md.

    Few column tiles want all warps of a thread block on one of them, so that each multiprocessor has one and no sums cross
    thread blocks. More rows of x, or more tiles, want a block that is wide, as it reads x once for all its columns.
    """
    per_sm = problem.column_tiles * problem.row_tiles / problem.sm_count
    is_short = problem.steps <= 48
    if problem.m > 16:
        return (8, 1), (4, 2), (4, 1), (2, 2)
    if per_sm > 4:
        if problem.m <= 4 and max(problem.widths) >= 4:
            return ((4, 4) if is_short else (1, 16)), (4, 4), (4, 2), (2, 4)
        return (8, 2), (4, 4), (4, 2), (2, 4), (2, 2)
    if problem.m <= 4:
        if is_short:
            return (1, 16), (1, 8), (2, 4), (1, 4)
        return ((1, 16) if problem.m <= 2 else (4, 4)), (4, 4), (2, 4), (1, 4)
    if is_short and problem.m <= 8:
        return (2, 8), (2, 4), (2, 2)
    return ((4, 4) if per_sm < 1.5 else (8, 2)), (4, 4), (4, 2), (2, 4), (2, 2)


@functools.cache
def pick_config(problem):
    """The cut for a Problem: a pure function, tuned on the sweeps of docs/measured.md."""
    for warps_n, warps_k in _shapes_for(problem):
        if problem.is_gated and warps_n % 2:
            warps_n, warps_k = 2, max(1, warps_k // 2)
        warps = warps_n * warps_k
        groups = -(-problem.column_tiles // warps_n) * problem.row_tiles
        # Slices of K where groups are too few for the multiprocessors; of less than a step or two a warp would wait more
        # than it works.
        is_sliced = groups * 5 < problem.sm_count * 2 or problem.steps > 96 and groups * 3 < problem.sm_count * 2
        slices = max(1, min(problem.sm_count // groups, problem.steps // warps_k)) if is_sliced else 1
        choices = [(tiles_for(problem.m), warps_n, warps_k, slots, slices) for slots in (3, 2)]
        # All of x at once, if need be beside fewer slots. Half of the shared memory, where that holds it, leaves the other half
        # to a second thread block or to the kernel that comes next.
        for choice in choices:
            half = make_config(problem, *choice, shared_limit=problem.shared_limit // 2, per_sm=2 if warps <= 8 else 1)
            for config in (half, make_config(problem, *choice)):
                if config is not None and config.chunk_steps == config.slice_steps:
                    return config
        for choice in choices:
            config = make_config(problem, *choice)
            if config is not None and (config.chunk_steps >= max(8, 2 * warps_k) or config.slots == 2):
                return config
    for tiles in (8, 4, 2, 1):  # little shared memory: fewer rows at a time
        if tiles <= tiles_for(problem.m) and (config := make_config(problem, tiles, 2, 1, 2, 1)) is not None:
            return config
    return None


@functools.cache
def most_values(problem, values):
    """The most that values(m, problem, config) comes to for 1 to problem.m rows."""
    problems = (dataclasses.replace(problem, m=m) for m in range(1, problem.m + 1))
    return max(values(p.m, p, pick_config(p)) for p in problems)


def current_problem(m, joined, *, is_gated=False):
    """The Problem of m rows and a JoinedQMatrix on the current GPU."""
    device = _device.current()
    return Problem(
        m,
        joined.column_tiles,
        joined.blocks,
        widths_present(joined.width_blocks),
        joined.kind == "gptq",
        device.sm_count,
        _device.arch_number(device.arch),
        len(joined.matrices),
        is_gated,
    )
