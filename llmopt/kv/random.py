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

STEPS = ((30, 0xBF58476D1CE4E5B9 - 2 ** 64), (27, 0x94D049BB133111EB - 2 ** 64))         # as signed 64-bit integers
STRIDE = 0x9E3779B97F4A7C15 - 2 ** 64


@register("kv.random")
@dataclass(frozen=True)
class Random(Scorer):
    """A control: entries drawn by lot, alike for a text alone and in a batch."""

    seed: int = Field(0, ge=0, lt=2 ** 31, description="another seed keeps others")

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        heads = torch.arange(kv.keys.shape[1], device=kv.keys.device)[:, None]
        first = mixed(mixed(heads + (kv.layer << 32)) + self.seed)                       # [G, 1]
        return (mixed(first + kv.positions.long()) >> 40 & 0xFFFFFF).float() / 2 ** 24


def mixed(x: Tensor) -> Tensor:
    """Int64 numbers, of which any two differ in about half of their bits afterwards."""
    x = (x + 1) * STRIDE
    for bits, factor in STEPS:
        x = (x ^ (x >> bits & (1 << 64 - bits) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)
