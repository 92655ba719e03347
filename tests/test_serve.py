"""serve/: every job as if it were alone, whatever comes and goes; texts, filters, errors."""

import asyncio
import dataclasses
import os
import re

import numpy as np
import pytest
from serve_checks import (
    GREEDY,
    Scripted,
    alone,
    gpu_model,
    random_job,
    run_all,
    same_but_for_a_near_tie,
    small_generator,
    text_of,
    tiny_model,
    tokenizer,
)
from test_adapters import sizes_of, tensors_of, write
from test_models import folder_of

from cupyq.generate import SamplerSettings, encode, generate
from cupyq.models import load_model
from cupyq.serve import Event, Generator, Job, NGramDraft
from cupyq.serve import generator as serve_generator
from cupyq.serve.engine import batch_class, pass_class
from cupyq.serve.pages import MustWait
from cupyq.serve.running import log_probabilities
from cupyq.serve.scheduler import WaitingLine
from cupyq.serve.streaming import TextStream, fold, overlap

SAMPLED = SamplerSettings(temperature=1.2, top_k=0, top_p=0.97)
PENALISED = SamplerSettings(
    temperature=1.1,
    top_k=0,
    top_p=0.98,
    repetition_penalty=1.3,
    frequency_penalty=0.1,
    presence_penalty=0.2,
    dry_multiplier=0.8,
    dry_allowed_length=1,
    token_bias={7: 1.0, 9: float("-inf")},
)
EVERYTHING = dataclasses.replace(
    PENALISED, dry_breakers=(3, 4), xtc_probability=0.5, xtc_threshold=0.05, xtc_protected=(5,), mirostat_tau=4.0, tfs=0.99
)


JOBS = int(os.environ.get("CUPYQ_TEST_JOBS", "0"))
"""Jobs in the tests where many come and go, in place of as many as `make test` has time for."""


def churn(generator, rng, jobs, options=(), cancel_share=0.1):
    """Jobs that come at random times, some of which are given up -> (all jobs, events)."""
    waiting, events, live = list(jobs), [], []
    for _ in range(20000 + 20 * len(waiting)):
        while waiting and rng.random() < 0.4:
            live.append(generator.add(waiting.pop()))
        if generator.is_idle and not waiting:
            return events
        if live and rng.random() < cancel_share:
            live[int(rng.integers(len(live)))].cancel()
        events += generator.step()
    raise AssertionError("jobs starve")


# --- as if alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_invariant", [True, False], ids=["batch_invariant", "default"])
def test_hundreds_of_jobs_that_come_and_go_are_each_as_if_alone(is_invariant):
    """Two texts of few tokens at the start of prompts, so that pages are shared and copied; stop tokens; cancellations."""
    model, rng = tiny_model(), np.random.default_rng(int(is_invariant))
    generator = small_generator(model, cache_tokens=40 * 16, batch_invariant=is_invariant)
    starts = rng.integers(0, 96, (2, 50)).tolist()
    jobs = []
    for _ in range(JOBS or 250):
        job = random_job(rng, longest=40, stop_tokens=rng.integers(0, 96, 4).tolist())
        job.prompt = [*starts[int(rng.integers(2))][: int(rng.integers(0, 50))], *job.prompt]
        jobs.append(job)
    events = churn(generator, rng, jobs)
    assert all(job.is_done for job in jobs)
    reasons = [job.reason for job in jobs]
    assert {"length", "stop_token", "cancelled"} == set(reasons) and reasons.count("cancelled") < len(jobs) / 2
    for job in jobs:
        expected = alone(model, job)
        assert job.tokens == (expected[: len(job.tokens)] if job.reason == "cancelled" else expected)
        mine = [event for event in events if event.job is job]
        assert [t for event in mine for t in event.tokens] == job.tokens
        assert mine[-1].kind == "finished" and [event.kind for event in mine].count("finished") == 1
    assert generator.free_pages == generator.pages
    assert generator.cached_tokens > 1000 and generator.is_idle


@pytest.mark.parametrize("late", [0, 1])
def test_sampled_jobs_do_not_see_what_else_is_in_the_batch(late):
    model, rng = tiny_model(), np.random.default_rng(5)
    generator = small_generator(model, late=late, cache_tokens=1024)
    kinds = [GREEDY, SAMPLED, PENALISED, EVERYTHING]
    jobs = [random_job(rng, settings=kinds[i % 4], seed=i, longest=30) for i in range(40)]
    churn(generator, rng, jobs, cancel_share=0)
    assert [job.tokens for job in jobs] == [alone(model, job) for job in jobs]
    assert len({tuple(job.tokens) for job in jobs}) > 30


def test_the_seed_decides():
    model = tiny_model()

    def tokens(**options):
        generator = small_generator(model)
        job = generator.add(Job([1, 2, 3], max_new_tokens=20, settings=SAMPLED, stop_tokens=[], **options))
        run_all(generator)
        return job

    assert tokens(seed=3).tokens == tokens(seed=3).tokens != tokens(seed=4).tokens
    free = tokens()
    assert tokens(seed=free.seed).tokens == free.tokens
    assert Job([1], settings=SamplerSettings(seed=9)).seed == 9


def test_batch_invariant_log_probabilities_are_the_same_bits():
    """Those of a prompt alone, in an empty generator; NaN-free, and shared pages change nothing."""
    model, rng = tiny_model(), np.random.default_rng(8)
    prefix = rng.integers(0, 96, 40).tolist()
    prompts = [[*prefix, *rng.integers(0, 96, int(rng.integers(1, 30))).tolist()] for _ in range(12)]

    def job(prompt):
        return Job(prompt, max_new_tokens=8, settings=GREEDY, stop_tokens=[], logprobs=5)

    def logprobs(events, one):
        return [told for event in events if event.job is one for told in event.logprobs]

    together = small_generator(model, batch_invariant=True, cache_tokens=2048)
    jobs = [together.add(job(prompt)) for prompt in prompts]
    events = run_all(together)
    assert together.cached_tokens >= 11 * 32
    for one, prompt in zip(jobs, prompts, strict=True):
        single = small_generator(model, batch_invariant=True)
        same = single.add(job(prompt))
        assert logprobs(events, one) == logprobs(run_all(single), same)


def test_batch_invariant_prompts_are_cut_at_their_own_pages(monkeypatch):
    """Whatever is left of the chunk that a step may pass: products of other numbers of rows may round otherwise."""
    generator, passed = small_generator(tiny_model(), batch_invariant=True, cache_tokens=2048), []
    monkeypatch.setattr(generator._engine, "prefill", lambda parts: passed.extend((p.begin, len(p.tokens)) for p in parts))
    jobs = [generator.add(Job([i, *range(lengths)], max_new_tokens=1, stop_tokens=[])) for i, lengths in enumerate([7, 50, 23])]
    while any(event.kind == "prefill" for event in generator.step()) or generator._prefilling:
        pass
    ends = [len(job.prompt) - 1 for job in jobs]
    wanted = [(begin, min(16, end - begin)) for end in ends for begin in range(0, end, 16)]
    assert passed == wanted


@pytest.mark.parametrize("small", [0, 120, 1000])
def test_prompts_pass_together(monkeypatch, small):
    """In passes of the oldest prompt and others: small ones of any, larger ones of those that fill them."""
    monkeypatch.setattr(serve_generator, "SMALL_PASS", small)
    model, passes = tiny_model(), []
    generator = small_generator(model, cache_tokens=4096, max_batch=16, chunk=256)
    prefill = generator._engine.prefill
    monkeypatch.setattr(generator._engine, "prefill", lambda parts: (passes.append(parts), prefill(parts)))
    rng = np.random.default_rng(4)
    lengths = [60, 9, 57, 300, 31, 64, 33, 3, 58, 1]
    jobs = [
        generator.add(Job(rng.integers(0, 96, n).tolist(), max_new_tokens=12, settings=GREEDY, stop_tokens=[])) for n in lengths
    ]
    run_all(generator)
    assert [job.tokens for job in jobs] == [alone(model, job) for job in jobs]
    assert [job.prefilled_tokens for job in jobs] == [n - 1 for n in lengths]
    widths = [[len(part.tokens) for part in parts] for parts in passes]
    assert sum(map(sum, widths)) == sum(lengths) - len(lengths)
    for each in widths:
        cells = len(each) * max(each)
        assert cells <= 256 and (len(each) == 1 or cells <= small or sum(each) >= 0.75 * cells)
    first = {0: [59, 56, 30, 63], 120: [59, 8], 1000: [59, 8, 56, 30]}
    assert widths[0] == first[small]


# --- pages and turns --------------------------------------------------------------------------------------------------


def test_a_common_prefix_costs_one_prefill():
    """64 jobs at once: the first computes, the others wait for it; the page where they part is copied."""
    model, rng = tiny_model(), np.random.default_rng(1)
    prefix = rng.integers(0, 96, 205).tolist()
    generator = small_generator(model, cache_tokens=64 * 3 * 16 + 224, max_batch=64)
    jobs = [generator.add(Job([*prefix, i, 1, 2], max_new_tokens=4, settings=GREEDY, stop_tokens=[])) for i in range(64)]
    run_all(generator)
    assert generator.prefilled_tokens == 205 + 64 * 2
    assert generator.cached_tokens == 63 * 205 and all(job.cached_tokens == 205 for job in jobs[1:])
    for job in jobs[::16]:
        assert job.tokens == alone(model, job)
    assert generator.free_pages == generator.pages


def test_a_conversation_goes_on_where_it_stopped():
    """What was generated is found again, the last page that was not full included."""
    model = tiny_model()
    generator = small_generator(model)
    first = generator.add(Job(list(range(20)), max_new_tokens=11, settings=GREEDY, stop_tokens=[]))
    run_all(generator)
    second = generator.add(Job([*range(20), *first.tokens, 5, 6, 7], max_new_tokens=4, settings=GREEDY, stop_tokens=[]))
    run_all(generator)
    assert second.cached_tokens == 30 and second.prefilled_tokens == 3  # the last token drawn had never been fed
    assert second.tokens == alone(model, second)
    generator.forget()
    third = generator.add(Job(second.prompt, max_new_tokens=4, settings=GREEDY, stop_tokens=[]))
    run_all(generator)
    assert third.cached_tokens == 0 and third.tokens == second.tokens


def test_prompts_pass_in_chunks_between_the_steps_of_others():
    generator = small_generator(tiny_model(), chunk=16)
    short = generator.add(Job([1, 2], max_new_tokens=30, settings=GREEDY, stop_tokens=[]))
    generator.step()
    long = generator.add(Job(list(range(90)), max_new_tokens=2, settings=GREEDY, stop_tokens=[]))
    before = len(short.tokens)
    counts = []
    while not long.tokens:
        counts += [event.count for event in generator.step() if event.job is long and event.kind == "prefill"]
    assert counts == [16, 32, 48, 64, 80, 89]
    assert len(short.tokens) - before >= 6  # it never stood still
    run_all(generator)
    assert [job.tokens for job in (short, long)] == [alone(tiny_model(), job) for job in (short, long)]


def test_who_waits_for_pages_is_overtaken_only_so_often():
    generator = small_generator(tiny_model(), cache_tokens=10 * 16, max_skips=3)
    running = generator.add(Job([1] * 10, max_new_tokens=60, settings=GREEDY, stop_tokens=[]))
    generator.step()
    large = generator.add(Job([2] * 80, max_new_tokens=60, settings=GREEDY, stop_tokens=[]))
    small = [generator.add(Job([3, i], max_new_tokens=3, settings=GREEDY, stop_tokens=[])) for i in range(20)]
    order = [event.job for event in run_all(generator) if event.kind == "started"]
    assert order.index(large) == 3 and set(order[:3]) <= set(small)
    assert running.is_done and all(job.reason == "length" for job in [large, *small])


def test_the_queue():
    class Waiting:
        def __init__(self, pages):
            self.pages, self.skips, self.lease = pages, 0, None

    free, queue = 3, WaitingLine(max_skips=2)
    runs = [Waiting(pages) for pages in (9, 1, 0, 1, 1)]
    for run in runs:
        queue.add(run)

    def lease(run):
        if run.pages == 0:
            raise MustWait
        return "pages" if run.pages <= free else None

    assert list(queue.begin(lease, 8)) == [runs[1], runs[3]] and len(queue) == 3
    assert list(queue.begin(lease, 8)) == []  # the first was overtaken twice
    free = 9
    assert list(queue.begin(lease, 1)) == [runs[0]] and list(queue) == [runs[2], runs[4]]


def test_texts_are_found_again_in_pages_put_in_order():
    model, rng = tiny_model(), np.random.default_rng(3)
    generator, moved = small_generator(model, cache_tokens=12 * 16), 0
    for _ in range(12):
        jobs = [generator.add(random_job(rng, longest=50)) for _ in range(3)]
        with pytest.raises(ValueError, match="jobs have pages"):
            generator.defragment()
        run_all(generator)
        assert [job.tokens for job in jobs] == [alone(model, job) for job in jobs]
        moved += generator.defragment()
        assert generator.defragment() == 0
    assert moved
    again = generator.add(Job([*jobs[0].prompt, *jobs[0].tokens, 1], max_new_tokens=5, settings=GREEDY, stop_tokens=[]))
    run_all(generator)
    assert again.cached_tokens > 0 and again.tokens == alone(model, again)


def test_classes_of_batches():
    sizes = [batch_class(rows) for rows in range(1, 257)]
    assert all(rows <= size <= rows * 1.5 for rows, size in enumerate(sizes, 1)) and len(set(sizes)) == 16
    for rows, width in np.random.default_rng(0).integers(1, 600, (200, 2)).tolist():
        largest, longest = pass_class(rows, width)
        assert rows <= largest < 2 * rows and width <= longest < max(2 * width, 17)


# --- texts ------------------------------------------------------------------------------------------------------------


def scripted(text, **options):
    """A model that says `text` after a prompt of the token of "A" -> (model, prompt)."""
    prompt = encode(tokenizer(), "A", special=False)
    return Scripted([*prompt, *encode(tokenizer(), text, special=False), 0, 0, 0, 0], **options), prompt


def said(text, count=None, generator_options=None, model_options=None, **options):
    model, prompt = scripted(text, **(model_options or {}))
    generator = small_generator(model, tokenizer(), **(generator_options or {}))
    count = len(model.script) - 4 - len(prompt) if count is None else count
    job = generator.add(Job(prompt, max_new_tokens=count, settings=GREEDY, stop_tokens=[], **options))
    events = run_all(generator)
    assert text_of(events, job) == job.text
    return job, events


LINE = "Now is the winter of our discontent made glorious summer; naïve café — 日本語 🎭 end."


def test_text_comes_whole_and_no_character_is_split():
    job, events = said(LINE)
    assert job.text == LINE and job.reason == "length"
    assert not any("\ufffd" in event.text for event in events)


@pytest.mark.parametrize("stop", ["winter", "of our disc", "nt made", "🎭", "本", "é — 日本", " end.", "N", "zzz", LINE])
def test_stop_strings_across_tokens_end_the_text_before_them(stop):
    job, events = said(LINE, stop_strings=["never said", stop])
    expected = LINE.split(stop)[0]
    assert job.text == expected and job.reason == ("length" if stop == "zzz" else "stop_string")
    assert tokenizer().decode(job.tokens).startswith(expected) and "\ufffd" not in job.text
    if stop == LINE:
        assert not any(event.text for event in events)  # all of it was held back


def test_of_two_stop_strings_the_first_counts():
    assert said("one two three", stop_strings=["three", "two"])[0].text == "one "
    assert said("one two three", stop_strings=["e two", "two"])[0].text == "on"


def test_what_may_become_a_stop_string_is_held_back_until_it_is_not():
    stream = TextStream(tokenizer(), [], stop=["the end"])
    pieces = [stream.add(token) for token in encode(tokenizer(), "the enemy", special=False)]
    assert "".join(told.text for told in pieces) + stream.finish().text == "the enemy"
    assert pieces[0].text == ""  # "the" or less of it
    assert overlap("say the", "the end") == 3 and overlap("x", "the end") == 0 and overlap("the end", "the end") == 0
    assert fold("ÀİB") == "àİb"


@pytest.mark.parametrize("text", ["é", "日本", "🎭", "a🎭b", "👩‍👩‍👧 ok", "ß→∀"])
def test_every_way_to_cut_a_text_into_tokens(text):
    """Byte by byte is one of them, and the prompt may end amid a character: each piece is whole characters."""
    ids, before = encode(tokenizer(), text, special=False), encode(tokenizer(), "so", special=False)
    for cut in range(len(ids) + 1):
        for strings in ({}, {"stop": ["#"]}, {"banned": ["#"]}):
            stream = TextStream(tokenizer(), before + ids[:cut], **strings)
            pieces = [stream.add(token).text for token in ids[cut:]]
            assert not any("\ufffd" in piece for piece in pieces)
            if cut == 0:
                assert "".join(pieces) + stream.finish().text == text


def test_stop_tokens_are_left_out():
    model, prompt = scripted("to be or not", eos=(0,))
    generator = small_generator(model, tokenizer())
    job = generator.add(Job(prompt, max_new_tokens=50, settings=GREEDY))
    run_all(generator)
    assert job.text == "to be or not" and job.reason == "stop_token" and 0 not in job.tokens
    later = generator.add(Job(prompt, max_new_tokens=50, min_new_tokens=len(job.tokens) + 3, settings=GREEDY))
    run_all(generator)
    assert len(later.tokens) >= len(job.tokens) + 3 and 0 not in later.tokens


def replacing(text, banned_text, instead):
    """others= for `scripted`: at the position of the token in which banned_text begins, that of `instead` is next in line."""
    ids = encode(tokenizer(), text, special=False)
    at = text.lower().index(banned_text.lower())
    end = 0
    for index, token in enumerate(ids):
        end += len(tokenizer().decode([token]))
        if end > at:
            return {1 + index: encode(tokenizer(), instead, special=False)[:1]}
    raise AssertionError("not there")


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("banned", ["winter", "WINTER OF our", "e winter"])
def test_banned_strings_are_taken_back(banned, late):
    text = "Now is the winter of our discontent"
    others = replacing(text, banned, "x")
    job, events = said(text, banned_strings=[banned], generator_options={"late": late}, model_options={"others": others})
    assert job.rewinds == 1 and banned.lower() not in job.text.lower() and "x" in job.text
    at = text.lower().index(banned.lower())
    assert job.text[: at - 8] == text[: at - 8] and job.text.endswith("discontent"[-3:])
    assert len(job.tokens) == len(encode(tokenizer(), text, special=False)) and job.reason == "length"


def test_a_banned_string_that_comes_again_is_taken_back_again():
    text = "aa bb cc"
    ids = encode(tokenizer(), text, special=False)
    spaces = [index for index, token in enumerate(ids) if "b" in tokenizer().decode([token])]
    other = [encode(tokenizer(), letter, special=False)[0] for letter in "byz"]
    job, _ = said(text, banned_strings=["b"], model_options={"others": {1 + index: other for index in spaces}})
    assert "b" not in job.text and "y" in job.text and job.rewinds >= len(spaces)


def test_a_place_where_everything_is_banned_ends_the_job():
    vocab = 6
    model = Scripted([1, 2, 2, 2, 2], vocab_size=vocab, context=64)
    generator = small_generator(model)
    mask = np.zeros(vocab, bool)
    mask[3] = True
    job = generator.add(Job([1], max_new_tokens=3, settings=GREEDY, stop_tokens=[3], min_new_tokens=2, filters=[mask]))
    run_all(generator)
    assert job.reason == "filter" and job.tokens == []


def test_token_healing():
    """A prompt that ends amid a word goes on with the word, as if it had been cut elsewhere; only what is new is told."""
    model, _ = scripted("")
    ids = encode(tokenizer(), "to be", special=False)
    longer = [
        t for t in range(1024) if tokenizer().id_to_token(t).startswith(tokenizer().id_to_token(ids[-1])) and t != ids[-1]
    ]
    assert longer
    wanted = longer[0]
    script = [*ids[:-1], wanted, 0, 0]
    # Without healing another token follows the last one; with it, one that begins with it takes its place.
    model = Scripted(script, others={len(ids) - 1: []})
    model.script[len(ids) - 1] = wanted
    generator = small_generator(model, tokenizer())
    job = generator.add(Job(ids, max_new_tokens=1, settings=GREEDY, stop_tokens=[], heal=True))
    run_all(generator)
    assert job.tokens == [wanted]
    assert "to be" + job.text == tokenizer().decode([*ids[:-1], wanted])
    model.script[len(ids) - 1] = encode(tokenizer(), "#", special=False)[0]  # begins otherwise: not allowed
    again = generator.add(Job(ids, max_new_tokens=1, settings=GREEDY, stop_tokens=[], heal=True))
    run_all(generator)
    assert tokenizer().id_to_token(again.tokens[0]).startswith(tokenizer().id_to_token(ids[-1]))
    one = generator.add(Job(ids[:1], max_new_tokens=1, settings=GREEDY, stop_tokens=[], heal=True))
    run_all(generator)
    assert one.reason == "length"  # nothing to feed would be left: not healed


# --- filters and log-probabilities ------------------------------------------------------------------------------------


def test_filters():
    """A mask, a callable of ids, a callable that looks at the text: only what all allow is drawn, and most likely first."""
    model, rng = tiny_model(), np.random.default_rng(2)
    generator = small_generator(model)
    even = np.arange(96) % 2 == 0
    seen = []

    def follows(tokens):
        seen.append(list(tokens))
        return None if not tokens else range(tokens[-1], 96)

    jobs = [
        generator.add(Job([1, 2, 3], max_new_tokens=6, settings=GREEDY, stop_tokens=[], filters=filters))
        for filters in ([even], [even, follows], [lambda tokens: [5, 6]], [])
    ]
    others = [generator.add(random_job(rng)) for _ in range(4)]
    run_all(generator)
    assert all(token % 2 == 0 for job in jobs[:2] for token in job.tokens)
    assert jobs[1].tokens == sorted(jobs[1].tokens) and seen == [jobs[1].tokens[:i] for i in range(6)]
    assert set(jobs[2].tokens) <= {5, 6} and [len(job.tokens) for job in jobs] == [6] * 4
    for job in (jobs[3], *others):
        assert job.tokens == alone(model, job)
    # By hand: the most likely allowed token of every position.
    text = [1, 2, 3]
    for token in jobs[0].tokens:
        logits = np.where(even, model.forward([text], last_only=True)[0, 0], -np.inf)
        assert token == int(logits.argmax())
        text.append(token)


def test_a_job_that_fails_harms_no_other():
    model, rng = tiny_model(), np.random.default_rng(4)
    for draft in (None, NGramDraft()):
        generator = small_generator(model, draft=draft)

        def fails(tokens):
            if len(tokens) == 3:
                raise RuntimeError("the grammar is broken")
            return None

        bad = [fails, lambda tokens: [96], lambda tokens: "no ids", lambda tokens: np.ones(5, bool), lambda tokens: 7]
        broken = [generator.add(random_job(rng, max_new_tokens=8, filters=[one])) for one in bad]
        ended = generator.add(random_job(rng, max_new_tokens=8, filters=[lambda tokens: [] if len(tokens) == 2 else None]))
        others = [generator.add(random_job(rng)) for _ in range(6)]
        events = run_all(generator)
        assert [job.reason for job in broken] == ["error"] * 5 and len(broken[0].tokens) == 3
        says = ["grammar is broken", "token 96, expected 0 to 95", "must be a mask", r"must be bool \[96\]", "got int"]
        for job, message in zip(broken, says, strict=True):
            assert re.search(message, str(job.error)) and "\n" not in str(job.error)
            assert next(event for event in events if event.job is job and event.kind == "finished").error is job.error
        assert ended.reason == "filter" and len(ended.tokens) == 2
        assert [job.tokens for job in others] == [alone(model, job) for job in others]
        assert generator.free_pages == generator.pages


def test_logits_that_are_not_finite_end_their_job_alone():
    model = Scripted([1, 2, 3, 4, 5, 6, 7, 8], vocab_size=16, context=64)
    logits = model.logits

    def damaged(hidden, step):
        found = logits(hidden, step)
        found[np.asarray(hidden) == 4] = np.nan
        return found

    model.logits = damaged
    generator = small_generator(model)
    long, short = (generator.add(Job([1], max_new_tokens=count, settings=GREEDY, stop_tokens=[])) for count in (7, 3))
    run_all(generator)
    assert long.reason == "error" and "not finite" in str(long.error) and long.tokens == [2, 3, 4, 5]
    assert short.reason == "length" and short.tokens == [2, 3, 4]


@pytest.mark.parametrize("settings", [GREEDY, PENALISED], ids=["greedy", "penalised"])
def test_log_probabilities_are_those_of_the_logits(settings):
    model, rng = tiny_model(), np.random.default_rng(6)
    generator = small_generator(model)
    jobs = [generator.add(random_job(rng, settings=settings, max_new_tokens=6, logprobs=most)) for most in (0, 3, 96, None)]
    events = run_all(generator)
    for job in jobs:
        told = [one for event in events if event.job is job for one in event.logprobs]
        assert len(told) == (0 if job.logprobs is None else 6)
        text = list(job.prompt)
        for one, token in zip(told, job.tokens, strict=False):
            row = model.forward([text], last_only=True)[0, 0].astype(np.float64)
            logs = row - row.max() - np.log(np.exp(row - row.max()).sum())
            assert one.token == token and one.logprob == pytest.approx(logs[token], abs=1e-5)
            best = np.sort(logs)[::-1][: job.logprobs]
            assert list(one.top.values()) == pytest.approx(best.tolist(), abs=1e-5)
            assert all(value == pytest.approx(logs[key], abs=1e-5) for key, value in one.top.items())
            text.append(token)


def test_of_equal_logits_the_lowest_ids_are_told():
    found = log_probabilities(np.float32([1, 2, 2, 0, 2]), 3, 2)
    assert list(found.top) == [1, 2] and found.logprob == pytest.approx(-2 - np.log(3 + np.exp(-1) + np.exp(-2)))
    assert log_probabilities(np.float32([1, 2]), 0, 0).top == {} and len(log_probabilities(np.float32([1, 2]), 0, 9).top) == 2


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_jobs_of_different_adapters_share_a_batch_and_no_pages(tmp_path):
    model = load_model(folder_of("qwen2"), "numpy")
    write(tmp_path / "one", tensors_of(sizes_of("qwen2"), 4, 1))
    model.load_adapter(tmp_path / "one")
    generator = small_generator(model, cache_tokens=256)
    prompt = list(range(3, 23))
    jobs = [
        generator.add(Job(prompt, max_new_tokens=6, settings=GREEDY, stop_tokens=[], adapters=adapters))
        for adapters in (None, "one", None, {"one": 2.0})
    ]
    run_all(generator)
    for job in jobs:
        expected = generate(model, prompt, max_new_tokens=6, settings=GREEDY, adapters=job.adapters).tokens
        assert job.tokens == expected
    assert [job.cached_tokens > 0 for job in jobs] == [False, False, True, False]
    with pytest.raises(ValueError, match="no adapter 'two' is loaded"):
        generator.add(Job(prompt, adapters="two"))


# --- async ------------------------------------------------------------------------------------------------------------


def test_async():
    model, rng = tiny_model(), np.random.default_rng(9)
    generator = small_generator(model)
    jobs = [random_job(rng, max_new_tokens=9) for _ in range(12)]

    async def follow(job, most=None):
        kinds = []
        stream = generator.stream(job)
        async for event in stream:
            kinds.append(event.kind)
            if most is not None and kinds.count("text") == most:
                await stream.aclose()
                break
        return kinds

    async def main():
        found = await asyncio.gather(*(follow(job, 2 if index == 5 else None) for index, job in enumerate(jobs)))
        while not generator.is_idle:
            await asyncio.sleep(0.01)
        late = random_job(rng)
        assert (await follow(late))[-1] == "finished"
        return found

    found = asyncio.run(main())
    for index, (job, kinds) in enumerate(zip(jobs, found, strict=True)):
        if index == 5:
            assert job.reason == "cancelled" or len(job.tokens) == 9
        else:
            assert kinds[0] == "started" and kinds[-1] == "finished" and job.tokens == alone(model, job)
    assert generator.free_pages == generator.pages

    async def bad():
        async for _ in generator.stream(Job([1000])):
            pass

    with pytest.raises(ValueError, match="token 1000 at position 0"):
        asyncio.run(bad())


def test_an_error_of_the_model_reaches_who_waits():
    model = Scripted([1, 2, 3], vocab_size=16, context=64)
    generator = small_generator(model)

    def breaks(hidden, step):
        raise MemoryError("none left")

    model.logits = breaks

    async def main():
        async for _ in generator.stream(Job([1], max_new_tokens=2, stop_tokens=[])):
            pass

    with pytest.raises(MemoryError, match="none left"):
        asyncio.run(main())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens must be a whole number, got float"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be 0 or more"),
        ({"min_new_tokens": 200}, ValueError, "min_new_tokens is 200, above max_new_tokens 128"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 4294967295, got -1"),
        ({"seed": "1"}, TypeError, "seed must be a whole number"),
        ({"settings": {"top_k": 1}}, TypeError, "settings must be SamplerSettings, got dict"),
        ({"stop_strings": "abc"}, TypeError, "stop_strings must be a list of texts"),
        ({"banned_strings": [1]}, TypeError, "banned_strings must be a list of texts"),
        ({"stop_strings": [""]}, ValueError, "stop_strings holds an empty text"),
        ({"filters": len}, TypeError, "filters must be a list of them"),
        ({"filters": [3]}, TypeError, r"filters\[0\] must be a callable or a mask"),
        ({"heal": 1}, TypeError, "heal must be True or False"),
        ({"logprobs": 1025}, ValueError, "logprobs must be from 0 to 1024"),
        ({"logprobs": True}, TypeError, "logprobs must be a whole number"),
    ],
)
def test_jobs_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        Job([1, 2], **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": []}, ValueError, "prompt is empty"),
        ({"prompt": [96]}, ValueError, "prompt: token 96 at position 0, expected 0 to 95"),
        ({"prompt": "text"}, TypeError, "prompt must be a list of whole numbers"),
        ({"prompt": [1] * 400, "max_new_tokens": 200}, ValueError, "context of 512: ask for at most 113 new tokens"),
        ({"prompt": [1] * 200, "max_new_tokens": 100}, ValueError, "need 19 pages, the cache has 8"),
        ({"stop_tokens": [-1]}, ValueError, "stop_tokens: token -1"),
        ({"stop_tokens": 3}, TypeError, "stop_tokens must be a list"),
        ({"stop_strings": ["a"]}, ValueError, "no tokenizer: pass one"),
        ({"heal": True}, ValueError, "no tokenizer: pass one"),
        ({"filters": [np.ones(95, bool)]}, ValueError, r"filters\[0\] must be bool \[96\], got bool \[95\]"),
        ({"settings": SamplerSettings(token_bias={96: 1.0})}, ValueError, "settings.token_bias: token 96, expected 0 to 95"),
        ({"adapters": "none"}, ValueError, "no adapter 'none' is loaded"),
    ],
)
def test_jobs_that_the_generator_refuses(arguments, error, message):
    generator = small_generator(tiny_model(), cache_tokens=128)
    with pytest.raises(error, match=message) as caught:
        generator.add(Job(**{"prompt": [1, 2], "max_new_tokens": 4} | arguments))
    assert "\n" not in str(caught.value) and generator.is_idle


def test_other_arguments():
    model = tiny_model()
    generator = small_generator(model)
    with pytest.raises(TypeError, match="job must be a Job, got list"):
        generator.add([1, 2])
    job = generator.add(Job([1], max_new_tokens=1, stop_tokens=[]))
    with pytest.raises(ValueError, match="job was added before"):
        generator.add(job)
    job.cancel()
    assert [event.reason for event in run_all(generator)] == ["cancelled"]
    job.cancel()
    assert job.reason == "cancelled" and isinstance(Event(job, "text"), Event)
    for arguments, error, message in (
        ({"max_batch": 0}, ValueError, "max_batch must be 1 or more"),
        ({"cache_tokens": 10}, ValueError, "cache_tokens must be 16 or more, got 10"),
        ({"page_size": 3, "cache_tokens": 30}, ValueError, "page_size must be a power of two"),
        ({"chunk": 0}, ValueError, "chunk must be 1 or more"),
        ({"late": 2}, ValueError, "late must be from 0 to 1"),
        ({"max_skips": -1}, ValueError, "max_skips must be 0 or more"),
        ({"cache": "q5"}, ValueError, "kind must be one of"),
        ({"draft": 3}, TypeError, "draft must be an NGramDraft or a ModelDraft, got int"),
    ):
        with pytest.raises(error, match=message):
            small_generator(model, **arguments)
    assert Generator(model, page_size=64).pages == 8  # the model's context


# --- on the GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("is_invariant", [True, False], ids=["batch_invariant", "default"])
def test_jobs_on_the_gpu_are_as_if_alone(is_invariant, cupy, capsys):
    """Bit for bit in a batch-invariant generator; otherwise but for near ties, which are counted."""
    model, rng = gpu_model(), np.random.default_rng(11)
    start = rng.integers(0, 96, 40).tolist()

    def jobs():
        numbers = np.random.default_rng(12)
        made = [random_job(numbers, longest=40, logprobs=3 if i % 5 == 0 else None) for i in range(JOBS or 40)]
        for job in made[::2]:
            job.prompt = [*start, *job.prompt]
        return made

    generator = small_generator(model, cache_tokens=1024, batch_invariant=is_invariant)
    together = jobs()
    events = churn(generator, rng, list(together), cancel_share=0)
    ties, single = 0, small_generator(model, batch_invariant=is_invariant)
    for one, job in zip(jobs(), together, strict=True):
        single.forget()
        single.add(one)
        expected = run_all(single)
        if is_invariant:
            told, wanted = ([x for e in some for x in e.logprobs if e.job is j] for some, j in ((events, job), (expected, one)))
            assert job.tokens == one.tokens and told == wanted
        else:
            ties += job.tokens != one.tokens
            assert same_but_for_a_near_tie(model, job.prompt, job.tokens, one.tokens)
    assert generator.free_pages == generator.pages and generator.cached_tokens > 0
    if JOBS:
        with capsys.disabled():
            print(f"\n{len(together)} jobs, {ties} of them with another token at a near tie")


@pytest.mark.gpu
def test_graphs_change_nothing_on_the_gpu(cupy):
    model = gpu_model()

    def jobs_of(kinds, **options):
        generator = small_generator(model, cache_tokens=2048, max_batch=6, **options)
        rng = np.random.default_rng(13)
        jobs = [random_job(rng, settings=kinds[i % len(kinds)], seed=i, longest=20) for i in range(24)]
        churn(generator, np.random.default_rng(14), list(jobs), cancel_share=0)
        has_graphs = options.get("graph", True)
        assert bool(generator._engine._steps) == bool(generator._engine._passes) == has_graphs
        return jobs

    everything = [GREEDY, SAMPLED, PENALISED, EVERYTHING]
    assert [job.tokens for job in jobs_of(everything)] == [job.tokens for job in jobs_of(everything)]
    # Graphs pass batches of certain sizes, and without lateness other jobs meet: products may round otherwise.
    expected = jobs_of([GREEDY])
    for options in ({"graph": False}, {"late": 0}):
        for job, other in zip(expected, jobs_of([GREEDY], **options), strict=True):
            assert same_but_for_a_near_tie(model, job.prompt, other.tokens, job.tokens)


@pytest.mark.gpu
def test_the_cache_on_the_gpu_may_hold_codes(cupy):
    model = gpu_model()
    generator = small_generator(model, cache="fp8", cache_tokens=1024)
    jobs = [generator.add(Job([*range(30), i, 1], max_new_tokens=8, settings=GREEDY, stop_tokens=[])) for i in range(6)]
    run_all(generator)
    assert generator.prefilled_tokens == 31 + 5 and all(len(job.tokens) == 8 for job in jobs)
    single = small_generator(model, cache="fp8")
    same = single.add(Job([*range(30), 3, 1], max_new_tokens=8, settings=GREEDY, stop_tokens=[]))
    run_all(single)
    assert same_but_for_a_near_tie(model, same.prompt, jobs[3].tokens, same.tokens)
