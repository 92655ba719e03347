"""What `sample` does to one row between logits and draw, in NumPy: weights, and the filters in their order.

The kernel (cu/sample.cu) repeats it step by step. Weights are integers, so their sums are exact; the float64 steps that
decide something are written out in single roundings, logarithm and power of two included.
"""

import math

import numpy as np

ONE = 40
"""The likeliest token's weight is 2**40; tokens less likely than 2**-40 of it have weight 0."""
_FIXED = 24  # fractional bits of a token's number of halvings where those are summed

# --- one float64 recipe for both sides --------------------------------------------------------------------------------

# log2 of m in [sqrt(1/2), sqrt(2)): the series of artanh in t = (m - 1) / (m + 1), 2 / (n log(2)) for n = 21, 19, ... 1.
_LOG2 = [0.1373995277037108, 0.15186263588304877, 0.16972882833987804, 0.19235933878519512, 0.2219530832136867,
         0.2623081892525388, 0.3205988979753252, 0.41219858311113244, 0.5770780163555853, 0.9617966939259757,
         2.8853900817779268]  # fmt: skip
# 2**f on [-1/2, 1/2]: the Taylor series, log(2)**n / n! for n = 14, 13, ... 0.
_EXP2 = [6.778726354822543e-14, 1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10,
         7.054911620801121e-09, 1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05,
         0.00015403530393381606, 0.0013333558146428441, 0.009618129107628477, 0.055504108664821576, 0.2402265069591007,
         0.6931471805599453, 1.0]  # fmt: skip


def log2(x):
    """log2 of a float above 0, within a few 2**-53 of max(1, the result): the same bits as in the kernel."""
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = mantissa * 2, exponent - 1
    t = (mantissa - 1) / (mantissa + 1)
    square, series = t * t, _LOG2[0]
    for coefficient in _LOG2[1:]:
        series = series * square + coefficient
    return exponent + t * series


def exp2(x):
    """2**x of a float up to 1000, 0 below -1000: the same bits as in the kernel."""
    if not x >= -1000:
        return 0.0
    x = min(x, 1000.0)
    whole = round(x)  # half to even
    part, series = x - whole, _EXP2[0]
    for coefficient in _EXP2[1:]:
        series = series * part + coefficient
    return math.ldexp(series, whole)


# --- weights ----------------------------------------------------------------------------------------------------------


def halvings_of(row, temperature, smoothing=0.0):
    """How often the largest probability is halved to give each token's, float32: the exponent of the softmax in base 2.

    (max - x) / temperature, with smoothing s > 0 s * (max - x)**2 / temperature, times log2(e). row: float32 without NaN,
    finite maximum. Every step is one float32 rounding, in the order in which the kernel takes them.
    """
    smoothing = np.float32(smoothing)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scale = np.float32(1.4426950408889634)
        if smoothing > 0:
            scale = scale * smoothing
        scale = min(scale / np.float32(temperature), np.finfo(np.float32).max)
        distance = row.max() - row
        return (distance * distance if smoothing > 0 else distance) * scale


# A minimax fit of 2**-f on [0, 1], exact at both ends, relative error 3e-7 in float32; highest power first.
_HALVING = np.float32([-0.000939659308642149, 0.00919379387050867, -0.0552879199385643, 0.2401772290468216,
                       -0.6931434273719788, 1.0])  # fmt: skip


def weights_of(halvings):
    """floor(2**40 * 2**-halvings), uint64; 0 where that is 40 halvings or more, and for NaN."""
    with np.errstate(under="ignore"):
        halvings = np.where(halvings < ONE, halvings, np.float32(ONE))
        whole = halvings.astype(np.int32)
        part = halvings - whole.astype(np.float32)
        fraction = np.full_like(part, _HALVING[0])
        for coefficient in _HALVING[1:]:
            fraction = fraction * part + coefficient
    mantissa = (np.maximum(fraction, np.float32(0.5)) * np.float32(1 << 24)).astype(np.uint64)
    return np.where(halvings < ONE, mantissa << np.uint64(16) >> whole.astype(np.uint64), np.uint64(0))


def token_weights(row, temperature, smoothing=0.0):
    """floor(2**40 * exp((row - max) / temperature)), uint64 [vocab]; 0 where less likely than 2**-40 of the maximum."""
    return weights_of(halvings_of(row, temperature, smoothing))


def share_of(total, share):
    """The least weight that is at least this share of the total, 1 to total."""
    return min(max(math.ceil(float(share) * float(total)), 1), total)


# --- the row ----------------------------------------------------------------------------------------------------------


class Candidates:
    """The tokens of a row that are still in the draw.

    ids; weights, uint64; halvings, float32. The filters below take away tokens or, `retemper`, change the weights. Tokens
    stand by id until a filter needs their order: by logit, descending, ties by lowest id.
    """

    def __init__(self, row, temperature, smoothing=0.0):
        halvings = halvings_of(row, temperature, smoothing)
        weights = weights_of(halvings)
        self.ids = np.flatnonzero(weights)
        self.logits, self.weights, self.halvings = row[self.ids], weights[self.ids], halvings[self.ids]
        self._is_in_order = False

    @property
    def total(self):
        return int(self.weights.sum())

    def keep(self, which):
        self.ids, self.logits = self.ids[which], self.logits[which]
        self.weights, self.halvings = self.weights[which], self.halvings[which]

    def put_in_order(self):
        if not self._is_in_order:
            self.keep(np.argsort(-self.logits, kind="stable"))
            self._is_in_order = True

    def top_k(self, count):
        """The first `count` tokens of the order; 0 is all."""
        if 0 < count < self.ids.size:
            self.keep(self.logits >= np.partition(self.logits, -count)[-count])  # to sort few
            self.put_in_order()
            self.keep(slice(count))

    def top_p(self, share):
        """The shortest beginning of the order whose share of the total reaches `share`."""
        if share < 1:
            self.put_in_order()
            cumulative = np.cumsum(self.weights, dtype=np.uint64)
            self.keep(slice(int(np.searchsorted(cumulative, np.uint64(share_of(int(cumulative[-1]), share)))) + 1))

    def at_least(self, weight):
        """Tokens of at least this weight; the likeliest is always kept."""
        self.keep(self.weights >= min(np.uint64(weight), self.weights.max()))

    def top_a(self, factor):
        """p >= factor * max(p)**2, that is, weight >= factor * 2**40 * (2**40 / total)."""
        if factor > 0:
            self.at_least(min(math.ceil(float(factor) * 2.0**ONE * (2.0**ONE / float(self.total))), 1 << ONE))

    def min_p(self, factor):
        """p >= factor * max(p)."""
        self.at_least(math.ceil(float(factor) * 2.0**ONE))

    def tail_free(self, share):
        """One more than the beginning that holds up to `share` of the second differences' absolute values."""
        n = self.ids.size
        if not 0 < share < 1 or n < 3:
            return
        self.put_in_order()
        weights = self.weights.astype(np.int64)
        curvature = np.cumsum(np.abs(weights[:-2] - 2 * weights[1:-1] + weights[2:]))
        total = int(curvature[-1])
        if total > 0:
            limit = math.floor(float(share) * float(total))
            self.keep(slice(int(np.searchsorted(curvature, limit, side="right")) + 1))

    def mean_halvings(self):
        """The mean number of halvings, float64, times 2**24: entropy in bits, but for log2(total / 2**40)."""
        terms = self.weights * (self.halvings * np.float32(1 << _FIXED)).astype(np.uint64)
        low, high = int((terms & np.uint64(0xFFFFFFFF)).sum()), int((terms >> np.uint64(32)).sum())
        return (float(high) * 4294967296.0 + float(low)) / float(self.total)

    def typical(self, share):
        """Tokens whose -log p is nearest the entropy, nearest first, until their share reaches `share`.

        -log2 p is the number of halvings plus a constant, so the distance needs no logarithm; it is compared in units of
        2**-24, at equal distance the likelier first, then by lowest id.
        """
        if not 0 < share < 1:
            return
        distance = (self.halvings * np.float32(1 << _FIXED)).astype(np.int64) - round(self.mean_halvings())
        order = np.lexsort((self.ids, 2 * np.abs(distance) + (distance > 0)))
        cumulative = np.cumsum(self.weights[order], dtype=np.uint64)
        count = int(np.searchsorted(cumulative, np.uint64(share_of(self.total, share)))) + 1
        self.keep(np.sort(order[:count]))

    def mirostat(self, tau, mu):
        """Tokens of surprise -log2 p up to mu; the likeliest is always kept."""
        if tau > 0:
            exponent = float(np.fmin(np.fmax(-np.float32(mu), np.float32(-64)), np.float32(64)))
            self.at_least(min(math.ceil(float(self.total) * exp2(exponent)), 1 << (ONE + 1)))

    def retemper(self, post_temperature, min_temp, max_temp, exponent):
        """p**(1 / T), T = post_temperature or, where max_temp > min_temp, a power of the entropy between the two."""
        temperature, n = np.float32(post_temperature), self.ids.size
        if max_temp > min_temp:
            if n == 1:
                return
            entropy = log2(float(self.total)) - ONE + self.mean_halvings() * 2.0**-_FIXED
            relative = min(max(entropy / log2(float(n)), 0.0), 1.0)
            power = exp2(float(exponent) * log2(relative)) if relative > 0 else float(exponent == 0)
            temperature = np.float32(float(min_temp) + (float(max_temp) - float(min_temp)) * power)
        if temperature == 1:
            return
        with np.errstate(over="ignore", divide="ignore", under="ignore"):
            slope = min(np.float32(1) / temperature, np.finfo(np.float32).max)
            self.weights = weights_of((self.halvings - self.halvings.min()) * slope)
        self.keep(self.weights > 0)

    def exclude_top(self, probability, threshold, mask, random):
        """XTC: with that probability, all tokens of at least the threshold go, but for the least likely of them."""
        if (random >> 11) * 2.0**-53 < float(probability):
            self.put_in_order()
            is_high = self.weights >= np.uint64(share_of(self.total, threshold))
            if mask is not None:
                is_high &= mask[self.ids] != 0
            high = np.flatnonzero(is_high)
            kept = np.ones(self.ids.size, bool)
            kept[high[:-1]] = False
            self.keep(kept)

    def draw(self, random, skew):
        """The place of the token that the random number (64 bits) picks."""
        total = self.total
        if skew == 0:
            by_id = np.argsort(self.ids) if self._is_in_order else slice(None)
            place = _place(self.weights[by_id], random * total >> 64)
            return int(by_id[place]) if self._is_in_order else place
        self.put_in_order()
        uniform = (random >> 11) * 2.0**-53
        if uniform > 0:
            uniform = exp2(exp2(float(-skew) * 1.4426950408889634) * log2(uniform))
        return _place(self.weights, min(math.floor(uniform * float(total)), total - 1))


def _place(weights, target):
    return int(np.searchsorted(np.cumsum(weights, dtype=np.uint64), np.uint64(target), side="right"))


def kept_weights(row, temperature, top_k, top_p, min_p):
    """Weights, uint64 [vocab], of the tokens that the filters keep; 0 for the others. row: float32, finite maximum."""
    candidates = Candidates(row, temperature)
    candidates.top_k(top_k)
    candidates.top_p(top_p)
    candidates.min_p(min_p)
    weights = np.zeros(row.size, np.uint64)
    weights[candidates.ids] = candidates.weights
    return weights


def probability_of(weight, total):
    """weight / total in float64, rounded to float32."""
    return np.float32(float(weight) / float(total))


def surprised(mu, tau, eta, weight, total):
    """The next mu of mirostat: mu + eta * (tau + log2 p), rounded to float32."""
    log_p = log2(float(weight)) - log2(float(total))
    with np.errstate(over="ignore"):
        return np.float32(float(mu) + float(eta) * (float(tau) + log_p))
