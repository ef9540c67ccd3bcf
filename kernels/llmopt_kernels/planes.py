"""Codes of any width from 2 to 8 bits in parts of 8, 4, 2 and 1 bits, which fbgemm's kernels in torch make dense fast.

    3 bits = 2 + 1,  5 = 4 + 1,  6 = 4 + 2,  7 = 4 + 2 + 1; what lies above 2 or 4 bits is kept beside them

torch.ops.quantized.embedding_bag_4bit_unpack and its sister for 2 bits read rows of bytes, the lowest bits first, with
a scale and a bias in float16 behind each row, and write float32 about as fast as memory is read, by AVX2 or AVX-512.
Here these are 1, or the worth of the lowest bit, and minus half the range, so that what comes out is the code. Of
single bits the even ones of a byte belong to the left half of the columns, the odd ones to the right half: each half is
a row of 2-bit fields once the other half is masked out.

The layout takes four bytes more for each row and part than a file does. Codes of 8 bits are plain int8.
"""
import torch
from torch import Tensor

from llmopt_kernels.words import PIECE, Codes, Rows, Words, pieces, unsigned

PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
TAIL = 4                        # bytes of a scale and a bias


class Planes(Codes):
    """Made from `Words`, which it can replace. fast: fbgemm's kernels are there."""

    fast = hasattr(torch.ops.quantized, "embedding_bag_2bit_unpack")

    def __init__(self, source: Words):
        super().__init__(source.bits, source.shape, source.groups)
        self.register_buffer("scales", source.scales)
        self.register_buffer("zeros", source.zeros)
        for index in range(len(PARTS[self.bits])):
            self.register_buffer(f"part{index}", None)
        made: list[list[Tensor]] = []
        for rows in pieces(*self.shape, PIECE):
            made.append(_parts(unsigned(source.words[rows], self.bits, self.shape[1]), self.bits))
        for index, parts in enumerate(zip(*made, strict=True)):
            setattr(self, f"part{index}", torch.cat(parts))

    def numbers(self, rows: Rows) -> Tensor:
        if self.bits == 8:
            return self.part0[rows].float()
        fast = self.fast and self.part0.device.type == "cpu"
        widths, width = PARTS[self.bits], self.shape[1]
        out = _unpacked(self.part0[rows], widths[0], fast)
        for index, bits in enumerate(widths[1:], 1):
            out += _unpacked(getattr(self, f"part{index}")[rows], bits, fast)
        return out[:, :width]


def _parts(codes: Tensor, bits: int) -> list[Tensor]:
    """Unsigned codes [R, K] as the bytes of each part, with what stands behind the rows."""
    if bits == 8:
        return [(codes - 128).to(torch.int8)]
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % 8))
    made, shift = [], 0
    for width in PARTS[bits]:
        fields = codes >> shift & (1 << width) - 1
        tail = torch.tensor([1 << shift, -(1 << bits - 1) if shift == 0 else 0], dtype=torch.float16)
        made.append(torch.cat([_bytes(fields, width), tail.view(torch.uint8).expand(len(codes), TAIL)], 1))
        shift += width
    return made


def _bytes(fields: Tensor, width: int) -> Tensor:
    """Fields [R, K] of 4, 2 or 1 bits side by side in bytes."""
    if width == 1:
        left, right = fields.chunk(2, 1)
        return _bytes(left, 2) | _bytes(right, 2) << 1
    each = 8 // width
    shifts = torch.arange(each, dtype=torch.uint8) * width
    return (fields.unflatten(1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8)


def _unpacked(part: Tensor, width: int, fast: bool) -> Tensor:
    """What the bytes of a part stand for: float32 [R, K]."""
    if width > 1 and fast:
        return getattr(torch.ops.quantized, f"embedding_bag_{width}bit_unpack")(part)
    if width > 1:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=part.device)
        fields = part[:, :-TAIL, None] >> shifts & (1 << width) - 1
        scale, bias = part[:, -TAIL:].contiguous().view(torch.float16).float().split(1, 1)
        return fields.flatten(1).float() * scale + bias
    halves = [part & 0x55, part >> 1 & 0x55]
    for half in halves:
        half[:, -TAIL:] = part[:, -TAIL:]
    return torch.cat([_unpacked(half, 2, fast) for half in halves], 1)
