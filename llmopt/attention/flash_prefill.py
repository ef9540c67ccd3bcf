"""FlashPrefill: blocks whose share comes near the largest one's; no sorting, no sums.

    P[t, n] = sum over rows i of tile t of exp(q_i . mean key of n), divided by its sum over all n that the tile sees
    read  <=>  P[t, n] >= alpha max_n P[t, n]

Fan et al., 2026 (arXiv:2603.06199). Every query meets the mean keys, not only the tile's mean query; a block counts
for a row once all of its keys lie before it. The threshold follows the largest share, so that a long tail of small ones
is cut off however many there are. The last `dense` tiles of a prompt read everything. Left out: a least number of
blocks, off in the published defaults; the kernel.
"""
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import pad

from llmopt.attention.base import State
from llmopt.attention.grid import BlockSelector, Grid
from llmopt.parts import register


@register("attention.flash_prefill")
@dataclass(frozen=True)
class FlashPrefill(BlockSelector):
    """One product of all queries with the mean keys."""

    first: int = Field(2, ge=0, description="blocks at the beginning that are always read")
    near: int = Field(4, ge=1, description="newest blocks that are always read, the query's own included")
    alpha: float = Field(0.1, gt=0, le=1, description="of the largest share, what a block must have to be read")
    dense: int = Field(2, ge=0, description="last tiles of a prompt that read everything")

    def picks(self, grid: Grid, state: State) -> Tensor:
        keys, last = grid.mean(grid.keys), len(grid.begins) - self.dense
        found = torch.cat([self._of_head(grid, query, keys[head * len(keys) // len(grid.query)].unsqueeze(0))
                           for head, query in enumerate(grid.query.split(1))])
        return found | (torch.arange(len(grid.begins), device=found.device) >= last)[:, None]

    def _of_head(self, grid: Grid, query: Tensor, keys: Tensor) -> Tensor:
        """[1, tiles, blocks] for queries [1, T, D] and mean keys [1, blocks, D] of one head."""
        logits = grid.rule.logits(query, keys)                                               # [1, T, blocks]
        rows = torch.arange(grid.offset, grid.keys.shape[1], device=keys.device)
        ends = (torch.arange(grid.blocks, device=keys.device) + 1) * grid.size
        logits = logits.masked_fill(ends > rows[:, None] + 1, -torch.inf)
        tiles = pad(logits, (0, 0, 0, -len(rows) % grid.size), value=-torch.inf).unflatten(1, (-1, grid.size))
        highest = tiles.amax((2, 3), keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        summed = (tiles - highest).exp().sum(2)                                              # [1, tiles, blocks]
        return (summed >= self.alpha * summed.amax(-1, keepdim=True)) & (summed > 0)
