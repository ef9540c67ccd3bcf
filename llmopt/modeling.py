"""Per-layer shapes: the part behind AutoModel, and the file that is copied into checkpoints (torch + transformers only)."""
import torch
from torch import nn


class SkippedAttn(nn.Module):
    """Stands where a layer has lost its attention: adds nothing, but counts the tokens in this layer's cache."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            batch, tokens, _ = hidden_states.shape
            marker = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(marker, marker, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedFFN(nn.Module):
    """Stands where a layer has lost its feed-forward part."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)
