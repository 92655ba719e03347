"""How well a model predicts a text, and how far it is from the model it was quantized from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq._copies import to_host
from cupyq.generate.generator import check_ids

_LOGITS_BYTES = 256 << 20  # float32 logits of one batch: bounds the copy to the host


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    """exp of the mean negative log-likelihood."""
    tokens: int
    """Predicted tokens: windows x (window - 1)."""
    kl: float | None
    """Mean over the predicted tokens of KL(reference || model), in nats; None without a reference."""
    top1: float | None
    """Share of the predicted tokens where model and reference hold the same token most likely; None without a reference."""
    windows: int


def perplexity(
    model: Any,
    ids: Sequence[int] | np.ndarray,
    *,
    window: int = 256,
    reference: Any = None,
    max_windows: int | None = None,
    batch: int = 8,
    cache: str | None = None,
    on_windows: Callable[[int], Any] | None = None,
) -> Perplexity:
    """exp(mean of -log p(token | tokens before it in the window)) over non-overlapping windows of `ids`.

    Each window is a text of its own, of which tokens 1, 2, ... are predicted; a last window that is not full is dropped.
    Log-probabilities are float64, computed on the host. With `cache`, a kind as `Model.new_cache` takes it, the model is fed
    token by token through such a cache, as when it generates; the reference never is. `max_windows` stops early;
    `on_windows(count)` is called after each batch. ValueError for a text shorter than a window, ids outside the vocabulary, a
    window longer than a model's context, and a reference with another vocabulary.
    """
    models = [model] if reference is None else [model, reference]
    vocab = model.config.vocab_size
    if reference is not None and reference.config.vocab_size != vocab:
        raise ValueError(
            f"the reference has {reference.config.vocab_size} tokens in its vocabulary, the model {vocab}: "
            "take the model it was quantized from"
        )
    limit = min(m.config.max_seq_len for m in models)
    if not 2 <= window <= limit:
        raise ValueError(f"window must be from 2 to {limit}, the model's context, got {window}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be 1 or more, got {max_windows}")
    tokens = np.array(check_ids(ids, vocab, "ids"), np.int32)
    count = len(tokens) // window
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one window of {window}: take a longer text or a smaller window"
        )
    count = count if max_windows is None else min(count, max_windows)
    windows = tokens[: count * window].reshape(count, window)
    batch = max(1, min(batch, _LOGITS_BYTES // (4 * window * vocab)))

    losses, divergences, agreements = [], [], 0
    for begin in range(0, count, batch):
        part = windows[begin : begin + batch]
        rows = [to_host(m.forward(m.xp.asarray(part))) for m in models[1:]]
        rows.insert(0, _token_by_token(model, part, cache) if cache else to_host(model.forward(model.xp.asarray(part))))
        for index, targets in enumerate(part[:, 1:]):
            log_p = log_softmax(rows[0][index, : window - 1])
            losses.append(-math.fsum(log_p[np.arange(window - 1), targets]))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the model's logits in window {begin + index} are not finite: its weights are damaged")
            if reference is not None:
                log_q = log_softmax(rows[1][index, :-1])
                divergences.append(math.fsum(np.sum(np.exp(log_q) * (log_q - log_p), axis=-1)))
                agreements += int(np.count_nonzero(log_p.argmax(-1) == log_q.argmax(-1)))
        if on_windows is not None:
            on_windows(len(part))
    predicted = count * (window - 1)
    mean = math.fsum(losses) / predicted
    return Perplexity(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        tokens=predicted,
        kl=None if reference is None else math.fsum(divergences) / predicted,
        top1=None if reference is None else agreements / predicted,
        windows=count,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log(exp(x) / sum(exp(x))) over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def _token_by_token(model: Any, ids: np.ndarray, kind: str) -> np.ndarray:
    """Logits of every position but the last, each of the tokens before it in a cache: float32 [batch, window - 1, vocab]."""
    cache = model.new_cache(batch=len(ids), capacity=ids.shape[1] - 1, kind=kind)
    tokens = model.xp.asarray(np.ascontiguousarray(ids.T))
    return np.concatenate([to_host(model.forward(column[:, None], cache)) for column in tokens[:-1]], axis=1)
