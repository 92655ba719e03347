"""A mixture of experts around its products: who computes which row, and the sum of what they made."""

from dataclasses import dataclass

import numpy as np

from cupyq._arrays import FLOATS, check, float16, float32, int32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.ops._common import access_width, float64, refuse_overlap, store, truth, whole_number

_MOST_EXPERTS = 1024


@accepts_dlpack(writes=("weights", "experts"), replays=True)
def route(logits, top_k, *, renormalize=True, weights=None, experts=None):
    """(weights, experts): the top_k experts of every row and the weights softmax(logits)[expert]

    logits [rows, experts]: float16, bfloat16 or float32, at most 1024 experts. weights float32 and experts int32
    [rows, top_k], written where given. The experts of a row stand in ascending order, so that sums over them have one
    order whatever the weights are; of equal logits the lowest expert is kept. With `renormalize`, weights are divided by
    their sum (Mixtral; norm_topk_prob of Qwen), and the sum of the full softmax cancels. fp32 (float64 in the reference).
    A row whose maximum is not finite (NaN, +Inf or nothing but -Inf) gets the weights NaN and the experts
    0 to top_k - 1. Raises TypeError / ValueError for wrong dtypes, shapes, strides, top_k outside 1 to experts or
    results that overlap logits. Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.1.

    >>> route(np.log(np.array([[1.0, 2.0, 3.0, 1.0]], np.float32)), 2)
    (array([[0.4, 0.6]], dtype=float32), array([[1, 2]], dtype=int32))
    """
    xp = namespace(logits=logits)
    check(logits, "logits", dtype=FLOATS, ndim=2)
    rows, count = logits.shape
    if count > _MOST_EXPERTS:
        raise ValueError(f"logits must have at most {_MOST_EXPERTS} experts as its last dimension, got {count}")
    top_k, renormalize = whole_number(top_k, "top_k"), truth(renormalize, "renormalize")
    if not 1 <= top_k <= count:
        raise ValueError(f"top_k must be 1 to {count}, the experts of logits, got {top_k}")
    weights = output(xp, weights, (rows, top_k), float32, "weights")
    experts = output(xp, experts, (rows, top_k), int32, "experts")
    refuse_overlap(weights, "weights", logits=logits, experts=experts)
    refuse_overlap(experts, "experts", logits=logits)
    if rows == 0:
        return weights, experts
    if xp is np:
        values, experts[...] = route_reference(logits, top_k, renormalize)
        store(weights, values)
    else:
        _launch_route(logits, top_k, renormalize, weights, experts)
    return weights, experts


@np.errstate(invalid="ignore")
def route_reference(logits, top_k, renormalize=True):
    logits = float64(logits)
    largest = logits.max(axis=1, keepdims=True)
    is_finite = np.isfinite(largest)
    kept = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :top_k], axis=1)
    exponentials = np.exp(logits - largest)
    weights = np.take_along_axis(exponentials, kept, axis=1)
    weights /= (weights if renormalize else exponentials).sum(axis=1, keepdims=True)
    return np.where(is_finite, weights, np.nan), np.where(is_finite, kept, np.arange(top_k)).astype(np.int32)


def _launch_route(logits, top_k, renormalize, weights, experts):
    rows, count = logits.shape
    arguments = (logits, weights, experts, *map(np.int32, (rows, count, top_k)), np.bool_(renormalize))
    launch(_route_instance(logits.dtype, count), (-(-rows // 8),), (256,), arguments)


def _route_instance(dtype, experts):
    slots = 1  # experts a lane holds
    while 32 * slots < experts:
        slots *= 2
    return instance("route", dtype, slots)


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The pairs (row, one of its experts) sorted by expert, and cut into row tiles: what `group_rows` returns.

    Pair row * top_k + j is the j-th expert of a row. `order` int32 [rows * top_k] holds the pairs of expert 0, then those
    of expert 1, and so on, each in ascending order; those of expert e are order[offsets[e] : offsets[e + 1]]. `tiles`
    int32 [most tiles, 3] holds (expert, first position in order, number of positions) of every run of up to `tile_rows`
    pairs of one expert; as only the GPU knows how many there are, the rest is (-1, 0, 0).
    """

    rows: int
    top_k: int
    tile_rows: int
    xp: object
    order: object
    offsets: object
    tiles: object

    @property
    def num_experts(self):
        return len(self.offsets) - 1


TILE_ROWS = (8, 16, 32, 64)


def pick_tile_rows(pairs, num_experts):
    """Rows of a tile: enough for an expert's fair share. Larger tiles compute more padding, smaller read weights more often."""
    return next(t for t in TILE_ROWS if t >= min(pairs / num_experts, TILE_ROWS[-1]))


def most_tiles(pairs, num_experts, tile_rows):
    """The most row tiles that any routing can need: all experts but one have a single pair."""
    busy = min(pairs, num_experts)
    return (pairs - busy) // tile_rows + busy


@accepts_dlpack
def group_rows(experts, num_experts, *, tile_rows=None, out=None):
    """RowGroups: pairs of a row and one of its experts, sorted by expert (stable), and cut into tiles of tile_rows

    experts int32 [rows, top_k], as `route` returns them: 0 to num_experts - 1, at most 1024. tile_rows: 8, 16, 32 or 64,
    by default enough for an expert's fair share. Exact, and without asking the GPU for any count. `out`: the RowGroups of
    an earlier call of the same sizes, whose arrays are then overwritten. Raises TypeError / ValueError for wrong dtypes,
    shapes and strides, and for experts out of range; on a GPU such pairs are left out instead, and nobody computes them.

    >>> groups = group_rows(np.array([[0, 2], [1, 2], [0, 1]], np.int32), 3)
    >>> groups.order, groups.offsets
    (array([0, 4, 2, 5, 1, 3], dtype=int32), array([0, 2, 4, 6], dtype=int32))
    """
    xp = namespace(experts=experts)
    check(experts, "experts", dtype=int32, ndim=2)
    num_experts = whole_number(num_experts, "num_experts")
    if not 1 <= num_experts <= _MOST_EXPERTS:
        raise ValueError(f"num_experts must be 1 to {_MOST_EXPERTS}, got {num_experts}")
    tile_rows = pick_tile_rows(experts.size, num_experts) if tile_rows is None else tile_rows
    if whole_number(tile_rows, "tile_rows") not in TILE_ROWS:
        raise ValueError(f"tile_rows must be one of {', '.join(map(str, TILE_ROWS))}, got {tile_rows}")
    shapes = dict(
        order=(experts.size,), offsets=(num_experts + 1,), tiles=(most_tiles(experts.size, num_experts, tile_rows), 3)
    )
    if not (out is None or isinstance(out, RowGroups)):
        raise TypeError(f"out must be the RowGroups of an earlier call, got {type(out).__name__}")
    arrays = {name: output(xp, getattr(out, name, None), shape, int32, f"out.{name}") for name, shape in shapes.items()}
    others = {f"out.{name}": array for name, array in arrays.items()} | {"experts": experts}
    for name, array in arrays.items():
        del others[f"out.{name}"]
        refuse_overlap(array, f"out.{name}", **others)
    if experts.size == 0:
        arrays["offsets"].fill(0)
    elif xp is np:
        if experts.min() < 0 or experts.max() >= num_experts:
            raise ValueError(f"experts must hold 0 to {num_experts - 1}, got {experts.min()} to {experts.max()}")
        for array, values in zip(arrays.values(), group_rows_reference(experts, num_experts, tile_rows), strict=True):
            array[...] = values
    else:
        _launch_group_rows(experts, num_experts, tile_rows, **arrays)
    return RowGroups(*experts.shape, tile_rows, xp, **arrays)


def group_rows_reference(experts, num_experts, tile_rows):
    """(order, offsets, tiles)"""
    flat = experts.reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=num_experts))])
    tiles = np.zeros((most_tiles(flat.size, num_experts, tile_rows), 3), np.int32)
    tiles[:, 0] = -1
    entries = [
        (expert, first, min(tile_rows, offsets[expert + 1] - first))
        for expert in range(num_experts)
        for first in range(offsets[expert], offsets[expert + 1], tile_rows)
    ]
    tiles[: len(entries)] = entries
    return np.argsort(flat, kind="stable"), offsets, tiles


def _launch_group_rows(experts, num_experts, tile_rows, order, offsets, tiles):
    arguments = (experts, order, offsets, tiles, *map(np.int32, (experts.size, tile_rows, len(tiles))))
    launch(instance("group_rows"), (num_experts,), (512,), arguments)


@accepts_dlpack(replays=True)
def combine_rows(y, weights, *, out=None):
    """z[r, :] = sum_j weights[r, j] * y[r, j, :], in float32

    y [rows, top_k, cols]: float16, bfloat16 or float32, the rows as their experts made them; weights float32
    [rows, top_k]; z float32 [rows, cols]. fp32 fused multiply-adds in the order of j (float64 in the reference). Where a
    weight is exactly 0, y is passed over, whatever it holds there (Inf and NaN included). Raises TypeError / ValueError
    for wrong dtypes, shapes, strides or an out that overlaps an input.

    >>> combine_rows(np.array([[[1, 2], [10, 20], [np.nan, 0]]], np.float16), np.array([[0.5, 0.25, 0]], np.float32))
    array([[3., 6.]], dtype=float32)
    """
    xp = namespace(y=y, weights=weights)
    check(y, "y", dtype=FLOATS, ndim=3)
    check(weights, "weights", dtype=float32, shape=y.shape[:2])
    rows, top_k, cols = y.shape
    out = output(xp, out, (rows, cols), float32)
    refuse_overlap(out, "out", y=y, weights=weights)
    if out.size == 0:
        return out
    if xp is np:
        store(out, combine_rows_reference(y, weights))
    else:
        _launch_combine_rows(y, weights, out)
    return out


@np.errstate(invalid="ignore")
def combine_rows_reference(y, weights):
    weights = float64(weights)[:, :, None]
    return np.where(weights == 0, 0.0, weights * float64(y)).sum(axis=1)


def _launch_combine_rows(y, weights, out):
    rows, top_k, cols = y.shape
    vector = access_width(cols, y, out)
    grid = (rows, min(-(-cols // (256 * vector)), 64))
    launch(instance("combine_rows", y.dtype, vector), grid, (256,), (y, weights, out, np.int32(cols), np.int32(top_k)))


INSTANCES = [
    *(_route_instance(dtype, 32) for dtype in FLOATS),
    *(_route_instance(float16, experts) for experts in (64, 128, _MOST_EXPERTS)),
    instance("group_rows"),
    *(instance("combine_rows", dtype, 4) for dtype in FLOATS),
    instance("combine_rows", float16, 1),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
