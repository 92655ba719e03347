"""Which option to take for each layer, within a budget: simulated annealing."""

import itertools
import math

import numpy as np

_BATCH = 1 << 16  # proposals drawn at a time


def sim_anneal(slots, max_cost, initial_temp, cooling_factor, min_temp, iterations, norm, *, seed=0):
    """Pick one option per slot so that E = sum of err**norm is small and the sum of cost at most max_cost.

    slots: for each slot the list of its options (cost, err), cost an int, err >= 0. Starting from option 0 everywhere,
    trunc(log(min_temp / initial_temp) / log(cooling_factor)) rounds of `iterations` proposals each, the temperature T
    falling from initial_temp by cooling_factor (below 1) after each round. A proposal is a random option for a random
    slot. It is allowed if the new cost is within max_cost or below the present cost, and then taken if it changes E by
    dE < 0, or with probability exp(-dE / T).

    Returns (solution, indices, E, cost, largest err) of the best state within the budget: the chosen tuples, their
    numbers, float64 sums. A budget that is never met within the rounds is met by the cheapest option of every slot, and
    a budget below even that cannot be met: the cheapest options are returned too, and cost > max_cost tells. The same
    arguments and seed give the same result. ValueError for empty slots, errors below 0 or not finite, temperatures
    that do not fall.
    Source: Kirkpatrick, Gelatt and Vecchi, Optimization by Simulated Annealing, Science 220, 1983; exllamav2
    (ext_quant.cpp), which returns the last state, from another seed every time.

    >>> sim_anneal([[(10, 0.5), (30, 0.1)], [(10, 0.9), (30, 0.2)]], 40, 1.0, 0.9, 0.01, 100, 1.0)
    ([(10, 0.5), (30, 0.2)], [0, 1], 0.7, 40, 0.5)
    """
    _check_slots(slots)
    rounds = _rounds(initial_temp, cooling_factor, min_temp)
    if iterations < 0 or not 0 < norm < math.inf:
        raise ValueError(f"iterations must be at least 0 and norm positive, got {iterations!r} and {norm!r}")

    # Options are numbered through all slots: slot s has those from starts[s] on.
    starts = list(itertools.accumulate(map(len, slots), initial=0))[:-1]
    costs = [int(cost) for slot in slots for cost, _ in slot]
    penalties = [float(err) ** norm for slot in slots for _, err in slot]
    present = list(starts)
    cost = sum(costs[option] for option in present)
    energy = sum(penalties[option] for option in present)
    best, best_energy = (list(present), energy) if cost <= max_cost else (None, math.inf)

    sizes = np.array([len(slot) for slot in slots])
    generator = np.random.Generator(np.random.PCG64(seed))
    temperature = initial_temp
    for _ in range(rounds):
        for first in range(0, iterations, _BATCH):
            for slot, option, allowance in _proposals(generator, starts, sizes, min(_BATCH, iterations - first), temperature):
                old = present[slot]
                new_cost = cost + costs[option] - costs[old]
                if new_cost <= max_cost or new_cost < cost:
                    change = penalties[option] - penalties[old]
                    if change < allowance:
                        present[slot] = option
                        cost = new_cost
                        energy += change
                        if energy < best_energy and cost <= max_cost:
                            best, best_energy = present.copy(), energy
        temperature *= cooling_factor

    if best is None:
        ends = (start + len(slot) for start, slot in zip(starts, slots, strict=True))
        best = [min(range(a, b), key=lambda o: (costs[o], penalties[o])) for a, b in zip(starts, ends, strict=True)]
    indices = [option - start for option, start in zip(best, starts, strict=True)]
    solution = [slot[index] for slot, index in zip(slots, indices, strict=True)]
    total = math.fsum(penalties[option] for option in best)
    return solution, indices, total, sum(costs[option] for option in best), max(float(err) for _, err in solution)


def _proposals(generator, starts, sizes, count, temperature):
    """(slot, option, allowance) of each proposal; a change of E below the allowance is taken.

    u < exp(-dE / T) for u uniform in (0, 1] means dE < -T log u, which is never negative.
    """
    # Products of plain uniform numbers: their stream is the same in every NumPy release.
    slots = (generator.random(count) * sizes.size).astype(np.int64)
    options = np.array(starts)[slots] + (generator.random(count) * sizes[slots]).astype(np.int64)
    allowances = -temperature * np.log1p(-generator.random(count))
    return zip(slots.tolist(), options.tolist(), allowances.tolist(), strict=True)


def _check_slots(slots):
    if not isinstance(slots, (list, tuple)):
        raise TypeError(f"slots must be a list of lists of (cost, err), got {type(slots).__name__}")
    if len(slots) == 0:
        raise ValueError("slots is empty: give at least one slot")
    for number, slot in enumerate(slots):
        if not isinstance(slot, (list, tuple)) or not all(map(_is_option, slot)):
            raise TypeError(f"slots[{number}] must be a list of pairs of numbers (cost, err), got {slot!r:.60}")
        if len(slot) == 0:
            raise ValueError(f"slots[{number}] has no options: give at least one (cost, err)")
        for _, err in slot:
            if not 0 <= err < math.inf:
                raise ValueError(f"slots[{number}] has an option with err {err!r}: errors must be finite and not negative")


def _is_option(option):
    kinds = (int, float, np.integer, np.floating)
    return isinstance(option, (list, tuple)) and len(option) == 2 and all(isinstance(n, kinds) for n in option)


def _rounds(initial_temp, cooling_factor, min_temp):
    if not (0 < min_temp < math.inf and 0 < initial_temp < math.inf and 0 < cooling_factor < 1):
        raise ValueError(
            "initial_temp and min_temp must be positive and cooling_factor between 0 and 1, "
            f"got {initial_temp!r}, {min_temp!r} and {cooling_factor!r}"
        )
    return max(0, math.trunc(math.log(min_temp / initial_temp) / math.log(cooling_factor)))
