"""models/config.py and models/architectures.py: both spellings, every rule, and the refusals."""

import dataclasses
import json
from pathlib import Path

import pytest

from cupyq.errors import FormatError, UnsupportedError
from cupyq.models.architectures import ARCHITECTURES, architecture
from cupyq.models.config import ModelConfig

ROOT = Path(__file__).parent.parent
FOLDERS = sorted((ROOT / "tests/models").iterdir()) + sorted((ROOT / "examples/models").iterdir())

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 2}
GEMMA2 = LLAMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 144,
    "sliding_window": 8,
}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def read(tmp_path):
    """read(keys, without=name, beside={...}): the ModelConfig of these keys, written to a config.json."""

    def read(keys, without=None, beside=None):
        keys = {key: value for key, value in keys.items() if key != without}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        if beside is not None:
            (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
        return ModelConfig.from_file(tmp_path)

    return read


# --- the fixtures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_published_config_says_what_its_json_says(folder):
    config, data = ModelConfig.from_file(folder), json.loads((folder / "config.json").read_text())
    assert config.path == folder / "config.json"
    assert config.architecture.name == data["architectures"][0]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(config, key) == data[key], key
    assert config.head_dim == data.get("head_dim", data["hidden_size"] // data["num_attention_heads"])
    assert config.eos_token_ids == (data["eos_token_id"],)
    assert config.rope_theta == data["rope_parameters"]["rope_theta"]
    assert config.dtype == "float16"
    assert config.max_seq_len == config.max_position_embeddings


@pytest.mark.parametrize("folder", sorted((ROOT / "tests/models").iterdir()), ids=lambda p: p.name)
def test_both_spellings_mean_the_same(folder):
    new, old = ModelConfig.from_file(folder), ModelConfig.from_file(folder / "config.legacy.json")
    assert dataclasses.replace(old, path=new.path) == new


def test_the_fixtures_differ_where_they_should():
    by_name = {folder.name: ModelConfig.from_file(folder) for folder in FOLDERS}
    assert by_name["llama3-rope"].rope_scaling == LLAMA3
    assert by_name["qwen2"].has_qkv_bias and not by_name["qwen2"].has_output_bias
    assert not by_name["qwen3"].has_qkv_bias and by_name["qwen3"].architecture.head_norm == "rms"
    gemma = by_name["gemma2"]
    assert gemma.windows == (32, None, 32)
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.attention_scale) == (10.0, 15.0, 48**-0.5)
    assert gemma.activation == "gelu_tanh" and by_name["qwen2"].activation == "silu"
    assert (by_name["mixtral"].num_experts, by_name["mixtral"].num_experts_per_tok) == (4, 2)
    exl2, gptq = by_name["shakespeare-exl2-2.5"].quantization, by_name["shakespeare-gptq-g32"].quantization
    assert (exl2.method, exl2.bits, exl2.head_bits) == ("exl2", 2.5, 6)
    assert (gptq.method, gptq.bits, gptq.group_size, gptq.zeros) == ("gptq", 4, 32, "v1")
    assert by_name["shakespeare"].quantization is None


# --- rules ------------------------------------------------------------------------------------------------------------


def test_what_may_be_left_out_of_a_llama_config(read):
    config = read(LLAMA, without="num_key_value_heads")
    assert config.num_key_value_heads == 4 and config.head_dim == 16
    assert config.rope_theta == 10000.0 and config.rope_scaling is None
    assert config.attention_scale == 0.25
    assert config.windows == (None,) * 4
    assert config.eos_token_ids == () and config.dtype is None
    assert not config.tie_word_embeddings and not config.has_qkv_bias and not config.has_mlp_bias
    assert config.attention_softcap is None and config.logit_softcap is None
    assert read(MIXTRAL).rope_theta == 1e6
    assert read(GEMMA2).tie_word_embeddings and not read(GEMMA2 | {"tie_word_embeddings": False}).tie_word_embeddings


def test_null_means_absent(read):
    keys = {"head_dim": None, "rope_scaling": None, "eos_token_id": None, "attention_bias": None, "hidden_act": None}
    assert read(LLAMA | keys) == read(LLAMA)


def test_biases(read):
    config = read(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert config.has_qkv_bias and config.has_output_bias and config.has_mlp_bias
    qwen2 = read(QWEN2 | {"attention_bias": False})
    assert qwen2.has_qkv_bias and not qwen2.has_output_bias
    mistral = read(LLAMA | {"architectures": ["MistralForCausalLM"], "attention_bias": True, "mlp_bias": True})
    assert not mistral.has_qkv_bias and not mistral.has_mlp_bias


def test_several_stop_tokens(read):
    assert read(LLAMA | {"eos_token_id": [7, 0]}).eos_token_ids == (7, 0)
    assert read(LLAMA | {"eos_token_id": 3}).eos_token_ids == (3,)


def test_windows_of_mistral_and_mixtral_hold_for_every_layer(read):
    for keys in (LLAMA | {"architectures": ["MistralForCausalLM"]}, MIXTRAL):
        assert read(keys | {"sliding_window": 16}).windows == (16,) * 4
        assert read(keys | {"sliding_window": None}).windows == (None,) * 4
    assert read(LLAMA | {"sliding_window": 16}).windows == (None,) * 4


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_windows_of_qwen_need_their_switch(read, name):
    keys = QWEN2 | {"architectures": [name]}
    assert read(keys).windows == (None,) * 4
    assert read(keys | {"use_sliding_window": False}).windows == (None,) * 4
    assert read(keys | {"use_sliding_window": True}).windows == (None, None, 8, 8)
    assert read(keys | {"use_sliding_window": True, "max_window_layers": 0}).windows == (8,) * 4
    types = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    assert read(keys | {"use_sliding_window": True, "layer_types": types}).windows == (8, None, None, None)
    with pytest.raises(FormatError, match="layer_types: found .*use_sliding_window is not true"):
        read(keys | {"layer_types": types})


def test_windows_of_gemma2_alternate_unless_layer_types_says_otherwise(read):
    assert read(GEMMA2).windows == (8, None, 8, None)
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert read(GEMMA2 | {"layer_types": types}).windows == (None, None, 8, None)
    with pytest.raises(FormatError, match="sliding_window: missing, expected a whole number"):
        read(GEMMA2, without="sliding_window")


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_type_has_a_synonym(read, key):
    scaling = {(key if k == "rope_type" else k): v for k, v in LLAMA3.items()}
    assert read(LLAMA | {"rope_scaling": scaling}).rope_scaling == LLAMA3
    assert read(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5.0}}).rope_theta == 5.0
    assert read(LLAMA | {"rope_scaling": {key: "default"}}).rope_scaling is None
    linear = {"rope_type": "linear", "factor": 2.0}
    assert read(LLAMA | {"rope_scaling": {key: "linear", "factor": 2}}).rope_scaling == linear


def test_yarn_finds_its_lengths_at_top_level(read):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    scaling = read(LLAMA | {"rope_scaling": yarn}).rope_scaling
    assert scaling["factor"] == 4.0 and scaling["original_max_position_embeddings"] == 128
    scaling = read(LLAMA | {"rope_scaling": yarn, "original_max_position_embeddings": 32}).rope_scaling
    assert scaling["original_max_position_embeddings"] == 32
    scaling = read(LLAMA | {"rope_scaling": yarn | {"original_max_position_embeddings": 16}}).rope_scaling
    assert scaling["original_max_position_embeddings"] == 16


def test_rope_scaling_cannot_be_changed_behind_a_model(read):
    config = read(LLAMA | {"rope_scaling": LLAMA3})
    with pytest.raises(TypeError):
        config.rope_scaling["factor"] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1


def test_gptq_settings(read):
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    found = read(LLAMA | {"quantization_config": gptq | {"checkpoint_format": "gptq_v2"}}).quantization
    assert (found.bits, found.group_size, found.zeros) == (4, 128, "v2")
    assert read(LLAMA | {"quantization_config": gptq}).quantization.zeros == "v1"
    mixed = read(LLAMA | {"quantization_config": gptq | {"dynamic": {"+:.*up.*": {"bits": 8}}}}).quantization
    assert mixed.bits is None and mixed.group_size is None
    assert read(LLAMA | {"quantization_config": gptq | {"group_size": -1}}).quantization.group_size == -1


def test_gptq_settings_of_old_writers_lie_in_a_file_of_their_own(read):
    beside = {"bits": 8, "group_size": 64, "desc_act": False}
    assert read(LLAMA, beside=beside).quantization.bits == 8
    with pytest.raises(FormatError, match=r"quantize_config\.json: group_size: found 'x'"):
        read(LLAMA, beside=beside | {"group_size": "x"})
    inside = {"quant_method": "exl2", "bits": 3.0}
    assert read(LLAMA | {"quantization_config": inside}, beside=beside).quantization.method == "exl2"


# --- refusals ---------------------------------------------------------------------------------------------------------

REQUIRED = [key for key in LLAMA if key != "num_key_value_heads"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(read, key, tmp_path):
    with pytest.raises(FormatError) as caught:
        read(LLAMA, without=key)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {key}: missing, expected ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"])
def test_gemma2_must_name_its_caps(read, key):
    with pytest.raises(FormatError, match=f"{key}: missing"):
        read(GEMMA2, without=key)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
def test_a_mixture_must_name_its_experts(read, key):
    with pytest.raises(FormatError, match=f"{key}: missing"):
        read(MIXTRAL, without=key)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures: found 'LlamaForCausalLM', expected a list of one name"),
        ({"architectures": ["A", "B"]}, "architectures: found .*expected a list of one name"),
        ({"hidden_size": "64"}, "hidden_size: found '64', expected a whole number from 1"),
        ({"hidden_size": 64.0}, "hidden_size: found 64.0"),
        ({"hidden_size": True}, "hidden_size: found True"),
        ({"hidden_size": 0}, "hidden_size: found 0"),
        ({"hidden_size": 10**400}, "hidden_size: found 1000"),
        ({"vocab_size": 1 << 30}, "vocab_size: found 1073741824, expected a whole number from 1 to 16777216"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor of num_attention_heads, 4"),
        ({"num_attention_heads": 6}, "head_dim: missing.*64 is no multiple of num_attention_heads 6"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: found 0, expected a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: found '1e-5'"),
        ({"rms_norm_eps": 1e400}, "not JSON"),
        ({"max_position_embeddings": -1}, "max_position_embeddings: found -1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1, expected true or false"),
        ({"eos_token_id": "2"}, "eos_token_id: found '2'"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id: found \[1, -2\]"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"hidden_act": 3}, "hidden_act: found 3, expected a string"),
        ({"rope_theta": "1e4"}, "rope_theta: found '1e4'"),
        ({"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}}, "rope_theta: found 2.0, expected 3, as rope_par"),
        ({"rope_parameters": [1]}, r"rope_parameters: found \[1\], expected a JSON object or null"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.rope_type: missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor: found -2"),
        ({"rope_scaling": LLAMA3 | {"type": "linear"}}, "rope_scaling.type: found 'linear', expected 'llama3'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor: found 1.0, expected a number above"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "rope_scaling.factor: missing"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 4.0, "rope_theta": 5.0}},
            "rope_scaling: differs from rope_parameters",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method: missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits: missing"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}}, "group_size: found 0"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(read, keys, message):
    with pytest.raises(FormatError, match=message) as caught:
        read(LLAMA | keys)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("types", ["full_attention", ["full_attention"] * 3, ["full_attention", "linear", "x", "y"]])
def test_bad_layer_types(read, types):
    with pytest.raises(FormatError, match="layer_types: found .*expected a list of 4 entries"):
        read(GEMMA2 | {"layer_types": types})


def test_more_experts_per_token_than_experts(read):
    with pytest.raises(FormatError, match="num_experts_per_tok: found 9, expected a whole number from 1 to 8"):
        read(MIXTRAL | {"num_experts_per_tok": 9})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not supported"),
        ({"rope_scaling": {"type": "fixed", "factor": 2.0}}, "rope_scaling.type: 'fixed' is not supported"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.type: 'mrope' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor: 0.5"),
        ({"head_dim": 12}, "head_dim is 12; .*multiples of 8 up to 256"),
        ({"head_dim": 512}, "head_dim is 512"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method: 'awq' is not supported"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 5}}, "bits: 5 is not supported"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}},
            "checkpoint_format: 'marlin' is not supported",
        ),
    ],
)
def test_what_is_well_formed_but_unsupported(read, keys, message):
    with pytest.raises(UnsupportedError, match=message):
        read(LLAMA | keys)


def test_an_unknown_architecture_is_answered_with_the_known_ones(read):
    with pytest.raises(UnsupportedError) as caught:
        read(LLAMA | {"architectures": ["FalconForCausalLM"]})
    message = str(caught.value)
    assert "config.json: architectures: 'FalconForCausalLM' is not supported" in message
    assert all(name in message for name in ARCHITECTURES)
    assert architecture("LlamaForCausalLM").name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "holds a list, expected a JSON object; a model folder holds a config.json: copy it again"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"\xff\xfe", "not UTF-8 .invalid start byte at byte 0."),
        (b"[" * 100_000, "not JSON that can be read .nested too deeply."),
        (b'{"rms_norm_eps": 1e400}', "not JSON .1e400 is too large for a number."),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_configuration(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(FormatError, match=message) as caught:
        ModelConfig.from_file(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_no_configuration_at_all(tmp_path):
    with pytest.raises(FormatError, match="config.json: cannot be opened .No such file"):
        ModelConfig.from_file(tmp_path)
    with pytest.raises(FormatError, match="cannot be opened"):
        ModelConfig.from_file(tmp_path / "absent")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert ModelConfig.from_file(tmp_path).vocab_size == 100


def test_rows_differ_from_llama_only_in_what_they_name():
    """Data, not code: no row holds anything but plain values."""
    for row in ARCHITECTURES.values():
        for value in dataclasses.asdict(row).values():
            assert value is None or isinstance(value, (str, bool, int, float, tuple))
