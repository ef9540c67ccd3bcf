"""Which single weights become 0, and what those that stay then are: pure functions on one matrix, or on counts.

Counts are exact. Of equal scores the first go, in the order of rows and columns; 0 of them change nothing.
"""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmopt.errors import BudgetError
from llmopt.model.weights import ROWS

TURNS = 8                       # of conjugate gradients
HALF = 1 << 16                  # float32 numbers are counted by one half of their bits, then by the other


def smallest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` smallest of each row of `scores` [..., n]."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.kthvalue(count, -1, keepdim=True).values
    below, equal = scores < last, scores == last
    return below | equal & (equal.cumsum(-1, dtype=torch.int32) <= count - below.sum(-1, keepdim=True))


def half_of_each(scores: Tensor, group: int) -> Tensor:
    """True at the smaller half of every `group` consecutive entries of each row of `scores` [..., n]."""
    return smallest(scores.unflatten(-1, (-1, group)), group // 2).flatten(-2)


def comparable(sizes: Tensor, how: str) -> Tensor:
    """Scores [n] of |w| = `sizes`, in any order, that compare with those of other weights; float32.

    none: |w|. layer: over their mean. lamp: w_j^2 / (sum of the squares of all that are ranked at or above j).
    """
    if how == "layer":
        return sizes / sizes.mean().clamp(min=torch.finfo(sizes.dtype).tiny)
    if how == "lamp":
        squares = sizes.flatten().double().sort(descending=True).values.square_()
        return (squares / squares.cumsum(0).clamp(min=torch.finfo(squares.dtype).tiny)).float()
    return sizes


def counts_below(scores: Callable[[], Iterable[Tensor]], ratio: float, minimum: float) -> list[int]:
    """How many entries go from each tensor where the smallest `ratio` of all go, `minimum` of each tensor staying.

    scores: goes through the tensors, float32 and not negative, as often as it is called. The threshold is exact: such
    numbers rank like their bits, which are counted in two passes; of equal ones the first go.
    """
    high = torch.stack([_histogram(_bits(s) >> 16) for s in scores()])
    sizes = high.sum(1)
    floors = torch.ceil(sizes * minimum - 1e-9).long()
    total = int(sizes.sum())
    keep = total - int(ratio * total + 1e-9)
    if int(floors.sum()) > keep:
        raise BudgetError(f"ratio {ratio:g} cannot be met: minimum {minimum:g} leaves at most "
                          f"{1 - int(floors.sum()) / total:.3f} of the weights to zero")
    chunk, above = _crossing(high, torch.zeros_like(sizes), floors, keep)
    low = torch.stack([_histogram((bits := _bits(s))[bits >> 16 == chunk] & HALF - 1) for s in scores()])
    value, above = _crossing(low, above, floors, keep)
    kept, spare = torch.maximum(above, floors), keep - int(torch.maximum(above, floors).sum())
    for i in reversed(range(len(kept))):            # of the entries at the threshold the last stay
        more = min(spare, int(torch.maximum(above[i] + low[i, value], floors[i]) - kept[i]))
        kept[i] += more
        spare -= more
    return (sizes - kept).tolist()


def _bits(scores: Tensor) -> Tensor:
    return scores.float().contiguous().view(torch.int32).flatten()


def _histogram(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=HALF).cpu()


def _crossing(histogram: Tensor, above: Tensor, floors: Tensor, keep: int) -> tuple[int, Tensor]:
    """(the highest bin that cannot stay as a whole, entries of each tensor above it).

    histogram: [tensors, bins]; above: [tensors] entries beyond its last bin.
    """
    def kept(at: int) -> Tensor:                    # entries of each tensor in the bins from `at` on
        return above + histogram[:, at:].sum(1)

    first, last = 0, histogram.shape[1]             # with all bins from `first` on enough are kept, from `last` on not
    while last - first > 1:
        middle = (first + last) // 2
        enough = int(torch.maximum(kept(middle), floors).sum()) > keep
        first, last = (middle, last) if enough else (first, middle)
    return first, kept(first + 1)


def fitted(start: Tensor, stays: Tensor, target: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """The weights that stay, fitted to what `target` writes: some turns of conjugate gradients from `start`.

        min_W tr((W - target) (H + ridge mean(diag H) I) (W - target)^T),  W = 0 where nothing stays

    Every row on its own, preconditioned by the diagonal. start, target, stays (bool): [out, in]; gram: H [in, in].
    """
    hessian = gram.to(target.dtype, copy=True)
    hessian.diagonal().add_(ridge * hessian.diagonal().mean().clamp(min=1e-12))
    return torch.cat([_descent(*rows, hessian) for rows in zip(*(x.split(ROWS) for x in (start, stays, target)),
                                                               strict=True)])


def _descent(start: Tensor, stays: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    tiny, scale, found = torch.finfo(target.dtype).tiny, 1 / hessian.diagonal(), start.clone()
    rest = ((target - start) @ hessian).mul_(stays)         # minus half the slope
    way = rest * scale
    gain = (rest * way).sum(1, keepdim=True)
    for _ in range(TURNS):
        turned = (way @ hessian).mul_(stays)
        step = gain / (way * turned).sum(1, keepdim=True).clamp(min=tiny)
        found += step * way
        rest -= step * turned
        ahead = rest * scale
        gain, before = (rest * ahead).sum(1, keepdim=True), gain
        way = ahead + gain / before.clamp(min=tiny) * way
    return found
