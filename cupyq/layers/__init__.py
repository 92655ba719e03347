"""Plain objects over ops: the parts a decoder is made of. The same classes run on NumPy and on CuPy."""

from cupyq.layers.attention import Attention, Step
from cupyq.layers.cache import KVCache
from cupyq.layers.decoder import DecoderLayer
from cupyq.layers.linear import Linear
from cupyq.layers.mlp import MLP
from cupyq.layers.moe import MoE
from cupyq.layers.norm import RMSNorm
from cupyq.ops.qmatrix import QMatrix

__all__ = ["MLP", "Attention", "DecoderLayer", "KVCache", "Linear", "MoE", "QMatrix", "RMSNorm", "Step"]
