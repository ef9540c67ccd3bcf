"""What a scorer sees of one layer."""
from dataclasses import dataclass

import torch
from llmopt_kernels import NONE, Rule, attention_weights, column_sums
from torch import Tensor


@dataclass(frozen=True)
class LayerKV:
    """Entries of one layer, real tokens only: no padding. Positions count the real tokens from 0.

    keys, values: [B, G, T, D], keys after RoPE; positions: [B, G, T], -1 at holes, which only follow the last entry of
    a head; queries: [B, H, W, D] the last ones, after RoPE, as many as the scorer asked for; lengths: [B] tokens seen.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    query_positions: Tensor     # [B, W]
    positions: Tensor
    lengths: Tensor
    layer: int
    rule: Rule

    @property
    def holes(self) -> Tensor:
        """bool [B, G, T]: no entry here."""
        return self.positions == NONE

    def attention(self, last: int | None = None) -> Tensor:
        """Probabilities [B, H, W, T] of the last queries over all entries; each query sees its past only."""
        queries, positions = self._last(last)
        visible = self.rule.visible(positions.unsqueeze(1), self.positions)                 # [B, G, W, T]
        return attention_weights(queries, self.keys, visible, self.rule)

    def column_sums(self, last: int | None = None) -> Tensor:
        """Attention received, summed over the last queries (streamed): [B, H, T]."""
        queries, positions = self._last(last)
        return column_sums(queries, self.keys, positions, self.positions, self.rule)

    def mean_over_group(self, per_head: Tensor) -> Tensor:
        """[B, H, ...] -> [B, G, ...]."""
        return self._grouped(per_head).mean(2)

    def max_over_group(self, per_head: Tensor) -> Tensor:
        """[B, H, ...] -> [B, G, ...]."""
        return self._grouped(per_head).amax(2)

    def _grouped(self, per_head: Tensor) -> Tensor:
        return per_head.view(per_head.shape[0], self.keys.shape[1], -1, *per_head.shape[2:])

    def _last(self, last: int | None) -> tuple[Tensor, Tensor]:
        start = 0 if last is None else max(0, self.queries.shape[2] - last)
        return self.queries[:, :, start:], self.query_positions[:, start:]


def index_of_real(real: Tensor | None, positions: Tensor) -> Tensor:
    """Columns of a padded row -> count of real tokens before each; NONE stays NONE."""
    if real is None:
        return positions
    table = torch.cumsum(real.long(), 0) - 1
    return torch.where(positions == NONE, NONE, table[positions.clamp(min=0)])
