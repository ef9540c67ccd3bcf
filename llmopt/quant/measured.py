"""Bits by measured damage: what the choices of each unit cost, then what whole plans cost.

    D[u, c] = KL(dense || unit u made with choice c, all others as at the level)        in nats, for every u and c

Weights are made by the step's own solver from the dense model's inputs, block by block; the level is the choice next
above the average. Damage grows faster than its parts add up, so that a unit measured in a dense model looks more robust
than it is among others that are rounded too. What the sums of the table still get wrong is put right by measuring: the
programme's best plans, each of which differs from the others in an eighth of the units, and the best choice that is the
same for all units; the one that does least damage is taken.

Too few tokens choose a plan that is good on these alone: the more the better, and small models can have them all.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmopt.calibration.trials import Trials, sample
from llmopt.calibration.walk import Visit
from llmopt.model.blocks import blocks
from llmopt.model.codes import Quantized
from llmopt.quant.allocate import around
from llmopt.quant.making import Making
from llmopt.quant.options import Budget, Plan, Table, Unit, average, chosen, programme
from llmopt.quant.plan import DENSE, Choice
from llmopt.quant.settings import FEW

APART = 8           # plans that are measured differ in a unit of every so many
LEVEL = "level"
WORK = 2e13         # multiplications with weights that all trials may take, where `trial_tokens` leaves that open
Made = dict[tuple[str, Choice], Quantized]
Rows = list[dict[str, Tensor]]


@torch.no_grad()
def allocation(making: Making, bound: Budget, units: list[Unit]) -> tuple[Table, list[dict[str, float]], list[int]]:
    """(D, {foretold, measured} of each whole plan, the option that each unit takes)."""
    step, run = making.step, making.run
    rows = sample(run.batches, step.seed, step.trial_tokens or _affordable(making, units))
    level = _level(making, bound, units)
    table = run.ranks.agree(_table(making, units, level, rows))
    problem = programme(bound, units, table)
    plans = list(problem.plans(step.plans, max(1, len(units) // APART)))
    alike = [picks for picks in _alike(units) if problem.price(picks) <= bound.room and picks not in plans]
    plans += [min(alike, key=problem.harm)] if alike else []
    plans = [picks for picks in plans if bound.over(chosen(units, picks)) <= 0]
    damage = run.ranks.agree(_whole(making, [chosen(units, picks) for picks in plans], rows))
    base = table[units[0].name][level[units[0].name]]                   # which each unit's damage holds, too
    told = [{"foretold": problem.harm(picks) - (len(units) - 1) * base, "measured": found}
            for picks, found in zip(plans, damage, strict=True)]
    return table, told, plans[damage.index(min(damage))]


def _affordable(making: Making, units: Sequence[Unit]) -> int:
    """The tokens that WORK allows, each of which half of the blocks read in every trial; at least FEW."""
    times = (making.run.layers or len(blocks(making.model))) / len(blocks(making.model))        # of a rehearsal's units
    trials = sum(len(unit.choices) for unit in units) * times
    weights = sum(target.size for unit in units for target in unit.members) * times
    return max(FEW, int(WORK / max(1, trials * weights / 2)))


def _level(making: Making, bound: Budget, units: Sequence[Unit]) -> dict[str, Choice]:
    """For each unit the choice next above the average, in its usual groups where it can have them."""
    bits = around(making.step.widths, max(average(making.step, bound, units), min(making.step.widths)))[0]
    found = {}
    for unit in units:
        able = [choice for choice in unit.choices if choice.bits == bits]
        usual = [choice for choice in able if choice.group_size == unit.members[0].group_size]
        found[unit.name] = (usual or able)[0]
    return found


def _alike(units: Sequence[Unit]) -> list[list[int]]:
    """The plans that give all units one choice, each the nearest of its group sizes."""
    found = []
    for bits, size in dict.fromkeys(choice for unit in units for choice in unit.choices):
        able = [[c for c in unit.choices if c.bits == bits] for unit in units]
        if all(able):
            found.append([unit.choices.index(min(of, key=lambda c, size=size: (c.group_size != size, of.index(c))))
                          for unit, of in zip(units, able, strict=True)])
    return found


def _table(making: Making, units: Sequence[Unit], level: dict[str, Choice], rows: Rows) -> Table:
    trials = Trials(making.model, making.run, rows, (LEVEL,))
    wanted = {t.name: [t.at(*choice) for choice in unit.choices if choice.bits != DENSE]
              for unit in units for t in unit.members}
    unit_of, waiting = {t.name: unit.name for unit in units for t in unit.members}, list(units)
    for data, own in trials.visits(making.data, "sensitivity"):
        here = _names(own)
        made, weights = _made(making, data, wanted), _weights(making, here)
        inside = [unit for unit in waiting if not here.isdisjoint(t.name for t in unit.members)]
        waiting = [unit for unit in waiting if unit not in inside]                  # experts may lie in all blocks
        branches = {(unit.name, choice): LEVEL for unit in inside for choice in unit.choices
                    if choice != level[unit.name]}

        def of(trial, here=here, made=made, weights=weights):
            name, choice = trial if trial != LEVEL else (None, None)
            return weights(made, {weight: choice if unit_of[weight] == name else level[unit_of[weight]]
                                  for weight in here if weight in unit_of})

        trials.through(own, of, branches)
    found = trials.damage()
    return {unit.name: {c: found.get((unit.name, c), found[LEVEL]) for c in unit.choices} for unit in units}


def _whole(making: Making, plans: Sequence[Plan], rows: Rows) -> list[float]:
    """The damage of whole plans."""
    trials = Trials(making.model, making.run, rows, tuple(range(len(plans))))
    open_ = {target.name: target for target in making.step.chosen(making.model) if not target.fixed}
    wanted = {name: [target.at(*choice) for choice in dict.fromkeys(plan[name] for plan in plans)
                     if choice.bits != DENSE] for name, target in open_.items()}
    for data, own in trials.visits(making.data, "whole plans"):
        made, weights = _made(making, data, wanted), _weights(making, _names(own))
        trials.through(own, lambda index, made=made, weights=weights: weights(made, plans[index]))
    found = trials.damage()
    return [found[index] for index in range(len(plans))]


def _names(visit: Visit) -> set[str]:
    """The weights of the block that is visited."""
    return {p.name for group in visit.block.weights() for p in group}


def _made(making: Making, data, wanted) -> Made:
    """The codes of a block's weights, by the name and the choice."""
    return {(target.name, Choice(target.bits, target.group_size)): codes
            for target, codes in making.trials(data, wanted)}


def _weights(making: Making, names: set[str]) -> Callable[[Made, Plan], dict[str, Tensor]]:
    """A function that gives the weights of a block by a plan; those that stay dense are not among them."""
    def of(made: Made, plan: Plan) -> dict[str, Tensor]:
        return {name: made[name, plan[name]].dequantize(making.model.dtype) for name in names
                if name in plan and plan[name].bits != DENSE}

    return of
