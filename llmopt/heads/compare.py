"""How alike two head scores are: the rank correlation over all heads of a model (Spearman)."""
import torch
from torch import Tensor

from llmopt.errors import LlmoptError


def rank_correlation(one: list[Tensor], other: list[Tensor]) -> float | None:
    """-1 to 1; equal scores share their mean rank. None where one of the two says the same of all heads."""
    shapes = [[len(values) for values in scores] for scores in (one, other)]
    if shapes[0] != shapes[1]:
        raise LlmoptError(f"scores of different heads cannot be compared: {shapes[0]} and {shapes[1]} by layer")
    a, b = (ranks(torch.cat(scores)) for scores in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float((a @ b / size).clamp(-1, 1)) if size > 0 else None          # rounding can go beyond


def ranks(values: Tensor) -> Tensor:      # [N] -> [N]
    """The rank of each value from 0, equal ones at their mean."""
    _, places, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts + 1) / 2)[places]
