"""Divergence: how much what a head says changes when the answer is taken out of the context.

    D(l, h) = mean over probes and tokens of the answer of || z_h(context) - z_h(corrupted) ||

z_h is the head's output, before the output projection, in front of each token of the answer; `corrupted` is the
context without the answer, of as many tokens. Beside it `relative`: the norm over that of z_h(context), since a head
that speaks loudly changes loudly.

Vision-aware head divergence (arXiv:2412.13949), which takes the picture out of a prompt; here it is what a text says.
Left out: its reinforcement of the heads that look while the model writes.
"""
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.probes import as_batches
from llmopt.calibration.walk import Visit, visits
from llmopt.errors import LlmoptError
from llmopt.heads.base import ProbeScore
from llmopt.method import Probe, Run
from llmopt.model.blocks import blocks
from llmopt.parts import register


def corrupted(probe: Probe) -> Probe:
    """The probe with the context that does not hold the answer."""
    return replace(probe, context=probe.corrupted)


def refuse_without(found: list[Probe]) -> None:
    """Raise LlmoptError for a probe that has no corrupted context."""
    for index, probe in enumerate(found):
        if probe.corrupted is None:
            raise LlmoptError(f"probe {index + 1} has no `corrupted`: the context without the answer, of as many "
                              "tokens")


@register("heads.divergence")
@dataclass(frozen=True)
class Divergence(ProbeScore):
    """Change of a head's output without the answer; two forward passes a probe, block by block."""

    needs_whole: ClassVar[bool] = False
    mean_over: ClassVar = "samples"
    beside: ClassVar = ("relative",)
    unit: ClassVar = "change of the head's output"

    def chosen(self, model: nn.Module, run: Run) -> list[int]:
        refuse_without(run.probes)
        return super().chosen(model, run)

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        """{"scores", "relative"}: L tensors [H_l] each."""
        both = [version for probe in run.probes for version in (probe, corrupted(probe))]
        found = [(torch.zeros(block.heads), torch.zeros(block.heads)) for block in blocks(model)]
        for visit in visits(model, replace(run, batches=as_batches(both)), self.name, edits=False):
            if visit.block.attn_out is not None:
                found[visit.block.index] = self._changes(visit, both)
        return {"scores": [change for change, _ in found], "relative": [share for _, share in found]}

    @staticmethod
    def _changes(visit: Visit, both: list[Probe]) -> tuple[Tensor, Tensor]:
        """(change [H], change over size [H]) of one block, the mean over all pairs of probes."""
        said: list[Tensor] = []

        def keep(z: Tensor) -> None:                    # [N, H D] of the next batch
            at = both[len(said)].asked
            said.append(z[at].float().cpu().unflatten(1, (visit.block.heads, visit.block.head_dim)))

        visit.observe({visit.block.attn_out.name: keep})
        pairs = list(zip(said[::2], said[1::2], strict=True))
        change = [(one - other).norm(dim=2) for one, other in pairs]                                  # [n, H] each
        share = [c / one.norm(dim=2).clamp(min=1e-30) for c, (one, _) in zip(change, pairs, strict=True)]
        return tuple(torch.stack([part.mean(0) for part in parts]).mean(0) for parts in (change, share))
