"""How much each token of the calibration data counts in the second moments: the pieces behind `tokens`."""
from abc import ABC, abstractmethod

from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.parts import Part, register


class TokenWeights(Part, ABC):
    """Weights r_t of the tokens in H = (2 / N) sum_t r_t x_t x_t^T, block by block."""

    kind = "token weight"

    @abstractmethod
    def weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        """[N] for the real tokens of each batch, >= 0; None: all alike.

        The visit shows this process's rows, run.own_batches, alone; the weights of a row may depend on nothing but that
        row and what all processes have, such as run.batches.
        """


@register("alike")
@dataclass(frozen=True)
class Alike(TokenWeights):
    """Every token counts as much as the others."""

    def weights(self, visit: Visit, run: Run) -> list[Tensor] | None:
        return None
