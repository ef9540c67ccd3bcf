"""The blocks whose mean key fits best, a fixed number of them: MoBA's gate without training, and VMoBA's variants.

    s[t, n] = mean query of tile t . mean key of block n

over: tile      the `keep` best blocks of each tile (Lu et al., 2025, MoBA, arXiv:2502.13189)
      head      as many in all, wherever they are in the head: tiles of sharp scores get more (VMoBA, arXiv:2506.23858)
heads           head scores, by which `keep` is shared out among the heads
density         instead of a number, that of each head is searched for offline
threshold       instead of a number, scores brought to 0 .. 1 within the head, the best until their sum is this share

MoBA decides for each query by itself: block: 1 row a tile is not offered; a tile's mean query stands for its rows.
Left out: VMoBA's two- and three-dimensional blocks, which are for video.
"""
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import State
from llmopt.attention.by_head import ByHead
from llmopt.attention.grid import BlockSelector, Grid, largest, top
from llmopt.errors import FieldError
from llmopt.parts import register


@register("attention.block_topk")
@dataclass(frozen=True)
class BlockTopK(ByHead, BlockSelector):
    """Cheap, and coarse: a block is judged by one vector."""

    tried: ClassVar = {"keep": (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)}

    keep: int = Field(8, ge=0, description="blocks for each tile, besides those that are always read")
    over: Literal["tile", "head"] = Field("tile", description="where the best are looked for")
    threshold: float | None = Field(None, gt=0, le=1, description="share of the scores' sum, in the place of keep")

    def check(self) -> None:
        super().check()
        for name, given in (("heads", self.heads), ("density", self.density)):
            if given is not None and self.threshold is not None:
                raise FieldError(name, given, "no threshold beside it: heads share out a number of blocks, keep")

    def picks(self, grid: Grid, state: State) -> Tensor:
        scores = grid.pooled_logits.masked_fill(~grid.far, -torch.inf)                       # [H, tiles, blocks]
        flat = scores.flatten(1) if self.over == "head" else scores
        if self.threshold is None:
            each = scores.shape[1] if self.over == "head" else 1                             # tiles
            count = self.number("keep", grid.blocks * each, state, each).to(flat.device)
            found = top(flat, count if self.over == "head" else count[:, None])
        else:
            found = largest(_between_0_and_1(flat), self.threshold)
        return found.view_as(scores)


def _between_0_and_1(scores: Tensor) -> Tensor:
    """Scores [..., n] less the least and divided by the spread; 0 where they are -inf."""
    seen = scores.isfinite()
    low = scores.masked_fill(~seen, torch.inf).amin(-1, keepdim=True)
    spread = (scores.amax(-1, keepdim=True) - low).clamp(min=1e-9)
    return ((scores - low) / spread).where(seen, 0.0).nan_to_num(0.0)
