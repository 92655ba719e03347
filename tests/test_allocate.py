"""allocate: against exhaustive search, its own bound, the annealer, a plain dynamic program; budgets, ties, extremes."""

import itertools
import math
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyq.quantize.allocate import TOLERANCE, Allocation, allocate
from cupyq.quantize.anneal import sim_anneal
from cupyq.quantize.layouts import MENU


def check(options, budget, result):
    """What holds of every result."""
    assert type(result) is Allocation and len(result.choice) == len(options)
    taken = [item[at] for item, at in zip(options, result.choice, strict=True)]
    assert result.bits == sum(bits for bits, _ in taken) <= budget
    assert result.error == math.fsum(error for _, error in taken)
    assert 0 <= result.bound <= result.error
    assert {type(at) for at in result.choice} == {type(result.bits)} == {int}
    assert type(result.error) is type(result.bound) is float
    # All that can be spent on one item is spent.
    for item, (bits, error) in zip(options, taken, strict=True):
        for other_bits, other_error in item:
            assert not (other_error < error and result.bits - bits + other_bits <= budget)
    return result


def least_error(options, budget):
    choices = itertools.product(*options)
    return min(math.fsum(e for _, e in choice) for choice in choices if sum(b for b, _ in choice) <= budget)


def reach(options):
    return sum(min(b for b, _ in item) for item in options), sum(max(b for b, _ in item) for item in options)


def share_of_reach(options, share):
    low, high = reach(options)
    return low + int(share * (high - low))


def unrelated(rng, items, count):
    """No order between bits and errors: most options are beaten by another one."""
    return [
        [(int(b), float(e)) for b, e in zip(rng.integers(0, 1000, count), rng.random(count), strict=True)] for _ in range(items)
    ]


def layer_like(rng, items, count=None):
    """What a quantizer measures: the menu's bits, errors that fall fourfold per bit from a level of each layer's own."""
    shapes = ((4096, 4096), (4096, 1024), (14336, 4096), (256, 768))
    options = []
    for _ in range(items):
        k, n = shapes[rng.integers(len(shapes))]
        bits = [layout.storage_bits(k, n) for layout in MENU[:count]]
        errors = rng.lognormal(0, 2) * 4.0 ** -(np.array(bits) / (k * n)) * np.exp(rng.normal(0, 0.1, len(bits)))
        options.append([(b, float(e)) for b, e in zip(bits, errors, strict=True)])
    return options


def straight(rng, items, count):
    """Errors that fall evenly with the bits: every choice that uses as many bits is as good."""
    return [[(int(b), 1000.0 - float(b)) for b in rng.integers(0, 1000, count)] for _ in range(items)]


def few_values(rng, items, count):
    """Bits and errors from a handful of numbers, zero among them: ties everywhere."""
    return [[(int(rng.integers(0, 4)), float(rng.integers(0, 3)) / 4) for _ in range(count)] for _ in range(items)]


# --- the best ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unrelated, layer_like, straight, few_values])
@pytest.mark.parametrize("seed", range(15))
def test_the_best_of_small_problems(make, seed):
    rng = np.random.default_rng(seed)
    options = make(rng, int(rng.integers(1, 7)), int(rng.integers(1, 5)))
    for share in (0, 0.1, 0.3, 0.5, 0.8, 1):
        budget = share_of_reach(options, share)
        result = check(options, budget, allocate(options, budget))
        assert result.error == pytest.approx(least_error(options, budget), rel=1e-12)
        assert result.bound == result.error


def test_taking_what_fits_next_would_not_do():
    """The steepest step alone leaves 9 bits over: exhaustive search tells such answers from the best."""
    options = [[(0, 10.0), (11, 0.0)], [(0, 9.5), (10, 0.5)], [(0, 9.5), (10, 0.5)]]
    assert allocate(options, 20) == Allocation([0, 1, 1], 20, 11.0, 11.0)
    assert least_error(options, 20) == 11.0


def test_gains_below_rounding_are_bought_too():
    """They vanish in the sum of errors; still no bits are left that could lower a single one."""
    tiny = [[(0, 1e-13), (50, 0.0)], [(0, 1e-15), (1, 0.0)]]
    assert allocate([[(0, 1e6), (100, 0.0)], *tiny], 60).choice == [0, 1, 1]
    # Here after the search has found the first three.
    options = [[(0, 10.0), (110, 0.0)], [(0, 9.5), (100, 0.5)], [(0, 9.5), (100, 0.5)], *tiny]
    assert allocate(options, 201).choice == [0, 1, 1, 0, 1]


numbers = st.one_of(st.integers(0, 12), st.integers(0, 10**6))
problems = st.lists(st.lists(st.tuples(numbers, st.floats(0, 1e6)), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems, st.floats(0, 1.1))
def test_the_best_of_any_small_problem(options, share):
    budget = share_of_reach(options, share)
    result = check(options, budget, allocate(options, budget))
    least = least_error(options, budget)
    assert result.bound <= least * (1 + 2 * TOLERANCE) and least <= result.error <= least * (1 + 2 * TOLERANCE)


def best_by_program(options, budget):
    """Least error for every number of bits, item by item: small whole bits only."""
    least = np.zeros(budget + 1)
    for item in options:
        after = np.full(budget + 1, math.inf)
        for bits, error in item:
            if bits <= budget:
                after[bits:] = np.minimum(after[bits:], least[: budget + 1 - bits] + error)
        least = after
    return least[budget]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_the_best_of_larger_problems(seed, share):
    options = unrelated(np.random.default_rng(seed), 40, 20)
    budget = share_of_reach(options, share)
    result = check(options, budget, allocate(options, budget))
    assert result.bound == result.error == pytest.approx(best_by_program(options, budget), rel=1e-12)


def test_ties_by_the_thousand():
    options = few_values(np.random.default_rng(2), 300, 20)
    for item in options:  # nobody gets the least error for nothing
        item[:] = [(bits + 1, error + 0.25 * (3 - bits)) for bits, error in item] + [(4, 0.0)]
    for budget in (400, 777, 1000):
        result = check(options, budget, allocate(options, budget))
        assert result.bound == result.error == best_by_program(options, budget)


def test_a_budget_between_sums():
    """Bits come in thousands: 999 more are worth nothing, and the bound knows."""
    options = [[(1000 * b, e) for b, e in item] for item in straight(np.random.default_rng(1), 150, 20)]
    for share in (0.2, 0.6):
        budget = share_of_reach(options, share) // 1000 * 1000
        results = [check(options, budget + more, allocate(options, budget + more)) for more in (0, 999)]
        assert results[0] == results[1]
        assert results[0].bits == budget and results[0].bound == results[0].error


@pytest.mark.parametrize("items", [8, 28, 120])
@pytest.mark.parametrize("share", [0.06, 0.33, 0.65])
def test_at_least_as_good_as_the_annealer(items, share):
    options = layer_like(np.random.default_rng(items), items)
    budget = share_of_reach(options, share)
    result = check(options, budget, allocate(options, budget))
    # The temperature has to suit the errors, which exllamav2 gets by taking 1 - accuracy.
    start = max(e for item in options for _, e in item)
    for seed in range(2):
        annealed = sim_anneal(options, budget, start, 0.95, 1e-5 * start, 500, 1.0, seed=seed)
        assert annealed[3] <= budget
        assert result.error <= annealed[2] * (1 + 1e-12)
        assert result.bound <= annealed[2]


def test_layers_of_a_model_come_out_best():
    for items in (28, 224, 500):
        options = layer_like(np.random.default_rng(items), items)
        for share in (0.05, 0.2, 0.5, 0.9):
            budget = share_of_reach(options, share)
            result = check(options, budget, allocate(options, budget))
            assert result.bound == result.error
            if items >= 224:
                assert budget - result.bits < 1e-5 * budget, "some combination of so many comes close to the budget"


def test_more_bits_are_never_worse():
    options = layer_like(np.random.default_rng(5), 30)
    errors = [allocate(options, share_of_reach(options, share)).error for share in np.linspace(0, 1, 40)]
    assert all(after <= before * (1 + TOLERANCE) for before, after in itertools.pairwise(errors))
    assert errors[0] == math.fsum(item[0][1] for item in options)


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [straight, few_values])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_where_the_search_is_cut_short(make, seed, monkeypatch):
    """With room for a few partial choices the result need not be the best, but the bound stays below the best."""
    import cupyq.quantize.allocate as module

    monkeypatch.setattr(module, "_CAPS", (16,))
    monkeypatch.setattr(module, "_WORK", 1)
    gaps = 0
    for variant in range(6):
        rng = np.random.default_rng([seed, variant])
        options = [[(b * 7 + int(rng.integers(3)), e) for b, e in item] for item in make(rng, 30, 6)]
        budget = share_of_reach(options, 0.2 + 0.1 * variant)
        result = check(options, budget, allocate(options, budget))
        best = best_by_program(options, budget)
        assert result.bound <= best * (1 + TOLERANCE) and best <= result.error * (1 + TOLERANCE)
        gaps += result.bound < result.error
    if make is straight:
        assert gaps > 0, "no case was cut short"


def test_the_bound_is_close_even_for_the_hardest():
    """Sums of hundreds of bit counts that all buy the same: which of them meets the budget is a subset-sum problem."""
    rng = np.random.default_rng(0)
    options = [[(int(b), 1.0 - b / 1e9) for b in rng.integers(0, 10**9, 20)] for _ in range(200)]
    budget = share_of_reach(options, 0.4) | 1
    start = process_time()
    result = check(options, budget, allocate(options, budget))
    assert process_time() - start < 4  # 1 s on one core of a server of 2023
    assert result.error - result.bound < 1e-7 * result.error
    assert budget - result.bits < 1e-7 * budget


# --- options and budgets of all kinds ---------------------------------------------------------------------------------


def test_options_that_others_beat_are_not_taken():
    options = [[(10, 0.5), (10, 0.4), (12, 0.4), (9, 0.6), (20, 0.41), (30, 0.1)]]
    taken = {budget: allocate(options, budget).choice[0] for budget in range(9, 40)}
    assert [taken[b] for b in (9, 10, 12, 20, 29, 30, 39)] == [3, 1, 1, 1, 1, 5, 5]


def test_an_option_above_the_hull_is_taken_where_it_fits():
    options = [[(0, 10.0), (5, 9.0), (10, 0.0)]]
    assert [allocate(options, budget).choice for budget in (4, 5, 9, 10)] == [[0], [1], [1], [2]]


def test_of_equal_options_the_first():
    assert allocate([[(4, 0.5), (4, 0.5), (5, 0.5)]], 100).choice == [0]
    assert allocate([[(5, 0.5), (4, 0.5), (4, 0.5)]], 100).choice == [1]


def test_no_errors_at_all():
    options = [[(5, 0.0), (3, 0.0), (9, 0.0)] for _ in range(50)]
    assert allocate(options, 1000) == Allocation([1] * 50, 150, 0.0, 0.0)
    assert allocate(options, 150).bits == 150


def test_some_errors_of_zero():
    options = [[(3, 0.5), (5, 0.0), (9, 0.0)], [(2, 0.0), (8, 0.0)], [(1, 1e-300), (2, 0.0)]]
    assert allocate(options, 6) == Allocation([0, 0, 0], 6, 0.5, 0.5)
    assert allocate(options, 8) == Allocation([1, 0, 0], 8, 1e-300, 1e-300)
    assert allocate(options, 9) == Allocation([1, 0, 1], 9, 0.0, 0.0)


def test_a_wide_range_of_errors():
    """The last bits buy a billionth of a billionth of the first ones, and are still spent well."""
    rng = np.random.default_rng(1)
    options = [[(b, float(10.0 ** -(b + rng.random()))) for b in range(0, 20, 2)] for _ in range(6)]
    for budget in range(0, 110, 7):
        result = check(options, budget, allocate(options, budget))
        assert result.error == pytest.approx(best_by_program(options, budget), rel=1e-10)


@pytest.mark.parametrize("count", [2, 8, 20])
def test_many_equal_items(count):
    rng = np.random.default_rng(count)
    bits, errors = np.cumsum(rng.integers(1, 9, count)), np.sort(rng.random(count))[::-1]
    options = [[(int(b), float(e)) for b, e in zip(bits, errors, strict=True)]] * 300
    for share in (0.1, 0.55):
        budget = share_of_reach(options, share)
        result = check(options, budget, allocate(options, budget))
        assert result.error == pytest.approx(best_by_program(options, budget), rel=1e-9)


def test_nothing_to_choose():
    options = [[(7, 0.5)], [(9, 0.25)]]
    for budget in (16, 17, 1000):
        assert allocate(options, budget) == Allocation([0, 0], 16, 0.75, 0.75)
    mixed = [*options, [(1, 0.5), (3, 0.1)], [(7, 1.0)]]
    assert [allocate(mixed, budget).choice for budget in (24, 25, 26)] == [[0] * 4, [0] * 4, [0, 0, 1, 0]]


def test_budgets_at_and_beyond_the_ends():
    options = layer_like(np.random.default_rng(3), 12)
    low, _ = reach(options)
    assert allocate(options, low).choice == [0] * 12
    best = [int(np.argmin([error for _, error in item])) for item in options]
    high = sum(item[at][0] for item, at in zip(options, best, strict=True))  # more bits than these buy nothing
    for budget in (high, high + 1, 10**30):
        assert allocate(options, budget).choice == best
    message = rf"budget_bits: {low - 1}, the options reach from {low} to {high}; ask for at least {low}"
    with pytest.raises(ValueError, match=message):
        allocate(options, low - 1)


def test_wide_bits_are_exact():
    """Sums beyond 2**53: bits are whole numbers, not floats."""
    options = [[(2**59 + 1, 0.5), (2**59, 0.6)], [(2**59 + 1, 0.5), (2**59, 0.6)]]
    assert [allocate(options, 2**60 + more).bits - 2**60 for more in range(4)] == [0, 1, 2, 2]


def test_numpy_numbers_and_tuples_pass():
    options = tuple(((np.int64(5), np.float32(0.5)), (np.int32(3), np.float64(0.75))) for _ in range(2))
    result = check(options, 8, allocate(options, np.int64(8)))
    assert sorted(result.choice) == [0, 1] and (result.error, result.bits) == (1.25, 8)


def test_the_same_for_the_same():
    options = layer_like(np.random.default_rng(8), 200)
    budget = share_of_reach(options, 0.3)
    first = allocate(options, budget)
    assert all(allocate(options, budget) == first for _ in range(2))
    order = np.random.default_rng(9).permutation(200).tolist()
    assert allocate([options[at] for at in order], budget).error == pytest.approx(first.error, rel=1e-10)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unrelated, layer_like, straight])
def test_five_hundred_items_of_twenty_options(make):
    options = make(np.random.default_rng(4), 500, 20)
    start = process_time()
    result = allocate(options, share_of_reach(options, 0.25))
    assert process_time() - start < 2  # 0.1 s on one core of a server of 2023
    check(options, share_of_reach(options, 0.25), result)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "budget", "kind", "message"),
    [
        ([], 10, ValueError, "options is empty: give at least one item"),
        ([[(1, 0.5)], []], 10, ValueError, r"options\[1\] is empty: give at least one"),
        ([[(1, 0.5), (2, -0.5)]], 10, ValueError, r"options\[0\]\[1\] is \(2, -0.5\): expected bits"),
        ([[(1, 0.5), (2, math.nan)]], 10, ValueError, r"options\[0\]\[1\] is \(2, nan\)"),
        ([[(1, math.inf)]], 10, ValueError, r"options\[0\]\[0\] is \(1, inf\)"),
        ([[(-1, 0.5)]], 10, ValueError, r"options\[0\]\[0\] is \(-1, 0.5\)"),
        ([[(2**62, 0.5)]], 2**63, ValueError, "expected bits from 0 to"),
        ([[(2**61, 0.5)]] * 2, 2**63, ValueError, "bits that sum to 4611686018427387904, expected below"),
        ([[(4, 0.5), (9, 0.1)], [(3, 0.5)]], 6, ValueError, "budget_bits: 6, the options reach from 7 to 12"),
        ([[(4, 0.5)]], -1, ValueError, "budget_bits: -1, the options reach from 4 to 4"),
        ([[(1, 0.5)]], 2.5, TypeError, "budget_bits: 2.5, expected an int"),
        ([[(1.5, 0.5)]], 10, TypeError, r"bits in options\[0\]: 1.5, expected an int"),
    ],
)
def test_refusals(options, budget, kind, message):
    with pytest.raises(kind, match=message) as error:
        allocate(options, budget)
    assert "\n" not in str(error.value)
