"""Weights on their grids, and gains of norms, as functions of numbers that have gradients.

    following   c = clamp(round(w / s + V) + z),  s and z of the range times alpha and beta         (AutoRound)
    held        c = clamp(round(u + V)),          s = s_0 (1 + a),  z as it is
    value = s (c - z),   rounding, clamping and the types that are stored passed straight through

Every value is exactly what a loader of the checkpoint will compute.
"""
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from llmopt.model.blocks import Projection
from llmopt.model.codes import Quantized
from llmopt.model.links import Norm
from llmopt.quant.grid import quantized
from llmopt.quant.start import EDGE, Start

FIGURES = ("damping", "dead_columns", "note")       # of the start that are true of what comes of it


def straight(exact: Tensor, soft: Tensor) -> Tensor:
    """`exact`, with the gradient of `soft`."""
    return soft + (exact - soft).detach()


class Latent(ABC):
    """A weight [out, in] on its grid; offset [out, in]: of its codes, in steps."""

    def __init__(self, start: Start):
        self.start, self.spec, self.projection = start, start.spec, start.projection
        self.codes = start.codes
        self.shape = (*self.codes.scales.shape, -1)                             # [out, groups, width]
        self.numbers = self.spec.form.numbers(self.codes.codes).view(self.shape)
        self.offset = torch.zeros_like(start.slack)
        self.live = None if self.spec.live is None else self.spec.live.view(self.shape)

    @property
    def moved(self) -> Tensor:
        """The offsets [out, groups, width]; 0 where the weight is to stay 0."""
        offset = self.offset.view(self.shape)
        return offset if self.live is None else offset * self.live

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points [out, groups, 1] before they are rounded, with gradients."""

    @abstractmethod
    def steps(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The codes [out, groups, width] before they are rounded, with gradients."""

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales, zero points as they will be stored, float32, with gradients."""
        scale, zero = self.grid()
        exact = scale.detach().to(self.spec.stored).to(self.spec.dtype).float()
        old = self.codes.scales.unsqueeze(-1).float()
        usable = exact.isfinite() & (exact.abs() >= self.spec.floor) & (exact.sign() == old.sign())
        scale = straight(torch.where(usable, exact, old), scale)
        zero = None if zero is None else straight(zero.detach().round().clamp(self.spec.low, self.spec.high), zero)
        soft = self.steps(scale, zero).clamp(self.spec.low, self.spec.high)
        return straight(soft.detach().round(), soft), scale, zero

    def value(self) -> Tensor:
        """The weight [out, in], of the type of its module."""
        codes, scale, zero = self.stored()
        return ((codes if zero is None else codes - zero) * scale).flatten(1).to(self.projection.weight.dtype)

    @torch.no_grad()
    def result(self) -> Quantized:
        codes, scale, zero = self.stored()
        zero = None if zero is None else zero.squeeze(-1).to(self.codes.zeros.dtype)
        made = quantized(codes.flatten(1), scale.squeeze(-1).to(self.spec.stored), zero, self.spec)
        figures = {key: value for key, value in self.codes.figures.items() if key in FIGURES}
        moved = float((made.codes != self.codes.codes).float().mean())
        return dataclasses.replace(made, figures=figures | {"moved_codes": moved})


class Following(Latent):
    """AutoRound's: an offset, and two factors of the range; the codes follow the scale."""

    def __init__(self, start: Start):
        super().__init__(start)
        scale, zero = self.codes.scales.float().unsqueeze(-1), self.codes.zeros
        self.zero = None if zero is None else zero.float().unsqueeze(-1)
        middle = self.numbers + start.slack.view(self.shape)
        self.weight = (middle if zero is None else middle - self.zero) * scale
        self.low, self.high = (end if zero is None else end - self.zero for end in (self.spec.low, self.spec.high))
        self.alpha, self.beta = torch.ones_like(scale), torch.ones_like(scale)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        scale = self.codes.scales.float().unsqueeze(-1)
        if self.zero is None:
            return scale * self.beta, None
        wider = (self.high * self.beta - self.low * self.alpha) / ((1 << self.spec.bits) - 1)
        return scale * wider, self.spec.low - self.low * self.alpha / wider

    def steps(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        steps = self.weight / scale + self.moved
        return steps if zero is None else straight(steps.detach().round(), steps) + zero


class Held(Latent):
    """An offset from the codes that there are, and a factor of each scale; the codes do not follow the scale."""

    def __init__(self, start: Start):
        super().__init__(start)
        self.middle = self.numbers + start.slack.view(self.shape).clamp(-EDGE, EDGE)
        self.factor = torch.zeros_like(self.codes.scales, dtype=torch.float32)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        zero = self.codes.zeros
        scale = self.codes.scales.float() * (1 + self.factor)
        return scale.unsqueeze(-1), None if zero is None else zero.float().unsqueeze(-1)

    def steps(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.middle + self.moved if self.offset.requires_grad else self.numbers


def results(latents: list[Latent], losses: tuple[float, float]) -> Iterator[tuple[Projection, Quantized]]:
    """What has become of the weights; losses: of their block, before and after."""
    for latent in latents:
        made = latent.result()
        made.figures |= dict(zip(("block_error_before", "block_error"), losses, strict=True))
        yield latent.projection, made


class Gain:
    """What a norm multiplies by; delta: in parts of its mean size."""

    def __init__(self, norm: Norm):
        self.norm, self.start = norm, norm.module.weight.detach().float()
        self.size = float(norm.gain.abs().mean())
        self.delta = torch.zeros_like(self.start)

    def value(self) -> Tensor:
        return (self.start + self.size * self.delta).to(self.norm.module.weight.dtype)

    @torch.no_grad()
    def write(self) -> None:
        self.norm.module.weight.copy_(self.value())


def substitutes(latents: Iterable[Latent], gains: Iterable[Gain]) -> dict[str, Tensor]:
    """The parameters that these stand for, by their names in the model."""
    made = {}
    for latent in latents:
        value = latent.value()
        made[latent.projection.key] = value.T if latent.projection.transposed else value
    return made | {f"{gain.norm.name}.weight": gain.value() for gain in gains}
