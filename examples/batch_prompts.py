"""A file of prompts, one a line, as one batch: answers as JSON lines in the same order, and a progress bar.

python examples/batch_prompts.py [PROMPTS] [--model FOLDER] [--out FILE] [--max-new-tokens N] [--max-batch N] [--greedy]
                                 [--cache-tokens N] [--backend auto|numpy|cupy]

Jobs enter and leave the running batch as they can; beginnings that prompts have in common are computed once.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

import cupyq
from cupyq.generate import encode, load_tokenizer
from cupyq.serve import Generator, Job, SamplerSettings

PROMPTS = ["ROMEO:\n", "JULIET:\n", "First Citizen:\nWe are", "First Citizen:\nWe know", "KING RICHARD II:\n", "Nurse:\nO "]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("prompts", nargs="?", type=Path, help="a text file, a prompt a line; \\n stands for a line break in it")
parser.add_argument("--model", default=Path(__file__).parent / "models/shakespeare-exl2-4.0", type=Path)
parser.add_argument("--out", type=Path)
parser.add_argument("--max-new-tokens", type=int, default=24)
parser.add_argument("--max-batch", type=int, default=32)
parser.add_argument("--cache-tokens", type=int, help="places for keys and values of all jobs together")
parser.add_argument("--greedy", action="store_true")
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
options = parser.parse_args()

model, tokenizer = cupyq.load_model(options.model, backend=options.backend), load_tokenizer(options.model)
texts = PROMPTS
if options.prompts is not None:
    texts = [line.replace("\\n", "\n") for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
generator = Generator(model, tokenizer, max_batch=options.max_batch, cache_tokens=options.cache_tokens)
settings = SamplerSettings.greedy() if options.greedy else SamplerSettings()
jobs = [
    generator.add(Job(encode(tokenizer, text), max_new_tokens=options.max_new_tokens, settings=settings, seed=seed))
    for seed, text in enumerate(texts)
]
with tqdm(total=len(jobs), unit="prompt", disable=None) as bar:
    tokens = 0
    for event in generator:
        tokens += len(event.tokens)
        if event.kind == "finished":
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            bar.update()

with options.out.open("w", encoding="utf-8") if options.out else sys.stdout as out:
    for text, job in zip(texts, jobs, strict=True):
        answer = {"prompt": text, "text": job.text, "tokens": len(job.tokens), "reason": job.reason}
        print(json.dumps(answer, ensure_ascii=False), file=out)
print(
    f"{len(jobs)} prompts: {generator.prefilled_tokens} prompt tokens computed, {generator.cached_tokens} found in the cache",
    file=sys.stderr,
)
