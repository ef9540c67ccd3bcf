"""What sparse attention means, in plain torch: which keys a tile of query rows reads, and attention over those alone.

Notation as in `reference.py`; X lists of keys, one per KV head (X = G) or per query head (X = H).
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from llmopt_kernels.flash import fits, flash_partial
from llmopt_kernels.partial import Partial, merged, sunk, weighted
from llmopt_kernels.reference import NONE, Rule


@dataclass(frozen=True)
class Pooled:
    """Stand-ins for runs of far keys: a mean key and value with the logarithm of how many they stand for.

    keys [X, P, D], values [X, P, D], log_counts [X, P] fp32; ends: int64 [P], last key that each one stands for. Row i
    reads those that end before its first local key; that none of their keys is listed too is the selector's business.
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Stripes:
    """The keys that each row tile reads: a dense base of `sinks` first and some local ones, chosen columns and blocks.

    window: row i reads the local keys from i - window + 1 on; int64 [X]: each head has its own.
    start: instead of a window, the first local key of each row tile: int64 [tiles], or [X, tiles] by head.
    columns: int64 [X, tiles, C], in any order, NONE as filler; None: no columns.
    blocks: int64 [X, tiles, K], n standing for the keys from n * block to (n + 1) * block - 1; NONE as filler.
    diagonals: int64 [X, S], distances: a tile reads every key that is so far before one of its rows; NONE as filler.
    verticals: int64 [X, V], columns that all tiles read; NONE as filler.
    tile: number of query rows that share one list. A key named twice counts once, a key after its row not at all.
    done: attention over the base, out [H, T, D] and lse [H, T], where the selector has computed it already: it is
    merged with what the lists give, and not computed again.
    """

    sinks: int
    window: int | Tensor | None = None
    columns: Tensor | None = None
    tile: int = 128
    blocks: Tensor | None = None
    block: int = 64
    pooled: Pooled | None = None
    start: Tensor | None = None
    done: Partial | None = None
    diagonals: Tensor | None = None
    verticals: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.window is None) == (self.start is None):
            raise ValueError("Stripes: exactly one of window and start")

    @property
    def has_lists(self) -> bool:
        """True if keys are named tile by tile besides the base."""
        return any(x is not None for x in (self.columns, self.blocks, self.diagonals))

    @property
    def lists(self) -> int:
        """The largest X."""
        given = (self.columns, self.blocks, self.diagonals, self.verticals,
                 self.window if isinstance(self.window, Tensor) else None,
                 self.start if self.start is not None and self.start.ndim > 1 else None)
        return max((len(x) for x in given if x is not None), default=1)

    def starts(self, units: int) -> Tensor:
        """The first local keys, [U, tiles]."""
        given = self.start.reshape(-1, self.start.shape[-1])
        return given.repeat_interleave(units // len(given), 0)

    def everywhere(self, units: int, total: int) -> Tensor:
        """bool [U, total]: the keys that all tiles read as verticals, the first `sinks` left out."""
        if self.verticals is None:
            return torch.zeros(units, total, dtype=torch.bool)
        found = torch.zeros(len(self.verticals), total + 1, dtype=torch.bool)                # the last one: fillers
        inside = (self.verticals != NONE) & (self.verticals < total)
        found.scatter_(1, self.verticals.where(inside, total), True)
        found[:, :self.sinks] = False
        return found[:, :total].repeat_interleave(units // len(found), 0)

    def about(self, tokens: int, total: int) -> float:
        """Pairs of a head, about: what lists, lines and base name twice counts twice."""
        rows = torch.arange(total - tokens, total)
        begins = rows[::self.tile]
        if self.start is not None:
            first = self.start.reshape(-1, len(begins)).cpu().repeat_interleave(self.tile, 1)[:, :tokens]
        else:
            first = (rows - torch.as_tensor(self.window).cpu().reshape(-1, 1) + 1).clamp(min=0)
        base = (rows + 1 - first + first.clamp(max=self.sinks)).clamp(min=0).double().sum(1).mean()
        tile = min(self.tile, tokens)
        named = [(x, each) for x, each in ((self.columns, tile), (self.blocks, tile * self.block)) if x is not None]
        lists = sum(int((x != NONE).sum()) / len(x) * each for x, each in named)
        return float(base) + lists + self._lines(begins.tolist(), total)

    def _lines(self, begins: list[int], total: int) -> float:
        """Pairs of a head with columns of all tiles and, before the tiles that begin there, with distances."""
        pairs = 0.0
        if self.verticals is not None:
            below = total - self.verticals.where(self.verticals != NONE, total).clamp(min=begins[0])
            pairs += int(below.clamp(min=0).sum()) / len(self.verticals)
        if self.diagonals is not None:
            rows = [min(self.tile, total - begin) for begin in begins]
            reach = self._reach(total).cumsum(1)[:, begins].cpu().double()                  # places before each tile
            pairs += float((reach @ torch.tensor(rows, dtype=torch.float64)).mean())
        return pairs

    def _reach(self, total: int) -> Tensor:
        """bool [X, total]: is what stands so far before a whole tile reached by a distance of one of its rows?"""
        far = self.diagonals.where((self.diagonals != NONE) & (self.diagonals < total + self.tile), total + self.tile)
        steps = torch.zeros(len(far), total + 2 * self.tile, dtype=torch.int32, device=far.device)
        for places, by in (((far - self.tile + 1).clamp(min=0), 1), (far + 1, -1)):
            steps.scatter_add_(1, places, torch.full_like(places, by, dtype=torch.int32))
        found = steps.cumsum(1)[:, :total] > 0
        found[:, :1] = False
        return found

    def spelled(self, tokens: int) -> "Stripes":
        """The same with the verticals among the columns of each tile, of a prompt of so many query rows."""
        if self.verticals is None:
            return self
        everywhere = self.verticals.unsqueeze(1).expand(-1, -(-tokens // self.tile), -1)
        given = [everywhere] if self.columns is None else _as_many([self.columns, everywhere])
        return replace(self, columns=torch.cat(given, -1), verticals=None)

    def local(self, number: int, row: int) -> list[tuple[int, int | None]]:
        """(first local key, window) of a tile whose first row is at `row`: one pair for all heads, or one for each X.

        Without a window all rows of the tile begin at the first key.
        """
        if self.start is not None:
            return [(first, None) for first in self.start[..., number].reshape(-1).tolist()]
        windows = [self.window] if isinstance(self.window, int) else self.window.tolist()
        return [(max(0, row - window + 1), window) for window in windows]

    def marked(self, number: int, rows: tuple[int, int], total: int) -> Tensor:
        """The listed keys below `total`: bool [X, total]. rows: places of the tile's first row and of its end."""
        found = torch.zeros(self.lists, total + 1, dtype=torch.bool, device=self._device)    # the last one: fillers
        if self.columns is not None:
            keys = _repeated(self.columns[:, number], self.lists)
            found.scatter_(1, keys.masked_fill((keys == NONE) | (keys > total), total), True)
        if self.blocks is not None:
            count = -(-total // self.block)
            picked = _repeated(self.blocks[:, number], self.lists)
            whole = torch.zeros(self.lists, count + 1, dtype=torch.bool, device=self._device)
            whole.scatter_(1, picked.masked_fill((picked == NONE) | (picked > count), count), True)
            found[:, :total] |= whole[:, :count].repeat_interleave(self.block, 1)[:, :total]
        if self.diagonals is not None:
            far = self.diagonals.masked_fill(self.diagonals == NONE, rows[1] + total)
            ends = [_repeated((edge - far).clamp(0, total), self.lists) for edge in rows]
            steps = torch.zeros(self.lists, total + 1, dtype=torch.int32, device=self._device)
            for places, by in zip(ends, (1, -1), strict=True):
                steps.scatter_add_(1, places, torch.full_like(places, by, dtype=torch.int32))
            found[:, :total] |= steps.cumsum(1)[:, :total] > 0
        return found[:, :total]

    @property
    def _device(self) -> torch.device:
        return next(x.device for x in (self.columns, self.blocks, self.diagonals) if x is not None)

    def listed(self, number: int, total: int, rows: Tensor) -> Tensor | None:
        """The keys below `total` that the lists name for one tile, each once: int64 [X, C], NONE as filler.

        rows: int64 [R], the places of its queries.
        """
        lists = [] if self.columns is None else [self.columns[:, number]]
        if self.blocks is not None:
            picked = self.blocks[:, number].unsqueeze(-1)                            # [X, K, 1]
            inside = torch.arange(self.block, device=picked.device)
            lists.append((picked * self.block + inside).masked_fill(picked == NONE, NONE).flatten(1))
        if self.diagonals is not None:
            along = rows - self.diagonals.unsqueeze(-1)                                  # [X, S, R]
            lists.append(along.masked_fill((self.diagonals == NONE).unsqueeze(-1) | (along < 0), NONE).flatten(1))
        if not lists:
            return None
        joined = torch.cat(_as_many(lists), 1)
        keys = joined.masked_fill(joined >= total, NONE).sort(-1).values
        again = torch.nn.functional.pad(keys[:, 1:] == keys[:, :-1], (1, 0))
        return keys.masked_fill(again, NONE)


def sparse_attention(query: Tensor, keys: Tensor, values: Tensor, stripes: Stripes,
                     rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention over the base and the listed keys only, gathered tile by tile: [H, T, D] and computed pairs [H].

    query [H, T, D], keys and values [G, S, D]; the queries are the last T of the S tokens.
    """
    part, pairs = sparse_partial(query, keys, values, stripes, rule)
    return sunk(part, rule).out.to(query.dtype), pairs


def sparse_partial(query: Tensor, keys: Tensor, values: Tensor, stripes: Stripes,
                   rule: Rule) -> tuple[Partial, Tensor]:
    """As `sparse_attention` without sinks, fit to be merged with other keys; out is fp32, or as the query is."""
    if _for_triton(query):
        from llmopt_kernels import sparse_on_gpu  # Triton is not everywhere

        if sparse_on_gpu.fits(query, keys, values, stripes, rule):
            return sparse_on_gpu.triton_partial(query, keys, values, stripes.spelled(query.shape[1]), rule)
    if fits(query, keys, values, stripes, rule):
        return flash_partial(query, keys, values, stripes, rule)
    return by_gathering(query, keys, values, stripes, rule)


def _for_triton(query: Tensor) -> bool:
    return query.is_cuda and has_triton()


def by_gathering(query: Tensor, keys: Tensor, values: Tensor, stripes: Stripes,
                 rule: Rule) -> tuple[Partial, Tensor]:
    """What `sparse_partial` means, for all rules and devices."""
    stripes = stripes.spelled(query.shape[1])
    out = query.new_empty(*query.shape[:2], values.shape[-1], dtype=torch.float32)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    pairs = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    for tile in _tiles(query, keys, stripes):
        heads = tile.index(len(query))
        got, count = _attend(query[heads, tile.part], _read(tile, (keys, values), stripes, rule), rule)
        out[heads, tile.part], lse[heads, tile.part] = got.out, got.lse
        pairs[heads] += count if stripes.done is None else count + _base_pairs(tile, stripes.sinks, rule)
    part = Partial(out, lse)
    return (part if stripes.done is None else merged(stripes.done, part)), pairs


@dataclass(frozen=True)
class _Tile:
    """The rows of one tile, for those of `of` lists whose local keys begin alike; lists: int64 [n], None for all."""

    number: int
    part: slice                 # of the queries
    rows: Tensor                # int64 [R], their positions
    first: Tensor               # int64 [R], the first local key of each; ascending
    bounds: tuple[int, int]     # the first of `rows` and of `first`
    of: int
    lists: Tensor | None

    def index(self, count: int) -> slice | Tensor:
        """The heads, of `count`, that belong to these lists; where lists share a head, it is named once for each."""
        if self.lists is None:
            return slice(None)
        if count <= self.of:
            return self.lists * count // self.of
        each = count // self.of
        return (self.lists.unsqueeze(1) * each + torch.arange(each, device=self.lists.device)).flatten()

    def in_base(self, keys: Tensor, sinks: int) -> Tensor:
        """Is key j [..., C], not after its row, part of the dense base of row i [R]? bool [..., R, C]."""
        keys = keys.unsqueeze(-2)
        return (keys < sinks) | (keys >= self.first.unsqueeze(-1))


def _tiles(query: Tensor, keys: Tensor, stripes: Stripes) -> Iterator[_Tile]:
    """Every tile of rows, once for each different local part among the lists."""
    tokens, offset = query.shape[1], keys.shape[1] - query.shape[1]
    for number, begin in enumerate(range(0, tokens, stripes.tile)):
        part = slice(begin, min(begin + stripes.tile, tokens))
        rows = torch.arange(part.start + offset, part.stop + offset, device=query.device)
        local = stripes.window if stripes.start is None else stripes.start[..., number]
        for value, of, lists in _alike(local):
            lowest = value if stripes.start is not None else begin + offset - value + 1
            first = torch.full_like(rows, value) if stripes.start is not None else rows - value + 1
            yield _Tile(number, part, rows, first, (begin + offset, lowest), of, lists)


def _alike(local: int | Tensor) -> list[tuple[int, int, Tensor | None]]:
    """(value, number of lists, those that have it) of a number, or of one number for each list [X]."""
    values = local if isinstance(local, int) else local.tolist()
    if isinstance(values, int) or len(set(values)) == 1:
        return [(values if isinstance(values, int) else values[0], 1, None)]
    return [(value, len(values), (local == value).nonzero().squeeze(1)) for value in sorted(set(values))]


Read = tuple[Tensor, Tensor, Tensor, Tensor | None]    # keys, values [X, C, D], visible [X, R, C], bias [X, C] or None


def _read(tile: _Tile, kv: tuple[Tensor, Tensor], stripes: Stripes, rule: Rule) -> list[Read]:
    """All that a tile still has to read: the base, the lists, the pooled keys."""
    read = [_base_keys(tile, kv, stripes, rule)]
    extra = stripes.listed(tile.number, kv[0].shape[1], tile.rows)
    if extra is not None:
        extra = extra[tile.index(len(extra))]
        owner = torch.arange(len(kv[0]), device=extra.device)[tile.index(len(kv[0]))]
        owner = owner[torch.arange(len(extra), device=extra.device) * len(owner) // len(extra)].unsqueeze(1)
        far = rule.visible(tile.rows, extra) & ~tile.in_base(extra, stripes.sinks)
        read.append((kv[0][owner, extra.clamp(min=0)], kv[1][owner, extra.clamp(min=0)], far, None))
    if stripes.pooled is not None:
        pooled = stripes.pooled
        keys, values, bias = (x[tile.index(len(x))] for x in (pooled.keys, pooled.values, pooled.log_counts))
        read.append((keys, values, (pooled.ends < tile.first.unsqueeze(-1)).unsqueeze(0), bias))
    return read


def _base_keys(tile: _Tile, kv: tuple[Tensor, Tensor], stripes: Stripes, rule: Rule) -> Read:
    """The dense base of a tile, sinks and then local keys; none of it where it has been computed already."""
    row, lowest = tile.bounds
    reach = 0 if rule.window is None else max(0, row - rule.window + 1)
    local = max(reach, lowest)
    spans = [(reach, min(stripes.sinks, local)), (local, row + len(tile.rows))] if stripes.done is None else []
    spans = [(begin, end) for begin, end in spans if begin < end] or [(0, 0)]
    columns = torch.cat([torch.arange(*span, device=tile.rows.device) for span in spans])
    near = (rule.visible(tile.rows, columns) & tile.in_base(columns, stripes.sinks)).unsqueeze(0)    # [1, R, C]
    at = tile.index(len(kv[0]))
    keys, values = (torch.cat([x[at, begin:end] for begin, end in spans], 1) for x in kv)
    return keys, values, near, None


def _base_pairs(tile: _Tile, sinks: int, rule: Rule) -> Tensor:
    """Pairs of a tile's base, for one head."""
    after = tile.rows + 1
    reach = torch.zeros_like(after) if rule.window is None else (after - rule.window).clamp(min=0)
    local = torch.minimum(torch.maximum(tile.first, reach), after)
    return (after - local + (local.clamp(max=sinks) - reach).clamp(min=0)).sum()


def _attend(query: Tensor, read: list[Read], rule: Rule) -> tuple[Partial, Tensor]:
    """Attention of one tile [H, R, D] over what it reads, and the pairs [H] that this took."""
    keys, values, seen, bias = read[0] if len(read) == 1 else _joined(read)
    logits = rule.logits(query.unflatten(0, (len(keys), -1)), keys.unsqueeze(1))         # [X, h, R, C]
    if bias is not None:
        logits = logits + bias[:, None, None]
    got = weighted(logits, values.unsqueeze(1), seen.unsqueeze(1))
    count = seen.sum((-1, -2)).expand(len(keys)).repeat_interleave(len(query) // len(keys))
    return Partial(got.out.flatten(0, 1), got.lse.flatten(0, 1)), count


def _joined(read: list[Read]) -> Read:
    """Several pieces as one, for as many heads as the most finely chosen of them."""
    keys, values = (torch.cat(_as_many([piece[k] for piece in read]), 1) for k in (0, 1))
    most = len(keys)
    visible = torch.cat([_repeated(piece[2], most) for piece in read], -1)
    if all(piece[3] is None for piece in read):
        return keys, values, visible, None
    biases = [k.new_zeros(1, k.shape[1], dtype=torch.float32) if bias is None else bias for k, _, _, bias in read]
    return keys, values, visible, torch.cat([_repeated(bias, most) for bias in biases], 1)


def _as_many(lists: list[Tensor]) -> list[Tensor]:
    """Tensors [X, ...] repeated along the first axis to the largest X."""
    return [_repeated(x, max(map(len, lists))) for x in lists]


def _repeated(x: Tensor, count: int) -> Tensor:
    """[X, ...] -> [count, ...], each entry standing for the heads of its group."""
    return x if len(x) == count else x.repeat_interleave(count // len(x), 0)
