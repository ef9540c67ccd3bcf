"""What a forward brings to one layer, and what its attention reads."""
from dataclasses import dataclass

import torch
from llmopt_kernels import Ragged, Rule
from torch import Tensor

from llmopt.runtime.cache_layer import RaggedLayer


class Newest:
    """Queries [B, H, T, D] of the newest T of `seen` tokens."""

    query: Tensor
    seen: int

    @property
    def first(self) -> int:
        """Column of the first query."""
        return self.seen - self.query.shape[2]


@dataclass(frozen=True)
class Prompt(Newest):
    """Queries [B, H, T, D] of the newest T tokens, of which there is more than one, and all that a layer holds of the
    `seen` tokens so far.

    keys, values: [B, G, S, D] of the newest S tokens; kept: the entries that are left of older ones, or None.
    mask: bool [B, seen], False at padding; None where there is no padding; or a 4-D mask as it was given.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    kept: Ragged | None
    mask: Tensor | None
    seen: int
    rule: Rule
    layer: int


@dataclass(frozen=True)
class Attended(Newest):
    """Queries [B, H, T, D] of the newest T tokens, which have read all that `cache` holds of a layer.

    cache: None in a forward without one, where keys and values [B, G, T, D] are all there is. mask: bool [B, seen] or
    None, as in `Prompt`.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    cache: RaggedLayer | None
    mask: Tensor | None
    seen: int
    rule: Rule
    layer: int

    def of_head(self, row: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, positions and bias of a KV head of a row, as RaggedLayer.of_head."""
        if self.cache is not None:
            return self.cache.of_head(row, head)
        return self.keys[row, head], self.values[row, head], torch.arange(self.seen, device=self.keys.device), None
