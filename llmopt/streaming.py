"""A streamed run from the outside: whether there is to be one, its work folder, and the checkpoint that it writes."""
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmopt import checkpoint, shards, store
from llmopt.available import available
from llmopt.blocks import layer_list, replace_layers
from llmopt.checkpoint import plain_state
from llmopt.data import DEFAULT_LENGTH
from llmopt.finite import all_finite
from llmopt.folder import check_folder
from llmopt.hub import fetch
from llmopt.journal import Journal
from llmopt.kept import Kept
from llmopt.loading import fitting_tokenizer, load_dense, resolve
from llmopt.method import LlmoptError
from llmopt.prune.shapes import slice_config
from llmopt.recipe import Recipe
from llmopt.stream import Stream
from llmopt.verify import VerificationError


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
        if self.force is not None or self.blocks:
            return bool(self.force or self.blocks)
        fits = recipe.model.device != "cpu" or not source.is_dir()
        return not fits and _dense_bytes(source, recipe) > available()


def _dense_bytes(folder: Path, recipe: Recipe) -> int:
    check_folder(folder)
    return store.dense_bytes(folder, recipe.model.dtype)


def open_streamed(recipe: Recipe, journal: Journal, streaming: Streaming) -> tuple[nn.Module, Any, Stream]:
    """(skeleton, tokenizer, memory) of a recipe's model; `journal` is written to by steps that change blocks.

    The room for activations is shared by the processes.
    """
    source = resolve(recipe.model.id)
    local = source if Path(source).is_dir() else str(fetch(source, recipe.model.revision))
    model, places = store.open_model(replace(recipe.model, id=local))
    refuse_whole(recipe, model, "and cannot be streamed", room=0)
    memory = Stream(journal, places, model, recipe, streaming.activations // journal.ranks.size)
    if streaming.blocks:
        cut_short(model, streaming.blocks)
    return model, fitting_tokenizer(model, local, recipe.model), memory


def cut_short(model: nn.Module, count: int) -> None:
    """Leave the first `count` blocks."""
    kept = list(layer_list(model))[:count]
    replace_layers(model, kept)
    slice_config(model, list(range(len(kept))))


def refuse_whole(recipe: Recipe, model: nn.Module, why: str, room: int) -> None:
    """Raise LlmoptError for a step that works on the whole model and takes more than `room` bytes."""
    data, size = recipe.data, shards.tensor_bytes(dict(model.named_parameters()))
    tokens = min(data.batch_size, data.samples) * (data.length or DEFAULT_LENGTH)
    for i, step in enumerate(recipe.steps):
        needed = size + step.whole_bytes(model, tokens)
        if step.needs_whole and needed > room:
            raise LlmoptError(f"steps.{i} {step.name}: works on the whole model {why}; that takes at least "
                              f"{needed / 1e9:.1f} GB ({size / 1e9:.1f} GB of weights), {available() / 1e9:.1f} GB "
                              "are available")


def open_model(recipe: Recipe, journal: Journal, streaming: Streaming) -> tuple[nn.Module, Any, Kept]:
    """(model, tokenizer, memory) of a recipe, streamed or as a whole; `journal` is written to by steps alone."""
    if journal.ranks.agree(streaming.wanted(recipe)):
        return open_streamed(recipe, journal, streaming)
    return *open_whole(recipe, streaming), Kept(journal)


def open_whole(recipe: Recipe, streaming: Streaming) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a recipe whose model is loaded as a whole; --no-stream insists on trying."""
    insisted = streaming.force is False or recipe.model.device != "cpu"
    room = sys.maxsize if insisted else available()      # before the weights are there
    model, tokenizer = load_dense(recipe.model)
    refuse_whole(recipe, model, "at once", room)
    return model, tokenizer


class StreamedWeights(checkpoint.Weights):
    """A streamed model's weights for `checkpoint.save`: written block by block, and read back block by block."""

    def __init__(self, model: nn.Module, memory: Stream):
        super().__init__(model, memory.format)
        self.memory = memory

    def write(self, stage: Path, max_shard_size: str) -> None:
        with shards.full_disks():
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
                if not torch.equal(back[name], tensor.cpu()) or not all_finite(tensor):
                    raise VerificationError(f"{stage.name}: {name} does not read back as it was written")
            expected |= group.keys()
        if foreign := written.keys() - expected:
            raise VerificationError(f"{stage.name}: {min(foreign)} belongs to no part of the model")
        _verify_shapes(stage, written, self.model)


def _verify_shapes(stage: Path, written: store.Places, model: nn.Module) -> None:
    """Raise VerificationError unless the written config makes a model of the written shapes; `model` has the names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(stage)
    fresh = store.skeleton(config, config.dtype)
    fresh._weight_conversions = model._weight_conversions
    for name, like in plain_state(fresh, renamed="quantization_config" not in config.to_dict()).items():
        told = f"{name.removesuffix('weight')}weight_shape"
        if name not in written and told not in written:
            raise VerificationError(f"{stage.name}: the config wants {name}, which was not written")
        known = store.read({"it": written.get(name) or written[told]})["it"]
        shape = list(known.shape) if name in written else known.tolist()
        if shape != list(like.shape):
            raise VerificationError(f"{stage.name}: {name} is {shape}, the config wants {list(like.shape)}")


def save_partial(weights: StreamedWeights, output: Path, max_shard_size: str,
                 finish: Callable[[Path], None]) -> None:
    """Write the weights of a model that was cut short; without a config, nothing loads them."""
    with checkpoint.staged(output, weights.memory.work) as stage:
        weights.write(stage, max_shard_size)
        shards.write_text(stage / "PARTIAL", "The first blocks of a model, written to measure memory and time.\n")
        finish(stage)
