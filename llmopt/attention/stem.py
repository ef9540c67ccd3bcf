"""Stem: fewer blocks for later queries, chosen by what they would write as well as by how they fit.

    M[t, n] = mean logit of the pair of blocks + beta max(0, max over n of log |v|)
    blocks of tile t of N = ceil(k0 - k0 (1 - mu) t / N),     k0 = keep of the blocks there are

Niu et al., 2026 (arXiv:2603.06274): every later token reads what the first ones have written, so these are computed
nearly in full. The mean logit is that over antidiagonals of squares of `stride` (antidiagonal.py), whose own average
within the pair of blocks is taken. A tile has no more blocks than it sees.
With `heads`, k0 is shared out among the heads; with `density`, each head's is searched for offline.
"""
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.antidiagonal import antidiagonals, summed
from llmopt.attention.base import State
from llmopt.attention.by_head import ByHead
from llmopt.attention.grid import BlockSelector, Grid, in_runs, top
from llmopt.errors import FieldError
from llmopt.parts import register


@register("attention.stem")
@dataclass(frozen=True)
class Stem(ByHead, BlockSelector):
    """A budget that decays with the place of the query."""

    tried: ClassVar = {"keep": (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)}

    keep: float = Field(0.2, gt=0, le=1, description="share of all blocks that the first tiles read at most")
    decay: float = Field(0.7, gt=0, le=1, description="of that, what the last tile reads (mu)")
    beta: float = Field(0.2, ge=0, description="weight of the values' norms")
    stride: int = Field(16, ge=1, description="side of the squares; must divide block")

    def check(self) -> None:
        super().check()
        if self.block % self.stride:
            raise FieldError("stride", self.stride, f"a divisor of block ({self.block})")

    def picks(self, grid: Grid, state: State) -> Tensor:
        per = self.block // self.stride
        fit = torch.stack([summed(logits * seen, per) / summed(seen.float(), per).clamp(min=1)
                           for logits, seen in antidiagonals(grid, self.stride)])            # [H, tiles, blocks]
        norms = in_runs(grid.values.float().norm(dim=-1, keepdim=True), grid.size).amax((2, 3))         # [G, blocks]
        scores = fit + self.beta * grid.for_heads(norms.log().clamp(min=0)).unsqueeze(1)
        return top(scores.masked_fill(~grid.far, -torch.inf), self.budgets(grid, self._keep(state)))

    def _keep(self, state: State) -> Tensor:
        """float64 [H] or [1]."""
        found = self.found("keep", state)
        return self.keep * self.shares(state) if found is None else found

    def budgets(self, grid: Grid, keep: Tensor) -> Tensor:
        """int64 [H, tiles] or [1, tiles]: blocks that each tile chooses besides those that it reads in any case."""
        most = grid.blocks * keep.to(grid.keys.device)[:, None]
        place = grid.begins.double() / grid.keys.shape[1]
        return ((most - most * (1 - self.decay) * place).ceil().long() - self.first - self.near).clamp(min=0)
