"""OBS for structures: the unit leaves whose going costs least after all that stay have made up for it.

    loss(unit g) = tr( W_g (Hinv_gg)^-1 W_g^T ) / 2                H = sum_t x_t x_t^T + damping mean(diag H) I
    then         W -= W_g (Hinv_gg)^-1 Hinv_g,      Hinv -= Hinv_g^T (Hinv_gg)^-1 Hinv_g            (a few at a time)

W [out, in], x: weight and inputs of a writer; g: the columns of a unit, Hinv_g their rows of the inverse. score(unit)
is its loss at the time it leaves, and never less than that of one that left before. Hassibi and Stork, 1993; of
structures, Kurtic et al., ZipLM (arXiv:2302.04089), Meng et al., OSSCAR (arXiv:2403.12983). What stays is fitted by
`refit`, at once and exactly. Left out: OSSCAR's exchanges afterwards.
"""
import math

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.second_moments import Gram
from llmopt.parts import register
from llmopt.prune.inputs import ByInputs

ROUNDS = 64             # a 64th of the units leaves before the others are looked at again


@register("prune.obs")
@dataclass(frozen=True)
class OBS(ByInputs):
    """One pass over the calibration data, and an inverse for each writer."""

    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")

    def watch(self) -> Gram:
        return Gram()

    def rate(self, weight: Tensor, seen: Gram, index: Tensor) -> Tensor:
        return damped_losses(weight, seen.whole(), index, self.damping)


def damped_losses(weight: Tensor, hessian: Tensor, index: Tensor, damping: float, rounds: int = ROUNDS,
                  first_order: bool = False) -> Tensor:
    """`losses` of a writer's weight [out, in] under a float64 Hessian [in, in]: [units].

    first_order: what the unit writes, times the whole output, tr(W_g H_g W^T) of the dense W, is added to each loss.
    """
    hessian = hessian.clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp(min=1e-12))
    inverse, weight = torch.cholesky_inverse(torch.linalg.cholesky(hessian)), weight.double().T
    return losses(weight, inverse, index.to(weight.device), rounds, hessian @ weight if first_order else None)


def losses(weight: Tensor, inverse: Tensor, index: Tensor, rounds: int = ROUNDS,
           slopes: Tensor | None = None) -> Tensor:
    """What each unit costs when it leaves, the cheapest first: [units].

    weight [in, out] and inverse [in, in], both float64; index [units, n]: rows of both. rounds: how often those left
    are looked at anew. slopes [in, out]: the inner product of a unit's rows with them comes to its cost.
    """
    found, least = weight.new_zeros(len(index)), weight.new_full((), 0 if slopes is None else -math.inf)
    left, step = torch.arange(len(index), device=index.device), -(-len(index) // rounds)
    weight, inverse, size = weight[index.flatten()], inverse[index.flatten()][:, index.flatten()], index.shape[1]
    slopes = torch.zeros_like(weight) if slopes is None else slopes[index.flatten()]
    while len(left):
        now = _now(weight, inverse, size) + (slopes * weight).unflatten(0, (-1, size)).sum((1, 2))
        gone = now.argsort(stable=True)[:step]
        found[left[gone]] = now[gone].clamp(min=least)
        least = found[left[gone]].max()
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        rows = stays.repeat_interleave(size)
        across = inverse[rows][:, ~rows]
        taken = torch.linalg.solve(inverse[~rows][:, ~rows], torch.cat([weight[~rows], across.T], 1))
        slopes, weight = slopes[rows], weight[rows] - across @ taken[:, :weight.shape[1]]
        inverse = inverse[rows][:, rows] - across @ taken[:, weight.shape[1]:]
        left = left[stays]
    return found


def _now(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """tr(W_g^T (Hinv_gg)^-1 W_g) / 2 of each run of `size` rows of weight [in, out]."""
    parts = weight.unflatten(0, (-1, size))                                              # [units, n, out]
    corners = inverse.view(len(parts), size, len(parts), size).diagonal(dim1=0, dim2=2)        # [n, n, units]
    return (torch.linalg.solve(corners.permute(2, 0, 1), parts) * parts).sum((1, 2)) / 2
