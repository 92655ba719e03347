"""Who holds which part of a model: the same pure arithmetic on every rank, so that ranks need not tell each other.

    q, k, v, gate, up, head     split by columns: a rank computes its own heads, its own inner features, its own logits
    o, down                     split by rows, whose inputs a rank has just computed; the partial sums are added over ranks
    embedding, norms, router    whole on every rank

Experts are split like any MLP, each along its inner features, so that every rank has work whatever the router chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from numbers import Integral
from typing import Protocol

UNIT, WIDE_UNIT = 32, 128  # columns: a weight tile; what wide kernels and groups of 128 like best
_UNEVEN = Fraction(21, 20)  # wide units may make the fullest rank this much fuller

MAX_RANKS = 256


class Sizes(Protocol):
    """What a plan looks at, as models.ModelConfig has it."""

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def expert_size(self) -> int: ...


@dataclass(frozen=True)
class TPPlan:
    """Ranges of what each rank holds, by rank; equal inputs give equal plans, on any machine. Build one with `TPPlan.of`."""

    ranks: int
    head_dim: int
    heads: tuple[range, ...]
    """Query heads. They cover all heads in order. Empty on some ranks where there are more ranks than heads."""
    kv_heads: tuple[range, ...]
    """KV heads of those query heads. Where there are more ranks than KV heads, neighbouring ranks hold the same one.
    On each rank, as in the model, every KV head serves equally many query heads."""
    inner: tuple[range, ...]
    """Intermediate features of an MLP, best counted in the stored order of a quantized down projection
    (`split.stored_features`). Borders are multiples of 32."""
    experts: tuple[range, ...]
    """The same of every expert; all empty where there are none."""
    vocab: tuple[range, ...]
    """Vocabulary. Borders are multiples of 32; columns that pad a quantized head go to the last rank."""

    @classmethod
    def of(cls, config: Sizes, ranks: int, weights: Sequence[float] | None = None) -> "TPPlan":
        """The plan for a model's sizes.

        weights: one positive number per rank, such as its free memory; its shares are in proportion, as far as whole heads
        and units allow: the fullest rank, by weight, is as little full as can be. None: equal. Every rank gets at least one
        unit of inner features and of the vocabulary. Intermediate features go by 32, or by 128 where no rank gets more than
        5% fuller by it. TypeError or ValueError names what does not fit.
        """
        if isinstance(ranks, bool) or not isinstance(ranks, Integral):
            raise TypeError(f"ranks must be a whole number, got {type(ranks).__name__}")
        if not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"ranks must be from 1 to {MAX_RANKS}, got {ranks}")
        exact = _exact_weights(weights, ranks)
        size = config.expert_size
        heads, kv_heads = _split_heads(config.num_attention_heads, config.num_key_value_heads, exact)
        return cls(
            ranks=int(ranks),
            head_dim=config.head_dim,
            heads=heads,
            kv_heads=kv_heads,
            inner=_split_inner("intermediate_size", config.intermediate_size, exact),
            experts=_split_inner("expert_size", size, exact) if size else (range(0),) * ranks,
            vocab=_split_units("vocab_size", config.vocab_size, UNIT, exact),
        )

    def head_columns(self, rank: int) -> range:
        """Columns of the query projection, and rows of the output projection, of a rank."""
        return self._columns(self.heads[rank])

    def kv_columns(self, rank: int) -> range:
        """Columns of the key and value projections of a rank."""
        return self._columns(self.kv_heads[rank])

    def _columns(self, heads: range) -> range:
        return range(heads.start * self.head_dim, heads.stop * self.head_dim)


def shares(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` units in whole shares, at least 1 each: the largest share / weight is as small as can be (D'Hondt's rule).

    total >= len(weights). Of several that could take a unit, the first does.

    >>> shares(7, [Fraction(1), Fraction(1), Fraction(2)])
    [2, 2, 3]
    """
    whole = sum(weights)
    given = [int(total * weight / whole) for weight in weights]  # which that rule never goes below
    if min(given) < 1:
        given = [1] * len(weights)
    while sum(given) < total:
        loads = [(count + 1) / weight for count, weight in zip(given, weights, strict=True)]
        given[loads.index(min(loads))] += 1
    return given


def _exact_weights(weights: Sequence[float] | None, ranks: int) -> list[Fraction]:
    if weights is None:
        return [Fraction(1)] * ranks
    weights = list(weights)
    if len(weights) != ranks:
        raise ValueError(f"weights must be {ranks} numbers, one for each rank, got {len(weights)}")
    exact: list[Fraction] = []
    for rank, weight in enumerate(weights):
        try:
            exact.append(Fraction(float(weight)))
        except (TypeError, ValueError, OverflowError):  # the last two: NaN and infinity
            raise ValueError(f"weights[{rank}] must be a finite number, got {weight!r}") from None
        if exact[-1] <= 0:
            raise ValueError(f"weights[{rank}] must be above 0, got {weight}: leave a rank out that is to hold nothing")
    return exact


def _split_heads(heads: int, kv_heads: int, weights: Sequence[Fraction]) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """(query heads, KV heads) by rank."""
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, {kv_heads}, got {heads}")
    group, ranks = heads // kv_heads, len(weights)
    if kv_heads >= ranks:
        kv = _ranges(shares(kv_heads, weights))
        return tuple(range(part.start * group, part.stop * group) for part in kv), kv
    # Several ranks to a KV head, its query heads shared out among them: were a rank's query heads those of two KV heads in
    # unequal numbers, its attention would not be of the model's form.
    query: list[range] = []
    held: list[range] = []
    for kv_head, members in enumerate(_teams(kv_heads, weights)):
        counts = _shares_or_none(group, [weights[rank] for rank in members])
        query += _ranges(counts, kv_head * group)
        held += [range(kv_head, kv_head + (count > 0)) for count in counts]
    return tuple(query), tuple(held)


def _teams(kv_heads: int, weights: Sequence[Fraction]) -> list[range]:
    """Ranks of each KV head, neighbours, at least one each, such that the lightest team is as heavy as can be.

    A border search over sums of neighbours: best[h][r] is how heavy the lightest of h + 1 teams of the first r ranks can be,
    and where its last team then begins.
    """
    sums = [Fraction(0), *accumulate(weights)]
    ranks = len(weights)
    best: list[list[tuple[Fraction, int]]] = [[(s, 0) for s in sums]]
    for team in range(1, kv_heads):
        row = [(Fraction(0), 0)] * (team + 1)
        for end in range(team + 1, ranks + 1):
            options = [(min(best[-1][begin][0], sums[end] - sums[begin]), begin) for begin in range(team, end)]
            row.append(max(options))  # of equals the last border: earlier teams are the larger ones
        best.append(row)
    borders = [ranks]
    for row in reversed(best):
        borders.append(row[borders[-1]][1])
    return [range(*pair) for pair in pairwise(reversed(borders))]


def _shares_or_none(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`shares`, and where there are fewer units than ranks, one for each of the first ones by weight."""
    if total >= len(weights):
        return shares(total, weights)
    chosen = sorted(range(len(weights)), key=lambda rank: (-weights[rank], rank))[:total]
    return [int(rank in chosen) for rank in range(len(weights))]


def _split_inner(what: str, size: int, weights: Sequence[Fraction]) -> tuple[range, ...]:
    narrow = _split_units(what, size, UNIT, weights)
    if -(-size // WIDE_UNIT) < len(weights):
        return narrow
    wide = _split_units(what, size, WIDE_UNIT, weights)
    return wide if _fullest(wide, weights) <= _UNEVEN * _fullest(narrow, weights) else narrow


def _fullest(parts: Sequence[range], weights: Sequence[Fraction]) -> Fraction:
    return max(len(part) / weight for part, weight in zip(parts, weights, strict=True))


def _split_units(what: str, size: int, unit: int, weights: Sequence[Fraction]) -> tuple[range, ...]:
    """Ranges whose borders are multiples of `unit`; the end is `size`."""
    units = -(-size // unit)
    if units < len(weights):
        raise ValueError(f"{what} {size} makes {units} parts of {unit}, fewer than {len(weights)} ranks: use at most {units}")
    return tuple(range(part.start * unit, min(part.stop * unit, size)) for part in _ranges(shares(units, weights)))


def _ranges(counts: Sequence[int], start: int = 0) -> tuple[range, ...]:
    return tuple(range(*pair) for pair in pairwise([start, *(start + end for end in accumulate(counts))]))
