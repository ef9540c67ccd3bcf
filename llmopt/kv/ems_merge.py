"""EMS, what becomes of the entries that go: the better ones are merged into those they repeat, the rest is dropped.

    R_ec = max(0, cos(k_e, k_c)) * max(0, cos(v_e, v_c))          e: the best ceil(beta b) that go, c: the b that stay
    v_c <- (s_c v_c + sum s_e v_e) / (s_c + sum s_e)              over those e whose highest R is R_ec > tau

Li et al., 2024 (arXiv:2412.08521): a class of no value takes those that are like no other. s is the scorer's score.
The paper's thresholds are not known to us: tau and beta are ours. Left out: its expansion of shared entries, which the
form above has no need of. `merge_keys` turns keys back, averages them and turns the mean to the place of the one that
stays. Ours is `count`: an entry's logits rise by the logarithm of how many it stands for, so that entries of equal keys
lose nothing; scorers do not see that.
"""
from dataclasses import replace

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.allocate import ranks
from llmopt.kv.reduce import closest, evict, gone, mean_into, sum_into, worth
from llmopt.kv.reducers import Reducer
from llmopt.kv.view import LayerKV
from llmopt.parts import register
from llmopt.runtime.cache_layer import Entries


@register("ems_merge")
@dataclass(frozen=True)
class EMSMerge(Reducer):
    """The values of those that repeat a kept entry, in key and value, are averaged into it, weighted by scores."""

    tau: float = Field(0.6, ge=0, description="likeness above which an entry is merged; above 1 none is")
    beta: float = Field(1.0, ge=0, description="entries that may be merged, for each that stays")
    merge_keys: bool = Field(False, description="the keys too")
    count: bool = Field(False, description="an entry draws as much attention as all that went into it")

    @property
    def turns(self) -> bool:
        return self.merge_keys

    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        others = gone(entries, keep)
        best = ranks(scores.masked_fill(~others, -torch.inf)) < (self.beta * keep.sum(-1, keepdim=True)).ceil()
        likeness, target = closest([entries.keys, entries.values], keep, others & best)
        part = keep | (likeness > self.tau)
        weight = worth(scores).where(part, 0.0)
        left = replace(entries, values=mean_into(entries.values, target, weight))
        if self.merge_keys:
            left = replace(left, keys=mean_of_keys(kv, entries.keys, target, weight))
        if self.count:
            stands_for = sum_into(entries.column("bias").exp().where(part, 0.0), target)
            left = replace(left, carried=left.carried | {"bias": stands_for.clamp(min=1).log()})
        return evict(left, keep)


def mean_of_keys(kv: LayerKV, keys: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """keys [G, T, D] with the weighted mean of what goes into each, taken before RoPE and turned to its own place."""
    before = kv.unrotated_keys()
    mean = mean_into(before[0], target, weight)
    changed = (mean != before[0]).any(-1, keepdim=True)
    return torch.where(changed, kv.rotated(mean.unsqueeze(0), kv.source.entries)[0].to(keys.dtype), keys)
