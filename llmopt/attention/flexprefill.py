"""FlexPrefill: every head decides by itself between lines and blocks, and how many it needs.

    P = softmax of the last tile of queries, summed by key block: p        p' = the same from mean queries and keys
    D = sqrt(Jensen-Shannon divergence of p and p')

D < tau: means tell the truth in this head, and pooled attention of all tiles chooses: the fewest pairs of blocks, over
the whole head, that hold `gamma` of it. Otherwise lines: as many columns and distances as hold `gamma` of P, counted in
blocks, the best of them by P. Both read at least `budget` tokens' worth of the best lines.

Lai et al., 2025 (arXiv:2502.20766). Where the published code takes p log p of zeros, ours counts them as zero.
"""
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import State
from llmopt.attention.grid import BlockSelector, Grid, in_runs, largest, top
from llmopt.attention.vertical_slash import along_diagonals, last_weights
from llmopt.parts import register


@register("attention.flexprefill")
@dataclass(frozen=True)
class FlexPrefill(BlockSelector):
    """Costs a tile of rows of attention, and the pooled product."""

    gamma: float = Field(0.9, gt=0, le=1, description="share of the attention that is read")
    tau: float = Field(0.1, ge=0, description="distance below which a head is chosen by pooled attention")
    budget: int = Field(1024, ge=0, description="tokens that each row reads at least, in columns and in distances")

    def picks(self, grid: Grid, state: State) -> Tensor:
        weights = last_weights(grid.query, grid.keys, state, grid.size)                       # [H, R, S]
        pooled = grid.pooled_logits.masked_fill(~grid.causal, -torch.inf).softmax(-1)         # [H, tiles, blocks]
        true = in_runs(weights.sum(1).unsqueeze(-1), grid.size).sum((2, 3))                   # [H, blocks]
        means = grid.mean(grid.query[:, -grid.size:])[:, :1]
        guess = grid.rule.logits(means, grid.for_heads(grid.mean(grid.keys)))[:, 0].softmax(-1)
        truthful = distance(true / true.sum(-1, keepdim=True), guess) < self.tau              # [H]
        lines = self._lines(grid, weights, true)
        whole = largest(pooled.flatten(1), self.gamma).view_as(pooled)
        least = self._lines(grid, weights, true, adaptive=False)
        return torch.where(truthful[:, None, None], whole | least, lines)

    def _lines(self, grid: Grid, weights: Tensor, columns: Tensor, adaptive: bool = True) -> Tensor:
        """[H, tiles, blocks] by lines; adaptive: as many as hold gamma of the attention, else only the budget."""
        along = along_diagonals(weights)                                                      # [H, S]
        by_distance = in_runs(along.unsqueeze(-1), grid.size).sum((2, 3))                     # [H, blocks]
        counts = [self._count(x, grid.size, adaptive) for x in (weights.sum(1), along)]
        vertical, slash = top(columns, counts[0]), top(by_distance, counts[1])
        own = torch.div(grid.begins, grid.size, rounding_mode="floor")[:, None]
        apart = own - torch.arange(grid.blocks, device=own.device)                            # [tiles, blocks]
        return vertical.unsqueeze(1) | (slash[:, apart.clamp(min=0)] & (apart >= 0))

    def _count(self, mass: Tensor, size: int, adaptive: bool) -> Tensor:
        """Blocks [H] for lines of mass [H, S]."""
        least = -(-self.budget // size)
        needed = largest(mass, self.gamma).sum(-1) // size + 1
        return needed.clamp(min=least) if adaptive else torch.full_like(needed, least)


def distance(p: Tensor, q: Tensor) -> Tensor:
    """[..., n], two distributions -> [...]: the root of their Jensen-Shannon divergence in nats."""
    middle = (p + q) / 2
    apart = [torch.xlogy(x, x).sum(-1) - torch.xlogy(x, middle).sum(-1) for x in (p, q)]
    return (sum(apart) / 2).clamp(min=0).sqrt()
