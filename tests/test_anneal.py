"""sim_anneal: against exhaustive search, within its budget, the same from the same seed, fast enough."""

import itertools
import math
import time

import numpy as np
import pytest

from cupyq.quantize.anneal import sim_anneal

SCHEDULE = {"initial_temp": 1.0, "cooling_factor": 0.9, "min_temp": 1e-4, "iterations": 200}


def anneal(slots, max_cost, norm=2.0, **options):
    return sim_anneal(slots, max_cost, **{**SCHEDULE, "norm": norm, **options})


def random_slots(seed, slots, options):
    """Menus as a quantizer has them: more cost, less error, more or less."""
    generator = np.random.default_rng(seed)
    menus = []
    for _ in range(slots):
        costs = np.sort(generator.integers(1000, 9000, options))
        errors = np.sort(generator.random(options))[::-1] * generator.uniform(0.2, 1.0)
        menus.append([(int(c), float(e)) for c, e in zip(costs, errors, strict=True)])
    return menus


def best_by_search(slots, max_cost, norm):
    feasible = (choice for choice in itertools.product(*slots) if sum(c for c, _ in choice) <= max_cost)
    return min(sum(e**norm for _, e in choice) for choice in feasible)


def check_result(slots, result, norm):
    solution, indices, energy, cost, largest = result
    assert solution == [slot[i] for slot, i in zip(slots, indices, strict=True)]
    assert cost == sum(c for c, _ in solution) and largest == max(e for _, e in solution)
    assert energy == math.fsum(e**norm for _, e in solution)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("norm", [1.0, 2.5])
def test_finds_the_best_of_small_problems(seed, norm):
    slots = random_slots(seed, 5, 5)
    budget = int(0.6 * sum(slot[-1][0] for slot in slots))
    result = anneal(slots, budget, norm, seed=seed)
    check_result(slots, result, norm)
    assert result[3] <= budget
    assert result[2] == pytest.approx(best_by_search(slots, budget, norm), rel=1e-12)


def test_returns_the_best_state_seen_not_the_last():
    """So hot that every move is taken: the last state is a random one."""
    slots = random_slots(9, 4, 4)
    result = anneal(slots, 10**9, initial_temp=1e9, min_temp=1e8, iterations=2000)
    assert result[2] == pytest.approx(best_by_search(slots, 10**9, 2.0), rel=1e-12)


def test_cold_moves_never_climb():
    """At T = 0 but for rounding a worse option is never taken, so a start in a local optimum stays."""
    slots = [[(5, 0.5), (9, 0.1)], [(5, 0.5), (1, 0.6)]]  # the gain needs the second slot to give up some first
    cold = {"initial_temp": 1e-12, "min_temp": 1e-14}
    assert anneal(slots, 10, 1.0, **cold)[1] == [0, 0]
    assert anneal(slots, 10, 1.0)[1] == [1, 1]


def test_an_infeasible_start_finds_its_way():
    slots = [[(100, 0.0), (60, 0.1), (30, 0.2), (10, 0.5)] for _ in range(6)]
    solution, _, energy, cost, _ = anneal(slots, 200, 1.0)
    assert cost <= 200 and energy == pytest.approx(best_by_search(slots, 200, 1.0))
    # No single move from the start lands within this budget.
    assert sum(slot[0][0] for slot in slots) - 90 > 200


def test_moves_over_budget_are_needed_for_that():
    """With few proposals the cheapest options are not the answer: the state came down by itself."""
    slots = [[(100, 0.0), (10, 0.5), (90, 0.01)] for _ in range(8)]
    _, indices, _, cost, _ = anneal(slots, 700, 1.0, iterations=50)
    assert cost <= 700 and indices != [1] * 8


def test_without_proposals():
    slots = [[(3, 0.5), (1, 0.7), (1, 0.6)], [(4, 0.2), (9, 0.1)]]
    for options in ({"iterations": 0}, {"min_temp": 5.0}):  # min_temp above the start: no rounds
        result = anneal(slots, 7, **options)
        assert result[1] == [0, 0]
        assert anneal(slots, 6, **options)[1] == [2, 0], "over budget: the cheapest, of equals the better"
    assert anneal(slots, 4)[1] == [2, 0] and anneal(slots, 4)[3] == 5, "no choice fits: the cheapest, over budget"


def test_the_seed_decides():
    slots = random_slots(1, 40, 19)
    budget = 40 * 4000
    short = {"cooling_factor": 0.5, "iterations": 100}
    first, again = anneal(slots, budget, **short), anneal(slots, budget, seed=0, **short)
    assert first == again
    assert len({tuple(anneal(slots, budget, seed=seed, **short)[1]) for seed in range(4)}) > 1


def test_wide_costs_are_exact():
    """Sums beyond 2**53: costs are whole numbers, not floats."""
    slots = [[(2**60 + 1, 0.5), (2**60, 0.6)], [(2**60 + 1, 0.5), (2**60, 0.6)]]
    assert anneal(slots, 2**61 + 1)[3] == 2**61 + 1
    assert anneal(slots, 2**61)[3] == 2**61


def test_numpy_numbers_and_tuples_pass():
    slots = tuple(((np.int64(5), np.float32(0.5)), (np.int64(3), np.float32(0.75))) for _ in range(2))
    _, indices, energy, cost, largest = anneal(slots, np.int64(8), 1.0)
    assert sorted(indices) == [0, 1] and (energy, cost, largest) == (1.25, 8, 0.75)
    assert type(cost) is int and type(energy) is float and type(largest) is float


def test_two_million_proposals_take_seconds():
    slots = random_slots(2, 64, 19)
    start = time.process_time()
    result = sim_anneal(slots, 64 * 4000, 2.0, 0.995, 1e-4, 1000, 2.5)
    assert time.process_time() - start < 10  # 0.7 s on one core of a server of 2023
    check_result(slots, result, 2.5)
    assert result[3] <= 64 * 4000


@pytest.mark.parametrize(
    "slots, options, message",
    [
        ([], {}, "slots is empty"),
        ([[(1, 0.5)], []], {}, r"slots\[1\] has no options"),
        ([[(1, -0.5)]], {}, r"slots\[0\] has an option with err -0.5"),
        ([[(1, math.nan)]], {}, "err nan"),
        ([[(1, math.inf)]], {}, "err inf"),
        ([[(1, 0.5)]], {"cooling_factor": 1.0}, "cooling_factor between 0 and 1"),
        ([[(1, 0.5)]], {"initial_temp": 0.0}, "must be positive"),
        ([[(1, 0.5)]], {"min_temp": math.nan}, "must be positive"),
        ([[(1, 0.5)]], {"iterations": -1}, "iterations must be at least 0"),
        ([[(1, 0.5)]], {"norm": 0.0}, "norm positive"),
    ],
)
def test_refusals(slots, options, message):
    with pytest.raises(ValueError, match=message):
        anneal(slots, 10, **options)
