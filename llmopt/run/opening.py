"""A streamed run from the outside: whether there is to be one, its work folder, and the checkpoint that it writes."""
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmopt.calibration import data
from llmopt.checkpoint.verify import greedy, probe
from llmopt.errors import LlmoptError
from llmopt.files import shards
from llmopt.files.checks import refusals
from llmopt.files.hub import fetch
from llmopt.forecast.memory import whole_bytes
from llmopt.method import Method
from llmopt.model import places, skeleton
from llmopt.model.blocks import layer_list, replace_layers
from llmopt.model.computing import choose
from llmopt.model.loading import fitting_tokenizer, load_dense, resolve
from llmopt.model.modeling import saved_config
from llmopt.model.names import remember_names
from llmopt.model.outline import outline
from llmopt.model.shapes import slice_config, sliced
from llmopt.model.ways import view
from llmopt.progress import human
from llmopt.scale.available import available
from llmopt.scale.journal import Journal
from llmopt.scale.memory import Resumable
from llmopt.scale.stream import Streamed
from llmopt.specs import DataSpec, ModelSpec


@dataclass(frozen=True)
class Streaming:
    """The options of streaming. force None: stream if the dense model would not fit into the available memory.

    activations: bytes of calibration activations held in memory. blocks: only so many blocks, to measure; what is
    written then is no model.
    """

    force: bool | None = None
    activations: int = 2 << 30
    blocks: int | None = None

    def room(self, model: ModelSpec) -> int:
        """Bytes there are for a step on the whole of a model held in memory, asked for before its weights are there.

        --no-stream insists on trying, and what a GPU has is not known here.
        """
        return sys.maxsize if self.force is False or model.device != "cpu" else available()

    def wanted(self, model: ModelSpec) -> bool:
        """True if a run on this model is to be streamed."""
        source = Path(resolve(model))
        if self.force is not None or self.blocks:
            return bool(self.force or self.blocks)
        fits = model.device != "cpu" or not source.is_dir()
        return not fits and _dense_bytes(source, model.dtype) > available()


def _dense_bytes(folder: Path, dtype: str | None) -> int:
    view.check(folder)
    return view.dense_bytes(folder, dtype)


def open_model(spec: ModelSpec, format: str, journal: Journal,
               streaming: Streaming) -> tuple[nn.Module, Any, Resumable]:
    """(model, tokenizer, memory), streamed or as a whole; `journal` is written to by steps alone.

    format: of the checkpoint to come.
    """
    if journal.ranks.agree(streaming.wanted(spec)):
        model, tokenizer, memory = _open_streamed(spec, format, journal, streaming)
    else:
        model, tokenizer, memory = *load_dense(spec), Resumable(journal)
    choose(model, spec.compute_dtype, spec.device, journal.ranks.agree)
    return model, tokenizer, memory


def _open_streamed(spec: ModelSpec, format: str, journal: Journal,
                   streaming: Streaming) -> tuple[nn.Module, Any, Streamed]:
    """(skeleton, tokenizer, memory); the room for activations is shared by the processes."""
    source = resolve(spec)
    local = source if Path(source).is_dir() else str(fetch(source, spec.revision))
    model, held = skeleton.open_model(spec.at(local))
    memory = Streamed(journal, held, model, format, spec.device, streaming.activations // journal.ranks.size)
    if streaming.blocks:
        cut_short(model, range(min(streaming.blocks, len(layer_list(model)))), streamed=True)
    return model, fitting_tokenizer(model, local, spec), memory


def cut_short(model: nn.Module, kept: Sequence[int], streamed: bool) -> bool:
    """Leave the blocks of these numbers; True if they make a model of its kind.

    Where the model cannot do without the others (states without any attention, tables by layer), its config goes on
    telling of them.
    """
    remember_names(model)
    config, layers = model.config.get_text_config(), layer_list(model)
    whole, ran = dict(vars(config)), _works(_run, model, streamed)
    alike = kept[0] == 0 or _works(places.check, model, [*kept], sliced(model.config, [*kept]))
    replace_layers(model, [layers[index] for index in kept])
    slice_config(model, [*kept])
    alone = alike and _works(saved_config, model) and (not ran or _works(_run, model, streamed))
    if not alone:
        vars(config).update(whole)
    return alone


def _run(model: nn.Module, streamed: bool) -> None:
    """A few tokens; streamed, their shapes alone, which not all code can do."""
    if streamed:
        outline(model)(torch.zeros(1, 2, dtype=torch.long, device="meta"))
    else:
        greedy(model, probe(model)[:1], 2)


def _works(do: Callable, *given: Any) -> bool:
    """True if some blocks do this, False where it is refused or code that is not ours fails; our faults come out."""
    try:
        with refusals("the first blocks", ours=False):
            do(*given)
    except LlmoptError:
        return False
    return True


def refuse_whole(model: nn.Module, steps: Sequence[Method], spec: DataSpec, room: int) -> None:
    """Raise LlmoptError for a step that works on the whole model and takes more than `room` bytes; none if streamed."""
    size = shards.tensor_bytes(dict(model.named_parameters()))
    batch = min(spec.batch_size, spec.samples * spec.shifts), spec.length or data.DEFAULT_LENGTH
    for i, step in enumerate(steps):
        needed = size + whole_bytes(step, model, *batch) if step.needs_whole else 0
        if needed > room:
            raise LlmoptError(f"steps.{i} {step.name}: works on the whole model "
                              f"{'at once' if room else 'and cannot be streamed'}; that takes at least "
                              f"{human(needed)} ({human(size)} of weights), {human(available())} are available")
