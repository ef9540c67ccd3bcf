"""Vertical and slash lines: keys that the last queries read, and distances at which they read.

    P = softmax of the last `queries` rows      vertical[j] = sum_i P[i, j]      slash[o] = sum_i P[i, i - o]
    the tile of rows i reads the `vertical` best keys, and those at the `slash` best distances from any of its rows

Jiang et al., 2024 (MInference, arXiv:2407.02490). The first `always` keys and the nearest `always` distances count as
best; of its own tile a row reads all that is not after it. An estimate from the end of the prompt: what only earlier
queries need is lost. With `density`, numbers of each head are searched for offline (search.py). Left out: the other two
patterns, which the published search turns into this one in the end.
"""
from typing import ClassVar

import torch
from llmopt_kernels import NONE, Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import pad

from llmopt.attention.base import State
from llmopt.attention.by_head import ByHead
from llmopt.parts import register


@register("attention.vertical_slash")
@dataclass(frozen=True)
class VerticalSlash(ByHead):
    """Costs `queries` rows of attention."""

    tries: ClassVar = False
    tried: ClassVar = {"vertical": (1 / 128, 1 / 32, 1 / 10, 1 / 4, 5 / 8),
                       "slash": (0, 1 / 512, 1 / 128, 1 / 32, 1 / 10, 1 / 4)}         # besides those always read

    vertical: int = Field(1000, ge=1, description="keys that every row reads")
    slash: int = Field(800, ge=1, description="distances at which every tile of rows reads")
    queries: int = Field(64, ge=1, description="last queries that the estimate looks at")
    always: int = Field(30, ge=0, description="first keys, and nearest distances, that are always read")
    tile: int = Field(64, ge=1, description="rows that share a list")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        vertical, slash = self.lines(q, k, state)                                             # [H, S] each
        distances = best(slash, self._count("slash", k.shape[1], state))
        begins = torch.arange(0, q.shape[1], self.tile, device=q.device) + state.offset
        near = min(self.always, int((distances != NONE).sum(1).min()))        # distances that all heads have
        far = distances.masked_fill(distances < near, NONE)
        return Stripes(0, start=(begins - max(0, near - 1)).clamp(min=0), tile=self.tile,
                       verticals=best(vertical, self._count("vertical", k.shape[1], state)),
                       diagonals=far if bool((far != NONE).any()) else None)

    def _count(self, name: str, total: int, state: State) -> Tensor:
        """How many lines each head reads, int64 [H] or [1], those that are always read among them."""
        counts = self.number(name, total, state)
        return counts.clamp(min=self.always) if self.found(name, state) is None else counts + self.always

    def lines(self, q: Tensor, k: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """What the last queries read: by key, and by distance, [H, S] both."""
        total = k.shape[1]
        weights = last_weights(q, k, state, self.queries)                                     # [H, R, S]
        vertical, slash = weights.sum(1), along_diagonals(weights)
        first = torch.arange(self.always, 0, -1, device=k.device) + self.queries          # more than any sum, in order
        vertical[:, :max(0, self.always - state.dropped)] = first[state.dropped:][:total]
        slash = slash[:, :total]
        slash[:, :self.always] = first[:total]
        return vertical, slash


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """The places of so many of the largest scores of each head [H, S], NONE as filler; counts [H], or [1] for all."""
    counts = counts.to(scores.device).clamp(max=scores.shape[1])
    found = scores.topk(int(counts.max())).indices
    return found.masked_fill(torch.arange(found.shape[1], device=found.device) >= counts[:, None], NONE)


def last_weights(q: Tensor, k: Tensor, state: State, count: int) -> Tensor:
    """Attention of the last `count` queries, [H, R, S] float32."""
    last = q[:, -count:]
    rows = torch.arange(k.shape[1] - last.shape[1], k.shape[1], device=k.device)
    seen = state.rule.visible(rows, torch.arange(k.shape[1], device=k.device))
    logits = state.rule.logits(last.unflatten(0, (len(k), -1)), k.unsqueeze(1)).flatten(0, 1)
    return logits.masked_fill_(~seen, -torch.inf).softmax(-1)


def along_diagonals(weights: Tensor) -> Tensor:
    """[H, R, S], rows the last R of S tokens -> [H, S]: the sum of each distance between query and key.

    Row by row what stands at a distance moves by one place, which a view with one more place to a row undoes.
    """
    heads, rows, total = weights.shape
    wide = pad(weights, (rows, 0))
    return wide.as_strided((heads, rows, total), (rows * (rows + total), rows + total + 1, 1), 1).sum(1).flip(-1)
