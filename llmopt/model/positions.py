"""What a layer's attention looks like from outside: its sliding window and its rotary tables."""
import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.model.architectures import NO_ENTRY
from llmopt.model.blocks import at, attention_modules, spec_of, windows_found


def refuse_bidirectional(model: nn.Module) -> None:
    """Raise LlmoptError for a model whose tokens see later ones: causal attention has no meaning there."""
    if getattr(model.config, "use_bidirectional_attention", False) or not getattr(model.config, "is_causal", True):
        raise LlmoptError("the model attends in both directions (use_bidirectional_attention), as encoders do; methods "
                          "that look at attention or a cache need a causal model. heads.gradient, prune.* and quant.* "
                          "work")


def refuse_far(model: nn.Module, position_ids: Tensor | None, columns: int, mask: Tensor | None) -> None:
    """Raise LlmoptError for positions that a model with learned ones does not have: position_ids as given, or counted.

    columns: tokens in a row, padding included; mask: bool [B, columns], False at padding, None: there is none.
    """
    most = model.config.max_position_embeddings
    if columns > most:
        wanted = int(mask.sum(1).max() if mask is not None else columns)
        wanted = wanted if position_ids is None else int(position_ids.max()) + 1
        if wanted > most:
            raise LlmoptError(f"{wanted} tokens given, but this {model.config.model_type} has no more than {most} "
                              "positions; use a shorter prompt or generate fewer tokens")


def attention_windows(model: nn.Module) -> list[int | None]:
    """Per layer, how many tokens back its queries see, themselves included; None: all."""
    spec, config = spec_of(model), model.config
    if not spec.known:
        return windows_found(model)
    layers = range(len(attention_modules(model)))
    if not spec.sliding:
        return [None for _ in layers]
    return [config.sliding_window if spec.sliding == "all" or config.layer_types[i] == "sliding_attention" else None
            for i in layers]


def refuse_turned(model: nn.Module) -> None:
    """Raise LlmoptError if the keys of this model cannot be turned back to position 0."""
    spec, kind = spec_of(model), model.config.model_type
    if not spec.known:
        raise LlmoptError(f"{kind}: how positions turn its keys is not known: {NO_ENTRY}")
    if spec.turned:
        raise LlmoptError(f"{kind}: its keys cannot be turned back to position 0: {spec.turned}")


@torch.no_grad()
def rotary_tables(model: nn.Module, layer: int, length: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [length, R] by which this layer turns queries and keys at positions 0, 1, ...

    R <= D: the other channels stay. None where the architecture has no rotary embedding. The model's own module makes
    them (partial, scaled, per layer type), in the dtype and on the device of `like`; `length` is to be the number of
    positions that the model has seen, for scalings that depend on it.
    """
    refuse_turned(model)
    spec = spec_of(model)
    if spec.rotary is None:
        return None
    typed = "rope_type" not in model.config.rope_parameters          # one entry per layer type, as in Gemma-3
    places = torch.arange(length, device=like.device).unsqueeze(0)
    cos, sin = at(model, spec.rotary)(like, places, *([model.config.layer_types[layer]] if typed else []))
    return cos[0], sin[0]
