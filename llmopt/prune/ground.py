"""What a search across all kinds of units can take of a model, what that is worth, and how much has to go.

Each block has two parts, attention and FFN. Of a part some units leave, or all of it where `attention` or `mlp` is
among the units; a block leaves as a whole by `blocks`, and where both its parts may.
"""
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from llmopt.errors import BudgetError, LlmoptError
from llmopt.model.blocks import Block
from llmopt.prune.allocate import Units
from llmopt.prune.groups import cost, members
from llmopt.prune.supernet import PARTS, Option, Part, options, widths
from llmopt.prune.surgery import LayerPlan

FINE = {"attention": ("kv_groups", "q_heads"), "mlp": ("ffn",)}


class Ground:
    """parts: of each block, with no levels yet. whole: parameters that leave with each block. budget: by account.

    chosen: kinds of units. each: attention and FFN have accounts of their own. rank: see Pruner._ranked.
    """

    def __init__(self, views: list[Block], chosen: set[str], ratio: float, each: bool,
                 rank: Callable[[Block, str, torch.Tensor], Units]):
        self.chosen, self.ratio, self.rank = chosen, ratio, rank
        self.parts = [{which: self._part(block, which) for which in PARTS} for block in views]
        self.whole = [cost(block, "blocks") for block in views]
        self.gone = {which: which in chosen for which in PARTS}
        self.drop = "blocks" in chosen or all(self.gone.values())
        reached = [[self._reached(own[which], which) for which in PARTS] for own in self.parts]
        self.totals = [sum(column) for column in zip(*reached, strict=True)] if each else [sum(map(sum, reached))]
        if "blocks" in chosen:
            self.totals = [sum(self.whole)]
        if not sum(self.totals):
            raise LlmoptError(f"the model has none of the units {', '.join(sorted(chosen))} left")
        self.budget = tuple(int(ratio * total) for total in self.totals)

    def _part(self, block: Block, which: str) -> Part:
        kind = next((kind for kind in FINE[which] if kind in self.chosen and members(block, kind)), None)
        if kind is None:
            return Part(None, int(bool(members(block, which))), cost(block, which))
        units = self.rank(block, kind, torch.linspace(1, 2, len(members(block, kind)[-1].index)))
        return Part(units, len(units.scores), cost(block, which))

    def _reached(self, part: Part, which: str) -> int:
        """Parameters of a part that the units share."""
        if part.units is not None and not self.gone[which] and not self.drop:
            return part.count * part.units.cost
        return part.whole if self.gone[which] or self.drop or part.units is not None else 0

    def around(self, centre: list[Option], step: float, side: int) -> tuple[list[dict[str, Part]], list[list[Option]]]:
        """Parts with levels and options of each block; see widths. step: a share of a part's units."""
        parts = [{which: Part(part.units, part.count, part.whole,
                              widths(part, taken, step * part.count, side, self.gone[which] and part.count > 0))
                  for (which, part), taken in zip(own.items(), option, strict=False)}
                 for own, option in zip(self.parts, centre, strict=True)]
        return parts, [options(own, self.drop) for own in parts]

    def uniform(self) -> list[Option]:
        """The same share of each block, as near as units of attention go, the rest of the share from its FFN."""
        found = []
        for own in self.parts:
            shares = [self.ratio * self._reached(own[which], which) for which in PARTS]
            attention = _most(own["attention"], shares[0])
            left = shares[1] if len(self.budget) == 2 else sum(shares) - own["attention"].price(attention)
            found.append(Option(attention, _most(own["mlp"], left)))
        return found

    def check_reachable(self) -> None:
        """Raise BudgetError where no plan takes so much away, or where it does not pay for the smallest step."""
        for account, (total, budget) in enumerate(zip(self.totals, self.budget, strict=True)):
            names = PARTS if len(self.budget) == 1 else (PARTS[account],)
            most, least = self._reach(names)
            if budget > most:
                raise BudgetError(f"ratio {self.ratio:g} cannot be met: the floors leave {most / total:.3f} of the "
                                  f"chosen units to remove{'' if len(names) == 2 else f' of {names[0]}'}")
            if budget < least:
                raise BudgetError(f"ratio {self.ratio:g} is less than one unit of {', '.join(sorted(self.chosen))} "
                                  f"({least / total:.3g}; nothing would be removed); raise it")

    def _reach(self, names: tuple[str, ...]) -> tuple[int, int]:
        """(the most, the least above nothing) that can leave of these parts of all blocks, one attention staying."""
        most, kept, least = 0, [], []
        for own, whole in zip(self.parts, self.whole, strict=True):
            prices = {which: self._prices(own[which], which) for which in names}
            thinned = sum(max(prices[which]) for which in names)
            stays = thinned
            if "attention" in names and self.gone["attention"]:
                stays -= max(prices["attention"]) - max(self._prices(own["attention"], "attention", gone=False))
            best = max(thinned, whole) if self.drop and len(names) == 2 else thinned
            most, kept = most + best, [*kept, best - stays]
            least += [price for of in prices.values() for price in of if price] + [whole] * (best == whole)
        return most - (min(kept) if "attention" in names else 0), min(least, default=0)

    def _prices(self, part: Part, which: str, gone: bool | None = None) -> list[int]:
        """What can leave of a part."""
        fine = [] if part.units is None else [part.price(part.count - kept) for kept in part.units.allowed]
        return [0, *fine] + [part.whole] * (self.gone[which] if gone is None else gone)

    def first(self, index: int, option: Option) -> LayerPlan:
        """A plan of the right size for a block, whichever its units are."""
        if option.drop:
            return LayerPlan(drop=True)
        kept: dict[str, Any] = {}
        for part, taken in zip(self.parts[index].values(), option, strict=False):
            if taken and not part.gone(taken):
                kind = part.units.kind
                kept["heads" if kind == "q_heads" else kind] = part.units.index[taken:].flatten().sort().values
        return LayerPlan(**kept, skip=tuple(which for which, taken in zip(PARTS, option, strict=False)
                                            if self.parts[index][which].gone(taken)))

    def told(self, found: list[Option], plans: list[LayerPlan]) -> tuple[list[LayerPlan], dict[str, Any]]:
        """The plans, and what leaves under them, for a record."""
        units, freed = Counter(), 0
        for own, whole, option in zip(self.parts, self.whole, found, strict=True):
            pairs = [(which, own[which], taken) for which, taken in zip(PARTS, option, strict=False) if taken]
            freed += whole if option.drop else sum(part.price(taken) for _, part, taken in pairs)
            units["blocks"] += option.drop
            for which, part, taken in () if option.drop else pairs:
                gone = part.gone(taken)
                units[which if gone else part.units.kind] += 1 if gone else taken * part.units.index.shape[1]
        return plans, {"ratio": self.ratio, "removed_share": freed / sum(self.totals),
                       "removed_units": {kind: count for kind, count in units.items() if count}}


def _most(part: Part, share: float) -> int:
    """The largest number of units, of those that the part may lose, that takes no more than a share."""
    possible = [0] if part.units is None else [part.count - kept for kept in part.units.allowed]
    return max(taken for taken in possible if part.price(taken) <= share)
