"""A linear layer, quantized or not."""

import numpy as np

from cupyq.ops.elementwise import add
from cupyq.ops.matmul import matmul
from cupyq.ops.qmatmul import InputNorm, qmatmul
from cupyq.ops.qmatrix import QMatrix


class Linear:
    """y = x @ W + bias, with W a QMatrix (which holds its own bias) or an array [N, K], as checkpoints store it.

    `lora`: the LoraWeights of the adapters loaded for this projection, or None.
    """

    def __init__(self, weight, bias=None, name="", stored_dtype=None):
        """`stored_dtype`: of an unquantized weight in its checkpoint, where that is not the weight's own."""
        self.weight, self.name, self.lora = weight, name, None
        self.is_quantized = isinstance(weight, QMatrix)
        self.n, self.k = (weight.n, weight.k) if self.is_quantized else weight.shape
        if self.is_quantized and bias is not None:
            raise ValueError(f"bias of {name or 'a Linear'}: a QMatrix holds its own, pass it to QMatrix.from_tensors")
        self.bias = weight.bias if self.is_quantized else bias
        if not self.is_quantized:
            self.stored_dtype = np.dtype(stored_dtype or weight.dtype)

    def __call__(self, x, out=None, dtype=None, adapters=None, *, before=None, residual=None, workspace=None):
        """x [..., K] -> [..., N]; of `dtype` (default: x's), or into `out`.

        adapters: a Selection, whose adapters add what they have for this projection, in fp32 before a second rounding; the
        rows of x are then the rows of its requests, in equal shares.
        residual [..., N] is added to the product; the result has its dtype, and `out` may be the residual itself.
        before: an InputNorm to be applied to x first, or, if quantized, an InputGate. workspace: that of `qmatmul`.
        """
        if isinstance(before, InputNorm) and (not self.is_quantized or self.is_changed_by(adapters)):
            x, before = before.applied(x), None
        if self.is_quantized:
            dtype = dtype if residual is None else residual.dtype
            options = dict(before=before, residual=residual, dtype=dtype)
            y = qmatmul(x, self.weight, out=out, workspace=workspace, **options)
        elif residual is None:
            y = matmul(x, self.weight, transpose=True, bias=self.bias, dtype=dtype, out=out)
        else:
            y = add(residual, matmul(x, self.weight, transpose=True, bias=self.bias), out=out)
        if self.is_changed_by(adapters):
            self.lora.add_to(y, x, adapters)
        return y

    def is_changed_by(self, adapters):
        """Whether a selected adapter has a part for this projection; adapters: a Selection or None."""
        return adapters is not None and self.lora is not None and not self.lora.adapters.isdisjoint(adapters.active)

    @property
    def kind(self):
        """exl2, gptq, or the dtype of an unquantized weight in its checkpoint."""
        return self.weight.kind if self.is_quantized else str(self.stored_dtype)

    @property
    def storage_bits(self):
        """Bits of the checkpoint this layer takes, scales and permutation included."""
        if self.is_quantized:
            return self.weight.storage_bits
        return 8 * self.stored_dtype.itemsize * (self.k * self.n + (self.n if self.bias is not None else 0))

    @property
    def bits_per_weight(self):
        return self.storage_bits / (self.k * self.n)
