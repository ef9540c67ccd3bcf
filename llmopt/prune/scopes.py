"""How many units each layer loses: the pieces that a recipe names in `scope`, over the functions of allocate.py.

A scope sees the scores of any criterion, and what each number of kept units takes of the budget. These here look at no
more; ecoflap, pagcp and measured run the model, each in a file of its own.
"""
import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.method import Run
from llmopt.parts import Part, register
from llmopt.prune.allocate import Units, globally, locally, normalise

Removed = tuple[list[int], dict[str, Any]]          # units that leave from each entry; figures for the record


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a scope shares out: `ratio` of what all `units` take of the budget leaves, never more.

    normalize, refit: fields of the step, whose name is `label`. model, run: for a scope that learns.
    """

    units: list[Units]
    ratio: float
    normalize: str
    refit: bool
    model: nn.Module
    run: Run
    label: str


class Scope(Part, ABC):
    """Decides how many units leave from each layer. learns: its `removed` runs the model on the calibration data."""

    kind = "scope"
    learns: ClassVar[bool] = False

    def fits(self, ratio: float) -> None:
        """Raise FieldError for a field that does not go with the step's `ratio`."""

    @abstractmethod
    def removed(self, demand: Demand) -> Removed:
        """Units to remove from each entry of `demand.units`, each a step of its `allowed`."""

    def guess(self, units: list[Units], ratio: float) -> list[int]:
        """As many units as `removed` will take, while nothing is known of them."""
        return globally(units, ratio)


@register("local")
@dataclass(frozen=True)
class Local(Scope):
    """The same share from every layer; layers of one shape stay alike, which plain transformers loads."""

    def removed(self, demand: Demand) -> Removed:
        return locally(demand.units, demand.ratio), {}

    def guess(self, units: list[Units], ratio: float) -> list[int]:
        return locally(units, ratio)


@register("global")
@dataclass(frozen=True)
class Global(Scope):
    """The weakest units of the whole model, by scores that the step's `normalize` makes comparable.

    `minimum` is the floor of every layer (Gupta et al., 2022, arXiv:2209.14624).
    """

    def removed(self, demand: Demand) -> Removed:
        return _ranked(demand, demand.normalize)


@register("lamp")
@dataclass(frozen=True)
class Lamp(Scope):
    """The weakest units of the whole model, by n s_j / (sum of the layer's scores ranked at or above j).

    Lee et al., 2021 (arXiv:2010.07611), for units instead of weights; `global` with normalize: lamp by another name.
    """

    def removed(self, demand: Demand) -> Removed:
        return _ranked(demand, "lamp")


@register("flap")
@dataclass(frozen=True)
class Standard(Scope):
    """The weakest units of the whole model, by (s_j - mean) / standard deviation within the layer and kind of unit.

    FLAP's ranking ("AL-AM", An et al., 2023, arXiv:2312.11983), where a head counts by what it takes of the budget.
    Ours keeps a floor in every layer, and compares whole chunks where widths are rounded.
    """

    def removed(self, demand: Demand) -> Removed:
        return _ranked(demand, "standard")


def _ranked(demand: Demand, how: str) -> Removed:
    alike = [dataclasses.replace(u, scores=normalise(u.scores, how)) for u in demand.units]
    return globally(alike, demand.ratio), {}
