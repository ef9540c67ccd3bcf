"""Attention maps without ever holding one: every layer's rows, a tile of queries at a time."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from llmopt_kernels import Rule, attention_weights, dense_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llmopt.model.positions import refuse_bidirectional
from llmopt.runtime.interface import attending_by, llmopt_mask

NAME = "llmopt_rows"        # of the attention function
KEY = "_llmopt_see"         # where attention modules keep who looks on
ENTRIES = 2**24             # of a tile: 64 MiB of fp32


@dataclass(frozen=True)
class Rows:
    """Attention of some queries [t] of one layer over keys [S]: weights [B, H, t, S], fp32; both are positions.

    Keys that no query of the tile can see are left out. real: bool [B, t], False at queries that are padding.
    """

    layer: int
    weights: Tensor
    queries: Tensor
    keys: Tensor
    real: Tensor


@contextmanager
def attention_rows(model: nn.Module, see: Callable[[Rows], None], rows: slice | None = None) -> Iterator[None]:
    """While it is open, a forward without a cache, of the model or of a block, hands every tile of every map to `see`.

    rows: the queries that are wanted, by their place in the row of the batch; the others are computed without a map.
    Blocks that are called one by one must have got their masks inside; calibration.walk.Visit.attention sees to it.
    """
    refuse_bidirectional(model)
    with attending_by(model, NAME, KEY, lambda layer, module: (see, layer, rows)):
        yield


def rows_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                   scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                   softcap: float | None = None, s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """The attention function: query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D]."""
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    total, lines = query.shape[2], query.shape[0] * query.shape[1]
    see, layer, rows = module.__dict__[KEY]
    first, last, _ = slice(None).indices(total) if rows is None else rows.indices(total)
    size = max(1, ENTRIES // (lines * total))
    tiles = [(start, min(start + size, last)) for start in range(first, last, size)]
    out = [_unseen((query, key, value), attention_mask, rule, (0, first)),
           *(_tile((see, layer), (query, key, value), attention_mask, rule, tile) for tile in tiles),
           _unseen((query, key, value), attention_mask, rule, (max(first, last), total))]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def _unseen(qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, rule: Rule, tile: tuple[int, int]) -> Tensor:
    """Attention of queries nobody looks at: [B, H, t, D]."""
    (query, key, value), (start, stop) = qkv, tile
    if start == stop:
        return query[:, :, :0]
    mask = None if mask is None else mask[:, :stop].bool()
    return dense_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], mask, start, rule)


def _tile(looking: tuple, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, rule: Rule,
          tile: tuple[int, int]) -> Tensor:
    """Attention of the queries from tile[0] to tile[1]: [B, H, t, D]."""
    (query, key, value), (start, stop), (see, layer) = qkv, tile, looking
    first = 0 if rule.window is None else max(0, start - rule.window + 1)
    i, j = (torch.arange(a, stop, device=query.device) for a in (start, first))
    visible = rule.visible(i, j)[None, None]                                             # [1, 1, t, S]
    if mask is not None:
        visible = visible & mask[:, None, None, first:stop]
    weights = attention_weights(query[:, :, start:stop], key[:, :, first:stop], visible, rule)
    real = visible.new_ones(len(query), stop - start) if mask is None else mask[:, start:stop].bool()
    see(Rows(layer, weights, i, j, real))
    groups = value.shape[1]
    mixed = weights.unflatten(1, (groups, -1)).flatten(2, 3) @ value[:, :, first:stop].float()     # [B, G, g t, D]
    return mixed.view(*weights.shape[:3], -1).to(query.dtype)


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, llmopt_mask)
