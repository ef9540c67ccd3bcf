"""Mean keys of the blocks of a cache, kept beside it: a token chooses among blocks by them, and reads none for that."""
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pools:
    """Of one batch row: means [G, n, D], float32, of its n complete blocks of `size` tokens, the first one at column
    `start`.
    """

    size: int
    start: int
    means: Tensor

    @classmethod
    def empty(cls, size: int, start: int, keys: Tensor) -> "Pools":
        """Of no block yet; keys [G, S, D]."""
        return cls(size, start, keys.new_zeros(len(keys), 0, keys.shape[2], dtype=torch.float32))

    def grown(self, keys: Tensor) -> "Pools":
        """With the blocks that are complete in keys [G, S, D], all columns of the row."""
        known = self.means.shape[1]
        more = (keys.shape[1] - self.start) // self.size - known
        if more <= 0:
            return self
        new = keys.narrow(1, self.start + known * self.size, more * self.size).unflatten(1, (more, self.size))
        return replace(self, means=torch.cat([self.means, new.float().mean(2)], 1))
