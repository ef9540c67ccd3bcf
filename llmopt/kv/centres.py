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
    for head, new in enumerate(fresh):
        if bool(new[0]):
            of[head, 0] = len(centres)
            centres.append(x[head, 0].bfloat16())
        _extend(x[head], of[head], new & (of[head] < 0), centres)
    return Runs(of, torch.stack(centres) if centres else x.new_empty(0, x.shape[2], dtype=torch.bfloat16))


def _filled(of: Tensor, fresh: Tensor) -> Tensor:
    """`of` with the runs of fresh entries in front of known ones: that of the known one before, or else behind them."""
    known, place = of >= 0, torch.arange(of.shape[1], device=of.device)
    before = torch.where(known, place, -1).cummax(1).values
    near = of.gather(1, torch.where(before < 0, known.long().argmax(1, keepdim=True), before))
    return torch.where(fresh & (place < before[:, -1:]), near, of)


def _extend(x: Tensor, of: Tensor, new: Tensor, centres: list[Tensor]) -> None:
    """Runs for the last entries of a head, those in `new` [T]: few of them join the run before, unless it is full.

    The mean of a short run is that of so many entries up to its end as make half a run.
    """
    count = int(new.sum())
    if count == 0:
        return
    last = of[of >= 0][-1]
    if count < RUN // 2 and 1 < int((of == last).sum()) < RUN:
        of[new] = last
        return
    for part in new.nonzero().flatten().tensor_split((count + RUN // 2) // RUN or 1):
        first, end = int(part[0]), int(part[-1]) + 1
        of[first:end] = len(centres)
        centres.append(x[max(1, min(first, end - RUN // 2)):end].float().mean(0).bfloat16())
