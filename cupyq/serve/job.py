"""What a caller asks for: a Job; and what it is told: Events."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyq.generate.generator import check_ids
from cupyq.models.sampler import MAX_SEED, SamplerSettings
from cupyq.ops._common import whole_number

MAX_LOGPROBS = 1024

Filter = Callable[[list[int]], Any]
"""From the new tokens so far, what may come next: bool [vocab], ids, or None for anything."""

_numbers = itertools.count()


@dataclass(eq=False)
class Job:
    """A text to be continued, and how. Hand it to `Generator.add`; it holds its results then, too.

    prompt          token ids, one or more
    max_new_tokens  ends it, reason "length"
    min_new_tokens  until so many are drawn, stop tokens cannot be
    settings        how tokens are drawn; the seed (default: settings.seed, else a new one from `Generator.add`) decides
                    which, whatever else is in the batch
    stop_tokens     ids that end it and are no part of the result; None: the model's end-of-text tokens
    stop_strings    texts that end it and are no part of the result
    banned_strings  texts, upper or lower case, that are taken back as soon as they are there: their first token is drawn anew
    filters         each a callable (see Filter) or a mask bool [vocab]: only tokens that all of them allow are drawn. Where
                    none is left the job ends, reason "filter"
    heal            take the prompt's last token back and draw one that begins with it: a prompt may end amid a word
    adapters        LoRA, as `Model.forward` takes for one row
    logprobs        so many of the most likely tokens are told for each token, of the logits before any setting
    speculate       False: not even where the generator does
    name            anything, for the caller

    ValueError / TypeError for anything out of range; what only the model can tell, `Generator.add` does.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    settings: SamplerSettings = field(default_factory=SamplerSettings)
    seed: int | None = None
    stop_tokens: Collection[int] | None = None
    stop_strings: Sequence[str] = ()
    banned_strings: Sequence[str] = ()
    filters: Sequence[Filter | np.ndarray] = ()
    heal: bool = False
    adapters: Any = None
    logprobs: int | None = None
    speculate: bool = True
    name: Any = None

    def __post_init__(self) -> None:
        self.number = next(_numbers)
        """Its place among all jobs of this process."""
        self.tokens: list[int] = []
        """New ones so far, those that have been told."""
        self.text = ""
        self.reason: str | None = None
        """Why it ended: stop_token, stop_string, length, filter, cancelled or error; None while it has not."""
        self.error: BaseException | None = None
        self.cached_tokens = 0
        """Of the prompt, found in the cache; prefilled_tokens: computed."""
        self.prefilled_tokens = 0
        self.accepted_drafts = self.refused_drafts = 0
        self.rewinds = 0
        """Times that a banned string was taken back."""
        self.is_cancelled = self.is_added = False
        self._check()

    def _check(self) -> None:
        if not isinstance(self.settings, SamplerSettings):
            raise TypeError(f"settings must be SamplerSettings, got {type(self.settings).__name__}")
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0)):
            whole_number(getattr(self, name), name, least)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}: lower it")
        if self.seed is None:
            self.seed = self.settings.seed
        if self.seed is not None:
            whole_number(self.seed, "seed", 0, MAX_SEED)
        if self.logprobs is not None:
            whole_number(self.logprobs, "logprobs", 0, MAX_LOGPROBS)
        for name in ("heal", "speculate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("stop_strings", "banned_strings"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"{name} must be a list of texts, got {texts!r}")
            if "" in texts:
                raise ValueError(f"{name} holds an empty text, which is everywhere: leave it out")
        if callable(self.filters) or isinstance(self.filters, (np.ndarray, str)):
            raise TypeError(f"filters must be a list of them, got one {type(self.filters).__name__}: put it into a list")
        for index, one in enumerate(self.filters):
            if not callable(one) and not isinstance(one, np.ndarray):
                raise TypeError(f"filters[{index}] must be a callable or a mask bool [vocab], got {type(one).__name__}")

    def check_for(self, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """What takes the model to check; fills in stop_tokens."""
        self.prompt = check_ids(self.prompt, vocab_size, "prompt")
        stop = list(eos_token_ids) if self.stop_tokens is None else self.stop_tokens
        if isinstance(stop, (int, str)):
            raise TypeError(f"stop_tokens must be a list of token ids, got {stop!r}")
        self.stop_tokens = frozenset(check_ids(list(stop), vocab_size, "stop_tokens")) if len(stop) else frozenset()
        for index, one in enumerate(self.filters):
            if isinstance(one, np.ndarray):
                check_mask(one, vocab_size, f"filters[{index}]")
        for name in ("token_bias", "dry_breakers", "xtc_protected"):
            for token in getattr(self.settings, name):
                if token >= vocab_size:
                    raise ValueError(f"settings.{name}: token {token}, expected 0 to {vocab_size - 1}")

    def cancel(self) -> None:
        """Give it up: it ends at the next step, reason "cancelled". Nothing happens where it has ended."""
        self.is_cancelled = True

    @property
    def is_done(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities: the token's, and the most likely ones', likeliest first."""

    token: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job.

    kind "started": it has its pages. "prefill": `count` of its `total` prompt tokens have passed or were found. "text": new
    tokens and their text; a character is never split, and neither is held back longer than it takes to know that it is no
    stop string's and no banned string's. "finished": nothing follows; `reason` and `error` are the job's.
    """

    job: Job
    kind: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    count: int = 0
    total: int = 0
    reason: str | None = None
    error: BaseException | None = None


def allowed_tokens(filters: Iterable[Filter | np.ndarray], tokens: list[int], vocab_size: int) -> np.ndarray | None:
    """bool [vocab] of what all filters allow after `tokens`; None where that is everything."""
    mask = None
    for index, one in enumerate(filters):
        allowed = one if isinstance(one, np.ndarray) else one(list(tokens))
        if allowed is None:
            continue
        if isinstance(allowed, np.ndarray) and allowed.dtype.kind == "b":
            check_mask(allowed, vocab_size, f"what filters[{index}] returned")
        else:
            allowed = mask_of(allowed, vocab_size, f"what filters[{index}] returned")
        mask = allowed if mask is None else mask & allowed
    return mask


def mask_of(ids: Any, vocab_size: int, name: str) -> np.ndarray:
    """True at the ids, bool [vocab]."""
    mask = np.zeros(vocab_size, bool)
    try:
        found = np.fromiter(ids, np.int64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a mask bool [vocab], token ids or None, got {type(ids).__name__} ({error})") from None
    if found.size and not 0 <= found.min() <= found.max() < vocab_size:
        raise ValueError(f"{name}: token {found[(found < 0) | (found >= vocab_size)][0]}, expected 0 to {vocab_size - 1}")
    mask[found] = True
    return mask


def check_mask(mask: np.ndarray, vocab_size: int, name: str) -> None:
    if mask.dtype != bool or mask.shape != (vocab_size,):
        raise ValueError(f"{name} must be bool [{vocab_size}], got {mask.dtype} {list(mask.shape)}")
