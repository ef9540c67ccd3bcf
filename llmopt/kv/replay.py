"""Scores of entries by what is read again: the context is replayed on a copy of the cache, chunk by chunk."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmopt.runtime.attach import frozen
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.hooks import Attachment


def highest_scores(live: Attachment, cache: LlmoptCache, row: int, chunks: Iterator[Tensor],
                   score: Callable[[LlmoptCache, int], Tensor]) -> dict[int, Tensor]:
    """By layer, the maximum over chunks, int64 [t] each, of `score(copy, layer)`: [1, G, T].

    copy: the row's cache after it has read the chunk; its layers hold the queries of the chunk in `queries`.
    """
    best: dict[int, Tensor] = {}
    for chunk in chunks:
        copy = _read(live, cache, row, chunk)
        for index in cache.attending():
            scores = score(copy, index)
            best[index] = torch.maximum(best[index], scores) if index in best else scores
    return best


def _read(live: Attachment, cache: LlmoptCache, row: int, chunk: Tensor) -> LlmoptCache:
    """A copy of one row of the cache that has read `chunk` [t] behind what it had seen."""
    copy = cache.fork()
    copy.forward = None
    copy.batch_select_indices(torch.tensor([row]))
    places = {}
    if copy.position_ids is not None:
        first = int(copy.position_ids.max()) + 1
        places["position_ids"] = torch.arange(first, first + len(chunk), device=chunk.device)[None]
    with live.now.nested(), frozen(live.model, recording=True):
        live.model.get_decoder()(input_ids=chunk[None], past_key_values=copy, use_cache=True, **places)
    return copy
