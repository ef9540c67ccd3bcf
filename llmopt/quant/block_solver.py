"""Solvers of whole blocks: the codes of single weights first, then all numbers of the block that may move, together.

The walk shows a block with what goes into it behind the edited blocks, and beside it what the unedited block writes in
the dense model's stream. Of several processes each does all of the work, with all rows of the data.
"""
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.quant.gptq import ColumnSweep
from llmopt.quant.grid import Spec
from llmopt.quant.rtn import Nearest
from llmopt.quant.solver import Solver
from llmopt.quant.start import Start, begin
from llmopt.quant.tokens import Alike, TokenWeights
from llmopt.scale.processes import Ranks

Begin = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class BlockSolver(Solver):
    """Starts from the codes of single weights."""

    inputs: ClassVar = "block"
    integers: ClassVar[bool] = True

    start: Begin = Field("gptq", description="whose codes to begin with: those of quant.gptq with its defaults, or the "
                                             "nearest")
    tokens: TokenWeights = Field(Alike(), description="how much each token of the calibration data counts")

    @property
    def dense(self) -> Literal["outputs", "residual"]:
        return "residual" if self.start == "gptq" else "outputs"

    def quantize_block(self, visit: Visit, specs: Mapping[str, Spec],
                       run: Run) -> Iterator[tuple[Projection, Quantized]]:
        alone = replace(run, ranks=Ranks())                             # all rows of the data are here
        first = ColumnSweep(tokens=self.tokens) if self.start == "gptq" else Nearest()
        starts = begin(visit, specs, alone, first)
        if starts:
            yield from self.improve(visit, starts, self.tokens.weights(visit, alone), run)

    @abstractmethod
    def improve(self, visit: Visit, starts: list[Start], weights: list[Tensor] | None,
                run: Run) -> Iterator[tuple[Projection, Quantized]]:
        """The weights with codes at least as good. weights: what each real token counts ([N] for each batch)."""
