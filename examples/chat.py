"""A chat in the terminal: text as it is generated, Ctrl-C ends an answer, Ctrl-D or an empty line the chat.

python examples/chat.py [FOLDER] [--system TEXT] [--max-new-tokens N] [--temperature T] [--seed S] [--backend auto|numpy|cupy]

The folder's chat template decides how messages become a prompt; a model without one, such as the examples', goes on with the
text it is given.
"""

import argparse
import itertools
from pathlib import Path

import cupyq
from cupyq.errors import FormatError
from cupyq.generate import encode, load_tokenizer
from cupyq.models.chat_template import ChatTemplate
from cupyq.serve import Generator, Job, NGramDraft, SamplerSettings

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", default=Path(__file__).parent / "models/shakespeare-exl2-4.0", type=Path)
parser.add_argument("--system", help="a first message to the model")
parser.add_argument("--max-new-tokens", type=int, default=200)
parser.add_argument("--temperature", type=float, default=0.8)
parser.add_argument("--seed", type=int)
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
options = parser.parse_args()

model, tokenizer = cupyq.load_model(options.folder, backend=options.backend), load_tokenizer(options.folder)
try:
    template = ChatTemplate.from_folder(options.folder)
except FormatError:
    template = None
# What was said before is found in the cache: each turn costs its own tokens only.
generator = Generator(model, tokenizer, max_batch=1, draft=NGramDraft())
settings = SamplerSettings(temperature=options.temperature)


def prompt_of(messages):
    if template is None:
        return encode(tokenizer, "".join(message["content"] for message in messages))
    return encode(tokenizer, template.render(messages, add_generation_prompt=True), special=False)


messages = [{"role": "system", "content": options.system}] if options.system else []
for turn in itertools.count():
    try:
        text = input("> ")
    except EOFError:
        text = ""
    if not text:
        break
    messages.append({"role": "user", "content": text if template else f"{text}\n"})
    prompt = prompt_of(messages)
    room = model.config.max_seq_len - len(prompt)
    if room < 1:
        print("The conversation is longer than the model's context.")
        break
    seed = None if options.seed is None else options.seed + turn
    job = generator.add(Job(prompt, max_new_tokens=min(options.max_new_tokens, room), settings=settings, seed=seed))
    try:
        for event in generator:
            print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        job.cancel()
        for event in generator:
            print(event.text, end="", flush=True)
    print(f"\n[{len(job.tokens)} tokens, {job.cached_tokens} of {len(prompt)} prompt tokens found in the cache]")
    messages.append({"role": "assistant", "content": job.text})
