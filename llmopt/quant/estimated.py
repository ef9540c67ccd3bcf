"""Bits by estimated damage: how much a unit matters times what it loses at each choice.

    D[u, c] = w_u sum over its weights of tr((W - Q) H (W - Q)^T) / tr(W H W^T)         H = sum_t x_t x_t^T

Q by the step's own solver from the dense model's inputs; where no moments are collected (quant.rtn with head scores),
H = 1: the share of the weights that is lost. No run of the rounded model beyond one block.

    hessian  w_u = gain(u): what of its block's output is lost, as shares (gains.py)
    heads    w_u = the mean head score of the layer over the mean of all layers, of attention; FFNs, of which head
             scores say nothing, count 1; where there are calibration data, times gain(u) / gain(the half's writer)
    lrp      w_u = sum over tokens and channels of |R| at what the unit's half of the block writes (relevance.py),
             the shares of all halves of blocks adding up to 1, times gain(u) / gain(the half's writer)

lrp is of the kind of LRP-QViT (Ranjan & Savakis, arXiv:2401.11243), whose code is not public; ours are the rules, and
the error instead of its rank by width.
"""
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from llmopt.calibration.head_scores import find
from llmopt.calibration.inputs import Inputs
from llmopt.calibration.relevance import relevance
from llmopt.calibration.trials import sample
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, blocks
from llmopt.model.levels import refuse_below
from llmopt.quant.gains import gains
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.making import Making
from llmopt.quant.options import Table, Unit
from llmopt.quant.plan import DENSE, Choice
from llmopt.quant.settings import FEW

BITS = 4            # at which an error is made to see what becomes of it


def table(making: Making, units: Sequence[Unit]) -> Table:
    """D of every unit and choice."""
    weight, step = _importance(making), making.step
    wanted = {t.name: [t.at(*choice) for choice in unit.choices if choice.bits != DENSE]
              for unit in units for t in unit.members}
    lost = {unit.name: dict.fromkeys(unit.choices, 0.0) for unit in units}
    inputs = making.collected
    if step.solver.inputs == "none" and step.allocate != "heads":
        inputs = Inputs("moments")
    for target, share in making.losses(wanted, inputs):
        lost[target.group][Choice(target.bits, target.group_size)] += weight[target.group] * share
    return making.run.ranks.agree(lost)


def _importance(making: Making) -> dict[str, float]:
    """w by the name of a unit: the first of the weights that read one input."""
    step, model, run = making.step, making.model, making.run
    if step.allocate in ("heads", "lrp"):
        refuse_below(model, "structure", f"allocate: {step.allocate}")
    if step.allocate == "hessian":
        return _gains(making)
    views = blocks(model)
    halves = [_by_heads(views, step.heads, run, model), {}] if step.allocate == "heads" else _by_relevance(model, run)
    gained, found = _gains(making) if run.batches else {}, {}
    for block in views:
        for group in block.groups():
            half, name = not _attends(block, group), group[0].name
            writer = (block.ffn_out if half else block.attn_out).name
            passed = gained[name] / max(gained[writer], 1e-30) if gained else 1.0
            found[name] = halves[half].get(block.name, 1.0) * passed
    return found


def _gains(making: Making) -> dict[str, float]:
    """What of each share that a unit loses its block loses, on a part of the calibration data."""
    step, targets = making.step, {target.name: target for target in making.step.chosen(making.model)}

    def rounded(p: Projection) -> Tensor:
        if p.name not in targets:                                               # stays dense, but for this trial
            return round_to_nearest(p.weight.float(), Spec(BITS)).dequantize(p.weight.dtype)
        spec = step.spec(targets[p.name].at(BITS), p.weight.dtype)
        return round_to_nearest(p.weight.float(), spec).dequantize(p.weight.dtype)

    rows = sample(making.run.batches, step.seed, step.trial_tokens or FEW)
    return gains(making.model, replace(making.run, batches=rows), rounded)


def _attends(block: Block, group: list[Projection]) -> bool:
    """True for the weights of a block's attention."""
    return group[0].name in [p.name for p in (*block.attn_in, block.attn_out) if p is not None]


def _by_heads(views: Sequence[Block], name: str, run: Run, model: nn.Module) -> dict[str, float]:
    """By the name of the block."""
    means = layer_means(name, find(name, run, model), model)
    return {block.name: mean for block, mean in zip(views, means, strict=True)}


def layer_means(name: str, scores: list[Tensor], model: nn.Module) -> list[float]:
    """The mean head score of each layer over the mean of those that attend; raises LlmoptError for no such shares."""
    means = [float(row.mean()) if len(row) else 0.0 for row in scores]
    present = [mean for mean, block in zip(means, blocks(model), strict=True) if block.attention is not None]
    if not present or min(present) < 0 or sum(present) <= 0:
        raise LlmoptError(f"heads: {name} holds scores below 0, or none above it, which do not say how much more one "
                          "layer matters than another: a score that does is wanted (heads.gradient)")
    return [mean * len(present) / sum(present) for mean in means]


def _by_relevance(model: nn.Module, run: Run) -> list[dict[str, float]]:
    """By the names of the blocks: of attentions, of FFNs."""
    views = blocks(model)
    writers = [{block.name: writer for block in views if (writer := of(block)) is not None}
               for of in (lambda block: block.attn_out, lambda block: block.ffn_out)]
    places = {(half, name): writer.module for half, found in enumerate(writers) for name, writer in found.items()}
    sums = dict.fromkeys(places, 0.0)
    rows = [batch["input_ids"][i, :int(batch["attention_mask"][i].sum())] for batch in run.own_batches
            for i in range(len(batch["input_ids"]))]
    for ids in run.progress(rows, "relevance"):
        for place, values in relevance(model, ids, places).items():
            sums[place] += float(values.abs().double().sum())
    total = run.ranks.totals(sums)
    return [{name: total[half, name] / max(sum(total.values()), 1e-30) for name in found}
            for half, found in enumerate(writers)]
