"""Layers whose weight stays packed, as it came from a file of compressed-tensors: they multiply, or look up, its codes.
"""
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from llmopt_kernels import Codes, quant_matmul
from torch import Tensor, nn
from torch.nn.functional import embedding

from llmopt.model.codes import Quantized
from llmopt.model.forms import BYTES


class Packed(nn.Module):
    """Stands in the place of a layer, and is one to adapters; in place of `weight` it has `codes`.

    The module it is made of keeps its bias, hooks and attributes: only its class changes, and its weight. `weight` can
    be read, and is made anew each time; torch refuses to write into it, as that would be lost (but not into its data).
    """

    codes: Codes
    group_size: int             # -1: one group for each row
    dtype: torch.dtype          # of the dense weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            with torch.inference_mode():
                return self.dense()
        return super().__getattr__(name)

    def quantized(self) -> Quantized:
        """The weight's codes as compression left them."""
        codes, rows = self.codes, slice(0, self.codes.shape[0])
        return Quantized(codes.numbers(rows).to(torch.int8), codes.scales, codes.bits, self.group_size, codes.zeros)

    def dense(self) -> Tensor:
        """The weight [out, in], or table [V, E], as a loader would make it."""
        return self.codes.dense(slice(0, self.codes.shape[0]), self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class PackedLinear(Packed, nn.Linear):
    """Multiplies with the codes."""

    def forward(self, x: Tensor) -> Tensor:
        return quant_matmul(x, self.codes, self.bias)


class PackedEmbedding(Packed, nn.Embedding):
    """Makes the rows dense that are looked up; codes of 8 bits, which a tied head shares."""

    def forward(self, ids: Tensor) -> Tensor:
        rows, places = ids.unique(return_inverse=True)
        return embedding(places, self.codes.dense(rows, self.dtype))

    def quantized(self) -> Quantized:
        return replace(super().quantized(), form=BYTES)


@functools.cache
def packed_class(stock: type) -> type:
    """The packed kind of a class of layers; one that does more than nn.Embedding, as Gemma's scaled table, still does.
    """
    if stock in (nn.Linear, nn.Embedding):
        return PackedLinear if stock is nn.Linear else PackedEmbedding
    return type(stock.__name__, (stock, PackedEmbedding), {"__module__": stock.__module__, "stock": stock})


def plain_class(packed: type) -> type:
    """The class of which `packed_class` made this one."""
    return {PackedLinear: nn.Linear, PackedEmbedding: nn.Embedding}.get(packed) or packed.stock
