"""The main path, top to bottom: load dense -> batches -> each step's apply -> save -> verify -> rename."""
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt import checkpoint, data, rehearsal, runtime, shards
from llmopt.facts import FILE, read_facts
from llmopt.folder import WORK
from llmopt.hub import companion
from llmopt.journal import Journal, checksum
from llmopt.loading import load_dense, resolve
from llmopt.method import LlmoptError, Method, Progress, Record, Run, naming, silent
from llmopt.predict import group_multiple, predict
from llmopt.quant.base import quantized_modules
from llmopt.ranks import Ranks
from llmopt.recipe import Recipe, check_order
from llmopt.stream import Stream
from llmopt.streaming import StreamedWeights, Streaming, open_model, save_partial


@dataclass
class Report:
    """What a run did and what came of it. Times stay out of `to_dict`: a run repeated writes the same bytes.

    records: [{"method": name, "fields": {...}, "meta": {...}}, ...]; sizes in bytes of safetensors.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    calibration: str | None = None
    dense_bytes: int = 0
    dense_parameters: int = 0
    parameters: int = 0
    cache_before: float = 0.0          # bytes per token of context
    cache_after: float = 0.0
    predicted_bytes: int | None = None
    streamed: bool = False             # one block in memory at a time; the result is the same
    told: list[str] = field(default_factory=list)     # of a resumed run: what was there, what was damaged
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"records": self.records, "seed": self.seed, "calibration_sha256": self.calibration,
                "dense_bytes": self.dense_bytes, "parameters": [self.dense_parameters, self.parameters],
                "predicted_bytes": self.predicted_bytes,
                "cache_bytes_per_token": [self.cache_before, self.cache_after]}


def compress(model: nn.Module, steps: list[Method], batches: Any = None, seed: int = 0, progress: Progress = silent,
             tokenizer: Any = None) -> Report:
    """Apply `steps` to `model` in place.

    batches: token ids [N, T], a list of id lists, or ready batches; needed only if a step asks for data.
    Raises LlmoptError for steps in a wrong order, a model already quantized, or missing data.
    """
    if batches is not None:
        batches = data.as_batches(batches, model.config.vocab_size)
    return _compress(model, steps, Run(batches, seed=seed, progress=progress, tokenizer=tokenizer))


def _compress(model: nn.Module, steps: list[Method], run: Run) -> Report:
    check_order(tuple(steps))
    refuse_compressed(model)
    run.multiple = group_multiple(steps)
    training = model.training
    model.eval()                            # dropout would make statistics and sizes a matter of chance
    try:
        return _apply(model, steps, run)
    finally:
        model.train(training)


def _apply(model: nn.Module, steps: list[Method], run: Run) -> Report:
    report = Report(seed=run.seed, calibration=data.fingerprint(run.batches) if run.batches else None,
                    dense_bytes=shards.file_bytes(checkpoint.plain_state(model)),
                    dense_parameters=model.num_parameters(), cache_before=cache_bytes_per_token(model))
    for i, step in enumerate(steps):
        start = time.perf_counter()
        torch.manual_seed(run.seed)         # every step anew: a resumed run passes over the work of earlier ones
        run.memory.begin(i)
        with naming(f"steps.{i} {step.name}"):
            if step.needs_data and not run.batches:
                raise LlmoptError("needs calibration data, and none was given")
            record = step.apply(model, run)
        report.records.append(describe(step, record))
        report.seconds[f"steps.{i} {step.name}"] = time.perf_counter() - start
    report.parameters = model.num_parameters()
    report.cache_after = cache_bytes_per_token(model)
    return report


def describe(step: Method, record: Record) -> dict[str, Any]:
    """A record as llmopt.json keeps it."""
    (name, fields), = step.to_dict().items()
    return {"method": name, "fields": fields, "meta": record.meta}


def refuse_compressed(model: nn.Module) -> None:
    """Raise LlmoptError for a model whose weights are already quantized or that has runtime parts attached."""
    if getattr(model.config, "quantization_config", None) is not None or quantized_modules(model):
        raise LlmoptError("the model is already quantized; start from the dense checkpoint")
    if runtime.runtime_config(model)["steps"]:
        raise LlmoptError("the model already has runtime parts attached; start from the dense checkpoint")


@torch.no_grad()
def cache_bytes_per_token(model: nn.Module) -> float:
    """Bytes that the KV cache holds after a prompt of random tokens, per token of the prompt."""
    length = min(512, model.config.max_position_embeddings // 2)
    if next(model.parameters()).is_meta:
        return rehearsal.cache_bytes(model, length) / length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(model.device)
    cache = model(ids, use_cache=True).past_key_values
    if isinstance(cache, runtime.LlmoptCache):
        return cache.nbytes() / length
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in held) / length


def run(recipe: Recipe, output: Path, *, overwrite: bool = False, progress: Progress = silent,
        streaming: Streaming = Streaming(), resume: bool = False, ranks: Ranks = Ranks()) -> Report:  # noqa: B008  frozen
    """Carry out `recipe` into the folder `output`, in memory or streamed.

    What is finished is kept in OUTPUT.llmopt-work until all is; resume: go on with what a run that was cut off has
    left there. ranks: the processes that do this together; one of them writes, all come back when it has.
    Raises LlmoptError, with nothing written, for bad input, and for an unfinished run that is not resumed.
    """
    clock = time.perf_counter()
    source = resolve(recipe.model.id)
    output = checkpoint.prepare_output(output, source, overwrite)
    journal = journal_of(output, ranks)
    if ranks.is_main and not resume:
        journal.refuse_unfinished()
    model, tokenizer, memory = open_model(recipe, journal, streaming)
    streamed = isinstance(memory, Stream)
    batches = None
    if any(step.needs_data for step in recipe.steps):
        batches = data.load(recipe.data, model.config, tokenizer)
    with journal.opened(marks(recipe, batches, streaming)):
        run = Run(batches, seed=recipe.seed, progress=progress, tokenizer=tokenizer, memory=memory, ranks=ranks)
        loaded = time.perf_counter() - clock
        predicted, _ = predict(model, list(recipe.steps), recipe.format, recipe.seed, memory)
        report = _compress(model, list(recipe.steps), run)
        journal.hold = True
        report.predicted_bytes, report.streamed, report.told = predicted, streamed, journal.told
        weights = StreamedWeights(model, memory) if streamed else checkpoint.Weights(model, recipe.format)
        report.seconds = {"load": loaded, **report.seconds, "of which for the journal": journal.seconds}
        if streaming.blocks and ranks.is_main:
            save_partial(weights, output, recipe.max_shard_size)
        elif ranks.is_main:
            checkpoint.save(model, output, tokenizer, report=report, source=source, recipe=recipe,
                            format=recipe.format, max_shard_size=recipe.max_shard_size, overwrite=overwrite,
                            finish=lambda stage: _write_log(stage, report), weights=weights, work=journal.folder)
        ranks.wait()
    report.seconds["total"] = time.perf_counter() - clock
    return report


def marks(recipe: Recipe, batches: Any, streaming: Streaming) -> dict[str, Any]:
    """What makes two runs the same: recipe, model files, data, seeds and versions; not whether they are streamed."""
    config = companion(resolve(recipe.model.id), "config.json", recipe.model.revision)
    files = [config, *sorted(config.parent.glob("*.safetensors"))]
    return {"recipe": recipe.resolved(), "files": {f.name: [f.stat().st_size, checksum(f)] for f in files},
            "blocks": streaming.blocks, "data": data.fingerprint(batches) if batches else None,
            "versions": checkpoint.versions()}


def dry_run(recipe: Recipe, streaming: Streaming = Streaming()) -> dict[str, Any]:     # noqa: B008  frozen
    """{"model", "steps": [[name, text]], "predicted_bytes", "dense_bytes"} of a recipe; nothing is written."""
    model, _, memory = open_model(recipe, Journal(Path("nowhere")), streaming)
    size, steps = predict(model, list(recipe.steps), recipe.format, recipe.seed, memory)
    return {"model": recipe.model.id, "steps": steps, "predicted_bytes": size,
            "dense_bytes": shards.file_bytes(checkpoint.plain_state(model))}


def score_heads(recipe: Recipe, progress: Progress = silent,
                ranks: Ranks = Ranks()) -> tuple[list[Tensor], dict[str, Any]]:      # noqa: B008  frozen
    """(scores [L][H], what is known about them) of a recipe whose one step is a head score; nothing is written."""
    step, = recipe.steps
    model, tokenizer = load_dense(recipe.model)
    batches = data.load(recipe.data, model.config, tokenizer) if step.needs_data else None
    run = Run(batches=batches, seed=recipe.seed, progress=progress, tokenizer=tokenizer, ranks=ranks)
    with naming(step.name):
        record = step.apply(model, run)
    return run.scores[step.name], record.meta


def is_finished(output: Path, recipe: Recipe) -> bool:
    """Whether `output` is a checkpoint made by this very recipe, so that only its evaluation can be missing."""
    return (Path(output) / FILE).is_file() and read_facts(Path(output)).get("recipe") == recipe.resolved()


def journal_of(output: Path, ranks: Ranks = Ranks()) -> Journal:        # noqa: B008  frozen
    """Where a run into `output` keeps what it has finished."""
    return Journal(output.with_name(output.name + WORK), ranks)


def _write_log(stage: Path, report: Report) -> None:
    lines = [f"llmopt on {platform.machine()}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    if report.streamed:
        lines.append("streamed: one block in memory at a time")
    lines += report.told
    lines += [f"{seconds:9.2f} s  {what}" for what, seconds in report.seconds.items()]
    (stage / "llmopt.log").write_text("\n".join(lines) + "\n")
