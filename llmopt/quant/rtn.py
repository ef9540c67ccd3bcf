"""RTN: round every weight to the nearest point of its group's grid.

    code = clamp(round(w / s)),  value = s * code          (grids and the search for s: grid.py)

No data, no correction of one weight's error by the others: the baseline of all quantizers, and the fallback of GPTQ.
"""
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.inputs import Moments
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.solver import Solver


@register("rtn")
@dataclass(frozen=True)
class Nearest(Solver):
    """Round to nearest, without data."""

    rowwise: ClassVar[bool] = True

    def quantize(self, weight: Tensor, moments: Moments | None, spec: Spec) -> Quantized:
        return round_to_nearest(weight, spec)


@register("quant.rtn")
@dataclass(frozen=True)
class RTN(Nearest, Quantizer):
    """Round to nearest, without data."""

    kind = "method"
