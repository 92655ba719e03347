"""Compiling, before its first use, what a model launches."""

from typing import Any

import numpy as np

from cupyq import _kernels
from cupyq.ops.sampling import sample

_TRACED_LENGTHS = (1, 8, 16, 32, 64, 128)  # prompts for which ops/qmatmul.py and ops/lora.py take different kernels


def compile_kernels(model: Any, adapters: Any = None) -> None:
    """Compile, in parallel, what prompts and decoding steps launch: they are run with the launches left out."""
    capacity = min(_TRACED_LENGTHS[-1] + 1, model.config.max_seq_len)
    with _kernels.tracing() as wanted:
        cache = model.new_cache(capacity=capacity)
        for seq in _TRACED_LENGTHS:
            cache.reset()
            model.forward(np.zeros(min(seq, capacity), np.int32), cache, adapters=adapters)
        # A step behind many keys, which attention spreads over several blocks and then combines.
        cache.truncate(min(cache.length, capacity - 1))
        logits = model.forward([0], cache, adapters=adapters)
        sample(logits.reshape(1, -1))
        model.forward(np.zeros(capacity, np.int32), adapters=adapters)
    if wanted:
        _kernels.compile_all([instance for instance, _ in wanted], wanted[0][1])
