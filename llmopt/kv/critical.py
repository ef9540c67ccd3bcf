"""CriticalKV: of what the last queries look at, keep first what also moves the residual stream.

    s'_j = (s_j + 1e-4) * mean_{h in group} |W_O^h v_j|_1            s: SnapKV's votes

Feng et al., 2025 (arXiv:2502.03805). Half of the budget, sinks and window in it, goes to the best by s, the other
half to the best of the rest by s'. Differs: where heads compete for entries, they do by s', and each head's half is
that of the even share (the authors' heads compete by s: on SmolLM2-135M no better, README).
"""
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv.allocate import ranks
from llmopt.kv.snapkv import SnapKV
from llmopt.kv.view import LayerKV
from llmopt.parts import register

SMALL = 1e-4        # added to every vote, so that a large value counts without any
TILE = 1 << 18      # numbers of the residual stream at a time: they stay in the processor's cache


@register("kv.critical")
@dataclass(frozen=True)
class Critical(SnapKV):
    """SnapKV's votes, weighed by how much a value moves the residual stream."""

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        votes, length = super().score(kv), int(kv.lengths[0])
        free = kv.holes | (kv.positions < self.sinks) | (kv.positions >= length - self.window)
        sure = ranks(votes.masked_fill(free, -1.0)) < max(0, self.share(length) // 2 - self.sinks - self.window)
        weighed = ((votes + SMALL) * residual_sizes(kv)).masked_fill(kv.holes, 0.0)
        return weighed + sure * weighed.amax((1, 2), keepdim=True)           # above all others, and still finite


def residual_sizes(kv: LayerKV) -> Tensor:
    """L1 norm of what each value adds to the residual stream, mean over the query heads of its group: [B, G, T]."""
    weight = kv.output_weight().to(kv.values.device).float()                             # [H, D, E]
    heads = weight.unflatten(0, (kv.values.shape[1], -1)).transpose(1, 2).flatten(2)     # [G, D, g E]
    size = max(16, TILE // heads.shape[2])
    sums = [torch.cat([(part @ of_group).abs_().sum(-1) for part in values.float().split(size, 1)], 1)
            for values, of_group in zip(kv.values.unbind(1), heads, strict=True)]
    return torch.stack(sums, 1) / (len(weight) // len(heads))
