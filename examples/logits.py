"""Logits in a numpy script: what a model holds likely after every token of a text, and how surprised it was.

python examples/logits.py [--text TEXT] [--backend auto|numpy|cupy]
"""

import argparse
from pathlib import Path

import numpy as np

import cupyq
from cupyq.generate import encode, load_tokenizer

FOLDER = Path(__file__).parent / "models/shakespeare-exl2-4.0"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", default="ROMEO:\nO, my love, and the king of England")
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
options = parser.parse_args()

model, tokenizer = cupyq.load_model(FOLDER, backend=options.backend), load_tokenizer(FOLDER)
ids = encode(tokenizer, options.text)
logits = model.forward([ids])[0]  # float32 [seq, vocab], NumPy or CuPy
logits = np.asarray(logits if model.backend == "numpy" else logits.get(), np.float64)

shifted = logits - logits.max(axis=-1, keepdims=True)
logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
print(f"{'token':<14}{'probability':>12}   likeliest in its place")
for position in range(1, len(ids)):
    row = logprobs[position - 1]
    best = np.argsort(-row)[:3]
    guesses = ", ".join(f"{tokenizer.decode([int(token)])!r} {np.exp(row[token]):.2f}" for token in best)
    print(f"{tokenizer.decode([ids[position]])!r:<14}{np.exp(row[ids[position]]):>12.4f}   {guesses}")
loss = -logprobs[np.arange(len(ids) - 1), ids[1:]].mean()
print(f"\n{len(ids) - 1} tokens, perplexity {np.exp(loss):.2f}")
