"""Quantized matrices of random codes: timing needs no meaningful weights, only valid ones of the right layout."""

import math
import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kind:
    """How a matrix is quantized. `parts`: (bits, share of the rows, rows of a group), bits falling."""

    name: str
    is_gptq: bool
    parts: tuple[tuple[int, float, int], ...]
    has_act_order: bool
    """Rows in the order of their importance: always so in EXL2, `desc_act` in GPTQ."""

    @property
    def layout(self):
        """As text: 8x0.05g32+4x0.95g128 is 5 % of the rows at 8 bits in groups of 32, the others at 4 in groups of 128."""
        parts = (f"{bits}g{group}" if share == 1 else f"{bits}x{share:g}g{group}" for bits, share, group in self.parts)
        return f"{'gptq' if self.is_gptq else 'exl2'}:{'+'.join(parts)}{':act-order' if self.has_act_order else ''}"

    def groups(self, k):
        """(bits [G], rows [G]) of a matrix of k rows, cut as exllamav2's converter does; the last group may be shorter."""
        bits, rows, left = [], [], k
        for position, (width, share, group) in enumerate(self.parts):
            is_last = position == len(self.parts) - 1
            count = math.ceil((left if is_last else min(k * share, left)) / group)
            for _ in range(count):
                bits.append(width)
                rows.append(min(group, left))
                left -= rows[-1]
        return np.array(bits, np.int32), np.array(rows, np.int32)

    def weight_bytes(self, k, n):
        """Bytes of codes, scales and zeros as the format stores them; permutations and tables of a few KB do not count."""
        bits, rows = self.groups(k)
        codes = int((bits.astype(np.int64) * rows).sum()) * n // 8
        if self.is_gptq:
            return codes + len(bits) * n * 2 + len(bits) * n * int(bits[0]) // 8
        return codes + len(bits) * (n // 2 + 2)

    def product_bytes(self, rows, k, n):
        """What a product of `rows` rows must move at least: the weights, x and y, both of 16 bits."""
        return self.weight_bytes(k, n) + 2 * rows * (k + n)


# Layouts such as exllamav2's converter makes (its menu of parameters, conversion/qparams.py, has others of these kinds).
MIXTURES = {
    "2.5": ((3, 0.5, 64), (2, 0.5, 64)),  # as gate and up of a model of about 2.5 bits, with more rows at 3
    "4.65": ((8, 0.05, 32), (5, 0.4, 128), (4, 0.55, 128)),  # as down_proj of a model of about 4.65 bits
}
# The layouts the converter gives the head for `--head-bits`.
HEADS = {
    2: ((4, 0.3, 32), (2, 0.7, 32)),
    3: ((4, 0.15, 32), (3, 0.85, 32)),
    4: ((6, 0.15, 32), (4, 0.85, 32)),
    5: ((6, 0.15, 128), (5, 0.85, 128)),
    6: ((8, 0.15, 128), (6, 0.85, 128)),
    8: ((8, 1, 128),),
}
EXL2_WIDTHS, GPTQ_WIDTHS = (2, 3, 4, 5, 6, 8), (2, 3, 4, 8)


def parse_kind(text):
    """The Kind that `--bits` names: 4, 4-g32, 2.5, 4.65, gptq-g128, gptq8-g32, gptq-act (4 bits, groups of 128)."""
    if text in MIXTURES:
        return Kind(text, False, MIXTURES[text], True)
    match = re.fullmatch(r"(gptq)?(\d?)(?:-g(\d+))?(-act)?", text)
    is_gptq = bool(match and match[1])
    widths = GPTQ_WIDTHS if is_gptq else EXL2_WIDTHS
    bits = int(match[2] or (4 if is_gptq else 0)) if match else 0
    group = int(match[3] or 128) if match else 0
    if bits not in widths or (match[4] and not is_gptq) or group % 32 or group == 0:
        raise ValueError(
            f"--bits: {text!r} is no kind of matrix; name widths such as 4 or 4-g32 (groups of a multiple of 32), "
            f"mixtures ({', '.join(MIXTURES)}), or gptq-g32, gptq8-g128, gptq-act"
        )
    return Kind(text, is_gptq, ((bits, 1, group),), bool(match[4]) or not is_gptq)


def head_kind(bits):
    """The Kind of a head, as the converter lays it out."""
    if bits not in HEADS:
        raise ValueError(f"--head-bits: {bits}, expected one of {', '.join(map(str, HEADS))}")
    return Kind(f"head {bits}", False, HEADS[bits], True)


class Words:
    """Random 32-bit words, at least as many as were asked for at once: arrays taken from here share them."""

    def __init__(self, xp, count, seed=0):
        block = np.random.default_rng(seed).integers(-(2**31), 2**31, min(count, 1 << 22), np.int32)
        # Repeated after 16 MiB: cheap on the host, and no kernel or memory can tell.
        self._words = xp.asarray(np.resize(block, count))

    def take(self, *shape):
        count = math.prod(shape)
        if count > self._words.size:
            raise ValueError(f"{count} words asked for, {self._words.size} were made")
        return self._words[:count].reshape(shape)


def words_needed(k, n):
    """Enough for any matrix of this size."""
    return k * n // 4


def random_tensors(kind, k, n, words, xp=np, seed=0):
    """The checkpoint's tensors of one matrix, valid and random; the large ones are views of `words`, on its library `xp`.

    Weights are about as large whatever the width, so that in a mixture every part shows in an error.
    """
    if k % 32 or n % 32:
        raise ValueError(f"a matrix of {k} x {n}: both must be multiples of 32")
    rng = np.random.default_rng(seed)
    bits, rows = kind.groups(k)
    groups = len(bits)
    # Codes reach 2**(bits - 1) from their zero; 1 / sqrt(k) keeps y of the size of x.
    largest = 4 / np.sqrt(k) / 2.0 ** (bits - 1)
    if kind.is_gptq:
        width, group = int(bits[0]), kind.parts[0][2]
        scales = (rng.uniform(0.25, 1, 8191) * largest[0]).astype(np.float16)
        tensors = {
            "qweight": words.take(k * width // 32, n),
            "qzeros": words.take(groups, n * width // 32),
            "scales": xp.asarray(np.resize(scales, (groups, n))),
        }
        if kind.has_act_order or k % group:  # without it, readers infer groups of one size
            order = rng.permutation(k) if kind.has_act_order else np.arange(k)
            tensors["g_idx"] = (order // group).astype(np.int32)
        return tensors
    qwords = rows * bits // 32
    table = np.stack([bits, np.cumsum(qwords) - qwords], axis=1)
    return {
        "q_weight": words.take(int(qwords.sum()), n),
        "q_scale": words.take(groups, n // 8),
        "q_scale_max": largest.astype(np.float16),
        "q_groups": table.astype(np.uint16).view(np.int16).reshape(-1),
        "q_invperm": rng.permutation(k).astype(np.int32),
    }
