"""Models larger than memory: each block's weights come from disk when a step needs them, and go back when it is done.

The model is a skeleton whose weights are on the meta device, so that everything about shapes, names and config works as
ever. What a block became is a file of the work folder; the last walk over all of them is the one that writes the
checkpoint. Peak memory: one block, or one shard, and the calibration activations that fit their budget.
"""
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import naming
from llmopt.files import shards, tensors
from llmopt.files.tensors import file_of
from llmopt.model import expert_files, skeleton
from llmopt.model.blocks import decoder, layer_list, spec_of
from llmopt.model.finite import cast, check_finite
from llmopt.model.heap import give_back_freed
from llmopt.model.outside import Outside
from llmopt.model.state import as_filed, packs, plain_state
from llmopt.model.stored import beside, described, rebuilt, refuse_unportable, stored
from llmopt.model.weights import Weight, coded
from llmopt.scale.journal import Journal
from llmopt.scale.memory import Resumable

SCRATCH = ".scratch"        # files of blocks that a resumed run makes anew


class Streamed(Resumable):
    """The weights of a skeleton, one block at a time; `places` say where they are at the beginning.

    journal: its folder holds what blocks become. format: of the checkpoint to come. device: where blocks are worked
    on. room: bytes of calibration activations held in memory.
    """

    lists = 3           # of activations held at once: a block's inputs, its outputs, and the masks of all blocks

    def __init__(self, journal: Journal, places: tensors.Places, model: nn.Module, format: str, device: str,
                 room: int):
        super().__init__(journal)
        self.layers, self.rest = skeleton.by_layer(model, _without_tables(model, places))
        self.model, self.merging = model, skeleton.converters(model)
        self.work, self.format, self.room = journal.folder, format, room
        self.device = torch.device(device)

    @contextmanager
    def outside(self, model: nn.Module, edits: bool = False, head: bool = False) -> Iterator[None]:
        with self._editing_outside(Outside(model)) if edits else self._reading_outside(Outside(model), head):
            yield

    @contextmanager
    def _editing_outside(self, rest: Outside) -> Iterator[None]:
        tied = rest.tied
        self._fill(rest.model, self.rest)
        if tied:                                            # what was read is the embeddings' alone
            rest.tie()
        try:
            yield
            file = self.commit_outside(rest)
            self.rest.clear()                               # shared with the memory of all other loops
            self.rest.update(tensors.of_file(file))
        finally:
            tied = rest.tied
            for name, parameter in rest.parameters().items():
                _put(rest.model, name, _absent(parameter))
            _empty_codes(rest.coded)
            if tied:
                rest.tie()
            give_back_freed()

    def adopt_outside(self, rest: Outside, file: Path, record: dict[str, Any]) -> None:
        if not record["tied"]:
            rest.untie()
        self.rest.clear()
        self.rest.update(tensors.of_file(file))
        if record["codes"]:
            for weight, codes in rebuilt(rest.model, tensors.read(self.rest), record["codes"], {})[1]:
                weight.codes = codes
            _empty_codes(rest.coded)

    @contextmanager
    def _reading_outside(self, rest: Outside, head: bool) -> Iterator[None]:
        model, tied, inner = rest.model, rest.tied, decoder(rest.model)
        prefix = next(name for name, module in model.named_modules() if module is inner)
        before, places = ({name: it for name, it in found.items() if head or name.startswith(f"{prefix}.")}
                          for found in (rest.parameters(), self.rest))
        self._fill(model, places, described([weight for weight in rest.coded if weight.key in before]), before)
        if head and tied:
            rest.tie()
        try:
            yield
        finally:
            for name, parameter in before.items():          # the very same: the output head may be tied to it
                _put(model, name, parameter)
            if head and tied:
                rest.tie()

    @contextmanager
    def block(self, model: nn.Module, index: int) -> Iterator[None]:
        layer = layer_list(model)[index]
        place = f"{spec_of(model).layers}.{index}"
        with naming(place):
            self._fill(layer, self.layers[layer], described(coded(layer)), prefix=f"{place}.")
        try:
            yield
            if self.commits:
                with naming(place):
                    self._commit(layer, index)
        finally:
            _empty(layer)
            give_back_freed()

    def holding(self, lists: int) -> "Streamed":
        twin = copy.copy(self)
        twin.lists = lists
        return twin

    def parcels(self, batches: list) -> list[list]:
        return [batches] if batches else []             # each would bring all weights from disk twice

    def keeper(self) -> Callable[[Tensor], Tensor]:
        room = self.room // self.lists

        def held(tensor: Tensor) -> Tensor:
            nonlocal room
            fits = tensor.nbytes <= room
            room -= min(tensor.nbytes, room)
            return tensor if fits else spilled(tensor, self.work / f"{os.getpid()}-activations")

        return held

    def adopt(self, layer: nn.Module, file: Path, record: dict[str, Any]) -> None:
        self.layers[layer] = tensors.of_file(file)
        for weight, codes in rebuilt(layer, tensors.read(self.layers[layer]), record)[1]:
            weight.codes = codes
        _empty(layer)

    def _fill(self, root: nn.Module, places: tensors.Places, record: dict[str, Any] | None = None,
              like: dict[str, Tensor] | None = None, prefix: str = "") -> None:
        """Give the parameters of `root` their values, in the model's type; record, like: see model.stored.rebuilt.

        prefix: of the names in `root`, in those of the model.
        """
        fresh, read = {}, self._read(places, root, record or {}, like, prefix)
        tables = dict(root.named_buffers())
        for name, tensor in read.items():
            if name in tables:                          # of a layer that was written back: they are there already
                continue
            dtype = root.get_parameter(name).dtype
            fresh[name] = nn.Parameter(cast(tensor.to(self.device), dtype, name), requires_grad=False)
        self._check(fresh, places)
        for name, parameter in fresh.items():
            _put(root, name, parameter)

    def _read(self, places: tensors.Places, root: nn.Module, record: dict[str, Any],
              like: dict[str, Tensor] | None = None, prefix: str = "") -> dict[str, Tensor]:
        """The tensors at these places, under the names of the modules; of what `record` tells the dense weights."""
        if record:
            return rebuilt(root, tensors.read(places), record, like)[0]
        return skeleton.merged(self.merging, tensors.read(places), self.model, prefix)

    def _check(self, tensors: dict[str, Tensor], places: tensors.Places) -> None:
        """Raise LlmoptError for NaN or Inf in what was read from the model's own files."""
        files = {name: file for name, place in places.items()
                 if not (file := file_of(place)).is_relative_to(self.work)}
        for name, tensor in tensors.items() if files else ():
            check_finite({name: tensor}, str(files.get(name) or ", ".join(sorted({f.name for f in files.values()}))))

    def _commit(self, layer: nn.Module, index: int) -> None:
        """Write what the layer has become; what it was before is then of no more use."""
        if self.format != "dense":
            refuse_unportable(layer)
        tensors, record = stored(layer, release=True)
        if self.lasting:
            file = self.journal.commit(self.key(index), tensors, record)
        else:
            file = self.journal.write(self.journal.path(self.key(index)).with_suffix(SCRATCH), tensors)
        for old in set(map(file_of, self.layers[layer].values())) - {file} if self.journal.writes else ():
            if old.suffix == SCRATCH and old.is_relative_to(self.work):
                old.unlink()
        self.layers[layer] = {name: (file, name) for name in tensors}

    def groups(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """The tensors of the finished checkpoint, a layer's together, in the order of the state dict."""
        renamed = not packs(model, self.format)
        homes = _homes(model, renamed)
        outside = Outside(model).parameters()
        names = {filed: name for name in outside
                 for filed in (as_filed(model, {name: outside[name]}) if renamed else [name])}
        for group in shards.by_block(plain_state(model, renamed)):
            prefix, layer = homes.get(next(iter(group)), ("", None))
            wanted = {names[filed]: group[filed] for filed in group if group[filed].is_meta} if layer is None else None
            places = self._parts(wanted) if layer is None else self.layers[layer]
            record = described([w for w in coded(layer or model) if layer or w.key in wanted])
            read = self._read(places, layer or model, record if self.format == "dense" else {}, wanted, prefix)
            found = {prefix + name: tensor for name, tensor in read.items()}
            found = as_filed(model, found) if renamed else expert_files.filed(model, found)
            made = {name: cast(t, group[name].dtype, name) if name in group and t.itemsize > 1 else t
                    for name, t in found.items()}
            made |= {} if renamed else beside(model, made)
            self._check(made, {prefix + name: place for name, place in places.items()})
            yield made | {name: tensor for name, tensor in group.items() if not tensor.is_meta}
            give_back_freed()

    def _parts(self, names: Iterable[str]) -> tensors.Places:
        """The places of these parameters outside the blocks, or of what their codes lie in."""
        return {key: place for key, place in self.rest.items()
                if any(key == name or key.startswith(f"{name}_") for name in names)}


def _homes(model: nn.Module, renamed: bool) -> dict[str, tuple[str, nn.Module]]:
    """By the name of each tensor of a layer in the checkpoint: the prefix of its names in the model, and the layer."""
    found = {}
    for index, layer in enumerate(layer_list(model)):
        prefix = f"{spec_of(model).layers}.{index}."
        own = {prefix + name: tensor for name, tensor in layer.state_dict().items()}
        found |= dict.fromkeys(as_filed(model, own) if renamed else own, (prefix, layer))
    return found


def _without_tables(model: nn.Module, places: tensors.Places) -> tensors.Places:
    """The places of the parameters; buffers that lie in files, small tables, are read now and stay in the model."""
    tables = {name: buffer for name, buffer in model.named_buffers() if name in places}
    for name, tensor in tensors.read({name: places[name] for name in tables}).items():
        tables[name].copy_(tensor)
    return {name: place for name, place in places.items() if name not in tables}


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._parameters[leaf] = parameter


def _absent(parameter: nn.Parameter) -> nn.Parameter:
    """Shape and type of a parameter without its values."""
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _empty(layer: nn.Module) -> None:
    """Move a layer's weights and codes to the meta device; shapes, types and figures stay."""
    for name, parameter in list(layer.named_parameters()):
        _put(layer, name, _absent(parameter))
    _empty_codes(coded(layer))


def _empty_codes(weights: list[Weight]) -> None:
    for weight in weights:
        codes = weight.codes
        weight.codes = replace(codes, **{
            part: None if tensor is None else tensor.to("meta") for part, tensor in
            (("codes", codes.codes), ("scales", codes.scales), ("zeros", codes.zeros), ("groups", codes.groups))})


def spilled(tensor: Tensor, file: Path) -> Tensor:
    """Move a tensor's values into a mapped file without a name, which is gone when the tensor is."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, tensor.numel() * tensor.element_size())      # or the disk is full
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    file.unlink()
    return mapped.copy_(tensor)
