"""What layers of other widths take of the time, measured on this machine on weights of noise: shapes are enough.

A table for each kind of part: the matrix products of a feed-forward part, or those and the attention of an attention
part, at five widths from the floor to what is there; in between they are interpolated. Reading 2048 tokens at once
(prefill), or one token behind 2048 that are cached (decode). Norms, activations' own form and rotary positions, which
cost what no width changes or next to nothing, are left out.
"""
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from llmopt.model.blocks import Block, blocks
from llmopt.model.computing import compute_type
from llmopt.prune.allocate import Units

Phase = Literal["prefill", "decode"]
TOKENS = 2048
POINTS = 5              # widths of a table
TRIES = 5               # the fastest counts: other work on the machine only adds
LEAST = 0.01            # of a table's mean slope, by which it rises at least: more channels never save time


class Shape(NamedTuple):
    """Of one part of a block: the hidden size, rows of its readers for each unit, and what the units are."""

    kind: str
    hidden: int
    readers: int            # projections of an FFN that read the stream: 2 with a gate
    heads: int              # query heads for each KV head, and KV heads, where all are there
    groups: int
    dim: int
    queries: int = 1        # rows of a query head's reader for each of its channels: 2 with a gate

    def run(self, count: int, phase: Phase, like: Tensor) -> Callable[[], Tensor]:
        """Something to be timed: this part with `count` of its units."""
        return self._ffn(count, phase, like) if self.kind == "ffn" else self._attention(count, phase, like)

    def _ffn(self, count: int, phase: Phase, like: Tensor) -> Callable[[], Tensor]:
        x = _noise(like, TOKENS if phase == "prefill" else 1, self.hidden)
        inner, outer = _noise(like, self.readers * count, self.hidden), _noise(like, self.hidden, count)

        def go() -> Tensor:
            first, *second = linear(x, inner).split(count, dim=-1)
            return linear(silu(first) * second[0] if second else silu(first), outer)

        return go

    def _attention(self, count: int, phase: Phase, like: Tensor) -> Callable[[], Tensor]:
        groups = count if self.kind == "kv_groups" else self.groups
        heads = count * (self.heads if self.kind == "kv_groups" else self.groups)
        new = TOKENS if phase == "prefill" else 1
        x, old = _noise(like, new, self.hidden), _noise(like, 2, 1, groups, TOKENS - new + 1, self.dim)
        inner = _noise(like, (self.queries * heads + 2 * groups) * self.dim, self.hidden)
        outer = _noise(like, self.hidden, heads * self.dim)

        def go() -> Tensor:
            read = linear(x, inner).unflatten(-1, (-1, self.dim)).transpose(0, 1)[None]             # [1, heads, t, D]
            queries, keys, values = read.split([self.queries * heads, groups, groups], dim=1)
            queries = queries[:, :heads]
            if phase == "decode":
                keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
            mixed = scaled_dot_product_attention(queries, keys, values, is_causal=phase == "prefill", enable_gqa=True)
            return linear(mixed[0].transpose(0, 1).flatten(1), outer)

        return go


def measured(model: nn.Module, units: list[Units], phase: Phase, device: torch.device) -> list[tuple[int, ...]]:
    """Nanoseconds that each entry's layer takes with each number of units that it may keep."""
    like, views, known = torch.zeros(0, dtype=compute_type(model), device=device), blocks(model), {}
    for u in units:
        key = shape_of(views[u.layer], u.kind), u.allowed
        if key not in known:
            known[key] = table(u.allowed, lambda counts, shape=key[0]: fastest(
                [shape.run(count, phase, like) for count in counts]))
    return [known[shape_of(views[u.layer], u.kind), u.allowed] for u in units]


def shape_of(block: Block, kind: str) -> Shape:
    """The shape of the part that units of this kind belong to."""
    writer = block.ffn_out if kind == "ffn" else block.attn_out
    gated = any("gate" in reader.parts for reader in block.ffn_in)
    groups = max(1, block.kv_heads)
    queries = block.part("q")[1].shape[1] // block.head_dim if block.heads_known else 1
    return Shape(kind, writer.out_features, 1 + gated, block.heads // groups, block.kv_heads, block.head_dim, queries)


def table(allowed: tuple[int, ...], cost: Callable[[list[int]], list[float]]) -> tuple[int, ...]:
    """The cost of each number of units, of which a few are asked for; from the largest number down."""
    low, high = allowed[-1], allowed[0]
    points = sorted({low + (high - low) * step // (POINTS - 1) for step in range(POINTS)})
    costs = cost(points)
    slope = LEAST * max(0.0, costs[-1] - costs[0]) / max(1, high - low)
    for place in range(1, len(points)):
        costs[place] = max(costs[place], costs[place - 1] + slope * (points[place] - points[place - 1]))

    def between(count: int) -> int:
        right = next(place for place, point in enumerate(points) if point >= count)
        if points[right] == count:
            return round(costs[right])
        share = (count - points[right - 1]) / (points[right] - points[right - 1])
        return round(costs[right - 1] + share * (costs[right] - costs[right - 1]))

    return tuple(between(count) for count in allowed)


@torch.no_grad()
def fastest(works: list[Callable[[], Tensor]]) -> list[float]:
    """Nanoseconds of the fastest of a few tries of each, in turns, after one that does not count."""
    rounds = [[_timed(work) for work in works] for _ in range(1 + TRIES)]
    return [float(min(tries)) for tries in zip(*rounds[1:], strict=True)]


def _timed(work: Callable[[], Tensor]) -> int:
    start = time.perf_counter_ns()
    made = work()
    if made.is_cuda:
        torch.cuda.synchronize(made.device)
    return time.perf_counter_ns() - start


def _noise(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, 0.01, dtype=like.dtype, device=like.device)
