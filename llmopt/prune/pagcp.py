"""PAGCP: part after part loses as much as a threshold on the loss allows, on the model as it has been cut so far.

    for the i-th part:  the largest share r with  L(cut so far, and r of part i) <= (1 + t_i) L(cut so far)
    t_i = t_1 lambda^i,       prod_i (1 + t_i) = growth,       t_1 = growth^(first / n) - 1

L: next-token loss on some calibration rows. Parts go in the order of what a cut of .3 frees, the largest first. Shares
are those of a grid, found by halving, as if the loss rose with the share. What was cut beyond the ratio is given back
where the loss had risen most for what was freed. Without a `growth`, the least one that reaches the ratio is looked
for: growth doubles its logarithm until it does, then a few halvings.

Ye et al., 2023 ("Performance-aware approximation of global channel pruning"). Theirs chooses by the L1 norm; here the
step's criterion does. Left out: several tasks with a threshold each, as calibration data have one source; rounds of
training in between. Cuts are tried without the refit, which follows.
"""
import math
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.calls import decoded_behind, record_calls
from llmopt.calibration.losses import row_losses
from llmopt.calibration.trials import in_block, sample
from llmopt.calibration.walk import Visit, refuse_without_data
from llmopt.errors import BudgetError, LlmoptError
from llmopt.model.blocks import blocks, layer_list
from llmopt.parts import register
from llmopt.prune.allocate import Units
from llmopt.prune.scopes import Demand, Removed, Scope
from llmopt.prune.stand_ins import StandIns

GRID = [n / 20 for n in range(20)]              # 0, .05, ... .95
TYPICAL = 0.3                                   # the share by which parts are put in order
START, DOUBLINGS, HALVINGS = 0.1, 7, 3          # of the logarithm of growth


@register("pagcp")
@dataclass(frozen=True)
class PAGCP(Scope):
    """Greedy, under thresholds on the loss; many forwards, half a model's each: for small models, or a GPU."""

    learns: ClassVar[bool] = True

    growth: float | None = Field(None, gt=1, description="the loss may grow to so many times itself; null: the least "
                                                         "that reaches the ratio")
    first: float = Field(2.0, ge=1, description="logarithm of the first part's growth, in even shares; 1: all alike")
    trial_tokens: int = Field(2048, ge=1, description="tokens of calibration data on which the loss is measured")

    @torch.no_grad()
    def removed(self, demand: Demand) -> Removed:
        refuse_without_data(demand.run)
        losses = Losses(demand, sample(demand.run.batches, demand.run.seed, self.trial_tokens))
        growth, found = self._enough(demand, losses)
        removed, thresholds, rises = found["removed"], found["thresholds"], found["rises"]
        return given_back(demand.units, removed, rises, demand.ratio), {
            "growth": growth, "thresholds": thresholds, "rises": rises}

    def _enough(self, demand: Demand, losses: "Losses") -> tuple[float, dict[str, Any]]:
        """(growth, what the greedy walk found) where at least the ratio leaves."""
        room = max(u.price(a) - u.price(b) for u in demand.units for a, b in pairwise(u.allowed))
        wanted = demand.ratio * sum(u.total for u in demand.units) - room

        def walk(growth: float) -> tuple[dict[str, Any], int]:
            found = demand.run.memory.remember(f"growth {growth:.9g}", lambda: greedy(losses, growth, self.first))
            return found, sum(u.freed(n) for u, n in zip(demand.units, found["removed"], strict=True))

        if self.growth is not None:
            found, freed = walk(self.growth)
            if freed < wanted:
                raise BudgetError(f"ratio {demand.ratio:g} cannot be met with a growth of {self.growth:g}: 0 to "
                                  f"{freed / sum(u.total for u in demand.units):.3f} of the chosen units can leave")
            return self.growth, found
        low, high = 0.0, START
        for _ in range(DOUBLINGS):
            best, freed = walk(math.exp(high))
            if freed >= wanted:
                break
            low, high = high, 2 * high
        else:
            raise BudgetError(f"ratio {demand.ratio:g} cannot be met: 0 to "
                              f"{freed / sum(u.total for u in demand.units):.3f} of the chosen units can leave")
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found, freed = walk(math.exp(middle))
            low, high, best = (low, middle, found) if freed >= wanted else (middle, high, best)
        return math.exp(high), best


def thresholds(count: int, growth: float, first: float) -> list[float]:
    """t_i of `count` parts, falling, whose product of 1 + t_i is `growth`."""
    start = growth ** (min(first, count) / count) - 1
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        reached = math.fsum(math.log1p(start * middle ** i) for i in range(count))
        low, high = (low, middle) if reached > math.log(growth) else (middle, high)
    return [start * high ** i for i in range(count)]


def greedy(losses: "Losses", growth: float, first: float) -> dict[str, Any]:
    """{removed: units of each entry, thresholds: of each, rises: the relative rise of the loss at its turn}."""
    units = losses.demand.units
    order = sorted((i for i, u in enumerate(units) if u.most), key=lambda i: (-_typical(units[i]), i))
    plan, base = [0] * len(units), losses.begin()
    told = {"thresholds": [0.0] * len(units), "rises": [0.0] * len(units)}
    for i, threshold in zip(order, thresholds(len(order), growth, first), strict=True):
        steps = sorted({nearest(units[i], share) for share in GRID})
        low, high, reached = 0, len(steps) - 1, base
        while low < high:
            middle = (low + high + 1) // 2
            now = losses.of([*plan[:i], steps[middle], *plan[i + 1:]], units[i].layer)
            if now <= (1 + threshold) * base:
                low, reached = middle, now
            else:
                high = middle - 1
        plan[i] = steps[low]
        losses.changed(units[i].layer)
        told["thresholds"][i], told["rises"][i] = threshold, reached / base - 1
        base = reached
    return {"removed": plan, **told}


def given_back(units: list[Units], removed: list[int], rises: list[float], ratio: float) -> list[int]:
    """The plan, less what is beyond `ratio`: first of the parts where the loss had risen most for what was freed."""
    kept, room = list(removed), ratio * sum(u.total for u in units) * (1 + 1e-12)
    order = sorted((i for i, n in enumerate(removed) if n),
                   key=lambda i: (-rises[i] / max(1, units[i].freed(removed[i])), i))
    for i in order:
        over = sum(u.freed(n) for u, n in zip(units, kept, strict=True)) - room
        if over <= 0:
            break
        able = [len(units[i].scores) - count for count in units[i].allowed]
        fits = [n for n in able if n <= removed[i] and units[i].freed(removed[i]) - units[i].freed(n) >= over]
        kept[i] = max(fits, default=0)
    return kept


def nearest(u: Units, share: float) -> int:
    """The number of units that may leave nearest to a share."""
    return min((len(u.scores) - count for count in u.allowed), key=lambda gone: abs(gone - share * len(u.scores)))


def _typical(u: Units) -> int:
    return u.freed(nearest(u, TYPICAL))


class Losses:
    """The mean loss of a few rows under plans of cuts; what a block reads is kept until a cut before it changes."""

    def __init__(self, demand: Demand, rows: list[dict[str, Tensor]]):
        self.demand, run = demand, demand.run
        self.rows = run.ranks.share(rows)
        self.memory = run.memory.reading.holding(len(layer_list(demand.model)) + 3)
        inputs, self.calls = record_calls(demand.model, self.rows, self.memory)
        self.front: dict[int, list[Tensor]] = {0: inputs}

    @cached_property
    def count(self) -> int:
        """Rows of all processes."""
        return sum(self.demand.run.ranks.gather(len(self.rows)))

    def begin(self) -> float:
        """The loss of the dense model, from which plans start anew."""
        self.front = {0: self.front[0]}
        return self.of([0] * len(self.demand.units), 0)

    def changed(self, layer: int) -> None:
        """What is read behind this block is no longer what it was."""
        self.front = {index: kept for index, kept in self.front.items() if index <= layer}

    def of(self, plan: list[int], layer: int) -> float:
        """The loss under a plan that differs in this block, or from here on, from the plans seen before `changed`."""
        hidden = None
        for index, hidden in self._through(plan, layer):
            if index <= layer:
                self.front[index] = hidden
        total = 0.0
        model = self.demand.model
        with self.memory.outside(model, head=True):
            for row, x in zip(self.rows, hidden or [], strict=True):
                ids, mask = (row[key].to(model.device) for key in ("input_ids", "attention_mask"))
                total += float(row_losses(model, decoded_behind(model, row, x), ids, mask).double().sum())
        found = sum(self.demand.run.ranks.gather(total)) / self.count
        if not math.isfinite(found):
            raise LlmoptError("the loss of a cut model is not finite on the calibration data")
        return found

    def _through(self, plan: list[int], layer: int) -> Iterator[tuple[int, list[Tensor]]]:
        """(index, what block `index` reads under the plan), from the last known one at or before `layer` to the end."""
        model, units = self.demand.model, self.demand.units
        start = max(index for index in self.front if index <= layer)
        hidden, count = self.front[start], len(layer_list(model))
        for index in range(start, count):
            hold = self.memory.keeper()
            with self.memory.block(model, index):
                block = blocks(model)[index]
                cut = StandIns(block, units, self.demand.run, None, {}).weights(
                    {u.kind: gone for u, gone in zip(units, plan, strict=True) if u.layer == index})
                visit = Visit(model, block, hidden, self.calls[index], [])
                hidden = [hold(visit.forward(row, in_block(block, cut))) for row in range(len(self.rows))]
            yield index + 1, hidden
