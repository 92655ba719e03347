"""The Hessian of a linear layer's output error, gathered from calibration tokens, and the factors that GPTQ works with.

    H = mean over tokens of w x x^T, float64 [K, K]     the mean squared error of y = x W is tr((W - Q)^T H (W - Q))
    H + ridge = (I + A) diag(D) (I + A)^T               A strictly upper triangular, rows by falling mean square

with w the weight of a token, 1 unless told.

Row r of A's column k says how much of feature k's rounding error feature r can take on. No inverse of H is needed: A and
D come from the Cholesky factor of H with its rows and columns reversed.

A layer of the quantized model reads inputs, and may add its outputs to a residual, that have errors already. Some of that
can be made up for by the weight to be quantized:

    W' = W + s (H + ridge)^-1 (C W + R / 2)     s = max(0, 1 - K / tokens)
    C = mean of w x (original x - x)^T          R = mean of w x gap^T, gap the original residual less the quantized model's

Source: Frantar et al., GPTQ, arXiv 2210.17323 (Hessian, order, damping); Chee et al., QuIP, arXiv 2307.13304 (this
factorisation); Li et al., GPTAQ, arXiv 2504.02692 (the error against the unquantized model's inputs). Half of R, and s: own
measurements. K numbers for each output are fitted to the tokens, and with few tokens they would mostly fit chance; s is the
share of what they explain that K numbers without meaning would not, as in the adjusted R squared of a regression.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, float32, namespace
from cupyq.ops.matmul import matmul

_BATCH = 2048  # tokens whose products are summed in float32
_TRIES = 6
_LEAST_RETRY = 1e-6  # damping of the first retry after a try without any
_LEAST_LEFT = 1e-8  # of a feature's mean square, after those before it in the factorisation explained it
_SOLVED_ROWS = 128  # of a triangular system at a time
_GAP_SHARE = 0.5  # of the residual's gap, that a layer is to close


@dataclass(frozen=True, eq=False)
class Prepared:
    """A Hessian, damped, ordered and factored. Arrays are of NumPy or CuPy, as the Hessian's; rows are in `order`."""

    order: np.ndarray  # int64 [K], always NumPy: row r stands for feature order[r]
    factor: Any  # A, float32 [K, K]; None: zero, for plain rounding
    weights: Any  # D, float32 [K], above 0
    ridge: Any  # float64 [K]: what was added to the diagonal of H
    damping: float  # share of the mean diagonal that was added, after retries
    cross: Any = None  # C, float32 [K, K], features in the model's order
    gap: Any = None  # R, float32 [K, N], features in the model's order
    share: float = 0.0  # s
    matrix: Any = None  # H, float32 [K, K] in `order`, if `Hessian.prepare` was told to keep it

    @property
    def k(self):
        return len(self.order)

    def corrected(self, weight):
        """The weight to quantize instead of `weight` [K, N] so that outputs come near those of the original inputs.

        W' = W + s (H + ridge)^-1 (C W + R / 2); with s = 1 the minimum of
        mean of w |x W' - original W - gap / 2|^2 + ridge |W' - W|^2, without R where no gap was given. float32 [K, N],
        features in the model's order, as `weight`'s. A Hessian whose inputs came without `original`, or are no more than
        it has features, gives the weight itself.
        ValueError for another N than the gap's.
        """
        xp = namespace(weight=weight, prepared=self.weights)
        weight = xp.ascontiguousarray(to_float32(weight))
        if self.gap is not None and self.gap.shape != weight.shape:
            raise ValueError(f"weight: shape {weight.shape}, expected {self.gap.shape}, the features of x and of gap")
        if self.cross is None or not self.share:
            return weight
        shift = self.cross @ weight
        if self.gap is not None:
            shift += float32.type(_GAP_SHARE) * self.gap
        order = xp.asarray(self.order)
        rows = _solve_upper(self.factor, shift[order]) / self.weights[:, None]
        shift[order] = _solve_lower(self.factor, rows)
        return weight + float32.type(self.share) * shift


class Hessian:
    """Sums w x x^T over the inputs of a linear layer, or of several layers that share them.

    k: features of an input; xp: numpy or cupy, the module of the inputs; name: of the layer, for errors. `tokens` counts
    the rows seen, `total` adds up their weights. `sum` is float64 [k, k]; `cross`, the sum of w x (original - x)^T, and
    `gap`, that of w x gap^T, are None until originals and gaps come.
    """

    def __init__(self, k, xp=np, *, name=""):
        self.k, self.xp, self.name, self.tokens, self.total = int(k), xp, name, 0, 0.0
        self.sum = xp.zeros((self.k, self.k), np.float64)
        self.cross = self.gap = None
        self._given = None

    def add(self, x, original=None, *, weights=None, gap=None):
        """Take in x [..., k], float16, bfloat16 or float32: what the layer is fed. Every row counts as a token.

        original, of the same shape: what the unquantized model feeds this layer at the same tokens, for
        `Prepared.corrected`. gap float32 [..., N], with originals only: the unquantized model's residual less that which this
        layer's outputs are to be added to. weights float32 [...]: what a token counts, not negative; without: 1. Give each of
        these with every x or with none. Products are float32, sums over batches float64. TypeError / ValueError for wrong
        arrays, dtypes or shapes.
        """
        rows = self._rows(x, "x")
        given = (original is not None, weights is not None, gap is not None)
        if self.tokens and given != self._given:
            raise ValueError(f"original, weights, gap{self._of()}: pass each with every call of add or with none")
        if gap is not None and original is None:
            raise ValueError(f"gap{self._of()}: pass original too")
        self._given = given
        originals = None if original is None else self._beside(self._rows(original, "original"), rows, "original")
        roots = None if weights is None else self._roots(weights, rows)
        if gap is not None:
            self._check(gap, "gap")
            gap = self._beside(to_float32(gap).reshape(-1, gap.shape[-1]), rows, "gap")
        self._make_sums(gap, originals)
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            self._add_batch(*(None if array is None else array[part] for array in (rows, originals, roots, gap)))
        self.tokens += len(rows)
        self.total += len(rows) if roots is None else float((roots.astype(np.float64) ** 2).sum())

    def _make_sums(self, gap, originals):
        if originals is not None and self.cross is None:
            self.cross = self.xp.zeros_like(self.sum)
        if gap is not None:
            if self.gap is None:
                self.gap = self.xp.zeros((self.k, gap.shape[1]), np.float64)
            elif self.gap.shape[1] != gap.shape[1]:
                raise ValueError(f"gap{self._of()}: {gap.shape[1]} features, expected {self.gap.shape[1]} as before")

    def _add_batch(self, x, originals, roots, gap):
        """roots: of the weights, so that a product of two arrays that were multiplied by them has the weights, and H is exactly
        symmetric."""
        if roots is None:
            self.sum += _squared(self.xp, x)
            if originals is None:
                return
        plain = to_float32(x)
        scaled = plain if roots is None else plain * roots[:, None]
        if roots is not None:
            self.sum += scaled.T @ scaled
        if originals is not None:
            # Of the difference, as x (original)^T and H are nearly the same and their difference is what counts.
            off = to_float32(originals) - plain
            self.cross += scaled.T @ (off if roots is None else off * roots[:, None])
        if gap is not None:
            self.gap += scaled.T @ (gap if roots is None else gap * roots[:, None])

    def _roots(self, weights, rows):
        """Of the weights, float32 [tokens]."""
        self._check(weights, "weights")
        if weights.dtype != float32:
            raise TypeError(f"weights{self._of()}: dtype {weights.dtype}, expected float32")
        return self.xp.sqrt(self._beside(weights.reshape(-1), rows, "weights"))

    def _beside(self, found, rows, argument):
        if len(found) != len(rows):
            raise ValueError(f"{argument}{self._of()}: {len(found)} tokens, expected {len(rows)} as in x")
        return found

    def _check(self, array, argument):
        if namespace(**{argument: array}) is not self.xp:
            raise TypeError(f"{argument}{self._of()}: {type(array).__module__} array, expected one of {self.xp.__name__}")
        if array.dtype not in FLOATS:
            raise TypeError(f"{argument}{self._of()}: dtype {array.dtype}, expected float16, bfloat16 or float32")

    def _rows(self, x, argument):
        self._check(x, argument)
        if x.ndim == 0 or x.shape[-1] != self.k:
            raise ValueError(f"{argument}{self._of()}: shape {x.shape}, expected {self.k} features in the last dimension")
        return x.reshape(-1, self.k)

    def _of(self):
        return f" of {self.name}" if self.name else ""

    @property
    def diagonal(self):
        """Mean square of each feature, float64 [k]; zeros if there were no tokens."""
        return self.sum.diagonal() / self._count

    @property
    def _count(self):
        """What sums are divided by."""
        return self.total if self.total > 0 else 1.0

    def prepare(self, damping=0.01, *, act_order=True, keeps_matrix=False):
        """H's factors after damping * mean(diag H) is added to its diagonal.

        A feature whose diagonal is 0 even then (no damping, or no tokens at all) gets 1. act_order: features by falling
        diagonal, ties by number; False: in the model's order. keeps_matrix: with H itself, which sweeps over a quantized
        weight take. Where H cannot be factored, ten times the damping is tried, at most 6 times in all. Float64 throughout;
        the factors are rounded to float32. ValueError names the layer and the feature that was NaN or infinite, or says
        that no damping helped.
        """
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping must be a number of at least 0, got {damping!r}")
        diagonal = self._finite_diagonal()
        order = _falling(diagonal) if act_order else np.arange(self.k)
        backward = self.xp.asarray(order[::-1].copy())
        matrix = self.sum[backward[:, None], backward]
        matrix /= self._count
        kept = self.xp.ascontiguousarray(matrix[::-1, ::-1].astype(float32)) if keeps_matrix else None
        for _ in range(_TRIES):
            ridge = _ridge(diagonal, damping)[order]
            lower = _cholesky(self.xp, matrix, self.xp.asarray((diagonal[order] + ridge)[::-1]))
            if lower is not None:
                break
            damping = max(damping * 10, _LEAST_RETRY)
        else:
            raise ValueError(
                f"Hessian{self._of()}: not positive definite even with damping {damping / 10:g}; calibrate with other text"
            )
        del matrix
        upper = lower[::-1, ::-1]
        scale = upper.diagonal().copy()
        upper /= scale
        factor = self.xp.ascontiguousarray(upper.astype(float32))
        self.xp.fill_diagonal(factor, 0)
        return Prepared(
            order=order,
            factor=factor,
            weights=(scale * scale).astype(float32),
            ridge=self.xp.asarray(ridge),
            damping=float(damping),
            share=max(0.0, 1 - self.k / max(self.tokens, 1)),
            cross=self._mean(self.cross),
            gap=self._mean(self.gap),
            matrix=kept,
        )

    def _mean(self, total):
        return None if total is None else (total / self._count).astype(float32)

    def _finite_diagonal(self):
        """On the host. An entry of H can only be NaN or infinite where the diagonal is."""
        diagonal = self.diagonal if self.xp is np else self.diagonal.get()
        if not np.isfinite(diagonal).all():
            feature = int(np.argmin(np.isfinite(diagonal)))
            raise ValueError(
                f"inputs{self._of()}: feature {feature} is NaN or infinite for some token; the model's activations overflow"
            )
        return diagonal


def prepare_rounding(diagonal, damping=0.01):
    """A Prepared for plain rounding: features by falling diagonal (NumPy or CuPy, float64 [K], `Hessian.diagonal`), A = 0."""
    xp = namespace(diagonal=diagonal)
    host = diagonal if xp is np else diagonal.get()
    order = _falling(host)
    ridge = _ridge(host, damping)
    weights = xp.asarray((host + ridge)[order].astype(float32))
    return Prepared(order, None, weights, xp.asarray(ridge[order]), float(damping))


def to_float32(x):
    """x as float32, itself if it is. CuPy has no conversions of bfloat16: its bits are a float32's upper half."""
    if x.dtype == float32:
        return x
    if x.dtype == bfloat16:
        return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(float32)


def _squared(xp, x):
    """x^T x, float32. On a GPU tensor cores multiply 16-bit numbers, whose products fp32 holds exactly."""
    if xp is np or x.dtype == float32:
        x = to_float32(x)
        return x.T @ x
    bits = xp.ascontiguousarray(x.view(np.uint16))
    transposed = xp.ascontiguousarray(bits.T)
    return matmul(transposed.view(x.dtype), bits.view(x.dtype), dtype=float32)


def _falling(diagonal):
    return np.argsort(-diagonal, kind="stable")


def _ridge(diagonal, damping):
    """What is added to each entry of the diagonal."""
    ridge = np.full(len(diagonal), damping * diagonal.mean() if len(diagonal) else 0.0)
    ridge[diagonal + ridge == 0] = 1
    return ridge


def _cholesky(xp, matrix, diagonal):
    """The lower Cholesky factor of `matrix` with that diagonal, which is left in it; None where it has none that counts.

    CuPy does not report failures unless told so globally: the factor must give back the diagonal. Where next to nothing is
    left of a feature, what is left is rounding error of the products.
    """
    every = xp.arange(len(diagonal))
    matrix[every, every] = diagonal
    try:
        lower = xp.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    found, left = xp.einsum("ij,ij->i", lower, lower), lower.diagonal()
    is_factor = (left > 0) & (left * left > _LEAST_LEFT * diagonal) & (abs(found - diagonal) <= 1e-6 * diagonal)
    return lower if bool(is_factor.all()) else None


def _solve_upper(factor, right):
    """Z of (I + A) Z = right, A strictly upper triangular [K, K], right [K, N]: blocks of rows from the last up."""
    xp, k = namespace(right=right), len(right)
    solved = xp.empty_like(right)
    for first in reversed(range(0, k, _SOLVED_ROWS)):
        last = min(first + _SOLVED_ROWS, k)
        rest = right[first:last]
        if last < k:
            rest = rest - factor[first:last, last:] @ solved[last:]
        solved[first:last] = xp.linalg.solve(_unit(xp, factor[first:last, first:last]), rest)
    return solved


def _solve_lower(factor, right):
    """Z of (I + A)^T Z = right: blocks of rows from the first down."""
    xp, k = namespace(right=right), len(right)
    solved = xp.empty_like(right)
    for first in range(0, k, _SOLVED_ROWS):
        last = min(first + _SOLVED_ROWS, k)
        rest = right[first:last]
        if first:
            rest = rest - factor[:first, first:last].T @ solved[:first]
        solved[first:last] = xp.linalg.solve(_unit(xp, factor[first:last, first:last]).T, rest)
    return solved


def _unit(xp, block):
    return block + xp.eye(len(block), dtype=block.dtype)
