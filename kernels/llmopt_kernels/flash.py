"""Sparse attention on the CPU by torch's flash kernel: what `sparse.sparse_partial` means, faster.

A tile of rows reads two pieces, each a product of the kernel that tells the sum of its softmax, so that they can be
merged: its local keys, a slice, under a mask that is alike for most tiles; and the keys before these, gathered, which
all of its rows see. A unit is what shares its keys: the query heads of a KV head as rows of one product, or one query
head where each has lists of its own. Units that read as much are computed together.
"""
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_kernels.partial import Partial, merged
from llmopt_kernels.reference import Rule

ROWS = 128          # whose local keys are computed at once


def fits(query: Tensor, keys: Tensor, values: Tensor, stripes, rule: Rule) -> bool:
    """True where `flash_partial` knows all that is asked for.

    Not: softcap, pooled keys, a sliding window that cuts something off, lists beside a window that differs by row, a
    tile that begins before its first local key.
    """
    begins = torch.arange(keys.shape[1] - query.shape[1], keys.shape[1], stripes.tile, device=query.device)
    return (query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)
            and query.dtype == keys.dtype == values.dtype and keys.shape[-1] == values.shape[-1]
            and not (torch.is_grad_enabled() and query.requires_grad)
            and rule.softcap is None and (rule.window is None or rule.window >= keys.shape[1])
            and stripes.pooled is None and not (stripes.start is None and stripes.has_lists)
            and (stripes.start is None or bool((stripes.start <= begins).all())))


def flash_partial(query: Tensor, keys: Tensor, values: Tensor, stripes, rule: Rule) -> tuple[Partial, Tensor]:
    """See `sparse.sparse_partial`: attention [H, T, D] with lse [H, T], and pairs [H]."""
    heads, tokens, _ = query.shape
    units = len(keys) if stripes.lists <= len(keys) else heads
    rows = query.unflatten(0, (units, -1))                                                   # [U, h, T, D]
    whole = Partial(query.new_zeros(rows.shape, dtype=torch.float32),
                    query.new_full(rows.shape[:3], -torch.inf, dtype=torch.float32))
    pairs, calls = torch.zeros(units, dtype=torch.int64), _Calls(keys, values, units, rule.scaling)
    for number, begin in enumerate(range(0, tokens, stripes.tile)):
        tile, row = rows[:, :, begin:begin + stripes.tile], begin + keys.shape[1] - tokens
        size = tile.shape[2]
        for piece in _pieces(stripes, number, (row, row + size), units):
            own = tile[piece.units]                                                          # [n, h, R, D]
            parts = [calls.far(own.flatten(1, 2), piece)] if piece.count else []
            if stripes.done is None:
                parts.append(calls.local(own, piece))
            for found in parts:
                at = piece.units, slice(None), slice(begin, begin + size)
                found = merged(Partial(whole.out[at], whole.lse[at]),
                               Partial(*(x.unflatten(1, (-1, size)) for x in (found.out, found.lse))))
                whole.out[at], whole.lse[at] = found.out, found.lse
            pairs[piece.units] += size * (piece.count + piece.known) + _local_pairs(piece)
    joined = Partial(whole.out.flatten(0, 1), whole.lse.flatten(0, 1))
    return joined if stripes.done is None else merged(stripes.done, joined), pairs.repeat_interleave(heads // units)


class _Piece(NamedTuple):
    """What some units of a tile read, as many keys each.

    units: int64 [n]. span: (first local key, end, first row). window, sinks: that cut the local keys of a row. places:
    int64 [n, count] of the keys before the local ones; None: they are the first `count` of all. known: sinks among the
    keys before the local ones that the selector has read itself.
    """

    units: Tensor
    span: tuple[int, int, int]
    window: int | None
    sinks: int
    count: int
    known: int
    places: Tensor | None


def _pieces(stripes, number: int, rows: tuple[int, int], units: int) -> Iterator[_Piece]:
    """The pieces of one tile, whose rows are those from rows[0] to rows[1] - 1."""
    local = stripes.local(number, rows[0])
    marks = stripes.marked(number, rows, max(first for first, _ in local)) if stripes.has_lists else None
    sinks = stripes.sinks if stripes.done is None else 0
    if marks is not None:
        marks[:, :stripes.sinks] = stripes.done is None
    together: dict[tuple[int, int | None, int], list[int]] = defaultdict(list)
    places: list[Tensor] = []
    for unit in range(units):
        first, window = local[unit * len(local) // units]
        if marks is not None:
            places.append(marks[unit * len(marks) // units, :first].nonzero().flatten())
        together[first, window, min(sinks, first) if marks is None else len(places[unit])].append(unit)
    for (first, window, count), alike in together.items():
        yield _Piece(torch.tensor(alike), (first, rows[1], rows[0]), window, stripes.sinks, count,
                     min(stripes.sinks, first) if stripes.done is not None else 0,
                     torch.stack([places[unit] for unit in alike]) if marks is not None and count else None)


def _local_pairs(piece: _Piece) -> int:
    """Pairs of the local keys with the rows of one head."""
    first, end, row = piece.span
    i = torch.arange(row, end)
    if piece.window is None:
        return int((i - first + 1).sum())
    begin = (i - piece.window + 1).clamp(min=first)
    return int((i - begin + 1 + (begin.clamp(max=piece.sinks) - first).clamp(min=0)).sum())


class _Calls:
    """The products of one call; masks are kept by what they depend on."""

    def __init__(self, keys: Tensor, values: Tensor, units: int, scaling: float):
        self.kv, self.scaling, self.units = (keys, values), scaling, units
        self.masks: dict[tuple[int | None, ...], Tensor] = {}

    def local(self, query: Tensor, piece: _Piece) -> Partial:
        """Attention of rows [n, h, R, D] to their keys from the first local one on, as [n, h R, D].

        A few rows at a time: what comes after the last of them is not computed.
        """
        first, _, row = piece.span
        found = []
        for at in range(0, query.shape[2], ROWS):
            some = query[:, :, at:at + ROWS]
            keys, values = (self._of(x[:, first:row + at + some.shape[2]], piece.units) for x in self.kv)
            part = self._product(some.flatten(1, 2), keys, values, self._mask(piece, row + at, some))
            found.append([x.unflatten(1, (query.shape[1], -1)) for x in (part.out, part.lse)])
        return Partial(*(torch.cat(parts, 2).flatten(1, 2) for parts in zip(*found, strict=True)))

    def _mask(self, piece: _Piece, row: int, rows: Tensor) -> Tensor:
        """[h R, local keys], 0 where one of the rows [n, h, R, D] from `row` on reads, -inf elsewhere."""
        first, size, sinks = piece.span[0], rows.shape[2], max(0, piece.sinks - piece.span[0])
        key = first - row, size, sinks, piece.window
        if key not in self.masks:
            i, j = torch.arange(size)[:, None], torch.arange(first - row, size)
            seen = j <= i
            if piece.window is not None:
                seen &= (i - j < piece.window) | (j - j[0] < sinks)
            self.masks[key] = torch.zeros(seen.shape, dtype=rows.dtype).masked_fill_(~seen, -torch.inf).repeat(
                rows.shape[1], 1)
        return self.masks[key]

    def far(self, query: Tensor, piece: _Piece) -> Partial:
        """Attention of rows [n, h R, D] to the keys before those."""
        if piece.places is None:
            return self._product(query, *(self._of(x[:, :piece.count], piece.units) for x in self.kv), None)
        owners = (piece.units * len(self.kv[0]) // self.units).tolist()
        return self._product(query, *(torch.stack([x[own].index_select(0, at) for own, at in zip(
            owners, piece.places, strict=True)]) for x in self.kv), None)

    def _of(self, x: Tensor, units: Tensor) -> Tensor:
        """[G, C, D] -> [n, C, D], the keys of these units."""
        return x if len(units) == len(x) == self.units else x[units * len(x) // self.units]

    def _product(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Partial:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], keys[None], values[None], 0.0, False, attn_mask=mask, scale=self.scaling)
        return Partial(out[0].float(), lse[0])
