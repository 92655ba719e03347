"""The Hessians of a layer's inputs: which of them can be had in one pass, and what experts are lent beside their own tokens."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cupyq.quantize.hessian import Hessian, to_float32
from cupyq.quantize.recording import Beside, LayerInput
from cupyq.quantize.walk import LayerWalk

HESSIAN_BYTES = 6 << 30
"""Of Hessians gathered in one pass. Mixtures of experts may take more passes."""


def stages(reads: Sequence[LayerInput]) -> list[list[LayerInput]]:
    """The inputs that do not depend on one another's weights: q/k/v; o; gate/up of all experts; down of all experts."""
    found: dict[str, list[LayerInput]] = {}
    for read in reads:
        found.setdefault(read.attribute, []).append(read)
    return list(found.values())


def chunks(reads: Sequence[LayerInput]) -> list[list[LayerInput]]:
    """As many inputs as may have their Hessians in memory together."""
    ends = _ends([(read.k, read.expert is not None) for read in reads])
    return [list(reads[first:end]) for first, end in zip([0, *ends], ends, strict=False)]


def most_bytes(reads: Sequence[tuple[int, bool]]) -> int:
    """Of the Hessians of any chunk, the most, and loans; reads: (K, whether it is an expert's) of each input."""
    ends = _ends(reads)
    most = max(sum(_bytes(*read) for read in reads[first:end]) for first, end in zip([0, *ends], ends, strict=False))
    return most if len(ends) == 1 else most + max(_bytes(*read) for read in reads)


def _ends(reads: Sequence[tuple[int, bool]]) -> list[int]:
    """Where the chunks end."""
    ends, size = [], 0
    for place, read in enumerate(reads):
        if size and size + _bytes(*read) > HESSIAN_BYTES:
            ends.append(place)
            size = 0
        size += _bytes(*read)
    return [*ends, len(reads)]


def _bytes(k: int, is_expert: bool) -> int:
    return 8 * k**2 if is_expert else 24 * k**2  # H, and beside the original model C and R


def gather(
    walk: LayerWalk, layer: Any, reads: Sequence[LayerInput], hidden: Any, loans: Mapping[str, Any] | None = None
) -> dict[str, tuple[Hessian, int]]:
    """{name of an input: (its Hessian over all rows of hidden, tokens that reached it)}, as the layer's weights now are.

    loans: as `find_loans` found them, where `reads` are not all experts of the layer.
    """
    hessians = {read.name: Hessian(read.k, walk.xp, name=read.name) for read in reads}
    tokens = walk.record(layer, hidden, {name: hessian.add for name, hessian in hessians.items()})
    experts = [read for read in reads if read.expert is not None]
    if loans is None:
        loans = _loans((read, hessians[read.name].sum, hessians[read.name].tokens) for read in experts)
    for read in experts:
        lend(hessians[read.name], loans[read.attribute])
    return {name: (hessian, tokens[name]) for name, hessian in hessians.items()}


def gather_beside(
    walk: LayerWalk,
    layer: Any,
    reads: Sequence[LayerInput],
    hidden: Any,
    original: Any,
    original_hidden: Any,
    loans: Mapping[str, Any] | None = None,
) -> dict[str, tuple[Hessian, int]]:
    """As `gather`, for two walks in step: tokens have weights, and what the original model does otherwise is gathered too.

    Not of experts, to which the two models may send different tokens.
    """
    beside = [read for read in reads if read.expert is None]
    found = gather(walk, layer, [read for read in reads if read.expert is not None], hidden, loans)
    hessians = {read.name: Hessian(read.k, walk.xp, name=read.name) for read in beside}

    def feed(hessian: Hessian, x: Any, other: Beside) -> None:
        hessian.add(x, other.original, weights=other.weights, gap=other.gap)

    feeds = {name: partial(feed, hessian) for name, hessian in hessians.items()}
    tokens = walk.record_beside(layer, hidden, original, original_hidden, feeds)
    return found | {name: (hessian, tokens[name]) for name, hessian in hessians.items()}


# --- experts ----------------------------------------------------------------------------------------------------------


def lend(hessian: Hessian, loan: Any) -> None:
    """K tokens of the kind that `loan` is the mean of, to an expert's Hessian of K features: a matrix, or a number times I.

    Experts may see few tokens, or none. Fitted to no more tokens than it has features, a weight is worse for all others than
    plain rounding makes it: on the mixture of tests/models (K = 128, 3 bits), other tokens found an error of 26 % of the
    output after 128 tokens, 18 % after none, and with this loan 17 % after 0 and 128, as after all 2,215. What is lent
    counts for less the more tokens an expert has: there is no number of tokens from which all is different.
    """
    if isinstance(loan, float):
        hessian.sum.reshape(-1)[:: hessian.k + 1] += hessian.k * loan  # the diagonal
    else:
        hessian.sum += hessian.k * loan
    hessian.tokens += hessian.k
    hessian.total += hessian.k  # tokens of experts have no weights


def find_loans(walk: LayerWalk, layer: Any, reads: Sequence[LayerInput], hidden: Any) -> dict[str, Any]:
    """{attribute: what its experts are lent}, in a pass of its own, for `reads` whose Hessians are not in memory together."""
    experts = [read for read in reads if read.expert is not None]
    sums: dict[str, Any] = {}
    for read in experts:
        kind = _Squares if _is_inner(read) else Hessian
        sums.setdefault(read.attribute, kind(read.k, walk.xp))
    walk.record(layer, hidden, {read.name: sums[read.attribute].add for read in experts})
    one_each = {read.attribute: read for read in experts}
    return _loans((read, sums[attribute].sum, sums[attribute].tokens) for attribute, read in one_each.items())


def _loans(found: Iterable[tuple[LayerInput, Any, int]]) -> dict[str, Any]:
    """{attribute: loan} of (an input, its sum of x x^T or of |x|^2, its tokens).

    What gates read is the layer's input, the same features for every expert: the mean of x x^T. Of what the last projections
    read, feature 7 of one expert is no relative of feature 7 of another: no more than the mean square of a feature is lent.
    """
    sums: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    for read, own, count in found:
        if _is_inner(read):
            own = float(own if isinstance(own, float) else own.trace()) / read.k
        if read.attribute in sums:
            own = sums[read.attribute] + own
        sums[read.attribute] = own
        tokens[read.attribute] = tokens.get(read.attribute, 0) + count
    return {attribute: total / max(tokens[attribute], 1) for attribute, total in sums.items()}


def _is_inner(read: LayerInput) -> bool:
    return read.attribute == "down"


class _Squares:
    """Sums |x|^2, where a Hessian would sum x x^T."""

    def __init__(self, k: int, xp: Any):
        self.sum, self.tokens = 0.0, 0

    def add(self, x: Any) -> None:
        self.sum += float((to_float32(x) ** 2).sum(dtype=np.float64))
        self.tokens += len(x)


# --- what a layer makes -----------------------------------------------------------------------------------------------


def mean_square(hessian: Hessian, weight: Any) -> float:
    """Mean over tokens of |x W|^2 = tr(W^T H W), each as it counts; weight [K, N]. 0 without tokens."""
    if not hessian.total:
        return 0.0
    mean = (hessian.sum / hessian.total).astype(np.float32)
    total = 0.0
    for first in range(0, weight.shape[1], 4096):  # bounds the temporaries of a head
        part = to_float32(weight[:, first : first + 4096])
        total += float(((mean @ part) * part).sum(dtype=np.float64))
    return max(0.0, total)
