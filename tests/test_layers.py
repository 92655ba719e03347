"""layers/: attention and whole decoder layers of every kind against plain arithmetic, float64 and written out."""

import copy

import numpy as np
import pytest
from kernel_checks import bfloat16
from layer_checks import (
    ACTIVATIONS,
    COS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SIN,
    close,
    head_norms,
    layer_norm,
    linear,
    make_attention,
    make_cache,
    make_mlp,
    numbers,
    plain_attention,
    plain_block,
    plain_linear,
    plain_norm,
    plain_rope,
    rms,
    uncached,
)

from cupyq.layers import MLP, DecoderLayer, HeadNorm, KVCache, LayerNorm, ParallelDecoderLayer, RMSNorm, Step
from cupyq.ops.rope import rope_tables

# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 0.5},
        {"sinks": numbers(HEADS, seed=6)},
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
            step = Step(SIN, COS, cache.positions, cache, cache.kv_lengths(piece))
            found.append(layer(x[:, begin : begin + piece].copy(), step))
            cache.advance(piece)
            begin += piece
        assert close(np.concatenate(found, 1), expected, 1e-6)
        assert np.isfinite(cache.k[1][:, :9]).all() and np.isnan(cache.k[1][:, 9:]).all()
        assert np.isnan(cache.k[0]).all() and np.isnan(cache.v[2]).all()  # other layers' parts


# --- decoder layers ---------------------------------------------------------------------------------------------------


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


def altered(layer):
    """(what, layer) for copies of a layer with one part of it wrong."""
    replaced = {
        "attention_post_norm": None,
        "mlp_post_norm": None,
        "attention.rope_style": {"neox": "gptj", "gptj": "neox", None: "neox"}[layer.attention.rope_style],
        "attention.q_norm": None,
        "attention.k_norm": None,
        "attention.q_norm.kind": "rms",
        "mlp.activation": next(name for name in ACTIVATIONS if name != layer.mlp.activation),
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
        step = Step(sin, cos, cache.positions, cache, cache.kv_lengths(piece))
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
        step = Step(*tables, cache.positions, cache, cache.kv_lengths(piece))
        hidden = cupy.asarray(np.ascontiguousarray(x[:, begin : begin + piece]))
        assert on_gpu(hidden, step, dtype) is hidden
        found.append(hidden.get())
        cache.advance(piece)
        begin += piece
    # What the layer adds, as the residual is the larger part.
    assert close(np.concatenate(found, 1) - x, expected - x, tolerance)
