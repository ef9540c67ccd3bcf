"""A-shape: every token reads the first tokens and its own neighbourhood.

    j is read by i  <=>  j < sinks  or  i - j < window

Jiang et al., 2024 (MInference, arXiv:2407.02490), whose static pattern has 100 and 800. Exact, and blind to the
content: the control that every other method has to beat. Left out: the offline choice of a pattern per head.
"""
from llmopt_kernels import Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import Selector, State
from llmopt.parts import register


@register("attention.a_shape")
@dataclass(frozen=True)
class AShape(Selector):
    """Attention sinks and a local band."""

    sinks: int = Field(100, ge=0, description="first tokens that every token reads")
    window: int = Field(800, ge=1, description="tokens before each one that it reads, itself included")
    ratio: float | None = Field(None, ge=0, lt=1, description="share of the causal pairs to skip; decides the window")

    def predict(self, length: int) -> float:
        window = self._window(length)
        return a_shape_pairs(length, self.sinks, window) / a_shape_pairs(length, 0, length)

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        return Stripes(self.sinks, self._window(state.dropped + k.shape[1]))

    def _window(self, length: int) -> int:
        return self.window if self.ratio is None else window_for(length, self.sinks, 1 - self.ratio)


def a_shape_pairs(length: int, sinks: int, window: int) -> int:
    """Pairs that the pattern computes in a prompt of `length` tokens."""
    full = min(length, sinks + window)              # these rows read everything before them
    return full * (full + 1) // 2 + (length - full) * (sinks + window)


def window_for(length: int, sinks: int, density: float) -> int:
    """The smallest window >= 1 that computes at least `density` of the causal pairs."""
    wanted = density * length * (length + 1) / 2
    low, high = 1, max(1, length)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if a_shape_pairs(length, sinks, middle) >= wanted else (middle + 1, high)
    return low
