"""KeyDiff: keep entries whose keys are unlike the others.

    s_j = -cos(k_j, mean_i k_i / |k_i|)

Park et al., 2025 (arXiv:2504.15364). Left out: the paper drops entries block by block while the prompt is read.
"""
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from llmopt.kv.base import Scorer
from llmopt.kv.view import LayerKV
from llmopt.parts import register


@register("kv.keydiff")
@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keys unlike the mean key; no attention is computed."""

    def score(self, kv: LayerKV) -> Tensor:                                              # [B, G, T]
        return unlikeness(kv)


def unlikeness(kv: LayerKV) -> Tensor:                                                   # [B, G, T]
    """The scores of the formula above."""
    keys = kv.keys.float()
    return -cosine_similarity(keys, kv.mean_over_entries(normalize(keys, dim=-1)), dim=-1)
