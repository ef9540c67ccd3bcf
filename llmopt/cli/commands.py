"""The `llmopt` command.

Exit codes: 0 done, 2 bad input, 3 verification failed, 130 interrupted. torchrun makes 1 of all but 0.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmopt.cli import log
from llmopt.cli.interrupts import patient
from llmopt.cli.log import LOG
from llmopt.errors import LlmoptError, one_line
from llmopt.files.checks import panics
from llmopt.scale import launch
from llmopt.scale.gauge import whole_pages

if TYPE_CHECKING:
    from llmopt.recipe.reader import Recipe
    from llmopt.scale.processes import Ranks

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
TRUST = click.option("--trust-remote-code", is_flag=True, help="Let code of the model, or of task files, run.")
COUNT = click.IntRange(min=1)
ANEW = click.option("--anew", is_flag=True, help="Measure scores of dense models again that are kept from earlier.")


class HomePath(click.Path):
    """A path in which `~` stands for the user's home wherever it comes from; shells leave it in `--text=~/x`."""

    def convert(self, value, param, ctx):
        return super().convert(os.path.expanduser(value), param, ctx)


FILE = HomePath(path_type=Path)
SHARED = ("compress", "eval", "heads")         # whose work several processes divide; one alone does the rest


def model_options(command):
    """Options on loading a MODEL argument: the keys of a recipe's `model` section."""
    for option in (TRUST, click.option("--revision", help="Branch, tag or commit of a hub name."),
                   click.option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's."),
                   click.option("--compute-dtype", default="auto", show_default=True,
                                help="float32, bfloat16 or float16 to compute in; auto: what is fast here."),
                   click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")):
        command = option(command)
    return command


def check_target(file: Path | None) -> None:
    """Raise LlmoptError, before any work, for a result file that could not be written after it."""
    if file and (file.exists() and not file.is_file() or not file.absolute().parent.is_dir()):
        raise LlmoptError(f"{file}: " + ("is a folder" if file.is_dir() else "is a device, socket or FIFO, not a file"
                                         if file.exists() else "its folder does not exist"))


def join(device: str) -> Ranks:
    """The processes of this run; raises LlmoptError for a device that all of them would take."""
    if launch.count() > 1 and device.startswith("cuda:"):
        raise LlmoptError(f"{device}: several processes take one GPU each; give cuda")
    from llmopt.scale import processes

    return processes.join(device)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmopt")
@log.verbosity
@click.pass_context
def cli(context) -> None:
    """Compress Hugging Face language models from one recipe."""
    if launch.started_alone():
        click.echo("accelerate launch has started one process; for several: torchrun --nproc-per-node N -m llmopt ...",
                   err=True)
    if context.invoked_subcommand not in SHARED and not launch.is_main():
        context.exit()


@cli.command()
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
        from llmopt_evals.preflight import agreed_tasks

        tasks, notes = agreed_tasks(plan, output)    # an error before the work, not after it
        for note in notes:
            LOG.warning(note)
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


def score(plan: Recipe, output: Path, tasks: list[str], team: Ranks, anew: bool, show: Callable[[dict], None]) -> None:
    """Score a finished checkpoint and show its table; cut off or failing, show what is known and say what to do."""

    facts, leave = {}, f"the checkpoint in {output} is finished"
    try:
        from llmopt_evals import preflight, report

        if tasks:
            leave += f". To score it: the same command with --resume, or {preflight.later(plan, output, tasks)}"
        facts = report.known(output, team)
        facts = report.scored(output, facts, plan, tasks, LOG.info, team, anew)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {leave}") from error
    except LlmoptError as error:
        raise LlmoptError(f"{error}; {leave}") from error
    finally:
        if facts:
            show(facts)


@cli.command("eval")
@log.verbosity
@click.argument("model")
@click.option("--tasks", required=True, help="Task names, separated by commas; every name lm-eval knows.")
@click.option("--compare", help="A second model, scored beside the first.")
@click.option("--limit", type=COUNT, help="Only the first N documents of each task.")
@click.option("--batch-size", type=COUNT, default=16, show_default=True)
@click.option("--text", help="The file that the task text_ppl reads.")
@click.option("--output", type=FILE, help="Also write lm-eval's results to this JSON file.")
@ANEW
@model_options
@JSON
def evaluate(model, tasks, compare, limit, batch_size, text, output, anew, as_json, **loading) -> None:
    """Score a model with lm-eval, its cache methods really in force."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt_evals import evaluate as scores
    from llmopt_evals import kept as dense
    from llmopt_evals.preflight import check_tasks

    from llmopt.model.loading import check_device
    from llmopt.specs import ModelSpec

    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    if not chosen:
        raise LlmoptError("--tasks names no task")
    check_target(output)
    models = [ModelSpec(id=model, **loading)]
    if compare is not None:
        models.append(ModelSpec(id=compare, **loading | {"revision": None}))
    check_device(loading["device"])
    check_tasks(models, chosen, text)                # before the first is scored
    columns, kept, team = {}, {}, join(loading["device"])
    for spec in models:
        LOG.info("scoring %s", spec.id)
        results, kept[spec.id] = dense.scores(spec, chosen, limit, batch_size, text, team, anew)
        if not team.is_main:
            continue
        columns[spec.id] = {(task, metric): value for task, metric, value in scores.figures(results)}
        if output and spec is models[0]:
            scores.write_results(results, output, model)
    tables.show_scores(columns, as_json, kept)


@cli.command()
@log.verbosity
@click.argument("model")
@click.option("--method", default="heads.span", show_default=True, help="A heads.* method.")
@click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE", help="A field of the method; repeatable.")
@click.option("--output", type=FILE, help="Write the scores to this JSON file.")
@click.option("--plot", type=FILE, help="Write a heat map to this .png, .pdf or .svg file.")
@click.option("--data", "data_path", help="Calibration text; default: the embedded world.")
@click.option("--samples", type=COUNT, default=64, show_default=True)
@click.option("--length", type=COUNT, help="Tokens of a sample; default: 512, or the model's maximum.")
@click.option("--batch-size", type=COUNT, default=8, show_default=True)
@model_options
@JSON
def heads(model, method, sets, output, plot, data_path, samples, length, batch_size, as_json, **loading) -> None:
    """Score every attention head of a model."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    import llmopt
    from llmopt.calibration.head_scores import save_scores
    from llmopt.errors import nearest
    from llmopt.heads.base import plot as draw
    from llmopt.parts import build
    from llmopt.recipe.reader import Recipe, values
    from llmopt.run.pipeline import score_heads
    from llmopt.specs import DataSpec, ModelSpec

    step = build(method, values(sets))
    if step.stage != "score":
        raise LlmoptError(f"{method} is not a head score"
                          f"{nearest(method, [n for n in llmopt.names() if n.startswith('heads.')])}")
    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise LlmoptError(f"{plot}: a plot is a .png, .pdf or .svg file")
    for target in (output, plot):
        check_target(target)
    data = DataSpec(name="text" if data_path else "world", path=data_path, samples=samples, length=length,
                    batch_size=batch_size)
    with log.progress() as progress:
        team = join(loading["device"])
        scores, meta = score_heads(Recipe(ModelSpec(id=model, **loading), data, (step,)), progress, team)
    if output and team.is_main:
        save_scores(output, step.name, scores, meta)
    if plot and team.is_main:
        draw(scores, plot)
    tables.show_heads({step.name: scores} | {key: meta[key] for key in step.beside}, as_json)


@cli.command()
@click.argument("folder", type=FILE)
@JSON
def show(folder, as_json) -> None:
    """What is inside a checkpoint: shapes, bits, budgets, sizes, provenance, how it can be loaded."""
    from llmopt.checkpoint.facts import read_facts, read_layers
    from llmopt.cli import tables

    tables.show_folder(read_facts(folder), read_layers(folder), as_json)


@cli.command()
@click.argument("name", required=False)
@JSON
def methods(name, as_json) -> None:
    """Every registered method, or one with its fields, defaults and source."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    import llmopt

    tables.show_methods([llmopt.get(name)] if name else [llmopt.get(n) for n in llmopt.names()], bool(name), as_json)


@cli.command()
def schema() -> None:
    """The JSON Schema of a recipe, for editors: yaml-language-server checks and completes with it."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt.recipe.schema import recipe_schema

    tables.print_json(recipe_schema())


@cli.command()
@click.argument("folder", type=HomePath(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True)
def push(folder, repo, private) -> None:
    """Upload a checkpoint to a repository of the Hugging Face hub."""
    from llmopt.checkpoint.card import card_for
    from llmopt.cli.tables import quiet_libraries
    from llmopt.files.checks import check_folder
    from llmopt.files.hub import upload

    quiet_libraries()
    check_folder(folder)
    click.echo(upload(folder, repo, private, card_for(folder, repo)))


@cli.group()
def bench() -> None:
    """Measure llmopt itself: the figures of the README, each with the command that gives it."""


@bench.command()
@log.verbosity
@click.option("--shape", default="qwen3-0.6b", show_default=True, help="Whose memory: qwen3-0.6b, llama-1b, llama-7b.")
@click.option("--blocks", default="4,8,16,32", show_default=True, help="How many of them, one run each.")
@click.option("--recipe", "recipe_name", help="Recipe of these runs; default: quant.rtn at 4 bits.")
@click.option("--solve", default="llama-1b", show_default=True, help="Shape on which one and two processes run GPTQ.")
@click.option("--quick", is_flag=True, help="Two small runs instead of four, and less calibration data.")
@JSON
def scale(shape, blocks, recipe_name, solve, quick, as_json) -> None:
    """Memory, time and the journal's cost against the number of blocks; two processes against one."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt_evals.bench.scale import QUICK, Plan, measure

    from llmopt.recipe.reader import values

    counts = values([f"blocks=[{blocks}]"])["blocks"]
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise LlmoptError(f"--blocks: {blocks!r} given, numbers such as 4,8,16,32 expected")
    with log.progress() as progress:
        found = measure(QUICK if quick else Plan(shape, tuple(counts), recipe_name, solve), progress)
    tables.show_scale(found, as_json)


def main() -> None:
    """Entry point: one line for everything the user can mend, and the exit codes of the module's docstring."""
    with patient():
        code = _ended()
    sys.exit(code if isinstance(code, int) else 0)


def _ended() -> int | None:
    """The exit code of the command, its errors told."""
    if launch.count() == 1:              # two processes, waiting for each other's pages, are a tenth slower by it
        whole_pages()
    try:
        with launch.one_voice(), log.talking(launch.is_main()), panics():
            code = cli.main(prog_name="llmopt", standalone_mode=False)
    except click.exceptions.Exit as leave:
        code = leave.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        told = str(error.__cause__ or error)          # click puts an Abort around it
        click.echo(told or "interrupted; nothing half-written was left", err=True)
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        code = 2
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except launch.Lost as error:
        click.echo(f"error: {error}", err=True)
        code = 1
    except OSError as error:             # no permission, a disk in trouble: a fact about the machine
        click.echo(f"error: {error.filename or 'input/output'}: {error.strerror or error}", err=True)
        code = 2
    except (MemoryError, RecursionError) as error:
        fact = "a file is nested too deeply" if isinstance(error, RecursionError) else str(error) or "out of memory"
        click.echo(f"error: {fact}", err=True)
        code = 2
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):        # torch has no type for it
            raise
        click.echo(f"error: {one_line(f'out of memory: {error}')[:300]}", err=True)
        code = 2
    return code
