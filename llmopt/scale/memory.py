"""Where the weights are while steps run, and how finished blocks reach the journal."""
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmopt.errors import naming
from llmopt.model.blocks import layer_list, spec_of
from llmopt.model.stored import rebuilt, stored
from llmopt.scale.gauge import give_back_freed
from llmopt.scale.journal import Journal


class Memory:
    """Where the weights are while steps run: all in memory. `Streamed` brings in one block at a time instead."""

    def begin(self, step: int) -> None:
        """The step that is about to run."""

    @property
    def reading(self) -> "Memory":
        """The same for a loop that changes no weight: what a block became is not kept."""
        return self

    def editing(self, again: bool = False) -> "Memory":
        """The same for one loop that changes blocks; again: so cheap that a resumed run does it again."""
        return self

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` gives, plain JSON data; computed once, even if the run is cut off and resumed."""
        return compute()

    def restored(self, model, index: int) -> bool:
        """Whether a run that was cut off had done this loop's work on a block, which is then in place."""
        return False

    @contextmanager
    def outside(self, model) -> Iterator[None]:
        """Inside, the weights of the decoder that belong to no block can be used."""
        yield

    @contextmanager
    def block(self, model, index: int) -> Iterator[None]:
        """Inside, the weights of one block can be used and changed."""
        yield

    def keeper(self) -> Callable[[Tensor], Tensor]:
        """What turns tensors into the same ones, to be held until the caller drops them; it has a room of its own."""
        return lambda tensor: tensor

    def keep(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors, held until the list is dropped."""
        return [*map(self.keeper(), tensors)]


class Resumable(Memory):
    """The memory of a run that can be resumed; llmopt.scale.stream has its like for models larger than memory."""

    commits, lasting = False, True

    def __init__(self, journal: Journal):
        self.journal = journal
        self.step = self.sweep = 0

    def begin(self, step: int) -> None:
        self.step, self.sweep = step, 0

    @property
    def reading(self) -> "Resumable":
        twin = copy.copy(self)              # shares the journal
        twin.commits = False
        return twin

    def editing(self, again: bool = False) -> "Resumable":
        self.sweep += 1
        twin = copy.copy(self)
        twin.commits, twin.lasting = True, not again
        return twin

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.journal.remember(self.step, name, compute)

    def restored(self, model: nn.Module, index: int) -> bool:
        found = self.journal.found(self.key(index)) if self.commits and self.lasting else None
        if found:
            with naming(f"{spec_of(model).layers}.{index}"):
                self.adopt(layer_list(model)[index], *found)
        return found is not None

    @contextmanager
    def block(self, model: nn.Module, index: int) -> Iterator[None]:
        yield
        if self.commits and self.lasting:
            with naming(f"{spec_of(model).layers}.{index}"):
                self.journal.commit(self.key(index), *stored(layer_list(model)[index]))
        give_back_freed()

    def key(self, index: int) -> tuple[int, int, int]:
        """The name that this loop's work on a block has in the journal."""
        return self.step, self.sweep, index

    @torch.no_grad()
    def adopt(self, layer: nn.Module, file: Path, record: dict[str, Any]) -> None:
        """Bring a layer into the state that a finished block was stored in."""
        device = next(layer.parameters()).device
        values, results = rebuilt(layer, load_file(file, str(device)), record)
        for name, tensor in layer.state_dict(keep_vars=True).items():
            tensor.data.copy_(values[name])
        for weight, codes in results:
            weight.codes = codes
