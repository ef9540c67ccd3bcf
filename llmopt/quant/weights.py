"""Quantization by any solver: `quant.weights: {bits: 3, solver: {gptq: {damping: 0.05}}}`.

The step says which weights, how many bits and what groups, the solver which codes. quant.rtn and quant.gptq are this
step with a solver of their own, whose fields stand among theirs.
"""
from pydantic import Field
from pydantic.dataclasses import dataclass

from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.rtn import Nearest
from llmopt.quant.solver import Solver


@register("quant.weights")
@dataclass(frozen=True)
class Weights(Quantizer):
    """Integer weights, their codes chosen by the solver that the recipe names."""

    solver: Solver = Field(Nearest(), description="who chooses the codes")
