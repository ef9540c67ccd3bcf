"""What a scorer sees and makes of a text, without dropping any of it."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.kv.base import Scorer, Turn, view_of
from llmopt.kv.view import LayerKV
from llmopt.method import Record, Replayed, Run
from llmopt.model.blocks import blocks, layer_list
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.onlooker import Onlooker, show


class Listener(Onlooker):
    """Takes down the scores that `scorer` would give."""

    name = "listener"

    def __init__(self, scorer: Scorer, record: Record):
        self.scorer, self.known = scorer, record
        self.replays, self.layer_by_layer, self.hidden = scorer.replays, not scorer.replays, scorer.hidden
        self.reads_ids = scorer.reads_ids
        self.found: dict[int, Tensor] = {}

    def queries(self) -> int | None:
        return self.scorer.queries()

    def condense(self, hidden: Tensor, index: int, record: Record) -> Tensor:
        return self.scorer.condense(hidden, index, self.known)

    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        turn = Turn(cache, live, self.known, 0)
        for index, layer in zip(layers, self.scorer.scores_of(turn, layers), strict=True):
            full = layer.scores.new_full((len(layer.scores), cache.get_seq_length()), -torch.inf)
            self.found[index] = full.scatter_(1, layer.positions.long(), layer.scores)      # -inf where it slid away
            cache.layers[index].forget_queries()


def replays_of(run: Run, model: nn.Module, label: str) -> list[Replayed]:
    """The texts that heads.replay has read twice; raises LlmoptError for none, or for those of other heads."""
    if not run.replays:
        raise LlmoptError(f"{label} needs the step heads.replay before it")
    found, wanted = ([len(layer) for layer in run.replays[0].scores], [block.kv_heads for block in blocks(model)])
    if found != wanted:
        raise LlmoptError(f"{label}: heads.replay has read its texts with {found} KV heads per layer; the model has "
                          f"{wanted} by now. Prune first, in a recipe of its own")
    return run.replays


def own_scores(scorer: Scorer, record: Record, model: nn.Module, ids: Tensor) -> list[Tensor]:
    """By layer, the scorer's scores of all entries of a text `ids` [n]: [G, n], as after a prefill."""
    listener = Listener(scorer, record)
    show(model, ids, listener)
    nothing = torch.zeros(0, len(ids))
    return [listener.found.get(index, nothing).cpu() for index in range(len(layer_list(model)))]


class Watcher(Onlooker):
    """Shows every layer of a text to `see`, with all queries and what its attention read."""

    name, layer_by_layer, hidden = "watcher", True, True

    def __init__(self, see: Callable[[LayerKV], None]):
        self.see = see

    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        turn = Turn(cache, live, record, 0)
        for index in layers:
            self.see(view_of(turn, index, turn.entries(index)))
            cache.layers[index].forget_queries()


def watch(model: nn.Module, ids: Tensor, see: Callable[[LayerKV], None]) -> None:
    """Show all layers of a text `ids` [n] to `see`, one by one, each right after its attention."""
    show(model, ids, Watcher(see))
