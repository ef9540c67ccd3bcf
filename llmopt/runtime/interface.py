"""The one attention function and the one mask function that transformers calls while methods are attached."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llmopt_kernels import Rule
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llmopt.errors import LlmoptError
from llmopt.model.blocks import attention_modules

NAME = "llmopt"             # of the attention function
KEY = "_llmopt_runtime"     # where model and attention modules keep their attachment


@torch.compiler.disable
def llmopt_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                     softcap: float | None = None, s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """The attention function: query [B, H, T, D], key and value [B, G, S, D] -> [B, T, H, D]."""
    if KEY not in module.__dict__:
        raise LlmoptError("attention 'llmopt' works on a model with attached methods only; see llmopt.attached")
    if dropout:
        raise LlmoptError("attention dropout is not supported while methods are attached; call model.eval()")
    live, index = module.__dict__[KEY]
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    out = live.attend(index, query, key, value, attention_mask, rule)
    return out.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def llmopt_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
                attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs) -> Tensor | None:
    """The mask function: the padding mask as it came, bool [B, seen], or None; a 4-D mask for packed sequences."""
    if not allow_is_causal_skip:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
                         allow_is_causal_skip=False, **kwargs)
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


@contextmanager
def attending_by(model: nn.Module, name: str, key: str, told: Callable[[int, nn.Module], Any]) -> Iterator[None]:
    """Inside, the model attends by the registered function `name`, which finds told(layer, module) under `key`.

    That is an entry of the __dict__ of each attention module, and gone afterwards; the model attends as before.
    """
    before = model.config._attn_implementation
    modules = [(layer, module) for layer, module in enumerate(attention_modules(model)) if module is not None]
    try:
        for layer, module in modules:
            module.__dict__[key] = told(layer, module)
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        for _, module in modules:
            module.__dict__.pop(key, None)


AttentionInterface.register(NAME, llmopt_attention)
AttentionMaskInterface.register(NAME, llmopt_mask)
