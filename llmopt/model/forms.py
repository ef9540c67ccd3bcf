"""The kinds of numbers that codes stand for: integers, and the small floats of new hardware (OCP MX and NVFP4).

    e4m3   sign, 4 exponent and 3 mantissa bits: up to 448, steps of an eighth of the power of two below
    e2m1   0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    value  = number * scale; scales of the model's type ("model"), e4m3 numbers over one float32 number of the whole
             weight ("e4m3"), or powers of two ("e8m0")

compressed-tensors unpacks e2m1, and all numbers with e8m0 scales, as bfloat16, whatever the model's type: their values
are rounded to it.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Form:
    """A kind of number. most: the largest. rows: that share a scale (0: all of a weight, 1: none)."""

    name: str
    most: float = 0
    scales: Literal["model", "e4m3", "e8m0"] = "model"
    rows: int = 1

    @property
    def is_float(self) -> bool:
        return self.most > 0

    @property
    def halves(self) -> bool:
        """True for numbers of which two lie in a byte."""
        return self.most == 6

    @property
    def through_bfloat16(self) -> bool:
        return self.scales != "model"

    def numbers(self, codes: Tensor) -> Tensor:
        """Codes as the numbers that they are, float32."""
        return codes.view(E4M3).float() if self.is_float else codes.float()

    def kept(self, numbers: Tensor, bits: int) -> Tensor:
        """Numbers as codes: int8 (int32 beyond 8 bits); of floats the bits of an e4m3 number, which e2m1's are too."""
        if self.is_float:
            return numbers.to(E4M3).view(torch.int8)
        return numbers.to(torch.int8 if bits <= 8 else torch.int32)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The nearest numbers of this form, ties to the even mantissa; float32, in place. Not for integers."""
        numbers.clamp_(-self.most, self.most)
        if not self.halves:
            return numbers.to(E4M3).float()
        size = numbers.abs()
        step = 0.5 + 0.5 * (size >= 2) + (size >= 4)                  # 0.5 below 2, 1 below 4, 2 beyond
        return numbers.div_(step).round_().mul_(step)


INTEGERS = Form("int")
BYTES = Form("bytes")           # integers, too, of which each lies in a byte of its own
FORMS = {form.name: form for form in (
    INTEGERS, BYTES, Form("fp8", 448), Form("fp8 tensor", 448, rows=0), Form("fp8 block", 448, rows=128),
    Form("nvfp4", 6, "e4m3"), Form("mxfp4", 6, "e8m0"), Form("mxfp8", 448, "e8m0"))}


def over(numbers: Tensor, whole: float) -> Tensor:
    """e4m3 scales as what they stand for, rounded as loaders round it: numbers / whole in float32."""
    return numbers.float() / torch.full((1,), whole, device=numbers.device)
