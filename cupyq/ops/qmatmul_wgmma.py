"""Products of quantized weights with many rows, on Hopper: how they are cut, and the kernel that makes them.

x is first rewritten as the kernel wants it in shared memory, in the stored row order of the weights (ops/arrange.py), then
multiplied (cu/qmatmul_wgmma.cu).
An item is `rows` rows and 128 * warpgroups_n columns of the result, a stage 64 stored rows of the weights.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from cupyq import _device
from cupyq._arrays import bfloat16, byte_bounds, float16, new_array
from cupyq._kernels import instance, launch
from cupyq.formats.tiles import TILE, WIDTHS_IN_ORDER
from cupyq.ops.arrange import STAGE_BLOCKS, STAGE_COLUMNS, image_count, launch_arrange_rows
from cupyq.ops.matrix_table import moved
from cupyq.ops.qmatmul_config import COUNTERS

THREADS = 384
SHARED_BYTES = 227 * 1024
"""What a thread block may have on Hopper (CUDA programming guide, compute capabilities)."""

_STATIC_BYTES = 512  # the kernel's barriers, rounded up
_RING = 12  # stages on their way: more do not help, and the kernel has barriers for 16
_COPIERS = 3  # warps that take turns at copying stages of weights: a ring has one of each at least, for each turn of consumers


# --- how a product is cut ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WgmmaConfig:
    """`thread_blocks` take `waves` items each, whole, and then `run_stages` each of the stages of the items that are left;
    `ring` stages are on their way. `microseconds` is what the model of `pick_wgmma_config` expects."""

    rows: int
    warpgroups_n: int
    thread_blocks: int
    waves: int
    run_stages: int
    items: int
    stages: int
    ring: int
    shared_bytes: int
    microseconds: float = 0.0

    @property
    def is_shared(self):
        """Whether any item is shared by several thread blocks, so that partial sums go through the workspace."""
        return self.shared_items > 0 and self.run_stages % self.stages != 0

    @property
    def shared_items(self):
        return self.items - self.waves * self.thread_blocks

    @property
    def partial_values(self):
        return 2 * self.thread_blocks * 128 * self.warpgroups_n * self.rows if self.is_shared else 0


def make_wgmma_config(
    m, ns, width_blocks, has_zeros, sm_count, *, rows, warpgroups_n, waves, runs, thread_blocks=None, ring=None
):
    """The WgmmaConfig of these choices: of the items beyond `waves` for each thread block, each is cut in about `runs`
    runs; None: all of them are one run, in equal shares. None where it does not fit.

    ns: columns of each of the matrices. width_blocks: row blocks of width 8, 6, 5, 4, 3 and 2.
    """
    blocks = sum(width_blocks)
    stages = -(-blocks // STAGE_BLOCKS)
    items = -(-m // rows) * sum(-(-n // (128 * warpgroups_n)) for n in ns)
    if waves == 0 and thread_blocks is None and runs is not None:
        thread_blocks = min(sm_count, -(-items * stages // -(-stages // runs)))
    thread_blocks = min(sm_count if thread_blocks is None else thread_blocks, items * stages)
    left = items - waves * thread_blocks
    if left < 0:
        return None
    run_stages = -(-stages // runs) if runs is not None else -(-left * stages // thread_blocks)
    if left == 0:
        run_stages = stages
    if waves == 0:
        thread_blocks = min(thread_blocks, -(-left * stages // run_stages))
    is_whole = run_stages % stages == 0
    if run_stages * thread_blocks < left * stages or not is_whole and (2 * left > COUNTERS or run_stages < min(stages, 3)):
        return None
    ring_bytes, fixed_bytes = _shared_parts(rows, warpgroups_n, width_blocks, has_zeros, len(ns), stages)
    room = (SHARED_BYTES - fixed_bytes) // ring_bytes
    ring = min(room, _RING) if ring is None else ring
    if warpgroups_n == 1:
        ring -= ring % 2  # the warpgroups take turns: each slot must always be the same one's
    if not _COPIERS * (3 - warpgroups_n) <= ring <= min(room, _RING):
        return None
    shared_bytes = fixed_bytes - _STATIC_BYTES + ring * ring_bytes
    config = WgmmaConfig(rows, warpgroups_n, thread_blocks, waves, run_stages, items, stages, ring, shared_bytes)
    return replace(config, microseconds=estimated_microseconds(config, m, ns, width_blocks))


def _shared_parts(rows, warpgroups_n, width_blocks, has_zeros, matrices, stages):
    """Bytes of shared memory for each stage of the ring, and for the rest."""
    tiles = 4 * warpgroups_n
    widest = next(bits for bits, count in zip(WIDTHS_IN_ORDER, width_blocks, strict=True) if count)
    words, scales = STAGE_BLOCKS * widest * 4 * TILE, STAGE_BLOCKS * TILE * 2 * (2 if has_zeros else 1)
    handed = 128 * rows * 4 if warpgroups_n == 1 else 0
    return rows * STAGE_COLUMNS * 2 + tiles * (words + scales), 1024 + matrices * stages * 16 + handed + _STATIC_BYTES


# What the model of `pick_wgmma_config` believes, fitted to times on an H100: microseconds, or cycles of a multiprocessor.
MODEL = {
    "clock": 1430.0,  # cycles a microsecond under load
    "read": 2.61e6,  # bytes a microsecond from memory
    "launch": 0.614,
    "begin": 851.0,  # cycles until the first products
    "product": 0.966,  # of a stage, by the cycles that the tensor cores take at best
    "decoding": 175.0,  # cycles until a warpgroup has the operands of its next stage
    "overlap": 0.626,  # of the products, that decoding does not hide
    "copying": 46.7,  # bytes from L2 a cycle
    "stage": 111.0,
    "item": 580.0,
    "item_bytes": 185.0,  # of sums, that are finished a cycle
    "shared": 4200.0,
    "shared_bytes": 125.0,  # of partial sums, that are written a cycle
    "part_bytes": 35.1,  # of partial sums, that are read a cycle
}


def estimated_microseconds(config, m, ns, width_blocks):
    """The time that a simple model gives the config: of the longest thread block, or of memory, and of sharing items."""
    c, model, blocks = config, MODEL, sum(width_blocks)
    bits = sum(b * count for b, count in zip(WIDTHS_IN_ORDER, width_blocks, strict=True)) / blocks
    columns = 128 * c.warpgroups_n
    product, decoding = c.rows * columns / 32, model["decoding"] * c.warpgroups_n
    copying = (c.rows * 128 + columns * (8 * bits + 2)) / model["copying"]
    stage = model["stage"] + max(model["product"] * product, decoding + model["overlap"] * product, copying)
    longest = c.waves * c.stages + min(c.run_stages, c.shared_items * c.stages)
    item_bytes = c.rows * columns * 4
    cycles = model["begin"] + longest * stage
    cycles += (c.waves + (c.shared_items > 0)) * (model["item"] + item_bytes / model["item_bytes"])
    if c.is_shared:
        parts = -(-c.stages // c.run_stages) + (c.stages % c.run_stages > 0)
        cycles += model["shared"] + item_bytes * (1 / model["shared_bytes"] + parts / model["part_bytes"])
    n = sum(ns)
    memory = (blocks * TILE * n * bits / 8 + 2 * m * (blocks * TILE + n)) / model["read"]
    return round(model["launch"] + max(cycles / model["clock"], memory + 2), 2)


@functools.cache
def pick_wgmma_config(m, ns, width_blocks, has_zeros, sm_count):
    """The WgmmaConfig that a simple model of the kernel prefers for m rows; None where none fits shared memory.

    ns: tuple of the columns of each matrix. width_blocks: their row blocks of width 8, 6, 5, 4, 3 and 2.
    """
    configs = candidate_wgmma_configs(m, ns, width_blocks, has_zeros, sm_count)
    return min(configs, key=lambda config: config.microseconds, default=None)


def candidate_wgmma_configs(m, ns, width_blocks, has_zeros, sm_count):
    """Every cut worth timing."""
    found: dict[WgmmaConfig, None] = {}
    for rows in (32, 64, 128):
        if rows > 32 and rows >= 2 * m:
            continue
        for warpgroups_n in (2, 1):
            items = -(-m // rows) * sum(-(-n // (128 * warpgroups_n)) for n in ns)
            all_waves = items // sm_count
            cuts = [(all_waves, None), (all_waves, 1)]  # the items left over in equal shares, or whole
            if all_waves:
                cuts.append((all_waves - 1, None))
            else:
                cuts += [(0, runs) for runs in range(2, 9)]
            for waves, runs in cuts:
                config = make_wgmma_config(
                    m, ns, width_blocks, has_zeros, sm_count, rows=rows, warpgroups_n=warpgroups_n, waves=waves, runs=runs
                )
                if config is not None:
                    found[config] = None
    return list(found)


def wgmma_config(q, m):
    """pick_wgmma_config for m rows and a QMatrix or JoinedQMatrix on the current GPU."""
    ns = tuple(matrix.n for matrix in q.matrices)
    return pick_wgmma_config(m, ns, q.width_blocks, q.kind == "gptq", _device.current().sm_count)


def wgmma_workspace_parts(m, blocks, config):
    """(partial sums, images of x) behind the counters of a workspace, in 4-byte values."""
    return config.partial_values, image_count(m, blocks, config.rows) * config.rows * STAGE_COLUMNS // 2


# --- the kernel -------------------------------------------------------------------------------------------------------


def launch_wgmma(
    x, q, out, m, workspace=None, *, residual=None, config=None, is_ordered=False, y_stride=None, first_column=0, arrange=None,
    dtype=None,
):  # fmt: skip
    """out = x W (+ bias + residual) for the QMatrix or JoinedQMatrix `q`; nothing is checked.

    x [m, k] (is_ordered: [m, 32 * blocks], in stored row order) and out [m, y_stride], contiguous; out and residual begin at a
    multiple of 16 bytes, and their rows are multiples of 4 values (`suits_wgmma`). y_stride and first_column place the result
    of one matrix in wider rows. workspace: float32, COUNTERS counters first, then `wgmma_workspace_parts`.
    arrange(order, images, rows) launches what writes the images of x, of `dtype`, as those of ops/arrange.py do; x may then be
    None. None: x itself, as it is.
    """
    dtype = np.dtype(x.dtype if dtype is None else dtype)
    config = wgmma_config(q, m) if config is None else config
    partials, image_values = wgmma_workspace_parts(m, q.blocks, config)
    if workspace is None:
        counters = new_array(q.xp, COUNTERS, np.float32, zeros=True)
        space = new_array(q.xp, partials + image_values, np.float32)
    else:
        counters, space = workspace[:COUNTERS], workspace[COUNTERS:]
    partial, images = space[:partials], space[partials : partials + image_values]
    order = None if is_ordered else q.order
    if arrange is None:
        launch_arrange_rows(x, order, images, m, q.blocks, config.rows)
    else:
        arrange(order, images, config.rows)
    matrices = moved(q.rows, first_column) if first_column else q.rows
    y_stride = q.n if y_stride is None else y_stride
    row_blocks = -(-m // config.rows)
    cut = (row_blocks, config.items, config.waves, config.run_stages, config.ring)
    sizes = (len(q.matrices), q.blocks, *cut, m, y_stride)
    launch(
        wgmma_instance(dtype, q.kind == "gptq", q.width_blocks, config.rows, config.warpgroups_n),
        (config.thread_blocks,),
        (THREADS,),
        (
            matrices, images, out, residual, partial if partials else None, counters, *map(np.int32, sizes),
            np.bool_(out.dtype != dtype),
        ),
        config.shared_bytes,
    )  # fmt: skip


def suits_wgmma(out, residual=None, y_stride=None):
    """Whether launch_wgmma takes these arrays: its stores and loads are of four values."""
    stride = out.shape[-1] if y_stride is None else y_stride
    return stride % 4 == 0 and all(a is None or byte_bounds(a)[0] % 16 == 0 for a in (out, residual))


def wgmma_instance(dtype, has_zeros, width_blocks, rows, warpgroups_n):
    widths = sum(1 << bits for bits, count in zip(WIDTHS_IN_ORDER, width_blocks, strict=True) if count)
    return instance("qmatmul_wgmma", dtype, has_zeros, widths, rows, warpgroups_n)


def _instances():
    only_4, every = (0, 0, 0, 1, 0, 0), (1,) * 6
    for dtype in (float16, bfloat16):
        yield wgmma_instance(dtype, False, only_4, 128, 2)
        yield wgmma_instance(dtype, False, every, 128, 2)
        yield wgmma_instance(dtype, True, only_4, 64, 2)
    yield wgmma_instance(float16, False, only_4, 64, 1)
    yield wgmma_instance(float16, False, only_4, 32, 2)


INSTANCES = list(_instances())
"""Each kind of decoding in both dtypes, and each size once; the others are compiled when first used."""
