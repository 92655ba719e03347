"""What distinguishes one architecture from the next: one row of data each.

A row says how tensors and keys of config.json are called and which of the decoder's options an architecture uses; sizes come
from config.json. A new architecture of known parts is a new row and no code. An architecture without a row is refused, never
taken for a Llama: one that differs in what no tensor's shape tells (an activation, a norm) would load and talk nonsense.
Facts: each model's class in huggingface/transformers; for those it lacks (Orion, Yi, InternLM2, MiniCPM, Index, GemMoE) the
modeling file published with the weights. Where a checkpoint stores several matrices as one, the names here are those of the
single ones, as exllamav2's converter writes them.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from cupyq.errors import UnsupportedError


@dataclass(frozen=True)
class Architecture:
    """One row. The defaults are Llama's; names of tensors are below `model.layers.<i>.`, dots left out at both ends."""

    name: str

    # Names
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements, used in order, that make a checkpoint's names of tensors those given here, and
    leave these as they are. Names that then begin with "mask." are of no weights: nobody reads them."""
    written: tuple[tuple[str, str], ...] = ()
    """The same from the names given here to those of exllamav2's modules, where it has others: its converter writes tensors
    under these, and it looks for no others."""
    keys: tuple[tuple[str, str], ...] = ()
    """A key of config.json as Llama spells it, and as this architecture does; dots lead into objects."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Keys, as Llama spells them, that config.json may leave out, and their values then."""
    required: tuple[tuple[str, Any], ...] = ()
    """Keys that must have this value where config.json has them: with another one the model is one of other parts."""
    text_types: tuple[str, ...] = ()
    """Of a model that sees as well: what text_config.model_type may be. Its keys count as if they were at top level, and what
    sees is left in the files."""

    # Norms: pre-norms enter attention and MLP, post-norms apply to what they return, before it joins the residual.
    norm: Literal["rms", "layer"] = "rms"
    has_norm_bias: bool = False
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    """None: attention and MLP are parallel, after one norm."""
    mlp_post_norm: str | None = None
    norm_weight_offset: float = 0.0
    """Added to every norm weight in float32: Gemma stores weight - 1."""

    # Attention
    attention: str = "self_attn"
    fused_qkv: str | None = None
    """The name of q, k and v in one tensor, where a checkpoint has that instead of the three."""
    qkv_layout: Literal["rows", "groups"] = "rows"
    """Of that tensor: all of q, of k, of v; or for each head of k its heads of q, itself, and its head of v."""
    head_norm: Literal["rms", "layer"] | None = None
    """Norm over each head of q and k, before RoPE; weights q_norm and k_norm of [head_dim]."""
    head_norm_key: str | None = None
    """The key that switches these norms on; None: always."""
    has_norm_per_head: bool = False
    """Those weights are [heads, head_dim]."""
    attention_bias: Literal["none", "qkv", "all", "config", "config-qkv"] = "none"
    """"config": key `attention_bias` says whether q, k, v and o have one; "config-qkv": whether q, k and v do."""
    window: Literal["none", "all", "switched", "optional", "pattern"] = "none"
    """Which layers `sliding_window` is for: none; all; all if `use_sliding_window`; then from `max_window_layers` on; all but
    each `window_pattern`-th. `layer_types` overrules."""
    window_pattern: int = 0
    """Where config.json has no `sliding_window_pattern`."""
    attention_scale: Literal["head_dim", "query_pre_attn_scalar", "attention_multiplier"] = "head_dim"
    """The first two to the power of -1/2."""
    has_softcaps: bool = False
    """Keys `attn_logit_softcapping` and `final_logit_softcapping` count."""
    has_qkv_clip: bool = False
    """Key `clip_qkv` bounds q, k and v."""
    rope: Literal["neox", "gptj"] | None = "neox"
    """None: positions are learned, an embedding `wpe`."""
    rope_theta: float = 10000.0
    """Where config.json has none."""
    local_rope_theta: float | None = None
    """Layers with a window have a theta of their own, unscaled; its value where config.json has none."""
    rotates_window_only: bool = False
    """Layers without a window do not rotate."""
    partial_rotary_factor: float | None = None
    """The share of each head that rotates, where config.json has none; None: whole heads, always."""
    has_mrope: bool = False
    """Positions of three axes, which are the same for text: plain RoPE."""

    # MLP: down(activation(gate(x)) * up(x)), or a mixture of such experts.
    mlp: str = "mlp"
    gate: str | None = "gate_proj"
    """None: down(activation(up(x)))."""
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str | None = None
    """The name of gate and up in one tensor, as rows, where a checkpoint has that instead of the two."""
    mlp_bias: Literal["none", "all", "config"] = "none"
    """"config": key `mlp_bias` says so."""
    inner_factor: int | None = None
    """intermediate_size is so many times hidden_size where config.json has none."""
    has_experts: bool = False
    router: str = "gate"
    experts: str = "experts"
    has_fused_experts: bool = False
    """A checkpoint may have each of gate, up and down as one tensor [experts * intermediate_size, hidden_size]."""
    renormalize: Literal["always", "norm_topk_prob", "moe_normalize_expert_weights"] = "always"
    """Whether the weights of the chosen experts are divided by their sum; else the key that says so."""
    has_dense_layers: bool = False
    """Keys `mlp_only_layers` and `decoder_sparse_step` tell which layers have experts."""
    activation_keys: tuple[str, ...] = ("hidden_act",)
    activation: str = "silu"
    """Where config.json has none."""
    is_transposed: bool = False
    """Unquantized matrices are stored [inputs, outputs]."""

    # Ends
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    embedding_scale: str | None = None
    """The key of what multiplies embeddings."""
    residual_scale: Literal["residual_multiplier", "scale_depth"] | None = None
    """The key of what multiplies all that is added to the residual; scale_depth is divided by sqrt(num_hidden_layers)."""
    logit_scale: Literal["logit_scale", "logits_scaling", "dim_model_base"] | None = None
    """The key of what multiplies logits, divides them, or is to be divided by hidden_size first."""
    has_head_norm_key: bool = False
    """Key `norm_head`: rows of an unquantized head are divided by their lengths."""
    ties_embeddings: bool = False
    """Where config.json does not say."""


_MIXTRAL = Architecture(
    "MixtralForCausalLM",
    window="all",
    rope_theta=1e6,
    mlp="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    has_experts=True,
)
_QWEN2 = Architecture("Qwen2ForCausalLM", attention_bias="qkv", window="optional")
_GEMMA = Architecture(
    "GemmaForCausalLM",
    norm_weight_offset=1.0,
    attention_bias="config",
    # Gemma's first configurations say hidden_act "gelu", which its authors corrected to the other form.
    activation_keys=("hidden_activation",),
    activation="gelu_pytorch_tanh",
    scales_embedding=True,
    ties_embeddings=True,
)
_GEMMA2 = replace(
    _GEMMA,
    name="Gemma2ForCausalLM",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    window="pattern",
    window_pattern=2,
    attention_scale="query_pre_attn_scalar",
    has_softcaps=True,
    activation_keys=("hidden_activation", "hidden_act"),
)
_GEMMA3 = replace(
    _GEMMA2,
    name="Gemma3ForCausalLM",
    # Published configurations leave out what transformers has as a default.
    defaults=(
        ("vocab_size", 262208),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("max_position_embeddings", 131072),
        ("rms_norm_eps", 1e-6),
        ("query_pre_attn_scalar", 256),
        ("sliding_window", 4096),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
    ),
    required=(("use_bidirectional_attention", False),),
    head_norm="rms",
    window_pattern=6,
    rope_theta=1e6,
    local_rope_theta=1e4,
)
# Two layouts of models with a vision part: up to transformers 4 and from 5 on.
_LANGUAGE_MODEL = (
    (r"^language_model\.", ""),
    (r"^model\.language_model\.", "model."),
    (r"^model\.(vision_tower|multi_modal_projector|visual)\.", r"\1."),
)
_BELOW_LANGUAGE_MODEL = ((r"^(model|lm_head)\.", r"language_model.\1."),)
_QWEN2_VL = replace(
    _QWEN2,
    name="Qwen2VLForConditionalGeneration",
    renames=_LANGUAGE_MODEL,
    text_types=("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
    has_mrope=True,
)
_PIXTRAL = Architecture(
    "LlavaForConditionalGeneration",
    renames=_LANGUAGE_MODEL,
    written=_BELOW_LANGUAGE_MODEL,
    defaults=(("num_attention_heads", 32),),
    text_types=("llama", "mistral"),
    window="all",
)
_COHERE = Architecture(
    "CohereForCausalLM",
    keys=(("rms_norm_eps", "layer_norm_eps"),),
    norm="layer",
    mlp_norm=None,
    head_norm="layer",
    head_norm_key="use_qk_norm",
    has_norm_per_head=True,
    attention_bias="config",
    rope="gptj",
    logit_scale="logit_scale",
    ties_embeddings=True,
    defaults=(("logit_scale", 0.0625),),
)
_GPT2 = Architecture(
    "GPT2LMHeadModel",
    renames=(
        (r"^transformer\.", ""),
        (r"^wte\.", "model.embed_tokens."),
        (r"^wpe\.", "model.wpe."),
        (r"^ln_f\.", "model.norm."),
        (r"^h\.", "model.layers."),
        (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        (r"\.attn\.", ".self_attn."),
        (r"^model\.(layers\.\d+\.self_attn\.(masked_)?bias)$", r"mask.\1"),  # the causal mask, which old writers stored
    ),
    keys=(
        ("hidden_size", "n_embd"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("max_position_embeddings", "n_positions"),
        ("intermediate_size", "n_inner"),
        ("rms_norm_eps", "layer_norm_epsilon"),
    ),
    required=(
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ),
    norm="layer",
    has_norm_bias=True,
    attention_norm="ln_1",
    mlp_norm="ln_2",
    fused_qkv="c_attn",
    attention_bias="all",
    rope=None,
    gate=None,
    up="c_fc",
    down="c_proj",
    mlp_bias="all",
    inner_factor=4,
    activation_keys=("activation_function",),
    activation="gelu_new",
    is_transposed=True,
    ties_embeddings=True,
)

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("LlamaForCausalLM", attention_bias="config", mlp_bias="config"),
        Architecture("MistralForCausalLM", window="all"),
        _MIXTRAL,
        _QWEN2,
        Architecture("Qwen3ForCausalLM", attention_bias="config", window="optional", head_norm="rms"),
        Architecture(
            "Qwen3MoeForCausalLM",
            keys=(("num_local_experts", "num_experts"),),
            attention_bias="config",
            window="switched",
            head_norm="rms",
            has_experts=True,
            renormalize="norm_topk_prob",
            has_dense_layers=True,
        ),
        _QWEN2_VL,
        replace(_QWEN2_VL, name="Qwen2_5_VLForConditionalGeneration"),
        _GEMMA,
        _GEMMA2,
        _GEMMA3,
        replace(
            _GEMMA3,
            name="Gemma3ForConditionalGeneration",
            renames=_LANGUAGE_MODEL,
            written=_BELOW_LANGUAGE_MODEL,
            text_types=("gemma3_text",),
        ),
        replace(_GEMMA, name="GemmoeForCausalLM", mlp="block_sparse_moe", gate="w1", up="w3", down="w2", has_experts=True),
        _COHERE,
        replace(
            _COHERE,
            name="Cohere2ForCausalLM",
            head_norm=None,
            head_norm_key=None,
            window="pattern",
            window_pattern=4,
            rotates_window_only=True,
        ),
        Architecture(
            "YiForCausalLM",
            renames=((r"\.ln1\.", ".input_layernorm."), (r"\.ln2\.", ".post_attention_layernorm.")),
            written=((r"\.input_layernorm\.", ".ln1."), (r"\.post_attention_layernorm\.", ".ln2.")),
            attention_bias="config",
            mlp_bias="config",
        ),
        Architecture("OrionForCausalLM", norm="layer", has_norm_bias=True),
        Architecture(
            "Starcoder2ForCausalLM",
            keys=(("rms_norm_eps", "norm_epsilon"), ("attention_bias", "use_bias"), ("mlp_bias", "use_bias")),
            defaults=(("attention_bias", True), ("mlp_bias", True)),
            norm="layer",
            has_norm_bias=True,
            attention_bias="config",
            window="all",
            gate=None,
            up="c_fc",
            down="c_proj",
            mlp_bias="config",
            activation="gelu_pytorch_tanh",
            ties_embeddings=True,
        ),
        _GPT2,
        replace(
            _GPT2,
            name="GPTBigCodeForCausalLM",
            keys=(*_GPT2.keys, ("is_multi_query", "multi_query")),
            defaults=(("is_multi_query", True),),
            qkv_layout="groups",  # with one head of keys for all, this is all of q, of k, of v
            activation="gelu_pytorch_tanh",
            is_transposed=False,
        ),
        Architecture(
            "DbrxForCausalLM",
            renames=(
                (r"^transformer\.", "model."),
                (r"\.blocks\.", ".layers."),
                (r"\.ffn\.experts\.mlp\.", ".block_sparse_moe.experts."),
                (r"\.ffn\.router\.layer\.", ".block_sparse_moe.gate."),
                (r"\.norm_attn_norm\.norm_1\.", ".input_layernorm."),
                (r"\.norm_attn_norm\.norm_2\.", ".post_attention_layernorm."),
                (r"\.norm_attn_norm\.attn\.", ".self_attn."),
                (r"\.out_proj\.", ".o_proj."),
                (r"\.norm_f\.", ".norm."),
                (r"\.wte\.", ".embed_tokens."),
            ),
            keys=(
                ("hidden_size", "d_model"),
                ("num_hidden_layers", "n_layers"),
                ("num_attention_heads", "n_heads"),
                ("max_position_embeddings", "max_seq_len"),
                ("num_key_value_heads", "attn_config.kv_n_heads"),
                ("clip_qkv", "attn_config.clip_qkv"),
                ("rope_theta", "attn_config.rope_theta"),
                ("intermediate_size", "ffn_config.ffn_hidden_size"),
                ("num_local_experts", "ffn_config.moe_num_experts"),
                ("num_experts_per_tok", "ffn_config.moe_top_k"),
                ("moe_normalize_expert_weights", "ffn_config.moe_normalize_expert_weights"),
                ("hidden_act", "ffn_config.ffn_act_fn.name"),
            ),
            defaults=(("rms_norm_eps", 1e-5),),
            norm="layer",
            fused_qkv="Wqkv",
            has_qkv_clip=True,
            mlp="block_sparse_moe",
            gate="w1",
            up="v1",
            down="w2",
            has_experts=True,
            has_fused_experts=True,
            renormalize="moe_normalize_expert_weights",
        ),
        Architecture(
            "Phi3ForCausalLM",
            fused_qkv="qkv_proj",
            window="all",
            partial_rotary_factor=1.0,
            fused_gate_up="gate_up_proj",
        ),
        Architecture(
            "InternLM2ForCausalLM",
            renames=(
                (r"^output\.", "lm_head."),
                (r"^model\.tok_embeddings\.", "model.embed_tokens."),
                (r"\.attention\.", ".self_attn."),
                (r"\.wo\.", ".o_proj."),
            ),
            keys=(("attention_bias", "bias"),),
            attention_norm="attention_norm",
            mlp_norm="ffn_norm",
            fused_qkv="wqkv",
            qkv_layout="groups",
            attention_bias="config",
            mlp="feed_forward",
            gate="w1",
            up="w3",
            down="w2",
        ),
        Architecture(
            "MiniCPMForCausalLM",
            attention_bias="config",
            embedding_scale="scale_emb",
            residual_scale="scale_depth",
            logit_scale="dim_model_base",
            ties_embeddings=True,
        ),
        Architecture(
            "GraniteForCausalLM",
            defaults=(
                ("embedding_multiplier", 1.0),
                ("residual_multiplier", 1.0),
                ("attention_multiplier", 1.0),
                ("logits_scaling", 1.0),
            ),
            attention_bias="config",
            attention_scale="attention_multiplier",
            mlp_bias="config",
            embedding_scale="embedding_multiplier",
            residual_scale="residual_multiplier",
            logit_scale="logits_scaling",
        ),
        Architecture(
            "Glm4ForCausalLM",
            attention_post_norm="post_self_attn_layernorm",
            mlp_post_norm="post_mlp_layernorm",
            attention_bias="config-qkv",
            rope="gptj",
            partial_rotary_factor=0.5,
            fused_gate_up="gate_up_proj",
        ),
        Architecture("IndexForCausalLM", has_head_norm_key=True),
        _PIXTRAL,
        replace(_PIXTRAL, name="Mistral3ForConditionalGeneration"),
    )
}


def architecture(name: str, where: str = "architectures") -> Architecture:
    """The row called `name`, or an UnsupportedError that lists all names; `where` starts the message."""
    row = ARCHITECTURES.get(name)
    if row is None:
        raise UnsupportedError(f"{where}: {name!r} is not supported; cupyq runs {', '.join(ARCHITECTURES)}")
    return row
