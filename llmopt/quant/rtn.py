"""RTN: round every weight to the nearest point of its group's grid.

    code = clamp(round(w / s)),  value = s * code          (grids: grid.py)

The scale s of a group of columns, by `clip` and `search`:

    clip: false                         its whole range
    clip: true                          the least sum |value - w|^2.4 over shrunken ranges (grid.py)
    clip: true, search: outputs         the least sum_t ((value - w) x_t)^2 of what its columns read (search.py)

The last is the search for clipped ranges of AWQ (Lin et al., arXiv:2306.00978), which spares the query and the key
projections; here they take part. No correction of one weight's error by the others: the baseline of all quantizers, and
the fallback of GPTQ. Without `search: outputs` no data is read.
"""
from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.inputs import Moments
from llmopt.errors import FieldError
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.grid import Spec, nearest
from llmopt.quant.search import fit_to, hessian_of
from llmopt.quant.solver import Solver


@register("rtn")
@dataclass(frozen=True)
class Nearest(Solver):
    """Round to nearest."""

    rowwise: ClassVar[bool] = True

    search: Literal["weights", "outputs"] = Field("weights", description="whose errors the scales are searched for: of "
                                                  "the group's weights (norm 2.4), or of its outputs on data; see clip")

    @property
    def inputs(self) -> Literal["none", "moments"]:
        return "moments" if self.search == "outputs" else "none"

    def quantize(self, weight: Tensor, moments: Moments | None, spec: Spec) -> Quantized:
        return nearest(weight, fit_to(weight, hessian_of(moments) if self.search == "outputs" else None, spec), spec)


@register("quant.rtn")
@dataclass(frozen=True)
class RTN(Nearest, Quantizer):
    """Round to nearest."""

    kind = "method"

    def check(self) -> None:
        super().check()
        if self.search == "outputs" and not self.clip:
            raise FieldError("search", self.search, "weights with clip: false, which searches nothing,")
