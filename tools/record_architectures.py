"""tests/golden/architectures.safetensors anew: logits of Hugging Face transformers, in float32 on the CPU.

Needs transformers and torch beside what tests need; `python tools/record_architectures.py [NAME ...]`. The models are those of
tests/architecture_cases.py. Six architectures are published with a modeling file of their own and have no class in
transformers: their golden is that of a class with the same formulas, to which their tensors are brought here, as that file
says. Written with transformers 5.23.0 and torch 2.15.0.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import architecture_cases as cases  # noqa: E402

GOLDEN = ROOT / "tests/golden/architectures.safetensors"


class Mixture(torch.nn.Module):
    """GemMoE: Mixtral's mixture of Gemma's MLPs."""

    def __init__(self, key, tensors):
        super().__init__()
        weights = {name.removeprefix(key): torch.tensor(value) for name, value in tensors.items() if name.startswith(key)}
        self.router = weights.pop("gate.weight")
        self.weights = weights

    def forward(self, x):
        chances = (x @ self.router.T).softmax(-1)
        values, chosen = chances.topk(2, -1)
        values = values / values.sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for expert in range(len(self.router)):
            w1, w3, w2 = (self.weights[f"experts.{expert}.{name}.weight"].T for name in ("w1", "w3", "w2"))
            y = (torch.nn.functional.gelu(x @ w1, approximate="tanh") * (x @ w3)) @ w2
            total += y * torch.where(chosen == expert, values, 0).sum(-1, keepdim=True)
        return total


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


def stand_in(name, keys, tensors):
    """(config, tensors) of a class of transformers with the same formulas."""
    if name == "yi":
        tensors = renamed(tensors, ("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm"))
        return keys | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, tensors
    if name == "orion":
        own = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "partial_rotary_factor": 1.0}
        return keys | own | {"layer_norm_eps": keys["rms_norm_eps"]}, tensors
    if name == "internlm2":
        pairs = [("tok_embeddings", "embed_tokens"), ("output.", "lm_head."), (".attention.wo", ".self_attn.o_proj")]
        pairs += [(f"feed_forward.{w}", f"mlp.{name}_proj") for w, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))]
        pairs += [("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
        split = {}
        for key, value in renamed(tensors, *pairs).items():
            if "wqkv" not in key:
                split[key] = value
                continue
            # einops: "(h gs d) -> h gs d", gs = 2 + heads of q for each of k
            groups = value.reshape(cases.KV_HEADS, cases.HEADS // cases.KV_HEADS + 2, cases.HEAD_DIM, -1)
            parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
            for part, rows in parts.items():
                split[key.replace("attention.wqkv", f"self_attn.{part}_proj")] = np.ascontiguousarray(
                    rows.reshape(-1, cases.HIDDEN)
                )
        return keys | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, split
    if name == "minicpm":
        own = {"embedding_multiplier": keys["scale_emb"], "logits_scaling": keys["hidden_size"] / keys["dim_model_base"]}
        own["residual_multiplier"] = keys["scale_depth"] / keys["num_hidden_layers"] ** 0.5
        own["attention_multiplier"] = cases.HEAD_DIM**-0.5
        return keys | own | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}, tensors
    if name == "index":
        head = tensors["lm_head.weight"]
        tensors = tensors | {"lm_head.weight": head / np.linalg.norm(head, axis=1, keepdims=True)}
        return keys | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, tensors
    if name == "dbrx":
        # transformers 5 does not read attn_config.rope_theta, which is where DBRX has it.
        return keys | {"rope_theta": keys["attn_config"]["rope_theta"]}, tensors
    if name == "gemmoe":
        plain = {key: value for key, value in tensors.items() if "block_sparse_moe" not in key}
        for key in cases.layer_names():
            plain |= {name: np.zeros(shape, np.float32) for name, shape in cases.gated(f"{key}.mlp").items()}
        return keys | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, plain
    return keys, tensors


def logits(name, folder):
    cases.write(folder, name)
    own = load_file(folder / "model.safetensors")
    keys, tensors = stand_in(name, json.loads((folder / "config.json").read_text()), own)
    cases.write(folder, name, tensors)
    (folder / "config.json").write_text(json.dumps(keys))
    model_class = getattr(transformers, keys["architectures"][0])
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = [key for key in report["missing_keys"] if not any(part in key for part in ("vis", "multi_modal", "merger"))]
    if missing or report["unexpected_keys"]:
        raise SystemExit(f"{name}: missing {missing}, unexpected {report['unexpected_keys']}")
    if name == "gemmoe":
        for layer, key in zip(model.model.layers, cases.layer_names(), strict=True):
            layer.mlp = Mixture(f"{key}.block_sparse_moe.", own)
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(cases.IDS, dtype=torch.long)).logits.float().numpy()[0]


def main(names):
    golden = load_file(GOLDEN) if GOLDEN.exists() else {}
    for name in names or cases.CASES:
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = logits(name, Path(folder))
        print(f"{name}: largest {np.abs(golden[name]).max():.3f}")
    golden = {name: golden[name] for name in cases.CASES if name in golden}
    save_file(golden, GOLDEN)


if __name__ == "__main__":
    main(sys.argv[1:])
