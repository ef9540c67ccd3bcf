"""What every pruner does once it knows what leaves: the rest is fitted to that, the parts are cut out, and it is told.

Whole parts go first, and the writers in front of them are repaired, so that the refit sees what comes behind them.
"""
import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.method import Method, Record, Run
from llmopt.model.blocks import Block, blocks
from llmopt.model.shapes import shapes
from llmopt.prune.refit import refit
from llmopt.prune.repair import repair
from llmopt.prune.surgery import LayerPlan, apply_plan, check_plan


@dataclass(frozen=True)
class Cutter(Method):
    """Decides once on a plan of all layers, by `plan`, and has it carried out."""

    stage: ClassVar = "prune"

    @property
    @abstractmethod
    def refits(self) -> bool:
        """True if what stays is fitted to what leaves."""

    @abstractmethod
    def plan(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        """The plan of every layer, and figures for the record."""

    def refuse(self, model: nn.Module) -> None:
        """Raise LlmoptError if this architecture cannot lose what may leave."""

    def check_data(self, run: Run) -> None:
        """Raise LlmoptError where calibration data are needed and there are none."""

    def notes(self, run: Run) -> list[str]:
        """What these fields cost, or do not save, that nobody would guess; for plan, log, record and model card."""
        return []

    def tell(self, run: Run) -> None:
        """Say the notes, once."""

    def apply(self, model: nn.Module, run: Run) -> Record:
        self.refuse(model)
        self.check_data(run)
        before, shape = model.num_parameters(), shapes(model)
        told = self._decided(model, run)
        plan, meta = [LayerPlan.from_dict(layer) for layer in told["layers"]], told["meta"]
        views = blocks(model)
        check_plan(model, views, plan)          # before the long work
        kept = [describe(block, layer) for block, layer in zip(views, plan, strict=True)]
        meta |= self._carry_out(model, run, plan)
        self.tell(run)
        return Record(meta=meta | {
            "notes": self.notes(run), "multiple": multiple_of(run), "layers": kept,
            "parameters": [before, model.num_parameters()],
            "dense": [dict(s._asdict(), skip=list(s.skip)) for s in shape]})

    def _carry_out(self, model: nn.Module, run: Run, plan: list[LayerPlan]) -> dict[str, Any]:
        """Cut, after repair and refit where there are any; their figures for the record."""
        found: dict[str, Any] = {}
        whole = [replace(layer, heads=None, kv_groups=None, ffn=None) for layer in plan]
        if self.refits and any(layer.drop or layer.skip for layer in whole):
            found["repair"] = repair(model, run, whole, f"{self.name} repair")
            apply_plan(model, whole, run)
            plan = [replace(layer, skip=()) for layer in plan if not layer.drop]
        if self.refits and any(layer.cuts for layer in plan):
            found["refit"] = refit(model, run, plan, f"{self.name} refit")
        apply_plan(model, plan, run)
        return found

    def _decided(self, model: nn.Module, run: Run) -> dict[str, Any]:
        """The plan and its figures, decided once: a forecast may have done it, or a run that was cut off."""
        return run.memory.remember("plan", lambda: self._told(self.plan(model, run)))

    @staticmethod
    def _told(found: tuple[list[LayerPlan], dict[str, Any]]) -> dict[str, Any]:
        plan, meta = found
        return {"layers": [layer.to_dict() for layer in plan], "meta": meta}


def multiple_of(run: Run) -> int:
    """The number of channels to which widths are rounded, so that every step to come fits."""
    return math.lcm(*(step.multiple for step in run.ahead))


def describe(block: Block, layer: LayerPlan) -> dict[str, Any]:
    """What stays of a block, for the record."""
    shape = layer.shape(block)
    told: dict[str, Any] = {"layer": block.index, "dropped": layer.drop, "skip": list(layer.skip),
                            "ffn": shape.width, "heads": layer.kept_heads(block).tolist()}
    if layer.kv_groups is not None:
        told["kv_groups"] = layer.kv_groups.tolist()
    return told
