"""Every op, as a function of arrays: NumPy runs the reference, CuPy (or any DLPack array on a GPU) the kernel.

The names below shadow the modules that hold them: `cupyq.ops.attention` is the op; its module is imported by
`from cupyq.ops.attention import ...` as usual.
"""

from cupyq.ops.activation import gelu, gelu_mul, silu_mul, softcap
from cupyq.ops.attention import attention, attention_workspace_size
from cupyq.ops.elementwise import add, add_weighted
from cupyq.ops.embedding import embedding
from cupyq.ops.kv_append import kv_append
from cupyq.ops.matmul import matmul
from cupyq.ops.norm import head_norm, layer_norm, rms_norm
from cupyq.ops.qmatmul import qmatmul, qmatmul_workspace_size, reconstruct
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.rope import rope, rope_tables
from cupyq.ops.routing import route
from cupyq.ops.sampling import sample

__all__ = [
    "QMatrix",
    "add",
    "add_weighted",
    "attention",
    "attention_workspace_size",
    "embedding",
    "gelu",
    "gelu_mul",
    "head_norm",
    "kv_append",
    "layer_norm",
    "matmul",
    "qmatmul",
    "qmatmul_workspace_size",
    "reconstruct",
    "rms_norm",
    "rope",
    "rope_tables",
    "route",
    "sample",
    "silu_mul",
    "softcap",
]
