"""Sampling of the extension: against recorded outputs of exllamav2 and plain loops over the memory it works in."""

import bisect
import math

import numpy as np
import pytest
from conftest import golden

import cupyq.ext as ext_c

f32 = np.float32

OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.0,
    "top_a": 0.0,
    "min_p": 0.0,
    "tfs": 0.0,
    "typical": 0.0,
    "mirostat": False,
    "mirostat_mu": 0.0,
    "mirostat_tau": 1.5,
    "mirostat_eta": 0.1,
    "post_temperature": 1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "min_temp": 0.0,
    "max_temp": 0.0,
    "temp_exponent": 1.0,
    "smoothing_factor": 0.0,
    "skew": 0.0,
}


def draw(logits, random=0.5, *, top=0, allowed=None, mask=None, mu=None, **settings):
    """(tokens, probabilities, top tokens, top probabilities, mu) of sample_basic for logits [batch, vocab]."""
    s = OFF | settings
    batch = logits.shape[0]
    tokens, probs = np.full((batch, 1), -7, np.int64), np.full((batch, 1), np.nan, f32)
    ktokens = np.full((batch, 1, top), -7, np.int64) if top else None
    kprobs = np.full((batch, 1, top), np.nan, f32) if top else None
    mu = [s["mirostat_mu"]] * batch if mu is None else mu
    before = logits.copy()
    after = ext_c.sample_basic(
        logits[:, None], s["temperature"], s["top_k"], s["top_p"], s["top_a"], s["min_p"], s["tfs"], s["typical"], random,
        tokens, probs, kprobs, ktokens, allowed, s["mirostat"], mu, s["mirostat_tau"], s["mirostat_eta"],
        s["post_temperature"], mask, s["xtc_probability"], s["xtc_threshold"], s["min_temp"], s["max_temp"],
        s["temp_exponent"], s["smoothing_factor"], s["skew"],
    )  # fmt: skip
    np.testing.assert_array_equal(logits, before)
    if top:
        return tokens[:, 0], probs[:, 0], ktokens[:, 0], kprobs[:, 0], after
    return tokens[:, 0], probs[:, 0], None, None, after


def logits_of(*probabilities):
    """One row whose softmax is this."""
    with np.errstate(divide="ignore"):
        return np.log(np.array([probabilities], np.float64)).astype(f32)


def candidates(logits, **settings):
    """{id: probability} of what is left after all stages, and their order, from the best tokens and many draws."""
    tokens = [int(draw(logits, u, **settings)[0][0]) for u in np.linspace(0, 1, 101)]
    top = draw(logits, top=logits.shape[1], **settings)
    return {int(t): float(p) for t, p in zip(top[2][0], top[3][0], strict=True) if p > 0}, list(dict.fromkeys(tokens))


# --- recorded outputs -------------------------------------------------------------------------------------------------

RECORDED = [case for case in golden("sampling") if case.startswith("sample_")]


@pytest.mark.parametrize("case", RECORDED)
def test_golden_draws(case):
    inputs, outputs, arguments = golden("sampling")[case]
    assert arguments.keys() <= OFF.keys()
    for index, random in enumerate(inputs["random"]):
        tokens, probs, top_tokens, top_probs, mu = draw(inputs["logits"], float(random), top=8, **arguments)
        assert tokens[0] == outputs["tokens"][index]
        np.testing.assert_allclose(probs[0], outputs["probs"][index], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(top_tokens[0], outputs["top_tokens"])
        np.testing.assert_allclose(top_probs[0], outputs["top_probs"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(mu[0], outputs["mu"][index], rtol=1e-6)


@pytest.mark.parametrize("case", range(4))
def test_golden_penalties(case):
    inputs, outputs, arguments = golden("sampling")[f"rep_{case}"]
    logits = inputs["logits"].copy()
    ext_c.apply_rep_penalty(inputs["sequence"], *arguments.values(), logits)
    np.testing.assert_array_equal(logits, outputs["logits"])
    assert not np.array_equal(logits, inputs["logits"])


def test_golden_filter():
    _, outputs, arguments = golden("sampling")["filter_exclusive"]
    allowed = np.ones((2, arguments["vocab"]), bool)
    ext_c.logit_filter_exclusive(allowed, arguments["lists"])
    np.testing.assert_array_equal(allowed, outputs["filter"])


# --- plain loops ------------------------------------------------------------------------------------------------------


class Memory:
    """The two arrays all stages share, probabilities and ids, of which the first n are candidates. One step at a time."""

    def __init__(self, logits, temperature, smoothing, allowed, mutation):
        self.mutation = mutation
        ids = [i for i in range(len(logits)) if allowed is None or allowed[i]]
        largest = max(float(logits[i]) for i in ids)
        weights = [0.0] * len(logits)
        for i in ids:
            d = float(logits[i]) - largest
            weights[i] = math.exp(-d * d * smoothing / temperature if smoothing else d / temperature)
        self.p = [float(f32(w / math.fsum(weights))) for w in weights]
        self.ids, self.n = list(range(len(logits))), len(logits)

    def swap(self, i, j):
        for a in (self.p, self.ids):
            a[i], a[j] = a[j], a[i]

    def place(self, pairs):
        for i, (p, token) in enumerate(pairs):
            self.p[i], self.ids[i] = p, token
        self.n = len(pairs)

    def normalise(self):
        total = math.fsum(self.p[: self.n])
        self.p[: self.n] = [float(f32(p / total)) for p in self.p[: self.n]]

    def pairs(self):
        return list(zip(self.p[: self.n], self.ids[: self.n], strict=True))

    def top_k(self, k):
        heap = sorted(self.pairs()[:k])
        for pair in self.pairs()[k:]:
            if pair[0] > heap[0][0]:
                heap.pop(0)
                bisect.insort(heap, pair)
        self.place(heap[::-1])

    def top_p(self, limit):
        if self.mutation == "usual top-p":
            taken, total = [], 0.0
            for pair in sorted(self.pairs(), reverse=True):
                taken.append(pair)
                total += pair[0]
                if total >= limit:
                    break
            self.place(taken)
            return
        heap, total, limit = [], f32(0), f32(limit)
        for pair in self.pairs():
            if pair[0] < 1e-6 or (total > limit and pair[0] < heap[0][0]):
                continue
            bisect.insort(heap, pair)
            total = f32(total + f32(pair[0]))
            while total > limit and len(heap) > 1:
                total = f32(total - f32(heap.pop(0)[0]))
        self.place(heap[::-1])

    def at_least(self, threshold):
        """Two pointers; the second's last step looks at a candidate the first has passed."""
        i, j = 0, self.n - 1
        while j >= i:
            while i <= j and self.p[i] >= threshold:
                i += 1
            if self.p[j] >= threshold and (self.mutation != "nothing comes back" or i <= j):
                if i == len(self.p):
                    break
                self.swap(i, j)
                i += 1
            j -= 1
        self.n = i

    def drop_negligible(self):
        """How many candidates of 1e-8 and more there are, now in front."""
        i, j = 0, self.n - 1
        while i <= j:
            if self.p[j] < f32(1e-8):
                j -= 1
            elif self.p[i] >= f32(1e-8):
                i += 1
            else:
                self.swap(i, j)
        return i

    def sort(self, low, high, last):
        """Quicksort, falling, around the last value; what begins behind `last` is left as it is."""
        if high - low < 1:
            return
        if high - low <= 4:
            for end in range(high, low, -1):
                for i in range(low, end):
                    if self.p[i] < self.p[i + 1]:
                        self.swap(i, i + 1)
            return
        middle = low
        for j in range(low, high):
            if self.p[j] >= self.p[high]:
                self.swap(middle, j)
                middle += 1
        self.swap(middle, high)
        self.sort(low, middle - 1, last)
        if middle <= last:
            self.sort(middle + 1, high, last)

    def sort_all(self):
        front = self.drop_negligible()
        self.place(sorted(self.pairs()[:front], key=lambda pair: -pair[0]))

    def tail_free(self, z):
        self.sort_all()
        d = [abs(a - 2 * b + c) for a, b, c in zip(self.p, self.p[1 : self.n], self.p[2 : self.n], strict=False)]
        kept, total = 1, 0.0
        for value in d:
            total += value / math.fsum(d)
            if total > z:
                break
            kept += 1
        self.n = kept

    def typical(self, t):
        self.n = self.drop_negligible()
        y = [p + math.log(p + 1e-10) for p in self.p[: self.n]]
        expected = math.fsum(p * v for p, v in zip(self.p, y, strict=False))
        order = sorted(range(self.n), key=lambda i: abs(y[i] - expected))
        taken, total, pairs = [], f32(0), self.pairs()
        for i in order:
            total += f32(pairs[i][0])
            if total >= f32(t):
                break
            taken.append(pairs[i])
        self.place(taken or [pairs[order[0]]])

    def mirostat(self, mu):
        self.sort_all()
        while self.n > 1 and self.p[self.n - 1] < 2.0**-mu:
            self.n -= 1

    def heat(self, s):
        temperature = s["post_temperature"]
        if s["max_temp"] > s["min_temp"]:
            entropy = -math.fsum(p * math.log(p) for p in self.p[: self.n] if p > 0)
            temperature = s["min_temp"] + (s["max_temp"] - s["min_temp"]) * (entropy / math.log(self.n)) ** s["temp_exponent"]
        self.p[: self.n] = [p ** (1 / temperature) for p in self.p[: self.n]]
        self.normalise()

    def exclude(self, chance, threshold, mask):
        eligible = [i for i in range(self.n) if self.p[i] >= f32(threshold) and (mask is None or mask[self.ids[i]])]
        if len(eligible) < 2:
            return
        least = min(eligible, key=lambda i: self.p[i])
        mass = math.fsum(self.p[i] for i in eligible) - self.p[least]
        for i in range(self.n):
            out = i in eligible and i != least
            self.p[i] *= 1 - chance if out else 1 + chance * mass / (1 - mass)


def plain(logits, randoms, *, top=0, allowed=None, mask=None, mutation=None, **settings):
    """([token, probability] for each random number, top tokens) of one row, by loops."""
    s = OFF | settings
    m = Memory(logits, s["temperature"], s["smoothing_factor"], allowed, mutation)
    stages = [
        (0 < s["top_k"] < len(logits), lambda: m.top_k(s["top_k"])),
        (0 < s["top_p"] < 1, lambda: m.top_p(s["top_p"])),
        (s["top_a"] > 0, lambda: m.at_least(min(s["top_a"] * max(m.p[: m.n]), 1) * max(m.p[: m.n]))),
        (0 < s["min_p"] < 1, lambda: m.at_least(s["min_p"] * max(m.p[: m.n]))),
        (0 < s["tfs"] < 1, lambda: m.n > 2 and m.tail_free(s["tfs"])),
        (0 < s["typical"] < 1, lambda: m.typical(s["typical"])),
        (s["mirostat"], lambda: m.mirostat(s["mirostat_mu"] or 2 * s["mirostat_tau"])),
    ]
    for runs, stage in stages:
        if runs and m.n > 1:
            stage()
            m.normalise()
    if m.n > 1 and (s["post_temperature"] != 1 or s["max_temp"] > s["min_temp"]):
        m.heat(s)
    if s["xtc_probability"]:
        m.exclude(s["xtc_probability"], s["xtc_threshold"], mask)
    if top or s["skew"]:
        front = m.drop_negligible()
        m.sort(0, front - 1, top if top and mutation != "sorted to the end" else front)
    best = [token for p, token in m.pairs()[:top] if p > 0]
    best += [i for i in range(len(logits)) if i not in best][: top - len(best)]
    found = []
    for u in randoms:
        u = (float(u) ** math.exp(-s["skew"])) * (1.0 if mutation == "u as given" else 0.9998)
        likely = [pair for pair in m.pairs() if pair[0] > 0]
        sums = np.cumsum([p for p, _ in likely])
        p, token = next((pair for pair, total in zip(likely, sums, strict=True) if total >= u), likely[-1])
        found.append((token, p))
    return found, best


COMBINATIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 9},
    {"top_p": 0.7},
    {"top_k": 20, "top_p": 0.9},
    {"top_a": 0.4},
    {"min_p": 0.01},
    {"min_p": 0.2},
    {"top_k": 30, "min_p": 0.0001},
    {"top_p": 0.9, "top_a": 0.001, "min_p": 0.0005},
    {"tfs": 0.8},
    {"typical": 0.7},
    {"typical": 0.9, "top_k": 25},
    {"mirostat": True, "mirostat_mu": 4.0},
    {"post_temperature": 1.7},
    {"min_temp": 0.3, "max_temp": 1.9, "temp_exponent": 0.8},
    {"xtc_probability": 0.6, "xtc_threshold": 0.03},
    {"typical": 0.9, "xtc_probability": 0.4, "xtc_threshold": 0.02},
    {"smoothing_factor": 0.4, "temperature": 0.9},
    {"skew": 0.6},
    {"skew": -0.4, "typical": 0.8},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "typical": 0.9, "post_temperature": 0.8, "xtc_probability": 0.2},
]


def disagreements(settings, mutation=None):
    """How many of the draws differ from those of the plain loops."""
    wrong = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        vocab = (65, 130)[seed % 2]
        logits = (rng.standard_normal((1, vocab)) * (1.0, 2.5)[seed // 2]).astype(f32)
        allowed = rng.random((1, vocab)) < 0.9 if seed % 2 else None
        mask = rng.random(vocab) < 0.7 if "xtc_probability" in settings else None
        randoms = np.append(rng.random(12), [0.0, 1.0])
        for top in (0, 5):
            own = {"allowed": None if allowed is None else allowed[0], "mask": mask, "mutation": mutation}
            expected, best = plain(logits[0], randoms, top=top, **own, **settings)
            for u, (token, p) in zip(randoms, expected, strict=True):
                tokens, probs, top_tokens, _, _ = draw(logits, float(u), top=top, allowed=allowed, mask=mask, **settings)
                wrong += tokens[0] != token or abs(probs[0] - p) > 1e-6 or (top > 0 and top_tokens[0].tolist() != best)
    return wrong


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: " ".join(s) or "nothing")
def test_draws_are_those_of_plain_loops(settings):
    assert disagreements(settings) == 0


@pytest.mark.parametrize(
    ("mutation", "settings"),
    [
        ("usual top-p", {"top_p": 0.7}),
        ("nothing comes back", {"top_p": 0.9, "min_p": 0.0005}),
        ("sorted to the end", {}),
    ],
)
def test_the_comparison_bites(mutation, settings):
    assert disagreements(settings, mutation) > 0


def test_recorded_draws_reject_wrong_loops():
    """sample_14 lets one candidate come back; sample_1 is drawn from a partly sorted array; sample_3 has top-p."""
    for case, wrong in ((14, "nothing comes back"), (1, "sorted to the end"), (3, "usual top-p")):
        inputs, outputs, arguments = golden("sampling")[f"sample_{case}"]
        for mutation in (None, wrong):
            found, _ = plain(inputs["logits"][0], inputs["random"], top=8, mutation=mutation, **arguments)
            assert ([token for token, _ in found] == outputs["tokens"].tolist()) == (mutation is None), (case, mutation)


# --- stated definitions and facts -------------------------------------------------------------------------------------


def close(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), atol=2e-6)


def test_measured_facts():
    close(candidates(logits_of(0.5, 0.4, 0.1), top_p=0.8)[0], {0: 5 / 6, 2: 1 / 6})
    close(candidates(logits_of(0.1, 0.4, 0.5), top_p=0.8)[0], {2: 1.0})
    close(candidates(logits_of(0.4, 0.3, 0.2, 0.1), typical=0.9)[0], {1: 0.6, 2: 0.4})


def test_xtc_follows_its_formula_in_any_order():
    kept = {"xtc_probability": 0.5, "xtc_threshold": 0.15}
    grown = 1 + 0.5 * 0.7 / 0.3
    close(candidates(logits_of(0.1, 0.2, 0.3, 0.4), **kept)[0], {0: 0.1 * grown, 1: 0.2 * grown, 2: 0.15, 3: 0.2})
    close(candidates(logits_of(0.4, 0.3, 0.2, 0.1), **kept)[0], {3: 0.1 * grown, 2: 0.2 * grown, 1: 0.15, 0: 0.2})
    mask = np.array([True, True, True, False])
    grown = 1 + 0.5 * 0.3 / 0.7
    close(
        candidates(logits_of(0.1, 0.2, 0.3, 0.4), mask=mask, **kept)[0],
        {0: 0.1 * grown, 1: 0.2 * grown, 2: 0.15, 3: 0.4 * grown},
    )
    close(candidates(logits_of(0.9, 0.1), **kept)[0], {0: 0.9, 1: 0.1})
    close(candidates(logits_of(0.6, 0.4), xtc_probability=1.0, xtc_threshold=0.3)[0], {1: 1.0})


def test_where_nothing_is_dropped_one_comes_back_but_never_from_behind_the_end():
    """Recorded in sample_14. Behind all ids of the vocabulary there is nothing that could."""
    assert len(candidates(logits_of(0.4, 0.3, 0.2, 0.1), top_p=0.95, min_p=0.01)[0]) == 4
    close(candidates(logits_of(0.4, 0.3, 0.2, 0.1), min_p=0.01)[0], {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1})
    close(candidates(logits_of(0.4, 0.3, 0.2, 0.1), min_p=0.6)[0], {0: 4 / 7, 1: 3 / 7})


def test_top_k_keeps_what_the_heap_keeps_among_equals():
    logits = logits_of(0.1, 0.1, 0.1, 0.5, 0.1, 0.1)
    assert set(candidates(logits, top_k=3)[0]) == {1, 2, 3}
    assert candidates(logits, top_k=3)[1] == [3, 2, 1]
    flat = np.zeros((1, 700), f32)
    assert draw(flat, 1.0, top_k=600)[0][0] == 599
    rising = np.arange(700, dtype=f32)[None] / 100
    assert set(candidates(rising, top_k=501)[0]) == set(range(199, 700))


def test_greedy_and_skew():
    logits = logits_of(0.3, 0.1, 0.3, 0.2, 0.1)
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"post_temperature": 0.0}, {"min_temp": -2.0, "max_temp": -1.0}):
        tokens, probs, top_tokens, top_probs, _ = draw(logits, 0.9, top=4, **settings)
        assert (tokens[0], probs[0]) == (0, 1.0)
        np.testing.assert_array_equal(top_tokens, [[0, 1, 2, 3]])
        np.testing.assert_array_equal(top_probs, [[1, 0, 0, 0]])
    assert draw(logits_of(0.6, 0.3, 0.1), 0.5, skew=3.0)[0][0] == 2
    assert draw(logits_of(0.6, 0.3, 0.1), 0.97, skew=-3.0)[0][0] == 0


def test_rows_of_a_batch():
    """Every row's number derives from the one before; smoothing divides the temperature once, not once more per row."""
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((5, 64)).astype(f32)
    settings = {"smoothing_factor": 0.3, "temperature": 0.9, "top_k": 20}
    tokens, probs, *_ = draw(logits, 0.37, **settings)
    random = f32(0.37)
    for row in range(5):
        one, p, *_ = draw(logits[row : row + 1], float(random), **settings)
        assert (one[0], p[0]) == (tokens[row], probs[row])
        r = random
        for _ in range(10):
            r = f32(float(r) + 1.337 + float(random))
            r = np.fmod(f32(r * r), f32(1))
        random = r
    assert len(set(tokens.tolist())) > 1


def test_mirostat_moves_mu():
    logits = logits_of(0.5, 0.25, 0.125, 0.125)
    for mu in (0.0, 3.0):
        settings = {"mirostat": True, "mirostat_mu": mu, "mirostat_tau": 1.5, "mirostat_eta": 0.1}
        after = draw(logits, 0.1, **settings)
        assert after[0][0] == 0 and after[1][0] == 0.5
        np.testing.assert_allclose(after[4], [3.0 + 0.1 * (1.5 - 1)], rtol=1e-6)
    assert draw(np.vstack([logits, logits]), mu=[1.0, 2.0])[4] == [1.0, 2.0]
    close(candidates(logits, mirostat=True, mirostat_mu=2.0)[0], {0: 2 / 3, 1: 1 / 3})
    close(candidates(logits, mirostat=True, mirostat_mu=-1e9)[0], {0: 1.0})


# --- where exllamav2's result is undefined ----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 31, 33, 64])
def test_any_vocabulary(vocab):
    logits = np.random.default_rng(vocab).standard_normal((2, vocab)).astype(f32)
    for settings in COMBINATIONS:
        tokens, probs, *_ = draw(logits, 0.99, top=min(vocab, 5), **settings)
        assert np.all((0 <= tokens) & (tokens < vocab)) and np.all((0 < probs) & (probs <= 1)), settings


def test_everything_is_defined():
    spread = logits_of(0.4, 0.3, 0.2, 0.1)
    close(candidates(spread, top_a=100.0)[0], {0: 1.0})
    close(candidates(logits_of(0.25, 0.25, 0.25, 0.25), tfs=0.5)[0], dict.fromkeys(range(4), 0.25))
    close(candidates(spread, min_temp=0.0, max_temp=1e-30)[0], {0: 1.0})
    close(
        candidates(logits_of(0.4, 0.3, 0.3, 0.0), min_temp=0.5, max_temp=1e9, temp_exponent=9.0)[0],
        dict.fromkeys(range(3), 1 / 3),
    )
    close(candidates(logits_of(1.0, 0.0, 0.0), min_temp=0.5, max_temp=2.0, temp_exponent=-1.0)[0], {0: 1.0})
    close(candidates(np.array([[np.nan, 1.0, -np.inf, 1.0]], f32))[0], {1: 0.5, 3: 0.5})
    close(candidates(np.array([[np.inf, 1.0, np.inf, np.nan]], f32), smoothing_factor=1e30)[0], {0: 0.5, 2: 0.5})
    close(candidates(np.array([[-np.inf, -2e38, -3e38]], f32))[0], {1: 1.0})
    flat = {"smoothing_factor": 1e-44, "allowed": np.array([[True, False, True, True]])}
    close(candidates(spread, **flat)[0], {0: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    close(candidates(spread, temperature=1e300, allowed=flat["allowed"])[0], {0: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    nothing = np.array([[np.nan, -np.inf, np.nan]], f32)
    assert draw(nothing, 0.9)[0][0] == 0
    assert draw(nothing, 0.9, allowed=np.array([[False, True, True]]))[0][0] == 1
    assert draw(spread, 0.0, allowed=np.array([[False, False, True, True]]))[0][0] == 2
    close(candidates(spread, allowed=np.array([[False, True, True, False]]), post_temperature=1e30)[0], {1: 0.5, 2: 0.5})


def test_a_million_equal_logits():
    """Their probabilities are below 1e-6, and quicksort would take the square of their number."""
    logits = np.zeros((1, 1_100_000), f32)
    assert draw(logits, 0.5, top_p=0.9)[0][0] == 0
    tokens, _, best, *_ = draw(logits[:, :50_000], 1.0, top=8)
    assert best.tolist() == [list(range(8))] and 40_000 < tokens[0] < 50_000
    shuffled = np.random.default_rng(0).permutation(50_000).astype(f32)[None] * 1e-4
    for order in (np.arange(50_000), np.argsort(shuffled[0]), np.argsort(-shuffled[0])):
        assert shuffled[0, order][draw(shuffled[:, order], 0.5, top=8)[2][0]].tolist() == sorted(shuffled[0])[:-9:-1]


def test_unused_ids_fill_the_best():
    _, _, tokens, probs, _ = draw(logits_of(0.1, 0.2, 0.7, 0.0, 0.0, 0.0), top=6, top_k=2)
    np.testing.assert_array_equal(tokens, [[2, 1, 0, 3, 4, 5]])
    np.testing.assert_allclose(probs, [[7 / 9, 2 / 9, 0, 0, 0, 0]], atol=1e-6)


# --- penalties, masks, copies -----------------------------------------------------------------------------------------


def penalised(row, tokens, r, sustain, decay, f, p):
    """exllamav2's walk from the end, token by token."""
    row, seen = row.astype(np.float64), set()
    left = len(tokens) if sustain == -1 else sustain
    steps = ((1 - r) / decay, -f / decay, -p / decay) if decay else (0, 0, 0)
    for token in tokens[::-1][: left + decay]:
        if 0 <= token < len(row):
            if token not in seen:
                row[token] = (row[token] / r if row[token] > 0 else row[token] * r) - p
                seen.add(token)
            row[token] -= f
        left -= 1
        if left < 0:
            r, f, p = r + steps[0], f + steps[1], p + steps[2]
    return row


@pytest.mark.parametrize(("sustain", "decay"), [(-1, 0), (-1, 5), (0, 0), (0, 7), (3, 0), (4, 6), (500, 500), (10**30, 0)])
def test_penalties_are_those_of_a_walk(sustain, decay):
    rng = np.random.default_rng(1 + sustain % 1000 + 10 * decay)
    sequence = rng.integers(-2, 12, (3, 20))
    sequence[0, :2] = 2**62, -(2**62)
    logits = rng.standard_normal((3, 1, 10)).astype(f32)
    expected = [
        penalised(row[0], list(tokens), 1.3, sustain, decay, 0.2, 0.4) for row, tokens in zip(logits, sequence, strict=True)
    ]
    before = logits.copy()
    ext_c.apply_rep_penalty(sequence, 1.3, sustain, decay, 0.2, 0.4, logits)
    np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(logits, before) == (sustain == decay == 0)
    ext_c.apply_rep_penalty(sequence[:, :0], 1.3, sustain, decay, 0.2, 0.4, logits)
    np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_filters_in_any_order():
    allowed = np.ones((3, 6), bool)
    allowed[0, 4] = False
    ext_c.logit_filter_exclusive(allowed, [[5, 4, 0], [], [2, 100, 2]])
    np.testing.assert_array_equal(np.argwhere(allowed), [[0, 0], [0, 5], [2, 2]])


def test_fills_and_adds_and_copies():
    flags = np.zeros((3, 5), bool)
    ext_c.fast_fill_cpu_ones_bool(flags)
    assert flags.all()
    a, b = np.arange(12, dtype=f32).reshape(2, 1, 6), np.array([[10, 20, 30]], f32)
    ext_c.fast_fadd_cpu(a, b)
    np.testing.assert_array_equal(a.ravel(), np.arange(12) + np.tile([10, 20, 30], 4))
    ext_c.fast_fadd_cpu(a[:0], b[:, :0])
    target = np.zeros((4, 6), np.int16)
    ext_c.fast_copy_cpu(target[::2, ::3], np.arange(4, dtype=np.int16).reshape(2, 2).T)
    np.testing.assert_array_equal(target[::2, ::3], [[0, 2], [1, 3]])
    assert np.count_nonzero(target) == 3
    assert ext_c.dump_profile_results() is None


# --- stop strings -----------------------------------------------------------------------------------------------------


def match(text, strings, offsets_type=np.uint8):
    encoded = [string.encode("utf-32-le") for string in strings]
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int32).view(offsets_type)
    return ext_c.partial_strings_match(
        np.frombuffer(text.encode("utf-32-le"), np.uint8), offsets, np.frombuffer(b"".join(encoded), np.uint8)
    )


def match_by_loops(text, strings):
    for string in filter(None, strings):
        for begin in range(len(text)):
            overlap = min(len(string), len(text) - begin)
            if text[begin : begin + overlap] == string[:overlap]:
                return begin if overlap == len(string) else -2
    return -1


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("hello wor", ["world", "foo"], -2),
        ("abc stop here", ["stop", "zzz"], 4),
        ("nothing", ["q"], -1),
        ("xx en", ["end", "x"], -2),
        ("xx en", ["x", "end"], 0),
        ("\u65e5\u672c\u8a9e\u30c6", ["\u30c6\u30b9\u30c8", "\u672c\u8a9e"], -2),
        ("\u65e5\u672c\u8a9e\u30c6", ["\u672c\u8a9e"], 1),
        ("\U0001f600", ["\U0001f600\U0001f601"], -2),
        ("", ["a"], -1),
        ("a", ["", "a"], 0),
        ("a", [], -1),
        ("\u0100\u0001", ["\u0001"], 1),
        ("aab", ["ab"], 1),
    ],
)
def test_stop_strings(text, strings, expected):
    assert match(text, strings) == match(text, strings, np.int32) == expected
    assert match_by_loops(text, strings) == expected


def test_stop_strings_are_those_of_loops():
    rng = np.random.default_rng(3)
    outcomes = set()
    for _ in range(400):
        text = "".join(rng.choice(list("ab\u0161"), rng.integers(0, 9)))
        strings = ["".join(rng.choice(list("ab\u0161"), rng.integers(0, 4))) for _ in range(rng.integers(1, 4))]
        assert match(text, strings) == match_by_loops(text, strings), (text, strings)
        outcomes.add(np.sign(match(text, strings)))
    assert outcomes == {-1, 0, 1}


# --- hostile calls ----------------------------------------------------------------------------------------------------


def sample_with(**changes):
    logits = np.zeros((2, 1, 8), f32)
    arguments = dict(
        logits=logits, temperature=1.0, top_k=0, top_p=0.0, top_a=0.0, min_p=0.0, tfs=0.0, typical=0.0, random=0.5,
        output_tokens=np.zeros((2, 1), np.int64), output_probs=np.zeros((2, 1), f32), output_kprobs=None,
        output_ktokens=None, logit_filter=None, mirostat=False, mirostat_mu=[0.0, 0.0], mirostat_tau=1.5, mirostat_eta=0.1,
        post_temperature=1.0, xtc_mask=None,
    )  # fmt: skip
    arguments |= changes
    try:
        return ext_c.sample_basic(**arguments)
    finally:
        for name in ("output_tokens", "output_probs"):
            if isinstance(arguments[name], np.ndarray):
                assert not arguments[name].any(), "a refused call wrote"


READ_ONLY = np.zeros((2, 1), np.int64)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"logits": np.zeros((2, 1, 8))}, TypeError, "logits must have dtype float32, got float64"),
        ({"logits": [1.0, 2.0]}, TypeError, "logits must be an array on the CPU, got list"),
        ({"logits": np.zeros((2, 3, 8), f32)}, ValueError, "logits must have shape"),
        ({"logits": np.zeros((2, 1, 0), f32)}, ValueError, "with a token to choose"),
        ({"logits": np.zeros(8, f32)}, ValueError, "logits must have shape"),
        ({"logits": np.zeros((3, 1, 8), f32)}, ValueError, r"output_tokens must have shape \(3, 1\)"),
        ({"output_tokens": np.zeros((2, 1), np.int32)}, TypeError, "output_tokens must have dtype int64"),
        ({"output_tokens": None}, TypeError, "output_tokens must be an array on the CPU, got NoneType"),
        ({"output_tokens": READ_ONLY}, ValueError, "output_tokens is read-only"),
        ({"output_probs": np.zeros((2, 1))}, TypeError, "output_probs must have dtype float32"),
        ({"output_probs": np.zeros(2, f32)}, ValueError, "output_probs must have shape"),
        ({"output_kprobs": np.zeros((2, 1, 3), f32)}, TypeError, "must both be arrays or both be None"),
        (
            {"output_kprobs": np.zeros((2, 1, 3), f32), "output_ktokens": np.zeros((2, 1, 4), np.int64)},
            ValueError,
            "output_ktokens must have shape",
        ),
        (
            {"output_kprobs": np.zeros((2, 1, 9), f32), "output_ktokens": np.zeros((2, 1, 9), np.int64)},
            ValueError,
            "asks for the 9 best of 8 tokens",
        ),
        ({"logit_filter": np.ones((2, 8), np.uint8)}, TypeError, "logit_filter must have dtype bool"),
        ({"logit_filter": np.ones((1, 8), bool)}, ValueError, "logit_filter must have shape"),
        ({"logit_filter": np.arange(16).reshape(2, 8) < 8}, ValueError, "logit_filter allows no token in row 1"),
        ({"xtc_mask": np.ones(9, bool)}, ValueError, "xtc_mask must have shape"),
        ({"xtc_mask": np.ones(8, f32)}, TypeError, "xtc_mask must have dtype bool"),
        ({"mirostat": True, "mirostat_mu": [1.0]}, ValueError, "mirostat_mu must hold 2 finite numbers"),
        ({"mirostat_mu": ["a"]}, TypeError, "mirostat_mu must be a list of numbers"),
        ({"mirostat_mu": None}, TypeError, "mirostat_mu must be a list of numbers"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number, got nan"),
        ({"post_temperature": float("inf")}, ValueError, "post_temperature must be a finite number"),
        ({"top_k": None}, TypeError, "top_k must be an integer, got NoneType"),
        ({"random": 1.5}, ValueError, r"random must lie in 0..1, got 1.5"),
        ({"random": float("nan")}, ValueError, "random must be a finite number"),
    ],
)
def test_bad_samples(changes, kind, message):
    with pytest.raises(kind, match=message):
        sample_with(**changes)


def zeros(*shape, dtype=f32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "message"),
    [
        ("apply_rep_penalty", (zeros(1, 2), 1.1, -1, 0, 0, 0, zeros(1, 8)), TypeError, "sequence must have dtype int64"),
        ("apply_rep_penalty", (zeros(1, 2, dtype=int), 1.1, -1, 0, 0, 0, zeros(1, 8, dtype=np.float16)), TypeError, "float32"),
        ("apply_rep_penalty", (zeros(2, 2, dtype=int), 1.1, -1, 0, 0, 0, zeros(1, 8)), ValueError, "logits must have shape"),
        (
            "apply_rep_penalty",
            (zeros(1, 2, dtype=int), 0, -1, 0, 0, 0, zeros(1, 8)),
            ValueError,
            "penalty_max must be positive",
        ),
        ("apply_rep_penalty", (zeros(1, 2, dtype=int), 1.1, -2, 0, 0, 0, zeros(1, 8)), ValueError, "sustain must be"),
        ("apply_rep_penalty", (zeros(1, 2, dtype=int), 1.1, 1, -1, 0, 0, zeros(1, 8)), ValueError, "decay must be"),
        ("apply_rep_penalty", (zeros(1, 2, dtype=int), 1.1, 1.5, 0, 0, 0, zeros(1, 8)), ValueError, "sustain must be"),
        ("logit_filter_exclusive", (zeros(1, 4), [[1]]), TypeError, "filter must have dtype bool"),
        ("logit_filter_exclusive", (zeros(1, 4, dtype=bool), [[1], [2]]), ValueError, "exclusive_lists must be 1 lists"),
        ("logit_filter_exclusive", (zeros(1, 4, dtype=bool), [[-1]]), ValueError, "holds the negative id -1"),
        ("logit_filter_exclusive", (zeros(1, 4, dtype=bool), [["a"]]), TypeError, "must be a list of token ids"),
        ("logit_filter_exclusive", (zeros(1, 4, dtype=bool), [3]), TypeError, "must be a list of token ids"),
        ("fast_fill_cpu_ones_bool", (zeros(3, dtype=np.uint8),), TypeError, "tensor must have dtype bool"),
        ("fast_fill_cpu_ones_bool", (zeros(4, 4, dtype=bool)[:, ::2],), ValueError, "C-contiguous"),
        ("fast_fill_cpu_ones_bool", (None,), TypeError, "tensor must be an array on the CPU, got NoneType"),
        ("fast_fadd_cpu", (zeros(4), zeros(3)), ValueError, "b has 3 elements, which do not divide a's 4"),
        ("fast_fadd_cpu", (zeros(4), zeros(0)), ValueError, "b has 0 elements"),
        ("fast_fadd_cpu", (zeros(4), zeros(4, dtype=np.float64)), TypeError, "b must have dtype float32"),
        ("fast_copy_cpu", (zeros(4), zeros(5)), ValueError, "src must be as dst"),
        ("fast_copy_cpu", (zeros(4), zeros(4, dtype=int)), ValueError, "src must be as dst"),
        ("fast_copy_cpu", (zeros(4), [0.0] * 4), TypeError, "src must be an array, got list"),
        ("partial_strings_match", (b"abc", b"", b""), ValueError, "match must hold whole values of 4 bytes"),
        ("partial_strings_match", (b"", zeros(2, dtype=np.int64), b""), TypeError, "offsets must be a buffer of bytes"),
        ("partial_strings_match", (b"abcd", np.array([0, 8], np.int32), b"abcd"), ValueError, "offsets must be rising"),
        ("partial_strings_match", (b"abcd", np.array([4, 0], np.int32), b"abcd"), ValueError, "offsets must be rising"),
        ("partial_strings_match", (b"abcd", np.array([-4, 0], np.int32), b"abcd"), ValueError, "offsets must be rising"),
        ("partial_strings_match", (b"abcd", np.array([0, 2], np.int32), b"abcd"), ValueError, "offsets must be rising"),
        ("partial_strings_match", ("abcd", b"", b""), TypeError, "match must be a contiguous buffer of bytes"),
        ("partial_strings_match", (zeros(8, dtype=np.uint8)[::2], b"", b""), TypeError, "match must be a contiguous buffer"),
    ],
)
def test_bad_calls(name, arguments, kind, message):
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    with pytest.raises(kind, match=message):
        getattr(ext_c, name)(*arguments)
    for a, b in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
def test_arrays_on_a_gpu_are_refused(cupy):
    logits, sequence, flags = cupy.zeros((1, 1, 8), f32), cupy.zeros((1, 4), np.int64), cupy.zeros((1, 8), bool)
    calls = {
        "logits": lambda: sample_with(logits=logits),
        "output_tokens": lambda: sample_with(output_tokens=sequence),
        "logit_filter": lambda: sample_with(logit_filter=flags),
        "sequence": lambda: ext_c.apply_rep_penalty(sequence, 1.1, -1, 0, 0.0, 0.0, np.zeros((1, 8), f32)),
        "filter": lambda: ext_c.logit_filter_exclusive(flags, [[1]]),
        "tensor": lambda: ext_c.fast_fill_cpu_ones_bool(flags),
        "b": lambda: ext_c.fast_fadd_cpu(np.zeros((1, 8), f32), logits),
        "dst": lambda: ext_c.fast_copy_cpu(logits, np.zeros((1, 1, 8), f32)),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name} is on a GPU, and this function works on the CPU: pass {name}.get()"):
            call()
