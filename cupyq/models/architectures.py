"""What distinguishes one architecture from the next: one row of data each.

A row says how tensors are called and which of the decoder's options an architecture uses; sizes come from config.json.
A new architecture of known parts is a new row and no code. Facts: each model's class in huggingface/transformers.
"""

from dataclasses import dataclass
from typing import Literal

from cupyq.errors import UnsupportedError


@dataclass(frozen=True)
class Architecture:
    """One row. The defaults are Llama's; names of tensors are below `model.layers.<i>.`, dots left out at both ends."""

    name: str

    # Norms: pre-norms enter attention and MLP, post-norms apply to what they return, before it joins the residual.
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    norm_weight_offset: float = 0.0
    """Added to every norm weight in float32: Gemma stores weight - 1."""

    # Attention
    attention: str = "self_attn"
    head_norm: Literal["rms"] | None = None
    """Norm over each head of q and k, before RoPE; weights q_norm and k_norm of [head_dim]."""
    attention_bias: Literal["none", "qkv", "config"] = "none"
    """"config": key `attention_bias` says whether q, k, v and o have one."""
    window: Literal["none", "all", "optional", "alternate"] = "none"
    """Which layers `sliding_window` is for: none; all; those config names, if `use_sliding_window`; even ones."""
    has_softcaps: bool = False
    """Keys `attn_logit_softcapping`, `final_logit_softcapping` and `query_pre_attn_scalar` count."""
    rope_theta: float = 10000.0
    """Where config.json has none."""

    # MLP: down(activation(gate(x)) * up(x)), or a mixture of such experts.
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    has_mlp_bias_key: bool = False
    has_experts: bool = False
    router: str = "gate"
    experts: str = "experts"
    activation_keys: tuple[str, ...] = ("hidden_act",)
    activation: str = "silu"
    """Where config.json has none."""

    # Ends
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    ties_embeddings: bool = False
    """Where config.json does not say."""


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("LlamaForCausalLM", attention_bias="config", has_mlp_bias_key=True),
        Architecture("MistralForCausalLM", window="all"),
        Architecture("Qwen2ForCausalLM", attention_bias="qkv", window="optional"),
        Architecture("Qwen3ForCausalLM", attention_bias="config", window="optional", head_norm="rms"),
        Architecture(
            "Gemma2ForCausalLM",
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            norm_weight_offset=1.0,
            attention_bias="config",
            window="alternate",
            has_softcaps=True,
            activation_keys=("hidden_activation", "hidden_act"),
            activation="gelu_pytorch_tanh",
            scales_embedding=True,
            ties_embeddings=True,
        ),
        Architecture(
            "MixtralForCausalLM",
            window="all",
            rope_theta=1e6,
            mlp="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
            has_experts=True,
        ),
    )
}


def architecture(name: str, where: str = "architectures") -> Architecture:
    """The row called `name`, or an UnsupportedError that lists all names; `where` starts the message."""
    row = ARCHITECTURES.get(name)
    if row is None:
        raise UnsupportedError(f"{where}: {name!r} is not supported; cupyq runs {', '.join(ARCHITECTURES)}")
    return row
