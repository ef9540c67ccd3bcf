"""What becomes of the entries that are not kept."""
from dataclasses import replace

import torch
from llmopt_kernels import NONE
from torch import Tensor
from torch.nn.functional import normalize

from llmopt.runtime.cache_layer import Entries

CHUNK = 1024        # dropped entries compared with the kept ones at a time


def evict(entries: Entries, keep: Tensor) -> Entries:
    """They are dropped. keep: bool [G, T]."""
    return replace(entries, positions=entries.positions.masked_fill(~keep, NONE))


def merge(entries: Entries, keep: Tensor) -> Entries:
    """The value of each is added to that of the kept entry with the most similar key (kvpress, MergingPress).

        w_e = max(0, cos(k_e, k_c)) * |v_e| / (|v_e| + |v_c|)        v_c <- (v_c + sum_e w_e v_e) / (1 + sum_e w_e)

    Keys and positions stay, so a kept entry is found as before.
    """
    values = entries.values.clone()
    for head, kept in enumerate(keep):
        gone = ~kept & (entries.positions[head] != NONE)
        if bool(kept.any()) and bool(gone.any()):
            merged = _merged(entries.keys[head].float(), entries.values[head].float(), kept, gone)
            values[head, kept] = merged.to(values.dtype)
    return evict(replace(entries, values=values), keep)


def _merged(keys: Tensor, values: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
    """One head: the values [K, D] of the kept entries after they have taken in the others."""
    centres, total = values[kept], torch.ones(int(kept.sum()), 1, device=values.device)
    unit, sizes, summed = normalize(keys[kept], dim=-1), centres.norm(dim=-1), centres.clone()
    for k, v in zip(keys[gone].split(CHUNK), values[gone].split(CHUNK), strict=True):
        likeness, nearest = (normalize(k, dim=-1) @ unit.T).max(-1)
        size = v.norm(dim=-1)
        weight = (likeness.clamp(min=0) * size / (size + sizes[nearest]).clamp(min=1e-30)).unsqueeze(-1)
        summed.index_add_(0, nearest, weight * v)
        total.index_add_(0, nearest, weight)
    return summed / total

