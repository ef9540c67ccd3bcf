"""How many units each layer loses: pure functions on scores and costs.

A layer's units leave from the weakest up, in chunks that keep its width divisible by what later steps need. `globally`
ranks the chunks of all layers together; `locally` takes the same number from every layer of the same shape.
"""
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmopt.errors import BudgetError


@dataclass(frozen=True)
class Units:
    """The prunable units of one kind in one layer.

    scores: [n], larger stays longer; cost: parameters per unit; allowed: numbers that the layer may keep, from n down.
    index: [n, k], the channels, groups or heads that unit i stands for (k > 1: they can only leave together).
    prices: what the layer takes of the budget with each number that is allowed; None: its parameters.
    """

    layer: int
    kind: str
    scores: Tensor
    cost: int
    allowed: tuple[int, ...]
    index: Tensor
    prices: tuple[int, ...] | None = None

    def price(self, count: int) -> int:
        """What `count` units, a number that is allowed, take of the budget."""
        return count * self.cost if self.prices is None else self.prices[self.allowed.index(count)]

    def freed(self, gone: int) -> int:
        """What the budget gains when `gone` units leave."""
        return self.total - self.price(len(self.scores) - gone)

    @property
    def total(self) -> int:
        """What all units take of the budget."""
        return self.price(len(self.scores))

    @property
    def most(self) -> int:
        """Units that may leave at most."""
        return len(self.scores) - self.allowed[-1]


def allowed_counts(count: int, width: int, multiple: int, floor: int) -> tuple[int, ...]:
    """Numbers of units that may stay, from `count` downwards: at least `floor`, count * width divisible by `multiple`.

    Where no number at all is divisible (the dense model already does not fit), every number is allowed.
    """
    fits = [n for n in range(count, 0, -1) if n * width % multiple == 0]
    fewer = [n for n in (fits or range(count, 0, -1)) if floor <= n < count]
    return (count, *fewer)


def normalise(scores: Tensor, how: str) -> Tensor:
    """Scores of one layer made comparable with those of other layers.

    none: as they are; layer: divided by the layer's mean; lamp: n * s_j / (sum of the scores ranked at or above j);
    standard: less the layer's mean, divided by its standard deviation.
    """
    values = scores.double()
    if how == "layer":
        return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    if how == "standard":
        return (values - values.mean()) / values.std(correction=0).clamp(min=torch.finfo(values.dtype).tiny)
    if how == "lamp":
        ordered, order = values.sort(descending=True, stable=True)
        tail = ordered.cumsum(0).clamp(min=torch.finfo(values.dtype).tiny)
        return torch.empty_like(values).scatter(0, order, ordered / tail * len(values))
    return values


def survivors(units: Units, count: int) -> Tensor:
    """The entries of `index` that stay when `count` units leave, ascending; ties leave in their order."""
    return units.index[units.scores.argsort(stable=True)[count:]].flatten().sort().values


def check_reachable(units: list[Units], ratio: float) -> None:
    """Raise BudgetError if the floors forbid to remove `ratio` of all that `units` take, rounding aside."""
    total = sum(u.total for u in units)
    reach = sum(u.freed(u.most) for u in units)
    step = max((u.price(high) - u.price(low) for u in units for high, low in pairwise(u.allowed)), default=0)
    if ratio * total > reach + step:
        raise BudgetError(f"ratio {ratio:g} cannot be met: the floors leave {reach / total:.3f} of the chosen units "
                          f"to remove")


def least_ratio(units: list[Units], by_layer: bool) -> float:
    """The ratio from which on something leaves: the smallest step's share, of all units or of those of its layer.

    In ten thousandths, rounded up.
    """
    def share(some: list[Units]) -> float:
        return min((u.freed(len(u.scores) - u.allowed[1]) for u in some if len(u.allowed) > 1), default=math.inf) / \
            sum(u.total for u in some)

    layers = {u.layer for u in units} if by_layer else {None}
    return math.ceil(1e4 * min(share([u for u in units if layer in (None, u.layer)]) for layer in layers) - 1e-9) / 1e4


def globally(units: list[Units], ratio: float) -> list[int]:
    """Units to remove from each entry, at most `ratio` of all that they take: the weakest chunks go first."""
    left = ratio * sum(u.total for u in units)
    removed, open_ = [0] * len(units), [True] * len(units)
    for _, entry, size, price in sorted(_chunks(units), key=lambda c: c[0]):
        if open_[entry] and price <= left:
            removed[entry] += size
            left -= price
        else:
            open_[entry] = False        # what follows in this layer is stronger still
    return removed


def _chunks(units: list[Units]) -> list[tuple[float, int, int, int]]:
    """(mean score, entry, number of units, what they take) of each step down in each entry."""
    found = []
    for entry, u in enumerate(units):
        ordered = u.scores.double().sort().values
        start = 0
        for high, low in pairwise(u.allowed):
            mean = float(ordered[start:start + high - low].mean())
            found.append((mean, entry, high - low, u.price(high) - u.price(low)))
            start += high - low
    return found


def locally(units: list[Units], ratio: float) -> list[int]:
    """Units to remove from each entry, at most `ratio` of what every layer takes.

    Kinds with large units come first and take what is nearest to their share, the kind with the smallest units takes
    what is then left of the layer, rounded down.
    """
    removed = [0] * len(units)
    for layer in sorted({u.layer for u in units}):
        mine = sorted((i for i, u in enumerate(units) if u.layer == layer), key=lambda i: -units[i].cost)
        left = ratio * sum(units[i].total for i in mine)
        for i in mine:
            share = left if i == mine[-1] else ratio * units[i].total
            steps = [len(units[i].scores) - n for n in units[i].allowed]                         # ascending, from 0
            fits = [n for n in steps if units[i].freed(n) <= left]
            removed[i] = min(fits, key=lambda n, i=i, share=share: abs(units[i].freed(n) - share))
            left -= units[i].freed(removed[i])
    return removed


def rounded(units: list[Units], wanted: list[float], ratio: float) -> list[int]:
    """Units to remove from each entry: what frees `wanted`, rounded down, then up in turn while `ratio` lasts.

    Those that are nearest to their next number are rounded up first.
    """
    tiny = 1e-9 * sum(u.total for u in units)
    steps = [[len(u.scores) - n for n in u.allowed] for u in units]                              # ascending, from 0
    removed = [max(n for n in some if u.freed(n) <= want + tiny)
               for u, some, want in zip(units, steps, wanted, strict=True)]
    left = ratio * sum(u.total for u in units) + tiny - sum(map(Units.freed, units, removed))
    beyond = [(units[i].freed(up) - wanted[i], i, up) for i, some in enumerate(steps)
              for up in some[some.index(removed[i]) + 1:][:1] if units[i].freed(removed[i]) + tiny < wanted[i]]
    for _, i, up in sorted(beyond):
        price = units[i].freed(up) - units[i].freed(removed[i])
        if price <= left:
            removed[i], left = up, left - price
    return removed
