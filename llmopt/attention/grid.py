"""Selectors by blocks: queries in tiles, keys in blocks of as many tokens, one decision for each pair of them.

A method writes `picks`. The first `first` blocks and the `near` newest ones, the row's own included, are always read;
of a key block that is read, a row reads all that is not after it.
"""
import dataclasses
from abc import abstractmethod
from functools import cached_property

import torch
from llmopt_kernels import NONE, Rule, Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import pad

from llmopt.attention.base import Selector, State


@dataclasses.dataclass(frozen=True)
class Grid:
    """One sequence cut up. query [H, T, D], the last T of the tokens; keys, values [G, S, D]; size: tokens of a block.

    Tiles count from the first query, blocks from the first key. start: int64 [tiles], the first key that a tile reads
    in any case; far: bool [tiles, blocks], the blocks that it can choose from.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    rule: Rule
    size: int
    first: int
    near: int

    @property
    def offset(self) -> int:
        """Keys in front of the first query."""
        return self.keys.shape[1] - self.query.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.keys.shape[1] // self.size)

    @cached_property
    def begins(self) -> Tensor:
        """int64 [tiles], the place of each tile's first query."""
        return torch.arange(0, self.query.shape[1], self.size, device=self.query.device) + self.offset

    @cached_property
    def start(self) -> Tensor:
        return ((self.begins // self.size - self.near + 1) * self.size).clamp(min=0)

    @cached_property
    def far(self) -> Tensor:
        ends = (torch.arange(self.blocks, device=self.query.device) + 1) * self.size
        return (ends <= self.start[:, None]) & (ends > self.first * self.size)

    @cached_property
    def causal(self) -> Tensor:
        """bool [tiles, blocks]: some row of the tile sees some key of the block."""
        last = (self.begins + self.size - 1).clamp(max=self.keys.shape[1] - 1)
        return torch.arange(0, self.blocks * self.size, self.size, device=last.device) <= last[:, None]

    def for_heads(self, x: Tensor) -> Tensor:
        """[G, ...] -> [H, ...]: each KV head for its query heads."""
        return x.repeat_interleave(len(self.query) // len(x), 0)

    def mean(self, x: Tensor) -> Tensor:
        """[X, N, D] -> [X, ceil(N / size), D] float32, the mean of each run of `size`, the last maybe shorter."""
        return in_runs(x.float(), self.size).sum(2) / self._counts(x.shape[1], x.device)[:, None]

    def _counts(self, total: int, device: torch.device) -> Tensor:
        return (total - torch.arange(0, total, self.size, device=device)).clamp(max=self.size)

    @cached_property
    def pooled_logits(self) -> Tensor:
        """[H, tiles, blocks] float32: mean query of the tile times mean key of the block, as the layer scales them."""
        return self.rule.logits(self.mean(self.query), self.for_heads(self.mean(self.keys)))


def in_runs(x: Tensor, size: int) -> Tensor:
    """[X, N, D] -> [X, ceil(N / size), size, D], zeros behind the last token."""
    return pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def largest(scores: Tensor, share: float, forced: Tensor | None = None) -> Tensor:
    """The fewest entries [..., n] of scores >= 0 that hold `share` of each row's sum, those of `forced` first: bool."""
    rank = scores if forced is None else scores.masked_fill(forced, torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    sums = scores.gather(-1, order).double().cumsum(-1)
    before = torch.nn.functional.pad(sums[..., :-1], (1, 0))
    wanted = (before < share * sums[..., -1:]) & (scores.gather(-1, order) > 0)
    found = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, wanted)
    return found if forced is None else found | forced


def top(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` [...] largest entries of each row [..., n], ties by place: bool."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < (count if isinstance(count, int) else count.unsqueeze(-1))


def listed(mask: Tensor) -> Tensor:
    """[..., n] bool -> [..., K] int64: the places that are True, NONE as filler."""
    rows = mask.flatten(0, -2)
    counts = rows.sum(-1)
    row, place = rows.nonzero().T
    found = mask.new_full((len(rows), int(counts.max())), NONE, dtype=torch.int64)
    found[row, torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]] = place
    return found.unflatten(0, mask.shape[:-1])


@dataclass(frozen=True)
class BlockSelector(Selector):
    """Base of what chooses blocks of keys for tiles of queries."""

    block: int = Field(128, ge=1, description="tokens of a block, and queries that share a choice")
    first: int = Field(1, ge=0, description="blocks at the beginning that are always read")
    near: int = Field(1, ge=1, description="newest blocks that are always read, the query's own included")
    together: bool = Field(False, description="the query heads of a KV head read what any of them chooses")

    @abstractmethod
    def picks(self, grid: Grid, state: State) -> Tensor:
        """bool [H, tiles, blocks]; what is always read, or not to be seen yet, does not matter."""

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        grid = Grid(q, k, state.values, state.rule, self.block, max(0, self.first - state.dropped // self.block),
                    self.near)
        picked = self.picks(grid, state) & grid.far
        if self.together:
            picked = picked.unflatten(0, (len(k), -1)).any(1)
        return Stripes(self.first * self.block, start=grid.start, blocks=listed(picked), block=self.block,
                       tile=self.block)
