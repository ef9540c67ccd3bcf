"""Attention span: how far back a head looks, the cheapest split into local and global heads.

    d(l, h) = mean_t sum_s A[t, s] (t - s)

over the real tokens t of the calibration data, A the attention map of head h in layer l. Small: a head that streams
along with the text; large: one that reaches back, which suffers from eviction. One forward pass, no gradients.

From the preplan-and-anchor study of attention (arXiv:2510.13554), which splits heads at the lowest and the highest
30 %. Left out: its WAAD and FAI signals per token.
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmopt.blocks import blocks
from llmopt.heads.base import Batch, HeadScore
from llmopt.heads.rows import Rows, attention_rows
from llmopt.method import register


def distance(rows: Rows, real: Tensor) -> Tensor:         # real: [B, T] -> [H]
    """Sum over the real queries of the mean attended distance."""
    center = rows.weights @ rows.keys.float()             # [B, H, t]: mean attended position
    spans = (rows.queries - center) * real[:, None, rows.queries]
    return spans.sum(dim=(0, 2))


@register("heads.span")
@dataclass(frozen=True)
class Span(HeadScore):
    """Mean attended distance in tokens; one sample at a time, a tile of one layer's map in memory."""

    mean_over: ClassVar = "tokens"

    @torch.no_grad()
    def score(self, model: nn.Module, batches: list[Batch]) -> list[Tensor]:
        totals = [torch.zeros(block.heads, dtype=torch.float64) for block in blocks(model)]
        tokens, real = 0, torch.ones(1, 1, device=model.device)

        def see(rows: Rows) -> None:
            totals[rows.layer] += distance(rows, real).cpu()

        with attention_rows(model, see):
            for batch in batches:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    real = mask[None].to(model.device)
                    model.get_decoder()(input_ids=ids[None].to(model.device), attention_mask=real, use_cache=False)
                    tokens += int(mask.sum())
        return [total / tokens for total in totals]
