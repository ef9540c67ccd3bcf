"""D2O's merging: an entry that goes lives on in the kept one whose key is most like its own, if it is like enough.

    u_e = max_c cos(k_e, k_c), c = the entry it is reached at          tau_t = (1 - rate) tau_{t-1} + rate mean_e u_e
    k_c <- (k_c + sum u_e k_e) / (1 + sum u_e), v_c likewise, over those e of u_e >= tau_t;     tau_0 = the first mean

Wan et al., 2024 (arXiv:2406.13035). tau is a moving average over compressions; the first takes its own mean. Where the
authors' code divides by the number of entries, which makes keys shorter, the mean here is weighted. Left out: budgets
by the variance of attention (`allocate` shares them out), one threshold for all heads of a layer (each has its own),
and the first and last two layers in full. Cosines below 0 count as 0. The paper averages keys as they are, at whatever
places; `merge_keys: false` leaves them alone. Every entry carries tau from turn to turn, four bytes.
"""
from dataclasses import replace

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.reduce import closest, evict, gone, mean_into
from llmopt.kv.reducers import Reducer
from llmopt.kv.view import LayerKV
from llmopt.parts import register
from llmopt.runtime.cache_layer import Entries

COLUMN = "d2o"          # 1 + tau, so that 0 says that there is none yet


@register("d2o")
@dataclass(frozen=True)
class D2O(Reducer):
    """Keys and values are averaged into those of the kept entry with the most similar key, the others dropped."""

    rate: float = Field(0.5, gt=0, le=1, description="how much of the threshold each compression renews")
    merge_keys: bool = Field(True, description="the keys too")

    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        others = gone(entries, keep)
        likeness, target = closest([entries.keys], keep, others)
        tau = self._threshold(entries.column(COLUMN), likeness, others)
        weight = torch.where(keep, 1.0, likeness.where(others & (likeness >= tau), 0.0))
        keys = mean_into(entries.keys, target, weight) if self.merge_keys else entries.keys
        carried = entries.carried | {COLUMN: (1 + tau).expand(keep.shape).clone()}
        values = mean_into(entries.values, target, weight)
        return evict(replace(entries, keys=keys, values=values, carried=carried), keep)

    def _threshold(self, before: Tensor, likeness: Tensor, others: Tensor) -> Tensor:
        """[G, 1]: a head's threshold now, from that which its entries carry; where none go, as it was."""
        before = before.amax(-1, keepdim=True) - 1
        count = others.sum(-1, keepdim=True)
        mean = likeness.where(others, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
        mixed = torch.where(before < 0, mean, (1 - self.rate) * before + self.rate * mean)
        return torch.where(count > 0, mixed, before)
