"""A plan as a method: what stays of every layer is read from a file that another run has written, or you.

Whole parts leave first, then channels and heads; where the plan says how many stay, `criterion` chooses which, on the
model as it is before anything leaves. So a costly search (prune.tyr, `scope: measured`) is made once, and its widths
are used again with other data, or after a change by hand.
"""
from collections import Counter
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, refuse_units
from llmopt.model.levels import Level
from llmopt.parts import build, register
from llmopt.prune.allocate import Units, survivors
from llmopt.prune.base import Criterion
from llmopt.prune.cutting import Cutter, multiple_of
from llmopt.prune.groups import cost, members
from llmopt.prune.plan_file import Entry, file_of, read_layers
from llmopt.prune.surgery import LayerPlan, apply_plan

UNITS = {"ffn": "ffn", "kv_groups": "kv_groups", "heads": "q_heads"}        # by the keys of a plan


@register("prune.plan")
@dataclass(frozen=True)
class ByPlan(Cutter):
    """One pass over the calibration data to compare units, where the plan gives numbers, and one for the refit."""

    path: str = Field("plan.json", description="a plan, or the folder of a pruned checkpoint that has one")
    criterion: Literal["wanda", "obs", "flap", "magnitude"] = Field(
        "wanda", description="what chooses the units where the plan says how many stay, and not which")
    refit: bool = Field(True, description="fit the writers of what leaves, and those in front of whole parts, to the "
                                          "model as it was, by least squares on calibration data")

    @property
    def level(self) -> Level:
        return "structure" if any("skip" in entry for entry in read_layers(self.path)) else "weights"

    @property
    def refits(self) -> bool:
        return self.refit

    @property
    def reads(self) -> tuple[str, ...]:
        return (str(file_of(self.path)),)

    @property
    def needs_data(self) -> bool:
        return self.refit or self.criterion != "magnitude"

    def check_data(self, run: Run) -> None:
        if self.needs_data and not run.batches:
            raise LlmoptError("this step needs calibration data and there is none")

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        """Exact in its counts, whichever the units are."""
        plan, meta = self._made(skeleton, run, lambda views, kinds: [
            {kind: torch.linspace(1, 2, len(members(block, kind)[-1].index)) for kind in kinds
             if members(block, kind)} for block in views])
        apply_plan(skeleton, plan, Run())
        gone = ", ".join(f"{count} {kind}" for kind, count in meta["removed_units"].items())
        return f"removes {meta['removed_share']:.1%} of the blocks' parameters, by {file_of(self.path)}: {gone}"

    def plan(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        return self._made(model, run, lambda views, kinds: self._of_units(kinds).rate_all(model, run))

    def _of_units(self, kinds: list[str]) -> Criterion:
        return build(f"prune.{self.criterion}", {"units": kinds or ["ffn"]})

    def _made(self, model: nn.Module, run: Run, rate: Any) -> tuple[list[LayerPlan], dict[str, Any]]:
        """The plan of this model; raises LlmoptError for the plan of another, or of what it cannot lose."""
        entries, views, file = read_layers(self.path), blocks(model), file_of(self.path)
        if len(entries) != (run.layers or len(views)):
            raise LlmoptError(f"{file}: is the plan of another model: it has {len(entries)} layers, this model "
                              f"{run.layers or len(views)}")
        if run.layers is not None:                                  # a rehearsal has one block, which has to stay
            entries = sorted(({} if _coarse(entry) else entry for entry in entries), key=len)[-len(views):]
        kinds = sorted({UNITS[key] for entry in entries for key in UNITS.keys() & entry.keys()
                        if isinstance(entry[key], int)})
        if {"kv_groups", "q_heads"} <= set(kinds):
            raise LlmoptError(f"{file}: numbers of heads in one layer and of kv_groups in another; one kind for all "
                              "layers expected, or lists")
        for unit in {word for entry in entries for word in (*(UNITS[key] for key in UNITS.keys() & entry.keys()),
                                                            *_coarse(entry))}:
            refuse_units(model, unit)
        rated = rate(views, kinds) if kinds else [{}] * len(views)
        ranked = partial(self._of_units(kinds)._ranked, multiple=multiple_of(run))
        layers = [_layer(entry, {kind: ranked(block, kind, scores[kind]) for kind in scores}, f"{file}: {block.name}")
                  for entry, block, scores in zip(entries, views, rated, strict=True)]
        return layers, _figures(views, layers)


def _coarse(entry: Entry) -> list[str]:
    return [*entry.get("skip", ()), *["blocks"] * entry.get("drop", False)]


def _layer(entry: Entry, ranked: dict[str, Units], where: str) -> LayerPlan:
    """What stays of a layer; where: the file and the layer, for errors."""
    if entry.get("drop"):
        return LayerPlan(drop=True)
    kept: dict[str, Tensor] = {}
    for key, unit in UNITS.items():
        if isinstance(stays := entry.get(key), list):
            kept[key] = torch.tensor(sorted(set(stays)), dtype=torch.long)
        elif stays is not None:
            kept[key] = _chosen(ranked.get(unit), stays, f"{where}: {key}")
    return LayerPlan(**kept, skip=tuple(entry.get("skip", ())))


def _chosen(units: Units | None, stays: int, where: str) -> Tensor:
    """So many units, the best."""
    if units is None:
        raise LlmoptError(f"{where}: the layer has none; is it the plan of another model?")
    each = units.index.shape[1]
    possible = [count * each for count in units.allowed]
    if stays not in possible:
        near = min(possible, key=lambda count: abs(count - stays))
        raise LlmoptError(f"{where}: {stays} cannot stay of {possible[0]}, {near} can: later steps and the heads of a "
                          "group ask for multiples, and something has to stay (skip takes a whole part out)")
    return survivors(units, (possible[0] - stays) // each)


def _figures(views: list[Block], layers: list[LayerPlan]) -> dict[str, Any]:
    """What leaves, of the parameters of all blocks."""
    gone, freed = Counter(), 0
    for block, layer in zip(views, layers, strict=True):
        if layer.drop:
            gone["blocks"], freed = gone["blocks"] + 1, freed + cost(block, "blocks")
            continue
        freed += sum(cost(block, part) for part in layer.skip)
        gone.update(layer.skip)
        groups = block.kv_heads if layer.kv_groups is None else len(layer.kv_groups)
        before = {"ffn": block.width, "kv_groups": block.kv_heads,
                  "heads": groups * block.heads // max(1, block.kv_heads)}
        for key, unit in UNITS.items():
            if (kept := getattr(layer, key)) is not None:
                gone[unit] += before[key] - len(kept)
                freed += (before[key] - len(kept)) * cost(block, unit)
    return {"removed_share": freed / sum(cost(block, "blocks") for block in views),
            "removed_units": {kind: count for kind, count in gone.items() if count}}
