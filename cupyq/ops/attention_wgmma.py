"""Attention of many queries on Hopper: the sizes of its tiles, and the kernel (cu/attention_wgmma.cu)."""

from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import bfloat16, float16
from cupyq._kernels import instance
from cupyq._kernels import launch as launch_kernel
from cupyq._tensor_maps import tensor_maps
from cupyq.ops.kv_append import parts_of

BLOCK_COLUMNS = 64
"""Columns of a tile that lie together: 128 bytes, as the tensor cores want them."""

_LEAST_PAGE = 8  # tokens: one pattern of the swizzle


@dataclass(frozen=True)
class AttentionWgmmaConfig:
    """`warpgroups` of 64 queries each, and rings of `stages` tiles of `tile_keys` keys, and of values.

    takes_turns: whether warpgroups start their products one after the other.
    """

    tile_keys: int
    stages: int
    warpgroups: int
    takes_turns: bool = True

    @property
    def tile_rows(self):
        return 64 * self.warpgroups

    @property
    def threads(self):
        return 128 * (self.warpgroups + 1)

    def shared_bytes(self, head_dim, k_kind="dense", v_kind="dense"):
        """Queries, keys and values, and the results where they do not lie over the queries; 1024 to align them.

        With codes: a tile of each cache as it is stored, and the barriers; nothing to align them.
        """
        row_bytes = -(-head_dim // BLOCK_COLUMNS) * 2 * BLOCK_COLUMNS
        rows = self.tile_rows * (2 if head_dim <= 128 else 1)
        decoded = row_bytes * (rows + 2 * self.stages * self.tile_keys)
        if k_kind == "dense":
            return 1024 + decoded
        stored = sum(int(_STORED_BITS[kind] * head_dim / 8) for kind in (k_kind, v_kind))
        return decoded + self.tile_keys * stored + 8 * (2 + 4 * self.stages)


_STORED_BITS = {"fp8": 8, "e4m3": 8, "q4": 4.5, "q8": 8.5}  # in shared memory: e4m3's scales are in registers

_CONFIGS = {
    64: AttentionWgmmaConfig(128, 2, 2),
    96: AttentionWgmmaConfig(128, 2, 2),
    128: AttentionWgmmaConfig(128, 2, 2),
    256: AttentionWgmmaConfig(64, 2, 2, takes_turns=False),
}


def supports(head_dim, page_size=None, has_codes=False):
    """Whether the kernel takes heads of this size, and pages of this size where there is a block table.

    has_codes: in caches that both hold codes, which come without tensor maps, so that pages may be of any size.
    """
    if has_codes:
        return head_dim in _CONFIGS and head_dim % BLOCK_COLUMNS == 0
    return head_dim in _CONFIGS and (page_size is None or page_size >= _LEAST_PAGE)


def pick_attention_wgmma_config(head_dim):
    """The AttentionWgmmaConfig for heads of this size."""
    return _CONFIGS[head_dim]


def launch(problem, q, k, v, out, *, config=None):
    """out = attention of an AttentionProblem, on sm_90a; nothing is checked.

    q and out are arrays of one 16-bit dtype, k and v are too, or both are CacheCodes; all begin at multiples of 16 bytes,
    `supports` the sizes. out may be q.
    """
    p = problem
    (k_kind, k_array, k_scales), (v_kind, v_array, v_scales) = parts_of(k), parts_of(v)
    has_codes = k_kind != "dense"
    config = pick_attention_wgmma_config(p.head_dim) if config is None else config
    if p.query_starts is None:
        rows = p.batch * p.most_queries
        tiles = p.batch * -(-p.most_queries // config.tile_rows)
    else:
        rows = p.most_queries  # of all sequences
        tiles = rows // config.tile_rows + p.batch  # at most
    items = tiles * p.heads
    box_keys = min(p.page_size, config.tile_keys) if p.is_paged else config.tile_keys
    caches = (p.pages, p.page_size, p.kv_heads, p.head_dim), (1, box_keys, 1, BLOCK_COLUMNS)
    queries = q, (rows, p.heads, p.head_dim), (config.tile_rows, 1, BLOCK_COLUMNS)
    # A cache of codes has no map, nor has one without slots; none is used.
    maps = tensor_maps(queries, *(queries if has_codes or not a.size else (a, *caches) for a in (k_array, v_array)))
    codes = (k_array, k_scales, v_array, v_scales) if has_codes else (None,) * 4
    sizes = (
        items, p.batch, rows, p.heads, p.kv_heads, p.capacity, p.page_size, p.max_pages, p.pages, bool(p.causal),
        p.kernel_window,
    )  # fmt: skip
    launch_kernel(
        attention_wgmma_instance(q.dtype, p.head_dim, config, p.softcap is not None, k_kind, v_kind),
        (min(items, _device.current().sm_count),),
        (config.threads,),
        (
            maps, out, p.kv_lengths, p.block_table, p.query_starts, p.sinks, *map(np.int32, sizes),
            np.float32(p.scale), np.float32(p.kernel_softcap), *codes,
        ),
        config.shared_bytes(p.head_dim, k_kind, v_kind),
    )  # fmt: skip


def attention_wgmma_instance(dtype, head_dim, config, has_softcap, k_kind="dense", v_kind="dense"):
    sizes = (head_dim, config.tile_keys, config.stages, config.warpgroups, config.takes_turns)
    kinds = () if k_kind == "dense" else (k_kind, v_kind)
    return instance("attention_wgmma", dtype, *sizes, has_softcap, *kinds)


def _instances():
    for dtype in (float16, bfloat16):
        for head_dim in (64, 128):
            yield attention_wgmma_instance(dtype, head_dim, _CONFIGS[head_dim], False)
    yield attention_wgmma_instance(float16, 96, _CONFIGS[96], False)
    yield attention_wgmma_instance(bfloat16, 256, _CONFIGS[256], True)
    for kinds in (("fp8", "fp8"), ("e4m3", "e4m3"), ("q4", "q4"), ("q8", "q4"), ("q8", "q8")):
        yield attention_wgmma_instance(float16, 128, _CONFIGS[128], False, *kinds)
    yield attention_wgmma_instance(bfloat16, 64, _CONFIGS[64], True, "q8", "q4")


INSTANCES = list(_instances())
"""Each size of heads, with a softcap, each kind of codes; the others are compiled when first used."""
