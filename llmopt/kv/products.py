"""Products with entries in codes as they are: rows with keys, weights with values; no entry becomes dense.

    q (low + scale code) = scale (q code) + low sum(q), group by group

The entries belong to L lanes of equal length, each with rows of its own. A byte holds codes of several dimensions:
`byte & mask` leaves one of them, 2^shift times, and is a number that its dimension of a row meets. Bytes become such
numbers tile by tile, in the processor's cache, and each group of dimensions in pieces that lie apart in memory: torch's
batched product reads these faster than columns of one matrix.
"""
from collections.abc import Iterator
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.kv.codebook import rotation
from llmopt.kv.codes import Codes

TILE = 1 << 18      # numbers that bytes become at a time: a MiB


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
    rows = rows @ rotation(codes.dim).to(rows.device) if codes.form.rotate else rows
    if codes.form.channel:
        return rows @ codes.numbers().unflatten(0, (len(rows), -1)).transpose(1, 2)
    parts = _parts(codes)
    pieces = [rows.unflatten(2, (-1, part.width)).permute(2, 0, 1, 3) * part.units.to(rows.device) for part in parts]
    found = rows.new_empty(*rows.shape[:2], len(codes) // len(rows))
    for where, scales, numbers in _tiles(codes, len(rows)):
        sums = 0
        for part, some in zip(pieces, numbers, strict=True):
            met = torch.bmm(part[:, where[0]].flatten(0, 1), some.flatten(0, 1).transpose(1, 2))
            sums = sums + met.view(len(scales), -1, *scales.shape[1:2], *met.shape[1:]).sum(1)
        found[where[0], :, where[1]] = (sums * scales).sum(0)                        # [groups, l, R, b]
    if codes.lows is not None:
        sums = rows.unflatten(2, (-1, codes.form.group)).sum(3)                      # [L, R, groups]
        found.baddbmm_(sums, codes.lows.unflatten(0, (len(rows), -1)).transpose(1, 2).float())
    return found


def weighted(codes: Codes, weights: Tensor) -> Tensor:
    """The sums of the entries of each lane with its weights [L, R, n], fp32: [L, R, D]."""
    if len(codes) == 0:
        return weights.new_zeros(*weights.shape[:2], codes.dim)
    if codes.form.channel:
        return codes.turned_back(weights @ codes.numbers().unflatten(0, (len(weights), -1)))
    parts = _parts(codes)
    sums = [weights.new_zeros(len(part.units), *weights.shape[:2], part.width) for part in parts]
    for where, scales, numbers in _tiles(codes, len(weights)):
        scaled = (weights[where[0], :, where[1]] * scales).unsqueeze(1)              # [groups, 1, l, R, b]
        for total, some in zip(sums, numbers, strict=True):
            each = scaled.expand(-1, len(total) // len(scaled), -1, -1, -1).flatten(0, 2)
            total[:, where[0]] += torch.bmm(each, some.flatten(0, 1)).view(len(total), -1, *total.shape[2:])
    found = sum((total * part.units.to(total.device)).permute(1, 2, 0, 3).flatten(2)
                for total, part in zip(sums, parts, strict=True))
    if codes.lows is not None:
        low = torch.bmm(weights, codes.lows.unflatten(0, (len(weights), -1)).float())
        found = found + low.repeat_interleave(codes.form.group, 2)
    return codes.turned_back(found)


def _parts(codes: Codes) -> list[Part]:
    """The parts of these entries; levels that have been looked up are one."""
    if codes.lows is None:
        groups = codes.dim // codes.form.group
        return [Part(slice(None), [], torch.ones(groups, 1, 1, 1), codes.form.group)]
    return parts_of(codes.form.bits, codes.dim, codes.form.group)


def _tiles(codes: Codes, lanes: int) -> Iterator[tuple[tuple[slice, slice], Tensor, list[Tensor]]]:
    """(lanes and entries of the tile, their scales [groups, l, 1, b], by part the numbers [J, l, b, w]), all fp32.

    The numbers are overwritten by those of the next tile.
    """
    words, scales = (x.unflatten(0, (lanes, -1)) for x in (codes.words, codes.scales))
    length, most = words.shape[1], max(1, TILE // codes.dim)
    step = max(1, most // max(1, length))
    parts, room = _parts(codes), words.new_empty(0, dtype=torch.float32)
    for first in range(0, lanes, step):
        for start in range(0, length, most):
            where = slice(first, first + step), slice(start, start + most)
            some = words[where]
            if codes.lows is None:
                numbers = [codes.levels(some).unflatten(2, (-1, codes.form.group)).permute(2, 0, 1, 3)]
            else:
                total = sum(len(part.masks) * some[..., part.words].numel() for part in parts)
                room = room if len(room) >= total else room.new_empty(total)
                numbers = _numbers(some, parts, room)
            yield where, scales[where].permute(2, 0, 1).unsqueeze(2).float(), numbers


def _numbers(words: Tensor, parts: list[Part], room: Tensor) -> list[Tensor]:
    """By part, the numbers that bytes [l, b, W] hold, written to `room`: [J, l, b, w]."""
    found, start = [], 0
    for part in parts:
        some = words[..., part.words]
        shape = len(part.masks), some.shape[2] // part.width, *some.shape[:2], part.width
        into = room[start:start + len(part.masks) * some.numel()].view(shape)
        for plane, mask in zip(into, part.masks, strict=True):
            plane.copy_(_masked(some, mask).unflatten(2, (-1, part.width)).permute(2, 0, 1, 3))
        found.append(into.flatten(0, 1)[:len(part.units)])
        start += into.numel()
    return found


def _masked(words: Tensor, mask: int) -> Tensor:
    """`words & mask`, eight bytes at a time where they lie so."""
    if mask == 255:
        return words
    if words.is_contiguous() and words.shape[2] % 8 == 0 and words.storage_offset() % 8 == 0:
        return (words.view(torch.int64) & int.from_bytes([mask] * 8, signed=True)).view(torch.uint8)
    return words & mask
