"""How many entries each KV head keeps: the pieces that a recipe names in `allocate`, over the functions beside."""
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv import allocate
from llmopt.parts import Part, register


class Scored(NamedTuple):
    """One layer of one row: the worth of its entries [G, T], -inf at holes, their positions and columns [G, T]."""

    scores: Tensor
    positions: Tensor
    carried: dict[str, Tensor]

    @property
    def counts(self) -> Tensor:
        """[G] entries per KV head."""
        return (self.positions >= 0).sum(-1)


@dataclasses.dataclass(frozen=True)
class Demand:
    """The budget that an allocator shares out in one row of the batch.

    share: mean entries per KV head; cap: int64 [L, G], the entries there are; least: the method's floor of any one
    head; protected: sinks + window; scored: the L layers it looks at; guard: bool [G, T] of a layer, the entries that
    stay in any case; weights: [L, G], how much head scores make of each KV head.
    """

    share: int
    cap: Tensor
    least: int
    protected: int
    scored: list[Scored] = dataclasses.field(default_factory=list)
    guard: Callable[[Scored], Tensor] | None = None
    weights: Tensor | None = None

    @property
    def total(self) -> int:
        """Entries to keep over all heads."""
        return allocate.total_of(self.cap, self.share)

    def floor(self, least: int | None = None) -> Tensor:
        """int64 [L, G]: entries that every head keeps at least, `least` or what the method says, as far as they go."""
        return self.cap.clamp(max=min(self.share, self.least if least is None else least))

    @property
    def scores(self) -> Tensor:
        """[L, G, T], -inf where there is no entry."""
        return stack([layer.scores for layer in self.scored], -torch.inf)

    @property
    def guarded_scores(self) -> Tensor:
        """[L, G, T]: the scores, inf for sinks and window."""
        return stack([layer.scores.masked_fill(self.guard(layer), torch.inf) for layer in self.scored], -torch.inf)


class Allocator(Part, ABC):
    """Decides how much each head keeps. looks_at: the scores of one layer at a time, of all layers, or of none.

    What looks at one layer or none is decided layer by layer, so that a prefill never holds two layers in full. What
    looks at none sees the lengths of all layers. reads_heads: it wants the head scores that the field `heads` names.
    """

    kind = "allocator"
    looks_at: ClassVar[Literal["layer", "model", "nothing"]] = "layer"
    reads_heads: ClassVar[bool] = False

    @abstractmethod
    def counts(self, demand: Demand) -> Tensor:
        """int64 [L, G]: entries that each head keeps, at most `demand.cap`, `demand.total` in all."""


@register("uniform")
@dataclass(frozen=True)
class Uniform(Allocator):
    """Every head keeps the same number."""

    def counts(self, demand: Demand) -> Tensor:
        return allocate.uniform(demand.cap, demand.share)


@register("ada")
@dataclass(frozen=True)
class Ada(Allocator):
    """AdaKV: the heads of a layer compete for that layer's even share."""

    alpha: float = Field(allocate.ALPHA, ge=0, le=1, description="part of the even share that every head keeps")

    def counts(self, demand: Demand) -> Tensor:
        return allocate.ada(demand.guarded_scores, demand.share, demand.floor(), demand.cap, self.alpha)


@register("global")
@dataclass(frozen=True)
class Global(Allocator):
    """The best entries of all heads and layers together."""

    looks_at: ClassVar = "model"

    floor: int | None = Field(None, ge=0, description="entries that every head keeps; null: minimum, sinks + window")

    def counts(self, demand: Demand) -> Tensor:
        return allocate.by_threshold(demand.guarded_scores, demand.total, demand.floor(self.floor))


@register("prefix")
@dataclass(frozen=True)
class Prefix(Allocator):
    """PrefixKV: every layer keeps the same part of its scores' mass."""

    looks_at: ClassVar = "model"

    floor: int | None = Field(None, ge=0, description="entries that every head keeps; null: minimum, sinks + window")

    def counts(self, demand: Demand) -> Tensor:
        return allocate.prefix(demand.scores, demand.total, demand.floor(self.floor), demand.cap)


@register("pyramid")
@dataclass(frozen=True)
class Pyramid(Allocator):
    """PyramidKV: a budget that falls linearly with depth."""

    looks_at: ClassVar = "nothing"

    beta: float = Field(allocate.BETA, ge=1, description="the last layer keeps about 1 / beta of the mean")

    def counts(self, demand: Demand) -> Tensor:
        return allocate.pyramid(demand.share, demand.protected, demand.floor(), demand.cap, self.beta)


@register("heads")
@dataclass(frozen=True)
class Heads(Allocator):
    """In proportion to head scores, the best query head of each group speaking for its KV head."""

    looks_at: ClassVar = "nothing"
    reads_heads: ClassVar[bool] = True

    def counts(self, demand: Demand) -> Tensor:
        return allocate.water_fill(demand.weights, demand.total, demand.floor(), demand.cap)


def stack(rows: list[Tensor], fill: float) -> Tensor:
    """Per-layer tensors of unequal shapes as one, padded at the end."""
    shape = [max(row.shape[d] for row in rows) for d in range(rows[0].ndim)]
    out = rows[0].new_full((len(rows), *shape), fill)
    for place, row in enumerate(rows):
        out[(place, *(slice(0, size) for size in row.shape))] = row
    return out
