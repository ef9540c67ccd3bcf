"""ModHiFi: the units leave that alone tell least of what their writer writes.

    FS_c(S) = max_delta 1 - E|Y_c - sum_{i in S} delta_i W_ci X_i|^2 / E Y_c^2  =  G_Sc^T H_SS^-1 G_Sc / (w_c H w_c^T)
    score(unit) = sum over outputs c of  FS_c(unit) E Y_c^2        (`aggregate: mean`: the mean of FS_c(unit))

Y = X W^T: what the writer puts out; w_c: row c of its weight; H = E x x^T, G = H W^T. FS is the subset fidelity, the
share of an output's energy that its best combination of the inputs in S explains: 0 to 1, and growing with S; of a
single channel it is cos^2(Y_c, X_i). Choosing the largest is optimal where the units are uncorrelated. The record tells
FS of the units that stay, of each writer, as the mean over its outputs; `refit` then combines them that way. `center`
takes the means off X and Y before, for writers with a bias, which can hold what is constant.

Kashyap et al., 2025 (arXiv:2511.19566), ModHiFi-P; how outputs are summed up is ours, as its code could not be read,
and so are the heads, whose columns make one set S. Left out: one factor for each column in place of the refit,
ModHiFi-U (unlearning), and greedy choice of several units together (prune.obs).
"""
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import pad

from llmopt.calibration.second_moments import Gram, blocks_of
from llmopt.calibration.walk import Visit, visits
from llmopt.method import Run
from llmopt.parts import register
from llmopt.prune.inputs import ByInputs
from llmopt.prune.refit import writers
from llmopt.prune.surgery import LayerPlan

RIDGE = 1e-9            # of a set's mean square, where inputs hang on one another
LEAST = 1e-6            # of an input's mean square is what sums of float32 products cannot tell from constant


class Moments:
    """The sum of x x^T over tokens, [in, in] float64; center: about the mean."""

    def __init__(self, center: bool):
        self.gram, self.center = Gram(), center

    @property
    def tokens(self) -> int:
        return self.gram.tokens

    def add(self, x: Tensor) -> None:
        """Take in `x` [N, in]."""
        self.gram.add(pad(x, (0, int(self.center)), value=1.0))

    def whole(self) -> Tensor:
        found = self.gram.whole()
        if not self.center:
            return found
        total, squares = found[-1, :-1], found.diagonal()[:-1].clone()
        found = found[:-1, :-1] - total[:, None] * total / found[-1, -1]
        constant = found.diagonal() < LEAST * squares
        return found.masked_fill(constant[:, None] | constant, 0)


@register("prune.modhifi")
@dataclass(frozen=True)
class ModHiFi(ByInputs):
    """One pass over the calibration data, and another for the fidelity of what stays."""

    aggregate: Literal["energy", "mean"] = Field(
        "energy", description="a unit's share of every output, weighted by that output's energy, or all alike")
    center: bool = Field(False, description="take the means off first: only what varies counts")

    def watch(self) -> Moments:
        return Moments(self.center)

    def rate(self, weight: Tensor, seen: Moments, index: Tensor) -> Tensor:
        told, energy = explained(weight, seen.whole(), index.to(weight.device))
        if self.aggregate == "energy":
            return told.sum(1)
        return _shares(told, energy).mean(1)

    def _carry_out(self, model: nn.Module, run: Run, plan: list[LayerPlan]) -> dict[str, Any]:
        found = run.memory.remember("fidelity", lambda: {"writers": self._fidelity(model, run, plan)})
        return {"fidelity": found["writers"]} | super()._carry_out(model, run, plan)

    @torch.no_grad()
    def _fidelity(self, model: nn.Module, run: Run, plan: list[LayerPlan]) -> list[dict[str, Any]]:
        """FS of what stays, of every writer that loses something."""
        found = []
        for visit in visits(model, run, f"{self.name} fidelity", edits=False):
            found += self._fidelity_of(visit, plan[visit.block.index])
        return run.ranks.agree(found)

    def _fidelity_of(self, visit: Visit, layer: LayerPlan) -> list[dict[str, Any]]:
        kept = {writer.name: (writer, columns, self.watch()) for writer, columns in writers(visit.block, layer)}
        visit.observe({name: seen.add for name, (_, _, seen) in kept.items()})
        return [{"name": name, "fidelity": float(fidelity(writer.weight.float(), seen.whole(), columns).mean())}
                for name, (writer, columns, seen) in kept.items()]


def explained(weight: Tensor, moments: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """FS_c(unit) E Y_c^2 [units, out], and E Y_c^2 [out]; weight [out, in], moments: H [in, in], index [units, n]."""
    corners = moments[index[:, :, None], index[:, None]]                                            # [units, n, n]
    level = corners.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * RIDGE
    factor = torch.linalg.inv(corners + level[:, None, None] * torch.eye(index.shape[1], device=weight.device))
    told = moments.new_empty(len(index), len(weight))
    energy = moments.new_empty(len(weight))
    for part in blocks_of(len(weight)):
        rows = weight[part].double()
        products = moments @ rows.T                                                                 # G [in, c]
        energy[part] = (rows.T * products).sum(0)
        own = products[index]                                                                       # [units, n, c]
        told[:, part] = (factor @ own).mul_(own).sum(1).clamp_(min=0)
    return told, energy


def fidelity(weight: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """FS_c of the input columns `kept` [k]: [out]; 1 where an output is always 0."""
    told, energy = explained(weight, moments, kept.to(weight.device)[None])
    return torch.where(energy > 0, _shares(told, energy)[0], 1.0)


def _shares(told: Tensor, energy: Tensor) -> Tensor:        # [units, out], [out] -> [units, out], 0 to 1
    return torch.where(energy > 0, told / energy, 0.0).clamp(max=1)
