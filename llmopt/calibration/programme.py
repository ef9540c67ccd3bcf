"""Which option each unit takes: the least damage in all within a budget, as an integer programme.

    min sum_u damage[u][c_u]      subject to      sum_u cost[u][c_u] <= room,      one option c_u for each unit u

A multiple-choice knapsack, solved exactly by HiGHS (scipy.optimize.milp): x[u, c] is 1 where unit u takes option c.
Further plans come of the same programme with a cut for every plan that is known already: at least so many units must
choose otherwise. Options that cost as much as another one of the unit and do more damage are left out beforehand.
"""
import ctypes
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from llmopt.errors import BudgetError

SECONDS = 60.0      # after which the best plan found so far is taken
FINE = 100.0       # the largest damage in the numbers of the solver, whose absolute gap of 1e-6 is then 1e-8 of it


@dataclass(frozen=True)
class Programme:
    """What each option of each unit costs, and what harm it does; both have a row for a unit, an entry for an option.

    Costs are whole numbers, damages any finite ones. least: what a plan costs at least, for budgets that are not to
    be undercut.
    """

    damage: Sequence[Sequence[float]]
    cost: Sequence[Sequence[int]]
    room: int
    least: int = 0

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the most that all units together can cost."""
        return sum(map(min, self.cost)), sum(map(max, self.cost))

    def price(self, picks: Sequence[int]) -> int:
        """What a plan costs: the option of each unit."""
        return sum(row[pick] for row, pick in zip(self.cost, picks, strict=True))

    def harm(self, picks: Sequence[int]) -> float:
        """The damage of a plan."""
        return math.fsum(row[pick] for row, pick in zip(self.damage, picks, strict=True))

    def best(self, known: Iterable[Sequence[int]] = (), apart: int = 1) -> list[int] | None:
        """The plan that does the least damage; None where none is left.

        known: plans from each of which it must differ in `apart` units. Raises BudgetError where no plan fits at all.
        """
        least = self.reach[0]
        if least > self.room:
            raise BudgetError(f"{self.room} cannot be met: the least possible is {least}")
        return self._solved([list(plan) for plan in known], apart, (self.least, self.room))

    def plans(self, count: int, apart: int = 1) -> Iterator[list[int]]:
        """The best plan, then the best of those that differ from all before in `apart` units; `count` at most."""
        found: list[list[int]] = []
        while len(found) < count and (plan := self.best(found, apart)) is not None:
            found.append(plan)
            yield plan

    def _solved(self, known: list[list[int]], apart: int, bounds: tuple[int, int]) -> list[int] | None:
        from scipy.optimize import Bounds, LinearConstraint, milp  # takes a second to import

        places = [(unit, option) for unit in range(len(self.cost)) for option in self._worth(unit, known)]
        unit_of = np.array([unit for unit, _ in places])
        price = np.array([self.cost[unit][option] for unit, option in places], dtype=np.float64)
        harm = np.array([self.damage[unit][option] for unit, option in places])
        scale, step = np.abs(harm).max() or 1.0, math.gcd(*price.astype(np.int64).tolist()) or 1
        rows = [(unit_of == np.arange(len(self.cost))[:, None]).astype(float), price[None] / step]
        low, high = [1.0] * len(self.cost) + [-(-bounds[0] // step)], [1.0] * len(self.cost) + [bounds[1] // step]
        for plan in known:
            rows.append(np.array([[float(plan[unit] == option) for unit, option in places]]))
            low, high = [*low, -np.inf], [*high, len(self.cost) - apart]
        with _apart_from_stdout():
            found = milp(FINE * harm / scale, integrality=np.ones(len(places)), bounds=Bounds(0, 1),
                         constraints=LinearConstraint(np.concatenate(rows), low, high),
                         options={"mip_rel_gap": 0.0, "time_limit": SECONDS})
        if found.x is None:
            return None
        chosen = [places[index] for index in np.flatnonzero(found.x > 0.5)]
        picks = [option for _, option in chosen]
        under, over = self.least - self.price(picks), self.price(picks) - self.room
        if max(under, over) <= 0:
            return picks
        closer = bounds[0] + max(0, under), bounds[1] - max(0, over)             # by as much as the solver tolerated
        return self._solved(known, apart, closer)

    def _worth(self, unit: int, known: Sequence[Sequence[int]]) -> list[int]:
        """The options of a unit that no other one beats, and those of plans that are known, sorted by their place.

        All of them where a plan can be too cheap.
        """
        if self.least:
            return list(range(len(self.cost[unit])))
        order = sorted(range(len(self.cost[unit])), key=lambda c: (self.cost[unit][c], self.damage[unit][c], c))
        kept, least = {plan[unit] for plan in known}, math.inf
        for option in order:
            if self.damage[unit][option] < least:
                kept.add(option)
                least = self.damage[unit][option]
        return sorted(kept)


@contextmanager
def _apart_from_stdout() -> Iterator[None]:
    """Inside, what compiled code prints goes to stderr: HiGHS says a line now and then, and stdout may be JSON."""
    printed = ctypes.CDLL(None)                 # of this process: its buffer is not Python's
    try:
        kept = os.dup(1)
    except OSError:                             # a process without stdout
        yield
        return
    try:
        printed.fflush(None)
        os.dup2(2, 1)
        yield
        printed.fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
