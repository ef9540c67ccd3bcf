"""Keys or values of which some are in codes; the newest entries stay as they are."""
from dataclasses import dataclass

import torch
from llmopt_kernels import Packed
from torch import Tensor

from llmopt.kv.codes import Codes
from llmopt.kv.products import products, weighted


@dataclass(frozen=True)
class Mixed(Packed):
    """Entries of which some are in codes and the others dense, in the order in which they lie.

    stretches: int64 on the CPU, how many entries in a row are in codes, are dense, are in codes, ...
    """

    stretches: Tensor
    codes: Codes                 # of M entries
    new: Tensor                  # [N - M, D]
    shape: tuple[int, ...]       # leading axes; their product is N

    @classmethod
    def of(cls, old: Tensor, codes: Codes, new: Tensor) -> "Mixed":
        """old: bool, of the shape of the leading axes: where the entries in codes lie."""
        kinds, stretches = torch.unique_consecutive(old.flatten(), return_counts=True)
        first = stretches.new_zeros(int(len(kinds) > 0 and not bool(kinds[0])))
        return cls(torch.cat([first, stretches]).cpu(), codes, new, tuple(old.shape))

    @property
    def old(self) -> Tensor:
        """bool [N]: the entries that are in codes."""
        kinds = torch.arange(len(self.stretches)) % 2 == 0
        return kinds.repeat_interleave(self.stretches).to(self.new.device)

    @property
    def places(self) -> Tensor:
        """int64 [N]: the place of every entry in `codes` or in `new`."""
        old = self.old
        return torch.where(old, old.cumsum(0), (~old).cumsum(0)) - 1

    def __getitem__(self, index) -> "Mixed":
        if isinstance(index, slice) and len(self.shape) == 1:
            return self._slice(*index.indices(self.shape[0])[:2])
        chosen = torch.arange(len(self.old), device=self.new.device).view(self.shape)[index]
        old, places = self.old[chosen], self.places[chosen]
        return Mixed.of(old, self.codes[places[old]], self.new[places[~old]])

    def _slice(self, start: int, stop: int) -> "Mixed":
        """Neighbours, without looking at the others."""
        end, before, within = 0, 0, []
        for index, count in enumerate(self.stretches.tolist()):
            first, end = end, end + count
            within.append(max(0, min(end, stop) - max(first, start)))
            before += max(0, min(end, start) - first) if index % 2 == 0 else 0
        many = sum(within[::2])
        there = [pair for pair in zip(within[::2], [*within[1::2], 0], strict=False) if any(pair)]
        return Mixed(torch.tensor(there, dtype=torch.long).flatten(), self.codes[before:before + many],
                     self.new[start - before:stop - before - many], (stop - start,))

    def products(self, rows: Tensor) -> Tensor:
        if rows.requires_grad:                                      # `products` of codes writes in place
            return super().products(rows)
        if (layout := self._layout(len(rows))) is None and len(rows) > 1:
            lanes = zip(self._lanes(len(rows)), rows.split(1), strict=True)
            return torch.cat([lane.products(row) for lane, row in lanes])
        new = self.new.float().unflatten(0, (len(rows), len(self.new) // len(rows)))
        found = torch.cat([products(self.codes, rows), rows @ new.transpose(1, 2)], 2)
        if layout is not None:
            return found
        return found[..., torch.where(self.old, self.places, len(self.codes) + self.places)]

    def weighted(self, weights: Tensor) -> Tensor:
        if weights.requires_grad:
            return super().weighted(weights)
        if (layout := self._layout(len(weights))) is None and len(weights) > 1:
            lanes = zip(self._lanes(len(weights)), weights.split(1), strict=True)
            return torch.cat([lane.weighted(row) for lane, row in lanes])
        both = weights.split(layout, 2) if layout else (weights[..., self.old], weights[..., ~self.old])
        new = self.new.float().unflatten(0, (len(weights), len(self.new) // len(weights)))
        return weighted(self.codes, both[0]) + both[1] @ new

    def _layout(self, lanes: int) -> tuple[int, int] | None:
        """How many entries in codes and dense ones behind them each of so many lanes has; None: it varies."""
        runs = self.stretches.tolist()
        if not any(runs[::2]) or not any(runs[1::2]):
            return len(self.codes) // lanes, len(self.new) // lanes
        return tuple(runs[:2]) if runs == runs[:2] * lanes else None

    def _lanes(self, count: int) -> list["Mixed"]:
        """The entries of each of so many lanes of equal length."""
        length = self.shape[0] // count
        return [self[lane * length:(lane + 1) * length] for lane in range(count)]

    def dense(self) -> Tensor:
        old = self.old
        x = self.new.new_empty(len(old), self.new.shape[-1])
        x[old], x[~old] = self.codes.dense().to(x.dtype), self.new
        return x.view(*self.shape, x.shape[-1])

    @classmethod
    def cat(cls, parts: list["Mixed"]) -> "Mixed":
        return cls.of(torch.cat([part.old for part in parts]), Codes.cat([part.codes for part in parts]),
                      torch.cat([part.new for part in parts]))

    def tensors(self) -> list[Tensor]:
        return [self.stretches, *self.codes.tensors(), self.new]
