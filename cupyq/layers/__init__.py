"""Plain objects over ops: the parts a decoder is made of. The same classes run on NumPy and on CuPy."""

from cupyq.layers.attention import Attention, Step
from cupyq.layers.cache import CACHE_KINDS, KVCache, PagedKVCache
from cupyq.layers.decoder import DecoderLayer, ParallelDecoderLayer
from cupyq.layers.linear import Linear
from cupyq.layers.lora import Adapter, LoraWeights, Selection
from cupyq.layers.mlp import MLP
from cupyq.layers.moe import MoE
from cupyq.layers.norm import HeadNorm, LayerNorm, RMSNorm
from cupyq.layers.quant_linear import QuantLinear
from cupyq.ops.qmatrix import QMatrix

__all__ = [
    "CACHE_KINDS",
    "MLP",
    "Adapter",
    "Attention",
    "DecoderLayer",
    "HeadNorm",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LoraWeights",
    "MoE",
    "PagedKVCache",
    "ParallelDecoderLayer",
    "QMatrix",
    "QuantLinear",
    "RMSNorm",
    "Selection",
    "Step",
]
