"""`compress --dry-run`: what a recipe will do, how large its checkpoint will be, what that takes of memory and of time.

Sizes follow from shapes. Time is measured: each step works on the model's first block for real, with the recipe's own
calibration data, and what comes of it is saved and verified in a temporary folder that is gone afterwards.
"""
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.streamed import StreamedWeights
from llmopt.errors import LlmoptError, naming
from llmopt.files import shards
from llmopt.files.checks import weight_files
from llmopt.forecast.size import Prediction
from llmopt.method import Method, Pace, Run
from llmopt.model import state
from llmopt.model.blocks import blocks, layer_list
from llmopt.model.computing import computing
from llmopt.model.head_numbers import HeadNumbers
from llmopt.model.loading import local_folder
from llmopt.model.usable import check_numbers
from llmopt.progress import timed
from llmopt.recipe.reader import Recipe
from llmopt.run.opening import Streaming, cut_short, open_model
from llmopt.run.pipeline import foresee, load_batches
from llmopt.runtime.rehearsal import cache_bytes_per_token, prompt_length
from llmopt.scale.available import available
from llmopt.scale.journal import Journal, checksum
from llmopt.scale.memory import Resumable
from llmopt.scale.stream import Streamed

INFLATED = 3        # a byte of a weight that is packed, and inflated to be verified, takes the time of so many others


@dataclass
class Times:
    """Seconds of each part of the run, and where the figure comes from."""

    parts: list[list] = field(default_factory=list)         # [part, seconds, origin]

    def add(self, part: str, seconds: float, origin: str) -> None:
        self.parts.append([part, round(seconds, 3), origin])

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds, _ in self.parts)


def dry_run(recipe: Recipe, streaming: Streaming = Streaming()) -> dict[str, Any]:     # noqa: B008  frozen
    """All that `compress --dry-run` prints, ready for JSON; nothing that is written remains."""
    free = available()
    with TemporaryDirectory(prefix="llmopt-dry-run-") as folder:
        start, times = time.perf_counter(), Times()
        model, tokenizer, memory = open_model(recipe, Journal(Path(folder)), streaming)
        run = Run(load_batches(recipe, model, tokenizer), seed=recipe.seed, tokenizer=tokenizer, memory=memory)
        told, dense = foresee(recipe, model, run, streaming), shards.file_bytes(state.plain_state(model))
        times.add("load", time.perf_counter() - start, "measured")
        times.add("checksums of the model", *_summing(weight_files(local_folder(recipe.model))))
        with computing(model):
            rehearse(model, recipe, run, told, times)
    streamed = isinstance(memory, Streamed)
    return {"model": recipe.model.id, "streamed": streamed, "steps": told.steps, "dense_bytes": dense,
            "predicted_bytes": told.bytes, "predicted_memory": told.peak.private,
            "predicted_mapped_memory": told.peak.mapped, "available_memory": free,
            "predicted_seconds": times.total, "peaks": [list(peak) for peak in told.peaks], "seconds": times.parts,
            "advice": advice(told, free, streamed, bool(run.batches))}


def rehearse(model: nn.Module, recipe: Recipe, run: Run, told: Prediction, times: Times) -> None:
    """Time every part of the run but loading; the model is cut to its first block on the way."""
    cache, length = timed(cache_bytes_per_token, model), prompt_length(model)
    times.add("cache before and after", 2 * cache, "measured")
    pace = Pace(len(layer_list(model)), (cache if isinstance(run.memory, Streamed) else
                                         timed(check_numbers, model, length)) / length)
    at_once = {i: _seconds(i, recipe, model, run, pace) for i, step in enumerate(recipe.steps) if _needs_all(step)}
    weights = _block_bytes(model)
    numbers = HeadNumbers.of(block.heads for block in blocks(model))
    run.heads = HeadNumbers(numbers.before, numbers.left[:1])
    cut_short(model, 1)
    run.scores = {name: scores[:1] for name, scores in run.scores.items()}
    for i, step in enumerate(recipe.steps):
        if i in at_once:
            times.add(f"steps.{i} {step.name}", at_once[i], f"first of {len(run.batches)} batches, measured")
        elif step.stage != "runtime":
            times.add(f"steps.{i} {step.name}", _seconds(i, recipe, model, run, pace),
                      f"first of {pace.blocks} blocks, measured")
    times.add("save and verify", *_saving(model, recipe, run.memory, told.bytes, weights))


def _saving(model: nn.Module, recipe: Recipe, memory: Resumable, size: int, dense: list[int]) -> tuple[float, str]:
    """(seconds, origin) of saving a checkpoint of `size` bytes, from the cut model; dense: see _block_bytes."""
    folder, streamed = memory.journal.folder / "saved", isinstance(memory, Streamed)
    spent = timed(lambda: checkpoint.save(model, folder, recipe=recipe, format=recipe.format,
                                          max_shard_size=recipe.max_shard_size,
                                          weights=StreamedWeights(model, memory) if streamed else None))
    rest, *layers = dense
    slow = INFLATED if state.packs(model, recipe.format) else 1
    scale = (rest + slow * sum(layers)) / (rest + slow * layers[0])
    if streamed:                            # compared as bytes
        scale = size / shards.written_bytes(folder)
    return spent * scale, "of one block, measured; the others by their bytes"


def _block_bytes(model: nn.Module) -> list[int]:
    """Bytes of the weights outside the blocks, then of each block."""
    layers = [shards.tensor_bytes(dict(layer.named_parameters())) for layer in layer_list(model)]
    return [shards.tensor_bytes(dict(model.named_parameters())) - sum(layers), *layers]


def _summing(files: list[Path]) -> tuple[float, str]:
    """(seconds, origin) of going through the bytes of all files, from the first."""
    sizes = [file.stat().st_size for file in files]
    return timed(checksum, files[0]) * sum(sizes) / sizes[0], f"first of {len(files)} files, measured"


def _needs_all(step: Method) -> bool:
    return step.needs_whole and step.stage == "score"


def _seconds(index: int, recipe: Recipe, model: nn.Module, run: Run, pace: Pace) -> float:
    step, run.ahead = recipe.steps[index], recipe.steps[index + 1:]
    run.memory.begin(index)
    with naming(f"steps.{index} {step.name}"):
        if step.needs_data and not run.batches:
            raise LlmoptError("needs calibration data, and none was given")
        return step.seconds(model, run, pace)


def advice(told: Prediction, free: int, streamed: bool, batches: bool) -> list[str]:
    """Lines of advice where memory will not suffice; none where it will."""
    if told.peak.private <= free:
        return []
    ways = ["a machine with more memory"]
    if batches:
        ways.insert(0, "fewer data.samples, a smaller data.batch_size or data.length")
    ways.insert(0, "a smaller --activation-memory" if streamed else "--stream")
    return [f"{told.peak.part} will take {told.peak.private / 1e9:.1f} GB, {free / 1e9:.1f} GB are available; "
            f"what helps: {', '.join(ways)}"]
