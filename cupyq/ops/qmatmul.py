"""Products with quantized weights."""

import dataclasses

import numpy as np

from cupyq import _device
from cupyq._arrays import (
    FLOATS,
    bfloat16,
    byte_bounds,
    check,
    float16,
    float32,
    namespace,
    new_array,
    output,
    refuse_partial_overlap,
)
from cupyq._copies import copy_values
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq._recording import spoil
from cupyq.formats.tiles import TILE
from cupyq.ops._common import dtype_named, float64, norm_epsilon, refuse_overlap, shown, store, truth
from cupyq.ops.activation import activation_reference, launch_activate
from cupyq.ops.arrange import launch_arrange_gated, launch_arrange_normed, suits_arrange
from cupyq.ops.gather_columns import launch_gather_columns
from cupyq.ops.matmul import fill_rows, multiply_into
from cupyq.ops.norm import rms_norm
from cupyq.ops.qmatmul_config import (
    COUNTERS,
    Problem,
    current_problem,
    make_config,
    most_values,
    pick_config,
    widths_present,
)
from cupyq.ops.qmatmul_wgmma import launch_wgmma, suits_wgmma, wgmma_config, wgmma_workspace_parts
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.qmatrix_join import JoinedQMatrix
from cupyq.ops.reconstruct import launch_reconstruct

_MAX_SCRATCH_BYTES = 256 * 2**20  # of dequantised weights at a time, for many rows

FUSED_ROWS = 64
"""Up to so many rows count as few: one launch of cu/qmatmul.cu, epilogue included; on Hopper up to the first of WGMMA_ROWS."""

GATES = {"silu": "SILU", "gelu": "GELU", "gelu_tanh": "GELU_TANH", "relu": "RELU"}


@dataclasses.dataclass(frozen=True)
class InputNorm:
    """An RMSNorm that a product applies to its x: rms_norm(x, weight, eps=eps, dtype=dtype), x of any of the three types."""

    weight: object  # [k], float16, bfloat16 or float32
    eps: float
    dtype: object  # float16 or bfloat16; on NumPy also float32

    def applied(self, x, order=None):
        """The normed x, with columns in `order` if there is one. Called once for an x, which other kinds of norm may change."""
        return rms_norm(x, self.weight, eps=self.eps, dtype=self.dtype, order=order)


@dataclasses.dataclass(frozen=True)
class InputGate:
    """A gate that a product applies to its x, gate and up side by side: activation(x[..., :k]) * x[..., k:], in x's dtype."""

    activation: str = "silu"
    """As of qmatmul_gated."""


@accepts_dlpack(replays=True)
def qmatmul(x, q, *, before=None, residual=None, is_ordered=False, dtype=None, out=None, workspace=None, batch_invariant=False):
    """y = x @ W (+ bias) (+ residual) with the quantized weights W [k, n] of `q`.

    q: a QMatrix, or a JoinedQMatrix of several side by side. x [..., k]: float16 or bfloat16 (on NumPy also float32), with
    any number of rows; with is_ordered its columns are already in the stored row order `q.order` (zero where that is -1).
    before: what is done to x first, an InputNorm or an InputGate; the result takes the place of x, and is never is_ordered.
    y [..., n] has x's dtype, or float32 with dtype=float32. residual has y's shape and dtype; `out` may be the residual, and
    must not overlap x. fp32 accumulation, one rounding, in which bias and residual are included; the same bits on every run.
    Few rows (16 on Hopper, else FUSED_ROWS): each group's fp32 sum is multiplied by its scale (weights are not rounded to fp16
    first: about 2e-4 norm-wise from, and nearer the exact product than, the definition in `reconstruct`). Many rows: weights
    rounded to x's dtype, inside the product (Hopper) or before it, and multiplied on the tensor cores.
    batch_invariant: a row's result depends on that row alone, not on how many others there are, at the cost of speed for many
    rows. `workspace`: float32 array of at least `qmatmul_workspace_size(q, rows)` values, zero when first used; it may serve
    any products one after the other, as its counters are zero again after each. With out and workspace given and up to
    FUSED_ROWS rows, nothing is allocated.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides, devices.
    """
    dtype = None if dtype is None else dtype_named(dtype)
    is_ordered, batch_invariant = truth(is_ordered, "is_ordered"), truth(batch_invariant, "batch_invariant")
    xp, out = _check_product(x, q, before, is_ordered, dtype, out, _columns(q), residual)
    if x.size == 0:
        return out
    if xp is np:
        store(out, qmatmul_reference(x, q, residual, before))
    else:
        _launch_qmatmul(x, q, out, workspace, residual, is_ordered, batch_invariant, before)
    return out


def _columns(q):
    if not isinstance(q, (QMatrix, JoinedQMatrix)):
        found = type(q).__name__
        raise TypeError(f"q must be a QMatrix (see QMatrix.from_tensors) or JoinedQMatrix, got {found}")
    return q.n


def _check_product(x, q, before, is_ordered, dtype, out, n, residual=None):
    xp = namespace(x=x, q=q, residual=residual, before=getattr(before, "weight", None))
    k = q.k if xp is np or not is_ordered else q.blocks * TILE
    types = (float16, bfloat16, float32) if xp is np else (float16, bfloat16)
    x_types, x_dtype = types, None
    if before is not None and is_ordered:
        raise ValueError("before and is_ordered exclude each other: what is done to x first reads it in the model's order")
    if isinstance(before, InputNorm):
        x_types, x_dtype = FLOATS, dtype_named(before.dtype, "before.dtype")
        norm_epsilon(before.eps, "before.eps")
        if x_dtype not in types:
            raise TypeError(f"before.dtype must be one of {', '.join(map(str, types))}, got {x_dtype}")
        check(before.weight, "before.weight", dtype=FLOATS, shape=(q.k,))
    elif isinstance(before, InputGate):
        _check_activation(before.activation)
        k *= 2
    elif before is not None:
        raise TypeError(f"before must be an InputNorm, an InputGate or None, got {type(before).__name__}")
    check(x, "x", dtype=x_types, last=k)
    x_dtype = x.dtype if x_dtype is None else x_dtype
    out = output(xp, out, (*x.shape[:-1], n), x_dtype if dtype is None else dtype)
    check(out, "out", dtype=(x_dtype, float32))
    refuse_overlap(out, "out", x=x, weight=getattr(before, "weight", None))
    if residual is not None:
        check(residual, "residual", dtype=out.dtype, shape=out.shape)
        refuse_partial_overlap(out, residual=residual)
    if is_ordered and isinstance(q, JoinedQMatrix) and not q.shares_order:
        raise ValueError("is_ordered needs matrices of one stored row order, and those of q differ: pass x as it is")
    return xp, out


def qmatmul_reference(x, q, residual=None, before=None):
    x = float64(_changed_reference(x, before))
    parts = [x.reshape(-1, q.k) @ float64(matrix.dense) for matrix in q.matrices]
    for part, matrix in zip(parts, q.matrices, strict=True):
        if matrix.bias is not None:
            part += matrix.bias
    y = (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)).reshape(*x.shape[:-1], q.n)
    return y if residual is None else y + float64(residual)


def _changed_reference(x, before):
    """x after what is done `before`, rounded."""
    if before is None:
        return x
    if isinstance(before, InputNorm):
        return before.applied(x)
    gate, up = np.split(x, 2, axis=-1)
    y = np.empty(gate.shape, x.dtype)
    store(y, activation_reference(gate, before.activation) * float64(up))
    return y


@accepts_dlpack(replays=True)
def qmatmul_gated(x, joined, *, activation="silu", before=None, is_ordered=False, out=None, workspace=None):
    """y = activation(x @ W_gate (+ bias)) * (x @ W_up (+ bias)), with `joined` the JoinedQMatrix of the two, of one n.

    x [..., k] as qmatmul's; y [..., n] has x's dtype. activation: "silu", "gelu" (erf), "gelu_tanh" or "relu". Few rows (as in
    qmatmul) are one launch, in which only y is rounded; beyond, gate and up are rounded to x's dtype in between.
    before (an InputNorm or None), `workspace`, is_ordered and errors as in qmatmul.
    """
    if not isinstance(joined, JoinedQMatrix) or len(joined.matrices) != 2 or len({q.n for q in joined.matrices}) != 1:
        raise TypeError("joined must be a JoinedQMatrix of two matrices with the same n: gate and up")
    _check_activation(activation)
    is_ordered = truth(is_ordered, "is_ordered")
    if isinstance(before, InputGate):
        raise TypeError("before must be an InputNorm or None: gate and up are what this op makes")
    xp, out = _check_product(x, joined, before, is_ordered, None, out, joined.matrices[0].n)
    dtype = np.dtype(x.dtype if before is None else before.dtype)
    if out.dtype != dtype:
        raise TypeError(f"out must have x's dtype, {dtype}, got {out.dtype}")
    if x.size == 0:
        return out
    if xp is np:
        store(out, qmatmul_gated_reference(x, joined, activation, before))
    else:
        if before is not None:
            way = _way(x.size // joined.k, joined)
            x, is_ordered = _changed(x, joined, before, way)
        _launch_gated(x, joined, GATES[activation], out, workspace, is_ordered)
    return out


def qmatmul_gated_reference(x, joined, activation, before=None):
    x = _changed_reference(x, before)
    gate, up = (qmatmul_reference(x, q) for q in joined.matrices)
    return activation_reference(gate, activation) * up


def _check_activation(activation):
    if not isinstance(activation, str) or activation not in GATES:
        raise ValueError(f"activation must be one of {', '.join(GATES)}, got {shown(activation)}")


# --- which kernel -----------------------------------------------------------------------------------------------------


def qmatmul_workspace_size(q, rows, *, batch_invariant=False):
    """float32 values of `workspace` that qmatmul and qmatmul_gated need for up to `rows` rows; 0 on NumPy."""
    if q.xp is np:
        return 0
    return COUNTERS + max((_most_parts(part, rows, batch_invariant) for part in {q, *q.matrices}), default=0)


def _most_parts(q, rows, batch_invariant):
    if rows == 0:
        return 0
    device, tile_values = _device.current(), q.blocks * TILE // 2
    if batch_invariant:
        rows = min(rows, _invariant_rows(q))
        return sum(workspace_parts(rows, q, _invariant_config(rows, q)))
    few = min(rows, FUSED_ROWS)
    sizes = [
        most_values(current_problem(few, q, is_gated=is_gated), _sliced_values) for is_gated in {False, len(q.matrices) == 2}
    ]
    if rows >= WGMMA_ROWS[0] and pick_kernel(WGMMA_ROWS[0], device.arch, q.k, q.n) == "wgmma":
        sizes.append(2 * device.sm_count * 256 * 128 + 127 * tile_values)  # whatever its cut, of at most 256 x 128 each
    return max(sizes) + rows * tile_values + tile_values


def _sliced_values(m, problem, config):
    return config.slices * m * problem.column_tiles * TILE if config.slices > 1 else 0


def pick_kernel(m, arch, k, n, is_gated=False):
    """Which way m rows go: "mma", cu/qmatmul.cu; "wgmma", Hopper's own kernel; "dequantise", reconstruct and cuBLAS.

    is_gated: an InputGate comes before, which costs a pass less in Hopper's own.
    """
    if arch == "sm_90a" and WGMMA_ROWS[0] <= m <= _most_wgmma_rows(k, n, is_gated):
        return "wgmma"
    return "mma" if m <= FUSED_ROWS else "dequantise"


WGMMA_ROWS = (17, 8192)
"""From how many rows Hopper's own kernel is the quickest, and to how many at most."""


def _most_wgmma_rows(k, n, is_gated):
    """From the sweeps of docs/measured.md: arranging x grows with m * k, dequantising W does not."""
    if k < 8192:
        return WGMMA_ROWS[1]
    return 1536 if k > 2 * n and not is_gated else 3072


def _way(m, q, is_gated=False):
    return pick_kernel(m, _device.current().arch, q.k, q.n, is_gated)


def workspace_parts(m, joined, config):
    """(partial sums, gathered x) behind the counters, in 4-byte values; only a sliced product has partial sums."""
    return config.slices * m * joined.column_tiles * TILE if config.slices > 1 else 0, m * joined.blocks * TILE // 2


def split_workspace(workspace, parts, rows, **others):
    """(counters, the space behind them) of the caller's workspace, which must not overlap the others, or of a new one."""
    if workspace is None:
        xp = namespace(**others)
        counters = new_array(xp, COUNTERS, np.uint32, zeros=True) if parts[0] else None
        return counters, new_array(xp, sum(parts), np.float32)
    _check_workspace(workspace, parts, rows, **others)
    return workspace[:COUNTERS], workspace[COUNTERS:]


def _check_workspace(workspace, parts, rows, **others):
    check(workspace, "workspace", dtype=float32, ndim=1)
    needed = COUNTERS + sum(parts)
    if workspace.size < needed:
        raise ValueError(f"workspace must have {needed} float32 values for {rows} rows, got {workspace.size}")
    if byte_bounds(workspace)[0] % 16:
        raise ValueError("workspace must begin at a multiple of 16 bytes: pass a whole array, not a slice from its middle")
    refuse_overlap(workspace, "workspace", **others)


def _launch_qmatmul(x, q, out, workspace, residual, is_ordered, batch_invariant, before=None):
    m = x.size // x.shape[-1]
    way = _way(m, q, isinstance(before, InputGate))
    x, out = x.reshape(m, -1), out.reshape(m, -1)
    residual = None if residual is None else residual.reshape(m, -1)
    is_wgmma = way == "wgmma" and not batch_invariant and q.n % 4 == 0  # its stores are of four values
    if is_wgmma and not suits_wgmma(out, residual):  # the same bits at any address
        aligned = q.xp.empty(out.shape, out.dtype)
        _launch_qmatmul(x, q, aligned, workspace, _copied(residual), is_ordered, False, before)
        copy_values(aligned, out)
        return
    if before is not None and not (is_wgmma and suits_arrange(q.k)):
        x, is_ordered, before = *_changed(x, q, before, way), None
    is_mma = way == "mma" or batch_invariant or way == "wgmma" and not is_wgmma and m <= FUSED_ROWS
    first_column = 0
    for part in (q,) if q.shares_order and (is_mma or is_wgmma) else q.matrices:
        placed = dict(residual=residual, is_ordered=is_ordered, y_stride=q.n, first_column=first_column)
        if batch_invariant:
            _launch_invariant(x, part, out, workspace, **placed)
        elif is_mma:
            _launch_fused(x, part, out, m, workspace, pick_config(current_problem(m, part)), **placed)
        elif is_wgmma:
            if workspace is not None:
                parts = wgmma_workspace_parts(m, part.blocks, wgmma_config(part, m))
                _check_workspace(workspace, parts, m, x=x, out=out, residual=residual)
            launch_wgmma(x, part, out, m, workspace, **placed, **_arrangement(x, part, before))
        else:
            _launch_dequantised(x, part, out, first_column, residual, is_ordered)
        first_column += part.n


def _changed(x, q, before, way):
    """(x after what is done `before`, whether it is in stored row order)"""
    if isinstance(before, InputNorm):
        order = q.order if q.shares_order and way != "dequantise" else None
        return before.applied(x, order), order is not None
    spoil()
    gate, up = (x[..., columns].copy() for columns in (slice(q.k), slice(q.k, None)))
    launch_activate(GATES[before.activation], gate, up, gate)
    return gate, False


def _arrangement(x, q, before):
    """What launch_wgmma arranges in place of x."""
    m = len(x)
    if isinstance(before, InputNorm):
        dtype = np.dtype(before.dtype)

        def arrange(order, images, rows):
            launch_arrange_normed(x, before.weight, before.eps, dtype, order, images, m, q.blocks, rows)
    elif isinstance(before, InputGate):
        dtype = x.dtype

        def arrange(order, images, rows):
            launch_arrange_gated(x, None, GATES[before.activation], order, images, m, q.blocks, rows)
    else:
        return {}
    return {"arrange": arrange, "dtype": dtype}


def suits_input_gate(rows, q):
    """Whether products of so many rows with q do well to apply an InputGate themselves: it then costs a pass less."""
    return q.xp is not np and _way(rows, q, is_gated=True) == "wgmma" and suits_arrange(q.k)


def _copied(array):
    if array is None:
        return None
    copy = namespace(array=array).empty(array.shape, array.dtype)
    copy_values(array, copy)
    return copy


def _launch_gated(x, joined, gate, out, workspace, is_ordered):
    m = x.size // x.shape[-1]
    if _way(m, joined) == "mma" and joined.shares_order:
        config = pick_config(current_problem(m, joined, is_gated=True))
        if config.warps_n % 2 == 0:
            _launch_fused(x, joined, out, m, workspace, config, is_ordered=is_ordered, gate=gate)
            return
    first, up = out, new_array(joined.xp, out.shape, out.dtype)
    for q, y in zip(joined.matrices, (first, up), strict=True):
        _launch_qmatmul(x, q, y, workspace, None, is_ordered, False)
    launch_activate(gate, first, up, out)


def _invariant_config(m, q):
    """A cut in which the order of a row's sums is the same whatever m: slices, chunks and warps of one row's, up to 16 rows."""
    one, problem = pick_config(current_problem(1, q)), current_problem(16, q)
    warps_k = one.warps_k
    while (config := make_config(problem, 2, one.warps_n, warps_k, 2, one.slices)) is None:
        warps_k //= 2  # 16 rows need more shared memory
    return config if m > 8 else dataclasses.replace(config, m_tiles=1)


def _invariant_rows(q):
    """So many rows at a time: each 16 of them have counters of their own."""
    return 16 * min(1024, max(1, COUNTERS // q.column_tiles))


def _launch_invariant(x, q, out, workspace, *, residual, **placed):
    step = _invariant_rows(q)
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        config = _invariant_config(len(x[rows]), q)
        part = None if residual is None else residual[rows]
        _launch_fused(x[rows], q, out[rows], len(x[rows]), workspace, config, residual=part, **placed)


def _launch_fused(
    x, joined, out, m, workspace, config, *, residual=None, is_ordered=False, gate="PLAIN", y_stride=None, first_column=0
):
    partials, gathered = workspace_parts(m, joined, config)
    arrived, space = split_workspace(workspace, (partials, gathered), m, x=x, out=out, residual=residual)
    order = None if is_ordered else joined.order
    # Inside the product each thread block would gather anew, at a 32-byte sector for every 2-byte value; and its copies of x
    # take 16 bytes.
    if order is not None or byte_bounds(x)[0] % 16 != 0:
        x = launch_gather_columns(x, order, space[partials : partials + gathered].view(x.dtype), m, joined.blocks)
    y_stride = (joined.matrices[0].n if gate != "PLAIN" else joined.n) if y_stride is None else y_stride
    if first_column:
        out, residual = (None if a is None else a.reshape(-1)[first_column:] for a in (out, residual))
    sizes = (
        len(joined.matrices), joined.column_tiles, joined.blocks, config.slices, config.slice_steps, config.chunk_steps,
        m, y_stride,
    )  # fmt: skip
    arguments = (
        joined.rows, x, out, residual, space, arrived, *map(np.int32, sizes),
        np.bool_(out.dtype != x.dtype),
    )  # fmt: skip
    kernel = product_instance("qmatmul", x.dtype, joined, config, gate)
    launch(kernel, (config.thread_blocks, -(-m // (8 * config.m_tiles))), (config.threads,), arguments, config.shared_bytes)


def product_instance(kernel, dtype, matrices, config, *gate):
    """Of qmatmul or qmatmul_grouped, for the widths that the matrices (a JoinedQMatrix or QMatrixGroup) have."""
    return _product_instance(kernel, dtype, matrices.kind == "gptq", matrices.width_blocks, config, *gate)


def _product_instance(kernel, dtype, has_zeros, width_blocks, config, *gate):
    widths = sum(1 << bits for bits in widths_present(width_blocks))
    return instance(kernel, dtype, has_zeros, widths, config.m_tiles, config.warps_n, config.warps_k, config.slots, *gate)


def _launch_dequantised(x, q, out, first_column, residual, is_ordered):
    """Column chunks of the weights, reconstructed into scratch that stays small, times x by cuBLAS."""
    k = x.shape[1]
    chunk = max(TILE, _MAX_SCRATCH_BYTES // (2 * k) // TILE * TILE)
    scratch = q.xp.empty(k * min(chunk, q.tiles.layout.padded_n), x.dtype)
    has_residual = residual is not None
    if has_residual:  # what the product is accumulated onto, in fp32
        fill_rows(q.bias, residual, out, first_column, q.n)
    for first in range(0, q.n, chunk):
        columns = min(chunk, q.n - first)
        weight = scratch[: k * columns].reshape(k, columns)
        launch_reconstruct(q, weight, first, stored_order=is_ordered)
        bias = None if q.bias is None or has_residual else q.bias[first : first + columns]
        multiply_into(out, x, weight, first_column=first_column + first, bias=bias, beta=float(has_residual))


def _instances():
    widths = [tuple(int(i == j) for j in range(6)) for i in range(6)]
    four, every = widths[3], (1,) * 6
    few = [(float16, False, counts) for counts in widths] + [(bfloat16, False, four), (float16, True, four)]
    for m, cases in (
        (1, [*few, (float16, False, every), (bfloat16, True, widths[0])]),
        (8, [(float16, False, four)]),
        (16, [(float16, True, four)]),
        (32, [(float16, False, every)]),
        (64, [(bfloat16, False, four), (float16, True, four)]),
    ):
        for dtype, has_zeros, counts in cases:
            config = pick_config(Problem(m, 128, 128, widths_present(counts), has_zeros, 132, 90))
            yield _product_instance("qmatmul", dtype, has_zeros, counts, config, "PLAIN")
    config = pick_config(Problem(1, 256, 128, (4,), False, 132, 90, 2, True))
    yield _product_instance("qmatmul", float16, False, four, config, "SILU")


INSTANCES = list(_instances())
"""Every width, all at once, and each kind of thread block; what else a model needs is compiled when it is loaded."""
