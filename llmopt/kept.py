"""All weights in memory, and what every loop makes of a block also in the journal."""
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from llmopt.blocks import layer_list, spec_of
from llmopt.gauge import give_back_freed
from llmopt.journal import Journal
from llmopt.method import Memory, naming
from llmopt.quant.export import rebuilt, stored


class Kept(Memory):
    """The memory of a run that can be resumed; llmopt.stream has its like for models larger than memory."""

    commits, lasting = False, True

    def __init__(self, journal: Journal):
        self.journal = journal
        self.step = self.sweep = 0

    def begin(self, step: int) -> None:
        self.step, self.sweep = step, 0

    @property
    def reading(self) -> "Kept":
        twin = copy.copy(self)              # shares the journal
        twin.commits = False
        return twin

    def editing(self, again: bool = False) -> "Kept":
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
        for name, result in results.items():
            layer.get_submodule(name).llmopt_quantized = result
