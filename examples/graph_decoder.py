"""Decoding without the host in between: four texts at once, drawn on the device; on a GPU a step is one CUDA graph.

python examples/graph_decoder.py [--backend auto|numpy|cupy]
"""

import argparse
import time
from pathlib import Path

import cupyq
from cupyq.generate import SamplerSettings, encode, load_tokenizer

FOLDER = Path(__file__).parent / "models/shakespeare-exl2-4.0"
SPEAKERS = ("ROMEO", "KING RICHARD II", "First Citizen", "Nurse")
STEPS = 12

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
model, tokenizer = cupyq.load_model(FOLDER, backend=parser.parse_args().backend), load_tokenizer(FOLDER)


def on_host(array):
    return array if model.backend == "numpy" else array.get()


prompts = [encode(tokenizer, f"{speaker}:\n") for speaker in SPEAKERS]  # of different lengths
decoder = model.decoder(batch=len(prompts), max_len=64, settings=SamplerSettings(temperature=0.7, seed=3))

# Token by token: each comes to the host as soon as it is known, while a GPU works on the next steps already.
decoder.start(prompts)
streamed = [tokens.tolist() for tokens in decoder.stream(1 + STEPS)]

# Or many steps, and the host waits once; the graph is there now.
first = decoder.start(prompts)  # int32 [batch], where the model is
start = time.perf_counter()
drawn = on_host(decoder.run(STEPS))  # int32 [batch, STEPS]
seconds = time.perf_counter() - start
if streamed != [on_host(first).tolist(), *drawn.T.tolist()]:
    raise SystemExit("the two differ, which must not be")

for prompt, token, tokens in zip(prompts, on_host(first).tolist(), drawn.tolist(), strict=True):
    print(f"{tokenizer.decode([*prompt, token, *tokens])} ...\n")
print(f"{model.backend}: {len(prompts) * STEPS / seconds:.0f} tokens per second, streamed and at once the same")
