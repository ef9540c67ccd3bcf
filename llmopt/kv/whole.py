"""Products with codes of 2 or 4 bits on a CPU: those with keys in whole numbers, which the processor adds up fastest.

    row ~ unit (d0 + 256 d1 + 65536 d2), d of a byte each;    row x code = unit (d0 code + 256 (d1 code + 256 d2 code))

Three bytes tell a number as closely as fp32 tells the largest of its row, and their sums are exact. Values are read by
weights that differ by orders of magnitude: their codes become fp32. Both happen tile by tile, in memory that is reused.
The J codes of a byte belong to J planes of neighbouring dimensions, each in one group.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from llmopt.kv.codes import Codes

TILE = 1 << 20                              # codes that are spread at a time
LONG = 1 << 17                              # codes of a lane from which whole numbers are faster
TOP, MIDDLE = 0x7F7F00, 0x808080            # three signed bytes hold a little more; what makes them unsigned


def suits(codes: Codes) -> bool:
    """True for codes that these products can read."""
    form, width = codes.form, codes.words.shape[1]
    return codes.words.device.type == "cpu" and form.bits in (2, 4) and codes.lows is not None \
        and not form.channel and width * 8 == codes.dim * form.bits and form.group % width == 0


def products(codes: Codes, rows: Tensor) -> Tensor:
    """rows [L, R, D], turned as the codes are, times code and scale of each entry of their lane: [L, R, n]."""
    units, left = _three_bytes(rows, codes.words.shape[1])                           # [L, R, 1], [L, J, 3 R, W]
    scales, room = _scales(codes, len(rows)), Room()
    out = rows.new_empty(*rows.shape[:2], scales.shape[3])
    for lanes, entries, numbers in _tiles(codes, len(rows)):
        shape = numbers.shape[1], len(numbers), left.shape[2], numbers.shape[2]      # [l, J, 3 R, b]
        sums = room.of("sums", shape, torch.int32)
        for lane, into in enumerate(sums):
            for row, plane, met in zip(left[lanes][lane], numbers[:, lane], into, strict=True):
                torch._int_mm(row, plane.T, out=met)
        of_group = sums.unflatten(1, (len(scales), -1))
        for more in of_group[:, :, 1:].unbind(2):
            of_group[:, :, 0] += more
        met = room.of("met", (shape[0], len(scales), *shape[2:]), torch.float32).copy_(of_group[:, :, 0])
        low, middle, high = met.unflatten(2, (3, -1)).unbind(2)                      # [l, groups, R, b]
        met = low.add_(middle.add_(high, alpha=256), alpha=256).mul_(scales[:, lanes, :, entries].transpose(0, 1))
        out[lanes, :, entries] = (met.sum(1) if len(scales) > 1 else met[:, 0]).mul_(units[lanes])
    return out


def weighted(codes: Codes, weights: Tensor) -> Tensor:
    """The sums of code times scale of the entries of each lane with its weights [L, R, n]: [L, R, D], not turned."""
    scales, room, width = _scales(codes, len(weights)), Room(), codes.words.shape[1]
    total = weights.new_zeros(codes.dim // width, *weights.shape[:2], width)         # [J, L, R, W]
    for lanes, entries, numbers in _tiles(codes, len(weights)):
        some = weights[lanes, :, entries] * scales[:, lanes, :, entries]             # [groups, l, R, b]
        for index, plane in enumerate(numbers):
            values = room.of("values", plane.shape, torch.float32).copy_(plane)
            total[index, lanes].baddbmm_(some[index * width // codes.form.group], values)
    return total.permute(1, 2, 0, 3).flatten(2)


class Room(dict):
    """Memory that one tile after the other uses."""

    def of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if (name, shape) not in self:
            self[name, shape] = torch.empty(shape, dtype=dtype)
        return self[name, shape]


def _tiles(codes: Codes, lanes: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(lanes, entries of the tile, its codes int8 [J, l, b, W]), overwritten by the next tile's."""
    bits, room = codes.form.bits, Room()
    words = codes.words.unflatten(0, (lanes, -1))
    if words.shape[2] % 8 == 0 and words.storage_offset() % 8 == 0:
        words = words.view(torch.int64)                                              # as many bytes at once
    mask = int.from_bytes([2 ** bits - 1] * words.element_size(), "little")
    most = max(1, TILE // codes.dim)
    step = max(1, most // words.shape[1])
    for first in range(0, lanes, step):
        for start in range(0, words.shape[1], most):
            tile = slice(first, first + step), slice(start, start + most)
            some = words[tile]
            planes = room.of("planes", (8 // bits, *some.shape), some.dtype)
            torch.bitwise_and(some, mask, out=planes[0])
            for index, plane in enumerate(planes[1:], 1):
                torch.bitwise_right_shift(some, bits * index, out=plane).bitwise_and_(mask)
            yield *tile, planes.view(torch.int8)


def _three_bytes(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What 1 counts [L, R, 1], and three bytes of each row, plane by plane: [L, J, 3 R, W]."""
    units = rows.abs().amax(2, keepdim=True).clamp(min=1e-30) / TOP
    whole = (rows / units).round_().int().add_(MIDDLE).bitwise_xor_(MIDDLE)
    three = whole.view(torch.int8).view(*rows.shape[:2], -1, width, 4)[..., :3]      # [L, R, J, W, 3]
    return units, three.permute(0, 2, 4, 1, 3).flatten(2, 3)


def _scales(codes: Codes, lanes: int) -> Tensor:
    """[groups, L, 1, n], fp32."""
    return codes.scales.T.unflatten(1, (lanes, -1)).unsqueeze(2).contiguous().float()
