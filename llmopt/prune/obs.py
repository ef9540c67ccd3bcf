"""OBS for structures: the unit leaves whose going costs least after all that stay have made up for it.

    loss(unit g) = tr( W_g (Hinv_gg)^-1 W_g^T ) / 2                H = sum_t x_t x_t^T + damping mean(diag H) I
    then         W -= W_g (Hinv_gg)^-1 Hinv_g,      Hinv -= Hinv_g^T (Hinv_gg)^-1 Hinv_g            (a few at a time)

W [out, in], x: weight and inputs of a writer; g: the columns of a unit, Hinv_g their rows of the inverse. score(unit)
is its loss at the time it leaves, and never less than that of one that left before. Hassibi and Stork, 1993; of
structures, Kurtic et al., ZipLM (arXiv:2302.04089), Meng et al., OSSCAR (arXiv:2403.12983). What stays is fitted by
`refit`, at once and exactly. Left out: OSSCAR's exchanges afterwards.

units: [weights] is SparseGPT (Frantar and Alistarh, 2023, arXiv:2301.00774), U upper triangular, U^T U = Hinv:

    of 128 columns at a time:  those of the smallest w_ij^2 / U_jj^2 go; with `pattern`, of M, as the sweep reaches them
    for column j:  e = (w_j, where it goes) / U_jj,   w_k -= e U_jk  for all k > j

Exact in its count over the whole weight; what has gone never returns. Inputs that are always 0 go first. Left out:
rounding in the same sweep.
"""
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.factor import inverse_factor
from llmopt.calibration.second_moments import Gram
from llmopt.parts import register
from llmopt.prune.inputs import ByInputs
from llmopt.prune.masks import half_of_each, smallest
from llmopt.prune.sparse import Gone, Sparse

BLOCK = 128             # columns of a weight whose zeros are chosen together
ROUNDS = 64             # a 64th of the units leaves before the others are looked at again


@register("prune.obs")
@dataclass(frozen=True)
class OBS(Sparse, ByInputs):
    """One pass over the calibration data, and an inverse for each writer."""

    looks: ClassVar[Literal["gram"]] = "gram"

    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")

    def watch(self) -> Gram:
        return Gram()

    def rate(self, weight: Tensor, seen: Gram, index: Tensor) -> Tensor:
        return damped_losses(weight, seen.whole(), index, self.damping)

    def zeroed(self, weight: Tensor, seen: Tensor, gone: Gone) -> tuple[Tensor, Tensor]:
        hessian = seen.float()                                      # a copy
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        factor, _ = inverse_factor(hessian, self.damping)
        if factor is None:                                          # singular at every damping up to 1
            factor = hessian.diagonal().rsqrt().diag()
        return swept(weight, factor, dead, gone)


def swept(weight: Tensor, factor: Tensor, dead: Tensor, gone: Gone) -> tuple[Tensor, Tensor]:
    """(the weight with its zeros and what stays made up for them, where the zeros are [out, in] bool).

    weight [out, in]; factor: U [in, in], upper triangular; dead [in]: inputs that are always 0.
    """
    weight, out = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    price = factor.diagonal().square().masked_fill(dead, torch.inf)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        now, corner = weight[:, start:stop], factor[start:stop, start:stop]
        mask, errors = out[:, start:stop], torch.zeros_like(now)
        if not gone.group:
            count = gone.count * stop // weight.shape[1] - gone.count * start // weight.shape[1]
            mask.copy_(smallest((now.square() / price[start:stop]).flatten(), count).view_as(mask))
        for j in range(stop - start):
            if gone.group and j % gone.group == 0:
                part = slice(j, j + gone.group)
                mask[:, part] = half_of_each(now[:, part].square() / price[start:stop][part], gone.group)
            errors[:, j] = now[:, j] * mask[:, j] / corner[j, j]
            now[:, j:].addr_(errors[:, j], corner[j, j:], alpha=-1)
        now[mask] = 0
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight, out


def damped_losses(weight: Tensor, hessian: Tensor, index: Tensor, damping: float, rounds: int = ROUNDS,
                  first_order: bool = False) -> Tensor:
    """`losses` of a writer's weight [out, in] under a float64 Hessian [in, in], which is used up: [units].

    first_order: what the unit writes, times the whole output, tr(W_g H_g W^T) of the dense W, is added to each loss.
    """
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp(min=1e-12))
    weight = weight.double().T.contiguous()
    slopes = hessian @ weight if first_order else None
    torch.cholesky_inverse(torch.linalg.cholesky(hessian, out=hessian), out=hessian)
    return losses(weight, hessian, index.to(weight.device), rounds, slopes)


def losses(weight: Tensor, inverse: Tensor, index: Tensor, rounds: int = ROUNDS,
           slopes: Tensor | None = None) -> Tensor:
    """What each unit costs when it leaves, the cheapest first: [units].

    weight [in, out] and inverse [in, in], both float64 and used up, as another matrix [in, in] would be a gigabyte at a
    width of 11,008. index [units, n]: rows of both. rounds: how often those left are looked at anew. slopes [in, out]:
    the inner product of a unit's rows with them comes to its cost.
    """
    found, least = weight.new_zeros(len(index)), weight.new_full((), 0 if slopes is None else -math.inf)
    left, step = torch.arange(len(index), device=index.device), -(-len(index) // rounds)
    while len(left):
        now = _now(weight, inverse, index[left])
        if slopes is not None:
            now += (slopes * weight).sum(1)[index[left]].sum(1)
        gone = now.argsort(stable=True)[:step]
        found[left[gone]] = now[gone].clamp(min=least)
        least = found[left[gone]].max()
        rows = index[left[gone]].flatten()
        across, corner = inverse[:, rows], inverse[rows[:, None], rows]
        weight.addmm_(across, torch.linalg.solve(corner, weight[rows]), alpha=-1)
        inverse.addmm_(across, torch.linalg.solve(corner, across.T), alpha=-1)        # leaves 0 where a unit has gone
        left = left[torch.ones_like(left, dtype=torch.bool).scatter_(0, gone, False)]
    return found


def _now(weight: Tensor, inverse: Tensor, index: Tensor) -> Tensor:
    """tr(W_g^T (Hinv_gg)^-1 W_g) / 2 of the rows `index` [units, n] of weight [in, out]: [units]."""
    if index.shape[1] == 1:
        return weight.square().sum(1)[index[:, 0]] / inverse.diagonal()[index[:, 0]] / 2
    parts, corners = weight[index], inverse[index[:, :, None], index[:, None, :]]       # [units, n, out], [units, n, n]
    return (torch.linalg.solve(corners, parts) * parts).sum((1, 2)) / 2
