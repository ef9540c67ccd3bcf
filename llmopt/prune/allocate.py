"""How many units each layer loses: pure functions on scores and costs.

A layer's units leave from the weakest up, in chunks that keep its width divisible by what later steps need. `globally`
ranks the chunks of all layers together; `locally` takes the same number from every layer of the same shape.
"""
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
    """

    layer: int
    kind: str
    scores: Tensor
    cost: int
    allowed: tuple[int, ...]
    index: Tensor

    @property
    def total(self) -> int:
        return len(self.scores) * self.cost


def allowed_counts(count: int, width: int, multiple: int, floor: int) -> tuple[int, ...]:
    """Numbers of units that may stay, from `count` downwards: at least `floor`, count * width divisible by `multiple`.

    Where no number at all is divisible (the dense model already does not fit), every number is allowed.
    """
    fits = [n for n in range(count, 0, -1) if n * width % multiple == 0]
    fewer = [n for n in (fits or range(count, 0, -1)) if floor <= n < count]
    return (count, *fewer)


def normalise(scores: Tensor, how: str) -> Tensor:
    """Scores of one layer made comparable with those of other layers.

    none: as they are; layer: divided by the layer's mean; lamp: n * s_j / (sum of the scores ranked at or above j).
    """
    values = scores.double()
    if how == "layer":
        return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    if how == "lamp":
        ordered, order = values.sort(descending=True, stable=True)
        tail = ordered.cumsum(0).clamp(min=torch.finfo(values.dtype).tiny)
        return torch.empty_like(values).scatter(0, order, ordered / tail * len(values))
    return values


def survivors(units: Units, count: int) -> Tensor:
    """The entries of `index` that stay when `count` units leave, ascending; ties leave in their order."""
    return units.index[units.scores.argsort(stable=True)[count:]].flatten().sort().values


def check_reachable(units: list[Units], ratio: float) -> None:
    """Raise BudgetError if the floors forbid to remove `ratio` of all parameters in `units`, rounding aside."""
    total = sum(u.total for u in units)
    reach = sum((len(u.scores) - u.allowed[-1]) * u.cost for u in units)
    step = max(((high - low) * u.cost for u in units for high, low in pairwise(u.allowed)), default=0)
    if ratio * total > reach + step:
        raise BudgetError(f"ratio {ratio:g} cannot be met: the floors leave {reach / total:.3f} of the chosen units "
                          f"to remove")


def globally(units: list[Units], ratio: float) -> list[int]:
    """Units to remove from each entry, at most `ratio` of all their parameters: the weakest chunks go first."""
    left = ratio * sum(u.total for u in units)
    removed, open_ = [0] * len(units), [True] * len(units)
    for _, entry, size in sorted(_chunks(units), key=lambda c: c[0]):
        price = size * units[entry].cost
        if open_[entry] and price <= left:
            removed[entry] += size
            left -= price
        else:
            open_[entry] = False        # what follows in this layer is stronger still
    return removed


def _chunks(units: list[Units]) -> list[tuple[float, int, int]]:
    """(mean score, entry, number of units) of each step down in each entry."""
    found = []
    for entry, u in enumerate(units):
        ordered = u.scores.double().sort().values
        start = 0
        for high, low in pairwise(u.allowed):
            found.append((float(ordered[start:start + high - low].mean()), entry, high - low))
            start += high - low
    return found


def locally(units: list[Units], ratio: float) -> list[int]:
    """Units to remove from each entry, at most `ratio` of every layer's parameters.

    Kinds with large units come first and take what is nearest to their share, the kind with the smallest units takes
    what is then left of the layer, rounded down.
    """
    removed = [0] * len(units)
    for layer in sorted({u.layer for u in units}):
        mine = sorted((i for i, u in enumerate(units) if u.layer == layer), key=lambda i: -units[i].cost)
        left = ratio * sum(units[i].total for i in mine)
        for i in mine:
            share = left if i == mine[-1] else ratio * units[i].total
            steps = [(len(units[i].scores) - n) * units[i].cost for n in units[i].allowed]       # ascending, from 0
            freed = min((step for step in steps if step <= left), key=lambda step: abs(step - share))
            removed[i] = freed // units[i].cost
            left -= freed
    return removed
