"""Criteria of the loss's slopes: a unit counts by what a gate on it would do to the loss.

    a(t) = sum over the unit's columns j of  x_j(t) dL/dx_j(t)          x: what the writer reads at token t

is token t's part of dL/dgate, where a gate, 1, multiplies what the unit hands to its writer (down_proj, o_proj). It is
exactly sum w dL/dw over the unit's columns of the writer, without a gradient of any weight. The readers' rows are left
out: by the chain rule they would count the same slope again (rows of up and v exactly). L is the sum over the samples
of the mean next-token loss; all units are compared on the dense model. A method says what becomes of a:

    score(unit) = mean over all s of measure( sum over t in s of a(t) )         s: a token, a sequence or a batch
"""
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.backward import backward
from llmopt.method import Run
from llmopt.model.blocks import Projection, blocks
from llmopt.prune.base import Criterion, Scores
from llmopt.prune.groups import members

Over = Literal["token", "sequence", "batch"]


@dataclass(frozen=True)
class ByGates(Criterion):
    """A method writes `measure`."""

    uses_inputs: ClassVar[bool] = True
    whole_parts: ClassVar[bool] = False

    over: Over = Field("sequence", description="what a slope is summed over before it is measured")

    def backward(self, rows: int, length: int) -> int:
        return max(rows * length, super().backward(rows, length))

    @abstractmethod
    def measure(self, slopes: Tensor) -> Tensor:
        """What slopes dL/dgate [N, units] are worth: [N, units], not negative."""

    def rate_all(self, model: nn.Module, run: Run) -> list[Scores]:
        ends = [{unit: found[-1] for unit in self.units if (found := members(block, unit))} for block in blocks(model)]
        worth = [{unit: torch.zeros(len(end.index), dtype=torch.float64) for unit, end in there.items()}
                 for there in ends]
        known = {end.projection.name: (end.index, worth[block][unit])
                 for block, there in enumerate(ends) for unit, end in there.items()}

        def see(writer: Projection, x: Tensor, slope: Tensor) -> None:
            index, total = known[writer.name]
            total += self.measure(self._summed((x * slope)[..., index.to(x.device)].sum(-1)).double()).sum(0).cpu()

        backward(model, run, self.name, lambda block: [end.projection for end in ends[block.index].values()], see)
        count = sum(run.ranks.gather(self._count(run.own_batches)))
        return [{unit: run.ranks.sum_(total) / count for unit, total in there.items()} for there in worth]

    def _summed(self, slopes: Tensor) -> Tensor:                        # [B, T, units] -> [N, units]
        if self.over == "token":
            return slopes.flatten(0, 1)
        return slopes.sum(1) if self.over == "sequence" else slopes.sum((0, 1))[None]

    def _count(self, batches: list[dict[str, Tensor]]) -> int:
        """How many slopes there are of each unit."""
        if self.over == "token":
            return sum(int(batch["attention_mask"].sum()) for batch in batches)
        return sum(len(batch["input_ids"]) for batch in batches) if self.over == "sequence" else len(batches)
