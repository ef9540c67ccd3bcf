"""EMS, its Global-Local score: keep what drew attention all along or draws it at the end, whichever says more.

    s_j = max(local_j, global_j * mean(local) / mean(global))
    global_j = attention from all queries, local_j = from the last `window`, pooled; means over the group

Li et al., 2024 (arXiv:2412.08521), as far as it is told there: the two are brought to one mean. What becomes
of the entries that go is `reduce: ems_merge`. Left out: between compressions while decoding, `local` sees the queries
since the last one only.
"""
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import avg_pool1d

from llmopt.kv.h2o import received
from llmopt.kv.snapkv import SnapKV
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.ems")
@dataclass(frozen=True)
class EMS(SnapKV):
    """Heavy hitters and the votes of the last queries together; reads the whole map once more, streamed."""

    combine: Literal["max", "sum"] = Field("max", description="how the two scores become one")

    def queries(self) -> None:
        return None

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        mass = kv.remember("mass", received(kv))
        local = kv.mean_over_group(kv.column_sums(last=self.window))
        local = avg_pool1d(local, self.pool, stride=1, padding=self.pool // 2)
        means = [kv.mean_over_entries(x.unsqueeze(-1)).squeeze(-1) for x in (local, mass)]              # [B, G, 1]
        aligned = mass * means[0] / means[1].clamp(min=1e-30)
        return torch.maximum(local, aligned) if self.combine == "max" else local + aligned

    def carry(self, kv: LayerKV, scores: Tensor) -> dict[str, Tensor]:
        return kv.remembered("mass")
