"""Products of a mixture of experts: every row with the quantized matrices of its own experts, in one launch."""

import numpy as np

from cupyq import _device
from cupyq._arrays import bfloat16, byte_bounds, check, float16, float32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.formats.tiles import TILE
from cupyq.ops._common import dtype_named, refuse_overlap, store
from cupyq.ops.qmatmul import product_instance, qmatmul_reference, split_workspace, workspace_parts
from cupyq.ops.qmatmul_config import COUNTERS, Problem, pick_config, widths_present
from cupyq.ops.qmatrix_group import QMatrixGroup
from cupyq.ops.routing import TILE_ROWS, RowGroups


@accepts_dlpack(replays=True)
def qmatmul_grouped(x, matrices, groups, *, dtype=None, out=None, workspace=None):
    """y[r, j] = x[r] @ W_e (+ bias_e), or x[r, j] @ W_e (+ bias_e), for the j-th expert e of every row r

    x [rows, k], or [rows, top_k, k] where each pair of a row and an expert has activations of its own: float16 or
    bfloat16 (on NumPy also float32). matrices: a QMatrixGroup, W_e [k, n] of every expert; groups: the RowGroups of
    `group_rows` for as many experts. y [rows, top_k, n] has x's dtype, or float32 with dtype=float32. fp32 accumulation,
    one rounding, as in `qmatmul`; the same bits on every run. For one number of rows, tile_rows and GPU, the bits of
    y[r, j] depend on its row of x and its expert alone. `out` must not overlap x.
    `workspace`: float32 array of at least `qmatmul_grouped_workspace_size(matrices, groups)` values, zero when first used; it
    may serve `qmatmul` as well, one call after the other. With out and workspace given nothing is allocated.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides, devices.
    """
    if not isinstance(matrices, QMatrixGroup):
        raise TypeError(f"matrices must be a QMatrixGroup (see QMatrixGroup.from_matrices), got {type(matrices).__name__}")
    if not isinstance(groups, RowGroups):
        raise TypeError(f"groups must be RowGroups (see group_rows), got {type(groups).__name__}")
    xp = namespace(x=x, matrices=matrices, groups=groups)
    check(x, "x", dtype=(float16, bfloat16, float32) if xp is np else (float16, bfloat16), last=matrices.k)
    rows, top_k = groups.rows, groups.top_k
    if x.shape[:-1] not in ((rows,), (rows, top_k)):
        k = matrices.k
        raise ValueError(f"x must have shape ({rows}, {k}) or ({rows}, {top_k}, {k}), as groups say, got {x.shape}")
    if groups.num_experts != len(matrices):
        raise ValueError(f"groups are for {groups.num_experts} experts and matrices for {len(matrices)}: they must agree")
    out = output(xp, out, (rows, top_k, matrices.n), x.dtype if dtype is None else dtype_named(dtype))
    check(out, "out", dtype=(x.dtype, float32))
    refuse_overlap(out, "out", x=x)
    if out.size == 0:
        return out
    if xp is np:
        store(out, qmatmul_grouped_reference(x, matrices, groups))
    else:
        _launch_qmatmul_grouped(x, matrices, groups, out, workspace)
    return out


def qmatmul_grouped_reference(x, matrices, groups):
    y = np.empty((groups.rows * groups.top_k, matrices.n))
    per_pair = x.reshape(-1, matrices.k)
    pairs_per_row = len(y) // len(per_pair)
    for expert, q in enumerate(matrices.matrices):
        pairs = groups.order[groups.offsets[expert] : groups.offsets[expert + 1]]
        if pairs.size:
            y[pairs] = qmatmul_reference(per_pair[pairs // pairs_per_row], q)
    return y.reshape(groups.rows, groups.top_k, matrices.n)


def qmatmul_grouped_workspace_size(matrices, groups):
    """float32 values of `workspace` that qmatmul_grouped needs, however so many rows are routed; 0 on NumPy."""
    if matrices.xp is np:
        return 0
    return COUNTERS + sum(_workspace_parts(matrices, groups, _config(matrices, groups)))


def _config(matrices, groups):
    device = _device.current()
    problem = Problem(
        groups.tile_rows,
        matrices.column_tiles,
        matrices.blocks,
        widths_present(matrices.width_blocks),
        matrices.kind == "gptq",
        device.sm_count,
        _device.arch_number(device.arch),
        row_tiles=len(groups.tiles),
    )
    return pick_config(problem)


def _workspace_parts(matrices, groups, config):
    return workspace_parts(groups.rows * groups.top_k, matrices, config)


def _launch_qmatmul_grouped(x, matrices, groups, out, workspace):
    config, pairs = _config(matrices, groups), groups.rows * groups.top_k
    pairs_per_row, x_stride = pairs * matrices.k // x.size, matrices.k
    partials, gathered = _workspace_parts(matrices, groups, config)
    arrived, space = split_workspace(workspace, (partials, gathered), groups.rows, x=x, out=out)
    if matrices.is_permuted or byte_bounds(x)[0] % 16 != 0:
        given, x, x_stride = x, space[partials : partials + gathered].view(x.dtype), TILE * matrices.blocks
        sizes = map(np.int32, (len(groups.tiles), pairs_per_row, matrices.k, x_stride))
        grid = (-(-x_stride // 256), min(len(groups.tiles), 65535))
        launch(_gather_instance(x.dtype), grid, (128,), (given, matrices.table, groups.tiles, groups.order, x, *sizes))
        pairs_per_row = 1
    sizes = (
        pairs, pairs_per_row, matrices.column_tiles, x_stride, config.staged_rows(groups.tile_rows), config.slices,
        config.slice_steps, config.chunk_steps,
    )  # fmt: skip
    arguments = (
        matrices.table, x, groups.tiles, groups.order, out, space, arrived, *map(np.int32, sizes),
        np.bool_(out.dtype != x.dtype),
    )  # fmt: skip
    kernel = product_instance("qmatmul_grouped", x.dtype, matrices, config)
    items = -(-matrices.column_tiles // config.warps_n) * config.slices
    launch(kernel, (items, len(groups.tiles)), (config.threads,), arguments, config.shared_bytes)


def _gather_instance(dtype):
    return instance("gather_columns_grouped", dtype, file="gather_columns")


def _instances():
    for dtype in (float16, bfloat16):
        yield _gather_instance(dtype)
    for dtype, tile_rows, has_zeros, widths in (
        (float16, TILE_ROWS[0], False, (4,)),
        (float16, TILE_ROWS[0], False, (8, 6, 5, 4, 3, 2)),
        (float16, TILE_ROWS[-2], False, (4,)),
        (bfloat16, TILE_ROWS[0], True, (4,)),
    ):
        config = pick_config(Problem(tile_rows, 128, 128, widths, has_zeros, 132, 90, row_tiles=8))
        sizes = (config.m_tiles, config.warps_n, config.warps_k, config.slots)
        yield instance("qmatmul_grouped", dtype, has_zeros, sum(1 << bits for bits in widths), *sizes)


INSTANCES = list(_instances())
"""Of each kind one; what a model needs is compiled when it is loaded."""
