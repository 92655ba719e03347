"""The rows of a batch, each drawn by settings of its own: texts and counters stay where the logits are and move on there."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyq._copies import copy_values
from cupyq.models.sampler import SamplerSettings, penalize_arguments, sample_arguments, token_mask
from cupyq.ops.advance import advance
from cupyq.ops.penalties import PenaltyTable, penalize
from cupyq.ops.sampling import SamplerTable, sample, sample_workspace_size

_NEUTRAL = SamplerSettings.greedy()
_ROW_BYTES = 8 + 4 * 4  # what `_fields` tells of a row


@dataclass(frozen=True)
class RowState:
    """Where a row stands: `token` is the last of `length` tokens and is fed next; `step` picks its next random number."""

    token: int = 0
    length: int = 1
    step: int = 0
    mu: float = 0.0
    history: Sequence[int] = ()
    """All tokens, where settings look back."""


@dataclass(frozen=True)
class RowSettings:
    settings: SamplerSettings = field(default_factory=SamplerSettings.greedy)
    seed: int = 0


@dataclass
class _Span:
    """Rows begin to end - 1, which one call can draw."""

    begin: int
    end: int
    table: SamplerTable
    penalties: PenaltyTable | None
    to_penalize: dict[str, Any]
    to_sample: dict[str, Any]


class Rows:
    """`count` rows: ids, what is fed next; positions, where that goes; lengths, tokens of each; int32 [count] each.

    They stay the same objects: a captured pass reads them. `draw` moves the rows it draws one token further.
    """

    def __init__(self, xp: Any, vocab_size: int, count: int):
        self._xp, self._vocab_size, self.count = xp, vocab_size, count
        self._memory = xp.empty(_ROW_BYTES * count, np.uint8)  # of all five, so that one copy puts all rows
        self.steps, self.mu, self.ids, self.positions, self.lengths = self._fields = _fields(self._memory)
        self._history = xp.zeros((count, 0), np.int32)
        self._spans: list[_Span] = []
        self._configured: list[RowSettings] = []
        self.put_all([])

    # --- where they stand ---

    def put(self, row: int, state: RowState, most: int = 0) -> None:
        """Row `row` stands there now; its text may grow to `most` tokens, if its settings look back."""
        for array, value in zip(self._fields, _fields(self._xp.asarray(_host_memory([state]))), strict=True):
            copy_values(value, array[row : row + 1])
        self._tell(row, state, most)

    def put_all(self, states: Sequence[RowState]) -> None:
        """The first len(states) rows, in one go; nobody's are those behind."""
        idle = [RowState()] * (self.count - len(states))
        copy_values(self._xp.asarray(_host_memory([*states, *idle])), self._memory)
        most = max((len(state.history) for state in states), default=0)
        for row, state in enumerate(states):
            self._tell(row, state, most)

    def _tell(self, row: int, state: RowState, most: int) -> None:
        """What the text of a row is, if its settings look back."""
        if len(state.history):
            self._widen(most)
            said = self._xp.asarray(np.array(state.history, np.int32))
            copy_values(said, self._history[row, : len(said)])

    def move(self, source: int, to: int) -> None:
        """Row `to` becomes what row `source` is, tokens included that the host has not seen."""
        for array in self._fields:
            copy_values(array[source : source + 1], array[to : to + 1])
        if self._history.shape[1]:
            copy_values(self._history[source], self._history[to])

    def _widen(self, most: int) -> None:
        if most > self._history.shape[1]:
            wider = self._xp.zeros((self.count, 1 << (most - 1).bit_length()), np.int32)
            wider[:, : self._history.shape[1]] = self._history
            self._history = wider

    # --- how they are drawn ---

    def configure(self, rows: Sequence[RowSettings]) -> None:
        """The settings of the first len(rows) rows. Free where they are the same objects as before."""
        if len(rows) == len(self._configured) and all(map(operator.is_, rows, self._configured)):
            return
        self._configured = list(rows)
        self._spans, begin = [], 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or _kind(rows[end].settings) != _kind(rows[begin].settings):
                self._spans.append(self._span(begin, rows[begin:end]))
                begin = end

    def _span(self, begin: int, rows: Sequence[RowSettings]) -> _Span:
        settings = [row.settings for row in rows]
        looks_back = any(one.looks_back for one in settings)
        to_penalize, to_sample = {}, {}
        if looks_back and settings[0].dry_breakers:
            to_penalize["dry_breakers"] = self._xp.asarray(
                token_mask(settings[0].dry_breakers, self._vocab_size, "dry_breakers")
            )
        biased = max(len(one.token_bias) for one in settings)
        if biased:
            ids, bias = np.zeros((len(rows), biased), np.int32), np.zeros((len(rows), biased), np.float32)
            for row, one in enumerate(settings):
                # Of an id's biases the last counts: what fills a row up stands first, and adds nothing.
                fill = biased - len(one.token_bias)
                ids[row, :fill] = next(iter(one.token_bias), 0)
                ids[row, fill:], bias[row, fill:] = list(one.token_bias), list(one.token_bias.values())
            to_penalize |= {"bias_ids": self._xp.asarray(ids), "bias": self._xp.asarray(bias)}
        if settings[0].xtc_protected:
            protected = token_mask(settings[0].xtc_protected, self._vocab_size, "xtc_protected")
            to_sample["xtc_mask"] = self._xp.asarray(~protected)
        if any(one.mirostat_tau > 0 for one in settings):
            to_sample["mirostat_mu"] = self.mu[begin : begin + len(rows)]
        workspace_size = sample_workspace_size(len(rows), self._vocab_size)
        if workspace_size and self._xp is not np:
            to_sample["workspace"] = self._xp.empty(workspace_size, np.uint8)
        seeds = np.array([row.seed for row in rows], np.uint64)
        table = SamplerTable(len(rows), self._xp, seed=seeds, **_of_all(map(sample_arguments, settings)))
        penalties = None
        if looks_back or biased:
            back = [one if one.looks_back else _NEUTRAL for one in settings]
            penalties = PenaltyTable(len(rows), self._xp, **_of_all(map(penalize_arguments, back)))
        return _Span(begin, begin + len(rows), table, penalties, to_penalize, to_sample)

    def draw(self, logits: Any, allowed: Mapping[int, np.ndarray] | None = None) -> Any:
        """`ids` of the rows that settings were given for, drawn from float32 logits [rows, vocab], which penalties change.

        allowed: masks bool [vocab] of the rows that have one. -1 stands for a row without a finite logit.
        """
        allowed = allowed or {}
        for span in self._spans:
            rows = slice(span.begin, span.end)
            part, masks = logits[rows], self._masks(span, allowed)
            if span.penalties is not None or masks is not None:
                table = span.penalties or PenaltyTable(span.end - span.begin, self._xp)
                lengths = self.lengths[rows] if self._history.shape[1] else None
                penalize(part, self._history[rows], lengths, table=table, allowed=masks, out=part, **span.to_penalize)
            sample(part, table=span.table, step=self.steps[rows], out=self.ids[rows], **span.to_sample)
        count = self._spans[-1].end
        history = self._history[:count] if self._history.shape[1] else None
        advance(*(array[:count] for array in (self.ids, self.positions, self.lengths, self.steps)), None, history)
        return self.ids[:count]

    def _masks(self, span: _Span, allowed: Mapping[int, np.ndarray]) -> Any:
        if not any(row in allowed for row in range(span.begin, span.end)):
            return None
        masks = np.ones((span.end - span.begin, self._vocab_size), bool)
        for row in range(span.begin, span.end):
            if row in allowed:
                masks[row - span.begin] = allowed[row]
        return self._xp.asarray(masks)


def _fields(memory: Any) -> tuple[Any, ...]:
    """steps, mu, ids, positions and lengths of as many rows as there is memory for."""
    count = len(memory) // _ROW_BYTES
    fields, begin = [], 0
    for dtype in (np.int64, np.float32, np.int32, np.int32, np.int32):
        end = begin + np.dtype(dtype).itemsize * count
        fields.append(memory[begin:end].view(dtype))
        begin = end
    return tuple(fields)


def _host_memory(states: Sequence[RowState]) -> np.ndarray:
    memory = np.empty(_ROW_BYTES * len(states), np.uint8)
    steps, mu, ids, positions, lengths = _fields(memory)
    steps[:] = [state.step for state in states]
    mu[:] = [state.mu for state in states]
    ids[:] = [state.token for state in states]
    lengths[:] = [state.length for state in states]
    positions[:] = lengths - 1
    return memory


def _kind(settings: SamplerSettings) -> tuple:
    """What all rows of one call have in common."""
    breakers = tuple(settings.dry_breakers) if settings.dry_multiplier > 0 else ()
    return breakers, tuple(settings.xtc_protected) if settings.xtc_probability > 0 else ()


def _of_all(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Each argument of all rows: one number where all have the same, for which ops take their shorter ways, or an array."""
    rows = list(rows)
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: each[0] if all(one == each[0] for one in each) else np.array(each) for name, each in values.items()}
