"""Whether a model that a program hands over is one that llmopt can work on: what is in the way, in one line."""
import torch
from torch import nn
from transformers import PreTrainedModel

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.model.blocks import layer_list, spec_of
from llmopt.model.context import context_length
from llmopt.model.unfinished import check_finished

CHECKED = 16        # tokens of the forward that tells whether a model computes numbers


def check_model(model: nn.Module, streamed: bool = False) -> None:
    """Raise LlmoptError for anything but a whole causal language model of a supported architecture.

    streamed: its weights are elsewhere on purpose.
    """
    check_wrapping(model)
    check_finished(model)
    spec_of(model)
    if model.get_output_embeddings() is None:
        raise LlmoptError(f"{type(model).__name__} has no output head that predicts tokens; load the model with "
                          "AutoModelForCausalLM")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LlmoptError("the model carries an adapter; merge it into the weights first (peft: merge_and_unload)")
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent and not streamed:
        raise LlmoptError(f"{len(absent)} weights are not in memory, such as {absent[0]} (offloaded by accelerate?); "
                          "load the model without device_map or offload_folder, or use `llmopt compress --stream`")
    _check_layers(model)
    if model.generation_config is not None:
        with refusals("the model's generation_config would be refused when it is saved"):
            model.generation_config.validate(strict=True)


def check_wrapping(model: nn.Module) -> None:
    """Raise LlmoptError for a model inside another module, or one that is compiled."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise LlmoptError(f"a loaded model expected, this is a {kind}; llmopt.load(FOLDER) gives one")
    if "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None:
        raise LlmoptError("the model is compiled, and what is compiled cannot be changed; pass the model as it was "
                          "before torch.compile (model._orig_mod), and compile it afterwards")
    if not isinstance(model, PreTrainedModel):
        inner = " around a model: pass the model inside (model.module, or peft's merge_and_unload())" if any(
            isinstance(module, PreTrainedModel) for module in model.modules()) else ""
        raise LlmoptError(f"a causal language model of transformers expected, this is a {kind}{inner}")


def _check_layers(model: nn.Module) -> None:
    """Raise LlmoptError for layers or projections that share weights: an edit of one would be one of the other, too."""
    owner: dict[int, int] = {}
    for index, layer in enumerate(layer_list(model)):
        names: dict[int, str] = {}
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if first != name:
                raise LlmoptError(f"layer {index}: {first} and {name} are tied, so they cannot be changed one by one; "
                                  "give each its own (nn.Parameter of a clone)")
        for parameter in layer.parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                raise LlmoptError(f"layers {first} and {index} share weights, so they cannot be changed one by one; "
                                  "give each its own (copy.deepcopy)")


@torch.no_grad()
def check_numbers(model: nn.Module, tokens: int = CHECKED) -> None:
    """Raise LlmoptError for a model that computes NaN from a few ordinary tokens; one without weights is not asked."""
    if next(model.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, min(tokens, context_length(model.config))),
                        generator=generator)
    if bool(model(ids.to(model.device), use_cache=False).logits.isnan().any()):
        raise LlmoptError("the model computes NaN from ordinary tokens; its config or its weights are damaged")
