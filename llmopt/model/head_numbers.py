"""Which heads of the model that was opened are left, once pruning has taken some."""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadNumbers:
    """before: query heads of each layer as the model was opened. left: of each present layer the numbers of its heads.

    Numbers [H_l] count through all layers of the opened model.
    """

    before: tuple[int, ...]
    left: list[Tensor]

    @classmethod
    def of(cls, counts: Iterable[int]) -> "HeadNumbers":
        """All heads, of a model with so many in each layer."""
        counts = tuple(counts)
        return cls(counts, list(torch.arange(sum(counts)).split(list(counts))))

    def select(self, rows: list[Tensor]) -> list[Tensor]:
        """Of one value for each head of the opened model, [H_l] for each layer, those of the heads that are left."""
        values = torch.cat(rows)
        return [values[numbers] for numbers in self.left]
