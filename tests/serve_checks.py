"""What the tests of cupyq.serve share: a tiny model of random weights, a scripted one, and jobs run alone."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
from conftest import ROOT

from cupyq.bench.random_model import random_model
from cupyq.bench.shapes import shape_config
from cupyq.generate import SamplerSettings, generate, load_tokenizer
from cupyq.models import load_model
from cupyq.serve import Generator, Job

GREEDY = SamplerSettings.greedy()
FOLDER = ROOT / "examples/models/shakespeare-exl2-4.0"


@functools.cache
def tiny_model(layers=2):
    """96 tokens in its vocabulary, a context of 512."""
    return random_model(shape_config("tiny", layers), "4", 6, "numpy")


@functools.cache
def gpu_model(bits="4.0"):
    """1024 tokens in its vocabulary, as many in its context."""
    return load_model(ROOT / f"examples/models/shakespeare-exl2-{bits}", "cupy")


@functools.cache
def tokenizer():
    return load_tokenizer(FOLDER)


def alone(model, job):
    """The new tokens of a job by the loop that knows of no others, without the stop token."""
    found = generate(
        model, job.prompt, max_new_tokens=job.max_new_tokens, settings=with_seed(job), stop_ids=job.stop_tokens or ()
    )
    return found.tokens


def with_seed(job):
    return dataclasses.replace(job.settings, seed=job.seed)


def random_job(rng, vocab=96, longest=60, most_new=12, **options):
    prompt = rng.integers(0, vocab, int(rng.integers(1, longest))).tolist()
    options = {"settings": GREEDY, "stop_tokens": [], "max_new_tokens": int(rng.integers(1, most_new))} | options
    return Job(prompt, **options)


def small_generator(model, tokenizer=None, **options):
    return Generator(model, tokenizer, **{"cache_tokens": 512, "max_batch": 8, "page_size": 16, "chunk": 32} | options)


def run_all(generator, most_steps=5000):
    """Events until nothing is left to do; fails where that takes too long."""
    events = []
    for _ in range(most_steps):
        if generator.is_idle:
            return events
        events += generator.step()
    raise AssertionError(f"not done after {most_steps} steps")


def same_but_for_a_near_tie(model, prompt, found, expected):
    """Whether two greedy texts agree up to a place where the model holds both tokens about equally likely."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a != b:
            logits = model.forward([[*prompt, *expected[:index]]], last_only=True)[0, 0]
            logits = np.asarray(logits if model.backend == "numpy" else logits.get(), np.float64)
            return abs(logits[a] - logits[b]) <= 0.02 * np.ptp(logits) and max(
                logits[a], logits[b]
            ) >= logits.max() - 0.02 * np.ptp(logits)
    return True


def text_of(events, job):
    return "".join(event.text for event in events if event.job is job)


class Scripted:
    """A model that says what it is told: after position p, whatever stands there, comes script[p + 1].

    `others`: {position: tokens} next in line there, should the first be forbidden. No keys, no values.
    """

    xp, backend, is_part = np, "numpy", False

    def __init__(self, script, vocab_size=1024, others=None, context=512, eos=()):
        self.config = SimpleNamespace(vocab_size=vocab_size, max_seq_len=context, eos_token_ids=eos)
        self.script, self.others = list(script), others or {}

    def new_paged_cache(self, pages, batch, *, page_size, kind):
        max_pages = -(-self.config.max_seq_len // page_size)
        table = np.zeros((batch, max_pages), np.int32)
        return SimpleNamespace(
            capacity=self.config.max_seq_len, max_pages=max_pages, block_table=table, batch=batch, k=[], v=[], holds_codes=False
        )

    def select_adapters(self, adapters, batch):
        return None

    def new_seed(self):
        return 0

    def check(self):
        pass

    def step(self, cache, new, positions, lengths, selection):
        return positions[:, None] + np.arange(new)

    def hidden(self, ids, step):
        assert ids.shape == step.shape
        return step

    def logits(self, hidden, step):
        logits = np.zeros((*hidden.shape, self.config.vocab_size), np.float32)
        for place in np.ndindex(hidden.shape):
            position = int(hidden[place]) + 1
            line = [self.script[min(position, len(self.script) - 1)], *self.others.get(position, ())]
            for order, token in enumerate(line):
                logits[place][token] = 40.0 - order
        return logits
