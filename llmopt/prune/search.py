"""Evolutionary search among plans of one price: pure functions on numbers, no model in sight.

A plan gives each block one of its options, and an option has a price: the parameters that leave. All plans that are
looked at are full: they stay within the budget, and not one more step of any block would. An offspring makes a few
steps that take more away, gives back elsewhere until the budget holds again, and is filled up; so it may trade a block
for channels everywhere, and the price stays. Selection, with an elitist parent: Li et al., 2025 (arXiv:2503.09657).
"""
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from llmopt.progress import Progress, silent

Plan = tuple[int, ...]              # the option of each block
Fitness = Callable[[list[Plan], int], list[float]]      # plans and the number of the stage: smaller is better
LAST = -1           # the stage whose tokens are always the same
TRIES = 30          # draws for each offspring that is wanted, after which there are no more distinct ones


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


def step(plan: Plan, block: int, option: int) -> Plan:
    """The plan with another option in one block."""
    return (*plan[:block], option, *plan[block + 1:])


def mended(space: Space, plan: Plan, draw: Random, keep: Iterable[int] = ()) -> Plan:
    """A full plan near `plan`: steps drawn at random give back what is too much, then take what fits.

    keep: blocks that give back only if nobody else can.
    """
    keep = set(keep)
    while max(over := space.over(plan)) > 0:
        ways = [(b, to) for b, to in space.moves(plan) if _gives_back(space.price(b, plan[b], to), over)]
        plan = step(plan, *draw.choice([way for way in ways if way[0] not in keep] or ways))
    while fits := _fitting(space, plan):
        plan = step(plan, *draw.choice(fits))
    return plan


def _gives_back(price: list[int], over: list[int]) -> bool:
    return max(price) <= 0 and any(p < 0 < excess for p, excess in zip(price, over, strict=True))


def _fitting(space: Space, plan: Plan) -> list[tuple[int, int]]:
    """The steps that take something more and leave the plan within the budget."""
    over, found = space.over(plan), []
    for block, option in space.moves(plan):
        price = space.price(block, plan[block], option)
        if min(price) >= 0 < max(price) and all(p + excess <= 0 for p, excess in zip(price, over, strict=True)):
            found.append((block, option))
    return found


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


def evolved(space: Space, parent: Plan, fitness: Fitness, generations: int, count: int, survivors: Sequence[int],
            most: int, draw: Random, progress: Progress = silent) -> tuple[Plan, list[float]]:
    """(the best plan, fitness of the parent before and after each generation).

    Of a parent's offspring the best `survivors` of each stage go on to the next. One that gets to the last, whose
    tokens are always the same, takes the parent's place if it is better there.
    """
    log = fitness([parent], LAST)
    for _ in progress(range(generations), "generations"):
        pool = offspring(space, parent, count, most, draw)
        for stage, keep in enumerate(survivors):
            if len(pool) > keep:
                found = fitness(pool, stage)
                pool = [pool[i] for i in sorted(range(len(pool)), key=found.__getitem__)[:keep]]
        found = fitness(pool, LAST) if pool else []
        if found and min(found) < log[-1]:
            parent = pool[found.index(min(found))]
        log.append(min([log[-1], *found]))
    return parent, log
