"""Generalized neighborhood attention in one dimension: runs of `stride` rows share the window of their last row.

    i reads j  <=>  leader - window < j <= i        leader = floor(i / stride) stride + stride - 1

stride 1: a sliding window; stride = window: blocks that see nothing outside. In between a window begins where a tile of
keys does, and the work saved is time saved: `tile_bound`. With `dilation`, a row reads only rows of its own residue
class, each class by the rule above. Hassani et al., 2025 (arXiv:2504.16922). The leader of the last run may lie beyond
the prompt, so that a prompt read in pieces is read alike.
"""
import math

import torch
from llmopt_kernels import NONE, Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import Selector, State
from llmopt.errors import FieldError
from llmopt.parts import register


@register("attention.neighborhood")
@dataclass(frozen=True)
class Neighborhood(Selector):
    """Decided by positions alone. No sinks: see attention.a_shape."""

    window: int = Field(1024, ge=1, description="keys that the last row of a run reads")
    stride: int = Field(128, ge=1, description="rows of a run; at most window")
    dilation: int = Field(1, ge=1, description="rows that share no key; above 1 each row has a list, which is slow")

    def check(self) -> None:
        if self.stride > self.window:
            raise FieldError("stride", self.stride, f"at most window ({self.window})")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        before = state.dropped + state.offset
        rows = torch.arange(before, before + q.shape[1], device=q.device)
        if self.dilation > 1:
            return Stripes(0, 1, columns=self._dilated(rows, state.dropped), tile=1)
        tile = math.gcd(self.stride, before)            # a tile does not cross runs, wherever the prompt was cut
        start = starts(rows[::tile], self.window, self.stride) - state.dropped
        return Stripes(0, start=start.clamp(min=0), tile=tile)

    def _dilated(self, rows: Tensor, dropped: int) -> Tensor:
        """[1, T, window]: for each row the keys of its class, NONE as filler."""
        apart, rest = rows // self.dilation, rows % self.dilation
        first = starts(apart, self.window, self.stride)
        keys = first[:, None] + torch.arange(self.window, device=rows.device)
        places = keys * self.dilation + rest[:, None] - dropped
        return places.masked_fill((keys > apart[:, None]) | (places < 0), NONE).unsqueeze(0)


def starts(rows: Tensor, window: int, stride: int) -> Tensor:
    """The first key that each row [T] reads."""
    leader = rows // stride * stride + stride - 1
    return (leader - window + 1).clamp(min=0)


def tile_bound(length: int, window: int, stride: int, query_tile: int, key_tile: int) -> tuple[float, float]:
    """How many times less than causal attention is computed, (by tiles as a kernel visits them, by pairs)."""
    rows = torch.arange(length)
    first = starts(rows, window, stride)
    begins = torch.arange(0, length, query_tile)
    ends = (begins + query_tile).clamp(max=length)
    visited = sum(-(-int(end) // key_tile) - int(first[begin]) // key_tile for begin, end in zip(begins, ends,
                                                                                                strict=True))
    dense = sum(-(-int(end) // key_tile) for end in ends)
    return dense / visited, length * (length + 1) / 2 / int((rows - first + 1).sum())
