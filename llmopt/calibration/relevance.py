"""How much of the right token's logit comes through a place: layer-wise relevance propagation, attention kept constant.

    R(t) = t * dL/dt,       L = sum over positions of the next token's logit;  backwards through
        linear maps, sums           as they are
        norms, activations f        as the constant factor f(x) / x: all relevance passes on, entry by entry
        gate * up                   half to each
        attention                   its weights are constants, all goes to the values (CP-LRP)

Input times gradient is the epsilon rule in one backward pass; the sum of R over the residual stream is L at every block
of a model without biases. Ali et al., 2022 (arXiv:2202.07304) keep attention constant; Achtibat et al., 2024 (AttnLRP,
arXiv:2402.05602) write the rules as gradients. These are rules of our own making of that kind. The authors of AttnLRP
say of their library that LRP is patented, free for personal and scientific use: who sells should ask.

Left out: relevance of queries and keys, for which AttnLRP has rules; a softcap on the logits.
"""
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from llmopt_kernels import Rule, attention_weights
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2CLS

from llmopt.model.blocks import blocks, decoder, final_norm
from llmopt.runtime.interface import attending_by, llmopt_mask

NAME = "llmopt_relevance"       # of the attention function
KEY = "_llmopt_relevance"
TINY = 1e-12                    # what is smaller has no relevance
ACTIVATIONS = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())


def relevance(model: nn.Module, ids: Tensor, places: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """R [T, E] of what each of the modules puts out on the tokens `ids` [T], float32; the model is as before."""
    model.requires_grad_(False)
    outputs: dict[str, Tensor] = {}

    def kept(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, out: Any) -> None:
            outputs[name] = out[0] if isinstance(out, tuple) else out
        return see

    ids = ids.to(model.device)
    with torch.enable_grad(), _rules(model), ExitStack() as hooks:
        for name, module in places.items():
            hooks.callback(module.register_forward_hook(kept(name)).remove)
        hidden = decoder(model)(input_ids=ids[None], use_cache=False)[0]                  # [1, T, E]
        slope = torch.zeros_like(hidden)
        slope[0, :-1] = model.get_output_embeddings().weight[ids[1:]].to(hidden.dtype)
        slopes = torch.autograd.grad(hidden, list(outputs.values()), slope)
    return {name: (out.detach().float() * grad.float())[0] for (name, out), grad in
            zip(outputs.items(), slopes, strict=True)}


@contextmanager
def _rules(model: nn.Module) -> Iterator[None]:
    """Inside, gradients through the model follow the rules; what it computes is the same."""
    with ExitStack() as hooks, attending_by(model, NAME, KEY, lambda layer, module: None):
        hooks.callback(model.get_input_embeddings().register_forward_hook(_leaf).remove)
        views = blocks(model)
        norms = [norm.module for block in views for norm in block.norms.values()] + [final_norm(model).module]
        activations = [m for block in views for m in block.module.modules() if isinstance(m, ACTIVATIONS)]
        for module in (*norms, *activations):
            hooks.callback(module.register_forward_hook(_as_factor).remove)
        for block in views:
            if any("gate" in reader.parts for reader in block.ffn_in):
                hooks.callback(block.ffn_out.module.register_forward_pre_hook(_halved).remove)
        yield


def _leaf(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.detach().requires_grad_()


def _as_factor(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """`out` as a constant multiple of what went in, and a constant."""
    x = args[0]
    factor = torch.where(x.abs() > TINY, out / x, 0).detach()
    line = x * factor
    return line + (out - line).detach()


def _halved(module: nn.Module, args: tuple) -> tuple:
    """What goes in, with half its gradient: each of its two factors gets that half in full."""
    half = args[0] * 0.5
    return (half + half.detach(), *args[1:])


def constant_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                       scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                       softcap: float | None = None, s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """The attention function for one text: query [1, H, T, D], value [1, G, T, D] -> [1, T, H, D]."""
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    places = torch.arange(key.shape[2], device=query.device)
    weights = attention_weights(query.detach(), key.detach(), rule.visible(places, places)[None, None], rule)
    mixed = weights.detach().unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value.float()          # [1, G, g T, D]
    return mixed.view(*weights.shape[:3], -1).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, constant_attention)
AttentionMaskInterface.register(NAME, llmopt_mask)
