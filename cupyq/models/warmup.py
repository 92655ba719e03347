"""Compiling, before its first use, what a model launches."""

from typing import Any

import numpy as np

from cupyq import _kernels

# Rows for which ops/qmatmul.py and ops/lora.py take different kernels: of prompts with a cache, and of texts without one,
# whose projections are not joined. Steps of so many texts take the same.
_PROMPTS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1025)
_TEXTS = (1, 8, 16, 32, 64, 129)


def compile_kernels(model: Any, adapters: Any = None, cache: str = "fp16") -> None:
    """Compile, in parallel, what prompts and decoding steps launch."""
    compile_traced(trace_kernels(model, adapters, cache))


def compile_traced(wanted: list[tuple[_kernels.Instance, str]]) -> None:
    """Compile, in parallel, those of the kernels that the cache lacks."""
    if wanted:
        _kernels.compile_all([instance for instance, _ in wanted], wanted[0][1])


def trace_kernels(model: Any, adapters: Any = None, cache: str = "fp16") -> list[tuple[_kernels.Instance, str]]:
    """Each kernel that prompts and decoding steps launch, and its architecture: they are run with the launches left out.

    cache: the kind of the cache for both.
    """
    capacity = min(_PROMPTS[-1], model.config.max_seq_len)
    with _kernels.tracing() as wanted:
        kept = model.new_cache(capacity=capacity, kind=cache)
        for length in _shortened(_PROMPTS, capacity):
            kept.reset()
            model.forward(np.zeros(length, np.int32), kept, last_only=True, adapters=adapters)
        for length in _shortened(_TEXTS, capacity):
            model.forward(np.zeros(length, np.int32), adapters=adapters)
        decoder = model.decoder(max_len=capacity, adapters=adapters, graph=False, cache=cache)
        decoder.start([np.zeros(1, np.int32)])
        decoder.run(min(1, capacity - 1))
    return wanted


def _shortened(lengths: tuple[int, ...], most: int) -> list[int]:
    return list(dict.fromkeys(min(length, most) for length in lengths))
