"""Criteria of what the writers of a block read: a unit counts by what it adds to the residual stream.

A unit (an FFN channel, the heads of a KV group) ends in columns of a writer, down_proj or o_proj; what stands in these
columns and what they read on the calibration data is all that such a criterion looks at. All units are compared on the
dense model, before anything leaves. Left out: inputs as the cut blocks in front make them (the refit sees those),
single weights, and 2 of 4.
"""
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.errors import LlmoptError
from llmopt.model.blocks import Block
from llmopt.prune.base import ByBlock, Scores
from llmopt.prune.groups import members


@dataclass(frozen=True)
class ByInputs(ByBlock):
    """A method writes `watch` and `rate`."""

    uses_inputs: ClassVar[bool] = True
    whole_parts: ClassVar[bool] = False

    @abstractmethod
    def watch(self) -> Any:
        """Something with `add(x [N, in])`, which takes in what a writer reads, batch by batch."""

    @abstractmethod
    def rate(self, weight: Tensor, seen: Any, index: Tensor) -> Tensor:
        """[units], larger stays longer. weight: the writer's [out, in] float32; index [units, n]: columns of a unit."""

    def score(self, block: Block, visit: Visit | None) -> Scores:
        ends = {unit: found[-1] for unit in self.units if (found := members(block, unit))}
        seen = {end.projection.name: self.watch() for end in ends.values()}
        readers: dict[str, Callable[[Tensor], None]] = {name: one.add for name, one in seen.items()}
        visit.observe(readers)
        return {unit: self._rated(end.projection, seen[end.projection.name], end.index) for unit, end in ends.items()}

    def _rated(self, writer: Any, seen: Any, index: Tensor) -> Tensor:
        if not seen.tokens:
            raise LlmoptError(f"{writer.name}: no calibration token reached it")
        found = self.rate(writer.weight.float(), seen, index)
        if not bool(found.isfinite().all()):
            raise LlmoptError(f"{writer.name}: its units cannot be compared, as what it reads on the calibration data "
                              "is not finite")
        return found.float()
