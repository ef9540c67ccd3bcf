"""Heads that fall silent for a while, to see what they were good for.

    zero       the head's output z is 0                                                     (Michel et al. 2019)
    mean       z is its mean over calibration data: what it says there about nothing in particular
    uniform    its queries are 0, so that it attends evenly to all it can see               (AttentionInfluence)
"""
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from llmopt.calibration.walk import visits
from llmopt.errors import LlmoptError
from llmopt.heads.base import single_rows
from llmopt.method import Run
from llmopt.model.blocks import blocks, layer_list, returned
from llmopt.runtime.interface import attending_by

How = Literal["zero", "mean", "uniform"]
KEY = "_llmopt_silent"      # where attention modules keep which heads attend evenly, and by which function
MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}        # of the attention that is stood in for


@contextmanager
def masked(model: nn.Module, silent: list[Tensor], how: How, means: list[Tensor] | None = None) -> Iterator[None]:
    """Inside, the heads where `silent` (L tensors bool [H_l]) is True say nothing.

    means: what they say instead under `how: mean`, of each layer [H_l, D], as `mean_outputs` gives it, or [T, H_l, D].
    """
    with _evenly(model, silent) if how == "uniform" else _replaced(model, silent, means if how == "mean" else None):
        yield


@contextmanager
def _replaced(model: nn.Module, silent: list[Tensor], means: list[Tensor] | None) -> Iterator[None]:
    """The outputs of these heads are their means, or 0."""
    def hook(out: Tensor, heads: Tensor):
        def pre(module: nn.Module, args: tuple):
            z = args[0].unflatten(-1, out.shape[-2:])                                       # [B, T, H, D]
            return (torch.where(heads[:, None], out.to(z), z).flatten(-2),)
        return pre

    handles = []
    try:
        for block, heads in zip(blocks(model), silent, strict=True):
            if block.attn_out is not None and bool(heads.any()):
                out = torch.zeros(block.heads, block.head_dim) if means is None else means[block.index]
                handles.append(block.attn_out.module.register_forward_pre_hook(hook(out, heads.to(model.device))))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evenly(model: nn.Module, silent: list[Tensor]) -> Iterator[None]:
    """These heads attend evenly."""
    before = model.config._attn_implementation
    if before not in MASKS:
        raise LlmoptError(f"heads are masked evenly in {' and '.join(MASKS)} attention; this model runs {before!r}")
    with attending_by(model, _name(before), KEY,
                      lambda layer, module: (silent[layer].to(model.device), _plain(module, before))):
        yield


def even_attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The model's attention, with the queries [B, H, T, D] of masked heads 0: all that they can see draws alike."""
    heads, plain = module.__dict__[KEY]
    return plain(module, query.masked_fill(heads[:, None, None], 0), *args, **kwargs)


def _plain(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function behind a name; the eager one stands beside the model's own classes."""
    beside = sys.modules[type(module).__module__]
    return sdpa_attention_forward if implementation == "sdpa" else beside.eager_attention_forward


def _name(implementation: str) -> str:
    return f"llmopt_masked_{implementation}"


@torch.no_grad()
def mean_outputs(model: nn.Module, run: Run) -> list[Tensor]:
    """The mean of each head's output over the real tokens of run.batches: L tensors [H_l, D]."""
    found = [torch.zeros(block.heads, block.head_dim) for block in blocks(model)]
    for visit in visits(model, replace(run, batches=single_rows(run.batches)), "mean outputs", edits=False):
        block = visit.block
        if block.attn_out is None:
            continue
        sums, tokens = torch.zeros(block.heads * block.head_dim, dtype=torch.float64), 0

        def add(z: Tensor, sums: Tensor = sums) -> None:            # [N, H D]
            sums.add_(z.double().sum(0).cpu())

        visit.observe({block.attn_out.name: add})
        tokens = sum(int(mask.sum()) for mask in visit.masks)
        found[block.index] = (sums / tokens).float().unflatten(0, (block.heads, block.head_dim))
    return found


@contextmanager
def begun_at(model: nn.Module, index: int, hidden: Tensor) -> Iterator[None]:
    """Inside, a forward begins at block `index` with `hidden` [B, T, E]: what lies in front of it is not computed."""
    earlier = layer_list(model)[:index]
    try:
        for layer in earlier:
            layer.forward = lambda *args, **kwargs: returned(model, hidden)
        yield
    finally:
        for layer in earlier:
            layer.__dict__.pop("forward", None)


@contextmanager
def block_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that a forward inside fills with the hidden states [B, T, E] in front of each block."""
    found: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
        for layer in layer_list(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def ranked(scores: list[Tensor]) -> list[tuple[int, int]]:
    """(layer, head), the largest score first, equal ones in the model's order."""
    order = torch.cat(scores).argsort(descending=True, stable=True).tolist()
    places = [(layer, head) for layer, values in enumerate(scores) for head in range(len(values))]
    return [places[index] for index in order]


def silenced(scores: list[Tensor], heads: list[tuple[int, int]]) -> list[Tensor]:
    """bool [H_l] of every layer, True at these (layer, head)."""
    found = [torch.zeros(len(values), dtype=torch.bool) for values in scores]
    for layer, head in heads:
        found[layer][head] = True
    return found


for stock, mask in MASKS.items():
    AttentionInterface.register(_name(stock), even_attention)
    AttentionMaskInterface.register(_name(stock), mask)
