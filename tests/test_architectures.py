"""Every architecture against logits of Hugging Face transformers, on tiny models; and how their tensors may be stored.

The goldens (tests/golden/architectures.safetensors) are logits of transformers 5.23.0 in float32 on the CPU, of the models of
architecture_cases.py; `tools/record_architectures.py` makes them anew. Measured when they were recorded: largest difference
1.8e-5, relative L2 1.2e-6 at most, over all models.
"""

import dataclasses
import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from architecture_cases import CASES, HEAD_DIM, HEADS, IDS, INNER, KV_HEADS, LENGTHS, SEQ, VISION, made, write
from random_layers import random_gptq
from safetensors.numpy import load_file

from cupyq import _kernels
from cupyq.errors import FormatError, UnsupportedError
from cupyq.formats.exl2 import dequantize_exl2, pack_exl2
from cupyq.formats.safetensors import Checkpoint
from cupyq.models import load_model, loader
from cupyq.models.architectures import ARCHITECTURES
from cupyq.models.config import ModelConfig
from cupyq.models.names import RenamedCheckpoint
from cupyq.models.parts import Plan
from cupyq.models.warmup import trace_kernels
from cupyq.ops import reconstruct


@functools.cache
def goldens():
    return load_file(Path(__file__).parent / "golden/architectures.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name): the folder of a model, written once."""
    root = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def folder(name):
        return write(root / name, name)

    return folder


@pytest.fixture(scope="module")
def loaded(folders):
    return functools.cache(lambda name: load_model(folders(name), "numpy", max_seq_len=LENGTHS.get(name)))


def relative(found, expected):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def is_exact(found, expected):
    return relative(found, expected) <= 1e-5 and np.abs(found - expected).max() <= 2e-4


# --- logits -----------------------------------------------------------------------------------------------------------


def test_every_architecture_has_a_golden():
    assert {keys["architectures"][0] for keys, _ in CASES.values()} == set(ARCHITECTURES)
    assert set(goldens()) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(loaded, name):
    logits, expected = loaded(name).forward(IDS)[0], goldens()[name]
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert is_exact(logits, expected), (relative(logits, expected), np.abs(logits - expected).max())


def in_steps(model):
    """Logits of a prompt of 7 tokens and single ones behind it, with a cache."""
    cache = model.new_cache(capacity=SEQ)
    parts = [model.forward(IDS[:, :7], cache)]
    parts += [model.forward(IDS[:, i : i + 1], cache) for i in range(7, SEQ)]
    return [part if model.xp is np else part.get() for part in parts]


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_with_a_cache(loaded, name):
    assert is_exact(np.concatenate(in_steps(loaded(name)), axis=1)[0], goldens()[name])


@pytest.mark.parametrize("name", ["gpt2", "cohere2", "dbrx", "granite", "gemma3"])
def test_several_texts_of_different_lengths_at_once(loaded, name):
    """Positions, learned ones too, are each text's own."""
    model = loaded(name)
    cache = model.new_paged_cache(pages=8, batch=2, page_size=8)
    rows = [model.forward(IDS[:, : 5 + 2 * row], cache.row(row), last_only=True) for row in range(2)]
    assert all(is_exact(row[0, 0], goldens()[name][4 + 2 * i]) for i, row in enumerate(rows))
    nexts = np.stack([IDS[0, 5:6], IDS[0, 7:8]])
    logits = model.forward(nexts, cache)
    assert is_exact(logits[:, 0], goldens()[name][[5, 7]])


# --- what a wrong reading would give ----------------------------------------------------------------------------------

WRONG_ROWS = [
    ("qwen3", {"head_norm": "layer"}),
    ("qwen3-moe", {"renormalize": "always", "has_dense_layers": True, "head_norm": "layer"}),
    ("qwen3-moe-unnormed", {"renormalize": "always"}),
    ("mistral", {"window": "none"}),
    ("starcoder2", {"window": "none"}),
    ("phi3", {"window": "none"}),
    ("qwen3-moe-unnormed", {"window": "none"}),
    ("qwen2-vl", {"rope": "gptj"}),
    ("gemma", {"norm_weight_offset": 0.0}),
    ("gemma", {"activation_keys": ("hidden_act",)}),
    ("gemma", {"scales_embedding": False}),
    ("gemmoe", {"gate": "w3", "up": "w1"}),
    ("gemma3", {"local_rope_theta": None}),
    ("gemma3", {"window": "none"}),
    ("gemma3", {"attention_scale": "head_dim"}),
    ("gemma3", {"head_norm": "layer"}),
    ("cohere", {"rope": "neox"}),
    ("cohere", {"norm": "rms"}),
    ("cohere", {"logit_scale": None}),
    ("cohere-head-norms", {"head_norm": "rms"}),
    ("cohere2", {"rotates_window_only": False}),
    ("cohere2", {"window": "none"}),
    ("orion", {"norm": "rms"}),
    ("starcoder2", {"activation": "silu", "activation_keys": ()}),
    ("gpt2", {"activation": "relu", "activation_keys": ()}),
    ("gpt-bigcode-many-heads", {"qkv_layout": "rows"}),
    ("internlm2", {"qkv_layout": "rows"}),
    ("dbrx", {"has_qkv_clip": False}),
    ("dbrx", {"norm": "rms"}),
    ("dbrx", {"gate": "v1", "up": "w1"}),
    ("minicpm", {"residual_scale": None}),
    ("minicpm", {"embedding_scale": None}),
    ("minicpm", {"logit_scale": None}),
    ("granite", {"residual_scale": None}),
    ("granite", {"attention_scale": "head_dim"}),
    ("granite", {"logit_scale": "logit_scale", "defaults": (("logit_scale", 1.0),)}),
    ("glm4", {"rope": "neox"}),
    ("glm4", {"attention_post_norm": "post_attention_layernorm", "mlp_norm": "post_self_attn_layernorm"}),
    ("index", {"has_head_norm_key": False}),
]


def in_words(value):
    return value if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize(("name", "changes"), WRONG_ROWS, ids=in_words)
def test_a_wrong_row_is_noticed(monkeypatch, folders, name, changes):
    row = ModelConfig.from_file(folders(name)).architecture
    monkeypatch.setitem(ARCHITECTURES, row.name, dataclasses.replace(row, **changes))
    assert not is_exact(load_model(folders(name), "numpy").forward(IDS)[0], goldens()[name])


WRONG_KEYS = [
    ("rope-linear", {"rope_scaling": {"type": "linear", "factor": 3.9}}),
    ("rope-linear", {"rope_scaling": None}),
    ("rope-llama3", {"rope_scaling": None}),
    ("rope-yarn", {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}}),
    ("phi3-longrope", {"original_max_position_embeddings": 4}),
    ("phi3-longrope", {"partial_rotary_factor": 1.0, "rope_scaling": None}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 6}),
    ("glm4", {"partial_rotary_factor": 0.75}),
    ("qwen3-moe", {"num_experts_per_tok": 1}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("gemma2", {"attn_logit_softcapping": None}),
]


@pytest.mark.parametrize(("name", "changes"), WRONG_KEYS, ids=in_words)
def test_a_wrong_key_is_noticed(tmp_path, name, changes):
    folder = write(tmp_path, name)
    keys = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(keys))
    assert not is_exact(load_model(folder, "numpy").forward(IDS)[0], goldens()[name])


def test_the_length_served_decides_on_dynamic_and_long_frequencies(folders):
    dynamic, long = folders("rope-dynamic"), folders("phi3-longrope")
    config = ModelConfig.from_file(dynamic)
    assert (config.max_seq_len, config.longest_seq_len) == (8, 32)
    assert load_model(dynamic, "numpy").config.max_seq_len == 8
    with pytest.raises(ValueError, match="max_seq_len must be from 1 to 32"):
        load_model(dynamic, "numpy", max_seq_len=33)
    assert not is_exact(load_model(dynamic, "numpy", max_seq_len=32).forward(IDS)[0], goldens()["rope-dynamic"])
    short = load_model(long, "numpy", max_seq_len=8)
    assert not np.allclose(short.cos, load_model(long, "numpy").cos[:8], atol=1e-3)


# --- how tensors may be stored ----------------------------------------------------------------------------------------


def rewritten(folder, name, tensors, **keys):
    """The model's folder with these tensors, and with some keys changed."""
    write(folder, name, {key: np.ascontiguousarray(value) for key, value in tensors.items()})
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NEW_LAYOUT = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}


@pytest.mark.parametrize("name", ["gemma3", "pixtral", "mistral3", "qwen2-vl", "qwen2.5-vl"])
def test_the_newer_layout_of_vision_models(tmp_path, folders, loaded, name):
    """What transformers 5 writes: other prefixes, and what sees beside what speaks."""
    tensors = {}
    for key, value in load_file(folders(name) / "model.safetensors").items():
        for old, new in NEW_LAYOUT.items():
            key = key.replace(old, new)
        if name.startswith("qwen"):
            key = key.replace("model.", "model.language_model.", 1)
        tensors[key] = value
    for part in ("visual.blocks.0.attn.qkv", "vision_tower.ln_pre", "multi_modal_projector.norm"):
        tensors[f"model.{part}.weight"] = np.ones(3, np.float32)
    if name == "gemma3":
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    model = load_model(rewritten(tmp_path, name, tensors), "numpy")
    assert np.array_equal(model.forward(IDS), loaded(name).forward(IDS))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_keys_of_text_config(tmp_path, loaded, folders, name):
    """transformers 5 has the text's keys in text_config, and rope_parameters instead of rope_scaling."""
    keys = json.loads((folders(name) / "config.json").read_text())
    top = {key: keys.pop(key) for key in ("architectures", "model_type", "vision_config", "tie_word_embeddings")}
    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": keys.pop("rope_theta"), "mrope_section": [2, 3, 3]}
    del keys["rope_scaling"]
    text = keys | {"model_type": f"{top['model_type']}_text", "tie_word_embeddings": True}
    folder = write(tmp_path, name)
    (folder / "config.json").write_text(json.dumps(top | {"text_config": text, "eos_token_id": [5, 6]}))
    config = ModelConfig.from_file(folder)
    assert config.eos_token_ids == (5, 6) and not config.tie_word_embeddings
    assert np.array_equal(load_model(folder, "numpy").forward(IDS), loaded(name).forward(IDS))


def test_gemma3_in_the_newer_spelling(tmp_path, loaded, folders):
    keys = json.loads((folders("gemma3-text") / "config.json").read_text())
    del keys["rope_theta"], keys["rope_local_base_freq"], keys["sliding_window_pattern"]
    full = {"rope_theta": 300.0} | keys.pop("rope_scaling")
    keys["rope_parameters"] = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}
    keys["layer_types"] = ["sliding_attention", "full_attention"]
    folder = write(tmp_path, "gemma3-text")
    (folder / "config.json").write_text(json.dumps(keys))
    assert np.array_equal(load_model(folder, "numpy").forward(IDS), loaded("gemma3-text").forward(IDS))


def test_yi_with_the_names_of_llama(tmp_path, loaded, folders):
    tensors = load_file(folders("yi") / "model.safetensors")
    pairs = (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm"))
    for old, new in pairs:
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    assert np.array_equal(load_model(rewritten(tmp_path, "yi", tensors), "numpy").forward(IDS), loaded("yi").forward(IDS))


def test_gpt2_with_its_prefix_and_masks(tmp_path, loaded, folders):
    tensors = {f"transformer.{key}": value for key, value in load_file(folders("gpt2") / "model.safetensors").items()}
    tensors |= {f"transformer.h.{layer}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for layer in range(2)}
    tensors["transformer.h.0.attn.masked_bias"] = np.float32([-1e4])
    assert np.array_equal(load_model(rewritten(tmp_path, "gpt2", tensors), "numpy").forward(IDS), loaded("gpt2").forward(IDS))


# --- quantized --------------------------------------------------------------------------------------------------------


def exl2(rng, k, n):
    groups = k // 32
    codes = rng.integers(0, 16, (k, n)).astype(np.uint8)
    scale_max = np.full(groups, 0.15, np.float16)
    return pack_exl2(codes, rng.integers(0, 16, (groups, n)), scale_max, [4] * groups, [32] * groups, rng.permutation(k))


def kept(folder, model):
    """The tensors of a folder that no converter quantizes, by the names that exllamav2's gives them."""
    with Checkpoint(folder) as checkpoint:
        renamed = RenamedCheckpoint(checkpoint, model.config.architecture.renames)
        parts = ("embed_tokens", "norm", "ln_", "wpe", "lm_head", "block_sparse_moe.gate.", "mlp.gate.")
        return {name: np.array(renamed.array(name)) for name in renamed.names if any(part in name for part in parts)}


def quantized(folder, model, make):
    """(tensors of a checkpoint whose linear layers make(k, n) quantizes one by one, those of each layer)."""
    layers = {}
    for linear in model._decoder_linears():
        layers[linear.name] = make(linear.k, linear.n)
        if linear.bias is not None:
            layers[linear.name] = layers[linear.name] | {"bias": np.asarray(linear.bias, np.float16)}
    tensors = {f"{key}.{short}": array for key, parts in layers.items() for short, array in parts.items()}
    return kept(folder, model) | tensors, layers


QUANTIZED = ["phi3", "internlm2", "gpt2", "gpt-bigcode-many-heads", "dbrx", "glm4", "gemma3", "cohere", "yi", "orion"]
QUANTIZED += ["starcoder2", "qwen3-moe", "qwen2-vl", "granite", "minicpm", "pixtral", "gemmoe"]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("method", ["exl2", "gptq"])
def test_quantized_projections(tmp_path, folders, loaded, name, method):
    """EXL2 and GPTQ, one matrix for each projection, under the names that exllamav2 writes."""
    rng = np.random.default_rng(5)
    make = {"exl2": exl2, "gptq": lambda rng, k, n: random_gptq(rng, 4, k=k, n=n, groups=k // 32)}[method]
    tensors, layers = quantized(folders(name), loaded(name), functools.partial(make, rng))
    method_keys = {"quant_method": method} | ({"bits": 4, "group_size": 32} if method == "gptq" else {})
    model = load_model(rewritten(tmp_path, name, tensors, quantization_config=method_keys), "numpy")
    assert {linear.name: linear.kind for linear in model._decoder_linears()} == dict.fromkeys(layers, method)
    if method == "exl2" and name == "phi3":
        assert is_exact(model.forward(IDS)[0], fused_again(tmp_path / "plain", name, tensors, layers))
    logits = model.forward(IDS)
    for linear in model._decoder_linears():
        weight = dequantize_exl2(layers[linear.name]) if method == "exl2" else reconstruct(linear.weight)
        linear.weight, linear.is_quantized = np.ascontiguousarray(weight.T, np.float32), False
        linear.bias = None if linear.bias is None else np.asarray(linear.bias, np.float32)
    assert relative(logits, model.forward(IDS)) <= 1e-5


def fused_again(folder, name, tensors, layers):
    """Logits of an unquantized checkpoint whose fused tensors are these matrices, one below the other."""
    plain = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in layers}
    for layer in range(2):
        for whole, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            key = f"model.layers.{layer}.{whole}"
            names = [f"{key.rpartition('.')[0]}.{part}_proj" for part in parts]
            plain[f"{key}.weight"] = np.concatenate([dequantize_exl2(layers[part]).T for part in names])
        for key in (f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.down_proj"):
            plain[f"{key}.weight"] = dequantize_exl2(layers[key]).T
    return load_model(rewritten(folder, name, plain), "numpy").forward(IDS)[0]


def test_gptq_of_fused_projections(tmp_path, folders, loaded):
    """Columns of GPTQ tensors side by side are those of the matrices, as quantizers that know no better leave them."""
    name, rng = "phi3", np.random.default_rng(6)
    tensors, layers = quantized(folders(name), loaded(name), lambda k, n: random_gptq(rng, 4, k=k, n=n, groups=k // 32))
    keys = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    expected = load_model(rewritten(tmp_path / "apart", name, tensors, **keys), "numpy").forward(IDS)
    for layer in range(2):
        for whole, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            key = f"model.layers.{layer}.{whole}"
            names = [f"{key.rpartition('.')[0]}.{part}_proj" for part in parts]
            for short in ("qweight", "qzeros", "scales"):
                tensors[f"{key}.{short}"] = np.concatenate([tensors.pop(f"{part}.{short}") for part in names], axis=1)
            g_idx = [tensors.pop(f"{part}.g_idx") for part in names]
            tensors[f"{key}.g_idx"] = g_idx[0]
    model = load_model(rewritten(tmp_path / "fused", name, tensors, **keys), "numpy")
    assert np.array_equal(model.forward(IDS), expected)


def test_fused_gptq_that_cannot_be_taken_apart(tmp_path, folders, loaded):
    name, rng = "internlm2", np.random.default_rng(6)
    tensors, layers = quantized(folders(name), loaded(name), lambda k, n: random_gptq(rng, 4, k=k, n=n, groups=k // 32))
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    for part in parts:
        for short in layers[part]:
            del tensors[f"{part}.{short}"]
    fused = random_gptq(rng, 4, k=64, n=(HEADS + 2 * KV_HEADS) * HEAD_DIM, groups=2)
    tensors |= {f"model.layers.0.attention.wqkv.{short}": array for short, array in fused.items()}
    with pytest.raises(UnsupportedError, match=r"'model.layers.0.attention.wqkv.qweight': several matrices in one"):
        load_model(rewritten(tmp_path, name, tensors, quantization_config={"quant_method": "gptq", "bits": 4}), "numpy")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is not supported; .* False"),
        ("gpt2", {"n_embd": None}, "config.json: n_embd: found None, expected a whole number"),
        ("dbrx", {"ffn_config": {"moe_num_experts": 4}}, "ffn_config.ffn_hidden_size: missing, expected a whole number"),
        ("dbrx", {"attn_config": [1]}, "attn_config: found .1., expected a JSON object"),
        ("pixtral", {"text_config": {"model_type": "mamba"}}, "model_type: 'mamba' is not supported; .* llama or mis"),
        ("gemma3", {"text_config": {"hidden_size": "64"}}, "text_config.hidden_size: found '64', expected a whole number"),
        ("qwen3-moe", {"mlp_only_layers": 3}, "mlp_only_layers: found 3, expected a list"),
        ("qwen3-moe", {"norm_topk_prob": 1}, "norm_topk_prob: found 1, expected true or false"),
        ("glm4", {"partial_rotary_factor": 0.01}, "partial_rotary_factor: 0 of 16 values of a head rotate"),
        ("glm4", {"partial_rotary_factor": 2}, "partial_rotary_factor: found 2, expected a number above 0, at most 1"),
        ("granite", {"residual_multiplier": -1.0}, "residual_multiplier: found -1.0, expected a number above 1e-06"),
        ("minicpm", {"dim_model_base": None}, "dim_model_base: found None, expected a number"),
        ("cohere2", {"sliding_window": None}, "sliding_window: found None, expected a whole number, the window of all but"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported; MistralForCausalLM rotates"),
    ],
)
def test_keys_that_are_refused(tmp_path, name, keys, message):
    folder = write(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises((FormatError, UnsupportedError), match=message) as caught:
        ModelConfig.from_file(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_no_llama(tmp_path):
    folder = write(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NovelForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="'NovelForCausalLM' is not supported; cupyq runs LlamaForCausalLM, Mis"):
        load_model(folder, "numpy")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "phi3",
            lambda t: t.pop("model.layers.1.self_attn.qkv_proj.weight"),
            "'model.layers.1.self_attn.q_proj.weight' is missing",
        ),
        (
            "gpt2",
            lambda t: t.update({"h.0.attn.c_attn.weight": np.ones((192, 64), np.float32)}),
            r"tensor 'h.0.attn.c_attn.weight': shape \[192, 64\], expected \[64, 192\]",
        ),
        ("dbrx", lambda t: t.update({"transformer.blocks.2.x": np.ones(3, np.float32)}), "'transformer.blocks.2.x'"),
        (
            "yi",
            lambda t: t.update({"model.layers.0.input_layernorm.weight": np.ones(64, np.float32)}),
            "tensors 'model.layers.0.*' and 'model.layers.0.*' are both the model's 'model.layers.0.input_layernorm.weight'",
        ),
        ("dbrx", lambda t: t.pop("transformer.blocks.0.ffn.experts.mlp.v1"), "block_sparse_moe.experts.v1' is missing"),
    ],
)
def test_tensors_that_are_refused(tmp_path, folders, name, change, message):
    tensors = load_file(folders(name) / "model.safetensors")
    change(tensors)
    with pytest.raises(FormatError, match=message) as caught:
        load_model(rewritten(tmp_path, name, tensors), "numpy")
    assert "\n" not in str(caught.value)


def test_what_the_cases_rest_on():
    """Sizes differ where a mix-up of them would not be seen otherwise, and tensors do not depend on their order."""
    assert len({HEADS * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM, INNER, 2 * INNER}) == 3 and set(VISION) == {
        "pixtral",
        "siglip",
        "qwen2_vl",
        "qwen2_5_vl",
    }
    shapes = CASES["phi3"][1]
    one, other = made(shapes), made(dict(reversed(list(shapes.items()))))
    assert all(np.array_equal(one[name], other[name]) for name in shapes)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def bound(folder, name, dtype):
    """Relative error of logits in this dtype on NumPy, whose ops round where the kernels do."""
    model = load_model(folder, "numpy", dtype=dtype, max_seq_len=LENGTHS.get(name))
    return relative(model.forward(IDS)[0], goldens()[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_logits_on_the_gpu(cupy, folders, name):
    model = load_model(folders(name), "cupy", max_seq_len=LENGTHS.get(name))
    most = 2 * bound(folders(name), name, "float16") + 2**-11
    assert relative(model.forward(IDS).get()[0], goldens()[name]) <= most
    assert relative(np.concatenate(in_steps(model), axis=1)[0], goldens()[name]) <= most


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "internlm2", "dbrx", "glm4", "gemma3", "cohere-head-norms", "index"])
def test_bfloat16_on_the_gpu(cupy, folders, name):
    model = load_model(folders(name), "cupy", dtype=ml_dtypes.bfloat16)
    most = 2 * bound(folders(name), name, "bfloat16") + 2**-8
    assert relative(model.forward(IDS).get()[0], goldens()[name]) <= most


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["phi3", "dbrx", "gpt2", "cohere", "glm4", "granite"])
def test_quantized_projections_on_the_gpu(cupy, tmp_path, folders, loaded, name):
    rng = np.random.default_rng(5)
    tensors, _ = quantized(folders(name), loaded(name), functools.partial(exl2, rng))
    folder = rewritten(tmp_path, name, tensors, quantization_config={"quant_method": "exl2"})
    exact = load_model(folder, "numpy").forward(IDS)
    most = 2 * relative(load_model(folder, "numpy", dtype="float16").forward(IDS), exact) + 2**-11
    model = load_model(folder, "cupy")
    assert relative(model.forward(IDS).get(), exact) <= most
    assert relative(np.concatenate(in_steps(model), axis=1), exact) <= most


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "cohere2", "dbrx", "phi3"])
def test_decoder_and_foreseen_kernels_on_the_gpu(cupy, monkeypatch, folders, name):
    """Steps as graphs draw what steps one by one do; and all that loading and running launches was compiled before."""
    foreseen = []
    compile_traced = loader.compile_traced

    def remember(wanted):
        foreseen.extend(wanted)
        compile_traced(wanted)

    monkeypatch.setattr(loader, "compile_traced", remember)
    model = load_model(folders(name), "cupy")
    assert set(trace_kernels(model)) <= set(foreseen)
    with Checkpoint(folders(name)) as checkpoint, _kernels.tracing() as to_load:
        loader.Blueprint(Plan(model.config, checkpoint, cupy, model.dtype)).load()
    assert set(to_load) <= set(foreseen)
    tokens = []
    for graph in (True, False):
        decoder = model.decoder(graph=graph, seed=3)
        first = decoder.start([IDS[0, :6]]).get()
        tokens.append([*first, *decoder.run(20).get()[0]])
    assert tokens[0] == tokens[1]
