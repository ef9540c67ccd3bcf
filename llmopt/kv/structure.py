"""Tokens of structure: punctuation, white space and the marks of lists, which take room in a cache and say little.

    structure = ids that make up `OFTEN` of a calibration text or more, and have neither letter nor digit
    s'_j = low + demote * (s_j - low) for their entries,            low: the head's lowest score, no more than 0

The idea is RestoreKV's "structure demotion" (kvpress, pull request 288); how it finds them is not told there, the rule
here is ours. Without a tokenizer all that is frequent counts.
"""
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import LlmoptError

OFTEN = 2e-3


def frequent_marks(batches: list[dict[str, Tensor]] | None, tokenizer: Any) -> list[int]:
    """The ids of structure in calibration data; raises LlmoptError where there is none."""
    if not batches:
        raise LlmoptError("demote: tokens of structure are found in calibration data, and there is none")
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]).cpu()
    often = (torch.bincount(ids) >= OFTEN * len(ids)).nonzero().flatten().tolist()
    return often if tokenizer is None else [i for i in often if not any(map(str.isalnum, tokenizer.decode([i])))]


def demoted(scores: Tensor, ids: Tensor, structure: list[int], factor: float) -> Tensor:
    """scores [G, T], -inf at holes, with those of structure scaled down; ids: [G, T], negative at holes."""
    low = scores.masked_fill(ids < 0, 0.0).amin(-1, keepdim=True).clamp(max=0)
    marks = torch.isin(ids, torch.tensor(structure, dtype=ids.dtype, device=ids.device)) & (ids >= 0)
    return torch.where(marks, low + factor * (scores - low), scores)
