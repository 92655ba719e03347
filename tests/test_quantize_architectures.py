"""Quantizing models whose matrices are stored as one, the other way round or under other names: the same bytes as of a twin.

The twin has the same weights, one matrix for each linear layer, [outputs, inputs], under the names that the model has for
them. What is fused is taken apart here, by slices written out, and knows nothing of how cupyq does it.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest
from architecture_cases import EXPERTS, HEADS, IDS, INNER, KV, KV_HEADS, VOCAB, Q, made, write
from safetensors.numpy import load_file, save_file
from test_quantize_job import digest, quantize, with_text

from cupyq.formats.safetensors import Checkpoint
from cupyq.models import load_model
from cupyq.models.architectures import ARCHITECTURES
from cupyq.quantize import work
from cupyq.quantize.layouts import Layout
from cupyq.quantize.walk import LayerWalk

EXL2 = {"bits": 8.4, "head_bits": 8, "menu": tuple(map(Layout.parse, ("6g32", "8g128"))), "sensitivity_tokens": 0}
GPTQ = {"format": "gptq", "bits": 8, "group_size": 32}
FORMATS = {"exl2": (EXL2, "output.safetensors", 0.1), "gptq": (GPTQ, "model.safetensors", 0.05)}

# --- twins ------------------------------------------------------------------------------------------------------------

GPT2_NAMES = (
    ("|h.", "model.layers."),
    ("|wte.", "model.embed_tokens."),
    ("|wpe.", "model.wpe."),
    ("|ln_f.", "model.norm."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".attn.c_attn.", ".self_attn.qkv."),
)
NAMES = {
    "gpt2": GPT2_NAMES,
    "gpt-bigcode-many-heads": (("transformer.", "|"), *GPT2_NAMES),
    "dbrx": (
        ("transformer.wte.", "model.embed_tokens."),
        ("transformer.norm_f.", "model.norm."),
        ("transformer.blocks.", "model.layers."),
        (".norm_attn_norm.norm_1.", ".input_layernorm."),
        (".norm_attn_norm.norm_2.", ".post_attention_layernorm."),
        (".norm_attn_norm.attn.out_proj.", ".self_attn.o_proj."),
        (".norm_attn_norm.attn.Wqkv.", ".self_attn.qkv."),
        (".ffn.router.layer.", ".block_sparse_moe.gate."),
        (".ffn.experts.mlp.", ".block_sparse_moe.experts."),
    ),
    "internlm2": (
        ("|output.", "lm_head."),
        ("model.tok_embeddings.", "model.embed_tokens."),
        (".attention.wo.", ".self_attn.o_proj."),
        (".attention.wqkv.", ".self_attn.qkv."),
    ),
    "phi3": ((".qkv_proj.", ".qkv."),),
    "yi": ((".ln1.", ".input_layernorm."), (".ln2.", ".post_attention_layernorm.")),
    "gemma3": (("language_model.", ""),),
    "pixtral": (("language_model.", ""),),
}
GROUPS = {"internlm2": KV_HEADS, "gpt-bigcode-many-heads": HEADS}
"""Heads of keys, where each stands behind its heads of q and before its head of v."""


def q_k_v(name, array):
    if name == "gpt2":
        return np.split(array, 3)
    if name not in GROUPS:
        return np.split(array, [Q, Q + KV])
    q, k, v = [], [], []
    for group in np.split(array, GROUPS[name]):
        *own, key, value = np.split(group, HEADS // GROUPS[name] + 2)
        q, k, v = [*q, *own], [*k, key], [*v, value]
    return [np.concatenate(heads) for heads in (q, k, v)]


def parts_of(name, key, value):
    """{name: array} of what a tensor is in the twin."""
    for old, new in NAMES.get(name, ()):
        key = f"|{key}".replace(old, new).removeprefix("|")
    if name == "gpt2" and value.ndim == 2 and ".layers." in key:
        value = value.T
    if ".qkv." in key:
        return {key.replace(".qkv.", f".{n}_proj."): part for n, part in zip("qkv", q_k_v(name, value), strict=True)}
    if ".gate_up_proj." in key:
        halves = {"gate_proj": value[:INNER], "up_proj": value[INNER:]}
        return {key.replace("gate_up_proj", half): part for half, part in halves.items()}
    if ".experts." in key:
        within, matrix = key.rsplit(".", 1)
        blocks = [block.T if matrix == "w2" else block for block in np.split(value, EXPERTS)]
        return {f"{within}.{expert}.{matrix}.weight": block for expert, block in enumerate(blocks)}
    return {key: value}


def source_of(folder, name, tensors=None, **keys):
    if tensors is not None:
        tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    write(folder / "in", name, tensors)
    if keys:
        path = folder / "in/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return with_text(folder / "in", VOCAB)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """sources(name): the folder of a model, written once."""
    return functools.cache(lambda name: source_of(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, sources):
    """outputs(name, format): the folder of the quantized model, made once."""

    @functools.cache
    def output(name, kind):
        out = tmp_path_factory.mktemp("out") / name
        run(sources(name), out, kind)
        return out

    return output


def run(source, out, kind, **options):
    return quantize(source, out, rows=2, windows=0, **FORMATS[kind][0], **options)


def tensors_of(source):
    return load_file(source / "model.safetensors")


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


TWINS = [("exl2", name) for name in ("phi3", "internlm2", "gpt2", "gpt-bigcode-many-heads", "dbrx", "glm4", "yi", "pixtral")]
TWINS += [("gptq", name) for name in ("internlm2", "gpt2", "dbrx", "gemma3")]


def run_twin(folder, monkeypatch, source, name, kind, **options):
    """The Result of quantizing the source's twin to folder / "twin"."""
    parts = [parts_of(name, key, value) for key, value in tensors_of(source).items()]
    twin = source_of(folder, name, {key: value for part in parts for key, value in part.items()})
    with monkeypatch.context() as patch:
        if name == "gpt2":
            row = ARCHITECTURES["GPT2LMHeadModel"]
            patch.setitem(ARCHITECTURES, row.name, dataclasses.replace(row, is_transposed=False))
        return run(twin, folder / "twin", kind, **options)


@pytest.mark.parametrize(("kind", "name"), TWINS)
def test_the_same_bytes_as_of_a_twin(tmp_path, monkeypatch, sources, outputs, kind, name):
    source, out, (_, file, bound) = sources(name), outputs(name, kind), FORMATS[kind]
    coded = load_model(out, "numpy")
    assert {linear.kind for linear in coded._decoder_linears()} == {kind}
    assert relative(coded.forward(IDS), load_model(source, "numpy").forward(IDS)) <= bound
    result = run_twin(tmp_path, monkeypatch, source, name, kind)
    assert (tmp_path / "twin" / file).read_bytes() == (out / file).read_bytes()
    if kind == "exl2":
        assert result.bits_per_weight == pytest.approx(coded.bits_per_weight)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after.pop("quantization_config")["quant_method"] == kind and after == before


def test_a_wrong_slice_would_be_noticed(tmp_path, sources, outputs):
    """Keys for values: the bytes are another model's."""
    parts = [parts_of("phi3", key, value) for key, value in tensors_of(sources("phi3")).items()]
    tensors = {key: value for part in parts for key, value in part.items()}
    key = "model.layers.1.self_attn"
    names = [f"{key}.k_proj.weight", f"{key}.v_proj.weight"]
    tensors[names[0]], tensors[names[1]] = (tensors[name] for name in reversed(names))
    run(source_of(tmp_path, "phi3", tensors), tmp_path / "twin", "exl2")
    assert (tmp_path / "twin/output.safetensors").read_bytes() != (outputs("phi3", "exl2") / "output.safetensors").read_bytes()


# --- names ------------------------------------------------------------------------------------------------------------

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ENDS = ("model.embed_tokens", "model.norm", "lm_head")
WRITTEN = {
    "phi3": (*LLAMA_NORMS, *MLP),
    "glm4": (*LLAMA_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm", *MLP),
    "internlm2": ("attention_norm", "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "gpt2": ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    "gpt-bigcode-many-heads": ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    "dbrx": (
        *LLAMA_NORMS,
        "block_sparse_moe.gate",
        *(f"block_sparse_moe.experts.{expert}.{matrix}" for expert in range(EXPERTS) for matrix in ("w1", "v1", "w2")),
    ),
    "yi": ("ln1", "ln2", *MLP),
    "pixtral": (*LLAMA_NORMS, *MLP),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_modules_have_the_names_of_exllamav2(outputs, name):
    """Keys of its modules (architecture.py of exllamav2 0.3.2): its converter writes them, its keymaps leave them alone."""
    prefix = "language_model." if name == "pixtral" else ""
    expected = {f"{prefix}{end}" for end in ENDS} | ({"model.wpe"} if name.startswith("gpt") else set())
    expected |= {f"{prefix}model.layers.{layer}.{part}" for layer in range(2) for part in (*ATTENTION, *WRITTEN[name])}
    with Checkpoint(outputs(name, "exl2")) as checkpoint:
        assert {tensor.rpartition(".")[0] for tensor in checkpoint.names} == expected
        biased = {tensor.rpartition(".")[0] for tensor in checkpoint.names if tensor.endswith(".bias")}
        if name.startswith("gpt"):
            assert biased == {key for key in expected if ".layers." in key or key == "model.norm"}
            assert checkpoint.info("model.layers.0.self_attn.k_proj.bias").dtype == np.float16
        else:
            assert {key.rpartition(".")[2] for key in biased} == ({"q_proj", "k_proj", "v_proj"} if name == "glm4" else set())


def test_what_is_no_weight_is_left_out(tmp_path, sources, outputs):
    """GPT-2's prefix, and masks of a dtype that no reader takes; a bias of zeros beside a fused matrix that has none."""
    tensors = {f"transformer.{key}": value for key, value in tensors_of(sources("gpt2")).items()}
    tensors |= {f"transformer.h.{layer}.attn.bias": np.ones((1, 1, 4, 4), np.uint8) for layer in range(2)}
    tensors["transformer.h.0.attn.masked_bias"] = np.full(1, -1e4, np.float32)
    zeros = {"model.layers.0.self_attn.qkv_proj.bias": np.zeros(Q + 2 * KV, np.float32)}
    for name, changed in (("gpt2", tensors), ("phi3", tensors_of(sources("phi3")) | zeros)):
        run(source_of(tmp_path / name, name, changed), tmp_path / name / "out", "exl2")
        written, expected = ((folder / "output.safetensors") for folder in (tmp_path / name / "out", outputs(name, "exl2")))
        assert written.read_bytes() == expected.read_bytes()


def test_the_newer_layout_of_vision_models(tmp_path, sources, outputs):
    """Written in the older one; what sees goes along, from a file of its own too."""
    new = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}
    tensors = {}
    for key, value in tensors_of(sources("pixtral")).items():
        for old, name in new.items():
            key = key.replace(old, name)
        tensors[key] = value
    seeing = {f"model.{key}.weight": value for key, value in made({"vision_tower.ln_pre": (3,)}).items()}
    source = source_of(tmp_path, "pixtral", tensors)
    save_file(seeing, source / "vision.safetensors")
    run(source, tmp_path / "out", "exl2")
    written = load_file(tmp_path / "out/output.safetensors")
    assert np.array_equal(written.pop("vision_tower.ln_pre.weight"), seeing["model.vision_tower.ln_pre.weight"])
    expected = load_file(outputs("pixtral", "exl2") / "output.safetensors")
    assert written.keys() == expected.keys() and all(np.array_equal(written[key], expected[key]) for key in expected)


# --- side by side, and the rest ---------------------------------------------------------------------------------------


OTHERS = ["starcoder2", "qwen3-moe", "granite", "gemma3-text", "cohere2", "cohere-head-norms"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path, name):
    """Biases and no gate; layers with and without experts; a scaled residual; windows with tables of their own; attention and
    MLP side by side."""
    source = source_of(tmp_path, name)
    result = quantize(source, tmp_path / "out", bits=5, windows=0)
    whole, coded = (load_model(folder, "numpy") for folder in (source, tmp_path / "out"))
    linears = list(coded._decoder_linears())
    assert {linear.kind for linear in linears} == {"exl2"} and len(linears) == len(list(whole._decoder_linears()))
    assert 4.7 < result.bits_per_weight <= 5
    assert relative(coded.forward(IDS), whole.forward(IDS)) <= 0.5


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "count"), [("gpt2", 2), ("dbrx", 9)])
def test_a_kill_between_layers_that_are_stored_as_one(tmp_path, monkeypatch, sources, outputs, name, count):
    real, saved = work.WorkFolder.save, []

    def save(folder, *arguments):
        if len(saved) == count:
            raise Killed
        saved.append(arguments)
        real(folder, *arguments)

    out = tmp_path / name
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(work.WorkFolder, "save", save)
        run(sources(name), out, "exl2")
    assert not out.exists()
    run(sources(name), out, "exl2", resume=True)
    assert digest(out) == digest(outputs(name, "exl2"))


def test_layers_let_go_of_their_weights_one_by_one(sources):
    """Views of one tensor would keep all of it."""
    with LayerWalk(sources("dbrx"), "numpy") as walk:
        linears = next(walk.layers())[1].linears()
        split = [linear for linear in linears if not linear.name.endswith(("o_proj", ".gate"))]
        assert len(split) == 3 + 3 * EXPERTS
        owners = [linear.weight if linear.weight.base is None else linear.weight.base for linear in split]
        assert all(owner.nbytes == linear.weight.nbytes for owner, linear in zip(owners, split, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["phi3", "internlm2", "gpt2", "dbrx"])
def test_twins_on_a_gpu(tmp_path, monkeypatch, cupy, sources, name):
    """The same bytes, biases and float32 weights that are float16 there included."""
    run(sources(name), tmp_path / "out", "exl2", backend="cupy")
    run_twin(tmp_path, monkeypatch, sources(name), name, "exl2", backend="cupy")
    written, expected = (tmp_path / folder / "output.safetensors" for folder in ("out", "twin"))
    assert written.read_bytes() == expected.read_bytes()
    logits = load_model(tmp_path / "out", "numpy").forward(IDS)
    assert relative(logits, load_model(sources(name), "numpy").forward(IDS)) <= 0.2


@pytest.mark.gpu
def test_side_by_side_on_a_gpu(tmp_path, cupy):
    source = source_of(tmp_path, "cohere")
    run(source, tmp_path / "out", "exl2", backend="cupy")
    logits = load_model(tmp_path / "out", "numpy").forward(IDS)
    assert relative(logits, load_model(source, "numpy").forward(IDS)) <= 0.2
