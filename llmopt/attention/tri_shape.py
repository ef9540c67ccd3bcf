"""Tri-shape: as A-shape, but the last queries, which are to answer, read everything.

    j is read by i  <=>  j < sinks  or  i - j < window  or  i among the last `dense` queries

Li et al., 2024 (SCBench, arXiv:2412.10319). A tile of rows shares the beginning of its window, so that its last rows
read a little more.
"""
import torch
from llmopt_kernels import Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import Selector, State
from llmopt.parts import register


@register("attention.tri_shape")
@dataclass(frozen=True)
class TriShape(Selector):
    """Decided by positions alone."""

    sinks: int = Field(128, ge=0, description="first tokens that every token reads")
    window: int = Field(1024, ge=1, description="tokens before each one that it reads, itself included")
    dense: int = Field(128, ge=0, description="last queries that read everything")
    tile: int = Field(64, ge=1, description="rows that share the beginning of their window")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        begins = torch.arange(0, q.shape[1], self.tile, device=q.device)
        start = (begins + state.offset - self.window + 1).clamp(min=0)
        asking = begins + self.tile > q.shape[1] - self.dense
        return Stripes(self.sinks, start=start.masked_fill(asking, 0), tile=self.tile)
