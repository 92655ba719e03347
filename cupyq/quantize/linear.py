"""Quantizing the weight of one linear layer: GPTQ's recursion over groups of rows, to EXL2 or GPTQ tensors.

    t_k = w_k + sum over j < k of A[j, k] (w_j - q_j);   q_k = nearest code of t_k
    tr((W - Q)^T (H + ridge) (W - Q)) = sum over k of D_k |t_k - q_k|^2

for the rows k in the order of a `Prepared` Hessian, whose factors A and D are. A group's scales are searched on its rows t
as they stand when all groups before it are done; within it the kernel goes row by row.

Sweeps then go through all rows again, with the scales as they are:

    t_k = w_k + (sum over j != k of H[k, j] (w_j - q_j)) / (H[k, k] + ridge);   q_k = nearest code of t_k

which is the best code of a weight given all others, before and after it, so that no step raises the loss: coordinate
descent. It is the same recursion within a group, with H's upper triangle over its diagonal for A.
Source: Frantar et al., GPTQ, arXiv 2210.17323; Chee et al., QuIP, arXiv 2307.13304 (LDLQ, the recursion in this form).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyq._arrays import FLOATS, float16, float32, namespace
from cupyq.formats.exl2 import pack_exl2
from cupyq.formats.gptq import GPTQ_WIDTHS, pack_gptq
from cupyq.ops.quantize_group import quantize_group, search_scales, search_scales_gptq, search_scales_workspace_size
from cupyq.quantize.hessian import prepare_rounding, to_float32

_BLOCK = 128  # the most rows quantize_group takes
MOST_GROUP_ROWS = _BLOCK
"""Of an EXL2 layer, as the search for scales takes a group whole. Groups of GPTQ may have any number of rows."""
_EXL2_ROWS = range(32, MOST_GROUP_ROWS + 1, 32)
_COLUMNS = 32  # N is padded to a multiple of this many
_SWEEP_DAMPING = 0.003  # share of the mean diagonal of H that is added to it for sweeps
_AT_ONCE = 4096  # columns in a temporary of [K, columns]


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """What became of a weight [K, N]: the values the run time will decode, what they cost, and, when asked for, tensors."""

    error: float  # tr((W - Q)^T H (W - Q)): the squared error of all outputs of a token, averaged over tokens
    loss: float  # the same with H + ridge, which is what the recursion, before sweeps, minimised
    storage_bits: int  # as Linear.storage_bits, bias aside
    _decode: Callable[[], Any] = field(repr=False)
    _pack: Callable[[], dict[str, np.ndarray]] = field(repr=False)

    @functools.cached_property
    def values(self):
        """float32 [K, N], NumPy or CuPy as the weight, rows in the model's order. Decoded when first asked for."""
        return self._decode()

    @functools.cached_property
    def tensors(self):
        """The tensors of a checkpoint, NumPy arrays: q_weight, ... (EXL2) or qweight, ... (GPTQ), without a bias.

        N is padded to a multiple of 32 with columns whose values are 0. Packed when first asked for.
        """
        return self._pack()


def quantize_linear(weight, prepared, layout, *, sweeps=0, name=""):
    """An EXL2 matrix of `layout` near `weight` under a Hessian: a QuantizedLinear.

    weight [K, N] of y = x W, float16, bfloat16 or float32, NumPy or CuPy as prepared is; K a multiple of 32. layout: has
    `groups(k)`, the list of (bits, rows) of every group, widths falling, and `storage_bits(k, n)`. sweeps: so many times of
    coordinate descent, for which `prepared` must have kept its matrix. name: of the layer, for errors. Deterministic: same
    arrays, same library and machine, same bits. Raises TypeError / ValueError for wrong dtypes or shapes, and ValueError
    for weights that are NaN or infinite or too large for fp16.
    """
    rows = _Rows(weight, prepared, name)
    groups = layout.groups(rows.k)
    if any(count not in _EXL2_ROWS for _, count in groups) or sum(count for _, count in groups) != rows.k:
        raise ValueError(
            f"layout{_of(name)}: groups {groups[:4]}, ..., expected 32, 64, 96 or 128 rows in each and {rows.k} in all"
        )
    padded = rows.codes.shape[1]
    scale_codes, scales = rows.xp.empty((len(groups), padded), np.uint8), rows.xp.empty((len(groups), padded), float16)
    scale_maxima = rows.xp.empty(len(groups), float16)
    workspace = rows.xp.empty(search_scales_workspace_size(padded), np.uint8)
    for group, (bits, count) in enumerate(groups):
        target, weights = rows.take(count)
        outputs = {"codes": scale_codes[group], "scale_max": scale_maxima[group : group + 1], "scales16": scales[group]}
        search_scales(target, weights, bits, **outputs, workspace=workspace)
        rows.quantize(target, scales[group], bits)
    rows.sweep(sweeps)
    pack = functools.partial(_pack_exl2, rows.codes, scale_codes, scale_maxima, groups, prepared.order)
    return rows.finished(layout.storage_bits(rows.k, rows.codes.shape[1]), pack)


def _pack_exl2(codes, scale_codes, scale_maxima, groups, order):
    bits, counts = zip(*groups, strict=True)
    return pack_exl2(_host(codes), _host(scale_codes), _host(scale_maxima), bits, counts, order)


def round_linear(weight, diagonal, layout, *, damping=0.01, name=""):
    """`quantize_linear` without error feedback, for heads too large for a Hessian: every weight to its nearest code.

    diagonal: mean square of each input feature, float64 [K] (`Hessian.diagonal`), which orders the rows and weighs them in
    the search for scales. The error counts each feature by itself.
    """
    return quantize_linear(weight, prepare_rounding(diagonal, damping), layout, name=name)


def quantize_linear_gptq(weight, prepared, bits, group_size, is_symmetric, act_order, *, sweeps=0, name=""):
    """A GPTQ matrix near `weight` under a Hessian: a QuantizedLinear with tensors qweight, qzeros, scales and g_idx.

    weight and sweeps as in `quantize_linear`. bits 2, 3, 4 or 8; group_size a multiple of 32, or -1 for one group;
    is_symmetric: the zero point is 2^(bits - 1), else each group and column has its own. act_order: rows are taken in the
    order of `prepared`, which g_idx then tells; without it prepared must have been made with act_order=False. Zeros are
    stored as zero - 1 (v1), from 1 up, so that every reader takes them for the same.
    """
    if bits not in GPTQ_WIDTHS:
        raise ValueError(f"bits must be 2, 3, 4 or 8 for GPTQ, got {bits!r}")
    if group_size != -1 and (group_size < 32 or group_size % 32):
        raise ValueError(f"group_size must be a multiple of 32, or -1 for one group, got {group_size!r}")
    if not act_order and not np.array_equal(prepared.order, np.arange(prepared.k)):
        raise ValueError("act_order is False, but prepared has its rows ordered: make it with prepare(act_order=False)")
    rows = _Rows(weight, prepared, name)
    size = rows.k if group_size == -1 else group_size
    scales, zeros = [], []
    for first in range(0, rows.k, size):
        target, weights = rows.take(min(size, rows.k - first))
        group_scales, group_zeros = search_scales_gptq(target, weights, bits, is_symmetric)
        rows.quantize(target, group_scales, bits, zeros=group_zeros)
        scales.append(group_scales)
        zeros.append(group_zeros)
    rows.sweep(sweeps)
    pack = functools.partial(_pack_gptq, rows.codes, rows.xp.stack(zeros), rows.xp.stack(scales), size, prepared.order, bits)
    padded = rows.codes.shape[1]
    return rows.finished(padded * (rows.k * bits + len(scales) * (bits + 16)) + 32 * rows.k, pack)


def _pack_gptq(codes, zeros, scales, size, order, bits):
    unordered, group = np.empty(codes.shape, np.uint8), np.empty(len(order), np.int32)
    unordered[order] = _host(codes)
    group[order] = np.arange(len(order)) // size
    return pack_gptq(unordered, _host(zeros), _host(scales), group, bits)


def _decode(codes, blocks, order, n):
    """float32 [K, n] of codes [K, padded N] whose rows are in `order`; blocks: of a `_Rows`."""
    values = namespace(codes=codes).empty((len(codes), n), float32)
    for rows, scales, bits, zeros in blocks:
        zero = float32.type(1 << (bits - 1)) if zeros is None else zeros.astype(float32)
        exact = (codes[rows].astype(float32) - zero) * scales.astype(float32)
        values[order[rows]] = exact[:, :n].astype(float16).astype(float32)
    return values


def _host(array):
    return array if isinstance(array, np.ndarray) else array.get()


class _Rows:
    """A weight on its way: its rows in the order of a Hessian, of which the first `done` are quantized."""

    def __init__(self, weight, prepared, name):
        self.xp = namespace(weight=weight, prepared=prepared.weights)
        _check_weight(weight, prepared.k, name)
        self.prepared, self.name = prepared, name
        self.k, self.n = weight.shape
        self.done = 0
        xp, padded = self.xp, -(-self.n // _COLUMNS) * _COLUMNS
        self.order = xp.asarray(prepared.order)
        self.original = xp.ascontiguousarray(to_float32(weight)[self.order])
        if padded > self.n:
            self.original = xp.pad(self.original, ((0, 0), (0, padded - self.n)))
        self.error = xp.empty_like(self.original)  # W - Q of the rows that are done
        self.codes = xp.empty(self.original.shape, np.uint8)
        self.losses = []  # float32 [padded N] of each block
        self.blocks = []  # (slice, scales, bits, zeros) of each block
        self.is_swept = False

    def take(self, count):
        """(t of the next `count` rows given all that are done, their D)."""
        last = self.done + count
        return self._target(last), self.prepared.weights[self.done : last]

    def _target(self, last):
        original = self.original[self.done : last]
        if self.done == 0 or self.prepared.factor is None:
            return original
        with np.errstate(over="ignore", invalid="ignore"):  # `finished` refuses what overflows
            return original + self.prepared.factor[: self.done, self.done : last].T @ self.error[: self.done]

    def quantize(self, target, scales, bits, zeros=None):
        """The rows whose t `take` gave: codes and errors; scales float16 [N], zeros uint8 [N] or None: 2^(bits - 1)."""
        first, end = self.done, self.done + len(target)
        for start in range(first, end, _BLOCK):
            last = min(start + _BLOCK, end)
            if start > first:
                target = self._target(last)
            block = slice(start, last)
            self.blocks.append((block, scales, bits, zeros))
            factor, weights = self._factor(block), self.prepared.weights[block]
            self.losses.append(self._round(self.blocks[-1], target[: last - start], factor, weights))
            self.done = last

    def _round(self, block, target, factor, weights):
        """Codes and errors of a block -> float32 [padded N], their loss."""
        rows, scales, bits, zeros = block
        outputs = {"codes": self.codes[rows], "error": self.error[rows]}
        return quantize_group(target, self.original[rows], factor, weights, scales, bits, zeros=zeros, **outputs)[2]

    def sweep(self, count):
        """`count` times over all rows, once every row is quantized, with the scales they have."""
        if count == 0:
            return
        xp, matrix = self.xp, self.prepared.matrix
        if matrix is None:
            raise ValueError(
                f"prepared{_of(self.name)} has no matrix, which sweeps take: make it with prepare(keeps_matrix=True)"
            )
        self._loss()  # of what cannot be quantized, nothing could be computed
        diagonal = matrix.diagonal().copy()
        diagonal += float32.type(_SWEEP_DAMPING) * diagonal.mean()
        diagonal[diagonal == 0] = 1
        for _ in range(count):
            for block in self.blocks:
                rows = block[0]
                own, weights = matrix[rows, rows], diagonal[rows]
                # What earlier rows of the block add is of this sweep: the recursion brings it.
                target = matrix[rows] @ self.error - xp.tril(own) @ self.error[rows]
                target /= weights[:, None]
                target += self.original[rows]
                self._round(block, target, xp.triu(own, 1) / weights, weights)
        self.is_swept = True

    def _factor(self, block):
        if self.prepared.factor is None:
            return self.xp.zeros((block.stop - block.start,) * 2, float32)
        return self.xp.ascontiguousarray(self.prepared.factor[block, block])

    def finished(self, storage_bits, pack):
        """The result, once every row is quantized."""
        loss, ridge_loss = self._loss(), self._ridge_loss()
        if self.is_swept:
            loss = self._finite(self._swept_error() + ridge_loss)
        decode = functools.partial(_decode, self.codes, self.blocks, self.order, self.n)  # which keeps no more than these
        return QuantizedLinear(max(0.0, loss - ridge_loss), loss, storage_bits, decode, pack)

    def _loss(self):
        """What the recursion minimised, before sweeps."""
        return self._finite(float(self.xp.stack(self.losses).sum(dtype=np.float64)))

    def _finite(self, loss):
        """A loss; where values overflow it is not finite, which is refused."""
        if not np.isfinite(loss):
            raise ValueError(f"weight{_of(self.name)}: too large for fp16 (65504 at most); this layer cannot be quantized")
        return loss

    def _swept_error(self):
        """tr(E^T H E)."""
        total = 0.0
        for first in range(0, self.error.shape[1], _AT_ONCE):
            part = self.error[:, first : first + _AT_ONCE]
            total += float(((self.prepared.matrix @ part) * part).sum(dtype=np.float64))
        return total

    def _ridge_loss(self):
        """What the ridge adds to the loss."""
        total = 0.0
        for first in range(0, self.k, 1024):  # bounds the temporary
            block = slice(first, first + 1024)
            total += self.prepared.ridge[block] @ self.xp.square(self.error[block]).sum(axis=1, dtype=np.float64)
        return float(total)


def _check_weight(weight, k, name):
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight{_of(name)}: dtype {weight.dtype}, expected float16, bfloat16 or float32")
    if weight.ndim != 2 or weight.shape[0] != k or weight.shape[1] == 0:
        raise ValueError(f"weight{_of(name)}: shape {weight.shape}, expected [{k}, N], the features of the Hessian")
    if k % 32 or k == 0:
        raise ValueError(f"weight{_of(name)}: {k} rows, expected a multiple of 32, as codes are packed 32 rows at a time")
    finite = namespace(weight=weight).isfinite(to_float32(weight))
    if not bool(finite.all()):
        row, column = divmod(int(finite.argmin()), weight.shape[1])
        raise ValueError(
            f"weight{_of(name)}: {float(to_float32(weight)[row, column])} at input {row}, output {column}; "
            "repair or download the model again"
        )


def _of(name):
    return f" of {name}" if name else ""
