"""The calls that a forward makes of the blocks, none of which runs: hidden states in front, and all other arguments."""
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from llmopt.model.blocks import decoder, layer_list, returned
from llmopt.model.discovery import split
from llmopt.scale.memory import Memory


class Shared:
    """Stands in for each tensor of a call: the same one for the blocks of a batch, and for batches that are alike."""

    def __init__(self, hold: Callable[[Tensor], Tensor]):
        self.hold = hold
        self.before: list[Tensor] = []                      # what the last batch held
        self.now: dict[int, tuple[Tensor, Tensor]] = {}     # by its address: as it came, as it is held

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.now:
            alike = (held for held in self.before if held.dtype == tensor.dtype and torch.equal(held, tensor))
            held = next(alike, None)
            self.now[id(tensor)] = tensor, self.hold(tensor) if held is None else held
        return self.now[id(tensor)][1]

    def next_batch(self) -> None:
        self.before, self.now = [held for _, held in self.now.values()], {}


@torch.no_grad()
def record_calls(model: nn.Module, batches: list[dict[str, Tensor]], memory: Memory) -> tuple[list[Tensor], list]:
    """Hidden states in front of block 0, and per block the other arguments it is called with, per batch."""
    calls: list[list[tuple[tuple, dict]]] = [[] for _ in layer_list(model)]
    first: list[Tensor] = []
    shared = Shared(memory.keeper())

    def recorder(index):
        def forward(*args, **kwargs):
            hidden, args, kwargs = split(args, kwargs)
            if index == 0:
                first.append(hidden)
            calls[index].append(recursively_apply(shared, (args, kwargs)))
            return returned(model, hidden)
        return forward

    def inputs() -> Iterator[Tensor]:
        for batch in batches:
            decoder(model)(**_placed(model, batch), use_cache=False)
            shared.next_batch()
            yield first.pop()

    with memory.outside(model), _in_place_of(layer_list(model), recorder):
        return memory.keep(inputs()), calls


@torch.no_grad()
def logits_behind(model: nn.Module, row: dict[str, Tensor], hidden: Tensor) -> Tensor:      # [B, T, E] -> [B, T, V]
    """The logits of a batch whose last block gave `hidden`; no block runs."""
    with _behind_all(model, hidden):
        return model(**_placed(model, row), use_cache=False).logits


def decoded_behind(model: nn.Module, row: dict[str, Tensor], hidden: Tensor) -> Tensor:     # [B, T, E] -> [B, T, E]
    """What the decoder gives for a batch whose last block gave `hidden`, differentiable in it; no block runs."""
    with _behind_all(model, hidden):
        return decoder(model)(**_placed(model, row), use_cache=False)[0]


def _placed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch where the decoder is; the weights of a part that reads images may be nowhere."""
    device = decoder(model).device
    return {name: value.to(device) for name, value in batch.items()}


def _behind_all(model: nn.Module, hidden: Tensor) -> AbstractContextManager:
    """Inside, every block gives `hidden` whatever it reads."""
    return _in_place_of(layer_list(model), lambda index: lambda *args, **kwargs: returned(model, hidden))


@contextmanager
def _in_place_of(modules: nn.ModuleList, make: Callable[[int], Callable]) -> Iterator[None]:
    """Replace the forward of each module for a while; nothing of it remains afterwards."""
    try:
        for index, module in enumerate(modules):
            module.forward = make(index)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
