"""Plans from which a search begins, so that it can only be better than they are.

    measured    options one by one in a base plan; then the least sum of damages, as if these added up
    greedy      whole blocks one after the other, each time the one whose going costs least behind all that went before

Damages of neighbours do not add up: a run of blocks costs less than its blocks one by one, and measured sums cannot see
that. So the greedy rows of blocks, short and long, are each filled up with what the table says of all others.
"""
import math
from random import Random

from llmopt.calibration.programme import Programme
from llmopt.prune.search import Fitness, Plan, Space, mended, step
from llmopt.prune.supernet import Option, Part

LOOKED_AT = 8       # blocks that are tried at each step of the greedy removal, beside the neighbours of those gone
RUNS = 6            # lengths of rows of blocks that become seeds
SLACK = 0.005       # of the budget may be left over; more where there is no such plan
Table = list[list[float]]       # [b][o]: damage of an option in a block


def table(parts: list[dict[str, Part]], choices: list[list[Option]], base: Plan, fitness: Fitness,
          far: bool = True) -> Table:
    """What each option adds to the damage of a base plan; of one that differs in both parts, the sum of two.

    Of a part are measured the levels next to the base's; far: also the longest that leaves some of it, and all of it,
    and a level between two that were measured lies on the line between them. Infinity for all others.
    """
    wholes = [_whole(of[o]) for of, o in zip(choices, base, strict=True)]
    wanted = [(b, option) for b, of in enumerate(choices) for option in of if option != of[base[b]]
              and option in _singles(parts[b], wholes[b], far or of[base[b]].drop)]
    found = fitness([base, *(step(base, b, choices[b].index(option)) for b, option in wanted)], 0)
    alone = dict(zip(wanted, (value - found[0] for value in found[1:]), strict=True))
    alone |= {(b, of[o]): 0.0 for b, (of, o) in enumerate(zip(choices, base, strict=True))}
    return [[_sum(option, wholes[b], {known: value for (of, known), value in alone.items() if of == b}, parts[b])
             for option in of] for b, of in enumerate(choices)]


def _whole(base: Option) -> Option:
    """What options are compared with: the base, or a whole block where that is gone."""
    return Option(0, 0) if base.drop else base


def _singles(own: dict[str, Part], whole: Option, far: bool) -> list[Option]:
    """The options that are measured: they differ from `whole` in one part, or the block is gone."""
    found = [whole] + [Option(own["attention"].count, own["mlp"].count, True)] * far
    for place, part in enumerate(own.values()):
        at, levels = part.levels.index(whole[place]), part.levels
        near = [*levels[max(0, at - 1):at], *levels[at + 1:at + 2]]
        longest = [*part.thinned[-1:], *(taken for taken in levels if part.gone(taken))] if far else []
        found += [Option(*whole[:place], taken, *whole[place + 1:2]) for taken in dict.fromkeys([*near, *longest])]
    return found


def _sum(option: Option, whole: Option, alone: dict[Option, float], own: dict[str, Part]) -> float:
    if option.drop:
        return alone.get(option, math.inf)
    of_parts = [_between(place, option[place], whole, alone, part) for place, part in enumerate(own.values())]
    return sum(of_parts) - alone.get(whole, math.inf) if math.isfinite(sum(of_parts)) else math.inf


def _between(place: int, taken: int, whole: Option, alone: dict[Option, float], part: Part) -> float:
    """The damage of a level of one part, all else as in `whole`."""
    known = {option[place]: value for option, value in alone.items()
             if not option.drop and option[1 - place] == whole[1 - place]}
    low, high = max((n for n in known if n <= taken), default=None), min((n for n in known if n >= taken), default=None)
    if low is None or high is None or part.gone(high) and taken < high:
        return math.inf
    return known[low] if low == high else known[low] + (known[high] - known[low]) * (taken - low) / (high - low)


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
        name = f"measured, {length} blocks gone" if length else "measured"
        found[name] = mended(space, summed(space, damage, fixed), draw, fixed)
    return {name: plan for name, plan in found.items() if space.attending(plan)}
