"""What a forward of more than one token brings to one layer."""
from dataclasses import dataclass

from llmopt_kernels import Ragged, Rule
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Queries [B, H, T, D] of the newest T tokens, and all that a layer holds of the `seen` tokens so far.

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

    @property
    def first(self) -> int:
        """Column of the first query."""
        return self.seen - self.query.shape[2]
