"""How many bits each weight of a step gets, by its `allocate`: from names and shapes alone, then from data."""
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from llmopt.calibration.trial import Change, Trial, sample
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.quant import scores
from llmopt.quant.allocate import around, at_most, exact, two_level
from llmopt.quant.making import Making
from llmopt.quant.plan import Share, Target, undecided
from llmopt.quant.settings import Settings


def planned(step: Settings, model: nn.Module) -> list[Target]:
    """The targets with bits as far as names and shapes tell, fractions where only data will.

    lim and zd: two widths, as many blocks of each as there will be, if not the same ones.
    """
    found = step.chosen(model)
    if step.allocate == "uniform" or all(t.fixed for t in found):
        return found
    share = undecided(found, step.bits, attrgetter("block"))
    if step.allocate == "sensitivity":
        return [t.at(share.target) for t in found]
    bits = _two_level(step, share, [0.0] * len(share.units))
    return [t.at(bits[t.block]) if not t.fixed else t for t in found]


def decided(step: Settings, model: nn.Module, run: Run) -> tuple[list[Target], dict]:
    """The targets with their bits, and what the allocation was based on."""
    found = step.chosen(model)
    if step.allocate == "uniform":
        return found, {}
    unit = attrgetter("group" if step.allocate == "sensitivity" else "block")
    share = undecided(found, step.bits, unit)
    if not share.units:
        return found, {}
    made = run.memory.remember("allocation", lambda: _allocation(Making(step, model, run), found, share))
    return [t if t.fixed else t.at(made["bits"][unit(t)]) for t in found], {"allocation": made}


def _two_level(step: Settings, share: Share, importance: list[float]) -> dict[str, int]:
    bits = two_level(importance, share.params, *around(step.widths, share.target), share.target)
    return dict(zip(share.units, bits, strict=True))


def _allocation(making: Making, found: list[Target], share: Share) -> dict[str, Any]:
    step, model, run = making.step, making.model, making.run
    if step.allocate == "sensitivity":
        ranked, chosen = measured(making, found, share)
    else:
        score = scores.lim(model, run) if step.allocate == "lim" else scores.zd(model, run)
        names = [block.name for block in blocks(model)]
        ranked = {name: value for name, value in zip(names, score, strict=True) if name in share.units}
        chosen = _two_level(step, share, [s if step.allocate == "lim" else -s for s in ranked.values()])
    return {"by": step.allocate, "scores": _texts(ranked), "bits": chosen}


@torch.no_grad()
def measured(making: Making, found: list[Target], share: Share) -> tuple[dict, dict]:
    """({unit: {bits: KL}}, {unit: bits}) with weights that this very method made from the dense model's inputs.

    The least damage by the table, unless the widest uniform choice that fits does less in fact.
    """
    step, model, run = making.step, making.model, making.run
    free = {t.name: t for t in found if not t.fixed}
    choices: dict[str, dict[int, list[Change]]] = {unit: {w: [] for w in step.widths} for unit in share.units}
    for p, width, codes in making.at_all_widths(free, step.widths):
        choices[free[p.name].group][width].append((p, partial(codes.dequantize, p.weight.dtype)))
    background, level = around(step.widths, share.target)[0], at_most(step.widths, share.target)
    trial = Trial(model, sample(run.batches, step.seed, model.get_output_embeddings().weight.shape[0]), choices)
    try:
        table = scores.sensitivity(trial, step.widths, background, run)
        least = exact(list(table.values()), share.params, share.target)
        plans = [dict(zip(choices, least, strict=True)), dict.fromkeys(choices, level)]
        return table, run.ranks.agree(min(plans, key=trial.of))
    finally:
        trial.restore()


def _texts(table: dict) -> dict:
    """A table as JSON holds it: keys are text."""
    return {str(k): _texts(v) if isinstance(v, dict) else v for k, v in table.items()}
