"""Tokens from a model, one after the other."""

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq.models.sampler import Sampler, SamplerSettings
from cupyq.ops._common import whole_number


@dataclass(frozen=True)
class Result:
    """What `generate` made and how long it took."""

    tokens: list[int]
    """The new tokens; a stop token is not among them."""
    prompt_tokens: list[int]
    stopped_by: int | None
    """The stop token that ended the generation, None where max_new_tokens did."""
    seed: int
    prefill_seconds: float
    """From the start to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    steps: int
    """Tokens drawn, the stop token included."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return _rate(len(self.prompt_tokens), self.prefill_seconds)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first one per second; None where there are none."""
        return _rate(self.steps - 1, self.decode_seconds)


Tokens = Generator[int, None, None]


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    settings: SamplerSettings | None = None,
    stop_ids: Collection[int] = (),
    adapters: Any = None,
    cache: str = "fp16",
    on_token: Callable[[int], Any] | None = None,
) -> Result:
    """Continue `prompt_ids` by up to `max_new_tokens` tokens.

    The whole prompt passes the model once; then every drawn token is fed back with the cache. A token of `stop_ids` ends the
    generation; on a GPU up to two further ones have been drawn by then, and are dropped. `adapters` are the LoRA adapters to
    use, as `Model.forward` takes them; `cache` is what keys and values are kept in, a kind as `Model.new_cache` takes it.
    `on_token(token)` is called for each new token as soon as it is known. The same model, prompt, adapters, cache, settings
    and seed give the same tokens.
    ValueError / TypeError for an empty prompt, ids outside the vocabulary, and a prompt and max_new_tokens that do not fit
    the model's context together.
    """
    settings = SamplerSettings() if settings is None else settings
    prompt = check_ids(prompt_ids, model.config.vocab_size, "prompt_ids")
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", 1)
    # The last token drawn is never fed back, so it needs no place in the cache.
    needed, limit = len(prompt) + max_new_tokens - 1, model.config.max_seq_len
    if len(prompt) > limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's context {limit}: shorten the prompt")
    if needed > limit:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_new_tokens {max_new_tokens} pass the model's context of {limit}: "
            f"ask for at most {limit - len(prompt) + 1} new tokens"
        )
    seed = model.new_seed() if settings.seed is None else settings.seed
    stop = frozenset(int(token) for token in stop_ids)
    tokens: list[int] = []
    stopped_by = None
    step = 0

    start = time.perf_counter()
    first = last = start
    drawn = (_forwarded if model.xp is np else _decoded)(model, prompt, max_new_tokens, settings, seed, adapters, cache)
    with contextlib.closing(drawn):
        for step, token in enumerate(drawn):
            if token < 0:
                position = len(prompt) + step - 1
                raise ValueError(f"the model's logits at position {position} are not finite: its weights are damaged")
            last = time.perf_counter()
            first = last if step == 0 else first
            if token in stop:
                stopped_by = token
                break
            tokens.append(token)
            if on_token is not None:
                on_token(token)
    return Result(tokens, prompt, stopped_by, seed, first - start, last - first, step + 1)


def _forwarded(
    model: Any, prompt: list[int], count: int, settings: SamplerSettings, seed: int, adapters: Any, cache_kind: str = "fp16"
) -> Tokens:
    """`count` tokens, each drawn when it is asked for."""
    sampler = Sampler(settings, model.xp, model.config.vocab_size, capacity=len(prompt) + count, seed=seed)
    sampler.start([prompt])
    # Models without adapters, or kinds of caches, need not know of them.
    kind = {} if cache_kind == "fp16" else {"kind": cache_kind}
    chosen = {} if adapters is None else {"adapters": adapters}
    cache = model.new_cache(batch=1, capacity=len(prompt) + count - 1, **kind)
    ids = model.xp.asarray(np.array([prompt], np.int32))
    for _ in range(count):
        logits = model.forward(ids, cache, last_only=True, **chosen)[:, -1]
        ids = sampler.draw(model.xp.ascontiguousarray(logits))[:, None]
        yield int(ids[0, 0])


def _decoded(
    model: Any, prompt: list[int], count: int, settings: SamplerSettings, seed: int, adapters: Any, cache_kind: str = "fp16"
) -> Tokens:
    """`count` tokens of a Decoder, which draws ahead while one is looked at."""
    options = {"settings": settings, "seed": seed, "adapters": adapters, "cache": cache_kind}
    decoder = model.decoder(max_len=len(prompt) + count - 1, **options)
    decoder.start([prompt])
    with contextlib.closing(decoder.stream(count)) as drawn:
        for tokens in drawn:
            yield int(tokens[0])


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, name: str) -> list[int]:
    """`ids` as a list of ints, after checking that there is one at least and that each is in the vocabulary."""
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise TypeError(f"{name} must be a list of whole numbers, got an array of shape {ids.shape}")
    tokens = list(ids)
    if not tokens:
        raise ValueError(f"{name} is empty: at least one token is needed")
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise TypeError(f"{name} must be a list of whole numbers, got {token!r} at position {position}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token {token} at position {position}, expected 0 to {vocab_size - 1}")
    return [int(token) for token in tokens]
