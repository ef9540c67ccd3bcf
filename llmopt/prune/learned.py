"""Parameters of a model as functions of numbers that have gradients: whole, or with a product of low rank on top.

Weights that are exactly 0 stay 0: single weights that pruning has taken.
"""
import math

import torch
from torch import Tensor, nn

from llmopt.model.blocks import Projection


class Whole:
    """A parameter that is learned as it is, in float32."""

    def __init__(self, key: str, parameter: nn.Parameter):
        self.key, self.parameter = key, parameter
        self.number = parameter.detach().float().clone()
        self.zeros = zeros_of(self.number) if parameter.dim() > 1 else None

    @property
    def numbers(self) -> list[Tensor]:
        return [self.number]

    def begin(self, number: Tensor) -> None:
        """Learn from another value on."""
        self.number.copy_(number)

    def value(self) -> Tensor:
        """What stands in the place of the parameter."""
        return cleared(self.number, self.zeros).to(self.parameter.dtype)


class LowRank:
    """W + B A, B of zeros [out, rank], A of uniform numbers [rank, in] as large as fit that many inputs."""

    def __init__(self, projection: Projection, rank: int, drawing: torch.Generator):
        weight = projection.weight
        self.key, self.parameter = projection.key, getattr(projection.module, projection.parameter)
        self.weight, self.transposed, self.zeros = weight, projection.transposed, zeros_of(weight)
        self.up, self.down = factors(weight, rank, drawing)

    @property
    def numbers(self) -> list[Tensor]:
        return [self.up, self.down]

    def begin(self, weight: Tensor) -> None:                                        # [out, in]
        """Learn from another weight on."""
        self.weight = weight

    def value(self) -> Tensor:
        """What stands in the place of the parameter."""
        return self.placed(self.weight.float() + self.up @ self.down)

    def placed(self, weight: Tensor) -> Tensor:                                     # [out, in]
        """A weight as the module stores it."""
        weight = cleared(weight, self.zeros)
        return (weight.T if self.transposed else weight).to(self.parameter.dtype)


Learned = Whole | LowRank


def zeros_of(weight: Tensor) -> Tensor | None:
    """Where a weight is 0; None if nowhere."""
    found = weight == 0
    return found if bool(found.any()) else None


def cleared(weight: Tensor, zeros: Tensor | None) -> Tensor:
    """The weight with 0 at these places."""
    return weight if zeros is None else weight.masked_fill(zeros, 0)


def factors(weight: Tensor, rank: int, drawing: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B [out, rank], A [rank, in]) for a weight [out, in]; their product is 0."""
    out, width = weight.shape
    drawn = torch.rand(rank, width, generator=drawing) * 2 - 1
    return torch.zeros(out, rank, device=weight.device), (drawn / math.sqrt(width)).to(weight.device)
