"""The Hessians of a layer's inputs: which of them can be had in one pass, and what experts that few tokens reach get."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from cupyq.quantize.hessian import Hessian, to_float32
from cupyq.quantize.recording import Beside, LayerInput
from cupyq.quantize.walk import LayerWalk

HESSIAN_BYTES = 6 << 30
"""Of Hessians gathered in one pass. Mixtures of experts may take more passes, for the same result."""


def stages(reads: Sequence[LayerInput]) -> list[list[LayerInput]]:
    """The inputs that do not depend on one another's weights: q/k/v; o; gate/up of all experts; down of all experts."""
    found: dict[str, list[LayerInput]] = {}
    for read in reads:
        found.setdefault(read.attribute, []).append(read)
    return list(found.values())


def chunks(reads: Sequence[LayerInput]) -> Iterator[list[LayerInput]]:
    """As many inputs as may have their Hessians in memory together."""
    chunk: list[LayerInput] = []
    size = 0
    for read in reads:
        own = 8 * read.k**2 if read.expert is not None else 24 * read.k**2
        if chunk and size + own > HESSIAN_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(read)
        size += own
    yield chunk


def gather(walk: LayerWalk, layer: Any, reads: Sequence[LayerInput], hidden: Any) -> dict[str, tuple[Hessian, int]]:
    """{name of an input: (its Hessian over all rows of hidden, tokens that reached it)}, as the layer's weights now are."""
    hessians = {read.name: Hessian(read.k, walk.xp, name=read.name) for read in reads}
    tokens = walk.record(layer, hidden, {name: hessian.add for name, hessian in hessians.items()})
    for attribute in {read.attribute for read in reads if read.expert is not None}:
        lend([hessians[read.name] for read in reads if read.expert is not None and read.attribute == attribute])
    return {name: (hessian, tokens[name]) for name, hessian in hessians.items()}


def gather_beside(
    walk: LayerWalk, layer: Any, reads: Sequence[LayerInput], hidden: Any, original: Any, original_hidden: Any
) -> dict[str, tuple[Hessian, int]]:
    """As `gather`, for two walks in step: tokens have weights, and what the original model does otherwise is gathered too.

    Not of experts, to which the two models may send different tokens.
    """
    beside = [read for read in reads if read.expert is None]
    found = gather(walk, layer, [read for read in reads if read.expert is not None], hidden)
    hessians = {read.name: Hessian(read.k, walk.xp, name=read.name) for read in beside}

    def feed(hessian: Hessian, x: Any, other: Beside) -> None:
        hessian.add(x, other.original, weights=other.weights, gap=other.gap)

    feeds = {name: partial(feed, hessian) for name, hessian in hessians.items()}
    tokens = walk.record_beside(layer, hidden, original, original_hidden, feeds)
    return found | {name: (hessian, tokens[name]) for name, hessian in hessians.items()}


def lend(hessians: Sequence[Hessian]) -> None:
    """Give experts that fewer tokens reached than they have features the mean token of all of them for each that lacks.

    A Hessian of few tokens is singular: what it does not know of would be quantized as if it never came.
    """
    total = sum(hessian.tokens for hessian in hessians)
    if not total or all(hessian.tokens >= hessian.k for hessian in hessians):
        return
    mean = hessians[0].sum / total  # their tokens have no weights
    for hessian in hessians[1:]:
        mean += hessian.sum / total
    for hessian in hessians:
        lacking = hessian.k - hessian.tokens
        if lacking > 0:
            hessian.sum += lacking * mean
            hessian.tokens += lacking
            hessian.total += lacking


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
