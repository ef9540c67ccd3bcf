"""Attention over ragged kept entries without fp32 copies: one fused SDPA call per KV head."""
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_kernels import reference
from llmopt_kernels.reference import Packed, Ragged, Rule, dense, softmax

FEW = 16            # queries for which packed entries are better multiplied as they are than made dense


def ragged_attention(query: Tensor, kept: Ragged, tail: tuple[Tensor, Tensor], tail_visible: Tensor | None,
                     first: int, rule: Rule) -> Tensor:
    """As `reference.ragged_attention`: [B, H, T, D] -> [B, H, T, D].

    The g query heads of a group are rows of one call.
    """
    if isinstance(kept.keys, Packed) and query.shape[2] <= FEW:
        return _packed_attention(query, kept, tail, tail_visible, first, rule)
    if not rule.plain or kept.bias is not None:
        return reference.ragged_attention(query, kept, tail, tail_visible, first, rule)
    batch, heads, tokens, dim = query.shape
    group = heads // kept.counts.shape[1]
    rows = query.reshape(batch, -1, group * tokens, dim)                             # [B, G, g T, D]
    out = query.new_empty(*rows.shape[:3], tail[1].shape[-1])
    i = torch.arange(first, first + tokens, device=query.device)
    plain = rule.window is None and tail_visible is None
    visible = tail[0].new_ones(1, 1, 1, dtype=torch.bool) if tail_visible is None else tail_visible
    visible = visible.expand(batch, tokens, tail[0].shape[2])
    for row, head, where in kept.heads():
        keys, values = (torch.cat([dense(old[where]), new[row, head]])[None, None]
                        for old, new in zip((kept.keys, kept.values), tail, strict=True))
        if plain:
            out[row, head] = scaled_dot_product_attention(rows[row, head][None, None], keys, values,
                                                          scale=rule.scaling)[0, 0]
            continue
        seen = torch.cat([rule.visible(i, kept.positions[where]), visible[row]], -1).repeat(group, 1)
        part = scaled_dot_product_attention(rows[row, head][None, None], keys, values, seen, scale=rule.scaling)[0, 0]
        out[row, head] = part.nan_to_num(0.0)
    return out.view(batch, heads, tokens, -1)


def _packed_attention(query: Tensor, kept: Ragged, tail: tuple[Tensor, Tensor], tail_visible: Tensor | None,
                      first: int, rule: Rule) -> Tensor:
    """Few queries over entries that multiply rows in the form they have: even heads together, others one by one."""
    batch, heads, tokens, dim = query.shape
    groups = kept.counts.shape[1]
    rows = query.reshape(batch * groups, -1, dim).float() * rule.scaling                 # [B G, g T, D]
    tail_keys, tail_values = (x.flatten(0, 1).float() for x in tail)
    i = torch.arange(first, first + tokens, device=query.device)
    visible = tail[0].new_ones(1, 1, 1, dtype=torch.bool) if tail_visible is None else tail_visible
    visible = visible.expand(batch, tokens, tail[0].shape[2]).repeat_interleave(groups, 0)
    sinks = rule.sinks_of(groups)                                                        # -> [B G, g T, 1]
    sinks = None if sinks is None else sinks.expand(-1, -1, tokens, -1).flatten(1, 2).repeat(batch, 1, 1)
    out, start = query.new_empty(*rows.shape[:2], tail[1].shape[-1]), 0
    for lanes, keys, values in kept.lanes:
        old = keys.products(rows[lanes])                                                 # [L, g T, n]
        where, start = slice(start, start + old[:, 0].numel()), start + old[:, 0].numel()
        logits = torch.cat([old, torch.bmm(rows[lanes], tail_keys[lanes].transpose(1, 2))], 2)
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        if kept.bias is not None:
            logits[..., :old.shape[2]] += kept.bias[where].view(len(old), 1, -1)
        seen = None
        if rule.window is not None or tail_visible is not None:
            hidden = rule.visible(i, kept.positions[where].view(len(old), -1))
            seen = torch.cat([hidden, visible[lanes]], 2).repeat(1, heads // groups, 1)
        weights = softmax(logits, seen, None if sinks is None else sinks[lanes])
        old, new = weights.split([old.shape[2], tail[0].shape[2]], 2)
        out[lanes] = values.weighted(old) + torch.bmm(new, tail_values[lanes])
    return out.view(batch, heads, tokens, -1)
