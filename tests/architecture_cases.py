"""Tiny models of every architecture: config.json in the spelling its publisher uses, and tensors by their published names.

Names and shapes are written out here, from the modeling files, and know nothing of cupyq's table of architectures. The same
folders go to transformers (tools/record_architectures.py) and to cupyq.
"""

import json
import zlib

import numpy as np
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, VOCAB, EXPERTS = 64, 4, 2, 16, 96, 2, 96, 4
SEQ = 12
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
WINDOW = 5

IDS = np.random.default_rng(8).integers(0, VOCAB, (1, SEQ), np.int32)

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 300.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(name, kind, without=(), **keys):
    """The keys of a Llama, those of `keys` in place of or beside them, those of `without` left out."""
    both = {"architectures": [name], "model_type": kind} | BASE | keys
    return {key: value for key, value in both.items() if key not in without}


# --- tensors ----------------------------------------------------------------------------------------------------------


def layer_names(layer_key="model.layers", layers=LAYERS):
    return [f"{layer_key}.{layer}" for layer in range(layers)]


def attention(key, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, qkv_bias=False, o_bias=False):
    widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    shapes = {f"{key}.{part}_proj.weight": (n, HIDDEN) for part, n in widths.items()}
    shapes |= {f"{key}.{part}_proj.bias": (n,) for part, n in widths.items() if qkv_bias}
    shapes |= {f"{key}.o_proj.weight": (HIDDEN, heads * head_dim)}
    return shapes | ({f"{key}.o_proj.bias": (HIDDEN,)} if o_bias else {})


def gated(key, gate="gate_proj", up="up_proj", down="down_proj", inner=INNER):
    wide = {f"{key}.{name}.weight": (inner, HIDDEN) for name in (gate, up)}
    return wide | {f"{key}.{down}.weight": (HIDDEN, inner)}


def norms(*names, bias=False):
    return {f"{name}.{part}": (HIDDEN,) for name in names for part in (("weight", "bias") if bias else ("weight",))}


def ends(embedding="model.embed_tokens", norm="model.norm", head="lm_head", bias=False):
    shapes = {f"{embedding}.weight": (VOCAB, HIDDEN)} | norms(norm, bias=bias)
    return shapes | ({f"{head}.weight": (VOCAB, HIDDEN)} if head else {})


def llama_like(
    qkv_bias=False,
    o_bias=False,
    head=True,
    layer_norms=("input_layernorm", "post_attention_layernorm"),
    norm_bias=False,
    extra=lambda key: {},
    mlp=lambda key: gated(f"{key}.mlp"),
    prefix="",
    layers=LAYERS,
):
    shapes = ends(f"{prefix}model.embed_tokens", f"{prefix}model.norm", f"{prefix}lm_head" if head else None, norm_bias)
    for key in layer_names(f"{prefix}model.layers", layers):
        shapes |= attention(f"{key}.self_attn", qkv_bias=qkv_bias, o_bias=o_bias) | mlp(key) | extra(key)
        shapes |= norms(*(f"{key}.{name}" for name in layer_norms), bias=norm_bias)
    return shapes


def with_head_norms(key):
    return {f"{key}.self_attn.{part}_norm.weight": (HEAD_DIM,) for part in "qk"}


def cohere_head_norms(key):
    return {f"{key}.self_attn.q_norm.weight": (HEADS, HEAD_DIM), f"{key}.self_attn.k_norm.weight": (KV_HEADS, HEAD_DIM)}


def mixtral_mlp(key):
    shapes = {f"{key}.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        shapes |= gated(f"{key}.block_sparse_moe.experts.{expert}", "w1", "w3", "w2")
    return shapes


def qwen3_moe_mlp(key):
    if key.endswith(".1"):  # mlp_only_layers
        return gated(f"{key}.mlp")
    shapes = {f"{key}.mlp.gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        shapes |= gated(f"{key}.mlp.experts.{expert}", inner=32)
    return shapes


def ungated(up, down, bias=True, transposed=False):
    def shapes(key):
        both = {f"{key}.{up}.weight": (INNER, HIDDEN), f"{key}.{down}.weight": (HIDDEN, INNER)}
        both = {name: shape[::-1] if transposed else shape for name, shape in both.items()}
        return both | ({f"{key}.{up}.bias": (INNER,), f"{key}.{down}.bias": (HIDDEN,)} if bias else {})

    return shapes


def gpt2_like(qkv, transposed, prefix="transformer."):
    shapes = ends(f"{prefix}wte", f"{prefix}ln_f", None, bias=True) | {f"{prefix}wpe.weight": (64, HIDDEN)}
    for key in layer_names(f"{prefix}h"):
        matrices = {f"{key}.attn.c_attn": (qkv, HIDDEN), f"{key}.attn.c_proj": (HIDDEN, HIDDEN)}
        for name, shape in matrices.items():
            shapes |= {f"{name}.weight": shape[::-1] if transposed else shape, f"{name}.bias": shape[:1]}
        shapes |= ungated("c_fc", "c_proj", transposed=transposed)(f"{key}.mlp")
        shapes |= norms(f"{key}.ln_1", f"{key}.ln_2", bias=True)
    return shapes


def dbrx():
    shapes = ends("transformer.wte", "transformer.norm_f")
    for key in layer_names("transformer.blocks"):
        shapes |= {
            f"{key}.norm_attn_norm.attn.Wqkv.weight": (Q + 2 * KV, HIDDEN),
            f"{key}.norm_attn_norm.attn.out_proj.weight": (HIDDEN, Q),
            f"{key}.ffn.router.layer.weight": (EXPERTS, HIDDEN),
        }
        shapes |= {f"{key}.ffn.experts.mlp.{name}": (EXPERTS * 32, HIDDEN) for name in ("w1", "v1", "w2")}
        shapes |= norms(f"{key}.norm_attn_norm.norm_1", f"{key}.norm_attn_norm.norm_2")
    return shapes


def phi3():
    shapes = ends()
    for key in layer_names():
        shapes |= {
            f"{key}.self_attn.qkv_proj.weight": (Q + 2 * KV, HIDDEN),
            f"{key}.self_attn.o_proj.weight": (HIDDEN, Q),
            f"{key}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
            f"{key}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
        shapes |= norms(f"{key}.input_layernorm", f"{key}.post_attention_layernorm")
    return shapes


def internlm2():
    shapes = ends("model.tok_embeddings", "model.norm", "output")
    for key in layer_names():
        shapes |= {f"{key}.attention.wqkv.weight": (Q + 2 * KV, HIDDEN), f"{key}.attention.wo.weight": (HIDDEN, Q)}
        shapes |= gated(f"{key}.feed_forward", "w1", "w3", "w2")
        shapes |= norms(f"{key}.attention_norm", f"{key}.ffn_norm")
    return shapes


def glm4():
    def mlp(key):
        return {f"{key}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN), f"{key}.mlp.down_proj.weight": (HIDDEN, INNER)}

    names = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
    return llama_like(qkv_bias=True, layer_norms=names, mlp=mlp)


GEMMA2_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def made(shapes):
    """The tensors: each depends on its own name alone."""
    tensors = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        is_norm = len(shape) == 1 and name.endswith("weight") or name.endswith(("q_norm.weight", "k_norm.weight"))
        if is_norm:
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif any(part in name for part in ("embed", "wte", "wpe")):
            values = 0.5 * values
        else:
            values = 0.2 * values
        tensors[name] = values.astype(np.float32)
    return tensors


# --- the models -------------------------------------------------------------------------------------------------------

GEMMA = {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "head_dim": HEAD_DIM, "tie_word_embeddings": True}
GEMMA3_TEXT = GEMMA | {
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 20.0,
    "query_pre_attn_scalar": 24,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "n_inner": INNER,
    "layer_norm_epsilon": 1e-3,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
TEXT = {key: value for key, value in BASE.items() if key not in ("torch_dtype", "tie_word_embeddings", "hidden_act")}
VISION = {
    "pixtral": {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    "siglip": {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    "qwen2_vl": {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 1},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": HIDDEN},
}


def with_vision(name, kind, vision, text, **keys):
    common = {key: BASE[key] for key in ("torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")}
    whole = {"architectures": [name], "model_type": kind, "text_config": text, "vision_config": VISION[vision]}
    return whole | common | keys


def rope(kind, **numbers):
    return config("LlamaForCausalLM", "llama", rope_scaling={"type": kind, **numbers})


FACTORS = [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * (HEAD_DIM // 2), "long_factor": FACTORS}
SCALED_SIX = {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE | {"short_factor": [1.0] * 6, "long_factor": FACTORS[:6]}}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
YARN = {"factor": 8.0, "original_max_position_embeddings": 8}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

CASES = {
    "llama": (config("LlamaForCausalLM", "llama"), llama_like()),
    "llama-biases": (
        config("LlamaForCausalLM", "llama", attention_bias=True),
        llama_like(qkv_bias=True, o_bias=True),
    ),
    "rope-linear": (rope("linear", factor=4.0), llama_like()),
    "rope-dynamic": (rope("dynamic", factor=4.0) | {"max_position_embeddings": 8}, llama_like()),
    "rope-llama3": (rope("llama3", **LLAMA3), llama_like()),
    "rope-yarn": (rope("yarn", **YARN), llama_like()),
    "mistral": (config("MistralForCausalLM", "mistral", sliding_window=WINDOW), llama_like()),
    "mixtral": (
        config("MixtralForCausalLM", "mixtral", num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None),
        llama_like(mlp=mixtral_mlp),
    ),
    "qwen2": (config("Qwen2ForCausalLM", "qwen2"), llama_like(qkv_bias=True)),
    "qwen3": (config("Qwen3ForCausalLM", "qwen3", head_dim=HEAD_DIM), llama_like(extra=with_head_norms)),
    "qwen3-moe": (
        config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            head_dim=HEAD_DIM,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            decoder_sparse_step=1,
        ),
        llama_like(extra=with_head_norms, mlp=qwen3_moe_mlp),
    ),
    "qwen3-moe-unnormed": (
        config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            head_dim=HEAD_DIM,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=WINDOW,
        ),
        llama_like(extra=with_head_norms, mlp=qwen3_moe_mlp),
    ),
    "qwen2-vl": (
        config("Qwen2VLForConditionalGeneration", "qwen2_vl", rope_scaling=MROPE, vision_config=VISION["qwen2_vl"]),
        llama_like(qkv_bias=True),
    ),
    "qwen2.5-vl": (
        config("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", rope_scaling=MROPE, vision_config=VISION["qwen2_5_vl"]),
        llama_like(qkv_bias=True),
    ),
    "gemma": (config("GemmaForCausalLM", "gemma", **GEMMA), llama_like(head=False)),
    "gemma2": (
        config(
            "Gemma2ForCausalLM",
            "gemma2",
            **GEMMA,
            sliding_window=WINDOW,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        ),
        llama_like(head=False, layer_norms=GEMMA2_NORMS),
    ),
    "gemma3-text": (
        config("Gemma3ForCausalLM", "gemma3_text", **GEMMA3_TEXT),
        llama_like(head=False, layer_norms=GEMMA2_NORMS, extra=with_head_norms),
    ),
    "gemma3": (
        with_vision(
            "Gemma3ForConditionalGeneration",
            "gemma3",
            "siglip",
            {key: value for key, value in (TEXT | GEMMA3_TEXT).items() if key not in ("hidden_act", "rms_norm_eps")}
            | {"model_type": "gemma3_text"},
            mm_tokens_per_image=4,
        ),
        llama_like(head=False, layer_norms=GEMMA2_NORMS, extra=with_head_norms, prefix="language_model."),
    ),
    "gemmoe": (
        config("GemmoeForCausalLM", "gemmoe", **GEMMA, num_local_experts=EXPERTS, num_experts_per_tok=2),
        llama_like(head=False, mlp=mixtral_mlp),
    ),
    "cohere": (
        config(
            "CohereForCausalLM", "cohere", ("rms_norm_eps",), layer_norm_eps=1e-3, logit_scale=0.25, tie_word_embeddings=True
        ),
        llama_like(head=False, layer_norms=("input_layernorm",)),
    ),
    "cohere-head-norms": (
        config(
            "CohereForCausalLM",
            "cohere",
            ("rms_norm_eps",),
            layer_norm_eps=1e-3,
            logit_scale=0.25,
            use_qk_norm=True,
            tie_word_embeddings=True,
        ),
        llama_like(head=False, layer_norms=("input_layernorm",), extra=cohere_head_norms),
    ),
    "cohere2": (
        config(
            "Cohere2ForCausalLM",
            "cohere2",
            ("rms_norm_eps",),
            layer_norm_eps=1e-3,
            logit_scale=0.25,
            sliding_window=WINDOW,
            sliding_window_pattern=2,
            tie_word_embeddings=True,
        ),
        llama_like(head=False, layer_norms=("input_layernorm",)),
    ),
    "yi": (config("YiForCausalLM", "Yi"), llama_like(layer_norms=("ln1", "ln2"))),
    "orion": (config("OrionForCausalLM", "orion"), llama_like(norm_bias=True)),
    "starcoder2": (
        config(
            "Starcoder2ForCausalLM",
            "starcoder2",
            ("rms_norm_eps",),
            norm_epsilon=1e-3,
            use_bias=True,
            hidden_act="gelu_pytorch_tanh",
            sliding_window=WINDOW,
            tie_word_embeddings=True,
        ),
        llama_like(
            qkv_bias=True,
            o_bias=True,
            head=False,
            norm_bias=True,
            mlp=lambda key: ungated("c_fc", "c_proj")(f"{key}.mlp"),
        ),
    ),
    "gpt2": (
        GPT2 | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"},
        gpt2_like(3 * HIDDEN, transposed=True, prefix=""),
    ),
    "gpt-bigcode": (
        GPT2
        | {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "multi_query": True}
        | {"activation_function": "gelu_pytorch_tanh"},
        gpt2_like(HIDDEN + 2 * HEAD_DIM, transposed=False),
    ),
    "gpt-bigcode-many-heads": (
        GPT2
        | {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "multi_query": False}
        | {"activation_function": "gelu_pytorch_tanh"},
        gpt2_like(3 * HIDDEN, transposed=False),
    ),
    "dbrx": (
        {
            "architectures": ["DbrxForCausalLM"],
            "model_type": "dbrx",
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_seq_len": 64,
            "torch_dtype": "float32",
            "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 1.0, "rope_theta": 300.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        },
        dbrx(),
    ),
    "phi3": (config("Phi3ForCausalLM", "phi3", sliding_window=WINDOW), phi3()),
    "phi3-longrope": (
        config("Phi3ForCausalLM", "phi3", **SCALED_SIX, original_max_position_embeddings=8, sliding_window=None),
        phi3(),
    ),
    "phi3-shortrope": (
        config("Phi3ForCausalLM", "phi3", **SCALED_SIX, original_max_position_embeddings=32, sliding_window=None),
        phi3(),
    ),
    "internlm2": (config("InternLM2ForCausalLM", "internlm2", bias=False), internlm2()),
    "minicpm": (config("MiniCPMForCausalLM", "minicpm", scale_emb=3.0, scale_depth=0.7, dim_model_base=16), llama_like()),
    "granite": (
        config(
            "GraniteForCausalLM",
            "granite",
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.11,
            logits_scaling=2.5,
        ),
        llama_like(),
    ),
    "glm4": (
        config("Glm4ForCausalLM", "glm4", head_dim=HEAD_DIM, attention_bias=True, partial_rotary_factor=0.5),
        glm4(),
    ),
    "index": (config("IndexForCausalLM", "index", norm_head=1), llama_like()),
    "pixtral": (
        with_vision(
            "LlavaForConditionalGeneration",
            "llava",
            "pixtral",
            TEXT | {"model_type": "mistral", "head_dim": HEAD_DIM, "sliding_window": None},
        ),
        llama_like(prefix="language_model."),
    ),
    "mistral3": (
        with_vision(
            "Mistral3ForConditionalGeneration",
            "mistral3",
            "pixtral",
            TEXT | {"model_type": "mistral", "head_dim": HEAD_DIM, "sliding_window": WINDOW, "hidden_act": "silu"},
        ),
        llama_like(prefix="language_model."),
    ),
}

LENGTHS = {"rope-dynamic": SEQ, "phi3-shortrope": SEQ}
"""The context served, where that decides which frequencies are used; elsewhere it is config.json's."""


def write(folder, name, tensors=None):
    """The model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, shapes = CASES[name]
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(made(shapes) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
