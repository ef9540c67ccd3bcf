"""Layouts of torch's own weight-only kernels on the CPU, for bfloat16: 4 bits in groups, 8 bits by rows.

    Int4    aten::_weight_int4pack_mm_for_cpu: whole sixty-fours of rows, groups of 32 or a multiple, no zero points
    Int8    aten::_weight_int8pack_mm, once for each group; of widths that are no multiple of 16 it computes nonsense

Both take scales of either sign, sum in float32 and round each product (Int8: each group's) to bfloat16. Their kernels
for float32 are many times slower than a dense product and are not used, nor is any that rounds what the weight reads.
For many rows both layouts make the weight dense in turn, as all do.

How Int4's bytes lie depends on the processor: byte i of column k of a block of 64 or 32 rows holds the rows i and
i + half a block. Where a trial finds it otherwise the layout is not offered.
"""
import functools

import torch
from torch import Tensor

from llmopt_kernels.words import PIECE, Codes, Rows, Way, Words, pieces

SIZES = (256, 128, 64, 32)          # of groups that the kernel for 4 bits knows
TAIL = torch.tensor([1, -8], dtype=torch.float16).view(torch.uint8)         # what fbgemm reads behind a row


class Int4(Codes):
    """packed: uint8 [N, K / 2] in torch's order. pairs: bfloat16 [groups, N, 2], a scale and 0 each."""

    def __init__(self, source: Words):
        super().__init__(4, source.shape, source.scales.shape[1])
        (height, width), scales = self.shape, source.scales.bfloat16()
        size = _size(source)
        packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu((source.numbers(rows) + 8).int(), 1)
                  for rows in pieces(height, width, PIECE)]
        scales = scales.repeat_interleave(width // size // scales.shape[1], 1).T                    # [groups, N]
        self.register_buffer("packed", torch.cat([part.view(-1, width // 2) for part in packed]))
        self.register_buffer("pairs", torch.stack([scales, torch.zeros_like(scales)], -1).contiguous())

    @staticmethod
    def fits(source: Words, dtype: torch.dtype) -> bool:
        return (source.bits == 4 and source.zeros is None and dtype == source.scales.dtype == torch.bfloat16
                and source.shape[0] % 64 == 0 and _size(source) > 0 and block_rows() > 0)

    @property
    def scales(self) -> Tensor:
        return self.pairs[::len(self.pairs) // self.groups, :, 0].T.contiguous()

    def numbers(self, rows: slice) -> Tensor:
        size, width = block_rows(), self.shape[1]
        begin, end = rows.start // size, -(-rows.stop // size)
        halves = self.packed.view(-1, width, size // 2)[begin:end].transpose(1, 2)                  # [blocks, half, K]
        codes = torch.stack([halves & 15, halves >> 4], 1).flatten(0, 2)[rows.start - begin * size:]
        return codes[:rows.stop - rows.start].float().sub_(8)

    def ways(self, x: Tensor) -> dict[str, Way]:
        ways = {"blocks": self.by_blocks}
        if x.dtype == self.pairs.dtype == torch.bfloat16:
            ways["int4"] = self._kernel
        return ways

    def _kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        size = self.shape[1] // len(self.pairs)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, size, self.pairs)
        return out if bias is None else out.add_(bias)

    def by_blocks(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        size, out = block_rows(), x.new_empty(len(x), self.shape[0])
        for begin in range(0, self.shape[0], size):
            part = x @ self._columns(begin, x.dtype)            # [M, size], of the rows i and i + half in turn
            out[:, begin:begin + size] = part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
        return out if bias is None else out.add_(bias)

    def _columns(self, begin: int, dtype: torch.dtype) -> Tensor:
        """A block of rows as columns [K, size], in the order in which its bytes hold them."""
        size, groups = block_rows(), len(self.pairs)
        stored = self.packed[begin:begin + size].view(groups, -1)
        row = torch.empty(groups, stored.shape[1] + len(TAIL), dtype=torch.uint8)
        row[:, :-len(TAIL)], row[:, -len(TAIL):] = stored, TAIL
        numbers = torch.ops.quantized.embedding_bag_4bit_unpack(row).view(groups, -1, size)
        scales = self.pairs[:, begin:begin + size, 0].to(dtype).float().unflatten(1, (2, -1)).transpose(1, 2)
        return numbers.mul_(scales.reshape(groups, 1, size)).flatten(0, 1).to(dtype)


class Int8(Codes):
    """grouped: int8 [groups, N, width of a group]; scales bfloat16 [N, groups]."""

    def __init__(self, source: Words):
        super().__init__(8, source.shape, source.scales.shape[1])
        height, width = self.shape
        grouped = torch.empty(self.groups, height, width // self.groups, dtype=torch.int8)
        for rows in pieces(height, width, PIECE):
            grouped[:, rows] = source.numbers(rows).to(torch.int8).unflatten(1, (self.groups, -1)).transpose(0, 1)
        self.register_buffer("grouped", grouped)
        self.register_buffer("scales", source.scales)

    @staticmethod
    def fits(source: Words, dtype: torch.dtype) -> bool:
        return (source.bits == 8 and source.zeros is None and dtype == source.scales.dtype == torch.bfloat16
                and source.shape[1] // source.scales.shape[1] % 16 == 0)

    def numbers(self, rows: Rows) -> Tensor:
        return self.grouped[:, rows].transpose(0, 1).float().flatten(1)

    def ways(self, x: Tensor) -> dict[str, Way]:
        ways = super().ways(x)
        if x.dtype == self.scales.dtype == torch.bfloat16:
            ways["int8"] = self._kernel
        return ways

    def _kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.groups == 1:
            out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.grouped[0], self.scales[:, 0])
            return out if bias is None else out.add_(bias)
        parts, scales = x.unflatten(1, (self.groups, -1)).transpose(0, 1).contiguous(), self.scales.T.contiguous()
        out = torch.zeros(len(x), self.shape[0]) if bias is None else bias.float().repeat(len(x), 1)
        for part, weight, scale in zip(parts, self.grouped, scales, strict=True):
            out += torch.ops.aten._weight_int8pack_mm(part, weight, scale)
        return out.to(x.dtype)


def _size(source: Words) -> int:
    """The largest group that the kernel for 4 bits can take; 0 for none."""
    width = source.shape[1] // source.scales.shape[1]
    return next((size for size in SIZES if width % size == 0), 0)


@functools.cache
def block_rows() -> int:
    """Rows that lie together in the layout for 4 bits on this processor; 0 if it is not as this file has it."""
    codes = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    for size in (64, 32):
        halves = packed.view(-1, 64, size // 2).transpose(1, 2)
        if torch.equal(torch.stack([halves & 15, halves >> 4], 1).flatten(0, 2).int(), codes):
            return size
    return 0
