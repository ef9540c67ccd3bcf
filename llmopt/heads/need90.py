"""How many tokens a head needs to keep 90 % of its attention: the cheapest guess at the cache that it deserves.

    need(l, h) = mean_t min { k : m_S(t) + (the k largest A[t, s], s not in S, together) >= share }

over the real tokens t of the calibration data; S are the attention sinks of the head, told as in heads.span, and m_S(t)
what they draw. Every cache method keeps the sinks, so they are not counted: a head that rests on one needs nothing.
Two runs of each block's attention, no gradients, block by block.

The count behind top-p sparse attention (Twilight, arXiv:2502.02770; MInference's coverage, arXiv:2407.02490), here a
figure of the head. Left out: thresholds per token or per query at run time.
"""
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.walk import Visit, visits
from llmopt.heads.base import HeadScore, single_rows
from llmopt.heads.span import Columns, sinks
from llmopt.method import Run
from llmopt.parts import register
from llmopt.runtime.attention_rows import Rows

ROUNDING = 1e-6         # of a row of attention weights, which add up to 1


def needed(weights: Tensor, at_sinks: Tensor, share: float) -> Tensor:      # [H, t, S], bool [H, S] -> [H, t]
    """The number of keys that are no sinks with which the sinks and the largest of them hold `share` of each row."""
    free = at_sinks[:, None]
    missing = share - ROUNDING - weights.masked_fill(~free, 0).sum(-1)                                # [H, t]
    held = weights.masked_fill(free, 0).sort(-1, descending=True).values.cumsum(-1)                  # [H, t, S]
    return (held < missing[..., None]).sum(-1) + (missing > 0).long()


@register("heads.need90")
@dataclass(frozen=True)
class Need90(HeadScore):
    """Mean number of tokens that hold 90 % of the attention, attention sinks left out; a tile of a map in memory."""

    needs_whole: ClassVar[bool] = False
    mean_over: ClassVar = "tokens"
    unit: ClassVar = "tokens that hold the share of the attention"

    share: float = Field(0.9, gt=0, lt=1, description="of the attention that they are to hold, with the sinks")

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        alone = replace(run, batches=single_rows(run.batches))
        tokens = sum(int(sample["attention_mask"].sum()) for sample in alone.batches)
        return {"scores": [self._total(visit) / tokens for visit in visits(model, alone, self.name, edits=False)]}

    def _total(self, visit: Visit) -> Tensor:      # [H]
        """The counts of one block, over all real tokens together."""
        total = torch.zeros(visit.block.heads, dtype=torch.float64)
        columns = [Columns(visit.block.heads) for _ in visit.inputs]

        def count(marked: list[Tensor], sample: int, rows: Rows) -> None:
            free = marked[sample][:, rows.keys.cpu()].to(rows.weights.device)
            counts = needed(rows.weights[0], free, self.share) * rows.real[0]
            total.add_(counts.sum(1).double().cpu())

        visit.attention(lambda sample, rows: columns[sample].add(rows))
        visit.attention(partial(count, [sinks(seen.sums[0], seen.real) for seen in columns]))
        return total
