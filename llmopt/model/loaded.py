"""A model that transformers loaded from packed weights, brought back into the form in which llmopt compressed it."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.model.codes import Quantized
from llmopt.model.forms import FORMS
from llmopt.model.modeling import tied
from llmopt.model.packing import facts_of, peak_of, read_off
from llmopt.model.rounded_inputs import forget_rounding
from llmopt.model.stay_packed import inflate, is_packed
from llmopt.model.weights import CODES, Weight

LEFTOVERS = ("weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
INPUTS = ("input_scale", "input_global_scale")      # what compressed-tensors keeps beside a weight it has unpacked
WORDS = ("num_bits", "type", "symmetric", "strategy", "dynamic")    # come first in a description of inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode, as dropout would make results a matter of chance; then as it was before."""
    modes, root = {module: module.training for module in model.modules()}, model.training
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, root)


@contextmanager
def with_codes(model: nn.Module) -> Iterator[None]:
    """Inside, weights that were loaded packed carry their codes, as after compression, and nothing else beside them.

    Raises LlmoptError for weights in a form that llmopt does not write.
    """
    modules = {name: module for name, module in model.named_modules() if _scheme(module) is not None}
    if not modules:
        _refuse_foreign(model)
        yield
        return
    unpack(model)
    shared = _tied_again(model)
    taken: dict[nn.Module, dict[str, Tensor]] = {}
    try:
        for name, module in modules.items():
            if module is not shared:
                Weight(name, module).codes = module.quantized() if is_packed(module) else _codes(name, module)
            taken[module] = {key: module._parameters.pop(key) for key in LEFTOVERS if key in module._parameters}
        yield
    finally:
        for module, parameters in taken.items():
            module.__dict__.pop(CODES, None)
            module._parameters.update(parameters)


def _tied_again(model: nn.Module) -> nn.Module | None:
    """The head, if it was loaded from the codes of the embedding, whose weight it now has; else None."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or _scheme(head) is None or _scheme(table) is None or not model.config.tie_word_embeddings:
        return None
    if is_packed(table):
        return head if tied(model) else None
    if not torch.equal(table.weight, head.weight):
        return None
    del head.weight                         # compressed-tensors' parameters copy what they are set to
    head.weight = table.weight
    return head


def unpack(model: nn.Module) -> None:
    """Inflate weights that are still packed, as the first forward would."""
    if getattr(model, "ct_decompress_hook", None) is not None:
        model.hf_quantizer.compressor.decompress_model(model)


def is_ours(model: nn.Module) -> bool:
    """Whether transformers loaded the model from packed weights of the kind that llmopt writes, and of no other."""
    modules = [module for module in model.modules() if _scheme(module) is not None]
    return bool(modules) and all(is_packed(module) or _known(module) is not None for module in modules)


def _known(module: nn.Module) -> Quantized | None:
    """All of a weight's codes but their values; None where these could not be read off the unpacked weight."""
    scheme, held = module.quantization_scheme, module._parameters
    told = scheme.weights.model_dump()
    if not _is_read(told) or scheme.output_activations is not None or held.get("weight_scale") is None:
        return None
    inputs = scheme.input_activations and scheme.input_activations.model_dump()
    said = inputs and {key: inputs[key] for key in (*WORDS, *inputs) if inputs[key] is not None}
    facts = facts_of(told, getattr(scheme.format, "value", scheme.format), said)
    form, whole = FORMS[facts.pop("form")], held.get("weight_global_scale")
    known = Quantized(None, None, **facts, form=form, inputs=said, whole=1.0 if whole is None else whole.item())
    scales = {name: held[name].data for name in INPUTS if held.get(name) is not None}
    if not scales:
        return known if said is None or said["dynamic"] is True else None
    name, scale = scales.popitem()
    known.peak = peak_of(name, scale, known) if form.is_float and scale.numel() == 1 and not scales else None
    return known if known.peak else None


def _is_read(told: dict[str, Any]) -> bool:
    """True for numbers that llmopt writes: symmetric integers, and the small floats of model/forms.py."""
    strategy, bits = told["strategy"], told["num_bits"]
    if not told["symmetric"] or told["dynamic"]:
        return False
    if told["type"] == "int":
        return strategy in ("group", "channel")
    grouping = told["block_structure"] if strategy == "block" else told["group_size"]
    return (strategy, bits, grouping) in [("channel", 8, None), ("tensor", 8, None), ("block", 8, [128, 128]),
                                          ("tensor_group", 4, 16), ("group", 4, 32), ("group", 8, 32)]


def _scheme(module: nn.Module) -> Any:
    """The quantization scheme that compressed-tensors gives for a module's weights; None for dense ones."""
    return getattr(module.__dict__.get("quantization_scheme"), "weights", None)


@torch.no_grad()
def _codes(name: str, module: nn.Module) -> Quantized:
    """The codes of an unpacked weight, from the weight and its scales."""
    scheme, known = _scheme(module), _known(module)
    if known is None:
        rounded = ", inputs rounded" if module.quantization_scheme.input_activations is not None else ""
        raise LlmoptError(f"{name}: loaded in a form ({scheme.type}, {scheme.strategy}, symmetric: {scheme.symmetric}"
                          f"{rounded}) that llmopt does not write; model.save_pretrained(FOLDER) before the first "
                          "forward keeps the file as it is")
    scales = module._parameters["weight_scale"].data
    short = scales.half()                   # the type they had in the file, if it was shorter than the model's
    if scales.dtype == torch.float32 and not known.form.is_float and torch.equal(short.float(), scales):
        scales = short
    return read_off(module.weight.data, scales, known)


def _refuse_foreign(model: nn.Module) -> None:
    """Raise LlmoptError for a model that another library has quantized and still holds so."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    name = getattr(method, "quant_method", "compressed-tensors")
    if str(getattr(name, "value", name)) != "compressed-tensors":
        raise LlmoptError(f"the model is quantized by {getattr(name, 'value', name)}, which llmopt does not write; "
                          "save it with that library")


def forget_codes(model: nn.Module) -> None:
    """Make a quantized model an ordinary dense one with the weights it has now, which may then be trained and saved."""
    unpack(model)
    inflate(model)
    _refuse_foreign(model)
    _tied_again(model)
    forget_rounding(model)
    for module in model.modules():
        module.__dict__.pop(CODES, None)
        if _scheme(module) is not None:
            del module.quantization_scheme
            for key in LEFTOVERS + INPUTS:
                module._parameters.pop(key, None)
    model.config.__dict__.pop("quantization_config", None)
    for key in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(key, None)
