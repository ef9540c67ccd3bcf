"""Widths by measured damage: what each layer's cut costs alone, the best sum, then what whole plans cost.

    D[u, c] = KL(dense || layer part u without its c weakest units, all else dense)    in nats, for u and shares c

The criterion says which units are the weakest, and the refit is in place (stand_ins.py). Between two shares D is taken
to be straight; an integer programme then finds the plan with the least sum that meets the budget, exactly.
Damages do not add up: of three parts of SmolLM2-135M that cost least one by one, the going of all three cost as much as
a tenth of the model. So the best few plans, each of which differs from the others in an eighth of the parts, the same
share everywhere and LAMP's ranking are measured whole, and the one with the least damage is taken.

The exact choice over such a table is that of ZipLM and SPDY (Kurtic et al., 2023, arXiv:2302.04089; Frantar and
Alistarh, 2022, arXiv:2201.13096), which go by layerwise error or by search. A whole plan is refitted as the cut will
be, block after block, which costs three passes over the calibration data for each plan and holds what each one reads.
"""
import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.programme import Programme
from llmopt.calibration.trials import Trials, in_block, sample
from llmopt.calibration.walk import Visit
from llmopt.errors import BudgetError, FieldError
from llmopt.parts import Several, register
from llmopt.prune.allocate import Units, globally, locally, normalise
from llmopt.prune.scopes import Demand, Removed, Scope
from llmopt.prune.stand_ins import Ridges, StandIns, in_turn

APART = 8           # plans that are measured differ in a part of every so many
MORE = 4            # times as many tokens where few plans are compared, which differ little
BETWEEN = 8         # choices from one share that is measured to the next
DENSE = "dense"
Table = list[dict[int, float]]          # by the number of units that leave, for each layer part: the damage


@register("measured")
@dataclass(frozen=True)
class Measured(Scope):
    """The widths that cost least by measured KL; hours on a large model without a GPU."""

    learns: ClassVar[bool] = True

    shares: Several[float] | None = Field(
        None, description="shares of a layer's units whose going is measured; null: tenths up to .5, or ratio + .2")
    plans: int = Field(4, ge=1, description="plans that are measured whole, beside two usual ones")
    trial_tokens: int = Field(2048, ge=1, description="tokens of calibration data on which the KL of a cut is "
                                                   "measured; four times as many for a whole plan")

    def check(self) -> None:
        if self.shares is not None and not (self.shares and all(0 < share <= 1 for share in self.shares)
                                            and list(self.shares) == sorted(set(self.shares))):
            raise FieldError("shares", list(self.shares), "rising numbers above 0, at most 1")

    @torch.no_grad()
    def removed(self, demand: Demand) -> Removed:
        shares = self.shares or tenths(demand.ratio)
        told = demand.run.memory.remember("damage", lambda: self._damage(demand, shares))
        table = [{int(gone): damage for gone, damage in row} for row in told["damage"]]
        plans = best_plans(demand.units, demand.ratio, table, self.plans)
        usual = [locally(demand.units, demand.ratio), _by_lamp(demand)]
        plans = [list(plan) for plan in dict.fromkeys(map(tuple, [*plans, *usual])) if any(plan)]
        found = demand.run.memory.remember(
            "whole plans", lambda: {"measured": self._whole(demand, plans, told["ridges"])})["measured"]
        best = min(range(len(plans)), key=found.__getitem__)
        return plans[best], {"damage": told["damage"], "plans": [
            {"foretold": foretold(table, plan), "measured": damage} for plan, damage in zip(plans, found, strict=True)]}

    def _damage(self, demand: Demand, shares: Sequence[float]) -> dict[str, Any]:
        """{damage: for each entry, (units that leave, KL) of each share; ridges}."""
        counts = [grid(u, shares) for u in demand.units]
        trials, data = self._trials(demand, (DENSE,)), demand.run.own_batches
        ridges: Ridges = {}
        for visit, own in trials.visits(data, f"{demand.label}, damage"):
            stand_ins = self._stand_ins(visit, demand, ridges)
            branches = {(entry, gone): DENSE for entry, u in enumerate(demand.units)
                        if u.layer == own.block.index for gone in counts[entry]}

            def of(trial: Any, branches: Any = branches, stand_ins: StandIns = stand_ins) -> dict:
                return stand_ins.weights({demand.units[trial[0]].kind: trial[1]}) if trial in branches else {}

            trials.through(own, of, branches)
        found = demand.run.ranks.agree(trials.damage())
        return {"damage": [[[0, 0.0], *([gone, found[entry, gone]] for gone in some)]
                           for entry, some in enumerate(counts)], "ridges": demand.run.ranks.agree(ridges)}

    def _whole(self, demand: Demand, plans: list[list[int]], ridges: Ridges) -> list[float]:
        """The damage of whole plans; every refit is on what the blocks read behind the plan's own cuts."""
        run, trials = demand.run, self._trials(demand, tuple(range(len(plans))), MORE)
        read: list[list[Tensor]] = []          # of each plan, what the next block reads of the calibration data
        for visit, own in trials.visits(run.own_batches, f"{demand.label}, whole plans"):
            made, ahead = {}, []
            for index, plan in enumerate(plans):
                removed = {u.kind: n for u, n in zip(demand.units, plan, strict=True) if u.layer == own.block.index}
                here = dataclasses.replace(visit, inputs=read[index]) if read else visit
                if not demand.refit:
                    made[index] = StandIns(own.block, demand.units, run, None, {}).weights(removed)
                    continue
                made[index] = in_turn(here, demand.units, run, removed, dict(ridges))
                weights, hold = in_block(own.block, made[index]), trials.memory.keeper()
                ahead.append([hold(here.forward(batch, weights)) for batch in range(len(here.inputs))])
            read = ahead
            trials.through(own, made.__getitem__)
        found = run.ranks.agree(trials.damage())
        return [found[index] for index in range(len(plans))]

    @staticmethod
    def _stand_ins(visit: Visit, demand: Demand, ridges: Ridges) -> StandIns:
        return StandIns(visit.block, demand.units, demand.run, visit if demand.refit else None, ridges)

    def _trials(self, demand: Demand, start: tuple, times: int = 1) -> Trials:
        run = demand.run
        return Trials(demand.model, run, sample(run.batches, run.seed, times * self.trial_tokens), start)


def tenths(ratio: float) -> tuple[float, ...]:
    """Shares that are measured where `ratio` of all is to leave."""
    return tuple(n / 10 for n in range(1, max(5, min(9, round(10 * ratio + 2))) + 1))


def grid(u: Units, shares: Sequence[float]) -> list[int]:
    """The numbers of units that may leave nearest to these shares; the smallest one that can, at least."""
    able = [len(u.scores) - count for count in u.allowed[1:]]
    return sorted({min(able, key=lambda gone: abs(gone - share * len(u.scores))) for share in shares}) if able else []


def best_plans(units: list[Units], ratio: float, table: Table, count: int) -> list[list[int]]:
    """The plans with the least sums of damages, as near below `ratio` as the choices allow; `count` at most."""
    options = [choices(u, row) for u, row in zip(units, table, strict=True)]
    cost = [[u.price(len(u.scores) - gone) for gone in some] for u, some in zip(units, options, strict=True)]
    total = sum(u.total for u in units)
    least = math.ceil((1 - ratio) * total - 1e-6)
    step = max((high - low for row in cost for high, low in pairwise(row)), default=0)
    damage = [[lerp(row, gone) for gone in some] for row, some in zip(table, options, strict=True)]
    if sum(map(min, cost)) > least + step:
        reach = 1 - sum(map(min, cost)) / total
        raise BudgetError(f"ratio {ratio:g} cannot be met: with the shares that are measured 0 to {reach:.3f} of the "
                          "chosen units can leave")
    for slack in (step // 32, step // 4, step):                  # a plan that far below the budget there always is
        problem = Programme(damage, cost, least + slack, least)
        if sum(map(min, cost)) <= problem.room and (found := list(problem.plans(count, max(1, len(units) // APART)))):
            return [[some[pick] for some, pick in zip(options, picks, strict=True)] for picks in found]
    return []


def choices(u: Units, row: dict[int, float]) -> list[int]:
    """Numbers of units that may leave: those that were measured and, where allowed, seven between one and the next."""
    known, able = sorted(row), [len(u.scores) - count for count in u.allowed]
    found = set(known)
    for low, high in pairwise(known):
        found |= {min(able, key=lambda gone, at=low + (high - low) * part / BETWEEN: abs(gone - at))
                  for part in range(1, BETWEEN)}
    return sorted(found)


def lerp(row: dict[int, float], gone: int) -> float:
    """The damage of so many units, on the line between the two numbers around it that were measured."""
    low, high = max(n for n in row if n <= gone), min(n for n in row if n >= gone)
    return row[low] if low == high else row[low] + (row[high] - row[low]) * (gone - low) / (high - low)


def foretold(table: Table, plan: list[int]) -> float | None:
    """The sum of a plan's damages; None where it goes beyond what was measured."""
    inside = all(gone <= max(row) for row, gone in zip(table, plan, strict=True))
    return sum(lerp(row, gone) for row, gone in zip(table, plan, strict=True)) if inside else None


def _by_lamp(demand: Demand) -> list[int]:
    alike = [dataclasses.replace(u, scores=normalise(u.scores, "lamp")) for u in demand.units]
    return globally(alike, demand.ratio)
