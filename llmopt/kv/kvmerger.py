"""KVMerger: runs of neighbours with like keys become one entry each, a mean that falls off with distance to its pivot.

    a run goes on while cos(k_i, k_i+1) > threshold; e goes to the pivot p, the kept entry of its run that is nearest
    w_e = exp(-|k_p - k_e|^2 / (2 sigma^2))             k_p <- (k_p + sum w_e k_e) / (1 + sum w_e), v_p likewise

Wang et al., 2024 (arXiv:2407.08454). sigma^2 is the mean of |k_p - k_e|^2 in the head, a choice of ours: the paper's is
not known to us. Left out: there the runs alone say how much is kept; here the budget does, and a run of several kept
entries has as many pivots. One without any is dropped. `merge_keys: false` leaves keys alone.
"""
from dataclasses import replace

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llmopt.kv.reduce import evict, gone, mean_into
from llmopt.kv.reducers import Reducer
from llmopt.kv.view import LayerKV
from llmopt.parts import register
from llmopt.runtime.cache_layer import Entries


@register("kvmerger")
@dataclass(frozen=True)
class KVMerger(Reducer):
    """Keys and values are averaged into the nearest kept entry of the same run of like keys, the others dropped."""

    threshold: float = Field(0.75, ge=-1, le=1, description="likeness of neighbouring keys above which a run goes on")
    merge_keys: bool = Field(True, description="the keys too")

    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        target, found = pivots(runs(entries.keys.float(), self.threshold), keep)
        joins = found & gone(entries, keep)
        keys = entries.keys.float()
        far = (keys - keys.gather(1, target.unsqueeze(-1).expand_as(keys))).square().sum(-1)             # [G, T]
        variance = far.where(joins, 0.0).sum(-1, keepdim=True) / joins.sum(-1, keepdim=True).clamp(min=1)
        near = torch.exp(-far / (2 * variance).clamp(min=1e-30))
        weight = torch.where(keep, 1.0, near.where(joins, 0.0))
        left = replace(entries, values=mean_into(entries.values, target, weight))
        if self.merge_keys:
            left = replace(left, keys=mean_into(entries.keys, target, weight))
        return evict(left, keep)


def runs(keys: Tensor, threshold: float) -> Tensor:
    """int64 [G, T]: the number of the run that each key [G, T, D] is in, rising."""
    breaks = cosine_similarity(keys[:, 1:], keys[:, :-1], dim=-1) <= threshold
    return torch.nn.functional.pad(breaks.long(), (1, 0)).cumsum(-1)


def pivots(run: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(target, found), int64 and bool [G, T]: the nearest kept entry of the same run, the older of two; else itself."""
    length = keep.shape[1]
    here = torch.arange(length, device=keep.device).expand(keep.shape)
    before = here.where(keep, -1).cummax(-1).values
    behind = here.where(keep, length).flip(-1).cummin(-1).values.flip(-1)
    fits = [(place >= 0) & (place < length) & (run.gather(1, place.clamp(0, length - 1)) == run)
            for place in (before, behind)]
    older = fits[0] & (~fits[1] | (here - before <= behind - here))
    target = torch.where(older, before, torch.where(fits[1], behind, here))
    return target, fits[0] | fits[1]
