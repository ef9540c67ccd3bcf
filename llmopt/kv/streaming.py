"""StreamingLLM: keep the first tokens and the newest ones.

    score_j = j

Xiao et al., 2023 (arXiv:2309.17453). Left out: the paper renumbers the kept tokens so that text can go on for ever;
here keys keep their original positions.
"""
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.streaming")
@dataclass(frozen=True)
class Streaming(Scorer):
    """Attention sinks and a sliding window."""

    sinks: int = Field(4, ge=0, description="first tokens, always kept")

    def score(self, kv: LayerKV) -> Tensor:                  # [B, G, T]
        return kv.positions.float()
