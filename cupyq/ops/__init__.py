"""Every op, as a function of arrays: NumPy runs the reference, CuPy (or any DLPack array on a GPU) the kernel.

The names below shadow the modules that hold them: `cupyq.ops.attention` is the op; its module is imported by
`from cupyq.ops.attention import ...` as usual.
"""

from cupyq.ops.activation import clamp, gelu, gelu_mul, relu, relu_mul, silu, silu_mul, softcap
from cupyq.ops.advance import advance
from cupyq.ops.attention import attention, attention_workspace_size
from cupyq.ops.cache_pages import cache_rotate, count_match
from cupyq.ops.elementwise import add, add_weighted
from cupyq.ops.embedding import embedding
from cupyq.ops.hadamard import hadamard, hadamard_matrix, paley_1, paley_2
from cupyq.ops.kv_append import kv_append
from cupyq.ops.kv_codec import (
    CacheCodes,
    decode_blocks,
    encode_blocks,
    kv_decode,
    kv_decode_paged,
    kv_encode,
    kv_encode_paged,
)
from cupyq.ops.lora import lora, lora_workspace_size
from cupyq.ops.matmul import gemm, matmul
from cupyq.ops.norm import head_norm, layer_norm, rms_norm
from cupyq.ops.penalties import PenaltyTable, penalize, penalize_workspace_size
from cupyq.ops.qkv_append import qkv_append
from cupyq.ops.qmatmul import InputGate, InputNorm, qmatmul, qmatmul_gated, qmatmul_workspace_size
from cupyq.ops.qmatmul_grouped import qmatmul_grouped, qmatmul_grouped_workspace_size
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.qmatrix_group import QMatrixGroup
from cupyq.ops.qmatrix_join import JoinedQMatrix
from cupyq.ops.quantize_group import (
    quantize_group,
    search_scales,
    search_scales_gptq,
    search_scales_workspace_size,
)
from cupyq.ops.quantizing import (
    pack_columns,
    pack_rows_4,
    quantize,
    quantize_err,
    quantize_range,
    quantize_range_inplace,
)
from cupyq.ops.reconstruct import reconstruct
from cupyq.ops.remap import remap_columns, remap_nibbles
from cupyq.ops.rope import mrope_positions, rope, rope_tables
from cupyq.ops.routing import combine_rows, group_rows, route
from cupyq.ops.sampling import SamplerTable, sample, sample_workspace_size

__all__ = [
    "CacheCodes",
    "InputGate",
    "InputNorm",
    "JoinedQMatrix",
    "PenaltyTable",
    "QMatrix",
    "QMatrixGroup",
    "SamplerTable",
    "add",
    "add_weighted",
    "advance",
    "attention",
    "attention_workspace_size",
    "cache_rotate",
    "clamp",
    "combine_rows",
    "count_match",
    "decode_blocks",
    "embedding",
    "encode_blocks",
    "gelu",
    "gelu_mul",
    "gemm",
    "group_rows",
    "hadamard",
    "hadamard_matrix",
    "head_norm",
    "kv_append",
    "kv_decode",
    "kv_decode_paged",
    "kv_encode",
    "kv_encode_paged",
    "layer_norm",
    "lora",
    "lora_workspace_size",
    "matmul",
    "mrope_positions",
    "pack_columns",
    "pack_rows_4",
    "paley_1",
    "paley_2",
    "penalize",
    "penalize_workspace_size",
    "qkv_append",
    "qmatmul",
    "qmatmul_gated",
    "qmatmul_grouped",
    "qmatmul_grouped_workspace_size",
    "qmatmul_workspace_size",
    "quantize",
    "quantize_err",
    "quantize_group",
    "quantize_range",
    "quantize_range_inplace",
    "reconstruct",
    "relu",
    "relu_mul",
    "remap_columns",
    "remap_nibbles",
    "rms_norm",
    "rope",
    "rope_tables",
    "route",
    "sample",
    "sample_workspace_size",
    "search_scales",
    "search_scales_gptq",
    "search_scales_workspace_size",
    "silu",
    "silu_mul",
    "softcap",
]
