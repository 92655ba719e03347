"""RMSNorm with its weight."""

from cupyq.ops.norm import rms_norm


class RMSNorm:
    """x * weight / sqrt(mean(x**2) + eps), over the last axis.

    weight [dim] is float32 whatever the checkpoint holds: an offset (Gemma's + 1) is added in float32, and the ops take
    any mix of dtypes.
    """

    def __init__(self, weight, eps):
        self.weight, self.eps = weight, eps

    def __call__(self, x, dtype=None):
        """x [..., dim] -> the same shape, of `dtype` (default: x's)."""
        return rms_norm(x, self.weight, eps=self.eps, dtype=dtype)
