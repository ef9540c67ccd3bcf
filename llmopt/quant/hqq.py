"""HQQ: scales and zero points that suit most weights of a group, a few large errors being allowed; no data.

    minimize over s, z, E     sum |E|^p / p + beta/2 |(W - Q) / s - E|^2,    Q = s (c - z),  c = clamp(round(W / s) + z)

by half-quadratic splitting, each unknown in turn, R = (W - Q) / s the error in steps of the grid, by groups:

    E = sign(R) max(|R| - |R|^(p - 1) / beta, 0)           shrinkage: small errors to 0, large ones nearly as they are
    z = round(mean(c - (W / s - E)))                       what is left is to have no mean; symmetric: no z
    s = <c - z, W - s E> / <c - z, c - z>                  what is left is to be small
    beta grows by `growth` a turn

It begins with the grid of quant.rtn, for scales of both signs where `signed` (grid.py), and keeps for each group the
grid with the least sum (W - Q)^2 of all turns, the first one being among them.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023 (mobiusml.github.io/hqq_blog). There
s stays as it was, z is a fraction, R is in the weights' own unit and the turns end when sum |R| grows. Readers of
compressed-tensors have integers for zero points, which leaves z little room, so that s moves as well; errors in steps
make one beta right for weights of any size. Keeping the least sum |R|^p, the sum above, was worse than quant.rtn on
SmolLM2 (README).
"""
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.calibration.inputs import Moments
from llmopt.model.codes import Quantized
from llmopt.parts import register
from llmopt.quant.base import Quantizer
from llmopt.quant.grid import CHUNK, Grid, Spec, encode, fit_at_once, nearest, norm, off, value
from llmopt.quant.search import usable
from llmopt.quant.solver import Solver


@register("hqq")
@dataclass(frozen=True)
class HalfQuadratic(Solver):
    """Scales and zero points in turns with errors that may be few and large, without data."""

    rowwise: ClassVar[bool] = True
    integers: ClassVar[bool] = True

    iterations: int = Field(20, ge=0, description="turns; 0: the grid it begins with")
    power: float = Field(0.7, gt=0, le=1, description="p: the smaller, the more a few large errors are allowed")
    beta: float = Field(10.0, gt=0, description="how closely E follows the errors, counted in steps of the grid")
    growth: float = Field(1.01, ge=1, description="of beta, a turn")
    signed: bool = Field(True, description="symmetric scales may be negative: the one code that a side has more is "
                                           "put where the large weights are")

    def quantize(self, weight: Tensor, moments: Moments | None, spec: Spec) -> Quantized:
        spec = replace(spec, signed=self.signed)
        grouped = weight.unflatten(1, (-1, spec.width(weight.shape[1])))                   # [out, groups, width]
        rows = max(1, CHUNK // grouped[0].numel())                  # few enough to stay in the processor's cache
        grids = [self._turns(part, fit_at_once(part, spec, norm), spec) for part in grouped.split(rows)]
        scale, zero = (None if parts[0] is None else torch.cat(parts).squeeze(-1)
                       for parts in zip(*grids, strict=True))
        return nearest(weight, (scale, zero), spec)

    def _turns(self, weight: Tensor, grid: Grid, spec: Spec) -> Grid:
        """The best grid [..., 1] on the way from this one, for runs of `weight` [..., width]."""
        best, least, beta = grid, off(weight, grid, spec, _squares), self.beta
        for _ in range(self.iterations):
            grid = self.turn(weight, grid, beta, spec)
            found = off(weight, grid, spec, _squares)
            better = found < least
            best = tuple(None if old is None else torch.where(better, new, old)
                         for new, old in zip(grid, best, strict=True))
            least, beta = torch.minimum(found, least), beta * self.growth
        return best

    def turn(self, weight: Tensor, grid: Grid, beta: float, spec: Spec) -> Grid:
        """The zero point, then the scale [..., 1] that suit what shrinkage leaves of each run of `weight`."""
        (scale, zero), unit = grid, grid[0].to(spec.dtype).float()
        codes = encode(weight, scale, zero, spec)
        wanted = weight - unit * shrunk((weight - value(codes, scale, zero, spec)) / unit, self.power, beta)
        if zero is not None:
            zero = (codes - wanted / unit).mean(-1, keepdim=True).round().clamp(spec.low, spec.high).to(zero.dtype)
        steps = codes if zero is None else codes - zero
        energy = steps.square().sum(-1, keepdim=True)
        return usable((steps * wanted).sum(-1, keepdim=True) / energy, scale, spec), zero


def shrunk(error: Tensor, power: float, beta: float) -> Tensor:
    """E for errors of any shape: near the least of |E|^p / p + beta/2 (error - E)^2."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=torch.finfo(size.dtype).tiny).pow(power - 1) / beta).clamp(min=0)


def _squares(apart: Tensor) -> Tensor:
    return apart.square_().sum(-1, keepdim=True)


@register("quant.hqq")
@dataclass(frozen=True)
class HQQ(HalfQuadratic, Quantizer):
    """Scales and zero points in turns with errors that may be few and large, without data."""

    kind = "method"
