"""Attention of queries to a contiguous KV cache."""

import math
from dataclasses import dataclass

import numpy as np

from cupyq import _device
from cupyq._arrays import (
    FLOATS,
    accepts_dlpack,
    bfloat16,
    byte_bounds,
    check,
    float16,
    float32,
    int32,
    namespace,
    output,
    refuse_partial_overlap,
)
from cupyq._device import shared_bytes_limit
from cupyq._kernels import instance, launch
from cupyq.ops._common import float64, refuse_overlap, vector_width


@accepts_dlpack
def attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=True,
    window=None,
    softcap=None,
    kv_lengths=None,
    max_kv_length=None,
    out=None,
    workspace=None,
):
    """out[b, i, h] = sum_j w_j * v[b, j, g], w = softmax_j(softcapped(scale * q[b, i, h] . k[b, j, g])), g = h // group

    q [batch, seq, heads, head_dim], k and v [at least batch, capacity, kv_heads, head_dim]: a KV cache or just the new
    keys; group = heads / kv_heads, a whole number; head_dim a multiple of 8 up to 256; all three float16, bfloat16 or
    float32. The result has q's shape and dtype.

    kv_lengths, int32 [batch], counts the valid keys of each batch row including those of the queries at hand (default:
    capacity). Query i of row b stands at position p = kv_lengths[b] - seq + i and sees the keys j < kv_lengths[b] with
    j <= p where `causal`, and j > p - window where a window (a number of keys, its own included) is given. A query that
    sees no key gives zeros. softcapped(s) is softcap * tanh(s / softcap), taken before masking. scale defaults to
    head_dim**-0.5.

    Cache slots no query of the call sees may hold anything, NaN included. A NaN or infinity in a key or value that some
    query of a batch row sees may spread to its other queries.

    On the GPU lengths outside 0..capacity are clamped (checking would wait for the GPU); NumPy refuses them.
    max_kv_length is a bound of kv_lengths known to the host: it only decides over how many blocks the keys of few
    queries may be spread. It is rounded up by `kv_length_bucket`, so that all lengths of a bucket take the same launch; the
    bits are the same for every bound that holds, and longer lengths remain correct. `workspace`, float32
    [attention_workspace_size(head_dim)] or larger, is scratch memory, zero when first used; it may serve any calls one
    after the other, as its counters are zero again after each. With it and `out` nothing is allocated.

    Rounding: 16-bit types multiply on tensor cores with fp32 sums, softmax weights are rounded to the type before they
    meet v, the result is rounded once; float32 computes in fp32 throughout. Same bits on every run. `out` may be q
    itself, never k or v. Raises TypeError / ValueError for wrong dtypes, shapes, strides, options or overlaps.
    Sources: Dao, FlashAttention-2, arXiv 2307.08691; sliding_window of Hugging Face Transformers.

    >>> one = np.ones((1, 2, 1, 8), np.float32)
    >>> attention(one, one, np.stack([one[:, 0], 3 * one[:, 0]], axis=1))[0, :, 0, 0]
    array([1., 2.], dtype=float32)
    """
    xp = namespace(q=q, k=k, v=v, kv_lengths=kv_lengths, workspace=workspace)
    check(q, "q", dtype=FLOATS, ndim=4)
    batch, seq, heads, head_dim = q.shape
    check(k, "k", dtype=q.dtype, shape=(None, None, None, head_dim))
    check(v, "v", dtype=q.dtype, shape=k.shape)
    batch_capacity, capacity, kv_heads, _ = k.shape
    if batch_capacity < batch:
        raise ValueError(f"k must have at least the {batch} batch rows of q, got shape {k.shape}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's, got {heads} and {kv_heads}")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"q must have a head_dim that is a multiple of 8 from 8 to 256, got {head_dim}: pad it")
    scale = _positive(head_dim**-0.5 if scale is None else scale, "scale")
    softcap = None if softcap is None else _positive(softcap, "softcap")
    if window is not None and not (isinstance(window, (int, np.integer)) and window >= 1):
        raise ValueError(f"window must be a number of keys from 1, or None for all, got {window!r}")
    if max_kv_length is not None and not (isinstance(max_kv_length, (int, np.integer)) and max_kv_length >= 0):
        raise ValueError(f"max_kv_length must be a number of keys, or None for k's capacity, got {max_kv_length!r}")
    if kv_lengths is not None:
        check(kv_lengths, "kv_lengths", dtype=int32, shape=(batch,))
    if workspace is not None:
        check(workspace, "workspace", dtype=float32, ndim=1, writes=True)
    out = output(xp, out, q.shape, q.dtype)
    refuse_partial_overlap(out, q=q)
    refuse_overlap(out, "out", k=k, v=v, kv_lengths=kv_lengths, workspace=workspace)
    if q.size == 0:
        return out
    if xp is np:
        low, high = (0, 0) if kv_lengths is None else (kv_lengths.min(), kv_lengths.max())
        if low < 0 or high > capacity:
            raise ValueError(f"kv_lengths must lie in 0..{capacity}, k's capacity, got {low}..{high}")
        out[...] = attention_reference(q, k, v, scale, causal, window, softcap, kv_lengths)
    else:
        bound = capacity if max_kv_length is None else kv_length_bucket(max_kv_length, capacity)
        _launch_attention(q, k, v, scale, causal, window, softcap, kv_lengths, bound, out, workspace)
    return out


def attention_workspace_size(head_dim, *, sm_count=None):
    """How many floats of workspace any attention() call with this head_dim may need, whatever its other sizes.

    sm_count, the GPU's number of multiprocessors, defaults to the current GPU's; without one the result is 0, as the
    NumPy path needs no workspace.

    >>> attention_workspace_size(128, sm_count=132)
    275584
    """
    if sm_count is None:
        sm_count = _device.current().sm_count if _device.count() else 0
    return sm_count and _COUNTERS + sm_count * _DECODE_ROWS * (head_dim + 2)


def kv_length_bucket(length, capacity):
    """The bound of KV lengths up to `length` that attention() works with: a power of two from 256 on, or `capacity`.

    A CUDA graph captured for one length of a bucket serves all of them.

    >>> [kv_length_bucket(length, 5000) for length in (1, 256, 257, 4097)]
    [256, 256, 512, 5000]
    """
    return min(max(256, 1 << max(length - 1, 0).bit_length()), capacity)


def _positive(value, name):
    value = float(value)
    if not 0 < value < np.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return value


_REFERENCE_SCORES = 1 << 22


def attention_reference(q, k, v, scale, causal, window, softcap, kv_lengths):
    """The definition, in float64. Queries go in blocks, so that no more than a few million scores exist at a time."""
    batch, seq, heads, head_dim = q.shape
    _, capacity, kv_heads, _ = k.shape
    group = heads // kv_heads
    out = np.zeros(q.shape)
    for b in range(batch):
        length = capacity if kv_lengths is None else int(kv_lengths[b])
        positions = length - seq + np.arange(seq)
        begins = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
        ends = positions + 1 if causal else np.full_like(positions, length)
        # Slots outside of this are never touched: they may hold NaN.
        first, last = int(begins[0]), int(ends[-1])
        if last <= first:
            continue
        keys = float64(k[b, first:last]).transpose(1, 2, 0)  # [kv_heads, head_dim, keys]
        values = float64(v[b, first:last]).transpose(1, 0, 2)  # [kv_heads, keys, head_dim]
        block = max(1, _REFERENCE_SCORES // (heads * (last - first)))
        for start in range(0, seq, block):
            rows = slice(start, min(start + block, seq))
            low, high = int(begins[rows.start]), int(ends[rows.stop - 1])
            if high <= low:
                continue
            queries = float64(q[b, rows]).reshape(-1, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
            count = queries.shape[2]
            scores = queries.reshape(kv_heads, group * count, head_dim) @ keys[:, :, low - first : high - first]
            scores = scores.reshape(kv_heads, group, count, -1)
            scores *= scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            j = np.arange(low, high)
            scores[..., (j < begins[rows, None]) | (j >= ends[rows, None])] = -np.inf
            top = scores.max(axis=-1, keepdims=True)
            scores -= np.where(top == -np.inf, 0.0, top)
            weights = np.exp(scores, out=scores)
            total = weights.sum(axis=-1, keepdims=True)
            sums = weights.reshape(kv_heads, group * count, -1) @ values[:, low - first : high - first]
            result = sums.reshape(kv_heads, group, count, head_dim) / np.where(total == 0, 1.0, total)
            out[b, rows] = result.transpose(2, 0, 1, 3).reshape(count, heads, head_dim)
    return out


# --- which kernel, with which tiles -----------------------------------------------------------------------------------

_DECODE_ROWS = 16  # rows of one mma tile
_DECODE_KEYS = 16  # keys of one warp's tile
_SHARE_TILES = 4  # a block takes part in decoding where there are so many tiles for it
_COUNTERS = 1024  # at the start of the workspace: one per 16 rows of a kv head whose keys are spread over several blocks


def pick_kernel(dtype, seq, is_aligned, arch):
    """Which kernel: "decode" packs the heads of a group and splits the keys, "simple" goes without tensor cores."""
    if dtype == float32 or not is_aligned or (dtype == bfloat16 and _device.arch_number(arch) < 80):
        return "simple"
    return "decode" if seq <= 16 else "prefill"


@dataclass(frozen=True)
class PrefillConfig:
    warps: int
    tile_keys: int

    def shared_bytes(self, head_dim):
        """Two stages of K and V; the queries lie under them where they fit into registers (head_dim <= 128)."""
        keys, queries = 4 * self.tile_keys, 16 * self.warps
        rows = max(keys, queries) if head_dim <= 128 else keys + queries
        return rows * _row_bytes(head_dim)


@dataclass(frozen=True)
class DecodeConfig:
    warps: int
    stages: int

    def shared_bytes(self, head_dim):
        """K and V of every stage of every warp, and the queries."""
        return (self.warps * self.stages * 2 * _DECODE_KEYS + _DECODE_ROWS) * _row_bytes(head_dim)


def pick_prefill_config(head_dim, arch):
    choices = [(8, 64), (4, 32)] if head_dim <= 128 else [(8, 32), (4, 32), (2, 16)]
    return _first_that_fits([PrefillConfig(*choice) for choice in choices], head_dim, arch)


def pick_decode_config(head_dim, arch, is_crowded=False):
    """One block of 8 warps has a multiprocessor for itself; in a crowd, blocks of 4, of which one starts as another ends."""
    choices = [(8, 3), (8, 2)] * (not is_crowded) + [(4, 3), (4, 2), (2, 2), (1, 2)]
    return _first_that_fits([DecodeConfig(*choice) for choice in choices], head_dim, arch)


def _first_that_fits(configs, head_dim, arch):
    return next(config for config in configs if config.shared_bytes(head_dim) <= shared_bytes_limit(arch))


def pick_splits(blocks, keys, rows, sm_count):
    """Over how many blocks each of `blocks` runs of up to `keys` keys, for that many of 16 `rows`, may be spread.

    No more blocks in all than multiprocessors (attention_workspace_size counts on it), and none without work.
    """
    if blocks > _COUNTERS:
        return 1
    return max(1, min(sm_count // blocks, most_shares(keys, rows)))


def most_shares(keys, rows):
    """How many blocks the kernel would ever let share so many keys: at least its share_count, for fewer keys too."""
    tiles = -(-keys // _DECODE_KEYS)
    return min(math.isqrt(2 * _DECODE_KEYS * tiles // rows) + 2, -(-tiles // _SHARE_TILES))


def _padded(head_dim, multiple):
    return -(-head_dim // multiple) * multiple


def _row_bytes(head_dim):
    return 2 * (_padded(head_dim, 16) + 8)


# --- launching --------------------------------------------------------------------------------------------------------


def _launch_attention(q, k, v, scale, causal, window, softcap, kv_lengths, max_kv_length, out, workspace):
    batch, seq, heads, head_dim = q.shape
    _, capacity, kv_heads, _ = k.shape
    seen = max_kv_length if window is None else min(max_kv_length, seq + window - 1)  # keys, by all queries of a row
    arguments = (
        *(np.int32(size) for size in (batch, seq, heads, kv_heads, head_dim, capacity)),
        np.int32(bool(causal)),
        np.int32(capacity if window is None else min(window, max(capacity, 1))),
        np.float32(scale),
        np.float32(0.0 if softcap is None else softcap),
    )
    is_aligned = vector_width(head_dim, q, k, v, out, widest=8) == 8
    device = _device.current()
    kernel = pick_kernel(q.dtype, seq, is_aligned, device.arch)
    if kernel == "simple":
        padded = _padded(head_dim, 32)
        shared = 4 * (16 * padded + 32 * (padded + 4) + 16 * 32)
        grid = (-(-seq // 16) * batch * heads,)
        launch(_simple_instance(q.dtype, head_dim), grid, (128,), (q, k, v, kv_lengths, out, *arguments), shared)
        return
    if kernel == "prefill":
        config = pick_prefill_config(head_dim, device.arch)
        wanted = _prefill_instance(q.dtype, head_dim, config)
        grid = (-(-seq // (16 * config.warps)) * batch * heads,)
        shared = config.shared_bytes(head_dim)
        launch(wanted, grid, (32 * config.warps,), (q, k, v, kv_lengths, out, *arguments), shared)
        return
    group_rows = seq * heads // kv_heads
    blocks = batch * kv_heads * -(-group_rows // _DECODE_ROWS)
    config = pick_decode_config(head_dim, device.arch, is_crowded=blocks >= 2 * device.sm_count)
    splits = pick_splits(blocks, seen, group_rows % _DECODE_ROWS or _DECODE_ROWS, device.sm_count)
    parts = arrived = None
    if splits > 1:
        parts, arrived = _parts(q, batch * seq * heads * splits * (head_dim + 2), blocks, workspace)
    decode_arguments = (q, k, v, kv_lengths, out, parts, arrived, *arguments, np.int32(splits))
    wanted = _decode_instance(q.dtype, head_dim, config)
    launch(wanted, (blocks * splits,), (32 * config.warps,), decode_arguments, config.shared_bytes(head_dim))


def _parts(q, size, blocks, workspace):
    """What shares of the keys leave behind, and the counters of those that have."""
    if workspace is None:
        xp = namespace(q=q)
        return xp.empty(size, float32), xp.zeros(blocks, np.uint32)
    if workspace.size < _COUNTERS + size:
        raise ValueError(
            f"workspace must have at least {_COUNTERS + size} floats, got {workspace.size}: see attention_workspace_size"
        )
    if byte_bounds(workspace)[0] % 8:
        raise ValueError("workspace must begin at a multiple of 8 bytes: pass a whole array, not a slice from its middle")
    return workspace[_COUNTERS:], workspace[:_COUNTERS]


def _simple_instance(dtype, head_dim):
    return instance("attention_simple", dtype, _padded(head_dim, 32))


def _prefill_instance(dtype, head_dim, config):
    return instance("attention_prefill", dtype, _padded(head_dim, 16), config.warps, config.tile_keys)


def _decode_instance(dtype, head_dim, config):
    return instance("attention_decode", dtype, _padded(head_dim, 16), config.warps, config.stages)


def _instances(arch):
    yield _simple_instance(float32, 128)
    for dtype in (float16, bfloat16):
        for head_dim in (64, 128):
            yield _prefill_instance(dtype, head_dim, pick_prefill_config(head_dim, arch))
            for is_crowded in (False, True):
                yield _decode_instance(dtype, head_dim, pick_decode_config(head_dim, arch, is_crowded))


INSTANCES = list(_instances("sm_90a"))
"""What `cupyq compile` builds ahead; other sizes, and tiles for less shared memory, are compiled when first used."""
