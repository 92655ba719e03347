"""How the next token is drawn from the logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if not lowest <= value <= highest:
                raise ValueError(f"{name} must be from {lowest} to {highest}, got {value}")
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


class Sampler:
    """Draws the tokens of one text: the settings, the history and the state of mirostat, all where the logits are.

    Sampler(settings, xp, vocab_size, prompt, capacity, seed): `capacity` tokens at most, the prompt's included.
    """

    def __init__(self, settings: SamplerSettings, xp: Any, vocab_size: int, prompt: Sequence[int], capacity: int, seed: int):
        from cupyq.ops.penalties import PenaltyTable, penalize_workspace_size
        from cupyq.ops.sampling import SamplerTable

        self._xp, self._seed = xp, seed
        is_last = settings.temperature_last and settings.temperature > 0
        self._table = SamplerTable(
            1,
            xp,
            temperature=1.0 if is_last else float(settings.temperature),
            post_temperature=float(settings.temperature) if is_last else 1.0,
            smoothing=settings.smoothing_factor,
            seed=seed,
            **{
                name: getattr(settings, name)
                for name in ("top_k", "top_p", "top_a", "min_p", "tfs", "typical", "mirostat_tau", "mirostat_eta", "min_temp")
                + ("max_temp", "temp_exponent", "xtc_probability", "xtc_threshold", "skew")
            },
        )
        self._mu = xp.asarray(np.float32([2 * settings.mirostat_tau])) if settings.mirostat_tau > 0 else None
        self._xtc_mask = None
        if settings.xtc_probability > 0 and settings.xtc_protected:
            self._xtc_mask = xp.asarray(~_mask(settings.xtc_protected, vocab_size, "xtc_protected"))

        self._history = None
        bias = settings.token_bias
        if not settings.looks_back and not bias:
            return
        history = np.zeros((1, capacity if settings.looks_back else 0), np.int32)
        history[0, : len(prompt)] = prompt if settings.looks_back else []
        self._history, self._length = xp.asarray(history), len(prompt)
        self._lengths = xp.asarray(np.int32([self._length]))
        self._penalties = PenaltyTable(
            1,
            xp,
            repetition=settings.repetition_penalty,
            frequency=settings.frequency_penalty,
            presence=settings.presence_penalty,
            sustain=settings.repetition_range,
            decay=settings.repetition_decay,
            **{
                f"dry_{name}": getattr(settings, f"dry_{name}")
                for name in ("multiplier", "base", "allowed_length", "max_ngram")
            },
            dry_range=settings.dry_range,
        )
        self._arrays: dict[str, Any] = {}
        if settings.dry_multiplier > 0 and settings.dry_breakers:
            self._arrays["dry_breakers"] = xp.asarray(_mask(settings.dry_breakers, vocab_size, "dry_breakers"))
        if bias:
            _mask(list(bias), vocab_size, "token_bias")
            self._arrays["bias_ids"] = xp.asarray(np.array(list(bias), np.int32))
            self._arrays["bias"] = xp.asarray(np.array(list(bias.values()), np.float32))
        if xp is not np:
            size = penalize_workspace_size(1, vocab_size, history.shape[1], len(bias))
            self._arrays["workspace"] = xp.empty(size, np.uint8)

    def draw(self, logits: Any, step: int) -> Any:
        """The next id, int32 [1], from logits [1, vocab], which the penalties change; it joins the history."""
        from cupyq.ops.penalties import penalize
        from cupyq.ops.sampling import sample

        if self._history is not None:
            lengths = self._lengths if self._history.shape[1] else None
            penalize(logits, self._history, lengths, table=self._penalties, out=logits, **self._arrays)
        ids = sample(logits, table=self._table, step=step, mirostat_mu=self._mu, xtc_mask=self._xtc_mask)
        if self._history is not None and self._length < self._history.shape[1]:
            self._history[:, self._length] = ids
            self._length += 1
            self._lengths.fill(self._length)
        return ids


def _mask(ids: Sequence[int], vocab_size: int, name: str) -> np.ndarray:
    """True at the ids, bool [vocab_size]."""
    mask = np.zeros(vocab_size, bool)
    for token in ids:
        if token >= vocab_size:
            raise ValueError(f"{name}: token {token}, expected 0 to {vocab_size - 1}")
        mask[token] = True
    return mask
