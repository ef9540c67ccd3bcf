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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.calibration.leaving import visits_in_place
from llmopt.calibration.walk import Visit
from llmopt.method import Run
from llmopt.model.architectures import NO_ENTRY, NORMS_KEPT, UNTURNED
from llmopt.model.blocks import Projection, spec_of
from llmopt.prune.refit import RIDGES, Sums, fitted, held_out
from llmopt.prune.surgery import LayerPlan


@torch.no_grad()
def repair(model: nn.Module, run: Run, plan: list[LayerPlan], label: str) -> list[dict[str, Any]]:
    """Refit the writers in front of what leaves, block after block; for each its ridge and what is missing, as shares.

    Parts of blocks that stay write nothing afterwards.
    """
    leaving = {index: ("blocks",) if layer.drop else layer.skip for index, layer in enumerate(plan)
               if layer.drop or layer.skip}
    figures: dict[int, dict] = {}
    for visit in visits_in_place(model, run, label, leaving):
        found = _repaired(visit, leaving.get(visit.block.index, ()), run)
        figures[visit.block.index] = run.memory.remember(f"repair {visit.block.index}", lambda known=found: known)
    told = [figures[index] if index in figures else run.memory.remember(f"repair {index}", dict)
            for index in range(len(plan))]
    return [one for one in told if one]


def _repaired(visit: Visit, gone: tuple[str, ...], run: Run) -> dict[str, Any]:
    block = visit.block
    writer = block.attn_out if block.ffn_out is None or "mlp" in gone else block.ffn_out
    if block.form in UNTURNED or block.form in NORMS_KEPT:
        return {"name": block.name, "ridge": None, "note": "a norm stands between its writers and the stream"}
    if not spec_of(visit.model).ffn_out:
        why = "its last writers are experts" if spec_of(visit.model).known else NO_ENTRY
        return {"name": block.name, "ridge": None, "note": why}
    sums, bias = Sums(held_out(visit.masks, run.ranks), run.ranks), writer.bias is not None
    for x in _augmented(visit, writer, bias):
        sums.add(x)
    weight = writer.weight
    old = torch.cat([weight.float(), *([writer.bias.float()[:, None]] if bias else []),
                     torch.eye(len(weight), device=weight.device)], 1)
    found, figures = fitted(writer, old, torch.arange(old.shape[1] - len(weight), device=weight.device), sums,
                            (*RIDGES, 10.0))
    writer.write(found[:, :weight.shape[1]])
    if bias:
        writer.bias.copy_(found[:, -1])
    return figures


def _augmented(visit: Visit, writer: Projection, bias: bool) -> Iterator[Tensor]:
    """[h, 1 where there is a bias, y - m - W h] / |y| of the real tokens, batch by batch: [N, in (+ 1) + out]."""
    for index, made in enumerate(visit.record({"read": writer.module}, lambda tensor: tensor)):
        read, mask = visit.dense["read"].pop().float(), visit.masks[index].to(made.device)
        wanted = visit.wanted[index].to(made.device)[mask].float()
        size = wanted.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        yield torch.cat([read, *([torch.ones_like(size)] if bias else []), wanted - made[mask].float()], 1) / size
    visit.dense = None
