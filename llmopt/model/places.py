"""Whether the layers of a model that no table describes are the same at other places, once some have left."""
from typing import Any

import torch
from torch import nn

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.model.blocks import layer_list, spec_of

PLAIN = (bool, int, float, str, type(None))


def check(model: nn.Module, kept: list[int], config: Any) -> None:
    """Raise LlmoptError if the layers that `config` describes are not those at `kept` of the model.

    A model without weights is built from it: modules, shapes, and the numbers that they keep must be alike.
    """
    from accelerate import init_empty_weights

    kind = model.config.model_type
    if model.config.is_heterogeneous:
        raise LlmoptError(f"{kind}: blocks cannot be pruned: its config tells of every layer by its number")
    with refusals(f"{kind}: blocks cannot be pruned: no config describes what is left"), init_empty_weights():
        built = type(model)(config)
    path = spec_of(model).layers
    ours, theirs = ({name: p.shape for name, p in root.named_parameters() if not name.startswith(f"{path}.")}
                    for root in (model, built))
    if other := [name for name in ours if ours[name] != theirs.get(name)]:
        raise LlmoptError(f"{kind}: blocks cannot be pruned: {other[0]} has a part for each of them")
    there = built.get_submodule(path)
    for place, index in enumerate(kept):
        if differing := _differ(layer_list(model)[index], there[place]):
            raise LlmoptError(f"{kind}: blocks cannot be pruned: layer {index} would be another one at place {place} "
                              f"({differing})")


def _differ(layer: nn.Module, other: nn.Module) -> str:
    """What is unlike in two layers, but for their numbers; empty: nothing."""
    ours, theirs = dict(layer.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        return f"{min(ours.keys() ^ theirs.keys())} is in one of them"
    if [(name, p.shape) for name, p in layer.named_parameters()] != [(n, p.shape) for n, p in other.named_parameters()]:
        return "shapes of its weights"
    for name, module in ours.items():
        for key, value in vars(module).items():
            if isinstance(value, PLAIN) and not key.startswith("_") and key not in ("layer_idx", "training") \
                    and vars(theirs[name]).get(key, value) != value:
                return f"{name}.{key}".lstrip(".")
        if any(not torch.equal(b, theirs[name]._buffers[key]) for key, b in module._buffers.items()
               if b is not None and not b.is_meta and theirs[name]._buffers.get(key) is not None
               and not theirs[name]._buffers[key].is_meta):
            return f"a table of {name}"
    return ""
