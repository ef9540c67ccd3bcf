"""What a scorer sees of one layer."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from llmopt_kernels import NONE, Rule, attention_weights, column_sums, rotate, unrotate
from torch import Tensor, nn

from llmopt.method import Record
from llmopt.model.blocks import blocks
from llmopt.model.positions import rotary_tables
from llmopt.runtime.replay import effects, largest_attention, output_weight


@dataclass(frozen=True)
class Source:
    """The origin of a view: the model, the method's record, and the position ids of entries and queries.

    entries: [B, G, T], queries: [B, W], as the rotary embedding saw them; length: one more than the largest seen.
    shared: the memory of this forward. rehearsed: entries are noise, and the model may have no data to turn them by.
    """

    model: nn.Module
    record: Record
    entries: Tensor
    queries: Tensor | None
    length: int
    shared: dict = field(default_factory=dict)
    rehearsed: bool = False


class Carried(dict):
    """Columns by name; one that no entry has yet is zeros, fp32."""

    def __init__(self, columns: dict[str, Tensor], positions: Tensor):
        super().__init__(columns)
        self.positions = positions

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(self.positions.shape, device=self.positions.device)


@dataclass(frozen=True)
class LayerKV:
    """Entries of one layer, real tokens only: no padding. Positions count the real tokens from 0.

    keys, values: [B, G, T, D], keys after RoPE; positions: [B, G, T], -1 at holes, which only follow the last entry of
    a head; queries: [B, H, W, D] the last ones, after RoPE, as many as the scorer asked for; lengths: [B] tokens seen;
    columns: [B, G, T] each, what the entries carry. tail: [B, G, S, D] of a replay, keys that end in those of the
    tokens being read again, which are no entries. hidden: [B, W, N], of the tokens of query_positions, what the
    scorer's `condense` made of what the layer's attention read, where it sets `hidden`.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    query_positions: Tensor     # [B, W]
    positions: Tensor
    lengths: Tensor
    layer: int
    rule: Rule
    source: Source | None = field(default=None, repr=False)
    columns: dict[str, Tensor] = field(default_factory=dict, repr=False)
    tail: Tensor | None = field(default=None, repr=False)
    hidden: Tensor | None = field(default=None, repr=False)

    @property
    def holes(self) -> Tensor:
        """bool [B, G, T]: no entry here."""
        return self.positions == NONE

    @property
    def record(self) -> Record:
        """The record that the method's `plan` made: meta and tensors."""
        return self.source.record

    @property
    def shared(self) -> dict:
        """The memory of this forward: what one layer puts in, the layers after it find; gone when the forward ends."""
        return self.source.shared

    @property
    def carried(self) -> dict[str, Tensor]:
        """Columns [B, G, T] by name, as an earlier compression left them: 0 for entries that are new since."""
        return Carried(self.columns, self.positions)

    def remember(self, name: str, column: Tensor) -> Tensor:
        """The column itself [B, G, T], which `score` has worked out and `carry` will ask for."""
        self.shared[name, self.layer] = column
        return column

    def remembered(self, name: str) -> dict[str, Tensor]:
        """{name: column} of this layer and row, once; nothing if no score was asked for."""
        column = self.shared.pop((name, self.layer), None)
        return {} if column is None else {name: column}

    # ------------------------------------------------------------------------------------------------- attention

    def attention(self, last: int | None = None) -> Tensor:
        """Probabilities [B, H, W, T] of the last queries over all entries; each query sees its past only."""
        queries, positions = self._last(last)
        visible = self.rule.visible(positions.unsqueeze(1), self.positions)                 # [B, G, W, T]
        return attention_weights(queries, self.keys, visible, self.rule)

    def column_sums(self, last: int | None = None) -> Tensor:
        """Attention received, summed over the last queries (streamed): [B, H, T]."""
        queries, positions = self._last(last)
        return column_sums(queries, self.keys, positions, self.positions, self.rule)

    def weights_of(self, part: slice, span: slice, visible: Tensor | None) -> Tensor:
        """Probabilities [B, H, w, s] of the queries in `part` over the entries in `span`, as `visible` has it.

        visible: bool, broadcastable to [B, G, w, s]; None: every query sees all of them.
        """
        return attention_weights(self.queries[:, :, part], self.keys[:, :, span], visible, self.rule)

    def column_max(self, read: Tensor | None = None) -> Tensor:
        """The largest attention on each entry from any one query of a replay, see `tail`: [B, H, T].

        read: sizes [B, W, 1] that the queries' attention is divided by.
        """
        return largest_attention(self.queries, self.query_positions, self.keys, self.positions, self.tail, self.rule,
                                 read)

    def mean_over_group(self, per_head: Tensor) -> Tensor:
        """[B, H, ...] -> [B, G, ...]."""
        return self._grouped(per_head).mean(2)

    def max_over_group(self, per_head: Tensor) -> Tensor:
        """[B, H, ...] -> [B, G, ...]."""
        return self._grouped(per_head).amax(2)

    def mean_over_entries(self, x: Tensor) -> Tensor:
        """[B, G, T, N] -> [B, G, 1, N]: the mean over the entries that are there."""
        holes = self.holes.unsqueeze(-1)
        return x.masked_fill(holes, 0.0).sum(-2, keepdim=True) / (~holes).sum(-2, keepdim=True).clamp(min=1)

    def _grouped(self, per_head: Tensor) -> Tensor:
        return per_head.unflatten(1, (self.keys.shape[1], -1))                               # [B, G, g, ...]

    def _last(self, last: int | None) -> tuple[Tensor, Tensor]:
        start = 0 if last is None else max(0, self.queries.shape[2] - last)
        return self.queries[:, :, start:], self.query_positions[:, start:]

    # ------------------------------------------------------------------------------------- positions and projections

    def unrotated_keys(self) -> Tensor:
        """[B, G, T, D]: the keys before RoPE; as they are where the architecture has none."""
        return self._turned(unrotate, self.keys, self.source.entries)

    def unrotated_queries(self) -> Tensor:
        """[B, H, W, D]: the queries before RoPE."""
        return self._turned(unrotate, self.queries, self.source.queries.unsqueeze(1))

    def rotated(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """x [..., D] turned as this layer turns keys at `position_ids` [...], none beyond what the model has seen."""
        return self._turned(rotate, x, position_ids)

    def mean_rotation(self, ahead: int) -> Tensor:
        """[D, D]: row i is unit vector i, turned by RoPE and averaged over the next `ahead` positions.

        A turn is linear in its cosines and sines: their means are the mean of the turns.
        """
        unit, first = torch.eye(self.keys.shape[-1], device=self.keys.device), int(self.source.queries.max()) + 1
        tables = rotary_tables(self.source.model, self.layer, first + ahead, unit)
        if tables is None:
            return unit
        return rotate(unit, *(table[first:].mean(0) for table in tables))

    def _turned(self, turn: Callable, x: Tensor, position_ids: Tensor) -> Tensor:
        tables = None if self.source.rehearsed else rotary_tables(self.source.model, self.layer, self.source.length, x)
        if tables is None:
            return x
        at = position_ids.clamp(min=0).long()
        return turn(x, tables[0][at], tables[1][at])

    def output_weight(self) -> Tensor:
        """[H, D, E]: what each query head's result is multiplied by on its way into the residual stream."""
        return output_weight(blocks(self.source.model)[self.layer])

    def effects(self) -> Tensor:
        """[B, H, T]: the length of what each value adds to the residual stream by way of each query head."""
        return effects(self.source.model, self.layer, self.values)


def index_of_real(real: Tensor | None, positions: Tensor) -> Tensor:
    """Columns of a padded row -> count of real tokens before each; NONE stays NONE."""
    if real is None:
        return positions
    table = torch.cumsum(real.long(), 0) - 1
    return torch.where(positions == NONE, NONE, table[positions.clamp(min=0)])


def look_up(table: Tensor | None, columns: Tensor) -> Tensor:
    """The position ids of columns, from [seen] or, where there is no table, the columns themselves; NONE stays NONE."""
    if table is None:
        return columns
    return torch.where(columns == NONE, NONE, table[columns.clamp(min=0)])


def coarse(x: Tensor) -> Tensor:
    """x to eleven bits: scores closer than that are a tie, which the older entry wins, not the last bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2048).round() / 2048, exponent)
