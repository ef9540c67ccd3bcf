"""Models that are loaded from packed weights and keep them packed: `llmopt.load(DIR, packed=True)`, `LLMOPT_PACKED=1`.

compressed-tensors inflates all weights at the first forward. Here each weight stays as it is in the file, or is laid
out once for the fastest product of this machine, and its layer multiplies with the codes (llmopt_kernels.quant_matmul).
Integers of 2 to 8 bits with and without zero points can stay packed; small floats, and weights whose inputs are
rounded, cannot.
"""
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from llmopt_kernels import Words, laid_out
from torch import Tensor, nn

from llmopt.errors import LlmoptError
from llmopt.model.codes import unpack
from llmopt.model.heap import give_back_freed
from llmopt.model.modeling import tied
from llmopt.model.packed_modules import Packed, packed_class, plain_class

VARIABLE = "LLMOPT_PACKED"
SWITCH = {"": False, "0": False, "1": True}
TABLE = "it is a table of less than 8 bits, or not of whole bytes"
OF_FILES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

_packing: ContextVar[bool | None] = ContextVar("packing", default=None)


def asked_for() -> bool:
    """True where packed weights are to stay so; raises LlmoptError for a value in the environment that says nothing."""
    value = os.environ.get(VARIABLE, "")
    if value not in SWITCH:
        raise LlmoptError(f"{VARIABLE}={value} given, 1 or 0 expected")
    return SWITCH[value] if _packing.get() is None else _packing.get()


@contextmanager
def packing(wanted: bool | None) -> Iterator[None]:
    """Inside, models are loaded with their packed weights kept so, or not; None: as the environment says."""
    token = _packing.set(wanted)
    try:
        yield
    finally:
        _packing.reset(token)


def extend_quantizer(quantizers: ModuleType) -> None:
    """Have transformers' loader of compressed-tensors make room for what lies in the files, where that is to stay."""
    quantizer = quantizers.CompressedTensorsHfQuantizer
    start, before = quantizer.__init__, quantizer._process_model_before_weight_loading
    after = quantizer._process_model_after_weight_loading

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if asked_for():
            self.quantization_config.dequantize = False

    def prepared(self: Any, model: nn.Module, **kwargs: Any) -> None:
        before(self, model, **kwargs)
        for name, module in _packed_tables(model).items():
            if asked_for():
                raise LlmoptError(f"{name} cannot stay packed: {TABLE}. Load the checkpoint without packed=True "
                                  f"({VARIABLE})")
            module._is_hf_initialized = True                # else transformers draws its weight, which is not there
            model._keys_to_ignore_on_load_missing.update(map(re.escape, model.all_tied_weights_keys))
            model.all_tied_weights_keys = {}                # nor is it there to be tied; `finished` does that
        if asked_for():
            for module in filter(_has_packed_zeros, model.modules()):
                height, groups = module.weight_zero_point.shape
                words = torch.empty(-(-height * module.quantization_scheme.weights.num_bits // 32), groups,
                                    dtype=torch.int32, device="meta")
                module.weight_zero_point = nn.Parameter(words, requires_grad=False)

    def finished(self: Any, model: nn.Module, **kwargs: Any) -> Any:
        done = after(self, model, **kwargs)
        if _packed_tables(model):
            self.compressor.decompress_model(model)
            head = model.get_output_embeddings()
            if model.config.tie_word_embeddings and head is not None:
                del head.weight                     # compressed-tensors' parameters copy what they are set to
                head.weight = model.get_input_embeddings().weight
                model.tie_weights()
        return done

    quantizer.__init__, quantizer._process_model_before_weight_loading = started, prepared
    quantizer._process_model_after_weight_loading = finished


def _packed_tables(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the embeddings whose codes are packed, as no plain transformers loads them."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and "weight_packed" in module._parameters}


def _has_packed_zeros(module: nn.Module) -> bool:
    return "weight_zero_point" in module._parameters and "weight_packed" in module._parameters


@torch.no_grad()
def keep_packed(model: nn.Module, source: str) -> None:
    """Make the layers of a freshly loaded model multiply with their packed weights; a dense model stays as it is.

    Raises LlmoptError, before anything changes, for weights that cannot stay packed.
    """
    found = {name: module for name, module in model.named_modules() if "quantization_scheme" in vars(module)}
    for name, module in found.items():
        _refuse(name, module, source)
    if found:
        model.hf_quantizer.compressor.remove_decompression_hook(model)
    shared = tied(model) and model.get_input_embeddings() in found.values()
    for module in found.values():
        _keep(module)
    if shared:
        model.get_input_embeddings().codes = model.get_output_embeddings().codes
    for parameter in model.parameters() if found else ():
        parameter.data = parameter.data.clone()     # while one of them lies in the file, all of it stays mapped
    give_back_freed()


def check_packed(model: nn.Module, source: str) -> None:
    """Raise LlmoptError for a model in which no weight has stayed packed."""
    if not any(map(is_packed, model.modules())):
        raise LlmoptError(f"{source}: packed=True given, but the checkpoint holds no packed weights; load it without, "
                          "or compress it first (llmopt compress MODEL --scheme W4A16)")


def _refuse(name: str, module: nn.Module, source: str) -> None:
    """Raise LlmoptError for a weight that cannot stay packed."""
    scheme = module.quantization_scheme
    weights, reason = scheme.weights, None
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        reason = f"it belongs to a {type(module).__name__}"
    elif isinstance(module, nn.Embedding) and module._parameters["weight"].dtype != torch.int8:
        reason = TABLE
    elif scheme.input_activations is not None or scheme.output_activations is not None:
        reason = "what it reads is rounded, too"
    elif weights.type != "int" or not 2 <= weights.num_bits <= 8:
        reason = f"it holds {weights.num_bits}-bit numbers of type {weights.type}"
    elif weights.strategy not in ("group", "channel") or weights.dynamic or "weight_g_idx" in module._parameters:
        reason = f"its scales are not those of rows or groups of columns ({weights.strategy})"
    elif "weight_packed" not in module._parameters and module._parameters["weight"].dtype != torch.int8:
        reason = "it is not packed in the file"
    if reason:
        raise LlmoptError(f"{source}: {name} cannot stay packed: {reason}; integers of 2 to 8 bits can, weight-only. "
                          f"Load the checkpoint without packed=True ({VARIABLE})")


def _keep(module: nn.Module) -> None:
    weights = module.quantization_scheme.weights
    stored = {key: module._parameters.pop(key).data for key in OF_FILES if key in module._parameters}
    vars(module).pop("forward", None)                   # compressed-tensors' own, which reads `weight`
    module.__class__ = packed_class(type(module))
    module.dtype = stored["weight_scale"].dtype
    module.group_size = -1 if weights.strategy == "channel" else weights.group_size
    module.codes = laid_out(_words(stored, weights.num_bits, module), module.dtype)


def _words(stored: dict[str, Tensor], bits: int, module: nn.Linear) -> Words:
    scales, zeros = stored["weight_scale"].clone(), stored.get("weight_zero_point")
    if zeros is None:
        short = scales.half()           # the type they had in the file, if it was shorter than the model's
        scales = short if scales.dtype == torch.float32 and torch.equal(short.float(), scales) else scales
    elif "weight_packed" in stored:
        zeros = unpack(zeros, bits, (module.out_features, scales.shape[1]), 0)
    if "weight_packed" in stored:
        return Words(stored["weight_packed"], bits, module.in_features, scales, zeros)
    return Words.of_bytes(stored["weight"], scales, zeros)


def is_packed(module: nn.Module) -> bool:
    """True for a layer that multiplies with its packed weight, or looks up in it."""
    return isinstance(module, Packed)


@torch.no_grad()
def inflate(model: nn.Module) -> None:
    """Give layers whose weights stay packed dense weights, and transformers' class again."""
    made: dict[nn.Module, nn.Parameter] = {}
    for module in filter(is_packed, list(model.modules())):
        if module.codes not in made:
            made[module.codes] = nn.Parameter(module.dense(), requires_grad=False)
        weight = made[module.codes]
        del module.codes, module.group_size, module.dtype
        module.__class__ = plain_class(type(module))
        module.weight = weight


def as_weights(model: nn.Module, state: dict[str, Tensor], values: bool) -> dict[str, Tensor]:
    """A state dict with one tensor, under the weight's name, for each weight that stays packed; values: a dense one."""
    packed = {f"{name}.codes": module for name, module in model.named_modules() if is_packed(module)}
    made = {}
    for key, tensor in state.items():
        stem = key.rpartition(".")[0]
        if stem not in packed:
            made[key] = tensor
        elif (name := f"{stem.removesuffix('.codes')}.weight") not in made:
            module = packed[stem]
            made[name] = module.dense() if values else torch.empty(module.codes.shape, dtype=module.dtype,
                                                                   device="meta")
    return made
