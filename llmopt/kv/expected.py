"""Expected attention: keep what queries to come will look at, if they are like those of the prompt.

    mu, S = mean and covariance of the queries before RoPE; R = mean rotation of the next `ahead` positions
    s_j = mean over the group of softmax_j(c k_j . R mu + c^2/2 k_j^T R S R^T k_j) * |v_j|          c: the layer's scale

Devoto et al., 2025 (arXiv:2510.00636): the mean of exp(logit) over a normal distribution of queries. The softmax is
over all but the first `sinks` tokens, which stay in any case: they draw most of the attention of some query heads,
whose wishes would hardly count. Nothing left out; a softcap on logits is not taken into account.
"""
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.expected")
@dataclass(frozen=True)
class Expected(Scorer):
    """What queries of the prompt's kind will look at; no map of attention is computed."""

    turns: ClassVar = True

    sinks: int = Field(4, ge=0, description="first tokens, always kept; their queries do not count")
    ahead: int = Field(512, ge=1, le=100_000, description="positions to come over which the rotation is averaged")

    def queries(self) -> None:
        return None

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        first = kv.positions < self.sinks
        scores = expected_attention(kv, self.sinks, self.ahead, kv.holes | first)
        return scores.masked_fill(first, float(scores.max()))


def expected_attention(kv: LayerKV, sinks: int, ahead: int, without: Tensor) -> Tensor:
    """The scores of the formula above, the queries of the first `sinks` tokens left out: [1, G, T].

    without: bool [1, G, T], entries that draw nothing.
    """
    queries = kv.unrotated_queries()[0].float()                                          # [H, W, D]
    later = kv.query_positions[0] >= sinks
    queries = queries[:, later] if bool(later.any()) else queries
    mean = queries.mean(1)                                                               # [H, D]
    apart = queries - mean[:, None]
    spread = apart.mT @ apart / apart.shape[1]                                           # [H, D, D]
    turn = kv.mean_rotation(ahead)                                                       # [D, D], rows R e_i
    mean, spread = mean @ turn, turn.mT @ spread @ turn
    keys, scale = kv.keys[0].float(), kv.rule.scaling                                    # [G, T, D]
    mean, spread = (x.unflatten(0, (len(keys), -1)) for x in (mean, spread))             # [G, g, D], [G, g, D, D]
    level = torch.einsum("gtd,ghd->ght", keys, mean) * scale
    bend = torch.einsum("gtd,ghde,gte->ght", keys, spread, keys) * scale ** 2 / 2
    logits = (level + bend).masked_fill(without[0][:, None], -torch.inf)
    shares = logits.softmax(-1).masked_fill(without.all(-1)[0, :, None, None], 0.0)
    return (shares.mean(1) * kv.values[0].float().norm(dim=-1))[None]
