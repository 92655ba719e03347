"""Attention of few queries: how the keys are shared out over the GPU, and the launch of attention_decode."""

import functools
from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import address_of, bfloat16, float16, float32, new_array, require_cupy
from cupyq._device import shared_bytes_limit
from cupyq._kernels import instance
from cupyq._kernels import launch as launch_kernel
from cupyq.errors import UnsupportedError
from cupyq.ops._common import int32_of
from cupyq.ops.kv_append import parts_of
from cupyq.ops.kv_codec import CacheCodes

_ROWS = 16  # of one mma tile
_KEYS = 16  # of one warp's tile
_COUNTERS = 1024  # at the start of the workspace: one per block that shares out keys with others
_LEAST_TILES = 4  # of a share: what a block of four warps takes at a time
_MOST_PLANNED = 512  # sequences: every block looks at all lengths; with more of them none is split
_MOST_TILES = 1 << 30  # of all items: the kernel counts them in 32 bits


# --- choices ----------------------------------------------------------------------------------------------------------


def supports(problem, k, v):
    """Whether `launch` takes this call: codes need whole chunks of 64 values, and pages of two tokens."""
    has_codes = isinstance(k, CacheCodes) or isinstance(v, CacheCodes)
    return not has_codes or (problem.head_dim % 64 == 0 and (problem.page_size > 1 or not problem.is_paged))


@dataclass(frozen=True)
class DecodeConfig:
    warps: int
    stages: int

    def shared_bytes(self, head_dim, k_kind="dense", v_kind="dense"):
        """K and V of every stage of every warp, or what the warps leave at the end; and the queries."""
        padded = _padded(head_dim)
        stage = _tile_bytes(k_kind, padded) + _tile_bytes(v_kind, padded)
        part = 4 * (_ROWS * (padded + 8) + 2 * _ROWS)
        return self.warps * max(self.stages * stage, part) + _ROWS * 2 * (padded + 8)

    def blocks_per_sm(self, head_dim, arch, k_kind="dense", v_kind="dense"):
        """Two where they fit: one loads while the other ends a segment. A block's share costs 1 KiB more than it asks for."""
        is_small = self.warps <= 4 and _padded(head_dim) <= 128
        limit = shared_bytes_limit(arch)
        return 2 if is_small and 2 * (self.shared_bytes(head_dim, k_kind, v_kind) + 1024) <= limit + 1024 else 1


@functools.cache  # asked for at every launch
def pick_decode_config(head_dim, arch, k_kind="dense", v_kind="dense", *, has_many_items=False):
    """The largest block that fits: the more warps share a block, the fewer parts of their sums are to be added.

    With many more items than multiprocessors most of a block's time goes into whole items, and a block of four warps leaves
    room for a second one that loads while the first ends an item (docs/measured.md).
    """
    eight = (8, 2 if k_kind == v_kind == "dense" else 3)
    choices = [eight] * (_padded(head_dim) <= 128 and not has_many_items) + [(4, 3), (4, 2), (2, 2), (1, 2)]
    configs = [DecodeConfig(*choice) for choice in choices]
    limit = shared_bytes_limit(arch)
    return next(config for config in configs if config.shared_bytes(head_dim, k_kind, v_kind) <= limit)


@dataclass(frozen=True)
class Plan:
    """How many blocks a launch has, and how the kernel shares out the keys: by the shapes and the GPU alone."""

    blocks: int
    most_shares: int  # of all keys, in equal lengths, a block per kv head to each; 0: no item (16 rows) is split
    least_tiles: int  # of a share, where an item has so many
    part_rows: int
    parts: int  # that segments of split items may leave: two a block
    counters: int

    def part_floats(self, head_dim):
        """Of one part: the sums, then top and sum of weights of each row, to a multiple of 16 bytes."""
        return self.part_rows * head_dim + -(-2 * self.part_rows // 4) * 4


@functools.cache
def _resources(config, head_dim, arch, k_kind, v_kind):
    """Bytes of shared memory of a block, and how many blocks a multiprocessor is to hold."""
    return config.shared_bytes(head_dim, k_kind, v_kind), config.blocks_per_sm(head_dim, arch, k_kind, v_kind)


def plan_shares(problem, resident_blocks, least_tiles=_LEAST_TILES):
    """The Plan of a call on a GPU that holds so many blocks at once.

    The bits depend on most_shares and least_tiles, so neither depends on true lengths. There are as many blocks as there may
    be shares: most_shares, or fewer where the shapes show that even full caches give less of them, each of least_tiles or of
    an item; and kv_heads times as many.
    """
    rows = problem.most_queries * problem.group
    every = problem.batch * -(-rows // _ROWS)  # as if each sequence had all rows, if there are starts
    items = every if problem.query_starts is None else min(every, rows // _ROWS + problem.batch)
    part_rows = min(rows, _ROWS)
    keys = problem.capacity
    if problem.window is not None:  # that all queries of a sequence see
        keys = min(keys, problem.most_queries + problem.window - 1)
    tiles = _most_tiles(keys)
    most_shares = min(resident_blocks, _COUNTERS) // problem.kv_heads
    if problem.batch > _MOST_PLANNED or tiles <= least_tiles or items * tiles > _MOST_TILES or most_shares < 2:
        return Plan(every * problem.kv_heads, 0, least_tiles, part_rows, 0, 0)
    blocks = problem.kv_heads * min(most_shares, max(items, -(-items * tiles // least_tiles)))
    return Plan(blocks, most_shares, least_tiles, part_rows, 2 * blocks, blocks)


def _most_tiles(keys):
    """How many tiles so many keys may take; they may begin inside of one."""
    return (keys + _KEYS - 2) // _KEYS + 1


def attention_workspace_size(head_dim, *, sm_count=None):
    """How many floats of workspace any attention() call with this head_dim may need, whatever its other sizes.

    sm_count, the GPU's number of multiprocessors, defaults to the current GPU's; without one the result is 0, as the
    NumPy path needs no workspace.

    >>> attention_workspace_size(128, sm_count=132)
    1099264
    """
    if sm_count is None:
        sm_count = _device.current().sm_count if _device.count() else 0
    return sm_count and _COUNTERS + 2 * min(2 * sm_count, _COUNTERS) * _ROWS * (head_dim + 2)


def _padded(head_dim):
    return -(-head_dim // 16) * 16


def _tile_bytes(kind, padded):
    """TileLayout of cu/kv_tile.cuh."""
    row_bytes = 2 * (padded + 8) if kind == "dense" else padded // 2 if kind == "q4" else padded
    scale_words = padded // 64 if kind in ("q4", "q8") else int(kind == "e4m3")
    return _KEYS * (row_bytes + 4 * scale_words)


# --- launching --------------------------------------------------------------------------------------------------------


def launch(problem, q, k, v, out, workspace, *, config=None, plan=None, ahead_tiles=2):
    """attention_decode of a checked call, for any number of queries. `workspace` as attention() takes it, or None.

    ahead_tiles: how many tiles of each warp come into L2 while the kernel before, or the segment before, still works; nothing
    but time depends on it.
    """
    if not supports(problem, k, v):
        raise UnsupportedError(
            f"attention of few queries takes codes with a head_dim that is a multiple of 64 and pages of at least 2 tokens, "
            f"got {problem.head_dim} and {problem.page_size}: decode the cache first"
        )
    device = _device.current()
    (k_kind, *k_parts), (v_kind, *v_parts) = parts_of(k), parts_of(v)
    if config is None:
        has_many_items = problem.batch * problem.kv_heads >= 2 * device.sm_count
        config = pick_decode_config(problem.head_dim, device.arch, k_kind, v_kind, has_many_items=has_many_items)
    shared, per_sm = _resources(config, problem.head_dim, device.arch, k_kind, v_kind)
    if plan is None:
        plan = plan_shares(problem, per_sm * device.sm_count)
    parts, arrived = _parts(q, plan, problem.head_dim, workspace) if plan.parts else (None, None)
    arguments = (
        q,
        *k_parts,
        *v_parts,
        *(problem.kv_lengths, problem.block_table, problem.query_starts, problem.sinks),
        out,
        parts,
        arrived,
        *map(int32_of, (problem.batch, problem.most_queries, problem.heads, problem.kv_heads, problem.head_dim)),
        int32_of(problem.capacity),
        int32_of(problem.page_size.bit_length() - 1 if problem.is_paged else 0),
        *map(int32_of, (problem.max_pages, problem.pages, problem.causal, problem.kernel_window)),
        *map(np.float32, (problem.scale, problem.kernel_softcap)),
        *map(int32_of, (plan.most_shares, plan.least_tiles, plan.part_rows, ahead_tiles)),
    )
    wanted = _decode_instance(q.dtype, problem.head_dim, config, k_kind, v_kind)
    launch_kernel(wanted, (plan.blocks,), (32 * config.warps,), arguments, shared)


def _parts(q, plan, head_dim, workspace):
    """What segments of split items leave behind, and the counters of those that have."""
    size = plan.parts * plan.part_floats(head_dim)
    if workspace is None:
        xp = require_cupy()
        return new_array(xp, size, float32), new_array(xp, plan.counters, np.uint32, zeros=True)
    if workspace.size < _COUNTERS + size:
        raise ValueError(
            f"workspace must have at least {_COUNTERS + size} floats, got {workspace.size}: see attention_workspace_size"
        )
    address = address_of(workspace)
    if address % 16:
        raise ValueError("workspace must begin at a multiple of 16 bytes: pass a whole array, not a slice from its middle")
    return np.uint64(address + 4 * _COUNTERS), workspace  # addresses: views take four times as long to make


def _decode_instance(dtype, head_dim, config, k_kind="dense", v_kind="dense"):
    return instance("attention_decode", dtype, _padded(head_dim), k_kind, v_kind, config.warps, config.stages)


def _instances(arch):
    calls = [(dtype, head_dim, "dense", "dense") for dtype in (float16, bfloat16) for head_dim in (64, 128)]
    of_codes = (("fp8", "fp8"), ("e4m3", "e4m3"), ("q4", "q4"), ("q8", "q4"), ("q8", "q8"))
    for dtype, head_dim, *kinds in calls + [(float16, 128, *kinds) for kinds in of_codes]:
        for has_many_items in (False, True):
            config = pick_decode_config(head_dim, arch, *kinds, has_many_items=has_many_items)
            yield _decode_instance(dtype, head_dim, config, *kinds)


INSTANCES = list(_instances("sm_90a"))
"""What `cupyq compile` builds ahead; other sizes, and tiles for less shared memory, are compiled when first used."""
