"""Layer reuse: some layers choose blocks, those above read by the choice of a layer below (HyLRA, arXiv:2602.00777).

Decided once, on rows of the calibration data, from the attention that the blocks of keys draw in each KV head:

    ratio90[l]      share of the visible blocks that hold .9 of a tile's attention, mean over tiles and heads
    overlap[i, j]   of the `keep` best blocks of layers i < j, the share that they have in common, least of the heads

The layers of the largest ratio90, all but `sparsity` of them, read everything: their attention is spread out. Of the
others, `computed` choose by themselves (policy.py). Two layers that choose at random agree, too: an overlap counts
only if (overlap - chance) / (1 - chance) >= `guard`. A choice is the `keep` blocks of the largest pooled attention
of a KV head's queries together.

For prompts; the paper's own use, tokens that are written one by one, is left out: there the cache is read in full.
"""
import math
from collections import defaultdict
from itertools import combinations
from typing import Any, ClassVar

import torch
from llmopt_kernels import Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.attention.base import State
from llmopt.attention.grid import BlockSelector, Grid, largest, top
from llmopt.attention.policy import sources
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run, Sample
from llmopt.model.blocks import blocks
from llmopt.parts import register
from llmopt.runtime.attention_rows import Rows, attention_rows

FULL = -1           # in the place of a layer whose choice is read


@register("attention.reuse")
@dataclass(frozen=True)
class Reuse(BlockSelector):
    """Spares the selection in most layers."""

    meta_shape: ClassVar[Any] = {"sources": [int], str: object}
    needs_data: ClassVar[bool] = True

    block: int = Field(64, ge=1, description="tokens of a block, and queries that share a choice")
    keep: int = Field(16, ge=1, description="blocks for each tile, besides those that are always read")
    sparsity: float = Field(0.9, ge=0, le=1, description="share of the layers that do not read everything")
    computed: float = Field(0.3, ge=0, le=1, description="share of these that choose by themselves, at most")
    guard: float = Field(0.5, ge=0, le=1, description="overlap beyond chance below which nothing is taken over")
    rows: int = Field(8, ge=1, description="of the calibration data that are looked at")

    def sample(self, run: Run) -> Sample:
        return Sample(run, 1, "all")

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"sources": by layer whose choice it reads, FULL where it reads everything or has no attention; "ratio90" and
        "overlap" of the layers that attend}.
        """
        return Record(run.memory.remember("sources", lambda: run.ranks.agree(self._decided(model, run))))

    def _decided(self, model: nn.Module, run: Run) -> dict[str, Any]:
        spread, alike = self._profile(model, run)                       # of the layers that attend
        attending = [block.index for block in blocks(model) if block.attention is not None]
        given, count = [FULL] * len(blocks(model)), len(spread)
        full = sorted(spread.argsort(descending=True, stable=True)[:math.ceil(count * (1 - self.sparsity))].tolist())
        seen = alike.clone()
        seen[full] = seen[:, full] = 0.0
        seen.fill_diagonal_(1.0)
        found = sources(seen, math.ceil(count * self.sparsity * self.computed) + 2 * len(full))
        for place, layer in enumerate(attending):
            given[layer] = FULL if place in full else attending[found[place]]
        return {"sources": given, "ratio90": spread.tolist(), "overlap": alike.tolist()}

    @torch.no_grad()
    def _profile(self, model: nn.Module, run: Run) -> tuple[Tensor, Tensor]:
        """(ratio90 [L], overlap [L, L], 0 where the guard says that it is chance)."""
        ratios, common, chooses = defaultdict(list), defaultdict(list), False
        for ids in _single(run.batches)[:self.rows]:
            mass = self._mass(model, ids)                                                # by layer [G, tiles, blocks]
            causal = torch.ones(mass[0].shape[1:]).tril().bool()
            far = causal.tril(-1) & (torch.arange(causal.shape[1]) >= self.first)
            tiles = far.sum(1) > self.keep                                               # where there is a choice
            picks = [top(x.masked_fill(~far, -1.0), self.keep)[:, tiles] for x in mass]
            for layer, x in enumerate(mass):
                ratios[layer].append((largest(x, 0.9).sum(-1) / causal.sum(1)).mean())
            if not bool(tiles.any()):
                continue
            chooses = True
            chance = float((self.keep / far.sum(1)[tiles]).mean())
            for (i, one), (j, other) in combinations(enumerate(picks), 2):
                if one.shape == other.shape:                                            # as many KV heads
                    both = float(((one & other).sum(-1) / self.keep).mean(-1).min())
                    common[i, j].append(both if (both - chance) / (1 - chance) >= self.guard else 0.0)
        if not chooses:
            raise LlmoptError(f"no row of the data has more than {self.keep + self.first} blocks of "
                              f"{self.block} tokens; longer rows, a smaller block, or fewer to keep")
        alike = torch.eye(len(ratios), dtype=torch.float64)
        for (i, j), values in common.items():
            alike[i, j] = sum(values) / len(values)
        return torch.stack([torch.stack(ratios[layer]).mean() for layer in range(len(ratios))]).double(), alike

    def _mass(self, model: nn.Module, ids: Tensor) -> list[Tensor]:
        """By layer [G, tiles, blocks]: what the queries of a tile put on each block, mean over a KV head's queries."""
        count = -(-ids.shape[1] // self.block)
        groups = [block.kv_heads for block in blocks(model) if block.attention is not None]
        found: dict[int, Tensor] = {}

        def see(rows: Rows) -> None:
            whole = found.setdefault(rows.layer, torch.zeros(rows.weights.shape[1], count, count))
            by_key = torch.zeros(*rows.weights.shape[1:3], count)
            by_key.index_add_(2, rows.keys.cpu() // self.block, rows.weights[0].cpu())
            whole.index_add_(1, rows.queries.cpu() // self.block, by_key)

        with attention_rows(model, see):
            model(ids, use_cache=False)
        return [found[layer].unflatten(0, (groups[place], -1)).mean(1) for place, layer in enumerate(sorted(found))]

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        given, count = record.meta["sources"], len(blocks(model))
        if len(given) != count or any(not FULL <= source <= layer or (source >= 0 and given[source] != source)
                                      for layer, source in enumerate(given)):
            raise LlmoptError(f"{self.name}: {count} layers, each of which reads everything ({FULL}), by its own "
                              f"number or by that of an earlier one that chooses, expected; {given} given")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        if state.record.meta["sources"][state.layer] == FULL:
            return Stripes(0, k.shape[1])
        return super().select(q, k, state)

    def picks(self, grid: Grid, state: State) -> Tensor:
        source = state.record.meta["sources"][state.layer]
        known = state.shared.get((self.name, source))
        if known is None or known.shape[1:] != grid.far.shape:              # its own, or of a layer with another window
            pooled = grid.pooled_logits.masked_fill(~grid.causal, -torch.inf).softmax(-1)
            together = pooled.unflatten(0, (len(grid.keys), -1)).mean(1).masked_fill(~grid.far, -1.0)
            known = state.shared[self.name, source] = top(together, self.keep)
        return grid.for_heads(known)


def _single(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The rows of batches one by one, [1, T] each, without padding."""
    return [ids[mask.bool()][None] for batch in batches for ids, mask in zip(batch["input_ids"],
                                                                             batch["attention_mask"], strict=True)]
