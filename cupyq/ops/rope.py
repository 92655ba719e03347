"""Rotary position embedding: the rotation and the tables of its sines and cosines."""

import math

import numpy as np

from cupyq._arrays import FLOATS, bfloat16, check, float16, float32, int32, namespace, output, refuse_partial_overlap
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.errors import FormatError, UnsupportedError
from cupyq.ops._common import float64, int32_of, refuse_overlap, shown, store, vector_width


@accepts_dlpack(replays=True)
def rope(x, sin, cos, positions, *, style="neox", out=None):
    """Each pair (p, q) of a head becomes (p * cos - q * sin, q * cos + p * sin), with its position's angle

    x [batch, seq, heads, head_dim]: float16, bfloat16 or float32, as y. sin and cos [table_len, rotary_dim / 2]: both
    float16 or both float32, one value per pair. Pair j is columns (j, j + rotary_dim / 2) for style "neox", (2j, 2j +
    1) for "gptj"; columns from rotary_dim on are copied. positions: int32 [batch], where token i of row b is at
    positions[b] + i, or int32 [batch, seq], one for each token. fp32 arithmetic (float64 in the reference), rounded
    once. `out` may be x. A position outside the tables raises ValueError on NumPy; on the GPU, where reading
    positions back would stall it, the whole token becomes NaN. Raises TypeError / ValueError for wrong dtypes,
    shapes, strides, an unknown style or an overlap other than out = x.
    Source: Su et al., RoFormer, arXiv 2104.09864; the "neox" pairing is GPT-NeoX's, arXiv 2204.06745.

    >>> sin, cos = np.array([[0.0], [1.0]], np.float32), np.array([[1.0], [0.0]], np.float32)
    >>> rope(np.array([[[[3.0, 4.0]], [[3.0, 4.0]]]], np.float32), sin, cos, np.array([0], np.int32))[0, :, 0]
    array([[ 3.,  4.],
           [-4.,  3.]], dtype=float32)
    """
    xp = namespace(x=x, sin=sin, cos=cos, positions=positions)
    if not isinstance(style, str) or style not in ("neox", "gptj"):
        raise ValueError(f'style must be "neox" or "gptj", got {shown(style)}')
    check(x, "x", dtype=FLOATS, ndim=4)
    check(sin, "sin", dtype=(float32, float16), ndim=2)
    check(cos, "cos", dtype=sin.dtype, shape=sin.shape)
    if 2 * sin.shape[1] > x.shape[3]:
        raise ValueError(f"sin has {sin.shape[1]} columns, one per pair, but x's head_dim {x.shape[3]} has fewer pairs")
    check(positions, "positions", dtype=int32)
    if positions.shape not in (x.shape[:1], x.shape[:2]):
        raise ValueError(f"positions must have shape {x.shape[:1]} or {x.shape[:2]}, as x, got {positions.shape}")
    out = output(xp, out, x.shape, x.dtype)
    refuse_partial_overlap(out, x=x)
    refuse_overlap(out, "out", sin=sin, cos=cos, positions=positions)
    if x.size == 0:
        return out
    if xp is np:
        check_positions(positions, x.shape[1], sin.shape[0])
        store(out, rope_reference(x, sin, cos, positions, style))
    else:
        _launch_rope(x, sin, cos, positions, style, out)
    return out


def _token_positions(positions, seq):
    """[batch, seq]: every token's position."""
    return positions if positions.ndim == 2 else positions[:, None].astype(np.int64) + np.arange(seq)


def check_positions(positions, seq, table_len):
    """Raise ValueError where a token, of positions [batch] or [batch, seq], stands outside the tables."""
    positions = _token_positions(positions, seq)
    outside = (positions < 0) | (positions >= table_len)
    if outside.any():
        row, token = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"positions put token {token} of row {row} at {positions[row, token]}, outside the tables of {table_len} "
            "positions: make longer tables with rope_tables"
        )


def rope_reference(x, sin, cos, positions, style):
    rows = _token_positions(positions, x.shape[1])
    s, c = float64(sin[rows])[:, :, None], float64(cos[rows])[:, :, None]
    pairs = sin.shape[1]
    p, q = (np.s_[..., :pairs], np.s_[..., pairs : 2 * pairs])
    if style == "gptj":
        p, q = (np.s_[..., 0 : 2 * pairs : 2], np.s_[..., 1 : 2 * pairs : 2])
    x = float64(x)
    y = x.copy()
    y[p] = x[p] * c - x[q] * s
    y[q] = x[q] * c + x[p] * s
    return y


def _launch_rope(x, sin, cos, positions, style, out):
    batch, seq, heads, head_dim = x.shape
    table_len, pairs = sin.shape
    # A head's columns and its pairs both fall into whole accesses.
    vector = vector_width(math.gcd(head_dim, pairs), x, sin, cos, out, widest=16 // x.itemsize)
    items = heads * ((head_dim - pairs) // vector)
    launch(
        _rope_instance(x.dtype, sin.dtype, style, vector),
        (batch * seq,),
        (min(256, -(-items // 32) * 32),),
        (x, sin, cos, positions, out, *map(int32_of, (seq, heads, head_dim, pairs, table_len, positions.ndim == 2))),
    )


def _rope_instance(x, table, style, vector):
    return instance("rope", x, table, style == "neox", vector)


# --- positions of text and images -------------------------------------------------------------------------------------


def mrope_positions(ids, merge_size, spans, grids, length):
    """(int64 [3, length], next): time, row and column of every token for multimodal RoPE, and the next free position

    ids: int64 [n], NumPy; token i >= n counts as text. spans: one (begin, end) range of ids per image or video, whose
    patches follow each other in ids; grids: their (time, height, width) in patches before merge_size x merge_size of
    them are merged. A text token has one number, the next free one, in all three rows. Patch k of a span starts from the
    number b after the last text token: (b + k // gw // gh % time, b + k // gw % gh, b + k % gw) with gh = height //
    merge_size, gw = width // merge_size. The next free number is one more than the largest so far; two spans without
    text between them start from the same number. The first span that holds an id counts. Integers throughout. Raises
    TypeError / ValueError for wrong dtypes, shapes or sizes.
    Source: Wang et al., Qwen2-VL, arXiv 2409.12191, section 2.1.

    >>> mrope_positions(np.array([7, 100, 101, 8]), 1, [(100, 102)], [(1, 1, 2)], 4)
    (array([[0, 1, 1, 3],
           [0, 1, 1, 3],
           [0, 1, 2, 3]]), 4)
    """
    if not isinstance(ids, np.ndarray):
        raise TypeError(f"ids must be a NumPy array, as positions are made on the host, got {type(ids).__name__}")
    check(ids, "ids", dtype=np.int64, ndim=1)
    for name, size, least in (("merge_size", merge_size, 1), ("length", length, 0)):
        if not isinstance(size, (int, np.integer)) or size < least:
            raise ValueError(f"{name} must be an integer from {least}, got {shown(size)}")
    sizes = _merged_grids(merge_size, spans, grids)
    which = np.full(length, -1)
    known = ids[:length]
    for index, (begin, end) in reversed(list(enumerate(spans))):  # so that the first that holds an id stays
        which[: known.size][(known >= begin) & (known < end)] = index
    positions = np.empty((3, length), np.int64)
    base = free = 0
    is_text = which < 0
    edges = [0, *(np.flatnonzero(is_text[1:] != is_text[:-1]) + 1).tolist(), length] if length else [0]
    for begin, end in zip(edges, edges[1:], strict=False):
        run = positions[:, begin:end]
        if is_text[begin]:
            run[:] = np.arange(free, free + end - begin)
            base = free = free + end - begin
            continue
        starts, time, height, width = sizes[which[begin:end]].T
        patch = known[begin:end] - starts
        run[:] = base + np.stack([patch // width // height % time, patch // width % height, patch % width])
        free = max(free, int(run.max()) + 1)
    return positions, free


def _merged_grids(merge_size, spans, grids):
    """int64 [spans, 4]: first id, time, and height and width after merging."""
    try:
        ranges, sizes = (np.array(list(items) or np.empty((0, n), np.int64)) for items, n in ((spans, 2), (grids, 3)))
        fits = all(a.dtype.kind in "iu" and a.ndim == 2 and a.shape[1] == n for a, n in ((ranges, 2), (sizes, 3)))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError("spans must hold pairs (begin, end) and grids triples (time, height, width) of integers")
    if len(ranges) != len(sizes):
        raise ValueError(f"grids must hold one (time, height, width) for each of {len(ranges)} spans, got {len(sizes)}")
    sizes = sizes.astype(np.int64) // [1, merge_size, merge_size]
    if sizes.size and sizes.min() < 1:
        index = int(np.argmax((sizes < 1).any(axis=1)))
        raise ValueError(f"grids[{index}] must be at least (1, {merge_size}, {merge_size}), got {tuple(grids[index])}")
    return np.hstack([ranges[:, :1].astype(np.int64), sizes])


# --- tables -----------------------------------------------------------------------------------------------------------


def rope_tables(rotary_dim, length, *, theta=10000.0, scaling=None, xp=np):
    """(sin, cos) of position * frequency, float32 [length, rotary_dim / 2], on the library `xp`

    frequency[i] = theta**(-2i / rotary_dim), changed by `scaling`: a checkpoint's rope_scaling or rope_parameters, in
    the spelling of transformers, with rope_type (or type) one of
      default   no change
      linear    frequencies / factor
      dynamic   where length is beyond max_position_embeddings L, theta * (factor * length / L - factor + 1)**(d / (d - 2))
                with d = rotary_dim; all positions turn by the frequencies for this length
      llama3    long wavelengths / factor, short ones kept, a ramp between (low_freq_factor, high_freq_factor)
      yarn      fast-turning pairs kept, slow ones / factor, a ramp between (beta_fast, beta_slow); attention factor
      longrope  (also "su") frequencies / long_factor[i] where length is beyond original_max_position_embeddings, else
                / short_factor[i]; attention factor
    The attention factor multiplies both tables. llama3, yarn and longrope measure by
    original_max_position_embeddings, the length before extension: where a checkpoint has that key (or
    max_position_embeddings, for dynamic and for a missing factor of longrope) at top level only, put it into `scaling`.
    Everything is computed in float64 on the host and rounded once; an angle is at most 1e-15 of itself off. Raises
    UnsupportedError for an unknown rope_type, FormatError for a missing or malformed key, ValueError for wrong sizes.
    Source: arXiv 2309.00071 (yarn), 2402.13753 (longrope), Llama 3.1's release (llama3); transformers,
    modeling_rope_utils.py, for the spelling and the defaults.

    >>> rope_tables(4, 2)[0]
    array([[0.        , 0.        ],
           [0.84147096, 0.00999983]], dtype=float32)
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be positive and even, got {rotary_dim}")
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    try:
        with np.errstate(all="ignore"):
            frequencies, attention_factor = _scaled_frequencies(rotary_dim, length, float(theta), scaling or {})
            largest = np.float32([attention_factor, *(frequencies * max(length, 1))])
    except ArithmeticError as error:  # of numbers that are each in range
        raise FormatError(f"rope scaling: numbers from which no frequencies follow ({error}), theta is {theta:g}") from None
    if not np.isfinite(largest).all():
        raise FormatError(f"rope scaling: numbers from which angles follow that are beyond float32, theta is {theta:g}")
    sin, cos = np.empty((2, length, rotary_dim // 2), np.float32)
    # exp(i (a + b)) = exp(i a) exp(i b): a sine or cosine costs ten times as much as a product.
    step = 128
    turns = np.exp(1j * np.arange(0, length, step)[:, None] * frequencies)
    small_turns = attention_factor * np.exp(1j * np.arange(step)[:, None] * frequencies)
    for first, turn in zip(range(0, length, step), turns, strict=True):
        values = small_turns[: length - first] * turn
        sin[first : first + step], cos[first : first + step] = values.imag, values.real
    return xp.asarray(sin), xp.asarray(cos)


def _scaled_frequencies(rotary_dim, length, theta, scaling):
    """float64 [rotary_dim / 2] radians per position, and the factor of both tables."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _SCALINGS:
        raise UnsupportedError(f"rope_type {kind!r} is not supported: known are {', '.join(_SCALINGS)}")
    if scaling.get("rope_theta", theta) != theta:
        raise ValueError(f"theta is {theta:g} but scaling says rope_theta {scaling['rope_theta']}: pass that as theta")
    frequencies = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return _SCALINGS[kind](frequencies, length, theta, scaling)


def _number(scaling, key, default=None):
    value = scaling.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        kind = scaling.get("rope_type", scaling.get("type"))
        raise FormatError(f"rope scaling {key!r} must be a positive number for rope_type {kind!r}, got {value!r}")
    return float(value)


def _default(frequencies, length, theta, scaling):
    return frequencies, 1.0


def _linear(frequencies, length, theta, scaling):
    return frequencies / _number(scaling, "factor"), 1.0


def _dynamic(frequencies, length, theta, scaling):
    factor, usual = _number(scaling, "factor"), _number(scaling, "max_position_embeddings")
    rotary_dim = 2 * frequencies.size
    if length <= usual or rotary_dim == 2:  # a single pair turns by 1 whatever theta is
        return frequencies, 1.0
    stretch = factor * length / usual - (factor - 1)
    # theta**(-2i / d) with theta stretched to the power of d / (d - 2)
    return frequencies * stretch ** (-np.arange(0, rotary_dim, 2) / (rotary_dim - 2)), 1.0


def _llama3(frequencies, length, theta, scaling):
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise FormatError(f"rope scaling 'low_freq_factor' must be below 'high_freq_factor', got {low} and {high}")
    turns = _number(scaling, "original_max_position_embeddings") * frequencies / (2 * math.pi)  # within that length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def _yarn(frequencies, length, theta, scaling):
    factor, original = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    rotary_dim = 2 * frequencies.size

    def pair_turning(turns):
        """The (fractional) pair that makes so many turns within the original length."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(_number(scaling, "beta_fast", 32)), pair_turning(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    # transformers' guard against a ramp of no width
    divided = np.clip((np.arange(frequencies.size) - first) / (last - first if last != first else 0.001), 0, 1)

    def attention(scale=1.0):
        return 1 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        proposed = attention(_number(scaling, "mscale")) / attention(_number(scaling, "mscale_all_dim"))
    else:
        proposed = attention()
    return frequencies * (1 - divided + divided / factor), _number(scaling, "attention_factor", proposed)


def _longrope(frequencies, length, theta, scaling):
    original = _number(scaling, "original_max_position_embeddings")
    key = "long_factor" if length > original else "short_factor"
    given = scaling.get(key)
    try:
        factors = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        factors = np.empty(())
    if factors.shape != frequencies.shape or not np.all((factors > 0) & (factors < np.inf)):
        found = f"{len(given)} values" if isinstance(given, (list, tuple)) else repr(given)
        raise FormatError(f"rope scaling {key!r} must be a list of {frequencies.size} positive numbers, got {found}")
    if scaling.get("factor") is None and scaling.get("attention_factor") is None:
        extension = _number(scaling, "max_position_embeddings") / original
    else:
        extension = _number(scaling, "factor", 1.0)
    proposed = math.sqrt(1 + math.log(extension) / math.log(original)) if extension > 1 else 1.0
    return frequencies / factors, _number(scaling, "attention_factor", proposed)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}

INSTANCES = [
    *(_rope_instance(x, float32, style, 16 // x.itemsize) for x in FLOATS for style in ("neox", "gptj")),
    _rope_instance(float16, float16, "neox", 8),
    _rope_instance(bfloat16, float16, "neox", 1),
]
"""What `cupyq compile` builds ahead; other combinations are compiled when first used."""
