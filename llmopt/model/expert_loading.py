"""Packed experts that `import llmopt` loads: those of models whose dense files keep a stack as one tensor.

The names in the files are single matrices (expert_files.py), in a group of their own of the quantization_config. A word
in it that compressed-tensors does not know has plain transformers refuse the checkpoint, where it would else make the
experts of random numbers, and warn.
"""
from typing import Any

from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from llmopt.model.discovery import stacks
from llmopt.model.expert_files import EXPERTS, halves
from llmopt.model.expert_weights import stacks_of
from llmopt.model.experts import Experts


def conversions(quantizer: Any, model: nn.Module) -> list[WeightConverter]:
    """What makes the stacks of a model from single matrices, in the words of transformers' own conversions."""
    found = {}
    ours = EXPERTS in quantizer.compressor.quantization_config.config_groups
    for name, module in model.named_modules() if ours else ():
        if not stacks(module):
            continue
        path = ".".join(name.split(".")[-2:])                       # mlp.experts, in every layer
        if path not in found:
            experts = Experts(name, module, module, len(next(module.parameters())))
            found[path] = [_converter(path, module, stack.parameter, stack.transposed) for stack in stacks_of(experts)]
    return [converter for converters in found.values() for converter in converters]


def _converter(path: str, module: nn.Module, parameter: str, transposed: bool) -> WeightConverter:
    size = getattr(module, parameter).shape[2 if transposed else 1]
    parts, made = halves(module, parameter, size), [MergeModulelist(dim=0)]
    made += _joining([*parts.values()])
    return WeightConverter([f"{path}.*.{name}.weight" for name in parts], f"{path}.{parameter}",
                           [*made, *([Transpose(1, 2)] if transposed else [])])


def _joining(rows: list[slice]) -> list[ConversionOps]:
    """What makes one matrix of those whose rows are these in it."""
    if len(rows) == 1:
        return []
    return [Concatenate(dim=1), *([Interleave(dim=1, inverse=True)] if rows[0].step else [])]
