"""Norms with their weights, of whole rows and of single heads."""

from cupyq.ops.norm import head_norm, layer_norm, rms_norm
from cupyq.ops.qmatmul import InputNorm


class RMSNorm:
    """x * weight / sqrt(mean(x**2) + eps), over the last axis.

    weight [dim] is float32 whatever the checkpoint holds: an offset (Gemma's + 1) is added in float32, and the ops take
    any mix of dtypes.
    """

    def __init__(self, weight, eps):
        self.weight, self.eps = weight, eps

    def __call__(self, x, dtype=None, residual=None, out=None):
        """x [..., dim] -> the same shape, of `dtype` (default: x's); with a residual, the sum of the two, in its dtype."""
        return rms_norm(x, self.weight, eps=self.eps, dtype=dtype, residual=residual, out=out)

    def of_product(self, x, dtype):
        """This norm as an InputNorm, for a quantized product of x to do itself."""
        return InputNorm(self.weight, self.eps, dtype)


class LayerNorm:
    """(x - mean) * weight / sqrt(variance + eps) + bias, over the last axis; bias may be None."""

    def __init__(self, weight, bias, eps):
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x, dtype=None, residual=None, out=None):
        """As RMSNorm's."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, dtype=dtype, residual=residual, out=out)

    def of_product(self, x, dtype):
        """None: no product does it."""


class HeadNorm:
    """One of the two norms ("rms" or "layer") over each head's head_dim values, plus bias, which may be None.

    weight and bias are [head_dim], one for all heads, or [heads, head_dim].
    """

    def __init__(self, weight, bias=None, *, eps=1e-6, kind="rms"):
        self.weight, self.bias, self.eps, self.kind = weight, bias, eps, kind

    def __call__(self, x):
        """x [..., heads, head_dim], changed in place and returned."""
        return head_norm(x, self.weight, self.bias, eps=self.eps, kind=self.kind, out=x)
