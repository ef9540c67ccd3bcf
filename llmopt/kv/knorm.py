"""Knorm: keep entries with small keys, which draw the most attention in many models.

    s_j = -|k_j|

Devoto et al., 2024 (arXiv:2406.11430). Left out: the paper leaves the first layers as they are.
"""
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV, coarse
from llmopt.parts import register


@register("kv.knorm")
@dataclass(frozen=True)
class Knorm(Scorer):
    """Small keys; no attention is computed."""

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        return -coarse(kv.keys.float().norm(dim=-1))              # keys behind a norm may have one size
