"""Weights as integer codes: what they stand for, how a layer stores them and is made from them again."""
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import FieldError, LlmoptError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Quantized:
    """A weight [out, in] as integer codes; the value is scales * (codes - zeros), computed in the model's type."""

    codes: Tensor                       # [out, in] int8 (int32 beyond 8 bits)
    scales: Tensor                      # [out, groups], in the stored type
    bits: int
    group_size: int                     # -1: one group
    zeros: Tensor | None = None         # [out, groups], signed like the codes; None: symmetric
    groups: Tensor | None = None        # [in] the group of each column, where that is not column // group_size
    figures: dict = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] exactly as a loader computes it for a model of type `dtype`."""
        if self.groups is not None:
            zeros = None if self.zeros is None else self.zeros[:, self.groups]
            return decode(self.codes, self.scales[:, self.groups], zeros, dtype)
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1))                          # [out, groups, width]
        zeros = None if self.zeros is None else self.zeros.unsqueeze(-1)
        return decode(codes, self.scales.unsqueeze(-1), zeros, dtype).flatten(1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * (codes - zero), multiplied in `dtype`. The shapes broadcast."""
    steps = codes.float() if zero is None else codes.float() - zero.float()
    return steps.to(dtype) * scale.to(dtype)


def quantized_modules(model: nn.Module) -> dict[str, tuple[nn.Module, Quantized]]:
    """The modules that carry codes, by name."""
    return {name: (module, vars(module)["llmopt_quantized"]) for name, module in model.named_modules()
            if "llmopt_quantized" in vars(module)}


def _int32(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] side by side in int32 words."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # takes two seconds to import

    return pack_to_int32(codes.cpu(), bits)


def _codes(words: Tensor, bits: int, shape: Iterable[int]) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size(shape))


def packed(name: str, result: Quantized) -> dict[str, Tensor]:
    """The tensors of one module under their checkpoint names."""
    return {f"{name}.weight_packed": _int32(result.codes, result.bits),                   # [out, ceil(in bits / 32)]
            f"{name}.weight_scale": result.scales.cpu().contiguous(),                     # [out, groups]
            f"{name}.weight_shape": torch.tensor(result.codes.shape)}                     # [2] int64


def packed_in_place(tensors: dict[str, Tensor], packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict with the tensors of each packed weight in its place."""
    return {k: v for key, dense in tensors.items() for k, v in packed.get(key, {key: dense}).items()}


def stored(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of a decoder layer, its quantized weights as codes alone: what `rebuilt` makes it from again.

    Holds asymmetric and scattered grids too. Raises LlmoptError where codes and weights disagree.
    """
    check_consistent(layer)
    parts = {}
    for name, (_, result) in quantized_modules(layer).items():
        more = {f"{name}.zeros": result.zeros, f"{name}.groups": result.groups}
        parts[f"{name}.weight"] = packed(name, result) | {key: t for key, t in more.items() if t is not None}
    return packed_in_place(layer.state_dict(), parts), told(layer)


def told(layer: nn.Module) -> dict[str, Any]:
    """What is known of a layer's quantized weights beside their tensors; plain JSON data."""
    return {name: {"bits": r.bits, "group_size": r.group_size, "figures": r.figures}
            for name, (_, r) in quantized_modules(layer).items()}


def rebuilt(layer: nn.Module, tensors: dict[str, Tensor],
            record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """(state dict, {module name: codes}) of a layer from what `stored` gave; `layer` tells layout and types."""
    results = {name: _unpacked(name, tensors, known) for name, known in record.items()}
    state = {}
    for key, like in layer.state_dict().items():
        name, _, _ = key.rpartition(".weight")
        if name in results:
            weight = results[name].dequantize(like.dtype)
            state[key] = weight if isinstance(layer.get_submodule(name), nn.Linear) else weight.T.contiguous()
        else:
            state[key] = tensors[key]
    return state, results


def _unpacked(name: str, tensors: dict[str, Tensor], known: dict[str, Any]) -> Quantized:
    codes = _codes(tensors[f"{name}.weight_packed"], known["bits"], tensors[f"{name}.weight_shape"].tolist())
    return Quantized(codes, tensors[f"{name}.weight_scale"], known["bits"], known["group_size"],
                     tensors.get(f"{name}.zeros"), tensors.get(f"{name}.groups"), known["figures"])


def unpacked(codes: Tensor, scale: Tensor, shape: list[int], bits: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] of a model of type `dtype` that these tensors of `packed` stand for."""
    return Quantized(_codes(codes, bits, shape), scale, bits, shape[1] // scale.shape[1]).dequantize(dtype)


def refuse_unportable(model: nn.Module) -> None:
    """Raise LlmoptError for what stock transformers could not load from compressed-tensors, saying what to use."""
    for name, (module, result) in quantized_modules(model).items():
        if not isinstance(module, nn.Linear):
            raise LlmoptError(f"{name} is a {type(module).__name__}, which compressed-tensors cannot hold: "
                              "use format: dense")
        if result.zeros is not None:
            raise LlmoptError(f"{name} has an asymmetric grid, which stock transformers cannot load from "
                              "compressed-tensors: use symmetric: true, or format: dense")
        if result.groups is not None:
            raise FieldError("static_groups", False, "true together with act_order (groups of scattered columns cannot "
                             "be stored portably), or format: dense")


def check_consistent(model: nn.Module) -> None:
    """Raise LlmoptError where a dense weight is not what its codes and scales stand for."""
    for name, (module, result) in quantized_modules(model).items():
        weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T
        if weight.shape != result.codes.shape or not torch.equal(result.dequantize(weight.dtype), weight):
            raise LlmoptError(f"{name}: the weight was changed after it was quantized; quantization must be the last "
                              "step that edits weights; to train or write them as they are, call "
                              "llmopt.model.loaded.forget_codes(model) first")
