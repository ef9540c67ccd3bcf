"""TOVA: keep what the newest token looks at, the same entries in all heads of a layer.

    s_j = mean over all heads of softmax(q_n k^T / sqrt(D))_j,    n the newest token

Oren et al., 2024 (arXiv:2401.06104). The paper drops one entry at every token: `every: 1`. Nothing left out; where
heads hold different entries, one that a head lacks draws nothing there.
"""
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.tova")
@dataclass(frozen=True)
class TOVA(Scorer):
    """One score for a whole layer, by the newest token."""

    window: int = Field(1, ge=1, description="last tokens, always kept")

    def queries(self) -> int:
        return 1

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        votes = kv.mean_over_group(kv.attention(last=1)[:, :, -1]).masked_fill(kv.holes, 0.0)
        places = kv.positions.clamp(min=0).long().flatten(1)
        total = votes.new_zeros(len(votes), int(kv.lengths.max())).scatter_add_(1, places, votes.flatten(1))
        return total.gather(1, places).view_as(votes) / votes.shape[1]
