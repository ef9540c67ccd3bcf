"""Means over the antidiagonals of small squares of the map of logits, for selectors by blocks.

    T[u, v] = 1/S sum_r q[u S + S - 1 - r] . k[v S + r]

Every query and every key of a square of S x S takes part once, so that neither a vertical nor a slash line is missed,
for the price of 1/S of all logits.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from llmopt.attention.grid import Grid, in_runs


def antidiagonals(grid: Grid, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Head by head: T [T / S, S' / S] as the layer scales logits, and bool: the square begins no later than its rows.

    stride: a divisor of the grid's size, so that squares do not cross blocks.
    """
    flipped = in_runs(grid.query, stride).flip(2).flatten(2)                                 # [H, T / S, S D]
    along = in_runs(grid.keys, stride).flatten(2)                                            # [G, keys / S, S D]
    rows = torch.arange(flipped.shape[1], device=along.device) * stride + grid.offset
    seen = torch.arange(along.shape[1], device=along.device) * stride <= rows[:, None]
    for head, query in enumerate(flipped.split(1)):
        keys = along[head * len(along) // len(flipped)].unsqueeze(0)
        yield grid.rule.logits(query, keys)[0] / stride, seen


def summed(squares: Tensor, per: int) -> Tensor:
    """[tiles per, blocks per] -> [tiles, blocks] sums, the last of each maybe of fewer."""
    rows = in_runs(squares[None], per)[0].sum(1)
    return in_runs(rows.T[None], per)[0].sum(1).T
