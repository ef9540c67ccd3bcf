"""Layer reuse: some layers choose blocks, those above read by the choice of a layer below (HyLRA, arXiv:2602.00777).

It serves prompts, where the queries of a tile choose together; or, the paper's own use, `phase: decode`: tokens that
are written one by one, each of which chooses for itself while the cache holds every key.

Decided once, on rows of the calibration data, from the attention that the blocks of keys draw in each KV head, from
the queries of a tile (decode: from each of the last 128 queries of a row):

    ratio90[l]      share of the visible blocks that hold .9 of the attention, mean over tiles and heads
    overlap[i, j]   of the `keep` best blocks of layers i < j, the share that they have in common, least of the heads

The layers of the largest ratio90, all but `sparsity` of them, read everything: their attention is spread out. Of the
others, `computed` choose by themselves (policy.py). Two layers that choose at random agree, too: an overlap counts
only if (overlap - chance) / (1 - chance) >= `guard`. A choice is the `keep` blocks whose mean keys draw most of the
attention of a KV head's queries together; the paper's runtime compares hashes of single keys in their place.

While decoding, layers with a window, and whatever a kv method has left of a cache, are read in full. Left out of the
paper's code: outliers of ratio90 are not clipped, each layer keeps as many blocks, none is dense by its place alone.
"""
import math
from collections import defaultdict
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from llmopt_kernels import Stripes, dense_attention
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.attention.base import State, add_pairs
from llmopt.attention.by_token import Held
from llmopt.attention.grid import BlockSelector, Grid, largest, top
from llmopt.attention.policy import sources
from llmopt.attention.sequences import causal_pairs
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Record, Run, Sample
from llmopt.model.blocks import blocks, decoder
from llmopt.parts import register
from llmopt.runtime.attention_rows import Rows, attention_rows
from llmopt.runtime.compression import ATTENTION
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.prompt import Prompt

FULL = -1           # in the place of a layer whose choice is read
STEPS = 128         # last queries of a row by which decoding is planned
STARTS = "starts of rows"


@register("attention.reuse")
@dataclass(frozen=True)
class Reuse(BlockSelector):
    """Spares the selection in most layers."""

    meta_shape: ClassVar[Any] = {"sources": [int], str: object}
    needs_data: ClassVar[bool] = True

    phase: Literal["prefill", "decode"] = Field("prefill", description="who reads by blocks: queries of prompts, or "
                                                                       "tokens that are written one by one")
    block: int = Field(64, ge=1, description="tokens of a block, and of a prompt the queries that share a choice")
    keep: int = Field(16, ge=1, description="blocks for each tile or token, besides those that are always read")
    sparsity: float = Field(0.9, ge=0, le=1, description="share of the layers that do not read everything")
    computed: float = Field(0.3, ge=0, le=1, description="share of these that choose by themselves, at most")
    guard: float = Field(0.5, ge=0, le=1, description="overlap beyond chance below which nothing is taken over")
    rows: int = Field(8, ge=1, description="of the calibration data that are looked at")

    def check(self) -> None:
        if self.decodes and self.last:
            raise FieldError("last", self.last, "0, as prompts are read in full where phase is decode,")

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
            begins = self._begins(ids.shape[1])
            mass = self._mass(model, ids, begins)                                        # by layer [G, tiles, blocks]
            causal, far = self._choice(begins, mass[0].shape[2])
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

    def _begins(self, length: int) -> Tensor:
        """The first query of each tile; a query alone where tokens are written one by one."""
        return torch.arange(max(0, length - STEPS), length) if self.decodes else torch.arange(0, length, self.block)

    def _choice(self, begins: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """bool [tiles, blocks] twice: the blocks that a tile sees, and those of them that are read only if chosen."""
        block, newest = torch.arange(blocks), begins[:, None] // self.block
        return block <= newest, (block <= newest - self.near) & (block >= self.first)

    def _mass(self, model: nn.Module, ids: Tensor, begins: Tensor) -> list[Tensor]:
        """By layer [G, tiles, blocks]: what the queries of a tile put on each block, mean over a KV head's queries."""
        count, first, size = -(-ids.shape[1] // self.block), int(begins[0]), 1 if self.decodes else self.block
        groups = [block.kv_heads for block in blocks(model) if block.attention is not None]
        found: dict[int, Tensor] = {}

        def see(rows: Rows) -> None:
            whole = found.setdefault(rows.layer, torch.zeros(rows.weights.shape[1], len(begins), count))
            by_key = torch.zeros(*rows.weights.shape[1:3], count)
            by_key.index_add_(2, rows.keys.cpu() // self.block, rows.weights[0].cpu())
            whole.index_add_(1, (rows.queries.cpu() - first) // size, by_key)

        with attention_rows(model, see, slice(first, None)):
            decoder(model)(input_ids=ids.to(model.device), use_cache=False)
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

    @property
    def decodes(self) -> bool:
        return self.phase == "decode"

    def attention(self, prompt: Prompt, live: Attachment) -> Tensor:
        return self._decoded(prompt, live) if self.decodes else super().attention(prompt, live)

    def _decoded(self, prompt: Prompt, live: Attachment) -> Tensor:
        """Attention [B, H, 1, D] of the newest token of every row."""
        source = live.record(ATTENTION).meta["sources"][prompt.layer]
        rows = [None if source == FULL or start is None else self._held(prompt, live, row, start)
                for row, start in enumerate(_starts(prompt, live.now.shared))]
        if all(held is None for held in rows):
            return _dense(prompt, live, slice(None))
        return torch.cat([_dense(prompt, live, slice(row, row + 1)) if held is None else
                          self._by_blocks(held, (row, source), prompt, live) for row, held in enumerate(rows)])

    def _by_blocks(self, held: Held, place: tuple[int, int], prompt: Prompt, live: Attachment) -> Tensor:
        """Attention [1, H, 1, D] of one row, by the choice of one layer; place: both of them."""
        row, source = place
        chosen = live.now.shared.setdefault((ATTENTION, row), {})                       # by layer, the keys to read
        if source not in chosen or len(chosen[source]) != len(held.keys):               # its own, or other KV heads'
            chosen[source] = held.chosen(self.keep)
        add_pairs(live, prompt, chosen[source].shape[1], held.keys.shape[1])
        return held.read(chosen[source])[None]

    def _held(self, prompt: Prompt, live: Attachment, row: int, start: int) -> Held | None:
        """What the cache holds of a row; None where there is too little to choose from, or a window."""
        if prompt.rule.window is not None or prompt.seen - start < self.min_length:
            return None
        means = live.now.cache.layers[prompt.layer].pooled(row, start, self.block)
        held = Held(prompt.query[row, :, 0], prompt.keys[row, :, start:], prompt.values[row, :, start:], means,
                    prompt.rule, self.block, self.first, self.near)
        return held if held.choice > self.keep else None


def _starts(prompt: Prompt, shared: dict[Any, Any]) -> list[int | None]:
    """By row, the column of its first real token; None where padding stands behind it."""
    if prompt.mask is None:
        return [0] * len(prompt.query)
    if STARTS not in shared:
        mask = prompt.mask.bool()
        first = mask.int().argmax(1)
        unbroken = mask.sum(1) == prompt.seen - first
        shared[STARTS] = [start if ok else None for start, ok in zip(first.tolist(), unbroken.tolist(), strict=True)]
    return shared[STARTS]


def _dense(prompt: Prompt, live: Attachment, rows: slice) -> Tensor:
    """Attention [B, H, 1, D] of some rows' newest tokens to all that they may read."""
    query, keys, values = (x[rows] for x in (prompt.query, prompt.keys, prompt.values))
    mask = None if prompt.mask is None else prompt.mask[rows].bool()
    each = causal_pairs(prompt.first, prompt.seen, prompt.rule.window)
    pairs = len(query) * each if mask is None else int(mask.sum())
    add_pairs(live, prompt, pairs, pairs)
    return dense_attention(query, keys, values, mask, prompt.first, prompt.rule)


def _single(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The rows of batches one by one, [1, T] each, without padding."""
    return [ids[mask.bool()][None] for batch in batches for ids, mask in zip(batch["input_ids"],
                                                                             batch["attention_mask"], strict=True)]
