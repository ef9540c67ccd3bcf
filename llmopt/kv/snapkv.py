"""SnapKV: keep what the last queries of the prompt look at.

    score_j = avgpool_pool( mean_{h in group, t in window} softmax(q_t k^T / sqrt(D))_j )

Li et al., 2024 (arXiv:2404.14469). Nothing left out; the window itself is always kept. The paper scores each query
head; with grouped queries the mean over the group decides for its one KV head.
"""
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import avg_pool1d

from llmopt.errors import FieldError
from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.snapkv")
@dataclass(frozen=True)
class SnapKV(Scorer):
    """Votes of an observation window, pooled."""

    window: int = Field(32, ge=1, description="queries that vote, counted from the end of the prompt; always kept")
    pool: int = Field(5, ge=1, description="odd; spreads a vote over its neighbours")

    def check(self) -> None:
        super().check()
        if self.pool % 2 == 0:
            raise FieldError("pool", self.pool, "an odd number")

    def queries(self) -> int:
        return self.window

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        return votes(kv, self.window, self.pool)


def votes(kv: LayerKV, window: int, pool: int) -> Tensor:                                # [B, G, T]
    """The scores of the formula above."""
    given = kv.mean_over_group(kv.attention(last=window).mean(-2))
    return avg_pool1d(given, pool, stride=1, padding=pool // 2)
