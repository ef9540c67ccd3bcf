"""How much of llmopt works on a model: three levels, each of which holds the ones before.

    weights     quantization, blocks that leave: every causal LM whose decoder layers are one list of modules
    run time    heads.*, kv.*, attention.*: models whose attention goes through transformers' attention interface
    structure   widths and heads that leave, transforms: architectures with an entry in the table (architectures.py)
"""
from typing import Literal

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmopt.errors import LlmoptError
from llmopt.model.architectures import NO_ENTRY
from llmopt.model.blocks import known_layers, spec_of

Level = Literal["weights", "run time", "structure"]


def lacking(model: nn.Module) -> dict[Level, str | None]:
    """By level, why it does not hold; None: it does. Raises LlmoptError for a model on which nothing works."""
    if spec_of(model).known:
        return {"weights": None, "run time": None, "structure": None}
    return {"weights": None, "run time": _attention(model), "structure": NO_ENTRY}


def _attention(model: nn.Module) -> str | None:
    """What of the attention of a model that no table describes cannot be done as it does it; None: nothing."""
    config, layers = model.config, known_layers(model)
    if config.get_text_config() is not config:
        return "it reads more than text"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is cut into chunks"
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    for index, held in enumerate(DynamicCache(config=config).layers):
        if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer) and index < len(layers):
            return f"layer {index} keeps a state beside keys and values, or instead of them"
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        if len(layer.attention) != 1:
            return f"layer {index} does not attend by transformers' attention interface, or not once"
        (seen,) = layer.attention.values()
        if seen.value_dim != seen.head_dim or getattr(config, "kv_lora_rank", None):
            return f"layer {index} caches what keys and values are made of, not these (MLA)"
        if seen.asks:
            return f"the attention of layer {index} asks for {', '.join(seen.asks)}"
        if not seen.writer:
            return f"no linear map of layer {index} reads what its heads give, as they give it"
        if seen.window is None and kind is not None and "sliding" in kind:
            return f"the window of layer {index} is in its mask alone"
    return None


def described(model: nn.Module) -> str:
    """The levels in a line: which holds, and why not the next."""
    found = lacking(model)
    return "; ".join([max((level for level in found if found[level] is None), key=[*found].index),
                      *(f"not {level}: {reason}" for level, reason in found.items() if reason)])


def refuse_below(model: nn.Module, level: Level, what: str) -> None:
    """Raise LlmoptError unless `level`, which `what` takes, holds for the model."""
    if reason := lacking(model)[level]:
        raise LlmoptError(f"{model.config.model_type}: {what} takes the level {level!r}, and it has none: {reason}")
