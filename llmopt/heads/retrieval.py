"""Retrieval score: how much of an answer that stands in the context a head finds, while it is written.

    hits: top     | { j in the needle : at a token of the answer the head looks most at j, and j is that token } | / n
    hits: mass    sum over tokens of the answer of A[t, j], j in the needle and among the n keys looked at most, / n

The needle are the n tokens of the context that state the answer; t is the token in front of the one that is written.
The mean is over the probes whose answer the model gets right, more than half of its tokens (`gate`). The answer is
read, not sampled, so that one pass over a probe is enough. A repeated hit counts once, as in the paper's formula.

Retrieval heads (arXiv:2404.15574); `mass`: HeadKV's R2 (arXiv:2410.19258). Left out: its needle of two facts, and the
authors' haystack of 600 trials, which `probe: FILE.jsonl` can hold.
"""
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.probes import as_batches
from llmopt.calibration.walk import visits
from llmopt.errors import LlmoptError
from llmopt.heads.base import ProbeScore, answer_logits
from llmopt.method import Probe, Run
from llmopt.model.blocks import blocks
from llmopt.parts import register
from llmopt.runtime.attention_rows import Rows

ENOUGH = 0.5            # of an answer's tokens: more than that is an answer


def hit(weights: Tensor, keys: Tensor, probe: Probe, steps: Tensor) -> Tensor:      # [H, t, S], [S], [t] -> [H, n]
    """1 at each token of the needle that is copied at one of these `steps` of the answer, 0 elsewhere."""
    best = keys[weights.argmax(-1)]                                                             # [H, t]
    right = probe.ids.to(best)[best] == probe.answer.to(best)[steps]
    return ((best[..., None] == probe.needle.to(best)) & right[..., None]).any(1).float()


def mass(weights: Tensor, keys: Tensor, probe: Probe, steps: Tensor) -> Tensor:      # [H, t, S], [S], [t] -> [H, n]
    """The attention on each token of the needle, where it is among the n keys that draw most, summed over the steps."""
    drawn, places = weights.topk(min(len(probe.needle), len(keys)), -1)                         # [H, t, n]
    at = keys[places][..., None] == probe.needle.to(keys)                                       # [H, t, n, n]
    return (drawn[..., None] * at).sum((1, 2))


@torch.no_grad()
def answered(model: nn.Module, probe: Probe) -> float:
    """The share of the answer's tokens that the model would have written."""
    return float((answer_logits(model, probe).argmax(-1).cpu() == probe.answer).float().mean())


@register("heads.retrieval")
@dataclass(frozen=True)
class Retrieval(ProbeScore):
    """The part of the needle that a head copies from; one forward pass a probe, and one more for the gate."""

    mean_over: ClassVar = "samples"

    hits: Literal["top", "mass"] = Field("top", description="top: what a head looks at most; mass: how much it looks")
    gate: bool = Field(True, description="leave out what the model answers wrong; false: works with --stream")

    @property
    def needs_whole(self) -> bool:
        return self.gate

    @property
    def unit(self) -> str:
        return "part of the needle that is copied" if self.hits == "top" else "attention on the needle"

    def chosen(self, model: nn.Module, run: Run) -> list[int]:
        for index, probe in enumerate(run.probes):
            if probe.needle is None:
                raise LlmoptError(f"probe {index + 1}: the answer does not stand in its context, token by token")
        if not self.gate:
            return super().chosen(model, run)
        right = [i for i in run.progress(range(len(run.probes)), f"{self.name}: answers")
                 if answered(model, run.probes[i]) > ENOUGH]
        if not right:
            raise LlmoptError(f"the model answers none of the {len(run.probes)} probes ({self.probe}), and the gate "
                              "leaves out what it does not answer: give gate: false, or plant facts in a text (python "
                              "-m llmopt_evals.needles --text FILE --model MODEL --probes p.jsonl) for probe: p.jsonl")
        return right

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        totals = [torch.zeros(block.heads) for block in blocks(model)]
        batches, asked = as_batches(run.probes), [probe.asked for probe in run.probes]
        for visit in visits(model, replace(run, batches=batches), self.name, edits=False):
            found = [torch.zeros(visit.block.heads, len(probe.answer)) for probe in run.probes]

            def see(index: int, rows: Rows, found: list[Tensor] = found) -> None:
                probe, of = run.probes[index], hit if self.hits == "top" else mass
                fresh = of(rows.weights[0], rows.keys, probe, rows.queries - probe.asked.start).cpu()
                found[index] = torch.maximum(found[index], fresh) if self.hits == "top" else found[index] + fresh

            visit.attention(see, asked)
            totals[visit.block.index] += sum(part.mean(1) for part in found)
        return {"scores": [total / len(run.probes) for total in totals]}
