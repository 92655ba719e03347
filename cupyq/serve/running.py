"""A job that has begun: its text so far, what may come next, and what each new token means for it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyq.serve.job import Event, Job, TokenLogprobs, allowed_tokens, mask_of
from cupyq.serve.pages import Lease
from cupyq.serve.rows import RowSettings, RowState
from cupyq.serve.streaming import TextStream, Told


class Running:
    """What the generator knows of a job. `tokens` is the whole text, prompt included, as far as the host has seen it."""

    def __init__(self, job: Job, tokenizer: Any, pieces: "Pieces | None", vocab_size: int):
        self.job, self._vocab_size = job, vocab_size
        self.row_settings = RowSettings(job.settings, job.seed)
        self.tokens = list(job.prompt)
        self.healing, healed = None, 0
        if job.heal and pieces is not None and len(self.tokens) > 1:
            self.healing, healed = pieces.healing(self.tokens)
            if self.healing is not None:
                self.tokens.pop()
        self.start = len(self.tokens)
        self.stream = TextStream(tokenizer, self.tokens, job.stop_strings, job.banned_strings, healed)
        self.lease: Lease | None = None
        self.fed = 0
        """Tokens of the prompt whose keys and values are there."""
        self.drawn = 0
        """New tokens that were drawn, those included that are still on their way."""
        self.is_placed = False
        """Whether its row of the batch stands where the job does."""
        self.skips = 0
        self.epoch = 0
        """Grows when tokens are taken back: those on their way by then are void."""
        self.mu = 2 * job.settings.mirostat_tau
        self.index: dict = {}
        """What an n-gram draft has seen of the text."""
        self._blocked: dict[int, set[int]] = {}

    # --- sizes ---

    @property
    def length(self) -> int:
        """Tokens of the text once all that were drawn have arrived."""
        return self.start + self.drawn

    @property
    def most(self) -> int:
        """Tokens that ever need a place: the last one drawn is not fed."""
        return self.start + self.job.max_new_tokens - 1

    @property
    def unfed(self) -> int:
        """Tokens of the prompt that have to pass: all but the last, which the first step feeds."""
        return max(self.start - 1 - self.fed, 0)

    @property
    def certain(self) -> int:
        """Tokens whose keys and values are there, and that will not be taken back."""
        if self.fed < self.start - 1:
            return self.fed
        return min(len(self.tokens) - 1, len(self.tokens) - self.stream.held if self.job.banned_strings else len(self.tokens))

    @property
    def wants_step(self) -> bool:
        return not self.job.is_done and self.drawn < self.job.max_new_tokens

    # --- for the next draw ---

    @functools.cached_property
    def draft_settings(self) -> RowSettings:
        """For a draft model, without what looks back: guesses are cheap, not exact."""
        neutral = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "dry_multiplier": 0.0}
        settings = dataclasses.replace(self.job.settings, **neutral, mirostat_tau=0.0)
        return RowSettings(settings, self.job.seed)

    def state(self, ahead: Sequence[int] = ()) -> RowState:
        """Where its row stands after all tokens the host has seen, and those `ahead`."""
        length = len(self.tokens) + len(ahead)
        # One random number for each place in the text, and new ones after something was taken back.
        step = (self.job.rewinds << 32) | (length - self.start)
        history = [*self.tokens, *ahead] if self.job.settings.looks_back else ()
        return RowState(ahead[-1] if ahead else self.tokens[-1], length, step, self.mu, history)

    @property
    def waits_for_tokens(self) -> bool:
        """Whether what may come next depends on tokens that the host must see first."""
        return any(callable(one) for one in self.job.filters)

    def mask(self, ahead: list[int] | None = None) -> np.ndarray | None:
        """bool [vocab] of what may come after the text, and `ahead`, guesses after it; None where everything may."""
        job, vocab = self.job, self._vocab_size
        index = self.drawn if ahead is None else len(self.tokens) - self.start + len(ahead)
        mask = allowed_tokens(job.filters, [*self.tokens[self.start :], *(ahead or ())], vocab) if job.filters else None
        forbidden: set[int] = set(self._blocked.get(index, ()))
        if index < job.min_new_tokens:
            forbidden |= set(job.stop_tokens or ())
        if forbidden:
            mask = np.ones(vocab, bool) if mask is None else mask.copy()
            mask[list(forbidden)] = False
        if self.healing is not None and index == 0:
            mask = self.healing if mask is None else mask & self.healing
        return mask

    def masks(self, guessed: list[int]) -> list[np.ndarray | None]:
        """What may come at each position of the text and `guessed`, from which guesses are dropped that may not."""
        found = [self.mask([])]
        for position, token in enumerate(guessed):
            if found[-1] is not None and not found[-1][token]:
                del guessed[position:]
                break
            try:
                mask = self.mask(guessed[: position + 1])
            except Exception:
                mask = np.zeros(0, bool)  # if this guess is right, the next step will see what is wrong
            if mask is not None and not mask.any():
                del guessed[position:]  # likewise if the text ends there
                break
            found.append(mask)
        return found

    # --- tokens arrive ---

    def arrive(self, token: int, logprobs: TokenLogprobs | None = None) -> list[Event]:
        """What a drawn token means: events, the last one "finished" where it ends the job."""
        if token < 0:
            return self.finish("error", ValueError("no token could be drawn: the model's logits are not finite"))
        index = len(self.tokens) - self.start
        self.tokens.append(token)
        if token in (self.job.stop_tokens or ()) and index >= self.job.min_new_tokens:
            return self.finish("stop_token")
        told = self.stream.add(token, logprobs)
        if told.rewind is not None:
            self._rewind(*told.rewind)
            return []
        events = self._events(told)
        if told.is_stopped:
            return events + self.finish("stop_string", rest=False)
        if index + 1 == self.job.max_new_tokens:
            return events + self.finish("length")
        return events

    def _rewind(self, count: int, token: int) -> None:
        del self.tokens[-count:]
        self.drawn = index = len(self.tokens) - self.start
        self._blocked = {place: tokens for place, tokens in self._blocked.items() if place <= index}
        self._blocked.setdefault(index, set()).add(token)
        self.job.rewinds += 1
        self.epoch += 1
        self.is_placed, self.index = False, {}

    def _events(self, told: Told) -> list[Event]:
        self.job.tokens += told.tokens
        self.job.text += told.text
        if not told.tokens and not told.text:
            return []
        logprobs = tuple(one for one in told.extras if one is not None)
        return [Event(self.job, "text", told.text, told.tokens, logprobs)]

    def finish(self, reason: str, error: BaseException | None = None, *, rest: bool = True) -> list[Event]:
        """The job ends; `rest`: what is held back is told."""
        events = []
        if rest:
            told = self.stream.finish()
            events = self._events(told)
            reason = "stop_string" if told.is_stopped and reason in ("length", "stop_token") else reason
        self.job.reason, self.job.error = reason, error
        return [*events, Event(self.job, "finished", reason=reason, error=error)]


class Pieces:
    """The tokens of a vocabulary as its tokenizer writes them, to find those that begin with one of them."""

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special = special
        self._pieces: list[str | None] | None = None

    def healing(self, prompt: list[int]) -> tuple[np.ndarray | None, int]:
        """(what may stand in place of the last token of a prompt, characters of its text that the prompt has already).

        None where it is to stay: a special token, or the first bytes of a character.
        """
        if self._pieces is None:
            count = min(self._tokenizer.get_vocab_size(), self._vocab_size)
            self._pieces = [None if index in self._special else self._tokenizer.id_to_token(index) for index in range(count)]
        last = prompt[-1]
        piece = self._pieces[last] if last < len(self._pieces) else None
        if not piece:
            return None, 0
        stream = TextStream(self._tokenizer, prompt[:-1])
        text = stream.add(last).text
        if not text or stream.finish().text:
            return None, 0
        ids = [index for index, other in enumerate(self._pieces) if other is not None and other.startswith(piece)]
        return mask_of(ids, self._vocab_size, "healing"), len(text)


def log_probabilities(logits: np.ndarray, token: int, most: int) -> TokenLogprobs:
    """Of float32 logits [vocab], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    logs = shifted - np.log(np.sum(np.exp(shifted)))
    # Ties by the lowest id, as everywhere.
    candidates = (
        np.flatnonzero(logits >= np.partition(logits, -most)[-most]) if 0 < most <= logits.size else np.arange(logits.size)
    )
    top = candidates[np.lexsort((candidates, -logits[candidates]))][:most]
    return TokenLogprobs(token, float(logs[token]), {int(index): float(logs[index]) for index in top})
