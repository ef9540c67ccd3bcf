"""Attention span: how far back a head looks, the cheapest split into local and global heads.

    d(l, h) = mean_t sum_s A[t, s] (t - s)

over the real tokens t of the calibration data, A the attention map of head h in layer l. Small: a head that streams
along with the text; large: one that reaches back, which suffers from eviction. One forward pass, no gradients,
block by block.

From the preplan-and-anchor study of attention (arXiv:2510.13554), which splits heads at the lowest and the highest
30 %. Left out: its WAAD and FAI signals per token.
"""
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.walk import visits
from llmopt.heads.base import HeadScore
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.parts import register
from llmopt.runtime.attention_rows import ENTRIES, Rows, attention_rows
from llmopt.scale import activations
from llmopt.scale.room import Room, Scene


def distance(rows: Rows) -> Tensor:                       # [H]
    """Sum over the real queries of the mean attended distance."""
    center = rows.weights @ rows.keys.float()             # [B, H, t]: mean attended position
    spans = (rows.queries - center) * rows.real[:, None]
    return spans.sum(dim=(0, 2))


@register("heads.span")
@dataclass(frozen=True)
class Span(HeadScore):
    """Mean attended distance in tokens; one sample at a time, a tile of one layer's map in memory."""

    needs_whole: ClassVar[bool] = False
    mean_over: ClassVar = "tokens"

    def rooms(self, model: nn.Module, scene: Scene) -> list[Room]:
        length = max((length for _, length in scene.shapes), default=0)
        return [Room(passes=activations.forward(model, block, 1, length)
                     + 12 * min(ENTRIES, block.heads * length ** 2), sets=2) for block in blocks(model)]

    @torch.no_grad()
    def score(self, model: nn.Module, run: Run) -> list[Tensor]:
        totals = [torch.zeros(block.heads, dtype=torch.float64) for block in blocks(model)]
        samples = [{key: row[None] for key, row in zip(batch, rows, strict=True)}
                   for batch in run.batches for rows in zip(*batch.values(), strict=True)]
        tokens = sum(int(sample["attention_mask"].sum()) for sample in samples)

        def see(rows: Rows) -> None:
            totals[rows.layer] += distance(rows).cpu()

        with attention_rows(model, see):
            for _ in visits(model, replace(run, batches=samples), self.name, edits=False):
                pass                                      # going on to the next block runs this one
        return [total / tokens for total in totals]
