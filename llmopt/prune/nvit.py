"""NViT: units leave by what they matter to the loss, against the time that they take.

    I(unit) = mean over s of ( dL(s) / dgate )^2                    L, gates: see gates.py
    score(unit) = I / sum of all I  -  eta  (time now - time without it) / time of all units

Of the units of all layers and kinds, those of the lowest score leave one after the other, under the floors of each
layer, until `ratio` of the time is saved; what a unit saves is read off again after each that left. `scope: nvit` is
the second line, for any criterion; without `eta` the lowest of I / (time saved) leave, which is the eta that the target
asks for. Time is counted in parameters, or measured for layers of these widths on this machine (latency.py); then no
two runs need decide alike.

Yang et al., 2023 (arXiv:2110.04869), who sum w dL/dw over all weights of a structure, where a gate counts each slope
once and heads and channels need no factors to compare; they square it for each minibatch (`over: batch`). Left out: the
training between cuts, on whose batches they measure I anew, so that here it is measured once; their loss's distance
from the dense model, whose slope there is 0; and the residual width and the sizes of heads, which stay.
"""
import heapq
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.parts import register
from llmopt.prune.allocate import Units
from llmopt.prune.gates import ByGates
from llmopt.prune.latency import measured
from llmopt.prune.scopes import Demand, Removed, Scope


@register("nvit")
@dataclass(frozen=True)
class LatencyAware(Scope):
    """The units of the whole model that matter least for the time that they take (NViT)."""

    eta: float | None = Field(None, ge=0, description="weight of a unit's share of the time against its share of all "
                                                      "scores; null: as the target asks for")
    latency: Literal["parameters", "prefill", "decode"] = Field(
        "parameters", description="what takes time: parameters, or measured on this machine: 2048 tokens at once, or "
                                  "one token behind 2048")

    def removed(self, demand: Demand) -> Removed:
        if self.latency == "parameters":
            return ranked(demand.units, demand.ratio, self.eta), {}
        device = getattr(demand.run.memory, "device", demand.model.device)      # streamed, the model itself has none
        timed = demand.run.ranks.agree(measured(demand.model, demand.units, self.latency, device))
        units = [replace(u, prices=prices) for u, prices in zip(demand.units, timed, strict=True)]
        found = ranked(units, demand.ratio, self.eta)
        left = sum(u.total - u.freed(gone) for u, gone in zip(units, found, strict=True))
        return found, {"nanoseconds": [sum(u.total for u in units), left]}


@register("prune.nvit")
@dataclass(frozen=True)
class NViT(ByGates):
    """A forward and a backward pass over the calibration data."""

    scope: Scope = Field(LatencyAware(), description="how many leave from each layer; nvit: by score and time saved")

    def measure(self, slopes: Tensor) -> Tensor:
        return slopes.square()


def ranked(units: list[Units], ratio: float, eta: float | None) -> list[int]:
    """Units to remove from each entry, at most `ratio` of all that they take: the lowest chunks go first."""
    whole, weight = sum(u.total for u in units), sum(float(u.scores.double().sum()) for u in units) or 1.0
    steps = [_steps(u, weight, whole, eta) for u in units]
    left, removed = ratio * whole, [0] * len(units)
    queue = [(found[0][0], entry, 0) for entry, found in enumerate(steps) if found]
    heapq.heapify(queue)
    while queue:
        _, entry, number = heapq.heappop(queue)
        _, size, price = steps[entry][number]
        if price <= left:                       # else what follows in this layer stays as well
            removed[entry] += size
            left -= price
            if number + 1 < len(steps[entry]):
                heapq.heappush(queue, (steps[entry][number + 1][0], entry, number + 1))
    return removed


def _steps(u: Units, weight: float, whole: int, eta: float | None) -> list[tuple[float, int, int]]:
    """(score of its mean unit, number of units, what they take) of each step down, from the weakest units up.

    weight, whole: all scores, and what all units take. Without eta the score is that for each share of the time.
    """
    sums, found = u.scores.double().sort().values.cumsum(0), []
    for high, low in pairwise(u.allowed):
        first, last = len(u.scores) - high, len(u.scores) - low
        share = float(sums[last - 1] - (sums[first - 1] if first else 0)) / weight
        saved, price = (u.price(high) - u.price(low)) / whole, u.price(high) - u.price(low)
        own = share / max(saved, 1e-30) if eta is None else (share - eta * saved) / (last - first)
        found.append((own, last - first, price))
    return found
