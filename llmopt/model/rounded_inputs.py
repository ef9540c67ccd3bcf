"""Inputs of quantized weights rounded while a model in memory runs, as transformers rounds them in a loaded one."""
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.model.packing import input_scale
from llmopt.model.weights import Weight, coded

HOOK = "_llmopt_rounded_inputs"         # where a module keeps the handle of its hook


class Rounding:
    """A forward pre-hook: compressed-tensors' own arithmetic, so that a score here is one of the loaded checkpoint."""

    def __init__(self, weight: Weight):
        from compressed_tensors.quantization import QuantizationArgs  # takes two seconds to import

        codes = weight.codes
        self.how = QuantizationArgs(**codes.inputs)
        name, scale = ("", None) if codes.peak is None else input_scale(codes, weight.weight.dtype)
        self.scale = scale if name == "input_scale" else None
        self.whole = scale if name == "input_global_scale" else None

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

        x, *rest = args
        if not x.numel():
            return args
        whole, scale, zero = self._here(self.whole, x), self._here(self.scale, x), None
        if scale is None:
            scale, zero = compute_dynamic_scales_and_zp(x, self.how, module, whole)
        return fake_quantize(x, scale, zero, self.how, whole), *rest

    @staticmethod
    def _here(value: Tensor | None, x: Tensor) -> Tensor | None:
        return None if value is None else value.to(x.device)


def round_inputs(model: nn.Module) -> None:
    """From now on, what weights with such codes read is rounded first."""
    forget_rounding(model)
    for weight in coded(model):
        if weight.codes.inputs:
            setattr(weight.module, HOOK, weight.module.register_forward_pre_hook(Rounding(weight)))


def forget_rounding(model: nn.Module) -> None:
    """Undo `round_inputs`."""
    for module in model.modules():
        if handle := module.__dict__.pop(HOOK, None):
            handle.remove()
