"""A streamed run from the outside: whether there is to be one, its work folder, and the checkpoint that it writes."""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from llmopt.calibration.data import DEFAULT_LENGTH
from llmopt.errors import LlmoptError
from llmopt.files import shards, tensors
from llmopt.files.checks import check_folder
from llmopt.files.hub import fetch
from llmopt.forecast.memory import whole_bytes
from llmopt.model import skeleton
from llmopt.model.blocks import layer_list, replace_layers
from llmopt.model.computing import choose
from llmopt.model.loading import fitting_tokenizer, load_dense, resolve
from llmopt.model.shapes import slice_config
from llmopt.recipe.reader import Recipe
from llmopt.scale.available import available
from llmopt.scale.journal import Journal
from llmopt.scale.memory import Resumable
from llmopt.scale.stream import Streamed
from llmopt.specs import ModelSpec


@dataclass(frozen=True)
class Streaming:
    """The options of streaming. force None: stream if the dense model would not fit into the available memory.

    activations: bytes of calibration activations held in memory. blocks: only so many blocks, to measure; what is
    written then is no model.
    """

    force: bool | None = None
    activations: int = 2 << 30
    blocks: int | None = None

    def wanted(self, model: ModelSpec) -> bool:
        """True if a run on this model is to be streamed."""
        source = Path(resolve(model.id))
        if self.force is not None or self.blocks:
            return bool(self.force or self.blocks)
        fits = model.device != "cpu" or not source.is_dir()
        return not fits and _dense_bytes(source, model.dtype) > available()


def _dense_bytes(folder: Path, dtype: str | None) -> int:
    check_folder(folder)
    return tensors.dense_bytes(folder, dtype)


def open_streamed(recipe: Recipe, journal: Journal, streaming: Streaming) -> tuple[nn.Module, Any, Streamed]:
    """(skeleton, tokenizer, memory) of a recipe's model; `journal` is written to by steps that change blocks.

    The room for activations is shared by the processes.
    """
    source = resolve(recipe.model.id)
    local = source if Path(source).is_dir() else str(fetch(source, recipe.model.revision))
    model, places = skeleton.open_model(replace(recipe.model, id=local))
    refuse_whole(recipe, model, "and cannot be streamed", room=0)
    memory = Streamed(journal, places, model, recipe.format, recipe.model.device,
                      streaming.activations // journal.ranks.size)
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
        needed = size + whole_bytes(step, model, tokens) if step.needs_whole else 0
        if needed > room:
            raise LlmoptError(f"steps.{i} {step.name}: works on the whole model {why}; that takes at least "
                              f"{needed / 1e9:.1f} GB ({size / 1e9:.1f} GB of weights), {available() / 1e9:.1f} GB "
                              "are available")


def open_model(recipe: Recipe, journal: Journal, streaming: Streaming) -> tuple[nn.Module, Any, Resumable]:
    """(model, tokenizer, memory) of a recipe, streamed or as a whole; `journal` is written to by steps alone."""
    if journal.ranks.agree(streaming.wanted(recipe.model)):
        model, tokenizer, memory = open_streamed(recipe, journal, streaming)
    else:
        model, tokenizer, memory = *open_whole(recipe, streaming), Resumable(journal)
    choose(model, recipe.model.compute_dtype, recipe.model.device, journal.ranks.agree)
    return model, tokenizer, memory


def open_whole(recipe: Recipe, streaming: Streaming) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a recipe whose model is loaded as a whole; --no-stream insists on trying."""
    insisted = streaming.force is False or recipe.model.device != "cpu"
    room = sys.maxsize if insisted else available()      # before the weights are there
    model, tokenizer = load_dense(recipe.model)
    refuse_whole(recipe, model, "at once", room)
    return model, tokenizer
