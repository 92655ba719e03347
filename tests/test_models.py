"""models/: whole models against recorded logits of transformers, on NumPy and (fp16, bf16) on a GPU.

The goldens were computed in float32, without a cache, from the weights as stored; tolerances are those measured when
they were recorded (see MEASURED_FLOAT16). The mutated readers below must all fail them.
"""

import dataclasses
import functools
import gc
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cupyq import _device
from cupyq.errors import BackendError, FormatError, UnsupportedError
from cupyq.formats.exl2 import dequantize_exl2, pack_exl2
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers import KVCache, Step
from cupyq.models import architectures, load_model
from cupyq.models import model as model_module

ROOT = Path(__file__).parent.parent
ARCH, EXAMPLES = ROOT / "tests/models", ROOT / "examples/models"

# Largest error and relative L2 error of a float16 transformers run against the golden.
MEASURED_FLOAT16 = {
    "llama3-rope": (0.041, 0.0020),
    "qwen2": (0.024, 0.0014),
    "qwen3": (0.046, 0.0021),
    "mixtral": (0.044, 0.0018),
    "gemma2": (0.113, 0.0050),
    # One trained model in four forms; measured with the dequantised GPTQ weights, and stated with its margin.
    "shakespeare": (0.015, 0.0005),
    "shakespeare-exl2-2.5": (0.015, 0.0005),
    "shakespeare-exl2-4.0": (0.015, 0.0005),
    "shakespeare-gptq-g32": (0.015, 0.0005),
}
MODELS = list(MEASURED_FLOAT16)
ARCH_MODELS = MODELS[:5]


def folder_of(name):
    return ARCH / name if name in ARCH_MODELS else EXAMPLES / name


@functools.cache
def loaded(name):
    return load_model(folder_of(name), "numpy")


@functools.cache
def golden(name):
    """(ids [batch, seq], logits [batch, seq, vocab])"""
    file = SafetensorsFile(folder_of(name) / "golden.safetensors")
    ids, logits = file.array("input_ids"), file.array("logits")
    return ids.reshape(-1, ids.shape[-1]), logits.reshape(-1, *logits.shape[-2:])


def errors(found, expected):
    """(largest absolute error, relative L2 error)"""
    difference = np.asarray(found, np.float64) - expected
    return np.abs(difference).max(), np.linalg.norm(difference) / np.linalg.norm(expected)


def is_float32_exact(found, expected):
    largest, relative = errors(found, expected)
    return largest <= 1e-3 and relative <= 1e-4


def variant(tmp_path, name, edit=None, source="config.json", drop=(), tensors=None):
    """A copy of a model folder, without its goldens, with an edited configuration and changed tensors."""
    folder = tmp_path / "variant"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = json.loads((folder_of(name) / source).read_text())
    (folder / "config.json").write_text(json.dumps(data | edit(data) if edit else data))
    weights = folder_of(name) / ("output.safetensors" if "exl2" in name else "model.safetensors")
    if not drop and tensors is None:
        (folder / "model.safetensors").symlink_to(weights)
        return folder
    file = SafetensorsFile(weights)
    kept = {key: file.array(key) for key in file.names if not any(key.startswith(d) for d in drop)}
    kept |= tensors or {}
    save_file({key: np.ascontiguousarray(value) for key, value in kept.items()}, folder / "model.safetensors")
    return folder


def setting(**keys):
    return lambda data: keys


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if "gptq" not in name])
def test_logits_match_the_golden(name):
    ids, expected = golden(name)
    logits = loaded(name).forward(ids)
    assert logits.dtype == np.float32 and logits.shape == expected.shape and logits.flags.c_contiguous
    assert is_float32_exact(logits, expected), errors(logits, expected)


def test_logits_of_gptq_match_the_golden():
    """The golden's weights are (q - zero) * scale in float32; the format's definition rounds each of them to float16,
    2**-11 relative at most, which moves these logits by up to 0.0024."""
    ids, expected = golden("shakespeare-gptq-g32")
    largest, relative = errors(loaded("shakespeare-gptq-g32").forward(ids), expected)
    assert relative <= 1e-4 and largest <= 3e-3


def test_logits_of_gptq_with_unrounded_weights_match_the_golden_exactly():
    name = "shakespeare-gptq-g32"
    model, file = load_model(folder_of(name), "numpy"), SafetensorsFile(folder_of(name) / "model.safetensors")
    for layer in model.layers:
        for linear in layer.linears():
            words, zeros, scales, group = (
                file.array(f"{linear.name}.{short}") for short in ("qweight", "qzeros", "scales", "g_idx")
            )
            shifts = np.arange(0, 32, 4, dtype=np.uint32)
            codes = ((words.view(np.uint32)[:, None, :] >> shifts[None, :, None]) & 15).reshape(linear.k, linear.n)
            zero = ((zeros.view(np.uint32)[:, :, None] >> shifts) & 15).reshape(len(scales), linear.n) + 1
            weight = (codes.astype(np.float32) - zero[group]) * scales.astype(np.float32)[group]
            linear.weight, linear.is_quantized = np.ascontiguousarray(weight.T, np.float32), False
    ids, expected = golden(name)
    assert is_float32_exact(model.forward(ids), expected)


@pytest.mark.parametrize("name", ARCH_MODELS)
def test_the_older_spelling_gives_the_same_bits(tmp_path, name):
    ids, _ = golden(name)
    old = load_model(variant(tmp_path, name, source="config.legacy.json"), "numpy")
    assert np.array_equal(old.forward(ids[:1, :80]), loaded(name).forward(ids[:1, :80]))


@pytest.mark.parametrize("name", [*ARCH_MODELS, "shakespeare-exl2-2.5"])
def test_token_by_token_with_a_cache_matches_the_golden(name):
    """A prefill, then single tokens, for a batch of two where the golden has two."""
    ids, expected = golden(name)
    model, seq = loaded(name), 96
    cache = model.new_cache(batch=len(ids), capacity=seq)
    parts = [model.forward(ids[:, :60], cache)]
    parts += [model.forward(ids[:, i : i + 1], cache) for i in range(60, seq)]
    assert cache.length == seq
    logits = np.concatenate(parts, axis=1)
    assert is_float32_exact(logits, expected[:, :seq]), errors(logits, expected[:, :seq])


@pytest.mark.parametrize("name", ARCH_MODELS)
def test_long_prompts_go_in_chunks(monkeypatch, name):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 20)
    ids, expected = golden(name)
    model = loaded(name)
    cache = model.new_cache(batch=2, capacity=100)
    logits = model.forward(ids, cache)
    assert logits.shape == expected.shape and is_float32_exact(logits, expected)
    assert cache.length == 96
    cache.reset()
    last = model.forward(ids, cache, last_only=True)
    assert last.shape == (2, 1, expected.shape[-1]) and is_float32_exact(last, expected[:, -1:])


def test_last_only_is_the_last_row():
    ids, _ = golden("gemma2")
    model = loaded("gemma2")
    assert np.allclose(model.forward(ids, last_only=True), model.forward(ids)[:, -1:], atol=1e-5)


def greedy_cases(names):
    cases = [(name, file) for name in names for file in ("greedy", "greedy_long")]
    return [(name, file) for name, file in cases if (folder_of(name) / f"{file}.json").exists()]


def greedy_tokens(model, prompt, count):
    cache = model.new_cache(capacity=len(prompt) + count)
    ids, tokens = prompt, []
    for _ in range(count):
        logits = model.forward(np.array(ids, np.int32), cache, last_only=True)
        ids = [int(logits[0, -1].argmax())]
        tokens += ids
    return tokens


@pytest.mark.parametrize(("name", "file"), greedy_cases(MODELS))
def test_greedy_tokens(name, file):
    case = json.loads((folder_of(name) / f"{file}.json").read_text())
    assert greedy_tokens(loaded(name), case["prompt"], len(case["greedy"])) == case["greedy"]


def test_one_row_of_ids_is_a_batch_of_one():
    ids, expected = golden("qwen2")
    model = loaded("qwen2")
    for form in (ids[0, :8], ids[0, :8].tolist(), ids[0, :8].astype(np.int64), ids[:1, :8].astype(np.uint16)):
        logits = model.forward(form)
        assert logits.shape == (1, 8, 512) and is_float32_exact(logits, expected[:1, :8])


@pytest.mark.parametrize("name", ["llama3-rope", "gemma2"])
@pytest.mark.parametrize("dtype", ["float16", np.float16])
def test_float16_activations_on_numpy(name, dtype):
    """What a GPU's float16 is measured against: the same roundings, in the reference."""
    ids, expected = golden(name)
    model = load_model(folder_of(name), "numpy", dtype=dtype)
    largest, relative = errors(model.forward(ids), expected)
    most, most_relative = MEASURED_FLOAT16[name]
    assert 1e-4 < largest <= most and 1e-4 < relative <= most_relative
    assert model.new_cache(capacity=4).k[0].dtype == np.float16


# --- the tolerance bites ----------------------------------------------------------------------------------------------


def shift_window(by):
    return lambda data: {"sliding_window": data["sliding_window"] + by}


WRONG_CONFIGS = {
    "rope scaling ignored": ("llama3-rope", setting(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})),
    "rope factor off": ("llama3-rope", lambda d: {"rope_parameters": d["rope_parameters"] | {"factor": 9.0}}),
    "rope theta off": ("qwen2", setting(rope_parameters={"rope_theta": 1e5, "rope_type": "default"})),
    "eps off": ("qwen2", setting(rms_norm_eps=1e-4)),
    "window one longer": ("gemma2", shift_window(1)),
    "window one shorter": ("gemma2", shift_window(-1)),
    "window ignored": ("gemma2", setting(layer_types=["full_attention"] * 3)),
    "windows on the odd layers": (
        "gemma2",
        setting(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "attention softcap off": ("gemma2", setting(attn_logit_softcapping=None)),
    "logit softcap off": ("gemma2", setting(final_logit_softcapping=None)),
    "scale of head_dim": ("gemma2", setting(query_pre_attn_scalar=64)),
    "exact gelu": ("gemma2", setting(hidden_activation="gelu")),
    "top-1": ("mixtral", setting(num_experts_per_tok=1)),
    "top-3": ("mixtral", setting(num_experts_per_tok=3)),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_misread_config_is_noticed(tmp_path, case):
    name, edit = WRONG_CONFIGS[case]
    ids, expected = golden(name)
    logits = load_model(variant(tmp_path, name, edit), "numpy").forward(ids)
    assert not is_float32_exact(logits, expected)


WRONG_ROWS = {
    "norm weights without + 1": ("gemma2", {"norm_weight_offset": 0.0}),
    "embedding not scaled": ("gemma2", {"scales_embedding": False}),
    "gate and up exchanged": ("mixtral", {"gate": "w3", "up": "w1"}),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_of_the_table_is_noticed(monkeypatch, case):
    name, changes = WRONG_ROWS[case]
    row = loaded(name).config.architecture
    monkeypatch.setitem(architectures.ARCHITECTURES, row.name, dataclasses.replace(row, **changes))
    ids, expected = golden(name)
    assert not is_float32_exact(load_model(folder_of(name), "numpy").forward(ids), expected)


def drop_head_norms(model):
    for layer in model.layers:
        layer.attention.q_norm = layer.attention.k_norm = None


def drop_post_norms(model):
    model.layers[1].mlp_post_norm = None


def drop_bias(model):
    model.layers[0].attention.k.bias = None
    model.layers[1].attention.v.bias = None


def exchange_layers(model):
    model.layers.reverse()
    for index, layer in enumerate(model.layers):
        layer.attention.layer = index


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3", drop_head_norms),
        ("gemma2", drop_post_norms),
        ("qwen2", drop_bias),
        ("llama3-rope", exchange_layers),
    ],
)
def test_a_part_left_out_is_noticed(name, change):
    ids, expected = golden(name)
    model = load_model(folder_of(name), "numpy")
    change(model)
    assert not is_float32_exact(model.forward(ids), expected)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_quantized_models():
    assert abs(loaded("shakespeare-exl2-2.5").bits_per_weight - 2.493) < 0.0005
    assert abs(loaded("shakespeare-exl2-4.0").bits_per_weight - 4.000) < 0.0005
    assert loaded("shakespeare").bits_per_weight == 16.0
    gptq = 4 + 16 / 32 + 4 / 32  # codes, scales, zeros; and the group of each row
    assert gptq < loaded("shakespeare-gptq-g32").bits_per_weight < gptq + 0.2
    formats = [loaded(name).format for name in MODELS[5:]]
    assert formats == ["float16", "exl2", "exl2", "gptq"]
    assert {loaded(name).parameters for name in MODELS[5:]} == {3672320}
    tied = loaded("qwen3")
    assert tied.parameters == sum(np.prod(tied_shape) for tied_shape in shapes(ARCH / "qwen3/model.safetensors"))


def shapes(path):
    file = SafetensorsFile(path)
    return [file.info(name).shape for name in file.names]


def test_linear_layers_are_listed():
    layers = list(loaded("shakespeare-exl2-2.5").linear_layers())
    assert len(layers) == 4 * 7 + 1
    assert layers[0].name == "model.layers.0.self_attn.q_proj" and layers[0].shape == (256, 256)
    assert layers[6].name == "model.layers.0.mlp.down_proj" and layers[6].shape == (768, 256)
    assert layers[-1].name == "lm_head" and layers[-1].shape == (256, 1024)
    assert {layer.kind for layer in layers} == {"exl2"} and 7 < layers[-1].bits_per_weight < 7.1
    experts = [layer.name for layer in loaded("mixtral").linear_layers()]
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in experts
    assert not any(name.endswith(".gate") for name in experts)
    assert [layer.kind for layer in loaded("shakespeare-gptq-g32").linear_layers()][-2:] == ["gptq", "float16"]


def test_a_quantized_head_of_a_tied_model_is_its_own(tmp_path):
    """Quantizers write lm_head.q_* for tied models too; the config still says that they are tied."""
    name = "shakespeare-exl2-4.0"
    ids, expected = golden(name)
    tied = load_model(variant(tmp_path, name, setting(tie_word_embeddings=True)), "numpy")
    assert is_float32_exact(tied.forward(ids[:, :64]), expected[:, :64])
    fallback = load_model(variant(tmp_path, name, setting(tie_word_embeddings=True), drop=["lm_head"]), "numpy")
    assert not is_float32_exact(fallback.forward(ids[:, :64]), expected[:, :64])
    assert fallback.head.weight is fallback.embedding


def packed(rng, key, k, n, bits=4):
    """Random EXL2 tensors of a linear layer, N rounded up to 32."""
    n, groups = -(-n // 32) * 32, k // 32
    codes = rng.integers(0, 1 << bits, (k, n))
    scale_max = (rng.random(groups) * 0.5 + 0.1).astype(np.float16)
    tensors = pack_exl2(codes, rng.integers(0, 16, (groups, n)), scale_max, [bits] * groups, [32] * groups)
    return {f"{key}.{short}": value for short, value in tensors.items()}


def dequantized(tensors, key):
    return dequantize_exl2({name.removeprefix(f"{key}."): v for name, v in tensors.items() if name.startswith(key)})


def test_a_quantized_layer_keeps_its_bias(tmp_path):
    key = "model.layers.1.self_attn.k_proj"
    tensors = packed(np.random.default_rng(3), key, 192, 64)
    quantized = load_model(variant(tmp_path, "qwen2", drop=[f"{key}.weight"], tensors=tensors), "numpy")
    weight = {f"{key}.weight": dequantized(tensors, key).T}
    plain = load_model(variant(tmp_path, "qwen2", tensors=weight), "numpy")
    ids = golden("qwen2")[0][:, :20]
    assert quantized.format == "mixed"
    assert is_float32_exact(quantized.forward(ids), plain.forward(ids))
    plain.layers[1].attention.k.bias = None
    assert not is_float32_exact(quantized.forward(ids), plain.forward(ids))


@pytest.mark.parametrize("vocab", [500, 481, 512])
def test_padded_columns_of_the_head_are_cut(tmp_path, vocab):
    rng = np.random.default_rng(vocab)
    embed = SafetensorsFile(ARCH / "qwen2/model.safetensors").array("model.embed_tokens.weight")
    tensors = packed(rng, "lm_head", 192, vocab) | {"model.embed_tokens.weight": embed[:vocab]}
    folder = variant(tmp_path, "qwen2", setting(vocab_size=vocab), drop=["lm_head"], tensors=tensors)
    model = load_model(folder, "numpy")
    ids = rng.integers(0, vocab, (2, 5))
    logits = model.forward(ids)
    assert logits.shape == (2, 5, vocab) and logits.flags.c_contiguous
    head = dequantized(tensors, "lm_head")
    plain = load_model(variant(tmp_path, "qwen2"), "numpy")
    hidden = plain.norm(plain.hidden(ids.astype(np.int32), Step(plain.sin, plain.cos, np.zeros(2, np.int32))))
    assert is_float32_exact(logits, (hidden.astype(np.float64) @ head)[..., :vocab])


def test_a_head_padded_by_more_than_its_format_does_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    folder = variant(tmp_path, "qwen2", drop=["lm_head"], tensors=packed(rng, "lm_head", 192, 513))
    with pytest.raises(FormatError, match=r"'lm_head.q_weight': a matrix of 192 x 544, expected 192 x 512"):
        load_model(folder, "numpy")


def gptq_tensors(edit):
    file = SafetensorsFile(EXAMPLES / "shakespeare-gptq-g32/model.safetensors")
    return {name: edit(file.array(name)) for name in file.names if name.endswith(".qzeros")}


def test_the_two_conventions_of_gptq_zeros(tmp_path):
    name = "shakespeare-gptq-g32"
    ids = golden(name)[0][:, :32]

    def v2(data):
        return {"quantization_config": data["quantization_config"] | {"checkpoint_format": "gptq_v2"}}

    # All stored zeros are below 15, so that adding 1 to each carries nowhere.
    plus_one = gptq_tensors(lambda a: (a.view(np.uint32) + np.uint32(0x11111111)).view(np.int32))
    expected = loaded(name).forward(ids)
    assert np.array_equal(load_model(variant(tmp_path, name, v2, tensors=plus_one), "numpy").forward(ids), expected)
    misread = load_model(variant(tmp_path, name, v2), "numpy").forward(ids)
    assert errors(misread, expected)[1] > 0.1


def test_gptq_settings_must_fit_the_tensors(tmp_path):
    def edit(**keys):
        return lambda data: {"quantization_config": data["quantization_config"] | keys}

    with pytest.raises(FormatError, match=r"model\.safetensors: model\.layers\.0\.self_attn\.q_proj\.qzeros: .*4 bits"):
        load_model(variant(tmp_path, "shakespeare-gptq-g32", edit(bits=8)), "numpy")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_of_other_float_dtypes(tmp_path, dtype):
    file = SafetensorsFile(ARCH / "qwen2/model.safetensors")
    tensors = {name: file.array(name).astype(dtype) for name in file.names}
    model = load_model(variant(tmp_path, "qwen2", tensors=tensors), "numpy")
    assert model.format == str(np.dtype(dtype)) and model.embedding.dtype == np.float32
    ids, expected = golden("qwen2")
    largest, relative = errors(model.forward(ids), expected)
    assert relative <= (1e-4 if dtype == np.float32 else 0.03)
    narrow = load_model(variant(tmp_path, "qwen2", tensors=tensors), "numpy", dtype="float16")
    assert narrow.embedding.dtype == np.float16


def test_a_weight_beyond_float16_is_named(tmp_path):
    weight = np.full((192, 192), 1e5, ml_dtypes.bfloat16)
    folder = variant(tmp_path, "qwen2", tensors={"model.layers.1.self_attn.o_proj.weight": weight})
    message = "tensor 'model.layers.1.self_attn.o_proj.weight': holds values beyond the range of float16; .*bfloat16"
    with pytest.raises(FormatError, match=message):
        load_model(folder, "numpy", dtype="float16")
    load_model(folder, "numpy")


def test_a_stale_index_and_other_files_do_no_harm(tmp_path):
    folder = variant(tmp_path, "qwen2")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "nowhere.safetensors"}}')
    shutil.copy(ARCH / "qwen2/golden.safetensors", folder)
    load_model(folder, "numpy")


def test_shards_are_merged(tmp_path):
    folder = variant(tmp_path, "qwen2", tensors={}, drop=["model.layers.1."])
    file = SafetensorsFile(ARCH / "qwen2/model.safetensors")
    rest = {name: np.ascontiguousarray(file.array(name)) for name in file.names if name.startswith("model.layers.1.")}
    save_file(rest, folder / "output-00002-of-00002.safetensors")
    ids, expected = golden("qwen2")
    assert is_float32_exact(load_model(folder, "numpy").forward(ids), expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen2", "model.embed_tokens.weight"),
        ("qwen2", "model.layers.1.self_attn.k_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen2", "model.norm.weight"),
        ("qwen2", "lm_head.weight"),
        ("qwen3", "model.layers.2.self_attn.q_norm.weight"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("shakespeare-exl2-2.5", "model.layers.3.mlp.up_proj.q_scale_max"),
        ("shakespeare-exl2-2.5", "lm_head.q_invperm"),
        ("shakespeare-gptq-g32", "model.layers.2.mlp.down_proj.scales"),
    ],
)
def test_a_missing_tensor_is_named_with_its_folder(tmp_path, name, tensor):
    folder = variant(tmp_path, name, drop=[tensor])
    with pytest.raises(FormatError) as caught:
        load_model(folder, "numpy")
    message = str(caught.value)
    assert message.startswith(f"{folder}: tensor '{tensor}' is missing") and "\n" not in message


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = variant(tmp_path, "qwen2", tensors={name: np.zeros((384, 191), np.float16)})
    message = rf"model\.safetensors: tensor '{name}': shape \[384, 191\], expected \[384, 192\], as config\.json says"
    with pytest.raises(FormatError, match=message):
        load_model(folder, "numpy")
    with pytest.raises(FormatError, match=r"embed_tokens.weight': shape \[512, 192\], expected \[500, 192\]"):
        load_model(variant(tmp_path, "qwen2", setting(vocab_size=500)), "numpy")


def test_a_quantized_matrix_of_the_wrong_size_is_named(tmp_path):
    folder = variant(tmp_path, "shakespeare-exl2-4.0", setting(intermediate_size=800))
    message = r"'model.layers.0.mlp.gate_proj.q_weight': a matrix of 256 x 768, expected 256 x 800"
    with pytest.raises(FormatError, match=message):
        load_model(folder, "numpy")


def test_a_damaged_quantized_tensor_is_named_with_its_file(tmp_path):
    name = "model.layers.0.self_attn.q_proj.q_groups"
    bad = SafetensorsFile(EXAMPLES / "shakespeare-exl2-4.0/output.safetensors").array(name).copy()
    bad[0] = 7
    folder = variant(tmp_path, "shakespeare-exl2-4.0", tensors={name: bad})
    with pytest.raises(FormatError, match=rf"variant/model\.safetensors: {name}: group 0 has bit width 7"):
        load_model(folder, "numpy")


def test_a_tensor_of_an_unknown_dtype_is_named(tmp_path):
    folder = variant(tmp_path, "qwen2", tensors={"lm_head.weight": np.zeros((512, 192), np.int8)})
    with pytest.raises(UnsupportedError, match="'lm_head.weight': dtype int8, expected float16, bfloat16 or float32"):
        load_model(folder, "numpy")


def test_weights_nobody_asked_for_are_named(tmp_path):
    """A config of fewer layers, or a bias the config denies, would run and talk nonsense."""
    with pytest.raises(FormatError, match=r"'model.layers.1\..*not part of a Qwen2ForCausalLM of 1 layers"):
        load_model(variant(tmp_path, "qwen2", setting(num_hidden_layers=1, layer_types=None)), "numpy")
    with pytest.raises(FormatError, match="k_norm.weight': not part of a LlamaForCausalLM of 3"):
        load_model(variant(tmp_path, "qwen3", setting(architectures=["LlamaForCausalLM"])), "numpy")
    with pytest.raises(FormatError, match="q_proj.bias': not zero, but MistralForCausalLM has no such bias"):
        load_model(variant(tmp_path, "qwen2", setting(architectures=["MistralForCausalLM"])), "numpy")


def test_a_bias_of_zeros_is_dropped(tmp_path):
    name = "shakespeare-gptq-g32"
    zeros = {"model.layers.0.mlp.up_proj.bias": np.zeros(768, np.float16)}
    model = load_model(variant(tmp_path, name, tensors=zeros), "numpy")
    assert model.layers[0].mlp.up.bias is None


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)}
    load_model(variant(tmp_path, "qwen2", tensors=extra), "numpy")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], ValueError, "ids is empty"),
        (np.zeros((2, 0), np.int32), ValueError, r"ids is empty, shape \(2, 0\)"),
        ([1, 512], ValueError, r"ids: 512 at \[0, 1\], expected 0 to 511"),
        ([[1, 2], [3, -1]], ValueError, r"ids: -1 at \[1, 1\]"),
        (np.array([2**40]), ValueError, "ids: 1099511627776"),
        ([1.0, 2.0], TypeError, "ids must be whole numbers, got dtype float64"),
        ([True, False], TypeError, "ids must be whole numbers, got dtype bool"),
        ("abc", TypeError, "ids must be whole numbers, got dtype <U3"),
        ([[1, 2], [3]], TypeError, "ids must be whole numbers"),
        (3, ValueError, r"ids must have shape \[batch, seq\] or \[seq\], got \(\)"),
        (np.zeros((1, 1, 1), np.int32), ValueError, r"got \(1, 1, 1\)"),
        (np.zeros(257, np.int32), ValueError, "ids: 257 tokens per row, but the model's context is 256"),
    ],
)
def test_bad_ids(ids, error, message):
    with pytest.raises(error, match=message) as caught:
        loaded("qwen2").forward(ids)
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_cache():
    model = loaded("qwen2")
    cache = model.new_cache(capacity=10)
    model.forward(range_of(8), cache)
    with pytest.raises(ValueError, match=r"prompt longer than the cache: 3 tokens after 8 pass its capacity of 10"):
        model.forward(range_of(3), cache)
    assert cache.length == 8
    model.forward(range_of(2), cache)
    with pytest.raises(ValueError, match="prompt longer than the cache: 1 tokens after 10"):
        model.forward([1], cache)


def range_of(count):
    return np.arange(count)


def test_a_cache_of_another_kind():
    model, other = loaded("qwen2"), loaded("qwen3")
    with pytest.raises(ValueError, match="cache is another model's"):
        model.forward([1], other.new_cache(capacity=4))
    with pytest.raises(ValueError, match="cache is another model's"):
        narrow = KVCache(np, batch=1, capacity=4, layers=2, kv_heads=1, head_dim=64, dtype=np.float16)
        model.forward([1], narrow)
    with pytest.raises(ValueError, match="cache has 2 rows and ids 1: make one with new_cache.batch=1"):
        model.forward([1], model.new_cache(batch=2, capacity=4))
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        model.forward([1], {})
    with pytest.raises(ValueError, match="capacity must be at most 256"):
        model.new_cache(capacity=257)
    assert model.new_cache().capacity == 256


def test_a_failed_step_leaves_the_cache_as_it_was(monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 4)
    model = load_model(ARCH / "qwen2", "numpy")
    cache = model.new_cache(capacity=20)
    model.forward(range_of(3), cache)
    calls = []

    def fail_late(hidden, step, dtype, layer=model.layers[0]):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return layer(hidden, step, dtype)

    model.layers[0] = fail_late
    with pytest.raises(MemoryError):
        model.forward(range_of(12), cache)
    assert cache.length == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "torch"}, ValueError, "backend must be 'auto', 'numpy' or 'cupy', got 'torch'"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32, float16, bfloat16 with .*'numpy', got 'int8'"),
        ({"dtype": np.float64}, ValueError, "dtype must be one of"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be from 1 to 256"),
        ({"max_seq_len": 257}, ValueError, "max_seq_len must be from 1 to 256"),
        ({"max_seq_len": 8.0}, TypeError, "max_seq_len must be a whole number, got float"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load_model(ARCH / "qwen2", **({"backend": "numpy"} | arguments))


def test_max_seq_len_limits_context_and_cache():
    model = load_model(ARCH / "qwen2", "numpy", max_seq_len=np.int64(16))
    assert model.config.max_seq_len == 16 and model.new_cache().capacity == 16 and len(model.sin) == 16
    with pytest.raises(ValueError, match="the model's context is 16"):
        model.forward(range_of(17))


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_device, "count", lambda: 0)
    assert load_model(ARCH / "qwen2").backend == "numpy"
    with pytest.raises(BackendError, match="CuPy cannot be imported|no usable GPU for backend='cupy': run `cupyq"):
        load_model(ARCH / "qwen2", "cupy")


@pytest.mark.parametrize("path", ["absent", "."])
def test_a_folder_that_is_no_model(tmp_path, path):
    with pytest.raises(FormatError, match=r"cannot be opened .No such file"):
        load_model(tmp_path / path, "numpy")


def test_a_rope_scaling_its_tables_refuse_is_named_with_its_file(tmp_path):
    edit = setting(rope_parameters={"rope_type": "yarn", "factor": "x", "rope_theta": 1e6})
    with pytest.raises(FormatError, match=r"variant/config\.json: rope scaling 'factor' must be a positive number"):
        load_model(variant(tmp_path, "qwen2", edit), "numpy")


def test_sizes_no_machine_holds_are_refused_before_memory_is_asked_for(tmp_path):
    with pytest.raises(FormatError, match="shape"):
        load_model(variant(tmp_path, "qwen2", setting(vocab_size=1 << 24, hidden_size=1 << 20, head_dim=64)), "numpy")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@functools.cache
def on_gpu(name, dtype=None):
    return load_model(folder_of(name), "cupy", dtype=dtype)


def check_float16(name, logits, expected):
    largest, relative = errors(logits, expected)
    most, most_relative = MEASURED_FLOAT16[name]
    assert largest <= 2 * most and relative <= 2 * most_relative, (largest, relative)
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.97


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_logits_on_the_gpu(cupy, name):
    ids, expected = golden(name)
    model = on_gpu(name)
    logits = model.forward(ids)
    assert isinstance(logits, cupy.ndarray) and logits.dtype == np.float32 and logits.shape == expected.shape
    assert model.backend == "cupy" and model.dtype == np.float16
    check_float16(name, logits.get(), expected)
    again = model.forward(cupy.asarray(ids.astype(np.int32)))
    assert np.array_equal(again.get().view(np.uint32), logits.get().view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_on_the_gpu(cupy, name):
    ids, expected = golden(name)
    model = on_gpu(name)
    cache = model.new_cache(batch=len(ids), capacity=96)
    parts = [model.forward(ids[:, :40], cache)] + [model.forward(ids[:, i : i + 1], cache) for i in range(40, 96)]
    check_float16(name, np.concatenate([part.get() for part in parts], axis=1), expected[:, :96])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma2", "shakespeare-exl2-4.0"])
def test_long_prompts_go_in_chunks_on_the_gpu(cupy, monkeypatch, name):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 20)
    ids, expected = golden(name)
    ids, expected = ids[:, :96], expected[:, :96]
    model = on_gpu(name)
    cache = model.new_cache(batch=len(ids), capacity=100)
    check_float16(name, model.forward(ids, cache).get(), expected)
    cache.reset()
    last = model.forward(ids, cache, last_only=True).get()
    assert errors(last, expected[:, -1:])[0] <= 2 * MEASURED_FLOAT16[name][0]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "file"), greedy_cases(MODELS))
def test_greedy_tokens_on_the_gpu(cupy, name, file):
    case = json.loads((folder_of(name) / f"{file}.json").read_text())
    prompt, expected = case["prompt"], case["greedy"]
    logits = loaded(name).forward(prompt + expected[:-1])[0, len(prompt) - 1 :]
    two_best = np.sort(logits, axis=-1)[:, -2:]
    margins = two_best[:, 1] - two_best[:, 0]
    # Up to the first step where the two best logits are nearer than float16 can tell apart.
    unsure = np.flatnonzero(margins <= 2 * MEASURED_FLOAT16[name][0])
    count = int(unsure[0]) if unsure.size else len(margins)
    assert count >= 8
    assert greedy_tokens(on_gpu(name), prompt, count) == expected[:count]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama3-rope", "mixtral"])
def test_bfloat16_on_the_gpu(cupy, name):
    """At most twice as far from the golden as the reference with the same dtype."""
    ids, expected = golden(name)
    largest, relative = errors(load_model(folder_of(name), "numpy", dtype="bfloat16").forward(ids), expected)
    model = on_gpu(name, "bfloat16")
    assert model.dtype == ml_dtypes.bfloat16
    found = errors(model.forward(ids).get(), expected)
    assert found[0] <= 2 * largest and found[1] <= 2 * relative


@pytest.mark.gpu
def test_ids_outside_the_vocabulary_on_the_gpu(cupy):
    model = on_gpu("qwen2")
    with pytest.raises(ValueError, match=r"ids: 512 at \[0, 1\]"):
        model.forward([1, 512])
    with pytest.raises(TypeError, match="whole numbers"):
        model.forward(cupy.asarray([1.0, 2.0]))
    with pytest.raises(ValueError, match="ids is empty"):
        model.forward(cupy.zeros((1, 0), np.int32))
    ids = np.arange(10).reshape(2, 5)
    good = model.forward(ids).get()
    ids[1, 4] = 512
    bad = model.forward(cupy.asarray(ids)).get()
    assert np.isnan(bad[1, 4]).all()
    assert np.array_equal(bad[0], good[0])


@pytest.mark.gpu
def test_a_model_on_numpy_refuses_gpu_ids(cupy):
    with pytest.raises(TypeError, match="ids is a CuPy array and the model runs on NumPy"):
        loaded("qwen2").forward(cupy.asarray([1]))
    with pytest.raises(ValueError, match="cache is another model's"):
        on_gpu("qwen2").forward([1], loaded("qwen2").new_cache(capacity=4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma2", "shakespeare-exl2-2.5"])
def test_loading_compiles_what_running_needs(cupy, monkeypatch, tmp_path, name):
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path))
    model = load_model(folder_of(name), "cupy")
    compiled = {path.name for path in tmp_path.iterdir()}
    assert compiled
    from cupyq import _kernels

    _kernels.forget_loaded()  # what other tests have loaded does not count
    cache = model.new_cache(capacity=140)
    for seq in (5, 1, 30, 100, 1):
        model.forward(np.arange(seq), cache, last_only=True)
    model.forward(np.arange(12))
    assert {path.name for path in tmp_path.iterdir()} == compiled


@pytest.mark.gpu
def test_loading_leaves_no_second_copy_on_the_gpu(cupy):
    pool = cupy.get_default_memory_pool()
    load_model(EXAMPLES / "shakespeare", "cupy")
    gc.collect()
    before = pool.used_bytes()
    model = load_model(EXAMPLES / "shakespeare", "cupy", max_seq_len=128)
    grown = pool.used_bytes() - before
    assert 2 * model.parameters <= grown <= 2.2 * model.parameters + (1 << 20)
