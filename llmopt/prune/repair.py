"""Closed-form repair: the last writer in front of parts that leave takes over what these wrote, by least squares.

    W, b <- argmin sum_t |m_t + W h_t + b - y_t|^2 / |y_t|^2                ridge as in refit.py

h is what the writer reads, m all else that is in the stream behind its block, y what the stream was behind the last
part that leaves. It is refit.py's equation: h and the missing y - m - W_old h are inputs of one writer [W_old, 1], of
which the latter leave. Tokens count by the size of their stream, as the next norm will see them: else the few tokens
of massive activations (24,500 beside 10 in SmolLM2-135M) would be all that is fitted. The ridge is that which does best
on rows held out, and where none does better there than the weight as it is, that stays.

With a norm between writer and stream the equation is not linear, and experts are no single writer: parts leave without
a repair then, which the record says.
"""
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.calibration.leaving import visits_in_place
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.architectures import NO_ENTRY, NORMS_KEPT, UNTURNED
from llmopt.model.blocks import Block, Projection, spec_of
from llmopt.prune.refit import RIDGES, Sums, fitted, held_out
from llmopt.prune.surgery import LayerPlan
from llmopt.scale.processes import Ranks


@torch.no_grad()
def repair(model: nn.Module, run: Run, plan: list[LayerPlan], label: str) -> list[dict[str, Any]]:
    """Refit the writers in front of what leaves, block after block; for each its ridge and what is missing, as shares.

    Parts of blocks that stay write nothing afterwards.
    """
    leaving = {index: ("blocks",) if layer.drop else layer.skip for index, layer in enumerate(plan)
               if layer.drop or layer.skip}
    figures: dict[int, dict] = {}
    for visit in visits_in_place(model, run, label, leaving):
        writer = writer_of(visit.block, leaving.get(visit.block.index, ()))
        weight, bias, found = repaired(visit, writer, run.ranks)
        if weight is not None:
            writer.write(weight)
        if bias is not None:
            writer.bias.copy_(bias)
        figures[visit.block.index] = run.memory.remember(f"repair {visit.block.index}", lambda known=found: known)
    told = [figures[index] if index in figures else run.memory.remember(f"repair {index}", dict)
            for index in range(len(plan))]
    return [one for one in told if one]


def writer_of(block: Block, gone: Collection[str] = ()) -> Projection | None:
    """The last writer of a block that loses these parts; None where it is none of those that can be repaired."""
    return block.attn_out if block.ffn_out is None or "mlp" in gone else block.ffn_out


def repaired(visit: Visit, writer: Projection | None, ranks: Ranks
             ) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
    """(weight [out, in], bias, figures) with which the block writes `visit.wanted`, as near as its last writer can.

    None for what it has not, and for both where no equation tells them.
    """
    block = visit.block
    if why := _not_linear(visit):
        return None, None, {"name": block.name, "ridge": None, "note": why}
    sums, bias = Sums(held_out(visit.masks, ranks), ranks), writer.bias is not None
    for x in _augmented(visit, writer, bias):
        sums.add(x)
    weight = writer.weight
    old = torch.cat([weight.float(), *([writer.bias.float()[:, None]] if bias else []),
                     torch.eye(len(weight), device=weight.device)], 1)
    found, figures = fitted(writer, old, torch.arange(old.shape[1] - len(weight), device=weight.device), sums,
                            (*RIDGES, 10.0))
    return found[:, :weight.shape[1]], found[:, -1] if bias else None, figures


def _not_linear(visit: Visit) -> str | None:
    """Why no equation tells what the last writer of a block should write; None: one does."""
    if visit.block.form in UNTURNED or visit.block.form in NORMS_KEPT:
        return "a norm stands between its writers and the stream"
    if spec_of(visit.model).ffn_out:
        return None
    return "its last writers are experts" if spec_of(visit.model).known else NO_ENTRY


def _augmented(visit: Visit, writer: Projection, bias: bool) -> Iterator[Tensor]:
    """[h, 1 where there is a bias, y - m - W h] / |y| of the real tokens, batch by batch: [N, in (+ 1) + out]."""
    for index, made in enumerate(visit.record({"read": writer.module}, lambda tensor: tensor)):
        read, mask = visit.dense["read"].pop().float(), visit.masks[index].to(made.device)
        wanted = visit.wanted[index].to(made.device)[mask].float()
        size = wanted.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        yield torch.cat([read, *([torch.ones_like(size)] if bias else []), wanted - made[mask].float()], 1) / size
    visit.dense = None
