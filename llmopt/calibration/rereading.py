"""A context that is read a second time with gradients: what each head's output is worth to the tokens behind it."""
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from llmopt_kernels import Rule, attention_weights, dense_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from llmopt.calibration.losses import drawn_slopes
from llmopt.model.blocks import decoder
from llmopt.runtime.interface import attending_by, llmopt_mask
from llmopt.runtime.replay import chunks

NAME = "llmopt_reread"      # of the attention function
KEY = "_llmopt_reread"      # where attention modules keep what they have computed


@dataclass(frozen=True)
class Reread:
    """One layer while a chunk of t tokens is read behind its context, over the last S of all `seen` positions.

    weights: attention [H, t, S]; values [G, S, D]; output: [H, t, D]; slope: what the log-probability of a token drawn
    from the model's own prediction gains by it, summed over the chunk [H, t, D]. All fp32.
    """

    layer: int
    seen: int
    weights: Tensor
    values: Tensor
    output: Tensor
    slope: Tensor


def reread(model: nn.Module, ids: Tensor, asked: list[int], size: int, see: Callable[[Reread], None]) -> None:
    """Read the context `ids` [n], then again in chunks of `size` tokens, each on its own and shown layer by layer.

    Gradients reach the attention outputs of the chunk; one backward pass a chunk. Tokens are drawn from a fixed seed.
    """
    found: list[tuple[int, Tensor, Tensor, Tensor]] = []
    drawing = torch.Generator(model.device).manual_seed(0)
    read, ids = decoder(model), ids.to(model.device)
    model.requires_grad_(False)
    with attending_by(model, NAME, KEY, lambda layer, module: (found, layer)):
        whole = DynamicCache(config=model.config)
        with torch.no_grad():
            read(input_ids=ids[None], past_key_values=whole, use_cache=True)
        for chunk in chunks(ids, asked, size):
            found.clear()
            with torch.enable_grad():
                hidden = read(input_ids=chunk[None], past_key_values=deepcopy(whole), use_cache=True)[0]
                outputs = [output for *_, output in found]
                slopes = torch.autograd.grad(hidden, outputs, drawn_slopes(model, hidden, drawing))
            for (layer, weights, values, output), slope in zip(found, slopes, strict=True):
                see(Reread(layer, len(ids) + len(chunk), *(x.detach()[0].float() for x in
                                                           (weights, values, output, slope))))


def reread_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                     softcap: float | None = None, s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """The attention function: query [1, H, t, D], key and value [1, G, S, D] -> [1, t, H, D]."""
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    first, found = key.shape[2] - query.shape[2], module.__dict__[KEY]
    if not torch.is_grad_enabled():
        return dense_attention(query, key, value, None, first, rule).transpose(1, 2).contiguous(), None
    places = torch.arange(key.shape[2], device=query.device)
    weights = attention_weights(query, key, rule.visible(places[first:], places)[None, None], rule)
    mixed = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value.float()                   # [1, G, g t, D]
    output = mixed.view(*weights.shape[:3], -1).to(query.dtype)
    if not output.requires_grad:            # the first layer's: nothing below it is asked for gradients
        output.requires_grad_()
    found[0].append((found[1], weights, value, output))
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, reread_attention)
AttentionMaskInterface.register(NAME, llmopt_mask)
