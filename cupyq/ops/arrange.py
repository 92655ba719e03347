"""Rows of x as the images that cu/qmatmul_wgmma.cu wants in shared memory, in the stored row order of a QMatrix: as they are,
or with a norm or a gate before.

Nothing is checked here. x [m, k], k a multiple of 8. order: int32, the column of x of each of the 32 * blocks stored rows, -1
for none; or None for 0, 1, 2, ..., which are k then. It is a constant, which may be read before the kernel ahead has ended.
images: any array with the memory of `image_count(m, blocks, rows)` images of rows x 64 values, at a multiple of 16 bytes; rows:
32, 64 or 128.
"""

import functools
from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import bfloat16, byte_bounds, float16, float32
from cupyq._kernels import instance, launch
from cupyq.formats.tiles import TILE
from cupyq.ops._common import access_width, store
from cupyq.ops.activation import activation_reference
from cupyq.ops.norm import norm_warps, rms_norm_reference

STAGE_BLOCKS = 2
"""Row blocks of an image."""
STAGE_COLUMNS = STAGE_BLOCKS * TILE

_RESERVED = 1024  # bytes of shared memory that CUDA takes for each thread block
_COLUMN_LIMIT = 1 << 16  # columns travel as 16-bit numbers


def image_count(m, blocks, rows):
    return -(-m // rows) * -(-blocks // STAGE_BLOCKS)


# --- how rows are shared out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowCut:
    """Rows 0, 1, ... go round `grid[0]` thread blocks for each of `grid[1]` parts of the columns."""

    grid: tuple[int, int]
    threads: int
    shared_bytes: int


@functools.cache
def cut_rows(image_rows, stages, row_bytes, threads, has_order, most_blocks, device):
    """The RowCut for so many rows of `stages` images, or None where shared memory does not hold what a thread block needs.

    row_bytes: of the rows that it holds. most_blocks: thread blocks on a multiprocessor, as registers and threads allow.
    """
    # Of few rows, each goes to several thread blocks, a chunk a thread at least; so does one that leaves too little room.
    parts = max(1, min(-(-stages * 8 // threads), 2 * device.sm_count // image_rows))
    limit = device.shared_bytes_per_block
    while (shared_bytes := row_bytes + has_order * -(-stages // parts) * 128) > limit - _RESERVED:
        if parts >= stages or not has_order:
            return None
        parts += 1
    blocks = device.sm_count * min(most_blocks, (limit + _RESERVED) // (shared_bytes + _RESERVED))
    return RowCut((min(image_rows, -(-blocks // parts)), parts), threads, shared_bytes)


def _cut(m, k, blocks, rows, order, threads, most_blocks, slots=1):
    """cut_rows for the current GPU and `slots` rows of k values; None also where a column has no 16-bit number."""
    if k >= _COLUMN_LIMIT:
        return None
    image_rows, stages = -(-m // rows) * rows, -(-blocks // STAGE_BLOCKS)
    return cut_rows(image_rows, stages, slots * _row_bytes(k), threads, order is not None, most_blocks, _device.current())


def _row_bytes(k):
    """Of a row with zeros behind it."""
    return 2 * k + 16


def suits_arrange(k):
    """Whether launch_arrange_normed and launch_arrange_gated take rows of k values on the current GPU."""
    # 128 bytes of columns and the sums of a norm are the least that goes with a row.
    return k < _COLUMN_LIMIT and _row_bytes(k) + 128 <= _device.current().shared_bytes_per_block - _RESERVED


# --- x ----------------------------------------------------------------------------------------------------------------

ROW_THREADS = 512
SLOTS = (2, 1)
"""Rows that a thread block holds, the best first: with the second, a row is on its way while the one before is gathered."""


def launch_arrange_rows(x, order, images, m, blocks, rows):
    """Write x [m, k] of any 16-bit dtype."""
    k, count = x.size // m, blocks * TILE
    cuts = []
    if order is not None:
        cuts = [(_cut(m, k, blocks, rows, order, ROW_THREADS, 2048 // ROW_THREADS, slots), slots) for slots in SLOTS]
    whole = RowCut((-(-m // rows) * rows, -(-blocks // (32 * STAGE_BLOCKS))), 256, 0)  # a chunk a thread, none in shared memory
    cut, slots = min((c for c in cuts if c[0] is not None), key=lambda c: c[0].grid[1], default=(whole, 0))
    sizes = (*map(np.int32, (m, k, count, rows)), np.bool_(byte_bounds(x)[0] % 16 == 0))
    launch(arrange_instance(slots), cut.grid, (cut.threads,), (x, order, images, *sizes), cut.shared_bytes)


def arrange_rows_reference(x, order, blocks, rows):
    """The images of x [m, k] as an array of its dtype [ceil(m / rows), stages, rows, 64], swizzled as in shared memory."""
    m, stages = x.shape[0], -(-blocks // STAGE_BLOCKS)
    padded = np.zeros((-(-m // rows) * rows, stages * STAGE_COLUMNS), x.dtype)
    if order is None:
        padded[:m, : x.shape[1]] = x
    else:
        padded[:m, : order.size] = np.where(order < 0, np.zeros((), x.dtype), x[:, np.maximum(order, 0)])
    chunks = padded.reshape(-1, rows, stages, 8, 8).transpose(0, 2, 1, 3, 4)  # [row block, stage, row, chunk, value]
    images = np.empty_like(chunks)
    for r in range(rows):
        images[:, :, r, np.arange(8) ^ r % 8] = chunks[:, :, r]
    return images.reshape(*images.shape[:3], STAGE_COLUMNS)


def arrange_instance(slots):
    return instance("arrange_rows", slots)


# --- the norm of x ----------------------------------------------------------------------------------------------------


def launch_arrange_normed(x, weight, eps, dtype, order, images, m, blocks, rows):
    """Write rms_norm(x, weight, eps=eps, dtype=dtype), to the bit; only for a k that `suits_arrange`.

    x [m, k] and weight [k] may each be float16, bfloat16 or float32; dtype: one of the first two.
    """
    k, warps = weight.size, norm_warps(weight.size)
    cut = _cut(m, k, blocks, rows, order, 32 * warps, max(2, 24 // warps))  # with 64 and 80 registers a thread, of 65536
    kernel = _normed_instance(x.dtype, weight.dtype, dtype, access_width(k, x, weight), warps)
    sizes = (*map(np.int32, (m, k, blocks * TILE, rows)), np.float32(eps))
    launch(kernel, cut.grid, (cut.threads,), (x, weight, order, images, *sizes), cut.shared_bytes)


def arrange_normed_reference(x, weight, eps, dtype, order, blocks, rows):
    return _images_of(rms_norm_reference(x, weight, eps), dtype, order, blocks, rows)


def _images_of(values, dtype, order, blocks, rows):
    rounded = np.empty(values.shape, dtype)
    store(rounded, values)
    return arrange_rows_reference(rounded, order, blocks, rows)


def _normed_instance(x, weight, y, vector, warps):
    return instance("arrange_normed", x, weight, y, vector, warps)


# --- the gated product ------------------------------------------------------------------------------------------------

_GATED_THREADS = 512


def launch_arrange_gated(gate, up, function, order, images, m, blocks, rows):
    """Write activation(gate) * up, to the bit of cu/activate.cu; only for a k that `suits_arrange`.

    gate and up [m, k] of one 16-bit dtype, or both side by side, gate [m, 2 * k], and up None; function: "SILU", "GELU" (erf),
    "GELU_TANH" or "RELU".
    """
    stride = gate.size // m
    k = stride if up is not None else stride // 2
    if up is None:
        up = gate.reshape(-1)[k:]
    cut = _cut(m, k, blocks, rows, order, _GATED_THREADS, 1 if function == "GELU" else 2)  # erfcf takes many registers
    vector = 8 if access_width(k, gate, up) == 8 else 1
    sizes = map(np.int32, (m, k, stride, blocks * TILE, rows))
    kernel = _gated_instance(gate.dtype, function, vector)
    launch(kernel, cut.grid, (cut.threads,), (gate, up, order, images, *sizes), cut.shared_bytes)


@np.errstate(over="ignore", invalid="ignore")
def arrange_gated_reference(gate, up, function, order, blocks, rows):
    values = activation_reference(gate, function.lower()) * up.astype(np.float64)
    return _images_of(values, gate.dtype, order, blocks, rows)


def _gated_instance(dtype, function, vector):
    return instance("arrange_gated", dtype, function, vector)


INSTANCES = [
    *map(arrange_instance, (0, 1, 2)),
    *(_normed_instance(float32, float32, y, 4, 16) for y in (float16, bfloat16)),
    _normed_instance(bfloat16, float32, bfloat16, 1, 1),
    *(_gated_instance(dtype, "SILU", 8) for dtype in (float16, bfloat16)),
    _gated_instance(float16, "GELU", 1),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
