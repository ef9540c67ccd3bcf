"""H2O: keep heavy hitters, the entries that drew the most attention from all queries so far.

    s_j = sum_t mean_{h in group} softmax(q_t k^T / sqrt(D))_j              mean: divided by the queries t that saw j

Zhang et al., 2023 (arXiv:2306.14048). Half of a head's budget goes to its newest entries, half to the heavy hitters
among the rest. An entry carries its sum from turn to turn. The paper drops one entry at every token: `every: 1`.
Nothing left out; with grouped queries the mean over the group decides for its one KV head.
"""
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.h2o")
@dataclass(frozen=True)
class H2O(Scorer):
    """All attention that an entry has received; reads the whole map once more, streamed."""

    recent: float = Field(0.5, ge=0, le=1, description="part of a head's budget for its newest entries")
    mean: bool = Field(False, description="by the number of queries that saw the entry: old ones have no advantage")

    def queries(self) -> None:
        return None

    def ends(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        first, last = super().ends(counts)
        return first, torch.maximum(last, (counts * self.recent).long())

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        mass = received(kv)
        return mass / self._seen_by(kv) if self.mean else mass

    def carry(self, kv: LayerKV, scores: Tensor) -> dict[str, Tensor]:
        return {"mass": scores * self._seen_by(kv) if self.mean else scores}

    def _seen_by(self, kv: LayerKV) -> Tensor:
        """[B, G, T]: queries so far that could look at each entry."""
        count = kv.lengths.to(kv.positions.device)[:, None, None] - kv.positions
        return count if kv.rule.window is None else count.clamp(max=kv.rule.window)


def received(kv: LayerKV) -> Tensor:
    """The attention that each entry has drawn so far, `mass` of it in earlier turns: [B, G, T]."""
    return kv.carried["mass"] + kv.mean_over_group(kv.column_sums())
