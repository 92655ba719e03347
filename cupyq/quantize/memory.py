"""How much memory a quantization takes, before it begins."""

import math
from collections.abc import Mapping

import numpy as np

from cupyq.quantize.request import Request
from cupyq.quantize.walk import LayerWalk


def peak_bytes(walk: LayerWalk, shapes: Mapping[str, tuple[int, int]], ids: np.ndarray, request: Request) -> int:
    """An estimate of the most memory in use at a time: of the GPU, or without one, of the host.

    shapes: (K, N) of the linear layers to be quantized, by name; ids: the calibration rows.
    """
    config, wide, length = walk.config, walk.dtype.itemsize, ids.shape[1]
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    hidden = 2 * 4 * ids.size * config.hidden_size  # of the original model, and of the quantized one
    if not request.is_gptq and request.sensitivity_tokens:
        tokens = min(ids.size, max(length, request.sensitivity_tokens))
        hidden = max(hidden, 4 * (7 * len(walk) + 1) * tokens * config.hidden_size)
    layers = [0] * len(walk)
    for name, size in sizes.items():
        if name != "lm_head":
            layers[int(name.split(".")[2])] += size
    # A layer twice, as the two models have it, or the head.
    weights = wide * max(2 * max(layers), config.hidden_size * config.vocab_size)
    # H and C, an ordered copy, the factor and a copy of it on the way in float64; A, H and C in float32
    hessian = 52 * max(k for k, _ in shapes.values()) ** 2
    # R in float64 and float32, W, W', its error and its values in float32, codes, and what an element-wise expression makes
    # on the way
    matrix = 42 * max(sizes.values())
    tokens = max(walk.batch_tokens, length)
    # Attention in float64 keeps all scores of a batch, on NumPy only.
    scores = 16 * tokens * length * config.num_attention_heads if walk.xp is np else 0
    # Of both models: residuals and one input of the original's are kept while the other runs.
    activations = 4 * tokens * (10 * config.hidden_size + 5 * config.intermediate_size) + scores
    return hidden + weights + hessian + max(matrix, activations)
