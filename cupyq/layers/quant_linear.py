"""LoRAX's quantized linear layer, by its constructor: GPTQ tensors of 2, 3, 4 or 8 bits."""

from cupyq.ops.qmatmul import qmatmul
from cupyq.ops.qmatrix import QMatrix


class QuantLinear:
    """y = x W + bias, as LoRAX's `QuantLinear(qweight, qzeros, scales, g_idx, bias, bits, groupsize)`.

    qweight int32 [k * bits / 32, n], qzeros int32 [groups, n * bits / 32], scales [groups, n], g_idx int32 [k] or None
    (all zero counts as None), bias [n] or None; bits 2, 3, 4 or 8; groupsize -1 for one group. Zero points are stored as
    zero - 1 and wrap to 0 at 2**bits, as LoRAX's kernels read them. NumPy arrays give a layer on NumPy; CuPy arrays, or
    PyTorch and JAX ones by DLPack, a layer on their GPU, repacked there at once: the caller's tensors are never altered
    and may be freed. g_idx may stay on the CPU. There is no scratch to size: `set_device` and `create_exllama_buffers`
    are accepted and do nothing. Raises FormatError for tensors that do not fit each other, bits or groupsize.
    Source: LoRAX, server layers/gptq/exllamav2.py.
    """

    def __init__(self, qweight, qzeros, scales, g_idx, bias, bits, groupsize):
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx, "bias": bias}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.matrix = QMatrix.from_tensors(tensors, bits=bits, group_size=groupsize, zeros="v1-wrapped", name="QuantLinear")
        self.bits, self.groupsize = bits, groupsize
        self.infeatures, self.outfeatures = self.matrix.shape

    def __call__(self, x, force_cuda=False, out=None):
        """x [..., infeatures] -> [..., outfeatures], in x's framework; see `cupyq.ops.qmatmul`.

        `force_cuda`, which asks exllamav2 for its fused kernel at any number of rows, is accepted and has no effect.
        """
        return qmatmul(x, self.matrix, out=out)

    forward = __call__


def set_device(device):
    """Accepted for LoRAX's sake: a layer lives where its tensors were."""


def create_exllama_buffers(max_total_tokens=None):
    """Accepted for LoRAX's sake: layers share no scratch, and are ready once made."""
