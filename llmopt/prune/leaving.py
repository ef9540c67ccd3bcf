"""Whole parts of a model that leave, one after the other: what may leave, how much, and the plan that comes of it.

A part is a block, or the attention or FFN of one.
"""
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.errors import BudgetError
from llmopt.method import Method, Record, Run
from llmopt.model.blocks import Block, blocks, refuse_units
from llmopt.model.levels import Level
from llmopt.model.shapes import check_droppable, shapes
from llmopt.prune.cutting import describe
from llmopt.prune.groups import cost
from llmopt.prune.surgery import LayerPlan, apply_plan, check_plan

Part = tuple[int, str]              # block; blocks, attention or mlp
Parts = dict[Part, int]             # the parameters of each


@dataclass(frozen=True)
class Leaving(Method):
    """Base of the methods that take whole parts out, on calibration data."""

    stage: ClassVar = "prune"
    needs_data: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("blocks",)

    ratio: float = Field(0.1, ge=0, lt=1, description="share of the parts' parameters that leaves; never more")
    protect: bool = Field(True, description="the first and the last block stay as they are")
    trial_tokens: int = Field(1024, ge=1, description="damage and mi are measured on so many tokens")

    @property
    def level(self) -> Level:
        return "weights" if set(self.units) == {"blocks"} else "structure"

    def refuse(self, model: nn.Module) -> None:
        """Raise LlmoptError if this architecture cannot lose one of the units."""
        for unit in self.units:
            refuse_units(model, unit)
        if set(self.units) != {"attention"} and set(self.units) != {"mlp"}:
            check_droppable(model)

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        """Which parts leave is not known yet: as many as will."""
        self.refuse(skeleton)
        views = blocks(skeleton)
        gone = self._guess(views)
        share = _share(views, self.units, gone)
        apply_plan(skeleton, plan_of(views, gone), Run())
        told = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for _, kind in gone).items())
        return f"removes about {share:.1%} of {', '.join(self.units)}: {told}"

    def apply(self, model: nn.Module, run: Run) -> Record:
        self.refuse(model)
        before, shape, views = model.num_parameters(), shapes(model), blocks(model)
        check_plan(model, views, plan_of(views, self._guess(views)))          # before the long work
        gone, meta = self.take_out(model, run) if self.ratio else ([], {})
        plan, share = plan_of(views, gone), _share(views, self.units, gone)
        kept = [describe(block, layer) for block, layer in zip(views, plan, strict=True)]
        apply_plan(model, plan, run)
        return Record(meta={
            "ratio": self.ratio, "removed_share": share, "removed_units": dict(Counter(kind for _, kind in gone)),
            "removed": [list(part) for part in gone], **meta, "parameters": [before, model.num_parameters()],
            "layers": kept, "dense": [dict(s._asdict(), skip=list(s.skip)) for s in shape]})

    @abstractmethod
    def take_out(self, model: nn.Module, run: Run) -> tuple[list[Part], dict[str, Any]]:
        """The parts that leave, in the order they were chosen, and figures; the rest has been made ready for it."""

    def parts(self, views: list[Block]) -> Parts:
        """What may leave."""
        inner = views[1:-1] if self.protect else views
        return {(block.index, unit): price for block in inner for unit in self.units if (price := cost(block, unit))}

    def in_turn(self, views: list[Block], choose: Callable[[list[Part], Parts], list[Part]]) -> list[Part]:
        """The parts that leave: `choose` adds some to those before, of the parts that still fit, until none does."""
        parts, gone = self.parts(views), []
        left = self._room(views, parts)
        while fits := {part: price for part, price in parts.items() if part not in gone and price <= left}:
            chosen = choose(gone, fits)
            gone, left = gone + chosen, left - sum(parts[part] for part in chosen)
        if not gone and self.ratio:
            total = sum(cost(block, unit) for block in views for unit in self.units)
            least = min(parts.values(), default=0) / max(1, total)
            raise BudgetError(f"ratio {self.ratio:g} is less than one of the {', '.join(self.units)} ({least:.3g}; "
                              "nothing would be removed); raise it")
        return gone

    def _guess(self, views: list[Block]) -> list[Part]:
        """As many as will leave, from the middle."""
        return self.in_turn(views, lambda gone, fits: [min(fits, key=lambda part: abs(part[0] - len(views) // 2))])

    def _room(self, views: list[Block], parts: Parts) -> float:
        """How many parameters may leave; raises BudgetError where there are not so many to give."""
        total = sum(cost(block, unit) for block in views for unit in self.units)
        free, largest = sum(parts.values()), max(parts.values(), default=0)
        if self.ratio * total >= free + largest and self.ratio:
            why = ", as the first and the last block are protected" if self.protect else ""
            raise BudgetError(f"ratio {self.ratio:g} cannot be met: at most {free / max(1, total):.3f} of the "
                              f"{', '.join(self.units)} may leave{why}")
        return self.ratio * total + 1e-6


def _share(views: list[Block], units: tuple[str, ...], gone: list[Part]) -> float:
    """Of the parameters of all such parts."""
    total = sum(cost(block, unit) for block in views for unit in units)
    return sum(cost(views[index], kind) for index, kind in gone) / max(1, total)


def plan_of(views: list[Block], gone: list[Part]) -> list[LayerPlan]:
    """The plan of every block without these parts; one that loses both attention and FFN leaves as a whole."""
    plan = []
    for block in views:
        lost = {kind for index, kind in gone if index == block.index}
        whole = "blocks" in lost or {"attention", "mlp"} <= lost
        plan.append(LayerPlan(drop=whole, skip=() if whole else tuple(sorted(lost))))
    return plan
