"""Weights as codes: what they stand for, and how integers are packed."""
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt.model.forms import INTEGERS, Form

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Quantized:
    """A weight [out, in] as codes; the value is scales * (codes - zeros), computed in the model's type.

    whole: what e4m3 scales are multiplied by where they are stored. Such scales, and powers of two, are kept here as
    the float32 numbers that they stand for. inputs: how what the weight reads is rounded while the model runs, in the
    words of compressed-tensors; peak: the largest of it that calibration has seen, where that is asked for.
    """

    codes: Tensor                       # [out, in] int8 (int32 beyond 8 bits)
    scales: Tensor                      # [out, groups], in the stored type
    bits: int
    group_size: int                     # -1: one group
    zeros: Tensor | None = None         # [out, groups], signed like the codes; None: symmetric
    groups: Tensor | None = None        # [in] the group of each column, where that is not column // group_size
    figures: dict = field(default_factory=dict)
    form: Form = INTEGERS
    whole: float = 1.0
    inputs: dict[str, Any] | None = None
    peak: float | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] exactly as a loader computes it for a model of type `dtype`."""
        numbers, zeros = self.form.numbers(self.codes), self.zeros
        if self.groups is not None:
            zeros = None if zeros is None else zeros[:, self.groups]
            return decode(numbers, self.scales[:, self.groups], zeros, dtype, self.form)
        numbers = numbers.unflatten(1, (self.scales.shape[1], -1))                           # [out, groups, width]
        zeros = None if zeros is None else zeros.unsqueeze(-1)
        return decode(numbers, self.scales.unsqueeze(-1), zeros, dtype, self.form).flatten(1)


def decode(numbers: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, form: Form = INTEGERS) -> Tensor:
    """scale * (numbers - zero) of float32 numbers, multiplied in `dtype`, or as `form` wants. The shapes broadcast."""
    if form.through_bfloat16:
        return (numbers * scale).to(torch.bfloat16).to(dtype)
    steps = numbers if zero is None else numbers - zero.float()
    return steps.to(dtype) * scale.to(dtype)


def pack(codes: Tensor, bits: int | float, along: int = 1) -> Tensor:
    """Integers side by side in int32 words, along rows or, as zero points are, columns (0).

    Of codes without values the shape, for fractions of bits too.
    """
    if codes.is_meta:
        shape = list(codes.shape)
        shape[along] = -int(-shape[along] * bits // 32)
        return torch.empty(shape, dtype=torch.int32, device="meta")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # takes two seconds to import

    return pack_to_int32(codes.cpu(), bits, along).contiguous()


def unpack(words: Tensor, bits: int, shape: Iterable[int], along: int = 1) -> Tensor:
    """The codes of this shape that `pack` put into these words."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size(shape), along)
