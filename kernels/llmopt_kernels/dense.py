"""Dense causal attention by torch's fused kernel, with padding and windows; softcap and sinks take the long way."""
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_kernels.reference import Rule, attention


def dense_visible(query: Tensor, keys: Tensor, mask: Tensor | None, first: int, rule: Rule) -> Tensor | None:
    """The visibility of the S newest tokens to each query: bool [B or 1, T, S]; None when all are visible."""
    last, total = first + query.shape[2], keys.shape[2]
    reaches = rule.window is None or total <= rule.window
    if query.shape[2] == 1 and mask is None and reaches:
        return None
    i = torch.arange(first, last, device=query.device)
    visible = rule.visible(i, torch.arange(last - total, last, device=query.device)).unsqueeze(0)
    return visible if mask is None else visible & mask[:, None, last - total:]


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, first: int, rule: Rule) -> Tensor:
    """Causal attention of the tokens from position `first` on over the S newest tokens: [B, H, T, D]."""
    batch, heads, tokens, dim = query.shape
    total = keys.shape[2]
    plain = mask is None and (rule.window is None or total <= rule.window)
    if not rule.plain:
        visible = dense_visible(query, keys, mask, first, rule)
        return attention(query, keys, values, None if visible is None else visible.unsqueeze(1), rule)
    if plain and tokens == total:
        return scaled_dot_product_attention(query, keys, values, is_causal=tokens > 1, scale=rule.scaling,
                                            enable_gqa=True)
    visible = dense_visible(query, keys, mask, first, rule)
    visible = None if visible is None else visible.unsqueeze(1)                          # [B, 1, T, S]
    if tokens == 1:                          # the g query heads of a group as rows: much faster than repeating keys
        rows = query.view(batch, keys.shape[1], -1, dim)
        out = scaled_dot_product_attention(rows, keys, values, visible, scale=rule.scaling)
        return out.reshape(batch, heads, 1, -1)
    out = scaled_dot_product_attention(query, keys, values, visible, scale=rule.scaling, enable_gqa=True)
    return out.nan_to_num(0.0)               # a padding query sees nothing
