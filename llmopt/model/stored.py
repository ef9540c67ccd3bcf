"""How a layer's weights are kept in a file while steps run, those with codes as codes alone, and are made again."""
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import FieldError, LlmoptError
from llmopt.model.codes import Quantized, pack, unpack
from llmopt.model.weights import Weight, check_consistent, coded


def packed(weight: Weight) -> dict[str, Tensor]:
    """The tensors of one weight with codes under their checkpoint names."""
    codes, stem = weight.codes, weight.stem
    return {f"{stem}_packed": pack(codes.codes, codes.bits),                              # [out, ceil(in bits / 32)]
            f"{stem}_scale": codes.scales if codes.scales.is_meta else codes.scales.cpu().contiguous(),  # [out, groups]
            f"{stem}_shape": torch.tensor(codes.codes.shape)}                             # [2] int64


def packed_in_place(tensors: dict[str, Tensor], packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict with the tensors of each packed weight in its place."""
    return {k: v for key, dense in tensors.items() for k, v in packed.get(key, {key: dense}).items()}


def stored(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of a decoder layer, its quantized weights as codes alone: what `rebuilt` makes it from again.

    Holds asymmetric and scattered grids too; of a stack of experts, none yet. Raises LlmoptError where codes and
    weights disagree.
    """
    check_consistent(layer)
    parts: dict[str, dict[str, Tensor]] = {}
    for weight in coded(layer):
        more = {f"{weight.stem}_zeros": weight.codes.zeros, f"{weight.stem}_groups": weight.codes.groups}
        parts.setdefault(weight.key, {}).update(packed(weight) | {key: t for key, t in more.items() if t is not None})
    return packed_in_place(layer.state_dict(), parts), described(layer)


def described(layer: nn.Module) -> dict[str, Any]:
    """The facts about a layer's quantized weights beside their tensors: plain JSON data by the weights' names."""
    return {w.name: {"place": [w.path, w.parameter, w.expert], "bits": w.codes.bits, "group_size": w.codes.group_size,
                     "figures": w.codes.figures} for w in coded(layer)}


def rebuilt(layer: nn.Module, tensors: dict[str, Tensor],
            record: dict[str, Any]) -> tuple[dict[str, Tensor], list[tuple[Weight, Quantized]]]:
    """(state dict, the quantized weights with their codes) of a layer from what `stored` gave.

    layer: tells layout and types. Nothing is hung on it yet.
    """
    results = [_unpacked(layer, tensors, known) for known in record.values()]
    by_key = {weight.key: (weight, codes) for weight, codes in results}
    state = {}
    for key, like in layer.state_dict().items():
        if key in by_key:
            weight, codes = by_key[key]
            dense = codes.dequantize(like.dtype)
            state[key] = dense.T.contiguous() if weight.transposed else dense
        else:
            state[key] = tensors[key]
    return state, results


def _unpacked(layer: nn.Module, tensors: dict[str, Tensor], known: dict[str, Any]) -> tuple[Weight, Quantized]:
    path, parameter, expert = known["place"]
    weight = Weight(path, layer.get_submodule(path), parameter, expert)
    words, scale, shape = (tensors[f"{weight.stem}_{part}"] for part in ("packed", "scale", "shape"))
    return weight, Quantized(unpack(words, known["bits"], shape.tolist()), scale, known["bits"], known["group_size"],
                             tensors.get(f"{weight.stem}_zeros"), tensors.get(f"{weight.stem}_groups"),
                             known["figures"])


def refuse_unportable(model: nn.Module) -> None:
    """Raise LlmoptError for what stock transformers could not load from compressed-tensors, saying what to use."""
    for weight in coded(model):
        if not isinstance(weight.module, nn.Linear) or weight.name != weight.path:
            raise LlmoptError(f"{weight.name} is a {type(weight.module).__name__}, which compressed-tensors cannot "
                              "hold: format: dense (--set format=dense) rounds it, no file shrinks")
        if weight.codes.zeros is not None:
            raise LlmoptError(f"{weight.name} has an asymmetric grid, which stock transformers cannot load from "
                              "compressed-tensors: use symmetric: true, or format: dense")
        if weight.codes.groups is not None:
            raise FieldError("static_groups", False, "true together with act_order (groups of scattered columns cannot "
                             "be stored portably), or format: dense")
