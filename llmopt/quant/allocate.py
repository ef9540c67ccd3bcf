"""Which block gets which of two widths, by its rank (arXiv:2406.17415): pure functions on plain numbers.

The least important layers move from `hi` to `lo` until the average fits, which is at or below the target; equal scores
are settled by the index. For choices among more: calibration/programme.py.
"""
from collections.abc import Mapping, Sequence

from llmopt.errors import BudgetError

SLACK = 1e-9


def two_level(importance: Sequence[float], params: Sequence[int], hi: int, lo: int, target: float,
              pinned: Mapping[int, int] | None = None) -> list[int]:
    """Bits of each layer, `hi` or `lo`; the least important go down first, no more of them than the target asks for."""
    pinned = pinned or {}
    bits = [pinned.get(layer, hi) for layer in range(len(params))]
    order = sorted(range(len(params)), key=lambda layer: (importance[layer], layer))
    for layer in order:
        if _fits(bits, params, target):
            return bits
        if layer not in pinned:
            bits[layer] = lo
    if not _fits(bits, params, target):
        raise BudgetError(f"an average of {target:g} bits cannot be met: with every layer at {lo} it is "
                          f"{_mean(bits, params):.4g}")
    return bits


def _mean(bits: Sequence[int], params: Sequence[int]) -> float:
    return sum(n * b for n, b in zip(params, bits, strict=True)) / sum(params)


def _fits(bits: Sequence[int], params: Sequence[int], target: float) -> bool:
    return _mean(bits, params) <= target + SLACK


def at_most(widths: Sequence[int], target: float) -> int:
    """The largest width that keeps the target; raises BudgetError where none does."""
    fitting = [w for w in widths if w <= target + SLACK]
    if not fitting:
        raise BudgetError(f"an average of {target:.4g} bits cannot be met with widths {sorted(widths)}")
    return max(fitting)


def around(widths: Sequence[int], target: float) -> tuple[int, int]:
    """The two widths (hi, lo) next to the target, for `two_level`; a target that is a width lies between them."""
    fits = at_most(widths, target)
    lo = max((w for w in widths if w < target - SLACK), default=fits)
    hi = min((w for w in widths if w > target + SLACK), default=fits)
    if target <= min(widths) + SLACK:
        return lo, lo
    return (hi, hi) if target >= max(widths) - SLACK else (hi, lo)
