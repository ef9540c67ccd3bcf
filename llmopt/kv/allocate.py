"""How many entries each KV head keeps: pure functions on arrays, integer results, exact sums.

counts, floor, cap: int64 [L, G]; a head that does not exist (pruned layers have fewer) has cap 0. scores: [L, G, T],
-inf where there is no entry. `share` is the mean number of entries per head; no head gets more than its cap.
"""
import torch
from torch import Tensor

from llmopt.errors import BudgetError

ALPHA = 0.2     # of its even share, every head keeps at least this much under `ada`
BETA = 20.0     # pyramid: the last layer's budget is about 1 / BETA of the mean


def total_of(cap: Tensor, even: Tensor) -> int:
    """Entries to keep over all heads: the sum of their even shares, if there are as many."""
    return min(int(cap.sum()), int(even.sum()))


def uniform(cap: Tensor, share: int) -> Tensor:
    """Share out evenly: every head gets as much."""
    return cap.clamp(max=share)


def water_fill(weights: Tensor, total: int, floor: int | Tensor, cap: int | Tensor) -> Tensor:
    """Integers >= floor and <= cap, proportional to `weights` in between, summing to `total`.

    weights: [L, G], >= 0; heads of weight 0 get more than their floor only once all others are at their cap. Fractions
    go to the largest remainder, ties to the first. Raises BudgetError where floor or cap leave no solution.
    """
    wide = torch.zeros(weights.shape, dtype=torch.int64)
    cap, floor = wide + cap, torch.minimum(wide + floor, wide + cap)
    if not int(floor.sum()) <= total <= int(cap.sum()):
        raise BudgetError(f"{total} entries cannot be shared: at least {int(floor.sum())}, at most {int(cap.sum())}")
    weights = weights.double()
    largest = weights.max() if bool(weights.max() > 0) else torch.ones((), dtype=torch.float64)
    weights = weights / largest + 1e-9
    low, high = -60.0, 60.0
    for _ in range(100):                                 # the level is found by bisection of its logarithm
        middle = (low + high) / 2
        level = (weights * 2.0 ** middle).clamp(floor, cap).sum()
        low, high = (middle, high) if level <= total else (low, middle)
    exact = (weights * 2.0 ** low).clamp(floor, cap)
    counts = (exact + 1e-6).floor().long().clamp(floor, cap)
    return _settle(counts, exact, total, floor, cap)


def _settle(counts: Tensor, exact: Tensor, total: int, floor: Tensor, cap: Tensor) -> Tensor:
    """Add or take single entries, the largest (smallest) remainder first, until the sum is `total`."""
    flat, exact, floor, cap = counts.flatten().clone(), exact.flatten(), floor.flatten(), cap.flatten()
    while (missing := total - int(flat.sum())) != 0:
        sign = 1 if missing > 0 else -1
        room = (flat < cap) if sign > 0 else (flat > floor)
        gain = ((exact - flat) * sign).mul(1e6).round().masked_fill(~room, -torch.inf)    # equal up to rounding: a tie
        order = gain.argsort(descending=True, stable=True)[:min(abs(missing), int(room.sum()))]
        flat[order] += sign
    return flat.view(counts.shape)


def ranks(scores: Tensor) -> Tensor:
    """Place of each entry in its head, best first from 0, ties to the older one: [..., T]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def by_threshold(scores: Tensor, total: int, floor: Tensor) -> Tensor:
    """Each head's best `floor` entries, then the best of all heads together until there are `total`: counts [L, G]."""
    sure = ranks(scores) < floor.to(scores.device).unsqueeze(-1)
    order = scores.masked_fill(sure, torch.inf).flatten().argsort(descending=True, stable=True)[:total]
    heads = scores.shape[0] * scores.shape[1]
    return torch.bincount(order // scores.shape[2], minlength=heads).view(scores.shape[:2]).cpu()


def ada(scores: Tensor, even: Tensor, floor: Tensor, cap: Tensor, alpha: float = ALPHA) -> Tensor:
    """AdaKV: heads of one layer compete for that layer's even share (Feng et al., 2024, arXiv:2407.11550)."""
    safe = torch.maximum(floor, (alpha * even).long().clamp(max=cap))
    return torch.cat([by_threshold(s[None], total_of(c, e), f[None])
                      for s, f, c, e in zip(scores, safe, cap, even, strict=True)])


def pyramid(even: Tensor, protected: Tensor, floor: Tensor, cap: Tensor, beta: float = BETA) -> Tensor:
    """PyramidKV: a budget that falls linearly with depth (Cai et al., 2024, arXiv:2406.02069)."""
    layers, share = cap.shape[0], int(even.max())
    free = max(share - int(protected.max()), 0)
    last = free / beta
    first = 2 * free - last
    steps = torch.arange(layers) / max(layers - 1, 1)
    profile = (first - steps * (first - last))[:, None] + protected
    return water_fill(profile if layers > 1 else torch.full_like(profile, share), total_of(cap, even), floor, cap)


def prefix(scores: Tensor, total: int, floor: Tensor, cap: Tensor) -> Tensor:
    """PrefixKV: every layer keeps the same part of its scores' mass (Wang et al., 2024, arXiv:2412.03409).

    A layer's score is the mean over its heads; the common part is found by bisection.
    """
    there = scores > -torch.inf
    lowest = scores.masked_fill(~there, torch.inf).amin((-1, -2), keepdim=True)
    shifted = torch.where(there, scores - lowest.clamp(max=0), 0.0).double()                  # >= 0
    mass = shifted.sum(1).sort(-1, descending=True).values.cumsum(-1)                          # [L, T]
    mass = (mass / mass[:, -1:].clamp(min=1e-30)).cpu()
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = _prefix_lengths(mass, middle)[:, None].expand(cap.shape).clamp(floor, cap).sum() <= total
        low, high = (middle, high) if fits else (low, middle)
    return water_fill(_prefix_lengths(mass, low)[:, None].expand(cap.shape), total, floor, cap)


def _prefix_lengths(mass: Tensor, part: float) -> Tensor:
    """Shortest prefix of each layer's sorted scores that holds `part` of the mass: [L]."""
    return (mass < part).sum(-1) + 1
