"""The whole quantizer on small models of random weights: what it writes, that a kill costs nothing, what it refuses."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers

from cupyq import load_model
from cupyq.cli import main
from cupyq.errors import FormatError, UnsupportedError
from cupyq.formats.exl2 import dequantize_exl2
from cupyq.formats.gptq import dequantize_gptq
from cupyq.formats.safetensors import Checkpoint
from cupyq.layers import Linear
from cupyq.quantize import choice, gather, job, measurement, quantization, work, writer
from cupyq.quantize.allocate import allocate
from cupyq.quantize.calibration import calibration_rows
from cupyq.quantize.hessian import Hessian
from cupyq.quantize.job import quantize_model
from cupyq.quantize.layouts import MENU as DEFAULT_MENU
from cupyq.quantize.layouts import Layout
from cupyq.quantize.linear import quantize_linear
from cupyq.quantize.recording import layer_inputs
from cupyq.quantize.report import LinearReport, read_report
from cupyq.quantize.sensitivity import sensitivity
from cupyq.quantize.walk import LayerWalk

MENU = tuple(map(Layout.parse, ("2g64", "3g32", "4g32", "8x.5g32+6x.5g32")))
HIDDEN, INNER, VOCAB, LAYERS, EXPERTS = 64, 96, 128, 2, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "num_hidden_layers": 1}


def weights(config):
    """{name: array} of random weights whose outputs neither vanish nor grow."""
    numbers = np.random.default_rng(3)
    tensors = {"model.embed_tokens.weight": numbers.standard_normal((VOCAB, HIDDEN)), "model.norm.weight": np.ones(HIDDEN)}

    def matrix(name, k, n, bias=False):
        scale = np.exp(0.5 * numbers.standard_normal(k))  # inputs that matter more than others
        tensors[f"{name}.weight"] = numbers.standard_normal((n, k)) * scale / math.sqrt(k)
        if bias:
            tensors[f"{name}.bias"] = numbers.standard_normal(n) * 0.1

    is_mixture, has_bias = "num_local_experts" in config, "Qwen2" in config["architectures"][0]
    for layer in range(config["num_hidden_layers"]):
        key = f"model.layers.{layer}"
        for name, n in (("q", 64), ("k", 32), ("v", 32)):
            matrix(f"{key}.self_attn.{name}_proj", HIDDEN, n, has_bias)
        matrix(f"{key}.self_attn.o_proj", 64, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{key}.{norm}.weight"] = 1 + 0.1 * numbers.standard_normal(HIDDEN)
        if is_mixture:
            matrix(f"{key}.block_sparse_moe.gate", HIDDEN, EXPERTS)
        experts = [f"{key}.block_sparse_moe.experts.{i}" for i in range(EXPERTS)] if is_mixture else [f"{key}.mlp"]
        gate, up, down = ("w1", "w3", "w2") if is_mixture else ("gate_proj", "up_proj", "down_proj")
        for expert in experts:
            matrix(f"{expert}.{gate}", HIDDEN, INNER)
            matrix(f"{expert}.{up}", HIDDEN, INNER)
            matrix(f"{expert}.{down}", INNER, HIDDEN)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", HIDDEN, VOCAB)
    return {name: array.astype(np.float16) for name, array in tensors.items()}


def write_source(folder, **changes):
    config = CONFIG | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    writer.save_tensors(folder / "model.safetensors", weights(config))
    writer.save_tensors(folder / "golden.safetensors", {"logits": np.zeros(3, np.float32)})
    return with_text(folder, VOCAB)


def with_text(folder, vocab):
    """The folder with a tokenizer, and a text beside it."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = random.Random(1)
    (folder.parent / "text.txt").write_text(" ".join(f"w{words.randrange(vocab)}" for _ in range(1500)))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("llama") / "in")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("mixtral") / "in", **MIXTRAL)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("qwen") / "in", **QWEN)


def quantize(source, out, bits=4.5, **options):
    options = {"rows": 6, "length": 32, "backend": "numpy", "menu": MENU, "windows": 2} | options
    return quantize_model(source, out, bits=bits, calibration=source.parent / "text.txt", **options)


@pytest.fixture(scope="module")
def done(llama, tmp_path_factory):
    """(folder, Result) of an undisturbed run."""
    out = tmp_path_factory.mktemp("done") / "out"
    return out, quantize(llama, out)


def digest(folder):
    """One SHA-256 over names and bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def weight_of(folder, name):
    """float32 [K, N] of a linear layer of an EXL2, GPTQ or unquantized checkpoint, by the formats' own decoders."""
    with Checkpoint(folder) as checkpoint:
        tensors = {n.rpartition(".")[2]: checkpoint.array(n) for n in checkpoint.names if n.rpartition(".")[0] == name}
    if "q_weight" in tensors:
        return dequantize_exl2(tensors).astype(np.float32)
    if "qweight" in tensors:
        return dequantize_gptq(tensors).astype(np.float32)
    return tensors["weight"].astype(np.float32).T


# --- what is written --------------------------------------------------------------------------------------------------


def test_an_exl2_model(llama, done):
    out, result = done
    model, plain = load_model(out, "numpy"), load_model(llama, "numpy")
    assert model.format == "exl2" and len(list(model.linear_layers())) == 7 * LAYERS + 1
    assert 4.2 < model.bits_per_weight <= 4.5 and result.bits_per_weight == model.bits_per_weight
    by_name = {layer.name: layer for layer in model.linear_layers()}
    assert [layer.name for layer in result.layers] == list(by_name)
    for layer in result.layers:
        assert layer.storage_bits == by_name[layer.name].storage_bits and (layer.k, layer.n) == by_name[layer.name].shape
        assert layer.tokens == 6 * 32 and 0 < layer.relative_error < 0.4
    assert by_name["lm_head"].bits_per_weight > 6
    ids = np.arange(40).reshape(2, 20)
    error = model.forward(ids) - plain.forward(ids)
    assert 0.001 < np.square(error).mean() / np.square(plain.forward(ids)).mean() < 0.2
    assert {path.name for path in out.iterdir()} == {
        "config.json", "output.safetensors", "tokenizer.json", "measurement.json",
        "quantization.json", "quantization.md", "quantization.svg",
    }  # fmt: skip
    with Checkpoint(llama) as before, Checkpoint(out) as after:
        assert "logits" not in after and not any(name.endswith("proj.weight") for name in after.names)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
            assert np.array_equal(before.array(name), after.array(name))


def test_what_the_report_says_is_so(llama, done, monkeypatch):
    """Errors are of the walk in which x is what the quantized model feeds a layer and of the weights that make up for it."""
    out, result = done
    ids = calibration_rows(llama.parent / "text.txt", llama, rows=6, length=32, seed=0)
    key = "model.layers.1.self_attn"
    names = [layer.name for layer in result.layers if layer.name != "lm_head"]
    found = []
    for source in (llama, out):
        model = load_model(llama, "numpy")
        for linear in (linear for layer in model.layers for linear in layer.linears()):
            linear.weight = np.ascontiguousarray(weight_of(source, linear.name).T)
        calls = listened(monkeypatch, model, ids)
        layers, model.layers = model.layers, model.layers[:1]
        start = model.hidden(model.checked_ids(ids), hidden_step(model, len(ids))).reshape(-1, HIDDEN).astype(np.float64)
        model.layers = layers
        found.append((calls, start))
    (original, start), (quantized, other) = found
    middle = start + original[f"{key}.o_proj"] @ weight_of(llama, f"{key}.o_proj").astype(np.float64)
    reports = {layer.name: layer for layer in result.layers}
    assert reports.keys() == {*names, "lm_head"}
    for name, residual, gap in (("k_proj", start, 0.0), ("o_proj", middle, 0.5 * (start - other))):
        x, source = quantized[f"{key}.{name}"], original[f"{key}.{name}"]
        w, q = (weight_of(folder, f"{key}.{name}").astype(np.float64) for folder in (llama, out))
        weights = 1 / (np.square(residual).mean(axis=1, keepdims=True) + CONFIG["rms_norm_eps"])
        weights /= weights.mean()
        report = reports[f"{key}.{name}"]
        output = (weights[:, 0] * np.square(x @ w).sum(axis=1)).mean()
        assert report.output == pytest.approx(output, rel=2e-3)
        assert report.output != pytest.approx(np.square(x @ w).sum(axis=1).mean(), rel=2e-3)
        assert report.output != pytest.approx((weights[:, 0] * np.square(source @ w).sum(axis=1)).mean(), rel=2e-3)
        hessian = x.T @ (weights * x) / len(x)
        ridge = 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        corrected = w + (1 - HIDDEN / len(x)) * np.linalg.solve(
            hessian + ridge, x.T @ (weights * ((source - x) @ w + gap)) / len(x)
        )
        errors = [(weights[:, 0] * np.square(x @ (target - q)).sum(axis=1)).mean() for target in (corrected, w)]
        assert report.error == pytest.approx(errors[0], rel=2e-3) and errors[0] < 0.99 * errors[1]
        # What all this is for: outputs nearer to those of the original.
        plain = np.square(x @ (w - q)).sum(axis=1).mean()
        assert np.square(x @ q - source @ w).sum(axis=1).mean() != pytest.approx(plain, rel=1e-3)
    # The head makes up for its inputs too; its tokens all count the same.
    # It reads residuals, after a norm whose weights are 1.
    x, source = (
        h / np.sqrt(np.square(h).mean(axis=1, keepdims=True) + CONFIG["rms_norm_eps"])
        for h in (quantized["lm_head"], original["lm_head"])
    )
    w, q = (weight_of(folder, "lm_head").astype(np.float64) for folder in (llama, out))
    hessian = x.T @ x / len(x)
    ridge = 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    corrected = w + (1 - HIDDEN / len(x)) * np.linalg.solve(hessian + ridge, x.T @ (source - x) @ w / len(x))
    assert reports["lm_head"].output == pytest.approx(np.square(x @ w).sum(axis=1).mean(), rel=2e-3)
    assert reports["lm_head"].error == pytest.approx(np.square(x @ (corrected - q)).sum(axis=1).mean(), rel=2e-3)
    comparison = result.comparison
    assert comparison.tokens == 2 * 31 and 0 < comparison.kl < 0.5 and comparison.text == "calibration text"


def listened(monkeypatch, model, ids):
    """{name: what a linear layer reads, float64 [tokens, K]}"""
    calls, real = {}, Linear.__call__

    def call(linear, x, *arguments, **options):
        calls[linear.name] = x.reshape(-1, x.shape[-1]).astype(np.float64)
        return real(linear, x, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__call__", call)
        model.forward(ids)
    return calls


def hidden_step(model, rows):
    from cupyq.layers import Step

    return Step(model.sin, model.cos, np.zeros(rows, np.int32))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Models of as many tokens as it takes for what is fitted to them to hold for others: {what is left out: KL}."""
    source = write_source(tmp_path_factory.mktemp("fitted") / "in")
    words = random.Random(2)
    (source.parent / "text.txt").write_text(" ".join(f"w{words.randrange(VOCAB)}" for _ in range(9000)))
    (source.parent / "other.txt").write_text(" ".join(f"w{words.randrange(VOCAB)}" for _ in range(1500)))
    found, measured = {}, None

    def run(name):
        nonlocal measured
        options = {"rows": 100, "length": 64, "windows": 12, "evaluate": source.parent / "other.txt"}
        result = quantize(source, source.parent / name, bits=3.3, measurement=measured, **options)
        measured = source.parent / name / "measurement.json"
        found[name] = result.comparison.kl

    run("nothing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "SWEEPS", 0)
        run("sweeps")
        patch.setattr(gather, "gather_beside", lambda walk, layer, reads, hidden, *_: gather.gather(walk, layer, reads, hidden))
        patch.setattr(LayerWalk, "record_head", one_walk_head(LayerWalk.record_head))
        run("sweeps and correction")
    return found


def one_walk_head(real):
    return lambda walk, head, hidden, feed, original=None: real(walk, head, hidden, feed)


def test_every_part_of_the_recipe_pays(fitted):
    """On text that was not calibrated on."""
    assert fitted["nothing"] < fitted["sweeps"] < 0.9 * fitted["sweeps and correction"]


def test_the_same_bytes_again_and_others_for_another_seed(llama, done, tmp_path):
    out, _ = done
    quantize(llama, tmp_path / "again", progress=False, batch_tokens=4096)
    assert digest(tmp_path / "again") == digest(out)
    quantize(llama, tmp_path / "seed", seed=1, measurement=out / "measurement.json", windows=0)
    assert digest(tmp_path / "seed") != digest(out)
    with Checkpoint(tmp_path / "seed") as a, Checkpoint(out) as b:
        assert any(not np.array_equal(a.array(name), b.array(name)) for name in b.names if name.endswith("q_weight"))


def test_the_budget_is_kept_and_used(llama, done, tmp_path):
    """With the measurement of another run, which gives what measuring gives."""
    out, _ = done
    weights = sum(k * n for k, n in (layer.shape for layer in load_model(llama, "numpy").linear_layers())) - HIDDEN * VOCAB
    kls = []
    for bits in (3.2, 4.5, 6.5):
        result = quantize(llama, tmp_path / str(bits), bits=bits, measurement=out / "measurement.json")
        kls.append(result.comparison.kl)
        spare = (bits - result.bits_per_weight) * weights
        assert 0 <= spare < max(b - a for a, b in steps())
    assert kls == sorted(kls, reverse=True) and kls[0] > 4 * kls[2]
    with Checkpoint(tmp_path / "4.5") as found, Checkpoint(out) as expected:
        for name in expected.names:
            assert np.array_equal(found.array(name), expected.array(name)), name
    assert (tmp_path / "4.5/measurement.json").read_bytes() == (out / "measurement.json").read_bytes()


def steps():
    """Neighbouring sizes of the options of each linear layer: an unused remainder is less than the largest step."""
    for k, n in ((HIDDEN, 64), (HIDDEN, 32), (HIDDEN, INNER), (INNER, HIDDEN)):
        sizes = sorted(layout.storage_bits(k, n) for layout in MENU)
        yield from zip(sizes, sizes[1:], strict=False)


def test_biases_and_a_tied_head(qwen, tmp_path):
    result = quantize(qwen, tmp_path / "out", bits=5)
    model, plain = load_model(tmp_path / "out", "numpy"), load_model(qwen, "numpy")
    assert model.bits_per_weight == result.bits_per_weight <= 5
    assert model.head.kind == "exl2" and model.head.n == VOCAB
    with Checkpoint(tmp_path / "out") as found, Checkpoint(qwen) as source:
        assert "lm_head.q_weight" in found and "lm_head.weight" not in found
        for name in ("model.layers.0.self_attn.k_proj.bias", "model.embed_tokens.weight"):
            assert found.array(name).dtype == np.float16 and np.array_equal(found.array(name), source.array(name))
    ids = np.arange(16)
    assert np.square(model.forward(ids) - plain.forward(ids)).mean() < 0.05 * np.square(plain.forward(ids)).mean()


def test_a_mixture_of_experts(mixtral, tmp_path, monkeypatch):
    result = quantize(mixtral, tmp_path / "out", bits=5)
    model = load_model(tmp_path / "out", "numpy")
    assert model.bits_per_weight == result.bits_per_weight <= 5
    experts = {layer.name: layer for layer in result.layers if ".experts." in layer.name}
    assert len(experts) == 12
    tokens = [experts[f"model.layers.0.block_sparse_moe.experts.{i}.w1"].tokens for i in range(4)]
    assert sum(tokens) == 6 * 32 and min(tokens) < HIDDEN  # one token, one expert: some Hessians are singular
    assert all(layer.relative_error < 0.5 for layer in experts.values())
    assert model.layers[0].mlp.router.kind == "float16"  # kept as it is
    # Hessians that do not all fit are gathered in turns, but for what is lent, of another order of sums, the same.
    monkeypatch.setattr(gather, "lend", lambda hessian, loan: None)
    quantize(mixtral, tmp_path / "once", bits=5, windows=0)
    monkeypatch.setattr(gather, "HESSIAN_BYTES", 8 * HIDDEN**2)
    quantize(mixtral, tmp_path / "turns", bits=5, windows=0)
    assert digest(tmp_path / "once") == digest(tmp_path / "turns") != digest(tmp_path / "out")


def expert_rows(source):
    """(walk, layer, hidden, inputs of its experts, {name: what each reads, float64}) of one walk over the text."""
    ids = calibration_rows(source.parent / "text.txt", source, rows=6, length=32, seed=0)
    walk = LayerWalk(source, "numpy")
    hidden = walk.embed(ids)
    _, layer = next(walk.layers())
    reads = [read for read in layer_inputs(layer) if read.expert is not None]
    rows = {read.name: [np.empty((0, read.k), np.float32)] for read in reads}
    walk.record(layer, hidden, {name: (lambda x, own=own: own.append(x.copy())) for name, own in rows.items()})
    return walk, layer, hidden, reads, {name: np.concatenate(own).astype(np.float64) for name, own in rows.items()}


def test_what_experts_are_lent(mixtral, monkeypatch):
    """K tokens of the mean of all that gates read; of what last projections read, whose features have nothing in common, K of
    the mean square. The same where not all Hessians are in memory together."""
    walk, layer, hidden, reads, rows = expert_rows(mixtral)
    for bytes_at_once in (1 << 30, 1):
        monkeypatch.setattr(gather, "HESSIAN_BYTES", bytes_at_once)
        chunks = gather.chunks(reads)
        assert len(chunks) == (1 if bytes_at_once > 1 else len(reads))
        loans = gather.find_loans(walk, layer, reads, hidden) if len(chunks) > 1 else None
        for chunk in chunks:
            for name, (hessian, tokens) in gather.gather(walk, layer, chunk, hidden, loans).items():
                (read,) = (read for read in reads if read.name == name)
                x, k = rows[name], read.k
                every = np.concatenate([rows[each.name] for each in reads if each.attribute == read.attribute])
                mean = every.T @ every / len(every)
                if read.attribute == "down":
                    mean = np.eye(k) * np.trace(mean) / k
                assert (tokens, hessian.tokens, hessian.total) == (len(x), len(x) + k, len(x) + k)
                assert np.allclose(hessian.sum, x.T @ x + k * mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 8, 16])
def test_experts_of_few_tokens_are_no_worse_than_rounded(mixtral, count):
    """On tokens that they were not calibrated on, against weights rounded to the nearest level: what no tokens at all lead to.
    Fitted to their own tokens alone they would be much worse."""
    _, _, _, reads, rows = expert_rows(mixtral)
    errors = {"lent": 0.0, "own": 0.0, "rounded": 0.0}
    for read in reads:
        others = [rows[each.name] for each in reads if each.attribute == read.attribute and each is not read]
        x = np.concatenate(others) if read.attribute != "down" else rows[read.name]
        used = x[:count].astype(np.float32)
        weight, layout, new = read.linears[0].weight.T, Layout.parse("3g32"), x[count:]
        for name in errors:
            hessian = Hessian(read.k)
            if name != "rounded" and count:
                hessian.add(used)
            if name == "lent":
                squares = new.T @ new / len(new)
                gather.lend(hessian, float(np.trace(squares)) / read.k if read.attribute == "down" else squares)
            quantized = quantize_linear(weight, hessian.prepare(), layout)
            off = np.square(new @ (weight - quantized.values)).sum() / np.square(new @ weight).sum()
            errors[name] += off / len(reads)
    assert errors["lent"] < 1.02 * errors["rounded"]
    assert count in (0, 1) or errors["own"] > 1.2 * errors["rounded"]


@pytest.mark.parametrize("seen", [0, 1])
def test_an_expert_that_hardly_saw_a_token(mixtral, tmp_path, monkeypatch, seen):
    """From end to end: its outputs are as near the source's as rounding alone would bring them, and its error is known."""
    real = LayerWalk.record

    def record(walk, layer, hidden, feeds):
        counts = dict.fromkeys(feeds, 0)

        def few(name, x):
            x = x[: max(0, seen - counts[name])] if ".experts.2." in name else x
            counts[name] += len(x)
            if len(x):
                feeds[name](x)

        real(walk, layer, hidden, {name: partial(few, name) for name in feeds})
        return counts

    _, _, _, _, inputs = expert_rows(mixtral)
    monkeypatch.setattr(LayerWalk, "record", record)
    result = quantize(mixtral, tmp_path / "out", bits=6, windows=0)
    layers = [layer for layer in result.layers if ".experts.2." in layer.name]
    assert len(layers) == 3 and all(layer.tokens == seen for layer in layers)
    for layer in layers:
        w, q = weight_of(mixtral, layer.name), weight_of(tmp_path / "out", layer.name)
        rounded = quantize_linear(w, Hessian(layer.k).prepare(), Layout.parse(layer.layout)).values
        x = inputs[layer.name.replace("w3", "w1")]
        assert 0 < np.square(x @ (w - q)).sum() < 1.02 * np.square(x @ (w - rounded)).sum(), layer.name
        assert 0 < layer.relative_error < 0.5 and layer.nats > 0


def plain_gptq(x, w, bits, size, is_symmetric, act_order):
    """[K, N]: GPTQ as its paper has it, by the inverse of H, in float64; a group's scales are of its extremes as they stand."""
    k, most = len(w), 2**bits - 1
    hessian = x.T @ x / len(x)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    hessian = hessian[order][:, order] + 0.01 * np.diag(hessian).mean() * np.eye(k)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rows, values = w[order].astype(np.float64), np.empty(w.shape)
    for i in range(k):
        if i % size == 0:
            group = rows[i : i + size]
            high, low = np.maximum(group.max(axis=0), 0), np.minimum(group.min(axis=0), 0)
            if is_symmetric:
                high = np.maximum(high, -low)
                low = -high
            scale = ((high - low) / most).astype(np.float16).astype(np.float64)
            zero = np.full(w.shape[1], 2.0 ** (bits - 1)) if is_symmetric else np.rint(-low / scale)
        values[i] = (np.clip(np.rint(rows[i] / scale) + zero, 0, most) - zero) * scale
        rows[i:] -= factor[i, i:, None] * (rows[i] - values[i]) / factor[i, i]
    unordered = np.empty_like(values)
    unordered[order] = values
    return unordered


def plain_gptq_model(source, ids, monkeypatch, *options):
    """(logits, {name: squared output error as a share of the output}) of a model rounded by `plain_gptq`, layer after layer."""
    model, errors = load_model(source, "numpy"), {}
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        for stage in ((attention.q, attention.k, attention.v), (attention.o,), (mlp.gate, mlp.up), (mlp.down,)):
            calls = listened(monkeypatch, model, ids)
            for linear in stage:
                x, w = calls[linear.name], linear.weight.T.astype(np.float64)
                q = plain_gptq(x, w, *options)
                errors[linear.name] = np.square(x @ (w - q)).sum() / np.square(x @ w).sum()
                linear.weight = np.ascontiguousarray(q.T.astype(np.float32))
    return model.forward(ids), errors


@pytest.mark.parametrize(
    ("bits", "group_size", "is_symmetric", "act_order"),
    [(4, 32, True, False), (3, 64, False, True), (8, -1, True, True), (2, 160, False, False)],
)
def test_a_gptq_model(llama, tmp_path, monkeypatch, bits, group_size, is_symmetric, act_order):
    """Better than plain GPTQ, in its layers and in what they come to together."""
    options = {"group_size": group_size, "is_symmetric": is_symmetric, "act_order": act_order}
    result = quantize(llama, tmp_path / "out", bits=bits, format="gptq", windows=0, **options)
    model = load_model(tmp_path / "out", "numpy")
    kinds = [layer.kind for layer in model.linear_layers()]
    assert kinds == ["gptq"] * 7 * LAYERS + ["float16"]
    assert result.bits_per_weight == model.bits_per_weight
    assert model.config.quantization.bits == bits
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert config["sym"] == is_symmetric and config["group_size"] == group_size and config["desc_act"] == act_order
    ids = calibration_rows(llama.parent / "text.txt", llama, rows=6, length=32, seed=0)
    size = group_size if group_size > 0 else max(HIDDEN, INNER)
    logits, errors = plain_gptq_model(llama, ids, monkeypatch, bits, size, is_symmetric, act_order)
    shares = {layer.name: layer.relative_error**2 for layer in result.layers}
    assert shares.keys() == errors.keys() and 0 < sum(shares.values()) < sum(errors.values())
    expected = load_model(llama, "numpy").forward(ids)
    assert 0 < np.square(model.forward(ids) - expected).sum() < np.square(logits - expected).sum()
    with Checkpoint(tmp_path / "out") as found, Checkpoint(llama) as source:
        assert np.array_equal(found.array("lm_head.weight"), source.array("lm_head.weight"))


@pytest.mark.parametrize("options", [{"bits": 3.5}, {"bits": 3, "format": "gptq", "group_size": 32}])
def test_sweeps_are_made_in_both_formats(qwen, tmp_path, monkeypatch, options):
    errors = []
    for sweeps in (quantization.SWEEPS, 0):
        monkeypatch.setattr(quantization, "SWEEPS", sweeps)
        layers = quantize(qwen, tmp_path / str(sweeps), windows=0, **options).layers
        # Their inputs do not depend on what was quantized before.
        errors.append([layer.error for layer in layers if layer.name.endswith(("q_proj", "k_proj", "v_proj"))])
    assert len(errors[0]) == 3 and all(swept < plain for swept, plain in zip(*errors, strict=True))


def test_few_measured_layouts(llama, done, tmp_path):
    """The errors of the others lie on the line between logarithms; the choice is nearly as good."""
    out, full = done
    result = quantize(llama, tmp_path / "out", measured_layouts=3)
    data = json.loads((tmp_path / "out/measurement.json").read_text())
    every = json.loads((out / "measurement.json").read_text())
    for name, entry in data["linears"].items():
        assert entry["options"].keys() == {"2g64", "3g32", "8x.5g32+6x.5g32"}
        assert all(error == every["linears"][name]["options"][layout] for layout, error in entry["options"].items())
    found = measurement.Measurement(MENU, data["linears"], "nats", "")
    name = "model.layers.0.mlp.up_proj"
    sizes = [layout.storage_bits(HIDDEN, INNER) for layout in MENU]
    options, entry = found._options(name, sizes), data["linears"][name]
    low, high = (math.log(entry["options"][MENU[i].name]) for i in (1, 3))
    between = low + (high - low) * (sizes[2] - sizes[1]) / (sizes[3] - sizes[1])
    assert [bits for bits, _ in options] == sizes
    assert options[2][1] == pytest.approx(entry["weight"] * math.exp(between))
    assert result.comparison.kl < 1.5 * full.comparison.kl


def test_errors_count_by_what_they_do_to_the_predictions(llama, done):
    """Numbers of `sensitivity` on the calibration tokens."""
    out, _ = done
    data = json.loads((out / "measurement.json").read_text())
    ids = calibration_rows(llama.parent / "text.txt", llama, rows=6, length=32, seed=0)
    with LayerWalk(llama, "numpy") as walk:
        expected = sensitivity(walk, ids, seed=0)
    assert {name: entry["weight"] for name, entry in data["linears"].items()} == expected


def test_experts_count_for_the_tokens_they_get():
    """And for one where there were none: bits that nobody misses are better spent on them than on nothing."""
    linears = {"a": {"tokens": 10, "output": 4.0}, "b": {"tokens": 40, "output": 2.0}, "c": {"tokens": 0, "output": 0.0}}
    found = measurement.weighted(linears, 40, {"a": 3.0, "b": 5.0, "c": 7.0})
    assert [entry["weight"] for entry in found.values()] == [0.75, 5, pytest.approx(7 / 40)]
    found = measurement.weighted(linears, 40, None)
    assert [entry["weight"] for entry in found.values()] == [1 / 16, 1 / 2, 0]
    assert "weight" not in linears["a"] and found["b"]["output"] == 2


def test_the_choice_is_the_knapsack_s(llama, tmp_path):
    """Weights of errors: 1 / mean square of the output. The layouts written are those of `allocate`."""
    out, result = tmp_path / "out", quantize(llama, tmp_path / "out", sensitivity_tokens=0, windows=0)
    data = json.loads((out / "measurement.json").read_text())
    options = []
    for layer in result.layers[:-1]:
        entry = data["linears"][layer.name]
        assert entry["weight"] == pytest.approx(1 / entry["output"])
        errors = [entry["options"][layout.name] / entry["output"] for layout in MENU]
        assert errors == sorted(errors, reverse=True)
        options.append([(x.storage_bits(layer.k, layer.n), e) for x, e in zip(MENU, errors, strict=True)])
    found = allocate(options, int(4.5 * sum(layer.k * layer.n for layer in result.layers[:-1])))
    assert [MENU[choice].name for choice in found.choice] == [layer.layout for layer in result.layers[:-1]]


# --- killed and resumed -----------------------------------------------------------------------------------------------


def command(source, out, *more):
    text = str(source.parent / "text.txt")
    arguments = ["quantize", str(source), str(out), "--bits", "4.5", "--calibration", text, "--rows", "6", "--length", "32"]
    return [*arguments, "--backend", "numpy", "--windows", "2", "--measured-layouts", "4", *more]


def test_killed_at_random_moments(qwen, tmp_path):
    """kill -9 of a process, wherever it is: the resumed run writes the same bytes as one that nobody disturbed."""
    assert main(command(qwen, tmp_path / "calm")) == 0
    moments = random.Random(os.getpid())
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kills = []
    for files in (1, moments.randrange(2, 8), moments.randrange(8, 14)):
        child = subprocess.Popen(
            [sys.executable, "-m", "cupyq", *command(qwen, out, *["--resume"] * partial.exists())],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT,
        )  # fmt: skip
        while child.poll() is None and len([path for path in partial.rglob("*") if path.is_file()]) <= files:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        _, errors = child.communicate()
        kills.append((files, child.returncode))
        assert child.returncode in (0, -signal.SIGKILL), errors.decode()
        assert out.exists() == (child.returncode == 0) or partial.exists()
    assert kills[0][1] == -signal.SIGKILL
    assert main(command(qwen, out, "--resume")) == 0
    assert digest(out) == digest(tmp_path / "calm"), kills
    assert not partial.exists()


class Killed(BaseException):
    pass


def test_killed_at_every_kind_of_file(llama, done, tmp_path, monkeypatch):
    """In this process, so that the moment is exact: just before and just after a file gets its name."""
    out, result = done
    real = os.replace
    state = {"count": 0, "stop": None, "after": False}

    def replace(a, b):
        if str(a).startswith(str(tmp_path)):
            state["count"] += 1
            if state["count"] == state["stop"] and not state["after"]:
                raise Killed
        real(a, b)
        if str(a).startswith(str(tmp_path)) and state["count"] == state["stop"]:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    # job.json, 2 measured layers, measurement.json, 15 linear layers, shard, tokenizer, config, ..., the folder itself
    moments = ((1, False), (2, True), (1, True), (1, True), (4, False), (9, True), (2, True), (1, False), (6, False))
    for stop, after in moments:
        state.update(count=0, stop=stop, after=after)
        with pytest.raises(Killed):
            quantize(llama, tmp_path / "out", resume=True)
    state["stop"] = None
    resumed = quantize(llama, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(out)
    assert resumed.layers == result.layers and resumed.comparison == result.comparison


def test_killed_before_the_working_folder_is_gone(llama, done, tmp_path, monkeypatch):
    out = shutil.copytree(done[0], tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    monkeypatch.setattr(choice, "measure_input", None)  # nothing is computed again
    resumed = quantize(llama, out, resume=True)
    assert resumed.layers == done[1].layers and not (tmp_path / "out.partial").exists()
    assert digest(out) == digest(done[0])
    with pytest.raises(ValueError, match="begun with bits 4.5, not 5"):
        quantize(llama, out, bits=5, resume=True)


@pytest.fixture
def begun(llama, tmp_path, monkeypatch):
    """The folder of a run that ended after its settings were noted."""

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(choice, "measured", stop)
        quantize(llama, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bits": 4}, "bits 4.5, not 4"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"head_bits": 8}, "head_bits 6, not 8"),
        ({"rows": 5}, "rows 6, not 5"),
        ({"damping": 0.02}, "damping 0.01, not 0.02"),
        ({"menu": MENU[:3] + (Layout.parse("8g32"),)}, "menu"),
        ({"format": "gptq", "bits": 4}, "format"),
        ({"batch_tokens": 64}, "batch_tokens 4096, not 64"),
    ],
)
def test_resuming_with_other_settings(llama, begun, changes, what):
    with pytest.raises(ValueError, match=rf"out\.partial was begun with {what}.*or delete it"):
        quantize(llama, begun, resume=True, **changes)
    with pytest.raises(ValueError, match="pass --resume"):
        quantize(llama, begun)


def test_resuming_with_other_weights(llama, begun, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other" / "in")
    shutil.copy(llama.parent / "text.txt", tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="begun with source_sha256"):
        quantize(other, begun, resume=True)


def test_two_processes_do_not_work_in_one_folder(llama, begun):
    folder = work.WorkFolder(begun)
    with folder.locked(), pytest.raises(ValueError, match="another process is at work"):
        quantize(llama, begun, resume=True)


def test_tensors_that_stand_for_other_weights_are_not_written(llama, tmp_path, monkeypatch):
    real = quantization.quantize_linear

    def wrong(*arguments, **options):
        quantized = real(*arguments, **options)
        quantized.tensors["q_weight"][0, 0] ^= 1
        return quantized

    monkeypatch.setattr(quantization, "quantize_linear", wrong)
    with pytest.raises(RuntimeError, match="q_proj.*do not stand for"):
        quantize(llama, tmp_path / "out", measurement=None, menu=MENU[:2], bits=3)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob("linears/*"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"bits": 1.5}, r"bits must be from \d\.\d{3} to \d\.\d{3} .* got 1\.5"),
        ({"bits": 9.0}, r"bits must be from \d\.\d{3} to \d\.\d{3} .* got 9"),
        ({"bits": 0}, "bits must be a number above 0"),
        ({"bits": math.nan}, "bits must be a number above 0"),
        ({"bits": 3.5, "format": "gptq"}, "2, 3, 4 or 8 for GPTQ, got 3.5"),
        ({"bits": 4, "format": "gptq", "group_size": 48}, "group_size must be a multiple of 32"),
        ({"bits": 4, "format": "gptq", "group_size": 64.0}, "group_size must be a multiple of 32.*got 64.0"),
        ({"format": "awq"}, "format must be"),
        ({"head_bits": 7}, "head_bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"rows": 0}, "rows must be a whole number of at least 1"),
        ({"length": 100}, "length must be at most 64, the model's context"),
        ({"rows": 60, "length": 64}, "1500 tokens, but 60 rows of 64 need 3840"),
        ({"menu": ()}, "menu is empty"),
        ({"menu": (*MENU, Layout.parse("8x.1g32+4x.9g160"))}, "menu: layout .* groups of 160 rows.* at most 128: take smaller"),
        ({"measured_layouts": 1}, "measured_layouts must be a whole number of at least 2"),
        ({"damping": -1.0}, "damping must be"),
        ({"backend": "tpu"}, "backend must be"),
    ],
)
def test_bad_arguments(llama, tmp_path, options, what):
    with pytest.raises(ValueError, match=what):
        quantize(llama, tmp_path / "out", **{"bits": 4.0} | options)
    assert list(tmp_path.iterdir()) == []


def test_the_range_of_bits_is_what_the_menu_reaches(llama, tmp_path):
    with pytest.raises(ValueError) as error:
        quantize(llama, tmp_path / "out", bits=1.5)
    low, high = map(float, re.findall(r"\d\.\d{3}", str(error.value)))
    for bits in (low, high):
        result = quantize(llama, tmp_path / f"out{bits}", bits=bits, windows=0)
        assert bits - 0.001 <= result.bits_per_weight <= bits


def damaged(source, folder, name, change):
    copy = shutil.copytree(source, folder / "damaged")
    shutil.copy(source.parent / "text.txt", folder)
    with Checkpoint(copy) as checkpoint:
        files = [file for file in checkpoint.files if file.path.name == "model.safetensors"]
        tensors = {each: files[0].array(each).copy() for each in files[0].names}
    change(tensors)
    writer.save_tensors(copy / "model.safetensors", tensors)
    return copy


def test_bad_models(llama, tmp_path, done):
    def nan(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 2] = np.nan

    def cut(tensors):
        del tensors["model.layers.1.mlp.down_proj.weight"]

    for number, (change, what) in enumerate(
        ((nan, r"down_proj.weight': NaN at \[3, 2\]"), (cut, "down_proj.weight' is missing"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = damaged(llama, folder, "x", change)
        with pytest.raises(FormatError, match=what):
            quantize(source, folder / "out")
        assert not (folder / "out.partial").exists()
    half = shutil.copytree(llama, tmp_path / "half" / "in")
    shutil.copy(llama.parent / "text.txt", tmp_path / "half")
    data = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(data[: len(data) // 2])  # an interrupted download
    with pytest.raises(FormatError, match="model.safetensors.*download or convert it again"):
        quantize(half, tmp_path / "half/out")
    (tmp_path / "text.txt").write_text("w1")
    again = shutil.copytree(done[0], tmp_path / "again")
    with pytest.raises((FormatError, UnsupportedError), match="quantized already"):
        quantize(again, tmp_path / "out")


def test_sizes_that_cannot_be_quantized(tmp_path):
    source = write_source(tmp_path / "in", intermediate_size=INNER, head_dim=8, num_hidden_layers=1)
    assert source.exists()
    with pytest.raises(FormatError, match="shape"):
        quantize(source, tmp_path / "out")  # tensors of head_dim 16
    config = json.loads((source / "config.json").read_text()) | {"head_dim": 8}
    tensors = weights(CONFIG | {"num_hidden_layers": 1})
    for name, n in (("q", 32), ("k", 16), ("v", 16)):
        key = f"model.layers.0.self_attn.{name}_proj.weight"
        tensors[key] = np.ascontiguousarray(tensors[key][:n])
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.ones((HIDDEN, 32), np.float16)
    writer.save_tensors(source / "model.safetensors", tensors)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="k_proj is a matrix of 64 x 16, expected multiples of 32"):
        quantize(source, tmp_path / "out")


def test_tensors_that_could_not_be_written(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "in")
    shutil.copy(llama.parent / "text.txt", tmp_path)
    with Checkpoint(llama) as checkpoint:
        tensors = {name: checkpoint.array(name) for name in checkpoint.names if name != "logits"}
    safetensors.numpy.save_file(tensors | {"counter": np.zeros(1, np.int64)}, source / "model.safetensors")
    with pytest.raises(FormatError, match="'counter': dtype int64, expected one of int16"):
        quantize(source, tmp_path / "out")


def test_no_room(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="GB free on its disk"):
        quantize(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"bits": 4.5}, {"bits": 4, "format": "gptq", "group_size": 32}])
def test_room_is_asked_for_as_it_is_needed(llama, tmp_path, monkeypatch, options):
    """For the model, and for its quantized tensors once more in the working folder."""
    asked = []
    monkeypatch.setattr(writer, "check_room", lambda folder, needed, present: asked.append((needed, present)))
    quantize(llama, tmp_path / "out", windows=0, **options)
    with Checkpoint(tmp_path / "out") as checkpoint:
        twice = [name for name in checkpoint.names if not name.endswith("weight") or name.endswith(("q_weight", "qweight"))]
        used = checkpoint.total_bytes(checkpoint.names) + checkpoint.total_bytes(twice)
    assert used <= asked[0][0] < 1.05 * used and asked[0][1] == 0


def test_out_exists(llama, tmp_path):
    (tmp_path / "out").mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists: choose another folder"):
            quantize(llama, tmp_path / "out", resume=resume)
    with pytest.raises(ValueError, match="lies inside IN"):
        quantize(llama, llama / "out")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: data.update(cupyq_measurement=99), "not a measurement of this version"),
        (lambda data: data.update(source_sha256="0"), "measured on a model of other weights"),
        (lambda data: data["linears"].popitem(), "measured on another model, or damaged: .* is not in it"),
        (lambda data: data["linears"].update(more=data["linears"]["model.layers.0.mlp.up_proj"]), "more is not in the model"),
        (lambda data: data["menu"].append("9g64"), "damaged"),
        (lambda data: data["menu"].append("4g256"), "layout '4g256' has groups of 256 rows.*at most 128"),
        (lambda data: data.update(unit="miles"), "unit is 'miles'"),
        (lambda data: data.pop("unit"), "damaged"),
        (lambda data: data["linears"]["model.layers.0.mlp.up_proj"].update(weight=-1), "has -1, expected numbers from 0"),
        (lambda data: data["linears"]["model.layers.0.mlp.up_proj"].update(options={}), "no layout of the menu"),
    ],
)
def test_measurements_of_others(llama, done, tmp_path, change, what):
    """Known before there is a working folder."""
    data = json.loads((done[0] / "measurement.json").read_text())
    change(data)
    path = tmp_path / "measurement.json"
    path.write_text(json.dumps(data))
    with pytest.raises((FormatError, ValueError), match=what):
        quantize(llama, tmp_path / "out", measurement=path, menu=None)
    assert list(tmp_path.iterdir()) == [path]


def test_measurements_that_are_none(llama, done, tmp_path):
    """Known before anything else is looked at: here there is no model either."""
    path = tmp_path / "measurement.json"

    def refused(what):
        with pytest.raises(FormatError, match=what):
            quantize(tmp_path / "no model", tmp_path / "out", measurement=path)

    refused("measurement.json: cannot be opened .No such file or directory.")
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        refused("measurement.json: not JSON")
    path.write_text("[]")
    refused("measurement.json: holds a list, expected a JSON object")
    path.unlink()
    path.mkdir()
    refused("measurement.json: cannot be opened .Is a directory.")
    with pytest.raises(ValueError, match="measurement has no meaning for format 'gptq'"):
        quantize(llama, tmp_path / "out", bits=4, format="gptq", measurement=done[0] / "measurement.json")
    with pytest.raises(ValueError, match="menu: 4g32, but the measurement is of 2g64"):
        quantize(llama, tmp_path / "out", measurement=done[0] / "measurement.json", menu=(Layout.parse("4g32"),))
    assert list(tmp_path.iterdir()) == [path]


def test_the_range_of_bits_is_that_of_the_measured_menu(llama, done, tmp_path):
    """Not of the default menu, which has fewer bits and more."""
    data = json.loads((done[0] / "measurement.json").read_text())
    data["menu"] = ["3g32", "4g32"]
    path = tmp_path / "measurement.json"
    path.write_text(json.dumps(data))
    for bits in (2.9, 7.0):
        with pytest.raises(ValueError, match=r"bits must be from 3\.\d{3} to 4\.\d{3} for this model and menu"):
            quantize(llama, tmp_path / "out", bits=bits, measurement=path, menu=None)
    assert list(tmp_path.iterdir()) == [path]
    result = quantize(llama, tmp_path / "out", bits=4.5, measurement=path, menu=None, windows=0)
    assert {layer.layout for layer in result.layers if layer.name != "lm_head"} == {"3g32", "4g32"}
    settings, _, _ = read_report(tmp_path / "out")
    assert settings["menu"] == ["3g32", "4g32"] != [layout.name for layout in DEFAULT_MENU]


def test_rows_are_spread_over_the_calibration(llama, tmp_path, monkeypatch):
    """Those that sensitivity is measured on, and those that the models are compared on."""
    seen = []
    monkeypatch.setattr(choice, "sensitivity", lambda walk, ids, **_: seen.append(ids) or dict.fromkeys(walk.shapes(), 1.0))
    real = job.compare
    monkeypatch.setattr(job, "compare", lambda *arguments, **options: seen.append(arguments[2]) or real(*arguments, **options))
    quantize(llama, tmp_path / "out", rows=10, sensitivity_tokens=32 * 3 + 31, windows=2, measured_layouts=2)
    ids = calibration_rows(llama.parent / "text.txt", llama, rows=10, length=32, seed=0)
    assert np.array_equal(seen[0], ids[[1, 5, 8]]) and np.array_equal(seen[1], ids[[2, 7]])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_command(llama, done, tmp_path, capsys):
    text = str(llama.parent / "text.txt")
    arguments = [
        "quantize",
        str(llama),
        str(tmp_path / "out"),
        "--bits",
        "4",
        "--calibration",
        text,
        "--rows",
        "2",
        "--length",
        "32",
    ]
    assert (
        main([*arguments, "--format", "gptq", "--group-size", "32", "--asym", "--act-order", "--windows", "1", "--json"]) == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result.keys() == {"bits_per_weight", "seconds", "comparison", "layers"} and result["comparison"]["kl"] > 0
    assert len(result["layers"]) == 7 * LAYERS and result["seconds"] > 0
    assert result["layers"][0].keys() == {"name", "shape", "bits", "layout", "relative_error", "nats"}
    assert "peak memory" in captured.err and "KL" in captured.err
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (config["sym"], config["desc_act"], config["group_size"]) == (False, True, 32)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("cupyq: error: OUT") and captured.err.count("\n") == 1


def test_head_bits_of_the_command_line_are_those_there_are():
    from cupyq.quantize.arguments import HEAD_BITS
    from cupyq.quantize.layouts import HEAD_LAYOUTS

    assert set(HEAD_BITS) == set(HEAD_LAYOUTS)


def test_reports_survive_the_working_folder(tmp_path):
    folder = work.WorkFolder(tmp_path / "out")
    report = LinearReport("model.layers.0.x", 32, 32, "4g32", 4444, 0.1 + 0.2, 1e-17, 7)
    folder.save({"q_weight": np.arange(4, dtype=np.int32)}, report)
    assert folder.has("model.layers.0.x") and not folder.has("model.layers.0.x", "y")
    assert folder.report("model.layers.0.x") == report
    assert [tensor.name for tensor in folder.tensors("model.layers.0.x")] == ["model.layers.0.x.q_weight"]
    assert folder.tensors("model.layers.0.x")[0].read().tolist() == [0, 1, 2, 3]


@pytest.mark.gpu
def test_on_a_gpu(llama, mixtral, done, tmp_path, cupy):
    """The same bytes on every run, resumed or not; nearly the same model as without a GPU."""
    first = quantize(llama, tmp_path / "a", backend="cupy")
    quantize(llama, tmp_path / "b", backend="cupy")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert first.bits_per_weight == load_model(tmp_path / "a", "numpy").bits_per_weight <= 4.5
    assert first.comparison.kl < 2 * done[1].comparison.kl
    quantize(mixtral, tmp_path / "mixtral", bits=5, backend="cupy")
    quantize(mixtral, tmp_path / "again", bits=5, backend="cupy")
    assert digest(tmp_path / "mixtral") == digest(tmp_path / "again")
    for options in ({"is_symmetric": True}, {"is_symmetric": False, "act_order": True}):
        result = quantize(llama, tmp_path / str(len(options)), bits=4, format="gptq", group_size=32, backend="cupy", **options)
        assert result.comparison.kl < 0.5 and read_report(tmp_path / str(len(options))) is not None
