"""Tyr: how much each attention, FFN and block gives is found by evolution, on candidates that were pruned beforehand.

    min over plans s of  D(s) = mean over tokens KL(dense || s)        with  sum of what s takes away <= ratio x total

For every part of every block some widths around a centre are pruned locally: units leave by `criterion`, the writer is
refitted on what stays, behind blocks that have errors of their own (prune/supernet.py). Plans of them compete on growing
numbers of tokens (prune/search.py); the best one is the centre of the next iteration, whose steps are half as long. The
last one is cut, and its writers refitted once more behind the blocks as they really are. Li et al., 2025,
Tyr-the-Pruner (arXiv:2503.09657).

Beyond the paper: parts and blocks may leave as a whole, and one budget in parameters holds for all kinds of units, so
that a block is traded for channels (`budgets: each` keeps each kind to its own share, as the paper does). The search
begins at the best of several plans (prune/seeds.py), with the same widths everywhere among them. Where the paper's local
criterion is OBS with `first_order: 1`, the default is Wanda's: on SmolLM2-135M a tenth of the channels then costs .141
nats, by OBS .196. Left out: hidden states in the fitness, unequal numbers of query heads in the groups of a layer.
"""
from functools import partial
from random import Random
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.prefixes import Prefixes
from llmopt.calibration.trials import sample
from llmopt.calibration.walk import Visit
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, blocks, refuse_units
from llmopt.parts import Several, register
from llmopt.prune.allocate import Units
from llmopt.prune.base import Pruner, Scores, Unit, multiple_of
from llmopt.prune.groups import COARSE, FINE, cost, members
from llmopt.prune.obs import damped_losses
from llmopt.prune.search import Plan, Space, check_reachable, evolved, mended
from llmopt.prune.seeds import greedy, seeds, table
from llmopt.prune.supernet import PARTS, Making, Option, Part, Supernet, options, space, widths
from llmopt.prune.surgery import LayerPlan
from llmopt.prune.wanda import wanda

FIRST_STEP = 0.125          # of a part's units, in the first iteration


@register("prune.tyr")
@dataclass(frozen=True)
class Tyr(Pruner):
    """Two passes over the calibration data for each iteration and the end; the search has a few rows of it."""

    needs_data: ClassVar[bool] = True

    units: Several[Unit] = Field(("ffn", "kv_groups", "attention", "mlp", "blocks"), description="what may leave")
    refit: bool = Field(True, description="refit the writers of the pruned parts by least squares on calibration data")
    budgets: Literal["one", "each"] = Field("one", description="one: for all units together; each: attention and FFN "
                                                               "lose the same share")
    criterion: Literal["wanda", "obs"] = Field("wanda", description="what compares the units of a part")
    first_order: Literal[0, 1] = Field(0, description="criterion: obs: add what a unit writes, times the whole output")
    rounds: int = Field(64, ge=1, description="criterion: obs: how often the units that are left are looked at anew")
    damping: float = Field(0.01, gt=0, le=1, description="criterion: obs: share of the mean diagonal added to the Hessian")
    accumulate: Literal["expected", "centre"] = Field("expected", description="what blocks read while candidates are "
                                                      "made: the mean of those in front, or the best so far")
    iterations: int = Field(2, ge=1, le=8, description="supernets, each with steps half as long")
    levels: int = Field(5, ge=3, description="widths around the centre of each part, itself included")
    generations: int = Field(10, ge=0, description="of each iteration")
    offspring: int = Field(20, ge=1, description="plans of each generation")
    moves: int = Field(4, ge=1, description="steps from parent to offspring at most")
    tokens: Several[int] = Field((512, 2048, 4096), description="calibration tokens of each stage of the selection")
    survivors: Several[int] = Field((6, 2), description="plans that go on from each stage but the last")
    support: int = Field(2048, ge=2, description="largest logits of the dense model on which plans are compared")
    seed: int = Field(0, ge=0, description="of the moves and of the rows that the search sees")

    def check(self) -> None:
        chosen = set(self.units)
        if not chosen or len(chosen) < len(self.units) or {"q_heads", "kv_groups"} <= chosen:
            raise FieldError("units", list(self.units), "units once each; q_heads and kv_groups exclude each other")
        if self.budgets == "each" and "blocks" in chosen:
            raise FieldError("units", list(self.units), "no blocks: with budgets: each attention and FFN lose their own "
                                                        "share each")
        if self.scope != "local":
            raise FieldError("scope", self.scope, "local: prune.tyr searches across the layers by itself")
        if self.levels % 2 == 0:
            raise FieldError("levels", self.levels, "an odd number: a centre and as many on both sides")
        if not self.tokens or min(self.tokens) < 2 or list(self.tokens) != sorted(self.tokens):
            raise FieldError("tokens", list(self.tokens), "numbers of tokens that grow, at least 2 each")
        if len(self.survivors) != len(self.tokens) - 1 or min(self.survivors, default=1) < 1 or \
                list(self.survivors) != sorted(self.survivors, reverse=True):
            raise FieldError("survivors", list(self.survivors), f"{len(self.tokens) - 1} numbers that fall, one for each "
                                                                "of `tokens` but the last")

    def score(self, block: Block, visit: Visit | None) -> Scores:
        raise NotImplementedError("prune.tyr plans all blocks together")

    def refuse(self, model: nn.Module) -> None:
        super().refuse(model)
        if set(self.units) - {"blocks"}:
            refuse_units(model, "per_layer_shapes")
        if set(self.units) & {"kv_groups", "q_heads"}:
            refuse_units(model, "per_layer_heads")

    def plan(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        self.refuse(model)
        if not run.batches:
            raise LlmoptError("this step needs calibration data and there is none")
        field = Field_(self, model, run)
        search, told = Search(self, model, run, field), None
        for iteration in range(self.iterations):
            told = run.memory.remember(f"iteration {iteration}", partial(search.iteration, iteration, told))
        ...
