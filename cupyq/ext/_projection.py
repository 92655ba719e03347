"""What the attention and the MLP blocks share: norms, projections with LoRA adapters, and the residual."""

import numpy as np

from cupyq import ops
from cupyq._arrays import check, float16, float32, namespace
from cupyq.ext._arrays import is_array, settle
from cupyq.ext._handles import handles
from cupyq.layers import LayerNorm, RMSNorm


class Projection:
    """y = x W (+ bias) of the matrix behind a handle, plus the adapters registered for it."""

    def __init__(self, handle, name):
        self.matrix = handles.get(handle, "q_matrix", name).matrix
        self.k, self.n, self.xp = self.matrix.k, self.matrix.n, self.matrix.xp
        self.loras = {}  # id -> (a [k, rank], b [rank, n], rank_adapter, weights), as ops.lora takes them

    def __call__(self, x, loras, *, out=None, dtype=None):
        """x float16 [rows, k] -> [rows, n]; `loras`: ids, of which those not registered here add nothing."""
        y = ops.qmatmul(x, self.matrix, out=out, dtype=dtype)
        for key in loras:
            if key in self.loras:
                ops.lora(y, x, *self.loras[key])
        return y


def check_loras(loras):
    """The argument `loras` of a forward function: a list of ids."""
    if not isinstance(loras, (list, tuple)) or not all(type(key) is int for key in loras):
        raise TypeError(f"loras must be a list of the ids given to set_loras, got {type(loras).__name__}")
    return loras


def set_loras(registrations):
    """Replace the adapters of projections by those of [(projection or None, name, {id: a}, {id: b})].

    All are checked before any is replaced. Returns the largest rank. a float16 [k, rank], b float16 [rank, n]: one for
    each id in both or neither.
    """
    found, largest = [], 0
    for projection, name, a, b in registrations:
        for side, tensors in (("a", a), ("b", b)):
            if not isinstance(tensors, dict):
                raise TypeError(f"{name}_{side} must be a dict from ids to tensors, got {type(tensors).__name__}")
            if tensors and projection is None:
                raise ValueError(f"{name}_{side} has adapters for a projection that this block does not have")
        if a.keys() != b.keys():
            raise ValueError(
                f"{name}_a and {name}_b must have the same ids, these are in one alone: {sorted(a.keys() ^ b.keys())}"
            )
        pairs = {key: _lora_arguments(projection, name, key, a[key], b[key]) for key in a}
        largest = max([largest, *(pair[0].shape[1] for pair in pairs.values())])
        found.append((projection, pairs))
    for projection, pairs in found:
        if projection is not None:
            projection.loras = pairs
            if pairs:
                settle(projection.xp)
    return largest


def _lora_arguments(projection, name, key, a, b):
    for side, tensor in (("a", a), ("b", b)):
        if type(key) is not int or not is_array(tensor):
            raise TypeError(f"{name}_{side} must map int ids to tensors, got {type(key).__name__} to {type(tensor).__name__}")
    namespace(**{name: projection.matrix, f"{name}_a[{key}]": a, f"{name}_b[{key}]": b})
    check(a, f"{name}_a[{key}]", dtype=float16, shape=(projection.k, None))
    check(b, f"{name}_b[{key}]", dtype=float16, shape=(a.shape[1], projection.n))
    xp = projection.xp
    return a, b, xp.zeros(a.shape[1], np.int32), xp.asarray(np.ones((1, 1), np.float32))


def make_norm(weight, bias, is_rms, eps, *, dim, name):
    """RMSNorm or LayerNorm over `dim` values with these weights, which are kept, not copied; None without a weight."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"{name}_bias is given, but {name} is absent")
        return None
    check(weight, name, dtype=float16, shape=(dim,))
    if is_rms:
        if bias is not None:
            raise ValueError(f"{name}_bias must be absent: an RMS norm has no bias")
        return RMSNorm(weight, eps)
    if bias is not None:
        check(bias, f"{name}_bias", dtype=float16, shape=(dim,))
    return LayerNorm(weight, bias, eps)


class Residual:
    """x = (x +) y, or x += norm(y) where there is a post-norm; x float16, or float32 in models that keep it so."""

    def __init__(self, has_residual, post_norm, is_float32):
        self.has_residual, self.post_norm = bool(has_residual), post_norm
        self.dtype = float32 if is_float32 else float16

    def check(self, x, dim):
        """x as [rows, dim], after its checks."""
        check(x, "x", dtype=self.dtype, last=dim)
        return x.reshape(-1, dim)

    def normed(self, x, norm):
        """What the projections read: float16, of norm(x) or of x itself."""
        if norm is not None:
            return norm(x, dtype=float16)
        with np.errstate(over="ignore"):  # beyond fp16 is Inf, as in every op
            return x.astype(float16, copy=False)

    def add(self, x, inner, projection, loras):
        """Write the block's result into x [rows, dim]; its last projection is summed in fp32 and rounded with x once.

        The adapters are part of what a post-norm sees. (exllamav2 adds theirs behind it.)
        """
        if self.post_norm is None and not self.has_residual:
            projection(inner, loras, out=x)
            return
        y = projection(inner, loras, dtype=float32)
        if self.post_norm is None:
            ops.add(x, y, out=x)
        else:
            self.post_norm(y, residual=x, out=x)
