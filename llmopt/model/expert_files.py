"""Codes of experts under the names of a model's files, one matrix each: mlp.experts.0.gate_proj.weight_packed.

In the model they are rows of a stack, gate and up together; which rows make up which matrix of the files is read off
transformers' own conversion, by sending the numbers of the rows through it. When transformers loads them it unpacks
each matrix and puts the stacks together again, by one setting for all experts: that of the pattern in the config.

The files of some models keep the stack as it is (gpt-oss, Granite, Qwen3-VL-MoE), and no conversion of transformers
puts one together. Packed, its matrices have such names too, and take `import llmopt` to be loaded (expert_loading.py).
"""
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.files.shards import by_block
from llmopt.model.packing import format_of
from llmopt.model.state import as_filed
from llmopt.model.weights import STACKS, Weight, coded

APART = {"Llama4TextExperts"}       # stacks in whose place transformers builds single linear maps beside packed weights
GATED, HALVES = "gate_up_proj", ("gate_proj", "up_proj")        # a stack's name, and what its rows are
EXPERTS = "llmopt_experts"  # the config group of those that take `import llmopt` to be loaded; nobody else's name
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


def halves(module: nn.Module, parameter: str, size: int) -> dict[str, slice]:
    """The matrices that the `size` rows of an expert's matrix of a stack are, by name: gate and up apart."""
    if parameter != GATED:
        return {parameter: slice(0, size)}
    gate, up = HALVES
    if getattr(module, "is_concatenated", True):                # transformers' word for it
        return {gate: slice(0, size // 2), up: slice(size // 2, size)}
    return {gate: slice(0, size, 2), up: slice(1, size, 2)}


def kept_whole(model: nn.Module, weight: Weight) -> bool:
    """True where the files of plain transformers keep the stack of this weight as it is."""
    return type(weight.module).__name__ not in APART and _converted(model, weight) is None


def parts_of(model: nn.Module, weight: Weight) -> list[list[Part]]:
    """By expert: what the files make of its matrix in the stack of this weight."""
    found = None if type(weight.module).__name__ in APART else _converted(model, weight)
    if found is not None:
        return found
    own = halves(weight.module, weight.parameter, weight.weight.shape[0])
    return [[Part(f"{weight.path}.{expert}.{name}", rows) for name, rows in own.items()]
            for expert in range(len(model.get_parameter(weight.key)))]


def _converted(model: nn.Module, weight: Weight) -> list[list[Part]] | None:
    """What transformers' conversion makes of a stack; None: no single matrices."""
    from transformers.core_model_loading import revert_weight_conversion

    stack = model.get_parameter(weight.key)
    if weight.transposed:                       # [E, in, out], of which no conversion makes single matrices
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
             for expert, parts in enumerate(parts_of(model, weights[0]))}
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
    kinds = {path: module for path, module in model.named_modules() if type(module).__name__ in APART}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if path not in kinds or tensor.dim() != 3:
            made[name] = tensor
            continue
        made |= _singles(name, kinds[path], tensor.to(model.get_parameter(name).dtype).mT)
    return made


def as_written(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which the stacks that a file holds packed, of those that dense files keep whole, are matrices."""
    found = {key: weights[0] for key, weights in stacked(coded(model)).items() if kept_whole(model, weights[0])}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        weight = found.get(name)
        made |= {name: tensor} if weight is None else _singles(
            name, weight.module, tensor.mT if weight.transposed else tensor)
    return made


def _singles(key: str, module: nn.Module, stack: Tensor) -> dict[str, Tensor]:
    """By its name in the files, each matrix of a stack [E, out, in]."""
    path, _, parameter = key.rpartition(".")
    own = halves(module, parameter, stack.shape[1])
    return {f"{path}.{expert}.{name}.weight": matrix[rows].contiguous() for expert, matrix in enumerate(stack)
            for name, rows in own.items()}


def targets(model: nn.Module, weights: Iterable[Weight]) -> list[str]:
    """The pattern by which a quantization_config names the experts of all layers, if they are among these weights."""
    found: dict[str, set[str]] = {}
    for first, *_ in stacked(weights).values():
        for part in parts_of(model, first)[0]:
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
    known = [f"{name}.{stack.parameter}" for name, module in root.named_modules()
             for stack in vars(module).get(STACKS, ())]
    if found and (left := [name for name in known if name not in found]):
        raise LlmoptError(f"{left[0]}: plain transformers loads packed experts if those of all layers are packed: "
                          "quantize or ignore all of them, or use format: dense")


def _apart(name: str) -> tuple[str, str]:
    suffix = next(end for end in SUFFIXES if name.endswith(end))
    return name.removesuffix(suffix), suffix


def _rows(tensor: Tensor, suffix: str, rows: slice) -> Tensor:
    if suffix == "_shape":
        count = len(range(*rows.indices(int(tensor[0]))))
        return torch.stack([torch.tensor(count, device=tensor.device), tensor[1]])
    return tensor[rows].contiguous()
