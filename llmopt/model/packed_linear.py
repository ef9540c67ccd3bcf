"""A linear layer that multiplies with its weight packed, as it came from a file of compressed-tensors."""
from collections.abc import Callable
from typing import Any

import torch
from llmopt_kernels import Codes, quant_matmul
from torch import Tensor, nn

from llmopt.model.codes import Quantized


class PackedLinear(nn.Linear):
    """Stands in the place of an nn.Linear, and is one to adapters; in place of `weight` it has `codes`.

    The module it is made of keeps its bias, hooks and attributes: only its class changes, and its weight. `weight` can
    be read, and is made anew each time; torch refuses to write into it, as that would be lost (but not into its data).
    """

    codes: Codes
    group_size: int             # -1: one group for each row
    dtype: torch.dtype          # of the dense weight

    def forward(self, x: Tensor) -> Tensor:
        return quant_matmul(x, self.codes, self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            with torch.inference_mode():
                return self.dense()
        return super().__getattr__(name)

    def quantized(self) -> Quantized:
        """The weight's codes as compression left them."""
        codes, rows = self.codes, slice(0, self.out_features)
        return Quantized(codes.numbers(rows).to(torch.int8), codes.scales, codes.bits, self.group_size, codes.zeros)

    def dense(self) -> Tensor:
        """The weight [out, in] as a loader would make it."""
        return self.codes.dense(slice(0, self.out_features), self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
