"""WAAD and FAI: how far back a head looks within a short window, and how much what it reads is looked at much later.

    waad    mean over t of sum_s A[t, s] min(t - s, window)
    fai     mean over s of the mean of A[t, s] over t from s + first to s + last, as far as there are such t

over real tokens t and s of the calibration data; A is the attention map of the head. A low WAAD is a head that stays
within its neighbourhood; a high FAI one that comes back to tokens long after. One forward pass, no gradients, block by
block.

The preplan-and-anchor study of attention (arXiv:2510.13554) averages the maps of its local (waad) or global (fai) heads
first and has a figure of each token; here there is one of each head, its mean over the tokens. Left out: the peaks of
both over a text, its purpose. Attention sinks are not left out, as there: see heads.span.
"""
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import pad

from llmopt.calibration.walk import Visit, visits
from llmopt.errors import FieldError, LlmoptError
from llmopt.heads.base import HeadScore, single_rows
from llmopt.method import Run
from llmopt.parts import register
from llmopt.runtime.attention_rows import Rows


def clipped_distance(rows: Rows, window: int) -> Tensor:      # [H]
    """Attention times distance, at most `window`, summed over the real queries of one sample's tile."""
    apart = (rows.queries[:, None] - rows.keys).clamp(min=0, max=window)                              # [t, S]
    return ((rows.weights[0] * apart).sum(2) * rows.real[0]).sum(1).double().cpu()


def later_attention(rows: Rows, counts: Tensor, span: tuple[int, int]) -> Tensor:      # [n] -> [H]
    """What each key draws from queries `span` tokens later, over the number of those (`counts`), summed over keys."""
    apart = rows.queries[:, None] - rows.keys
    late = (apart >= span[0]) & (apart <= span[1]) & rows.real[0][:, None]                            # [t, S]
    padded = pad(counts, (0, max(0, int(rows.keys[-1]) + 1 - len(counts))))
    share = 1 / padded.to(rows.weights)[rows.keys].clamp(min=1)
    return ((rows.weights[0] * late).sum(1) * share).sum(1).double().cpu()


def later_queries(length: int, span: tuple[int, int]) -> Tensor:      # [length]
    """How many tokens stand from span[0] to span[1] behind each token of a text."""
    place = torch.arange(length)
    return ((place + span[1]).clamp(max=length - 1) - (place + span[0]) + 1).clamp(min=0)


@register("heads.waad_fai")
@dataclass(frozen=True)
class WaadFai(HeadScore):
    """Windowed distance of attention, or attention from later tokens; a tile of a map in memory."""

    needs_whole: ClassVar[bool] = False

    score: Literal["waad", "fai"] = Field("waad", description="which of the two")
    window: int = Field(10, ge=1, description="tokens, beyond which no distance counts (waad)")
    first: int = Field(10, ge=1, description="how many tokens later it begins to count (fai)")
    last: int = Field(100, ge=1, description="how many tokens later it counts at the latest (fai)")

    def check(self) -> None:
        if self.last < self.first:
            raise FieldError("last", self.last, f"at least first = {self.first}")

    @property
    def unit(self) -> str:
        return "mean distance within the window" if self.score == "waad" else "attention from later tokens"

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        rows = single_rows(run.batches)
        lengths = [int(row["attention_mask"].sum()) for row in rows]
        looked_at = [sum(lengths)] if self.score == "waad" else [int((n > 0).sum()) for n in self._later(lengths)]
        if not sum(looked_at):
            raise LlmoptError(f"texts of at most {max(lengths)} tokens: none stands {self.first} behind another")
        walk = visits(model, replace(run, batches=rows), self.name, edits=False)
        return {"scores": [self._total(visit, self._later(lengths)) / sum(looked_at) for visit in walk]}

    def _later(self, lengths: list[int]) -> list[Tensor]:
        return [later_queries(length, (self.first, self.last)) for length in lengths]

    def _total(self, visit: Visit, counts: list[Tensor]) -> Tensor:      # [H]
        """The figure of one block, summed over the tokens of all samples."""
        total = torch.zeros(visit.block.heads, dtype=torch.float64)

        def see(sample: int, rows: Rows) -> None:
            total.add_(clipped_distance(rows, self.window) if self.score == "waad" else
                       later_attention(rows, counts[sample], (self.first, self.last)))

        visit.attention(see)
        return total
