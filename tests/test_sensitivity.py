"""quantize/sensitivity.py: noise on a linear layer's output, and the KL that it causes, against other ways to know it."""

import math

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT

from cupyq.layers import Linear
from cupyq.models import load_model
from cupyq.quantize.hessian import Hessian
from cupyq.quantize.layouts import Layout
from cupyq.quantize.linear import quantize_linear
from cupyq.quantize.recording import layer_inputs
from cupyq.quantize.sensitivity import _Noisy, _projections, sensitivity
from cupyq.quantize.walk import LayerWalk, replace

ARCH, SHAKESPEARE = ROOT / "tests/models", ROOT / "examples/models/shakespeare"


def measured(folder, ids, backend="numpy", dtype=None, batch_tokens=4096, **options):
    with LayerWalk(folder, backend, dtype=dtype, batch_tokens=batch_tokens) as walk:
        return sensitivity(walk, ids, **options)


def random_ids(rows, length, seed=5, vocab=256):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def text_ids(rows, length):
    """Of the validation text: the model's golden ids come from there too."""
    from cupyq.generate.text import load_tokenizer

    tokenizer = load_tokenizer(SHAKESPEARE)
    text = (SHAKESPEARE / "val.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    starts = np.linspace(0, len(ids) - length, rows).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(reference, logits):
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


class Gaussian(Linear):
    """Adds noise of its own to what a linear layer makes."""

    def __init__(self, linear, deviation, seed):
        self.__dict__.update(vars(linear))
        self.deviation, self.generator = deviation, np.random.default_rng(seed)
        self.rows = 0

    def __call__(self, *args, **options):
        y = super().__call__(*args, **options)
        y += (self.generator.standard_normal(y.shape) * self.deviation).astype(y.dtype)
        self.rows += y.size // self.n
        return y


def gaussian_sensitivity(folder, ids, layer, places, deviation):
    """KL for a unit of squared error, of Gaussian noise on one or more linear layers of a layer of the whole model."""
    model = load_model(folder, "numpy")
    reference = model.forward(ids)
    noisy = []
    for seed, (owner, attribute) in enumerate(places(model.layers[layer])):
        noisy.append(Gaussian(getattr(owner, attribute), deviation, seed))
        setattr(owner, attribute, noisy[-1])
    found = divergence(reference, model.forward(ids))
    return found / (deviation**2 * sum(linear.n * linear.rows for linear in noisy) / ids.size)


# --- the numbers ------------------------------------------------------------------------------------------------------


def fisher_of_last(folder, ids):
    """What noise on the hidden states after the last layer does, by the second derivative of KL: half the mean over tokens of
    trace(J^T (diag p - p p^T) J) / width, J the derivative of logits by hidden states; noise of length 1 a token."""
    with LayerWalk(folder, "numpy") as walk:
        hidden = walk.embed(ids)
        for _, layer in walk.layers():
            walk.run(layer, hidden)
        model = walk.head()
        weight = model.head.weight.astype(np.float64)
        gain, eps = model.norm.weight.astype(np.float64), model.norm.eps
    total = 0.0
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64)
    for row in rows:
        size = math.sqrt(float(np.mean(row * row)) + eps)
        normed = row / size
        jacobian = (weight * gain) @ (np.eye(len(row)) - np.outer(normed, normed) / len(row)) / size
        logits = weight @ (gain * normed)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        mean = p @ jacobian
        total += float((p[:, None] * jacobian**2).sum() - mean @ mean)
    return total / 2 / len(rows) / rows.shape[1]


def test_last_projection_has_the_fisher_information_of_the_head():
    folder, ids = ARCH / "llama3-rope", random_ids(6, 48)
    expected = fisher_of_last(folder, ids)
    for noise in (0.02, 0.05):
        found = measured(folder, ids, noise=noise)["model.layers.2.mlp.down_proj"]
        assert found == pytest.approx(expected, rel=0.06)
    # Mistakes in what the noise is divided by would be no match: a root, a half, one column in place of all.
    assert not any(wrong == pytest.approx(expected, rel=0.06) for wrong in (found**0.5, found / 2, found * 128))


@pytest.mark.parametrize(("name", "part"), [("model.layers.0.self_attn.q_proj", "q"), ("model.layers.1.self_attn.o_proj", "o")])
def test_signs_do_what_gaussian_noise_does(name, part):
    folder, ids = ARCH / "llama3-rope", random_ids(6, 48)
    expected = gaussian_sensitivity(folder, ids, int(name.split(".")[2]), lambda layer: [(layer.attention, part)], 0.05)
    assert measured(folder, ids)[name] == pytest.approx(expected, rel=0.2)


def test_experts_are_disturbed_together_and_share_a_number():
    folder, ids = ARCH / "mixtral", random_ids(6, 48)
    found = measured(folder, ids)
    with LayerWalk(folder, "numpy") as walk:
        assert found.keys() == walk.shapes().keys() - {"lm_head"}
    for layer, (part, attribute) in ((0, ("w1", "gate")), (1, ("w2", "down"))):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        numbers = {found[f"{prefix}{expert}.{part}.weight".removesuffix(".weight")] for expert in range(4)}
        assert len(numbers) == 1
        expected = gaussian_sensitivity(
            folder, ids, layer, lambda found, a=attribute: [(expert, a) for expert in found.mlp.experts], 0.05
        )
        # Counting every expert for every token, the error would be twice as large: 4 experts, of which a token has 2.
        assert numbers.pop() == pytest.approx(expected, rel=0.25)


def test_it_predicts_what_quantized_weights_do():
    ids = text_ids(4, 128)
    found = measured(SHAKESPEARE, ids)
    assert len(found) == 28 and min(found.values()) > 0
    # The embeddings' small residual makes the first layer's outputs count, as known from measurements with weights.
    assert found["model.layers.0.self_attn.o_proj"] > 50 * found["model.layers.2.self_attn.o_proj"]
    model = load_model(SHAKESPEARE, "numpy")
    reference = model.forward(ids)
    wanted = {"model.layers.0.self_attn.v_proj": 3, "model.layers.1.mlp.up_proj": 2, "model.layers.3.mlp.down_proj": 3}
    with LayerWalk(SHAKESPEARE, "numpy") as walk:
        hidden = walk.embed(ids)
        for index, layer in walk.layers():
            reads = [read for read in layer_inputs(layer) if any(linear.name in wanted for linear in read.linears)]
            hessians = {read.name: Hessian(read.k) for read in reads}
            walk.record(layer, hidden, {name: hessian.add for name, hessian in hessians.items()})
            for read in reads:
                (own,) = (linear for linear in read.linears if linear.name in wanted)
                layout = Layout.parse(f"{wanted[own.name]}g64")
                quantized = quantize_linear(own.weight.T, hessians[read.name].prepare(), layout)
                (place,) = (linear for linear in model.layers[index].linears() if linear.name == own.name)
                old = replace(place, quantized.values)
                ratio = divergence(reference, model.forward(ids)) / (found[own.name] * quantized.error)
                replace(place, old)
                assert 0.7 < ratio < 1.8, own.name
            walk.run(layer, hidden)


# --- its ways ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_numbers_and_layers_are_reported():
    folder, ids, seen = ARCH / "gemma2", random_ids(2, 40), []
    first = measured(folder, ids, on_layer=seen.append)
    assert seen == list(range(len(seen))) and len(first) == 7 * len(seen)
    assert measured(folder, ids, on_host=True) == first
    other = measured(folder, ids, seed=1)
    assert other != first
    assert all(other[name] == pytest.approx(value, rel=0.5) for name, value in first.items())


def test_batches_differ_only_in_their_noise():
    folder, ids = ARCH / "qwen3", random_ids(6, 40)
    first, cut = measured(folder, ids), measured(folder, ids, batch_tokens=80)
    assert all(cut[name] == pytest.approx(value, rel=0.4) for name, value in first.items())


def test_bfloat16():
    folder, ids = ARCH / "llama3-rope", random_ids(4, 48)
    first, found = measured(folder, ids), measured(folder, ids, dtype="bfloat16")
    assert all(found[name] == pytest.approx(value, rel=0.25) for name, value in first.items())


def noisy_output(dtype, xp=np):
    """(outputs, the same with noise of 0.1, the linear layer) of a layer that doubles its inputs."""
    linear = Linear(xp.asarray((2 * np.eye(32)).astype(dtype)), name="doubles")
    noisy = _Noisy(linear, 0.1, (0, 1))
    x = np.random.default_rng(0).standard_normal((5, 64, 32)).astype(np.float32)
    x[0, 0] *= 1000  # one token far above the others does not count
    x = xp.asarray(x.astype(dtype))
    return linear(x), noisy(x), noisy


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_noise_has_the_size_it_says(dtype):
    clean, disturbed, noisy = noisy_output(dtype)
    assert disturbed.dtype == dtype and noisy.amount == pytest.approx(0.2, rel=0.1)
    change = (disturbed.astype(np.float64) - clean.astype(np.float64)).reshape(-1, 32)[1:]
    ulp = {2: 2.0**-7 if dtype == ml_dtypes.bfloat16 else 2.0**-10, 4: 2.0**-22}[np.dtype(dtype).itemsize]
    assert np.abs(np.abs(change) - noisy.amount).max() <= 8 * ulp
    assert np.mean(change * change) == pytest.approx(noisy.amount**2, rel=0.01)
    signs = np.sign(change)
    assert abs(signs.mean()) < 0.04 and abs((signs[:-1] * signs[1:]).mean()) < 0.04  # 4 standard deviations


def test_layers_get_their_linears_back():
    with LayerWalk(ARCH / "mixtral", "numpy") as walk:
        _, layer = next(walk.layers())
        before = layer.linears()
        trials = list(_projections(layer, 0.05, (0, 0)))
        assert [len(places) for places in trials] == [1, 1, 1, 1, 4, 4, 4]
        assert all(found is own for found, own in zip(layer.linears(), before, strict=True))


@pytest.mark.parametrize("noise", [0, -0.1, 0.6, math.nan])
def test_refuses_noise(noise):
    with pytest.raises(ValueError, match="^noise must be above 0 and at most 0.5"):
        measured(ARCH / "llama3-rope", random_ids(1, 4), noise=noise)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.1), ("bfloat16", 0.3)])
def test_gpu_finds_the_same(cupy, dtype, tolerance):
    folder, ids = ARCH / "llama3-rope", random_ids(4, 48)
    expected, found = measured(folder, ids), measured(folder, ids, "cupy", dtype)
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value, rel=tolerance) for key, value in expected.items())
    assert measured(folder, ids, "cupy", dtype) == found
    assert measured(folder, ids, "cupy", dtype, on_host=True) == found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_finds_the_same_for_experts(cupy, dtype):
    """Within what another seed changes on NumPy, 0.56 to 1.61: there, experts compute their own rows, here all rows."""
    folder, ids = ARCH / "mixtral", random_ids(16, 48)
    expected, found = measured(folder, ids), measured(folder, ids, "cupy", dtype)
    assert found.keys() == expected.keys()
    ratios = np.log([found[key] / value for key, value in expected.items()])
    assert np.abs(ratios).max() < math.log(2.5) and abs(ratios.mean()) < math.log(1.4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_gpu_noise_has_the_same_signs(cupy, dtype):
    (clean, disturbed, noisy), (_, other, other_noisy) = noisy_output(dtype), noisy_output(dtype, cupy)
    assert other_noisy.amount == pytest.approx(noisy.amount, rel=1e-4)
    change = disturbed.astype(np.float64) - clean.astype(np.float64)
    other_change = other.get().astype(np.float64) - clean.astype(np.float64)
    plain = np.abs(clean.astype(np.float64)) < 8  # where noise is not lost in rounding
    assert plain.mean() > 0.9 and np.array_equal(np.sign(change[plain]), np.sign(other_change[plain]))
