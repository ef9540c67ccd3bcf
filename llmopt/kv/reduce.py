"""What becomes of the entries that are not kept: the primitives, on all heads of one layer and row.

keep, gone: bool [G, T], the entries that stay and those that do not; holes are neither. target: int64 [G, T], the
entry that each goes into, itself if it stays or is lost. weight: [G, T], how much of it; 0 is nothing.
"""
from dataclasses import replace

import torch
from llmopt_kernels import NONE
from torch import Tensor
from torch.nn.functional import normalize

from llmopt.runtime.cache_layer import Entries

CHUNK = 1024        # dropped entries compared with the kept ones at a time


def evict(entries: Entries, keep: Tensor) -> Entries:
    """They are dropped."""
    return replace(entries, positions=entries.positions.masked_fill(~keep, NONE))


def merge(entries: Entries, keep: Tensor) -> Entries:
    """The value of each is added to that of the kept entry with the most similar key (kvpress, MergingPress).

        w_e = max(0, cos(k_e, k_c)) * |v_e| / (|v_e| + |v_c|)        v_c <- (v_c + sum_e w_e v_e) / (1 + sum_e w_e)

    Keys and positions stay, so a kept entry is found as before.
    """
    likeness, target = closest([entries.keys], keep, gone(entries, keep))
    size = entries.values.float().norm(dim=-1)
    share = likeness * size / (size + size.gather(1, target)).clamp(min=1e-30)
    values = mean_into(entries.values, target, torch.where(keep, 1.0, share))
    return evict(replace(entries, values=values), keep)


def gone(entries: Entries, keep: Tensor) -> Tensor:
    """bool [G, T]: the entries that are there and do not stay."""
    return ~keep & (entries.positions != NONE)


def worth(scores: Tensor) -> Tensor:
    """Scores [G, T] as weights: >= 0, 0 at holes. Where a scorer gives less than 0, all are lifted by its lowest."""
    there = scores > -torch.inf
    low = scores.masked_fill(~there, 0.0).amin(-1, keepdim=True)
    return (scores - low.clamp(max=0)).masked_fill(~there, 0.0)


def closest(parts: list[Tensor], keep: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """(likeness, target) of every entry that goes to the kept one it is most like; 0 and itself for all others.

    likeness: the product over `parts`, [G, T, D] each, of cosines, those below 0 taken for 0.
    """
    target = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep), 1)
    likeness = torch.zeros(keep.shape, device=keep.device)
    for head in range(len(keep)):
        stay, go = keep[head].nonzero().flatten(), gone[head].nonzero().flatten()
        if not len(stay):
            continue
        centres = [normalize(part[head, stay].float(), dim=-1) for part in parts]
        for some in go.split(CHUNK):
            alike = 1.0
            for part, centre in zip(parts, centres, strict=True):
                alike = alike * (normalize(part[head, some].float(), dim=-1) @ centre.T).clamp(min=0)
            likeness[head, some], best = alike.max(-1)
            target[head, some] = stay[best]
    return likeness, target


def sum_into(x: Tensor, target: Tensor) -> Tensor:
    """x [G, T] or [G, T, D] added up where each entry goes."""
    place = target if x.dim() == 2 else target.unsqueeze(-1).expand_as(x)
    return torch.zeros_like(x).scatter_add_(1, place, x)


def mean_into(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """x [G, T, D], each entry the weighted mean of itself and all that goes into it; untouched where nothing does."""
    own = target == torch.arange(target.shape[1], device=target.device)
    took = sum_into(weight.masked_fill(own, 0.0), target) > 0
    total = sum_into(weight, target).clamp(min=1e-30).unsqueeze(-1)
    mean = sum_into(weight.unsqueeze(-1) * x.float(), target) / total
    return torch.where(took.unsqueeze(-1), mean.to(x.dtype), x)
