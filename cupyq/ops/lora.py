"""Low-rank adapters: what many LoRA adapters add to one projection, chosen per request."""

from dataclasses import dataclass

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, check, float16, float32, int32, namespace, new_array
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, float64, refuse_overlap, store, vector_width


@accepts_dlpack(writes=("y", "workspace"), replays=True)
def lora(y, x, a, b, rank_adapter, weights, *, workspace=None):
    """y[r] += sum over rank columns j of weights[q, rank_adapter[j]] * (x[r] . a[:, j]) * b[j], with q = r // (rows / requests)

    In place, and y is returned. The adapters of a projection stand side by side along the rank axis, each of any rank:
    a [k, ranks], b [ranks, n], x [rows, k] of one dtype, float16, bfloat16 or float32; rank_adapter int32 [ranks], the
    adapter of each rank column; weights float32 [requests, adapters]; y [rows, n], float16, bfloat16 or float32. rows is
    a multiple of requests: consecutive rows of equal number belong to a request.
    A weight of exactly 0 means that the request does not use the adapter: its part of a and b is not read for these rows,
    so Inf and NaN there do not spread, and a row that uses no adapter keeps its bits. x . a is fp32 and not rounded in
    between; sums are fp32 in a fixed order (float64 in the reference), y is rounded once. Numbers in rank_adapter outside
    0 .. adapters - 1 raise ValueError on NumPy and count as unused on a GPU.
    `workspace`: float32 array of at least `lora_workspace_size(rows, k, ranks)` values, with which nothing is allocated.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides, devices, and for a y that overlaps another array.
    Sources, for the shape of the problem: Hu et al., LoRA, arXiv 2106.09685; Chen et al., Punica, arXiv 2310.18547 (a
    batch of requests, each with its adapter, as one gathered product); Sheng et al., S-LoRA, arXiv 2311.03285 (ranks of
    any mix, without padding).

    >>> y, x = np.zeros((2, 1), np.float32), np.ones((2, 3), np.float32)
    >>> a, b = np.ones((3, 2), np.float32), np.array([[1], [10]], np.float32)
    >>> lora(y, x, a, b, np.array([0, 1], np.int32), np.array([[1, 0], [0.5, 2]], np.float32))
    array([[ 3. ],
           [61.5]], dtype=float32)
    """
    xp = namespace(y=y, x=x, a=a, b=b, rank_adapter=rank_adapter, weights=weights, workspace=workspace)
    check(x, "x", dtype=FLOATS, ndim=2)
    rows, k = x.shape
    check(a, "a", dtype=x.dtype, ndim=2)
    check(a, "a", shape=(k, None))
    ranks = a.shape[1]
    check(b, "b", dtype=x.dtype, shape=(ranks, None))
    n = b.shape[1]
    check(y, "y", dtype=FLOATS, shape=(rows, n), writes=True)
    check(rank_adapter, "rank_adapter", dtype=int32, shape=(ranks,))
    check(weights, "weights", dtype=float32, ndim=2)
    requests, adapters = weights.shape
    if rows % requests if requests else rows:
        raise ValueError(f"weights has {requests} rows, one per request, and x {rows} rows, which is no multiple of them")
    refuse_overlap(y, "y", x=x, a=a, b=b, rank_adapter=rank_adapter, weights=weights)
    if workspace is not None:
        _check_workspace(workspace, lora_workspace_size(rows, k, ranks))
        refuse_overlap(workspace, "workspace", y=y, x=x, a=a, b=b, rank_adapter=rank_adapter, weights=weights)
    if xp is np and ranks and not (0 <= rank_adapter.min() and rank_adapter.max() < adapters):
        raise ValueError(
            f"rank_adapter must be from 0 to {adapters - 1}, as weights has {adapters} columns, got "
            f"{rank_adapter.min()} to {rank_adapter.max()}"
        )
    if y.size == 0 or ranks == 0 or k == 0 or adapters == 0:
        return y
    if xp is np:
        store(y, lora_reference(y, x, a, b, rank_adapter, weights))
    else:
        _launch_lora(y, x, a, b, rank_adapter, weights, workspace)
    return y


@np.errstate(invalid="ignore", over="ignore")
def lora_reference(y, x, a, b, rank_adapter, weights):
    result = float64(y)
    for request, rows in enumerate(np.split(np.arange(len(x)), len(weights))):
        rank_weights = float64(weights[request])[rank_adapter]
        used = np.flatnonzero(rank_weights != 0)
        if used.size:
            t = (float64(x[rows]) @ float64(a[:, used])) * rank_weights[used]
            result[rows] += t @ float64(b[used])
    return result


# --- launching --------------------------------------------------------------------------------------------------------

_K_STEP = 64  # lora_shrink_mma takes K in pieces of so many rows
_MIN_SLICE = 256
_MAX_SLICES = 32  # of K: the expanding kernel adds them up
_WANTED_TILES = 256  # thread blocks that keep a large GPU busy
_MMA_ROWS, _MMA_COLUMNS = 64, 64
_EXPAND_ROWS = 16
_MANY_ROWS = 16  # per request: from here on tensor cores


@dataclass(frozen=True)
class LoraConfig:
    """How x . a is cut. Slices depend on rows, k and nothing else, so that a workspace fits any choice of requests."""

    slices: int
    slice_k: int
    tile_rows: int
    """Of the kernel without tensor cores."""
    uses_mma: bool
    rank_blocks: int
    """Thread blocks that share the rank columns of a tile."""


def pick_config(rows, requests, k, ranks, dtype):
    """The LoraConfig for x [rows, k] of `dtype` from so many requests, and adapters of so many ranks together."""
    tiles = -(-rows // _MMA_ROWS)
    wanted = max(1, min(_MAX_SLICES, _WANTED_TILES // tiles, -(-k // _MIN_SLICE)))
    slice_k = -(-k // (wanted * _K_STEP)) * _K_STEP
    per_request = rows // requests
    uses_mma = per_request >= _MANY_ROWS and dtype != float32
    rank_blocks = min(4, -(-ranks // _MMA_COLUMNS)) if uses_mma else min(8, -(-ranks // 16))
    return LoraConfig(-(-k // slice_k), slice_k, 8 if per_request >= 4 else 1, uses_mma, rank_blocks)


def lora_workspace_size(rows, k, ranks):
    """float32 values `lora` needs for x [rows, k] and a [k, ranks], whatever the requests and the dtype."""
    if rows == 0 or k == 0:
        return 0
    return pick_config(rows, 1, k, ranks, float32).slices * rows * ranks


def _check_workspace(workspace, needed):
    check(workspace, "workspace", dtype=float32, ndim=1, writes=True)
    if workspace.size < needed:
        raise ValueError(f"workspace must have {needed} float32 values, as lora_workspace_size says, got {workspace.size}")


def _launch_lora(y, x, a, b, rank_adapter, weights, workspace):
    (rows, k), (ranks, n), (requests, adapters) = x.shape, b.shape, weights.shape
    config, per_request = pick_config(rows, requests, k, ranks, x.dtype), rows // requests
    if workspace is None:
        workspace = new_array(namespace(x=x), lora_workspace_size(rows, k, ranks), float32)

    def tiles(height):
        return requests * -(-per_request // height)

    if config.uses_mma:
        wide_x, wide_a = (8 if vector_width(cols, array, widest=8) == 8 else 1 for cols, array in ((k, x), (ranks, a)))
        shrink, shrink_tiles = instance("lora_shrink_mma", x.dtype, wide_x, wide_a, file="lora_shrink"), tiles(_MMA_ROWS)
    else:
        shrink = instance("lora_shrink", x.dtype, access_width(ranks, a), config.tile_rows)
        shrink_tiles = tiles(config.tile_rows)
    sizes = (rows, per_request, k, ranks, adapters, config.slice_k)
    grid = (shrink_tiles, config.slices, config.rank_blocks)
    launch(shrink, grid, (128,), (x, a, rank_adapter, weights, workspace, *map(np.int32, sizes)))

    vector, height = vector_width(n, b, y, widest=4), _EXPAND_ROWS if per_request >= 4 else 1
    column_tiles = -(-n // (vector * (32 if height == 1 else 128)))
    sizes = (rows, per_request, n, ranks, adapters, config.slices, column_tiles)
    expand = instance("lora_expand", b.dtype, y.dtype, vector, height)
    launch(expand, (tiles(height) * column_tiles,), (128,), (workspace, b, rank_adapter, weights, y, *map(np.int32, sizes)))


_PAIRS = ((float16, float16), (bfloat16, bfloat16), (float16, float32), (bfloat16, float32), (float32, float32))

INSTANCES = [
    *(instance("lora_shrink", dtype, 8, rows) for dtype in (float16, bfloat16) for rows in (1, 8)),
    *(instance("lora_shrink", float32, 4, rows) for rows in (1, 8)),
    *(instance("lora_shrink", float16, 1, rows) for rows in (1, 8)),
    *(instance("lora_shrink_mma", dtype, 8, 8, file="lora_shrink") for dtype in (float16, bfloat16)),
    *(instance("lora_shrink_mma", float16, *widths, file="lora_shrink") for widths in ((8, 1), (1, 1))),
    *(instance("lora_expand", b, y, 4, rows) for b, y in _PAIRS for rows in (1, 16)),
    *(instance("lora_expand", float16, float16, 1, rows) for rows in (1, 16)),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
