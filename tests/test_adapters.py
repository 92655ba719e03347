"""models/adapters.py and layers/lora.py: PEFT folders, and whole models with them against models with merged weights."""

import functools
import json
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file
from test_models import folder_of, packed, setting, variant

from cupyq.cli import main
from cupyq.errors import FormatError, UnsupportedError
from cupyq.generate import SamplerSettings, generate
from cupyq.layers import Adapter, Linear
from cupyq.models import load_model

bfloat16 = np.dtype(ml_dtypes.bfloat16)
SHAKESPEARE = ROOT / "examples/models/shakespeare"
MODELS = ("shakespeare", "llama3-rope", "qwen2", "qwen3", "gemma2", "mixtral")


@functools.cache
def sizes_of(name):
    """{projection: (k, n)} of a model, router and head included."""
    return {key: (linear.k, linear.n) for key, linear in load_model(folder_of(name), "numpy")._linears_by_projection().items()}


def tensors_of(sizes, rank, seed=0, dtype=np.float32, scale=1.0):
    """Tensors of a PEFT file: `rank` a number, or a function of the projection. Deltas about as large as the weights."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for projection, (k, n) in sizes.items():
        r = rank if isinstance(rank, int) else rank(projection)
        module = f"base_model.model.{'' if projection == 'lm_head' else 'model.'}{projection}"
        tensors[f"{module}.lora_A.weight"] = (rng.standard_normal((r, k)) * scale / math.sqrt(k)).astype(dtype)
        tensors[f"{module}.lora_B.weight"] = (rng.standard_normal((n, r)) / math.sqrt(r)).astype(dtype)
    return tensors


def write(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4} | config))
    return folder


def merge(model, *adapters):
    """Add weight * scale * B A to the matrices of a NumPy model: (tensors, {projection: scale} or a number, weight)."""
    for tensors, scales, weight in adapters:
        for projection, linear in model._linears_by_projection().items():
            module = f"base_model.model.{'' if projection == 'lm_head' else 'model.'}{projection}"
            if f"{module}.lora_A.weight" not in tensors:
                continue
            a, b = (tensors[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            scale = scales[projection] if isinstance(scales, dict) else scales
            dense = linear.weight.dense.T if linear.is_quantized else linear.weight
            linear.weight = np.ascontiguousarray(dense + weight * scale * (b @ a), np.float32)
            linear.is_quantized = False
    return model


def ids_of(batch, seq, seed=3):
    return np.random.default_rng(seed).integers(0, 500, (batch, seq))


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# --- models -----------------------------------------------------------------------------------------------------------


def mixed_rank(projection):
    return 3 if projection.endswith(("q_proj", "w2")) else 5 if projection.startswith("layers.1.") else 4


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_equals_merged_weights(tmp_path, name):
    """Every projection, of three ranks; with a cache too. gemma2: the delta comes before the post-norms."""
    sizes = sizes_of(name)
    tensors = tensors_of(sizes, mixed_rank, scale=0.5)
    folder = write(tmp_path / "style", tensors, lora_alpha=6, rank_pattern={"q_proj": 3, "w2": 3, r"layers\.1\..*": 5})
    model = load_model(folder_of(name), "numpy")
    ids = ids_of(2, 12)
    base = model.forward(ids)
    assert model.load_adapter(folder) == "style" and model.adapters == ["style"]
    assert np.array_equal(model.forward(ids), base)
    scales = {projection: 6 / mixed_rank(projection) for projection in sizes}
    expected = merge(load_model(folder_of(name), "numpy"), (tensors, scales, 1)).forward(ids)
    found = model.forward(ids, adapters="style")
    assert relative(found, expected) <= 1e-5 and relative(base, expected) > 0.1
    cache = model.new_cache(batch=2, capacity=12)
    parts = [model.forward(ids[:, i:j], cache, adapters="style") for i, j in ((0, 11), (11, 12))]
    assert relative(np.concatenate(parts, axis=1), expected) <= 1e-5
    cache.reset()
    assert relative(model.forward(ids, cache, last_only=True, adapters=["style", "style"]), expected[:, -1:]) <= 1e-5
    model.unload_adapter("style")
    assert model.adapters == [] and np.array_equal(model.forward(ids), base)


@pytest.mark.parametrize(
    "projection",
    ["layers.0.self_attn.o_proj", "layers.1.block_sparse_moe.experts.2.w1", "layers.0.block_sparse_moe.gate", "lm_head"],
)
def test_each_kind_of_projection_counts(tmp_path, projection):
    """One at a time, so that none can hide behind the others."""
    sizes = {projection: sizes_of("mixtral")[projection]}
    tensors = tensors_of(sizes, 4, scale=2.0)
    model, ids = load_model(folder_of("mixtral"), "numpy"), ids_of(1, 12)
    base = model.forward(ids)
    model.load_adapter(write(tmp_path / "one", tensors))
    expected = merge(load_model(folder_of("mixtral"), "numpy"), (tensors, 1, 1)).forward(ids)
    assert relative(model.forward(ids, adapters="one"), expected) <= 1e-5 and relative(base, expected) > 1e-3


def two_adapters(tmp_path, name, **options):
    """(model, tensors of "a", tensors of "b"): a changes all projections, b some of them with another rank."""
    sizes = sizes_of(name)
    some = {key: size for key, size in sizes.items() if key.endswith(("v_proj", "up_proj", "w3", "lm_head"))}
    a, b = tensors_of(sizes, 4, seed=1, scale=0.4), tensors_of(some, 2, seed=2, scale=0.6)
    model = load_model(folder_of(name), **({"backend": "numpy"} | options))
    model.load_adapter(write(tmp_path / "a", a))
    model.load_adapter(write(tmp_path / "b", b, r=2, lora_alpha=1), scaling=0.5)
    return model, a, b


B_SCALE = 0.25  # of two_adapters: 0.5 * lora_alpha / r


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_several_adapters_at_once(tmp_path, name):
    model, a, b = two_adapters(tmp_path, name)
    ids = ids_of(1, 16)
    for choice, weight_a, weight_b in (({"a": 0.5, "b": -2.0}, 0.5, -2), (("b", "a"), 1, 1), ({"b": 3, "a": 0}, 0, 3)):
        expected = merge(load_model(folder_of(name), "numpy"), (a, 1, weight_a), (b, B_SCALE, weight_b)).forward(ids)
        assert relative(model.forward(ids, adapters=choice), expected) <= 1e-5, choice


CHOICES = [None, "a", {"b": 0.5}, ("a", "b"), {"a": -1.0, "b": 2.0}]


@pytest.mark.parametrize("name", ["shakespeare-exl2-2.5", "gemma2", "mixtral"])
def test_each_row_of_a_batch_has_its_own_adapters(tmp_path, name):
    model, _, _ = two_adapters(tmp_path, name)
    ids = ids_of(len(CHOICES), 14)
    cache = model.new_cache(batch=len(CHOICES), capacity=14)
    whole = model.forward(ids, adapters=CHOICES)
    steps = [model.forward(ids[:, i:j], cache, adapters=CHOICES) for i, j in ((0, 10), (10, 11), (11, 14))]
    assert relative(np.concatenate(steps, axis=1), whole) <= 1e-5
    for row, choice in enumerate(CHOICES):
        alone = model.forward(ids[row], adapters=choice)
        assert relative(whole[row : row + 1], alone) <= 1e-5, choice
        assert relative(alone, whole[row - 1 : row or None]) > 0.01


def test_adapters_come_and_go(tmp_path):
    model, _, _ = two_adapters(tmp_path, "llama3-rope")
    ids = ids_of(1, 8)
    with_a, with_b = model.forward(ids, adapters="a"), model.forward(ids, adapters="b")
    model.unload_adapter("a")
    assert model.adapters == ["b"] and np.array_equal(model.forward(ids, adapters="b"), with_b)
    assert model.load_adapter(tmp_path / "a", name="again", scaling=2) == "again"
    assert model.adapters == ["b", "again"]
    assert relative(model.forward(ids, adapters={"again": 0.5}), with_a) <= 1e-6
    assert np.array_equal(model.forward(ids, adapters="b"), with_b)
    model.unload_adapter("b")
    model.unload_adapter("again")
    assert all(linear.lora is None for linear in model._linears_by_projection().values())
    assert model.load_adapter(tmp_path / "a") == "a" and np.array_equal(model.forward(ids, adapters="a"), with_a)


def test_a_head_padded_to_32_columns(tmp_path):
    """Quantizers round N up to 32, adapters have as many rows as the vocabulary."""
    tensors = packed(np.random.default_rng(0), "lm_head", 192, 481)
    embedding = np.random.default_rng(1).standard_normal((481, 192)).astype(np.float16)
    drop = ["lm_head", "model.embed_tokens"]
    extra = tensors | {"model.embed_tokens.weight": embedding}
    folder = variant(tmp_path, "qwen2", setting(vocab_size=481), drop=drop, tensors=extra)
    model, adapter = load_model(folder, "numpy"), tensors_of({"lm_head": (192, 481)}, 4)
    assert model.head.n == 512
    ids = ids_of(1, 6) % 481
    base = model.forward(ids)
    model.load_adapter(write(tmp_path / "head", adapter))
    found = model.forward(ids, adapters="head")
    assert found.shape == (1, 6, 481) and relative(found, base) > 0.01
    plain = load_model(folder, "numpy")
    a, b = (adapter[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    weight = plain.head.weight.dense.T.copy()
    weight[:481] += b @ a
    plain.head = Linear(weight)
    assert relative(found, plain.forward(ids)) <= 1e-5
    wide = tensors_of({"lm_head": (192, 512)}, 4)
    with pytest.raises(FormatError, match=r"lm_head.lora_B.weight': shape \[512, 4\], expected \[481, 4\]"):
        model.load_adapter(write(tmp_path / "wide", wide))


def test_activations_of_16_bits(tmp_path):
    """The delta in the model's dtype, twice as far from float32 as the model without one, at most."""
    exact, _, _ = two_adapters(tmp_path, "llama3-rope")
    ids = ids_of(2, 16)
    for dtype in ("float16", "bfloat16"):
        model, _, _ = two_adapters(tmp_path, "llama3-rope", dtype=dtype)
        layer = model.layers[0].attention.q
        assert layer.lora.a.dtype == layer.lora.b.dtype == model.dtype
        usual = relative(model.forward(ids), exact.forward(ids))
        found = relative(model.forward(ids, adapters=[("a", "b"), None]), exact.forward(ids, adapters=[("a", "b"), None]))
        assert usual / 4 <= found <= 3 * usual


# --- what a caller passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ("c", ValueError, "no adapter 'c' is loaded; loaded: 'a', 'b'"),
        ({"c": 1.0}, ValueError, "no adapter 'c' is loaded"),
        (["a", "c"], ValueError, "no adapter 'c' is loaded"),
        (["a"], ValueError, "adapters: a list of 1, expected 2, one choice for each row of ids"),
        (["a", "b", None], ValueError, "adapters: a list of 3, expected 2"),
        (("a", "a"), ValueError, "names an adapter twice"),
        (3, TypeError, "a choice is None, a name, a tuple of names or a dict of names and weights, got int"),
        (["a", ["b"]], TypeError, "a choice is None, .*got list"),
        (("a", 1), TypeError, "the name of an adapter is a str, got int"),
        (("a", {}), TypeError, "the name of an adapter is a str, got dict"),
        ({"a": "1"}, TypeError, "the weight of 'a' must be a number, got str"),
        ({"a": True}, TypeError, "the weight of 'a' must be a number, got bool"),
        ({"a": math.nan}, ValueError, "the weight of 'a' must be a finite float32, got nan"),
        ({"a": 1e39}, ValueError, "the weight of 'a' must be a finite float32"),
    ],
)
def test_bad_choices(tmp_path, adapters, error, message):
    model, _, _ = two_adapters(tmp_path, "qwen2")
    cache = model.new_cache(batch=2, capacity=4)
    with pytest.raises(error, match=message) as caught:
        model.forward(ids_of(2, 3), cache, adapters=adapters)
    assert "\n" not in str(caught.value) and cache.length == 0


def test_choices_without_effect(tmp_path):
    model, _, _ = two_adapters(tmp_path, "qwen2")
    ids = ids_of(2, 5)
    base = model.forward(ids)
    for choice in (None, {}, (), {"a": 0.0}, {"a": 1e-60}, [None, {"b": 0}]):
        assert np.array_equal(model.forward(ids, adapters=choice), base), choice


def test_names(tmp_path):
    model, _, _ = two_adapters(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="name must be one that no loaded adapter has, got 'a'; loaded: 'a', 'b'"):
        model.load_adapter(tmp_path / "b", name="a")
    with pytest.raises(ValueError, match="got ''"):
        model.load_adapter(tmp_path / "b", name="")
    with pytest.raises(TypeError, match="name must be a str, got int"):
        model.load_adapter(tmp_path / "b", name=1)
    with pytest.raises(ValueError, match="no adapter 'c' is loaded; loaded: 'a', 'b'"):
        model.unload_adapter("c")
    with pytest.raises(ValueError, match="scaling must be a finite number, got nan"):
        model.load_adapter(tmp_path / "b", name="c", scaling=math.nan)
    assert load_model(folder_of("qwen2"), "numpy").adapters == []


def test_a_failed_load_changes_nothing(tmp_path):
    model, _, _ = two_adapters(tmp_path, "qwen2")
    before = {key: linear.lora for key, linear in model._linears_by_projection().items()}
    tensors = tensors_of(sizes_of("qwen2") | {"layers.1.mlp.down_proj": (384, 191)}, 4)
    with pytest.raises(FormatError, match=r"layers.1.mlp.down_proj.lora_B.weight': shape \[191, 4\], expected \[192, 4\]"):
        model.load_adapter(write(tmp_path / "bad", tensors))
    assert model.adapters == ["a", "b"]
    assert before == {key: linear.lora for key, linear in model._linears_by_projection().items()}


# --- PEFT folders -----------------------------------------------------------------------------------------------------

UP = "layers.0.mlp.up_proj"
Q = "layers.1.self_attn.q_proj"
A_OF_UP = f"base_model.model.model.{UP}.lora_A.weight"
B_OF_UP = f"base_model.model.model.{UP}.lora_B.weight"


def small(rank=4, **options):
    return tensors_of({UP: (6, 8), Q: (6, 10)}, rank, **options)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 6}, (1.5, 1.5)),
        ({"lora_alpha": 6, "use_rslora": True}, (3.0, 3.0)),
        ({"lora_alpha": 0.5, "use_rslora": None}, (0.125, 0.125)),
        ({"alpha_pattern": {"up_proj": 8}}, (2.0, 1.0)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 8}}, (1.0, 2.0)),
        ({"alpha_pattern": {"model.layers.1.self_attn.q_proj": 8, "q_proj": 16}}, (1.0, 2.0)),
        ({"alpha_pattern": {r"layers\.\d+\.(mlp|self_attn)\..*": 8}}, (2.0, 2.0)),
        ({"alpha_pattern": {"proj": 8, "p_proj": 8, "self_attn": 8, "ayers.1.self_attn.q_proj": 8, "up_pro": 8}}, (1.0, 1.0)),
        ({"alpha_pattern": {"q_proj|up_proj": 12}, "use_rslora": True}, (6.0, 6.0)),
    ],
)
def test_the_scale_of_each_projection(tmp_path, config, scales):
    adapter = Adapter.from_peft(write(tmp_path / "x", small(), **config))
    assert (adapter.projections[UP].scale, adapter.projections[Q].scale) == scales
    doubled = Adapter.from_peft(tmp_path / "x", scaling=-2)
    assert (doubled.projections[UP].scale, doubled.projections[Q].scale) == tuple(-2 * scale for scale in scales)
    assert adapter.name == "x" and adapter.projections.keys() == {UP, Q}


def test_ranks_of_their_own(tmp_path):
    tensors = small(lambda projection: 1 if projection == UP else 7)
    adapter = Adapter.from_peft(write(tmp_path, tensors, r=7, lora_alpha=14, rank_pattern={"mlp.up_proj": 1}))
    assert [(pair.rank, pair.scale) for pair in adapter.projections.values()] == [(1, 14.0), (7, 2.0)]
    with pytest.raises(FormatError, match=rf"'{A_OF_UP}': shape \[1, 6\], expected \[7, inputs\], as adapter_config.json says"):
        Adapter.from_peft(write(tmp_path, tensors, r=7))


@pytest.mark.parametrize("stored", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_the_scale_is_applied_in_float32(tmp_path, stored, dtype):
    tensors = small(dtype=stored)
    pair = Adapter.from_peft(write(tmp_path, tensors, lora_alpha=1.3)).projections[UP]
    a, b = pair.arrays(np.dtype(dtype))
    assert a.flags.c_contiguous and b.flags.c_contiguous and a.dtype == b.dtype == dtype
    assert a.tobytes() == np.ascontiguousarray(tensors[A_OF_UP].astype(np.float32).T.astype(dtype)).tobytes()
    scaled = tensors[B_OF_UP].astype(np.float32) * np.float32(1.3 / 4)
    assert b.tobytes() == np.ascontiguousarray(scaled.T.astype(dtype)).tobytes()
    wide = pair.arrays(np.dtype(dtype), 32)[1]
    assert wide.shape == (4, 32) and wide[:, :8].tobytes() == b.tobytes() and not wide[:, 8:].astype(np.float32).any()


def test_tensors_of_no_effect_are_passed_over(tmp_path):
    module = "base_model.model.lm_head"
    extra = {
        f"base_model.model.model.{UP}.bias": np.zeros(8, np.float32),
        f"base_model.model.model.{Q}.lora_B.bias": np.full(10, 1e-7, np.float32),
        f"{module}.base_layer.weight": np.ones((3, 6), np.float32),
        f"{module}.original_module.weight": np.ones((3, 6), np.float32),
    }
    assert Adapter.from_peft(write(tmp_path, small() | extra, bias="all")).projections.keys() == {UP, Q}


def test_names_with_other_prefixes(tmp_path):
    renamed = {name.replace("base_model.model.model.", "some.wrapper.model."): array for name, array in small().items()}
    renamed |= {f"wrapper.lm_head.lora_{side}.weight": small()[A_OF_UP if side == "A" else B_OF_UP] for side in "AB"}
    adapter = Adapter.from_peft(write(tmp_path, renamed, alpha_pattern={"up_proj": 8}))
    assert adapter.projections.keys() == {UP, Q, "lm_head"} and adapter.projections[UP].scale == 2


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "'peft_type' is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, UnsupportedError, "'use_dora' is set: DoRA"),
        ({"fan_in_fan_out": True}, UnsupportedError, "'fan_in_fan_out' is set"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, "'modules_to_save' is set"),
        ({"trainable_token_indices": [1]}, UnsupportedError, "'trainable_token_indices' is set"),
        ({"layer_replication": [[0, 2]]}, UnsupportedError, "'layer_replication' is set"),
        ({"target_parameters": ["experts"]}, UnsupportedError, "'target_parameters' is set"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "'init_lora_weights' is 'pissa_niter_4', which changes"),
        ({"r": 0}, FormatError, "'r' is 0, expected a whole number from 1 on"),
        ({"r": 4.0}, FormatError, "'r' is 4.0, expected a whole number"),
        ({"r": None}, FormatError, "'r' is None"),
        ({"r": True}, FormatError, "'r' is True"),
        ({"lora_alpha": "8"}, FormatError, "'lora_alpha' is '8', expected a number"),
        ({"lora_alpha": math.inf}, FormatError, r"not JSON \(Infinity is not JSON\)"),
        ({"lora_alpha": 1e10}, FormatError, "'lora_alpha' is 10000000000.0, expected a number"),
        ({"use_rslora": "yes"}, FormatError, "'use_rslora' is 'yes', expected true or false"),
        ({"rank_pattern": [4]}, FormatError, r"'rank_pattern' is \[4\], expected an object"),
        ({"rank_pattern": {"q_proj": 0}}, FormatError, "'rank_pattern.q_proj' is 0, expected a whole number"),
        ({"alpha_pattern": {"q_proj": None}}, FormatError, "'alpha_pattern.q_proj' is None"),
        ({"alpha_pattern": {"(": 1}}, FormatError, r"'alpha_pattern' is '\(', expected regular expressions"),
    ],
)
def test_bad_configs(tmp_path, config, error, message):
    with pytest.raises(error, match=message) as caught:
        Adapter.from_peft(write(tmp_path, small(), **config))
    assert str(caught.value).startswith(f"{tmp_path}/adapter_config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 4', "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path, text):
    write(tmp_path, small())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json: (not JSON|holds a list)") as caught:
        Adapter.from_peft(tmp_path)
    assert "\n" not in str(caught.value)


def with_tensor(name, array=None):
    return lambda tensors: tensors | {name: np.ones((2, 2), np.float32) if array is None else array}


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


PREFIX = "base_model.model.model."


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (without(A_OF_UP), FormatError, f"'{B_OF_UP}': without its '{PREFIX}{UP}.lora_A.weight'"),
        (without(B_OF_UP), FormatError, f"'{A_OF_UP}': without its '{PREFIX}{UP}.lora_B.weight'"),
        (lambda tensors: {}, FormatError, r"no tensor named '\*.lora_A.weight'"),
        (with_tensor(A_OF_UP, np.ones((4, 6), np.int32)), UnsupportedError, "up_proj.lora_A.weight': dtype int32"),
        (
            with_tensor(A_OF_UP, np.ones((6, 4), np.float32)),
            FormatError,
            r"lora_A.weight': shape \[6, 4\], expected \[4, inputs\]",
        ),
        (with_tensor(B_OF_UP, np.ones((8, 5), np.float32)), FormatError, r"shape \[8, 5\], expected \[outputs, 4\]"),
        (with_tensor(B_OF_UP, np.ones(4, np.float32)), FormatError, r"shape \[4\], expected \[outputs, 4\]"),
        (with_tensor(f"{PREFIX}{UP}.bias"), UnsupportedError, "up_proj.bias': a trained bias"),
        (with_tensor(f"{PREFIX}{UP}.lora_B.bias", np.array([0, np.nan], np.float32)), UnsupportedError, "a trained bias"),
        (with_tensor(f"{PREFIX}{UP}.lora_magnitude_vector"), UnsupportedError, "lora_magnitude_vector': belongs to DoRA"),
        (with_tensor("base_model.model.lm_head.modules_to_save.weight"), UnsupportedError, "modules_to_save"),
        (with_tensor("base_model.model.lm_head.weight"), UnsupportedError, "lm_head.weight': not part of a LoRA pair"),
        (with_tensor(f"{PREFIX}embed_tokens.weight"), UnsupportedError, "embed_tokens.weight': belongs to the embedding"),
        (with_tensor(f"{PREFIX}embed_tokens.lora_embedding_A"), UnsupportedError, "belongs to the embedding"),
        (with_tensor(f"{PREFIX}{UP}.ia3_l"), UnsupportedError, "ia3_l': not part of a LoRA pair"),
        (
            lambda tensors: {name.replace("model.layers", "transformer.h"): array for name, array in tensors.items()},
            UnsupportedError,
            "expected a name with 'model.layers.<number>.' or 'lm_head' in it",
        ),
        (
            lambda tensors: tensors | {name.replace("base_model", "other"): array for name, array in tensors.items()},
            FormatError,
            "a second pair for layers.",
        ),
    ],
)
def test_bad_tensors(tmp_path, edit, error, message):
    with pytest.raises(error, match=message) as caught:
        Adapter.from_peft(write(tmp_path, edit(small())))
    assert str(caught.value).startswith(f"{tmp_path}/adapter_model.safetensors: ") and "\n" not in str(caught.value)


def test_folders_that_are_no_adapters(tmp_path):
    with pytest.raises(FormatError, match="adapter_config.json: cannot be opened"):
        Adapter.from_peft(tmp_path / "absent")
    write(tmp_path, small())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"adapter_model.bin is a pickle.*convert it: save_file\(torch.load"):
        Adapter.from_peft(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: cannot be (opened|read)"):
        Adapter.from_peft(tmp_path)


def test_adapters_of_another_model(tmp_path):
    model = load_model(folder_of("qwen2"), "numpy")
    far = write(tmp_path / "far", tensors_of({"layers.7.self_attn.q_proj": (192, 192)}, 4))
    with pytest.raises(
        FormatError, match="layers.7.*lora_A.weight': the model has no linear layer 'layers.7.self_attn.q_proj'"
    ):
        model.load_adapter(far)
    narrow = write(tmp_path / "narrow", tensors_of({"layers.0.self_attn.q_proj": (191, 192)}, 4))
    with pytest.raises(FormatError, match=r"lora_A.weight': shape \[4, 191\], expected \[4, 192\]; .*another model"):
        model.load_adapter(narrow)


def test_values_beyond_the_range_are_named(tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = tensors_of({"layers.0.self_attn.q_proj": (192, 192)}, 4)
    tensors[f"{key}B.weight"] = np.full((192, 4), 9e4, np.float32)
    large = write(tmp_path / "large", tensors)
    load_model(folder_of("qwen2"), "numpy").load_adapter(large)
    model = load_model(folder_of("qwen2"), "numpy", dtype="float16")
    with pytest.raises(FormatError, match="lora_B.weight': values that are not finite, or beyond the range of float16"):
        model.load_adapter(large)
    model.load_adapter(large, scaling=0.25)
    tensors[f"{key}A.weight"][0, 0] = np.nan
    with pytest.raises(FormatError, match="lora_A.weight': values that are not finite"):
        model.load_adapter(write(tmp_path / "damaged", tensors))


# --- generation and the command line ----------------------------------------------------------------------------------


def shakespeare_adapters(tmp_path):
    sizes = sizes_of("shakespeare")
    return [write(tmp_path / f"{name}/style", tensors_of(sizes, 4, seed, scale=0.3)) for name, seed in (("x", 5), ("y", 6))]


def test_generate_with_adapters(tmp_path):
    x, y = shakespeare_adapters(tmp_path)
    model = load_model(SHAKESPEARE, "numpy")
    model.load_adapter(x, "x")
    model.load_adapter(y, "y")
    prompt, choice = [5, 80, 300], {"x": 1, "y": 0.5}

    def tokens(adapters):
        settings = SamplerSettings.greedy()
        return generate(model, prompt, max_new_tokens=8, settings=settings, adapters=adapters).tokens

    found = tokens(choice)
    logits = model.forward(prompt + found[:-1], adapters=choice)[0, len(prompt) - 1 :]
    assert found == logits.argmax(-1).tolist()
    assert found != tokens(None) and found != tokens("x") and tokens([choice]) == found
    with pytest.raises(ValueError, match="no adapter 'z' is loaded"):
        tokens("z")


def test_the_command_line_takes_adapters(tmp_path, capsys):
    x, y = shakespeare_adapters(tmp_path)

    def run(*options):
        arguments = [str(SHAKESPEARE), "--tokens", "5,80,300", "--greedy", "--max-new-tokens", "6", "--backend", "numpy"]
        code = main(["generate", *arguments, "--json", *map(str, options)])
        captured = capsys.readouterr()
        return (json.loads(captured.out)["tokens"], "") if code == 0 else (None, captured.err)

    model = load_model(SHAKESPEARE, "numpy")
    model.load_adapter(x, "x")
    model.load_adapter(y, "y")
    settings = SamplerSettings.greedy()
    for options, adapters in (
        (("--lora", x, "--lora", f"{y}=0.5"), {"x": 1, "y": 0.5}),
        (("--lora", f"{y}=-1e0"), {"y": -1}),
    ):
        expected = generate(model, [5, 80, 300], max_new_tokens=6, settings=settings, adapters=adapters).tokens
        assert run(*options) == (expected, "")
    odd = write(tmp_path / "style=2", tensors_of(sizes_of("shakespeare"), 4, 5, scale=0.3))
    assert run("--lora", odd) == run("--lora", f"{x}=1")
    for option, message in (
        (f"{x}=much", "expected FOLDER or FOLDER=WEIGHT"),
        ("absent", "absent/adapter_config.json: cannot be"),
    ):
        tokens, error = run("--lora", option)
        assert tokens is None and message in error and error.count("\n") == 1
    assert "must be a finite float32" in run("--lora", f"{x}=nan")[1]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def typical(found, expected):
    """The median over the tokens of the relative error: a token near a tie between two experts may take the other one."""
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return np.median(error)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("shakespeare-exl2-2.5", "float16"), ("shakespeare", "bfloat16"), ("gemma2", "float16"), ("mixtral", "float16")],
)
def test_adapters_on_the_gpu(tmp_path, cupy, name, dtype):
    """At most twice as far from float32 as the reference in the same dtype: prompts, steps, and one choice for all rows."""
    exact, _, _ = two_adapters(tmp_path, name)
    same, _, _ = two_adapters(tmp_path, name, dtype=dtype)
    model, _, _ = two_adapters(tmp_path, name, backend="cupy", dtype=dtype)
    ids = ids_of(len(CHOICES), 20)
    expected = exact.forward(ids, adapters=CHOICES)
    usual = typical(same.forward(ids, adapters=CHOICES), expected)
    found = model.forward(ids, adapters=CHOICES)
    assert typical(found.get(), expected) <= 2 * usual
    for row, choice in enumerate(CHOICES):
        assert typical(found[row].get(), expected[row]) <= 3 * usual < 0.02, choice
    assert np.array_equal(found.get(), model.forward(ids, adapters=CHOICES).get())
    cache = model.new_cache(batch=len(CHOICES), capacity=20)
    steps = [model.forward(ids[:, i:j], cache, adapters=CHOICES) for i, j in ((0, 16), (16, 17), (17, 20))]
    assert typical(np.concatenate([step.get() for step in steps], axis=1), expected) <= 2 * usual
    for choice in ("a", None):
        whole = exact.forward(ids[:2], adapters=choice)
        assert typical(model.forward(ids[:2], adapters=choice).get(), whole) <= 3 * usual


@pytest.mark.gpu
def test_rows_without_adapters_keep_their_bits_on_the_gpu(tmp_path, cupy):
    model, _, _ = two_adapters(tmp_path, "shakespeare", backend="cupy")
    ids = ids_of(3, 20)
    base = model.forward(ids).get()
    mixed = model.forward(ids, adapters=["b", None, "a"]).get()
    assert np.array_equal(mixed[1], base[1]) and relative(mixed[0], base[0]) > 0.01 and relative(mixed[2], base[2]) > 0.01
    model.unload_adapter("a")
    assert np.array_equal(model.forward(ids, adapters=["b", None, None]).get()[:2], mixed[:2])
    model.unload_adapter("b")
    assert np.array_equal(model.forward(ids).get(), base)


@pytest.mark.gpu
def test_loading_an_adapter_compiles_what_it_needs(tmp_path, cupy, monkeypatch):
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path / "cache"))
    model, _, _ = two_adapters(tmp_path, "shakespeare", backend="cupy")
    compiled = {path.name for path in (tmp_path / "cache").iterdir()}
    assert any(name.startswith("lora_shrink_mma") for name in compiled)
    from cupyq import _kernels

    _kernels.forget_loaded()  # what other tests have loaded does not count
    for adapters in ("b", ("a", "b")):
        cache = model.new_cache(capacity=140)
        for seq in (5, 1, 30, 100, 1):
            model.forward(np.arange(seq), cache, last_only=True, adapters=adapters)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == compiled
