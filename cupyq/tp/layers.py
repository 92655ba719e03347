"""What a rank's layers are made of besides the ordinary ones: sums over the ranks behind the parts that are split by rows.

    h + o(x)            each rank has x[part] W_part in float32, to which rank 0 adds h; the sum over the ranks is the result
    h + post(o(x))      the sum first, then the post-norm, on every rank alike

So the residual is equal on all ranks, bit for bit, as long as all_reduce gives each the same. Where an RMSNorm is the next to
read it, that one sums, in the same launch: until then the residual is each rank's own part (`leave_sums_to_norms`).
"""

from dataclasses import dataclass

import numpy as np

from cupyq._arrays import namespace
from cupyq._kernels import is_tracing
from cupyq.layers import DecoderLayer, Linear, RMSNorm
from cupyq.ops.elementwise import add
from cupyq.ops.qmatmul import InputNorm
from cupyq.tp.comm import Comm

SUMMED_ROWS = 16
"""Up to so many rows a norm is left to sum, in one launch where `tp.peer` finds that quicker. For more, products arrange the
normed rows themselves."""


def summed(comm, y):
    """y, replaced by its sum over the ranks."""
    return y if is_tracing() else comm.all_reduce(y, y)


class SummedLinear(Linear):
    """A Linear of which this rank holds some inputs. Its result is the sum over the ranks, float32.

    With a residual, which is the same on all ranks, rank 0 alone adds it. A bias, an adapter's part: wherever a rank has one.
    """

    def __init__(self, linear, comm):
        """`linear`: this rank's part."""
        own = (linear.bias, linear.stored_dtype) if not linear.is_quantized else (None, None)
        super().__init__(linear.weight, own[0], linear.name, own[1])
        self.comm = comm
        self.leaves_sum = False
        """Whether the result stays this rank's part: the norm that follows sums."""

    def __call__(self, x, out=None, dtype=None, adapters=None, *, before=None, residual=None, workspace=None):
        """As Linear's, but that the result is float32 where `out` is not given."""
        own = residual if self.comm.rank == 0 else None
        options = dict(dtype=np.float32, adapters=adapters, before=before, workspace=workspace)
        if self.is_quantized or own is None:
            y = super().__call__(x, out, residual=own, **options)
        else:
            y = add(own, super().__call__(x, **options), out=out)  # Linear would round the product to x's dtype first
        return y if self.leaves_sum else summed(self.comm, y)


class SummedMoE:
    """A MoE whose experts are split, each along its inner features: their weighted sum, then the sum over the ranks.

    Every rank has the whole router and makes the same choice of it.
    """

    def __init__(self, moe, comm):
        self.moe, self.router, self.comm = moe, moe.router, comm

    def __call__(self, x, adapters=None, *, norm=None, residual=None, workspace=None):
        """As MoE's."""
        total = summed(self.comm, self.moe(x, adapters, norm=norm, workspace=workspace))
        return total if residual is None else add(residual, total, out=residual)

    def linears(self):
        return self.moe.linears()

    def matrices(self):
        return self.moe.matrices()


class NoHeads:
    """Attention on a rank that holds no heads, where there are more ranks than heads: it has nothing to add."""

    def __init__(self, comm):
        self.comm = comm
        self.leaves_sum = False
        """As of SummedLinear."""

    def __call__(self, x, step, *, norm=None, residual=None):
        """As Attention's."""
        if isinstance(norm, SummingInputNorm):
            norm.applied(x)
        y = residual
        if y is None:
            y = namespace(x=x).zeros(x.shape, np.float32)
        elif self.comm.rank != 0:
            y.fill(0)
        return y if self.leaves_sum else summed(self.comm, y)

    def linears(self):
        return []

    def matrices(self):
        return []


@dataclass(frozen=True)
class SummingInputNorm(InputNorm):
    """An InputNorm of what is still each rank's part: x is float32, and becomes the sum over the ranks when it is applied."""

    comm: Comm

    def applied(self, x, order=None):
        return self.comm.all_reduce_norm(x, self.weight, eps=self.eps, dtype=self.dtype, order=order)


class SummingNorm:
    """An RMSNorm that sums before it norms: each call changes x, a rank's part, into the sum over the ranks."""

    def __init__(self, norm, comm):
        self.norm, self.comm = norm, comm
        self.weight, self.eps = norm.weight, norm.eps

    def __call__(self, x, dtype=None):
        """As RMSNorm's, without a residual."""
        return self.norm(summed(self.comm, x), dtype)

    def of_product(self, x, dtype):
        """As RMSNorm's; more rows are summed at once."""
        if x.size > SUMMED_ROWS * x.shape[-1]:
            return self.norm.of_product(summed(self.comm, x), dtype)
        return SummingInputNorm(self.weight, self.eps, dtype, self.comm)


def leave_sums_to_norms(layers, norm, comm):
    """Let each RMSNorm that directly follows a sum do that itself; returns the model's last norm, which is `norm` before.

    A sum is left to the next norm that reads the residual where nothing else does before: behind an o or down without a
    post-norm, in a DecoderLayer, before the pre-norm of a DecoderLayer or the model's last norm. All other sums stay.
    """
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if type(layer) is not DecoderLayer:
            continue
        if layer.attention_post_norm is None and type(layer.mlp_norm) is RMSNorm:
            layer.mlp_norm = _summing(layer.mlp_norm, _last_of(layer.attention, "o"), comm)
        if layer.mlp_post_norm is not None:
            continue
        down = _last_of(layer.mlp, "down")
        if after is None and type(norm) is RMSNorm:
            norm = _summing(norm, down, comm)
        elif type(after) is DecoderLayer and type(after.attention_norm) is RMSNorm:
            after.attention_norm = _summing(after.attention_norm, down, comm)
    return norm


def _last_of(part, name):
    """What sums at the end of attention or MLP and can leave it; None for a MoE."""
    found = part if isinstance(part, NoHeads) else getattr(part, name, None)
    return found if hasattr(found, "leaves_sum") else None


def _summing(norm, last, comm):
    """The norm in place of which `last` sums no more."""
    if last is None:
        return norm
    last.leaves_sum = True
    return SummingNorm(norm, comm)
