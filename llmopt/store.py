"""A checkpoint's tensors one by one: which file holds which, and the model's shapes without its weights."""
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmopt.blocks import layer_list, spec_of
from llmopt.folder import fact_of, read_header, weight_files
from llmopt.loading import check_dense, examine
from llmopt.method import LlmoptError
from llmopt.recipe import ModelSpec
from llmopt.shards import DTYPES

Places = dict[str, tuple[Path, str]]        # name -> (file, the tensor's name in there)
TYPES = {short: getattr(torch, name.removeprefix("torch.")) for name, short in DTYPES.items()}


def places(folder: Path) -> Places:
    """Every tensor of a folder."""
    return {name: (file, name) for file in weight_files(folder) for name in read_header(file)[0]}


def read(wanted: Places) -> dict[str, Tensor]:
    """The tensors at these places, in their order; mapped from the files, so that memory is taken where they change."""
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(file for file, _ in wanted.values()):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(key) for name, (home, key) in wanted.items() if home == file}
        except (SafetensorError, OSError) as error:
            raise LlmoptError(f"{file}: cannot be read: {fact_of(error)}") from error
    return {name: found[name] for name in wanted}


def dense_bytes(folder: Path, dtype: str | None = None) -> int:
    """Bytes of a folder's weights in memory, as `dtype` or in the types of the files."""
    total = 0
    for entry in (entry for file in weight_files(folder) for entry in read_header(file)[0].values()):
        start, end = entry["data_offsets"]
        total += math.prod(entry["shape"]) * getattr(torch, dtype).itemsize if dtype else end - start
    return total


def converted(model: nn.Module, folder: Path) -> frozenset[str]:
    """The model's parameters that are not mapped from the folder's files: of another type there, or put together."""
    stored = {name: TYPES.get(entry["dtype"]) for file in weight_files(folder)
              for name, entry in read_header(file)[0].items()}
    prefix = f"{model.base_model_prefix}."
    return frozenset(name for name, parameter in model.named_parameters()
                     if parameter.dtype not in (stored.get(name), stored.get(name.removeprefix(prefix))))


def skeleton(config: Any, dtype: torch.dtype, trust: bool = False) -> nn.Module:
    """The model of a config in eval mode: its weights on the meta device, what it computes from its config real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    model.tie_weights()             # each weight was moved by itself, which has cut the ties
    return model.eval()


def open_model(spec: ModelSpec) -> tuple[nn.Module, Places]:
    """(skeleton, where its weights lie) of a model in a folder; the checks of `load_dense`.

    What can be known of single values, NaN and Inf, is found when they are read.
    """
    from transformers import GenerationConfig

    check_dense(spec)
    source, config = examine(spec)
    folder = Path(source)
    found = places(folder)
    model = skeleton(config, getattr(torch, spec.dtype) if spec.dtype else config.dtype or _first_dtype(found),
                     spec.trust_remote_code)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(spec.device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model.generation_config = GenerationConfig.from_pretrained(folder, "config.json", _from_model_config=True)
    return model, match(model, found, source)


def _first_dtype(found: Places) -> torch.dtype:
    """The type of the first floating-point tensor: what transformers takes where the config names none."""
    for file, name in found.values():
        dtype = TYPES.get(read_header(file)[0][name]["dtype"])
        if dtype is not None and dtype.is_floating_point:
            return dtype
    return torch.float32


def match(model: nn.Module, found: Places, source: str) -> Places:
    """The place of each of the model's tensors, which files may name without the base model's prefix.

    Raises LlmoptError for missing or foreign tensors, and for files that transformers has to convert.
    """
    tied = model.all_tied_weights_keys
    wanted = [name for name in model.state_dict() if name not in tied]
    prefix = f"{model.base_model_prefix}."
    known = {name if name in model.state_dict() else prefix + name: place for name, place in found.items()}
    missing = [name for name in wanted if name not in known]
    if missing and not spec_of(model).ffn_out:
        raise LlmoptError(f"{source}: {missing[0]} is put together from several tensors of the files, as in every "
                          "Mixture-of-Experts model: it cannot be streamed")
    foreign = [name for name in known if name not in model.state_dict() and name.endswith(".weight")]
    for kind, names in (("missing", missing), ("unknown to the config", foreign)):
        if names:
            raise LlmoptError(f"{source}: {len(names)} tensors {kind}, such as {min(names)}; "
                              "the checkpoint does not fit its config")
    for copy, original in tied.items():
        if copy in known and not torch.equal(*read({"a": known[copy], "b": known[original]}).values()):
            raise LlmoptError(f"{source}: {copy} and {original} are tied by the config, but differ in the files; set "
                              "tie_word_embeddings to false in config.json")
    return {name: known[name] for name in wanted}


def by_layer(model: nn.Module, found: Places) -> tuple[dict[nn.Module, Places], Places]:
    """(the places of each decoder layer's tensors under their names in the layer, all other places)."""
    layers, rest = {}, dict(found)
    for index, layer in enumerate(layer_list(model)):
        prefix = f"{spec_of(model).layers}.{index}."
        layers[layer] = {name.removeprefix(prefix): rest.pop(name) for name in found if name.startswith(prefix)}
    return layers, rest
