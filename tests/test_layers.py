"""layers/: each part against plain arithmetic, float64 and written out."""

import math
from pathlib import Path

import numpy as np
import pytest

from cupyq.formats.exl2 import dequantize_exl2
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers import MLP, Attention, DecoderLayer, KVCache, Linear, MoE, RMSNorm, Step
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


# --- RMSNorm, MLP, MoE ------------------------------------------------------------------------------------------------


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


def make_moe(top_k, experts=5):
    router = linear(16, experts, 50)
    return MoE(router, [MLP(*(linear(16, 16, 3 * e + i) for i in range(3)), "silu") for e in range(experts)], top_k)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_moe_is_the_weighted_sum_of_the_chosen_experts(top_k):
    moe, x = make_moe(top_k), numbers(2, 7, 16)
    found = moe(x)
    assert found.shape == x.shape and found.dtype == np.float32
    for row, y in zip(x.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        logits = plain_linear(moe.router, row)
        chosen = sorted(range(5), key=lambda e: -logits[e])[:top_k]
        weights = np.exp(logits[chosen])
        weights /= weights.sum()
        expected = 0.0
        for expert, weight in zip(chosen, weights, strict=True):
            mlp = moe.experts[expert]
            inner = ACTIVATIONS["silu"](plain_linear(mlp.gate, row)) * plain_linear(mlp.up, row)
            expected = expected + weight * plain_linear(mlp.down, inner)
        assert close(y, expected, 1e-5)


def test_moe_passes_over_what_an_idle_expert_makes():
    """An expert may overflow on rows that are not its own; their sums must not see it."""
    moe, x = make_moe(2), numbers(1, 6, 16)
    before = moe(x)
    logits = plain_linear(moe.router, x[0])
    last = np.argsort(-logits, axis=1)
    # Blind expert e for all rows but those that choose it.
    for e in range(5):
        rows = [r for r in range(6) if e not in last[r, :2]]
        calm = make_moe(2)
        inner = calm.experts[e]
        calm.experts[e] = lambda x, inner=inner, rows=rows: poisoned(inner(x), rows)
        assert np.array_equal(calm(x), before)


def poisoned(y, rows):
    y = y.copy()
    y[rows] = np.nan
    return y


def test_moe_lists_the_experts_layers_without_the_router():
    moe = make_moe(2)
    assert len(moe.linears()) == 15 and moe.router not in moe.linears()


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


def make_attention(**options):
    widths = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    parts = [linear(HIDDEN, n, seed) for seed, n in enumerate(widths)]
    options = {"layer": 1, "head_dim": HEAD_DIM, "scale": 0.3} | options
    return Attention(*parts, linear(HEADS * HEAD_DIM, HIDDEN, 3), **options)


def plain_attention(layer, x):
    """Position by position and head by head, in float64."""
    seq = x.shape[0]

    def heads_of(project, weight):
        y = plain_linear(project, x).reshape(seq, -1, HEAD_DIM)
        if weight is not None:
            y = y * weight / np.sqrt((y**2).mean(-1, keepdims=True) + layer.eps)
        return y

    def turned(y):
        half = HEAD_DIM // 2
        s, c = SIN[:seq, None].astype(np.float64), COS[:seq, None].astype(np.float64)
        return np.concatenate([y[..., :half] * c - y[..., half:] * s, y[..., half:] * c + y[..., :half] * s], -1)

    q, k = turned(heads_of(layer.q, layer.q_norm)), turned(heads_of(layer.k, layer.k_norm))
    v = heads_of(layer.v, None)
    mixed = np.zeros((seq, HEADS, HEAD_DIM))
    for i in range(seq):
        first = 0 if layer.window is None else max(0, i - layer.window + 1)
        for head in range(HEADS):
            scores = k[first : i + 1, head // 2] @ q[i, head] * layer.scale
            if layer.softcap is not None:
                scores = layer.softcap * np.tanh(scores / layer.softcap)
            weights = np.exp(scores - scores.max())
            mixed[i, head] = weights / weights.sum() @ v[first : i + 1, head // 2]
    return plain_linear(layer.o, mixed.reshape(seq, -1))


def uncached(batch=2):
    return Step(SIN, COS, np.zeros(batch, np.int32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 0.5},
        {"scale": 1.0},
        {"q_norm": numbers(HEAD_DIM, seed=7), "k_norm": numbers(HEAD_DIM, seed=8), "eps": 1e-5},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_attention(options):
    layer, x = make_attention(**options), numbers(2, 9, HIDDEN, scale=2.0)
    found = layer(x, uncached())
    for row in range(2):
        expected = plain_attention(layer, x[row])
        assert close(found[row], expected, 1e-5)
        if options:
            assert not close(found[row], plain_attention(make_attention(), x[row]), 1e-3)


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


@pytest.mark.parametrize("has_post_norms", [False, True])
def test_decoder_layer_adds_to_a_float32_residual(has_post_norms):
    roles = ["attention_norm", "mlp_norm", *(["attention_post_norm", "mlp_post_norm"] if has_post_norms else [])]
    norms = {role: RMSNorm(numbers(HIDDEN, seed=seed), 1e-5) for seed, role in enumerate(roles)}
    mlp = MLP(linear(HIDDEN, 16, 20), linear(HIDDEN, 16, 21), linear(16, HIDDEN, 22), "silu")
    layer = DecoderLayer(make_attention(), mlp, **norms)
    x = numbers(2, 5, HIDDEN, seed=30)
    hidden = x.copy()
    assert layer(hidden, uncached(), np.float32) is hidden

    def plain_norm(role, y):
        norm = norms.get(role)
        return y if norm is None else y * norm.weight / np.sqrt((y**2).mean(-1, keepdims=True) + norm.eps)

    for row in range(2):
        h = x[row].astype(np.float64)
        h = h + plain_norm("attention_post_norm", plain_attention(layer.attention, plain_norm("attention_norm", h)))
        y = plain_norm("mlp_norm", h)
        y = plain_linear(mlp.down, ACTIVATIONS["silu"](plain_linear(mlp.gate, y)) * plain_linear(mlp.up, y))
        h = h + plain_norm("mlp_post_norm", y)
        assert close(hidden[row], h, 1e-5)
    assert len(layer.linears()) == 7


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
def test_moe_on_the_gpu_matches_the_reference(cupy):
    moe, x = make_moe(2), numbers(2, 7, 16).astype(np.float16)
    for part in (moe.router, *moe.linears()):
        part.weight = part.weight.astype(np.float16)
    expected = moe(x)
    for part in (moe.router, *moe.linears()):
        part.weight = cupy.asarray(part.weight)
    found = moe(cupy.asarray(x))
    assert isinstance(found, cupy.ndarray) and found.dtype == np.float32
    assert close(found.get(), expected, 2e-3)
    assert np.array_equal(found.get(), moe(cupy.asarray(x)).get())


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


@pytest.mark.gpu
def test_cache_tables_live_on_the_gpu(cupy):
    cache = make_cache(xp=cupy, dtype=np.float16)
    cache.advance(4)
    assert isinstance(cache.positions, cupy.ndarray) and cache.positions.flags.c_contiguous
    assert cache.positions.get().tolist() == [4, 4] and cache.kv_lengths(2).get().tolist() == [6, 6]
