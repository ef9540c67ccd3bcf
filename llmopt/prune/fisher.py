"""Fisher pruning: the units leave whose slopes, squared, are smallest.

    score(unit) = mean over sequences s of  ( dL(s) / dgate )^2        half of it: the loss's rise when the gate closes,
                                                                       by its curvature, for a model that is trained

dL/dgate: see gates.py. Of a trained model the slopes themselves cancel out over its data, and their squares are the
curvature (the empirical Fisher): it takes many sequences, 128 or so, to know them. Theis et al., 2018
(arXiv:1801.05787), Molchanov et al., 2019 (arXiv:1906.10771). `over: batch` squares after summing over a batch, as NViT
and others do with the gradients of a training step; `token` before summing over anything. Left out: tokens drawn from
the model's own predictions, and what two units do together.
"""
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.parts import register
from llmopt.prune.gates import ByGates


@register("prune.fisher")
@dataclass(frozen=True)
class Fisher(ByGates):
    """A forward and a backward pass over the calibration data."""

    def measure(self, slopes: Tensor) -> Tensor:
        return slopes.square()
