"""Sparse attention on the CPU by torch's flash kernel: what `sparse.sparse_partial` means, faster.

First every row meets its local keys: tiles of rows whose local keys lie alike are one call of the kernel, under one
mask, over pieces of the keys that overlap in memory and are not copied. Then the keys before the local ones, which all
rows of a tile see: the first keys of all, gathered ones, or lines (lines.py). Each call tells the sum of its softmax,
by which its result is merged into what there is. U units share their keys: KV heads, h query heads each, whose rows
are rows of one product; or query heads, where each has lists of its own.

The kernel is faster where keys come in multiples of 32 (bfloat16: by a third): keys that nobody reads fill them up.
"""
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmopt_kernels.lines import AT_ONCE, KEYS, add_slashes, add_verticals
from llmopt_kernels.partial import Partial, by_flash, merge_into
from llmopt_kernels.reference import Rule

TYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 64               # of each head, whose local keys are computed at once, of less than four heads twice as many


def fits(query: Tensor, keys: Tensor, values: Tensor, stripes, rule: Rule) -> bool:
    """True where `flash_partial` knows all that is asked for.

    Not: softcap, pooled keys, a sliding window that cuts something off, lists beside a window that differs by row, a
    tile that begins before its first local key.
    """
    begins = torch.arange(keys.shape[1] - query.shape[1], keys.shape[1], stripes.tile, device=query.device)
    return (query.device.type == "cpu" and query.dtype in TYPES
            and query.dtype == keys.dtype == values.dtype and keys.shape[-1] == values.shape[-1]
            and not (torch.is_grad_enabled() and query.requires_grad)
            and rule.softcap is None and (rule.window is None or rule.window >= keys.shape[1])
            and stripes.pooled is None
            and not (stripes.start is None and (stripes.has_lists or stripes.verticals is not None))
            and (stripes.start is None or bool((stripes.start <= begins).all())))


def flash_partial(query: Tensor, keys: Tensor, values: Tensor, stripes, rule: Rule) -> tuple[Partial, Tensor]:
    """See `sparse.sparse_partial`: attention [H, T, D], of the queries' type, with lse [H, T] fp32; and pairs [H]."""
    heads, tokens, _ = query.shape
    whole = (Partial(torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32))
             if stripes.done is None else Partial(stripes.done.out.clone(), stripes.done.lse.clone()))
    pairs, lines = torch.zeros(heads, dtype=torch.int64), stripes
    if stripes.columns is None and stripes.blocks is None:
        stripes = replace(stripes, diagonals=None)              # slashes by themselves are no lists of single tiles
    for part in _parts(stripes, len(keys), heads):
        spans = part.spans(query.shape, keys.shape[1], stripes.tile)
        if stripes.done is None:
            given, out, lse = (x.unflatten(0, (part.of, -1)) for x in (query, whole.out, whole.lse))
            base = _Base(part.own(given), *(part.shared(x) for x in (keys, values)), rule.scaling,
                         Partial(part.own(out), part.own(lse)))
            base.add_local(spans, part.window, 0 if stripes.has_lists else stripes.sinks)
            if not stripes.has_lists:
                base.add_first(spans, stripes.sinks)
            if part.units is not None:
                out[part.units], lse[part.units] = base.found.out, base.found.lse
        pairs.unflatten(0, (part.of, -1))[slice(None) if part.units is None else part.units] += _base_pairs(
            spans, part.window, stripes.sinks)
    if stripes.has_lists:
        _add_listed(whole, query, keys, values, stripes, rule.scaling, pairs)
    elif lines.diagonals is not None:
        add_slashes(whole, query, keys, values, lines, rule.scaling, pairs)
    if lines.verticals is not None:
        add_verticals(whole, query, keys, values, lines, rule.scaling, pairs)
    return whole, pairs


class _Span(NamedTuple):
    """Query rows from `begin` on, of which the first stands at `row`.

    first: the first local key of that one; read: the first key that is looked at.
    """

    begin: int
    size: int
    row: int
    first: int
    read: int


class _Part(NamedTuple):
    """Some units of `of` in all, or all (None), that share a window, or else the first local key of each tile."""

    of: int
    units: Tensor | None
    window: int | None
    starts: Sequence[int]

    def own(self, x: Tensor) -> Tensor:
        """Their part of what is given by unit."""
        return x if self.units is None else x[self.units]

    def shared(self, x: Tensor) -> Tensor:
        """Keys or values [G, S, D] by unit."""
        return x if self.units is None else x[self.units * len(x) // self.of]

    def spans(self, shape: Sequence[int], total: int, tile: int) -> list[_Span]:
        """All rows of queries [H, T, D], as many at once as their tile divides well into."""
        heads, tokens, offset = shape[0] // self.of, shape[1], total - shape[1]
        most = ROWS if heads >= 4 else 2 * ROWS
        whole = min(tile, tokens) if self.window is None else most
        size = max((n for n in range(1, most + 1) if whole % n == 0), default=1)
        size = size if 4 * size >= min(most, whole) else whole
        return [self._span(begin, min(size, tokens - begin), begin + offset, tile) for begin in range(0, tokens, size)]

    def _span(self, begin: int, size: int, row: int, tile: int) -> _Span:
        first = max(0, row - self.window + 1) if self.window is not None else self.starts[begin // tile]
        fill = -(row + size - first) % KEYS
        return _Span(begin, size, row, first, first - fill if first >= fill else first)


def _parts(stripes, groups: int, heads: int) -> list[_Part]:
    """Units that begin alike: all KV heads together, where they can be."""
    local = stripes.window if stripes.start is None else stripes.start
    given = local.tolist() if isinstance(local, Tensor) else local
    lists = given if isinstance(given, list) and (stripes.start is None or isinstance(given[0], list)) else [given]
    units = groups if len(lists) <= groups else heads
    alike: dict[int | tuple[int, ...], list[int]] = defaultdict(list)
    for unit in range(units):
        one = lists[unit * len(lists) // units]
        alike[tuple(one) if isinstance(one, list) else one].append(unit)
    together = len(alike) == 1
    return [_Part(groups if together else units, None if together else torch.tensor(members),
                  None if isinstance(one, tuple) else one, one if isinstance(one, tuple) else ())
            for one, members in alike.items()]


def _base_pairs(spans: list[_Span], window: int | None, sinks: int) -> int:
    """Pairs of the base, for one head."""
    last = spans[-1]
    i = torch.arange(spans[0].row, last.row + last.size)
    if window is None:
        begin = torch.tensor([span.first for span in spans]).repeat_interleave(torch.tensor([s.size for s in spans]))
    else:
        begin = (i - window + 1).clamp(min=0)
    return int((i - begin + 1 + begin.clamp(max=sinks)).sum())


class _Base(NamedTuple):
    """Queries [U, h, T, D] of units, their keys and values [U, S, D], and what has been found: [U, h, T, D], [U, h, T].
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    found: Partial

    def add_local(self, spans: list[_Span], window: int | None, sinks: int) -> None:
        """Attention of all rows to their keys from the first local one on."""
        alike: dict[tuple[int, int, int, int], list[_Span]] = defaultdict(list)
        for span in spans:
            alike[span.row - span.read, span.size, max(0, sinks - span.read), span.first - span.read].append(span)
        units, heads, _, dim = self.query.shape
        for (before, size, near, gap), same in alike.items():
            mask = _mask(before, size, near, window, gap, self.query.dtype).repeat(heads, 1)
            for run, step in _in_steps(same, max(1, AT_ONCE // (units * (before + size) * dim))):
                rows = _pieces(self.query, run[0].begin, size, step, len(run)).flatten(2, 3)       # [n, U, h R, D]
                keys, values = (_pieces(x, run[0].read, before + size, step, len(run))
                                for x in (self.keys, self.values))
                got = by_flash(rows, keys, values, self.scaling, mask)
                for whole, x in ((self.found.out, got.out), (self.found.lse.unsqueeze(-1), got.lse.unsqueeze(-1))):
                    _pieces(whole, run[0].begin, size, step, len(run)).copy_(x.unflatten(2, (heads, size)))

    def add_first(self, spans: list[_Span], sinks: int) -> None:
        """Attention to the first keys of all, as far as they are not local."""
        for count, same in groupby(spans, lambda span: min(sinks, span.read)):
            rows = list(same)
            for some in (rows[at:at + 8] for at in range(0, len(rows) if count else 0, 8)):
                part = slice(some[0].begin, some[-1].begin + some[-1].size)
                got = by_flash(self.query[:, :, part].flatten(1, 2)[None], self.keys[None, :, :count],
                                 self.values[None, :, :count], self.scaling)
                merge_into(self.found.out, self.found.lse, (slice(None), slice(None), part), got)


def _mask(before: int, size: int, near: int, window: int | None, gap: int, dtype: torch.dtype) -> Tensor:
    """[size, before + size], 0 where a row reads, else -inf.

    near: keys that all rows read, as first ones; gap: keys before the first local one, which no row reads besides.
    """
    i, j = torch.arange(before, before + size)[:, None], torch.arange(before + size)
    local = j >= gap if window is None else i - j < window
    return torch.zeros(size, before + size, dtype=dtype).masked_fill_((j > i) | ~(local | (j < near)), -torch.inf)


def _in_steps(spans: list[_Span], most: int) -> Iterator[tuple[list[_Span], int]]:
    """Runs of at most so many spans that are equally far apart, and how far."""
    run, step = spans[:1], spans[0].size
    for span in spans[1:]:
        apart = span.begin - run[-1].begin
        if len(run) == most or (len(run) > 1 and apart != step):
            yield run, step
            run = []
        step = apart if len(run) == 1 else step
        run.append(span)
    yield run, step


def _pieces(x: Tensor, begin: int, size: int, step: int, count: int) -> Tensor:
    """[..., N, D] -> [count, ..., size, D], a view: pieces that begin `step` apart."""
    return x[..., begin:begin + (count - 1) * step + size, :].unfold(-2, size, step).transpose(-1, -2).movedim(-3, 0)


def _add_listed(whole: Partial, query: Tensor, keys: Tensor, values: Tensor, stripes, scaling: float,
                pairs: Tensor) -> None:
    """Merge attention of each tile to the keys that its lists name before its local ones, the first keys among them."""
    units, offset = len(keys) if stripes.lists <= len(keys) else len(query), keys.shape[1] - query.shape[1]
    given, out, lse, counted = (x.unflatten(0, (units, -1)) for x in (query, whole.out, whole.lse, pairs))
    lists, grain = _in_grains(stripes)
    flat = [_runs(x, grain) for x in (keys, values)]
    owner = torch.arange(units) * len(keys) // units * (keys.shape[1] // grain)
    starts, everywhere = lists.starts(units), lists.everywhere(units, keys.shape[1])
    for number, (first, of_unit) in enumerate(zip(starts.T, starts.T.tolist(), strict=True)):
        part = slice(number * stripes.tile, min((number + 1) * stripes.tile, query.shape[1]))
        marks = lists.marked(number, (part.start + offset, part.stop + offset), max(of_unit))
        marks[:, :lists.sinks] = stripes.done is None
        marks = marks if len(marks) == units else marks.repeat_interleave(units // len(marks), 0)
        marks &= ~everywhere[:, :marks.shape[1]]
        if len(set(of_unit)) > 1:
            marks &= torch.arange(marks.shape[1]) < first[:, None]
        counts = marks.sum(1)
        known = first.clamp(max=lists.sinks) if stripes.done is None else 0
        counted += ((counts - known) * grain * (part.stop - part.start))[:, None]
        for some, places, mask in _alike(marks, counts, grain, query.dtype):
            read = [x.index_select(0, (places + owner[some, None]).flatten()).view(1, len(places), -1, keys.shape[-1])
                    for x in flat]
            got = by_flash(given[some, :, part].flatten(1, 2)[None], *read, scaling, mask)
            merge_into(out, lse, (some, slice(None), part), got)


def _in_grains(stripes) -> tuple[Any, int]:
    """Stripes counted in runs of so many keys that are listed all together or not at all: whole blocks, or single keys.
    """
    single = any(x is not None for x in (stripes.columns, stripes.diagonals, stripes.verticals))
    whole = not single and stripes.sinks % stripes.block == 0
    if not whole or bool((stripes.start % stripes.block != 0).any()):
        return stripes, 1
    return replace(stripes, columns=stripes.blocks, blocks=None, start=stripes.start // stripes.block,
                   sinks=stripes.sinks // stripes.block), stripes.block


def _runs(x: Tensor, grain: int) -> Tensor:
    """[G, S, D] -> [G S / grain, grain D]; what is left over at the end of S is listed by nobody."""
    return x[:, :x.shape[1] // grain * grain].unflatten(1, (-1, grain)).flatten(2).flatten(0, 1)


def _alike(marks: Tensor, counts: Tensor, grain: int,
           dtype: torch.dtype) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """Units that read about as many of the grains marked [U, S]: (which, their places [n, C], a mask of what fills up).
    """
    step = KEYS // math.gcd(KEYS, grain)
    unit, place = marks.nonzero().T
    filled = -(-counts // step) * step
    places = torch.zeros(len(counts), int(filled.max()), dtype=torch.int64)
    places[unit, torch.arange(len(unit)) - (counts.cumsum(0) - counts)[unit]] = place
    sizes = sorted(set(filled.tolist()))
    for size in sizes if sizes[0] else sizes[1:]:
        some = slice(None) if len(sizes) == 1 else (filled == size).nonzero().flatten()
        beyond = torch.arange(size * grain) >= counts[some, None] * grain
        mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)[None, :, None]
        yield some, places[some, :size], mask if bool(beyond.any()) else None
