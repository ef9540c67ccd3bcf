"""CaM: the value of an entry that goes is spread over the kept ones behind it, more surely if it drew more attention.

    p_e = min(1, s_e / mean(s of the next m kept entries))              v_j <- v_j + z_e v_e / m for each of these m
    z_e = 1 with probability p_e, else 0          where fewer than m are left behind it, m is their number

Zhang et al., ICML 2024. s is the scorer's score, and has to be mean attention: of kv.h2o's sums the newest entries have
little, so that all in front of them is added to them in full (`mean: true` mends it). `sampled: false` takes p_e itself
for z_e. The lots hang on seed, layer, head and position alone, so a padded row draws as it does alone. Left out:
entries that go are treated at once and not one by one, so s of the kept is that before merging; one with no kept entry
behind it is dropped. Keys stay.
"""
from dataclasses import replace

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.reduce import evict, gone, worth
from llmopt.kv.reducers import Reducer
from llmopt.kv.view import LayerKV
from llmopt.parts import register
from llmopt.runtime.cache_layer import Entries


@register("cam")
@dataclass(frozen=True)
class CaM(Reducer):
    """The value of each is added, by lot and in equal parts, to the kept entries that follow it."""

    spread: int = Field(32, ge=1, description="kept entries that share a value, m")
    sampled: bool = Field(True, description="all or nothing by lot; false: a part of the value, the chance itself")
    seed: int = Field(0, ge=0, description="of the lots")

    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        others, weight = gone(entries, keep), worth(scores).double()
        lots = self._lots(kv, keep) if self.sampled else None
        values = entries.values.clone()
        for head, (stay, go) in enumerate(zip(keep, others, strict=True)):
            first = stay.cumsum(0)[go]                                       # [E] the kept entry behind each
            count = (stay.sum() - first).clamp(max=self.spread)
            chance = _chance(weight[head, go], weight[head, stay], first, count)
            part = chance if lots is None else (lots[head, go] < chance).double()
            shares = entries.values[head, go].double() * (part / count.clamp(min=1)).unsqueeze(-1)
            values[head, stay] += _spread(shares, first, int(stay.sum()), self.spread).to(values.dtype)
        return evict(replace(entries, values=values), keep)

    def _lots(self, kv: LayerKV, keep: Tensor) -> Tensor:
        """[G, T] in 0 ... 1, by position."""
        generator = torch.Generator().manual_seed(self.seed + kv.layer)
        drawn = torch.rand(int(kv.lengths[0]), len(keep), generator=generator, dtype=torch.float64).T.to(keep.device)
        return drawn.gather(1, kv.positions[0].clamp(min=0).long())


def _chance(own: Tensor, kept: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """[E]: the worth of each over the mean worth of the `count` kept entries from `first` on, at most 1; 0 for none."""
    before = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
    mean = (before[first + count] - before[first]) / count.clamp(min=1)
    return (own / mean.clamp(min=1e-30)).clamp(max=1) * (count > 0)


def _spread(shares: Tensor, first: Tensor, kept: int, width: int) -> Tensor:
    """[kept, D]: each of `shares` [E, D] added to `width` rows from its `first` on, as far as there are rows."""
    summed = shares.new_zeros(kept + 1, shares.shape[-1]).index_add_(0, first, shares).cumsum(0)[:kept]
    late = torch.zeros_like(summed)
    late[width:] = summed[:max(0, kept - width)]
    return summed - late
