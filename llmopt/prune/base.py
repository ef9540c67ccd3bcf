"""Structural pruning: a method scores units, this file decides how many leave and has them cut out."""
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.walk import Visit, each, visits
from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, layer_list, refuse_units
from llmopt.model.levels import Level
from llmopt.parts import Several
from llmopt.prune.allocate import Units, allowed_counts, check_reachable, globally, least_ratio
from llmopt.prune.budgets import Budget, Parameters
from llmopt.prune.cutting import Cutter, multiple_of
from llmopt.prune.groups import COARSE, cost, members
from llmopt.prune.scopes import Demand, Global, Local, Removed, Scope
from llmopt.prune.surgery import LayerPlan, apply_plan, layer_plan

LOG = logging.getLogger(__name__)

LOSES_MORE = "without the refit, which would make the rest do the work of what leaves, more is lost"
Unit = Literal["ffn", "kv_groups", "q_heads", "attention", "mlp", "blocks"]
Scores = dict[str, Tensor]        # unit -> one score per unit of a block, larger stays longer


@dataclass(frozen=True)
class Pruner(Cutter):
    """Family base: how much leaves, of what, and how layers compare. A method that searches writes `plan`."""

    uses_inputs: ClassVar[bool] = False       # True: `score` gets the calibration data's visit of the block
    whole_parts: ClassVar[bool] = True        # False: it does not compare sub-blocks and blocks

    ratio: float = Field(0.2, ge=0, lt=1, description="share of the units' parameters, or other budget, that leaves; "
                                                      "never more")
    budget: Budget = Field(Parameters(), description="what the ratio is a share of")
    scope: Scope = Field(Local(), description="how many leave from each layer; local: the same share")
    units: Several[Unit] = Field(("ffn", "kv_groups"), description="what may leave")
    normalize: Literal["lamp", "layer", "none"] = Field(
        "lamp", description="how scope: global makes the scores of different layers comparable")
    minimum: float = Field(
        0.05, gt=0, le=1, description="share of its FFN channels, or single weights, that every layer keeps")
    refit: bool = Field(True, description="refit the writers of what leaves, or the weights that stay, by least "
                                          "squares on calibration data; nothing to do where whole parts leave")

    def check(self) -> None:
        chosen = set(self.units)
        coarse = chosen & set(COARSE)
        if not chosen or len(chosen) < len(self.units) or {"q_heads", "kv_groups"} <= chosen:
            raise FieldError("units", list(self.units), "units once each; q_heads and kv_groups exclude each other")
        if coarse and not self.whole_parts:
            raise FieldError("units", list(self.units), f"channels and heads: {self.name} does not compare "
                                                        f"{', '.join(sorted(coarse))} (prune.magnitude does)")
        if coarse and (coarse != chosen or "blocks" in chosen and len(chosen) > 1):
            raise FieldError("units", list(self.units), "one kind at a time: [blocks], [attention, mlp], or channels "
                                                        "and heads; use two steps to have both")
        if coarse and not isinstance(self.scope, (Local, Global)):
            raise FieldError("scope", self.scope.name, "local or global: whole sub-blocks are ranked across the model")
        self.scope.fits(self.ratio)

    @property
    def level(self) -> Level:
        return "structure" if set(self.units) & {"attention", "mlp"} else "weights"

    @property
    def reads(self) -> tuple[str, ...]:
        return (*super().reads, *self.budget.reads)

    @property
    def by_weights(self) -> bool:
        """True if the weights alone tell the scores, to a forecast too."""
        return not self.uses_inputs

    @property
    def refits(self) -> bool:
        """True if writers are left that can make up for what leaves."""
        return self.refit and not set(self.units) & set(COARSE)

    @property
    def needs_data(self) -> bool:
        return self.uses_inputs or self.refits or self.scope.learns

    def notes(self, run: Run) -> list[str]:
        """What these fields cost, or do not save, that nobody would guess; for plan, log, record and model card."""
        if self.refits or set(self.units) & set(COARSE):
            return []
        if self.needs_data or not self.by_weights:
            return [LOSES_MORE]
        return ["chosen by weights alone and without a refit, no calibration data: on real models worse than channels "
                "drawn at random; refit: true, or better prune.wanda, loses a fraction of that"]

    def refuse(self, model: nn.Module) -> None:
        """Raise LlmoptError if this architecture cannot lose one of the units."""
        for unit in self.units:
            refuse_units(model, unit)
        if self.scope.learns:                   # before the long work
            refuse_units(model, "per_layer_shapes")
            if set(self.units) & {"kv_groups", "q_heads"}:
                refuse_units(model, "per_layer_heads")

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        """Where the scores cannot be known yet, as many units leave as will leave, whichever they are."""
        self.refuse(skeleton)
        known = source is not None and self.by_weights and not self.scope.learns
        told = self._told(self._guess(skeleton, run)) if not known else self._decided(source, run)
        apply_plan(skeleton, [LayerPlan.from_dict(layer) for layer in told["layers"]], Run())
        gone = ", ".join(f"{n} {kind}" for kind, n in told["meta"]["removed_units"].items() if n)
        return "; ".join([f"removes {'about ' * (not known)}{told['meta']['removed_share']:.1%} of "
                          f"{', '.join(self.units)}: {gone}", *self.notes(run)])

    def check_data(self, run: Run) -> None:
        """Raise LlmoptError where calibration data are needed and there are none."""
        if self.needs_data and not run.batches:
            without = not self.uses_inputs and not self.scope.learns
            raise LlmoptError("this step needs calibration data and there is none"
                              + "; refit: false does without, and loses far more" * without)

    def tell(self, run: Run) -> None:
        """Say the notes, once; not in a rehearsal, whose plan has them."""
        for note in self.notes(run) if run.layers is None and run.ranks.is_main else []:
            LOG.warning("%s: %s", self.name, note)

    def _guess(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        """A plan of the right size while the scores cannot be known: every layer's units rank alike; shapes are enough.

        Exact in its counts where scope is local.
        """
        views = blocks(model)
        alike = [{kind: torch.linspace(1, 2, len(found[0].index)) for kind in self.units
                  if (found := members(block, kind))} for block in views]
        priced = self.budget.priced(self._all_units(views, alike, multiple_of(run)), views, model, None)[0]
        return self._chosen(views, priced, lambda units: (self.scope.guess(units, self.ratio), {}))

    def _all_units(self, views: list[Block], rated: list[Scores], multiple: int) -> list[Units]:
        units = [u for block, scores in zip(views, rated, strict=True) for u in self._units(block, scores, multiple)]
        if not units:
            raise LlmoptError(f"the model has none of the units {', '.join(self.units)} left")
        return units

    def _chosen(self, views: list[Block], units: list[Units], decide: Callable[[list[Units]], Removed]
                ) -> tuple[list[LayerPlan], dict[str, Any]]:
        removed, figures = self._allocate(units, decide)
        plan = [layer_plan([(u, n) for u, n in zip(units, removed, strict=True) if u.layer == block.index])
                for block in views]
        gone, freed = Counter(), 0
        for u, n in zip(units, removed, strict=True):
            gone[u.kind] += n * u.index.shape[1]
            freed += n * u.cost
        return plan, {"ratio": self.ratio, "removed_share": freed / sum(len(u.scores) * u.cost for u in units),
                      "removed_units": dict(gone)} | self._of_budget(units, removed) | figures

    def _of_budget(self, units: list[Units], removed: list[int]) -> dict[str, Any]:
        """How much of another budget than parameters leaves."""
        if isinstance(self.budget, Parameters):
            return {}
        freed = sum(u.freed(n) for u, n in zip(units, removed, strict=True))
        return {"budget": self.budget.name, "removed_budget": freed / sum(u.total for u in units)}

    def _units(self, block: Block, scores: Scores, multiple: int) -> list[Units]:
        found = []
        for kind in self.units:
            if not members(block, kind):
                continue
            found.append(self._ranked(block, kind, scores[kind], multiple))
        return found

    def _ranked(self, block: Block, kind: str, values: Tensor, multiple: int) -> Units:
        if not bool(values.isfinite().all()):
            raise LlmoptError(f"{block.name}: the scores of its {kind} are not finite")
        index = torch.arange(len(values))[:, None]
        if kind == "q_heads":
            values, index = _slices(values.view(block.kv_heads, -1))
        counts = self._counts(block, kind, len(values), multiple)
        return Units(block.index, kind, values, cost(block, kind) * index.shape[1], counts, index)

    def _counts(self, block: Block, kind: str, count: int, multiple: int) -> tuple[int, ...]:
        """The numbers of units of one kind that a layer may keep, largest first."""
        if kind in COARSE:
            return 1, 0
        width = {"ffn": 1, "q_heads": block.kv_heads * block.head_dim,
                 "kv_groups": block.head_dim * max(1, block.heads // max(1, block.kv_heads))}[kind]
        floor = -int(-self.minimum * count // 1) if kind == "ffn" else 1
        return allowed_counts(count, width, multiple, max(1, floor))

    def _allocate(self, units: list[Units], decide: Callable[[list[Units]], Removed]) -> Removed:
        if self.ratio == 0:
            return [0] * len(units), {}
        check_reachable(units, self.ratio)
        coarse = units[0].kind in COARSE
        local = isinstance(self.scope, Local) and not coarse
        least = least_ratio(units, local)
        removed, figures = [], {}
        if self.ratio > least - 1e-4:                                               # as it is rounded up
            removed, figures = (globally(units, self.ratio), {}) if coarse else decide(units)
        if not any(removed):
            raise BudgetError(f"ratio {self.ratio:g} is less than one unit of {', '.join(self.units)} ({least:g}"
                              f"{'' if coarse else ', rounding included'}; nothing would be removed); raise it"
                              + " or use scope: global" * local)
        return removed, figures


@dataclass(frozen=True)
class Criterion(Pruner):
    """Scores units; the scope decides by them how many leave from each layer. A method writes `rate_all`."""

    @abstractmethod
    def rate_all(self, model: nn.Module, run: Run) -> list[Scores]:
        """The scores of all blocks, the same on all processes."""

    def plan(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        views, rated = blocks(model), self.rate_all(model, run)
        priced, figures = self.budget.priced(self._all_units(views, rated, multiple_of(run)), views, model, run)
        plan, told = self._chosen(views, priced, lambda units: self.scope.removed(
            Demand(units, self.ratio, self.normalize, self.refits, model, run, self.name)))
        return plan, told | figures


@dataclass(frozen=True)
class ByBlock(Criterion):
    """Scores the units of one block at a time. A method writes `score`."""

    @abstractmethod
    def score(self, block: Block, visit: Visit | None) -> Scores:
        """For each of `self.units` that the block has, a float tensor [number of units]; see prune/groups.py."""

    def rate_all(self, model: nn.Module, run: Run) -> list[Scores]:
        with torch.no_grad():
            if self.uses_inputs:
                stops = visits(model, run, self.name, edits=False)
                return run.ranks.agree([_plain(self.score(visit.block, visit)) for visit in stops])
            own = run.ranks.share(range(len(layer_list(model))))
            rated = [_plain(self.score(block, None)) for block in each(model, run, self.name, edits=False, only=own)]
            return [scores for part in run.ranks.gather(rated) for scores in part]


def _plain(scores: Scores) -> Scores:
    return {kind: values.detach().float().cpu() for kind, values in scores.items()}


def _slices(scores: Tensor) -> tuple[Tensor, Tensor]:     # [G, H/G] -> [H/G], [H/G, G]
    """Query heads as units: the k-th weakest head of every KV group at once, so that the groups stay equal."""
    ordered, order = scores.sort(dim=1, stable=True)
    heads = order + torch.arange(len(scores))[:, None] * scores.shape[1]
    return ordered.mean(dim=0), heads.T

