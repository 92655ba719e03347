"""Drawing tokens from logits, and the counter-based random numbers behind it."""

import math
import operator

import numpy as np

from cupyq._arrays import (
    FLOATS,
    accepts_dlpack,
    check,
    int32,
    is_cupy,
    namespace,
    output,
    refuse_partial_overlap,
    require_cupy,
)
from cupyq._kernels import instance, launch
from cupyq.ops._common import vector_width

MAX_VOCAB = 1 << 23
"""Weights are at most 2**40: their sum stays below 2**63."""


@accepts_dlpack
def sample(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=0, out=None):
    """One token id per row, drawn from softmax(logits / temperature) after top-k, then top-p, then min-p.

    logits [rows, vocab] float16, bfloat16 or float32 -> int32 [rows]. Every setting is one number for all rows, or an
    array [rows]. Where logits is a CuPy array, NumPy arrays of settings are uploaded in one copy, and CuPy arrays are
    used as they are, their values unchecked; they must be float32 (temperature, top_p, min_p), int32 (top_k), int64 or
    uint64 (seed, step).

    Tokens are ordered by logit, descending, ties by lowest id.
    temperature  0 takes the first token of the order. Must be finite; rounded to float32, as top_p and min_p are.
    top_k        keeps the first top_k tokens; 0 keeps all.
    top_p        keeps, of what top-k left, the shortest beginning whose share of the probability reaches top_p; 1: all.
    min_p        keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
    seed, step   64-bit integers, step >= 0. The random number is Philox4x32-10 of counter step under key seed: a row's
                 result depends on its own logits and settings alone, and rows of one batch want different seeds.

    NaN counts as -inf, and -inf is never drawn: a row without any other value gives -1. A row with +inf gives the
    lowest id that has it. Probabilities are integers of 40 fractional bits relative to the likeliest token; less likely
    ones count as 0 (relative error 4e-6 elsewhere). So sums are exact, and NumPy and CUDA draw the same ids.
    Raises TypeError / ValueError for wrong dtypes, shapes, strides or settings, and for more than 2**23 tokens.
    Sources: top-p Holtzman et al., arXiv 1904.09751; min-p Nguyen et al., arXiv 2407.01082; order of the filters as in
    Hugging Face Transformers; Philox: Salmon et al., SC 2011.

    >>> sample(np.log(np.array([[0.1, 0.6, 0.3]] * 8, np.float32)), top_p=0.8, seed=np.arange(8))
    array([2, 2, 1, 1, 2, 1, 1, 2], dtype=int32)
    """
    xp = namespace(logits=logits)
    check(logits, "logits", dtype=FLOATS, ndim=2)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"logits must have at most {MAX_VOCAB} columns, got {vocab}")
    settings = {
        "temperature": _real("temperature", temperature, xp, rows, "finite in float32, >= 0", lambda v: v >= 0),
        "top_k": _integer("top_k", top_k, xp, rows, np.int32, 0),
        "top_p": _real("top_p", top_p, xp, rows, "above 0 and at most 1", lambda v: (v > 0) & (v <= 1)),
        "min_p": _real("min_p", min_p, xp, rows, "from 0 to 1", lambda v: (v >= 0) & (v <= 1)),
        "seed": _integer("seed", seed, xp, rows, np.uint64, -(1 << 63)),
        "step": _integer("step", step, xp, rows, np.uint64, 0),
    }
    out = output(xp, out, (rows,), int32)
    refuse_partial_overlap(out, logits=logits)
    if rows == 0:
        return out
    if xp is np:
        out[...] = sample_reference(logits, **settings)
    else:
        _launch_sample(logits, settings, out)
    return out


def sample_reference(logits, temperature, top_k, top_p, min_p, seed, step):
    rows = len(logits)
    random = np.broadcast_to(philox_bits(seed, step), rows)
    temperature, top_k, top_p, min_p = (np.broadcast_to(value, rows) for value in (temperature, top_k, top_p, min_p))
    ids = np.empty(rows, np.int32)
    for r in range(rows):
        row = logits[r].astype(np.float32)
        row[np.isnan(row)] = -np.inf
        best = int(np.argmax(row)) if row.size else -1
        if best < 0 or row[best] == -np.inf:
            ids[r] = -1
        elif temperature[r] == 0 or row[best] == np.inf:
            ids[r] = best
        else:
            cumulative = np.cumsum(kept_weights(row, temperature[r], top_k[r], top_p[r], min_p[r]), dtype=np.uint64)
            target = int(random[r]) * int(cumulative[-1]) >> 64
            ids[r] = np.searchsorted(cumulative, np.uint64(target), side="right")
    return ids


def kept_weights(row, temperature, top_k, top_p, min_p):
    """Weights, uint64 [vocab], of the tokens that the filters keep; 0 for the others. row: float32, finite maximum."""
    weights = token_weights(row, temperature)
    if 0 < top_k < row.size or top_p < 1:
        candidates = np.flatnonzero(weights)
        if 0 < top_k < candidates.size:  # sort few
            candidates = candidates[row[candidates] >= np.partition(row[candidates], -top_k)[-top_k]]
        order = candidates[np.argsort(-row[candidates], kind="stable")]
        if top_k > 0:
            order = order[:top_k]
        if top_p < 1:
            cumulative = np.cumsum(weights[order], dtype=np.uint64)
            target = max(math.ceil(float(top_p) * float(cumulative[-1])), 1)
            order = order[: np.searchsorted(cumulative, np.uint64(target)) + 1]
        kept = np.zeros_like(weights)
        kept[order] = weights[order]
        weights = kept
    weights[weights < np.uint64(math.ceil(float(min_p) * 2.0**40))] = 0
    return weights


# A minimax fit of 2**-f on [0, 1], exact at both ends, relative error 3e-7 in float32; highest power first.
_HALVING = np.float32([-0.000939659308642149, 0.00919379387050867, -0.0552879199385643, 0.2401772290468216,
                       -0.6931434273719788, 1.0])  # fmt: skip


def token_weights(row, temperature):
    """floor(2**40 * exp((row - max) / temperature)), uint64 [vocab]; 0 where less likely than 2**-40 of the maximum.

    Every step is one float32 rounding, in the order in which the kernel takes them.
    """
    with np.errstate(over="ignore", under="ignore"):
        scale = min(np.float32(1.4426950408889634) / np.float32(temperature), np.finfo(np.float32).max)
        halvings = (row.max() - row) * scale
        halvings = np.where(halvings < 40, halvings, np.float32(40))
        whole = halvings.astype(np.int32)
        part = halvings - whole.astype(np.float32)
        fraction = np.full_like(part, _HALVING[0])
        for coefficient in _HALVING[1:]:
            fraction = fraction * part + coefficient
    mantissa = (np.maximum(fraction, np.float32(0.5)) * np.float32(1 << 24)).astype(np.uint64)
    return np.where(halvings < 40, mantissa << np.uint64(16) >> whole.astype(np.uint64), np.uint64(0))


def _launch_sample(logits, settings, out):
    rows, vocab = logits.shape
    per_row, for_all = [], []
    for value, dtype in zip(_upload(settings, logits), _DTYPES, strict=True):
        is_array = not isinstance(value, np.generic)
        per_row.append(value if is_array else None)
        for_all.append(dtype(0) if is_array else value)
    vector = 4 if vector_width(vocab, logits) == 4 else 1
    launch(_sample_instance(logits.dtype, vector), (rows,), (1024,), (logits, *per_row, out, np.int32(vocab), *for_all))


_DTYPES = (np.float32, np.int32, np.float32, np.float32, np.uint64, np.uint64)


def _upload(settings, logits):
    """The settings in order, the NumPy arrays among them moved to the device of logits in a single copy."""
    values = list(settings.values())
    host = [i for i, value in enumerate(values) if isinstance(value, np.ndarray)]
    if host:
        rows = len(logits)
        packed = np.zeros((len(host), rows), np.uint64)
        for line, i in enumerate(host):
            packed[line].view(_DTYPES[i])[:rows] = values[i]
        with logits.device:
            device = require_cupy().asarray(packed)
        for line, i in enumerate(host):
            values[i] = device[line].view(_DTYPES[i])[:rows]
    return values


def _sample_instance(x, vector):
    return instance("sample", x, vector)


# --- settings ---------------------------------------------------------------------------------------------------------


def _real(name, value, xp, rows, expected, is_valid):
    """A float setting as a float32 scalar or array, checked where the values are on the host."""
    if is_cupy(value):
        return _on_device(name, value, xp, rows, (np.float32,))
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.dtype not in FLOATS:
        raise TypeError(f"{name} must be a real number or an array of them, got {_kind(value)}")
    _check_rows(name, array, rows)
    array = array.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = array.astype(np.float32)
        wrong = ~(is_valid(array) & np.isfinite(rounded))
    if wrong.any():
        raise ValueError(f"{name} must be {expected}, got {float(array[wrong].flat[0])!r}")
    return rounded if array.ndim else rounded[()]


def _integer(name, value, xp, rows, dtype, least):
    """An integer setting: uint64 modulo 2**64, int32 clamped to its largest value (no vocabulary is larger)."""
    if is_cupy(value):
        return _on_device(name, value, xp, rows, (np.int32,) if dtype is np.int32 else (np.int64, np.uint64))
    if np.ndim(value) == 0:
        try:
            number = operator.index(value.item() if isinstance(value, (np.ndarray, np.generic)) else value)
        except TypeError:
            raise TypeError(f"{name} must be an integer or an array of integers, got {_kind(value)}") from None
        smallest = largest = number
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be an integer or an array of integers, got {_kind(value)}")
        _check_rows(name, array, rows)
        smallest, largest = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if smallest < least:
        raise ValueError(f"{name} must be at least {least}, got {smallest}")
    if dtype is np.uint64 and largest >= 1 << 64:
        raise ValueError(f"{name} must be below 2**64, got {largest}")
    if np.ndim(value) == 0:
        return np.uint64(number % (1 << 64)) if dtype is np.uint64 else np.int32(min(number, (1 << 31) - 1))
    return array.astype(np.uint64) if dtype is np.uint64 else np.minimum(array, (1 << 31) - 1).astype(np.int32)


def _on_device(name, value, xp, rows, dtypes):
    if xp is np:
        raise TypeError(f"logits is a NumPy array and {name} is a CuPy array: move one with cupy.asarray() or .get()")
    check(value, name, dtype=tuple(map(np.dtype, dtypes)), shape=(rows,))
    return value


def _check_rows(name, array, rows):
    if array.ndim and array.shape != (rows,):
        raise ValueError(f"{name} must be one number or have shape ({rows},), one per row of logits, got {array.shape}")


def _kind(value):
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


# --- random numbers ---------------------------------------------------------------------------------------------------


def philox4x32(counter, key):
    """Philox4x32-10: four random 32-bit words as a function of a counter [..., 4] and a key [..., 2], all uint32.

    Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.

    >>> philox4x32([0, 0, 0, 0], [0, 0])
    array([1713891541, 3781805453, 3159862348, 2600524760], dtype=uint32)
    """
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [np.asarray(counter, np.uint32)[..., i].astype(np.uint64) for i in range(4)]
    keys = [np.asarray(key, np.uint32)[..., i].astype(np.uint64) for i in range(2)]
    for _ in range(10):
        product_0, product_2 = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            product_2 >> shift ^ words[1] ^ keys[0],
            product_2 & low32,
            product_0 >> shift ^ words[3] ^ keys[1],
            product_0 & low32,
        ]
        keys = [keys[0] + np.uint64(0x9E3779B9) & low32, keys[1] + np.uint64(0xBB67AE85) & low32]
    return np.stack(np.broadcast_arrays(*words), axis=-1).astype(np.uint32)


def philox_bits(seed, step):
    """The 64 random bits of `step` under `seed` (numbers or arrays that broadcast): two words, the low one first."""
    seed, step = np.broadcast_arrays(_as_uint64(seed), _as_uint64(step))
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    zero = np.zeros_like(step)
    words = philox4x32(
        np.stack([step & low32, step >> shift, zero, zero], axis=-1), np.stack([seed & low32, seed >> shift], axis=-1)
    ).astype(np.uint64)
    return words[..., 1] << shift | words[..., 0]


def _as_uint64(value):
    return np.uint64(value % (1 << 64)) if isinstance(value, int) else np.asarray(value).astype(np.uint64)


def philox_uniform(seed, step):
    """Uniform numbers in [0, 1), float64: the upper 53 of the 64 bits `sample` draws with.

    >>> philox_uniform(0, 0)
    np.float64(0.8805201978886142)
    """
    return (philox_bits(seed, step) >> np.uint64(11)).astype(np.float64) * 2.0**-53


INSTANCES = [_sample_instance(x, vector) for x in FLOATS for vector in (1, 4)]
"""All instances of the kernel."""
