"""SpargeAttn's selection: pooled attention, trusted only for blocks whose tokens are alike.

    P = softmax over blocks of (mean query . mean key)        read: the fewest blocks that hold `mass` of P

A block's mean says little if its tokens differ: where the mean cosine between its tokens is below `alike`, a key block
is read by all, and a tile of queries reads everything. Zhang et al., 2025 (arXiv:2502.18137). Left out: what its
kernel skips while it computes, and 8-bit products.
"""
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import normalize

from llmopt.attention.base import State
from llmopt.attention.grid import BlockSelector, Grid, in_runs, largest
from llmopt.parts import register


@register("attention.sparge")
@dataclass(frozen=True)
class Sparge(BlockSelector):
    """One pooled product, and the cosines inside blocks."""

    block: int = Field(64, ge=1, description="tokens of a block, and queries that share a choice")
    mass: float = Field(0.9, gt=0, le=1, description="share of the pooled attention that each tile reads")
    alike: float = Field(0.1, ge=-1, le=1, description="mean cosine below which a block's mean is not trusted")

    def picks(self, grid: Grid, state: State) -> Tensor:
        strange_keys = grid.for_heads(cosines(grid.keys, grid.size) < self.alike).unsqueeze(1)     # [H, 1, blocks]
        strange_rows = (cosines(grid.query, grid.size) < self.alike).unsqueeze(2)                  # [H, tiles, 1]
        logits = grid.pooled_logits.masked_fill(strange_keys | ~grid.causal, -torch.inf)
        return largest(logits.softmax(-1).nan_to_num(0.0), self.mass) | strange_keys | strange_rows


def cosines(x: Tensor, size: int) -> Tensor:
    """[X, N, D] -> [X, blocks]: mean cosine over all pairs of tokens of a block, a token with itself included.

    The mean over all pairs is the squared norm of the mean of the unit vectors.
    """
    units = in_runs(normalize(x.float(), dim=-1), size)                                       # zeros behind the end
    counts = in_runs(torch.ones_like(x[:1, :, :1]).float(), size).sum((2, 3))
    return (units.sum(2) / counts.unsqueeze(-1)).square().sum(-1)
