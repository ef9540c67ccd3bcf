"""AnchorAttention: single keys whose logit comes near the largest one of what a row reads anyway.

    M_i = max over the base of row i       base: the first `block` keys, and all from one block before the group on
    stripes of a group = the keys j before its base with  mean_i q_i . k_j >= mean_i M_i - theta  for one of its tiles

A group is `step` tiles of `block` queries and shares its list. The mean over a tile's rows of the logits of column j is
one product with the mean query; the mean of M, the anchor, moves with it: a vector added to all keys changes nothing.
Base and stripes never overlap. With `anchor: peak` the base's logits are computed twice, for their maxima and for
attention. `anchor: sum` puts log sum exp in the place of M, which attention over the base tells anyway: then theta is
what a key's weight may be of all that the base weighs, e^-theta, and nothing is computed twice.

Zhang et al., 2025 (arXiv:2505.23520); `sum` is ours. Of any length, where the published code reads the last part of a
prompt in full. Blocks count from the first query of a forward, so that a prompt read in pieces has other groups. theta:
12 is for heads of 128, 4 to 6 for small ones.
"""
from dataclasses import replace
from typing import Literal

import torch
from llmopt_kernels import Stripes, sparse_partial
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import pad

from llmopt.attention.base import Selector, State
from llmopt.attention.grid import listed
from llmopt.parts import register


@register("attention.anchor")
@dataclass(frozen=True)
class Anchor(Selector):
    """Every key is looked at once for each tile of queries; those that are read are single keys, not blocks."""

    block: int = Field(128, ge=1, description="queries of a tile; first tokens, and tokens before a group, in the base")
    step: int = Field(4, ge=1, description="tiles that share a list of stripes (16 in the paper, for long prompts)")
    theta: float = Field(12.0, description="how far below the anchor a logit may lie, in nats")
    anchor: Literal["peak", "sum"] = Field("peak", description="what a logit is held against: the largest of the base, "
                                                               "or the logarithm of the base's sum (faster)")
    together: bool = Field(False, description="the query heads of a KV head read what any of them needs")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        rows, offset, sinks = self.block * self.step, k.shape[1] - q.shape[1], max(0, self.block - state.dropped)
        groups = range(0, q.shape[1], rows)
        start = [max(0, offset + begin - self.block) for begin in groups]
        base = Stripes(sinks, start=torch.tensor(start, device=q.device), tile=rows)
        if self.anchor == "sum":
            base = replace(base, done=sparse_partial(q, k, state.values, base, state.rule)[0])
        exact, hits = k.float(), []
        for begin, first in zip(groups, start, strict=True):
            tiles = [slice(at, min(at + self.block, q.shape[1]))
                     for at in range(begin, min(begin + rows, q.shape[1]), self.block)]
            anchors = [self._peak(q[:, tile].float(), exact, state, (offset + tile.start, first, sinks))
                       if base.done is None else base.done.lse[:, tile].mean(-1) for tile in tiles]
            means = torch.stack([q[:, tile].float().mean(1) for tile in tiles], 1)
            hits.append(self._hits(means, exact[:, :first], state, sinks, torch.stack(anchors, 1)))
        stripes = torch.stack([pad(hit, (0, k.shape[1] - hit.shape[1])) for hit in hits], 1)        # [H, groups, S]
        if self.together:
            stripes = stripes.unflatten(0, (len(k), -1)).any(1)
        return replace(base, sinks=self.block, columns=listed(stripes))

    @staticmethod
    def _peak(q: Tensor, k: Tensor, state: State, places: tuple[int, int, int]) -> Tensor:
        """The mean over a tile's rows of the largest logit of their base, [H].

        places: of the first query, of the first key of the base behind the sinks, and how many sinks there are.
        """
        row, first, sinks = places
        rows = torch.arange(row, row + q.shape[1], device=q.device)
        peaks = []
        for columns in (slice(0, min(sinks, first)), slice(first, row), slice(row, row + q.shape[1])):
            keys = k[:, columns]
            if keys.shape[1]:
                logits = state.rule.logits(q.reshape(len(k), -1, q.shape[2]), keys).unflatten(1, (-1, q.shape[1]))
                if columns.start == row or state.rule.window is not None:
                    seen = state.rule.visible(rows, torch.arange(columns.start, columns.stop, device=q.device))
                    logits.masked_fill_(~seen, -torch.inf)
                peaks.append(logits.amax(-1))                                                        # [G, h, R]
        return torch.stack(peaks).amax(0).mean(-1).flatten()

    def _hits(self, means: Tensor, k: Tensor, state: State, sinks: int, anchors: Tensor) -> Tensor:
        """bool [H, keys before the base]: those that come near the anchor of a tile; means [H, tiles, D], anchors [H,
        tiles].
        """
        if k.shape[1] <= sinks:
            return torch.zeros(len(means), k.shape[1], dtype=torch.bool, device=k.device)
        logits = state.rule.logits(means.unflatten(0, (len(k), -1)), k.unsqueeze(1)).flatten(0, 1)
        near = (logits - anchors[:, :, None]).amax(1) >= -self.theta
        near[:, :sinks] = False
        return near
