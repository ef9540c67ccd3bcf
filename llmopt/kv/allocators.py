"""How many entries each KV head keeps: the pieces that a recipe names in `allocate`, over the functions beside."""
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration import head_scores
from llmopt.errors import LlmoptError
from llmopt.files.json_shapes import finite
from llmopt.kv import allocate
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks
from llmopt.parts import Part, register

if TYPE_CHECKING:
    from llmopt.kv.base import Scorer


class Scored(NamedTuple):
    """One layer of one row: the worth of its entries [G, T], -inf at holes, their positions and columns [G, T]."""

    scores: Tensor
    positions: Tensor
    carried: dict[str, Tensor]

    @property
    def counts(self) -> Tensor:
        """[G] entries per KV head."""
        return (self.positions >= 0).sum(-1)


class Room(NamedTuple):
    """What the KV heads of a row have in sight: entries that may go, and those that stay in any case, int64 [L, G]; and
    how many are to stay in all. What a sliding window has left behind is in neither.
    """

    free: Tensor
    sure: Tensor
    total: int


@dataclasses.dataclass(frozen=True)
class Demand:
    """The budget that an allocator shares out in one row of the batch.

    share: mean entries per KV head; cap: int64 [L, G], the entries there are; even: int64 [L, G], the share, or all of
    the row's tokens that the layer can see, where these are fewer; least: the method's floor of any one head, int64 []
    or [L, G]; protected: int64 [L, G], sinks and window as far as a layer sees them; scored: the L layers it looks at;
    guard: bool [G, T] of a layer, the entries that stay in any case; weights: [L, G], how much head scores make of each
    KV head.
    """

    share: int
    cap: Tensor
    even: Tensor
    least: Tensor
    protected: Tensor
    scored: list[Scored] = dataclasses.field(default_factory=list)
    guard: Callable[[Scored], Tensor] | None = None
    weights: Tensor | None = None

    @property
    def total(self) -> int:
        """Entries to keep over all heads."""
        return allocate.total_of(self.cap, self.even)

    def floor(self, least: int | Tensor | None = None) -> Tensor:
        """int64 [L, G]: entries that every head keeps at least, `least` or what the method says, as far as they go."""
        return self.cap.clamp(max=self.share).minimum(torch.as_tensor(self.least if least is None else least))

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
    learns: its `plan` runs the model, on the texts that heads.replay has read.
    """

    kind = "allocator"
    looks_at: ClassVar[Literal["layer", "model", "nothing"]] = "layer"
    reads_heads: ClassVar[bool] = False
    usual_heads: ClassVar[str | None] = None            # the head scores that it reads where `heads` names none
    sinks: ClassVar[int] = 0                            # first tokens that every head keeps, whatever the method says
    learns: ClassVar[bool] = False

    def backward(self, rows: int, length: int) -> int:
        """See Method.backward."""
        return 0

    def check_scores(self, scorer: "Scorer", scores: list[Tensor]) -> None:
        """See Method.check_scores."""

    def plan(self, scorer: "Scorer", record: Record, model: nn.Module, run: Run) -> dict[str, Any]:
        """Plain JSON that `weights` needs, decided once when the method is applied; record: what `scorer` learned."""
        return {}

    @property
    def meta_shape(self) -> dict:
        """The form of what `plan` gives, as files/json_shapes.py writes it."""
        return {}

    def check_meta(self, meta: dict[str, Any], heads: list[int], label: str) -> None:
        """Raise LlmoptError for what its form does not rule out; heads: KV heads of each layer of the model."""

    def weights(self, meta: dict[str, Any], layers: list[int], room: Room) -> Tensor | None:
        """How much of the budget each KV head of these `layers` deserves [L, G], by what `plan` gave; None: all alike.
        """
        return None

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
        return allocate.ada(demand.guarded_scores, demand.even, demand.floor(), demand.cap, self.alpha)


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
        return allocate.pyramid(demand.even, demand.protected, demand.floor(), demand.cap, self.beta)


SINKS = Field(4, ge=0, description="first tokens that every head keeps, for attention that finds nothing else")


@register("heads")
@dataclass(frozen=True)
class Heads(Allocator):
    """In proportion to head scores, the best query head of each group speaking for its KV head; below 0 is as 0."""

    looks_at: ClassVar = "nothing"
    reads_heads: ClassVar[bool] = True

    sinks: int = SINKS

    def plan(self, scorer: "Scorer", record: Record, model: nn.Module, run: Run) -> dict[str, Any]:
        self.check_scores(scorer, head_scores.find(scorer.heads, run, model))
        return {"shares": best_of_groups(scorer.heads, run, model)}

    def check_scores(self, scorer: "Scorer", scores: list[Tensor]) -> None:
        every = torch.cat(scores)
        if bool((every < 0).any()) and not bool((every > 0).any()):
            raise LlmoptError(f"heads: {scorer.heads} holds no score above 0, which would say who gets more; "
                              "heads.retrieval, heads.replay and heads.span give scores from 0")

    @property
    def meta_shape(self) -> dict:
        return {"shares": [[finite]]}

    def check_meta(self, meta: dict[str, Any], heads: list[int], label: str) -> None:
        check_heads(meta["shares"], heads, label)

    def weights(self, meta: dict[str, Any], layers: list[int], room: Room) -> Tensor:
        return of_layers(meta["shares"], layers)

    def counts(self, demand: Demand) -> Tensor:
        return allocate.water_fill(demand.weights, demand.total, demand.floor(), demand.cap)


@dataclass(frozen=True)
class Tabled(Allocator):
    """A budget for every head that was measured once, at several kept shares, by a table of kept parts.

    {"kept": [R], "parts": [R][L][G]}: which part of its entries each head keeps where so many of all are kept, sinks,
    window, and what a sliding window has left behind apart. In force is the row, interpolated, whose parts of what the
    heads have in sight now are the budget; so a head keeps its part whatever other layers hold of a longer text.
    """

    looks_at: ClassVar = "nothing"

    sinks: int = SINKS

    @property
    def meta_shape(self) -> dict:
        return {"kept": [finite], "parts": [[[finite]]]}

    def check_meta(self, meta: dict[str, Any], heads: list[int], label: str) -> None:
        if len(meta["kept"]) != len(meta["parts"]) or sorted(meta["kept"]) != meta["kept"] or not meta["kept"]:
            raise LlmoptError(f"{label}: parts for {len(meta['parts'])} kept shares; {meta['kept']} are named")
        for part in meta["parts"]:
            check_heads(part, heads, label)

    def weights(self, meta: dict[str, Any], layers: list[int], room: Room) -> Tensor:
        inner = [of_layers(parts, layers) for parts in meta["parts"]]
        table = torch.stack([torch.zeros_like(inner[0]), *inner, torch.ones_like(inner[0])]) * room.free     # [R, L, G]
        sizes, wanted = table.sum((1, 2)), room.total - int(room.sure.sum())
        place = int((sizes[1:-1] < wanted).sum())
        low, high = sizes[place:place + 2].tolist()
        mix = min(1.0, max(0.0, (wanted - low) / max(1e-9, high - low)))
        return torch.lerp(table[place], table[place + 1], mix) + room.sure

    def counts(self, demand: Demand) -> Tensor:
        return allocate.water_fill(demand.weights, demand.total, demand.floor(demand.protected), demand.cap)


@register("profile")
@dataclass(frozen=True)
class Profile(Tabled):
    """As many as the head has among the best replay scores of the model, by heads.replay."""

    reads_heads: ClassVar[bool] = True
    usual_heads: ClassVar = "heads.replay"

    def plan(self, scorer: "Scorer", record: Record, model: nn.Module, run: Run) -> dict[str, Any]:
        """The table, from the step that `heads` names, or from its file."""
        names = {"at_5": 0.05, "at_10": 0.1, "at_25": 0.25, "at_50": 0.5}
        parts = [best_of_groups(scorer.heads or self.usual_heads, run, model, name) for name in names]
        return {"kept": list(names.values()), "parts": parts}


def of_layers(rows: list[list[float]], layers: list[int]) -> Tensor:
    """What a table [layers of the model][G] has for these layers: float64 [L, G]."""
    return stack([torch.tensor(rows[layer], dtype=torch.float64) for layer in layers], 0.0)


def best_of_groups(name: str, run: Run, model: nn.Module, beside: str | None = None) -> list[list[float]]:
    """Head scores, or a figure beside them, by KV head [L][G]: the best query head of each group speaks for it."""
    found = zip(head_scores.find(name, run, model, beside), blocks(model), strict=True)
    return [scores.view(block.kv_heads, -1).amax(1).tolist() if block.heads else [] for scores, block in found]


def check_heads(rows: list[list[float]], heads: list[int], label: str) -> None:
    """Raise LlmoptError unless there is a number for each KV head of every layer."""
    found = [len(row) for row in rows]
    if found != heads:
        raise LlmoptError(f"{label}: shares for {str(found)[:200]} KV heads per layer; the model has {heads}")


def stack(rows: list[Tensor], fill: float) -> Tensor:
    """Per-layer tensors of unequal shapes as one, padded at the end."""
    shape = [max(row.shape[d] for row in rows) for d in range(rows[0].ndim)]
    out = rows[0].new_full((len(rows), *shape), fill)
    for place, row in enumerate(rows):
        out[(place, *(slice(0, size) for size in row.shape))] = row
    return out
