"""Gradient importance: how much the loss would change if a head fell silent, to first order.

    I(l, h) = mean_x | dL(x) / d xi |  =  mean_x | < z_h(x), dL/dz_h(x) > |

xi = 1 is a gate on the head's output z_h before the output projection, L(x) the next-token cross-entropy of sample x;
the product is summed over the positions of a sample before its absolute value is taken, and that is averaged over the
samples. `normalize: layer` divides by the L2 norm of the layer's scores, as the paper does before it ranks heads of
different layers.

Michel et al., 2019 (arXiv:1905.10650). Left out: pruning in steps with scores taken anew after each.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.losses import loss_slopes
from llmopt.heads.base import Batch, HeadScore
from llmopt.method import Run
from llmopt.model.blocks import Block, blocks, decoder
from llmopt.parts import register


@contextmanager
def gates(views: list[Block], values: list[Tensor]) -> Iterator[None]:
    """Multiply each head's output, before the output projection, by its gate; values: L tensors [B, H_l]."""
    handles = []

    def hook(block: Block, gate: Tensor):
        def pre(module, args):
            z = args[0].unflatten(-1, (block.heads, block.head_dim))        # [B, T, H, D]
            return ((z * gate[:, None, :, None]).flatten(-2).to(z.dtype),)
        return pre

    try:
        for block, gate in zip(views, values, strict=True):
            if block.attn_out is not None:
                handles.append(block.attn_out.module.register_forward_pre_hook(hook(block, gate)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def slopes_of(model: nn.Module, batch: Batch, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    """d(sum of the samples' mean losses)/dw for every w in `wanted`; None where the loss does not hang on it."""
    ids, mask = (batch[key].to(model.device) for key in ("input_ids", "attention_mask"))
    with torch.enable_grad():
        hidden = decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]      # [B, T, E]
        return torch.autograd.grad(hidden, wanted, loss_slopes(model, hidden, ids, mask), allow_unused=True)


@register("heads.gradient")
@dataclass(frozen=True)
class Gradient(HeadScore):
    """One forward and one backward pass; gradients reach the gates only."""

    mean_over: ClassVar = "samples"

    normalize: Literal["layer", "none"] = Field("layer", description="divide by the norm of each layer's scores")

    @property
    def unit(self) -> str:
        return "mean |dL/dgate|" + (", divided by the layer's norm" if self.normalize == "layer" else "")

    def backward(self, rows: int, length: int) -> int:
        return rows * length

    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        model.requires_grad_(False)
        views = blocks(model)
        totals, samples = [torch.zeros(block.heads, dtype=torch.float64) for block in views], 0
        for batch in run.progress(run.batches, self.name):
            for total, slope in zip(totals, self._slopes(model, views, batch), strict=True):
                total += slope.abs().sum(0).double().cpu()
            samples += len(batch["input_ids"])
        return {"scores": [total / samples for total in totals]}

    def finish(self, scores: list[Tensor]) -> list[Tensor]:
        return scores if self.normalize == "none" else [s / s.norm().clamp(min=1e-30) for s in scores]

    def _slopes(self, model: nn.Module, views: list[Block], batch: Batch) -> list[Tensor]:
        """dL/dxi per sample: L tensors [B, H_l]."""
        wide = torch.promote_types(model.dtype, torch.float32)      # slopes of a bf16 model are summed in fp32
        like = dict(dtype=wide, device=model.device, requires_grad=True)
        open_ = [torch.ones(len(batch["input_ids"]), block.heads, **like) for block in views]
        with gates(views, open_):
            found = slopes_of(model, batch, open_)              # None where attention is skipped: it has no gates
        return [torch.zeros_like(gate) if g is None else g for g, gate in zip(found, open_, strict=True)]
