"""Models larger than memory: each block's weights come from disk when a step needs them, and go back when it is done.

The model is a skeleton whose weights are on the meta device, so that everything about shapes, names and config works as
ever. What a block became is a file of the work folder; the last walk over all of them is the one that writes the
checkpoint. Peak memory: one block, or one shard, and the calibration activations that fit their budget.
"""
import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from llmopt import checkpoint, shards, store
from llmopt.blocks import layer_list, replace_layers, spec_of
from llmopt.checkpoint import VerificationError, packed_in_place, plain_state
from llmopt.folder import check_folder
from llmopt.hub import fetch
from llmopt.loading import check_finite, fitting_tokenizer, resolve
from llmopt.method import LlmoptError, Memory, naming
from llmopt.prune.shapes import slice_config
from llmopt.quant.base import quantized_modules
from llmopt.quant.export import check_consistent, export
from llmopt.recipe import Recipe


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


class StreamedWeights(checkpoint.Weights):
    """A streamed model's weights for `checkpoint.save`: written block by block, and read back block by block."""

    def __init__(self, model: nn.Module, memory: Stream):
        super().__init__(model, memory.format)
        self.memory = memory

    def write(self, stage: Path, max_shard_size: str) -> None:
        with checkpoint.full_disks():
            writer = shards.Writer(stage, max_shard_size)
            for group in self.memory.groups(self.model):
                writer.add(group)
            writer.close()

    @torch.no_grad()
    def verify(self, stage: Path) -> None:
        """Raise VerificationError unless every tensor reads back as it was written and has the config's shape."""
        written, expected = store.places(stage), set()
        for group in self.memory.groups(self.model):
            if absent := group.keys() - written.keys():
                raise VerificationError(f"{stage.name}: {min(absent)} was not written")
            back = store.read({name: written[name] for name in group})
            for name, tensor in group.items():
                if not torch.equal(back[name], tensor.cpu()) or not bool(tensor.isfinite().all()):
                    raise VerificationError(f"{stage.name}: {name} does not read back as it was written")
            expected |= group.keys()
        if foreign := written.keys() - expected:
            raise VerificationError(f"{stage.name}: {min(foreign)} belongs to no part of the model")
        _verify_shapes(stage, written)


def _verify_shapes(stage: Path, written: store.Places) -> None:
    """Raise VerificationError unless the written config makes a model of the written shapes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(stage)
    for name, like in plain_state(store.skeleton(config, config.dtype)).items():
        told = f"{name.removesuffix('weight')}weight_shape"
        if name not in written and told not in written:
            raise VerificationError(f"{stage.name}: the config wants {name}, which was not written")
        known = store.read({"it": written.get(name) or written[told]})["it"]
        shape = list(known.shape) if name in written else known.tolist()
        if shape != list(like.shape):
            raise VerificationError(f"{stage.name}: {name} is {shape}, the config wants {list(like.shape)}")


@dataclass(frozen=True)
class Streaming:
    """Whether and how a run is streamed. force None: if the dense model would not fit into the available memory.

    activations: bytes of calibration activations held in memory. blocks: only so many blocks, to measure; what is
    written then is no model.
    """

    force: bool | None = None
    activations: int = 2 << 30
    blocks: int | None = None

    def wanted(self, recipe: Recipe) -> bool:
        """Whether this recipe is to be streamed."""
        source = Path(resolve(recipe.model.id))
        if self.force is not None or self.blocks is not None:
            return self.force is not False
        fits = recipe.model.device != "cpu" or not source.is_dir()
        return not fits and _dense_bytes(source, recipe) > available()


def available() -> int:
    """Bytes of memory that this process may still take: the machine's, or its control group's."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _dense_bytes(folder: Path, recipe: Recipe) -> int:
    check_folder(folder)
    return store.dense_bytes(folder, recipe.model.dtype)


def open_streamed(recipe: Recipe, work: Path, streaming: Streaming) -> tuple[nn.Module, Any, Stream]:
    """(skeleton, tokenizer, memory) of a recipe's model; `work` is written to by steps that change or walk blocks."""
    source = resolve(recipe.model.id)
    local = source if Path(source).is_dir() else str(fetch(source, recipe.model.revision))
    refuse_whole(recipe, _dense_bytes(Path(local), recipe))
    model, places = store.open_model(replace(recipe.model, id=local))
    memory = Stream(places, model, work, recipe.format, streaming.activations)
    if streaming.blocks:
        _cut_short(model, streaming.blocks)
    return model, fitting_tokenizer(model, local, recipe.model), memory


@contextmanager
def working(work: Path) -> Iterator[None]:
    """The work folder, for as long as a run needs it; one that is there already is another run's."""
    try:
        work.mkdir(parents=True)
    except FileExistsError as error:
        raise LlmoptError(f"{work}: left by a run that was cut off, or in use by another; remove it") from error
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cut_short(model: nn.Module, count: int) -> None:
    """Leave the first `count` blocks."""
    kept = list(layer_list(model))[:count]
    replace_layers(model, kept)
    slice_config(model, list(range(len(kept))))


def save_partial(weights: StreamedWeights, output: Path, max_shard_size: str) -> None:
    """Write the weights of a model that was cut short; without a config, nothing loads them."""
    with checkpoint.staged(output) as stage:
        weights.write(stage, max_shard_size)
        shards.write_text(stage / "PARTIAL", "The first blocks of a model, written to measure memory and time.\n")


def refuse_whole(recipe: Recipe, size: int) -> None:
    """Raise LlmoptError for a step that works on the whole model; size: bytes of the dense weights."""
    for i, step in enumerate(recipe.steps):
        if step.needs_whole:
            raise LlmoptError(f"steps.{i} {step.name}: works on the whole model and cannot be streamed; that takes "
                              f"{size / 1e9:.1f} GB for the weights alone, {available() / 1e9:.1f} GB are available")
