"""XAttention: blocks by the softmax of antidiagonal means, the fewest that hold a share of it.

    A = softmax_v(T[u, v])        B[t, n] = sum of A over the squares of tile t and block n

T: antidiagonal.py, squares of `stride`. Each tile reads the smallest set of blocks whose B is `threshold` of its sum,
what is always read counted in. Xu et al., 2025 (arXiv:2503.16428); left out: thresholds for each head.
"""
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.antidiagonal import antidiagonals, summed
from llmopt.attention.base import State
from llmopt.attention.grid import BlockSelector, Grid, largest
from llmopt.errors import FieldError
from llmopt.parts import register


@register("attention.xattention")
@dataclass(frozen=True)
class XAttention(BlockSelector):
    """Costs 1 / stride of all products of queries and keys."""

    stride: int = Field(8, ge=1, description="side of the squares; must divide block")
    threshold: float = Field(0.9, gt=0, le=1, description="share of the blocks' sum that each tile reads")

    def check(self) -> None:
        if self.block % self.stride:
            raise FieldError("stride", self.stride, f"a divisor of block ({self.block})")

    def picks(self, grid: Grid, state: State) -> Tensor:
        scores = torch.stack([summed(logits.masked_fill(~seen, -torch.inf).softmax(-1), self.block // self.stride)
                              for logits, seen in antidiagonals(grid, self.stride)])
        scores = scores * grid.causal
        return largest(scores, self.threshold, forced=(grid.causal & ~grid.far).expand_as(scores))
