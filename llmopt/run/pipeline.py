"""The main path, top to bottom: load dense -> batches -> each step's apply -> save -> verify -> rename."""
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from llmopt import runtime
from llmopt.calibration import data
from llmopt.calibration.head_scores import check_known
from llmopt.calibration.logits_loss import outputs
from llmopt.calibration.sampling import Sampler
from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.place import prepare_output
from llmopt.checkpoint.streamed import StreamedWeights, save_partial
from llmopt.errors import LlmoptError, naming
from llmopt.files import shards
from llmopt.files.checks import WORK
from llmopt.forecast.memory import shard_bytes
from llmopt.forecast.size import Prediction, predict
from llmopt.forecast.times import Watch
from llmopt.method import UNCHANGED, Method, Record, Run
from llmopt.model import skeleton, state, unfinished
from llmopt.model.computing import choose, compute_type, computing
from llmopt.model.levels import refuse_below
from llmopt.model.loaded import evaluating
from llmopt.model.loading import load_dense, local_folder, resolve
from llmopt.model.modeling import let_save
from llmopt.model.usable import check_model, check_numbers
from llmopt.model.weights import coded
from llmopt.progress import Clock, Progress, duration, numbered, silent
from llmopt.recipe.reader import Recipe, check_order
from llmopt.run.calibrating import batches_of, load_batches, needs_data
from llmopt.run.foresight import Foresight
from llmopt.run.marks import marks
from llmopt.run.opening import Streaming, open_model, refuse_whole
from llmopt.run.report import Report, describe
from llmopt.runtime.rehearsal import cache_bytes_per_token
from llmopt.scale.gauge import Gauge
from llmopt.scale.journal import Journal
from llmopt.scale.processes import Ranks
from llmopt.scale.stream import Streamed
from llmopt.specs import DataSpec, ModelSpec

LOG = logging.getLogger(__name__)


def apply_steps(model: nn.Module, steps: list[Method], run: Run) -> Report:
    """Apply `steps` to `model` in place; raises LlmoptError for a wrong order, missing data, a compressed model."""
    check_order(tuple(steps))
    check_model(model, streamed=isinstance(run.memory, Streamed))
    refuse_compressed(model)
    let_save(model)
    with evaluating(model), computing(model):
        check_numbers(model)
        with _whole_or_refused(model):
            return _apply(model, steps, run)


@contextmanager
def _whole_or_refused(model: nn.Module) -> Iterator[None]:
    """Whatever ends the steps: a model that they have edited in part refuses to run, another one is as it was."""
    done = False
    try:
        yield
        done = True
    finally:
        if done:
            unfinished.finish(model)
        elif not unfinished.abandon(model):
            runtime.detach(model)


def _apply(model: nn.Module, steps: list[Method], run: Run) -> Report:
    start = time.perf_counter()
    batches = run.batches or []
    report = Report(seed=run.seed, calibration=data.fingerprint(batches) if batches else None,
                    calibrated=data.amount(batches) if batches else {},
                    dense_bytes=shards.file_bytes(state.plain_state(model)),
                    dense_parameters=model.num_parameters(), cache_before=cache_bytes_per_token(model))
    report.seconds["cache"] = time.perf_counter() - start
    if batches and any(step.recalls for step in steps):
        run.dense = outputs(model, batches)
    progress = run.progress
    check_known(steps, run, model)
    for i, step in enumerate(steps):
        start, place = time.perf_counter(), f"step {i + 1} of {len(steps)}"
        LOG.info("%s: %s", place, step.name)
        run.progress = numbered(progress, place)
        torch.manual_seed(run.seed)         # every step anew: a resumed run passes over the work of earlier ones
        run.memory.begin(i)
        run.ahead = tuple(steps[i + 1:])
        with naming(f"steps.{i} {step.name}"):
            refuse_below(model, step.level, step.name)
            if step.needs_data and not run.batches:
                raise LlmoptError("needs calibration data, and none was given")
            record = step.apply(model, run)
        if step.stage == "score":
            check_known(steps, run, model)
        if step.stage not in UNCHANGED:
            unfinished.begin(model)
        report.records.append(describe(step, record))
        report.seconds[f"steps.{i} {step.name}"] = time.perf_counter() - start
        LOG.debug("%s: %s, %s", place, step.name, duration(time.perf_counter() - start))
    report.parameters = model.num_parameters()
    start = time.perf_counter()
    report.cache_after = cache_bytes_per_token(model)
    report.seconds["cache"] += time.perf_counter() - start
    return report


def refuse_compressed(model: nn.Module) -> None:
    """Raise LlmoptError for a model whose weights are already quantized or that has runtime parts attached."""
    if getattr(model.config, "quantization_config", None) is not None or coded(model):
        raise LlmoptError("the model is already quantized; start from the dense checkpoint")
    if runtime.runtime_config(model)["steps"]:
        raise LlmoptError("the model already has runtime parts attached; start from the dense checkpoint")


def run(recipe: Recipe, output: Path, *, overwrite: bool = False, progress: Progress = silent,
        streaming: Streaming = Streaming(), resume: bool = False, ranks: Ranks = Ranks(),       # noqa: B008  frozen
        gauge: Gauge | None = None) -> Report:
    """Carry out `recipe` into the folder `output`, in memory or streamed.

    What is finished is kept in OUTPUT.llmopt-work until all is; resume: go on with what a run that was cut off has
    left there. ranks: the processes that do this together; one of them writes, all come back when it has. gauge:
    watches this one, so that the log can tell how much memory it took.
    Raises LlmoptError, with nothing written, for bad input, and for an unfinished run that is not resumed.
    """
    clock = time.perf_counter()
    source = resolve(recipe.model)
    output = prepare_output(output, source, overwrite)
    journal = journal_of(output, ranks)
    if ranks.is_main:
        journal.check(resume)
    if needs_data(recipe.steps):
        data.check_source(recipe.data)
    room = streaming.room(recipe.model)
    model, tokenizer, memory = open_model(recipe.model, recipe.format, journal, streaming)
    streamed = isinstance(memory, Streamed)
    refuse_whole(model, recipe.steps, recipe.data, 0 if streamed else room)
    sampler = Sampler(model, tokenizer, ranks, progress)
    batches = load_batches(recipe.data, recipe.steps, recipe.model, sampler)
    if batches:
        LOG.info("calibration: %(samples)s rows, %(tokens)s tokens", data.amount(batches))
    made_from = marks(recipe.model, recipe.steps, batches, streaming.blocks)
    with journal.opened({"recipe": recipe.resolved(), **made_from, "computes in": str(compute_type(model))}):
        run = Run(batches, seed=recipe.seed, tokenizer=tokenizer, memory=memory, ranks=ranks)
        predicted = predict(model, list(recipe.steps), recipe.format, run, recipe.max_shard_size)
        for line in predicted.needs:
            LOG.info(line)
        saving = predicted.saving
        if streamed:
            saving = streamed_saving(model, recipe.model, predicted, recipe.max_shard_size)
        sight = Foresight(progress, gauge, model, saving) if gauge else None
        run.progress = pace = Clock(sight or progress)
        loaded = time.perf_counter() - clock
        report = apply_steps(model, list(recipe.steps), run)
        journal.keep_on_error = True
        report.streamed, report.messages = streamed, journal.messages
        weights = StreamedWeights(model, memory) if streamed else checkpoint.Weights(model, recipe.format)
        report.seconds = {"load": loaded, **report.seconds}
        report.predict(predicted, pace.seconds, sight.peak if sight else 0)
        report.made_from = made_from

        def finish(stage: Path) -> None:
            total = time.perf_counter() - clock
            report.seconds |= {"save and verify": total - sum(report.seconds.values()), "total": total,
                               "of which for the journal": journal.seconds}
            report.memory = gauge.look().private if gauge else None
            _write_log(stage, report)

        if streaming.blocks and ranks.is_main:
            save_partial(weights, output, recipe.max_shard_size, finish)
        elif ranks.is_main:
            checkpoint.save(model, output, tokenizer, report=report, source=source, recipe=recipe,
                            format=recipe.format, max_shard_size=recipe.max_shard_size, overwrite=overwrite,
                            finish=finish, weights=weights, work=journal.folder)
        ranks.wait()
    report.output, report.recipe = output, recipe
    return report


def streamed_saving(model: nn.Module, spec: ModelSpec, told: Prediction, max_shard_size: str) -> int:
    """Bytes of memory that writing and verifying a streamed checkpoint takes on top of what the steps leave."""
    own = skeleton.converted(model, local_folder(spec))
    return shard_bytes(told.tensors, own, shards.size_of(max_shard_size))


def score_heads(spec: ModelSpec, steps: list[Method], source: DataSpec, progress: Progress = silent,
                ranks: Ranks = Ranks(),                                                       # noqa: B008  frozen
                calibrated: bool = False) -> tuple[nn.Module, Run, list[Record]]:
    """(the model, the run with its scores, a record of each step) by methods of head scores; nothing is written.

    calibrated: the run is to have calibration data even if no step looks at it.
    """
    model, tokenizer = load_dense(spec)
    choose(model, spec.compute_dtype, spec.device, ranks.agree)
    sampler, wanted = Sampler(model, tokenizer, ranks, progress), source.of(spec.id)
    batches = (batches_of(wanted, spec, sampler) if calibrated else load_batches(wanted, steps, spec, sampler))
    run, records = Run(batches=batches, progress=progress, tokenizer=tokenizer, ranks=ranks), []
    for step in steps:
        watch = Watch()
        with naming(step.name), computing(model):
            refuse_below(model, step.level, step.name)
            records.append(step.apply(model, run))
        LOG.info("%s took %s, %s of processor time", step.name, duration(watch.read().high), duration(watch.spent()))
    return model, run, records


def journal_of(output: Path, ranks: Ranks = Ranks()) -> Journal:        # noqa: B008  frozen
    """The journal of a run into `output`."""
    return Journal(output.with_name(output.name + WORK), ranks)


def _write_log(stage: Path, report: Report) -> None:
    lines = [f"llmopt on {platform.machine()}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    if report.streamed:
        lines.append("streamed: one block in memory at a time")
    lines += report.messages
    lines += [f"{seconds:9.2f} s  {what}" for what, seconds in report.seconds.items()]
    lines += [f"{what}: {told:,.0f} predicted, {found:,.0f} measured" for what, (told, found) in
              report.predictions().items()]
    (stage / "llmopt.log").write_text("\n".join(lines) + "\n")
