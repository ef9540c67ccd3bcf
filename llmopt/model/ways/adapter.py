"""A LoRA adapter of peft merged into the weights that it was trained beside, each when it is read.

    LoRA    W' = W + s B A            A [r, in], B [out, r];  s = alpha / r, of rank-stabilised LoRA alpha / sqrt(r)
    DoRA    W' = m (W + s B A) / |W + s B A|                      m [out], norms of the rows

Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA). Computed in float32 and rounded once to the
type of W, where peft's merge_and_unload rounds s B A first. Modules saved as a whole take the place of the base's.
peft itself is not needed: adapter_config.json and adapter_model.safetensors are read as they are.
"""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmopt.errors import LlmoptError, closest
from llmopt.files.checks import check_safetensors, read_json
from llmopt.files.json_shapes import COUNT, check_shape, finite
from llmopt.files.limited import limited
from llmopt.files.tensors import Made, Place, Places, file_of, of_file, outlines, read
from llmopt.model.finite import cast

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
                  r"(\.default)?(\.weight)?")
SHAPE = {"peft_type": str, "r?": COUNT, "lora_alpha?": finite, "rank_pattern?": {str: COUNT},
         "alpha_pattern?": {str: finite}, "use_rslora?": bool, "use_dora?": bool, str: object}
OTHER = {       # settings of LoRA that make other weights, or none that could be merged
    "layer_replication": "layers used several times", "target_parameters": "adapters on stacks of experts",
    "use_qalora": "QALoRA", "alora_invocation_tokens": "aLoRA, which acts from some tokens on", "use_bdlora": "BD-LoRA",
    "lora_bias": "biases in the adapter", "trainable_token_indices": "single tokens of the embedding",
    "arrow_config": "routing between adapters", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA",
    "velora_config": "VeLoRA", "megatron_config": "Megatron"}
CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")      # ways to begin that change the base's weights
MERGE = "merge it by peft (merge_and_unload), save the model, and give that"


@dataclass
class Change:
    """What an adapter has for one module: its parts, or a whole tensor."""

    parts: dict[str, Place] = field(default_factory=dict)
    rank: int = 0
    scale: float = 0.0


def merged(found: Places, folder: Path, model: nn.Module, source: str) -> tuple[Places, str]:
    """(the tensors with the adapter in `folder` merged, a line that tells what it is).

    model: the base's modules, without weights. Raises LlmoptError for what is no LoRA adapter, for one of another base
    and for tensors that are missing, unexpected or of other shapes.
    """
    config, stored = _read(folder)
    changes, whole = _sorted(stored, config, folder)
    known, done = outlines(found), {}
    for name, place in whole.items():
        base = _name(name, found, model, folder, config, source)
        shape, _ = outlines({"it": place})["it"]
        if shape != tuple(known[base][0]):
            raise LlmoptError(f"{folder}: {name} is {list(shape)}, of {source} {list(known[base][0])}; a vocabulary "
                              f"that was enlarged is not taken over: {MERGE}")
        done[base] = _made(base, place, known[base], lambda tensor: tensor)
    for module, change in changes.items():
        name = _name(f"{module}.weight", found, model, folder, config, source)
        turned = _is_turned(model, name)
        _check_shapes(change, known[name][0], turned, f"{folder}: {module}", source)
        done[name] = _made(name, done.get(name, found[name]), known[name], partial(_with_change, change, turned))
    kind = "DoRA" if config.get("use_dora") else "rank-stabilised LoRA" if config.get("use_rslora") else "LoRA"
    ranks = sorted({change.rank for change in changes.values()})
    return found | done, (f"the {kind} adapter {folder.name} (rank {' '.join(map(str, ranks))}, {len(changes)} weights"
                          + (f", {len(whole)} tensors as a whole" if whole else "") + ")")


def _made(name: str, place: Place, known: tuple, change: Callable[[Tensor], Tensor]) -> Made:
    """The tensor at a place, changed, in the type of the base's; known: its shape and that type."""
    shape, dtype = known
    return Made(shape, dtype, file_of(place), lambda: cast(change(read({name: place})[name]), dtype, name))


def _with_change(change: Change, turned: bool, weight: Tensor) -> Tensor:
    """W' of the module docstring in float32; turned: W is stored [in, out]."""
    parts = {name: tensor.float() for name, tensor in read(change.parts).items()}
    embedding = "lora_embedding_A" in parts
    a, b = (parts.get(f"lora_{side}", parts.get(f"lora_embedding_{side}")) for side in "AB")
    delta = (b @ a) * change.scale                                                      # [out, in]; [E, V]
    old = weight.float().T if turned or embedding else weight.float()
    new = old + delta
    if "lora_magnitude_vector" in parts:
        new = new * (parts["lora_magnitude_vector"].flatten() / torch.linalg.norm(new, dim=1)).unsqueeze(1)
    return (new.T if turned or embedding else new).contiguous()


def _read(folder: Path) -> tuple[dict[str, Any], Places]:
    """(adapter_config.json, the places of the adapter's tensors); raises LlmoptError for what is no LoRA adapter."""
    if not (folder / CONFIG).is_file():
        raise LlmoptError(f"{folder}: not an adapter: there is no {CONFIG} in it")
    config = {key: value for key, value in read_json(folder / CONFIG).items() if value is not None}
    check_shape(config, SHAPE, str(folder / CONFIG))
    if config["peft_type"] != "LORA":
        raise LlmoptError(f"{folder}: an adapter of the type {config['peft_type'][:80]}; LORA alone is merged here "
                          f"(rank-stabilised and DoRA too): {MERGE}")
    for key, meaning in OTHER.items():
        if config.get(key):
            raise LlmoptError(f"{folder / CONFIG}: {key}: {meaning} cannot be merged here: {MERGE}")
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGING):
        raise LlmoptError(f"{folder / CONFIG}: init_lora_weights {begun!r} changes the weights of the base: {MERGE}")
    if not (folder / FILE).is_file():
        pickled = "; adapter_model.bin is pickled and may run code when it is opened: save it again by peft" \
            if (folder / "adapter_model.bin").is_file() else ""
        raise LlmoptError(f"{folder}: there is no {FILE}{pickled}")
    check_safetensors(folder / FILE)
    return config, of_file(folder / FILE)


def _sorted(stored: Places, config: dict[str, Any], folder: Path) -> tuple[dict[str, Change], Places]:
    """({module: its change}, tensors that take the place of the base's) under the names of the base."""
    changes: dict[str, Change] = {}
    whole: Places = {}
    for name, place in stored.items():
        plain = name.removeprefix("base_model.model.")
        if found := PART.fullmatch(plain):
            changes.setdefault(found["module"], Change()).parts[found["part"]] = place
        elif "lora_" in plain or "token_adapter" in plain:
            raise LlmoptError(f"{folder / FILE}: {name} is no part of an adapter that is known here: {MERGE}")
        else:
            whole[re.sub(r"\.(modules_to_save\.default|base_layer)(?=\.)", "", plain)] = place
    if not changes and not whole:
        raise LlmoptError(f"{folder / FILE}: holds no tensor")
    alphas = _matched(changes, config, "alpha_pattern", folder)
    ranks = _matched(changes, config, "rank_pattern", folder)
    for module, change in changes.items():
        kinds = {part.removesuffix("_A").removesuffix("_B") for part in change.parts} - {"lora_magnitude_vector"}
        if len(kinds) != 1 or {f"{kind}_{side}" for kind in kinds for side in "AB"} - change.parts.keys():
            raise LlmoptError(f"{folder / FILE}: of {module} there is only {', '.join(sorted(change.parts))}; an A and "
                              "a B expected")
        if config.get("use_dora", False) != ("lora_magnitude_vector" in change.parts):
            raise LlmoptError(f"{folder / FILE}: {module} has {'no' if config.get('use_dora') else 'a'} "
                              f"lora_magnitude_vector, and {CONFIG} says use_dora: {config.get('use_dora', False)}")
        if kinds == {"lora_embedding"} and "lora_magnitude_vector" in change.parts:
            raise LlmoptError(f"{folder}: DoRA of an embedding is not merged here: {MERGE}")
        rank = ranks.get(module, config.get("r", 8))
        change.rank = rank
        change.scale = alphas.get(module, config.get("lora_alpha", 8)) / (
            math.sqrt(rank) if config.get("use_rslora") else rank)
    return changes, whole


def _matched(changes: dict[str, Change], config: dict[str, Any], key: str, folder: Path) -> dict[str, float]:
    """What a pattern of the config gives each module that one of its keys matches, as peft matches them."""
    patterns = config.get(key) or {}

    def act() -> dict[str, float]:
        return {module: value for module in changes for value in [next(
            (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)]
            if value is not None}

    return limited(act, f"{folder / CONFIG}: {key}", len(changes)) if patterns else {}


def _name(name: str, found: Places, model: nn.Module, folder: Path, config: dict[str, Any], source: str) -> str:
    """The name of a tensor in the files of the base, which may leave out the name of the inner model.

    Raises LlmoptError for a tensor that the base has not, and for one that is two of its weights.
    """
    tied = {key: other for key, other in model.all_tied_weights_keys.items() if key not in found}
    if {name, f"{model.base_model_prefix}.{name}"} & {*tied, *tied.values()}:
        raise LlmoptError(f"{folder}: changes {name}, and the base has one tensor for embedding and output head: "
                          f"{MERGE}")
    for each in (name, name.partition(".")[2]):
        if each in found:
            return each
    trained = str(config.get("base_model_name_or_path") or "another model")[:200]
    raise LlmoptError(f"{folder}: changes {name}, which {source} has not{closest(name, list(found))}; the adapter was "
                      f"trained on {trained}")


def _is_turned(model: nn.Module, name: str) -> bool:
    """True for a module that keeps its weight [in, out]; by the names of the files or of the model."""
    path = name.removesuffix(".weight")
    modules = dict(model.named_modules())
    module = modules.get(path, modules.get(f"{model.base_model_prefix}.{path}"))
    return isinstance(module, Conv1D)


def _check_shapes(change: Change, weight: tuple[int, ...], turned: bool, what: str, source: str) -> None:
    """Raise LlmoptError for parts that are not [rank, in], [out, rank] and [out] of the weight [out, in]."""
    embedding = "lora_embedding_A" in change.parts
    if len(weight) != 2:
        raise LlmoptError(f"{what}: the weight of {source} is {list(weight)}, and adapters of matrices alone are "
                          f"merged here: {MERGE}")
    out, width = reversed(weight) if turned or embedding else weight
    sides = "lora_embedding" if embedding else "lora"
    wanted = {f"{sides}_A": (change.rank, width), f"{sides}_B": (out, change.rank), "lora_magnitude_vector": (out,)}
    for part, (shape, _) in outlines(change.parts).items():
        if tuple(shape) != wanted[part]:
            raise LlmoptError(f"{what}: {part} is {list(shape)}; at rank {change.rank} the weight of {source} wants "
                              f"{list(wanted[part])}")
