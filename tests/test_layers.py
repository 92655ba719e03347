"""layers/: each part against plain arithmetic, float64 and written out."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
from kernel_checks import bfloat16

from cupyq.formats.exl2 import dequantize_exl2
from cupyq.formats.gptq import dequantize_gptq
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers import (
    MLP,
    Attention,
    DecoderLayer,
    HeadNorm,
    KVCache,
    LayerNorm,
    Linear,
    ParallelDecoderLayer,
    RMSNorm,
    Step,
)
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.rope import rope_tables

EXL2_MODEL = Path(__file__).parent.parent / "examples/models/shakespeare-exl2-2.5/output.safetensors"
EXL2_TENSORS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


def numbers(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def linear(k, n, seed=0, bias=False):
    return Linear(numbers(n, k, seed=seed, scale=k**-0.5), numbers(n, seed=seed + 1000) if bias else None)


def plain_linear(layer, x):
    y = x.astype(np.float64) @ layer.weight.astype(np.float64).T
    return y if layer.bias is None else y + layer.bias.astype(np.float64)


def close(found, expected, tolerance=2e-6):
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# --- Linear -----------------------------------------------------------------------------------------------------------


def test_linear_takes_weights_as_checkpoints_store_them():
    layer = linear(24, 40, bias=True)
    x = numbers(2, 3, 24, seed=5)
    y = layer(x)
    assert y.shape == (2, 3, 40) and y.dtype == np.float32
    assert close(y, plain_linear(layer, x))
    assert not close(y, plain_linear(layer, x) - layer.bias, 1e-3)
    assert (layer.k, layer.n, layer.kind) == (24, 40, "float32")
    out = np.full((2, 3, 40), np.nan, np.float32)
    assert layer(x, out=out) is out and np.array_equal(out, y)


def test_linear_counts_the_bits_of_its_checkpoint():
    weight = numbers(40, 24)
    assert Linear(weight).storage_bits == 32 * 24 * 40
    assert Linear(weight, stored_dtype=np.float16).bits_per_weight == 16.0
    assert Linear(weight, stored_dtype=np.float16).kind == "float16"
    assert Linear(weight, numbers(40), stored_dtype=np.float16).storage_bits == 16 * (24 * 40 + 40)


def test_linear_of_a_quantized_matrix():
    file, key = SafetensorsFile(EXL2_MODEL), "model.layers.1.mlp.down_proj"
    tensors = {name: file.array(f"{key}.{name}") for name in EXL2_TENSORS}
    layer = Linear(QMatrix.from_tensors(tensors), name=key)
    assert (layer.k, layer.n, layer.kind, layer.name) == (768, 256, "exl2", key)
    # Counted by hand from the table of tensors: codes, scale codes and maxima, the group table, the permutation.
    groups = tensors["q_scale_max"].size
    bits = 32 * tensors["q_weight"].size + 4 * groups * 256 + (16 + 32) * groups + 32 * 768
    assert layer.storage_bits == bits and layer.bits_per_weight == bits / (768 * 256)
    x = numbers(3, 768, seed=4)
    expected = x.astype(np.float64) @ dequantize_exl2(tensors).astype(np.float64)
    assert close(layer(x), expected)
    half = layer(x.astype(np.float16), dtype=np.float32)
    assert half.dtype == np.float32 and close(half, expected, 1e-3)


def test_a_quantized_matrix_holds_its_own_bias():
    file, key = SafetensorsFile(EXL2_MODEL), "model.layers.0.self_attn.k_proj"
    tensors = {name: file.array(f"{key}.{name}") for name in EXL2_TENSORS}
    with pytest.raises(ValueError, match="a QMatrix holds its own"):
        Linear(QMatrix.from_tensors(tensors), np.zeros(128, np.float32), "k")
    bias = numbers(128, seed=9).astype(np.float16)
    x = numbers(2, 256)
    without = Linear(QMatrix.from_tensors(tensors))(x)
    assert np.allclose(Linear(QMatrix.from_tensors(tensors, bias=bias))(x) - without, bias, atol=1e-4)


# --- RMSNorm, MLP -----------------------------------------------------------------------------------------------------


def test_norm_writes_the_dtype_asked_for():
    x, weight = numbers(2, 3, 16), numbers(16, seed=1)
    exact = x.astype(np.float64)
    exact = exact * weight / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    norm = RMSNorm(weight, 1e-5)
    assert norm(x).dtype == np.float32 and close(norm(x), exact)
    assert norm(x, np.float16).dtype == np.float16 and close(norm(x, np.float16), exact, 1e-3)


ACTIVATIONS = {
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu_tanh": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "gelu": lambda a: np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / 2**0.5)))(a),
    "relu": lambda a: np.where(a > 0, a, 0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation):
    gate, up, down = linear(16, 24, 1), linear(16, 24, 2, bias=True), linear(24, 16, 3)
    x = numbers(2, 5, 16, scale=3.0)
    found = MLP(gate, up, down, activation)(x)

    def expected(name):
        return plain_linear(down, ACTIVATIONS[name](plain_linear(gate, x)) * plain_linear(up, x))

    assert close(found, expected(activation))
    for other in ACTIVATIONS.keys() - {activation}:
        assert not close(found, expected(other), 1e-5)


# --- KVCache ----------------------------------------------------------------------------------------------------------


def make_cache(batch=2, capacity=6, xp=np, dtype=np.float32):
    return KVCache(xp, batch=batch, capacity=capacity, layers=3, kv_heads=2, head_dim=8, dtype=dtype)


def test_cache_counts_on_the_device():
    cache = make_cache()
    assert len(cache.k) == len(cache.v) == 3 and cache.k[0].shape == (2, 6, 2, 8)
    assert cache.nbytes == 2 * 3 * 2 * 6 * 2 * 8 * 4
    assert cache.positions.tolist() == [0, 0] and cache.kv_lengths(6).tolist() == [6, 6]
    cache.advance(4)
    assert cache.length == 4 and cache.positions.tolist() == [4, 4] and cache.kv_lengths(1).tolist() == [5, 5]
    assert cache.positions.dtype == np.int32 and cache.positions.flags.c_contiguous
    cache.truncate(1)
    assert cache.length == 1
    cache.reset()
    assert cache.length == 0


def test_cache_refuses_what_does_not_fit():
    cache = make_cache()
    cache.advance(4)
    cache.check_room(2)
    expected = r"prompt longer than the cache: 3 tokens after 4 pass its capacity of 6; .*capacity=7"
    with pytest.raises(ValueError, match=expected):
        cache.check_room(3)
    with pytest.raises(ValueError, match="prompt longer than the cache"):
        cache.advance(3)
    assert cache.length == 4
    with pytest.raises(ValueError, match="length must be from 0 to 4"):
        cache.truncate(5)


@pytest.mark.parametrize(("sizes", "error"), [({"batch": 0}, ValueError), ({"capacity": -1}, ValueError)])
def test_cache_refuses_bad_sizes(sizes, error):
    with pytest.raises(error, match=f"{next(iter(sizes))} must be 1 or more"):
        make_cache(**sizes)
    with pytest.raises(TypeError, match="capacity must be a whole number, got float"):
        make_cache(capacity=2.0)


# --- Attention and DecoderLayer ---------------------------------------------------------------------------------------

HEAD_DIM, HEADS, KV_HEADS, HIDDEN = 8, 4, 2, 24
SIN, COS = rope_tables(HEAD_DIM, 32, theta=100.0)


def make_attention(hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, bias=False, **options):
    options = {"layer": 1, "head_dim": HEAD_DIM, "scale": 0.3} | options
    widths = [n * options["head_dim"] for n in (heads, kv_heads, kv_heads)]
    parts = [linear(hidden, n, seed, bias) for seed, n in enumerate(widths)]
    return Attention(*parts, linear(widths[0], hidden, 3, bias), **options)


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
            mixed[i, head] = weights / weights.sum() @ v[first : i + 1, head // group]
    return plain_linear(layer.o, mixed.reshape(seq, -1))


def uncached(batch=2):
    return Step(SIN, COS, np.zeros(batch, np.int32))


def head_norms(**options):
    return {f"{name}_norm": HeadNorm(numbers(HEAD_DIM, seed=seed), **options) for seed, name in ((7, "q"), (8, "k"))}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 0.5},
        {"scale": 1.0},
        head_norms(eps=1e-5),
        head_norms(eps=1e-5, kind="layer"),
        {"q_norm": HeadNorm(numbers(HEADS, HEAD_DIM, seed=7), numbers(HEADS, HEAD_DIM, seed=9), kind="layer")},
        {"k_norm": HeadNorm(numbers(KV_HEADS, HEAD_DIM, seed=7), eps=1e-3)},
        {"rope_style": "gptj"},
        {"rope_style": None},
        {"bias": True},
    ],
    ids=lambda o: "-".join(f"{key} {getattr(value, 'kind', value)}" for key, value in o.items()) or "plain",
)
def test_attention(options):
    layer, x = make_attention(**options), numbers(2, 9, HIDDEN, scale=2.0)
    found = layer(x, uncached())
    for row in range(2):
        expected = plain_attention(layer, x[row])
        assert close(found[row], expected, 1e-5)
        if options:
            assert not close(found[row], plain_attention(make_attention(), x[row]), 1e-3)


def test_attention_turns_the_first_columns_only_where_the_tables_are_narrow():
    tables = rope_tables(HEAD_DIM // 2, 32, theta=100.0)
    x = numbers(2, 9, HIDDEN, scale=2.0)
    for style in ("neox", "gptj"):
        layer = make_attention(rope_style=style)
        found = layer(x, Step(*tables, np.zeros(2, np.int32)))
        assert close(found[1], plain_attention(layer, x[1], tables), 1e-5)
        assert not close(found[1], plain_attention(layer, x[1]), 1e-3)


def test_attention_without_rope_needs_no_tables():
    layer, x = make_attention(rope_style=None), numbers(2, 9, HIDDEN)
    assert np.array_equal(layer(x, Step(None, None, np.zeros(2, np.int32))), layer(x, uncached()))
    with pytest.raises(ValueError, match="step.sin is None, but layer 1 rotates"):
        make_attention()(x, Step(None, None, np.zeros(2, np.int32)))
    with pytest.raises(ValueError, match="rope_style must be"):
        make_attention(rope_style="llama")


def test_attention_in_two_halves():
    """What stands before and after the attention itself, for callers with a cache of their own."""
    layer, x = make_attention(**head_norms()), numbers(2, 5, HIDDEN)
    q, k, v = layer.project(x, uncached())
    assert q.shape == (2, 5, HEADS, HEAD_DIM) and k.shape == v.shape == (2, 5, KV_HEADS, HEAD_DIM)
    for row in range(2):
        for found, part, norm in ((q, layer.q, layer.q_norm), (k, layer.k, layer.k_norm)):
            projected = plain_linear(part, x[row]).reshape(5, -1, HEAD_DIM)
            assert close(found[row], plain_rope(plain_norm(norm, projected), "neox", SIN, COS))
        assert close(v[row], plain_linear(layer.v, x[row]).reshape(5, -1, HEAD_DIM))
    expected = plain_linear(layer.o, q.reshape(2, 5, -1))
    assert close(layer.output(q, uncached()), expected)


@pytest.mark.parametrize("options", [{}, {"window": 3}], ids=["plain", "window"])
def test_attention_with_a_cache_says_the_same_whatever_the_pieces(options):
    layer, x = make_attention(**options), numbers(2, 9, HIDDEN, scale=2.0)
    expected = layer(x, uncached())
    for pieces in ([9], [1] * 9, [4, 5], [7, 1, 1]):
        cache = make_cache(capacity=11)
        for array in (*cache.k, *cache.v):
            array[...] = np.nan  # nothing beyond what was appended may be read
        found, begin = [], 0
        for piece in pieces:
            step = Step(SIN, COS, cache.positions, cache, cache.kv_lengths(piece), cache.length + piece)
            found.append(layer(x[:, begin : begin + piece].copy(), step))
            cache.advance(piece)
            begin += piece
        assert close(np.concatenate(found, 1), expected, 1e-6)
        assert np.isfinite(cache.k[1][:, :9]).all() and np.isnan(cache.k[1][:, 9:]).all()
        assert np.isnan(cache.k[0]).all() and np.isnan(cache.v[2]).all()  # other layers' parts


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


class Plain:
    """What plain_linear needs of a layer."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


def llama():
    """Qwen 3's: RMSNorms, also of heads."""
    norms = {f"{name}_norm": HeadNorm(1 + numbers(64, seed=s, scale=0.3), eps=1e-5) for s, name in ((7, "q"), (8, "k"))}
    attention = make_attention(96, 3, 1, head_dim=64, scale=0.125, **norms)
    return DecoderLayer(attention, make_mlp(96, 104, "silu"), attention_norm=rms(96, 1), mlp_norm=rms(96, 2))


def gemma2():
    """Post-norms, a window, a cap."""
    attention = make_attention(160, 2, 2, head_dim=256, scale=0.07, window=3, softcap=2.0)
    roles = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")
    norms = {role: rms(160, seed) for seed, role in enumerate(roles)}
    return DecoderLayer(attention, make_mlp(160, 96, "gelu_tanh"), **norms)


def starcoder2():
    """LayerNorms and linear layers with biases, an MLP without a gate."""
    attention = make_attention(200, 4, 2, True, head_dim=80, scale=0.1)
    mlp = make_mlp(200, 104, "gelu_tanh", bias=True, is_gated=False)
    return DecoderLayer(attention, mlp, attention_norm=layer_norm(200, 1), mlp_norm=layer_norm(200, 2))


def gpt2():
    """As Starcoder 2, without RoPE; exact GELU, and post-norms with biases."""
    attention = make_attention(96, 2, 2, True, head_dim=96, scale=0.1, rope_style=None)
    roles = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")
    norms = {role: layer_norm(96, seed) for seed, role in enumerate(roles)}
    return DecoderLayer(attention, make_mlp(96, 200, "gelu", bias=True, is_gated=False), **norms)


def opt():
    """ReLU, gated and not, over MQA."""
    attention = make_attention(160, 3, 1, head_dim=64, scale=0.125)
    norms = {"attention_norm": layer_norm(160, 1), "mlp_norm": rms(160, 2), "mlp_post_norm": rms(160, 3)}
    return DecoderLayer(attention, make_mlp(160, 96, "relu", is_gated=False), **norms)


def cohere():
    """Attention and MLP side by side, LayerNorm without bias, GPT-J's RoPE, LayerNorm of each head by weights of its own."""
    norms = {
        f"{name}_norm": HeadNorm(1 + numbers(heads, 128, seed=heads, scale=0.3), eps=1e-5, kind="layer")
        for name, heads in (("q", 4), ("k", 2))
    }
    attention = make_attention(96, 4, 2, head_dim=128, scale=0.09, rope_style="gptj", **norms)
    return ParallelDecoderLayer(attention, make_mlp(96, 160, "silu"), norm=layer_norm(96, 1, bias=False))


def gated_relu():
    attention = make_attention(200, 2, 1, head_dim=64, scale=0.1)
    return ParallelDecoderLayer(attention, make_mlp(200, 96, "relu"), norm=rms(200, 1))


BLOCKS = (llama, gemma2, starcoder2, gpt2, opt, cohere, gated_relu)
PARTIAL = (starcoder2, cohere)  # half of each head turns


def tables_of(make, layer):
    return rope_tables(layer.attention.head_dim // (2 if make in PARTIAL else 1), 32, theta=100.0)


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


def altered(layer):
    """(what, layer) for copies of a layer with one part of it wrong."""
    replaced = {
        "attention_post_norm": None,
        "mlp_post_norm": None,
        "attention.rope_style": {"neox": "gptj", "gptj": "neox", None: "neox"}[layer.attention.rope_style],
        "attention.q_norm": None,
        "attention.k_norm": None,
        "attention.q_norm.kind": "rms",
        "mlp.activation": "silu" if layer.mlp.activation != "silu" else "relu",
        "attention.q.bias": None,
        "mlp.up.bias": None,
        "mlp.down.bias": None,
        "attention_norm.bias": None,
        "mlp_post_norm.bias": None,
        "norm.eps": 0.1,
        "attention_norm.eps": 0.1,
        "attention.window": None,
    }
    for path, value in replaced.items():
        *parents, name = path.split(".")
        wrong = node = copy.copy(layer)
        for parent in parents:
            child = copy.copy(getattr(node, parent, None))
            setattr(node, parent, child)
            node = child
        found = getattr(node, name, value)
        if isinstance(found, np.ndarray) or found != value:
            setattr(node, name, value)
            yield path, wrong


@pytest.mark.parametrize("make", BLOCKS)
def test_decoder_layers(make):
    """Into a float32 residual, in place."""
    layer = make()
    tables = tables_of(make, layer)
    x = numbers(2, 5, layer.attention.q.k, seed=30)
    hidden = x.copy()
    assert layer(hidden, Step(*tables, np.zeros(2, np.int32)), np.float32) is hidden
    for row in range(2):
        assert close(hidden[row], plain_block(layer, x[row], tables), 1e-5)
    wrong = dict(altered(layer))
    assert len(wrong) >= 3
    for name, other in wrong.items():
        assert not close(hidden[0], plain_block(other, x[0], tables), 1e-4), name
    assert len(layer.linears()) == (7 if layer.mlp.gate else 6)


@pytest.mark.parametrize("k, hidden", [(96, 160), (160, 96)])
def test_layers_of_quantized_matrices_take_any_multiple_of_32(k, hidden):
    """Gate, up and down in four bits, K of whole groups and N of whole words."""
    tensors = [gptq(hidden, k, 1), gptq(hidden, k, 2), gptq(k, hidden, 3)]
    plain = [Plain(dequantize_gptq(t).T.astype(np.float32), t["bias"]) for t in tensors]
    x = numbers(3, 2, hidden)
    for has_gate in (True, False):
        parts = [Linear(QMatrix.from_tensors(t)) for t in tensors]
        mlp = MLP(parts[0] if has_gate else None, *parts[1:], "gelu")
        expected = plain_mlp(MLP(plain[0] if has_gate else None, *plain[1:], "gelu"), x)
        assert close(mlp(x), expected, 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_without_a_gate(activation):
    mlp, x = make_mlp(16, 24, activation, bias=True, is_gated=False), numbers(2, 5, 16, scale=3.0)
    assert close(mlp(x), plain_mlp(mlp, x))
    assert mlp.linears() == [mlp.up, mlp.down]
    for other in ACTIVATIONS.keys() - {activation}:
        assert not close(mlp(x), plain_mlp(make_mlp(16, 24, other, bias=True, is_gated=False), x), 1e-5)


def test_mlp_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh, relu, got 'swish'"):
        make_mlp(16, 24, "swish")


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_add_a_residual_in_its_dtype(kind):
    norm = rms(16, 1) if kind == "rms" else layer_norm(16, 1)
    x, residual = numbers(2, 3, 16).astype(np.float16), numbers(2, 3, 16, seed=5, scale=1e4)
    expected = residual + plain_norm(norm, x.astype(np.float64))
    hidden = residual.copy()
    assert norm(x, residual=hidden, out=hidden) is hidden and close(hidden, expected, 1e-7)
    assert norm(x, np.float32).dtype == np.float32 and close(norm(x, np.float32), expected - residual)


def test_head_norm_works_in_place():
    for norm in (HeadNorm(numbers(8, seed=1), eps=1e-3), HeadNorm(numbers(3, 8, seed=1), numbers(3, 8, seed=2), kind="layer")):
        x = numbers(2, 5, 3, 8)
        expected = plain_norm(norm, x.astype(np.float64))
        assert norm(x) is x and close(x, expected)


def test_decoder_layer_keeps_the_residual_wide_with_narrow_activations():
    """A residual far beyond what float16 holds passes through."""
    norms = {role: RMSNorm(np.ones(HIDDEN, np.float32), 1e-5) for role in ("attention_norm", "mlp_norm")}

    def half(layer):
        layer.weight = layer.weight.astype(np.float16)
        return layer

    attention = make_attention()
    mlp = MLP(*(half(linear(k, n, s)) for k, n, s in ((HIDDEN, 16, 1), (HIDDEN, 16, 2), (16, HIDDEN, 3))), "silu")
    for part in attention.linears():
        half(part)
    hidden = numbers(1, 3, HIDDEN) * 1e6
    before = hidden.copy()
    DecoderLayer(attention, mlp, **norms)(hidden, uncached(1), np.float16)
    assert hidden.dtype == np.float32 and np.isfinite(hidden).all()
    assert np.allclose(hidden, before, rtol=1e-4, atol=20) and not np.array_equal(hidden, before)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.5}], ids=lambda o: "-".join(o) or "plain")
def test_attention_with_a_cache_on_the_gpu_matches_the_reference(cupy, options):
    layer, x = make_attention(**options), numbers(2, 9, HIDDEN, scale=2.0)
    expected = layer(x, uncached())
    sin, cos = cupy.asarray(SIN), cupy.asarray(COS)
    for part in layer.linears():
        part.weight = cupy.asarray(part.weight.astype(np.float16))
    cache = make_cache(capacity=11, xp=cupy, dtype=np.float16)
    found, begin = [], 0
    for piece in (4, 1, 1, 3):
        step = Step(sin, cos, cache.positions, cache, cache.kv_lengths(piece), begin + piece)
        part = np.ascontiguousarray(x[:, begin : begin + piece], np.float16)
        found.append(layer(cupy.asarray(part), step).get())
        cache.advance(piece)
        begin += piece
    assert close(np.concatenate(found, 1), expected, 3e-3)


def moved(layer, xp, dtype):
    """A copy of a decoder layer on that library: weights and biases of linear layers in `dtype`, norms in float32."""
    layer = copy.deepcopy(layer)
    for part in layer.linears():
        part.weight = xp.asarray(part.weight.astype(dtype))
        part.bias = None if part.bias is None else xp.asarray(part.bias.astype(dtype))
    for norm in (*vars(layer).values(), *vars(layer.attention).values()):
        for name in ("weight", "bias") if isinstance(norm, (RMSNorm, LayerNorm, HeadNorm)) else ():
            if getattr(norm, name, None) is not None:
                setattr(norm, name, xp.asarray(getattr(norm, name)))
    return layer


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [(make, np.dtype(np.float16), 2e-3) for make in BLOCKS] + [(make, bfloat16, 1.6e-2) for make in (gemma2, cohere)],
)
def test_decoder_layers_on_the_gpu_match_the_reference(cupy, make, dtype, tolerance):
    """A prompt and two steps with a cache, against the NumPy run of all tokens at once."""
    layer = make()
    attention, tables = layer.attention, tables_of(make, layer)
    x = numbers(2, 6, attention.q.k, seed=30)
    expected = x.copy()
    moved(layer, np, dtype)(expected, Step(*tables, np.zeros(2, np.int32)), dtype)
    on_gpu, tables = moved(layer, cupy, dtype), [cupy.asarray(table) for table in tables]
    sizes = {"layers": 2, "kv_heads": attention.k.n // attention.head_dim, "head_dim": attention.head_dim}
    cache = KVCache(cupy, batch=2, capacity=8, dtype=dtype, **sizes)
    found, begin = [], 0
    for piece in (4, 1, 1):
        step = Step(*tables, cache.positions, cache, cache.kv_lengths(piece), begin + piece)
        hidden = cupy.asarray(np.ascontiguousarray(x[:, begin : begin + piece]))
        assert on_gpu(hidden, step, dtype) is hidden
        found.append(hidden.get())
        cache.advance(piece)
        begin += piece
    # What the layer adds, as the residual is the larger part.
    assert close(np.concatenate(found, 1) - x, expected - x, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("has_gate", [True, False])
def test_quantized_mlps_on_the_gpu_match_the_reference(cupy, has_gate):
    tensors = [gptq(160, 96, 1), gptq(160, 96, 2), gptq(96, 160, 3)]
    x = numbers(3, 2, 160).astype(np.float16)

    def run(xp):
        parts = [Linear(QMatrix.from_tensors({name: xp.asarray(value) for name, value in t.items()})) for t in tensors]
        return MLP(parts[0] if has_gate else None, *parts[1:], "relu")(xp.asarray(x))

    found, expected = run(cupy), run(np)
    assert isinstance(found, cupy.ndarray) and found.dtype == np.float16
    assert close(found.get().astype(np.float64), expected.astype(np.float64), 2e-3)


@pytest.mark.gpu
def test_cache_tables_live_on_the_gpu(cupy):
    cache = make_cache(xp=cupy, dtype=np.float16)
    cache.advance(4)
    assert isinstance(cache.positions, cupy.ndarray) and cache.positions.flags.c_contiguous
    assert cache.positions.get().tolist() == [4, 4] and cache.kv_lengths(2).get().tolist() == [6, 6]
