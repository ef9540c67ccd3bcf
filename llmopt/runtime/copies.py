"""A text that is read once, and copies of its cache made smaller in many ways, each as if read under that method.

    with copies.keeping(model):
        whole = copies.read(model, ids)
        with whole.compressed((method, method.plan(model, run)), (store, Record())) as cache:
            ...                                         # the cache that a prefill with both attached would have left
"""
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.method import Record
from llmopt.model.blocks import decoder
from llmopt.runtime.attach import RuntimeMethod, attached, attachment, frozen
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.cache_layer import RaggedLayer
from llmopt.runtime.compression import EVICTOR
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.onlooker import Onlooker


class Keeper(Onlooker):
    """Leaves in the cache all that a kv method may ask for: every query, what attention read, token ids."""

    name, hidden, reads_ids = "keeper", True, True


def keeping(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside, what the model reads is kept whole; nothing else may be attached to it."""
    return attached(model, Keeper())


@dataclass
class Whole:
    """A cache from which nothing was dropped. replayed: scores of what was read again for one of its copies."""

    model: nn.Module
    cache: LlmoptCache
    replayed: dict[Any, Any] = field(default_factory=dict)

    @torch.no_grad()
    def further(self, ids: Tensor) -> "Whole":
        """What this becomes when the model reads ids [B, T] behind it; this one stays as it is."""
        cache = self.cache.fork()
        decoder(self.model)(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True)
        return Whole(self.model, cache)

    @contextmanager
    def compressed(self, *parts: tuple[RuntimeMethod, Record]) -> Iterator[LlmoptCache]:
        """Inside, these methods are in force, nothing more is dropped, and the cache is what they have left."""
        live, copy = attachment(self.model), self.cache.fork()
        with _in_place_of_keeper(live, parts), torch.no_grad():
            for index in copy.attending():
                _leave_to(live, copy.layers[index], index)
            live.finish(copy, self.replayed)
            with frozen(self.model):
                yield copy


def read(model: nn.Module, ids: Tensor) -> Whole:
    """The cache of ids [B, T], kept whole; the model must be inside `keeping`."""
    return Whole(model, attachment(model).new_cache()).further(ids)


@contextmanager
def _in_place_of_keeper(live: Attachment, parts: tuple[tuple[RuntimeMethod, Record], ...]) -> Iterator[None]:
    before = dict(live.parts)
    live.keep({})
    try:
        for method, record in parts:
            live.add(method, record)
        yield
    finally:
        live.keep({})
        live.keep(before)


def _leave_to(live: Attachment, layer: RaggedLayer, index: int) -> None:
    """Take from a layer what the evictor that is attached now would not have asked for."""
    method = live.method(EVICTOR)
    if method is None or method.replays or method.queries() == 0 and not method.hidden:
        layer.forget_queries()
        return
    if method.queries() == 0:
        layer.queries = layer.queries[..., :0]
    layer.hidden = method.condense(layer.hidden, index, live.record(EVICTOR)) if method.hidden else None
    layer.forget_queries(None if method.hidden else method.queries())
