"""When the cache is made smaller: by the evictor, which drops entries, and by the store, which packs what is left."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmopt_kernels import Ragged

from llmopt.method import Record
from llmopt.model.heap import give_back_freed
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.cache_layer import Entries

if TYPE_CHECKING:
    from llmopt.runtime.hooks import Attachment

EVICTOR, ATTENTION, STORE = "evicting kv method", "attention method", "kv cache store"      # places: one method each
EXPERTS = "method that skips experts"
WORTH_GIVING_BACK = 1 << 20                                      # bytes freed by a compression


@dataclass(frozen=True)
class Packing:
    """What a store may know besides the entries: which layer and batch row they are of, what its `plan` has recorded,
    and the memory of this forward.

    before: what the layer has kept so far, with its packed keys and values; the column `SOURCE` of the entries tells
    which of them an entry is.
    """

    layer: int
    row: int
    record: Record
    shared: dict[Any, Any]
    before: Ragged | None


def decide(live: "Attachment") -> None:
    """Whether the forward that begins is to end in an eviction (`due`), in a packing (`packs`)."""
    now, evictor, store = live.now, live.method(EVICTOR), live.method(STORE)
    if now.frozen:
        return
    now.due = evictor is not None and _reached(evictor.every, now.tokens, now.cache.pending)
    waiting = now.cache.get_seq_length() - max(layer.folded for layer in now.cache.layers)
    now.packs = store is not None and _reached(store.every, now.tokens, waiting)


def _reached(every: int | None, tokens: int, waiting: int) -> bool:
    """A forward of several tokens always counts; single ones once `every` of them have come."""
    return tokens > 1 or (every is not None and waiting + tokens >= every)


def after_attention(live: "Attachment", index: int) -> None:
    """Make a layer smaller as soon as it is computed, where nothing has to wait for the layers behind it."""
    now, evictor = live.now, live.method(EVICTOR)
    if now.due and not evictor.layer_by_layer:
        return
    if now.due:
        evictor.compress(now.cache, live, live.record(EVICTOR), [index])
    if now.packs:
        _pack(live, now.cache, index)


def after_forward(live: "Attachment", cache: LlmoptCache) -> None:
    """Make all layers smaller where that had to wait, and note that it has been done."""
    now, evictor = live.now, live.method(EVICTOR)
    cache.pending += now.tokens
    if now.due and not evictor.layer_by_layer:
        before = cache.nbytes()
        evictor.compress(cache, live, live.record(EVICTOR), cache.attending())
        for index in cache.attending() if now.packs else ():
            _pack(live, cache, index)
        if before - cache.nbytes() > WORTH_GIVING_BACK:             # all layers in full, freed at once
            give_back_freed()
    if now.due:
        cache.pending = 0
    if now.due or now.packs:
        cache.note_dropped()


def _pack(live: "Attachment", cache: LlmoptCache, index: int) -> None:
    """Hand a layer to the store, unless the evictor has just done so."""
    layer = cache.layers[index]
    if layer.folded < layer.seen:
        fold(live, cache, index, [layer.row(row, cache.real(row)) for row in range(cache.batch_size)])


def fold(live: "Attachment", cache: LlmoptCache, index: int, rows: list[Entries]) -> None:
    """Let a layer hold exactly these entries of its batch rows, in the form that the store gives them if there is one.

    What was packed before is packed again together with what is new: a store should leave its own values alone.
    """
    store, layer = live.method(STORE), cache.layers[index]
    if store is not None:
        record, shared = live.record(STORE), live.now.shared
        rows = [store.pack(entries, Packing(index, row, record, shared, layer.kept))
                for row, entries in enumerate(rows)]
    layer.fold(rows)
