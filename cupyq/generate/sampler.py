"""How the next token is drawn from the logits."""

from dataclasses import dataclass

MAX_SEED = (1 << 32) - 1
MAX_TOP_K = (1 << 31) - 1
_MAX_TEMPERATURE = 1e6  # far beyond any use, well within float32


@dataclass(frozen=True)
class SamplerSettings:
    """What `cupyq.ops.sampling.sample` is told at every step. The defaults are those of exllamav2's sampler.

    temperature  divides the logits; up to 1e6; 0 takes the most likely token
    top_k        keeps the k most likely tokens; 0 keeps all
    top_p        keeps the most likely tokens until their probabilities reach top_p, above 0; 1 keeps all
    min_p        keeps the tokens at least min_p times as likely as the most likely one; 0 keeps all
    seed         0 to 2^32 - 1: the same seed gives the same tokens; None draws a new one for every generation

    Raises ValueError / TypeError for values outside these ranges.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, expected, accepts in (
            ("temperature", f"from 0 to {_MAX_TEMPERATURE:g}", lambda value: 0 <= value <= _MAX_TEMPERATURE),
            ("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1),
            ("min_p", "from 0 to 1", lambda value: 0 <= value <= 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not accepts(value):  # NaN is refused too: it compares as false
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        for name, highest in (("top_k", MAX_TOP_K), ("seed", MAX_SEED)):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if not 0 <= value <= highest:
                raise ValueError(f"{name} must be from 0 to {highest}, got {value}")

    @classmethod
    def greedy(cls) -> "SamplerSettings":
        """The most likely token at every step; of equals, the one with the lowest id."""
        return cls(temperature=0.0, top_k=1, top_p=1.0, min_p=0.0, seed=0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1
