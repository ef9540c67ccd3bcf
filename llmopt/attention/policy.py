"""Which layer reads by whose choice: an exact dynamic programme over the overlaps of layers' choices.

A layer chooses for itself or takes over the choice of the last layer that did. Among all ways with at most so many
choosing layers, the one whose least overlap is largest, and of these the one with the largest sum.
"""
from collections.abc import Callable

import torch
from torch import Tensor


def sources(overlap: Tensor, changes: int) -> list[int]:
    """By layer, whose choice it reads: its own number, or that of an earlier layer.

    overlap [L, L], of layer j's choice with that of i < j; 1 on the diagonal counts for a layer's own. changes: layers
    besides the first that may choose.

    Two passes, as a path of larger least overlap may have the smaller sum, and both cannot be kept in one: the first
    finds the least overlap that can be had, the second the largest sum among paths that never fall below it.
    """
    least, _ = _best(overlap, changes, torch.minimum, 1.0)
    allowed = overlap.masked_fill(overlap < least, -torch.inf)
    return _best(allowed, changes, torch.add, 0.0)[1]


def _best(overlap: Tensor, changes: int, join: Callable[[Tensor, Tensor], Tensor],
          start: float) -> tuple[float, list[int]]:
    """(the largest value of a path, the path); join: of the value so far and the next overlap."""
    layers = len(overlap)
    values = torch.full((layers, changes + 1), -torch.inf, dtype=torch.float64)      # by source and changes so far
    values[0, 0] = join(torch.tensor(start), overlap[0, 0])
    came: list[Tensor] = []
    for layer in range(1, layers):
        stay = join(values, overlap[:, layer, None].double().expand_as(values))
        stay[values == -torch.inf] = -torch.inf
        switch, origin = values.max(0)
        stay[layer, 0] = -torch.inf
        stay[layer, 1:] = join(switch[:-1], overlap[layer, layer].double())
        stay[layer, 1:][switch[:-1] == -torch.inf] = -torch.inf
        came.append(origin)
        values = stay
    source, changed = divmod(int(values.flatten().argmax()), changes + 1)
    best, path = float(values[source, changed]), [source]
    for layer in range(layers - 1, 0, -1):
        if source == layer:
            changed -= 1
            source = int(came[layer - 1][changed])
        path.append(source)
    return best, path[::-1]
