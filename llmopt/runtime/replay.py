"""Reading a context again, chunk by chunk, to see which of its entries are looked at.

As in KVzip (arXiv:2505.23416); KVzip+ (arXiv:2601.07891) weighs what is looked at by what it says.
"""
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from llmopt_kernels import Rule, column_max
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.method import Record
from llmopt.model.blocks import Block, blocks, decoder, layer_list, spec_of
from llmopt.runtime.attach import frozen
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.onlooker import Onlooker, show

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
CUE = 8             # tokens in front of a chunk that are read with it, so that it is found in the context


def request(tokenizer: Any) -> list[int]:
    """The ids of the words that ask for the context; none without a tokenizer."""
    return [] if tokenizer is None else tokenizer(REQUEST, add_special_tokens=False)["input_ids"]


def chunks(ids: Tensor, asked: list[int], size: int) -> Iterator[Tensor]:
    """The context `ids` [n] in pieces of `size` tokens to be read again, each behind the request and a cue."""
    front = torch.tensor(asked, dtype=ids.dtype, device=ids.device)
    for start in range(0, len(ids), size):
        yield torch.cat([front, ids[max(0, start - CUE):start + size]])


def highest_scores(live: Attachment, cache: LlmoptCache, row: int, pieces: Iterable[Tensor],
                   score: Callable[[LlmoptCache, int], Tensor]) -> dict[int, Tensor]:
    """By layer, the maximum over chunks, int64 [t] each, of `score(copy, layer)`: [1, G, T].

    copy: the row's cache after it has read the chunk; its layers hold the queries of the chunk in `queries`.
    """
    best: dict[int, Tensor] = {}
    for chunk in pieces:
        copy = _read(live, cache, row, chunk)
        for index in cache.attending():
            scores = score(copy, index)
            best[index] = torch.maximum(best[index], scores) if index in best else scores
    return best


def check_positions(model: nn.Module, seen: int, more: int) -> None:
    """Raise LlmoptError where a model has no positions for `more` tokens behind those that it has seen."""
    longest = seen + more
    if spec_of(model).rotary is None and longest > getattr(model.config, "max_position_embeddings", longest):
        raise LlmoptError(f"reading {more} tokens again behind {seen} goes beyond the "
                          f"{model.config.max_position_embeddings} positions of this model; use a shorter prompt or "
                          "chunk")


def _read(live: Attachment, cache: LlmoptCache, row: int, chunk: Tensor) -> LlmoptCache:
    """A copy of one row of the cache that has read `chunk` [t] behind what it had seen."""
    check_positions(live.model, cache.get_seq_length(), len(chunk))
    copy = cache.fork()
    copy.forward = None
    copy.batch_select_indices(torch.tensor([row]))
    places = {}
    if copy.position_ids is not None:
        first = int(copy.position_ids.max()) + 1
        places["position_ids"] = torch.arange(first, first + len(chunk), device=chunk.device)[None]
    with live.now.nested(), frozen(live.model, recording=True):
        decoder(live.model)(input_ids=chunk[None], past_key_values=copy, use_cache=True, **places)
    return copy


class Replayer(Onlooker):
    """Reads the context again after a forward, and notes the most attention on each entry, or its effect."""

    name, replays = "replayer", True

    def __init__(self, asked: list[int], size: int, plus: bool):
        self.asked, self.size, self.hidden = asked, size, plus
        self.found: dict[int, Tensor] = {}

    def condense(self, hidden: Tensor, index: int, record: Record) -> Tensor:
        return sizes(hidden)

    def compress(self, cache: LlmoptCache, live: Attachment, record: Record, layers: list[int]) -> None:
        def score(copy: LlmoptCache, index: int) -> Tensor:
            entries, reader = cache.layers[index].row(0, None), copy.layers[index]
            best = largest_attention(reader.queries, reader.query_positions, entries.keys[None],
                                     entries.positions[None], reader.keys, live.rules[index], reader.hidden)
            if self.hidden:
                best = best * effects(live.model, index, entries.values[None])
            best = best.unflatten(1, (len(entries.keys), -1)).amax(2)
            full = best.new_zeros(1, len(entries.keys), cache.get_seq_length())         # what slid away draws nothing
            return full.scatter_(2, entries.positions[None].long(), best)

        self.found = highest_scores(live, cache, 0, chunks(cache.ids[0], self.asked, self.size), score)


def largest_attention(queries: Tensor, at: Tensor, keys: Tensor, positions: Tensor, tail: Tensor, rule: Rule,
                      read: Tensor | None = None) -> Tensor:
    """What each entry draws at most from one of the queries that read it again: [B, H, T].

    queries [B, H, W, D] at positions [B, W]; entries: keys [B, G, T, D] at [B, G, T]. tail [B, G, S, D] ends in the
    queries' own keys, which draw attention too. read: `sizes` [B, W, 1] that the queries' attention is divided by.
    """
    both = torch.cat([keys, tail[:, :, -queries.shape[2]:]], 2)
    places = torch.cat([positions, at[:, None].expand(-1, keys.shape[1], -1)], 2)
    weights = None if read is None else 1 / read[..., 0].clamp(min=1e-9)
    return column_max(queries, both, at, places, rule, weights)[..., :keys.shape[2]]


def sizes(hidden: Tensor) -> Tensor:
    """|h| of what attention reads, hidden [B, T, E]: [B, T, 1], fp32."""
    return hidden.float().norm(dim=-1, keepdim=True)


def effects(model: nn.Module, index: int, values: Tensor) -> Tensor:
    """|v_j W_O^h|: what each value [B, G, T, D] adds to the residual stream by each head of its group, [B, H, T]."""
    weight = output_weight(blocks(model)[index]).to(values.device).float()               # [H, D, E]
    square = (weight @ weight.mT).unflatten(0, (values.shape[1], -1))                    # [G, g, D, D]
    values = values.float()[:, :, None]
    return ((values @ square) * values).sum(-1).clamp(min=0).sqrt().flatten(1, 2)


def output_weight(block: Block) -> Tensor:
    """[H, D, E]: what each query head's result is multiplied by on its way into the residual stream."""
    with align_module_device(block.attn_out.module):                 # it may wait on disk
        return block.attn_out.weight.T.unflatten(0, (block.heads, block.head_dim))         # from [E, H D]


@torch.no_grad()
def replay_scores(model: nn.Module, ids: Tensor, asked: list[int], size: int, plus: bool = False) -> list[Tensor]:
    """By layer, the largest attention that each entry of the context `ids` [n] draws when it is read again: [G, n].

    [0, n] where attention is skipped. plus: times what the entry's value adds to the residual stream, as a part of what
    the query's token had there (KVzip+). Nothing is dropped; it takes the time of two to three prefills.
    """
    replayer = Replayer(asked, size, plus)
    show(model, ids, replayer)
    nothing = torch.zeros(1, 0, len(ids))
    return [replayer.found.get(index, nothing)[0].cpu() for index in range(len(layer_list(model)))]
