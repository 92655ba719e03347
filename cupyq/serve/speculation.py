"""Tokens guessed ahead, to be verified many at a time.

Who guesses is asked for some tokens after each text. The model then passes them all at once, and every position is drawn by
the job's own settings with the random number that belongs to that position. As long as the token drawn is the one guessed,
the next position is what it would have been without guessing; the first one that differs is kept and ends the step. So
guesses decide how fast a text comes, never which: not only the distribution, the tokens themselves stay those of the seed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyq._copies import copy_values
from cupyq.ops._common import whole_number
from cupyq.serve.engine import MOST_NEW, Engine, Landing
from cupyq.serve.rows import Rows
from cupyq.serve.running import Running


class NGramDraft:
    """Guesses that a text goes on as it did the last time its last tokens stood there: no model, no cache.

    most: the most tokens guessed, up to 15; longest: of the token sequences looked up, longer ones first, down to `shortest`.
    """

    def __init__(self, most: int = 4, longest: int = 4, shortest: int = 1):
        self.most = whole_number(most, "most", 1, MOST_NEW - 1)
        self._shortest = whole_number(shortest, "shortest", 1)
        self._longest = whole_number(longest, "longest", self._shortest)

    def guess(self, text: Sequence[int], index: dict) -> list[int]:
        """Up to `most` tokens after `text`. index: of this text, {} at first."""
        seen, ends = index.get("seen", 0), index.setdefault("ends", {})
        # Where each sequence that something follows ended last.
        for end in range(max(seen, 1), len(text)):
            for length in range(self._shortest, min(self._longest, end) + 1):
                ends[tuple(text[end - length : end])] = end
        index["seen"] = len(text)
        for length in range(min(self._longest, len(text) - 1), self._shortest - 1, -1):
            end = ends.get(tuple(text[-length:]))
            if end is not None:
                guessed: list[int] = []
                for place in range(end, end + self.most):  # beyond the end of the text, as it would go on repeating itself
                    guessed.append(text[place] if place < len(text) else guessed[place - len(text)])
                return guessed
        return []


class ModelDraft:
    """A smaller model of the same vocabulary guesses, with each job's settings and random numbers.

    most: the most tokens guessed, up to 15. Its cache has the pages of the large model's, and shares them alike. Penalties,
    filters and adapters are left to the large model. On the ranks of a large model it is split like that one, or whole on
    each: all must guess the same, so whole ones take GPUs of one kind.
    """

    def __init__(self, model: Any, most: int = 4):
        self.model = model
        self.most = whole_number(most, "most", 1, MOST_NEW - 1)

    def engine(self, target: Any, pages: int, page_size: int, max_batch: int, kind: str, **options: Any) -> Engine:
        """Its passes, beside those of the model it guesses for."""
        if self.model.config.vocab_size != target.config.vocab_size:
            raise ValueError(
                f"the draft model has {self.model.config.vocab_size} tokens in its vocabulary, the model "
                f"{target.config.vocab_size}: take a smaller model of the same family"
            )
        if self.model.xp is not target.xp:
            raise ValueError(f"the draft model runs on {self.model.backend}, the model on {target.backend}: load both alike")
        if self.model.is_part and not target.is_part:
            raise ValueError("the draft model is one rank's part, the model is whole: load the draft model whole, too")
        engine = Engine(self.model, pages, page_size, max_batch, kind, **options)
        if engine.capacity < target.config.max_seq_len:
            raise ValueError(
                f"the draft model's context is {engine.capacity}, the model's {target.config.max_seq_len}: load the model "
                f"with max_seq_len={engine.capacity}"
            )
        return engine

    def guess(self, engine: Engine, rows: Rows, batch: int, count: int) -> np.ndarray:
        """int32 [rows, count]: guesses after the first `batch` rows, which stand where the texts end.

        The last guess is fed too, so that its keys and values are there if it is right.
        """
        with engine.stepping():
            drawn = engine.xp.empty((count, rows.count), np.int32)
        for place in range(count + 1):
            logits = engine.decode(rows, [None] * batch)
            if place < count:
                with engine.stepping():
                    rows.draw(logits)
                    copy_values(rows.ids, drawn[place])
        return Landing(engine, {"ids": drawn}).receive()["ids"].T[:batch]


class Speculation:
    """Guesses for the rows of a batch, and their verification.

    engines: the model's, then the draft model's, if there is one.
    """

    def __init__(self, draft: NGramDraft | ModelDraft, engines: Sequence[Engine]):
        self._draft, self._engines = draft, engines
        self._verified: dict[int, Rows] = {}
        """By the number of tokens verified: rows for as many of every row of the batch."""
        if isinstance(draft, ModelDraft):
            engine = engines[1]
            with engine.stepping():  # the same arrays at every step: a captured pass reads them
                self._rows = Rows(engine.xp, engine.model.config.vocab_size, engine.batch)

    def guesses(self, runs: Sequence[Running]) -> dict[Running, list[int]]:
        """What may follow each text; runs: those of the first rows."""
        # No more than may be drawn before the last token, and than the tables of positions have.
        room = min(self._engines[0].capacity - len(run.tokens) for run in runs)
        most = {run: min(self._draft.most, run.job.max_new_tokens - run.drawn - 1, room) for run in runs}
        for run in runs:
            if not run.job.speculate or run.job.settings.mirostat_tau > 0:  # whose draws depend on each other
                most[run] = 0
        if isinstance(self._draft, NGramDraft):
            return {run: self._draft.guess(run.tokens, run.index)[: most[run]] for run in runs}
        engine = self._engines[1]
        with engine.stepping():
            self._rows.put_all([dataclasses.replace(run.state(), history=()) for run in runs])
            self._rows.configure([run.draft_settings for run in runs])
        drawn = self._draft.guess(engine, self._rows, len(runs), max(most.values()))
        guesses = {}
        for row, run in enumerate(runs):
            tokens = drawn[row, : most[run]].tolist()
            guesses[run] = tokens[: tokens.index(-1)] if -1 in tokens else tokens
        return guesses

    def verify(
        self, runs: Sequence[Running], guesses: dict[Running, list[int]], masks: dict[Running, list]
    ) -> list[tuple[list[int], list[np.ndarray | None]]]:
        """Of each run the tokens drawn at every position, and the logits there if its job wants to know them."""
        engine, count, new = self._engines[0], len(runs), 1 + max(len(guesses[run]) for run in runs)
        fed, at = np.zeros((count, new), np.int32), np.zeros(count, np.int32)
        states, settings, allowed, told = [], [], {}, []
        for row, run in enumerate(runs):
            guessed = guesses[run]
            fed[row, : 1 + len(guessed)] = [run.tokens[-1], *guessed]
            at[row] = len(run.tokens) - 1
            for position in range(new):  # those beyond the guesses are drawn too, and nobody looks at them
                states.append(run.state(guessed[:position]))
                settings.append(run.row_settings)
                if position <= len(guessed):
                    if masks[run][position] is not None:
                        allowed[row * new + position] = masks[run][position]
                    if run.job.logprobs is not None:
                        told.append(row * new + position)
        logits = engine.verify(fed, at, [run.job.adapters for run in runs])
        with engine.stepping():
            logits = logits.reshape(count * new, -1)
            if new not in self._verified:
                self._verified[new] = Rows(engine.xp, logits.shape[1], engine.batch * new)
            rows = self._verified[new]
            before = Landing(engine, {place: logits[place] for place in told})  # penalties change logits
            rows.put_all(states)
            rows.configure(settings)
            drawn = Landing(engine, {"ids": rows.draw(logits, allowed), "mu": rows.mu})
        arrays, kept = drawn.receive(), before.receive()
        tokens = arrays["ids"].reshape(count, new).tolist()
        for row, run in enumerate(runs):
            run.mu = float(arrays["mu"][row * new])
        return [(tokens[row], [kept.get(row * new + i) for i in range(new)]) for row in range(count)]
