"""How much memory a run will take, from shapes: the parts that its steps tell, added up from loading to verification.

In memory, weights are mapped from their files and become private where a step rewrites them; what steps keep beside
them stays until the checkpoint is written. Streamed, all of that lasts for one block. FLOOR is what no shape tells: the
libraries' own caches, modules that are imported late, and what freed copies below 2 MB leave behind.
"""
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from llmopt.checkpoint.verify import probe_length
from llmopt.files import shards
from llmopt.model.blocks import blocks, layer_list
from llmopt.model.state import tied_names
from llmopt.model.usable import CHECKED
from llmopt.scale import activations
from llmopt.scale.room import Room, Scene

FLOOR = 20 * 10**6


def _most(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)


class Peak(NamedTuple):
    """The most that one part of a run takes, in bytes above what the imports took; see gauge.Taken."""

    part: str
    private: int
    mapped: int


class Forecast:
    """The peaks of a run on `model`, a skeleton that is cut as the run will cut it, after each call of `step`."""

    def __init__(self, model: nn.Module, scene: Scene):
        self.model, self.scene = model, scene
        self.peaks: list[Peak] = []
        self.stays = 0                              # codes and the like, in memory
        self.owned = {id(module) for name, module in model.named_modules()      # whose weights are private
                      if any(f"{name}.{leaf}" in scene.converted for leaf in module._parameters)}
        self._note("load", 0, 0)

    def step(self, name: str, rooms: list[Room]) -> None:
        """The part of one step, which told these rooms of the model that it found; now the model is as it left it."""
        rewritten = {id(module) for room in rooms for module in room.rewritten}
        held = activations.kept(self.model, self.scene, _most(room.sets for room in rooms))
        passes, whole = _most(room.passes for room in rooms), _most(room.whole for room in rooms)
        if self.scene.streamed:
            block = _most(self._private(layer, rewritten) for layer in layer_list(self.model))
            edited = block + _most(room.stays for room in rooms) + passes
            self._note(name, held + max(edited, whole), self._largest())
            if rewritten:                           # blocks now come from the work folder, as they are
                self.owned -= {id(module) for layer in layer_list(self.model) for module in layer.modules()}
            return
        if whole:
            self._note(name, held + whole, 0)
        self.owned |= rewritten
        stays = sum(room.stays for room in rooms)
        self._note(name, held + passes + stays, 0)
        self.stays += stays

    def check(self) -> None:
        """The forward over a few tokens that tells whether the model computes numbers."""
        if not self.scene.streamed:
            self._note("check", self._forward(1, CHECKED) + activations.logits(self.model, CHECKED, 0), 0)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Writing a checkpoint of these tensors, and verifying it."""
        if self.scene.streamed:
            size, shard = shards.tensor_bytes(tensors), self.scene.shard
            private = min(self._private(self.model), shard)
            self._note("save", private, min(size, shard) + self._largest() - private)
            self._note("verify", 0, 2 * self._largest())
            return
        own, tied = dict(self.model.named_parameters()), tied_names(self.model)
        made = {name: tensor for name, tensor in tensors.items() if name not in own}
        inflated = {name: tensor for name, tensor in own.items() if name not in tensors and name not in tied}
        length = probe_length(self.model)
        answers = self._forward(2, length) + activations.logits(self.model, 2 * length, 4)
        self._note("save", shards.tensor_bytes(made), 0)
        self._note("verify", shards.tensor_bytes(inflated) + answers, shards.tensor_bytes(tensors))

    def _forward(self, rows: int, length: int) -> int:
        return _most(activations.forward(self.model, view, rows, length) for view in blocks(self.model))

    def _largest(self) -> int:
        """Bytes of the largest thing that is read at once: a block, or the embedding."""
        rest = [t for module in self.model.modules() if isinstance(module, nn.Embedding) for t in module.parameters()]
        layers = [list(layer.parameters()) for layer in layer_list(self.model)]
        return max(shards.tensor_bytes(dict(enumerate(group))) for group in [*layers, rest])

    def _private(self, root: nn.Module, more: set[int] = frozenset()) -> int:
        """Bytes of the weights below `root` that are not mapped from a file."""
        found = {id(p): p for module in root.modules() if id(module) in self.owned | more
                 for p in module._parameters.values() if p is not None}
        return shards.tensor_bytes(found)

    def _note(self, part: str, private: int, mapped: int) -> None:
        """A peak: in memory, on top of the model."""
        if not self.scene.streamed:
            own = self._private(self.model)
            mapped += shards.tensor_bytes(dict(self.model.named_parameters())) - own
            private += own + self.stays
        self.peaks.append(Peak(part, FLOOR + private, mapped))
