"""Many texts at once: jobs come and go between the steps of one running batch."""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

from cupyq.models.sampler import MAX_SEED
from cupyq.ops._common import whole_number
from cupyq.serve.batch import Batch
from cupyq.serve.driver import Driver
from cupyq.serve.engine import SMALL_PASS, Engine, Landing, Part
from cupyq.serve.job import Event, Job
from cupyq.serve.pages import Lease, PagePool
from cupyq.serve.running import Pieces, Running, log_probabilities
from cupyq.serve.scheduler import WaitingLine
from cupyq.serve.speculation import ModelDraft, NGramDraft, Speculation

LEAST_FILLED = 0.75
"""Of a larger pass of several prompts, which all count as the longest does, so much must be tokens."""


@dataclasses.dataclass
class _Flight:
    """Tokens that were drawn and that the host has not seen: whose they are, and of which epoch."""

    owners: list[tuple[Running, int]]
    landing: Landing
    logits: Landing | None
    """As the model made them, of rows whose jobs want to know."""


class Generator:
    """Continues jobs, many at a time.

        generator = Generator(model, tokenizer)
        job = generator.add(Job(prompt_ids, max_new_tokens=100))
        for event in generator:  # until all jobs are done
            print(event.text, end="")

    cache_tokens     places for keys and values, of all jobs together, in pages of page_size tokens (default: the model's
                     context); a job needs those of its prompt and of max_new_tokens, less what it shares with others
    max_batch        jobs that run at a time
    chunk            prompt tokens that pass between two steps, rounded down to whole pages, one at least
    cache            what keys and values are kept in, a kind as `Model.new_cache` takes it
    draft            NGramDraft or ModelDraft: tokens are guessed ahead and verified many at a time; never changes a text
    batch_invariant  every text is, bit for bit, what it would be alone, at the cost of speed: rows pass one by one, prompts
                     page by page, and only what a prompt computed is shared
    late             steps that are queued before the host looks at a token: 0 or 1. A text that ends has one step too many
                     then, of which nothing is seen
    max_skips        smaller jobs that may overtake one that waits for pages
    graph            False launches the kernels of a step one by one, as NumPy models always run

    A job's tokens depend on its prompt, settings and seed, not on what else runs, up to rounding: products of other batch
    sizes may round otherwise. ValueError / TypeError for wrong sizes; errors of one job, such as those a filter raises, end
    that job alone, with reason "error".

    Of a model of `tp.load_model` every rank makes the same Generator, adds and cancels the same jobs between the same steps,
    and calls `step` alike: then all see the same events. `stream` takes whole models.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        cache_tokens: int | None = None,
        max_batch: int = 32,
        page_size: int = 256,
        chunk: int = 2048,
        cache: str = "fp16",
        draft: NGramDraft | ModelDraft | None = None,
        batch_invariant: bool = False,
        late: int = 1,
        max_skips: int = 4,
        graph: bool = True,
    ):
        page_size = whole_number(page_size, "page_size", 1)
        self.max_batch = whole_number(max_batch, "max_batch", 1)
        self.late = whole_number(late, "late", 0, 1)
        if draft is not None and not isinstance(draft, (NGramDraft, ModelDraft)):
            raise TypeError(f"draft must be an NGramDraft or a ModelDraft, got {type(draft).__name__}")
        self.model, self.tokenizer, self.vocab_size = model, tokenizer, model.config.vocab_size
        tokens = model.config.max_seq_len if cache_tokens is None else whole_number(cache_tokens, "cache_tokens", page_size)
        pages = -(-tokens // page_size) if cache_tokens is None else tokens // page_size
        self.batch_invariant = bool(batch_invariant)
        options = {"graph": graph, "alone": self.batch_invariant}
        self._engine = Engine(model, pages, page_size, self.max_batch, cache, **options)
        self._engines = [self._engine]
        if isinstance(draft, ModelDraft):
            self._engines.append(draft.engine(model, pages, page_size, self.max_batch, cache, **options))
        self._speculation = None if draft is None else Speculation(draft, self._engines)
        self._pool = PagePool(pages, page_size, copies=not self.batch_invariant)
        # Whole pages: then a prompt is cut at the same places whatever was found of it.
        self._chunk = max(whole_number(chunk, "chunk", 1) // page_size, 1) * page_size
        self._waiting = WaitingLine(whole_number(max_skips, "max_skips", 0))
        self._inbox: deque[Running] = deque()
        self._prefilling: list[Running] = []
        self._flights: deque[_Flight] = deque()
        self._batch = Batch(self._engines, self.vocab_size)
        self._pieces: Pieces | None = None
        # Of jobs that have none. Ranks ask each other here, once, and draw the same ones from then on.
        self._seeds = random.Random(model.new_seed())
        self._join()
        self.prefilled_tokens = 0
        """Prompt tokens that passed the model since the generator was made; cached_tokens: those found in the cache."""
        self.cached_tokens = 0
        self.steps = 0
        self.waited_seconds = 0.0
        """Time the host spent waiting for tokens: the rest of a step's time is its own work."""
        self._driver: Driver | None = None

    # --- jobs ---

    def add(self, job: Job) -> Job:
        """Let a job begin as soon as there is room -> the job. May be called while another thread is in `step`.

        ValueError / TypeError for a job that this model and this cache can never do, and for one added before.
        """
        if not isinstance(job, Job):
            raise TypeError(f"job must be a Job, got {type(job).__name__}")
        if job.is_added:
            raise ValueError("job was added before: make a new Job for each text")
        job.check_for(self.vocab_size, self.model.config.eos_token_ids)
        if self.tokenizer is None and (job.stop_strings or job.banned_strings or job.heal):
            raise ValueError("job has stop_strings, banned_strings or heal, but the generator no tokenizer: pass one to it")
        limit, new = self._engine.capacity, job.max_new_tokens
        needed = len(job.prompt) + new - 1
        if needed > limit:
            raise ValueError(
                f"{len(job.prompt)} prompt tokens and max_new_tokens {new} pass the model's context of {limit}: "
                f"ask for at most {max(limit - len(job.prompt) + 1, 0)} new tokens"
            )
        if self._pool.pages_for(needed) > len(self._pool):
            raise ValueError(
                f"{len(job.prompt)} prompt tokens and max_new_tokens {new} need {self._pool.pages_for(needed)} pages, the "
                f"cache has {len(self._pool)}: make a Generator of more cache_tokens"
            )
        self.model.select_adapters(job.adapters, 1)  # here: where its caller sees what is wrong with them
        if job.heal and self._pieces is None:
            self._pieces = Pieces(self.tokenizer, self.vocab_size)
        if job.seed is None:
            job.seed = self._seeds.randint(0, MAX_SEED)
        run = Running(job, self.tokenizer, self._pieces, self.vocab_size)
        job.is_added = True
        self._inbox.append(run)
        return job

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._inbox or self._waiting or self._prefilling or self._batch.runs or self._flights)

    @property
    def free_pages(self) -> int:
        """Pages no job uses; what they hold is found again until they are needed."""
        return self._pool.free

    @property
    def pages(self) -> int:
        """Pages of `page_size` tokens that there are."""
        return len(self._pool)

    @property
    def page_size(self) -> int:
        return self._pool.page_size

    def forget(self) -> None:
        """Find nothing again of what was computed so far: for when an adapter of a known name has changed."""
        self._pool.forget()

    def defragment(self) -> int:
        """Put each text that is kept into pages that follow one another -> pages moved.

        Kernels read pages in any order as fast, so nothing does this by itself: it moves up to the whole cache (12 GB: 0.1 s
        on an H100). For who reads the cache's arrays. ValueError while there are jobs.
        """
        if not self.is_idle:
            raise ValueError("jobs have pages: put pages in order when all are done")
        cycles = self._pool.defragment()
        with self._engine.on_device():
            self._join()
            for engine in self._engines:
                engine.cache.rotate(cycles)
            self._join()
        return sum(map(len, cycles))

    def __iter__(self) -> Iterator[Event]:
        """Events, until all jobs are done."""
        while not self.is_idle:
            yield from self.step()

    # --- one step ---

    def step(self) -> list[Event]:
        """One step of the batch -> what happened.

        Jobs that fit begin; up to a chunk of prompt tokens passes; every job whose prompt has passed gets a token more.
        """
        events: list[Event] = []
        while self._inbox:
            self._waiting.add(self._inbox.popleft())
        with self._engine.on_device():
            self._end_cancelled(events)
            self._begin(events)
            self._prefill(events)
            if self._speculation is None:
                self._decode(events)
            else:
                self._speculate(events)
        self.steps += 1
        return events

    def _end_cancelled(self, events: list[Event]) -> None:
        for run in [*self._waiting, *self._prefilling, *self._batch.runs]:
            if run.job.is_cancelled and not run.job.is_done:
                self._take_in(run, events, run.finish("cancelled"))

    def _take_in(self, run: Running, events: list[Event], new: list[Event]) -> None:
        """Events of one job; where it has ended, its room is free."""
        events += new
        if not run.job.is_done:
            return
        if run.lease is None:
            self._waiting.remove(run)
            return
        self._fill(run)
        self._pool.release(run.lease)
        if run in self._prefilling:
            self._prefilling.remove(run)
        else:
            self._batch.leave(run)

    def _fill(self, run: Running) -> None:
        """Tell the pool what others may find."""
        count = min(run.certain, run.start - 1) if self.batch_invariant else run.certain
        self._pool.fill(run.lease, run.tokens, count)

    # --- beginning ---

    def _begin(self, events: list[Event]) -> None:
        room = self.max_batch - len(self._prefilling) - len(self._batch.runs)
        if not room or not len(self._waiting):
            return
        self._join()
        for run in self._waiting.begin(self._lease, room):
            lease = run.lease
            if lease.copied is not None:
                for engine in self._engines:
                    engine.cache.copy_page(*lease.copied)
            run.fed = lease.cached
            run.job.cached_tokens = lease.cached
            self.cached_tokens += lease.cached
            self._prefilling.append(run)
            events.append(Event(run.job, "started", count=lease.cached, total=run.start))

    def _lease(self, run: Running) -> Lease | None:
        # Keys and values depend on the adapters.
        salt = b"" if run.job.adapters is None else repr(run.job.adapters).encode()
        return self._pool.lease(run.tokens, run.most, salt)

    def _prefill(self, events: list[Event]) -> None:
        """Prompts, all but their last token, which the first step of the job feeds: oldest first."""
        if not self._prefilling:
            return
        budget = self._chunk
        self._join()
        while parts := self._next_parts(budget):
            self._pass_parts(parts)
            budget -= len(parts) * max(parts.values())
            events += [Event(run.job, "prefill", count=run.fed, total=run.start - 1) for run in parts]
        for run in [run for run in self._prefilling if not run.unfed]:
            self._prefilling.remove(run)
            self._batch.enter(run)
        self._join()

    def _next_parts(self, budget: int) -> dict[Running, int]:
        """Which prompts pass next and how many tokens of each: the oldest, and whole rests of others as long as it is.

        All count as the longest does; together they are within `budget`.
        """
        runs = [run for run in self._prefilling if run.unfed]
        if not runs:
            return {}
        first, size = runs.pop(0), self._pool.page_size
        width = min(first.unfed, size - first.fed % size) if self.batch_invariant else first.unfed
        if width > budget:
            width = (first.fed + budget) // size * size - first.fed
        parts = {first: width} if width > 0 else {}
        if not parts or self.batch_invariant:
            return parts
        capacity = min(engine.capacity for engine in self._engines)
        for run in runs:
            wider = max(width, run.unfed)
            cells, tokens = wider * (len(parts) + 1), sum(parts.values()) + run.unfed
            fits = cells <= budget and max(one.fed for one in (*parts, run)) + wider <= capacity
            if fits and (cells <= SMALL_PASS or tokens >= cells * LEAST_FILLED):
                parts[run], width = run.unfed, wider
        return parts

    def _join(self) -> None:
        for engine in self._engines:
            engine.join()

    def _pass_parts(self, counts: dict[Running, int]) -> None:
        parts = [
            Part(run.tokens[run.fed : run.fed + count], run.fed, run.lease.pages, run.job.adapters)
            for run, count in counts.items()
        ]
        self._engine.prefill(parts)
        for engine in self._engines[1:]:
            engine.prefill([part._replace(adapters=None) for part in parts])
        for run, count in counts.items():
            run.fed += count
            run.job.prefilled_tokens += count
            self.prefilled_tokens += count
            self._pool.fill(run.lease, run.tokens, run.fed)

    # --- a token each ---

    def _decode(self, events: list[Event]) -> None:
        if any(run.waits_for_tokens for run in self._batch.runs):
            self._land_all(events)
        self._batch.set_aside()
        masks = {run: self._guarded(run, run.mask, events) for run in self._batch.going}
        self._batch.set_aside()  # some may have ended
        runs = self._batch.going
        if runs:
            self._queue_step(runs, {row: masks[run] for row, run in enumerate(runs) if masks[run] is not None})
        while len(self._flights) > (self.late if runs else 0):
            self._land(self._flights.popleft(), events)

    def _guarded(self, run: Running, masks: Any, events: list[Event]) -> Any:
        """masks(): what may come next, a mask or None, or a list of them; a job whose filters fail or leave nothing ends."""
        try:
            found = masks()
        except Exception as error:
            self._take_in(run, events, run.finish("error", error))
            return None
        mask = found[0] if isinstance(found, list) else found
        if mask is not None and not mask.any():
            self._take_in(run, events, run.finish("filter"))
            return None
        return found

    def _queue_step(self, runs: list[Running], allowed: dict[int, np.ndarray]) -> None:
        self._batch.arrange()
        state = self._batch.state
        logits = self._engine.decode(state, [run.job.adapters for run in runs])
        arrays: dict[Any, Any] = {}
        with self._engine.stepping():
            told = {row: logits[row] for row, run in enumerate(runs) if run.job.logprobs is not None}
            # Penalties change logits: these are copied before.
            before = Landing(self._engine, told) if told else None
            arrays["ids"] = state.draw(logits, allowed)[: len(runs)]
            if any(run.job.settings.mirostat_tau > 0 for run in runs):
                arrays["mu"] = state.mu[: len(runs)]
        self._flights.append(_Flight([(run, run.epoch) for run in runs], Landing(self._engine, arrays), before))
        for run in runs:
            run.drawn += 1

    def _land_all(self, events: list[Event]) -> None:
        while self._flights:
            self._land(self._flights.popleft(), events)

    def _land(self, flight: _Flight, events: list[Event]) -> None:
        """Tokens have arrived: what they mean to their jobs."""
        start = time.perf_counter()
        arrays = flight.landing.receive()
        self.waited_seconds += time.perf_counter() - start
        logits = {} if flight.logits is None else flight.logits.receive()
        for row, (run, epoch) in enumerate(flight.owners):
            if run.job.is_done or run.epoch != epoch:
                continue
            if "mu" in arrays:
                run.mu = float(arrays["mu"][row])
            self._arrived(run, int(arrays["ids"][row]), logits.get(row), events)

    def _arrived(self, run: Running, token: int, logits: np.ndarray | None, events: list[Event]) -> None:
        logprobs = None
        if logits is not None and token >= 0:
            logprobs = log_probabilities(logits, token, run.job.logprobs or 0)
        size = self._pool.page_size
        new = run.arrive(token, logprobs)
        if not run.job.is_done and run.certain // size > (run.certain - 1) // size:
            self._fill(run)
        self._take_in(run, events, new)

    # --- many tokens each ---

    def _speculate(self, events: list[Event]) -> None:
        """One step with guesses: everything is on the host before the next begins."""
        self._batch.set_aside()
        if not self._batch.going:
            return
        self._batch.give_pages()
        guesses = self._speculation.guesses(self._batch.going)
        masks: dict[Running, list] = {}
        for run, guessed in guesses.items():
            masks[run] = self._guarded(run, lambda run=run, guessed=guessed: run.masks(guessed), events)
        self._batch.set_aside()  # some may have ended
        runs = self._batch.going
        if not runs:
            return
        self._batch.give_pages()
        start, waited = time.perf_counter(), self.waited_seconds
        verified = self._speculation.verify(runs, guesses, masks)
        self.waited_seconds = waited + time.perf_counter() - start
        for run, (drawn, logits) in zip(runs, verified, strict=True):
            self._take_drawn(run, guesses[run], drawn, logits, events)

    def _take_drawn(
        self, run: Running, guessed: list[int], drawn: list[int], logits: list[np.ndarray | None], events: list[Event]
    ) -> None:
        """A job's tokens up to the first that was not guessed."""
        epoch = run.epoch
        run.is_placed = False
        for position in range(len(guessed) + 1):
            is_guessed = position < len(guessed)
            is_right = is_guessed and drawn[position] == guessed[position]
            run.job.accepted_drafts += is_right
            run.job.refused_drafts += is_guessed and not is_right
            run.drawn += 1
            self._arrived(run, drawn[position], logits[position], events)
            if not is_right or run.job.is_done or run.epoch != epoch:
                return

    # --- async ---

    async def stream(self, job: Job) -> AsyncIterator[Event]:
        """Add a job, and its events as they come; leaving the loop early cancels it.

        Any number of tasks of one event loop may do this at a time; steps run in a thread of the generator's own.
        """
        if self._driver is None or self._driver.loop is not asyncio.get_running_loop():
            self._driver = Driver(self)
        async with contextlib.aclosing(self._driver.events(job)) as events:
            async for event in events:
                yield event
