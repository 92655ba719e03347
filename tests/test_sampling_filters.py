"""The filters of sample beyond top-k, top-p and min-p: against plain float64 loops, and the kernel against the reference."""

import math

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import host, move, on_both
from test_sampling import chi_square_excess

from cupyq._arrays import namespace
from cupyq.ops import sampling
from cupyq.ops.sampling import SamplerTable, philox_bits, sample, sample_workspace_size
from cupyq.ops.sampling_filters import Candidates, exp2, log2

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
INF, NAN = np.inf, np.nan

# --- the float64 recipes ----------------------------------------------------------------------------------------------


def test_log2_and_exp2_are_accurate():
    random = np.random.default_rng(0)
    for x in [1.0, 2.0, 0.5, 2.0**-1022, 1.7e308, *np.exp(random.uniform(-600, 600, 5000)).tolist()]:
        assert abs(log2(x) - math.log2(x)) <= 4 * 2.0**-53 * max(1, abs(math.log2(x)))
    for x in [0.0, 1.0, -1000.0, 0.5, -0.5, *random.uniform(-1000, 1000, 5000).tolist()]:
        assert abs(exp2(x) / 2.0**x - 1) <= 4 * 2.0**-53
    assert exp2(-1000.001) == exp2(-INF) == exp2(NAN) == 0 and exp2(2000.0) == 2.0**1000
    assert [log2(2.0**n) for n in (-20, 0, 1, 62)] == [-20, 0, 1, 62]


# --- what is left, against plain loops --------------------------------------------------------------------------------


def left(logits, library="numpy", **settings):
    """[{id: probability}] of the final distribution of each row, as sample tells it."""
    rows, vocab = logits.shape
    ids = move(library, np.full((rows, min(vocab, 1024)), -7, np.int32))
    probabilities = move(library, np.full(ids.shape, NAN, np.float32))
    drawn = move(library, np.full(rows, NAN, np.float32))
    settings = {
        name: move(library, value) if name in ("mirostat_mu", "xtc_mask") else value for name, value in settings.items()
    }
    chosen = host(sample(move(library, logits), top_ids=ids, top_probabilities=probabilities, probabilities=drawn, **settings))
    ids, probabilities, drawn = host(ids), host(probabilities), host(drawn)
    result = []
    for r in range(rows):
        count = np.count_nonzero(ids[r] >= 0)
        assert np.all(ids[r, count:] == -1) and np.all(probabilities[r, count:] == 0)
        kept = dict(zip(ids[r, :count].tolist(), probabilities[r, :count].tolist(), strict=True))
        assert len(kept) == count and list(kept.values()) == sorted(kept.values(), reverse=True)
        if vocab <= 1024 and count:
            assert abs(sum(kept.values()) - 1) < 1e-5 and drawn[r] == np.float32(kept[int(chosen[r])])
        result.append(kept)
    return result


class Plain:
    """The published definitions in float64; `margin` is how near, relatively, the closest decision was."""

    def __init__(self, row, temperature=1.0, smoothing=0.0):
        largest = max(row)
        exponent = [-((largest - x) ** 2) * smoothing if smoothing else x - largest for x in row]
        weight = {i: math.exp(e / temperature) for i, e in enumerate(exponent)}
        self.row, self.margin = row, 1.0
        self.set({i: w for i, w in weight.items() if w > 2.0**-40})
        self.near([w * 2.0**40 for w in weight.values()], 1.0)

    def set(self, weight):
        total = math.fsum(weight.values())
        order = sorted(weight, key=lambda i: (-self.row[i], i))
        self.p = {i: weight[i] / total for i in order}

    def near(self, values, limit):
        for value in values:
            self.margin = min(self.margin, abs(value - limit) / max(abs(limit), 1e-9))

    def top_k(self, count):
        if count:
            self.set({i: self.p[i] for i in list(self.p)[:count]})

    def top_p(self, share):
        if share < 1:
            self.set(self._reaching(list(self.p), share))

    def _reaching(self, ids, share):
        kept = {}
        for i in ids:
            kept[i] = self.p[i]
            self.near([math.fsum(kept.values())], share)
            if math.fsum(kept.values()) >= share:
                break
        return kept

    def at_least(self, limit):
        largest = max(self.p.values())
        limit = min(limit, largest)
        self.near([p for p in self.p.values() if p != largest], limit)
        self.set({i: p for i, p in self.p.items() if p >= limit})

    def top_a(self, a):
        if a:
            self.at_least(a * max(self.p.values()) ** 2)

    def min_p(self, value):
        if value:
            self.at_least(value * max(self.p.values()))

    def tfs(self, z):
        ids, p = list(self.p), list(self.p.values())
        if not 0 < z < 1 or len(ids) < 3:
            return
        curvature = [abs((p[i] - p[i + 1]) - (p[i + 1] - p[i + 2])) for i in range(len(p) - 2)]
        total = math.fsum(curvature)
        if total < 1e-9:  # equal probabilities: nothing bends
            self.margin = min(self.margin, 1.0 if total == 0 else 0.0)
            return
        kept, sum = 1, 0.0
        for c in curvature:
            sum += c
            self.near([sum / total], z)
            if sum / total > z:
                break
            kept += 1
        self.set({i: self.p[i] for i in ids[:kept]})

    def entropy(self):
        return -math.fsum(p * math.log(p) for p in self.p.values())

    def typical(self, share):
        if not 0 < share < 1:
            return
        entropy = self.entropy()
        distance = {i: abs(-math.log(p) - entropy) for i, p in self.p.items()}
        ids = sorted(self.p, key=lambda i: (distance[i], i))
        kept = self._reaching(ids, share)
        if len(kept) < len(ids):  # was it clear which of the two next to the cut comes first?
            self.margin = min(self.margin, distance[ids[len(kept)]] - distance[ids[len(kept) - 1]])
        self.set(kept)

    def mirostat(self, tau, mu):
        if tau:
            self.at_least(2.0**-mu)

    def retemper(self, post_temperature, min_temp, max_temp, exponent):
        temperature = post_temperature
        if max_temp > min_temp:
            if len(self.p) == 1:
                return
            relative = min(max(self.entropy() / math.log(len(self.p)), 0.0), 1.0)
            temperature = min_temp + (max_temp - min_temp) * relative**exponent
        largest = max(self.p.values())
        weight = {i: math.exp(max(math.log(p / largest) / temperature, -700)) for i, p in self.p.items()}
        if temperature != 1:
            self.near([w * 2.0**40 for w in weight.values()], 1.0)
            self.set({i: w for i, w in weight.items() if w > 2.0**-40})

    def xtc(self, threshold, mask):
        self.near(self.p.values(), threshold)
        high = [i for i, p in self.p.items() if p >= threshold and (mask is None or mask[i])]
        self.set({i: p for i, p in self.p.items() if i not in high[:-1]})


DEFAULTS = {"temperature": 1.0, "smoothing": 0.0, "top_k": 0, "top_p": 1.0, "top_a": 0.0, "min_p": 0.0, "tfs": 0.0}
DEFAULTS |= {"typical": 0.0, "mirostat_tau": 0.0, "post_temperature": 1.0, "min_temp": 0.0, "max_temp": 0.0}
DEFAULTS |= {"temp_exponent": 1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1}


def plain_left(row, mu=0.0, mask=None, **settings):
    s = DEFAULTS | settings
    s = {name: value if name == "top_k" else float(np.float32(value)) for name, value in s.items()}
    plain = Plain(row.tolist(), s["temperature"], s["smoothing"])
    for name in ("top_k", "top_p", "top_a", "min_p", "tfs", "typical"):
        getattr(plain, name)(s[name])
    plain.mirostat(s["mirostat_tau"], mu)
    plain.retemper(s["post_temperature"], s["min_temp"], s["max_temp"], s["temp_exponent"])
    if s["xtc_probability"]:  # tests set it to 0 or 1
        plain.xtc(s["xtc_threshold"], mask)
    return plain


CHOICES = {
    "temperature": [0.5, 2.0],
    "smoothing": [0.1, 0.5, 2.0],
    "top_k": [1, 3, 10, 40],
    "top_p": [0.3, 0.9, 0.99],
    "top_a": [0.05, 0.5, 3.0, 30.0],
    "min_p": [0.02, 0.3],
    "tfs": [0.3, 0.9, 0.99],
    "typical": [0.2, 0.6, 0.95],
    "mirostat_tau": [2.0],
    "post_temperature": [0.2, 0.7, 3.0, 100.0],
    "xtc_probability": [1.0],
}


def random_settings(random, names):
    settings = {}
    for name in names:
        if name == "dynamic":
            settings |= {"min_temp": random.choice([0.0, 0.5]), "max_temp": random.choice([1.0, 4.0])}
            settings["temp_exponent"] = random.choice([0.0, 0.5, 1.0, 3.0])
        else:
            settings[name] = random.choice(CHOICES[name]).item()
            if name == "xtc_probability":
                settings["xtc_threshold"] = random.choice([0.01, 0.1, 0.3])
    return settings


def random_row(random, size=None):
    row = random.normal(0, random.choice([0.5, 2.0, 5.0]), size or random.integers(1, 60)).astype(np.float32)
    return np.round(row) if random.random() < 0.2 else row  # many ties


def assert_left_is_plain(names, count, seed, least_decided):
    random = np.random.default_rng(seed)
    decided = 0
    for _ in range(count):
        row, settings = random_row(random), random_settings(random, names(random))
        mu, mask = np.float32(random.choice([0.0, 1.0, 3.0, 8.0])), random.random(row.size) < 0.7
        expected = plain_left(row, float(mu), mask, **settings)
        if expected.margin > 1e-4:
            decided += 1
            extra = {"mirostat_mu": np.array([mu]), "xtc_mask": mask} if settings.get("mirostat_tau") else {"xtc_mask": mask}
            (result,) = left(row[None], **settings, **extra)
            assert list(result) == list(expected.p), (row, settings)
            for id, p in result.items():
                # Weights are whole numbers of 2**-40 of the largest.
                assert abs(p - expected.p[id]) <= 3e-4 * expected.p[id] + 2.0**-39, (row, settings)
    assert decided >= least_decided


@pytest.mark.parametrize("name", [*CHOICES, "dynamic"])
def test_each_filter_keeps_what_its_publication_says(name):
    assert_left_is_plain(lambda random: [name], 80, 7, 40)


def test_filters_in_their_order_keep_what_plain_loops_keep():
    every = [*CHOICES, "dynamic"]
    assert_left_is_plain(lambda random: [n for n in every if random.random() < 0.4], 300, 5, 120)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_a": 1.0}, [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9]),  # 0.4 * 0.4 = 0.16
        ({"top_a": 1e6}, [1.0]),
        ({"typical": 0.25}, [0, 1.0]),  # entropy 1.28 nats; -log p is 0.92, 1.20, 1.61, 2.30
        ({"typical": 0.35}, [0, 0.6, 0.4]),
        ({"typical": 0.55}, [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.15}, [0, 0, 0.2 / 0.3, 0.1 / 0.3]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.35}, [0.4, 0.3, 0.2, 0.1]),  # one alone stays
        ({"xtc_probability": 1.0, "xtc_threshold": 0.15, "xtc_mask": np.array([0, 1, 1, 1], bool)}, [4 / 7, 0, 2 / 7, 1 / 7]),
        ({"post_temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"post_temperature": 0.5, "top_p": 0.65}, [16 / 25, 9 / 25]),  # 0.4 + 0.3 reach it before, 16 / 30 would after
        ({"temperature": 0.5, "top_p": 0.55}, [16 / 25, 9 / 25]),
        ({"temperature": 0.5, "top_p": 0.5}, [1.0]),
        ({"min_temp": 0.5, "max_temp": 2.0, "temp_exponent": 0.0}, [0.3254, 0.2818, 0.2301, 0.1627]),  # square roots
        ({"mirostat_tau": 1.0, "mirostat_mu": np.float32([1.8])}, [4 / 7, 3 / 7]),  # 2**-1.8 = 0.287
        ({"mirostat_tau": 1.0, "mirostat_mu": np.float32([0.0])}, [1.0]),
        ({"smoothing": 1.0}, [math.exp(-(math.log(0.4 / p) ** 2)) / 2.68542 for p in (0.4, 0.3, 0.2, 0.1)]),
    ],
)
def test_filters_by_hand(settings, expected):
    row = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]]))
    (result,) = left(row, **settings)
    assert set(result) == {i for i, p in enumerate(expected) if p}
    assert all(abs(result[i] - expected[i]) < 1e-4 for i in result)


def test_tail_free_by_hand():
    """0.5, 0.3, 0.1, 0.06, 0.04: second differences 0, 0.16, 0.02, of 0.18."""
    row = np.log(np.float32([[0.5, 0.3001, 0.1, 0.06, 0.04]]))
    for share, kept in [(0.002, 2), (0.5, 2), (0.88, 2), (0.9, 3), (0.999, 3)]:
        assert len(left(row, tfs=share)[0]) == kept
    assert len(left(np.zeros((1, 9), np.float32), tfs=0.5)[0]) == 9  # nothing bends
    assert len(left(row[:, :2].copy(), tfs=0.01)[0]) == 2
    for off in (0.0, 1.0):
        assert len(left(row, tfs=off, typical=off)[0]) == 5


def test_one_token_is_always_left():
    hard = {"top_a": 1e30, "min_p": 1.0, "tfs": 1e-30, "typical": 1e-30, "xtc_probability": 1.0, "xtc_threshold": 0.0}
    hard |= {"max_temp": 1e-30, "smoothing": 1e30, "mirostat_tau": 1e-30}
    random = np.random.default_rng(3)
    for size in (1, 2, 3, 50):
        for row in (random.normal(0, 3, (4, size)), np.zeros((4, size)), np.round(random.normal(0, 1, (4, size)))):
            for mu in (-1e30, -5.0, 0.0, 1e30, INF, -INF, NAN):
                mus = np.full(4, mu, np.float32)
                drawn = sample(row.astype(np.float32), **hard, mirostat_mu=mus, seed=np.arange(4))
                assert np.all((drawn >= 0) & (drawn < size))


def test_rows_without_a_choice():
    logits = np.float32([[1, 3, 2], [NAN, -INF, NAN], [1, INF, INF], [1, 3, 3]])
    mu, drawn = np.float32([5, 5, 5, 5]), np.full(4, NAN, np.float32)
    ids, probabilities = np.full((4, 2), -7, np.int32), np.full((4, 2), NAN, np.float32)
    settings = {"temperature": [0, 1, 1, 1], "top_k": [0, 0, 0, 1], "mirostat_tau": 2.0, "mirostat_eta": 0.5, "skew": 1.0}
    result = sample(logits, **settings, mirostat_mu=mu, probabilities=drawn, top_ids=ids, top_probabilities=probabilities)
    assert result.tolist() == [1, -1, 1, 1] and drawn.tolist() == [1, 0, 1, 1]
    assert ids.tolist() == [[1, -1], [-1, -1], [1, -1], [1, -1]]
    assert probabilities.tolist() == [[1, 0], [0, 0], [1, 0], [1, 0]]
    assert mu.tolist() == [6, 5, 6, 6]  # a sure token's surprise is 0


def test_top_tokens_stand_in_order_of_logits_and_ids():
    row = np.float32([[2, 5, 5, 1, 5, 3]])
    for count in (0, 1, 2, 3, 6, 9):
        ids = np.full((1, count), -7, np.int32)
        probabilities = np.full((1, count), NAN, np.float32)
        sample(row, top_ids=ids, top_k=5)
        sample(row, top_probabilities=probabilities, top_k=5)
        assert ids[0].tolist() == ([1, 2, 4, 5, 0] + [-1] * 4)[:count]
        assert np.count_nonzero(probabilities) == min(count, 5)


# --- the draw ---------------------------------------------------------------------------------------------------------


def dense(kept, size):
    return np.array([kept.get(i, 0.0) for i in range(size)])


STATISTICS = {
    "filters": {"temperature": 1.3, "tfs": 0.97, "typical": 0.9, "max_temp": 2.0, "xtc_probability": 1.0},
    "coin": {"xtc_probability": 0.3, "xtc_threshold": 0.05},
    "skew": {"skew": 0.7},
    "negative skew": {"skew": -1.5, "top_p": 0.95},
    "mirostat": {"mirostat_tau": 3.0, "smoothing": 0.3},
}


def exact_probability(row, settings):
    settings = dict(settings)
    skew, coin = settings.pop("skew", 0.0), settings.pop("xtc_probability", 0.0)
    mu = settings.get("mirostat_tau", 0.0) * 2
    plain = plain_left(row, mu, **settings)
    assert plain.margin > 1e-4
    probability = dense(plain.p, row.size)
    if coin:
        with_xtc = plain_left(row, mu, xtc_probability=1.0, **settings)
        assert with_xtc.margin > 1e-4
        probability = coin * dense(with_xtc.p, row.size) + (1 - coin) * probability
    if skew:
        cumulative = 0.0
        for id, p in plain.p.items():  # u**exp(-skew) < F where u < F**exp(skew)
            upper = min(cumulative + p, 1.0)
            probability[id] = upper ** math.exp(skew) - cumulative ** math.exp(skew)
            cumulative = upper
    assert abs(probability.sum() - 1) < 1e-9
    return probability


def draws(library, row, settings, count):
    settings = dict(settings)
    if "mirostat_tau" in settings:
        settings["mirostat_mu"] = move(library, np.full(count, 2 * settings["mirostat_tau"], np.float32))
    return host(sample(move(library, np.tile(row, (count, 1))), **settings, seed=np.arange(count)))


@on_both
@pytest.mark.parametrize("which", STATISTICS)
def test_draws_follow_the_probabilities(library, which):
    row = np.random.default_rng(11).normal(0, 1.2, 20).astype(np.float32)
    drawn = draws(library, row, STATISTICS[which], 4000 if library == "numpy" else 100_000)
    assert chi_square_excess(drawn, exact_probability(row, STATISTICS[which])) < 1
    wrong = {"filters": {"typical": 0.6}, "coin": {"xtc_probability": 0.4}, "skew": {"skew": 0.5}}
    wrong |= {"negative skew": {"skew": -1.2}, "mirostat": {"smoothing": 0.4}}
    assert chi_square_excess(drawn, exact_probability(row, STATISTICS[which] | wrong[which])) > 1


def test_the_coin_and_the_draw_are_independent():
    """XTC takes its own random number: under either outcome the drawn tokens spread as they should."""
    row = np.log(np.float32([0.3, 0.3, 0.2, 0.2]))
    seeds = np.arange(6000)
    coin = (philox_bits(seeds, 0, 2) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < np.float32(0.5)
    drawn = sample(np.tile(row, (6000, 1)), xtc_probability=0.5, xtc_threshold=0.25, seed=seeds)
    assert abs(coin.mean() - 0.5) < 0.03
    assert chi_square_excess(drawn[~coin], np.array([0.3, 0.3, 0.2, 0.2])) < 1
    assert chi_square_excess(drawn[coin], np.array([0, 3 / 7, 2 / 7, 2 / 7])) < 1


@on_both
def test_mirostat_keeps_to_its_surprise(library):
    """mu follows mu + eta * (tau + log2 p), and the mean surprise comes to tau."""
    random = np.random.default_rng(12)
    tau, eta, steps = 2.5, 0.1, 600
    mu = move(library, np.full(1, 2 * tau, np.float32))
    drawn, ids = move(library, np.empty(1, np.float32)), move(library, np.empty((1, 1), np.int32))
    surprises, expected = [], np.float64(2 * tau)
    for step in range(steps):
        logits = move(library, random.normal(0, 2, (1, 300)).astype(np.float32))
        settings = {"mirostat_tau": tau, "mirostat_eta": eta, "mirostat_mu": mu, "step": step}
        sample(logits, **settings, probabilities=drawn, top_ids=ids)
        surprises.append(-math.log2(float(host(drawn)[0])))
        expected = np.float32(expected + float(np.float32(eta)) * (tau - surprises[-1]))
        assert abs(host(mu)[0] - expected) < 1e-5
        expected = np.float64(host(mu)[0])
    assert abs(np.mean(surprises[100:]) - tau) < 0.1


def test_skew_is_zero_at_the_limit_of_small_ones():
    """With tokens by ascending id in their order, a skew of next to nothing draws what none draws."""
    logits = -np.sort(np.random.default_rng(13).normal(0, 2, (300, 40)).astype(np.float32))
    assert np.array_equal(sample(logits, seed=np.arange(300)), sample(logits, seed=np.arange(300), skew=1e-9))
    assert np.all(sample(logits, seed=np.arange(300), skew=-100) == 0)
    assert np.mean(sample(logits, seed=np.arange(300), skew=3)) > 5


# --- tables and batches -----------------------------------------------------------------------------------------------


def batch(vocab, dtype, rows=48, seed=0):
    """Logits, settings, state and mask that reach every stage, one row unlike the next."""
    random = np.random.default_rng([vocab, seed])
    logits = random.normal(0, 1, (rows, vocab)) * random.choice([0.01, 1, 3, 8], (rows, 1))
    kind = np.arange(rows) % 6
    logits[kind == 1] = np.round(logits[kind == 1])
    few = random.random((rows, vocab)) < 0.5
    logits[(kind == 2)[:, None] & few] = -INF
    logits[(kind == 3)[:, None] & few] = NAN
    if rows > 12:
        logits[9], logits[10, vocab // 2], logits[11] = NAN, INF, 1.5

    def some(off, values, share=0.35):
        return np.where(random.random(rows) < share, random.choice(values, rows), off)

    settings = {
        "temperature": some(1.0, [0.0, 0.5, 0.7, 2.0]),
        "smoothing": some(0.0, [0.1, 0.5, 2.0], 0.2),
        "top_k": some(0, [1, 2, 20, 1500, vocab // 2 + 1, vocab + 1], 0.3).astype(np.int64),
        "top_p": some(1.0, [0.1, 0.5, 0.9, 0.999], 0.3),
        "top_a": some(0.0, [0.01, 0.2, 5.0], 0.2),
        "min_p": some(0.0, [0.01, 0.1, 1.0], 0.2),
        "tfs": some(0.0, [0.5, 0.9, 0.99]),
        "typical": some(0.0, [0.2, 0.5, 0.95]),
        "mirostat_tau": some(0.0, [1.0, 3.0, 6.0]),
        "mirostat_eta": random.random(rows),
        "post_temperature": some(1.0, [0.3, 2.0, 10.0]),
        "min_temp": some(0.0, [0.1, 0.5]),
        "max_temp": some(0.0, [1.5, 3.0]),
        "temp_exponent": some(1.0, [0.0, 0.5, 2.0]),
        "xtc_probability": some(0.0, [0.5, 1.0]),
        "xtc_threshold": some(0.1, [0.0, 0.001, 0.02]),
        "skew": some(0.0, [-1.0, -0.2, 0.5, 3.0]),
        "seed": random.integers(-(2**63), 2**63, rows),
        "step": random.integers(0, 2**40, rows),
    }
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32).astype(dtype)
    return logits, settings, (random.random(rows) * 12).astype(np.float32), random.random(vocab) < 0.8


def everything(library, logits, settings, mu, mask, count=5, **further):
    """All that sample gives, on the host: ids, mu, probabilities, first tokens and theirs."""
    rows = len(logits)
    mu, drawn = move(library, mu.copy()), move(library, np.full(rows, NAN, np.float32))
    ids = move(library, np.full((rows, count), -7, np.int32))
    probabilities = move(library, np.full((rows, count), NAN, np.float32))
    states = {"mirostat_mu": mu, "probabilities": drawn, "top_ids": ids, "top_probabilities": probabilities}
    result = sample(move(library, logits), **settings, **states, xtc_mask=move(library, mask), **further)
    return [host(array) for array in (result, mu, drawn, ids, probabilities)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_rows_do_not_depend_on_their_batch():
    logits, settings, mu, mask = batch(129, np.float32)
    whole = everything("numpy", logits, settings, mu, mask)
    order = np.random.default_rng(1).permutation(48)
    shuffled = everything("numpy", logits[order], {n: v[order] for n, v in settings.items()}, mu[order], mask)
    assert_same([array[order] for array in whole], shuffled)
    for r in range(0, 48, 2):
        alone = {name: value[r].item() for name, value in settings.items()}
        assert_same([array[r : r + 1] for array in whole], everything("numpy", logits[r : r + 1], alone, mu[r : r + 1], mask))


@on_both
def test_a_table_stands_for_the_settings(library):
    logits, settings, mu, mask = batch(300, np.float32)
    xp = namespace(array=move(library, mu))
    step = {"step": settings.pop("step")}
    table = SamplerTable(48, xp, **settings)
    assert_same(
        everything(library, logits, {"table": table} | step, mu, mask), everything("numpy", logits, settings | step, mu, mask)
    )
    one = {"top_k": 40, "tfs": 0.9, "seed": 5}
    for step in (3, np.arange(48), move(library, np.arange(48))):
        result = host(sample(move(library, logits), table=SamplerTable(48, xp, **one), step=step))
        assert np.array_equal(result, sample(logits, **one, step=host(step) if hasattr(step, "shape") else step))
    classic = SamplerTable(48, xp, temperature=0.7, top_k=np.full(48, 9))
    assert np.array_equal(host(sample(move(library, logits), table=classic)), sample(logits, temperature=0.7, top_k=9))
    assert "top_k" in repr(classic) and "tfs" not in repr(classic)


# --- errors -----------------------------------------------------------------------------------------------------------

BAD = [
    ({"smoothing": -1.0}, ValueError, "smoothing must be finite in float32, >= 0, got -1.0"),
    ({"top_a": -0.1}, ValueError, "top_a must be finite"),
    ({"tfs": 1.1}, ValueError, "tfs must be from 0 to 1, got 1.1"),
    ({"tfs": [0.5, NAN, 0.5]}, ValueError, "tfs must be from 0 to 1, got nan"),
    ({"typical": -0.1}, ValueError, "typical must be from 0 to 1"),
    ({"typical": "much"}, TypeError, "typical must be a real number"),
    ({"typical": [0.5] * 4}, ValueError, r"typical must be one number or have shape \(3,\)"),
    ({"mirostat_tau": -1.0}, ValueError, "mirostat_tau must be finite"),
    ({"mirostat_tau": 2.0}, ValueError, "mirostat_tau is given without mirostat_mu"),
    ({"mirostat_eta": INF}, ValueError, "mirostat_eta must be finite"),
    ({"post_temperature": 0.0}, ValueError, "post_temperature must be finite in float32, > 0"),
    ({"post_temperature": 1e-50}, ValueError, "post_temperature"),
    ({"min_temp": -1.0}, ValueError, "min_temp"),
    ({"max_temp": INF}, ValueError, "max_temp"),
    ({"temp_exponent": -1.0}, ValueError, "temp_exponent"),
    ({"xtc_probability": 2.0}, ValueError, "xtc_probability must be from 0 to 1"),
    ({"xtc_threshold": -0.5}, ValueError, "xtc_threshold must be from 0 to 1"),
    ({"skew": 101.0}, ValueError, "skew must be from -100 to 100"),
    ({"skew": NAN}, ValueError, "skew must be from -100 to 100"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        sample(np.zeros((3, 8), np.float32), **settings)
    assert "\n" not in str(caught.value)


def bad_arrays(xp):
    logits = xp.zeros((3, 8), np.float32)
    memory = xp.zeros(24, np.float32)
    return [
        ({"mirostat_mu": xp.zeros(4, np.float32)}, ValueError, "mirostat_mu must have shape"),
        ({"mirostat_mu": xp.zeros(3)}, TypeError, "mirostat_mu must have dtype float32"),
        ({"xtc_mask": xp.zeros(9, bool)}, ValueError, "xtc_mask must have shape"),
        ({"xtc_mask": xp.zeros(8, np.int32)}, TypeError, "xtc_mask must have dtype"),
        ({"probabilities": xp.zeros((3, 1), np.float32)}, ValueError, "probabilities must have shape"),
        ({"top_ids": xp.zeros((2, 4), np.int32)}, ValueError, "top_ids must have shape"),
        ({"top_ids": xp.zeros((3, 4), np.int64)}, TypeError, "top_ids must have dtype int32"),
        ({"top_ids": xp.zeros((3, 1025), np.int32)}, ValueError, "top_ids must have at most 1024 columns"),
        (
            {"top_ids": xp.zeros((3, 4), np.int32), "top_probabilities": xp.zeros((3, 5), np.float32)},
            ValueError,
            "top_probabilities must have shape",
        ),
        ({"logits": memory.reshape(3, 8), "probabilities": memory[3:6]}, ValueError, "probabilities overlaps logits"),
        ({"table": SamplerTable(3, xp, top_k=2), "top_k": 3}, ValueError, "top_k and table are both given"),
        ({"table": SamplerTable(4, xp)}, ValueError, "table has 4 rows, logits 3"),
        ({"table": SamplerTable(3, xp, mirostat_tau=1.0)}, ValueError, "without mirostat_mu"),
        ({"table": {"top_k": 3}}, TypeError, "table must be"),
    ], logits


@pytest.mark.parametrize("case", range(14))
def test_bad_arrays(case):
    cases, logits = bad_arrays(np)
    arguments, error, message = cases[case]
    with pytest.raises(error, match=message):
        sample(**{"logits": logits} | arguments)


def test_bad_tables():
    for arguments, error, message in [
        ({"step": 3}, TypeError, "SamplerTable has no setting 'step'"),
        ({"topk": 3}, TypeError, "no setting 'topk'"),
        ({"xp": math}, TypeError, "xp must be numpy or cupy"),
        ({"tfs": 2.0}, ValueError, "tfs must be"),
        ({"rows": -1}, ValueError, "rows must be a whole number"),
    ]:
        with pytest.raises(error, match=message):
            SamplerTable(**{"rows": 3} | arguments)


# --- kernel against reference -----------------------------------------------------------------------------------------


def wrong_definitions():
    """Candidates whose one filter is slightly another."""

    def tail_free(self, share):
        count = self.ids.size
        Candidates.tail_free(self, share)
        if self.ids.size < count and self.ids.size > 1:
            self.keep(slice(-1))

    def typical(self, share):
        Candidates.typical(self, share * 0.97)

    def top_a(self, factor):
        if factor > 0:
            self.min_p(min(factor, 1))

    def mirostat(self, tau, mu):
        Candidates.mirostat(self, tau, mu - np.float32(0.3))

    def retemper(self, post_temperature, min_temp, max_temp, exponent):
        Candidates.retemper(self, post_temperature, min_temp, max_temp * np.float32(1.01), exponent)

    def exclude_top(self, probability, threshold, mask, random):
        Candidates.exclude_top(self, probability, threshold, None, random)

    def draw(self, random, skew):
        return Candidates.draw(self, random, -skew)

    return (tail_free, typical, top_a, mirostat, retemper, exclude_top, draw)


@pytest.mark.parametrize("wrong", wrong_definitions(), ids=lambda wrong: wrong.__name__)
def test_the_kernel_test_bites(monkeypatch, wrong):
    """The inputs of the kernel test tell the definition from its neighbours."""
    logits, settings, mu, mask = batch(1000, np.float32)
    right = everything("numpy", logits, settings, mu, mask)
    monkeypatch.setattr(sampling, "Candidates", type("Wrong", (Candidates,), {wrong.__name__: wrong}))
    result = everything("numpy", logits, settings, mu, mask)
    assert any(not np.array_equal(a, b) for a, b in zip(result, right, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 33, 127, 128, 1000, 2047, 2048, 2049, 4097, 32000])
def test_kernel_gives_the_same(cupy, vocab, dtype):
    logits, settings, mu, mask = batch(vocab, dtype, seed=dtype(0).itemsize)
    for count in (1, 40) if vocab < 2000 else (40,):
        expected = everything("numpy", logits, settings, mu, mask, count)
        assert_same(everything("cupy", logits, settings, mu, mask, count), expected)
    assert_same(everything("cupy", logits, settings, mu, mask, 40), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"tfs": 0.95}, {"typical": 0.9, "skew": 0.5}, {"max_temp": 3.0, "xtc_probability": 1.0}])
def test_kernel_where_very_many_tokens_are_left(cupy, settings):
    """More than fit in shared memory, up to the whole vocabulary; many ties; the tail-free sort in global memory."""
    random = np.random.default_rng(21)
    logits = random.normal(0, 1, (4, 128256)).astype(np.float32) * np.float32([[3], [1], [1], [0.1]])
    logits[2] = np.round(4 * logits[2])
    for rows in (logits, np.ascontiguousarray(logits[:, 3:])):
        mu, mask = np.zeros(4, np.float32), random.random(rows.shape[1]) < 0.5
        expected = everything("numpy", rows, settings, mu, mask, 1024)
        workspace = cupy.full(sample_workspace_size(*rows.shape) + 32, 0xA5, np.uint8)
        assert_same(everything("cupy", rows, settings, mu, mask, 1024, workspace=workspace[:-32]), expected)
        assert np.all(workspace[-32:].get() == 0xA5)
    with pytest.raises(ValueError, match=r"workspace must have at least \d+ bytes, got 8: see sample_workspace_size"):
        sample(cupy.asarray(logits), tfs=0.5, workspace=cupy.empty(8, np.uint8))


@pytest.mark.gpu
def test_kernel_writes_only_its_outputs(cupy):
    logits, settings, mu, mask = batch(500, np.float32)
    expected = everything("numpy", logits, settings, mu, mask)
    arrays = {}
    for name, values in [
        ("mirostat_mu", mu),
        ("probabilities", mu),
        ("top_ids", expected[3]),
        ("top_probabilities", expected[4]),
    ]:
        held = cupy.full(values.size + 64, -7, values.dtype)
        held[32:-32] = cupy.asarray(values.ravel())
        arrays[name] = held, held[32:-32].reshape(values.shape)
    on_gpu, flags = cupy.asarray(logits), cupy.asarray(mask)
    sample(on_gpu, **settings, xtc_mask=flags, **{name: view for name, (_, view) in arrays.items()})
    assert_same([arrays[name][1].get() for name in arrays], expected[1:])
    for held, _ in arrays.values():
        assert np.all(held[:32].get() == -7) and np.all(held[-32:].get() == -7)
    assert np.array_equal(on_gpu.get().view(np.uint8), logits.view(np.uint8)) and np.array_equal(flags.get(), mask)


@pytest.mark.gpu
def test_kernel_takes_settings_in_every_form(cupy):
    logits, settings, mu, mask = batch(700, np.float32)
    expected = everything("numpy", logits, settings, mu, mask)
    dtypes = {"top_k": np.int32, "seed": np.int64, "step": np.uint64}
    on_gpu = {name: cupy.asarray(value.astype(dtypes.get(name, np.float32))) for name, value in settings.items()}
    assert_same(everything("cupy", logits, on_gpu, mu, mask), expected)
    mixed = {name: on_gpu[name] if i % 2 else settings[name] for i, name in enumerate(settings)}
    assert_same(everything("cupy", logits, mixed, mu, mask), expected)
    for r in range(0, 48, 2):
        numbers = {name: value[r].item() for name, value in settings.items()}
        alone = everything("cupy", logits[r : r + 1], numbers, mu[r : r + 1], mask)
        assert_same(alone, [array[r : r + 1] for array in expected])


@pytest.mark.gpu
def test_kernel_on_unaligned_views(cupy):
    logits, settings, mu, mask = batch(1024, np.float16)
    expected = sample(logits, **settings, mirostat_mu=mu.copy(), xtc_mask=mask)
    for shift in (1, 2, 3):
        memory = cupy.empty(logits.size + shift, logits.dtype)
        view = memory[shift:].reshape(logits.shape)
        view.set(logits)
        drawn = sample(view, **settings, mirostat_mu=cupy.asarray(mu), xtc_mask=cupy.asarray(mask))
        assert np.array_equal(drawn.get(), expected)


@pytest.mark.gpu
def test_settings_on_the_device_cannot_break_the_kernel(cupy):
    """Their values are unchecked: whatever they are, an id of the vocabulary comes out."""
    random = np.random.default_rng(22)
    logits = cupy.asarray(random.normal(0, 3, (64, 3000)).astype(np.float32))
    strange = [NAN, INF, -INF, -1.0, 0.0, 2.0, 1e30, -1e30, 1e-45]
    for seed in range(4):
        values = {
            name: cupy.asarray(random.choice(strange, 64).astype(np.float32))
            for name in (*sampling.SETTINGS,)
            if name not in ("top_k", "seed", "step")
        }
        values["top_k"] = cupy.asarray(random.choice([-5, 0, 3, 2**31 - 1], 64).astype(np.int32))
        drawn = sample(
            logits, **values, seed=seed, mirostat_mu=cupy.asarray(random.choice(strange, 64).astype(np.float32))
        ).get()
        assert np.all((drawn >= 0) & (drawn < 3000))


@pytest.mark.gpu
def test_kernel_in_a_graph(cupy):
    """With a table, state and outputs on the device nothing is allocated and the host never waits."""
    random = np.random.default_rng(23)
    logits = random.normal(0, 2, (6, 5000)).astype(np.float32)
    settings = {"tfs": 0.99, "typical": [0.9, 0.5, 0, 0, 0, 0], "mirostat_tau": [0, 0, 3, 4, 0, 0], "skew": [0, 0, 0, 0, 1, 0]}
    table = SamplerTable(6, cupy, **settings, seed=np.arange(6))
    on_gpu, steps, mu = cupy.asarray(logits), cupy.zeros(6, np.int64), cupy.full(6, 6, np.float32)
    buffers = {"out": cupy.empty(6, np.int32), "probabilities": cupy.empty(6, np.float32)}
    buffers["workspace"] = cupy.empty(sample_workspace_size(6, 5000), np.uint8)
    sample(on_gpu, table=table, step=steps, mirostat_mu=mu, **buffers)  # compiles and loads before the capture
    mu.fill(6)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    expected_mu = np.full(6, 6, np.float32)
    with stream:
        stream.begin_capture()
        sample(on_gpu, table=table, step=steps, mirostat_mu=mu, **buffers)
        graph = stream.end_capture()
        for step in range(3):
            steps.fill(step)
            graph.launch(stream)
            stream.synchronize()
            expected = sample(logits, **settings, seed=np.arange(6), step=step, mirostat_mu=expected_mu)
            assert np.array_equal(buffers["out"].get(stream=stream), expected)
            assert np.array_equal(mu.get(stream=stream), expected_mu)


@pytest.mark.gpu
def test_same_errors_on_the_gpu(cupy):
    for settings, error, message in BAD:
        with pytest.raises(error, match=message):
            sample(cupy.zeros((3, 8), np.float32), **settings)
    cases, logits = bad_arrays(cupy)
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            sample(**{"logits": logits} | arguments)
    with pytest.raises(TypeError, match="tfs is a CuPy array"):
        sample(logits.get(), tfs=cupy.ones(3, np.float32))
    with pytest.raises(TypeError, match="table is a CuPy array"):
        sample(logits.get(), table=SamplerTable(3, cupy))
    with pytest.raises(TypeError, match="tfs must have dtype float32"):
        sample(logits, tfs=cupy.ones(3, np.float64))
