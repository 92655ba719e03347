"""layers/: linear layers, norms, MLPs, and the cache against plain arithmetic, float64 and written out."""

from pathlib import Path

import numpy as np
import pytest
from layer_checks import (
    ACTIVATIONS,
    Plain,
    close,
    gptq,
    layer_norm,
    linear,
    make_cache,
    make_mlp,
    numbers,
    plain_linear,
    plain_mlp,
    plain_norm,
    rms,
)

from cupyq.formats.exl2 import dequantize_exl2
from cupyq.formats.gptq import dequantize_gptq
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers import MLP, HeadNorm, Linear, RMSNorm
from cupyq.ops.qmatrix import QMatrix

EXL2_MODEL = Path(__file__).parent.parent / "examples/models/shakespeare-exl2-2.5/output.safetensors"
EXL2_TENSORS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


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


# --- norms, MLP -------------------------------------------------------------------------------------------------------


def test_norm_writes_the_dtype_asked_for():
    x, weight = numbers(2, 3, 16), numbers(16, seed=1)
    exact = x.astype(np.float64)
    exact = exact * weight / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    norm = RMSNorm(weight, 1e-5)
    assert norm(x).dtype == np.float32 and close(norm(x), exact)
    assert norm(x, np.float16).dtype == np.float16 and close(norm(x, np.float16), exact, 1e-3)


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


# --- KVCache ----------------------------------------------------------------------------------------------------------


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


# --- on a GPU ---------------------------------------------------------------------------------------------------------


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
