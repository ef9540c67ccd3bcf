"""DropKV: keep the entries whose loss alone would change attention's output most.

    s_j = avgpool( mean_{h in group} sum_{t in window} (p_tj / (1 - p_tj))^2 |v_j - o_t|^2 )

p: attention, o = sum_j p_j v_j: exact for one entry, since dropping j moves o_t by p_tj / (1 - p_tj) (o_t - v_j). After
DropKV (openreview.net/forum?id=MqfNzH3TVH), whose formula was read in its kvpress press. Left out: fused kernels.
"""
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import avg_pool1d

from llmopt.kv.snapkv import SnapKV
from llmopt.kv.view import LayerKV
from llmopt.parts import register

SMALL = 1e-6        # keeps 1 - p from zero


@register("kv.dropkv")
@dataclass(frozen=True)
class DropKV(SnapKV):
    """The squared error of the output that dropping an entry makes: heads can be compared by it."""

    pool: int = Field(7, ge=1, description="odd; spreads a score over its neighbours")

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        values = kv.values.float().masked_fill(kv.holes.unsqueeze(-1), 0.0).unsqueeze(2)              # [B, G, 1, T, D]
        p = kv.attention(last=self.window).unflatten(1, (kv.keys.shape[1], -1))                       # [B, G, g, W, T]
        out = p @ values                                                                              # [B, G, g, W, D]
        weight = (p / (1 - p + SMALL)).square()
        apart = (weight.sum(-2) * values.square().sum(-1) - 2 * ((weight.mT @ out) * values).sum(-1)
                 + (weight * out.square().sum(-1, keepdim=True)).sum(-2))                             # [B, G, g, T]
        return avg_pool1d(apart.clamp(min=0).mean(2), self.pool, stride=1, padding=self.pool // 2)
