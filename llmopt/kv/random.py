"""Entries drawn at random: what a choice without any reason costs.

    s_j = a number in [0, 1) mixed from seed, layer, head and position

An entry has the same number in every turn, so what stays is a fair sample of the whole text. The mixer is SplitMix64's
(Steele, Lea and Flood, 2014). Nothing left out.
"""
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register
from llmopt.runtime.lots import lots, mixed


@register("kv.random")
@dataclass(frozen=True)
class Random(Scorer):
    """A control: entries drawn by lot, alike for a text alone and in a batch."""

    seed: int = Field(0, ge=0, lt=2 ** 31, description="another seed keeps others")

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        heads = torch.arange(kv.keys.shape[1], device=kv.keys.device)[:, None]
        first = mixed(mixed(heads + (kv.layer << 32)) + self.seed)                       # [G, 1]
        return lots(first + kv.positions.long())
