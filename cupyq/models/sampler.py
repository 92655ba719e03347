"""How the next token is drawn from the logits."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyq._copies import copy_values
from cupyq.ops._common import whole_number
from cupyq.ops.advance import advance
from cupyq.ops.penalties import PenaltyTable, penalize, penalize_workspace_size
from cupyq.ops.sampling import SamplerTable, sample, sample_workspace_size

MAX_SEED = (1 << 32) - 1
MAX_TOP_K = (1 << 31) - 1
_LARGEST = 1e6  # far beyond any use, well within float32

# name -> (what it must be, the least value, the largest); both ends are allowed, but for those that must be above 0.
_NUMBERS = {
    "temperature": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "top_p": ("above 0 and at most 1", 0, 1),
    "min_p": ("from 0 to 1", 0, 1),
    "repetition_penalty": (f"above 0 and at most {_LARGEST:g}", 0, _LARGEST),
    "frequency_penalty": (f"from -{_LARGEST:g} to {_LARGEST:g}", -_LARGEST, _LARGEST),
    "presence_penalty": (f"from -{_LARGEST:g} to {_LARGEST:g}", -_LARGEST, _LARGEST),
    "dry_multiplier": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "dry_base": (f"from 1 to {_LARGEST:g}", 1, _LARGEST),
    "smoothing_factor": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "top_a": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "tfs": ("from 0 to 1", 0, 1),
    "typical": ("from 0 to 1", 0, 1),
    "mirostat_tau": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "mirostat_eta": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "min_temp": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "max_temp": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "temp_exponent": (f"from 0 to {_LARGEST:g}", 0, _LARGEST),
    "xtc_probability": ("from 0 to 1", 0, 1),
    "xtc_threshold": ("from 0 to 1", 0, 1),
    "skew": ("from -100 to 100", -100, 100),
}
_WHOLE_NUMBERS = {
    "top_k": (0, MAX_TOP_K),
    "seed": (0, MAX_SEED),
    "repetition_range": (-1, MAX_TOP_K),
    "repetition_decay": (0, MAX_TOP_K),
    "dry_allowed_length": (1, MAX_TOP_K),
    "dry_max_ngram": (1, MAX_TOP_K),
    "dry_range": (0, MAX_TOP_K),
}


@dataclass(frozen=True)
class SamplerSettings:
    """What `cupyq.ops.sampling.sample` and `cupyq.ops.penalties.penalize` are told at every step.

    The defaults of the first four are those of exllamav2's sampler; everything else is off.

    temperature  divides the logits; up to 1e6; 0 takes the most likely token
    top_k        keeps the k most likely tokens; 0 keeps all
    top_p        keeps the most likely tokens until their probabilities reach top_p, above 0; 1 keeps all
    min_p        keeps the tokens at least min_p times as likely as the most likely one; 0 keeps all
    seed         0 to 2^32 - 1: the same seed gives the same tokens; None draws a new one for every generation

    For tokens said before, prompt included; more in `penalize`:
    repetition_penalty      divides positive logits, multiplies negative ones; 1 is off
    frequency_penalty       subtracted for each time; presence_penalty: once
    repetition_range        newest tokens that count fully (-1: all); repetition_decay: further ones that count ever less
    dry_multiplier          above 0: against repeated sequences, with dry_base, dry_allowed_length, dry_max_ngram and dry_range
    dry_breakers            ids that end a sequence
    token_bias              {id: what is added to its logit}; -inf forbids it

    Further filters, 0 is off; more in `sample`:
    smoothing_factor, top_a, tfs, typical, xtc_probability with xtc_threshold and xtc_protected (ids), skew
    mirostat_tau            the surprise in bits to keep to, learned at the rate mirostat_eta
    min_temp, max_temp, temp_exponent
                            a temperature between the two by the entropy, after the filters, where max_temp > min_temp
    temperature_last        `temperature` divides after the filters instead of before

    Raises ValueError / TypeError for values outside these ranges.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_range: int = -1
    repetition_decay: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_max_ngram: int = 20
    dry_range: int = 0
    dry_breakers: Sequence[int] = ()
    token_bias: Mapping[int, float] = field(default_factory=dict)
    smoothing_factor: float = 0.0
    top_a: float = 0.0
    tfs: float = 0.0
    typical: float = 0.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    min_temp: float = 0.0
    max_temp: float = 0.0
    temp_exponent: float = 1.0
    temperature_last: bool = False
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_protected: Sequence[int] = ()
    skew: float = 0.0

    def __post_init__(self) -> None:
        for name, (expected, lowest, highest) in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            is_above = value > lowest if expected.startswith("above") else value >= lowest
            if not (is_above and value <= highest):  # NaN is refused too: it compares as false
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        for name, (lowest, highest) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            whole_number(value, name, lowest, highest)
        if not isinstance(self.temperature_last, bool):
            raise TypeError(f"temperature_last must be True or False, got {self.temperature_last!r}")
        if not isinstance(self.token_bias, Mapping):
            raise TypeError(f"token_bias must be a dict of ids and numbers, got {self.token_bias!r}")
        for name in ("dry_breakers", "xtc_protected", "token_bias"):
            for token in getattr(self, name):
                if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or token < 0:
                    raise ValueError(f"{name} must hold token ids, whole numbers of 0 or more, got {token!r}")
        for token, value in self.token_bias.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or math.isnan(value) or value > _LARGEST or -math.inf < value < -_LARGEST:
                raise ValueError(f"token_bias must add -inf or up to {_LARGEST:g} to token {token}, got {value!r}")

    @classmethod
    def greedy(cls) -> "SamplerSettings":
        """The most likely token at every step; of equals, the one with the lowest id."""
        return cls(temperature=0.0, top_k=1, top_p=1.0, min_p=0.0, seed=0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def looks_back(self) -> bool:
        """Whether what was said so far changes the logits."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
            or self.dry_multiplier != 0
        )


def sample_arguments(settings: SamplerSettings) -> dict[str, Any]:
    """What `sample` is told of them by number; seeds, steps, masks and mu are each caller's own."""
    is_last = settings.temperature_last and settings.temperature > 0
    names = ["top_k", "top_p", "top_a", "min_p", "tfs", "typical", "mirostat_tau", "mirostat_eta", "min_temp", "max_temp"]
    names += ["temp_exponent", "xtc_probability", "xtc_threshold", "skew"]
    return {name: getattr(settings, name) for name in names} | {
        "temperature": 1.0 if is_last else float(settings.temperature),
        "post_temperature": float(settings.temperature) if is_last else 1.0,
        "smoothing": settings.smoothing_factor,
    }


def penalize_arguments(settings: SamplerSettings) -> dict[str, Any]:
    """What `penalize` is told of them by number."""
    names = {"repetition": "repetition_penalty", "frequency": "frequency_penalty", "presence": "presence_penalty"}
    names |= {"sustain": "repetition_range", "decay": "repetition_decay"}
    dry = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_max_ngram", "dry_range")
    return {to: getattr(settings, name) for to, name in (*names.items(), *zip(dry, dry, strict=True))}


def token_mask(ids: Iterable[int], vocab_size: int, name: str) -> np.ndarray:
    """bool [vocab_size], true at the ids; ValueError for one beyond the vocabulary."""
    mask = np.zeros(vocab_size, bool)
    for token in ids:
        if token >= vocab_size:
            raise ValueError(f"{name}: token {token}, expected 0 to {vocab_size - 1}")
        mask[token] = True
    return mask


class Sampler:
    """Draws the tokens of a batch of texts. Settings, texts and counters are where the logits are and move on there.

    Sampler(settings, xp, vocab_size, batch=1, capacity=..., seed=...): `capacity` tokens of a text at most, its prompt
    included. Text b is drawn with seed + b, so that it is the same in any batch.

    Of use to whoever computes the logits: `ids`, int32 [batch], drawn last; `lengths`, int32 [batch], tokens of each text;
    `positions`, int32 [batch], where its last token stands. These arrays stay the same objects.
    """

    def __init__(self, settings: SamplerSettings, xp: Any, vocab_size: int, *, batch: int = 1, capacity: int, seed: int):
        self._xp, self._settings, self._vocab_size, self._batch = xp, settings, vocab_size, batch
        self.ids, self.lengths, self.positions = (xp.zeros(batch, np.int32) for _ in range(3))
        self.steps = xp.zeros(batch, np.int64)
        """Tokens drawn: what random numbers depend on."""
        self.tokens = xp.zeros((capacity, batch), np.int32)
        """Tokens drawn, in order."""
        self._history = xp.zeros((batch, capacity if settings.looks_back else 0), np.int32)
        seeds = seed if batch == 1 else np.uint64(seed) + np.arange(batch, dtype=np.uint64)
        self._table = SamplerTable(batch, xp, seed=seeds, **sample_arguments(settings))
        self._mu = xp.zeros(batch, np.float32) if settings.mirostat_tau > 0 else None
        self._arrays: dict[str, Any] = {}
        if settings.xtc_probability > 0 and settings.xtc_protected:
            self._arrays["xtc_mask"] = xp.asarray(~token_mask(settings.xtc_protected, vocab_size, "xtc_protected"))
        workspace_size = sample_workspace_size(batch, vocab_size)
        if workspace_size and xp is not np:
            self._arrays["workspace"] = xp.empty(workspace_size, np.uint8)
        self._penalties, self._arrays_to_penalize = None, {}
        if settings.looks_back or settings.token_bias:
            self._penalties = PenaltyTable(batch, xp, **penalize_arguments(settings))
            self._arrays_to_penalize = self._penalize_arrays()

    def _penalize_arrays(self) -> dict[str, Any]:
        xp, settings, bias = self._xp, self._settings, self._settings.token_bias
        arrays: dict[str, Any] = {}
        if settings.dry_multiplier > 0 and settings.dry_breakers:
            arrays["dry_breakers"] = xp.asarray(token_mask(settings.dry_breakers, self._vocab_size, "dry_breakers"))
        if bias:
            token_mask(list(bias), self._vocab_size, "token_bias")
            arrays["bias_ids"] = xp.asarray(np.array(list(bias), np.int32))
            arrays["bias"] = xp.asarray(np.array(list(bias.values()), np.float32))
        if xp is not np:
            size = penalize_workspace_size(self._batch, self._vocab_size, self._history.shape[1], len(bias))
            arrays["workspace"] = xp.empty(size, np.uint8)
        return arrays

    def start(self, prompts: Sequence[Any]) -> None:
        """Begin with these texts: int32 arrays [1 or more] of `xp`, or lists, one for each of the batch."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        copy_values(self._xp.asarray(lengths), self.lengths)
        copy_values(self._xp.asarray(lengths - 1), self.positions)
        self.steps.fill(0)
        if self._mu is not None:
            self._mu.fill(2 * self._settings.mirostat_tau)
        if self._history.size:
            for row, prompt in zip(self._history, prompts, strict=True):
                copy_values(self._xp.asarray(prompt, np.int32), row[: len(prompt)])

    def draw(self, logits: Any) -> Any:
        """`ids`, after drawing them from float32 logits [batch, vocab], which penalties change; they join the texts."""
        if self._penalties is not None:
            lengths = self.lengths if self._history.size else None
            penalize(logits, self._history, lengths, table=self._penalties, out=logits, **self._arrays_to_penalize)
        sample(logits, table=self._table, step=self.steps, mirostat_mu=self._mu, out=self.ids, **self._arrays)
        advance(self.ids, self.positions, self.lengths, self.steps, self.tokens, self._history)
        return self.ids
