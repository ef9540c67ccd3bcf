"""How much of llmopt works on a model: three levels, each of which holds the ones before.

    weights     quantization, blocks that leave: every causal LM whose decoder layers are one list of modules; of those
                whose feed-forward parts or heads have an entry (architectures.FEED_FORWARD, HEADS), channels and heads
                that leave
    run time    heads.*, kv.*, attention.*: models whose attention goes through transformers' attention interface
    structure   widths and heads that leave, transforms: architectures with an entry in the table (architectures.py)
"""
from typing import Any, Literal

from torch import nn
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from llmopt.errors import LlmoptError
from llmopt.model.blocks import known_layers, spec_of
from llmopt.model.discovery import Found
from llmopt.model.names import is_cut

OWN_CACHE = {"minimax": "it takes no cache but one of a class of its own",
             "recurrent_gemma": "it does not give back the cache that it fills"}
Level = Literal["weights", "run time", "structure"]
ATTEND = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer,
          LinearAttentionAndSlidingWindowAttentionLayer)        # what a cache holds of a layer with attention,
PASS = (LinearAttentionLayer, DummyLayer)                       # and of one without


def lacking(model: nn.Module) -> dict[Level, str | None]:
    """By level, why it does not hold; None: it does. Raises LlmoptError for a model on which nothing works."""
    if spec_of(model).known:
        return {"weights": None, "run time": None, "structure": None}
    return {"weights": None, "run time": _attention(model), "structure": spec_of(model).refuse["mlp"]}


def _attention(model: nn.Module) -> str | None:
    """What of the attention of a model that no table describes cannot be done as it does it; None: nothing."""
    config, layers = model.config, known_layers(model)
    if config.get_text_config() is not config:
        return "it reads more than text"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is cut into chunks"
    if not any(layer.attention for layer in layers):
        left = " of those that are left to measure (--max-blocks)" if is_cut(model) else ""
        return f"none of its layers{left} attends by transformers' attention interface"
    if config.model_type in OWN_CACHE:
        return OWN_CACHE[config.model_type]
    kinds, held = getattr(config, "layer_types", None) or [None] * len(layers), DynamicCache(config=config).layers
    reasons = (_of_layer(f"layer {index}", layer, kinds[index], type(held[index]), config)
               for index, layer in enumerate(layers))       # of a model cut short the config may tell of more
    return next((reason for reason in reasons if reason), None)


def _of_layer(name: str, layer: Found, kind: str | None, held: type, config: Any) -> str | None:
    """What of a layer cannot be done; held: what a cache of transformers keeps of it. One without attention passes."""
    if held not in ATTEND + PASS:
        return f"{name} keeps something else than keys, values and states ({held.__name__})"
    if held in PASS and not layer.attention:
        return None
    if held in PASS or len(layer.attention) != 1:
        return f"{name} does not attend by transformers' attention interface, or not once"
    (seen,) = layer.attention.values()
    if seen.value_dim != seen.head_dim or getattr(config, "kv_lora_rank", None):
        return f"{name} caches what keys and values are made of, not these (MLA)"
    if seen.asks:
        return f"the attention of {name} asks for {', '.join(seen.asks)}"
    if not seen.writer:
        return f"no linear map of {name} reads what its heads give, as they give it or times a gate"
    if seen.window is None and kind is not None and "sliding" in kind:
        return f"the window of {name} is in its mask alone"
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
