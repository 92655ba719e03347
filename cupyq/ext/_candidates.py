"""The candidates of exllamav2's sampler: its stages, in its order of candidates, and its sorting.

A stage takes the probabilities p, float32 [n], and returns which to keep, as an order: indices into p.
"""

import heapq
import math

import numpy as np


@np.errstate(all="ignore")  # underflow is meant; overflow and 0 * Inf are ruled out where they could arise
def candidates(logits, allowed, settings, mu, xtc_mask):
    """(probabilities, ids) of what all stages leave, in exllamav2's order. mu: None where mirostat is off."""
    top_k, top_p, tfs, typical = (settings[name] for name in ("top_k", "top_p", "tfs", "typical"))
    temperature, smoothing = settings["temperature"], settings["smoothing_factor"]
    if temperature < 0.01:
        temperature, top_k = 1.0, 1
    p, best = _softmax(logits, allowed, temperature, smoothing)
    ids = np.arange(p.size)
    n = p.size  # the candidates; what earlier stages dropped stays behind them, where _at_least may find it

    def keep(order, count=None):
        count = order.size if count is None else count
        p[: order.size], ids[: order.size] = p[order], ids[order]
        p[:count] /= p[:count].sum()
        return count

    if 0 < top_k < n:
        n = keep(_top_k(p, int(top_k), best), int(top_k))
    if n > 1 and 0 < top_p < 1:
        n = keep(_top_p(p[:n], ids[:n], np.float32(top_p)))
    if n > 1 and settings["top_a"] > 0:
        n = keep(*_at_least(p, n, np.float32(settings["top_a"]) * p[:n].max() * p[:n].max()))
    if n > 1 and 0 < settings["min_p"] < 1:
        n = keep(*_at_least(p, n, np.float32(settings["min_p"]) * p[:n].max()))
    if n > 2 and 0 < tfs < 1:
        n = keep(_tail_free(p[:n], np.float32(tfs)))
    if n > 1 and 0 < typical < 1:
        n = keep(_typical(p[:n], np.float32(typical)))
    if n > 1 and mu is not None:
        n = keep(_surprising_less_than(p[:n], mu or 2.0 * settings["mirostat_tau"]))
    p, ids = p[:n], ids[:n]
    if n > 1:
        p = _heated(p, settings)
    if settings["xtc_probability"] > 0:
        p = _exclude_top_choices(p, ids, xtc_mask, settings)
    return p, ids


def _softmax(logits, allowed, temperature, smoothing):
    """float32 probabilities, and the first id with the largest logit."""
    largest = np.finfo(np.float32).max
    values = np.nan_to_num(logits, nan=-np.inf, posinf=largest, neginf=-np.inf)
    if allowed is not None:
        values = np.where(allowed, values, np.float32(-np.inf))
    best = int(np.argmax(values))
    if values[best] == -np.inf:
        best = 0 if allowed is None else int(np.argmax(allowed))
        values[best] = 0.0
    values -= values[best]
    temperature = np.float32(temperature)
    if smoothing > 0:
        temperature /= np.float32(smoothing)
        values *= -values
    # Neither 0 * Inf nor -Inf * 0, where the temperature is next to nothing or out of range.
    values *= np.minimum(np.float32(1) / np.minimum(temperature, largest), largest)
    p = np.exp(values, out=values)
    return p / p.sum(), best


def _descending(p, tie_break):
    """Order by falling probability, among equals by falling tie_break."""
    return np.lexsort((-tie_break, -p))


_HEAP_LIMIT = 500  # up to so many exllamav2 uses a heap, whose order among equals is known


def _top_k(p, k, best):
    """Order that begins with the k largest, falling."""
    if k == 1:
        return np.array([best])
    if k > _HEAP_LIMIT:
        large = np.flatnonzero(p >= np.partition(p, p.size - k - 1)[p.size - k - 1])
        return large[np.argsort(-p[large], kind="stable")[: k + 1]]
    threshold = np.partition(p, p.size - k)[p.size - k]
    # What a heap of k (probability, id) pairs holds at the end. It takes candidates up to the k-th that reaches the
    # threshold, later ones only if they are above; each of these drives out the lowest id at the threshold.
    reaching = np.flatnonzero(p >= threshold)
    early, late = reaching[:k], reaching[k:]
    late = late[p[late] > threshold]
    equal = early[p[early] == threshold]
    kept = np.concatenate([early[p[early] > threshold], equal[late.size :], late])
    return kept[_descending(p[kept], kept)]


def _top_p(p, ids, top_p):
    """The sums are float32 and change with every rounding as exllamav2's do, so this is a loop behind the crossing."""
    large = np.flatnonzero(p >= np.float32(1e-6))
    if large.size == 0:
        return np.array([np.argmax(p)])
    sums = np.add.accumulate(p[large])
    start = int(np.argmax(sums > top_p)) + 1 if sums[-1] > top_p else large.size
    total = sums[start - 1]
    heap = list(zip(p[large[:start]].tolist(), ids[large[:start]].tolist(), large[:start].tolist(), strict=True))
    heapq.heapify(heap)
    rest = large[start:]
    pairs = zip(p[rest].tolist(), ids[rest].tolist(), rest.tolist(), strict=True)
    while True:
        while total > top_p and len(heap) > 1:
            total -= np.float32(heapq.heappop(heap)[0])
        pair = next(pairs, None)
        if pair is None:
            break
        if total > top_p and pair[0] < heap[0][0]:
            continue
        heapq.heappush(heap, pair)
        total += np.float32(pair[0])
    return np.array([index for _, _, index in sorted(heap, reverse=True)])


def _gather_front(keep):
    """Order in which the kept come first: the holes among them are filled from the end, as by swaps from both ends."""
    count = int(np.count_nonzero(keep))
    order = np.arange(keep.size)
    moved = np.flatnonzero(keep[count:])[::-1] + count
    holes = np.flatnonzero(~keep[:count])
    order[holes], order[moved] = moved, holes
    return order, count


def _at_least(p, n, threshold):
    """(order, count): the first n candidates with p >= threshold in front, and exllamav2's one too many.

    Its two pointers pass each other where the last candidates to be looked at are all kept. The one behind them is then
    let in, before the last: one that is below the threshold, or where nothing was dropped the one behind all candidates,
    which an earlier stage had dropped. Callers see it in the tokens drawn, so it is kept, except behind the very end of
    the array, where exllamav2 reads and writes memory that is not its own.
    """
    keep = p[:n] >= np.minimum(threshold, p[:n].max())
    order, count = _gather_front(keep)
    passed = keep[count - 1] and (keep[count] if count < n else n < p.size)
    if not passed:
        return order, count
    if count == n:
        order = np.append(order, n)
    order[[count - 1, count]] = order[[count, count - 1]]
    return order, count + 1


_NEGLIGIBLE = np.float32(1e-8)  # sorting stages leave what is below behind


def _sorted_front(p):
    """Descending order of the candidates that count, equal ones in their order."""
    order, count = _gather_front(p >= _NEGLIGIBLE)
    order = order[:count]
    return order[np.argsort(-p[order], kind="stable")]


def _tail_free(p, tfs):
    order = _sorted_front(p)
    q = p[order]
    second = np.abs(2 * q[1:-1] - q[:-2] - q[2:])
    total = second.sum()
    if total == 0:
        return order
    within = np.add.accumulate(second / total) <= tfs
    return order[: 1 + (within.size if within.all() else int(np.argmin(within)))]


def _typical(p, typical):
    order, count = _gather_front(p >= _NEGLIGIBLE)
    order = order[:count]
    q = p[order]
    y = q + np.log(q + np.float32(1e-10))
    order = order[np.argsort(np.abs(y - (q * y).sum()), kind="stable")]
    reached = np.add.accumulate(p[order]) >= typical
    return order[: max(1, int(np.argmax(reached)) if reached.any() else order.size)]


def _surprising_less_than(p, mu):
    order = _sorted_front(p)
    return order[: max(1, int(np.count_nonzero(p[order] >= 2.0 ** min(-mu, 1023.0))))]


def _heated(p, settings):
    temperature, low, high = (settings[name] for name in ("post_temperature", "min_temp", "max_temp"))
    if high > low:
        some = p[p > 0]
        evenness = -(some * np.log(some)).sum(dtype=np.float64) / math.log(p.size)
        temperature = low + (high - low) * np.power(min(max(evenness, 0.0), 1.0), settings["temp_exponent"])
    if temperature == 1:
        return p
    if temperature <= 0:
        heated = np.zeros_like(p)
        heated[np.argmax(p)] = 1
        return heated
    exponent = np.minimum(np.float32(1 / temperature), np.finfo(np.float32).max)
    heated = np.where(p > 0, np.power(p / p.max(), exponent), np.float32(0))  # 0**0 is 1
    return heated / heated.sum()


def _exclude_top_choices(p, ids, mask, settings):
    eligible = p >= np.float32(settings["xtc_threshold"])
    if mask is not None:
        eligible &= mask[ids]
    if np.count_nonzero(eligible) < 2:
        return p
    chance = np.float32(min(settings["xtc_probability"], 1.0))
    least = np.flatnonzero(eligible)[np.argmin(p[eligible])]
    eligible[least] = False
    excluded = p[eligible].sum()
    remaining = np.maximum(1 - excluded, p[~eligible].max())
    return np.where(eligible, p * (1 - chance), p * (1 + chance * excluded / remaining))


# --- order --------------------------------------------------------------------------------------------------------------


def sort_first(p, count):
    """Order of exllamav2's quicksort, which stops once the first `count` (0: all) candidates stand in falling order.

    It is followed step by step because what stands behind is drawn in the order that its partitions happen to leave.
    """
    order, size = _gather_front(p >= _NEGLIGIBLE)
    if count == 0 or count >= size:
        order[:size] = order[:size][np.argsort(-p[order[:size]], kind="stable")]
        return order
    budget = 64 * size  # comparisons; a quicksort that goes astray would take size**2 of them
    segments = [(0, size)]
    while segments:
        low, high = segments.pop()
        q = p[order[low:high]]
        if np.all(q[:-1] >= q[1:]):
            continue
        budget -= q.size
        if q.size <= 5 or budget < 0:
            order[low:high] = order[low:high][np.argsort(-q, kind="stable")]
            continue
        moved, middle = _partition(q)
        order[low:high] = order[low:high][moved]
        segments.append((low, low + middle))
        if low + middle <= count:
            segments.append((low + middle + 1, high))
    return order


def _partition(q):
    """(order, position of the pivot) of Lomuto's partition around the last value: values >= it, it, smaller ones.

    Every value >= the pivot changes places with the first smaller one, which so goes to the end of the smaller ones:
    these are a queue, Q, to which a step appends either a new value or a copy of what stands at its head.
    """
    last = q.size - 1
    larger = q[:last] >= q[last]
    if larger.all():
        return np.arange(q.size), last
    first = int(np.argmin(larger))
    is_copy = np.append(larger[first:], True)  # the pivot's own exchange comes last
    copies_before = np.cumsum(is_copy) - is_copy
    source = np.where(is_copy, copies_before, np.arange(is_copy.size))
    while True:
        further = source[source]
        if np.array_equal(further, source):
            break
        source = further
    smaller = source[np.count_nonzero(is_copy) :] + first
    front = np.flatnonzero(larger)
    return np.concatenate([front, [last], smaller]), front.size
