"""What a part of a model does, measured on rows of the calibration data in a model that has lost others already.

    damage   KL(dense || without the part) of the next-token probabilities, in nats
    mi       1 - mean_t cos(last hidden state, the same without the part)
    bi       1 - mean_t cos(stream before the part, behind it)
    angular  arccos cos(stream before a run of blocks, behind it) / pi, mean over the last tokens of the rows

The first two leave out each part in turn, in one walk over the blocks (calibration/trials.py).
"""
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llmopt.calibration.trials import Trials, sample, turned, without
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Block
from llmopt.prune.leaving import Part

Score = Literal["damage", "mi", "bi", "angular"]
LEFT = "left"               # the trial that goes without what has left already


def left_out(model: nn.Module, run: Run, gone: list[Part], parts: list[Part], score: Literal["damage", "mi"],
             tokens: int) -> dict[Part, float]:
    """By how much each of the parts would add to the damage, or to MI, were it to leave too."""
    trials = Trials(model, run, sample(run.batches, run.seed, tokens), (LEFT,))
    for _, own in trials.visits([], f"{score} without each part"):
        block = own.block
        trials.through(own, partial(_weights, block, gone), {p: LEFT for p in parts if p[0] == block.index})
    found = trials.damage() if score == "damage" else trials.turned()
    return {part: found[part] - found[LEFT] for part in parts}


@torch.no_grad()
def bi(model: nn.Module, run: Run, gone: list[Part], parts: list[Part]) -> dict[Part, float]:
    """The block influence of each part, over all of the data."""
    trials, sums = _all_rows(model, run), dict.fromkeys(parts, 0.0)
    for _, own in trials.visits([], "block influence"):
        block, kinds = own.block, {kind for index, kind in parts if index == own.block.index}
        for row, before, behind in _through(trials, own, gone):
            lost = {kind for index, kind in gone if index == block.index}
            middle = before if kinds <= {"blocks"} else row.forward(0, _inside(block, lost | {"mlp"}))
            ends = {"blocks": (before, behind), "attention": (before, middle), "mlp": (middle, behind)}
            for kind in kinds:
                sums[block.index, kind] += turned(*ends[kind])
    tokens = sum(run.ranks.gather(sum(row["input_ids"].numel() for row in trials.rows)))
    return {part: sum(run.ranks.gather(total)) / tokens for part, total in sums.items()}


@torch.no_grad()
def angular(model: nn.Module, run: Run, starts: list[int], length: int) -> dict[int, float]:
    """The angular distance across `length` blocks from each of these on, by the first of them."""
    trials, ends = _all_rows(model, run), []
    for _, own in trials.visits([], "angular distance"):
        found = [(before[0, -1], behind[0, -1]) for _, before, behind in _through(trials, own, [])]
        ends.append([torch.stack(side).double() if side else torch.zeros(0, 1) for side in
                     ([one for one, _ in found], [other for _, other in found])])
    rows, told = sum(run.ranks.gather(len(trials.rows))), {}
    for start in starts:
        cosines = cosine_similarity(ends[start][0], ends[start + length - 1][1], dim=-1).clamp(-1, 1)
        told[start] = sum(run.ranks.gather(float(cosines.arccos().sum()) / torch.pi)) / rows
    return told


def _all_rows(model: nn.Module, run: Run) -> Trials:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in run.batches)
    return Trials(model, run, sample(run.batches, run.seed, tokens), (LEFT,))


def _through(trials: Trials, own: Visit, gone: list[Part]) -> list[tuple[Visit, Tensor, Tensor]]:
    """For each row: (a visit of it, the stream before the block, behind it), in the model without what is gone."""
    before = trials.hidden[LEFT] or own.inputs
    trials.through(own, partial(_weights, own.block, gone))
    return [(Visit(own.model, own.block, [x], [call], [mask]), x, y) for x, y, call, mask in
            zip(before, trials.hidden[LEFT], own.calls, own.masks, strict=True)]


def _weights(block: Block, gone: list[Part], trial: Part | str) -> dict[str, Tensor] | None:
    """What a trial has in the place of the block's weights; None: it goes without the block."""
    lost = {kind for index, kind in [*gone, *([] if trial == LEFT else [trial])] if index == block.index}
    return None if "blocks" in lost else without(block, lost)


def _inside(block: Block, lost: set[str]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{block.name}."): zeros for name, zeros in without(block, lost).items()}
