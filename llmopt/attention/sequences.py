"""One sequence of a batch by itself: a row without its padding, or one of several packed into a row."""
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from llmopt_kernels import NONE, Ragged, Rule, dense, dense_attention, dense_visible, ragged_attention
from torch import Tensor

from llmopt.attention.packed import packed_sequences
from llmopt.errors import LlmoptError
from llmopt.runtime.prompt import Prompt


@dataclass(frozen=True)
class Sequence:
    """Queries [H, T, D] of the newest tokens over keys and values [G, S, D] of the unbroken run of newest tokens.

    number: (row, sequence in the row). columns: int64 [T], where the queries stand in the batch. old: what is left of
    the tokens before the run, positions counted in real tokens of this sequence, or None where no query can see any.
    """

    number: tuple[int, int]
    columns: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    old: Ragged | None
    first: int                  # real tokens in front of the first query
    rule: Rule

    @property
    def length(self) -> int:
        """Real tokens seen."""
        return self.first + len(self.columns)

    @property
    def dropped(self) -> int:
        """Tokens in front of the run."""
        return self.length - self.keys.shape[1]

    def divided(self, count: int) -> "tuple[Sequence, Sequence | None]":
        """(the first `count` queries with what they may read, the others)."""
        more = len(self.columns) - count
        if more == 0:
            return self, None
        end = self.keys.shape[1] - more
        return (replace(self, columns=self.columns[:count], query=self.query[:, :count], keys=self.keys[:, :end],
                        values=self.values[:, :end]),
                replace(self, columns=self.columns[count:], query=self.query[:, count:], first=self.first + count))

    def dense(self) -> Tensor:
        """Attention over all that is held: [H, T, D]."""
        query, tail = self.query[None], (self.keys[None], self.values[None])
        if self.old is None:
            return dense_attention(query, *tail, None, self.first, self.rule)[0]
        visible = dense_visible(query, tail[0], None, self.first, self.rule)
        return ragged_attention(query, self.old, tail, visible, self.first, self.rule)[0]

    def old_pairs(self) -> Tensor:
        """Pairs of queries with entries before the run: [H]."""
        per_group = torch.zeros(len(self.keys), dtype=torch.long, device=self.query.device)
        if self.old is not None:
            i = torch.arange(self.first, self.length, device=self.query.device)
            for _, head, where in self.old.heads():
                per_group[head] = self.rule.visible(i, self.old.positions[where]).sum()
        return per_group.repeat_interleave(len(self.query) // len(self.keys))

    def dense_pairs(self) -> Tensor:
        """Pairs that `dense` computes: [H]."""
        return self.old_pairs() + causal_pairs(self.first - self.dropped, self.keys.shape[1], self.rule.window)


def causal_pairs(first: int, length: int, window: int | None = None) -> int:
    """Pairs (i, j) with first <= i < length, j <= i, and i - j < window."""
    reach = length if window is None else min(window, length)
    short = sum(range(first + 1, min(length, reach) + 1))
    return short + max(0, length - max(first, reach)) * reach


def numbered(prompt: Prompt) -> tuple[Tensor, Rule]:
    """The sequence of every column, int64 [B, seen], NONE at padding; and the rule that holds within a sequence."""
    batch, mask = len(prompt.query), prompt.mask
    if mask is None:
        return torch.zeros(batch, prompt.seen, dtype=torch.long, device=prompt.query.device), prompt.rule
    if mask.shape[-1] != prompt.seen:
        raise LlmoptError(f"the attention_mask has {mask.shape[-1]} columns, {prompt.seen} tokens were seen")
    if mask.ndim == 2:
        return torch.where(mask.bool(), 0, NONE), prompt.rule
    numbers, rule = packed_sequences(mask, prompt.rule)
    return numbers.expand(batch, -1), rule


def sequences(prompt: Prompt, numbers: Tensor, rule: Rule) -> Iterator[Sequence]:
    """Every sequence of a batch that has queries, out of what `numbered` gives."""
    for row, line in enumerate(numbers):
        for number in range(int(line.max()) + 1):
            chosen = line == number
            if bool(chosen[prompt.first:].any()):
                yield _sequence(prompt, (row, number), chosen, rule)


def _sequence(prompt: Prompt, number: tuple[int, int], chosen: Tensor, rule: Rule) -> Sequence:
    """The columns `chosen`, bool [seen], of a row."""
    row, place = number[0], chosen.cumsum(0) - 1
    columns, length = chosen[prompt.first:].nonzero().squeeze(1), int(place[-1]) + 1
    first = length - len(columns)
    need = 0 if rule.window is None else max(0, first - rule.window + 1)                 # the oldest that a query sees
    tail = chosen[prompt.seen - prompt.keys.shape[2]:]
    keys, values = prompt.keys[row][:, tail], prompt.values[row][:, tail]
    old = None
    if prompt.kept is not None:
        live = chosen & (place >= need)
        keys, values, old = _with_kept(prompt.kept, row, (keys, values), torch.where(live, place, NONE))
    late = max(0, keys.shape[1] - (length - need))
    return Sequence(number, columns, prompt.query[row][:, columns], keys[:, late:], values[:, late:], old, first, rule)


def _with_kept(kept: Ragged, row: int, tail: tuple[Tensor, Tensor],
               place: Tensor) -> tuple[Tensor, Tensor, Ragged | None]:
    """The run of newest tokens that all heads hold, [G, S, D] twice, and the entries before it.

    place: int64 [seen], the count of each token in its sequence, NONE for tokens that are not read.
    """
    end = int(place.max()) + 1 - tail[0].shape[1]                                        # of the kept part
    entries = [torch.arange(where.start, where.stop, device=place.device) for r, _, where in kept.heads() if r == row]
    entries = [index[place[kept.positions[index].long()] != NONE] for index in entries]
    places = [place[kept.positions[index].long()] for index in entries]
    whole = [torch.ones_like(index, dtype=torch.bool) if kept.bias is None else kept.bias[index] == 0
             for index in entries]                                                       # not merged with others
    run = min(_run(at, end, plain) for at, plain in zip(places, whole, strict=True))
    new = torch.stack([index[len(index) - run:] for index in entries])                   # [G, run]
    keys, values = (torch.cat([dense(held[new]), x], 1) for held, x in zip((kept.keys, kept.values), tail, strict=True))
    left = [len(index) - run for index in entries]
    if not any(left):
        return keys, values, None
    index, at = (torch.cat([x[:n] for x, n in zip(xs, left, strict=True)]) for xs in (entries, places))
    carried = {name: column[index] for name, column in kept.carried.items()}
    return keys, values, Ragged(kept.keys[index], kept.values[index], at.int(), torch.tensor([left]), carried)


def _run(places: Tensor, end: int, whole: Tensor) -> int:
    """The number of last entries that stand one after another up to `end`, none of them merged."""
    wanted = torch.arange(end - len(places), end, device=places.device)
    return int(((places == wanted) & whole).flip(0).long().cumprod(0).sum())
