"""A context that is read a second time with gradients: what each head's output is worth to the tokens behind it."""
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from llmopt_kernels import Rule, attention_weights, dense_attention
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from llmopt.calibration.losses import odds_slopes
from llmopt.model.blocks import blocks, decoder
from llmopt.runtime.interface import attending_by, llmopt_mask
from llmopt.runtime.replay import check_positions, chunks

NAME = "llmopt_reread"      # of the attention function
KEY = "_llmopt_reread"      # where attention modules keep what they have computed
CHUNK = 256                 # tokens of the second reading that share one backward pass


@dataclass(frozen=True)
class Reread:
    """One layer while a chunk of t tokens is read behind its context, over the last S of all `seen` positions.

    weights: attention [H, t, S]; values [G, S, D]; output: [H, t, D]; slope: what is made of the model's predictions,
    summed over the chunk, gains by it [H, t, D]. All fp32.
    """

    layer: int
    seen: int
    weights: Tensor
    values: Tensor
    output: Tensor
    slope: Tensor


def reread(model: nn.Module, ids: Tensor, asked: list[int], size: int, slopes: Callable[[Tensor], Tensor],
           see: Callable[[Reread], None]) -> None:
    """Read the context `ids` [n], then again in chunks of `size` tokens, each on its own and shown layer by layer.

    slopes: what is made of the predictions, by the decoder's output [1, t, E], changes by it [1, t, E]. Gradients reach
    the attention outputs of the chunk; one backward pass a chunk.
    """
    found: list[tuple[int, Tensor, Tensor, Tensor]] = []
    read, ids = decoder(model), ids.to(model.device)
    model.requires_grad_(False)
    with attending_by(model, NAME, KEY, lambda layer, module: (found, layer)):
        whole = DynamicCache(config=model.config)
        with torch.no_grad():
            read(input_ids=ids[None], past_key_values=whole, use_cache=True)
        for chunk in chunks(ids, asked, size):
            found.clear()
            check_positions(model, len(ids), len(chunk))
            with torch.enable_grad(), allow_mutation_on_saved_tensors():    # caches write states in place
                hidden = read(input_ids=chunk[None], past_key_values=deepcopy(whole), use_cache=True)[0]
                outputs = [output for *_, output in found]
                own = torch.autograd.grad(hidden, outputs, slopes(hidden))
            for (layer, weights, values, output), slope in zip(found, own, strict=True):
                see(Reread(layer, len(ids) + len(chunk), *(x.detach()[0].float() for x in
                                                           (weights, values, output, slope))))


def replay_odds(model: nn.Module, ids: Tensor, asked: list[int], size: int) -> list[Tensor]:
    """By layer, how far predictions move when an entry of the context `ids` [n] goes alone: [G, n], 1 on average.

    sum over the tokens t of the second reading of (sum over the heads h of the group of
    g_t^h . (o_t^h - v_j) a_tj^h / (1 - a_tj^h))^2          g: the slope of the log odds of what the model prefers

    To the first order; attention a to the others rises to fill the gap. [0, n] where attention is skipped.
    """
    found = [torch.zeros(block.kv_heads if block.attention is not None else 0, len(ids)) for block in blocks(model)]

    def see(part: Reread) -> None:
        moved, slid = moves(part).square().sum(1).cpu(), part.seen - part.weights.shape[-1]
        found[part.layer][:, slid:] += moved[:, :len(ids) - slid]

    reread(model, ids, asked, size, lambda hidden: odds_slopes(model, hidden), see)
    even = torch.cat([layer.flatten() for layer in found]).mean().clamp(min=1e-30)
    return [layer / even for layer in found]


def moves(part: Reread) -> Tensor:
    """What each entry's going alone takes from what the slopes are of: [G, t, S]."""
    groups = len(part.values)
    told = part.slope @ part.values.mT.repeat_interleave(len(part.weights) // groups, 0)              # [H, t, S]
    whole = (part.slope * part.output).sum(-1, keepdim=True)
    weights = part.weights.clamp(max=1 - 1e-3)
    return (weights / (1 - weights) * (whole - told)).unflatten(0, (groups, -1)).sum(1)


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
