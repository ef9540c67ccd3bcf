"""Least-squares refit: the writer of a pruned part, on the inputs that remain, imitates what it wrote before.

    W_P += (H_PP + 1% mean(diag H_PP) I)^-1 H_PR W_R        H = sum of x x^T over the writer's inputs, P kept, R removed

The solution of min_W sum |W x_P - W_old x|^2, damped towards the old weights; the error can only fall.
"""
import torch
from torch import Tensor, nn

from llmopt.blocks import Block, Projection, Visit, walk
from llmopt.method import Run
from llmopt.prune.surgery import LayerPlan, head_columns

DAMPING = 0.01


class Gram:
    """Sum of x x^T over all tokens, [in, in] float32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, inputs: Tensor) -> None:                # [N, in]
        x = inputs.float()
        self.total = x.T @ x if self.total is None else self.total.addmm_(x.T, x)


def solve(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:      # [out, in], [in, in], [P] -> [out, P]
    """The columns `kept` of `weight`, changed so that they also do the work of the others."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    w, h = weight.double(), gram.double()
    inner = h[kept][:, kept]
    damped = inner + DAMPING * inner.diagonal().mean().clamp(min=1e-12) * torch.eye(len(kept), device=h.device)
    return w[:, kept] + torch.linalg.solve(damped, h[kept][:, gone] @ w[:, gone].T).T


def writers(block: Block, layer: LayerPlan) -> list[tuple[Projection, Tensor]]:
    """The writers that lose inputs under this plan, with the input columns that stay."""
    found = []
    if layer.heads is not None or layer.kv_groups is not None:
        found.append((block.attn_out, head_columns(layer.kept_heads(block), block.head_dim)))
    if layer.ffn is not None:
        found.append((block.ffn_out, layer.ffn))
    return found


@torch.no_grad()
def refit(model: nn.Module, run: Run, plan: list[LayerPlan], label: str) -> None:
    """Refit every writer, block after block, and zero the columns that the plan will cut."""
    for visit in walk(model, run.batches, run.progress, label):
        for projection, kept in writers(visit.block, plan[visit.block.index]):     # attention first: the FFN sees it
            _refit_one(visit, projection, kept)


def _refit_one(visit: Visit, projection: Projection, kept: Tensor) -> None:
    gram = Gram()
    visit.observe({projection.name: gram.add})
    kept = kept.to(projection.weight.device)
    fresh = torch.zeros_like(projection.weight)
    fresh[:, kept] = solve(projection.weight, gram.total, kept).to(fresh.dtype)
    projection.write(fresh)
