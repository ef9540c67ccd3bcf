"""The family base of transforms: the walk over the blocks, what belongs to no block, the record."""
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.calibration.walk import Visit, each, outside, visits
from llmopt.method import Method, Record, Run
from llmopt.model.blocks import Block, blocks
from llmopt.model.outside import Outside

Figures = dict[str, Any]


@dataclass(frozen=True)
class Transform(Method):
    """An edit that leaves the model's logits as they are. The author writes `block`, `outside`, or both.

    `Block.links()` and `Outside.links()` name what feeds what; the steps to come are `run.ahead`.
    """

    stage: ClassVar = "transform"
    uses_inputs: ClassVar[bool] = False       # True: `block` gets the calibration data's visit of the block

    @property
    def needs_data(self) -> bool:
        return self.uses_inputs

    def refuse(self, model: nn.Module) -> None:
        """Raise LlmoptError if this architecture does not allow the edit."""

    def block(self, block: Block, visit: Visit | None, run: Run) -> Figures:
        """Edit one block; figures for the record, plain JSON data."""
        return {}

    def outside(self, rest: Outside) -> None:
        """Edit embeddings, final norm and head, without a look at their values: a forecast does it to shapes alone."""

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        self.refuse(skeleton)
        before = skeleton.num_parameters()
        self.outside(Outside(skeleton))
        more = skeleton.num_parameters() - before
        return "changes no output" + (f", gives the head {more:,} weights of its own" if more else "")

    @torch.no_grad()
    def apply(self, model: nn.Module, run: Run) -> Record:
        self.refuse(model)
        before, figures = model.num_parameters(), self._blocks(model, run)
        self._rest(model, run)
        return Record(meta={"parameters": [before, model.num_parameters()], "blocks": figures})

    def _blocks(self, model: nn.Module, run: Run) -> list[Figures]:
        """The figures of all blocks; those of blocks that a run which was cut off had done are in its journal."""
        found: dict[int, Figures] = {}
        stops = visits(model, run, self.name) if self.uses_inputs else each(model, run, self.name)
        for stop in stops:
            block, visit = (stop.block, stop) if self.uses_inputs else (stop, None)
            figures = self.block(block, visit, run)             # before it is known to be done: it is done each time
            found[block.index] = run.memory.remember(f"block {block.index}", lambda known=figures: known)
        return [found[block.index] if block.index in found else run.memory.remember(f"block {block.index}", dict)
                for block in blocks(model)]

    def _rest(self, model: nn.Module, run: Run) -> None:
        for rest in outside(model, run):
            self.outside(rest)
