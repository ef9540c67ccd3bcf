"""Budgets from what a scorer captures: heads get entries where the scorer finds those that a second reading looks at.

    C(x) = part x of a head's entries, in the scorer's own order -> sum of their replay scores, mean over texts
    entries go, one after the other, where the concave majorant of C rises most

The idea is LU-KV's (arXiv:2602.08585); the majorant of replay mass in the scorer's order is ours. A head's entries are
those that may go: neither its first and last ones, nor what a sliding window has left behind.
"""
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.kv.allocators import Tabled
from llmopt.kv.listener import own_scores, replays_of
from llmopt.method import Record, Replayed, Run
from llmopt.parts import register

PLACES = torch.linspace(0, 1, 65, dtype=torch.float64) ** 2         # where curves are taken, densest at few entries
KEPT = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@register("captured")
@dataclass(frozen=True)
class Captured(Tabled):
    """Where this scorer finds what a second reading looks at, on the texts of heads.replay, which must run before."""

    learns: ClassVar = True

    def plan(self, scorer, record: Record, model: nn.Module, run: Run) -> dict[str, Any]:
        pieces = replays_of(run, model, f"{scorer.name}: allocate: {self.name}")
        curves = sum(self.gains(piece, own_scores(scorer, record, model, piece.ids), model, run)
                     for piece in run.progress(pieces, f"{scorer.name}: allocate: {self.name}"))
        heads, sizes = [len(layer) for layer in pieces[0].scores], pieces[0].sizes()
        slopes = torch.stack([falling(curve.diff() / PLACES.diff(), PLACES.diff()) for curve in curves])
        return {"kept": list(KEPT), "parts": [[row.tolist() for row in best(slopes, sizes, share).split(heads)]
                                              for share in KEPT]}

    def gains(self, piece: Replayed, own: list[Tensor], model: nn.Module, run: Run) -> Tensor:
        """What each head of the model gains [G of all layers, places] by keeping those of highest score at PLACES.

        own: the scorer's scores [G, n] of the piece's entries, by layer.
        """
        return captured(piece, own)


def captured(piece: Replayed, own: list[Tensor]) -> Tensor:
    """Replay mass of every head of the model [G of all layers, places]; own: the scorer's scores [G, n] by layer."""
    rows = []
    for layer, (mass, scores) in enumerate(zip(piece.scores, own, strict=True)):
        mass, scores = (x[:, piece.free(layer)].double() for x in (mass, scores))
        found = mass.gather(1, scores.argsort(dim=1, descending=True, stable=True)).cumsum(1)
        found = torch.cat([found.new_zeros(len(found), 1), found], 1)
        rows.append(found[:, (PLACES * mass.shape[1]).round().long()])
    return torch.cat(rows)


def falling(slopes: Tensor, widths: Tensor) -> Tensor:
    """The slopes of the concave majorant: neighbours that rise are pooled, weighted by their widths; both [n]."""
    pools: list[list[float]] = []                                    # [rise, width, pieces]
    for slope, width in zip(slopes.tolist(), widths.tolist(), strict=True):
        pools.append([slope * width, width, 1])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] < pools[-1][0] * pools[-2][1]:
            pools[-2:] = [[a + b for a, b in zip(*pools[-2:], strict=True)]]
    return torch.tensor([rise / width for rise, width, pieces in pools for _ in range(pieces)], dtype=torch.float64)


def best(slopes: Tensor, sizes: Tensor, share: float) -> Tensor:
    """The part of its entries that each head keeps [heads], where `share` of all go where an entry gains most.

    slopes [heads, places]: by part of a head's entries; sizes [heads]: how many these are. Where there are none,
    nothing is known, and the part is `share`.
    """
    sizes = sizes.double()[:, None]
    widths = (PLACES.diff() * sizes).flatten()                                            # in entries
    order = (slopes / sizes.clamp(min=1)).flatten().argsort(descending=True, stable=True)
    room = (share * sizes.sum() - (widths[order].cumsum(0) - widths[order])).clamp(min=0)
    given = torch.zeros_like(widths)
    given[order] = torch.minimum(widths[order], room)
    return torch.where(sizes > 0, given.view(slopes.shape) / sizes, share * PLACES.diff()).sum(1)
