"""What becomes of the entries that are not kept: the pieces that a recipe names in `reduce`."""
from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.kv import reduce
from llmopt.kv.view import LayerKV
from llmopt.parts import Part, register
from llmopt.runtime.cache_layer import Entries


class Reducer(Part, ABC):
    """Makes one layer of one row smaller."""

    kind = "reducer"
    turns: ClassVar[bool] = False       # it turns keys to other positions

    @abstractmethod
    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        """The entries of which those in `keep` stay: bool [G, T]; scores [G, T], -inf at holes.

        kv: what the scorer saw of the layer, a batch of one row (rotary tables, queries, the record).
        """


@register("evict")
@dataclass(frozen=True)
class Evict(Reducer):
    """They are dropped."""

    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        return reduce.evict(entries, keep)


@register("merge")
@dataclass(frozen=True)
class Merge(Reducer):
    """The value of each is added to that of the kept entry with the most similar key."""

    def reduce(self, kv: LayerKV, entries: Entries, keep: Tensor, scores: Tensor) -> Entries:
        return reduce.merge(entries, keep)
