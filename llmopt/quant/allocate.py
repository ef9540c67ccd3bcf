"""Which block gets how many bits: pure functions on plain numbers.

    two_level   the least important layers move from `hi` to `lo` until the average fits (arXiv:2406.17415)
    exact       min sum_l damage_l(b_l)   subject to   sum_l n_l b_l <= target sum_l n_l      (dynamic programming)

Both keep the average at or below the target and respect pinned layers; equal scores are settled by the index.
"""
import math
from collections.abc import Mapping, Sequence

import numpy as np

from llmopt.errors import BudgetError

STATES = 200_000    # beyond this many budget units, costs are rounded up to coarser ones (still within the budget)
SLACK = 1e-9


def two_level(importance: Sequence[float], params: Sequence[int], hi: int, lo: int, target: float,
              pinned: Mapping[int, int] | None = None) -> list[int]:
    """Bits of each layer, `hi` or `lo`; the least important go down first, no more of them than the target asks for."""
    pinned = pinned or {}
    bits = [pinned.get(layer, hi) for layer in range(len(params))]
    order = sorted(range(len(params)), key=lambda layer: (importance[layer], layer))
    for layer in order:
        if _fits(bits, params, target):
            return bits
        if layer not in pinned:
            bits[layer] = lo
    if not _fits(bits, params, target):
        raise BudgetError(f"an average of {target:g} bits cannot be met: with every layer at {lo} it is "
                          f"{_mean(bits, params):.4g}")
    return bits


def exact(damage: Sequence[Mapping[int, float]], params: Sequence[int], target: float,
          pinned: Mapping[int, int] | None = None) -> list[int]:
    """Bits of each layer at the least total damage; damage[l]: {bits: harm of layer l at these bits}."""
    pinned = pinned or {}
    choices = [[pinned[i]] if i in pinned else sorted(table) for i, table in enumerate(damage)]
    least = [c[0] for c in choices]
    room = math.floor((target + SLACK) * sum(params)) - sum(n * b for n, b in zip(params, least, strict=True))
    if room < 0:
        raise BudgetError(f"an average of {target:g} bits cannot be met: the least possible is "
                          f"{_mean(least, params):.4g}")
    unit = math.gcd(*(n * (b - c[0]) for n, c in zip(params, choices, strict=True) for b in c)) or 1
    unit = max(unit, math.ceil(room / STATES))
    costs = [[-(-n * (b - c[0]) // unit) for b in c] for n, c in zip(params, choices, strict=True)]
    harms = [[damage[i].get(b, 0.0) for b in c] for i, c in enumerate(choices)]
    picks = _knapsack(costs, harms, min(room // unit, sum(c[-1] for c in costs)))
    return [c[k] for c, k in zip(choices, picks, strict=True)]


def _knapsack(costs: list[list[int]], harms: list[list[float]], room: int) -> list[int]:
    """One option per item, at the least total harm within `room`; ties go to the cheaper option."""
    best = np.zeros(room + 1)                        # least harm of the items so far with at most this much spent
    taken = np.zeros((len(costs), room + 1), dtype=np.int8)
    for item, (prices, harm) in enumerate(zip(costs, harms, strict=True)):
        value = np.full(room + 1, np.inf)
        for option, price in enumerate(prices):
            if price > room:
                continue
            trial = np.full(room + 1, np.inf)
            trial[price:] = best[:room + 1 - price] + harm[option]
            better = trial < value
            value[better], taken[item, better] = trial[better], option
        best = value
    spent, picks = int(np.argmin(best)), []
    for item in reversed(range(len(costs))):
        picks.append(int(taken[item, spent]))
        spent -= costs[item][picks[-1]]
    return picks[::-1]


def _mean(bits: Sequence[int], params: Sequence[int]) -> float:
    return sum(n * b for n, b in zip(params, bits, strict=True)) / sum(params)


def _fits(bits: Sequence[int], params: Sequence[int], target: float) -> bool:
    return _mean(bits, params) <= target + SLACK


def at_most(widths: Sequence[int], target: float) -> int:
    """The largest width that keeps the target; raises BudgetError where none does."""
    fitting = [w for w in widths if w <= target + SLACK]
    if not fitting:
        raise BudgetError(f"an average of {target:.4g} bits cannot be met with widths {sorted(widths)}")
    return max(fitting)


def around(widths: Sequence[int], target: float) -> tuple[int, int]:
    """The two widths (hi, lo) next to the target, for `two_level`; a target that is a width lies between them."""
    fits = at_most(widths, target)
    lo = max((w for w in widths if w < target - SLACK), default=fits)
    hi = min((w for w in widths if w > target + SLACK), default=fits)
    if target <= min(widths) + SLACK:
        return lo, lo
    return (hi, hi) if target >= max(widths) - SLACK else (hi, lo)
