"""Codes of experts under the names of a model's files, one matrix each: mlp.experts.0.gate_proj.weight_packed.

In the model they are rows of a stack, gate and up together; which rows make up which matrix of the files is read off
transformers' own conversion, by sending the numbers of the rows through it. When transformers loads them it unpacks
each matrix and puts the stacks together again, by one setting for all experts: that of the pattern in the config.
"""
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmopt.errors import LlmoptError
from llmopt.files.shards import by_block
from llmopt.model.packing import format_of
from llmopt.model.state import as_filed
from llmopt.model.weights import STACKS, Weight, coded

# stacks [E, in, out] in whose place transformers builds single linear maps beside packed weights, and what these are
# called: the outputs of each side by side
APART = {"Llama4TextExperts": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}}
SUFFIXES = ("_packed", "_scale", "_shape", "")


class Part(NamedTuple):
    """A matrix of the files: its module's name, and the rows of one expert's matrix that it is."""

    module: str
    rows: slice


def stacked(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Those that belong to experts, by the key of their stack."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.expert is not None:
            found.setdefault(weight.key, []).append(weight)
    return found


def parts_of(model: nn.Module, weight: Weight) -> list[list[Part]] | None:
    """By expert: what the files make of its matrix in the stack of this weight; None: they keep the stack as it is."""
    from transformers.core_model_loading import revert_weight_conversion

    stack = model.get_parameter(weight.key)
    if names := APART.get(type(weight.module).__name__, {}).get(weight.parameter):
        size = weight.weight.shape[0] // len(names)
        return [[Part(f"{weight.path}.{expert}.{name}", slice(place * size, (place + 1) * size))
                 for place, name in enumerate(names)] for expert in range(len(stack))]
    if weight.transposed:                       # [E, in, out], of which no model makes single matrices
        return None
    rows = torch.arange(stack.shape[0] * stack.shape[1]).view(stack.shape[0], stack.shape[1], 1)
    found: list[list[Part]] = [[] for _ in range(len(stack))]
    for name, part in revert_weight_conversion(model, {weight.key: rows}).items():
        numbers = part.flatten()
        expert, first = divmod(int(numbers[0]), stack.shape[1])
        whole = part.dim() == 2 and name.endswith(".weight") and first + len(numbers) <= stack.shape[1]
        if not whole or not torch.equal(numbers, torch.arange(numbers[0], numbers[0] + len(numbers))):
            return None
        found[expert].append(Part(name.removesuffix(".weight"), slice(first, first + len(numbers))))
    return found if sum(p.rows.stop - p.rows.start for ps in found for p in ps) == rows.numel() else None


def filed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, or some layers of it, of a model with packed weights under the names of its files."""
    found, state = stacked(coded(model)), taken_apart(model, state)
    if not found:
        return state
    there = {_apart(name)[0] for name in state}
    stems = {f"{key}.{expert}": parts for key, weights in found.items() if weights[0].stem in there
             for expert, parts in enumerate(_files(model, weights[0]))}
    filed: dict[str, Tensor] = {}
    for group in by_block(state):
        rest, made = {}, {}
        for name, tensor in group.items():
            stem, suffix = _apart(name)
            if stem not in stems:
                rest[name] = tensor
            for part in stems.get(stem, ()):
                made[f"{part.module}.weight{suffix}"] = _rows(tensor, suffix, part.rows)
        filed |= as_filed(model, rest) | made
    return filed


def taken_apart(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which dense stacks of APART are the matrices that transformers looks for; all else as it is."""
    kinds = {path: APART[type(module).__name__] for path, module in model.named_modules()
             if type(module).__name__ in APART}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        parts = kinds.get(path, {}).get(leaf)
        if parts is None:
            made[name] = tensor
            continue
        for expert, matrix in enumerate(tensor.to(model.get_parameter(name).dtype)):
            made |= {f"{path}.{expert}.{part}.weight": rows.contiguous() for part, rows in
                     zip(parts, matrix.T.chunk(len(parts)), strict=True)}
    return made


def targets(model: nn.Module, weights: Iterable[Weight]) -> list[str]:
    """The pattern by which a quantization_config names the experts of all layers, if they are among these weights."""
    found: dict[str, set[str]] = {}
    for first, *_ in stacked(weights).values():
        for part in _files(model, first)[0]:
            before, _, leaf = part.module.rpartition(".0.")
            found.setdefault(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(before)), set()).add(leaf)
    return [f"re:{before}\\.\\d+\\.({'|'.join(sorted(leaves))})$" for before, leaves in found.items()]


def refuse(root: nn.Module, weights: Sequence[Weight]) -> None:
    """Raise LlmoptError where stock transformers could not load these experts, of a layer or a model."""
    found = stacked(weights)
    settings = {(w.codes.bits, w.codes.group_size) for w in weights if w.expert is not None}
    for key, members in found.items():
        first, count = members[0], len(root.get_parameter(key))
        if format_of(first.codes) != "pack-quantized" or first.codes.zeros is not None:
            raise LlmoptError(f"{first.name}: of experts transformers unpacks integers without zero points alone: use "
                              "bits of 2 to 8 and symmetric: true, or format: dense")
        if len(members) < count or len(settings) > 1:
            raise LlmoptError(f"{key}: plain transformers loads packed experts if all of them have the same bits and "
                              "group size: say so in overrides, experts: model where bits are allocated, ignore all of "
                              "them, or use format: dense")
        if isinstance(root, PreTrainedModel):
            _files(root, first)
    known = [f"{name}.{stack.parameter}" for name, module in root.named_modules()
             for stack in vars(module).get(STACKS, ())]
    if found and (left := [name for name in known if name not in found]):
        raise LlmoptError(f"{left[0]}: plain transformers loads packed experts if those of all layers are packed: "
                          "quantize or ignore all of them, or use format: dense")


def _files(model: nn.Module, weight: Weight) -> list[list[Part]]:
    found = parts_of(model, weight)
    if found is None:
        raise LlmoptError(f"{weight.key}: the files of {model.config.model_type} keep the matrices of all experts in "
                          "one tensor, which compressed-tensors cannot hold: use format: dense (--set format=dense), "
                          "or ignore: [experts]")
    return found


def _apart(name: str) -> tuple[str, str]:
    suffix = next(end for end in SUFFIXES if name.endswith(end))
    return name.removesuffix(suffix), suffix


def _rows(tensor: Tensor, suffix: str, rows: slice) -> Tensor:
    if suffix == "_shape":
        return torch.stack([torch.tensor(rows.stop - rows.start, device=tensor.device), tensor[1]])
    return tensor[rows].contiguous()
