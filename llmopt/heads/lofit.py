"""LoFiT: which heads a model would turn up or down to answer better.

    z_h <- (1 + A_h) * z_h,  A_h in R^D,   min over A of  mean_probes CE(answer | context, question) + l1 * ||A||_1
    score(l, h) = || A_h ||_2

z_h is the head's output before the output projection. A begins at noise of deviation 1e-3 and is learned by Adam; the
model stays as it is.

LoFiT (arXiv:2406.01563), the localisation step. Left out: its second step, which learns a bias for the chosen heads.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmopt.heads.base import ProbeScore, answer_logits
from llmopt.method import Probe, Run
from llmopt.model.blocks import Block, blocks
from llmopt.parts import register

NOISE = 1e-3


@contextmanager
def scaled(views: list[Block], factors: list[Tensor]) -> Iterator[None]:
    """Multiply each channel of each head's output by 1 + its factor; factors: L tensors [H_l, D]."""
    def hook(factor: Tensor):
        return lambda module, args: ((args[0] * (1 + factor.flatten())).to(args[0].dtype),)

    handles = [block.attn_out.module.register_forward_pre_hook(hook(factor))
               for block, factor in zip(views, factors, strict=True) if block.attn_out is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answer_loss(model: nn.Module, probe: Probe) -> Tensor:
    """The mean cross-entropy of the answer's tokens; differentiable."""
    logits = answer_logits(model, probe)
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), probe.answer.to(logits.device))


@register("heads.lofit")
@dataclass(frozen=True)
class Lofit(ProbeScore):
    """Size of a learned change of the head's scale; `epochs` forward and backward passes over each probe."""

    unit: ClassVar = "size of the learned scales"

    epochs: int = Field(5, ge=1, le=1000, description="passes over the probes")
    batch: int = Field(8, ge=1, description="probes whose gradients make one step")
    rate: float = Field(5e-3, gt=0, le=1, description="learning rate of Adam")
    l1: float = Field(5e-4, ge=0, description="weight of the sum of all |A|")

    def backward(self, rows: int, length: int) -> int:
        return self.length

    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        model.requires_grad_(False)
        views, generator = blocks(model), torch.Generator().manual_seed(self.seed)
        drawn = [NOISE * torch.randn(block.heads, block.head_dim, generator=generator) for block in views]
        factors = [start.to(model.device).requires_grad_() for start in drawn]
        steps = torch.optim.Adam([factor for factor in factors if factor.numel()], lr=self.rate)
        with torch.enable_grad(), scaled(views, factors):
            for _ in run.progress(range(self.epochs), self.name):
                order = torch.randperm(len(run.probes), generator=generator)
                for some in order.split(self.batch):
                    self._step(model, [run.probes[index] for index in some.tolist()], factors, steps)
        return {"scores": [factor.detach().norm(dim=1) for factor in factors]}

    def _step(self, model: nn.Module, found: list[Probe], factors: list[Tensor], steps: torch.optim.Optimizer) -> None:
        """One step of Adam on the mean loss of some probes, a probe in memory at a time."""
        steps.zero_grad()
        for probe in found:
            (answer_loss(model, probe) / len(found)).backward()
        (self.l1 * sum(factor.abs().sum() for factor in factors)).backward()
        steps.step()
