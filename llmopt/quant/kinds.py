"""What a scheme by name (recipe/schemes.py) says of a quantization step, and what it must find in a model."""
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic_core import ArgsKwargs
from torch import nn

from llmopt.errors import FieldError, LlmoptError
from llmopt.model.blocks import Projection, blocks
from llmopt.model.forms import FORMS
from llmopt.quant import floats
from llmopt.quant.plan import DENSE, Target, check_divides
from llmopt.recipe.schemes import SCHEMES, Scheme

Name = Literal[tuple(SCHEMES)]
INTEGERS = Scheme(bits=4)
KERNEL = 16         # input columns must be a multiple of it where numbers of 8 bits meet rounded inputs


def spelt_out(given: ArgsKwargs) -> ArgsKwargs:
    """The fields of a step with those that its scheme stands for; raises FieldError for one that contradicts it."""
    fields = dict(given.kwargs or {})
    name = fields.get("scheme")
    scheme = SCHEMES.get(name) if isinstance(name, str) else None
    for key in ("bits", "group_size", "symmetric") if scheme else ():
        value, free = getattr(scheme, key), key == "group_size" and scheme.plain
        if fields.setdefault(key, value) != value and not free:
            raise FieldError(key, fields[key], f"{value}, as scheme {name} says (or no scheme),")
    return ArgsKwargs(given.args, fields)


def spelt(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `overrides` with the bits and the group size that its scheme stands for."""
    if "scheme" not in entry:
        return dict(entry)
    scheme = SCHEMES[entry["scheme"]]
    return {"bits": scheme.bits, "group_size": scheme.group_size} | dict(entry)


def check_overrides(step: Any) -> None:
    """Raise FieldError for entries of `overrides` that say nothing, or contradict the scheme that they name."""
    for name, given in step.overrides.items():
        if not given:
            raise FieldError(f"overrides.{name}", given, "a mapping of bits and/or group_size, or a scheme")
        scheme = SCHEMES.get(given.get("scheme"))
        for key in given.keys() & {"bits", "group_size"} if scheme else ():
            value = getattr(scheme, key)
            if given[key] != value and not (key == "group_size" and scheme.plain):
                raise FieldError(f"overrides.{name}.{key}", given[key],
                                 f"{value}, as scheme {given['scheme']} says (or no scheme),")
        if scheme:
            _check_solver(step, f"overrides.{name}.scheme", given["scheme"])


def _check_solver(step: Any, field: str, name: str) -> None:
    """Raise FieldError for a scheme that the step's solver cannot serve."""
    scheme = SCHEMES[name]
    if scheme.form != "int" and step.solver.integers:
        raise FieldError(field, name, "one of integers, as this solver knows no others,")
    if scheme.static and step.solver.inputs == "block":
        raise FieldError(field, name, "one that needs no range of inputs, which this solver does not see,")


def check_fields(step: Any) -> None:
    """Raise FieldError for fields of a step that have no meaning under its scheme."""
    scheme = SCHEMES.get(step.scheme)
    if scheme is None or scheme.plain:
        return
    if step.allocate != "uniform":
        raise FieldError("allocate", step.allocate, f"uniform, as scheme {step.scheme} is one kind of numbers,")
    if step.scale_dtype and FORMS[scheme.form].scales != "model":
        raise FieldError("scale_dtype", step.scale_dtype, f"null, as scheme {step.scheme} has scales of its own,")
    for name, given in step.overrides.items():
        if given and "scheme" not in given and given != {"bits": DENSE}:
            raise FieldError(f"overrides.{name}", given, f"bits: {DENSE} (as it is) alone, or a scheme, under scheme "
                             f"{step.scheme}")
    _check_solver(step, "scheme", step.scheme)


def check_width(target: Target, name: str | None) -> None:
    """Raise LlmoptError for a weight whose columns a scheme's groups, or kernels for it, do not divide."""
    scheme = of(name)
    if scheme.plain:
        check_divides(target)
        return
    size = scheme.group_size if scheme.group_size > 0 else KERNEL
    if target.bits != DENSE and target.columns % size:
        raise LlmoptError(f"{target.name}: its {target.columns} input features are no multiple of {size}, as "
                          f"scheme {name} needs; leave such weights out (ignore), or use a scheme such as "
                          "W4A16 with a group_size that divides them")


def of(name: str | None) -> Scheme:
    """The scheme of this name; without one plain integers, of which the step's fields tell the rest."""
    return SCHEMES[name] if name else INTEGERS


class Wholes:
    """The number that the e4m3 scales of a weight are stored times: one for all weights that read one input."""

    def __init__(self, model: nn.Module, names: Collection[str]):
        self.groups: dict[str, list[Projection]] = {}
        self.known: dict[str, float] = {}
        for group in (group for block in blocks(model) for group in block.weights()):
            for projection in (members := [p for p in group if p.name in names]):
                self.groups[projection.name] = members

    def __getitem__(self, name: str) -> float:
        """Asked of the first of a group while all of them are still dense."""
        if name not in self.known:
            members = self.groups[name]
            found = floats.whole(max(float(p.weight.abs().max()) for p in members))
            self.known |= {p.name: found for p in members}
        return self.known[name]
