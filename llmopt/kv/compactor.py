"""Compactor: keep what its neighbourhood looks at, and keys that stand out, whatever is asked later.

    s_j = z(non-causal attention)_j + blend * z(leverage)_j        z: mean 0, spread 1 over all entries of the layer

Chari and Van Durme, 2025 (arXiv:2507.08143). `blend` is the share that is removed where it is not given: the rule of
the authors' press in kvpress. Differs: entries that are always kept count in mean, spread and scores, and attention has
the layer's scale, which the press leaves out. Left out: the paper's calibration of how much can be removed.
"""
from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.leverage import DIMENSIONS, leverage
from llmopt.kv.noncausal import CHUNK, non_causal
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.compactor")
@dataclass(frozen=True)
class Compactor(Scorer):
    """Attention inside chunks together with leverage scores of the keys; one pass, no question needed."""

    turns: ClassVar = True

    sinks: int = Field(8, ge=0, description="first tokens, always kept")
    window: int = Field(4, ge=0, description="last tokens, always kept")
    chunk: int = Field(CHUNK, ge=2, description="tokens that look at each other")
    dimensions: int = Field(DIMENSIONS, ge=1, description="keys are projected to so many, at most")
    blend: float | None = Field(None, ge=0, description="weight of the leverage scores; null: the share removed")

    def queries(self) -> None:
        return None

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        looked_at = kv.remember("noncausal", non_causal(kv, self.chunk))
        length = int(kv.lengths[0])
        blend = 1 - self.share(length) / length if self.blend is None else self.blend
        return standard(looked_at, kv.holes) + blend * standard(leverage(kv, self.dimensions), kv.holes)

    def carry(self, kv: LayerKV, scores: Tensor) -> dict[str, Tensor]:
        return kv.remembered("noncausal")


def standard(x: Tensor, holes: Tensor) -> Tensor:
    """x [B, G, T] less its mean over all heads and entries, divided by its spread."""
    there = (~holes).sum((1, 2), keepdim=True).clamp(min=1)
    mean = x.masked_fill(holes, 0.0).sum((1, 2), keepdim=True) / there
    spread = (x - mean).masked_fill(holes, 0.0).square().sum((1, 2), keepdim=True) / there
    return (x - mean) / spread.sqrt().clamp(min=1e-6)
