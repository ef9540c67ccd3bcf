"""Dependency groups: which rows and columns leave together when one unit of a block leaves.

    ffn        channel i:  row i of gate and up, column i of the FFN's writer
    kv_groups  group j:    rows j of k and v, rows and writer columns of its H/G query heads
    q_heads    head h:     rows h of q, columns h of the attention's writer
    attention, mlp, blocks: all of it
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.model.blocks import Block, Projection

FINE = ("ffn", "kv_groups", "q_heads")
COARSE = ("attention", "mlp", "blocks")


@dataclass(frozen=True)
class Member:
    """The share of one projection in the units of a block: index [units, n] of rows (or columns) of its weight."""

    projection: Projection
    index: Tensor
    columns: bool = False

    def sums(self, values: Tensor) -> Tensor:             # [out, in] -> [units]
        """Add up what each unit owns of `values`, a tensor shaped like the weight."""
        return values.sum(dim=0 if self.columns else 1)[self.index].sum(dim=1)

    @property
    def weights(self) -> int:
        """Weight entries per unit."""
        per_line = self.projection.out_features if self.columns else self.projection.in_features
        return self.index.shape[1] * per_line

    @property
    def biases(self) -> int:
        return self.index.shape[1] if self.projection.bias is not None and not self.columns else 0


def members(block: Block, unit: str) -> list[Member]:
    """The projections that a unit of this block reaches into; empty where the block has no such unit (any more)."""
    attention, ffn = block.attention is not None, block.ffn_out is not None
    if unit == "ffn":
        return _inner(block, ("gate", "up") if len(block.ffn_in) == 2 or "gate" in block.ffn_in[0].parts else ("up",),
                      block.ffn_out, block.width) if ffn else []
    if unit == "q_heads":
        return _inner(block, ("q",), block.attn_out, block.heads) if attention else []
    if unit == "kv_groups":
        parts = tuple(part for part in "qkv" if any(part in reader.parts for reader in block.attn_in))
        return _inner(block, parts, block.attn_out, block.kv_heads) if attention else []
    whole = {"attention": [*block.attn_in, block.attn_out] if attention else [],
             "mlp": [*block.ffn_in, block.ffn_out] if ffn else [], "blocks": block.projections()}[unit]
    return [Member(p, torch.arange(p.out_features)[None]) for p in whole]


def _inner(block: Block, parts: tuple[str, ...], writer: Projection, units: int) -> list[Member]:
    found = [Member(projection, rows.reshape(units, -1)) for projection, rows in map(block.part, parts)]
    return [*found, Member(writer, torch.arange(writer.in_features).view(units, -1), columns=True)]


def cost(block: Block, unit: str) -> int:
    """Parameters that leave with one unit."""
    if block.read is not None and unit == "blocks":
        return sum(parameter.numel() for parameter in block.module.parameters())
    return sum(m.weights + m.biases for m in members(block, unit))


def mean_square(block: Block, unit: str) -> Tensor:       # [units]
    """Mean of the squared weights over everything that leaves with each unit, float32."""
    found = members(block, unit)
    total = sum(m.sums(felt(block, unit, m.projection).square()) for m in found)
    return total / sum(m.weights for m in found)


def felt(block: Block, unit: str, projection: Projection) -> Tensor:      # [out, in]
    """Inside a layer, a reader's columns count with the gain of the norm in front of it, as the stream feels them.

    Whole sub-blocks are compared between layers, where gains tell of the depth of a layer and not of its worth.
    """
    weight = projection.weight.float()
    for role, readers in block.behind.items():
        ahead = unit in FINE and role in block.norms and block.form != "residual_post"
        if ahead and any(p is projection for p in readers):
            weight = weight * block.norms[role].gain
    return weight
