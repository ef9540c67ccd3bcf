"""One layer of the cache: old entries flat (`Ragged`), new tokens in a tail, folded in at the next compression.

The first single token joins the two in lanes (lanes.py), where all that follow are written in place.

Whatever it holds, it reports the tokens it has SEEN, so that positions stay those of the uncompressed run.
"""
from dataclasses import dataclass, field, replace

import torch
from llmopt_kernels import NONE, Packed, Ragged, dense, joined
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from llmopt.runtime.lanes import Lanes
from llmopt.runtime.pools import Pools

SOURCE = "source"       # a column of entries that were packed: 1 + their place among the kept ones; it is not kept


@dataclass
class Entries:
    """All entries of one batch row in one layer, heads padded at the end to equal length.

    keys, values: [G, T, D]; positions: [G, T], NONE at holes; carried: columns [G, T] that go with every entry through
    eviction, merging, sliding, beams and turns: `bias`, which is added to the logits, and those of scorers.
    """

    keys: Tensor | Packed
    values: Tensor | Packed
    positions: Tensor
    carried: dict[str, Tensor] = field(default_factory=dict)

    def column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A carried column [G, T]; zeros if these entries have none of that name."""
        if name in self.carried:
            return self.carried[name]
        return torch.zeros(self.positions.shape, dtype=dtype, device=self.positions.device)

    def traced_from(self, before: "Entries") -> "Entries":
        """These entries, made from `before`; those whose key or value has changed no longer know their source."""
        if SOURCE not in self.carried:
            return self
        source = torch.zeros_like(self.carried[SOURCE])
        if self.keys.shape == before.keys.shape:
            same = (self.keys == before.keys).all(-1) & (self.values == before.values).all(-1)
            source = torch.where(same, self.carried[SOURCE], source)
        return replace(self, carried=self.carried | {SOURCE: source})

    @property
    def counts(self) -> Tensor:
        """[G] entries per KV head."""
        return (self.positions != NONE).sum(-1)


class RaggedLayer(CacheLayerMixin):
    """`kept` (flat, or None before the first compression) and the tail [B, G, S, D], `keys` and `values`.

    groups: G; 0 where this layer has lost its attention: it counts tokens and holds nothing. window: of a
    sliding-window layer. plain: its attention has no window, softcap or sinks. folded: tokens seen when entries were
    last dropped. joined: the lanes hold the kept entries too, in front of the tail.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, groups: int, window: int | None = None):
        self.is_initialized = self.joined = self.plain = False
        self.groups = groups
        self.window = window
        self.seen = self.folded = 0
        self.lanes: Lanes | None = None
        self._kept: Ragged | None = None            # keys and values [N, 0] where the lanes hold them
        self.queries: Tensor | None = None          # [B, H, W, D] the queries that scorers asked for
        self.query_positions: Tensor | None = None  # [B, W], NONE at holes
        self.hidden: Tensor | None = None           # [B, W, N] of what attention read of them, if asked for
        self.drawn: Tensor | None = None            # [2, B, C, seen], see `note_drawn`
        self.pools: dict[int, Pools] = {}           # by batch row, where a method asks for them

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        nothing = torch.zeros(key_states.shape[:2], dtype=torch.long)
        self.lanes = Lanes.empty(nothing, 0, (key_states.detach(), value_states.detach()))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [B, G, T, D] to the tail and return all that is held, or these alone once entries have been dropped:
        the attention function then reads in this layer.
        """
        self.seen += key_states.shape[2]
        if self.groups == 0:
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1 and not self.joined:
            self._join()
        self.lanes = self.lanes.append(key_states, value_states)
        return (key_states, value_states) if self.compressed else self.lanes.tail

    def _join(self) -> None:
        """Let the lanes hold kept entries too, if attention can read them there: dense ones without bias or window."""
        kept = self._kept
        if kept is None or not self.plain or isinstance(kept.keys, Packed) or kept.bias is not None:
            return
        self.lanes, self.joined = self.lanes.behind(kept.counts, (kept.keys, kept.values)), True
        self._kept = replace(kept, keys=kept.keys[:, :0].clone(), values=kept.values[:, :0].clone())

    @property
    def compressed(self) -> bool:
        """True once entries have been dropped or packed."""
        return self._kept is not None

    @property
    def kept(self) -> Ragged | None:
        """The entries left by the last compression; keys and values that have joined the lanes are copied out."""
        if not self.joined:
            return self._kept
        keys, values = self.lanes.kept
        return replace(self._kept, keys=keys, values=values)

    @property
    def keys(self) -> Tensor | None:
        """[B, G, S, D] of the tail."""
        return self.lanes.tail[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """[B, G, S, D] of the tail."""
        return self.lanes.tail[1] if self.is_initialized else None

    def slide(self) -> None:
        """Drop the tail tokens that neither the last query nor one to come can see, in lots, so as to copy seldom."""
        if self.window is not None and self.lanes.length >= 2 * self.window:
            self.lanes = self.lanes.last(self.window)

    @property
    def tail_start(self) -> int:
        """Position of the first token of the tail."""
        return self.seen - (self.lanes.length if self.is_initialized else 0)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.lanes.counts.shape[0] if self.is_initialized else -1

    def reset(self) -> None:
        self.__init__(self.groups, self.window)

    def select_rows(self, rows: Tensor) -> None:
        """Make the batch consist of `rows` [B'] of the present one."""
        if not self.is_initialized:
            return
        place = rows.to(self.device)
        self.lanes = self.lanes.taken(rows, self.lanes.size)
        if self._kept is not None:
            self._kept = self._kept.select_rows(rows)
        if self.queries is not None:
            self.queries, self.query_positions = self.queries[place], self.query_positions[place]
            self.hidden = None if self.hidden is None else self.hidden[place]
        self.drawn = None if self.drawn is None else self.drawn[:, place]
        self.pools = {new: self.pools[old] for new, old in enumerate(rows.tolist()) if old in self.pools}

    def of_head(self, row: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All that a KV head of a row holds, oldest first, padding of the tail too: keys and values [n, D], positions
        [n], and what is added to the logits [n] or None.
        """
        keys, values = self.lanes.lane(row, head, whole=True)
        positions = torch.arange(self.tail_start, self.seen, device=self.device)
        if self._kept is None:
            return keys, values, positions, None
        where, bias = self._kept.place(row, head), self._kept.bias
        bias = None if bias is None else torch.cat([bias[where], bias.new_zeros(len(positions))])
        positions = torch.cat([self._kept.positions[where].long(), positions])
        if not self.joined:
            keys = torch.cat([dense(self._kept.keys[where]), keys])
            values = torch.cat([dense(self._kept.values[where]), values])
        return keys, values, positions, bias

    def pooled(self, row: int, start: int, size: int) -> Tensor:
        """[G, n, D] float32: mean keys of a row's complete blocks of `size` tokens, the first one at column `start`.

        Of a layer that has dropped nothing. The means are kept: each key is read for them once.
        """
        known = self.pools.get(row)
        if known is None or (known.size, known.start) != (size, start):
            known = Pools.empty(size, start, self.keys[row])
        self.pools[row] = known.grown(self.keys[row])
        return self.pools[row].means

    def drawn_so_far(self, rows: int, heads: int) -> Tensor:
        """[B, C, seen]: the attention that each token has drawn, in each of C heads, before the present forward."""
        known = self.drawn is not None and self.drawn.shape[1:3] == (rows, heads)
        drawn = self.drawn.sum(0) if known else torch.zeros(rows, heads, 0, device=self.device)
        return torch.nn.functional.pad(drawn, (0, self.seen - drawn.shape[-1]))

    def note_drawn(self, drawn: Tensor, last: Tensor) -> None:
        """Keep [B, C, seen] of the heads that a method watches, and apart from it what the newest token has added."""
        self.drawn = torch.stack([drawn - last, last])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def fork(self) -> "RaggedLayer":
        """A layer that holds the same tensors until it grows, so that the two can part ways."""
        twin = RaggedLayer(self.groups, self.window)
        twin.__dict__.update(self.__dict__, lanes=None if self.lanes is None else self.lanes.fork(),
                             pools=dict(self.pools))
        return twin

    def without_last(self) -> "RaggedLayer":
        """This layer before it saw its last token, but for what was evicted since."""
        twin = self.fork()
        twin.seen -= 1
        twin.folded = min(self.folded, twin.seen)
        twin.pools = {}                             # the last block may be none any more
        twin.forget_queries()
        if self.drawn is not None:
            twin.drawn = (self.drawn * self.drawn.new_tensor([1, 0]).view(2, 1, 1, 1))[..., :-1]
        if self.is_initialized and self.lanes.length:
            twin.lanes = self.lanes.fork(self.lanes.length - 1)
        elif (kept := self.kept) is not None:
            twin._hold(kept.where(kept.positions != twin.seen))
        return twin

    def record(self, query: Tensor, positions: Tensor, last: int | None, holes: bool,
               hidden: Tensor | None = None) -> None:
        """Keep the `last` real queries of every row (all, if None): query [B, H, T, D], positions [B, T].

        holes: whether `positions` may hold NONE, at padding. hidden: [B, T, N], where the kv method asks for it.
        """
        if (hidden is None) != (self.hidden is None):           # those waiting were asked for by another method
            self.forget_queries()
        if self.queries is not None:
            query = torch.cat([self.queries, query], 2)
            positions = torch.cat([self.query_positions, positions], 1)
            hidden = None if hidden is None else torch.cat([self.hidden, hidden], 1)
        if holes:
            order = positions.argsort(dim=1, stable=True)
            positions = positions.gather(1, order)
            query = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
            hidden = None if hidden is None else hidden.gather(1, order[..., None].expand(hidden.shape))
        self.queries, self.query_positions, self.hidden = query, positions, hidden
        self.forget_queries(last)

    def forget_queries(self, keep: int | None = 0, rows: Tensor | None = None) -> None:
        """Hold the last `keep` queries only; None forgets nothing. rows: bool [B], of which rows; None: of all."""
        if self.queries is None or keep is None:
            return
        if rows is not None and not bool(rows.all()):
            old = torch.arange(self.queries.shape[2]) < self.queries.shape[2] - keep
            gone = (rows[:, None] & old).to(self.query_positions.device)
            self.query_positions = self.query_positions.masked_fill(gone, NONE)
        elif keep == 0:
            self.queries = self.query_positions = self.hidden = None
        else:
            start = max(0, self.queries.shape[2] - keep)
            self.queries = self.queries[:, :, start:].clone()       # a view would hold on to all of them
            self.query_positions = self.query_positions[:, start:].clone()
            self.hidden = None if self.hidden is None else self.hidden[:, start:].clone()

    def coming(self, real: Tensor | None, row: int, total: int) -> Tensor:
        """[G] entries that this row will hold once `total` tokens are seen, unless something is dropped.

        real: bool [total] or None. Asked before this layer has seen them all as well as after.
        """
        oldest = -1 if self.window is None else total - self.window
        columns = torch.arange(max(self.tail_start, oldest + 1), total)
        tail = len(columns) if real is None else int(real[columns.to(real.device)].sum())
        counts = torch.full((self.groups,), tail)
        if self._kept is None:
            return counts
        if self.window is None and real is None:
            return counts + self._kept.counts[row]
        return counts + torch.stack([_alive(self._kept.positions[where], real, oldest).sum().cpu()
                                     for r, _, where in self._kept.heads() if r == row])

    def in_sight(self, real: Tensor | None, total: int) -> int:
        """How many of a row's `total` tokens a query behind them can see here; real: bool [total] or None."""
        first = 0 if self.window is None else max(0, total - self.window + 1)
        return total - first if real is None else int(real[first:total].sum())

    def shown(self, mask: Tensor) -> Ragged:
        """The kept entries of tokens that `mask` [B, seen] does not hide."""
        kept = self.kept
        return kept.where(mask.to(self.device).bool()[kept.rows, kept.positions.long()])

    def row(self, index: int, real: Tensor | None) -> Entries:
        """The entries of one batch row: real tokens [seen] only, and none that slid out of this layer's window."""
        columns = torch.arange(self.tail_start, self.seen, device=self.device)
        keys, values = self.keys[index], self.values[index]                              # [G, S, D]
        wanted = columns >= 0 if real is None else real[self.tail_start:]
        if self.window is not None:
            wanted = wanted & (columns > self.seen - self.window)
        if not bool(wanted.all()):
            keys, values, columns = keys[:, wanted], values[:, wanted], columns[wanted]
        tail = Entries(keys, values, columns.expand(keys.shape[0], -1))
        return tail if self._kept is None else self._with_kept(index, tail, real)

    def _with_kept(self, index: int, tail: Entries, real: Tensor | None) -> Entries:
        """Kept entries of a row that a query may still read, then its tail, head by head."""
        kept, parts = self._kept, []
        columns = dict(kept.carried)
        if isinstance(kept.keys, Packed):
            columns[SOURCE] = torch.arange(1, len(kept.positions) + 1, device=self.device)
        for row, head, where in kept.heads():
            if row != index:
                continue
            old = kept.positions[where].long()
            live = _alive(old, real, NONE if self.window is None else self.seen - self.window)
            new = [tail.keys[head], tail.values[head], tail.positions[head]]
            new += [column.new_zeros(len(new[2])) for column in columns.values()]
            lane = self.lanes.lane(row, head) if self.joined else (kept.keys[where], kept.values[where])
            before = [*map(dense, lane), old]
            before += [column[where] for column in columns.values()]
            parts.append([torch.cat([a[live], b]) for a, b in zip(before, new, strict=True)])
        fills = (0.0, 0.0, NONE, *(0 for _ in columns))
        keys, values, positions, *carried = (
            torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=fill)
            for column, fill in zip(zip(*parts, strict=True), fills, strict=True))
        return Entries(keys, values, positions, dict(zip(columns, carried, strict=True)))

    def fold(self, rows: list[Entries]) -> None:
        """Hold exactly these entries (holes left out) from now on; the tail becomes empty."""
        masks = [entry.positions != NONE for entry in rows]

        def flat(name: str) -> Tensor | Packed:
            return joined([getattr(entry, name)[mask] for entry, mask in zip(rows, masks, strict=True)])

        known = {name: column.dtype for entry in rows for name, column in entry.carried.items()
                 if name != SOURCE}
        carried = {name: torch.cat([entry.column(name, dtype)[mask] for entry, mask in zip(rows, masks, strict=True)])
                   for name, dtype in known.items()}
        counts = torch.stack([mask.sum(-1) for mask in masks]).cpu()
        self._hold(Ragged(flat("keys"), flat("values"), flat("positions").int(), counts, carried))
        self.folded = self.seen

    def _hold(self, kept: Ragged) -> None:
        """Hold these entries, apart from the lanes, which become empty."""
        self._kept, self.joined, self.pools = kept, False, {}
        self.lanes = Lanes.empty(torch.zeros_like(self.lanes.counts), 0, self.lanes.buffers)

    def counts(self) -> Tensor:
        """[B, G] entries held, padding in the tail included."""
        if not self.is_initialized:
            return torch.zeros(0, 0, dtype=torch.long)
        tail = torch.full(self.lanes.counts.shape, self.lanes.length)
        return tail if self._kept is None else tail + self._kept.counts

    def entries(self) -> list[Tensor]:
        """The keys and values held, codes with their scales."""
        tail = [self.keys, self.values] if self.is_initialized else []
        return tail if self._kept is None else tail + self.kept.entries()

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer holds."""
        held = [] if self.lanes is None else list(self.lanes.buffers)
        held += [t for t in (self.queries, self.query_positions, self.hidden, self.drawn) if t is not None]
        held += [pools.means for pools in self.pools.values()]
        return held if self._kept is None else held + self._kept.tensors()


def _alive(positions: Tensor, real: Tensor | None, oldest: int) -> Tensor:
    """bool [N]: entries at `positions` [N] behind `oldest` that are real tokens by `real` [seen] (None: all are)."""
    live = positions > oldest
    return live if real is None else live & real[positions.long()]
