"""Products with quantized weights, and the weights themselves."""

import functools
from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import (
    accepts_dlpack,
    bfloat16,
    byte_bounds,
    check,
    float16,
    float32,
    namespace,
    output,
)
from cupyq._kernels import instance, launch
from cupyq.formats.tiles import TILE, WIDTHS_IN_ORDER
from cupyq.ops._common import float64, refuse_overlap, store
from cupyq.ops.matmul import multiply_into
from cupyq.ops.qmatrix import QMatrix

_MAX_SCRATCH_BYTES = 256 * 2**20  # of dequantised weights at a time, for many rows


@accepts_dlpack
def qmatmul(x, q, *, dtype=None, out=None, workspace=None):
    """y = x @ W (+ bias) with the quantized matrix W [k, n] of `q`.

    x [..., k]: float16 or bfloat16 (on NumPy also float32), with any number of rows. y [..., n] has x's dtype, or float32
    with dtype=float32. fp32 accumulation, one rounding; the same bits on every run. `out` must not overlap x.
    Few rows: fused kernel, in which each block's fp32 sum is multiplied by its scale (weights are not rounded to fp16 first:
    about 2e-4 norm-wise from, and nearer the exact product than, the definition in `reconstruct`). Many rows: the weights are
    reconstructed in x's dtype and multiplied by cuBLAS.
    `workspace`: float32 array of at least `qmatmul_workspace_size(q, rows)` values, zero when first used; it may serve any
    products one after the other, as its counters are zero again after each. With out and workspace given and few rows,
    nothing is allocated and the op can be captured in a graph.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides, devices.
    """
    if not isinstance(q, QMatrix):
        raise TypeError(f"q must be a QMatrix (see QMatrix.from_tensors), got {type(q).__name__}")
    xp = namespace(x=x, q=q)
    check(x, "x", dtype=(float16, bfloat16, float32) if xp is np else (float16, bfloat16), last=q.k)
    out = output(xp, out, (*x.shape[:-1], q.n), x.dtype if dtype is None else np.dtype(dtype))
    check(out, "out", dtype=(x.dtype, float32))
    refuse_overlap(out, "out", x=x)
    if x.size == 0:
        return out
    if xp is np:
        store(out, qmatmul_reference(x, q))
    else:
        _launch_qmatmul(x, q, out, workspace)
    return out


def qmatmul_reference(x, q):
    y = float64(x).reshape(-1, q.k) @ float64(q.dense)
    if q.bias is not None:
        y += q.bias
    return y.reshape(*x.shape[:-1], q.n)


@dataclass(frozen=True)
class QmatmulConfig:
    """How a product is cut: 8 * m_tiles rows, 32 * warps_n columns and `slice_blocks` row blocks to a thread block."""

    m_tiles: int
    warps_n: int
    warps_k: int
    slices: int
    slice_blocks: int
    chunk_blocks: int

    @property
    def shared_bytes(self):
        staged = 8 * self.m_tiles * (self.chunk_blocks | 1) * 2 * TILE
        handed = (self.warps_k - 1) * self.m_tiles * 8 * self.warps_n * 32 * 4
        return max(staged, handed)


FUSED_ROWS = 64
"""Up to so many rows the fused kernel runs; beyond, dequantise and cuBLAS."""


@functools.cache
def pick_config(m, n, blocks, sm_count, *, row_tiles=1, warps_n=4, warps_k=2, shared_limit=48 * 1024):
    """QmatmulConfig for m rows, so often: two thread blocks for every multiprocessor where K is long enough to be sliced."""
    m_tiles = next(t for t in (1, 2, 4, 8) if 8 * t >= min(m, FUSED_ROWS))
    column_blocks = -(-n // (TILE * warps_n)) * -(-m // (8 * m_tiles)) * row_tiles
    # A slice of fewer than 8 blocks a warp would spend its time on filling and draining.
    slices = max(1, min(2 * sm_count // column_blocks, blocks // (8 * warps_k)))
    slice_blocks = -(-blocks // slices)
    chunk_blocks = min(slice_blocks, shared_limit // (8 * m_tiles * 2 * TILE) - 1)
    return QmatmulConfig(m_tiles, warps_n, warps_k, -(-blocks // slice_blocks), slice_blocks, chunk_blocks)


def qmatmul_workspace_size(q, rows):
    """float32 values of `workspace` that qmatmul needs for up to `rows` rows; 0 on NumPy."""
    if q.xp is np or rows > FUSED_ROWS:
        return 0
    return COUNTERS + max(sum(_workspace_parts(q, m, _config(q, m))) for m in {min(m, rows) for m in (1, 8, 16, 32, 64)})


def _config(q, m):
    return pick_config(m, q.n, q.tiles.layout.blocks, _device.current().sm_count)


COUNTERS = 1024
"""Counters at the start of every workspace, one per thread block of a slice. Always so many, whatever the product, so that one
workspace serves products of any shapes in turn: a sliced product has at most as many column blocks as there are SMs."""


def _workspace_parts(q, m, config):
    return workspace_parts(m, q.tiles.layout.padded_n, q.tiles.layout.blocks, config)


def workspace_parts(m, padded_n, blocks, config):
    """(partial sums, gathered x) behind the counters, in 4-byte values; only a sliced product has partial sums."""
    return config.slices * m * padded_n if config.slices > 1 else 0, m * blocks * TILE // 2


def split_workspace(workspace, parts, rows, **others):
    """(counters, the space behind them) of the caller's workspace, which must not overlap the others, or of a new one."""
    if workspace is None:
        xp = namespace(**others)
        return xp.zeros(COUNTERS, np.uint32) if parts[0] else None, xp.empty(sum(parts), np.float32)
    check(workspace, "workspace", dtype=float32, ndim=1)
    needed = COUNTERS + sum(parts)
    if workspace.size < needed:
        raise ValueError(f"workspace must have {needed} float32 values for {rows} rows, got {workspace.size}")
    if byte_bounds(workspace)[0] % 16:
        raise ValueError("workspace must begin at a multiple of 16 bytes: pass a whole array, not a slice from its middle")
    refuse_overlap(workspace, "workspace", **others)
    return workspace[:COUNTERS], workspace[COUNTERS:]


def _is_gathered(x, q):
    """Whether x must be rewritten first: into stored row order, or to an address the kernel's 16-byte copies can take.

    Inside the product each thread block would gather anew, at a 32-byte sector for every 2-byte value.
    """
    return q.tiles.rows is not None or byte_bounds(x)[0] % 16 != 0


def _launch_qmatmul(x, q, out, workspace):
    m = x.size // q.k
    if m > FUSED_ROWS:
        _launch_dequantised(x.reshape(m, q.k), q, out.reshape(m, q.n))
    else:
        _launch_fused(x, q, out, m, workspace, _config(q, m))


def _launch_fused(x, q, out, m, workspace, config):
    tiles, layout = q.tiles, q.tiles.layout
    partials, gathered = _workspace_parts(q, m, config)
    arrived, space = split_workspace(workspace, (partials, gathered), m, x=x, out=out)
    if _is_gathered(x, q):
        x = _launch_gather(x, q, space[partials : partials + gathered], m)
    grid = (-(-layout.column_tiles // config.warps_n), config.slices, -(-m // (8 * config.m_tiles)))
    sizes = (m, q.n, layout.padded_n, layout.words_per_column_tile, config.slice_blocks, config.chunk_blocks)
    arguments = (
        x, tiles.words, tiles.scales, tiles.zeros, tiles.block_group, q.bias, out, space, arrived,
        *map(np.int32, sizes), np.bool_(out.dtype != x.dtype), *map(np.int32, layout.width_blocks),
    )  # fmt: skip
    kernel = product_instance("qmatmul", x.dtype, tiles.zeros is not None, layout.width_blocks, config)
    launch(kernel, grid, (32 * config.warps_n * config.warps_k,), arguments, config.shared_bytes)


def _launch_gather(x, q, space, m):
    count = q.tiles.layout.blocks * TILE
    gathered = space.view(x.dtype)
    arguments = (x, q.tiles.rows, gathered, *map(np.int32, (m, q.k, count)))
    launch(_gather_instance(x.dtype), (-(-count // 256), m), (128,), arguments)
    return gathered


def _gather_instance(dtype):
    return instance("gather_columns", dtype)


def product_instance(kernel, dtype, has_zeros, width_blocks, config):
    """Of qmatmul or qmatmul_grouped, for the widths whose count in width_blocks is not 0."""
    widths = sum(1 << bits for bits, count in zip(WIDTHS_IN_ORDER, width_blocks, strict=True) if count)
    return instance(kernel, dtype, has_zeros, widths, config.m_tiles, config.warps_n, config.warps_k)


def _launch_dequantised(x, q, out):
    """Column chunks of the weights, reconstructed into scratch that stays small, times x by cuBLAS."""
    chunk = max(TILE, _MAX_SCRATCH_BYTES // (2 * q.k) // TILE * TILE)
    scratch = q.xp.empty(q.k * min(chunk, q.tiles.layout.padded_n), x.dtype)
    for first in range(0, q.n, chunk):
        columns = min(chunk, q.n - first)
        weight = scratch[: q.k * columns].reshape(q.k, columns)
        _launch_reconstruct(q, weight, first)
        multiply_into(out, x, weight, first_column=first, bias=q.bias)


@accepts_dlpack
def reconstruct(q, *, out=None):
    """W float16 [k, n]: the weights of the QMatrix `q` as the format defines them, bit for bit, rows in the model's order.

    EXL2: RN16((code - 2**(bits-1)) * scale), GPTQ: RN16((code - zero) * scale). The bias is not part of W.
    Raises TypeError for anything but a QMatrix, ValueError / TypeError for an unfit out.
    """
    if not isinstance(q, QMatrix):
        raise TypeError(f"q must be a QMatrix (see QMatrix.from_tensors), got {type(q).__name__}")
    out = output(q.xp, out, (q.k, q.n), float16)
    if q.xp is np:
        out[...] = reconstruct_reference(q)
    else:
        _launch_reconstruct(q, out, 0)
    return out


def reconstruct_reference(q):
    return q.dense


def _launch_reconstruct(q, out, first_column):
    tiles, layout = q.tiles, q.tiles.layout
    columns = out.shape[1]
    launch(
        _reconstruct_instance(out.dtype, tiles.zeros is not None),
        (-(-columns // TILE), -(-layout.blocks // 4)),
        (128,),
        (
            tiles.words, tiles.scales, tiles.zeros, tiles.block_bits, tiles.block_start, tiles.block_group, tiles.rows, out,
            *map(np.int32, (first_column // TILE, columns, layout.blocks, layout.padded_n, layout.words_per_column_tile)),
        ),
    )  # fmt: skip


def _reconstruct_instance(dtype, has_zeros):
    return instance("reconstruct", dtype, has_zeros)


def _instances():
    sixteen_bit = (float16, bfloat16)
    yield from map(_gather_instance, sixteen_bit)
    yield from (_reconstruct_instance(dtype, zeros) for dtype in sixteen_bit for zeros in (False, True))
    one_width = [tuple(int(bits == w) for w in WIDTHS_IN_ORDER) for bits in WIDTHS_IN_ORDER]
    for m in (1, 64):
        config = pick_config(m, 4096, 128, 132)
        for dtype in sixteen_bit:
            yield from (product_instance("qmatmul", dtype, False, counts, config) for counts in (*one_width, (1,) * 6))
            yield from (
                product_instance("qmatmul", dtype, True, counts, config) for counts in one_width if not counts[1] | counts[2]
            )


INSTANCES = list(_instances())
"""Every single width and all at once; mixtures of other models are compiled when first used."""
