"""serve/speculation.py: guesses change how fast a text comes, never which."""

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
    tiny_model,
    tokenizer,
)
from test_serve import EVERYTHING, LINE, PENALISED, SAMPLED, churn, replacing, said

from cupyq.generate import SamplerSettings, encode
from cupyq.serve import Job, ModelDraft, NGramDraft
from cupyq.serve.rows import Rows, RowSettings, RowState


def drafts():
    """By a table, by the model itself (always right where penalties and filters are not), by another model."""
    return {
        "ngram": NGramDraft(4),
        "ngram15": NGramDraft(15, longest=2),
        "itself": ModelDraft(tiny_model(), 4),
        "other": ModelDraft(tiny_model(layers=1), 3),
    }


# --- what is guessed --------------------------------------------------------------------------------------------------


def test_n_grams_go_on_as_the_last_time():
    draft, index = NGramDraft(3, longest=2), {}
    assert draft.guess([1, 2, 3, 9, 1, 2], index) == [3, 9, 1]
    assert draft.guess([1, 2, 3, 9, 1, 2, 4], index) == []  # 4 never stood there before
    assert draft.guess([1, 2, 3, 9, 1, 2, 4, 1, 2], index) == [4, 1, 2]  # the newest place counts
    assert draft.guess([1, 2, 3, 9, 1, 2, 4, 1, 2, 3], index) == [9, 1, 2]  # the longer sequence counts
    assert NGramDraft(3, longest=3, shortest=2).guess([5, 6, 7, 6], {}) == []
    for text in ([], [1], [1, 1, 1, 1]):
        assert NGramDraft(2).guess(text, {}) == [1, 1][: len(text) // 2]


def test_an_index_that_grows_is_that_of_the_whole_text():
    rng, draft, index = np.random.default_rng(0), NGramDraft(4, longest=3), {}
    text = []
    for _ in range(200):
        text += rng.integers(0, 4, int(rng.integers(1, 4))).tolist()
        assert draft.guess(text, index) == draft.guess(text, {})


# --- nothing changes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ngram", "ngram15", "itself", "other"])
def test_texts_are_those_without_guesses(name):
    """Greedy, sampled and penalised jobs that come and go, the same tokens as by the loop that knows of no guesses."""
    model, rng = tiny_model(), np.random.default_rng(21)
    generator = small_generator(model, draft=drafts()[name], cache_tokens=1024)
    kinds = [GREEDY, SAMPLED, PENALISED, EVERYTHING]
    jobs = []
    for i in range(20):
        options = {"stop_tokens": rng.integers(0, 96, 3).tolist(), "speculate": i % 7 != 6, "max_new_tokens": 16}
        jobs.append(random_job(rng, settings=kinds[i % 4], seed=i, longest=30, **options))
    churn(generator, rng, jobs, cancel_share=0)
    assert [job.tokens for job in jobs] == [alone(model, job) for job in jobs]
    assert all(job.accepted_drafts == job.refused_drafts == 0 for job in jobs if not job.speculate)
    assert sum(job.accepted_drafts for job in jobs) > 0 and generator.free_pages == generator.pages
    if name == "itself":  # a guess of the same model with the same random numbers is right
        plain = [job for job in jobs if job.settings in (GREEDY, SAMPLED)]
        assert all(job.refused_drafts == 0 for job in plain) and sum(job.accepted_drafts for job in plain) > 60


def test_fewer_steps_where_guesses_are_right():
    model = tiny_model()
    steps = {}
    for name, draft in {"none": None, "itself": ModelDraft(model, 7)}.items():
        generator = small_generator(model, draft=draft)
        job = generator.add(Job([1, 2, 3], max_new_tokens=48, settings=GREEDY, stop_tokens=[]))
        run_all(generator)
        steps[name] = generator.steps
        assert job.tokens == alone(model, job)
    assert steps["itself"] <= 48 // 8 + 1 and steps["none"] >= 48


def test_batch_invariant_with_guesses():
    model, rng = tiny_model(), np.random.default_rng(22)
    generator = small_generator(model, draft=NGramDraft(), batch_invariant=True)
    jobs = [generator.add(random_job(rng)) for _ in range(8)]
    run_all(generator)
    assert [job.tokens for job in jobs] == [alone(model, job) for job in jobs]


def test_up_to_the_end_of_the_context():
    model = tiny_model()
    for draft in (NGramDraft(15), ModelDraft(model, 15)):
        generator = small_generator(model, draft=draft, cache_tokens=1024)
        job = generator.add(Job([1, 2] * 250, max_new_tokens=13, settings=GREEDY, stop_tokens=[]))
        other = generator.add(Job([3] * 5, max_new_tokens=13, settings=GREEDY, stop_tokens=[]))
        run_all(generator)
        assert [one.tokens for one in (job, other)] == [alone(model, one) for one in (job, other)]


def test_filters_and_log_probabilities_with_guesses():
    """Filters see what is guessed before it is verified, and the tokens are those of a generator without guesses."""
    model = tiny_model()

    def rising(tokens):
        return [t for t in range(96) if not tokens or t % 16 >= tokens[-1] % 16 or t % 3 == 0]

    def result(draft):
        generator = small_generator(model, draft=draft)
        options = {"settings": SAMPLED, "stop_tokens": [], "max_new_tokens": 12, "logprobs": 2}
        jobs = [generator.add(Job([1, 2, i], seed=i, filters=[rising], **options)) for i in range(5)]
        jobs.append(generator.add(Job([4], seed=1, **options)))
        events = run_all(generator)
        return [job.tokens for job in jobs], [
            [
                (one.token, pytest.approx(one.logprob, abs=1e-5))
                for event in events
                if event.job is job
                for one in event.logprobs
            ]
            for job in jobs
        ]

    assert result(ModelDraft(model, 4)) == result(None) == result(NGramDraft())


def test_a_filter_that_fails_on_a_wrong_guess_does_not_end_its_job():
    model = Scripted([1, 5, 6, 1, 5, 7, 1, 5, 8, 9], vocab_size=16, context=64)
    script = model.script[1:]

    def strict(tokens):
        if tokens != script[: len(tokens)]:
            raise ValueError("never said")
        return [] if len(tokens) == 8 else None

    generator = small_generator(model, draft=NGramDraft())
    job = generator.add(Job([1], max_new_tokens=9, settings=GREEDY, stop_tokens=[], filters=[strict]))
    run_all(generator)
    assert job.tokens == script[:8] and job.reason == "filter" and job.refused_drafts + job.accepted_drafts > 0


def test_banned_and_stop_strings_with_guesses():
    text = "the winter and the winter and the winter is gone, the end."
    others = replacing(text, "winter", "x")
    options = {"banned_strings": ["winter and the w"], "stop_strings": ["the end"], "model_options": {"others": others}}
    plain, _ = said(text, **options)
    guessed, _ = said(text, generator_options={"draft": NGramDraft(8)}, **options)
    assert plain.text == guessed.text and plain.rewinds == guessed.rewinds >= 1 and plain.reason == guessed.reason
    assert guessed.accepted_drafts > 0
    assert said(LINE, generator_options={"draft": NGramDraft(8)})[0].text == LINE


def test_a_text_that_repeats_itself_comes_many_tokens_at_a_time():
    ids = encode(tokenizer(), "row, row, row your boat. " * 6, special=False)
    model = Scripted([1, *ids])
    generator = small_generator(model, tokenizer(), draft=NGramDraft(15))
    job = generator.add(Job([1], max_new_tokens=len(ids), settings=GREEDY, stop_tokens=[]))
    run_all(generator)
    assert job.tokens == ids and job.accepted_drafts > len(ids) // 2 and generator.steps < len(ids) // 2


# --- the distribution -------------------------------------------------------------------------------------------------


class Noisy(Scripted):
    """After token t comes a token of a distribution of t's own, the same at every position."""

    vocab = 8

    def __init__(self, seed):
        super().__init__([], vocab_size=self.vocab, context=64)
        self.table = (np.random.default_rng(seed).standard_normal((self.vocab, self.vocab)) * 1.5).astype(np.float32)

    def hidden(self, ids, step):
        return ids

    def logits(self, hidden, step):
        return self.table[hidden].copy()

    def probabilities(self):
        weights = np.exp(self.table.astype(np.float64))
        return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("name", ["ngram", "model"])
def test_the_distribution_is_that_of_the_model(name):
    """Chi-squared over the pairs of successive tokens of many seeds; a draft of another distribution guesses."""
    model = Noisy(1)
    draft = NGramDraft(3) if name == "ngram" else ModelDraft(Noisy(2), 3)
    generator = small_generator(model, draft=draft, max_batch=64, cache_tokens=64 * 32)
    free = SamplerSettings(temperature=1.0, top_k=0, top_p=1.0)
    jobs = [generator.add(Job([seed % 8], max_new_tokens=16, settings=free, seed=seed, stop_tokens=[])) for seed in range(300)]
    run_all(generator)
    counts = np.zeros((8, 8))
    for job in jobs:
        for before, after in zip([*job.prompt, *job.tokens], job.tokens, strict=False):
            counts[before, after] += 1
    assert sum(job.accepted_drafts for job in jobs) > 300 and sum(job.refused_drafts for job in jobs) > 300

    def chi_squared(probabilities):
        expected = probabilities * counts.sum(1, keepdims=True)
        return ((counts - expected) ** 2 / expected).sum()

    # 8 * 7 degrees of freedom: 95 is exceeded once in a thousand times. The tokens are those of fixed seeds.
    assert chi_squared(model.probabilities()) < 95
    for share in (0.2, 1.0):  # had guesses been accepted too easily
        assert chi_squared((1 - share) * model.probabilities() + share * Noisy(2).probabilities()) > 120


def test_rows_of_one_draw_are_each_drawn_as_alone():
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((4, 96)) * 2).astype(np.float32)
    kinds = [GREEDY, SAMPLED, PENALISED, EVERYTHING]
    states = [RowState(i, 3, 7 + i, 8.0, [1, 2, i]) for i in range(4)]
    together = Rows(np, 96, 4)
    together.put_all(states)
    together.configure([RowSettings(kind, seed=i) for i, kind in enumerate(kinds)])
    drawn = together.draw(logits.copy(), {1: np.arange(96) < 50}).tolist()
    assert drawn[1] < 50
    for i, kind in enumerate(kinds):
        single = Rows(np, 96, 1)
        single.put(0, states[i], 8)
        single.configure([RowSettings(kind, seed=i)])
        assert single.draw(logits[i : i + 1].copy(), {0: np.arange(96) < 50} if i == 1 else None).tolist() == [drawn[i]]
        assert single.mu[0] == together.mu[i] and single.positions[0] == together.positions[i] == 3


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors():
    for arguments, error, message in (
        ({"most": 0}, ValueError, "most must be from 1 to 15, got 0"),
        ({"most": 16}, ValueError, "most must be from 1 to 15, got 16"),
        ({"longest": 2, "shortest": 3}, ValueError, "longest must be 3 or more, got 2"),
        ({"shortest": 0}, ValueError, "shortest must be 1 or more"),
        ({"most": 2.0}, TypeError, "most must be a whole number"),
    ):
        with pytest.raises(error, match=message):
            NGramDraft(**arguments)
    with pytest.raises(ValueError, match="the draft model has 8 tokens in its vocabulary, the model 96"):
        small_generator(tiny_model(), draft=ModelDraft(Noisy(0)))
    short = Scripted([1], vocab_size=96, context=64)
    with pytest.raises(ValueError, match="the draft model's context is 64, the model's 512"):
        small_generator(tiny_model(), draft=ModelDraft(short))
    other = Scripted([1], vocab_size=96, context=512)
    other.xp, other.backend = object(), "cupy"
    with pytest.raises(ValueError, match="the draft model runs on cupy, the model on numpy"):
        small_generator(tiny_model(), draft=ModelDraft(other))


# --- on the GPU -------------------------------------------------------------------------------------------------------


def test_a_draft_model_reads_the_same_arrays_at_every_step(monkeypatch):
    """What was captured as a graph knows no others."""
    generator, seen = small_generator(tiny_model(), draft=ModelDraft(tiny_model(layers=1), 3)), set()
    draft, verified = generator._engines[1], []
    monkeypatch.setattr(draft, "decode", recorded(draft.decode, lambda rows, *_: seen.add((id(rows.ids), id(rows.lengths)))))
    monkeypatch.setattr(
        generator._engine, "verify", recorded(generator._engine.verify, lambda fed, *_: verified.append(fed.shape))
    )
    for length in (3, 9):
        generator.add(Job([*range(length)], max_new_tokens=12, settings=GREEDY, stop_tokens=[]))
    run_all(generator)
    assert len(seen) == 1 and len(verified) > 3


def recorded(function, note):
    def noting(*arguments):
        note(*arguments)
        return function(*arguments)

    return noting


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ngram", "model", "itself"])
def test_guesses_on_the_gpu(name, cupy):
    """Verified in passes of other sizes, whose products may round otherwise: the same texts but for near ties."""
    model = gpu_model()
    draft = NGramDraft(4) if name == "ngram" else ModelDraft(gpu_model("2.5" if name == "model" else "4.0"), 4)

    def jobs_of(draft, kinds):
        rng = np.random.default_rng(31)
        generator = small_generator(model, draft=draft, cache_tokens=2048)
        jobs = [random_job(rng, settings=kinds[i % 3], seed=i, longest=20, max_new_tokens=16) for i in range(18)]
        churn(generator, np.random.default_rng(32), list(jobs), cancel_share=0)
        return jobs

    found = jobs_of(draft, [GREEDY] * 3)
    for job, other in zip(found, jobs_of(None, [GREEDY] * 3), strict=True):
        assert same_but_for_a_near_tie(model, job.prompt, job.tokens, other.tokens)
    accepted, refused = (sum(getattr(job, f"{what}_drafts") for job in found) for what in ("accepted", "refused"))
    assert accepted > {"ngram": 0.2, "model": 0.6, "itself": 0.9}[name] * (accepted + refused)
    kinds = [SAMPLED, PENALISED, EVERYTHING]
    assert [job.tokens for job in jobs_of(draft, kinds)] == [job.tokens for job in jobs_of(draft, kinds)]
