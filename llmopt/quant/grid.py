"""The grids: scales, codes, and the values they stand for. Those of floats: floats.py.

    symmetric   s = 2 max|w| / (2^b - 1),            codes -2^(b-1) .. 2^(b-1) - 1
    asymmetric  s = (max(w, 0) - min(w, 0)) / (2^b - 1),    zero point z = round(-min(w, 0) / s) - 2^(b-1)
    code = clamp(round(w / s) + z),                  value = s (code - z)
    clip        shrink the range by 1 - i/100, i = 0..79, to the least sum |value - w|^2.4 of each row and group
                (every 4th i, then the neighbours of the best: at most 0.03 % above the least of all, at a third of it)
    signed      s or -s, whichever does less: a negative scale puts the code that a symmetric grid has more on one side
                among the positive weights; at 2 bits that is one level in four

Scales are rounded to the type that is stored, then to the model's, BEFORE codes are chosen: what a loader rebuilds
from the checkpoint (a product in the model's type) is what the solver saw. Frantar et al. (arXiv:2210.17323), quant.py.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.model.codes import Quantized, decode
from llmopt.model.forms import INTEGERS, Form
from llmopt.quant import floats

CLIP_STEPS, CLIP_NORM = 80, 2.4
COARSE = 4         # the clip search takes every 4th step, then looks around the best
CHUNK = 1 << 16    # weights whose scales are searched together
Grid = tuple[Tensor, Tensor | None]         # scale and zero point
Error = Callable[[Tensor], Tensor]          # what counts of value - weight [..., columns]: [..., 1]


@dataclass(frozen=True)
class Spec:
    """The grid of one weight matrix. group_size -1: one scale per output channel."""

    bits: int
    group_size: int = -1
    symmetric: bool = True
    clip: bool = False
    dtype: torch.dtype = torch.float32          # the model's: values are products in this type
    scale_dtype: torch.dtype | None = None      # the stored scales'; None: the model's
    form: Form = INTEGERS
    whole: float = 1.0                          # what scales that are e4m3 numbers are stored times
    signed: bool = False                        # symmetric scales of integers may be negative
    live: Tensor | None = field(default=None, compare=False)        # [out, in] bool; what is not stays 0; None: all

    @property
    def stored(self) -> torch.dtype:
        return self.scale_dtype or self.dtype

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def floor(self) -> float:
        """The least a scale may be."""
        return max([1e-8] + [torch.finfo(t).smallest_normal * torch.finfo(t).eps for t in (self.stored, self.dtype)])

    def width(self, columns: int) -> int:
        """Columns that share a scale."""
        return columns if self.group_size == -1 else self.group_size


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """The nearest numbers of the grid, float32. The shapes broadcast."""
    if spec.form.is_float:
        return spec.form.nearest(weight / (scale if spec.form.through_bfloat16 else scale.to(spec.dtype)).float())
    steps = (weight / scale.to(spec.dtype).float()).round_()
    if zero is not None:
        steps = steps + zero.float()
    return steps.clamp_(spec.low, spec.high)


def value(numbers: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """What a loader makes of the numbers of `encode`, float32. The shapes broadcast."""
    return decode(numbers, scale, zero, spec.dtype, spec.form).float()


def norm(apart: Tensor) -> Tensor:
    """sum |.|^2.4, at twice the speed of pow; overwrites what it is given."""
    return apart.abs_().log2_().mul_(CLIP_NORM).exp2_().sum(-1, keepdim=True)


def fit(weight: Tensor, spec: Spec) -> Grid:
    """Scale and zero point [..., 1] for each last-dimension run of `weight` [..., columns], float32."""
    rows = max(1, CHUNK // max(1, weight[0].numel()))                # few enough to stay in the processor's cache
    rows = rows if spec.form.rows == 1 else len(weight)
    found = [fit_at_once(part, spec, norm) for part in weight.split(rows)]
    scale, zero = (torch.cat(parts) if parts[0] is not None else None for parts in zip(*found, strict=True))
    return scale, zero


def fit_at_once(weight: Tensor, spec: Spec, error: Error) -> Grid:
    """`fit` by another measure of the error."""
    if spec.form.is_float:
        return floats.fit(weight, spec, lambda scale: off(weight, (scale, None), spec, error)), None
    scale, zero = _fit_positive(weight, spec, error)
    if not spec.signed or zero is not None:
        return scale, zero
    other, _ = _fit_positive(-weight, spec, error)
    better = off(-weight, (other, None), spec, error) < off(weight, (scale, None), spec, error)
    return torch.where(better, -other, scale), None


def _fit_positive(weight: Tensor, spec: Spec, error: Error) -> Grid:
    low = weight.amin(-1, keepdim=True).clamp(max=0)
    high = weight.amax(-1, keepdim=True).clamp(min=0)

    def grid(cut: Tensor) -> Grid:
        return _span(low * (1 - cut / 100), high * (1 - cut / 100), spec)

    cut = torch.zeros_like(high)                                     # hundredths taken off the range
    if not spec.clip:
        return grid(cut)
    least = off(weight, grid(cut), spec, error)
    for steps in (range(COARSE, CLIP_STEPS, COARSE), [*range(1 - COARSE, 0), *range(1, COARSE)]):
        centre = cut
        for step in steps:
            trial = (centre + step).clamp_(0, CLIP_STEPS - 1)
            found = off(weight, grid(trial), spec, error)
            better = found < least
            cut, least = torch.where(better, trial, cut), torch.where(better, found, least)
    return grid(cut)


def fit_groups(weight: Tensor, spec: Spec) -> Grid:
    """Scales and zero points [out, groups] of `weight` [out, in]."""
    width = spec.width(weight.shape[1])
    scale, zero = fit(weight.unflatten(1, (-1, width)), spec)        # [out, groups, 1]
    return scale.squeeze(-1), None if zero is None else zero.squeeze(-1)


def quantized(numbers: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec,
              groups: Tensor | None = None) -> Quantized:
    """The weight that numbers [out, in] of `encode` and their scales and zero points [out, groups] make."""
    codes = spec.form.kept(numbers, spec.bits)
    return Quantized(codes, scales, spec.bits, spec.group_size, zeros, groups, form=spec.form, whole=spec.whole)


def round_to_nearest(weight: Tensor, spec: Spec) -> Quantized:
    """Quantize `weight` [out, in] float32 entry by entry."""
    return nearest(weight, fit_groups(weight, spec), spec)


def nearest(weight: Tensor, grid: Grid, spec: Spec) -> Quantized:
    """The codes of `weight` [out, in] float32 that are nearest, with these scales and zero points [out, groups]."""
    scale, zero = grid
    grouped = weight.unflatten(1, (scale.shape[1], -1))              # [out, groups, width]
    numbers = encode(grouped, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), spec).flatten(1)
    return quantized(numbers, scale, zero, spec)


def off(weight: Tensor, grid: Grid, spec: Spec, error: Error) -> Tensor:
    """What counts of the error that rounding `weight` to this grid makes. The shapes broadcast."""
    return error(value(encode(weight, *grid, spec), *grid, spec).sub_(weight))


def _span(low: Tensor, high: Tensor, spec: Spec) -> Grid:
    """The grid that covers low..high; scales in the stored type."""
    steps = (1 << spec.bits) - 1
    reach = high - low if not spec.symmetric else 2 * torch.maximum(high, -low)
    scale = (reach / steps).clamp(min=spec.floor).to(spec.stored)
    if spec.symmetric:
        return scale, None
    zero = (-low / scale.to(spec.dtype).float()).round() + spec.low
    return scale, zero.clamp(spec.low, spec.high).to(torch.int8)
