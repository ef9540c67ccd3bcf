"""Wanda: what leaves are the units, or single weights, that are smallest times the size of what they multiply.

    score(unit) = mean over its columns j, and over rows i, of |W_ij| ||X_j||      W, X: weight and inputs of the writer
    units: [weights]:  |W_ij| ||X_j||, compared within a row, as many of each going; with `pattern` within M inputs

||X_j|| is the norm of input j over the tokens of the calibration data. Single weights: Sun et al., 2023
(arXiv:2306.11695), who leave the others as they are (`refit: false`); whole units: An et al., 2023 (arXiv:2312.11983),
"Wanda-sp". Left out: the paper's variant with a threshold for each row.
"""
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.parts import register
from llmopt.prune.inputs import ByInputs
from llmopt.prune.sparse import Gone, Sparse


class Squares:
    """The sum of x_j^2 over tokens, [in] float64."""

    def __init__(self):
        self.tokens, self.sum = 0, None

    def add(self, x: Tensor) -> None:
        """Take in `x` [N, in]."""
        found = x.double().square_().sum(0)
        self.tokens, self.sum = self.tokens + len(x), found if self.sum is None else self.sum + found


@register("prune.wanda")
@dataclass(frozen=True)
class Wanda(Sparse, ByInputs):
    """One pass over the calibration data."""

    looks: ClassVar[Literal["squares"]] = "squares"

    def watch(self) -> Squares:
        return Squares()

    def rate(self, weight: Tensor, seen: Squares, index: Tensor) -> Tensor:
        return mean_size(weight, seen.sum.sqrt(), index)

    def zeroed(self, weight: Tensor, seen: Tensor, gone: Gone) -> tuple[Tensor, Tensor]:
        out = gone.of_rows(weight.abs() * seen.sqrt().float())
        return weight.masked_fill(out, 0), out


def mean_size(weight: Tensor, norms: Tensor, index: Tensor) -> Tensor:
    """The mean of |W_ij| ||X_j|| over the columns of each unit, index [units, n]; weight [out, in], norms [in]."""
    return (weight.abs().mean(0) * norms)[index].mean(1)
