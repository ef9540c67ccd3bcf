"""FLAP: the units leave that fluctuate least, as what is constant can be given to a bias.

    score(unit) = mean over its columns j of  Var(X_j) ||W_j||^2          W, X: weight and inputs of the writer

An et al., 2023 (arXiv:2312.11983), "WIFV". What the units wrote on average goes, by `refit`, into the columns that
stay, and into the writer's bias, where it has one. Left out: new biases, as no plain reader of the checkpoint would
know them; the paper's own comparison between layers.
"""
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.parts import register
from llmopt.prune.inputs import ByInputs


class Spread:
    """Mean and variance of x_j over tokens [in], float64, by Chan's sums: no difference of large numbers."""

    def __init__(self):
        self.tokens, self.mean, self.apart = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Take in `x` [N, in]."""
        if not len(x):
            return
        x, before = x.double(), self.tokens
        mean = x.mean(0)
        self.tokens += len(x)
        step = mean - self.mean
        self.apart = self.apart + (x - mean).square_().sum(0) + step.square() * (before * len(x) / self.tokens)
        self.mean = self.mean + step * (len(x) / self.tokens)

    @property
    def variance(self) -> Tensor:
        return self.apart / self.tokens


@register("prune.flap")
@dataclass(frozen=True)
class FLAP(ByInputs):
    """One pass over the calibration data."""

    def watch(self) -> Spread:
        return Spread()

    def rate(self, weight: Tensor, seen: Spread, index: Tensor) -> Tensor:
        return (seen.variance * weight.square().sum(0))[index].mean(1)
