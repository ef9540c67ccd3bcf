"""Runs of a head's entries that are coded around their mean: what they have in common takes no bits of their codes.

    x = mean of the run + what is coded;    q x = q mean + q (what is coded)

The first entry of a head is a run by itself, and so nearly exact: attention rests there, and it is unlike the others.
Of these a run has some `RUN`: rotary positions turn what they have in common.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.kv.codes import Codes

RUN = 128           # its mean, in bf16, takes a bit of each entry for every 8 dimensions


class Runs(NamedTuple):
    """of: int64 [G, T], the run of each entry in codes, -1 of others; centres: bf16 [C, D], by run."""

    of: Tensor
    centres: Tensor


def runs_of(x: Tensor, known: Tensor, fresh: Tensor, codes: Codes | None) -> Runs:
    """The runs of entries x [G, T, D]: of those in `known`, which are in `codes`, and of those in `fresh`.

    Fresh ones in front of known ones join their runs, so that a run stays in one piece.
    """
    of, centres = torch.full(known.shape, -1, device=x.device), []
    if codes is not None:
        of[known] = codes.run
        of, centres = _filled(of, fresh), [*codes.centres]
    for head, coded in enumerate(known | fresh):
        places = coded.nonzero().flatten()
        if bool(fresh[head, places[:1]].any()):
            of[head, places[0]] = len(centres)
            centres.append(x[head, places[0]].bfloat16())
        _extend(x[head], of[head], places, centres)
    return Runs(of, torch.stack(centres) if centres else x.new_empty(0, x.shape[2], dtype=torch.bfloat16))


def _filled(of: Tensor, fresh: Tensor) -> Tensor:
    """`of` with the runs of fresh entries in front of known ones: that of the known one before, or else behind them."""
    known, place = of >= 0, torch.arange(of.shape[1], device=of.device)
    before = torch.where(known, place, -1).cummax(1).values
    near = of.gather(1, torch.where(before < 0, known.long().argmax(1, keepdim=True), before))
    return torch.where(fresh & (place < before[:, -1:]), near, of)


def _extend(x: Tensor, of: Tensor, places: Tensor, centres: list[Tensor]) -> None:
    """Runs for the last of a head's entries in codes, at `places`, which have none: new ones, or the last if they are
    few and it is not full. The mean of a short run is that of so many entries up to its end as make half a run.
    """
    runs = of[places]
    first = int((runs >= 0).sum())
    count = len(places) - first
    if count == 0:
        return
    if count < RUN // 2 and 1 < int((runs == runs[first - 1]).sum()) < RUN:
        of[places[first:]] = runs[first - 1]
        return
    parts = places[first:].tensor_split((count + RUN // 2) // RUN or 1)
    near = [places[max(1, len(places) - RUN // 2):]] if count < RUN // 2 else parts
    for part, some in zip(parts, near, strict=True):
        of[part] = len(centres)
        centres.append(x[some].float().mean(0).bfloat16())
