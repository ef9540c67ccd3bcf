"""The `llmopt` command.

Exit codes: 0 done, 2 bad input, 3 verification failed, 130 interrupted.
"""
import json
import sys
from pathlib import Path

import click

from llmopt.method import LlmoptError

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
TRUST = click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the model to run.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmopt")
def cli() -> None:
    """Compress Hugging Face language models from one recipe."""


@cli.command()
@click.option("--recipe", "recipe_name", required=True, help="A recipe file, or the name of a packaged one.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the compressed checkpoint.")
@click.option("--model", help="Folder or hub name; replaces the recipe's model.id.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override, such as steps.1.bits=3; repeatable.")
@click.option("--dry-run", is_flag=True, help="Print every step's plan and the predicted sizes; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint at --output.")
@click.option("--resume", is_flag=True, help="Finish what is missing of an earlier run of the same recipe.")
@click.option("--no-eval", is_flag=True, help="Skip the recipe's evaluation.")
@TRUST
@JSON
def compress(recipe_name, output, model, sets, dry_run, overwrite, resume, no_eval, trust_remote_code, as_json) -> None:
    """Apply a recipe to a model, write the checkpoint, verify it, score it."""
    from llmopt import terminal

    terminal.quiet_libraries()
    import llmopt  # noqa: F401  fills the registry, before the recipe is read
    from llmopt import pipeline, recipe

    plan = recipe.load(recipe_name, sets, model)
    if dry_run:
        from llmopt.predict import dry_run as predict

        terminal.show_plan(predict(plan, trust_remote_code), as_json)
        return
    if output is None:
        raise LlmoptError("--output FOLDER is needed (or --dry-run)")
    tasks = [] if no_eval else plan.eval.tasks
    if tasks:
        from llmopt_evals.evaluate import task_manager

        task_manager(tasks)                          # an unknown task is an error before the work, not after it
    if not (resume and pipeline.is_finished(output, plan)):
        with terminal.progress() as progress:
            pipeline.run(plan, output, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress)
    from llmopt_evals.report import complete

    terminal.show_result(complete(output, plan, tasks, terminal.say), output, as_json)


@cli.command("eval")
@click.argument("model")
@click.option("--tasks", required=True, help="Task names, separated by commas; every name lm-eval knows.")
@click.option("--compare", help="A second model, scored beside the first.")
@click.option("--limit", type=int, help="Only the first N documents of each task.")
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Also write lm-eval's results to this JSON file.")
@DEVICE
@TRUST
@JSON
def evaluate(model, tasks, compare, limit, batch_size, output, device, trust_remote_code, as_json) -> None:
    """Score a model with lm-eval, its cache methods really in force."""
    from llmopt import terminal

    terminal.quiet_libraries()
    from llmopt_evals import evaluate as scores

    from llmopt.loading import resolve

    columns = {}
    for name in [m for m in (model, compare) if m]:
        terminal.say(f"scoring {name}")
        results = scores.evaluate(resolve(name), tasks.split(","), None, limit, batch_size, device,
                                  trust_remote_code=trust_remote_code)
        columns[name] = {(task, metric): value for task, metric, value in scores.figures(results)}
        if output and name == model:
            scores.write_results(results, output)
    terminal.show_scores(columns, as_json)


@cli.command()
@click.argument("model")
@click.option("--method", default="heads.span", show_default=True, help="A heads.* method.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the scores to this JSON file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a heat map to this PNG file.")
@click.option("--data", "data_path", help="Calibration text; default: the embedded world.")
@click.option("--samples", type=int, default=64, show_default=True)
@JSON
def heads(model, method, output, plot, data_path, samples, as_json) -> None:
    """Score every attention head of a model."""
    from llmopt import terminal

    terminal.quiet_libraries()
    import llmopt
    from llmopt import data
    from llmopt.heads.base import plot as draw
    from llmopt.heads.base import save_scores
    from llmopt.loading import load_dense
    from llmopt.method import Run, build
    from llmopt.recipe import DataSpec, ModelSpec

    step = build(method, {})
    if step.stage != "score":
        raise LlmoptError(f"{method} is not a head score; choose one of "
                          + ", ".join(n for n in llmopt.names() if n.startswith("heads.")))
    spec = DataSpec(name="text" if data_path else "world", path=data_path, samples=samples)
    network, tokenizer = load_dense(ModelSpec(id=model))
    with terminal.progress() as progress:
        run = Run(batches=data.load(spec, network.config, tokenizer), progress=progress)
        record = step.apply(network, run)
    if output:
        save_scores(output, step.name, run.scores[step.name], record.meta)
    if plot:
        draw(run.scores[step.name], plot)
    terminal.show_heads(step.name, run.scores[step.name], as_json)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@JSON
def show(folder, as_json) -> None:
    """What is inside a checkpoint: shapes, bits, budgets, sizes, provenance, how it can be loaded."""
    from llmopt import terminal

    facts = folder / "llmopt.json"
    if not facts.is_file():
        raise LlmoptError(f"{folder}: no llmopt.json; this is not a checkpoint written by llmopt")
    terminal.show_folder(json.loads(facts.read_text()), json.loads((folder / "config.json").read_text()), as_json)


@cli.command()
@click.argument("name", required=False)
@JSON
def methods(name, as_json) -> None:
    """Every registered method, or one with its fields, defaults and source."""
    from llmopt import terminal

    terminal.quiet_libraries()
    import llmopt

    terminal.show_methods([llmopt.get(name)] if name else [llmopt.get(n) for n in llmopt.names()], bool(name), as_json)


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True)
def push(folder, repo, private) -> None:
    """Upload a checkpoint to a repository of the Hugging Face hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from llmopt.loading import check_folder

    check_folder(folder)
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LlmoptError(f"{repo}: {str(error).splitlines()[0]}") from error
    click.echo(f"https://huggingface.co/{repo}")


def main() -> None:
    """Entry point: one line for everything the user can mend, and the exit codes of the module's docstring."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as leave:
        code = leave.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing half-written was left", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        code = 3 if type(error).__name__ == "VerificationError" else 2
    sys.exit(code if isinstance(code, int) else 0)
