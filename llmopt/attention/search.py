"""Numbers for each head, found on the recipe's data: whoever loses least by reading less reads least.

    E_h(c) = sum over the queries of (g . (o_c - o))^2      o: the head's output by dense attention, o_c: by numbers c
    the c_h that make sum_h E_h(c_h) least while the pairs of all heads are at most `density` of the causal ones

g is the slope of the text's loss in o, so that E is a second-order (empirical Fisher) estimate of what predictions lose
by one head; several heads are taken to add up. The choice is an exact integer programme. Searching offline for what a
head reads is MInference's idea (Jiang et al., 2024, arXiv:2407.02490), which compares patterns of equal cost by the
output alone; the slopes, and heads that cost more or less than others, are ours.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from llmopt_kernels import Rule, dense_attention, sparse_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llmopt.attention.base import Selector, State
from llmopt.attention.sequences import causal_pairs
from llmopt.calibration.backward import backward
from llmopt.calibration.programme import Programme
from llmopt.calibration.walk import refuse_without_data
from llmopt.errors import BudgetError, LlmoptError
from llmopt.method import Record, Run, Sample
from llmopt.model.blocks import blocks
from llmopt.runtime.interface import attending_by, llmopt_mask

NAME = "llmopt_search"      # of the attention function
KEY = "_llmopt_search"      # where attention modules keep who watches
Numbers = dict[str, list[list[float]]]      # by field, layer and head


@dataclass
class Costs:
    """By layer what C ways of reading cost every head: errors [H, C], pairs [H, C]; dense: causal pairs [H]."""

    errors: dict[int, Tensor] = field(default_factory=dict)
    pairs: dict[int, Tensor] = field(default_factory=dict)
    dense: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, errors: Tensor, pairs: Tensor, dense: Tensor) -> None:
        for totals, new in ((self.errors, errors), (self.pairs, pairs), (self.dense, dense)):
            totals[layer] = totals.get(layer, 0) + new.double().cpu()


def searched(method: Selector, tried: dict[str, tuple[float, ...]], density: float, rows: int, model: nn.Module,
             run: Run) -> Numbers:
    """The numbers of each head of each layer, empty where attention is skipped; tried: by field, what is tried.

    Raises LlmoptError where no numbers read so little, or there is no data.
    """
    ways = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
    costs = measured(method, ways, model, replace(run, batches=first_rows(run, rows)))
    layers = sorted(costs.errors)
    errors, pairs, dense = (torch.cat([part[layer] for layer in layers]) for part in
                            (costs.errors, costs.pairs, costs.dense))
    try:
        picks = Programme(errors.tolist(), pairs.long().tolist(), int(density * dense.sum())).best()
    except BudgetError:
        least = float(pairs.amin(1).sum() / dense.sum())
        raise LlmoptError(f"{method.name}: density: {density:g} is out of reach: what every token reads in any case is "
                          f"{least:.3f} of the causal pairs of this data; at least that, or longer rows") from None
    own, given = iter(picks), [len(costs.errors.get(index, ())) for index in range(len(blocks(model)))]
    chosen = [[ways[next(own)] for _ in range(heads)] for heads in given]
    return {name: [[way[name] for way in layer] for layer in chosen] for name in tried}


def first_rows(run: Run, count: int) -> list[dict[str, Tensor]]:
    """The first rows of the data, each a batch [1, T] of its own without padding."""
    refuse_without_data(run)
    pairs = [(ids, mask.bool()) for batch in run.batches
             for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)][:count]
    return [{"input_ids": ids[mask][None], "attention_mask": mask[mask].long()[None]} for ids, mask in pairs]


def first_row(run: Run, count: int) -> Sample:
    """The first of so many rows."""
    rows = first_rows(run, count)
    return Sample(replace(run, batches=rows[:1]), len(rows), f"first of {len(rows)} rows")


def measured(method: Selector, ways: list[dict[str, float]], model: nn.Module, run: Run) -> Costs:
    """What every way costs on all rows of the run, of which each process reads its own."""
    costs, attending = Costs(), [block for block in blocks(model) if block.attention is not None]
    for block in attending:                                          # on a process without rows, too
        none = torch.zeros(block.heads, len(ways))
        costs.add(block.index, none, none, none[:, 0])
    with attending_by(model, NAME, KEY, lambda layer, module: partial(_watch, method, ways, costs, layer)):
        backward(model, run, f"{method.name}: search", lambda block: [], lambda *_: None)
    for part in (costs.errors, costs.pairs, costs.dense):
        for block in attending:
            run.ranks.sum_(part[block.index])
    return costs


@torch.no_grad()
def _watch(method: Selector, ways: list[dict[str, float]], costs: Costs, layer: int, rule: Rule, q: Tensor, k: Tensor,
           v: Tensor, out: Tensor, slope: Tensor) -> None:
    """Try all ways on one layer of one row: q, out and slope [H, T, D], k and v [G, T, D]."""
    errors, pairs = zip(*_tried(method, ways, rule, q, k, v, out, slope), strict=True)
    dense = torch.full((len(q),), causal_pairs(0, q.shape[1], rule.window))
    costs.add(layer, torch.stack(errors, 1), torch.stack(pairs, 1), dense)


def _tried(method: Selector, ways: list[dict[str, float]], rule: Rule, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
           slope: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(error [H], pairs computed [H]) of each way."""
    for way in ways:
        record = Record({"numbers": {name: [[value] * len(q)] for name, value in way.items()}})
        found, pairs = sparse_attention(q, k, v, method.select(q, k, State(0, rule, v, 0, 0, record)), rule)
        moved = ((found.float() - out.float()) * slope.float()).sum(-1)                             # [H, T]
        yield moved.double().square().sum(-1), pairs


def search_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                     softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    Where the output's slope comes back, it is shown to who watches this layer.
    """
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    out = dense_attention(query, key, value, None, 0, rule)
    if out.requires_grad:
        watch, seen = module.__dict__[KEY], [x.detach()[0] for x in (query, key, value, out)]
        out.register_hook(lambda slope: watch(rule, *seen, slope[0]))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, search_attention)
AttentionMaskInterface.register(NAME, llmopt_mask)
