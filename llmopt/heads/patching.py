"""Patching: how much of an answer hangs on one head, by giving the head what it says where the answer is another one.

    d(run) = logit(right) - logit(wrong) at the first token of the answer that the corrupted context changes
    score(l, h) = sum_x s (d(patched) - d(clean)) / sum_x |d(corrupted) - d(clean)|,  s: sign of d(corrupted) - d(clean)

patched: the clean run, in which head h of layer l says at all positions what it says in the corrupted run. 0: the head
does not matter; 1: the whole change goes through it. wrong is what the corrupted context states, or what the model then
says. `gate` keeps the probes where the clean run prefers the right answer and the corrupted one the wrong one.

Circuit reuse (arXiv:2310.08744) by activation patching. Left out: path patching, which freezes all other heads and asks
for the way between two heads: as many forwards again for every receiver.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.heads.base import ProbeScore
from llmopt.heads.divergence import corrupted, refuse_without
from llmopt.heads.masking import begun_at, block_inputs, masked, silenced
from llmopt.method import Probe, Run
from llmopt.model.blocks import blocks, decoder
from llmopt.model.head import logits_of
from llmopt.parts import register

LEAST = 1e-4            # of a change of logits: less is rounding


class Wanted(NamedTuple):
    """Which token is right and which is wrong behind the query at `place`."""

    place: int
    right: int
    wrong: int


@contextmanager
def head_outputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """{layer: z [T, H, D]} that a forward of one row inside fills."""
    found: dict[int, Tensor] = {}

    def hook(block):
        def pre(module: nn.Module, args: tuple) -> None:
            found[block.index] = args[0][0].unflatten(-1, (block.heads, block.head_dim))
        return pre

    handles = [block.attn_out.module.register_forward_pre_hook(hook(block))
               for block in blocks(model) if block.attn_out is not None]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def logits_at(model: nn.Module, probe: Probe, place: int) -> Tensor:      # [V]
    """The logits behind one query of a probe."""
    hidden = decoder(model)(input_ids=probe.ids[None].to(model.device), use_cache=False)[0]
    return logits_of(model, hidden[:, place:place + 1])[0, 0].float()


def wanted(model: nn.Module, probe: Probe) -> Wanted:
    """The first token of the answer that the corrupted context states otherwise, else its first token."""
    stated = None if probe.needle is None else probe.corrupted[probe.needle]
    differ = [] if stated is None else (stated != probe.answer).nonzero().flatten().tolist()
    step = differ[0] if differ else 0
    place = probe.asked.start + step
    wrong = int(stated[step]) if differ else int(logits_at(model, corrupted(probe), place).argmax())
    return Wanted(place, int(probe.answer[step]), wrong)


def margin(model: nn.Module, probe: Probe, of: Wanted) -> float:
    """d of one run."""
    logits = logits_at(model, probe, of.place)
    return float(logits[of.right] - logits[of.wrong])


@register("heads.patching")
@dataclass(frozen=True)
class Patching(ProbeScore):
    """Part of an answer that hangs on the head; as many forward passes as the model has heads, for each probe."""

    unit: ClassVar = "part of the change of the answer"

    gate: bool = Field(True, description="leave out probes whose answer the corrupted context does not turn")

    @torch.no_grad()
    def chosen(self, model: nn.Module, run: Run) -> list[int]:
        refuse_without(run.probes)
        kept = []
        for index in run.progress(range(len(run.probes)), f"{self.name}: answers"):
            probe = run.probes[index]
            of = wanted(model, probe)
            clean, broken = margin(model, probe, of), margin(model, corrupted(probe), of)
            if abs(broken - clean) > LEAST and (clean > 0 > broken or not self.gate):
                kept.append(index)
        if not kept:
            raise LlmoptError(f"in none of the {len(run.probes)} probes does the corrupted context "
                              + ("turn the answer; give easier ones, or gate: false" if self.gate else "change it"))
        return kept

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        totals, change = [torch.zeros(block.heads, dtype=torch.float64) for block in blocks(model)], 0.0
        places = [(layer, head) for layer, total in enumerate(totals) for head in range(len(total))]
        for number, probe in enumerate(run.probes):
            of = wanted(model, probe)
            with head_outputs(model) as said:
                broken = margin(model, corrupted(probe), of)
            with block_inputs(model) as hidden:
                clean = margin(model, probe, of)
            change += abs(broken - clean)
            means = [said.get(layer) for layer in range(len(totals))]
            for layer, head in run.progress(places, f"{self.name}: probe {number + 1} of {len(run.probes)}"):
                with masked(model, silenced(totals, [(layer, head)]), "mean", means), \
                        begun_at(model, layer, hidden[layer]):
                    patched = margin(model, probe, of)
                totals[layer][head] += (patched - clean) * (1 if broken > clean else -1)
        return {"scores": [total / change for total in totals]}
