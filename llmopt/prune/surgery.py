"""Cutting a model down to a plan: weights, biases, head scores, config; the model in memory works at once."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.calibration.walk import reshaped
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import Block, Projection, blocks, layer_list, replace_layers, spec_of, tell_shapes
from llmopt.model.head_numbers import HeadNumbers
from llmopt.model.modeling import FAMILIES, skip_part
from llmopt.model.shapes import LayerShape, check_droppable, check_storable, shape_of, slice_config, sync_config
from llmopt.prune.allocate import Units, survivors
from llmopt.prune.groups import COARSE


@dataclass(frozen=True)
class LayerPlan:
    """The units of one layer that stay: ascending indices; None: all of them.

    heads: query heads [kept H]; without them, all heads of the kept KV groups.
    """

    heads: Tensor | None = None
    kv_groups: Tensor | None = None
    ffn: Tensor | None = None
    skip: tuple[str, ...] = ()          # "attention", "mlp"
    drop: bool = False                  # the whole layer

    def to_dict(self) -> dict[str, Any]:
        """This plan as plain JSON data."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "LayerPlan":
        """The plan that `to_dict` wrote down."""
        return cls(**{k: tuple(v) if k == "skip" else torch.tensor(v, dtype=torch.long) if isinstance(v, list) else v
                      for k, v in told.items()})

    @property
    def cuts(self) -> bool:
        """True if anything leaves a layer that stays."""
        return bool(self.skip) or any(part is not None for part in (self.heads, self.kv_groups, self.ffn))

    def kept_heads(self, block: Block) -> Tensor:          # [kept H]
        """The query heads that stay."""
        if block.attention is None or "attention" in self.skip:
            return torch.arange(0)
        if self.heads is not None or self.kv_groups is None:
            return torch.arange(block.heads) if self.heads is None else self.heads
        return torch.arange(block.heads).view(block.kv_heads, -1)[self.kv_groups].flatten()

    def shape(self, block: Block, has_ffn: bool = True) -> LayerShape:
        """The shape that the layer will have."""
        now = shape_of(block, has_ffn)
        return LayerShape(
            0 if "attention" in self.skip or not now.heads else len(self.kept_heads(block)),
            0 if "attention" in self.skip else now.kv_heads if self.kv_groups is None else len(self.kv_groups),
            0 if "mlp" in self.skip else now.width if self.ffn is None else len(self.ffn),
            tuple(part for part in ("attention", "mlp") if part in now.skip + self.skip))


def layer_plan(chosen: list[tuple[Units, int]]) -> LayerPlan:
    """The plan of a layer that loses so many of its units of each kind."""
    made: dict[str, Any] = {"skip": ()}
    for units, count in chosen:
        if not count:
            continue
        if units.kind == "blocks":
            made["drop"] = True
        elif units.kind in COARSE:
            made["skip"] += (units.kind,)
        else:
            made["heads" if units.kind == "q_heads" else units.kind] = survivors(units, count)
    return LayerPlan(**made)


@torch.no_grad()
def apply_plan(model: nn.Module, plan: list[LayerPlan], run: Run) -> None:
    """Edit `model` and the run's head scores in place; what cannot be stored raises LlmoptError beforehand."""
    views = blocks(model)
    check_plan(model, views, plan)
    for name, per_layer in run.scores.items():
        run.scores[name] = reindex(per_layer, views, plan)
    numbers = run.heads or HeadNumbers.of(block.heads for block in views)
    run.heads = HeadNumbers(numbers.before, reindex(numbers.left, views, plan))
    kept = [i for i, layer in enumerate(plan) if not layer.drop]
    family = FAMILIES.get(model.config.model_type)      # None: no part of a block leaves, which refuse_units sees to
    for block in reshaped(model, run, "cutting", [i for i in kept if plan[i].cuts]):
        layer = plan[block.index]
        cut_ffn(block, layer)
        cut_heads(block, layer)
        for part in layer.skip:
            skip_part(family, block.module, part, block.index)
    if len(kept) < len(plan):
        present = list(layer_list(model))
        replace_layers(model, [present[i] for i in kept])
        slice_config(model, kept)
    tell_shapes(model)
    sync_config(model)


def check_plan(model: nn.Module, views: list[Block], plan: list[LayerPlan]) -> None:
    """Raise LlmoptError if `plan` is of another model, or leaves one that cannot work or cannot be stored."""
    if len(plan) != len(views):
        raise LlmoptError(f"the plan is for another model: it has {len(plan)} layers, this model has {len(views)}")
    for block, layer in zip(views, plan, strict=True):
        _check_kept(block, layer)
    spec = spec_of(model)
    has_ffn = bool(spec.ffn_out)
    planned = [layer.shape(block, has_ffn) for block, layer in zip(views, plan, strict=True) if not layer.drop]
    kept = [block for block, layer in zip(views, plan, strict=True) if not layer.drop and "attention" not in layer.skip]
    if all(block.attention is None for block in kept) and any(block.attention is not None for block in views):
        raise LlmoptError("no layer with attention would remain")
    if len(planned) < len(plan):
        check_droppable(model, [index for index, layer in enumerate(plan) if not layer.drop])
    if spec.reshapes:
        check_storable(model, planned)


def _check_kept(block: Block, layer: LayerPlan) -> None:
    """Raise LlmoptError unless what stays are units of this block, some of each kind, as many heads in each group."""
    for kind, part, count, kept in (("ffn", "mlp", block.width, layer.ffn),
                                    ("kv_groups", "attention", block.kv_heads, layer.kv_groups),
                                    ("heads", "attention", block.heads, layer.heads)):
        if kept is None:
            continue
        if not len(kept):
            raise LlmoptError(f"{block.name}: the plan keeps no {kind}; skip: [{part}] takes the whole part out")
        if not count:
            raise LlmoptError(f"{block.name}: the plan is for another model: it keeps {kind}, and this layer has none")
        if not 0 <= int(kept.min()) <= int(kept.max()) < count or bool((kept.diff() <= 0).any()):
            raise LlmoptError(f"{block.name}: the plan is for another model: of its {kind}, 0 to {count - 1}, it keeps "
                              f"{int(kept.min())} to {int(kept.max())}; ascending numbers of them expected")
    if layer.heads is not None:
        groups = torch.arange(block.kv_heads) if layer.kv_groups is None else layer.kv_groups
        own = torch.bincount(layer.heads // (block.heads // block.kv_heads), minlength=block.kv_heads)
        if int(own[groups].sum()) < len(layer.heads) or len(own[groups].unique()) > 1:
            raise LlmoptError(f"{block.name}: the plan keeps {own.tolist()} heads of its KV groups; as many of each "
                              "group that stays are needed, and none of the others")


def reindex(per_layer: list[Tensor], views: list[Block], plan: list[LayerPlan]) -> list[Tensor]:
    """The scores of the heads that remain: L tensors [H_l]."""
    return [own[layer.kept_heads(block)] for own, block, layer in zip(per_layer, views, plan, strict=True)
            if not layer.drop]


def cut_ffn(block: Block, layer: LayerPlan) -> None:
    """Take FFN channels out of the readers' rows and the writer's columns."""
    if layer.ffn is None:
        return
    for projection in block.ffn_in:
        projection.keep(rows=_rows(projection, dict.fromkeys(projection.parts, layer.ffn)))
    block.ffn_out.keep(columns=layer.ffn)


def cut_heads(block: Block, layer: LayerPlan) -> None:
    """Take KV groups and query heads out of q, k, v and the writer's columns."""
    if layer.heads is None and layer.kv_groups is None:
        return
    heads = layer.kept_heads(block)
    groups = torch.arange(block.kv_heads) if layer.kv_groups is None else layer.kv_groups
    for projection in block.attn_in:
        projection.keep(rows=_rows(projection, {"q": heads, "k": groups, "v": groups}))
    block.attn_out.keep(columns=head_columns(heads, block.head_dim))


def head_columns(heads: Tensor, dim: int) -> Tensor:       # [kept H * D]
    """The writer's input columns that belong to `heads`."""
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def _rows(projection: Projection, kept: dict[str, Tensor]) -> Tensor:
    """Rows of a (fused) reader that stay, in their old order."""
    return torch.cat([rows[kept[part]].flatten() for part, rows in projection.parts.items()]).sort().values
