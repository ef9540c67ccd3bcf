"""The product with packed words on a GPU, in Triton: codes of 2 to 8 bits are taken out of their words as it goes.

A program makes BN outputs for BM rows of x, K by K: each code is found by its place in the stream of bits, in one word
or two, multiplied by the scale of its group and summed in float32. Tested under Triton's interpreter; never run on a
GPU.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(x, words, scales, zeros, out, rows, height, width, per_row, groups,
             BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, EXACT: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for begin in range(0, width, BK):
        k = begin + tl.arange(0, BK)
        inside = (k[:, None] < width) & (n[None, :] < height)
        place, shift = n[None, :] * per_row + k[:, None] * BITS // 32, k[:, None] * BITS % 32       # [BK, BN]
        low = tl.load(words + place, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
        over = inside & (shift + BITS > 32)             # the rest of a code lies in the next word
        high = tl.load(words + place + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        high = tl.where(over, high << ((32 - shift) % 32).to(tl.uint32), 0)
        codes = ((low | high) & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))
        group = n[None, :] * groups + k[:, None] // (width // groups)
        if HAS_ZEROS:
            codes -= tl.load(zeros + group, mask=inside, other=0).to(tl.float32)
        weight = codes * tl.load(scales + group, mask=inside, other=0).to(tl.float32)
        here = (m[:, None] < rows) & (k[None, :] < width)
        given = tl.load(x + m[:, None] * width + k[None, :], mask=here, other=0)
        if EXACT:                                       # and under the interpreter, whose bfloat16 products are garbage
            total += tl.dot(given.to(tl.float32), weight, input_precision="ieee")
        else:
            total += tl.dot(given, weight.to(given.dtype))
    tl.store(out + m[:, None] * height + n[None, :], total, mask=(m[:, None] < rows) & (n[None, :] < height))


def product(x: Tensor, weight, bias: Tensor | None = None, exact: bool | None = None) -> Tensor:
    """x [M, K] times `Words` on the same device: [M, N]. exact: products in float32; None: where x is."""
    x, (height, width) = x.contiguous(), weight.shape
    out = torch.empty(len(x), height, dtype=torch.float32, device=x.device)
    bm, bn, bk = 16 if len(x) <= 16 else 64, 32, 32
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _product[triton.cdiv(len(x), bm), triton.cdiv(height, bn)](
        x, weight.words, weight.scales.contiguous(), zeros.contiguous(), out, len(x), height, width,
        weight.words.shape[1], weight.groups, BITS=weight.bits, HAS_ZEROS=weight.zeros is not None,
        EXACT=x.dtype == torch.float32 if exact is None else exact, BM=bm, BN=bn, BK=bk)
    return (out if bias is None else out + bias.float()).to(x.dtype)
