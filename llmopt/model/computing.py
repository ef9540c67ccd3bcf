"""The type that a model computes in, which need not be the one its weights are stored in.

Many CPUs have no bf16 arithmetic: there a bf16 layer takes several times as long as a float32 one. Weights stay in the
stored type, so that sizes, grids and files are the checkpoint's; each is converted when a layer reads it.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

KEY = "_llmopt_compute"         # where a model keeps the type that it computes in
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOOKUPS = {functional.embedding, torch.embedding}           # a row of the table is converted, not the table
READERS = {functional.linear, functional.layer_norm, torch.layer_norm, functional.rms_norm, torch.rms_norm,
           torch.addmm, torch.bmm, torch.baddbmm}
# what a CPU calls its arithmetic in each type; on x86, and on ARM
CPU_FLAGS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fp16")}


class Computing(TorchFunctionMode):
    """Inside, what layers read, inputs and weights, is converted to one type, and so is all that comes out of them."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in LOOKUPS:
            return self._converted(function(*args, **kwargs))
        if function in READERS:
            args = tuple(self._converted(value) for value in args)
            kwargs = {key: self._converted(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    def _converted(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype in FLOATS else value


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of the model compute in the type that was chosen for it; nothing changes where none was.

    Experts are computed one by one: transformers' grouped products round what they read to the weights' type.
    """
    dtype = compute_type(model)
    if dtype == model.dtype:
        yield
        return
    with eager(model), Computing(dtype):
        yield


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Inside, a model or a module of experts computes one expert after the other, as their own forward is written."""
    config = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(config, "_experts_implementation_internal"):
        yield
        return
    before = config._experts_implementation_internal
    config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        config._experts_implementation_internal = before


def compute_type(model: nn.Module) -> torch.dtype:
    """The type of the model's hidden states."""
    return model.__dict__.get(KEY, model.dtype)


def choose(model: nn.Module, name: str, device: str, agree: Callable[[Any], Any] = lambda mine: mine) -> None:
    """Let `model` compute in the type of this name; auto: its own where this machine computes fast in it, else fp32.

    agree: turns this process's choice into that of all processes.
    """
    model.__dict__[KEY] = agree(getattr(torch, name) if name != "auto" else fast_type(model.dtype, device))


def convert(model: nn.Module, room: int) -> None:
    """Convert a model that is only read to the type it computes in, if that takes at most `room` bytes more.

    Without the room, or with weights elsewhere, each is converted when a layer reads it.
    """
    dtype, parameters = compute_type(model), list(model.parameters())
    if dtype == model.dtype or any(parameter.is_meta for parameter in parameters):
        return
    packed = getattr(model, "ct_decompress_hook", None) is not None
    if packed:
        model.hf_quantizer.compressor.decompress_model(model)       # in the stored type, which is what was verified
    if sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize <= room:
        model.to(dtype)


def fast_type(stored: torch.dtype, device: str = "cpu") -> torch.dtype:
    """The stored type, or float32 where the device only emulates it."""
    if stored not in CPU_FLAGS:
        return stored
    if torch.device(device).type == "cuda":
        fast = stored == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities()
        fast = torch.device(device).type != "cpu" or any(flags.get(flag) for flag in CPU_FLAGS[stored])
    return stored if fast else torch.float32
