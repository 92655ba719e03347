"""Sampling on the CPU, in exllamav2's definitions: penalties, one token per row, allowed-token masks, stop strings.

The engine's own sampler, on the GPU and in the usual definitions, is `cupyq.ops.sample`; this one exists so that callers
of exllamav2 find the same tokens. Probabilities are float32 and candidates keep exllamav2's order, as the token picked
for a random number depends on it.
"""

import math

import numpy as np

from cupyq._arrays import check, first_line, float32, is_cupy
from cupyq._foreign import gpu_of
from cupyq.ext._arrays import entry, integer, is_array, number, refuse_any_overlap
from cupyq.ext._candidates import candidates, sort_first
from cupyq.ops._common import shown

_int64, _bool = np.dtype(np.int64), np.dtype(np.bool_)


def _on_cpu(**arrays):
    """Raise TypeError unless every array that is given is NumPy's."""
    for name, array in arrays.items():
        if is_cupy(array):
            raise TypeError(f"{name} is on a GPU, and this function works on the CPU: pass {name}.get() or {name}.cpu()")
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be an array on the CPU, got {type(array).__name__}")


def _scalars(**values):
    """Raise TypeError / ValueError unless every value is a finite number."""
    for name, value in values.items():
        if not math.isfinite(number(value, name)):
            raise ValueError(f"{name} must be a finite number, got {value}")


# --- penalties --------------------------------------------------------------------------------------------------------


@entry(writes=("logits",))
def apply_rep_penalty(sequence, penalty_max, sustain, decay, alpha_frequency, alpha_presence, logits):
    """Make tokens of the sequence less likely: logit / r where it is positive, logit * r elsewhere; then - p - count * f

    sequence int64 [batch, length]; logits float32 [batch, (1,) vocab], changed in place. The last `sustain` + 1 tokens
    (-1: all) meet the full r = penalty_max, p = alpha_presence, f = alpha_frequency; over the `decay` tokens before them
    these fall in equal steps to 1, 0, 0; older tokens are not looked at. r and p of a token are those of its latest
    occurrence. Ids outside 0..vocab - 1 are ignored. float32 arithmetic, in the order of a walk from the end.
    """
    _on_cpu(sequence=sequence, logits=logits)
    _scalars(penalty_max=penalty_max, alpha_frequency=alpha_frequency, alpha_presence=alpha_presence)
    check(sequence, "sequence", dtype=_int64, ndim=2)
    check(logits, "logits", dtype=float32, writes=True)
    if logits.ndim not in (2, 3) or logits.shape[0] != sequence.shape[0] or logits.size != logits.shape[0] * logits.shape[-1]:
        raise ValueError(f"logits must have shape ({sequence.shape[0]}, [1,] vocab), as sequence, got {logits.shape}")
    if penalty_max <= 0:
        raise ValueError(f"penalty_max must be positive (1 means no penalty), got {penalty_max}")
    for name, value, least in (("sustain", sustain, -1), ("decay", decay, 0)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a number of tokens from {least}, got {shown(value)}")
    length = sequence.shape[1]
    sustain = length if sustain == -1 else min(sustain, length)
    count = min(length, sustain + decay)
    if count == 0 or logits.size == 0:
        return
    steps = np.maximum(np.arange(count) - sustain, 0)
    penalties = [_decayed(*values, decay, steps) for values in ((penalty_max, 1), (alpha_frequency, 0), (alpha_presence, 0))]
    for row, tokens in zip(logits.reshape(-1, logits.shape[-1]), sequence[:, ::-1][:, :count], strict=True):
        known = (tokens >= 0) & (tokens < row.size)
        _penalise(row, tokens[known], *(values[known] for values in penalties))


def _decayed(start, end, decay, steps):
    """float32: `start` after that many additions of (end - start) / decay, rounded at each as exllamav2 does."""
    step = (np.float32(end) - np.float32(start)) / np.float32(max(decay, 1))
    values = np.full(int(steps[-1]) + 1, step, np.float32)
    values[0] = start
    return np.add.accumulate(values)[steps]


def _penalise(row, tokens, repetition, frequency, presence):
    seen, first = np.unique(tokens, return_index=True)
    values, r = row[seen], repetition[first]
    with np.errstate(over="ignore", invalid="ignore"):
        row[seen] = np.where(values > 0, values / r, values * r) - presence[first]
        np.subtract.at(row, tokens, frequency)  # one after the other


# --- one token per row ------------------------------------------------------------------------------------------------


@entry(writes=("output_tokens", "output_probs", "output_kprobs", "output_ktokens"), flags=("mirostat",))
def sample_basic(
    logits,
    temperature,
    top_k,
    top_p,
    top_a,
    min_p,
    tfs,
    typical,
    random,
    output_tokens,
    output_probs,
    output_kprobs,
    output_ktokens,
    logit_filter,
    mirostat,
    mirostat_mu,
    mirostat_tau,
    mirostat_eta,
    post_temperature,
    xtc_mask,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    min_temp=0.0,
    max_temp=0.0,
    temp_exponent=1.0,
    smoothing_factor=0.0,
    skew=0.0,
):
    """Draw one token per row of logits float32 [batch, (1,) vocab]; returns the list of mirostat's mu, one per row

    output_tokens int64 and output_probs float32 [batch, 1] receive the token and its probability among the candidates
    left; output_ktokens int64 and output_kprobs float32 [batch, 1, n], or None, the n best candidates, filled up with
    the lowest other ids at probability 0. logit_filter, bool [batch, vocab] or None: True where a token is allowed.
    random: a number in 0..1; later rows derive theirs from it.

    The stages, in this order, each followed by a division by the sum; those with their value at 0 are skipped, as are
    all but XTC when one candidate is left:
      softmax    of logits / temperature; with smoothing_factor s, exp(-(l - max)**2 * s / temperature). A temperature
                 below 0.01 means greedy: temperature 1, top_k 1
      top_k      the k most likely
      top_p      in candidate order, tokens are taken and the least likely given up while the sum exceeds top_p: unlike in
                 the usual definition, the token that crosses the threshold is out and smaller ones that still fit are in
      top_a      p >= top_a * max**2
      min_p      p >= min_p * max; where both drop nothing at the end of their candidates, one more comes in
                 (_candidates.py says which)
      tfs        descending; tokens whose second differences sum up to tfs of their total, and one more
      typical    by |y - E[y]| ascending with y = p + ln p, up to the token that reaches `typical`, exclusive
      mirostat   descending; p >= 2**-mu
      post_temperature
                 p**(1 / T), T = post_temperature, or where max_temp > min_temp T = min_temp + (max_temp - min_temp) *
                 (entropy / ln n)**temp_exponent
      XTC        with at least two tokens of p >= xtc_threshold and xtc_mask (bool [vocab]; None: all), every one but the
                 least likely of them becomes p * (1 - xtc_probability), the others grow to fill the sum
      skew       random becomes random**exp(-skew)
    and the first candidate whose cumulative sum reaches 0.9998 * random is chosen. With mirostat on, mu becomes mu + eta
    * (tau + log2 p); a mu of 0 stands for 2 * tau.

    Where exllamav2's result is undefined: NaN counts as -Inf and +Inf as the largest float32; where no allowed logit is
    finite, the lowest allowed id is taken; every stage keeps at least its most likely token; T = 0 is greedy; equal
    second differences leave tfs without effect; a token of probability 0 is never chosen. Its defects are not kept:
    smoothing divides the temperature once, not once more for each row; XTC follows its formula in any order of
    candidates. Raises TypeError / ValueError for wrong dtypes, shapes or numbers and for a filter that allows nothing,
    before anything is written.
    """
    _on_cpu(logits=logits, output_tokens=output_tokens, output_probs=output_probs)
    optional = {
        "output_kprobs": output_kprobs,
        "output_ktokens": output_ktokens,
        "logit_filter": logit_filter,
        "xtc_mask": xtc_mask,
    }
    _on_cpu(**{name: array for name, array in optional.items() if array is not None})
    settings = {
        "temperature": temperature,
        "top_k": integer(top_k, "top_k"),
        "top_p": top_p,
        "top_a": top_a,
        "min_p": min_p,
        "tfs": tfs,
        "typical": typical,
        "mirostat_tau": mirostat_tau,
        "mirostat_eta": mirostat_eta,
        "post_temperature": post_temperature,
        "xtc_probability": xtc_probability,
        "xtc_threshold": xtc_threshold,
        "min_temp": min_temp,
        "max_temp": max_temp,
        "temp_exponent": temp_exponent,
        "smoothing_factor": smoothing_factor,
        "skew": skew,
    }
    _scalars(random=random, **settings)
    if not 0 <= random <= 1:
        raise ValueError(f"random must lie in 0..1, got {random}")
    check(logits, "logits", dtype=float32)
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0 or logits.size != logits.shape[0] * logits.shape[-1]:
        raise ValueError(f"logits must have shape (batch, 1, vocab) with a token to choose, got {logits.shape}")
    batch, vocab = logits.shape[0], logits.shape[-1]
    for name, array, dtype in (("output_tokens", output_tokens, _int64), ("output_probs", output_probs, float32)):
        check(array, name, dtype=dtype, shape=(batch, 1), writes=True)
    top_count = _check_top_outputs(output_kprobs, output_ktokens, batch, vocab)
    allowed = _check_filter(logit_filter, batch, vocab)
    if xtc_mask is not None:
        check(xtc_mask, "xtc_mask", dtype=_bool, shape=(vocab,))
    mu = _check_mu(mirostat_mu, batch if mirostat else 0)
    arrays = {"logits": logits, "output_tokens": output_tokens, "output_probs": output_probs, **optional}
    refuse_any_overlap(**{name: array for name, array in arrays.items() if array is not None})

    logits = logits.reshape(batch, vocab)
    random = np.float32(random)
    for row in range(batch):
        own_filter, own_mu = None if allowed is None else allowed[row], mu[row] if mirostat else None
        p, ids = candidates(logits[row], own_filter, settings, own_mu, xtc_mask)
        if top_count or skew:
            order = sort_first(p, top_count)
            p, ids = p[order], ids[order]
        if top_count:
            _report(p, ids, output_kprobs[row, 0], output_ktokens[row, 0])
        chosen = _pick(p, _skewed(random, skew))
        output_tokens[row, 0], output_probs[row, 0] = ids[chosen], p[chosen]
        if mirostat:
            mu[row] = (mu[row] or 2.0 * mirostat_tau) + mirostat_eta * (mirostat_tau + math.log2(p[chosen]))
        random = _next_random(random)
    return mu


def _check_top_outputs(kprobs, ktokens, batch, vocab):
    """How many of the best tokens are asked for."""
    if kprobs is None and ktokens is None:
        return 0
    if kprobs is None or ktokens is None:
        raise TypeError("output_kprobs and output_ktokens must both be arrays or both be None")
    check(kprobs, "output_kprobs", dtype=float32, shape=(batch, 1, None), writes=True)
    check(ktokens, "output_ktokens", dtype=_int64, shape=kprobs.shape, writes=True)
    if kprobs.shape[2] > vocab:
        raise ValueError(f"output_kprobs asks for the {kprobs.shape[2]} best of {vocab} tokens: pass a smaller array")
    return kprobs.shape[2]


def _check_filter(logit_filter, batch, vocab):
    if logit_filter is None:
        return None
    check(logit_filter, "logit_filter", dtype=_bool, shape=(batch, vocab))
    barred = ~logit_filter.any(axis=1)
    if barred.any():
        raise ValueError(f"logit_filter allows no token in row {int(np.argmax(barred))}: leave at least one True")
    return logit_filter


def _check_mu(mirostat_mu, count):
    try:
        mu = [float(value) for value in mirostat_mu]
    except (TypeError, ValueError):
        raise TypeError(f"mirostat_mu must be a list of numbers, one for each row, got {shown(mirostat_mu)}") from None
    if len(mu) < count or not all(map(math.isfinite, mu)):
        raise ValueError(f"mirostat_mu must hold {count} finite numbers, one for each row, got {mu}")
    return mu


def _report(p, ids, kprobs, ktokens):
    """The first candidates of probability above 0, then the lowest ids that are not among them."""
    count = min(p.size, kprobs.size)
    count = int(np.count_nonzero(np.logical_and.accumulate(p[:count] > 0)))
    others = np.setdiff1d(np.arange(kprobs.size), ids[:count])
    kprobs[:count], ktokens[:count] = p[:count], ids[:count]
    kprobs[count:], ktokens[count:] = 0, others[: kprobs.size - count]


def _skewed(random, skew):
    if skew == 0:
        return random
    return np.power(random, np.float32(math.exp(min(-skew, 80.0))))


def _pick(p, random):
    """0.9998: in float32 the sum of many probabilities may end a little below 1."""
    reached = (np.add.accumulate(p) >= np.float32(float(random) * 0.9998)) & (p > 0)
    return int(np.argmax(reached)) if reached.any() else int(np.flatnonzero(p > 0)[-1])


def _next_random(random):
    """exllamav2's number for the next row: ten times r = frac((r + 1.337 + random)**2), rounded as it does."""
    r = random
    for _ in range(10):
        r = np.float32(float(r) + (1.337 + float(random)))
        r = np.fmod(r * r, np.float32(1))
    return r


# --- masks and copies -------------------------------------------------------------------------------------------------


@entry(writes=("filter",))
def logit_filter_exclusive(filter, exclusive_lists):
    """filter[b, id] becomes False for every id that is not in exclusive_lists[b]

    filter: bool [batch, vocab], in place; nothing becomes True. exclusive_lists: one list of ids per row, in any order;
    ids from vocab on have no effect, an empty list leaves nothing. Negative ids raise ValueError.
    """
    _on_cpu(filter=filter)
    check(filter, "filter", dtype=_bool, ndim=2, writes=True)
    if not isinstance(exclusive_lists, (list, tuple)) or len(exclusive_lists) != filter.shape[0]:
        raise ValueError(f"exclusive_lists must be {filter.shape[0]} lists of ids, one for each row of filter")
    lists = []
    for row, ids in enumerate(exclusive_lists):
        try:
            ids = np.asarray(ids if len(ids) else np.empty(0, np.int64))
        except (TypeError, ValueError):
            ids = np.empty((0, 0))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError(f"exclusive_lists[{row}] must be a list of token ids, got {exclusive_lists[row]!r:.60}")
        if ids.size and ids.min() < 0:
            raise ValueError(f"exclusive_lists[{row}] holds the negative id {ids.min()}")
        lists.append(ids)
    for row, ids in zip(filter, lists, strict=True):
        kept = np.zeros_like(row)
        kept[ids[ids < row.size]] = True
        row &= kept


@entry(writes=("tensor",))
def fast_fill_cpu_ones_bool(tensor):
    """Every element of the bool array becomes True."""
    _on_cpu(tensor=tensor)
    check(tensor, "tensor", dtype=_bool, writes=True)
    tensor[...] = True


@entry(writes=("a",))
def fast_fadd_cpu(a, b):
    """a += b, float32, with b repeated as often as it fits into a."""
    _on_cpu(a=a, b=b)
    check(a, "a", dtype=float32, writes=True)
    check(b, "b", dtype=float32)
    if a.size and (b.size == 0 or a.size % b.size):
        raise ValueError(f"b has {b.size} elements, which do not divide a's {a.size}")
    if a.size:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = a.reshape(-1, b.size)
            rows += b.reshape(-1)


def fast_copy_cpu(dst, src):
    """dst[...] = src: arrays of one shape and dtype, of any strides."""
    dst, src = _strided(dst, "dst"), _strided(src, "src")
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(f"src must be as dst, {dst.dtype} {dst.shape}, got {src.dtype} {src.shape}")
    if not dst.flags.writeable:
        raise ValueError("dst is read-only and would be written: pass a writable array")
    dst[...] = src


def _strided(array, name):
    """A NumPy view that keeps the strides; `entry` takes only contiguous arrays where it writes."""
    if isinstance(array, np.ndarray):
        return array
    if not is_array(array):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if gpu_of(array, name) is not None:
        raise TypeError(f"{name} is on a GPU, and this function works on the CPU: pass {name}.get() or {name}.cpu()")
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} ({type(array).__name__}) cannot be taken by DLPack: {first_line(error)}") from None


def dump_profile_results():
    """Nothing: there are no timings to print, as in a normal build of exllamav2."""


# --- stop strings -----------------------------------------------------------------------------------------------------


def partial_strings_match(match, offsets, strings):
    """Where the first of the strings that occurs in a text begins; -2 where the text ends within one, -1 for neither

    match: the text in UTF-32-LE; strings: all strings, likewise, one after the other; offsets: int32, byte offsets of
    their beginnings and of the end. Each is a buffer (bytes, or an array of bytes; offsets also an int32 array). Strings
    are tried in order and the first to occur fully (giving its position in characters) or to begin at the end of the
    text (giving -2) decides, whatever later ones do. Empty strings are passed over.
    """
    text, joined, bounds = _bytes(match, "match"), _bytes(strings, "strings"), _bytes(offsets, "offsets")
    for name, buffer in (("match", text), ("strings", joined), ("offsets", bounds)):
        if len(buffer) % 4:
            raise ValueError(f"{name} must hold whole values of 4 bytes, got {len(buffer)} bytes")
    bounds = np.frombuffer(bounds, "<i4").tolist()
    if any(b % 4 for b in bounds) or bounds != sorted(bounds) or bounds and not 0 <= bounds[0] <= bounds[-1] <= len(joined):
        raise ValueError(f"offsets must be rising multiples of 4 within the {len(joined)} bytes of strings")
    for begin, end in zip(bounds, bounds[1:], strict=False):
        found = _find(text, joined[begin:end])
        if found != -1:
            return found
    return -1


def _bytes(buffer, name):
    sizes = (1, 4) if name == "offsets" else (1,)
    try:
        view = memoryview(buffer)
        if view.itemsize in sizes:
            return view.cast("B").tobytes() if view.nbytes else b""
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"{name} must be a contiguous buffer of bytes: {error}") from None
    raise TypeError(f"{name} must be a buffer of bytes, got values of {view.itemsize} bytes: pass its bytes")


def _find(text, string):
    """partial_strings_match for one string."""
    if not string:
        return -1
    at = text.find(string)
    while at % 4 and at != -1:  # across characters
        at = text.find(string, at + 1)
    if at != -1:
        return at // 4
    longest = min(len(string), len(text))
    return -2 if any(text.endswith(string[:size]) for size in range(4, longest + 1, 4)) else -1
