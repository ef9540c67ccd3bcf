"""What every attention operation means, in plain torch.

Notation: B batch, H query heads, G KV heads, g = H / G, T queries, S keys, N flat entries, D head_dim.
Positions count tokens from the start of the sequence; `NONE` marks a hole. Logits and softmax are fp32.
"""
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

NONE = -1


def product(rows: Tensor, shared: Tensor) -> Tensor:
    """[..., g, R, K] x [..., 1, K, C] -> [..., g, R, C]: one product for the g heads of a group, without copying."""
    if rows.ndim != shared.ndim or shared.shape[-3] != 1:
        return torch.matmul(rows, shared)
    return torch.matmul(rows.flatten(-3, -2), shared.squeeze(-3)).unflatten(-2, rows.shape[-3:-1])


@dataclass(frozen=True)
class Rule:
    """The attention rule of one layer: how queries and keys become logits, and how far back it looks."""

    scaling: float
    softcap: float | None = None     # logits = cap * tanh(logits / cap)
    window: int | None = None        # key j is visible to query i while i - j < window
    sinks: Tensor | None = field(default=None, compare=False)    # [H]: each head's logit of a key without value

    @property
    def plain(self) -> bool:
        """True if attention is softmax(q k^T scaling) v, where keys are visible."""
        return self.softcap is None and self.sinks is None

    def sinks_of(self, groups: int) -> Tensor | None:
        """The sinks as a column of logits [B, G, g, T, S]: [G, g, 1, 1], fp32; None: there are none."""
        return None if self.sinks is None else self.sinks.float().view(groups, -1, 1, 1)

    def logits(self, query: Tensor, keys: Tensor) -> Tensor:
        """query [..., R, D], keys [..., S, D] -> [..., R, S], fp32."""
        logits = product(query.float() * self.scaling, keys.float().transpose(-1, -2))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """[..., T], [..., S] -> bool [..., T, S]: causal, inside the window, no holes."""
        i, j = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        seen = (j <= i) & (j != NONE)
        return seen if self.window is None else seen & (i - j < self.window)


class Packed(ABC):
    """Keys or values [..., D] kept in another form than a tensor, such as codes with scales.

    `packed[index]` selects entries along the leading axes, as a tensor's would, and is packed as well.
    """

    @abstractmethod
    def __getitem__(self, index) -> "Packed":
        """The entries that `index` selects: a slice, a bool mask or int64 indices."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[..., D], as attention reads them."""

    @classmethod
    @abstractmethod
    def cat(cls, parts: list["Packed"]) -> "Packed":
        """Parts [N_i, D], one behind the other."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every tensor that it consists of; their bytes are its bytes."""

    def products(self, rows: Tensor) -> Tensor:
        """rows [L, R, D], fp32, times the n entries of their lane: [L, R, n]; the L n entries lie lane by lane.

        A form that can multiply without `dense` overrides it.
        """
        return rows @ self.dense().float().unflatten(0, (len(rows), -1)).transpose(1, 2)

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum of the n entries of each lane with its rows of weights [L, R, n], fp32: [L, R, D]."""
        return weights @ self.dense().float().unflatten(0, weights.shape[::2])


def dense(x: "Tensor | Packed") -> Tensor:
    """Keys or values as a tensor."""
    return x if isinstance(x, Tensor) else x.dense()


def joined(parts: "list[Tensor] | list[Packed]") -> "Tensor | Packed":
    """Keys or values [N_i, D], one behind the other."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else type(parts[0]).cat(parts)


@dataclass(frozen=True)
class Ragged:
    """The entries a cache layer has kept: flat, row by row, within a row KV head by KV head, oldest first.

    carried: columns [N] that go with every entry. One of them means something here: `bias`, fp32, which is added to
    the logits (merged entries).
    """

    keys: Tensor | Packed            # [N, D]
    values: Tensor | Packed          # [N, D]
    positions: Tensor                # [N] int32
    counts: Tensor                   # [B, G] int64, on the CPU; their sum is N
    carried: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bias(self) -> Tensor | None:
        """[N] fp32, or None: zero."""
        return self.carried.get("bias")

    def entries(self) -> list[Tensor]:
        """The tensors of keys and values alone."""
        return [t for x in (self.keys, self.values) for t in ([x] if isinstance(x, Tensor) else x.tensors())]

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [*self.entries(), self.positions, self.counts, *self.carried.values()]

    @cached_property
    def even(self) -> bool:
        """True if all heads of all rows hold equally many entries."""
        return bool((self.counts == self.counts[0, 0]).all())

    @cached_property
    def lanes(self) -> "list[tuple[slice, Tensor | Packed, Tensor | Packed]]":
        """(which of the B G heads, their keys, their values): all together where they are even, else one by one."""
        if self.even:
            return [(slice(0, self.counts.numel()), self.keys, self.values)]
        return [(slice(i, i + 1), self.keys[where], self.values[where]) for i, (_, _, where) in enumerate(self.heads())]

    @property
    def rows(self) -> Tensor:
        """[N]: the batch row of every entry."""
        counts = self.counts.sum(1)
        return torch.arange(len(counts)).repeat_interleave(counts).to(self.positions.device)

    def heads(self) -> Iterator[tuple[int, int, slice]]:
        """(row, KV head, where its entries lie)."""
        start = 0
        for row, counts in enumerate(self.counts.tolist()):
            for head, count in enumerate(counts):
                yield row, head, slice(start, start + count)
                start += count

    def place(self, row: int, head: int) -> slice:
        """Where the entries of one KV head of a row lie."""
        number, counts = row * self.counts.shape[1] + head, self.counts.flatten()
        start = int(counts[:number].sum())
        return slice(start, start + int(counts[number]))

    def where(self, stay: Tensor) -> "Ragged":
        """The entries for which `stay` [N] holds."""
        counts = torch.tensor([int(stay[place].sum()) for _, _, place in self.heads()]).view_as(self.counts)
        return self._at(stay, counts)

    def select_rows(self, rows: Tensor) -> "Ragged":
        """These entries for a batch made of `rows` [B'], in that order."""
        ends = self.counts.sum(1).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        spans = [torch.arange(starts[r], ends[r]) for r in rows.tolist()]
        return self._at(torch.cat(spans).to(self.positions.device), self.counts[rows.cpu()])

    def _at(self, index: Tensor, counts: Tensor) -> "Ragged":
        carried = {name: column[index] for name, column in self.carried.items()}
        return Ragged(self.keys[index], self.values[index], self.positions[index], counts, carried)


def softmax(logits: Tensor, visible: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; a row that sees nothing becomes zeros.

    sinks: one more column, broadcastable to logits [..., :1], which is left out of the result.
    """
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        return torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    return logits.softmax(-1) if visible is None else logits.softmax(-1).nan_to_num(0.0)


def attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, rule: Rule) -> Tensor:
    """Masked attention, a block of queries at a time: [B, H, T, D] x [B, G, S, D] -> [B, H, T, D].

    visible: bool, broadcastable to [B, 1, T, S]; None lets every query see every key.
    """
    batch, heads, tokens, _ = query.shape
    groups = keys.shape[1]
    rows = query.view(batch, groups, heads // groups, tokens, -1)                    # [B, G, g, T, D]
    out = query.new_empty(batch, groups, heads // groups, tokens, values.shape[-1])
    for start in range(0, tokens, 256):
        part = slice(start, start + 256)
        seen = None if visible is None else visible.expand(batch, 1, tokens, -1).unsqueeze(2)[..., part, :]
        weights = softmax(rule.logits(rows[:, :, :, part], keys.unsqueeze(2)), seen, rule.sinks_of(groups))
        out[:, :, :, part] = product(weights, values.float().unsqueeze(2)).to(out.dtype)
    return out.view(batch, heads, tokens, -1)


def attention_weights(query: Tensor, keys: Tensor, visible: Tensor | None, rule: Rule) -> Tensor:
    """Probabilities [B, H, T, S], fp32; visible: bool [B, G, T, S] (per KV head) or broadcastable to it; None: all."""
    batch, heads, tokens, dim = query.shape
    groups = keys.shape[1]
    rows = query.view(batch, groups, heads // groups, tokens, dim)                   # [B, G, g, T, D]
    seen = None if visible is None else visible.unsqueeze(2)
    weights = softmax(rule.logits(rows, keys.unsqueeze(2)), seen, rule.sinks_of(groups))     # [B, G, g, T, S]
    return weights.view(batch, heads, tokens, -1)


def column_sums(query: Tensor, keys: Tensor, query_positions: Tensor, key_positions: Tensor, rule: Rule,
                block: int = 256) -> Tensor:
    """The attention that each key receives from all queries together: [B, H, S], fp32, a block of queries at a time.

    query [B, H, T, D]; keys [B, G, S, D]; query_positions [B, T]; key_positions [B, G, S].
    """
    total = query.new_zeros(query.shape[0], query.shape[1], keys.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        visible = rule.visible(query_positions[:, None, part], key_positions)        # [B, G, t, S]
        total += attention_weights(query[:, :, part], keys, visible, rule).sum(-2)
    return total


def column_max(query: Tensor, keys: Tensor, query_positions: Tensor, key_positions: Tensor, rule: Rule,
               weights: Tensor | None = None, block: int = 256) -> Tensor:
    """The largest attention that each key receives from any one query; arguments and result as in `column_sums`.

    weights: [B, T], what the attention of each query is multiplied by.
    """
    best = query.new_zeros(query.shape[0], query.shape[1], keys.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        visible = rule.visible(query_positions[:, None, part], key_positions)        # [B, G, t, S]
        found = attention_weights(query[:, :, part], keys, visible, rule)
        found = found if weights is None else found * weights[:, None, part, None]
        best = torch.maximum(best, found.amax(-2))
    return best


def ragged_attention(query: Tensor, kept: Ragged, tail: tuple[Tensor, Tensor], tail_visible: Tensor | None,
                     first: int, rule: Rule) -> Tensor:
    """Attention over flat kept entries and a dense tail: [B, H, T, D] -> [B, H, T, D].

    tail: keys and values [B, G, S, D] of the newest tokens; tail_visible: bool, broadcastable to [B, T, S], or None.
    first: position of the first query. Kept entries are older than every query; only the window can hide them.
    """
    batch, heads, tokens, dim = query.shape
    group = heads // kept.counts.shape[1]
    rows = query.view(batch, -1, group, tokens, dim)                                 # [B, G, g, T, D]
    i = torch.arange(first, first + tokens, device=query.device)
    visible = None if tail_visible is None else tail_visible.expand(batch, -1, -1)
    if kept.even:
        return _even_attention(rows, kept, tail, visible, i, rule).reshape(batch, heads, tokens, -1)
    out = query.new_empty(batch, rows.shape[1], group, tokens, tail[1].shape[-1])
    for row, head, where in kept.heads():
        old = None if rule.window is None else rule.visible(i, kept.positions[where])
        bias = None if kept.bias is None else kept.bias[where]
        new = None if visible is None else visible[row]
        keys = (dense(kept.keys[where]), tail[0][row, head])
        values = (dense(kept.values[where]), tail[1][row, head])
        sinks = None if rule.sinks is None else rule.sinks_of(len(rows[0]))[head]
        out[row, head] = _two_parts(rows[row, head], keys, values, (old, new), bias, rule, sinks)
    return out.view(batch, heads, tokens, -1)


def _even_attention(rows: Tensor, kept: Ragged, tail: tuple[Tensor, Tensor], visible: Tensor | None, i: Tensor,
                    rule: Rule) -> Tensor:
    """All heads hold equally many entries: one batched product instead of a loop."""
    batch, groups = kept.counts.shape
    shape = (batch, groups, 1, int(kept.counts[0, 0]))
    old = None if rule.window is None else rule.visible(i, kept.positions.view(shape))
    bias = None if kept.bias is None else kept.bias.view(batch, groups, 1, 1, shape[-1])
    new = None if visible is None else visible[:, None, None]
    keys = (dense(kept.keys).view(*shape, tail[0].shape[-1]), tail[0].unsqueeze(2))
    values = (dense(kept.values).view(*shape, tail[1].shape[-1]), tail[1].unsqueeze(2))
    return _two_parts(rows, keys, values, (old, new), bias, rule, rule.sinks_of(groups))


def _two_parts(query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor],
               visible: tuple[Tensor | None, Tensor | None], bias: Tensor | None, rule: Rule,
               sinks: Tensor | None) -> Tensor:
    """One softmax over two pieces, without joining them: query [..., T, D], keys and values [..., S1 | S2, D]."""
    parts = []
    for index, (piece, seen) in enumerate(zip(keys, visible, strict=True)):
        logits = rule.logits(query, piece)
        if index == 0 and bias is not None:
            logits = logits + bias
        parts.append(logits if seen is None else logits.masked_fill(~seen, -torch.inf))
    weights = softmax(torch.cat(parts, -1), None, sinks).nan_to_num(0.0)
    old, new = weights.split([parts[0].shape[-1], parts[1].shape[-1]], -1)
    out = product(old, values[0].float()) + product(new, values[1].float())
    return out.to(query.dtype)
