"""The fields of a quantization step, and what follows from them alone: what it needs, which weights, which grids."""
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from llmopt.errors import FieldError
from llmopt.files.json_shapes import finite
from llmopt.method import Method
from llmopt.model.codes import DTYPES
from llmopt.model.forms import FORMS, Form
from llmopt.parts import Several
from llmopt.quant import kinds
from llmopt.quant.grid import Spec
from llmopt.quant.plan import DENSE, Target, targets
from llmopt.quant.solver import Solver
from llmopt.recipe.schemes import Scheme
from llmopt.specs import Dtype

Allocation = Literal["uniform", "lim", "zd", "sensitivity"]
Width = Annotated[int, Field(ge=2, le=8)] | Literal[16]
GroupSize = Annotated[int, Field(ge=1)] | Literal[-1]


class Override(TypedDict, total=False):
    """An entry of `overrides`, for the weights that a name matches."""

    bits: Annotated[Width, Field(description="16: as it is")]
    group_size: Annotated[GroupSize, Field(description="-1: one scale per output channel")]


@dataclass(frozen=True)
class Settings(Method):
    """The fields of a step that quantizes weights of the decoder blocks."""

    stage: ClassVar = "quant"
    place: ClassVar = "quantization step"
    meta_shape: ClassVar = {"bits": finite, "modules": {str: {"bits": finite, str: object}}, str: object}

    bits: int | float = Field(4, description="average over all weights quantized; a fraction: see allocate; 16: as is",
                              json_schema_extra={"minimum": 2, "maximum": DENSE})       # check() tells more
    group_size: GroupSize = Field(128, description="input columns that share a scale; -1: one scale per output channel")
    symmetric: bool = Field(True, description="no zero points")
    scheme: kinds.Name | None = Field(None, description="these three by a name, or small floats, rounded inputs")
    clip: bool = Field(True, description="search each scale for the least error (norm 2.4)")
    scale_dtype: Dtype | None = Field(None, description="null: the model's; in float32 float16, but for zero points")
    ignore: Several[str] = Field((), description="names, globs or endings of names that stay as they are")
    overrides: dict[str, Override] = Field(default_factory=dict, description="NAME: {bits: ..., group_size: ...}")
    allocate: Allocation = Field("uniform", description="who decides the bits of each block")
    widths: Several[Width] = Field((2, 3, 4, 8), description="bits to choose from; lim and zd take two around `bits`")
    seed: int = Field(0, description="picks the calibration rows on which `sensitivity` is measured")

    @model_validator(mode="before")
    @classmethod
    def _of_scheme(cls, given: Any) -> Any:
        return kinds.spelt_out(given)

    def check(self) -> None:
        kinds.check_fields(self)
        if self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))
        if self.allocate == "uniform":
            _check_width(self.bits)
        elif not self.widths or not min(self.widths) <= self.bits <= max(self.widths):
            raise FieldError("bits", self.bits, f"an average within the widths {list(self.widths)}")
        for name, given in self.overrides.items():
            if not given:
                raise FieldError(f"overrides.{name}", given, "a mapping of bits and/or group_size")

    @property
    def solver(self) -> Solver:
        """The solver that chooses the codes. A step named after its solver has the solver's fields among its own."""
        return self

    @property
    def says(self) -> Scheme:
        """All that the scheme says; plain integers where none is named."""
        return kinds.of(self.scheme)

    @property
    def form(self) -> Form:
        """The kind of numbers."""
        return FORMS[self.says.form]

    @property
    def needs_data(self) -> bool:
        return self.solver.inputs != "none" or self.allocate in ("lim", "sensitivity") or self.says.static

    @property
    def multiple(self) -> int:
        return max(1 if self.says.plain else kinds.KERNEL, self.group_size)

    @property
    def needs_whole(self) -> bool:
        return self.allocate == "sensitivity" or self.solver.whole

    def backward(self, rows: int, length: int) -> int:
        return rows * length if self.solver.whole else 0

    def chosen(self, model: nn.Module) -> list[Target]:
        """The weights this step quantizes; their bits are decided where names alone decide them."""
        plain = self.says.plain
        found = targets(model, self.ignore, self.overrides, self.group_size if plain else -1)
        if not plain:
            kinds.check_widths(found, self.scheme)
            found = [replace(target, group_size=self.group_size) for target in found]
        return [t.at(self.bits) for t in found] if self.allocate == "uniform" else found

    def spec(self, target: Target, dtype: torch.dtype, wholes: kinds.Wholes | None = None) -> Spec:
        """The grid for one weight of type `dtype`. wholes: of the model, for scales that are e4m3 numbers."""
        return Spec(target.bits, target.group_size, self.symmetric, self.clip, dtype,
                    self.scale_type(dtype), self.form,
                    wholes[target.name] if wholes and self.form.scales == "e4m3" else 1.0)

    def scale_type(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which scales that are not numbers of the scheme's own are stored, for a model of type `dtype`."""
        if self.scale_dtype:
            return DTYPES[self.scale_dtype]
        short = dtype == torch.float32 and self.symmetric and not self.form.is_float
        return torch.float16 if short else dtype                    # zero points: loaders multiply in the scales' type


def _check_width(bits: int | float) -> None:
    """Raise FieldError unless the bits of all weights alike are such as one weight can have."""
    if bits not in (*range(2, 9), DENSE):
        fraction = isinstance(bits, float) and 2 <= bits <= 8
        raise FieldError("bits", bits, "an integer from 2 to 8 (or 16: dense)" if not fraction else
                         "an integer from 2 to 8, or a fraction with allocate: lim, zd or sensitivity")
