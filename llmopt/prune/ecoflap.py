"""ECoFLaP's ratios: what loses most by a change of its weights keeps most, within a small window around the ratio.

    zeroth order     s(W) = sum over d of | L_d(W + e z) - L_d(W - e z) | / (2 e)       z ~ N(0, 1) for each entry and d
    first order      s(W) = sum over d of  sum_ij | dL_d / dW_ij |
    kept of g        floor_g + what is left of all * s_g / sum s,     floor_g = (1 - cap) N_g

d: a part of the calibration rows. E |<z, dL/dW>| = sqrt(2 / pi) ||dL/dW||: forwards alone tell the norm of a slope. One
weight (or block) is moved at a time, all else as it is; e = epsilon * the root mean square of what is moved. Several d
average out the scatter, 76 % for one. Who is full leaves the shares to the others. Totals are exact integers; widths
are then rounded to whole units, never to more than the ratio in all.

Sung et al., 2024 (arXiv:2310.02998). The fine half of the method is the step's own criterion. Left out: scores that
count |W| too, and the three-step reference. Forwards in bf16 are too coarse for the zeroth order: compute in float32.
"""
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.backward import weights_backward
from llmopt.calibration.trials import Trials, sample
from llmopt.errors import FieldError, LlmoptError
from llmopt.model.blocks import Block, Projection, blocks
from llmopt.model.computing import compute_type
from llmopt.parts import register
from llmopt.prune.allocate import Units, rounded
from llmopt.prune.groups import members
from llmopt.prune.scopes import Demand, Removed, Scope

Names = tuple[str, ...]     # of the weights that are moved at once
DENSE = "dense"
WINDOW = 0.1                # above the ratio, which every script of the authors takes


@register("ecoflap")
@dataclass(frozen=True)
class ECoFLaP(Scope):
    """Each block's or part's share by how much the loss answers to its weights."""

    learns: ClassVar[bool] = True

    order: Literal["zeroth", "first"] = Field("zeroth", description="zeroth: forwards alone; first: backward passes")
    by: Literal["block", "tensor"] = Field(
        "block", description="block: each has a share; tensor: each part, its weights' scores added")
    cap: float | None = Field(None, gt=0, le=1, description="share that each loses at most; null: ratio + .1")
    draws: int = Field(8, ge=1, description="parts of the rows, each with a change of its own (order: zeroth)")
    trial_tokens: int = Field(4096, ge=1, description="tokens of calibration data in all these parts")
    epsilon: float = Field(1e-3, gt=0, description="size of the change, in root mean squares of the weights")

    def fits(self, ratio: float) -> None:
        if self.cap is not None and self.cap < ratio:
            raise FieldError("scope.ecoflap.cap", self.cap, f"at least the ratio, {ratio:g}")

    def removed(self, demand: Demand) -> Removed:
        groups = Groups(demand, self.by == "block")
        told = demand.run.memory.remember("slopes", lambda: {"scores": self._scores(demand, groups)})
        shares = shares_of(groups, told["scores"], demand.ratio, self.cap or min(1.0, demand.ratio + WINDOW))
        wanted = [shares[group] * u.total for u, group in zip(demand.units, groups.of, strict=True)]
        return rounded(demand.units, wanted, demand.ratio), {"scores": told["scores"], "leaves": shares}

    def _scores(self, demand: Demand, groups: "Groups") -> list[float]:
        found = demand.run.ranks.agree((first if self.order == "first" else self._zeroth)(demand, groups))
        scores = [0.0] * len(groups.sizes)
        for weights, score in found.items():
            if not math.isfinite(score):
                raise LlmoptError(f"{weights[0]}: how the loss answers to it is not finite")
            scores[groups.group[weights[0]]] += score
        return scores

    @torch.no_grad()
    def _zeroth(self, demand: Demand, groups: "Groups") -> dict[Names, float]:
        """By what was moved at once: the sum of the slopes along the draws."""
        rows = sample(demand.run.batches, demand.run.seed, self.trial_tokens)
        found = dict.fromkeys(groups.moved(self.by == "block"), 0.0)
        for draw in range(self.draws):
            some = rows[draw::self.draws] or [rows[draw % len(rows)]]
            for weights, slope in self._drawn(demand, list(found), some, draw).items():
                found[weights] += slope
        return found

    def _drawn(self, demand: Demand, moved: list[Names], rows: list, draw: int) -> dict[Names, float]:
        """The slope of the loss of `rows` along one draw for each of `moved`."""
        trials, steps = Trials(demand.model, demand.run, rows, (DENSE,)), {}
        for _, own in trials.visits([], f"{demand.label}, draw {draw + 1} of {self.draws}"):
            known = {p.name: p for p in own.block.projections()}
            here = {names: [known[name] for name in names] for names in moved if names[0] in known}
            steps |= {names: self.epsilon * root_mean_square(weights) for names, weights in here.items()}

            def of(trial: Any, here: Mapping = here, steps: Mapping = steps) -> dict[str, Tensor]:
                if trial == DENSE or trial[0] not in here:
                    return {}
                names, sign = trial
                return {p.name: shifted(p, sign * steps[names], f"{demand.run.seed} {draw}").to(
                    compute_type(demand.model)) for p in here[names]}

            trials.through(own, of, {(names, sign): DENSE for names in here for sign in (1, -1)})
        loss = trials.losses()
        return {names: abs(loss[names, 1] - loss[names, -1]) / (2 * steps[names]) for names in moved}


@dataclasses.dataclass(frozen=True)
class Groups:
    """What takes one share: the units of a block, or those of one kind in it. of: the group of each entry."""

    demand: Demand
    whole_blocks: bool

    @cached_property
    def of(self) -> list[int]:
        keys = [u.layer if self.whole_blocks else (u.layer, u.kind) for u in self.demand.units]
        return [list(dict.fromkeys(keys)).index(key) for key in keys]

    def _add(self, what: Any) -> list[int]:
        found = [0] * (max(self.of) + 1)
        for u, group in zip(self.demand.units, self.of, strict=True):
            found[group] += what(u)
        return found

    @cached_property
    def sizes(self) -> list[int]:
        """What the units of each group take of the budget."""
        return self._add(lambda u: u.total)

    @cached_property
    def least(self) -> list[int]:
        """What they take once as many as may have left."""
        return self._add(lambda u: u.total - u.freed(u.most))

    @cached_property
    def group(self) -> dict[str, int]:
        """By the name of each weight that units reach into: its group."""
        views = {block.index: block for block in blocks(self.demand.model)}
        return {p.name: group for u, group in zip(self.demand.units, self.of, strict=True)
                for p in reached(views[u.layer], u)}

    def moved(self, at_once: bool) -> list[Names]:
        """The weights by name, those of a group together or each alone."""
        if not at_once:
            return [(name,) for name in self.group]
        return [tuple(name for name, group in self.group.items() if group == one) for one in range(len(self.sizes))]


def reached(block: Block, u: Units) -> list[Projection]:
    """The projections that units reach into, each once."""
    return list({member.projection.name: member.projection for member in members(block, u.kind)}.values())


def root_mean_square(weights: list[Projection]) -> float:
    """Of all these weights together."""
    squares = sum(float(p.weight.float().square().sum(dtype=torch.float64)) for p in weights)
    return math.sqrt(squares / sum(p.weight.numel() for p in weights)) or 1.0


def shifted(projection: Projection, step: float, seed: str) -> Tensor:                        # [out, in]
    """W + step z, where z hangs on the weight's name and the seed alone, at least float32."""
    digest = hashlib.sha256(f"{seed} {projection.name}".encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    weight = projection.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + step * torch.randn(weight.shape, generator=noise).to(weight.device, wide)


def first(demand: Demand, groups: Groups) -> dict[Names, float]:
    """By the name of a weight: the sum of the absolute slopes over batches and entries."""
    units, found = demand.units, dict.fromkeys(groups.group, 0.0)

    def see(projection: Projection, slope: Tensor) -> None:
        found[projection.name] += float(slope.float().abs().sum(dtype=torch.float64))

    weights_backward(demand.model, demand.run, f"{demand.label}, slopes", lambda block: list(
        {p.name: p for u in units if u.layer == block.index for p in reached(block, u)}.values()), see)
    parts = demand.run.ranks.gather(found)
    return {(name,): math.fsum(part[name] for part in parts) for name in found}


def shares_of(groups: Groups, scores: list[float], ratio: float, cap: float) -> list[float]:
    """The share of each group that leaves."""
    floors = [max(math.ceil(size * (1 - cap)), least) for size, least in zip(groups.sizes, groups.least, strict=True)]
    keep = kept(scores, groups.sizes, floors, round(sum(groups.sizes) * (1 - ratio)))
    return [1 - k / size for k, size in zip(keep, groups.sizes, strict=True)]


def kept(scores: list[float], sizes: list[int], floors: list[int], total: int) -> list[int]:
    """Integers from `floors` to `sizes`: the floor, and what is left of `total` by score; they sum to `total`.

    Where the floors alone are more, they are all. Without any score left, what is open shares by its size.
    """
    keep = list(floors)
    while (rest := min(total, sum(sizes)) - sum(keep)) > 0:
        room = [size - k for size, k in zip(sizes, keep, strict=True)]
        score = [s if free else 0 for s, free in zip(scores, room, strict=True)]
        score = score if any(score) else room
        whole = math.fsum(score)
        add = [math.floor(rest * (s / whole)) for s in score]
        if not any(add):
            best = sorted((i for i, s in enumerate(score) if s), key=lambda i: (-score[i], i))[:rest]
            add = [int(i in best) for i in range(len(score))]
        keep = [min(k + more, size) for k, more, size in zip(keep, add, sizes, strict=True)]
    return keep
