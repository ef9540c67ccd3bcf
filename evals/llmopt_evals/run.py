"""A run from its recipe to the scores at its end: what `llmopt compress` does, and `llmopt.run` in Python."""
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from llmopt.errors import LlmoptError, naming_arguments
from llmopt.model.loading import load_tokenizer
from llmopt.progress import Progress, silent
from llmopt.recipe.given import recipe_of
from llmopt.recipe.reader import Recipe
from llmopt.run import pipeline
from llmopt.run.marks import is_finished
from llmopt.run.opening import Streaming
from llmopt.run.report import Report
from llmopt.scale.gauge import Gauge
from llmopt.scale.processes import Ranks, join
from llmopt.specs import EvalSpec, ModelSpec
from llmopt_evals import evaluate as lm_eval
from llmopt_evals import pairs, preflight, report
from llmopt_evals.large import obstacle

LOG = logging.getLogger("llmopt")


@dataclass(frozen=True)
class Options:
    """How a recipe is run, which changes nothing in what comes of it. scored: measure the recipe's tasks at the end."""

    overwrite: bool = False
    resume: bool = False
    scored: bool = True
    anew: bool = False
    streaming: Streaming = Streaming()


@naming_arguments
def run(recipe: Any, output: str | os.PathLike, *, model: str | None = None, overwrite: bool = False,
        resume: bool = False, evaluate: bool = True, stream: bool | None = None, progress: Progress = silent,
        trust_remote_code: bool = False) -> Report:
    """Carry out a recipe into the folder `output`, verify it and score it, as `llmopt compress` does.

    recipe: a file, a packaged name, a Recipe, its plain data, a scheme such as "W4A16", or steps as llmopt.compress
        takes them. model: a folder or hub name in the place of the recipe's own.
    overwrite: replace a finished checkpoint. resume: go on with a run that was cut off. evaluate: score the dense and
        the compressed model. stream: one block in memory at a time; None: where the model would not fit.
    Raises LlmoptError, with nothing written, for bad input.
    """
    plan = recipe_of(recipe, model, trust_remote_code=trust_remote_code)
    options = Options(overwrite, resume, evaluate, streaming=Streaming(stream))
    tasks, team = tasks_of(plan, Path(output), options), join(plan.model.device)
    made = checkpoint(plan, Path(output), options, progress, team)
    score(plan, Path(output), tasks, options, team, made.take)
    return made


@naming_arguments
def evaluate(model: nn.Module | str | os.PathLike | Report, tasks: str | list[str], tokenizer: Any = None, *,
             limit: int | None = None, batch_size: int = 16, text: str | None = None, compare: Any = None,
             data: Any = None) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} from `fidelity` and lm-eval, the model's cache methods in force.

    Standard errors stand under the metric's name with "_stderr" behind it.
    model: a folder, a hub name, what llmopt.compress returned, or a model in memory with its `tokenizer`; a pair of
    both will do. tasks: names, or one text of names with commas between them. text: the file that text_ppl and needles
    read. compare: the dense model that `fidelity` measures against, given as `model` is; a checkpoint knows its own.
    data: what it compares the two on: a file, the name of a source, or calibration data as llmopt.compress takes them.
    """
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    if isinstance(model, Report) and compare is None and model.recipe is not None:
        compare = model.recipe.model
    given, results = _given(model, tokenizer), None
    if pairs.NAME in names:
        pair = pairs.pair_of(given, None if compare is None else _given(compare, tokenizer), data)
        _, results = pairs.results(*pair, EvalSpec(limit=limit, batch_size=batch_size))
    if others := [name for name in names if name != pairs.NAME]:
        one, words = (given, None) if isinstance(given, ModelSpec) else given
        results = pairs.joined(lm_eval.evaluate(one, others, words, limit, batch_size, text), results)
    found: dict[str, dict[str, float]] = {}
    for (task, metric), (value, error) in lm_eval.column(results).items():
        found.setdefault(task, {})[metric] = value
        found[task] |= {} if error is None else {f"{metric}_stderr": error}
    return found


def _given(model: Any, tokenizer: Any) -> pairs.Given:
    """A model by its name, or one in memory with its tokenizer."""
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    if isinstance(model, Report):
        model, tokenizer = model.output or model.model, model.tokenizer
    if isinstance(model, (str, os.PathLike)):
        return ModelSpec(id=os.fspath(model))
    if isinstance(model, ModelSpec):
        return model
    return model, _tokenizer_beside(model) if tokenizer is None else tokenizer


def tasks_of(plan: Recipe, output: Path, options: Options) -> list[str]:
    """The tasks that a run will end in, told why where some will not be; an error before the work, not after it."""
    if not options.scored or options.streaming.blocks or not plan.eval.tasks:
        return []
    named = any(change.startswith("eval.tasks=") for change in plan.changes)
    tasks, notes = preflight.agreed_tasks(plan.model, plan.eval, output, named)
    packed = plan.format != "dense" and any(step.stage == "quant" for step in plan.steps)
    if tasks and (fact := obstacle(plan.model, output, packed)):
        tasks, notes = [], [f"not scored: {fact}. Later: {preflight.later(plan.model, output, tasks)}"]
    if pairs.NAME in tasks and (fact := pairs.obstacle(plan.model, plan.data)):
        tasks, notes = [task for task in tasks if task != pairs.NAME], [*notes, f"not scored: {pairs.NAME}: {fact}"]
    for note in notes:
        LOG.warning(note)
    return tasks


def checkpoint(plan: Recipe, output: Path, options: Options, progress: Progress, team: Ranks) -> Report:
    """The report of a run up to its checkpoint; of an earlier one, where that is finished and is to be resumed."""
    if team.agree(options.resume and is_finished(output, plan, options.streaming, options.overwrite)):
        if team.is_main:
            pipeline.journal_of(output).remove()     # its run may have been cut off at the very end
        return Report.of(report.known(output, team), output)
    with Gauge() as gauge:
        made = pipeline.run(plan, output, overwrite=options.overwrite, progress=progress, streaming=options.streaming,
                            resume=options.resume, ranks=team, gauge=gauge)
    for line in made.messages:
        LOG.info(line)
    if made.streamed and not options.streaming.blocks:
        LOG.info("streamed: one block in memory at a time")
    return made


def score(plan: Recipe, output: Path, tasks: list[str], options: Options, team: Ranks,
          show: Callable[[dict[str, Any]], None]) -> None:
    """Score a finished checkpoint and show its facts; cut off or failing, show what is known and say what to do."""
    facts, leave = {}, f"the checkpoint in {output} is finished"
    try:
        if tasks:
            leave += f". To score it: the same command with --resume, or {preflight.later(plan.model, output, tasks)}"
        facts = report.known(output, team)
        facts = report.scored(output, (plan.model, plan.data), replace(plan.eval, tasks=tasks), team, options.anew)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {leave}") from error
    except LlmoptError as error:
        raise LlmoptError(f"{error}; {leave}") from error
    finally:
        if facts:
            show(facts)


def _tokenizer_beside(model: nn.Module) -> Any:
    """The tokenizer in the folder that a model was loaded from."""
    folder = getattr(model.config, "_name_or_path", "")
    if not folder or not Path(folder).is_dir():
        raise LlmoptError("a model in memory is scored with its tokenizer: llmopt.evaluate(model, tasks, tokenizer)")
    return load_tokenizer(folder)
