"""config.json of a model folder, read strictly.

Both spellings are understood: transformers 5 (`dtype`, `rope_parameters`) and 4 (`torch_dtype`, `rope_theta`,
`rope_scaling` with `type` or `rope_type`). What is missing, of the wrong type or out of range is a one-line FormatError
that names file, key, what was found and what was expected; what is well formed but not handled, an UnsupportedError.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from cupyq.errors import FormatError, UnsupportedError
from cupyq.models.architectures import Architecture, architecture

MAX_CONFIG_BYTES = 16 << 20

# Far above every published model, far below what would exhaust memory before a tensor's shape refutes the number.
MAX_LAYERS, MAX_HEADS, MAX_EXPERTS = 4096, 4096, 1024
MAX_WIDTH, MAX_VOCAB, MAX_POSITIONS = 1 << 20, 1 << 24, 1 << 27

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says. Which tensors are quantized, and how, the tensors themselves say."""

    method: str
    """exl2 or gptq."""
    bits: float | None = None
    group_size: int | None = None
    """GPTQ: rows per group, -1 for one group; None if not said, or if it differs between layers."""
    desc_act: bool = False
    zeros: str = "v1"
    """GPTQ: v1 stores zero - 1, v2 ("checkpoint_format": "gptq_v2") stores zero."""
    head_bits: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model. Names are those of config.json where it has one."""

    path: Path
    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    max_seq_len: int
    """The context that is served: max_position_embeddings, or what load_model was asked for."""
    rms_norm_eps: float
    activation: str
    """silu, gelu, gelu_tanh or relu."""
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """None, or {"rope_type": ..., and that type's numbers}, as `rope_tables` takes it."""
    windows: tuple[int | None, ...]
    """One per layer: how many positions a query sees, its own included; None for all."""
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str | None = None
    """Of the checkpoint, as its config says; for information."""
    quantization: Quantization | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ModelConfig":
        """Read a config.json, or the one in the folder `path`."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        return _read_config(_Keys(path, _read_json(path)))


def _read_json(path: Path) -> dict[str, Any]:
    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened ({error.strerror}); a model folder holds a config.json") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise FormatError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB, expected a model's configuration")
    try:
        data = json.loads(raw.decode("utf-8-sig"), parse_constant=constant)
    except RecursionError:
        raise FormatError(f"{path}: nested too deeply, expected a model's configuration") from None
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: holds {_show(data)}, expected a JSON object")
    return data


_REQUIRED = object()


class _Keys:
    """Checked access to the keys of one JSON object; `prefix` names the object within the file."""

    def __init__(self, path: Path, data: Mapping[str, Any], prefix: str = ""):
        self.path, self.data, self.prefix = path, data, prefix

    def where(self, key: str) -> str:
        return f"{self.path}: {self.prefix}{key}"

    def refuse(self, key: str, expected: str) -> NoReturn:
        if key not in self.data:
            raise FormatError(f"{self.where(key)}: missing, expected {expected}")
        raise FormatError(f"{self.where(key)}: found {_show(self.data[key])}, expected {expected}")

    def unsupported(self, key: str, what: str) -> NoReturn:
        raise UnsupportedError(f"{self.where(key)}: {_show(self.data[key])} is not supported; {what}")

    def has(self, key: str) -> bool:
        """Present and not null, which means the same as absent."""
        return self.data.get(key) is not None

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        if not self.has(key) and default is not _REQUIRED:
            return default
        value = self.data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, low: float = 0.0, high: float = 1e12) -> Any:
        """A finite number above `low`."""
        if not self.has(key) and default is not _REQUIRED:
            return default
        value = self.data.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value <= high:
            self.refuse(key, f"a number above {low:g}, at most {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        if not isinstance(self.data[key], bool):
            self.refuse(key, "true or false")
        return self.data[key]

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        if not self.has(key) and default is not _REQUIRED:
            return default
        value = self.data.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def within(self, key: str) -> "_Keys":
        """The JSON object under a key; an empty one where it is absent."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "a JSON object or null")
        return _Keys(self.path, value or {}, f"{self.prefix}{key}.")


def _read_config(keys: _Keys) -> ModelConfig:
    names = keys.data.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        keys.refuse("architectures", "a list of one name, as in ['LlamaForCausalLM']")
    row = architecture(names[0], keys.where("architectures"))

    hidden = keys.integer("hidden_size", 1, MAX_WIDTH)
    layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
    heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = keys.integer("num_key_value_heads", 1, MAX_HEADS, heads)
    if heads % kv_heads:
        keys.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if not keys.has("head_dim") and hidden % heads:
        keys.refuse("head_dim", f"a number, as hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = keys.integer("head_dim", 1, MAX_WIDTH, hidden // heads)
    if head_dim % 8 or head_dim > 256:
        found = "head_dim" if keys.has("head_dim") else "hidden_size / num_attention_heads"
        raise UnsupportedError(f"{keys.path}: {found} is {head_dim}; cupyq's attention takes multiples of 8 up to 256")
    positions = keys.integer("max_position_embeddings", 1, MAX_POSITIONS)
    attention_bias = row.attention_bias == "config" and keys.boolean("attention_bias", False)
    theta, scaling = _read_rope(keys, row, positions)

    return ModelConfig(
        path=keys.path,
        architecture=row,
        vocab_size=keys.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", 1, MAX_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        max_seq_len=positions,
        rms_norm_eps=keys.number("rms_norm_eps", high=1.0),
        activation=_read_activation(keys, row),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_read_windows(keys, row, layers),
        attention_scale=_read_attention_scale(keys, row, head_dim),
        attention_softcap=_read_softcap(keys, row, "attn_logit_softcapping"),
        logit_softcap=_read_softcap(keys, row, "final_logit_softcapping"),
        has_qkv_bias=attention_bias or row.attention_bias == "qkv",
        has_output_bias=attention_bias,
        has_mlp_bias=row.has_mlp_bias_key and keys.boolean("mlp_bias", False),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", row.ties_embeddings),
        eos_token_ids=_read_eos(keys),
        bos_token_id=keys.integer("bos_token_id", 0, MAX_VOCAB, None),
        dtype=keys.text("dtype", None) or keys.text("torch_dtype", None),
        quantization=_read_quantization(keys),
        **_read_experts(keys, row),
    )


def _read_experts(keys: _Keys, row: Architecture) -> dict[str, int]:
    if not row.has_experts:
        return {}
    experts = keys.integer("num_local_experts", 1, MAX_EXPERTS)
    return {"num_experts": experts, "num_experts_per_tok": keys.integer("num_experts_per_tok", 1, experts)}


def _read_activation(keys: _Keys, row: Architecture) -> str:
    for key in row.activation_keys:
        name = keys.text(key, None)
        if name is not None:
            if name not in _ACTIVATIONS:
                keys.unsupported(key, f"cupyq computes {', '.join(_ACTIVATIONS)}")
            return _ACTIVATIONS[name]
    return _ACTIVATIONS[row.activation]


def _read_attention_scale(keys: _Keys, row: Architecture, head_dim: int) -> float:
    return (keys.number("query_pre_attn_scalar") if row.has_softcaps else head_dim) ** -0.5


def _read_softcap(keys: _Keys, row: Architecture, key: str) -> float | None:
    if not row.has_softcaps:
        return None
    if key not in keys.data:
        keys.refuse(key, "a number above 0, or null for no cap")
    return keys.number(key, None)


def _read_eos(keys: _Keys) -> tuple[int, ...]:
    value = keys.data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_VOCAB for i in ids):
        keys.refuse("eos_token_id", f"an id, a list of ids or null, ids from 0 to {MAX_VOCAB}")
    return tuple(ids)


def _read_rope(keys: _Keys, row: Architecture, positions: int) -> tuple[float, Mapping[str, Any] | None]:
    """Theta and scaling. transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    new, old = keys.within("rope_parameters"), keys.within("rope_scaling")
    theta = new.number("rope_theta", None)
    top_theta = keys.number("rope_theta", None)
    if theta is not None and top_theta is not None and theta != top_theta:
        keys.refuse("rope_theta", f"{theta:g}, as rope_parameters.rope_theta says; remove one of the two")
    theta = theta or top_theta or row.rope_theta

    for part in (keys, new, old):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            part.unsupported("partial_rotary_factor", f"{row.name} rotates whole heads")
    original = keys.integer("original_max_position_embeddings", 1, MAX_POSITIONS, positions)
    scaling, older = _read_rope_scaling(new), _read_rope_scaling(old)
    if scaling is None:
        scaling = older
    elif older is not None and older != scaling:
        raise FormatError(f"{keys.where('rope_scaling')}: differs from rope_parameters; remove one of the two")
    if scaling is None or scaling["rope_type"] == "default":
        return theta, None
    if scaling["rope_type"] in ("yarn", "longrope", "su"):
        # Lengths these measure by may stand at top level only; their other numbers are checked by ops/rope.py.
        lengths = {"max_position_embeddings": positions, "original_max_position_embeddings": original}
        scaling = MappingProxyType({**lengths, **scaling})
    return theta, scaling


def _read_rope_scaling(keys: _Keys) -> Mapping[str, Any] | None:
    if not keys.data:
        return None
    kind, synonym = keys.text("rope_type", None), keys.text("type", None)
    if kind is not None and synonym is not None and kind != synonym:
        keys.refuse("type", f"{kind!r}, as rope_type says; they are synonyms")
    key = "rope_type" if kind is not None else "type"
    kind = kind or synonym
    if kind is None:
        if keys.prefix.startswith("rope_parameters"):
            kind = "default"
        else:
            keys.refuse("rope_type", "the kind of scaling, such as linear or llama3")
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind == "linear":
        scaling["factor"] = keys.number("factor")
    elif kind == "llama3":
        scaling |= {name: keys.number(name) for name in _LLAMA3_KEYS}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            keys.refuse("high_freq_factor", f"a number above low_freq_factor, {scaling['low_freq_factor']:g}")
    elif kind in ("yarn", "longrope", "su"):
        scaling |= {name: value for name, value in keys.data.items() if name not in ("type", "rope_type", "rope_theta")}
    elif kind != "default":
        keys.unsupported(key, "cupyq scales RoPE by default, linear, llama3, yarn or longrope")
    return MappingProxyType(scaling)


def _read_windows(keys: _Keys, row: Architecture, layers: int) -> tuple[int | None, ...]:
    """The window of every layer: `layer_types` where given, else the architecture's rule."""
    if row.window == "none":
        return (None,) * layers
    is_on = keys.boolean("use_sliding_window", False) if row.window == "optional" else True
    window = keys.integer("sliding_window", 1, MAX_POSITIONS, None) if is_on else None
    types = keys.data.get("layer_types")
    if types is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
            keys.refuse("layer_types", f"a list of {layers} entries, each {' or '.join(kinds)}")
        slides = [kind == "sliding_attention" for kind in types]
        if any(slides) and window is None:
            off = "use_sliding_window is not true" if not is_on else "sliding_window is missing"
            keys.refuse("layer_types", f"full_attention everywhere, as {off}")
    elif row.window == "alternate":
        if window is None:
            keys.refuse("sliding_window", f"a whole number, the window of every second layer of {row.name}")
        slides = [layer % 2 == 0 for layer in range(layers)]
    elif row.window == "optional" and window is not None:
        first = keys.integer("max_window_layers", 0, MAX_LAYERS)
        slides = [layer >= first for layer in range(layers)]
    else:
        slides = [True] * layers
    return tuple(window if slide else None for slide in slides)


def _read_quantization(keys: _Keys) -> Quantization | None:
    if keys.has("quantization_config"):
        keys = keys.within("quantization_config")
    else:
        # Old GPTQ writers leave config.json alone and write this file beside it.
        beside = keys.path.parent / "quantize_config.json"
        if not beside.is_file():
            return None
        keys = _Keys(beside, {"quant_method": "gptq", **_read_json(beside)})
    method = keys.text("quant_method")
    if method == "exl2":
        return Quantization("exl2", bits=keys.number("bits", None), head_bits=keys.number("head_bits", None))
    if method != "gptq":
        keys.unsupported("quant_method", "cupyq reads exl2, gptq and unquantized checkpoints")
    layout = keys.text("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        keys.unsupported("checkpoint_format", "cupyq reads gptq and gptq_v2; convert the model again")
    bits = keys.integer("bits", 1, 32)
    if bits not in (2, 3, 4, 8):
        keys.unsupported("bits", "GPTQ has 2, 3, 4 or 8")
    group_size = keys.integer("group_size", -1, MAX_WIDTH, None)
    if group_size == 0:
        keys.refuse("group_size", "a number above 0, or -1 for one group")
    is_mixed = bool(keys.data.get("dynamic"))  # GPTQModel: layers that differ, by pattern
    return Quantization(
        "gptq",
        bits=None if is_mixed else bits,
        group_size=None if is_mixed else group_size,
        desc_act=keys.boolean("desc_act", False),
        zeros="v2" if layout == "gptq_v2" else "v1",
    )


def _show(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number too large"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:70]}... ({len(text)} characters)"
