"""How a layer's weights are kept in a file while steps run, those with codes as codes alone, and are made again."""
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REBUILT

from llmopt.errors import FieldError, LlmoptError
from llmopt.model import expert_files
from llmopt.model.blocks import spec_of
from llmopt.model.codes import Quantized
from llmopt.model.forms import BYTES
from llmopt.model.packing import format_of, kept, packed, unpacked
from llmopt.model.state import tied_names
from llmopt.model.weights import Weight, check_consistent, coded


def packed_in_place(tensors: dict[str, Tensor], packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict with the tensors of each packed weight in its place."""
    return {k: v for key, dense in tensors.items() for k, v in packed.get(key, {key: dense}).items()}


def stored(layer: nn.Module, release: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of a decoder layer, its quantized weights as codes alone: what `rebuilt` makes it from again.

    Holds scattered grids too. release: the layer's dense copies of these weights are gone before any is packed. Raises
    LlmoptError where codes and weights disagree.
    """
    check_consistent(layer)
    found = coded(layer)
    counts = Counter(weight.key for weight in found)
    for weight in found if release else ():
        dense = getattr(weight.module, weight.parameter)
        if weight.expert is None or counts[weight.key] == len(dense):
            weight.module._parameters[weight.parameter] = nn.Parameter(dense.detach().to("meta"), requires_grad=False)
    return as_codes(layer.state_dict(), found)


def as_codes(state: dict[str, Tensor], weights: list[Weight]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of a state dict in which these quantized weights become their codes."""
    parts: dict[str, dict[str, Tensor]] = {}
    places = {weight.stem for weight in weights}
    for weight in weights:
        if weight.expert is not None and weight.key not in parts:       # of the stack, experts without codes
            parts[weight.key] = {name: one.clone() for expert, one in enumerate(state[weight.key])
                                 if (name := f"{weight.key}.{expert}") not in places}
        more = {} if weight.codes.groups is None else {f"{weight.stem}_groups": weight.codes.groups}
        parts.setdefault(weight.key, {}).update(packed(weight) | more)
    return packed_in_place(state, parts), described(weights)


def described(weights: list[Weight]) -> dict[str, Any]:
    """The facts about quantized weights beside their tensors: plain JSON data by the weights' names."""
    return {w.name: {"place": [w.path, w.parameter, w.expert], "figures": w.codes.figures, **kept(w.codes)}
            for w in weights}


def rebuilt(root: nn.Module, tensors: dict[str, Tensor], record: dict[str, Any],
            like: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], list[tuple[Weight, Quantized]]]:
    """(state dict, the quantized weights with their codes) from what `stored` or `as_codes` gave.

    root: a layer or a model, on which nothing is hung yet. like: the tensors wanted, whose types they get; None: all.
    """
    results = [_unpacked(root, tensors, known) for known in record.values()]
    by_key: dict[str, dict[int | None, tuple[Weight, Quantized]]] = {}
    for weight, codes in results:
        by_key.setdefault(weight.key, {})[weight.expert] = weight, codes

    def dense(weight: Weight, codes: Quantized, dtype: torch.dtype) -> Tensor:
        made = codes.dequantize(dtype)
        return made.T.contiguous() if weight.transposed else made

    state = {}
    for key, wanted in (root.state_dict() if like is None else like).items():
        found = by_key.get(key, {})
        if None in found:
            state[key] = dense(*found[None], wanted.dtype)
        elif found:
            made = torch.empty(wanted.shape, dtype=wanted.dtype, device=next(iter(found.values()))[1].codes.device)
            for expert in range(len(wanted)):
                made[expert] = dense(*found[expert], wanted.dtype) if expert in found else tensors[f"{key}.{expert}"]
            state[key] = made
        else:
            state[key] = tensors[key]
    return state, results


def _unpacked(root: nn.Module, tensors: dict[str, Tensor], known: dict[str, Any]) -> tuple[Weight, Quantized]:
    facts = dict(known)
    path, parameter, expert = facts.pop("place")
    weight = Weight(path, root.get_submodule(path), parameter, expert)
    codes = unpacked(tensors, weight.stem, facts)
    codes.groups = tensors.get(f"{weight.stem}_groups")
    return weight, codes


def packed_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """By the key of each weight with codes: the tensors of a checkpoint that stand in its place."""
    parts: dict[str, dict[str, Tensor]] = {}
    for weight in coded(model):
        parts.setdefault(weight.key, {}).update(packed(weight))
    return {key: made | beside(model, made) for key, made in parts.items()}


def beside(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What loading wants beside the tensors of an embedding in bytes, or packed, if they are among these.

    A tied head reads the same bytes by scales of its own; what a module computes from its config is looked for as well.
    """
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    weight, scales = Weight(name, table), tensors.get(f"{name}.weight_scale")
    if scales is None or weight.codes.form != BYTES and not is_table(weight, model):
        return {}
    twins = tied_names(model) if weight.codes.form == BYTES else ()
    computed = dict(table.named_buffers()).keys() - table.state_dict().keys()
    return {f"{twin}_scale": scales.clone() for twin in twins} | {
        f"{name}.{buffer}": getattr(table, buffer) for buffer in computed}


def refuse_unportable(model: nn.Module) -> None:
    """Raise LlmoptError for what stock transformers could not load from compressed-tensors, saying what to use."""
    found = coded(model)
    expert_files.refuse(model, found)
    dense = [weight for weight in found if weight.expert is None]
    for weight in dense:
        if not isinstance(weight.module, (nn.Linear, nn.Embedding)) or weight.name != weight.path:
            raise LlmoptError(f"{weight.name} is a {type(weight.module).__name__}, which compressed-tensors cannot "
                              "hold: format: dense (--set format=dense) rounds it, no file shrinks")
        if weight.codes.groups is not None:
            raise FieldError("static_groups", False, "true together with act_order (groups of scattered columns cannot "
                             "be stored portably), or format: dense")
    unknown = REBUILT.keys() - expert_files.APART
    if rebuilt_experts := {type(module).__name__ for module in model.modules()} & unknown:
        raise LlmoptError(f"beside packed weights transformers builds the experts anew, one by one "
                          f"({min(rebuilt_experts)}), and does not find them: use format: dense")
    _refuse_types(found, at_once(model) or any(map(_is_packed_table, found)))
    if dequantizes(model) and not _alike(dense):
        if any(map(_is_packed_table, found)):
            raise LlmoptError("an embedding at less than 8 bits must be like all other weights in bits and groups "
                              "beside weights that transformers unpacks at once (zero points, this architecture): give "
                              "all weights the bits of the embedding, or use symmetric: true, or format: dense")
        way = "" if at_once(model) else "symmetric: true, or "
        what = "the weights of this architecture" if at_once(model) else \
            "weights with zero points, or small floats of a model that is not bfloat16,"
        raise LlmoptError(f"{what} must be alike in bits and groups for plain transformers to load them: use {way}"
                          "format: dense")


def _refuse_types(weights: list[Weight], at_once: bool) -> None:
    """Raise LlmoptError for types in which transformers would compute other weights or inputs than the solver saw."""
    for weight in weights:
        dtype, codes = str(weight.dtype).removeprefix("torch."), weight.codes
        scales = str(codes.scales.dtype).removeprefix("torch.")
        if (codes.zeros is not None or at_once or weight.expert is not None) and scales != dtype:
            raise FieldError("scale_dtype", scales, f"{dtype}, the model's type: where there are zero points, an "
                             "embedding at less than 8 bits, experts, or a model that is unpacked at once, "
                             "transformers multiplies in the type of the scales; or format: dense")
        if codes.inputs and codes.form.through_bfloat16 and dtype != "bfloat16":
            raise LlmoptError(f"{weight.name}: transformers unpacks {codes.form.name} as bfloat16, and the model is "
                              f"{dtype}: give dtype: bfloat16 under model (--dtype bf16)")


def dequantizes(model: nn.Module) -> bool:
    """True where plain transformers loads the weights only unpacked at once, by a word in their config.

    Some models ask for their weights before they are loaded (Spec.at_once). For all, it makes room for zero points
    that are not packed, and its packed small floats become bfloat16 weights; a packed embedding it loads so where all
    weights are alike, and else not at all (`is_table`).
    """
    found = coded(model)
    return at_once(model) or any(w.codes.zeros is not None or w.codes.form.through_bfloat16
                                 and w.dtype != torch.bfloat16 for w in found) or (
        any(map(_is_packed_table, found)) and _alike([w for w in found if w.expert is None]))


def is_table(weight: Weight, model: nn.Module) -> bool:
    """True for an embedding whose codes plain transformers cannot load: packed, beside weights of other settings."""
    return _is_packed_table(weight) and not dequantizes(model)


def _alike(weights: Sequence[Weight]) -> bool:
    """True where all weights have one setting."""
    return len({(w.codes.bits, w.codes.group_size, w.codes.form.name, w.codes.zeros is None, w.codes.inputs is None)
                for w in weights}) <= 1


def at_once(root: nn.Module) -> bool:
    """True for a model whose weights plain transformers can only unpack while it loads them; a layer does not say.

    Experts it always unpacks while it loads them, whatever it does with the rest.
    """
    return isinstance(root, PreTrainedModel) and spec_of(root).at_once and bool(coded(root))


def _is_packed_table(weight: Weight) -> bool:
    return isinstance(weight.module, nn.Embedding) and format_of(weight.codes) == "pack-quantized"


def refuse_rounded_inputs(model: nn.Module) -> None:
    """Raise LlmoptError for weights whose inputs are to be rounded, which a dense checkpoint cannot tell."""
    for weight in coded(model):
        if weight.codes.inputs:
            raise LlmoptError(f"{weight.name}: format: dense cannot say that what it reads is rounded, too: use "
                              "format: portable, or a scheme for weights alone such as W8A16")
