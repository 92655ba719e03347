"""How much memory a quantization takes, before it begins: the most of its phases, each the sum of what it holds at its worst.

Shapes are (K, N) of linear layers, by name. Where there is no GPU, products are made in float64, one at a time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cupyq.quantize import gather
from cupyq.quantize.request import Request
from cupyq.quantize.walk import HEAD, LayerWalk

Shapes = Mapping[str, tuple[int, int]]

_FED = 2048  # tokens of which a Hessian holds float32 copies
_ATTENTION_SCORES, _ATTENTION_QUERIES = 1 << 22, 64  # float64, at a time, on NumPy
_DIVERGENCE_BYTES = 128 << 20  # of float64 log-probabilities, as `sensitivity` cuts its tokens
_LOGITS_BYTES = 256 << 20  # of float32 logits, as `perplexity` cuts its windows
_SCRATCH = 16 << 20  # of what does not grow with the model: tokenizer, tables, a search's candidates


def work_bytes(
    walk: LayerWalk, shapes: Shapes, ids: np.ndarray, request: Request, is_on_host: Callable[[int], bool], measures: bool
) -> int:
    """Of choosing layouts (if `measures`) and quantizing: an estimate of the most memory in use at a time, of the GPU, or
    without one, of the host.

    ids: the calibration rows. is_on_host(bytes): whether hidden states of so many are kept off the GPU.
    """
    states = 4 * ids.size * walk.config.hidden_size

    def on_device(size: int) -> int:
        return 0 if is_on_host(size) else size

    layer = max(_layer_bytes(walk, shapes))
    passing = _passing_bytes(walk, shapes, ids.shape[1], max(ids.shape[1], min(walk.batch_tokens, ids.size)))
    found = [_end_bytes(walk) + on_device(2 * states) + passing]
    decoder = {name: shape for name, shape in shapes.items() if name != HEAD}
    fitting = _fitting_bytes(decoder, _hessian_bytes(walk, shapes, by_stage=True), passing)
    found += [on_device(2 * states) + 2 * layer + fitting]
    # Linear layers that are stored as one, on their way into a layer: as they are stored, and each for itself.
    found += [on_device(2 * states) + 2 * layer + 2 * walk.dtype.itemsize * walk.most_apart]
    if not request.is_gptq:
        fitting = _fitting_bytes({HEAD: shapes[HEAD]}, gather.most_bytes([(shapes[HEAD][0], False)]), 0)
        found += [on_device(2 * states) + _end_bytes(walk) + fitting]
    if measures:
        fitting = _fitting_bytes(decoder, _hessian_bytes(walk, shapes, by_stage=False), passing)
        found += [on_device(states) + layer + fitting]
        tokens = min(ids.size, max(ids.shape[1], request.sensitivity_tokens))
        copies = on_device(4 * (7 * len(walk) + 1) * tokens * walk.config.hidden_size)
        predicting = 6 * min(_DIVERGENCE_BYTES, 8 * tokens * walk.config.vocab_size)
        found += [copies + layer + passing, copies + _end_bytes(walk) + predicting]
    return max(found) + _SCRATCH


def comparison_bytes(walk: LayerWalk, shapes: Shapes, window: int, quantized: int) -> int:
    """Of both models at once, over windows of so many tokens; quantized: bytes of the quantized one's linear layers."""
    config, wide = walk.config, walk.dtype.itemsize
    linears = sum(map(math.prod, shapes.values()))
    embedding = config.vocab_size * config.hidden_size
    models = wide * (linears + embedding) + _end_bytes(walk)
    # NumPy multiplies with quantized weights that it has decoded, and keeps them.
    models += 4 * linears if walk.xp is np else quantized
    windows = max(1, min(8, _LOGITS_BYTES // (4 * window * config.vocab_size)))
    logits = window * config.vocab_size
    # float32 of one model, beside what makes the other's, in float64 on NumPy; then float64 of a window, step by step.
    making = (12 if walk.xp is np else 8) * windows * logits
    logits_bytes = 4 * windows * logits + max(making, 4 * windows * logits + 40 * logits)
    return models + max(logits_bytes, _passing_bytes(walk, shapes, window, windows * window)) + _SCRATCH


# --- parts of phases --------------------------------------------------------------------------------------------------


def _layer_bytes(walk: LayerWalk, shapes: Shapes) -> list[int]:
    """Weights of each layer."""
    sizes = [0] * len(walk)
    for name, shape in shapes.items():
        if name != HEAD:
            sizes[int(name.split(".")[2])] += walk.dtype.itemsize * math.prod(shape)
    return sizes


def _end_bytes(walk: LayerWalk) -> int:
    """The embedding, or the head, with what a product of it takes beside it."""
    per_weight = walk.dtype.itemsize + (8 if walk.xp is np else 0)
    return per_weight * walk.config.hidden_size * walk.config.vocab_size


def _passing_bytes(walk: LayerWalk, shapes: Shapes, length: int, tokens: int) -> int:
    """Activations of a batch in a layer; of both models, residuals and one input of the original's are kept while the other
    runs."""
    config = walk.config
    inner, width = config.intermediate_size, config.num_attention_heads * config.head_dim
    activations = 4 * tokens * (8 * config.hidden_size + 3 * inner + 4 * width)
    if walk.xp is not np:
        return activations
    product = max(8 * (tokens * (k + n) + k * n) for name, (k, n) in shapes.items() if name != HEAD)
    heads = config.num_attention_heads
    scores = 8 * heads * length * min(length, _ATTENTION_QUERIES, max(1, _ATTENTION_SCORES // (heads * length)))
    scores *= 2 if config.attention_softcap is None else 4  # those of a block, and of the one before it
    attention = 16 * tokens * width + scores
    return activations + max(product, attention)


def _fitting_bytes(shapes: Shapes, held: int, passing: int) -> int:
    """Hessians, of which the inputs' take `held` bytes, what goes into them, and what is made of one: a quantized weight."""
    k, size = max(k for k, _ in shapes.values()), max(map(math.prod, shapes.values()))
    feeding = passing + 12 * _FED * k + 4 * k**2
    # An ordered copy, the factor and a copy of it in float64; A, H and C in float32. Then, beside these: W, W', its error and
    # its values in float32, codes, and what an element-wise expression makes on the way.
    return held + max(feeding, 36 * k**2, 12 * k**2 + 42 * size)


def _hessian_bytes(walk: LayerWalk, shapes: Shapes, by_stage: bool) -> int:
    """Of the inputs whose Hessians are gathered at the same time, the most: of a layer's, or of one of its stages."""
    row = walk.config.architecture
    found: dict[Any, list[tuple[int, bool]]] = {}
    for name, (k, _) in shapes.items():
        short = name.rpartition(".")[2]
        # These read what q and gate read.
        if name != HEAD and short not in ("k_proj", "v_proj") and (row.gate is None or short != row.up):
            is_expert = row.has_experts and f".{row.experts}." in name
            found.setdefault((name.split(".")[2], short if by_stage else None), []).append((k, is_expert))
    return max(map(gather.most_bytes, found.values()))
