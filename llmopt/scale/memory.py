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
from llmopt.model import unfinished
from llmopt.model.blocks import layer_list, spec_of
from llmopt.model.heap import give_back_freed
from llmopt.model.outside import Outside
from llmopt.model.stored import as_codes, rebuilt, stored
from llmopt.scale.journal import Journal, Key

OUTSIDE = "outside"         # where a block has its index: all that belongs to no block
KEPT = "kept"               # where a loop over the blocks has its number: what `keep_named` keeps


class Memory:
    """All weights in memory while steps run. `Streamed` brings in one block at a time instead."""

    edits = False               # True in the memory of a loop that edits blocks

    def begin(self, step: int) -> None:
        """The step that is about to run."""

    @property
    def reading(self) -> "Memory":
        """This memory, read-only, for a loop that changes no weight: blocks are not written back."""
        return Memory()

    def editing(self, again: bool = False) -> "Memory":
        """This memory for one loop that edits blocks; each is committed. again: none is, a resumed run repeats it."""
        twin = copy.copy(self)
        twin.edits = True
        return twin

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `compute`, plain JSON data; computed once, even if the run is cut off and resumed."""
        return compute()

    def keep_named(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `make` gives; made once in a step, even if the run is cut off and resumed."""
        return make()

    def latest(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep_latest` was last given under this name, even by a run that was cut off."""
        return None

    def keep_latest(self, name: str, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Keep the state of long work, tensors and plain JSON data, in the place of the one before."""

    def finished(self, place: int | str) -> bool:
        """True if a run that was cut off had done this loop's work on a block; `restored` will put it in place."""
        return False

    def restored(self, model, place: int | str) -> bool:
        """True if a run that was cut off had done this loop's work on a block, or OUTSIDE; it is then in place."""
        return False

    def holding(self, lists: int) -> "Memory":
        """This memory for a loop that holds so many lists of activations at once."""
        return self

    def parcels(self, batches: list) -> list[list]:
        """The batches as a loop takes them that goes through all blocks there and back: one by one, as weights wait."""
        return [[batch] for batch in batches]

    @contextmanager
    def outside(self, model, edits: bool = False, head: bool = False) -> Iterator[None]:
        """Inside, the weights of the decoder that belong to no block can be used; head, edits: those of the head too.

        With edits they can be changed, a tied head given a weight of its own, and what they became is kept like a
        block. See llmopt.model.outside.Outside.
        """
        if edits:
            unfinished.begin(model)
        yield

    @contextmanager
    def block(self, model, index: int) -> Iterator[None]:
        """Inside, the weights of one block can be used and changed."""
        if self.edits:
            unfinished.begin(model)
        yield

    def keeper(self) -> Callable[[Tensor], Tensor]:
        """A function that stores activations: an equal tensor, in memory up to a budget, else mapped from a file."""
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

    def keep_named(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = self.step, KEPT, name
        found = self.journal.found(key)
        return load_file(found[0] if found else self.journal.commit(key, make(), {}))

    def latest(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = [kept for half in (0, 1) if (kept := self.journal.found((self.step, KEPT, f"{name}.{half}")))]
        if not found:
            return None
        file, record = max(found, key=lambda kept: kept[1]["number"])
        return load_file(file), record["told"]

    def keep_latest(self, name: str, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Two files in turn: a crash while one is written leaves the other."""
        entries = [self.journal.entries.get(f"{self.step}.{KEPT}.{name}.{half}") for half in (0, 1)]
        number = 1 + max((entry["record"]["number"] for entry in entries if entry), default=-1)
        self.journal.commit((self.step, KEPT, f"{name}.{number % 2}"), tensors, {"number": number, "told": told})

    def finished(self, place: int | str) -> bool:
        return self.commits and self.lasting and self.journal.found(self.key(place)) is not None

    def restored(self, model: nn.Module, place: int | str) -> bool:
        found = self.journal.found(self.key(place)) if self.commits and self.lasting else None
        if found and place == OUTSIDE:
            self.adopt_outside(Outside(model), *found)
        elif found:
            with naming(f"{spec_of(model).layers}.{place}"):
                self.adopt(layer_list(model)[place], *found)
        return found is not None

    @contextmanager
    def outside(self, model: nn.Module, edits: bool = False, head: bool = False) -> Iterator[None]:
        yield
        if edits:
            self.commit_outside(Outside(model))

    def commit_outside(self, rest: Outside) -> Path:
        """Enter into the journal what the parts outside the blocks have become; the file that holds them."""
        tensors, codes = as_codes(rest.parameters(), rest.coded)
        return self.journal.commit(self.key(OUTSIDE), tensors, {"tied": rest.tied, "codes": codes})

    @torch.no_grad()
    def adopt_outside(self, rest: Outside, file: Path, record: dict[str, Any]) -> None:
        """Bring what belongs to no block into the state that it was stored in."""
        if not record["tied"]:
            rest.untie()
        found, own = load_file(file, str(rest.embeddings.weight.device)), rest.parameters()
        values, results = rebuilt(rest.model, found, record["codes"], own)
        for name, parameter in own.items():
            parameter.copy_(values[name])
        for weight, codes in results:
            weight.codes = codes

    @contextmanager
    def block(self, model: nn.Module, index: int) -> Iterator[None]:
        yield
        if self.commits and self.lasting:
            with naming(f"{spec_of(model).layers}.{index}"):
                self.journal.commit(self.key(index), *stored(layer_list(model)[index]))
        give_back_freed()

    def key(self, place: int | str) -> Key:
        """The name that this loop's work on a block, or OUTSIDE, has in the journal."""
        return self.step, self.sweep, place

    @torch.no_grad()
    def adopt(self, layer: nn.Module, file: Path, record: dict[str, Any]) -> None:
        """Bring a layer into the state that a finished block was stored in."""
        device = next(layer.parameters()).device
        values, results = rebuilt(layer, load_file(file, str(device)), record)
        for name, tensor in layer.state_dict(keep_vars=True).items():
            tensor.data.copy_(values[name])
        for weight, codes in results:
            weight.codes = codes
