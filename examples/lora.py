"""Two requests in one batch, one of them with a LoRA adapter: python examples/lora.py [--backend auto|numpy|cupy]

The adapter is random and made here, in the layout PEFT saves: it has learnt nothing, but it changes what is said.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import cupyq
from cupyq.generate import SamplerSettings, encode, generate, load_tokenizer

MODEL = Path(__file__).parent / "models/shakespeare"
RANK, NEW_TOKENS = 8, 24

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
model = cupyq.load_model(MODEL, backend=parser.parse_args().backend)
tokenizer = load_tokenizer(MODEL)

rng, tensors = np.random.default_rng(0), {}
for layer in model.linear_layers():
    k, n = layer.shape
    if layer.name.endswith(("q_proj", "v_proj", "down_proj")):
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = rng.normal(0, k**-0.5, (RANK, k)).astype(np.float16)
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = rng.normal(0, 0.1, (n, RANK)).astype(np.float16)

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary) / "ranting"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}))
    name = model.load_adapter(folder)  # its name is the folder's

prompt = encode(tokenizer, "ROMEO:")
choices = [None, name]  # one for each request; also a tuple of names, or a dict of names and weights
cache = model.new_cache(batch=2, capacity=len(prompt) + NEW_TOKENS)
ids, tokens = np.array([prompt, prompt]), []
for _ in range(NEW_TOKENS):
    logits = model.forward(ids, cache, last_only=True, adapters=choices)
    ids = logits[:, -1].argmax(axis=-1).reshape(2, 1)
    tokens.append(ids.tolist())
columns = np.array(tokens)[:, :, 0].T.tolist()

for label, row in zip(("no adapter", name), columns, strict=True):
    print(f"{label:<12}{' '.join(tokenizer.decode(prompt + row).split())}")
alone = generate(model, prompt, max_new_tokens=NEW_TOKENS, settings=SamplerSettings.greedy(), adapters=name).tokens
print(f"alone, the adapter gives {'the same' if alone == columns[1] else 'other'} tokens")
