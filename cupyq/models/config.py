"""config.json of a model folder, read strictly.

Both spellings are understood: transformers 5 (`dtype`, `rope_parameters`) and 4 (`torch_dtype`, `rope_theta`,
`rope_scaling` with `type` or `rope_type`). What is missing, of the wrong type or out of range is a one-line FormatError
that names file, key, what was found and what was expected; what is well formed but not handled, an UnsupportedError.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cupyq._json_file import read_json
from cupyq.errors import FormatError, UnsupportedError
from cupyq.models.architectures import Architecture, architecture
from cupyq.models.keys import REQUIRED, Keys

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

# Keys that count as the top level of a model with a text part has them, which has them from its authors.
_OF_THE_WHOLE = ("architectures", "tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype")

_HINT = "a model folder holds a config.json: copy it again"
_SMALLEST_SCALE = 1e-6  # of embeddings, the residual and logits: squares and quotients of what is larger are numbers
_ROPE_TYPES = "default, linear, dynamic, llama3, yarn or longrope"
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says. Which tensors are quantized, and how, the tensors themselves say."""

    method: str
    """exl2 or gptq."""
    bits: float | None = None
    group_size: int | None = None
    """GPTQ: rows per group, -1 for one group; None if not said, or if it differs between layers."""
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
    """Of all norms, whatever their kind."""
    activation: str
    """silu, gelu, gelu_tanh or relu."""
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """None, or {"rope_type": ..., and that type's numbers}, as `rope_tables` takes it."""
    rotary_dim: int
    """The first so many values of each head rotate; 0 where positions are learned."""
    windows: tuple[int | None, ...]
    """One per layer: how many positions a query sees, its own included; None for all."""
    attention_scale: float
    local_rope_theta: float | None = None
    """Theta of layers with a window, where these have one of their own; they do not scale it."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qkv_clip: float | None = None
    """q, k and v are kept between minus this and this."""
    head_norm: str | None = None
    """rms or layer: the norm over each head of q and k."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert_size: int = 0
    """intermediate_size of an expert."""
    renormalizes_experts: bool = True
    """The weights of the chosen experts are divided by their sum."""
    sparse_layers: tuple[bool, ...] = ()
    """One per layer: whether it has experts."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Multiplies all that layers add to the residual."""
    logit_scale: float = 1.0
    normalizes_head: bool = False
    """Rows of an unquantized head are divided by their lengths."""
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    """Of the checkpoint, as its config says; for information."""
    quantization: Quantization | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ModelConfig":
        """Read a config.json, or the one in the folder `path`."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        return _read_config(Keys(path, read_json(path, hint=_HINT)))

    @property
    def longest_seq_len(self) -> int:
        """What max_seq_len may be: RoPE of type dynamic is made for any length up to `factor` times the usual one."""
        factor = 1.0
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "dynamic":
            factor = max(factor, self.rope_scaling["factor"])
        return min(int(factor * self.max_position_embeddings), MAX_POSITIONS)


def _read_config(keys: Keys) -> ModelConfig:
    names = keys.data.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        keys.refuse("architectures", "a list of one name, as in ['LlamaForCausalLM']")
    row = architecture(names[0], keys.where("architectures"))
    keys = _as_llama_spells_them(keys, row)
    for key, value in row.required:
        if keys.has(key) and keys.data[key] != value:
            keys.unsupported(key, f"cupyq's {row.name} is one with {value}")

    hidden = keys.integer("hidden_size", 1, MAX_WIDTH)
    layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
    heads = keys.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = keys.integer("num_key_value_heads", 1, MAX_HEADS, 1 if keys.boolean("is_multi_query", False) else heads)
    if heads % kv_heads:
        keys.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if not keys.has("head_dim") and hidden % heads:
        keys.refuse("head_dim", f"a number, as hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = keys.integer("head_dim", 1, MAX_WIDTH, hidden // heads)
    if head_dim % 8 or head_dim > 256:
        found = "head_dim" if keys.has("head_dim") else "hidden_size / num_attention_heads"
        raise UnsupportedError(f"{keys.path}: {found} is {head_dim}; cupyq's attention takes multiples of 8 up to 256")
    positions = keys.integer("max_position_embeddings", 1, MAX_POSITIONS)
    inner = keys.integer("intermediate_size", 1, MAX_WIDTH, row.inner_factor * hidden if row.inner_factor else REQUIRED)
    says_bias = row.attention_bias in ("config", "config-qkv") and keys.boolean("attention_bias", False)
    theta, scaling, rotary_dim = _read_rope(keys, row, positions, head_dim)

    return ModelConfig(
        path=keys.path,
        architecture=row,
        vocab_size=keys.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=inner,
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
        rotary_dim=rotary_dim,
        local_rope_theta=_read_local_theta(keys, row),
        windows=_read_windows(keys, row, layers),
        attention_scale=_read_attention_scale(keys, row, head_dim),
        attention_softcap=_read_softcap(keys, row, "attn_logit_softcapping"),
        logit_softcap=_read_softcap(keys, row, "final_logit_softcapping"),
        qkv_clip=keys.number("clip_qkv", None) if row.has_qkv_clip else None,
        head_norm=row.head_norm if row.head_norm_key is None or keys.boolean(row.head_norm_key, False) else None,
        has_qkv_bias=says_bias or row.attention_bias in ("qkv", "all"),
        has_output_bias=(says_bias and row.attention_bias == "config") or row.attention_bias == "all",
        has_mlp_bias=row.mlp_bias == "all" or (row.mlp_bias == "config" and keys.boolean("mlp_bias", False)),
        embedding_scale=_read_embedding_scale(keys, row, hidden),
        residual_scale=_read_residual_scale(keys, row, layers),
        logit_scale=_read_logit_scale(keys, row, hidden),
        normalizes_head=row.has_head_norm_key and bool(keys.data.get("norm_head")),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", row.ties_embeddings),
        eos_token_ids=_read_eos(keys),
        dtype=keys.text("dtype", None) or keys.text("torch_dtype", None),
        quantization=_read_quantization(keys),
        **_read_experts(keys, row, layers, inner),
    )


def _as_llama_spells_them(keys: Keys, row: Architecture) -> Keys:
    """The same keys by the names read here, with those of text_config and the row's defaults among them."""
    data, spelled = dict(keys.data), {}
    if row.text_types:
        text = keys.within("text_config")
        kind = text.text("model_type", row.text_types[0])
        if kind not in row.text_types:
            text.unsupported("model_type", f"cupyq runs a {row.name} whose text part is {' or '.join(row.text_types)}")
        for key, value in text.data.items():
            if key not in _OF_THE_WHOLE or data.get(key) is None:
                data[key], spelled[key] = value, f"text_config.{key}"
    for key, path in row.keys:
        *folders, last = path.split(".")
        inside = Keys(keys.path, data, spelled=spelled)
        for folder in folders:
            inside = inside.within(folder)
        if last in inside.data:
            data[key] = inside.data[last]
        if last in inside.data or key not in data:
            spelled[key] = path
    for key, value in row.defaults:
        if data.get(key) is None:
            data[key] = value
    return Keys(keys.path, data, spelled=spelled)


def _read_experts(keys: Keys, row: Architecture, layers: int, inner: int) -> dict[str, Any]:
    if not row.has_experts:
        return {}
    experts = keys.integer("num_local_experts", 1, MAX_EXPERTS)
    size = inner
    sparse = [True] * layers
    if row.has_dense_layers:
        size = keys.integer("moe_intermediate_size", 1, MAX_WIDTH, inner)
        step = keys.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
        dense = keys.data.get("mlp_only_layers") or []
        if not isinstance(dense, list) or len(dense) > MAX_LAYERS or not all(isinstance(layer, int) for layer in dense):
            keys.refuse("mlp_only_layers", "a list of numbers of layers")
        sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    return {
        "num_experts": experts,
        "num_experts_per_tok": keys.integer("num_experts_per_tok", 1, experts),
        "expert_size": size,
        "renormalizes_experts": _read_renormalization(keys, row),
        "sparse_layers": tuple(sparse),
    }


def _read_renormalization(keys: Keys, row: Architecture) -> bool:
    if row.renormalize == "norm_topk_prob":
        return keys.boolean("norm_topk_prob", False)
    if row.renormalize == "moe_normalize_expert_weights":
        power = keys.data.get("moe_normalize_expert_weights", 1)  # of the norm that the weights are divided by
        if power not in (None, 1):
            keys.unsupported("moe_normalize_expert_weights", "cupyq divides by the sum, 1, or not, null")
        return power is not None
    return True


def _read_embedding_scale(keys: Keys, row: Architecture, hidden: int) -> float:
    if row.embedding_scale is not None:
        return keys.number(row.embedding_scale, low=_SMALLEST_SCALE)
    return hidden**0.5 if row.scales_embedding else 1.0


def _read_residual_scale(keys: Keys, row: Architecture, layers: int) -> float:
    if row.residual_scale is None:
        return 1.0
    scale = keys.number(row.residual_scale, low=_SMALLEST_SCALE)
    return scale / layers**0.5 if row.residual_scale == "scale_depth" else scale


def _read_logit_scale(keys: Keys, row: Architecture, hidden: int) -> float:
    if row.logit_scale is None:
        return 1.0
    number = keys.number(row.logit_scale, low=_SMALLEST_SCALE)
    return {"logit_scale": number, "logits_scaling": 1 / number, "dim_model_base": number / hidden}[row.logit_scale]


def _read_activation(keys: Keys, row: Architecture) -> str:
    for key in row.activation_keys:
        name = keys.text(key, None)
        if name is not None:
            if name not in _ACTIVATIONS:
                keys.unsupported(key, f"cupyq computes {', '.join(_ACTIVATIONS)}")
            return _ACTIVATIONS[name]
    return _ACTIVATIONS[row.activation]


def _read_attention_scale(keys: Keys, row: Architecture, head_dim: int) -> float:
    if row.attention_scale == "attention_multiplier":
        return keys.number("attention_multiplier")
    return (keys.number("query_pre_attn_scalar") if row.attention_scale == "query_pre_attn_scalar" else head_dim) ** -0.5


def _read_softcap(keys: Keys, row: Architecture, key: str) -> float | None:
    if not row.has_softcaps:
        return None
    if key not in keys.data:
        keys.refuse(key, "a number above 0, or null for no cap")
    return keys.number(key, None)


def _read_eos(keys: Keys) -> tuple[int, ...]:
    value = keys.data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_VOCAB for i in ids):
        keys.refuse("eos_token_id", f"an id, a list of ids or null, ids from 0 to {MAX_VOCAB}")
    return tuple(ids)


def _read_rope(keys: Keys, row: Architecture, positions: int, head_dim: int) -> tuple[float, Mapping[str, Any] | None, int]:
    """Theta, scaling, rotary_dim. transformers 5 keeps all in `rope_parameters`, 4 in `rope_theta`, `rope_scaling`, ..."""
    if row.rope is None:
        return row.rope_theta, None, 0
    new, old = _global_rope(keys, row), keys.within("rope_scaling")
    theta = new.number("rope_theta", None)
    top_theta = keys.number("rope_theta", None)
    if theta is not None and top_theta is not None and theta != top_theta:
        keys.refuse("rope_theta", f"{theta:g}, as rope_parameters.rope_theta says; remove one of the two")
    theta = theta or top_theta or row.rope_theta

    original = keys.integer("original_max_position_embeddings", 1, MAX_POSITIONS, positions)
    scaling, older = _read_rope_scaling(new, row), _read_rope_scaling(old, row)
    if scaling is None:
        scaling = older
    elif older is not None and older != scaling:
        raise FormatError(f"{keys.where('rope_scaling')}: differs from rope_parameters; remove one of the two")
    if scaling is None or scaling["rope_type"] == "default":
        scaling = None
    elif scaling["rope_type"] in ("dynamic", "yarn", "longrope", "su"):
        # Lengths these measure by may stand at top level only; their other numbers are checked by ops/rope.py.
        lengths = {"max_position_embeddings": positions, "original_max_position_embeddings": original}
        scaling = MappingProxyType({**lengths, **scaling})
    return theta, scaling, _read_rotary_dim((keys, new, old), row, head_dim)


def _global_rope(keys: Keys, row: Architecture) -> Keys:
    """rope_parameters, or the part of it for layers that see everything."""
    parameters = keys.within("rope_parameters")
    return parameters.within("full_attention") if row.local_rope_theta and "full_attention" in parameters.data else parameters


def _read_local_theta(keys: Keys, row: Architecture) -> float | None:
    if row.local_rope_theta is None:
        return None
    local = keys.within("rope_parameters").within("sliding_attention")
    if local.text("rope_type", "default") != "default":
        local.unsupported("rope_type", f"layers of {row.name} with a window do not scale")
    return local.number("rope_theta", None) or keys.number("rope_local_base_freq", row.local_rope_theta)


def _read_rotary_dim(parts: tuple[Keys, ...], row: Architecture, head_dim: int) -> int:
    share = row.partial_rotary_factor
    for part in parts:
        found = part.number("partial_rotary_factor", None, high=1.0)
        if found is None:
            continue
        if share is None and found != 1.0:
            part.unsupported("partial_rotary_factor", f"{row.name} rotates whole heads")
        share = found if share is not None else None
    rotary_dim = head_dim if share is None else int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        where = parts[0].where("partial_rotary_factor")
        raise UnsupportedError(f"{where}: {rotary_dim} of {head_dim} values of a head rotate; expected an even number")
    return rotary_dim


def _read_rope_scaling(keys: Keys, row: Architecture) -> Mapping[str, Any] | None:
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
    if kind == "mrope" and row.has_mrope:
        kind = "default"
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind in ("linear", "dynamic"):
        scaling["factor"] = keys.number("factor")
    elif kind == "llama3":
        scaling |= {name: keys.number(name) for name in _LLAMA3_KEYS}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            keys.refuse("high_freq_factor", f"a number above low_freq_factor, {scaling['low_freq_factor']:g}")
    elif kind in ("yarn", "longrope", "su"):
        scaling |= {name: value for name, value in keys.data.items() if name not in ("type", "rope_type", "rope_theta")}
    elif kind != "default":
        keys.unsupported(key, f"cupyq scales RoPE by {_ROPE_TYPES}")
    return MappingProxyType(scaling)


def _read_windows(keys: Keys, row: Architecture, layers: int) -> tuple[int | None, ...]:
    """The window of every layer: `layer_types` where given, else the architecture's rule."""
    if row.window == "none":
        return (None,) * layers
    is_on = keys.boolean("use_sliding_window", False) if row.window in ("optional", "switched") else True
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
    elif row.window == "pattern":
        pattern = keys.integer("sliding_window_pattern", 1, MAX_LAYERS, row.window_pattern)
        if window is None:
            keys.refuse("sliding_window", f"a whole number, the window of all but each {pattern}. layer of {row.name}")
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif row.window == "optional" and window is not None:
        first = keys.integer("max_window_layers", 0, MAX_LAYERS)
        slides = [layer >= first for layer in range(layers)]
    else:
        slides = [True] * layers
    return tuple(window if slide else None for slide in slides)


def _read_quantization(keys: Keys) -> Quantization | None:
    if keys.has("quantization_config"):
        keys = keys.within("quantization_config")
    else:
        # Old GPTQ writers leave config.json alone and write this file beside it.
        beside = keys.path.parent / "quantize_config.json"
        if not beside.is_file():
            return None
        keys = Keys(beside, {"quant_method": "gptq", **read_json(beside, hint="copy it again")})
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
        zeros="v2" if layout == "gptq_v2" else "v1",
    )
