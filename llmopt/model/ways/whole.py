"""A whole model whose tensors are made when they are read, filled one tensor after the other."""
from collections.abc import Iterator

from torch import nn

from llmopt.files import tensors
from llmopt.model import skeleton
from llmopt.model.finite import cast
from llmopt.specs import ModelSpec


def filled(spec: ModelSpec) -> nn.Module:
    """The model of a view with its weights in memory; beside them one tensor, or one stack of experts, is held.

    Raises LlmoptError for missing or foreign tensors, and for shapes that the config does not want.
    """
    model, places = skeleton.outlined(spec)
    for group in _together(model, places):
        for name, tensor in skeleton.merged(skeleton.converters(model), tensors.read(group), model).items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            made = cast(tensor, getattr(module, leaf).dtype, name).to(spec.device)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(made)
            else:
                module._buffers[leaf] = made
    model.tie_weights()
    return model.to(spec.device)


def _together(model: nn.Module, places: tensors.Places) -> Iterator[tensors.Places]:
    """The places of the tensors, those of one tensor of the model together."""
    from transformers.core_model_loading import apply_converters

    merging, groups = skeleton.converters(model), {}
    for name, place in places.items():
        groups.setdefault(apply_converters(name, merging)[0], {})[name] = place
    yield from groups.values()
