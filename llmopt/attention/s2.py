"""Shifted groups: half of the heads attend inside groups of tokens, the other half inside groups moved by half of one.

Chen et al., 2023 (LongLoRA, arXiv:2309.12307), for training; without it this is blocked attention, a control that
others must beat. The second half's groups begin at 0, group / 2, 3 group / 2, ...: nothing is rolled around, so that no
token sees a later one, as in the published variant without that leak.
"""
import math

import torch
from llmopt_kernels import Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import Selector, State
from llmopt.parts import register


@register("attention.s2")
@dataclass(frozen=True)
class ShiftedGroups(Selector):
    """Decided by positions alone."""

    group: int = Field(2048, ge=2, multiple_of=2, description="tokens of a group; the paper: a quarter of the text")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        before = state.dropped + state.offset
        tile = math.gcd(self.group // 2, before)
        rows = torch.arange(before, before + q.shape[1], tile, device=q.device)
        both = [(self._starts(rows, shifted) - state.dropped).clamp(min=0) for shifted in (False, True)]
        half = (torch.arange(len(q), device=q.device) >= (len(q) + 1) // 2).long()
        return Stripes(0, start=torch.stack(both)[half], tile=tile)

    def _starts(self, rows: Tensor, shifted: bool) -> Tensor:
        """The first token of each row's group."""
        by = self.group // 2 if shifted else 0
        return ((rows + by) // self.group * self.group - by).clamp(min=0)
