"""The fields of a quantization step, and what follows from them alone: what it needs, which weights, which grids."""
from dataclasses import replace
from functools import partial
from math import lcm
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from llmopt.errors import FieldError
from llmopt.files.json_shapes import finite
from llmopt.method import Method
from llmopt.model.codes import DTYPES, Quantized
from llmopt.model.forms import FORMS
from llmopt.parts import Several
from llmopt.quant import kinds
from llmopt.quant.experts import Together, refuse_experts, together
from llmopt.quant.grid import Spec
from llmopt.quant.plan import DENSE, Target, targets
from llmopt.quant.plan_file import planned_by, read_plan
from llmopt.quant.solver import Solver
from llmopt.quant.zeros import Keep, keeps
from llmopt.recipe.schemes import Scheme
from llmopt.specs import Dtype

Allocation = Literal["uniform", "lim", "zd", "sensitivity", "hessian", "heads", "lrp"]
BY_RANK = ("lim", "zd")         # they rank whole blocks, which take one of two widths
FEW = 2048                      # tokens on which a choice is tried where a model is large
Width = Annotated[int, Field(ge=2, le=8)] | Literal[16]
GroupSize = Annotated[int, Field(ge=1)] | Literal[-1]


class Override(TypedDict, total=False):
    """An entry of `overrides`, for the weights that a name matches."""

    scheme: Annotated[kinds.Name, Field(description="a kind of numbers, in the place of bits")]
    bits: Annotated[Width, Field(description="16: as it is")]
    group_size: Annotated[GroupSize, Field(description="-1: one scale per output channel")]


class Outer(TypedDict):
    """The setting of a matrix outside the blocks."""

    bits: Annotated[int, Field(ge=2, le=8)]


@dataclass(frozen=True)
class Settings(Method):
    """The fields of a step that quantizes weights of the decoder blocks."""

    stage: ClassVar = "quant"
    place: ClassVar = "quantization step"
    level: ClassVar = "weights"
    meta_shape: ClassVar = {"bits": finite, "modules": {str: {"bits": finite, str: object}}, str: object}

    bits: int | float = Field(4, description="average over all weights quantized; a fraction: see allocate; 16: as is",
                              json_schema_extra={"minimum": 2, "maximum": DENSE})       # check() tells more
    group_size: GroupSize = Field(128, description="input columns that share a scale; -1: one scale per output channel")
    symmetric: bool = Field(True, description="no zero points")
    scheme: kinds.Name | None = Field(None, description="these three by a name, or small floats, rounded inputs")
    clip: bool = Field(True, description="search each scale for the least error (norm 2.4)")
    keep_zeros: Keep = Field("auto", description="whether what is exactly 0 stays 0, as zeros of pruning are to; auto: "
                             "in weights of which two fifths or more are 0")
    scale_dtype: Dtype | None = Field(None, description="null: the model's; in float32 float16, but for zero points")
    ignore: Several[str] = Field((), description="names, globs or endings of names that stay as they are")
    overrides: dict[str, Override] = Field(default_factory=dict, description="NAME: {bits: ..., group_size: ...} or "
                                           "{scheme: ...}")
    embedding: Outer | None = Field(None, description="{bits: 8}: the input embedding and a head tied to it, as int8 "
                                    "with a scale for each row; fewer bits take `import llmopt` to be loaded, but "
                                    "where all weights have them; null: as it is")
    head: Outer | None = Field(None, description="{bits: ...}: an output head of its own")
    min_tokens: int = Field(32, ge=0, description="an expert that was sent fewer calibration tokens is solved with "
                            "all of its layer; 0: none is, and an expert without a token is an error")
    calibrate_all_experts: bool = Field(False, description="every expert is solved with all tokens of its layer")
    allocate: Allocation = Field("uniform", description="who decides the bits of each weight")
    widths: Several[Width] = Field((2, 3, 4, 5, 6, 8), description="bits to choose from; lim and zd take two around "
                                   "`bits`")
    group_sizes: Several[GroupSize] = Field((), description="group sizes to choose from, beside the bits; none: "
                                            "group_size alone, which the average is about in any case")
    bytes: int | None = Field(None, ge=1, description="in the place of bits: what all safetensors may take, "
                              "but for what later steps add")
    plans: int = Field(4, ge=1, le=100, description="of allocate: sensitivity: so many plans are measured whole, "
                       "and the best is taken")
    trial_tokens: int | None = Field(None, ge=1, description="of allocate: sensitivity: damage is measured on so many "
                                     "tokens; null: 2048, and more, up to all of the data, where the model is small")
    experts: Together = Field("model", description="of allocate, which experts take one choice: all of the model, as "
                              "plain transformers wants it; of a layer; a stack of matrices of a layer; each by itself")
    heads: str | None = Field(None, description="of allocate: heads: the step whose head scores count, or a file")
    plan: str | None = Field(None, description="a file that names bits and group size of every weight, as "
                             "plan.json of a checkpoint does; nothing is allocated then")
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
        elif not self.widths or self.bytes is None and not min(self.widths) <= self.bits <= max(self.widths):
            raise FieldError("bits", self.bits, f"an average within the widths {list(self.widths)}")
        _check_allocation(self)
        kinds.check_overrides(self)

    @property
    def solver(self) -> Solver:
        """The solver that chooses the codes. A step named after its solver has the solver's fields among its own."""
        return self

    @property
    def says(self) -> Scheme:
        """All that the scheme says; plain integers where none is named."""
        return kinds.of(self.scheme)

    def keeps_zeros_of(self, share: float) -> bool:
        """Do zeros stay in a weight of which they are such a share? They do in any that is rounded alone."""
        return self.solver.inputs == "none" or keeps(self.keep_zeros, share)

    def scheme_of(self, target: Target) -> Scheme:
        """All that is said of the numbers of one weight, by `overrides` or for all."""
        return kinds.of(target.scheme) if target.scheme else replace(self.says, symmetric=self.symmetric)

    @property
    def schemes(self) -> list[Scheme]:
        """Those of all weights and of some."""
        return [self.says, *(kinds.of(entry["scheme"]) for entry in self.overrides.values() if "scheme" in entry)]

    @property
    def static(self) -> bool:
        """True where calibration data tells the range of some inputs."""
        return any(scheme.static for scheme in self.schemes)

    @property
    def needs_data(self) -> bool:
        return (self.solver.inputs != "none" or self.static
                or self.allocate in ("lim", "sensitivity", "hessian", "lrp"))

    @property
    def multiple(self) -> int:
        if self.plan:
            return lcm(*(max(1, choice.group_size) for choice in read_plan(self.plan).values()))
        named = [kinds.spelt(entry) for entry in self.overrides.values() if "scheme" in entry]
        sizes = [self.group_size, *(entry["group_size"] for entry in named)]
        return lcm(*(max(1 if scheme.plain else kinds.KERNEL, size)
                     for scheme, size in zip(self.schemes, sizes, strict=True)))

    @property
    def reads(self) -> tuple[str, ...]:
        return (*super().reads, *([self.plan] if self.plan else []))

    @property
    def needs_whole(self) -> bool:
        return self.allocate == "lrp" or self.solver.whole

    def backward(self, rows: int, length: int) -> int:
        return rows * length if self.solver.whole else length if self.allocate == "lrp" else 0

    def chosen(self, model: nn.Module) -> list[Target]:
        """The weights this step quantizes; their bits are decided where names alone decide them."""
        plain, entries = self.says.plain, {name: kinds.spelt(entry) for name, entry in self.overrides.items()}
        found = targets(model, self.ignore, entries, self.group_size if plain and not self.plan else -1,
                        self.group_sizes)
        if self.plan:
            found = planned_by(self.plan, found)
        found = [t if plain or t.scheme else replace(t, group_size=self.group_size) for t in found]
        for target in found:
            kinds.check_width(target, target.scheme or self.scheme)
        refuse_experts(self, found)
        found = [t if t.expert is None else replace(t, group=together(t, self.experts)) for t in found]
        return [t.at(self.bits) for t in found] if self.allocate == "uniform" and not self.plan else found

    def without_values(self, target: Target, dtype: torch.dtype) -> Quantized:
        """Codes of a weight on the meta device; their bits may be a fraction."""
        empty, kind = partial(torch.empty, target.out, device="meta"), self.scheme_of(target)
        form = FORMS[kind.form]
        scales = empty(target.groups, dtype=torch.float32 if form.through_bfloat16 else self.scale_type(
            dtype, kind, target.at_once))
        return Quantized(empty(target.columns, dtype=torch.int8), scales, target.bits, target.group_size,
                         None if kind.symmetric else torch.empty_like(scales), form=form,
                         inputs=kind.inputs, peak=1.0 if kind.static else None)

    def spec(self, target: Target, dtype: torch.dtype, wholes: kinds.Wholes | None = None) -> Spec:
        """The grid for one weight of type `dtype`. wholes: of the model, for scales that are e4m3 numbers."""
        kind = self.scheme_of(target)
        form = FORMS[kind.form]
        scales = self.scale_type(dtype, kind, target.at_once)
        return Spec(target.bits, target.group_size, kind.symmetric, self.clip, dtype, scales, form,
                    wholes[target.name] if wholes and form.scales == "e4m3" else 1.0)

    def scale_type(self, dtype: torch.dtype, kind: Scheme | None = None, at_once: bool = False) -> torch.dtype:
        """The type in which scales that are not numbers of the scheme's own are stored, for a model of type `dtype`.

        kind: of the weight's numbers; None: of most. at_once: see Spec.at_once of model/architectures.py.
        """
        if self.scale_dtype:
            return DTYPES[self.scale_dtype]
        symmetric, form = (self.symmetric, self.says.form) if kind is None else (kind.symmetric, kind.form)
        at_once = at_once or self.embedding is not None and self.embedding["bits"] < 8
        short = dtype == torch.float32 and symmetric and not FORMS[form].is_float and not at_once
        return torch.float16 if short else dtype        # zero points, unpacked at once: multiplied in the scales' type


def _check_width(bits: int | float) -> None:
    """Raise FieldError unless the bits of all weights alike are such as one weight can have."""
    if bits not in (*range(2, 9), DENSE):
        fraction = isinstance(bits, float) and 2 <= bits <= 8
        raise FieldError("bits", bits, "an integer from 2 to 8 (or 16: dense)" if not fraction else
                         "an integer from 2 to 8, or a fraction with allocate: lim, zd or sensitivity")


def _check_allocation(step: Settings) -> None:
    """Raise FieldError for fields that contradict how the bits are allocated."""
    ways = ", ".join(get_args(Allocation)[1:])
    if step.plan and not step.says.plain:
        raise FieldError("plan", step.plan, f"null, as scheme {step.scheme} is one kind of numbers,")
    if step.plan and step.allocate != "uniform":
        raise FieldError("allocate", step.allocate, "uniform, as the plan says it all,")
    for field, value, usual in (("bits", step.bits, 4), ("bytes", step.bytes, None)):
        if step.plan and value != usual:
            raise FieldError(field, value, "nothing, as the plan says it all,")
    if step.bytes is not None and step.bits != 4:
        raise FieldError("bits", step.bits, "nothing beside bytes, which says what all may take,")
    for field in ("bytes", "group_sizes"):
        if getattr(step, field) and step.allocate == "uniform":
            raise FieldError("allocate", step.allocate, f"one of {ways} beside {field}")
    if step.group_sizes and step.allocate in BY_RANK:
        raise FieldError("group_sizes", list(step.group_sizes), f"none with allocate: {step.allocate}, which ranks "
                         "blocks,")
    if step.experts != "model" and step.allocate == "uniform":
        raise FieldError("experts", step.experts, f"model, or one of {ways} for allocate,")
    if (step.heads is None) == (step.allocate == "heads"):
        raise FieldError("heads", step.heads, "the step whose head scores count, or a file of them," if
                         step.heads is None else "null without allocate: heads")
