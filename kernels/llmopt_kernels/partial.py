"""Attention in pieces: each remembers the sum of its softmax, so that pieces over different keys can be merged.

    lse = log sum_j exp(logit_j)        out = sum_k exp(lse_k - lse) out_k,  exp(lse) = sum_k exp(lse_k)
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_kernels.reference import Ragged, Rule, dense, product


@dataclass(frozen=True)
class Partial:
    """Attention over some keys alone: out [..., R, D], normalised over these keys, and lse [..., R], both fp32.

    Logits are what `Rule.logits` gives. A row that sees none of the keys has out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor


def weighted(logits: Tensor, values: Tensor, visible: Tensor | None) -> Partial:
    """Softmax of logits [..., R, C], which are overwritten, over values [..., C, D]; visible: bool [..., R, C]."""
    if logits.shape[-1] == 0:
        none = logits.new_full(logits.shape[:-1], -torch.inf)
        return Partial(logits.new_zeros(*none.shape, values.shape[-1]), none)
    seen = logits if visible is None else logits.masked_fill_(~visible, -torch.inf)
    top = seen.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).min)
    weights = seen.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)                        # at least 1, or 0 where nothing is seen
    return Partial(product(weights, values.float()) / total.clamp(min=1.0), (top + total.log()).squeeze(-1))


def merged(one: Partial, other: Partial) -> Partial:
    """Attention over the keys of both, which must not overlap."""
    lse = torch.logaddexp(one.lse, other.lse)
    shares = [(part.lse - lse).exp().nan_to_num(0.0).unsqueeze(-1) for part in (one, other)]
    return Partial(one.out * shares[0] + other.out * shares[1], lse)


def sunk(part: Partial, rule: Rule) -> Partial:
    """The part [H, T, D] merged with the sinks of its heads, if there are any: keys that everybody sees, of value 0."""
    if rule.sinks is None:
        return part
    sinks = rule.sinks.float().unsqueeze(-1)
    return Partial(part.out * torch.sigmoid(part.lse - sinks).unsqueeze(-1), torch.logaddexp(part.lse, sinks))


def by_flash(query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None) -> Partial:
    """By torch's flash kernel on the CPU: [n, U, R, D] over [n, U, C, D]; mask: additive, of the queries' type.

    Out is of that type. A row that sees nothing has out 0, and lse 0 too.
    """
    return Partial(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=mask, scale=scaling))


def merge_into(out: Tensor, lse: Tensor, at: tuple, got: Partial) -> None:
    """Merge [1, n, h R, D] into out [U, h, T, D] and lse [U, h, T], where that is; there, no row of it is without keys.
    """
    here, known = out[at], lse[at]
    more, other = got.out.view(here.shape), got.lse.view(known.shape)
    share = torch.sigmoid(other - known).unsqueeze(-1)
    out[at] = torch.lerp(here, more.to(here.dtype), share.to(here.dtype))
    lse[at] = torch.logaddexp(known, other)


def ragged_partial(query: Tensor, kept: Ragged, first: int, rule: Rule, block: int = 256) -> Partial:
    """Attention over flat kept entries alone, a block of queries at a time: [B, H, T, D] and [B, H, T].

    first: position of the first query; kept entries are older than every query, only the window can hide them. Sinks
    are not among them, as in all parts: see `sunk`.
    """
    batch, heads, tokens, _ = query.shape
    rows = query.unflatten(1, (kept.counts.shape[1], -1))                                # [B, G, g, T, D]
    out = rows.new_empty(*rows.shape[:-1], dense(kept.values[:0]).shape[-1], dtype=torch.float32)
    lse = rows.new_empty(rows.shape[:-1], dtype=torch.float32)
    for row, head, where in kept.heads():
        for start in range(0, tokens, block):
            part = slice(start, min(start + block, tokens))
            i = torch.arange(first + part.start, first + part.stop, device=query.device)
            logits = rule.logits(rows[row, head, :, part], dense(kept.keys[where]).unsqueeze(0))
            logits = logits if kept.bias is None else logits + kept.bias[where]
            seen = None if rule.window is None else rule.visible(i, kept.positions[where])
            got = weighted(logits, dense(kept.values[where]).unsqueeze(0), seen)
            out[row, head, :, part], lse[row, head, :, part] = got.out, got.lse
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))
