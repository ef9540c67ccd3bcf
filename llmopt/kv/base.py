"""Base of the kv methods: how much is kept, by whom, and what is always kept. A method writes `score` alone."""
import json
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmopt.blocks import blocks
from llmopt.cache import Entries, LlmoptCache, RaggedLayer
from llmopt.kv import allocate
from llmopt.kv.reduce import evict
from llmopt.kv.view import LayerKV, index_of_real
from llmopt.method import FieldError, LlmoptError, Run, nearest
from llmopt.runtime import Attachment, CacheMethod

Scored = tuple[Entries, Tensor]      # the entries of a layer, their scores [G, T]


@dataclass(frozen=True)
class Scorer(CacheMethod):
    """Keep the entries of highest score; exactly one of `ratio` and `budget` is set.

    Per row of the batch, with n real tokens seen, a KV head keeps on average
    min(n, max(minimum, n - floor(ratio * n))) or min(n, budget) entries.
    """

    ratio: float | None = None       # fraction removed
    budget: int | None = None        # mean entries per KV head, sinks and window included
    minimum: int = 7                 # floor of any one head
    sinks: int = 0                   # first tokens, always kept
    window: int = 0                  # last tokens, always kept
    allocate: Literal["uniform", "ada", "global", "pyramid", "prefix", "heads"] = "uniform"
    heads: str | None = None         # head scores: name of a score step, or a .json file
    every: int | None = None         # compress again after so many tokens of decoding
    reduce: Literal["evict"] = "evict"

    def check(self) -> None:
        if (self.ratio is None) == (self.budget is None):
            raise FieldError("ratio", self.ratio, "exactly one of ratio and budget")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise FieldError("ratio", self.ratio, "a fraction to remove, at least 0 and below 1")
        for key, value, least in (("minimum", self.minimum, 1), ("sinks", self.sinks, 0), ("window", self.window, 0)):
            if value < least:
                raise FieldError(key, value, f"at least {least}")
        if self.budget is not None and self.budget < max(1, self.sinks + self.window):
            raise FieldError("budget", self.budget, f"at least sinks + window = {self.sinks} + {self.window}")
        if self.every is not None and self.every < 1:
            raise FieldError("every", self.every, "at least 1")
        if (self.heads is None) == (self.allocate == "heads"):
            raise FieldError("heads", self.heads, "head scores together with allocate: heads, and only then,")

    @abstractmethod
    def score(self, kv: LayerKV) -> Tensor:
        """The worth of every entry: [B, G, T], higher is better. Holes may hold anything."""

    def share(self, length: int) -> int:
        """Mean entries per KV head after `length` real tokens."""
        if self.budget is not None:
            return min(length, self.budget)
        return min(length, max(self.minimum, length - int(self.ratio * length)))

    # ------------------------------------------------------------------------------------------ once, at apply

    def plan(self, model: nn.Module, run: Run) -> dict[str, Any]:
        """{"shares": [L][G]} where head scores decide: the best query head of each group speaks for it."""
        if self.allocate != "heads":
            return {}
        scores = _head_scores(self.heads, run)
        views = blocks(model)
        if len(scores) != len(views) or any(len(s) != v.heads for s, v in zip(scores, views, strict=False)):
            raise LlmoptError(f"heads: {self.heads} holds scores of other heads than this model has")
        return {"shares": [[max(s[i:i + v.heads // v.kv_heads]) for i in range(0, v.heads, v.heads // v.kv_heads)]
                           if v.heads else [] for s, v in zip(scores, views, strict=True)]}

    # ------------------------------------------------------------------------------------- after a forward

    @torch.no_grad()
    def compress(self, cache: LlmoptCache, live: Attachment, meta: dict[str, Any]) -> None:
        masks = [self._plan_row(cache, live, meta, row) for row in range(cache.batch_size)]
        if all(mask is None for mask in masks):
            return
        for place, index in enumerate(cache.attending()):
            layer, rows = cache.layers[index], []
            for row, mask in enumerate(masks):
                entries = layer.row(row, cache.real(row))
                rows.append(entries if mask is None else evict(entries, mask[place]))
            layer.fold(rows)

    def _plan_row(self, cache: LlmoptCache, live: Attachment, meta: dict[str, Any], row: int) -> list[Tensor] | None:
        """Which entries of one row stay, per layer bool [G, T]; None: all of them."""
        length = cache.lengths()[row]
        real, share = cache.real(row), self.share(length)
        layers = [(i, cache.layers[i]) for i in cache.attending()]
        entries = [layer.row(row, real) for _, layer in layers]
        if all(bool((e.counts <= share).all()) for e in entries):
            return None
        views = [_view(e, layer, real, row, (i, length, live)) for e, (i, layer) in zip(entries, layers, strict=True)]
        scores = [self._scores(view) for view in views]
        counts = self._counts(scores, views, share, [meta["shares"][i] for i, _ in layers] if meta else None)
        return [self._keep(score, view, count[:score.shape[0]])
                for score, view, count in zip(scores, views, counts, strict=True)]

    def _scores(self, view: LayerKV) -> Tensor:
        """[G, T], -inf at holes; raises LlmoptError if the method gave NaN."""
        scores = self.score(view)[0].float().masked_fill(view.holes[0], -torch.inf)
        if bool(scores.isnan().any()):
            raise LlmoptError(f"{self.name}: NaN scores in layer {view.layer}")
        return scores

    def _counts(self, scores: list[Tensor], views: list[LayerKV], share: int, weights: list | None) -> Tensor:
        """[L, G] entries that each head keeps."""
        cap = _stack([(~view.holes[0]).sum(-1) for view in views], 0).cpu()
        total = allocate.total_of(cap, share)
        floor = cap.clamp(max=min(share, self.minimum))
        if self.allocate == "uniform":
            return allocate.uniform(cap, share)
        if self.allocate == "pyramid":
            return allocate.pyramid(share, self.sinks + self.window, floor, cap)
        if self.allocate == "heads":
            return allocate.water_fill(_stack([torch.tensor(w) for w in weights], 0.0), total, floor, cap)
        floor = cap.clamp(max=min(share, max(self.minimum, self.sinks + self.window)))
        if self.allocate == "prefix":
            return allocate.prefix(_stack(scores, -torch.inf), total, floor, cap)
        sure = _stack([s.masked_fill(self._protected(v, torch.tensor(share)), torch.inf)
                       for s, v in zip(scores, views, strict=True)], -torch.inf)
        return allocate.ada(sure, share, floor, cap) if self.allocate == "ada" else \
            allocate.by_threshold(sure, total, floor)

    def _keep(self, scores: Tensor, view: LayerKV, counts: Tensor) -> Tensor:
        """bool [G, T]: sinks and window first, then the best."""
        counts = counts.to(scores.device)
        sure = scores.masked_fill(self._protected(view, counts), torch.inf)
        return allocate.ranks(sure) < counts.unsqueeze(-1)

    def _protected(self, view: LayerKV, counts: Tensor) -> Tensor:
        """bool [G, T]: first and last tokens. In a head of few entries sinks take at most half, the window the rest."""
        counts = counts.to(view.positions.device)
        sinks = counts.clamp(max=self.sinks)
        sinks = torch.where(counts < self.sinks + self.window, torch.minimum(sinks, counts // 2), sinks)
        window = (counts - sinks).clamp(max=self.window)
        positions = view.positions[0]
        first = positions < sinks.unsqueeze(-1)
        last = positions >= view.lengths[0] - window.unsqueeze(-1)
        return (first | last) & ~view.holes[0]


def _view(entries: Entries, layer: RaggedLayer, real: Tensor | None, row: int,
          place: tuple[int, int, Attachment]) -> LayerKV:
    """The scorer's view of one row; place = (layer index, real tokens seen, attachment)."""
    index, length, live = place
    if layer.queries is None:
        queries = query_positions = None
    else:
        there = layer.query_positions[row] >= 0
        queries = layer.queries[row, :, there].unsqueeze(0)
        query_positions = index_of_real(real, layer.query_positions[row, there]).unsqueeze(0)
    return LayerKV(entries.keys.unsqueeze(0), entries.values.unsqueeze(0), queries, query_positions,
                   index_of_real(real, entries.positions).unsqueeze(0),
                   torch.tensor([length], device=layer.device), index, live.rules[index])


def _stack(rows: list[Tensor], fill: float) -> Tensor:
    """Per-layer tensors of unequal shapes as one, padded at the end."""
    shape = [max(row.shape[d] for row in rows) for d in range(rows[0].ndim)]
    out = rows[0].new_full((len(rows), *shape), fill)
    for place, row in enumerate(rows):
        out[(place, *(slice(0, size) for size in row.shape))] = row
    return out


def _head_scores(name: str, run: Run) -> list[list[float]]:
    """Head scores by the name of their step, or from a .json file: {"scores": [L][H]} or the bare list."""
    if name in run.scores:
        return [scores.tolist() for scores in run.scores[name]]
    if not name.endswith(".json"):
        raise LlmoptError(f"heads: no score step {name!r}{nearest(name, run.scores) if run.scores else ' ran before'}")
    if not Path(name).is_file():
        raise LlmoptError(f"heads: there is no file {name}")
    data = json.loads(Path(name).read_text())
    return data["scores"] if isinstance(data, dict) else data
