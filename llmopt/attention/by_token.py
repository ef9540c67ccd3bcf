"""One token at a time by blocks: what a cache holds of one row, cut up, and attention to some of its blocks.

Blocks count from the row's first real token. The `first` ones and the `near` newest, the token's own included, are
always read; of those between, which are complete, a method chooses. The means of their keys are kept beside the cache
(runtime/pools.py), so that the choice reads no keys.
"""
from dataclasses import dataclass

import torch
from llmopt_kernels import Rule, dense_attention
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """The newest token's query [H, D] over keys and values [G, S, D], all real, its own the last.

    means: [G, n, D] of the keys of the complete blocks of `size` tokens, float32.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    means: Tensor
    rule: Rule
    size: int
    first: int
    near: int

    @property
    def end(self) -> int:
        """Where the blocks to choose from end."""
        return (self.keys.shape[1] - 1) // self.size - self.near + 1

    @property
    def choice(self) -> int:
        """How many there are."""
        return max(0, self.end - self.first)

    def chosen(self, keep: int) -> Tensor:
        """int64 [G, m]: the keys to read when of the blocks to choose from the `keep` ones are read whose means would
        draw most attention, mean over a KV head's query heads.
        """
        query = self.query.view(len(self.keys), -1, self.query.shape[1])                 # [G, g, D]
        worth = self.rule.logits(query, self.means).softmax(-1).mean(1)[:, self.first:self.end]
        blocks = worth.topk(keep).indices.sort().values + self.first                     # [G, keep]
        within, device = torch.arange(self.size, device=blocks.device), blocks.device
        always = [torch.arange(*ends, device=device).expand(len(blocks), -1)
                  for ends in ((0, self.first * self.size), (self.end * self.size, self.keys.shape[1]))]
        return torch.cat([always[0], (blocks[..., None] * self.size + within).flatten(1), always[1]], 1)

    def read(self, chosen: Tensor) -> Tensor:
        """Attention [H, 1, D] to the keys [G, m] that were chosen."""
        keys, values = (taken(x, chosen)[None] for x in (self.keys, self.values))
        return dense_attention(self.query[None, :, None], keys, values, None, chosen.shape[1] - 1, self.rule)[0]


def taken(x: Tensor, places: Tensor) -> Tensor:
    """x [G, S, D] at places [G, m] -> [G, m, D]: whole rows of memory by one call, three times as fast as by index."""
    dim = x.shape[2]
    if x.stride(2) != 1 or x.stride(0) % dim or x.stride(1) % dim:
        x = x.contiguous()
    head, step = x.stride(0) // dim, x.stride(1) // dim                                  # in rows
    rows = x.as_strided((1 + (len(x) - 1) * head + (x.shape[1] - 1) * step, dim), (dim, 1))
    heads = torch.arange(len(x), device=x.device)[:, None]
    return rows.index_select(0, (places * step + heads * head).flatten()).view(*places.shape, dim)
