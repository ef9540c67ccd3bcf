"""Quantized modules as compressed-tensors `pack-quantized` tensors and their quantization_config.

What is written loads in stock transformers, bit-exact: symmetric grids, 2 to 8 bits, mixed, in groups or per channel,
with the exact name of every module as a target.
"""
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.method import FieldError, LlmoptError
from llmopt.quant.base import Quantizer, quantized_modules
from llmopt.quant.grid import DTYPES, Quantized
from llmopt.quant.plan import DENSE, packed_bytes

Exported = tuple[dict[str, dict[str, Tensor]], dict]


def export(model: nn.Module) -> Exported | None:
    """({state-dict key: tensors written in its place}, quantization_config); None when nothing is quantized.

    Raises LlmoptError for what compressed-tensors cannot hold, or where codes and dense weights disagree.
    """
    found = quantized_modules(model)
    if not found:
        return None
    refuse_unportable(model)
    check_consistent(model)
    tensors = {f"{name}.weight": packed(name, result) for name, (_, result) in found.items()}
    return tensors, quantization_config(model)


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


def widths(config: dict) -> dict[str, int]:
    """The bits of every module that a quantization_config of ours names."""
    return {name: group["weights"]["num_bits"] for group in config["config_groups"].values()
            for name in group["targets"]}


def quantization_config(model: nn.Module) -> dict:
    """What config.json says of the quantized modules: one group for each (bits, group size), exact names as targets."""
    found = quantized_modules(model)
    schemes: dict[tuple[int, int], list[str]] = {}
    for name, (_, result) in found.items():
        schemes.setdefault((result.bits, result.group_size), []).append(name)
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in found and n != "lm_head"]
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head", *dense],
            "config_groups": {f"group_{i}": _scheme(bits, size, names)
                              for i, ((bits, size), names) in enumerate(sorted(schemes.items()))}}


def _scheme(bits: int, group_size: int, names: list[str]) -> dict:
    grouping = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return {"targets": names, "input_activations": None, "output_activations": None,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **grouping}}


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
                              "step that edits weights")


def predicted_bytes(model: nn.Module, step: Quantizer) -> int:
    """Bytes `export` will write for the modules that `step` quantizes, from shapes alone.

    Exact where names and shapes decide the bits; `allocate: sensitivity` is counted at the average.
    """
    scale = (DTYPES[step.scale_dtype] if step.scale_dtype else model.dtype).itemsize
    return int(sum(packed_bytes(t, scale) for t in step.planned(model) if t.bits != DENSE))
