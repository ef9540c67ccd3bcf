"""Log-probabilities of chosen tokens alone: hidden states first, then the head on those that are scored, in pieces.

A forward of transformers makes logits of every position, 10 GB for 4,000 tokens of a vocabulary of 262,144 together
with their log-softmax. Here a hook keeps what goes into the head and lets one position pass; the head is then run on
the scored positions, CHUNK bytes at a time, through the model's own forward with the hidden states standing in for its
decoder, so that what comes behind a head (Gemma's soft cap, Cohere's scale) is the model's own too. Models whose head
is no module that forward calls are read the plain way.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK = 64 << 20        # bytes of logits, their float32 copy and log-softmax at a time


class Readout:
    """The states [B, T, C] of a causal language model before its head, and log-probabilities read from them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        self.model, self.dtype = model, dtype
        self.head, self.decoder = model.get_output_embeddings(), model.get_decoder()
        self.output: type = BaseModelOutputWithPast         # what the decoder returns
        self.plain = self.head is None or self.decoder is None or self.decoder is model

    def states(self, ids: Tensor, **inputs) -> tuple[Tensor, Any]:
        """(states [B, T, C] of the tokens ids [B, T], the model's output with the logits of one position)."""
        seen: list[Tensor] = []
        handles = [] if self.plain else [self.head.register_forward_pre_hook(lambda _, args: _narrowed(seen, args)),
                                         self.decoder.register_forward_hook(self._note)]
        try:
            output = self.model(ids, **inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.plain = not seen
        return (output.logits if self.plain else seen[0]), output

    def _note(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        self.output = type(output)

    def read(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability of each target, whether it is the most likely token) after the states [N, C]."""
        found = []
        for table, wanted in zip(self.tables(states), targets.split(self.rows()), strict=True):
            found.append((table.gather(1, wanted[:, None])[:, 0].float(), table.argmax(-1) == wanted))
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    def tables(self, states: Tensor) -> Iterator[Tensor]:
        """Log-probabilities [n, vocabulary] of all tokens after the states [N, C], `rows()` positions at a time."""
        for rows in states.split(self.rows()):
            yield log_softmax(self._logits(rows), -1, dtype=self.dtype)

    def rows(self) -> int:
        """The number of positions that the head is run on at a time."""
        return max(1, CHUNK // (self.vocabulary() * (self.model.dtype.itemsize + 2 * self.dtype.itemsize)))

    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def _logits(self, states: Tensor) -> Tensor:
        if self.plain:
            return states
        given = _Given(self.output(last_hidden_state=states[None]), self.decoder)
        with _in_place_of(self.decoder, self.model, given):
            return self.model(torch.zeros(1, len(states), dtype=torch.long, device=states.device)).logits[0]


def _narrowed(seen: list[Tensor], args: tuple) -> tuple:
    seen.append(args[0])
    return args[0][:, -1:], *args[1:]


class _Given(nn.Module):
    """Stands where a decoder stood: returns the same output to every call, and is asked for what that one has."""

    def __init__(self, output: Any, decoder: nn.Module):
        super().__init__()
        self.__dict__.update(output=output, decoder=decoder)        # which is no part of it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args, **kwargs) -> Any:
        return self.output


@contextmanager
def _in_place_of(module: nn.Module, model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Inside, `other` stands where `module` stands in `model`."""
    parents = [(parent, name) for parent in model.modules() for name, child in parent._modules.items()
               if child is module]
    try:
        for parent, name in parents:
            parent._modules[name] = other
        yield
    finally:
        for parent, name in parents:
            parent._modules[name] = module
