"""What cupyq does, in half a minute: load a quantized model, measure what quantizing cost, write a scene.

python examples/demo.py [--backend auto|numpy|cupy]
"""

import argparse
import time
from pathlib import Path

from tqdm import tqdm

import cupyq
from cupyq.generate import SamplerSettings, StreamDecoder, encode, generate, load_tokenizer, perplexity

MODELS = Path(__file__).parent / "models"
TEXT = MODELS / "shakespeare/val.txt"
WINDOW = 256
WINDOWS_ON_CPU = 24  # of 193: the NumPy reference computes in float64, for certainty and not for speed
SEED = 7
PROMPT = "ROMEO:\n"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
backend = parser.parse_args().backend

start = time.perf_counter()
models = {
    "float16": cupyq.load_model(MODELS / "shakespeare", backend=backend),
    "EXL2": cupyq.load_model(MODELS / "shakespeare-exl2-4.0", backend=backend),
}
quantized = models["EXL2"]
where = "the GPU's kernels" if quantized.backend == "cupy" else "the NumPy reference, as no GPU is used"
print(f"{quantized.config.architecture.name}, {quantized.parameters / 1e6:.1f} M parameters, trained on Shakespeare")
print(f"backend {quantized.backend} ({where}), loaded in {time.perf_counter() - start:.1f} s\n")

tokenizer = load_tokenizer(MODELS / "shakespeare-exl2-4.0")
ids = encode(tokenizer, TEXT.read_text(encoding="utf-8"), special=False)
windows = len(ids) // WINDOW
if quantized.backend == "numpy":
    windows = min(windows, WINDOWS_ON_CPU)
print(f"{'':<10}{'bits per weight':>16}{'perplexity':>13}   over {windows} windows of {WINDOW} tokens it never saw")
for name, model in models.items():
    with tqdm(total=windows, desc=name, unit="window", delay=1, leave=False, disable=None) as bar:
        measured = perplexity(model, ids, window=WINDOW, max_windows=windows, on_windows=bar.update)
    print(f"{name:<10}{model.bits_per_weight:>16.3f}{measured.perplexity:>13.3f}")

print(f"\nA scene by the {quantized.bits_per_weight:.1f}-bit model (seed {SEED}: the same scene every time):\n")
prompt = encode(tokenizer, PROMPT)
decoder = StreamDecoder(tokenizer, prompt)
print(PROMPT, end="", flush=True)
scene = generate(
    quantized,
    prompt,
    max_new_tokens=200,
    settings=SamplerSettings(seed=SEED),
    stop_ids=quantized.config.eos_token_ids,
    on_token=lambda token: print(decoder.add(token), end="", flush=True),
)
print(decoder.finish())
print(f"\n{len(scene.tokens)} tokens, {scene.decode_tokens_per_s:.0f} per second")
