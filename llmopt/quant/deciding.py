"""What each weight of a step becomes, by its `allocate`: from names and shapes alone, then from data."""
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.quant import estimated, measured, scores
from llmopt.quant.allocate import around, two_level
from llmopt.quant.making import Making
from llmopt.quant.options import Budget, Plan, Unit, average, budget, chosen, programme, units_of, with_plan
from llmopt.quant.plan import Choice, Target
from llmopt.quant.settings import BY_RANK, Settings

LOG = logging.getLogger(__name__)
HAIR = 1e-9         # of a bit, by which units of experts differ in a forecast: who holds one setting alone refuses them


def planned(step: Settings, model: nn.Module) -> list[Target]:
    """The targets with bits as far as names and shapes tell, fractions where only data will.

    lim and zd: two widths, as many blocks of each as there will be, if not the same ones.
    """
    found = step.chosen(model)
    units = [] if step.allocate == "uniform" else units_of(step, found)
    if not units:
        return found
    bound = budget(step, model, found, units)
    bound.check(units)
    if step.allocate in BY_RANK:
        return with_plan(found, _by_rank(step, bound, units, [0.0] * len({t.block for u in units for t in u.members})))
    level = _fitting(bound, units, min(average(step, bound, units), max(step.widths)))
    experts = [unit for unit in units if unit.members[0].expert is not None]
    apart = {t.name: HAIR * place for place, unit in enumerate(experts) for t in unit.members}
    return [t.at(level - apart.get(t.name, 0)) for t in found]


def _fitting(bound: Budget, units: Sequence[Unit], level: float) -> float:
    """The level, or what of it the budget has room for where rows of codes end at whole words."""
    members = [target for unit in units for target in unit.members]
    while (over := sum(bound.price(target.at(level)) for target in members) - bound.room) > 0:
        level -= max(over, 1) / sum(target.size for target in members)
    return level


def decided(step: Settings, model: nn.Module, run: Run) -> tuple[list[Target], dict]:
    """The targets with their bits, and what the allocation was based on."""
    found = step.chosen(model)
    units = [] if step.allocate == "uniform" else units_of(step, found)
    if not units:
        return found, {}
    bound = budget(step, model, found, units)
    bound.check(units, spent=run.layers is None)                # of a whole model's bytes a rehearsal has one block's
    made = dict(run.memory.remember("allocation", lambda: _allocation(Making(step, model, run), bound, units)))
    found = with_plan(found, {name: Choice(*choice) for name, choice in made.pop("plan").items()})
    _tell(found)
    return found, {"allocation": made}


def _allocation(making: Making, bound: Budget, units: list[Unit]) -> dict[str, Any]:
    """{by, scores, plan, of those that were measured whole: plans}, ready for JSON."""
    step, model, run = making.step, making.model, making.run
    if step.allocate in BY_RANK:
        score = scores.lim(model, run) if step.allocate == "lim" else scores.zd(model, run)
        ranked = dict(zip((block.name for block in blocks(model)), score, strict=True))
        open_blocks = dict.fromkeys(t.block for unit in units for t in unit.members)
        plan = _by_rank(step, bound, units, [ranked[b] if step.allocate == "lim" else -ranked[b] for b in open_blocks])
        return {"by": step.allocate, "scores": {name: ranked[name] for name in open_blocks}, "plan": plan}
    if step.allocate == "sensitivity":
        table, plans, picks = measured.allocation(making, bound, units)
        more = {"plans": plans}
    else:
        table, more = estimated.table(making, units), {}
        picks = programme(bound, units, table).best()
    return {"by": step.allocate, "scores": {name: {str(c): v for c, v in row.items()} for name, row in table.items()},
            "plan": chosen(units, picks), **more}


def _by_rank(step: Settings, bound: Budget, units: Sequence[Unit], importance: list[float]) -> Plan:
    """The least important blocks at the lower of two widths; importance: of each block with open weights, in order."""
    members = [target for unit in units for target in unit.members]
    names = list(dict.fromkeys(target.block for target in members))
    params = [sum(target.size for target in members if target.block == name) for name in names]
    level = average(step, bound, units)
    while True:
        bits = dict(zip(names, two_level(importance, params, *around(step.widths, level), level), strict=True))
        plan = {target.name: Choice(bits[target.block], target.group_size) for target in members}
        over = sum(bound.price(target.at(*plan[target.name])) for target in members) - bound.room
        if max(over, bound.over(plan)) <= 0:
            return plan
        level -= max(over, 1) / sum(params)             # rows of codes end at whole words, which no average knows of


def _tell(found: Sequence[Target]) -> None:
    """Print the plan: a line for each block, `projection bits/columns that share a scale`."""
    for name in dict.fromkeys(target.block for target in found):
        alike: dict[tuple[str, Choice], list[str]] = {}
        own = [t for t in found if t.block == name]
        for target in own:
            what = Choice(target.bits, target.group_size)
            alike.setdefault((target.group, what), []).append(_leaf(target, own))
        LOG.info("plan: %s: %s", name, ", ".join(f"{' '.join(dict.fromkeys(names))} {what}" for (_, what), names in
                                                 alike.items()))


def _leaf(target: Target, own: Sequence[Target]) -> str:
    """How a line of the plan calls a weight of its block: of experts the stack alone, where all of it is alike."""
    if target.expert is None:
        return target.name.rpartition(".")[2]
    stack = target.key.rpartition(".")[2]
    alike = {(t.bits, t.group_size) for t in own if t.key == target.key}
    return f"experts.{stack}" + (f".{target.expert}" if len(alike) > 1 else "")
