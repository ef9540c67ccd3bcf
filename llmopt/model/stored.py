"""How a layer's weights are kept in a file while steps run, those with codes as codes alone, and are made again."""
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import FieldError, LlmoptError
from llmopt.model.codes import Quantized
from llmopt.model.packing import kept, packed, unpacked
from llmopt.model.weights import Weight, check_consistent, coded


def packed_in_place(tensors: dict[str, Tensor], packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict with the tensors of each packed weight in its place."""
    return {k: v for key, dense in tensors.items() for k, v in packed.get(key, {key: dense}).items()}


def stored(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of a decoder layer, its quantized weights as codes alone: what `rebuilt` makes it from again.

    Holds scattered grids too; of a stack of experts, none yet. Raises LlmoptError where codes and
    weights disagree.
    """
    check_consistent(layer)
    parts: dict[str, dict[str, Tensor]] = {}
    for weight in coded(layer):
        more = {} if weight.codes.groups is None else {f"{weight.stem}_groups": weight.codes.groups}
        parts.setdefault(weight.key, {}).update(packed(weight) | more)
    return packed_in_place(layer.state_dict(), parts), described(layer)


def described(layer: nn.Module) -> dict[str, Any]:
    """The facts about a layer's quantized weights beside their tensors: plain JSON data by the weights' names."""
    return {w.name: {"place": [w.path, w.parameter, w.expert], "figures": w.codes.figures, **kept(w.codes)}
            for w in coded(layer)}


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
    facts = dict(known)
    path, parameter, expert = facts.pop("place")
    weight = Weight(path, layer.get_submodule(path), parameter, expert)
    codes = unpacked(tensors, weight.stem, facts)
    codes.groups = tensors.get(f"{weight.stem}_groups")
    return weight, codes


def refuse_unportable(model: nn.Module) -> None:
    """Raise LlmoptError for what stock transformers could not load from compressed-tensors, saying what to use."""
    for weight in coded(model):
        if not isinstance(weight.module, nn.Linear) or weight.name != weight.path:
            raise LlmoptError(f"{weight.name} is a {type(weight.module).__name__}, which compressed-tensors cannot "
                              "hold: format: dense (--set format=dense) rounds it, no file shrinks")
        if weight.codes.groups is not None:
            raise FieldError("static_groups", False, "true together with act_order (groups of scattered columns cannot "
                             "be stored portably), or format: dense")
    _refuse_types(coded(model))
    if dequantizes(model) and len({(w.codes.bits, w.codes.group_size, w.codes.form.name) for w in coded(model)}) > 1:
        raise LlmoptError("weights with zero points, or small floats of a model that is not bfloat16, must be alike in "
                          "bits and groups for plain transformers to load them: use symmetric: true, or format: dense")


def _refuse_types(weights: list[Weight]) -> None:
    """Raise LlmoptError for types in which transformers would compute other weights or inputs than the solver saw."""
    for weight in weights:
        dtype, codes = str(weight.dtype).removeprefix("torch."), weight.codes
        scales = str(codes.scales.dtype).removeprefix("torch.")
        if codes.zeros is not None and scales != dtype:
            raise FieldError("scale_dtype", scales, f"{dtype}, the model's type: where there are zero points, "
                             "transformers multiplies in the type of the scales; or format: dense")
        if codes.inputs and codes.form.through_bfloat16 and dtype != "bfloat16":
            raise LlmoptError(f"{weight.name}: transformers unpacks {codes.form.name} as bfloat16, and the model is "
                              f"{dtype}: give dtype: bfloat16 under model (--dtype bf16)")


def dequantizes(model: nn.Module) -> bool:
    """True where plain transformers loads the weights only unpacked at once, by a word in their config.

    It makes room for zero points that are not packed, and its packed small floats become bfloat16 weights.
    """
    return any(w.codes.zeros is not None or
               w.codes.form.through_bfloat16 and w.dtype != torch.bfloat16 for w in coded(model))


def refuse_rounded_inputs(model: nn.Module) -> None:
    """Raise LlmoptError for weights whose inputs are to be rounded, which a dense checkpoint cannot tell."""
    for weight in coded(model):
        if weight.codes.inputs:
            raise LlmoptError(f"{weight.name}: format: dense cannot say that what it reads is rounded, too: use "
                              "format: portable, or a scheme for weights alone such as W8A16")
