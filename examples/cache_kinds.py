"""One text with its keys and values in every kind of cache: python examples/cache_kinds.py [--backend auto|numpy|cupy]

Fewer bytes hold longer contexts, and on a GPU attention is faster for them: it reads the codes as they are.
"""

import argparse
from pathlib import Path

import cupyq
from cupyq.generate import SamplerSettings, encode, generate, load_tokenizer
from cupyq.layers import CACHE_KINDS

MODEL = Path(__file__).parent / "models/shakespeare-exl2-4.0"
NEW_TOKENS = 12

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
model, tokenizer = cupyq.load_model(MODEL, backend=parser.parse_args().backend), load_tokenizer(MODEL)
prompt = encode(tokenizer, "KING RICHARD II:\n")

print(f"{'cache':<7}{'bytes a token':>14}   text")
for kind in CACHE_KINDS:
    result = generate(model, prompt, max_new_tokens=NEW_TOKENS, settings=SamplerSettings.greedy(), cache=kind)
    text = " ".join(tokenizer.decode(result.tokens).split())
    print(f"{kind:<7}{model.new_cache(capacity=8, kind=kind).bytes_per_token:>14}   {text}")
