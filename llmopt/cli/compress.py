"""`llmopt compress`: a recipe applied to a model, written, verified and scored."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmopt.cli import log
from llmopt.cli.log import LOG
from llmopt.cli.options import ANEW, COUNT, FILE, JSON, TRUST, join
from llmopt.errors import LlmoptError
from llmopt.scale import launch

if TYPE_CHECKING:
    from llmopt.recipe.reader import Recipe
    from llmopt.scale.processes import Ranks


@click.command()
@log.verbosity
@click.option("--recipe", "recipe_name", required=True, help="A recipe file, or the name of a packaged one.")
@click.option("--output", type=FILE, help="Folder for the compressed checkpoint.")
@click.option("--model", help="Folder or hub name; replaces the recipe's model.id.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override, such as steps.1.bits=3; repeatable.")
@click.option("--dry-run", is_flag=True, help="Plan, size, memory and time; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint at --output.")
@click.option("--resume", is_flag=True, help="Go on with a run of the same recipe that was cut off.")
@click.option("--no-eval", is_flag=True, help="Skip the recipe's evaluation.")
@click.option("--stream/--no-stream", default=None, help="One block in memory at a time; default: if needed.")
@click.option("--activation-memory", default="2GiB", show_default=True, help="Activations beyond it go to disk.")
@click.option("--max-blocks", type=COUNT, help="Stream the first N blocks only, to measure; the output is no model.")
@ANEW
@TRUST
@JSON
def compress(recipe_name, output, model, sets, dry_run, overwrite, resume, no_eval, stream, activation_memory,
             max_blocks, anew, trust_remote_code, as_json) -> None:
    """Apply a recipe to a model, write the checkpoint, verify it, score it."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt import recipe
    from llmopt.files.shards import size_of
    from llmopt.run import pipeline
    from llmopt.run.dry_run import dry_run as rehearsed
    from llmopt.run.marks import is_finished
    from llmopt.run.opening import Streaming
    from llmopt.scale.gauge import Gauge

    streaming = Streaming(stream, size_of(activation_memory), max_blocks)
    plan = recipe.load(recipe_name, sets, model, trust_remote_code)
    if dry_run:
        if launch.is_main():
            tables.show_plan(rehearsed(plan, streaming), as_json)
        return
    if output is None:
        raise LlmoptError("--output FOLDER is needed (or --dry-run)")
    tasks = [] if no_eval or max_blocks else plan.eval.tasks
    if tasks:
        tasks = agreed(plan, output)
    team, told = join(plan.model.device), {}
    if team.agree(resume and is_finished(output, plan, streaming, overwrite)):
        if team.is_main:
            pipeline.journal_of(output).remove()     # its run may have been cut off at the very end
    else:
        with log.progress() as progress, Gauge() as gauge:
            report = pipeline.run(plan, output, overwrite=overwrite, progress=progress, streaming=streaming,
                                  resume=resume, ranks=team, gauge=gauge)
        told = report.predictions()
        for line in report.messages:
            LOG.info(line)
        if max_blocks:
            tables.show_times(report.seconds, output, as_json)
            return
        if report.streamed:
            LOG.info("streamed: one block in memory at a time")
    score(plan, output, tasks, team, anew,
          lambda facts: tables.show_result(facts | {"predictions": told}, output, as_json))


def agreed(plan: Recipe, output: Path) -> list[str]:
    """The tasks that a run will end in, told why where some will not be; an error before the work, not after it."""
    from llmopt_evals.large import obstacle
    from llmopt_evals.preflight import agreed_tasks, later

    named = any(change.startswith("eval.tasks=") for change in plan.changes)
    tasks, notes = agreed_tasks(plan.model, plan.eval, output, named)
    packed = plan.format != "dense" and any(step.stage == "quant" for step in plan.steps)
    if tasks and (fact := obstacle(plan.model, output, packed)):
        tasks, notes = [], [f"not scored: {fact}. Later: {later(plan.model, output, tasks)}"]
    for note in notes:
        LOG.warning(note)
    return tasks


def score(plan: Recipe, output: Path, tasks: list[str], team: Ranks, anew: bool, show: Callable[[dict], None]) -> None:
    """Score a finished checkpoint and show its table; cut off or failing, show what is known and say what to do."""
    facts, leave = {}, f"the checkpoint in {output} is finished"
    try:
        from llmopt_evals import preflight, report

        if tasks:
            leave += f". To score it: the same command with --resume, or {preflight.later(plan.model, output, tasks)}"
        facts = report.known(output, team)
        facts = report.scored(output, plan.model, replace(plan.eval, tasks=tasks), team, anew)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {leave}") from error
    except LlmoptError as error:
        raise LlmoptError(f"{error}; {leave}") from error
    finally:
        if facts:
            show(facts)
