"""`cupyq bench serve`: many texts at a time through one Generator, against the same launches with nobody looking."""

import gc
import time
from dataclasses import dataclass, fields

import numpy as np

from cupyq import _device
from cupyq.bench.random_model import random_model
from cupyq.bench.shapes import shape_config
from cupyq.bench.table import emit, number, percent
from cupyq.bench.timing import wait
from cupyq.generate.text import encode, load_tokenizer
from cupyq.models import load_model
from cupyq.serve import Generator, Job, ModelDraft, NGramDraft, SamplerSettings

PAGE, NUMPY_PAGE = 256, 16
WARM_ROUNDS, ROUNDS, REPLAYS = 1, 2, 32
COLUMNS = (
    f"{'jobs':>5} {'tokens/s':>9} {'per job':>8} {'ms/step':>8} {'launches':>8} {'host':>6} {'busy ms':>8} {'first s':>8}"
    f" {'prompt t/s':>10} {'guesses':>8}"
)


@dataclass(frozen=True)
class Options:
    """Which model, how many jobs of what length, how they are drawn."""

    concurrent: tuple
    prompt: int
    new: int
    settings: SamplerSettings
    cache: str = "fp16"
    text: str | None = None
    draft: str | None = None
    guesses: int = 4


def run(arguments, out, lines=None):
    """[row] of each number of jobs; the table goes to `out`, JSON lines to `lines`."""
    names = (field.name for field in fields(Options) if field.name != "settings")
    settings = SamplerSettings() if arguments.sampled else SamplerSettings.greedy()
    options = Options(settings=settings, **{name: getattr(arguments, name) for name in names})
    if arguments.model is None:
        if arguments.text is not None:
            raise ValueError("--text is for a model with a tokenizer: give --model too")
        config = shape_config(arguments.shape, arguments.layers)
        model, name = random_model(config, arguments.bits, arguments.head_bits, arguments.backend), arguments.shape
    else:
        model, name = load_model(arguments.model, arguments.backend), arguments.model
    if options.prompt + options.new > model.config.max_seq_len:
        raise ValueError(
            f"--prompt {options.prompt} and --new {options.new} pass the context of {model.config.max_seq_len}: ask for less"
        )
    prompts = _prompts(model, options, arguments.model)
    machine = "NumPy, no GPU" if model.xp is np else _device.current().name
    print(
        f"{machine}; {name}: {model.bits_per_weight:.2f} bits per weight; prompts of {options.prompt} tokens, {options.new} new"
        f" ones\n{COLUMNS}",
        file=out,
        flush=True,
    )
    rows = []
    for count in options.concurrent:
        row = {"family": "serve", "model": name, "bits": model.bits_per_weight} | _row(model, options, prompts, count)
        rows.append(row)
        emit(row, row_text(row), out, lines)
    return rows


def _prompts(model, options, folder):
    """A function of (round, job) -> ids: pieces of a text from random places, or random tokens."""
    if options.text is None:
        vocab = model.config.vocab_size
        return lambda which, job: np.random.default_rng((which, job)).integers(0, vocab, options.prompt).tolist()
    with open(options.text, encoding="utf-8") as file:
        ids = encode(load_tokenizer(folder), file.read(), special=False)
    if len(ids) <= options.prompt:
        raise ValueError(f"--text: {options.text} has {len(ids)} tokens, prompts {options.prompt}: give a longer text")

    def piece(which, job):
        begin = int(np.random.default_rng((which, job)).integers(0, len(ids) - options.prompt))
        return ids[begin : begin + options.prompt]

    return piece


def _row(model, options, prompts, count):
    page = NUMPY_PAGE if model.xp is np else PAGE
    pages = -(-(options.prompt + options.new) // page)
    generator = Generator(
        model, cache_tokens=count * pages * page, max_batch=count, page_size=page, cache=options.cache,
        draft=_draft(model, options),
    )  # fmt: skip
    found = []
    for which in range(WARM_ROUNDS + ROUNDS):
        jobs = [
            generator.add(Job(prompts(which, i), options.new, settings=options.settings, seed=i, stop_tokens=[]))
            for i in range(count)
        ]
        found.append(_round(generator, model, jobs))
    best = min(found[WARM_ROUNDS:], key=lambda row: row["ms_per_step"])
    launches = None if options.draft else _launches_ms(generator, model, options, prompts, count)
    row = {"jobs": count, "prompt": options.prompt, "new": options.new, "cache": options.cache, "draft": options.draft} | best
    row["launches_ms"] = launches
    row["host_share"] = None if launches is None else max(0.0, 1 - launches / best["ms_per_step"])
    del generator
    gc.collect()
    if model.xp is not np:
        model.xp.get_default_memory_pool().free_all_blocks()
    return row


def _draft(model, options):
    if options.draft is None:
        return None
    if options.draft == "ngram":
        return NGramDraft(options.guesses)
    return ModelDraft(load_model(options.draft, model.backend), options.guesses)


def _round(generator, model, jobs):
    """All jobs from first to last; decoding counts from the step on in which the last one had its first token."""
    wait(model.xp)
    start = time.perf_counter()
    first, decoding = {}, None  # (time, tokens so far, steps, time waited) where all are decoding
    while not generator.is_idle:
        events = generator.step()
        now = time.perf_counter()
        for event in events:
            if event.kind == "text":
                first.setdefault(event.job.number, now - start)
        if decoding is None and len(first) == len(jobs):
            decoding = now, sum(len(job.tokens) for job in jobs), generator.steps, generator.waited_seconds
    end = time.perf_counter()
    if decoding[2] == generator.steps:
        raise ValueError("--new: every job got all its tokens in the step of its first one: ask for more of them")
    began, tokens, steps, waited = decoding
    tokens, steps = sum(len(job.tokens) for job in jobs) - tokens, generator.steps - steps
    accepted, refused = sum(job.accepted_drafts for job in jobs), sum(job.refused_drafts for job in jobs)
    if any(job.reason != "length" for job in jobs):
        raise RuntimeError(f"jobs ended early: {sorted({job.reason for job in jobs})}")
    return {
        "tokens_per_s": tokens / (end - began),
        "tokens_per_s_of_a_job": tokens / (end - began) / len(jobs),
        "ms_per_step": 1e3 * (end - began) / steps,
        "host_ms": 1e3 * (end - began - (generator.waited_seconds - waited)) / steps,
        "prompt_tokens_per_s": sum(job.prefilled_tokens for job in jobs) / (began - start),
        "first_token_s": max(first.values()),
        "whole_tokens_per_s": sum(len(job.tokens) for job in jobs) / (end - start),
        "accepted": None if accepted + refused == 0 else accepted / (accepted + refused),
        "tokens_per_step": tokens / steps / len(jobs),
    }


def _launches_ms(generator, model, options, prompts, count):
    """Milliseconds of one step's launches for `count` texts about half-way, when nobody reads the tokens."""
    jobs = [
        generator.add(Job(prompts(WARM_ROUNDS + ROUNDS, i), options.new, settings=options.settings, seed=i, stop_tokens=[]))
        for i in range(count)
    ]
    while any(len(job.tokens) < options.new // 2 for job in jobs):
        generator.step()
    engine, state = generator._engine, generator._batch.state
    replays = min(REPLAYS, options.new // 2 - 3) // 2
    seconds = []
    for _ in range(2):
        wait(model.xp)
        start = time.perf_counter()
        for _ in range(replays):
            logits = engine.decode(state, [None] * count)
            with engine.stepping():
                state.draw(logits)
        wait(model.xp)
        seconds.append(time.perf_counter() - start)
    for job in jobs:
        job.cancel()  # their texts have gone on without them
    while not generator.is_idle:
        generator.step()
    return 1e3 * seconds[-1] / replays


def row_text(row):
    """A row as people read it."""

    return (
        f"{row['jobs']:>5} {row['tokens_per_s']:>9.1f} {row['tokens_per_s_of_a_job']:>8.1f} {row['ms_per_step']:>8.3f}"
        f" {number(row['launches_ms'], 8, 3)} {percent(row['host_share'], 6)} {row['host_ms']:>8.3f}"
        f" {row['first_token_s']:>8.3f} {row['prompt_tokens_per_s']:>10.0f} {percent(row['accepted'], 8)}"
    )
