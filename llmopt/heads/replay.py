"""What each KV head needs to have kept: its part of what the model looks at when it reads a text again.

    s_j = max over queries t of the second reading, and over the heads h of the group, of a_tj^h           (KVzip)
    plus: of a_tj^h * |v_j W_O^h| / |x_t|            x_t: what the layer's attention reads at t            (KVzip+)
    odds: in their place, how far the model's predictions would move without the entry (calibration/rereading.py)
    at r of the entries kept: how many of a head's entries are among the best r of all heads of all layers

Replay scores: KVzip (arXiv:2505.23416), KVzip+ (arXiv:2601.07891); their thresholds as budgets per head that are fixed
once: the idea of LU-KV (arXiv:2602.08585). Odds are ours; their form is that of DropKV, along the slope of the
predictions. First and last entries, which every head keeps, are left out, and those that
a sliding window has left behind. A score of 1 is an even share.
"""
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.rereading import CHUNK, replay_odds
from llmopt.errors import FieldError, LlmoptError
from llmopt.heads.base import HeadScore
from llmopt.method import Record, Replayed, Run, Sample
from llmopt.model.blocks import blocks
from llmopt.model.positions import attention_windows
from llmopt.parts import register
from llmopt.runtime.replay import replay_scores, request

GRID = {"at_50": 0.5, "at_25": 0.25, "at_10": 0.1, "at_5": 0.05}


@register("heads.replay")
@dataclass(frozen=True)
class Replay(HeadScore):
    """Part of a small cache that a head deserves, by reading texts twice; needs no labels and no questions.

    A query head has the score of its KV head. Beside the scores: the part of its entries that the head keeps where
    50, 25, 10 and 5 % of all are kept, for `allocate: profile`.
    """

    beside: ClassVar = tuple(GRID)

    pieces: int = Field(6, ge=1, le=1000, description="texts that are read twice, rows of the data joined")
    length: int = Field(2048, ge=64, le=1_000_000, description="tokens of each")
    chunk: int = Field(512, ge=16, description="tokens that are read again at a time")
    plus: bool = Field(False, description="weigh attention by what the value does to the residual stream (KVzip+)")
    odds: bool = Field(False, description="how far predictions move without the entry, by gradients, in the place of "
                                          "attention; three to four times the work")
    sinks: int = Field(4, ge=0, description="first entries, always kept and left out here")
    window: int = Field(32, ge=0, description="last entries, always kept and left out here")

    def check(self) -> None:
        if self.odds and self.plus:
            raise FieldError("plus", True, "false with odds, which know values too")

    def backward(self, rows: int, length: int) -> int:
        return min(CHUNK, self.length) if self.odds else 0

    def sample(self, run: Run) -> Sample:
        if not run.batches:
            return super().sample(run)
        pieces = joined_rows(run.batches, self.pieces, self.length)
        first = {"input_ids": pieces[0][None], "attention_mask": torch.ones_like(pieces[0])[None]}
        return Sample(replace(run, batches=[first]), len(pieces), f"first of {len(pieces)} texts")

    def apply(self, model: nn.Module, run: Run) -> Record:
        if not run.batches:
            raise LlmoptError("head scores need calibration data and there is none")
        pieces, asked = joined_rows(run.batches, self.pieces, self.length), request(run.tokenizer)
        if min(map(len, pieces)) <= self.sinks + self.window:
            raise LlmoptError(f"texts of {min(map(len, pieces))} tokens are too short to leave out sinks + window = "
                              f"{self.sinks} + {self.window}")
        kept = run.memory.keep_named("replays", lambda: self._read(model, pieces, asked, run))
        run.replays = [Replayed(ids, [kept[f"{i}.{layer}"] for layer in range(len(blocks(model)))],
                                (self.sinks, self.window), slid(model, len(ids))) for i, ids in enumerate(pieces)]
        return super().apply(model, run)

    def _read(self, model: nn.Module, pieces: list[Tensor], asked: list[int], run: Run) -> dict[str, Tensor]:
        """{"piece.layer": scores [G, n]}."""
        found = {}
        for i in run.progress(range(len(pieces)), self.name):
            scores = (replay_odds(model, pieces[i], asked, min(CHUNK, self.chunk)) if self.odds
                      else replay_scores(model, pieces[i], asked, self.chunk, self.plus))
            found |= {f"{i}.{layer}": part for layer, part in enumerate(scores)}
        return found

    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        parts = {name: _mean([kept_parts(piece, share) for piece in run.replays]) for name, share in GRID.items()}
        sizes = run.replays[0].sizes().split([block.kv_heads for block in blocks(model)])
        even = run.replays[0].sizes().float().mean().clamp(min=1)
        scores = [sum(parts[name][layer] / share for name, share in GRID.items()) / len(GRID) * size / even
                  for layer, size in enumerate(sizes)]
        groups = [block.heads // max(1, block.kv_heads) for block in blocks(model)]
        return {key: [part.repeat_interleave(g) for part, g in zip(layers, groups, strict=True)]
                for key, layers in {"scores": scores, **parts}.items()}


def joined_rows(batches: list[dict[str, Tensor]], count: int, length: int) -> list[Tensor]:
    """At most `count` texts of `length` tokens, one row of the data behind the other, padding left out; int64 [n]."""
    rows = [row[mask.bool()] for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    texts = torch.cat(rows).split(length)[:count]
    return [text for text in texts if len(text) == length] or [texts[0]]


def slid(model: nn.Module, length: int) -> list[int]:
    """By layer, how many of the first entries of a text of `length` tokens no token behind it can see."""
    return [0 if window is None else max(0, length - window + 1) for window in attention_windows(model)]


def kept_parts(piece: Replayed, share: float) -> list[Tensor]:
    """By layer, the part of each KV head's entries [G] that is among the best `share` of all heads' that may go.

    Where none may go, nothing is known, and the part is `share`.
    """
    scores = [layer[:, piece.free(i)] for i, layer in enumerate(piece.scores)]
    every = torch.cat([layer.flatten() for layer in scores])
    best = every.argsort(descending=True, stable=True)[:round(share * len(every))]
    kept = torch.zeros(len(every)).index_fill_(0, best, 1.0).split([layer.numel() for layer in scores])
    return [mine.view(layer.shape).mean(1).nan_to_num(share) for mine, layer in zip(kept, scores, strict=True)]


def _mean(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(layer).mean(0) for layer in zip(*parts, strict=True)]
