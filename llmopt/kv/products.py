"""Products with entries in codes as they are: rows with keys, weights with values; no entry becomes dense.

    q (low + scale code + centre) = scale (q code) + low sum(q), group by group, + q centre, run by run

The entries belong to L lanes of equal length, each with rows of its own. A byte holds codes of several dimensions:
`byte & mask` leaves one of them, 2^shift times, and is a number that its dimension of a row meets. Bytes become such
numbers tile by tile, in the processor's cache, and each group of dimensions in pieces that lie apart in memory: torch's
batched product reads these faster than columns of one matrix. Codes of 2 and 4 bits have a faster way (whole.py).
"""
from collections.abc import Iterator
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.kv import whole
from llmopt.kv.codebook import rotation
from llmopt.kv.codes import Codes

TILE = 1 << 19      # numbers that bytes become at a time: 2 MiB


class Part(NamedTuple):
    """Bytes `words` of every entry, which hold a number for each dimension; of 3 bits there are two parts.

    masks: what leaves one code of a byte. units [J]: what 1 of its number counts, by piece. width: dimensions of a
    piece, of which J make up all dimensions, in order; no piece is in two groups.
    """

    words: slice
    masks: list[int]
    units: Tensor
    width: int


@cache
@torch.inference_mode(False)
def parts_of(bits: int, dim: int, group: int) -> list[Part]:
    """The parts of an entry's bytes, as `squeeze` lays them."""
    found, start = [], 0
    for width, factor in [(2, 1), (1, 4)] if bits == 3 else [(bits, 1)]:
        size, shifts = -(-dim * width // 8), range(0, 8, width)
        piece = gcd(size, group)
        units = torch.tensor([factor / 2 ** shift for shift in shifts]).repeat_interleave(size // piece)
        masks = [2 ** width - 1 << shift for shift in shifts]
        found.append(Part(slice(start, start + size), masks, units[:dim // piece].view(-1, 1, 1, 1), piece))
        start += size
    return found


def products(codes: Codes, rows: Tensor) -> Tensor:
    """rows [L, R, D], fp32, times each entry of their lane: [L, R, n]. Rows are rotated, entries not turned back."""
    if len(codes) == 0:
        return rows.new_zeros(*rows.shape[:2], 0)
    common = None if codes.centres is None else _common(codes, rows)
    rows = rows @ rotation(codes.dim).to(rows.device) if codes.form.rotate else rows
    if codes.form.channel:
        return rows @ codes.numbers().unflatten(0, (len(rows), -1)).transpose(1, 2)
    long = len(codes) // len(rows) * codes.dim >= whole.LONG
    found = whole.products(codes, rows) if long and whole.suits(codes) else _by_tiles(codes, rows)
    if codes.lows is not None:
        sums = rows.unflatten(2, (-1, codes.form.group)).sum(3)                      # [L, R, groups]
        found.baddbmm_(sums, codes.lows.unflatten(0, (len(rows), -1)).transpose(1, 2).float())
    return found if common is None else found.add_(common)


def _by_tiles(codes: Codes, rows: Tensor) -> Tensor:
    """Turned rows [L, R, D] times code and scale of each entry of their lane: [L, R, n]."""
    tiles = Tiles(codes, len(rows))
    pieces = [rows.unflatten(2, (-1, part.width)).permute(2, 0, 1, 3) * part.units.to(rows.device)
              for part in tiles.parts]                                               # [J, L, R, w]
    found = rows.new_zeros(codes.scales.shape[1], *rows.shape[:2], len(codes) // len(rows))
    for lanes, entries, numbers in tiles:
        into = found[:, lanes, :, entries]                                           # [groups, l, R, b]
        for part, some in zip(pieces, numbers, strict=True):
            met = torch.bmm(part[:, lanes].flatten(0, 1), some.flatten(0, 1).transpose(1, 2))
            into += met.view(len(into), -1, *into.shape[1:]).sum(1)
    return found.mul_(tiles.scales).sum(0)


def _common(codes: Codes, rows: Tensor) -> Tensor:
    """rows [L, R, D] times the centre of each entry of their lane, [L, R, n], once for all of a run."""
    run = codes.run.view(len(rows), -1)                                              # [L, n], ascending
    first = run[:, :1]
    most = int((run[:, -1:] - first).max()) + 1
    which = (first + torch.arange(most, device=run.device)).clamp(max=len(codes.centres) - 1)
    met = torch.bmm(rows, codes.centres[which].float().transpose(1, 2))              # [L, R, runs of a lane]
    return met.gather(2, (run - first).unsqueeze(1).expand(-1, rows.shape[1], -1))


def weighted(codes: Codes, weights: Tensor) -> Tensor:
    """The sums of the entries of each lane with its weights [L, R, n], fp32: [L, R, D]."""
    if len(codes) == 0:
        return weights.new_zeros(*weights.shape[:2], codes.dim)
    if codes.form.channel:
        return codes.turned_back(weights @ codes.numbers().unflatten(0, (len(weights), -1)))
    found = whole.weighted(codes, weights) if whole.suits(codes) else _sums_by_tiles(codes, weights)
    if codes.lows is not None:
        lows = codes.lows.T.unflatten(1, (len(weights), -1)).unsqueeze(2).contiguous().float()     # [groups, L, 1, n]
        found = found + (weights * lows).sum(3).permute(1, 2, 0).repeat_interleave(codes.form.group, 2)
    return codes.turned_back(found)


def _sums_by_tiles(codes: Codes, weights: Tensor) -> Tensor:
    """The sums of code times scale of the entries of each lane with its weights [L, R, n]: [L, R, D], not turned."""
    tiles = Tiles(codes, len(weights))
    scaled = weights * tiles.scales                                                  # [groups, L, R, n]
    sums = [weights.new_zeros(len(part.units), *weights.shape[:2], part.width) for part in tiles.parts]
    for lanes, entries, numbers in tiles:
        some = scaled[:, None, lanes, :, entries]
        for total, part in zip(sums, numbers, strict=True):
            each = some.expand(-1, len(total) // len(some), -1, -1, -1).flatten(0, 2)
            total[:, lanes] += torch.bmm(each, part.flatten(0, 1)).view(len(total), -1, *total.shape[2:])
    return sum((total * part.units.to(total.device)).permute(1, 2, 0, 3).flatten(2)
               for total, part in zip(sums, tiles.parts, strict=True))


class Tiles:
    """Entries in codes, L lanes of n, and the numbers of some at a time.

    parts: of their bytes; levels that have been looked up are one part. scales: [groups, L, 1, n], fp32.
    """

    def __init__(self, codes: Codes, lanes: int):
        self.codes = codes
        self.words = codes.words.unflatten(0, (lanes, -1))
        self.scales = codes.scales.unflatten(0, (lanes, -1)).permute(2, 0, 1).unsqueeze(2).float()
        self.parts = parts_of(codes.form.bits, codes.dim, codes.form.group)
        if codes.lows is None:
            self.parts = [Part(slice(None), [], torch.ones(len(self.scales), 1, 1, 1), codes.form.group)]
        self.sources = [self._source(part) for part in self.parts]

    def _source(self, part: Part) -> tuple[Tensor, list[int]]:
        """The bytes of a part, eight at a time where they lie so, and its masks for them."""
        words = self.words[..., part.words]
        if len(self.parts) > 1 or words.shape[2] % 8 or words.storage_offset() % 8:
            return words, part.masks
        return words.view(torch.int64), [int.from_bytes([mask] * 8, signed=True) for mask in part.masks]

    def __iter__(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """(lanes, entries of the tile, by part its numbers [J, l, b, w]); they are overwritten by the next tile's."""
        lanes, length = self.words.shape[:2]
        most = max(1, TILE // self.codes.dim)
        step, room = max(1, most // length), {}
        for first in range(0, lanes, step):
            for start in range(0, length, most):
                tile = slice(first, first + step), slice(start, start + most)
                yield *tile, self._levels(tile) if self.codes.lows is None else self._numbers(tile, room)

    def _levels(self, tile: tuple[slice, slice]) -> list[Tensor]:
        width = self.codes.form.group
        return [self.codes.levels(self.words[tile]).unflatten(2, (-1, width)).permute(2, 0, 1, 3)]

    def _numbers(self, tile: tuple[slice, slice], room: dict) -> list[Tensor]:
        found = []
        for index, (part, (source, masks)) in enumerate(zip(self.parts, self.sources, strict=True)):
            some = source[tile]
            if (index, some.shape) not in room:
                room[index, some.shape] = self._room(part, some)
            planes, numbers = room[index, some.shape]
            for plane, mask in zip(planes, masks, strict=True):
                plane.copy_((some if mask in (255, -1) else some & mask).view(torch.uint8).view(plane.shape))
            found.append(numbers)
        return found

    def _room(self, part: Part, some: Tensor) -> tuple[list[Tensor], Tensor]:
        """(where the numbers of each mask go, [l, b, W / w, w]; all of them as pieces [J, l, b, w])."""
        size = some.shape[2] * some.element_size()
        into = self.scales.new_empty(len(part.masks), size // part.width, *some.shape[:2], part.width)
        return [plane.permute(1, 2, 0, 3) for plane in into], into.flatten(0, 1)[:len(part.units)]
