"""Taylor pruning: the units leave that the loss, to first order, would miss least.

    score(unit) = mean over sequences s of  | dL(s) / dgate |  =  mean | L(s) - L(s, the gate closed) | + second order

dL/dgate: see gates.py. Molchanov et al., 2016 (arXiv:1611.06440), take the absolute value of each sample, as here. Ma
et al., LLM-Pruner, 2023 (arXiv:2305.11627, "vectorize"), take it of the sum over all samples, here `over: batch` with
all in one batch: on data that the model predicts well the slopes cancel out, and what is left is mostly noise. Left
out: their sums over single weights (they need the gradient of every weight) and second-order term (prune.fisher).
"""
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.parts import register
from llmopt.prune.gates import ByGates


@register("prune.taylor")
@dataclass(frozen=True)
class Taylor(ByGates):
    """A forward and a backward pass over the calibration data."""

    def measure(self, slopes: Tensor) -> Tensor:
        return slopes.abs()
