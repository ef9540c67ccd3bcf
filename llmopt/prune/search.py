"""Evolutionary search among plans of one price: pure functions on numbers, no model in sight.

A plan gives each block one of its options, and an option has a price: the parameters that leave. All plans that are
looked at are full: they stay within the budget, and not one more step of any block would. An offspring makes a few steps
that take more away, gives back elsewhere until the budget holds again, and is filled up; so it may trade a block for
channels everywhere, and the price stays. Selection, with an elitist parent: Li et al., 2025 (arXiv:2503.09657).
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from llmopt.errors import BudgetError
from llmopt.progress import Progress, silent

Plan = tuple[int, ...]              # the option of each block
Fitness = Callable[[list[Plan], int], list[float]]      # plans, number of the stage, -1 the last: smaller is better
TRIES = 30          # draws for each offspring that is wanted, after which there are no more distinct ones
LEAST, HALVINGS = 1e-18, 60         # nats that a parameter is worth, and how often the interval above it is halved


@dataclass(frozen=True)
class Space:
    """The options of every block, the first of which takes nothing away.

    prices[b][o]: parameters that leave, in each account of the budget. steps[b][o]: the options that are one step away.
    attends[b][o]: whether the block still has attention, as one block of a model must.
    """

    prices: list[list[tuple[int, ...]]]
    steps: list[list[tuple[int, ...]]]
    attends: list[list[bool]]
    budget: tuple[int, ...]

    @property
    def plans(self) -> int:
        """How many plans there are, whatever their price."""
        return math.prod(map(len, self.prices))

    @property
    def dense(self) -> Plan:
        return (0,) * len(self.prices)

    def spent(self, plan: Plan) -> list[int]:
        """What leaves, by account."""
        return [sum(account) for account in zip(*(of[o] for of, o in zip(self.prices, plan, strict=True)), strict=True)]

    def over(self, plan: Plan) -> list[int]:
        """By account, how far a plan is above the budget, or below it (negative)."""
        return [spent - most for spent, most in zip(self.spent(plan), self.budget, strict=True)]

    def attending(self, plan: Plan) -> int:
        """Blocks that have attention."""
        return sum(of[o] for of, o in zip(self.attends, plan, strict=True))

    def price(self, block: int, option: int, to: int) -> list[int]:
        """What more leaves, by account, when a block goes from one option to another."""
        return [b - a for a, b in zip(self.prices[block][option], self.prices[block][to], strict=True)]

    def moves(self, plan: Plan) -> list[tuple[int, int]]:
        """(block, option) of all single steps that leave the model some attention."""
        left = self.attending(plan)
        return [(b, to) for b, o in enumerate(plan) for to in self.steps[b][o]
                if self.attends[b][to] or left > self.attends[b][o]]


def check_reachable(space: Space, ratio: float) -> None:
    """Raise BudgetError where no plan takes away what the budget says, or where it does not pay for a single step."""
    most, total = sum(max(map(sum, of)) for of in space.prices), sum(space.budget)
    least = min((sum(price) for of in space.prices for price in of if sum(price)), default=0)
    if total > most:
        raise BudgetError(f"ratio {ratio:g} cannot be met: the units and `minimum` leave "
                          f"{ratio * most / total:.3f} to remove")
    if least > total:
        raise BudgetError(f"ratio {ratio:g} is less than one step of these units, which takes "
                          f"{ratio * least / total:.3g} (nothing would be removed); raise it")


def step(plan: Plan, block: int, option: int) -> Plan:
    """The plan with another option in one block."""
    return (*plan[:block], option, *plan[block + 1:])


def mended(space: Space, plan: Plan, draw: Random, keep: Iterable[int] = ()) -> Plan:
    """A full plan near `plan`: steps drawn at random give back what is too much, then take what fits.

    keep: blocks that give back only if nobody else can.
    """
    keep = set(keep)
    while any(excess > 0 for excess in (over := space.over(plan))):
        ways = [(b, to) for b, to in space.moves(plan)
                if all(p <= 0 for p in (price := space.price(b, plan[b], to)))
                and any(p < 0 < excess for p, excess in zip(price, over, strict=True))]
        plan = step(plan, *draw.choice([way for way in ways if way[0] not in keep] or ways))
    while fits := [(b, to) for b, to in space.moves(plan) if _fits(space.price(b, plan[b], to), space.over(plan))]:
        plan = step(plan, *draw.choice(fits))
    return plan


def _fits(price: list[int], over: list[int]) -> bool:
    return sum(price) > 0 and all(p >= 0 and p + excess <= 0 for p, excess in zip(price, over, strict=True))


def offspring(space: Space, parent: Plan, count: int, most: int, draw: Random) -> list[Plan]:
    """Distinct full plans, each min(U, U) steps from the parent, U drawn from 1 to `most`, and mended; maybe fewer."""
    found: dict[Plan, None] = {}
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        plan, touched = parent, set()
        for _ in range(min(draw.randint(1, most), draw.randint(1, most))):
            more = [(b, to) for b, to in space.moves(plan) if sum(space.price(b, plan[b], to)) > 0]
            if more:
                block, option = draw.choice(more)
                plan = step(plan, block, option)
                touched.add(block)
        plan = mended(space, plan, draw, touched)
        if plan != parent:
            found[plan] = None
    return list(found)


def evolved(space: Space, seeds: list[Plan], fitness: Fitness, generations: int, count: int, survivors: Iterable[int],
            most: int, draw: Random, progress: Progress = silent) -> tuple[Plan, list[float]]:
    """(the best plan, fitness of the parent before and after each generation).

    The parent of the first generation is the best of the seeds. Of its offspring the best `survivors` of each stage go
    on to the next; a survivor of the last but one takes the parent's place if it is better on the last stage's tokens,
    which are always the same.
    """
    found = fitness(seeds, -1)
    best = min(found)
    parent, log = seeds[found.index(best)], [best]
    for _ in progress(range(generations), "generations"):
        pool = offspring(space, parent, count, most, draw)
        for stage, keep in enumerate(survivors):
            found = fitness(pool, stage)
            pool = [pool[i] for i in sorted(range(len(pool)), key=found.__getitem__)[:keep]]
        found = fitness(pool, -1) if pool else []
        if found and min(found) < best:
            best = min(found)
            parent = pool[found.index(best)]
        log.append(best)
    return parent, log


def cheapest(space: Space, damage: list[list[float]], fixed: dict[int, int] | None = None) -> Plan:
    """The plan with the least sum of `damage[b][o]` near the budget, never above it: options fall to a price.

    Each block takes the option of least damage - worth x parameters; the worth, of each account, is the largest at which
    the budget holds. fixed: blocks whose option is given.
    """
    worth = [0.0] * len(space.budget)

    def best(worth: list[float]) -> Plan:
        return tuple(
            fixed[b] if fixed and b in fixed else min(range(len(of)), key=lambda o: (
                harm[o] - sum(w * p for w, p in zip(worth, of[o], strict=True)), sum(of[o])))
            for b, (of, harm) in enumerate(zip(space.prices, damage, strict=True)))

    for account in range(len(worth)):
        low, high = LEAST, 1 + max(max(map(abs, harm)) for harm in damage)
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            holds = space.over(best(_put(worth, account, middle)))[account] <= 0
            low, high = (middle, high) if holds else (low, middle)
        worth[account] = low
    return best(worth)


def _put(values: list[float], place: int, value: float) -> list[float]:
    return [value if i == place else v for i, v in enumerate(values)]
