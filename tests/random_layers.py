"""Random quantized layers: checkpoint tensors of every width and mixture, of both formats."""

import numpy as np

from cupyq.formats import exl2, gptq


def random_exl2(rng, widths, *, n, group_blocks=2, last_blocks=1, has_perm=True, has_bias=False):
    """Checkpoint tensors of a layer with two groups of every width and a shorter last one."""
    bits = [b for b in widths for _ in range(2)] + [widths[-1]]
    rows = [32 * group_blocks] * (2 * len(widths)) + [32 * last_blocks]
    k = sum(rows)
    codes = np.concatenate([rng.integers(0, 1 << b, (r, n)) for b, r in zip(bits, rows, strict=True)]).astype(np.uint8)
    scale_max = (0.3 + rng.random(len(bits))).astype(np.float16)
    perm = rng.permutation(k) if has_perm else None
    tensors = exl2.pack_exl2(codes, rng.integers(0, 16, (len(bits), n)), scale_max, bits, rows, perm)
    if has_bias:
        tensors["bias"] = rng.standard_normal(n).astype(np.float16)
    return tensors


def random_gptq(rng, bits, *, k, n, groups, act_order=False, version="v1", has_bias=False):
    row_group = np.arange(k) * groups // k
    if act_order:
        row_group = rng.integers(0, groups, k)  # groups of any size, in any order
    low = 1 if version == "v1" else 0
    zeros = rng.integers(low, low + (1 << bits), (groups, n))
    scales = (0.01 + 0.05 * rng.random((groups, n))).astype(np.float16)
    tensors = gptq.pack_gptq(rng.integers(0, 1 << bits, (k, n)), zeros, scales, row_group, bits, version)
    if has_bias:
        tensors["bias"] = rng.standard_normal(n).astype(np.float16)
    return tensors


def to_gpu(cupy, tensors):
    return {key: cupy.asarray(value) for key, value in tensors.items()}


MIXTURES = [(2,), (3,), (4,), (5,), (6,), (8,), (8, 6, 5, 4, 3, 2), (5, 4), (6, 3), (8, 2), (4, 3, 2)]
