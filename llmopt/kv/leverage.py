"""Leverage scores: keep keys that no combination of the others can stand for.

    X = (keys before RoPE - their mean) R,  R random [D, dimensions]            s_j = x_j^T (X^T X + e)^-1 x_j

One half of Compactor (Chari and Van Durme, 2025, arXiv:2507.08143). R is normal, drawn from a fixed seed, and left out
where D is no larger than `dimensions`: then the scores are exact. e is a ridge of a ten-thousandth of the mean square.
Differs: the first tokens stay, since the key on which idle attention rests need not stand out (the authors' press in
kvpress keeps none for sure, that of the whole Compactor eight).
Left out: the score's mean and spread are not taken out of it, which changes no choice inside a layer.
"""
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV, coarse
from llmopt.parts import register

RIDGE = 1e-4
DIMENSIONS = 48


@register("kv.leverage")
@dataclass(frozen=True)
class Leverage(Scorer):
    """Keys that stand out from the space of the others; no attention is computed."""

    turns: ClassVar = True

    sinks: int = Field(4, ge=0, description="first tokens, always kept")
    dimensions: int = Field(DIMENSIONS, ge=1, description="keys are projected to so many, at most")

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        return leverage(kv, self.dimensions)


def leverage(kv: LayerKV, dimensions: int) -> Tensor:
    """The scores of the formula above: [B, G, T]."""
    keys = kv.unrotated_keys().float()
    keys = (keys - kv.mean_over_entries(keys)).masked_fill(kv.holes.unsqueeze(-1), 0.0)
    if dimensions < keys.shape[-1]:
        drawn = torch.randn(keys.shape[-1], dimensions, generator=torch.Generator().manual_seed(0))
        keys = keys @ drawn.to(keys.device) / dimensions ** 0.5
    return coarse(leverage_scores(keys))             # of few entries all have much the same


def leverage_scores(x: Tensor) -> Tensor:
    """Diagonal of X (X^T X + e)^-1 X^T: [..., T, N] -> [..., T]."""
    gram = x.mT @ x
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    factor = torch.linalg.cholesky(gram + torch.diag_embed(ridge.unsqueeze(-1).expand(gram.shape[:-1])))
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).square().sum(-2)
