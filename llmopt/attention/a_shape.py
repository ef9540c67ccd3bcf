"""A-shape: every token reads the first tokens and its own neighbourhood.

    j is read by i  <=>  j < sinks  or  i - j < window          window: with `heads`, that of a head is share_h * window

Jiang et al., 2024 (MInference, arXiv:2407.02490), whose static pattern has 100 and 800. Exact, and blind to the
content: the control that every other method has to beat. With `density`, windows of each head are searched for offline.
"""
from typing import ClassVar

import torch
from llmopt_kernels import Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import State
from llmopt.attention.by_head import ByHead
from llmopt.errors import FieldError
from llmopt.parts import register

EVEN = torch.ones(1, dtype=torch.float64)
LARGEST = 1 << 62           # of a window, which is more than any text has


@register("attention.a_shape")
@dataclass(frozen=True)
class AShape(ByHead):
    """Attention sinks and a local band."""

    tried: ClassVar = {"window": (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)}

    sinks: int = Field(100, ge=0, description="first tokens that every token reads")
    window: int = Field(800, ge=1, description="tokens before each one that it reads, itself included")
    ratio: float | None = Field(None, ge=0, lt=1, description="share of the causal pairs to skip; decides the window")

    def check(self) -> None:
        super().check()
        if self.density is not None and self.ratio is not None:
            raise FieldError("density", self.density, "no ratio beside it: both say how much is read")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        held, total = state.record.meta.get("shares"), state.dropped + k.shape[1]
        if "numbers" in state.record.meta:
            return Stripes(self.sinks, self.number("window", total, state).clamp(min=1).to(q.device))
        if held is None:
            return Stripes(self.sinks, self._window(total, EVEN))
        every = torch.tensor([share for row in held for share in row], dtype=torch.float64)
        return Stripes(self.sinks, windows(self._window(total, every), self.shares(state)).to(q.device))

    def _window(self, length: int, shares: Tensor) -> int:
        return self.window if self.ratio is None else window_for(length, self.sinks, 1 - self.ratio, shares)


def windows(window: int, shares: Tensor) -> Tensor:
    """int64 [H], those of heads of these shares."""
    return (float(window) * shares).round().clamp(1, LARGEST).long()


def a_shape_pairs(length: int, sinks: int, window: Tensor | int) -> Tensor:
    """Pairs that the pattern computes in a prompt of `length` tokens, for each window [N]."""
    full = (sinks + torch.as_tensor(window)).clamp(max=length)       # these rows read everything before them
    return full * (full + 1) // 2 + (length - full) * (sinks + window)


def window_for(length: int, sinks: int, density: float, shares: Tensor = EVEN) -> int:
    """The smallest window >= 1 that computes at least `density` of the causal pairs, as a mean over heads."""
    wanted = density * length * (length + 1) / 2
    low, high = 1, max(1, int(min(LARGEST, length / float(shares[shares > 0].min()))))
    while low < high:
        middle = (low + high) // 2
        enough = a_shape_pairs(length, sinks, windows(middle, shares)).double().mean() >= wanted
        low, high = (low, middle) if bool(enough) else (middle + 1, high)
    return low
