"""Lines through the map of attention by torch's flash kernel: columns, and distances, that all tiles of rows read.

A unit is a KV head with its h query heads, or a query head with lines of its own. Columns in order are gathered once: a
long run of tiles reads the first so many of them. Distances reach the same places before each tile, so that many tiles
are one call. Of keys that are read in any case, or by a column, distances read nothing again.
"""
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmopt_kernels.partial import Partial, by_flash, merge_into

KEYS = 32               # in multiples of which the kernel is fast
AT_ONCE = 1 << 20       # numbers of the keys of one call, about: what the processor's cache holds
LONG = 1 << 19          # pairs of rows and columns at once, about


def add_verticals(whole: Partial, query: Tensor, keys: Tensor, values: Tensor, stripes, scaling: float,
                  pairs: Tensor) -> None:
    """Merge attention to the columns before each tile's local keys into `whole` [H, T, D]; pairs [H] are counted."""
    units, tile = len(keys) if len(stripes.verticals) <= len(keys) else len(query), stripes.tile
    given, out, lse, counted = (x.unflatten(0, (units, -1)) for x in (query, whole.out, whole.lse, pairs))
    heads = given.shape[1]
    for unit, (own, starts) in enumerate(zip(stripes.everywhere(units, keys.shape[1]), stripes.starts(units),
                                             strict=True)):
        columns = own.nonzero().squeeze(1)
        step = max(1, LONG // (tile * heads * max(1, len(columns))))
        filled = pad(columns, (0, -len(columns) % KEYS))
        read = [x[unit * len(x) // units].index_select(0, filled)[None, None] for x in (keys, values)]
        for number, ends in enumerate(torch.searchsorted(columns, starts).split(step)):
            part = slice(number * step * tile, min((number + 1) * step * tile, query.shape[1]))
            seen = ends.repeat_interleave(tile)[:part.stop - part.start]                              # by row
            counted[unit] += seen.sum()
            count = -(-int(ends.max()) // KEYS) * KEYS
            if count:
                mask = _mask(torch.arange(count) < seen[:, None], query.dtype).repeat(heads, 1)
                got = by_flash(given[unit, :, part].flatten(0, 1)[None, None], *(x[:, :, :count] for x in read),
                               scaling, mask)
                got.lse.masked_fill_((seen == 0).repeat(heads), -torch.inf)
                merge_into(out, lse, (slice(unit, unit + 1), slice(None), part), got)


def add_slashes(whole: Partial, query: Tensor, keys: Tensor, values: Tensor, stripes, scaling: float,
                pairs: Tensor) -> None:
    """The same with the keys that the distances name, as far as they stand before each tile's local ones."""
    units, tokens = len(keys) if stripes.lists <= len(keys) else len(query), query.shape[1]
    far = stripes.diagonals.repeat_interleave(units // len(stripes.diagonals), 0)
    free = ~stripes.everywhere(units, keys.shape[1])
    free[:, :stripes.sinks] = False
    even = tokens // stripes.tile * stripes.tile
    for begin, end, size in ((0, even, stripes.tile), (even, tokens, tokens - even)):        # the rest is a tile, too
        if begin == end:
            continue
        places = torch.arange(begin, end, size) + keys.shape[1] - tokens
        starts = stripes.starts(units)[:, begin // stripes.tile:][:, :len(places)]
        for unit in range(units):
            part = _Unit(*(x.unflatten(0, (units, -1))[unit, :, begin:end] for x in (query, whole.out, whole.lse)),
                         *(x[unit * len(x) // units] for x in (keys, values)))
            counted = part.add(far[unit][far[unit] >= 0], places, starts[unit], free[unit], size, scaling)
            pairs.unflatten(0, (units, -1))[unit] += counted


class _Unit(NamedTuple):
    """Query rows [h, T, D] of whole tiles, with what they have found, and their keys and values [S, D]."""

    query: Tensor
    out: Tensor
    lse: Tensor
    keys: Tensor
    values: Tensor

    def add(self, far: Tensor, places: Tensor, starts: Tensor, free: Tensor, size: int, scaling: float) -> int:
        """Merge in the keys `far` before some row of their tiles, which stand at `places`; the pairs of a head."""
        before = (far[:, None] - torch.arange(size)).flatten().unique()                # places of keys before a tile
        before, count = before[before > 0], 0
        step = max(1, AT_ONCE // max(1, len(before) * self.keys.shape[1]))
        for at in range(0, len(places), step):
            some = places[at:at + step, None]
            reach = before[before <= some[-1]]
            index = some - pad(reach, (0, -len(reach) % KEYS))               # [n, C], filled up with rows' own places
            seen = (index >= 0) & (index < starts[at:at + step, None]) & free[index.clamp(min=0)]
            if bool(seen.any()):
                count += int(seen.sum()) * size
                self._merge(slice(at * size, (at + len(some)) * size), index.clamp(min=0), seen, scaling)
        return count

    def _merge(self, part: slice, index: Tensor, seen: Tensor, scaling: float) -> None:
        """The rows `part` of n tiles read the keys index [n, C], where they are seen."""
        rows = self.query[:, part].unflatten(1, (len(index), -1)).transpose(0, 1)                  # [n, h, R, D]
        read = [x.index_select(0, index.flatten()).view(len(index), 1, -1, x.shape[1])
                for x in (self.keys, self.values)]
        got = by_flash(rows.flatten(1, 2).unsqueeze(1), *read, scaling, _mask(seen, rows.dtype)[:, None, None])
        got.lse.masked_fill_(~seen.any(1)[:, None, None], -torch.inf)
        out, lse = (x.view(rows.shape[:3] + x.shape[3:]).transpose(0, 1).flatten(1, 2)[None]
                    for x in (got.out, got.lse))
        merge_into(self.out[None], self.lse[None], (slice(None), slice(None), part), Partial(out, lse))


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
