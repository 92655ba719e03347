"""Layers by their formulas: small ones of every kind, and the same in float64, written out."""

import math

import numpy as np

from cupyq.layers import MLP, Attention, HeadNorm, KVCache, LayerNorm, Linear, ParallelDecoderLayer, RMSNorm, Step
from cupyq.ops.rope import rope_tables


def numbers(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def linear(k, n, seed=0, bias=False):
    return Linear(numbers(n, k, seed=seed, scale=k**-0.5), numbers(n, seed=seed + 1000) if bias else None)


def plain_linear(layer, x):
    y = x.astype(np.float64) @ layer.weight.astype(np.float64).T
    return y if layer.bias is None else y + layer.bias.astype(np.float64)


def close(found, expected, tolerance=2e-6):
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


ACTIVATIONS = {
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu_tanh": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "gelu": lambda a: np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / 2**0.5)))(a),
    "relu": lambda a: np.where(a > 0, a, 0),
}

HEAD_DIM, HEADS, KV_HEADS, HIDDEN = 8, 4, 2, 24
SIN, COS = rope_tables(HEAD_DIM, 32, theta=100.0)


# --- layers -----------------------------------------------------------------------------------------------------------


def make_cache(batch=2, capacity=6, xp=np, dtype=np.float32):
    return KVCache(xp, batch=batch, capacity=capacity, layers=3, kv_heads=2, head_dim=8, dtype=dtype)


def make_attention(hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, bias=False, **options):
    options = {"layer": 1, "head_dim": HEAD_DIM, "scale": 0.3} | options
    widths = [n * options["head_dim"] for n in (heads, kv_heads, kv_heads)]
    parts = [linear(hidden, n, seed, bias) for seed, n in enumerate(widths)]
    return Attention(*parts, linear(widths[0], hidden, 3, bias), **options)


def uncached(batch=2):
    return Step(SIN, COS, np.zeros(batch, np.int32))


def head_norms(**options):
    return {f"{name}_norm": HeadNorm(numbers(HEAD_DIM, seed=seed), **options) for seed, name in ((7, "q"), (8, "k"))}


def layer_norm(size, seed, bias=True, eps=1e-5):
    return LayerNorm(1 + numbers(size, seed=seed, scale=0.3), numbers(size, seed=seed + 500) if bias else None, eps)


def rms(size, seed):
    return RMSNorm(1 + numbers(size, seed=seed, scale=0.3), 1e-5)


def make_mlp(hidden, inner, activation, bias=False, is_gated=True):
    gate = linear(hidden, inner, 20, bias) if is_gated else None
    return MLP(gate, linear(hidden, inner, 21, bias), linear(inner, hidden, 22, bias), activation)


def gptq(k, n, seed):
    """Random 4-bit tensors in groups of 32, and a bias."""
    rng = np.random.default_rng(seed)
    words = {"qweight": (k // 8, n), "qzeros": (k // 32, n // 8)}
    tensors = {name: rng.integers(-(2**31), 2**31, shape, np.int32) for name, shape in words.items()}
    tensors["scales"] = (rng.random((k // 32, n)) * 0.2 * k**-0.5 + 0.01).astype(np.float16)
    return tensors | {"qzeros": tensors["qzeros"] & 0x77777777, "bias": rng.standard_normal(n).astype(np.float16)}


# --- their formulas ---------------------------------------------------------------------------------------------------


class Plain:
    """What plain_linear needs of a layer."""

    is_quantized = False

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


def plain_norm(norm, y):
    """The formula of a norm of any kind, over the last axis; None leaves y."""
    if norm is None:
        return y
    kind = norm.kind if isinstance(norm, HeadNorm) else {RMSNorm: "rms", LayerNorm: "layer"}[type(norm)]
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    y = y * norm.weight / np.sqrt((y**2).mean(-1, keepdims=True) + norm.eps)
    return y if kind == "rms" or norm.bias is None else y + norm.bias


def plain_rope(y, style, sin, cos):
    """y [seq, heads, head_dim], pair by pair."""
    y, before, pairs = y.copy(), y, sin.shape[1]
    for j in range(pairs if style else 0):
        p, q = (j, j + pairs) if style == "neox" else (2 * j, 2 * j + 1)
        s, c = (table[: len(y), j, None].astype(np.float64) for table in (sin, cos))
        y[..., p] = before[..., p] * c - before[..., q] * s
        y[..., q] = before[..., q] * c + before[..., p] * s
    return y


def plain_attention(layer, x, tables=(SIN, COS)):
    """Position by position and head by head, in float64."""
    seq = x.shape[0]
    q, k, v = (plain_linear(project, x).reshape(seq, -1, layer.head_dim) for project in (layer.q, layer.k, layer.v))
    q, k = (plain_rope(plain_norm(norm, y), layer.rope_style, *tables) for norm, y in ((layer.q_norm, q), (layer.k_norm, k)))
    mixed, group = np.zeros(q.shape), q.shape[1] // k.shape[1]
    for i in range(seq):
        first = 0 if layer.window is None else max(0, i - layer.window + 1)
        for head in range(q.shape[1]):
            scores = k[first : i + 1, head // group] @ q[i, head] * layer.scale
            if layer.softcap is not None:
                scores = layer.softcap * np.tanh(scores / layer.softcap)
            weights = np.exp(scores - scores.max())
            sink = 0 if layer.sinks is None else np.exp(layer.sinks[head] - scores.max())
            mixed[i, head] = weights / (weights.sum() + sink) @ v[first : i + 1, head // group]
    return plain_linear(layer.o, mixed.reshape(seq, -1))


def plain_mlp(mlp, x):
    up = plain_linear(mlp.up, x)
    activation = ACTIVATIONS[mlp.activation]
    inner = activation(up) if mlp.gate is None else activation(plain_linear(mlp.gate, x)) * up
    return plain_linear(mlp.down, inner)


def plain_block(layer, h, tables):
    """One row of hidden states through a layer of either kind, in float64."""
    h = h.astype(np.float64)
    if isinstance(layer, ParallelDecoderLayer):
        n = plain_norm(layer.norm, h)
        return h + plain_attention(layer.attention, n, tables) + plain_mlp(layer.mlp, n)
    mixed = plain_attention(layer.attention, plain_norm(layer.attention_norm, h), tables)
    h = h + plain_norm(layer.attention_post_norm, mixed)
    return h + plain_norm(layer.mlp_post_norm, plain_mlp(layer.mlp, plain_norm(layer.mlp_norm, h)))
