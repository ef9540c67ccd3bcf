"""Tyr: how much each attention, FFN and block gives is found by evolution, on candidates that were pruned beforehand.

    min over plans s of  D(s) = mean over tokens KL(dense || s)        with  sum of what s takes away <= ratio x total

For every part of every block some widths around a centre are pruned locally: units leave by `criterion`, the writer is
refitted on what stays, behind blocks that have errors of their own (prune/supernet.py). Plans of them compete on
growing numbers of tokens (prune/search.py), of rows on which nothing was fitted; the best one is the centre of the next
iteration, whose steps are half as long. The last one is cut, and its writers refitted once more on all rows, behind the
blocks as they really are; in front of what is gone as a whole they are repaired as well (prune/repair.py). Li et al.,
2025, Tyr-the-Pruner (arXiv:2503.09657).

Beyond the paper: parts and blocks may leave as a whole, and one budget in parameters holds for all kinds of units, so
that a block is traded for channels (`budgets: each` keeps each kind to its own share, as the paper does). The search
begins at the best of several plans (prune/seeds.py), the same widths everywhere among them. Where the paper's local
criterion is OBS with `first_order: 1`, the default is Wanda's: on SmolLM2-135M a tenth of the channels then costs .141
nats, by OBS .196. Left out: hidden states in the fitness, unequal numbers of query heads in the groups of a layer.
"""
import logging
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from random import Random
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.prefixes import Prefixes
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, blocks, refuse_units
from llmopt.parts import Several, register
from llmopt.prune.allocate import Units
from llmopt.prune.base import Pruner, Unit
from llmopt.prune.budgets import Parameters
from llmopt.prune.cutting import multiple_of
from llmopt.prune.ground import Ground
from llmopt.prune.groups import members
from llmopt.prune.obs import damped_losses
from llmopt.prune.scopes import Local
from llmopt.prune.search import LAST, Fitness, Plan, Space, evolved, mended
from llmopt.prune.seeds import filled, greedy, table
from llmopt.prune.supernet import Making, Option, Part, Supernet, space
from llmopt.prune.surgery import LayerPlan
from llmopt.prune.wanda import mean_size

LOG = logging.getLogger(__name__)
FIRST_STEP = 0.125          # of a part's units, in the first iteration
AT_MOST = 4                 # one row of so many is held out for the search
Rows = list[dict[str, Tensor]]


@register("prune.tyr")
@dataclass(frozen=True)
class Tyr(Pruner):
    """Two passes over the calibration data for each iteration and the end; the search has a few rows of it."""

    uses_inputs: ClassVar[bool] = True

    units: Several[Unit] = Field(("ffn", "kv_groups", "attention", "mlp", "blocks"), description="what may leave")
    budgets: Literal["one", "each"] = Field("one", description="one: for all units together; each: attention and FFN "
                                                               "lose the same share")
    criterion: Literal["wanda", "obs"] = Field("wanda", description="what compares the units of a part")
    first_order: Literal[0, 1] = Field(0, description="criterion: obs: add what a unit writes, times the whole output")
    rounds: int = Field(64, ge=1, description="criterion: obs: how often the units that are left are looked at anew")
    damping: float = Field(0.01, gt=0, le=1, description="criterion: obs: added to the Hessian, of its mean diagonal")
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
            raise FieldError("units", list(self.units), "no blocks, as attention and FFN lose a share each")
        if not isinstance(self.scope, Local):
            raise FieldError("scope", self.scope.name, "local: prune.tyr searches across the layers by itself")
        if not isinstance(self.budget, Parameters):
            raise FieldError("budget", self.budget.name, "parameters: prune.tyr counts nothing else")
        if self.levels % 2 == 0:
            raise FieldError("levels", self.levels, "an odd number: a centre and as many on both sides")
        if not self.tokens or min(self.tokens) < 2 or list(self.tokens) != sorted(self.tokens):
            raise FieldError("tokens", list(self.tokens), "numbers of tokens that grow, at least 2 each")
        if len(self.survivors) != len(self.tokens) - 1 or min(self.survivors, default=1) < 1:
            raise FieldError("survivors", list(self.survivors), f"{len(self.tokens) - 1} whole numbers from 1 on, one "
                                                                "for each of `tokens` but the last")

    @property
    def refits(self) -> bool:
        return self.refit

    def refuse(self, model: nn.Module) -> None:
        super().refuse(model)
        if set(self.units) - {"blocks"}:
            refuse_units(model, "per_layer_shapes")
        if set(self.units) & {"kv_groups", "q_heads"}:
            refuse_units(model, "per_layer_heads")

    def plan(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        ground = self._ground(model, run)
        if self.ratio == 0:
            return ground.told([Option(0, 0)] * len(ground.parts), [LayerPlan() for _ in ground.parts])
        ground.check_reachable()
        search, found = Search(self, model, run, ground), None
        log = []
        for iteration in range(self.iterations):
            found = run.memory.remember(f"iteration {iteration}", partial(search.iteration, iteration, found))
            log.append({"seeds": found["seeds"], "fitness": found["fitness"]})
        plans, meta = ground.told([Option(*option) for option in found["options"]],
                                  [LayerPlan.from_dict(layer) for layer in found["layers"]])
        return plans, meta | {"search": log}

    def _guess(self, model: nn.Module, run: Run) -> tuple[list[LayerPlan], dict[str, Any]]:
        """The same widths everywhere, as far as units go evenly into them."""
        ground = self._ground(model, run)
        if self.ratio and run.layers is None:
            ground.check_reachable()
        plan = ground.uniform()
        return ground.told(plan, [ground.first(b, option) for b, option in enumerate(plan)])

    def _ground(self, model: nn.Module, run: Run) -> Ground:
        units = partial(self._ranked, multiple=multiple_of(run))
        return Ground(blocks(model), set(self.units), self.ratio, self.budgets == "each", units)

    def rank(self, multiple: int, block: Block, writer: Projection, kind: str, hessian: Tensor) -> Units:
        """The units of a writer, compared by the criterion; hessian [in, in]."""
        index, weight = members(block, kind)[-1].index, writer.weight.float()
        if self.criterion == "obs":
            scores = damped_losses(weight, hessian.clone(), index, self.damping, self.rounds, bool(self.first_order))
        else:
            scores = mean_size(weight, hessian.diagonal().sqrt(), index)
        return self._ranked(block, kind, scores.float().cpu(), multiple)


class Search:
    """The iterations of one step's search on one model; nothing is run before the first of them."""

    def __init__(self, step: Tyr, model: nn.Module, run: Run, ground: Ground):
        self.step, self.model, self.run, self.ground = step, model, run, ground

    def iteration(self, number: int, before: dict[str, Any] | None) -> dict[str, Any]:
        """The best options around those of the iteration before, or around the same widths everywhere; JSON data."""
        step, ground, draw = self.step, self.ground, Random(f"{self.step.seed} {number}")
        centre = [Option(*option) for option in before["options"]] if before else ground.uniform()
        parts, choices = ground.around(centre, FIRST_STEP / 2 ** number, step.levels // 2)
        field = space(parts, choices, ground.whole, ground.budget)
        if field.plans <= step.offspring and self.run.layers is None:           # else of one block, for a forecast
            raise FieldError("offspring", step.offspring, f"less than {field.plans}: so many plans there are of these "
                                                          "units and levels")
        making = Making(partial(step.rank, multiple_of(self.run)), step.refit,
                        centre if step.accumulate == "centre" else None)
        net = making.net(self.model, replace(self.run, batches=self.divided[1]), parts, choices,
                         f"supernet {number + 1}")
        fitness = partial(self._fitness, net, draw)
        start = tuple(of.index(option) for of, option in zip(choices, centre, strict=True))
        found = self._seeds(field, parts, choices, start, fitness, draw, bool(before))
        values = dict(zip(found, fitness(list(found.values()), LAST), strict=True))
        best, log = evolved(field, found[min(values, key=values.get)], fitness, step.generations, step.offspring,
                            step.survivors, step.moves, draw, self.run.progress)
        LOG.info("%s, iteration %d: KL %.4f, of %s", step.name, number + 1, log[-1],
                 ", ".join(f"{name}: {value:.4f}" for name, value in values.items()))
        return {"seeds": values, "fitness": log, "options": [list(of[o]) for of, o in zip(choices, best, strict=True)],
                "layers": [net.layer_plan(b, o).to_dict() for b, o in enumerate(best)]}

    def _seeds(self, field: Space, parts: list[dict[str, Part]], choices: list[list[Option]], start: Plan,
               fitness: Fitness, draw: Random, later: bool) -> dict[str, Plan]:
        """Where the search begins: the centre, and plans of what was measured a step around it, or in the dense model.
        """
        found = {"centre" if later else "uniform": mended(field, start, draw)}
        if self.step.budgets == "each":
            return found
        damage = table(parts, choices, start if later else field.dense, fitness, not later)
        gone = [] if later else greedy(field, choices, damage, fitness)
        return found | filled(field, choices, damage, gone, draw)

    @cached_property
    def divided(self) -> tuple[Rows, Rows]:
        """See divided."""
        return divided(self.run.batches, self.step.seed, self.step.tokens[-1])

    @cached_property
    def rows(self) -> Prefixes:
        """The rows that the search sees, none longer than the first stage, with the dense model's logits."""
        length = self.step.tokens[0]
        rows = [{name: x[:, start:start + length] for name, x in row.items()}
                for row in self.divided[0] for start in range(0, row["input_ids"].shape[1] - 1, length)]
        if not rows:
            raise LlmoptError("the search needs calibration rows of at least two tokens")
        return Prefixes(self.model, self.run, rows, self.step.support)

    def _fitness(self, net: Supernet, draw: Random, plans: list[Plan], stage: int) -> list[float]:
        """D of plans on all rows, or before the last stage on some drawn anew: the first that have enough tokens."""
        order = list(range(len(self.rows.lengths)))
        if stage != LAST:
            draw.shuffle(order)
            tokens = list(accumulate(self.rows.lengths[row] for row in order))
            order = order[:1 + sum(total < self.step.tokens[stage] for total in tokens)]
        return self.rows.damage(plans, order, net.weights)


def divided(batches: Rows, seed: int, tokens: int) -> tuple[Rows, Rows]:
    """(single rows for the search, without padding; batches of all others, on which the candidates are fitted).

    Rows are drawn by `seed`, up to so many tokens and a quarter of all; of a single row both have it.
    """
    places = [(index, row) for index, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]
    drawn, total = set(), 0
    for place in torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist():
        index, row = places[place]
        total += int(batches[index]["attention_mask"][row].sum())
        if drawn and (total > tokens or AT_MOST * (len(drawn) + 1) > len(places)):
            break
        drawn.add((index, row))
    search = [{name: x[row:row + 1, :int(batches[index]["attention_mask"][row].sum())]
               for name, x in batches[index].items()} for index, row in sorted(drawn)]
    others = [[row for row in range(len(batch["input_ids"])) if (index, row) not in drawn]
              for index, batch in enumerate(batches)]
    rest = [{name: x[kept] for name, x in batch.items()} for batch, kept in zip(batches, others, strict=True) if kept]
    return search, rest or batches
