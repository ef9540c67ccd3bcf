"""Keys and values of one layer in two buffers that grow in place: a decode step copies nothing.

Every batch row and KV head has a lane of its own: the entries it has kept, its new tokens, and room for more.
"""
import torch
from llmopt_kernels import few_queries
from torch import Tensor

LEAST, MOST, SHARE = 4, 512, 8      # a full buffer gets room for an eighth of what a lane holds, within these bounds


class Lanes:
    """counts: [B, G] kept entries, on the CPU; length: tokens behind them; size: how many there is room for.

    buffers: keys and values, [N, D] each, lane by lane. A fork reads the same buffers and makes its own to write to.
    """

    def __init__(self, counts: Tensor, size: int, buffers: tuple[Tensor, Tensor]):
        self.counts, self.size, self.buffers = counts, size, buffers
        self.length, self.borrowed = 0, False
        kept = counts.flatten()
        self.even = bool((kept == kept[:1]).all())
        ends = kept.cumsum(0) + size * torch.arange(len(kept))          # of the kept entries of each lane
        self.spans = list(zip((ends - kept).tolist(), kept.tolist(), strict=True))
        self.ends = ends.to(buffers[0].device)

    @classmethod
    def empty(cls, counts: Tensor, size: int, like: tuple[Tensor, Tensor]) -> "Lanes":
        """Lanes of these measures whose content has still to be written."""
        total = int(counts.sum()) + size * counts.numel()
        return cls(counts, size, tuple(x.new_empty(total, x.shape[-1]) for x in like))

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept entries, [N, D] each, copied out lane by lane."""
        if self.even:
            return tuple(block[:, :, :self.spans[0][1]].flatten(0, 2).clone() for block in self._blocks())
        return tuple(torch.cat([x[start:start + count] for start, count in self.spans]) for x in self.buffers)

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens behind them, [B, G, S, D] each: views where all lanes keep equally many."""
        if self.even:
            return tuple(block[:, :, self.spans[0][1]:][:, :, :self.length] for block in self._blocks())
        return tuple(torch.stack([x[start + count:start + count + self.length] for start, count in self.spans])
                     .unflatten(0, self.counts.shape) for x in self.buffers)

    def lane(self, row: int, head: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values that a KV head has kept, [n, D] each; whole: with the tokens behind them."""
        start, count = self.spans[row * self.counts.shape[1] + head]
        return tuple(x[start:start + count + (self.length if whole else 0)] for x in self.buffers)

    def _blocks(self) -> tuple[Tensor, ...]:
        """The buffers of even lanes as [B, G, n + size, D]."""
        return tuple(x.view(*self.counts.shape, self.spans[0][1] + self.size, x.shape[-1]) for x in self.buffers)

    # ------------------------------------------------------------------------------------------------------ growing

    def append(self, keys: Tensor, values: Tensor) -> "Lanes":
        """These lanes with [B, G, T, D] more of each, which they are themselves as long as they may be written to."""
        lanes, tokens = self, keys.shape[2]
        if self.size < self.length + tokens or not self._ours(keys):
            lanes = self.taken(None, self._room(tokens), keys.dtype)
        lanes._write((keys, values))
        lanes.length += tokens
        return lanes

    def _ours(self, new: Tensor) -> bool:
        """False where writing would change what a fork or a gradient reads, or what torch has locked."""
        held = self.buffers[0]
        locked = held.is_inference() and not torch.is_inference_mode_enabled()
        return not (self.borrowed or locked or torch.is_grad_enabled()) and held.dtype == new.dtype

    def _room(self, tokens: int) -> int:
        """Tokens to make room for when so many more come: just those of a prompt, or while gradients are taken."""
        held = max(count for _, count in self.spans) + self.length
        exact = torch.is_grad_enabled() or (held == 0 and tokens > 1)
        return self.length + max(tokens, 0 if exact else min(max(LEAST, held // SHARE), MOST))

    def _write(self, new: tuple[Tensor, Tensor]) -> None:
        """Put keys and values [B, G, T, D] behind what is there."""
        tokens = new[0].shape[2]
        if self.even:
            start = self.spans[0][1] + self.length
            for block, states in zip(self._blocks(), new, strict=True):
                block[:, :, start:start + tokens] = states
            return
        places = (self.ends + self.length)[:, None] + torch.arange(tokens, device=self.ends.device)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[places] = states.flatten(0, 1)

    def taken(self, rows: Tensor | None, size: int, dtype: torch.dtype | None = None) -> "Lanes":
        """A copy that consists of `rows` [B'] of the batch, or of all, with room for `size` tokens.

        dtype: what is to be written to it; it becomes wider where that is.
        """
        like = tuple(x[:0].to(torch.promote_types(x.dtype, dtype or x.dtype)) for x in self.buffers)
        new = Lanes.empty(self.counts if rows is None else self.counts[rows.cpu()], size, like)
        new.length = self.length
        if self.even and new.even:
            for block, into in zip(self._blocks(), new._blocks(), strict=True):
                filled = block[:, :, :self.spans[0][1] + self.length]
                into[:, :, :filled.shape[2]] = filled if rows is None else filled[rows.to(filled.device)]
            return new
        lanes = torch.arange(self.counts.numel()).view(self.counts.shape)
        lanes = (lanes if rows is None else lanes[rows.cpu()]).flatten().tolist()
        for old, (to, count) in zip(lanes, new.spans, strict=True):
            start, filled = self.spans[old][0], count + self.length
            for buffer, into in zip(self.buffers, new.buffers, strict=True):
                into[to:to + filled] = buffer[start:start + filled]
        return new

    def behind(self, counts: Tensor, kept: tuple[Tensor, Tensor]) -> "Lanes":
        """Lanes of these kept entries, keys and values [N, D] each, with the tokens that lie here behind them."""
        new = Lanes(counts, 0, kept)
        return new.append(*self.tail) if self.length else new

    def last(self, length: int) -> "Lanes":
        """A copy of the newest tokens only."""
        tail = tuple(x[:, :, self.length - length:] for x in self.tail)
        return Lanes.empty(torch.zeros_like(self.counts), length, self.buffers).append(*tail)

    def fork(self, length: int | None = None) -> "Lanes":
        """These lanes, or the first tokens of them, to be continued apart from what becomes of these."""
        twin = Lanes.__new__(Lanes)
        twin.__dict__.update(self.__dict__, borrowed=True)
        twin.length = self.length if length is None else length
        return twin

    # ---------------------------------------------------------------------------------------------------- attention

    def attention(self, rows: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
        """Attention over all that the lanes hold of one token's g queries for each KV head: [B, G, g, D].

        visible: bool [B, S], which tokens behind the kept entries a row sees; None: all.
        """
        out = self._even(rows, visible, scaling) if self.even else self._uneven(rows, visible, scaling)
        return out if visible is None else out.nan_to_num(0.0)

    def _even(self, rows: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
        filled = self.spans[0][1] + self.length
        keys, values = (block[:, :, :filled] for block in self._blocks())
        mask = None if visible is None else _behind(visible, self.spans[0][1])[:, None, None]
        return few_queries(rows, keys, values, mask, scaling)

    def _uneven(self, rows: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
        keys, values = (x[None, None] for x in self.buffers)
        groups, out = self.counts.shape[1], []
        for i, (one, (start, count)) in enumerate(zip(rows.flatten(0, 1).split(1), self.spans, strict=True)):
            filled = count + self.length
            mask = None if visible is None else _behind(visible[i // groups, None], count)
            out.append(few_queries(one[None], keys.narrow(2, start, filled), values.narrow(2, start, filled), mask,
                                   scaling))
        return torch.cat(out).view(*rows.shape[:3], -1)


def lanes_attention(query: Tensor, lanes: Lanes, visible: Tensor | None, scaling: float) -> Tensor:
    """Attention of one token [B, H, 1, D], as `Lanes.attention`; the g heads of a group are rows of one call."""
    rows = query.unflatten(1, (lanes.counts.shape[1], -1)).squeeze(3)                    # [B, G, g, D]
    return lanes.attention(rows, visible, scaling).flatten(1, 2).unsqueeze(2)


def _behind(visible: Tensor, count: int) -> Tensor:
    """`visible` [..., S] behind `count` kept entries, which every query sees."""
    return torch.cat([visible.new_ones(*visible.shape[:-1], count), visible], -1)
