"""Budgets from what the next tokens lose: heads get entries where doing without them would move predictions most.

    E(x) = sum over the queries of a second reading of (g . (o(x) - o))^2
    o(x): the output of a KV head's group over the part x of its entries that the scorer puts first, and what every
    head keeps; g: the slope of log p(y) in o, y drawn from the model's own prediction
    entries go, one after the other, where the convex minorant of E falls most

E / 2 is the second-order (Fisher) estimate of the KL divergence between the predictions of the whole model and those
of a model with this one head cut; several heads are taken to add up. Unlike the replay mass of `captured` it knows
values, and heads whose attention nothing depends on. Ours; the form is that of Optimal Brain Surgeon for outputs.
"""
from functools import partial

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.losses import drawn_slopes
from llmopt.calibration.rereading import CHUNK, Reread, reread
from llmopt.kv.captured import PLACES, Captured
from llmopt.method import Replayed, Run
from llmopt.parts import register
from llmopt.runtime.replay import request


@register("fisher")
@dataclass(frozen=True)
class Fisher(Captured):
    """Where dropping entries would move the predictions, on the texts of heads.replay, which must run before."""

    def backward(self, rows: int, length: int) -> int:
        return min(CHUNK, rows * length)

    def gains(self, piece: Replayed, own: list[Tensor], model: nn.Module, run: Run) -> Tensor:
        losses = [torch.zeros(len(layer), len(PLACES), dtype=torch.float64) for layer in own]
        free = [piece.free(index) for index in range(len(own))]
        orders = [layer[:, part].argsort(dim=1, descending=True, stable=True) + part.start
                  for layer, part in zip(own, free, strict=True)]

        def see(part: Reread) -> None:
            losses[part.layer] += errors(part, orders[part.layer].to(part.weights.device)).cpu()

        slopes = partial(drawn_slopes, model, drawing=torch.Generator(model.device).manual_seed(0))
        reread(model, piece.ids, request(run.tokenizer), CHUNK, slopes, see)
        return -torch.cat(losses)


def errors(part: Reread, order: Tensor) -> Tensor:
    """E(x) at PLACES of every KV head [G, places]; order [G, k]: positions of entries, what is kept longest first."""
    stops, groups = (PLACES * order.shape[1]).round().long(), len(order)
    slid = part.seen - part.weights.shape[-1]               # positions that a window left behind: none is in `order`
    told = part.slope @ part.values.mT.repeat_interleave(len(part.weights) // groups, 0)         # [H, t, S]
    out = []
    for group, columns in enumerate(order - slid):
        heads = slice(group * len(part.weights) // groups, (group + 1) * len(part.weights) // groups)
        shares = part.weights[heads][..., columns]                              # [g, t, k], in the scorer's order
        moved = shares * told[heads][..., columns]
        whole = (part.slope[heads] * part.output[heads]).sum(-1, keepdim=True)  # [g, t, 1]
        kept, drawn = _running(shares)[..., stops], _running(moved)[..., stops]
        rest, level = 1 - shares.sum(-1, keepdim=True), whole - moved.sum(-1, keepdim=True)
        change = (drawn + level) / (kept + rest).clamp(min=1e-6) - whole
        out.append(change.sum(0).square().sum(0).double())
    return torch.stack(out)


def _running(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., k along the last axis."""
    return torch.cat([x.new_zeros(*x.shape[:-1], 1), x.cumsum(-1)], -1)
