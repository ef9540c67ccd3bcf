"""`llmopt eval`: one or two models scored with lm-eval."""
import click

from llmopt.cli import completion, log
from llmopt.cli.log import LOG
from llmopt.cli.options import ANEW, COUNT, FILE, JSON, check_target, join, model_options
from llmopt.errors import LlmoptError


@click.command("eval")
@log.verbosity
@click.argument("model", shell_complete=completion.models)
@click.option("--tasks", required=True, help="Task names, separated by commas; every name lm-eval knows.",
              shell_complete=completion.tasks)
@click.option("--compare", help="A second model, scored beside the first.", shell_complete=completion.models)
@click.option("--limit", type=COUNT, help="Only the first N documents of each task.")
@click.option("--batch-size", type=COUNT, default=16, show_default=True)
@click.option("--text", help="The file that the task text_ppl reads.")
@click.option("--data", help="What fidelity compares on: a file, a source's name, a dataset; default: the "
                             "calibration's.")
@click.option("--output", type=FILE, help="Also write lm-eval's results to this JSON file.")
@ANEW
@model_options
@JSON
def evaluate(model, tasks, compare, limit, batch_size, text, data, output, anew, as_json, **loading) -> None:
    """Score a model with lm-eval, its cache methods really in force."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt_evals import evaluate as scores
    from llmopt_evals import kept as dense
    from llmopt_evals import pairs
    from llmopt_evals.preflight import check_tasks

    from llmopt.model.loading import check_device
    from llmopt.specs import EvalSpec, ModelSpec

    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    if not chosen:
        raise LlmoptError("--tasks names no task")
    check_target(output)
    models = [ModelSpec(id=model, **loading)]
    if compare is not None:
        models.append(ModelSpec(id=compare, **loading | {"revision": None}))
    check_device(loading["device"])
    pair = pairs.asked_for(chosen, models, data)     # as this: before the first is scored
    tasks = [task for task in chosen if task != pairs.NAME]
    check_tasks(models, tasks, text)
    columns, kept, team = {}, {}, join(loading["device"])
    compared = pairs.by_name(pair, EvalSpec(limit=limit, batch_size=batch_size), team)
    for spec in models:
        results = None
        if tasks:
            LOG.info("scoring %s", spec.id)
            results, kept[spec.id] = dense.scores(spec, tasks, limit, batch_size, text, team, anew)
        if not team.is_main:
            continue
        results = pairs.joined(results, compared.pop(spec.id, None))
        columns[spec.id] = scores.column(results)
        if output and spec is models[0]:
            scores.write_results(results, output, model)
    columns |= {name: scores.column(results) for name, results in compared.items()}
    tables.show_scores(columns, as_json, kept)
