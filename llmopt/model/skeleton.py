"""A model's shapes without its weights, and which of its files' tensors each parameter is made from."""
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.files.tensors import Made, Places, outlines, read
from llmopt.model.auto import auto_class
from llmopt.model.blocks import layer_list, spec_of
from llmopt.model.fit import refuse_foreign
from llmopt.model.loading import check_dense, examine
from llmopt.model.ways import view
from llmopt.specs import ModelSpec


def converted(model: nn.Module, folder: Path) -> frozenset[str]:
    """The model's parameters that are not mapped from the folder's files: of another type there, or put together."""
    found = {name: place for name, place in view.places(folder).items() if not isinstance(place, Made)}
    stored = {name: dtype for name, (_, dtype) in outlines(found).items()}
    prefix = f"{model.base_model_prefix}."
    return frozenset(name for name, parameter in model.named_parameters()
                     if parameter.dtype not in (stored.get(name), stored.get(name.removeprefix(prefix))))


def skeleton(config: Any, dtype: torch.dtype, trust: bool = False) -> nn.Module:
    """The model of a config in eval mode: its weights on the meta device, what it computes from its config real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust)
    model.tie_weights()             # each weight was moved by itself, which has cut the ties
    return model.eval()


def open_model(spec: ModelSpec) -> tuple[nn.Module, Places]:
    """(skeleton, where its weights lie) of a model in a folder; the checks of `load_dense`.

    What can be known of single values, NaN and Inf, is found when they are read.
    """
    check_dense(spec)
    return outlined(spec)


def outlined(spec: ModelSpec) -> tuple[nn.Module, Places]:
    """The same of any causal language model; only `open_model` asks whether llmopt can work on it."""
    from transformers import GenerationConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    source, config = examine(spec)
    folder = Path(source)
    found = view.places(folder)
    model = skeleton(config, getattr(torch, spec.dtype) if spec.dtype else config.dtype or _first_dtype(found),
                     spec.trust_remote_code)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(spec.device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model.generation_config = GenerationConfig.from_pretrained(folder, "config.json", _from_model_config=True)
    matched = match(model, found, source)
    if (seen := view.of(folder)) and seen.is_gguf:        # nothing tells how its files name the tensors: as usual
        model._weight_conversions = [entry for entry in get_model_conversion_mapping(model, add_legacy=False)
                                     if not isinstance(entry, PrefixChange)]
    return model, matched


def _first_dtype(found: Places) -> torch.dtype:
    """The type of the first floating-point tensor: what transformers takes where the config names none."""
    for _, dtype in outlines(found).values():
        if dtype is not None and dtype.is_floating_point:
            return dtype
    return torch.float32


def match(model: nn.Module, found: Places, source: str) -> Places:
    """The places of the model's tensors, named as in the model, or as parts that `merged` puts together.

    Files may name them without the base model's prefix, and keep the experts of a layer one by one. Raises LlmoptError
    for missing or foreign tensors, and for shapes that the config does not want.
    """
    known = _as_known(model, found, model.state_dict())
    _tie_as_filed(model, known)
    tied, state = model.all_tied_weights_keys, model.state_dict()
    made = _merged_shapes(model, known, source)
    wanted = {name: state[name].shape for name in state if name not in tied}
    missing = [name for name in wanted if name not in made]
    if missing:
        raise LlmoptError(f"{source}: {len(missing)} tensors missing, such as {min(missing)}; "
                          "the checkpoint does not fit its config")
    refuse_foreign((name for name in made if name not in state), source)
    for name, shape in wanted.items():
        if made[name] != shape:
            raise LlmoptError(f"{source}: {name} is {list(made[name])}, the config wants {list(shape)}; "
                              "the checkpoint does not fit its config")
    return {name: place for name, place in known.items() if name in wanted or name not in made}


def _tie_as_filed(model: nn.Module, known: Places) -> None:
    """Tie weights as `from_pretrained` does: by what the files hold, where that is not what the config promises."""
    for twin, original in list(model.all_tied_weights_keys.items()):
        if twin in known and original not in known:
            known[original] = known.pop(twin)
        elif twin in known and not torch.equal(*read({"a": known[twin], "b": known[original]}).values()):
            path, _, leaf = twin.rpartition(".")
            own = nn.Parameter(model.get_parameter(twin).detach().clone(), requires_grad=False)
            model.get_submodule(path)._parameters[leaf] = own
            del model.all_tied_weights_keys[twin]


def _as_known(model: nn.Module, found: Places, state: dict[str, Tensor]) -> Places:
    """The places under the names that transformers gives them, before it puts any together.

    The model is told, as by `from_pretrained`, which of the conversions its files need: they are written likewise.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters, rename_source_key

    listed = get_model_conversion_mapping(model)
    renamings = [entry for entry in listed if not isinstance(entry, WeightConverter)]
    merging = [entry for entry in listed if isinstance(entry, WeightConverter)]
    known = {rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]: place
             for name, place in found.items()}
    for name in known:
        apply_converters(name, merging)
    model._weight_conversions = [entry for entry in listed if entry.was_used()]
    return known


def converters(model: nn.Module) -> list[Any]:
    """The conversions that put several tensors of the files together to one of this matched model."""
    from transformers.core_model_loading import WeightConverter

    return [entry for entry in model._weight_conversions if isinstance(entry, WeightConverter)]


def _merged_shapes(model: nn.Module, known: Places, source: str) -> dict[str, torch.Size]:
    """The shapes of the model's tensors that these places make."""
    parts = {name: torch.empty(shape, device="meta") for name, (shape, _) in outlines(known).items()}
    with refusals(f"{source}: the experts do not fit together"):
        return {name: tensor.shape for name, tensor in merged(converters(model), parts, model).items()}


def merged(merging: list[Any], tensors: dict[str, Tensor], model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A block's tensors as transformers makes them of those in its files: the experts of a layer become one tensor.

    prefix: of their names in the model, with or without weights; some tensors are turned to the shape in there.
    """
    from transformers.core_model_loading import apply_converters, dot_natural_key

    ready, parts, wanted = {}, {}, dict(model.named_parameters()) if merging else {}
    by_pattern = {pattern: entry for entry in merging for pattern in entry.source_patterns}
    for name in sorted(tensors, key=dot_natural_key) if merging else tensors:     # expert 10 comes after expert 9
        target, pattern = apply_converters(prefix + name, merging)
        if pattern is None or target not in wanted:         # codes of a stack have its name, and an ending
            ready[name] = tensors[name]
        else:
            collecting = parts.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            collecting.add_tensor(target, prefix + name, pattern, tensors[name])
    for target, collected in parts.items():
        made = collected.convert(target, model=model)
        ready |= {name.removeprefix(prefix): tensor for name, tensor in made.items()}
    return ready


def by_layer(model: nn.Module, found: Places) -> tuple[dict[nn.Module, Places], Places]:
    """(the places of each decoder layer's tensors under their names in the layer, all other places)."""
    layers, rest = {}, dict(found)
    for index, layer in enumerate(layer_list(model)):
        prefix = f"{spec_of(model).layers}.{index}."
        layers[layer] = {name.removeprefix(prefix): rest.pop(name) for name in found if name.startswith(prefix)}
    return layers, rest
