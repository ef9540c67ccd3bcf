"""What a model that reads images or sound has beside its language part; it is carried over bit by bit."""
from collections.abc import Iterator

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmopt.model.blocks import decoder
from llmopt.model.discovery import layers_path


def reads_more(model: nn.Module) -> bool:
    """True for a model whose config has a part that is its language model's."""
    return model.config.get_text_config() is not model.config


def carried(model: nn.Module) -> dict[str, int]:
    """{module: its parameters} of what is neither the language part nor the output head; empty for a causal LM."""
    return dict(_beside(model, "", {decoder(model), model.get_output_embeddings()})) if reads_more(model) else {}


def _beside(module: nn.Module, prefix: str, language: set[nn.Module | None]) -> Iterator[tuple[str, int]]:
    for name, child in module.named_children():
        inside = set(child.modules()) & language
        if inside and child not in language:
            yield from _beside(child, f"{prefix}{name}.", language)
        elif not inside and (count := sum(p.numel() for p in child.parameters())):
            yield f"{prefix}{name}", count


def layers_alone(model: nn.Module) -> str | None:
    """What the decoder layers are called in the causal LM that transformers makes of the language part alone.

    None: it has no class for that. Of such a model (Llama 4, Qwen3.5) AutoModelForCausalLM makes that one.
    """
    part = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type)
    if not reads_more(model) or part in (None, type(model).__name__):
        return None
    with init_empty_weights():
        return layers_path(getattr(transformers, part)(model.config.get_text_config()))


def told(model: nn.Module) -> str:
    """The same in words, for plans, cards and `llmopt show`; empty where there is nothing."""
    parts = ", ".join(f"{name} ({count:,} weights)" for name, count in carried(model).items())
    return f"carried over as it is: {parts}" if parts else ""
