"""CriticalKV: of what the last queries look at, keep first what also moves the residual stream.

    s'_j = (s_j + 1e-4) * mean_{h in group} |W_O^h v_j|_1            s: SnapKV's votes

Feng et al., 2025 (arXiv:2502.03805). Half of the budget beside sinks and window goes to the best by s, the other half
to the best of the rest by s'. Differs: where heads compete for entries, each head's half is that of the even share.
"""
from pydantic.dataclasses import dataclass
from torch import Tensor, stack

from llmopt.kv.allocate import ranks
from llmopt.kv.snapkv import SnapKV
from llmopt.kv.view import LayerKV
from llmopt.parts import register

SMALL = 1e-4        # added to every vote, so that a large value counts without any


@register("kv.critical")
@dataclass(frozen=True)
class Critical(SnapKV):
    """SnapKV's votes, weighed by how much a value moves the residual stream."""

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        votes, length = super().score(kv), int(kv.lengths[0])
        free = kv.holes | (kv.positions < self.sinks) | (kv.positions >= length - self.window)
        sure = ranks(votes.masked_fill(free, -1.0)) < (self.share(length) - self.sinks - self.window) // 2
        weighed = ((votes + SMALL) * residual_sizes(kv)).masked_fill(kv.holes, 0.0)
        return weighed + sure * weighed.amax((1, 2), keepdim=True)           # above all others, and still finite


def residual_sizes(kv: LayerKV) -> Tensor:
    """L1 norm of what each value adds to the residual stream, mean over the query heads of its group: [B, G, T]."""
    weight = kv.output_weight().to(kv.values.device).float()                             # [H, D, E]
    group = len(weight) // kv.values.shape[1]
    return kv.mean_over_group(stack([(kv.values[:, head // group].float() @ weight[head]).abs().sum(-1)
                                     for head in range(len(weight))], 1))                # one head at a time: [T, E]
