"""Experts leave: of a Mixture-of-Experts model those that its layers miss least, with their rows of the router.

    reap       mean over the tokens routed to expert e of  g_e(x) |f_e(x)|
    frequency  how many tokens are routed to it
    magnitude  the norm of its weights
    random     drawn, for comparison

f_e(x): the expert's answer; g_e: the router's weight, those of the chosen experts adding up to 1. The router then
chooses as many of the experts that stay as before. Lasby et al., REAP the Experts, ICLR 2026 (arXiv:2510.13999):
merging experts makes the router lose its hold on them, leaving some out does not. An expert that no token reached is
the first to leave. Where the router chooses among groups of experts, all groups lose as many. Left out: other numbers
of experts in other layers, which no config can say.
"""
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.walk import Visit, each, reshaped, visits
from llmopt.errors import BudgetError, LlmoptError
from llmopt.method import Method, Record, Run
from llmopt.model.blocks import blocks
from llmopt.model.experts import Experts, experts_of, told_count
from llmopt.model.finite import all_finite
from llmopt.parts import register

EPSILON = 1e-30


@plain_dataclass(frozen=True)
class Room:
    """How many experts there are and stay, in groups of which each loses as many; keys: of the config that say so."""

    count: int
    stay: int
    groups: int
    keys: list[str]


@register("prune.experts")
@dataclass(frozen=True)
class ExpertPruner(Method):
    """One pass over the calibration data; none for magnitude and random."""

    stage: ClassVar = "prune"
    level: ClassVar = "weights"
    units: ClassVar[tuple[str, ...]] = ("experts",)

    ratio: float = Field(0.25, ge=0, lt=1, description="share of each layer's experts that leaves; never more")
    criterion: Literal["reap", "frequency", "magnitude", "random"] = Field(
        "reap", description="what tells who stays: weighted size of the answers, number of tokens, size of the weights")
    seed: int = Field(0, ge=0, description="criterion: random: of the draw")

    @property
    def needs_data(self) -> bool:
        return self.criterion in ("reap", "frequency")

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        """Which experts stay is not known yet: as many as will."""
        found = _all_experts(skeleton)
        room = self._room(skeleton, found)
        _cut(skeleton, Run(), {index: torch.arange(room.stay) for index in found}, room)
        return f"removes {room.count - room.stay} of {room.count} experts of {len(found)} layers, by {self.criterion}"

    def apply(self, model: nn.Module, run: Run) -> Record:
        found, before = _all_experts(model), model.num_parameters()
        room = self._room(model, found)
        if self.needs_data and not run.batches:
            raise LlmoptError("this step needs calibration data and there is none; criterion: magnitude does without")
        told = run.memory.remember("experts", lambda: run.ranks.agree(self._rated(model, run)))
        kept = {int(index): _best(torch.tensor(one["scores"]), room) for index, one in told.items()}
        _cut(model, run, kept, room)
        unseen = sum(not tokens for one in told.values() for tokens in one.get("tokens", ()))
        return Record(meta={
            "ratio": self.ratio, "criterion": self.criterion, "removed_share": 1 - room.stay / room.count,
            "removed_units": {"experts": (room.count - room.stay) * len(found)}, "unseen": unseen,
            "experts": {index: {"kept": kept[int(index)].tolist(), **one} for index, one in told.items()},
            "parameters": [before, model.num_parameters()]})

    def _room(self, model: nn.Module, found: dict[int, Experts]) -> Room:
        """Raises LlmoptError for a model without experts, BudgetError where the router needs more than would stay."""
        counts = {experts.count for experts in found.values()}
        if len(counts) != 1:
            why = f"its layers have {sorted(counts)} of them" if counts else "it has none"
            raise LlmoptError(f"{model.config.model_type}: experts cannot be pruned: {why}")
        count, config = counts.pop(), model.config.get_text_config()
        groups, chosen = getattr(config, "n_group", None) or 1, getattr(config, "num_experts_per_tok", None) or 1
        chosen_groups = getattr(config, "topk_group", None) or 1
        each = count // groups
        stay = groups * (each - int(self.ratio * count / groups + 1e-9))
        least = groups * max(-(-chosen // min(chosen_groups, groups)), 2 if groups > 1 else 1)
        if stay < least:
            raise BudgetError(f"ratio {self.ratio:g} leaves {stay} of {count} experts, and the router chooses {chosen} "
                              f"for each token: at least {least} have to stay, ratio {1 - least / count:.3g} at most")
        if stay == count and self.ratio:
            raise BudgetError(f"ratio {self.ratio:g} is less than one of {each} experts{' of a group' * (groups > 1)} "
                              f"({1 / each:.3g}; nothing would be removed); raise it")
        return Room(count, stay, groups, told_count(config, count))

    @torch.no_grad()
    def _rated(self, model: nn.Module, run: Run) -> dict[str, dict[str, Any]]:
        """By the index of a layer with experts: their scores, and by data how many tokens each was given."""
        told: dict[str, dict[str, Any]] = {}
        if self.needs_data:
            for visit in visits(model, run, self.name, edits=False, shared=True):
                if (experts := experts_of(visit.block.module, visit.block.name)) is not None:
                    tokens, sizes = (run.ranks.sum_(part) for part in _seen(visit, experts, self.criterion == "reap"))
                    if not all_finite(sizes):
                        raise LlmoptError(f"{experts.name}: experts cannot be compared, as what they answer to the "
                                          "calibration data is not finite")
                    scores = sizes / tokens.clamp(min=1) if self.criterion == "reap" else tokens
                    told[str(visit.block.index)] = {"scores": scores.tolist(), "tokens": tokens.long().tolist()}
            return told
        draw = torch.Generator().manual_seed(self.seed)
        for block in each(model, run, self.name, edits=False):
            if (experts := experts_of(block.module, block.name)) is not None:
                sizes = [sum(float(tensor.double().square().sum()) for tensor in experts.of(expert))
                         for expert in range(experts.count)]
                drawn = torch.rand(experts.count, generator=draw).tolist()
                told[str(block.index)] = {"scores": sizes if self.criterion == "magnitude" else drawn}
        return told


def _seen(visit: Visit, experts: Experts, answers: bool) -> tuple[Tensor, Tensor]:
    """By expert [E] float64: the tokens routed to it, and the sum of its weighted answers' sizes if `answers`."""
    tokens, sizes, given = torch.zeros(experts.count).double(), torch.zeros(experts.count).double(), []
    handle = experts.module.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(experts.routed(args, kwargs)), with_kwargs=True)
    try:
        for index in range(len(visit.inputs)):
            visit.forward(index)
    finally:
        handle.remove()
    for mask, (x, index, weights) in zip(visit.masks, given, strict=True):
        real = mask.reshape(-1).to(x.device)
        x, index, weights = x[real], index[real], weights[real].double()
        shares = weights / weights.sum(1, keepdim=True).clamp(min=EPSILON)
        for expert in index.unique().tolist():
            rows, place = (index == expert).nonzero(as_tuple=True)
            tokens[expert] += len(rows)
            if answers:
                norms = experts.output(expert, x[rows]).double().norm(dim=1)
                sizes[expert] += float((shares[rows, place] * norms).sum())
    return tokens, sizes


def _best(scores: Tensor, room: Room) -> Tensor:
    """The experts that stay, ascending; as many of each group."""
    grouped = scores.double().view(room.groups, -1)
    order = grouped.argsort(dim=1, descending=True, stable=True)[:, :room.stay // room.groups]
    return (order + torch.arange(room.groups)[:, None] * grouped.shape[1]).flatten().sort().values


def _all_experts(model: nn.Module) -> dict[int, Experts]:
    """By the index of the layer."""
    found = {block.index: experts_of(block.module, block.name) for block in blocks(model)}
    return {index: experts for index, experts in found.items() if experts is not None}


def _cut(model: nn.Module, run: Run, kept: dict[int, Tensor], room: Room) -> None:
    for block in reshaped(model, run, "cutting", list(kept)):
        experts_of(block.module, block.name).keep(kept[block.index])
    for key in room.keys:
        setattr(model.config.get_text_config(), key, room.stay)
