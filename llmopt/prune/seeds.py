"""Plans from which a search begins, so that it can only be better than they are.

    measured    every option by itself in a base plan; then the least sum of damages, as if these added up
    greedy      whole blocks one after the other, each time the one whose going costs least behind all that went before

Damages of neighbours do not add up: a run of blocks costs less than its blocks one by one, and measured sums cannot see
that. So the greedy rows of blocks, short and long, are each filled up with what the table says of all others.
"""
import math
from collections.abc import Callable
from random import Random

from llmopt.calibration.programme import Programme
from llmopt.prune.search import Fitness, Plan, Space, mended, step
from llmopt.prune.supernet import Option

LOOKED_AT = 8       # blocks that are tried at each step of the greedy removal, beside the neighbours of those gone
RUNS = 6            # lengths of rows of blocks that become seeds
SLACK = 0.005       # of the budget may be left over; more where there is no such plan
Table = list[list[float]]       # [b][o]: damage of an option in a block


def table(choices: list[list[Option]], base: Plan, fitness: Fitness) -> Table:
    """What each option adds to the damage of a base plan; of one that differs in both parts, the sum of two.

    Infinity where these two cannot be had one by one.
    """
    wanted = [(b, of[o]) for b, of in enumerate(choices) for o in _singles(of, base[b]) if o != base[b]]
    found = fitness([base, *(step(base, b, choices[b].index(option)) for b, option in wanted)], 0)
    alone = dict(zip(wanted, (value - found[0] for value in found[1:]), strict=True))
    alone |= {(b, of[o]): 0.0 for b, (of, o) in enumerate(zip(choices, base, strict=True))}
    return [[_sum(option, _reference(of[o]), lambda one, b=b: alone.get((b, one), math.inf)) for option in of]
            for b, (of, o) in enumerate(zip(choices, base, strict=True))]


def _reference(base: Option) -> Option:
    """What parts are compared with: those of the base, whole where it is gone."""
    return Option(0, 0) if base.drop else base


def _singles(of: list[Option], base: int) -> list[int]:
    """The options that are measured: those that share a part with the reference, and a block that is gone."""
    whole = _reference(of[base])
    return [o for o, option in enumerate(of)
            if option.drop or option.attention == whole.attention or option.mlp == whole.mlp]


def _sum(option: Option, whole: Option, alone: Callable[[Option], float]) -> float:
    if option.drop or option.attention == whole.attention or option.mlp == whole.mlp:
        return alone(option)
    return alone(Option(option.attention, whole.mlp)) + alone(Option(whole.attention, option.mlp)) - alone(whole)


def greedy(space: Space, choices: list[list[Option]], damage: Table, fitness: Fitness) -> list[int]:
    """Blocks in the order in which they leave, as many as the budget has room for; damage: of each alone."""
    drops = {b: len(of) - 1 for b, of in enumerate(choices) if of[-1].drop}
    known, gone, plan = {b: damage[b][o] for b, o in drops.items()}, [], space.dense
    while known:
        fits = [b for b in known if (b, drops[b]) in space.moves(plan) and
                all(over <= 0 for over in space.over(step(plan, b, drops[b])))]
        near = {b + side for b in gone for side in (-1, 1)}
        tried = [b for place, b in enumerate(sorted(fits, key=known.__getitem__)) if place < LOOKED_AT or b in near]
        if not tried:
            break
        if gone:
            known |= zip(tried, fitness([step(plan, b, drops[b]) for b in tried], 0), strict=True)
        best = min(tried, key=known.__getitem__)
        gone, plan = [*gone, best], step(plan, best, drops[best])
        del known[best]
    return gone


def summed(space: Space, damage: Table, fixed: dict[int, int]) -> Plan:
    """The plan whose damages have the least sum, of those that take nearly what the budget, one account, says.

    fixed: blocks whose option is given.
    """
    rows = [[fixed[b]] if b in fixed else [o for o, value in enumerate(row) if value < math.inf]
            for b, row in enumerate(damage)]
    most = [max(space.prices[b][o][0] for o in row) for b, row in enumerate(rows)]
    stays = [[high - space.prices[b][o][0] for o in row] for b, (row, high) in enumerate(zip(rows, most, strict=True))]
    harm, least, slack = [[damage[b][o] for o in row] for b, row in enumerate(rows)], sum(most) - space.budget[0], SLACK
    while (picks := Programme(harm, stays, max(0, least) + int(slack * space.budget[0]), least).best()) is None:
        slack *= 4
    return tuple(row[pick] for row, pick in zip(rows, picks, strict=True))


def filled(space: Space, choices: list[list[Option]], damage: Table, gone: list[int], draw: Random) -> dict[str, Plan]:
    """Full plans by a name: the first few blocks of the greedy order gone, and the rest by the table."""
    found = {}
    for length in sorted({round(len(gone) * k / RUNS) for k in range(RUNS + 1)}):
        fixed = {b: len(choices[b]) - 1 for b in gone[:length]}
        found[f"measured, {length} blocks gone"] = mended(space, summed(space, damage, fixed), draw, fixed)
    return {name: plan for name, plan in found.items() if space.attending(plan)}
