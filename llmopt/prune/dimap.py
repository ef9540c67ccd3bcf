"""DIMAP: the units leave whose weights matter least beside the stronger weights of their own matrix.

    Imp(w) = w^2 / sum of v^2 over all weights v of the matrix with |v| >= |w|        score(unit) = sum of Imp(w) over
                                                                                      all weights that leave with it

He et al., 2024 ("Data-independent Module-Aware Pruning"): Imp is LAMP's score (Lee et al., 2021, arXiv:2010.07611), by
which a matrix with its scale changed, or a small one, stays comparable, and none can vanish; weights of one kind of
module are compared over all layers, kinds apart. Here the kinds are those of the units, FFN channels and heads, each
of which loses its share (`scope: apart`); matrices are gate, up, down, q, k, v, o, fused ones taken apart, with the
gain of the norm in front. No data needed but for the refit. Left out: single weights, for which the paper is made
(prune.magnitude with units: [weights] and scope: lamp).
"""
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.model.blocks import Block
from llmopt.parts import register
from llmopt.prune.allocate import Units, globally, normalise
from llmopt.prune.base import ByBlock, Scores
from llmopt.prune.groups import Member, felt, members
from llmopt.prune.scopes import Demand, Removed, Scope


@register("apart")
@dataclass(frozen=True)
class Apart(Scope):
    """The weakest units of the whole model, FFN channels and heads apart: the same share of each kind (DIMAP)."""

    def removed(self, demand: Demand) -> Removed:
        alike = [replace(u, scores=normalise(u.scores, demand.normalize)) for u in demand.units]
        return self.guess(alike, demand.ratio), {}

    def guess(self, units: list[Units], ratio: float) -> list[int]:
        found = [0] * len(units)
        for kind in {u.kind for u in units}:
            mine = [entry for entry, u in enumerate(units) if u.kind == kind]
            for entry, count in zip(mine, globally([units[entry] for entry in mine], ratio), strict=True):
                found[entry] = count
        return found


@register("prune.dimap")
@dataclass(frozen=True)
class DIMAP(ByBlock):
    """By weights alone."""

    whole_parts: ClassVar[bool] = False

    scope: Scope = Field(Apart(), description="how many leave from each layer; apart: FFN and heads by thresholds of "
                                              "their own")
    normalize: Literal["lamp", "layer", "none"] = Field(
        "none", description="how scope: global makes the scores of different layers comparable")

    def score(self, block: Block, visit: Visit | None) -> Scores:
        return {unit: sum(self._of(block, unit, member) for member in found)
                for unit in self.units if (found := members(block, unit))}

    def _of(self, block: Block, unit: str, member: Member) -> Tensor:      # [units]
        weight = felt(block, unit, member.projection)
        lines = (weight.T if member.columns else weight)[member.index.flatten().to(weight.device)]
        return importance(lines).view(len(member.index), -1).sum(1)


def importance(weight: Tensor) -> Tensor:
    """Imp of every entry of a matrix, float64; 0 of zeros, 1 of the largest."""
    squares = weight.float().square().flatten()
    ordered, order = squares.sort(descending=True)
    as_large = torch.searchsorted(-ordered, -ordered, right=True) - 1           # ties count in each other's sum
    sums = ordered.cumsum(0, dtype=torch.float64)[as_large].clamp(min=1e-300)
    return torch.zeros_like(sums).scatter(0, order, ordered / sums).view_as(weight)
