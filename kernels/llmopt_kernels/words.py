"""A weight that stays packed while it is multiplied with: what its codes stand for, in plain torch.

    value = scale * (code - zero), multiplied in the type asked for; a scale for each row, or for groups of columns.

`Words` is the definition, in the layout of compressed-tensors' pack-quantized files: codes + 2^(bits-1) as a stream of
bits, the lowest first, each row in int32 words of its own. Other layouts hold the same codes and scales, and give
every row back. Any layout makes a few rows dense at a time, never the whole weight.
"""
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

PIECE = 1 << 19             # values made dense at once: in float32 they fit into a cache of 2 MiB
BLOCK = 1 << 22             # values multiplied with at once
Rows = slice | Tensor       # of a weight: a run of them, or [R] indices, which all layouts but Int4 can take
Way = Callable[[Tensor, Tensor | None], Tensor]         # x [M, K], bias [N] or none -> y [M, N]


class Codes(nn.Module, ABC):
    """A weight [N, K] as integers of `bits` bits, in some layout, with `groups` scales for each row.

    scales [N, groups], zeros int8 [N, groups] or None.
    """

    scales: Tensor
    zeros: Tensor | None

    def __init__(self, bits: int, shape: tuple[int, int], groups: int):
        super().__init__()
        self.bits, self.shape, self.groups = bits, tuple(shape), groups
        self.register_buffer("zeros", None)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @abstractmethod
    def numbers(self, rows: Rows) -> Tensor:
        """The codes of some rows [R, K], signed, as float32; the caller may write into them."""

    def dense(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Some rows [R, K] as a loader would make them for a model of this type."""
        return self.values(rows, dtype).to(dtype)       # exact products, or nearly, rounded once, as in `dtype`

    def values(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Dense rows [R, K] before they are rounded to this type, as float32."""
        scales = self.scales[rows].to(dtype).float().unsqueeze(-1)                           # [R, G, 1]
        steps = self.numbers(rows).unflatten(1, (scales.shape[1], -1))                       # [R, G, width]
        if self.zeros is not None:
            steps = steps - self.zeros[rows].unsqueeze(-1)
        return steps.mul_(scales).flatten(1)

    def ways(self, x: Tensor) -> dict[str, Way]:
        """The ways to multiply this x [M, K] with the weight, the first one exact; which is fastest is measured."""
        ways = {"blocks": self.by_blocks}
        if x.dtype != torch.float32:
            ways["float32 blocks"] = lambda x, bias: self.by_blocks(x.float(), _float(bias)).to(x.dtype)
        return ways

    def by_blocks(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x [M, K], some rows of the weight made dense in turn: [M, N]."""
        (height, width), out = self.shape, x.new_empty(len(x), self.shape[0])
        for rows in pieces(height, width, 2 * PIECE if x.dtype == torch.float32 else BLOCK):
            out[:, rows] = F.linear(x, self.block(rows, x.dtype), None if bias is None else bias[rows])
        return out

    def block(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Dense rows, made in pieces that stay in the cache."""
        if dtype == torch.float32:
            return self.dense(rows, dtype)
        made = self.scales.new_empty(rows.stop - rows.start, self.shape[1], dtype=dtype)
        for piece in pieces(*made.shape, PIECE):
            made[piece] = self.values(slice(rows.start + piece.start, rows.start + piece.stop), dtype)
        return made


class Words(Codes):
    """The definition. words: int32 [N, ceil(K bits / 32)]."""

    def __init__(self, words: Tensor, bits: int, width: int, scales: Tensor, zeros: Tensor | None = None):
        super().__init__(bits, (len(words), width), scales.shape[1])
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    @classmethod
    def of_bytes(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> "Words":
        """From codes of 8 bits as int8 [N, K]."""
        padded = F.pad(codes ^ -128, (0, -codes.shape[1] % 4))
        return cls(padded.view(torch.int32), 8, codes.shape[1], scales, zeros)

    def ways(self, x: Tensor) -> dict[str, Way]:
        ways = super().ways(x)
        if x.is_cuda and has_triton():
            from llmopt_kernels.on_gpu import product  # without Triton it cannot be imported

            ways["triton"] = lambda x, bias: product(x, self, bias)
        return ways

    def numbers(self, rows: Rows) -> Tensor:
        return (unsigned(self.words[rows], self.bits, self.shape[1]) - (1 << self.bits - 1)).float()


def unsigned(words: Tensor, bits: int, width: int) -> Tensor:
    """The first `width` fields of so many bits of each row of int32 words: int64 [R, width]."""
    begin = torch.arange(width, device=words.device) * bits
    word, shift = begin // 32, begin % 32
    low = words.long() & 0xFFFFFFFF
    both = low[:, word] | low[:, (word + 1).clamp(max=low.shape[1] - 1)] << 32      # a field may reach into the next
    return (both >> shift) & ((1 << bits) - 1)


def pieces(rows: int, width: int, values: int) -> Iterator[slice]:
    """Rows in turn, of `width` values each, so that about `values` are taken at once; whole sixty-fours of rows."""
    step = max(64, values // max(1, width) // 64 * 64)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
