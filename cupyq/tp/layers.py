"""What a rank's layers are made of besides the ordinary ones: sums over the ranks behind the parts that are split by rows.

    h + o(x)            each rank has x[part] W_part in float32, to which rank 0 adds h; the sum over the ranks is the result
    h + post(o(x))      the sum first, then the post-norm, on every rank alike

So the residual is equal on all ranks, bit for bit, as long as all_reduce gives each the same.
"""

import numpy as np

from cupyq._arrays import namespace
from cupyq._kernels import is_tracing
from cupyq.layers import Linear
from cupyq.ops.elementwise import add


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

    def __call__(self, x, out=None, dtype=None, adapters=None, *, before=None, residual=None, workspace=None):
        """As Linear's, but that the result is float32 where `out` is not given."""
        own = residual if self.comm.rank == 0 else None
        options = dict(dtype=np.float32, adapters=adapters, before=before, workspace=workspace)
        if self.is_quantized or own is None:
            y = super().__call__(x, out, residual=own, **options)
        else:
            y = add(own, super().__call__(x, **options), out=out)  # Linear would round the product to x's dtype first
        return summed(self.comm, y)


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

    def __call__(self, x, step, *, norm=None, residual=None):
        """As Attention's."""
        y = residual
        if y is None:
            y = namespace(x=x).zeros(x.shape, np.float32)
        elif self.comm.rank != 0:
            y.fill(0)
        return summed(self.comm, y)

    def linears(self):
        return []

    def matrices(self):
        return []
