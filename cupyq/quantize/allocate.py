"""Which option to take for each layer, within a budget of bits: a multiple-choice knapsack, solved.

The least sum of errors with one option per item and at most so many bits. Shared between the items, the bits buy most
where an option's error falls steepest per bit: that greedy walk over the lower convex hulls of the items solves the
problem with fractions of options allowed (its Lagrangian dual), which bounds the best error from below. Rounded down it
is a first choice. Options that no choice better than that one can hold are struck out by their Lagrangian cost, and what
remains is searched item by item: the partial choices of which no other has fewer bits and less error, and whose own
lower bound beats the best choice known. Few are left as a rule, and then the result is the best there is.

Source: Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27, 1979 (relaxation); Pisinger, A
minimal algorithm for the multiple-choice knapsack problem, European Journal of Operational Research 83, 1995 (reduction
and search). exllamav2 anneals instead, see anneal.py.
"""

import math
import operator
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-11
"""Improvements below this share of the error count as none. Sums here only add what is not negative, so 100,000 terms of
float64 stay well within it."""

_CAPS = (64, 1024, 16384)  # partial choices kept in one pass; the next pass begins with the choice this one found
_WORK = 4_000_000  # partial choices made in one pass, at most
_MAX_BITS = 1 << 62


@dataclass(frozen=True)
class Allocation:
    """The number of the option taken for each item, the sum of their bits and of their errors, and what no choice within
    the budget can go below: error == bound says that this one is the best."""

    choice: list[int]
    bits: int
    error: float
    bound: float


def allocate(options, budget_bits):
    """Allocation with the least sum of errors whose bits sum to at most budget_bits.

    options: for each item the list of its options (bits, error), bits an int and error finite, neither negative. The
    budget is never exceeded, and no other option of a single item would both fit and lower the error. The result is the
    best, with bound == error, up to a share of 1e-11 of the error (rounding), unless the search grows beyond its limits
    (items by the hundred whose bits sum up like no other's); then it is between error and bound. Of two choices equally
    good either may come, but the same for the same arguments. A few hundred items with 20 options each take well under
    a second. ValueError for items without options, numbers out of range, and a budget below the cheapest options, with
    the range that can be reached.

    >>> allocate([[(10, 0.5), (30, 0.1)], [(10, 0.9), (30, 0.2), (20, 0.3)]], 40)
    Allocation(choice=[0, 1], bits=40, error=0.7, bound=0.7)
    """
    items = [_item(number, item) for number, item in enumerate(options)]
    if not items:
        raise ValueError("options is empty: give at least one item")
    budget = _whole("budget_bits", budget_bits)
    least, most = sum(int(item.bits[0]) for item in items), sum(int(item.bits[-1]) for item in items)
    if budget < least:
        raise ValueError(f"budget_bits: {budget}, the options reach from {least} to {most}; ask for at least {least}")
    if most >= _MAX_BITS:
        raise ValueError(f"options: bits that sum to {most}, expected below 2**62")
    # Sums of bits step by their common divisor: a budget between two steps is worth no more than the lower one.
    step = max(1, math.gcd(*(int(np.gcd.reduce(item.bits - item.bits[0])) for item in items)))
    best, bound = _solve(items, least + (min(budget, most) - least) // step * step)
    error = _error(items, best)
    choice = [int(item.numbers[at]) for item, at in zip(items, best, strict=True)]
    return Allocation(choice, _bits(items, best), error, min(bound, error))


@dataclass(frozen=True, eq=False)
class _Item:
    """The options of an item worth having, bits rising and errors falling, with their numbers in the caller's list."""

    bits: np.ndarray
    errors: np.ndarray
    numbers: np.ndarray

    def only(self, kept):
        return _Item(self.bits[kept], self.errors[kept], self.numbers[kept])


def _whole(name, value):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {value!r}, expected an int") from None


def _item(number, options):
    if len(options) == 0:
        raise ValueError(f"options[{number}] is empty: give at least one (bits, error)")
    useful = []
    name = f"bits in options[{number}]"
    for bits, error, at in sorted((_whole(name, bits), float(error), at) for at, (bits, error) in enumerate(options)):
        if not (0 <= bits < _MAX_BITS and 0 <= error < math.inf):
            raise ValueError(
                f"options[{number}][{at}] is ({bits}, {error}): expected bits from 0 to 2**62 and a finite error of at least 0"
            )
        if not useful or error < useful[-1][1]:
            useful.append((bits, error, at))
    bits, errors, numbers = zip(*useful, strict=True)
    return _Item(np.array(bits, np.int64), np.array(errors), np.array(numbers))


def _hull(item):
    """Places of the options on the lower convex hull of error over bits, and how steeply the error falls before each."""
    places, steepness = [0], [math.inf]
    bits, errors = item.bits.tolist(), item.errors.tolist()
    for at in range(1, len(bits)):
        while True:
            fall = (errors[places[-1]] - errors[at]) / (bits[at] - bits[places[-1]])
            if fall < steepness[-1]:
                break
            places.pop()
            steepness.pop()
        places.append(at)
        steepness.append(fall)
    return places, steepness


class _Steps:
    """The steps from each option on an item's hull to the next, of all items, steepest first."""

    def __init__(self, items):
        owners, places, steepness, bits, falls = [], [], [], [], []
        for owner, item in enumerate(items):
            hull, steep = _hull(item)
            owners += [owner] * (len(hull) - 1)
            places += hull[1:]
            steepness += steep[1:]
            bits += np.diff(item.bits[hull]).tolist()
            falls += (-np.diff(item.errors[hull])).tolist()
        # Stable: the steps of one item stay in their order even where they are equally steep.
        order = np.argsort(-np.array(steepness, float), kind="stable")
        self.owners, self.places = np.array(owners, int)[order], np.array(places, int)[order]
        self.steepness = np.array(steepness, float)[order]
        self.bits, self.falls = np.array(bits, np.int64)[order], np.array(falls, float)[order]
        self.first_bits = np.array([item.bits[0] for item in items], np.int64)
        self.last_errors = np.array([item.errors[-1] for item in items], float)


class _Relaxation:
    """The least error of the items from `first` on as a function of their budget, with fractions of options allowed.

    Piecewise linear, and at the ends of the pieces no option is split. Errors are summed from the small end, so that their
    rounding is small against them.
    """

    def __init__(self, steps, first):
        kept = np.flatnonzero(steps.owners >= first)
        self.owners, self.places = steps.owners[kept], steps.places[kept]
        self.steepness = np.append(steps.steepness[kept], 0.0)  # level past the last step
        self.ends = np.concatenate([[0], np.cumsum(steps.bits[kept])]) + steps.first_bits[first:].sum()
        falls = np.concatenate([[steps.last_errors[first:].sum()], steps.falls[kept][::-1]])
        self.errors = np.cumsum(falls)[::-1]

    def __call__(self, budgets):
        """(lower bounds, errors of the choices rounded down, steps those take) for budgets int64 of any shape; the first two
        are infinite where even the cheapest options do not fit."""
        steps = np.searchsorted(self.ends, budgets, side="right") - 1
        fits, at = steps >= 0, np.maximum(steps, 0)
        rounded = np.where(fits, self.errors[at], math.inf)
        above = np.minimum(at + 1, len(self.ends) - 1)
        part = self.errors[above] + (self.ends[above] - budgets) * self.steepness[at]
        # The part of a piece is added up another way than its ends: never let it pass the rounded choice.
        return np.where(fits, np.minimum(part, rounded), math.inf), rounded, steps

    def take(self, choice, count):
        """Write the first `count` steps into `choice`, places of options by item."""
        choice[self.owners[:count]] = self.places[:count]  # the last of an item's steps stays


def _solve(items, budget):
    """(place of the option taken by item, lower bound of the error)."""
    steps = _Steps(items)
    relaxation = _Relaxation(steps, 0)
    bound, _, count = (value.item() for value in relaxation(np.array(budget)))
    best = np.zeros(len(items), int)
    relaxation.take(best, count)
    _upgrade(items, best, budget)
    error = _error(items, best)
    price = float(relaxation.steepness[count])  # of the step that did not fit: the error that one more bit would save
    proven = bound
    for cap in _CAPS:
        if proven >= error * (1 - TOLERANCE):
            return best, error
        gap = error - bound + TOLERANCE * error
        places = [_worth_keeping(item, price, gap) for item in items]
        reduced = [item.only(kept) for item, kept in zip(items, places, strict=True)]
        found, dropped = _search(reduced, budget, error, cap)
        if found is not None:
            found = np.array([kept[at] for kept, at in zip(places, found, strict=True)], int)
            _upgrade(items, found, budget)
            if _error(items, found) < error:
                best, error = found, _error(items, found)
        proven = max(proven, min(dropped, error))
    return best, error if proven >= error * (1 - TOLERANCE) else proven


def _worth_keeping(item, price, gap):
    """Places of the options that a choice better than the best known may hold.

    A choice costs at least the bound plus what its options cost above the cheapest at this price per bit.
    """
    costs = item.errors + price * (item.bits - item.bits[0])
    rounding = 1e-12 * (costs + costs.min())
    return np.flatnonzero(costs - costs.min() <= gap + rounding)


def _search(items, budget, error, cap):
    """(places of a choice with less than `error` or None, the least lower bound among the partial choices given up).

    Items are gone through one by one, those that can change the bits most first: the items left then fill a remaining
    budget closely, which makes their relaxation a sharp bound. More than `cap` partial choices are thinned to those of
    the least bounds.
    """
    order = sorted(range(len(items)), key=lambda at: (-int(items[at].bits[-1] - items[at].bits[0]), at))
    items = [items[at] for at in order]
    cap = max(16, min(cap, _WORK // sum(len(item.bits) for item in items)))
    free = sum(len(item.bits) > 1 for item in items)  # behind these every item has one option left
    steps = _Steps(items)
    bits, errors = np.zeros(1, np.int64), np.zeros(1)
    trace = []  # by item: what each partial choice goes back to and the place it adds
    found, dropped = None, math.inf
    for number, item in enumerate(items[:free]):
        options = len(item.bits)
        next_bits = (bits[:, None] + item.bits).reshape(-1)
        next_errors = (errors[:, None] + item.errors).reshape(-1)
        relaxation = _Relaxation(steps, number + 1)
        bounds, rounded, counts = relaxation(budget - next_bits)
        bounds, rounded = bounds + next_errors, rounded + next_errors
        at = int(np.argmin(rounded))
        if rounded[at] < error:
            error = float(rounded[at])
            found = (number, at // options, at % options, relaxation, int(counts[at]))
        kept = np.flatnonzero(bounds < error * (1 - TOLERANCE))
        kept = kept[np.lexsort((next_errors[kept], next_bits[kept]))]
        # Undominated: less error than all with fewer or as many bits.
        least = np.minimum.accumulate(np.concatenate([[math.inf], next_errors[kept]]))[:-1]
        kept = kept[next_errors[kept] < least]
        if len(kept) > cap:
            by_bound = np.argsort(bounds[kept], kind="stable")
            dropped = min(dropped, float(bounds[kept[by_bound[cap]]]))
            kept = kept[np.sort(by_bound[:cap])]
        trace.append(((kept // options).astype(np.int32), (kept % options).astype(np.int32)))
        bits, errors = next_bits[kept], next_errors[kept]
        if len(kept) == 0:
            break
    if found is None:
        return None, dropped
    number, origin, place, relaxation, count = found
    choice = np.zeros(len(items), int)
    relaxation.take(choice, count)
    for earlier in range(number, -1, -1):
        choice[earlier] = place
        if earlier > 0:
            origins, places = trace[earlier - 1]
            origin, place = origins[origin], places[origin]
    result = np.empty(len(items), int)
    result[order] = choice
    return result, dropped


def _upgrade(items, choice, budget):
    """Take, while any fits, the option that lowers the error most: what rounding left over is spent."""
    left = budget - _bits(items, choice)
    while True:
        best_fall, best = 0.0, None
        for number, (item, at) in enumerate(zip(items, choice, strict=True)):
            # Errors fall as bits rise, so the last option that fits is the item's best.
            last = int(np.searchsorted(item.bits, item.bits[at] + left, side="right")) - 1
            fall = float(item.errors[at] - item.errors[last])
            if fall > best_fall:
                best_fall, best = fall, (number, last)
        if best is None:
            return
        number, last = best
        left -= int(items[number].bits[last] - items[number].bits[choice[number]])
        choice[number] = last


def _bits(items, choice):
    return sum(int(item.bits[at]) for item, at in zip(items, choice, strict=True))


def _error(items, choice):
    return math.fsum(item.errors[at] for item, at in zip(items, choice, strict=True))
