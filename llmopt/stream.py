"""Models larger than memory: each block's weights come from disk when a step needs them, and go back when it is done.

The model is a skeleton whose weights are on the meta device, so that everything about shapes, names and config works as
ever. What a block became is a file of the work folder; the last walk over all of them is the one that writes the
checkpoint. Peak memory: one block, or one shard, and the calibration activations that fit their budget.
"""
import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmopt import checkpoint, shards, store
from llmopt.blocks import layer_list, spec_of
from llmopt.checkpoint import packed_in_place, plain_state
from llmopt.gauge import give_back_freed
from llmopt.loading import check_finite
from llmopt.method import Memory, naming
from llmopt.quant.base import quantized_modules
from llmopt.quant.export import check_consistent, export


class Stream(Memory):
    """The weights of a skeleton, one block at a time; `places` say where they are at the beginning.

    work: a folder for what blocks become. room: bytes of calibration activations held in memory.
    """

    def __init__(self, places: store.Places, model: nn.Module, work: Path, format: str, room: int):
        self.layers, self.rest = store.by_layer(model, places)
        self.work, self.format, self.room = work, format, room
        self.device = next(model.buffers(), torch.empty(0)).device
        self.step, self.commits = 0, True

    def begin(self, step: int) -> None:
        self.step = step

    @property
    def reading(self) -> "Stream":
        twin = copy.copy(self)              # shares the places
        twin.commits = False
        return twin

    @contextmanager
    def outside(self, model: nn.Module) -> Iterator[None]:
        decoder = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        places = {name: place for name, place in self.rest.items() if name.startswith(f"{prefix}.")}
        before = {name: model.get_parameter(name) for name in places}
        self._fill(model, places)
        try:
            yield
        finally:
            for name, parameter in before.items():          # the very same: the output head may be tied to it
                _put(model, name, parameter)

    @contextmanager
    def block(self, model: nn.Module, index: int) -> Iterator[None]:
        layer = layer_list(model)[index]
        with naming(f"{spec_of(model).layers}.{index}"):
            self._fill(layer, self.layers[layer])
        try:
            yield
            if self.commits:
                with naming(f"{spec_of(model).layers}.{index}"):
                    self._commit(layer, index)
        finally:
            _empty(layer)
            give_back_freed()

    def keep(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        kept, room = [], self.room // 2             # a block's inputs and its outputs are held at once
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            kept.append(tensor if size <= room else spilled(tensor, self.work / "activations"))
            room -= min(size, room)
        return kept

    def _fill(self, root: nn.Module, places: store.Places) -> None:
        """Give the parameters of `root` their values, in the model's type."""
        fresh = {}
        for name, tensor in store.read(places).items():
            like = root.get_parameter(name)
            fresh[name] = nn.Parameter(tensor.to(self.device, like.dtype), requires_grad=False)
        self._check(fresh, places)
        for name, parameter in fresh.items():
            _put(root, name, parameter)

    def _check(self, tensors: dict[str, Tensor], places: store.Places) -> None:
        """Raise LlmoptError for NaN or Inf in what was read from the model's own files."""
        for name, (file, _) in places.items():
            if not file.is_relative_to(self.work):
                check_finite({name: tensors[name]}, str(file))

    def _commit(self, layer: nn.Module, index: int) -> None:
        """Write what the layer has become; what it was before is then of no more use."""
        tensors = layer.state_dict()
        check_consistent(layer)
        if self.format != "dense" and quantized_modules(layer):
            tensors = packed_in_place(tensors, export(layer)[0])
        file = self.work / f"step-{self.step}" / f"{index:05d}"
        file.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.full_disks():
            shards.save(tensors, beside := file.with_suffix(".partial"))
        os.replace(beside, file)            # tensors of an older file of this name stay mapped
        for old in {home for home, _ in self.layers[layer].values()} - {file}:
            if old.is_relative_to(self.work):
                old.unlink()
        self.layers[layer] = {name: (file, name) for name in tensors}

    def groups(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """The tensors of the finished checkpoint, a layer's together, in the order of the state dict."""
        homes = {f"{spec_of(model).layers}.{i}.": self.layers[layer] for i, layer in enumerate(layer_list(model))}
        for group in shards.by_block(plain_state(model)):
            first = next(iter(group))
            prefix = next((prefix for prefix in homes if first.startswith(prefix)), "")
            places = homes.get(prefix) or {name: self.rest[name] for name in group if group[name].is_meta}
            found = {prefix + name: tensor for name, tensor in store.read(places).items()}
            cast = {name: t.to(group[name].dtype) if name in group else t for name, t in found.items()}
            self._check(cast, {prefix + name: place for name, place in places.items()})
            yield cast | {name: tensor for name, tensor in group.items() if not tensor.is_meta}
            give_back_freed()


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._parameters[leaf] = parameter


def _empty(layer: nn.Module) -> None:
    """Move a layer's weights and codes to the meta device; shapes, types and figures stay."""
    for name, parameter in list(layer.named_parameters()):
        _put(layer, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    for module, codes in quantized_modules(layer).values():
        module.llmopt_quantized = replace(codes, **{
            part: None if tensor is None else tensor.to("meta") for part, tensor in
            (("codes", codes.codes), ("scales", codes.scales), ("zeros", codes.zeros), ("groups", codes.groups))})


def spilled(tensor: Tensor, file: Path) -> Tensor:
    """The same values in a mapped file that has no name any more, so that it is gone when the tensor is."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, tensor.numel() * tensor.element_size())      # or the disk is full
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    file.unlink()
    return mapped.copy_(tensor)
