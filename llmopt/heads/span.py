"""Attention span: how far back a head looks, the cheapest split into local and global heads.

    d(l, h) = mean_t sum_{s not in S} A[t, s] (t - s)

over the real tokens t of the calibration data, A the attention map of head h in layer l and S its attention sinks:
tokens that draw attention because a head must put it somewhere, not because it reads them. The first token always is
one; a later token is one where it draws, on average over at least 16 later tokens, more than .1 of the attention and
more than 5 times what even attention would give it. What a head puts on sinks counts as distance 0, so that a head
that reads nothing else has a span near 0; it is reported beside the span as `sink_mass`. Small: a head that streams
along with the text or rests on a sink; large: one that reaches back, which suffers from eviction. One forward pass,
no gradients, block by block.

From the preplan-and-anchor study of attention (arXiv:2510.13554), which splits heads at the lowest and the highest
30 % and does not treat sinks: on SmolLM2-135M its distance ranks heads by what they put on token 0 (rank correlation
.74). The rule for later sinks: ACT (arXiv:2406.15765), made relative to even attention. Left out: WAAD and FAI, the
study's signals per token.
"""
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import pad

from llmopt.calibration.walk import visits
from llmopt.heads.base import HeadScore, single_rows
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.parts import register
from llmopt.runtime.attention_rows import Rows, attention_rows

DRAWS, TIMES, QUERIES = 0.1, 5, 16      # of a sink: mean attention, that over even attention, queries that see it


def sinks(mass: Tensor, real: Tensor) -> Tensor:      # [H, T], bool [T] -> bool [H, T]
    """The attention sinks of each head; mass: the attention that each key drew from the real queries together."""
    place = real.cumsum(0) - 1                                                   # [T] real tokens in front
    later = real.sum() - place                                                   # queries that see this key
    even = (real / (place + 1).clamp(min=1)).flip(0).cumsum(0).flip(0)           # what even attention would give it
    drawn = (mass > DRAWS * later) & (mass > TIMES * even) & (later >= QUERIES)
    return (drawn | (place == 0)) & real


class Columns:
    """One attention map summed over its real queries, as tiles of its rows come in."""

    def __init__(self, heads: int):
        self.sums = torch.zeros(2, heads, 0, dtype=torch.float64)       # per key: sum_t A[t, s], sum_t A[t, s] (t - s)
        self.real = torch.zeros(0, dtype=torch.bool)                    # [T]

    def add(self, rows: Rows) -> None:
        """Take in the next rows of the map of one sample."""
        weights = rows.weights[0] * rows.real[0][:, None]                                # [H, t, S]
        apart = rows.queries[:, None] - rows.keys                                        # [t, S]
        fresh = torch.stack([weights.sum(1), (weights * apart).sum(1)]).cpu()            # [2, H, S]
        self.sums = pad(self.sums, (0, int(rows.queries[-1]) + 1 - self.sums.shape[2]))
        self.sums[:, :, rows.keys[0]:] += fresh
        self.real = torch.cat([self.real, rows.real[0].bool().cpu()])

    def totals(self) -> Tensor:                           # [2, H]
        """(distance, attention on sinks) of each head, summed over the real queries."""
        mass, reach = self.sums
        at_sinks = sinks(mass, self.real)
        return torch.stack([reach.masked_fill(at_sinks, 0).sum(1), mass.masked_fill(~at_sinks, 0).sum(1)])


@register("heads.span")
@dataclass(frozen=True)
class Span(HeadScore):
    """Mean attended distance in tokens, attention sinks left out; one sample at a time, a tile of a map in memory."""

    needs_whole: ClassVar[bool] = False
    mean_over: ClassVar = "tokens"
    beside: ClassVar = ("sink_mass",)
    unit: ClassVar = "mean attended distance in tokens"

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        """{"scores", "sink_mass"}: L tensors [H_l] each, distance in tokens and share of the attention."""
        totals = [torch.zeros(2, block.heads, dtype=torch.float64) for block in blocks(model)]
        samples = single_rows(run.batches)
        tokens = sum(int(sample["attention_mask"].sum()) for sample in samples)
        maps: dict[int, Columns] = {}                     # of each layer, the sample that it read last

        def see(rows: Rows) -> None:
            if rows.queries[0] == 0:
                finish(rows.layer)
                maps[rows.layer] = Columns(rows.weights.shape[1])
            maps[rows.layer].add(rows)

        def finish(layer: int) -> None:
            if layer in maps:
                totals[layer] += maps.pop(layer).totals()

        with attention_rows(model, see):
            for _ in visits(model, replace(run, batches=samples), self.name, edits=False):
                pass                                      # going on to the next block runs this one
        for layer in list(maps):
            finish(layer)
        return {"scores": [total[0] / tokens for total in totals], "sink_mass": [total[1] / tokens for total in totals]}
