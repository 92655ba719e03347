"""Decoding without the host in between: one step, from token ids to the next ones, as one CUDA graph."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from cupyq.layers import PagedKVCache
from cupyq.models.queues import HostQueue, StreamQueue
from cupyq.models.sampler import MAX_SEED, Sampler, SamplerSettings
from cupyq.ops._common import is_checking, whole_number


class Decoder:
    """Continues the texts of a batch, a token of each at every step; `Model.decoder` makes one.

    A step feeds the tokens drawn last and draws the next ones: embedding, layers, head, penalties, sampling. What it
    depends on, ids, positions, counters and texts, lies in fixed arrays on the device and is moved on there. So on a GPU
    all launches of a step are one graph: the first step runs launch by launch and is then captured. Steps are queued on a
    stream of the decoder's own, ordered by events behind what the caller has queued on CuPy's current stream and before what
    comes there next. On NumPy the same steps run at once.

    `capacity`: tokens of each text that can be fed. `length`: tokens of the longest text, prompt included. `seed`.
    """

    def __init__(
        self,
        model: Any,
        batch: int = 1,
        max_len: int | None = None,
        *,
        settings: SamplerSettings | None = None,
        seed: int | None = None,
        adapters: Any = None,
        graph: bool = True,
        cache: str | PagedKVCache = "fp16",
    ):
        settings = SamplerSettings() if settings is None else settings
        if not isinstance(settings, SamplerSettings):
            raise TypeError(f"settings must be SamplerSettings, got {type(settings).__name__}")
        seed = settings.seed if seed is None else seed
        self.seed = model.new_seed() if seed is None else whole_number(seed, "seed", 0, MAX_SEED)
        self.model, self.batch = model, batch
        self._adapters, self._selection = adapters, None
        self._graph: Any = None
        self._queue: Any = HostQueue() if model.xp is np else StreamQueue(model.xp, model.embedding.device.id)
        # What CUPYQ_CHECK=1 reads back from the GPU cannot be part of a graph.
        self._uses_graphs = bool(graph) and self._queue.has_graphs and not is_checking()
        if isinstance(cache, str):
            model.prepare_cache(cache)  # here: what compiling needs is not of the decoder's memory
        with self._queue.entered():
            self._cache = self._make_cache(cache, max_len)
            self.capacity = self._cache.capacity if max_len is None else int(max_len)
            # The last token drawn is never fed: a text may be one token longer than the cache.
            sizes = {"batch": batch, "capacity": self.capacity + 1}
            self._sampler = Sampler(settings, model.xp, model.config.vocab_size, seed=self.seed, **sizes)
        self.reset()

    def _make_cache(self, cache: Any, max_len: int | None) -> Any:
        if not isinstance(cache, PagedKVCache):
            return self.model.new_cache(self.batch, max_len, cache)
        self.model.check_cache(cache, self.batch)
        cache.reset()
        for row in range(self.batch):  # all that a text may need: where a step writes is not to be asked of the host
            cache.reserve(row, cache.capacity if max_len is None else max_len)
        return cache

    def reset(self) -> None:
        """Forget the texts; memory and the graph stay."""
        self.length = self._drawn = 0
        self._select()

    # --- prompts ---

    def start(self, prompts: Any) -> Any:
        """Begin new texts: pass the prompts, draw the first token of each -> int32 [batch], as `step` returns them.

        prompts: whole numbers [batch, seq], as `Model.forward` takes them, or a list of `batch` lists of any lengths.
        Raises TypeError / ValueError for wrong ids, and for prompts that are empty or longer than the cache.
        """
        rows = self._checked(prompts)
        longest = max(row.shape[1] for row in rows)
        if longest > self.capacity:
            raise ValueError(f"prompts: {longest} tokens pass the decoder's max_len of {self.capacity}: make a larger decoder")
        self.reset()
        # A prompt passes on the caller's stream, with memory of the usual pool: that of the steps stays as it is.
        self._queue.join()
        logits = self._forward(rows)
        self._sampler.start([row[0] for row in rows])
        self._sampler.draw(logits)
        self._queue.join()
        self.length, self._drawn = longest + 1, 1
        return self._newest()

    def _checked(self, prompts: Any) -> list[Any]:
        """int32 [1, seq] of each text."""
        if isinstance(prompts, Sequence) and all(hasattr(prompt, "__len__") for prompt in prompts):
            rows = [self.model.checked_ids(prompt) for prompt in prompts]
        else:
            ids = self.model.checked_ids(prompts)
            rows = [ids[row : row + 1] for row in range(len(ids))]
        if len(rows) != self.batch or any(len(row) != 1 for row in rows):
            raise ValueError(f"prompts must be {self.batch} rows of ids, one for each text of the decoder, got {len(rows)}")
        return rows

    def _forward(self, rows: list[Any]) -> Any:
        """Logits after the prompts, [batch, vocab], whose keys and values are put into the cache."""
        model, adapters = self.model, self._adapters
        self._cache.reset()
        if len({row.shape[1] for row in rows}) == 1:
            logits = model.forward(_stacked(model.xp, rows), self._cache, last_only=True, adapters=adapters)
        else:
            choices = adapters if isinstance(adapters, list) else [adapters] * self.batch
            parts = [
                model.forward(ids, self._cache.row(row), last_only=True, adapters=choice)
                for row, (ids, choice) in enumerate(zip(rows, choices, strict=True))
            ]
            logits = _stacked(model.xp, parts)
        return logits.reshape(self.batch, -1)

    # --- steps ---

    def step(self) -> Any:
        """One step -> the tokens drawn, int32 [batch] on the device, where -1 stands for logits that are not finite.

        The array keeps its values until the next `start`. The host waits for nothing. ValueError before the first `start`,
        and where a text would outgrow max_len.
        """
        self._check_room(1)
        with self._queue.entered():
            self._queue_step()
        return self._newest()

    def run(self, n: int) -> Any:
        """`n` steps -> the tokens drawn, a new array int32 [batch, n] on the device; otherwise as `step`."""
        self._check_room(n)
        with self._queue.entered():
            for _ in range(n):
                self._queue_step()
        return self._sampler.tokens[self._drawn - n : self._drawn].T.copy(order="C")

    def stream(self, count: int) -> Generator[np.ndarray, None, None]:
        """Yield `count` times int32 [batch] on the host: the tokens drawn last, then those of `count` - 1 steps.

        Each comes as soon as it is known; on a GPU up to two further steps are queued by then, so that it need not wait.
        """
        self._check_room(max(count - 1, 0))
        landing = self._queue.landing(self.batch)
        try:
            for index in range(count):
                if index:
                    with self._queue.entered():
                        self._queue_step()
                landing.send(self._newest())
                if index >= landing.ahead:
                    yield self._received(landing)
            for _ in range(min(landing.ahead, count)):
                yield self._received(landing)
        finally:
            landing.close()

    def _received(self, landing: Any) -> np.ndarray:
        tokens = landing.receive()
        self.model.check()  # where a step ended because another rank failed, they are no tokens
        return tokens

    def _newest(self) -> Any:
        return self._sampler.tokens[self._drawn - 1]

    def _check_room(self, n: int) -> None:
        whole_number(n, "the number of steps", 0)
        if not self._drawn:
            raise ValueError("the decoder has no texts yet: call start(prompts) first")
        most = self.capacity - self.length + 1
        if n > most:
            raise ValueError(f"{n} more steps pass the decoder's max_len of {self.capacity}: ask for at most {most}")

    def _queue_step(self) -> None:
        self._select()
        if self._graph is not None:
            self.model.launch(self._graph)
        else:
            self._compute()  # allocates what a capture then finds in the pool
            if self._uses_graphs:
                self._graph = self.model.adopt(self._queue.captured(self._compute))
        self.length += 1
        self._drawn += 1

    def _compute(self) -> None:
        """What a step is: the same launches with the same arguments for all steps."""
        model, sampler = self.model, self._sampler
        step = model.step(self._cache, 1, sampler.positions, sampler.lengths, self._selection)
        logits = model.logits(model.hidden(sampler.ids[:, None], step), step)
        sampler.draw(logits.reshape(self.batch, -1))

    def _select(self) -> None:
        """Look the adapters up again: where some were loaded or unloaded, the graph holds addresses of arrays that are gone."""
        if self._adapters is not None:
            selection = self.model.select_adapters(self._adapters, self.batch)
            if selection is not self._selection:
                self._graph = None
                self._selection = selection


def _stacked(xp: Any, arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else xp.concatenate(arrays)
