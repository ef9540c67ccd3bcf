"""What a scorer makes of a text, without dropping any of it."""
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.kv.base import Scorer, Turn
from llmopt.method import Record
from llmopt.model.blocks import layer_list
from llmopt.runtime.attach import CacheMethod, attached
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.hooks import Attachment


class Listener(CacheMethod):
    """Takes down the scores that `scorer` would give, and drops nothing."""

    name, every = "listener", None

    def __init__(self, scorer: Scorer, record: Record):
        self.scorer, self.known = scorer, record
        self.replays, self.layer_by_layer = scorer.replays, not scorer.replays
        self.found: dict[int, Tensor] = {}

    def to_dict(self) -> dict[str, Any]:
        return {self.name: {}}

    def queries(self) -> int | None:
        return self.scorer.queries()

    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        turn = Turn(cache, live, self.known, 0)
        for index, layer in zip(layers, self.scorer.scores_of(turn, layers), strict=True):
            full = layer.scores.new_full((len(layer.scores), cache.get_seq_length()), -torch.inf)
            self.found[index] = full.scatter_(1, layer.positions.long(), layer.scores)      # -inf where it slid away


@torch.no_grad()
def own_scores(scorer: Scorer, record: Record, model: nn.Module, ids: Tensor) -> list[Tensor]:
    """By layer, the scorer's scores of all entries of a text `ids` [n]: [G, n], as after a prefill."""
    listener = Listener(scorer, record)
    with attached(model, listener):
        model.get_decoder()(input_ids=ids[None].to(model.device), use_cache=True)
    nothing = torch.zeros(0, len(ids))
    return [listener.found.get(index, nothing).cpu() for index in range(len(layer_list(model)))]
