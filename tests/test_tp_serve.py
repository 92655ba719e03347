"""serve/ on the ranks of tp/: a Generator on each, whose events and tokens are the same on all, and the whole model's."""

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from serve_checks import (
    FOLDER,
    GREEDY,
    Scripted,
    gpu_model,
    random_job,
    run_all,
    same_but_for_a_near_tie,
    small_generator,
    tokenizer,
)
from test_models import EXAMPLES, folder_of, loaded
from test_serve import EVERYTHING, PENALISED, SAMPLED, churn
from test_tp_model import on_ranks
from tp_checks import several_gpus  # noqa: F401

from cupyq import tp
from cupyq.errors import BackendError, UnsupportedError
from cupyq.models import load_model
from cupyq.serve import Job, ModelDraft, NGramDraft
from cupyq.serve.engine import Graphs


def fails_later(tokens):
    if len(tokens) == 2:
        raise RuntimeError("the grammar is broken")
    return None


def jobs_of(vocab, free=()):
    """Fourteen: greedy, sampled and penalised ones, with seeds but for those that are `free`; most with a common beginning."""
    rng = np.random.default_rng(32)
    start, kinds = rng.integers(0, vocab, 40).tolist(), [GREEDY, SAMPLED, PENALISED, EVERYTHING]
    ends = [{"stop_tokens": rng.integers(0, vocab, 40).tolist()}, {"stop_strings": ["e", "a"]}, {"banned_strings": ["t"]}]
    ends += [{"logprobs": 3}, {"filters": [fails_later]}, {"filters": [lambda tokens: range(len(tokens), 90)]}, {}]
    jobs = []
    for i in range(14):
        options = {"settings": kinds[i % 4], "seed": None if i in free else i, "max_new_tokens": 9} | ends[i % 7]
        job = random_job(rng, vocab, 30, **options)
        if i % 4:
            job.prompt = [*start[: int(rng.integers(10, 40))], *job.prompt]
        jobs.append(job)
    return jobs


def serve(model, free=(), **options):
    """Jobs that come and go, some of them given up -> (what happened, log-probabilities, seeds, how many pages moved)."""
    jobs = jobs_of(model.config.vocab_size, free)
    generator = small_generator(model, tokenizer(), cache_tokens=14 * 16, max_batch=5, **options)
    events = churn(generator, np.random.default_rng(33), list(jobs), cancel_share=0.2)
    assert generator.free_pages == generator.pages and generator.cached_tokens > 0
    happened = [
        (jobs.index(one.job), one.kind, one.text, one.tokens, one.count, one.total, one.reason, str(one.error))
        for one in events
    ]
    told = [told.logprob for event in events for told in event.logprobs]
    return happened, told, [job.seed for job in jobs], generator.defragment()


def check_as_one(found, expected):
    """The same but for the last bits of log-probabilities."""
    assert found[0] == expected[0] and found[2:] == expected[2:]
    assert found[1] == pytest.approx(expected[1], abs=1e-4) and found[1]


@pytest.mark.parametrize(("name", "ranks"), [("qwen3", 2), ("llama3-rope", 3), ("mixtral", 2), ("qwen2", 5)])
def test_ranks_serve_as_one(name, ranks):
    """On qwen2's fifth rank there are no heads, and pages without a byte."""
    found = on_ranks(name, ranks, serve)
    check_as_one(found, serve(loaded(name)))
    reasons = [event[6] for event in found[0] if event[1] == "finished"]
    assert {"length", "error", "cancelled"} <= set(reasons) and {"stop_token", "stop_string"} & set(reasons)
    assert len(reasons) == 14 and reasons.count("cancelled") < 5


@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"late": 0}, {"cache": "q8"}], ids=str)
def test_options_on_ranks(options):
    found = on_ranks("qwen3", 2, lambda model: serve(model, **options))
    if "cache" not in options:  # codes fall the other way at a border between two
        check_as_one(found, serve(loaded("qwen3"), **options))


def test_seeds_that_nobody_chose():
    """Each another one, the same on all ranks, and new ones every time."""
    free = range(1, 14, 5)
    first, second = (on_ranks("qwen3", 3, lambda model: serve(model, free))[2] for _ in range(2))
    assert [seed for i, seed in enumerate(first) if i not in free] == [i for i in range(14) if i not in free]
    assert len({seeds[i] for seeds in (first, second) for i in free}) == 2 * len(free)


@pytest.mark.parametrize("kind", ["ngram", "whole", "split"])
def test_guesses_on_ranks(kind):
    """The texts of the whole model without guesses. Models guess for themselves: they are right."""
    folder = folder_of("qwen3")

    def work(model, draft=None):
        rng, vocab = np.random.default_rng(34), model.config.vocab_size
        generator = small_generator(model, draft=draft, cache_tokens=40 * 16)
        jobs = [random_job(rng, vocab, 20, settings=[GREEDY, SAMPLED][i % 2], seed=i, max_new_tokens=12) for i in range(8)]
        for job in jobs:
            job.prompt = [*range(6), *range(6), *job.prompt]
        churn(generator, rng, list(jobs), cancel_share=0)
        return [job.tokens for job in jobs], sum(job.accepted_drafts for job in jobs)

    def guessing(model):
        if kind == "ngram":
            return work(model, NGramDraft(4))
        return work(model, ModelDraft(tp.load_model(folder, model.comm) if kind == "split" else load_model(folder, "numpy"), 3))

    tokens, accepted = on_ranks("qwen3", 2, guessing)
    assert tokens == work(loaded("qwen3"))[0] and accepted > (0 if kind == "ngram" else 60)


def test_a_split_draft_of_a_whole_model_is_refused():
    def work(comm):
        small_generator(loaded("qwen3"), draft=ModelDraft(tp.load_model(folder_of("qwen3"), comm)))

    with pytest.raises(ValueError, match="the draft model is one rank's part, the model is whole"):
        tp.run(work, 2, backend="numpy")


# --- what must not be -------------------------------------------------------------------------------------------------


def test_a_rank_that_does_something_else_ends_all():
    def work(model):
        generator = small_generator(model)
        if model.comm.rank == 0:
            generator.add(Job([1, 2, 3], max_new_tokens=4, settings=GREEDY))
        run_all(generator)

    with pytest.raises(BackendError, match="rank 1 came to collective|closed while rank"):
        on_ranks("qwen3", 2, work)


def test_tokens_of_a_step_that_another_rank_ended_are_none():
    model = Scripted([1, 2, 3, 4], vocab_size=16, context=64)
    generator = small_generator(model)
    job = generator.add(Job([1], max_new_tokens=3, settings=GREEDY, stop_tokens=[]))
    generator.step()

    def check():
        raise BackendError("rank 1 failed: no memory")

    model.check = check
    with pytest.raises(BackendError, match="no memory"):
        run_all(generator)
    assert job.tokens == []


def test_the_async_face_is_of_whole_models():
    """Requests reach each rank at a time of its own."""

    async def follow(generator, job):
        return [event.kind async for event in generator.stream(job)]

    def work(model):
        generator, job = small_generator(model), Job([1, 2], max_new_tokens=2)
        with pytest.raises(UnsupportedError, match="model is one rank's part and stream takes whole models"):
            asyncio.run(follow(generator, job))
        assert not job.is_added and generator.is_idle
        generator.add(job)
        run_all(generator)
        return job.tokens

    assert len(on_ranks("qwen3", 2, work)) == 2
    alone = on_ranks("qwen3", 1, lambda model: asyncio.run(follow(small_generator(model), Job([1, 2], max_new_tokens=2))))
    assert alone[-1] == "finished"


# --- graphs -----------------------------------------------------------------------------------------------------------


class QueueWithGraphs:
    """A StreamQueue's graphs on the host, beside a pool that is as large as one says. `done`: what became of them."""

    has_graphs = True

    def __init__(self):
        self.size, self.done = 0, []

    def new_pool(self):
        return SimpleNamespace(total_bytes=lambda: self.size)

    def entered(self, pool):
        return contextlib.nullcontext()

    def captured(self, compute):
        compute()
        self.done.append("captured")
        return SimpleNamespace(launch=lambda: self.done.append("launched"))


def test_graphs_are_captured_and_given_up_on_all_ranks_together():
    """A capture may be an exchange, of which nobody must be left out. At the third key rank 1's pool alone grows."""

    def work(model):
        queue, comm = QueueWithGraphs(), model.comm
        graphs = Graphs(queue, model)
        # As on GPUs: what was adopted is the communicator's to launch.
        comm.adopt = lambda graph: SimpleNamespace(graph=graph)
        comm.launch = lambda adopted: adopted.graph.launch()

        def become_of(key, grows=False, at_once=True):
            def compute():
                queue.size += grows and comm.rank == 1
                return comm.all_gather(np.zeros(1, np.int32))

            queue.done = []
            assert graphs.result((key,), compute, at_once=at_once).shape == (2, 1)
            return queue.done

        assert become_of("a") == become_of("b") == ["captured"] and become_of("a") == ["launched"]
        assert become_of("c", grows=True) == ["captured"] and len(graphs) == 1
        assert become_of("a") == become_of("b") == ["captured"] and become_of("c") == ["launched"]
        assert [become_of("d", at_once=False) for _ in range(3)] == [[], ["captured"], ["launched"]]

    on_ranks("qwen3", 2, work)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_agreed(ranks):
    def work(comm):
        model = tp.load_model(folder_of("qwen3"), comm)
        return [model.agreed(comm.rank in who) for who in ((), (0,), (ranks - 1,), range(ranks))]

    assert tp.run(work, ranks, backend="numpy") == [[False, True, True, True]] * ranks
    assert [loaded("qwen3").agreed(flag) for flag in (False, True)] == [False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "ngram", "whole", "split"])
def test_ranks_serve_together_on_gpus(several_gpus, kind):  # noqa: F811
    """Two GPUs, by graphs and by launches; a prompt that is too long for a graph; against one GPU but for near ties."""
    small = EXAMPLES / "shakespeare-exl2-2.5"

    def jobs():
        rng = np.random.default_rng(35)
        made = [random_job(rng, 1024, 40, max_new_tokens=16) for _ in range(16)]
        made += [random_job(rng, 1024, 40, max_new_tokens=16, settings=SAMPLED) for _ in range(8)]
        start = [*range(90, 96)] * 6
        for job in made[::2]:
            job.prompt = [*start, *job.prompt]
        made[3].prompt = rng.integers(0, 1024, 700).tolist()
        return made

    def serve(model, draft, **options):
        generator = small_generator(model, cache_tokens=2048, chunk=1024, draft=draft, **options)
        made = jobs()
        events = churn(generator, np.random.default_rng(36), list(made), cancel_share=0)
        assert generator.cached_tokens > 0 and generator.free_pages == generator.pages
        assert bool(generator._engine._steps) == bool(generator._engine._passes) == options.get("graph", True)
        if draft is not None:
            assert sum(job.accepted_drafts + job.refused_drafts for job in made) > 0
        happened = [(made.index(event.job), event.kind, event.tokens, event.reason) for event in events]
        return [job.tokens for job in made], [job.seed for job in made], happened

    def work(comm):
        model, draft = tp.load_model(FOLDER, comm), None
        if kind == "ngram":
            draft = NGramDraft(4)
        elif kind != "plain":
            draft = ModelDraft(tp.load_model(small, comm) if kind == "split" else load_model(small, "cupy"), 3)
        return serve(model, draft), serve(model, draft, graph=False)

    one, other = tp.run(work, 2, backend="cupy")
    assert one == other
    expected, _, _ = serve(gpu_model(), None)
    for tokens, _, _ in one:
        for job, found, wanted in zip(jobs()[:16], tokens, expected, strict=False):
            assert same_but_for_a_near_tie(gpu_model(), job.prompt, found, wanted)
