"""quantize/recording.py: two walks in step against two whole models, their residuals by plain arithmetic."""

import gc
import json
import weakref

import architecture_cases
import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import host, same_bits

from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers import Linear, Step
from cupyq.models import load_model
from cupyq.models.loader import Blueprint
from cupyq.quantize import gather
from cupyq.quantize.recording import layer_inputs
from cupyq.quantize.walk import LayerWalk, replace

MODELS = ROOT / "tests/models"
PLAIN = ["llama3-rope", "qwen2"]
LENGTH = 36


def ids_of(folder, rows=3):
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(3).integers(0, vocab, (rows, LENGTH)).astype(np.int32)


def noisy_weights(model):
    """{name: float32 [K, N]} of other weights for every linear layer of the decoder."""
    rng, found = np.random.default_rng(9), {}
    for linear in (linear for layer in model.layers for linear in layer.linears()):
        old = host(linear.weight).T.astype(np.float32)
        found[linear.name] = (old + rng.normal(0, 0.1 * old.std(), old.shape)).astype(np.float16).astype(np.float32)
    return found


class Seen:
    """A whole model run layer by layer: what its linear layers read, and its residual between the layers, [tokens, ...]."""

    def __init__(self, folder, values, monkeypatch):
        model, ids = load_model(folder, "numpy"), ids_of(folder)
        for linear in (linear for layer in model.layers for linear in layer.linears()):
            if values:
                linear.weight = np.ascontiguousarray(values[linear.name].T)
        calls, real = {}, Linear.__call__

        def call(linear, x, *arguments, **options):
            calls.setdefault(linear.name, []).append(x.reshape(-1, x.shape[-1]).copy())
            return real(linear, x, *arguments, **options)

        layers, states = model.layers, []
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "__call__", call)
            for count in (*range(len(layers)), len(layers)):
                model.layers = layers[:count]
                calls.clear()
                batches = [ids[:2], ids[2:]]
                states.append(np.concatenate([self._run(model, batch) for batch in batches]))
        self.inputs = {name: np.concatenate(found) for name, found in calls.items()}
        self.residuals = [state.reshape(-1, state.shape[-1]) for state in states]
        self.layers = layers

    @staticmethod
    def _run(model, batch):
        return model.hidden(model.checked_ids(batch), Step(model.sin, model.cos, np.zeros(len(batch), np.int32)))

    def middle(self, index, norm_weight=None, eps=0.0):
        """The residual between attention and MLP of a layer, float64."""
        o = self.layers[index].attention.o
        made = self.inputs[o.name].astype(np.float64) @ o.weight.T.astype(np.float64)
        if o.bias is not None:
            made += o.bias
        if norm_weight is not None:
            made = made / np.sqrt(np.square(made).mean(axis=1, keepdims=True) + eps) * norm_weight
        return self.residuals[index] + made


def recorded_beside(walk, layer, hidden, original, originals, names):
    """{name: (x, original, weights, gap)} of all batches."""
    found = {}

    def feed(name):
        def take(x, beside):
            assert x.ndim == 2 and beside.weights.dtype == np.float32
            parts = (x, beside.original, beside.weights, beside.gap)
            found.setdefault(name, []).append([None if part is None else host(part).copy() for part in parts])

        return take

    tokens = walk.record_beside(layer, hidden, original, originals, {name: feed(name) for name in names})
    joined = {}
    for name, batches in found.items():
        joined[name] = tuple(None if parts[0] is None else np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert tokens == {name: len(joined[name][0]) for name in names}
    return joined


def expected_weights(residual, eps):
    return 1 / (np.square(residual.astype(np.float64)).mean(axis=1) + eps)


@pytest.mark.parametrize("name", [*PLAIN, "gemma2", "cohere"])
def test_two_walks_against_two_models(monkeypatch, tmp_path, name):
    is_parallel = name == "cohere"
    folder = architecture_cases.write(tmp_path, name) if is_parallel else MODELS / name
    values = noisy_weights(load_model(folder, "numpy"))
    other, plain = Seen(folder, values, monkeypatch), Seen(folder, None, monkeypatch)
    has_post_norms = name == "gemma2"
    with LayerWalk(folder, "numpy", batch_tokens=2 * LENGTH) as walk:
        hidden, originals, eps = walk.embed(ids_of(folder)), walk.embed(ids_of(folder)), walk.config.rms_norm_eps
        for index, layer, original in walk.pairs():
            for linear in layer.linears():
                replace(linear, values[linear.name])
            before = hidden.copy(), originals.copy()
            reads = {read.name: read for read in layer_inputs(layer)}
            every = recorded_beside(walk, layer, hidden, original, originals, reads)
            assert same_bits(hidden, before[0]) and same_bits(originals, before[1])
            norm = None
            if has_post_norms:
                file = SafetensorsFile(folder / "model.safetensors")
                norm = 1 + file.array(f"model.layers.{index}.post_attention_layernorm.weight").astype(np.float64)
            middle, original_middle = (seen.middle(index, norm, eps) for seen in (other, plain))
            start, end = plain.residuals[index], plain.residuals[index + 1]
            for read_name, (x, original_x, weights, gap) in every.items():
                short = read_name.rpartition(".")[2]
                assert same_bits(x, other.inputs[read_name]) and same_bits(original_x, plain.inputs[read_name])
                residual = {"q_proj": start, "o_proj": original_middle, "gate_proj": original_middle, "down_proj": end}[short]
                if is_parallel:
                    residual = start if short in ("q_proj", "gate_proj") else end
                assert np.abs(x - original_x).max() > 0 or (index == 0 and residual is start)
                assert np.allclose(weights, expected_weights(residual, eps), rtol=2e-5)
                expected = {"o_proj": start - other.residuals[index], "down_proj": original_middle - middle}.get(short)
                if expected is None or has_post_norms:
                    assert gap is None
                else:
                    assert gap.dtype == np.float32 and np.abs(gap - expected).max() <= 1e-5 * np.abs(end).max()
                    assert index == 0 or np.abs(gap).max() > 1e-3 * np.abs(end).max()
                if index == 1:  # alone, which runs no further than it must
                    alone = recorded_beside(walk, layer, hidden, original, originals, [read_name])[read_name]
                    assert all(a is b is None or same_bits(a, b) for a, b in zip(alone, every[read_name], strict=True))
            walk.run(layer, hidden)
            walk.run(original, originals)
        assert same_bits(hidden.reshape(-1, hidden.shape[-1]), other.residuals[-1])
        assert same_bits(originals.reshape(-1, hidden.shape[-1]), plain.residuals[-1])
        head, heads = walk.head(), []
        assert walk.record_head(head, hidden, lambda *x: heads.append([array.copy() for array in x]), originals) == 3 * LENGTH
        for number, state in enumerate((hidden, originals)):
            alone = []
            walk.record_head(head, state, alone.append)
            assert same_bits(np.concatenate([x[number] for x in heads]), np.concatenate(alone))


def test_a_layer_beside_itself():
    """Without other weights: no gap, the same inputs."""
    folder = MODELS / "llama3-rope"
    with LayerWalk(folder, "numpy") as walk:
        hidden, originals = walk.embed(ids_of(folder)), walk.embed(ids_of(folder))
        _, layer, original = next(walk.pairs())
        names = [read.name for read in layer_inputs(layer)]
        for x, original_x, _, gap in recorded_beside(walk, layer, hidden, original, originals, names).values():
            assert same_bits(x, original_x) and (gap is None or not gap.any())
        assert walk.record_beside(layer, hidden, original, originals, {}) == {}


def test_no_more_is_computed_than_asked_for(monkeypatch):
    folder = MODELS / "llama3-rope"
    with LayerWalk(folder, "numpy", batch_tokens=3 * LENGTH) as walk:
        hidden, originals = walk.embed(ids_of(folder)), walk.embed(ids_of(folder))
        _, layer, original = next(walk.pairs())
        calls, real = [], Linear.__call__

        def call(linear, *arguments, **options):
            owner = "new" if linear.weight is weights[linear.name] else "original"
            calls.append((owner, linear.name.rpartition(".")[2].removesuffix("_proj")))
            return real(linear, *arguments, **options)

        weights = {linear.name: linear.weight for linear in layer.linears()}
        monkeypatch.setattr(Linear, "__call__", call)
        qkv, mlp = ["q", "k", "v"], ["gate", "up", "down"]
        for last, (of_original, of_new) in {
            "self_attn.q_proj": ([], []),
            "self_attn.o_proj": ([*qkv, "o"], qkv),  # tokens count by what comes of o
            "mlp.gate_proj": ([*qkv, "o"], [*qkv, "o"]),
            "mlp.down_proj": ([*qkv, "o", *mlp], [*qkv, "o", *mlp[:2]]),
        }.items():
            calls.clear()
            walk.record_beside(layer, hidden, original, originals, {f"model.layers.0.{last}": lambda x, beside: None})
            assert calls == [*(("original", name) for name in of_original), *(("new", name) for name in of_new)]


def test_a_feed_that_fails_leaves_both_layers_as_they_were():
    folder = MODELS / "qwen2"
    with LayerWalk(folder, "numpy") as walk:
        hidden, originals = walk.embed(ids_of(folder)), walk.embed(ids_of(folder))
        _, layer, original = next(walk.pairs())
        own = [(part.linears(), part.mlp, part.attention) for part in (layer, original)]
        before = hidden.copy()
        with pytest.raises(ZeroDivisionError):
            walk.record_beside(layer, hidden, original, originals, {"model.layers.0.mlp.down_proj": lambda x, beside: 1 / 0})
        assert [(part.linears(), part.mlp, part.attention) for part in (layer, original)] == own
        assert same_bits(hidden, before) and same_bits(originals, before)
        with pytest.raises(ValueError, match="feeds has 'x', expected names of inputs of this layer"):
            walk.record_beside(layer, hidden, original, originals, {"x": lambda x, beside: None})


def test_experts_are_not_fed_beside_the_original():
    folder = MODELS / "mixtral"
    values = noisy_weights(load_model(folder, "numpy"))
    with LayerWalk(folder, "numpy") as walk:
        hidden, originals = walk.embed(ids_of(folder)), walk.embed(ids_of(folder))
        _, layer, original = next(walk.pairs())
        for linear in layer.linears():
            replace(linear, values[linear.name])
        reads = layer_inputs(layer)
        expert = next(read for read in reads if read.expert is not None)
        with pytest.raises(ValueError, match=f"feeds has '{expert.name}', an expert"):
            walk.record_beside(layer, hidden, original, originals, {expert.name: lambda x, beside: None})
        # Their Hessians are those of the quantized walk alone; those of attention have all there is.
        found = gather.gather_beside(walk, layer, reads, hidden, original, originals)
        alone = gather.gather(walk, layer, reads, hidden)
        assert found.keys() == alone.keys()
        for read in reads:
            (hessian, tokens), (plain, count) = found[read.name], alone[read.name]
            assert tokens == count
            assert (hessian.cross is None) == (read.expert is not None)
            assert (hessian.gap is None) == (read.attribute != "o")
            assert same_bits(hessian.sum, plain.sum) == (read.expert is not None)


@pytest.mark.parametrize("name", ["llama3-rope", "mixtral"])
def test_one_pair_is_in_memory_at_a_time(monkeypatch, name):
    alive, real, counts = [], Blueprint.layer, []

    def layer(blueprint, index):
        gc.collect()
        counts.append(len({id(weight()) for weight in alive if weight() is not None}))
        made = real(blueprint, index)
        alive.extend(weakref.ref(linear.weight) for linear in made.linears())
        return made

    monkeypatch.setattr(Blueprint, "layer", layer)
    with LayerWalk(MODELS / name, "numpy") as walk:
        each = [len(one.linears()) + len(two.linears()) for _, one, two in walk.pairs()]
        assert counts == [0, each[0] // 2] * len(walk)
        with pytest.raises(StopIteration):
            next(walk.pairs(len(walk)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("on_host", [False, True])
def test_two_walks_on_a_gpu(cupy, dtype, on_host):
    """Near what NumPy finds, wherever the hidden states are."""
    folder = MODELS / "llama3-rope"
    values = noisy_weights(load_model(folder, "numpy"))
    found = []
    for backend, options in (("cupy", {"dtype": dtype}), ("numpy", {})):
        with LayerWalk(folder, backend, batch_tokens=2 * LENGTH, **options) as walk:
            hidden = walk.embed(ids_of(folder), on_host=on_host)
            originals = hidden.copy()
            for index, layer, original in walk.pairs():
                for linear in layer.linears():
                    replace(linear, values[linear.name])
                if index == 1:
                    before = host(hidden).copy(), host(originals).copy()
                    reads = layer_inputs(layer)
                    arguments = (layer, reads, hidden, original, originals)
                    found.append(gather.gather_beside(walk, *arguments))
                    assert same_bits(host(hidden), before[0]) and same_bits(host(originals), before[1])
                    again = gather.gather_beside(walk, *arguments)
                    for name, (hessian, _) in found[-1].items():
                        for own, other in ((hessian.sum, again[name][0].sum), (hessian.cross, again[name][0].cross)):
                            assert same_bits(host(own), host(other))
                walk.run(layer, hidden)
                walk.run(original, originals)
    tolerance = {"float16": 0.02, "bfloat16": 0.15}[dtype]
    for name, (expected, tokens) in found[1].items():
        hessian, count = found[0][name]
        assert count == tokens and hessian.total == pytest.approx(expected.total, rel=tolerance)
        for own in ("sum", "cross", "gap"):
            if getattr(expected, own) is not None:
                difference = host(getattr(hessian, own)) - getattr(expected, own)
                assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(getattr(expected, own)), (name, own)
