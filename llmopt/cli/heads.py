"""`llmopt heads`: the importance of every attention head of a model."""
import click

from llmopt.cli import completion, log
from llmopt.cli.help import Command
from llmopt.cli.options import COUNT, DATA, FILE, JSON, MODEL_GROUP, check_target, join, model_options
from llmopt.errors import LlmoptError, one_line

GROUPS = {"Scores": ("methods", "sets", "correlate"), "Calibration data": ("data", "samples", "length", "batch_size"),
          "Masking heads": ("ablate", "how", "draws", "tasks", "limit", "text"), "Model": MODEL_GROUP,
          "Output": ("output", "plot", "as_json")}
EXAMPLES = ("llmopt heads llmopt/reference --samples 8",
            "llmopt heads llmopt/reference --method heads.gradient --samples 8 --output h.json --plot h.png",
            "llmopt heads llmopt/reference --method heads.span --method heads.gradient --samples 8 --correlate",
            "llmopt heads llmopt/reference --samples 8 --ablate 0.1 --tasks world_copy --limit 2 --draws 1")
FILES = (".json", ".safetensors")       # of scores


@click.command(cls=Command, groups=GROUPS, examples=EXAMPLES)
@log.verbosity
@click.argument("model", shell_complete=completion.models)
@click.option("--method", "methods", multiple=True, default=["heads.span"], show_default=True,
              help="A heads.* method, or a file of scores; repeatable.", shell_complete=completion.head_scores)
@click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE",
              help="A field, of each method that has it; repeatable.")
@click.option("--correlate", is_flag=True, help="Print the rank correlations of the scores, not the scores.")
@click.option("--ablate", type=click.FloatRange(min=0, min_open=True), metavar="K",
              help="Mask the top, the bottom and random K heads, or a share K below 1, and measure what it costs.")
@click.option("--how", type=click.Choice(["zero", "mean", "uniform"]), default="uniform", show_default=True,
              help="A masked head says nothing, its mean, or attends evenly.")
@click.option("--draws", type=click.IntRange(min=0), default=20, show_default=True, help="Of random heads.")
@click.option("--tasks", help="What is measured; default: recall and perplexity.", shell_complete=completion.tasks)
@click.option("--limit", type=COUNT, help="Only the first N documents of each task.")
@click.option("--text", help="The file that needles and text_ppl read.")
@click.option("--output", type=FILE, help="Write the scores to this .json or .safetensors file.")
@click.option("--plot", type=FILE, help="Write a heat map to this .png, .pdf or .svg file.")
@DATA
@click.option("--samples", type=COUNT, default=64, show_default=True)
@click.option("--length", type=COUNT, help="Tokens of a sample; default: 512, or the model's maximum.")
@click.option("--batch-size", type=COUNT, default=8, show_default=True)
@model_options
@JSON
def heads(model, methods, sets, correlate, ablate, how, draws, tasks, limit, text, output, plot, data, samples, length,
          batch_size, as_json, **loading) -> None:
    """Score every attention head of a model."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt.calibration.head_scores import load_scores, save_scores
    from llmopt.heads.base import plot as draw
    from llmopt.recipe.sources import source
    from llmopt.run.pipeline import score_heads
    from llmopt.specs import DataSpec, ModelSpec

    steps, files = steps_of(methods, sets), [name for name in methods if name.endswith(FILES)]
    check_wanted([*files, *steps], correlate, ablate, output, plot)
    if ablate is not None and tasks:
        check_tasks(tasks.split(","), loading["trust_remote_code"])
    given = {name: load_scores(name) for name in files}
    rows = DataSpec(**(source(data) if data is not None else {}), samples=samples, length=length,
                    batch_size=batch_size)
    with log.progress() as progress:
        team = join(loading["device"])
        mean = ablate is not None and how == "mean"
        spec = ModelSpec(id=model, **loading)
        loaded, run, records = score_heads(spec, steps, rows, progress, team, calibrated=mean)
        scores = given | {step.name: run.scores[step.name] for step in steps}
        if ablate is not None:
            columns = costs(loaded, run, scores, ablate, how, (tasks, limit, text, draws), loading["trust_remote_code"])
    if output and team.is_main:
        save_scores(output, steps[0].name, scores[steps[0].name], records[0].meta)
    if plot and team.is_main:
        draw(scores[steps[0].name], plot, f"{steps[0].name} of {one_line(model)}", steps[0].unit or steps[0].name)
    if correlate:
        tables.show_correlations(scores, as_json)
    elif ablate is not None:
        tables.show_ablated(columns, how, as_json)
    else:
        beside = {key if len(steps) == 1 else f"{step.name} {key}": record.meta[key]
                  for step, record in zip(steps, records, strict=True) for key in step.beside}
        tables.show_heads(scores | beside, as_json)


def steps_of(methods, sets):
    """The head scores of these names, each with those of the fields that it has; files are left out."""
    import llmopt
    from llmopt.errors import nearest
    from llmopt.parts import build, fields_of, get
    from llmopt.recipe.assign import values

    names, fields = [name for name in dict.fromkeys(methods) if not name.endswith(FILES)], values(sets)
    homeless = {key for key in fields if not any(key in fields_of(get(name)) for name in names)}
    made = [build(name, {key: value for key, value in fields.items() if key in homeless or key in fields_of(get(name))})
            for name in names]
    for step in made:
        if step.stage != "score":
            raise LlmoptError(f"{step.name} is not a head score"
                              f"{nearest(step.name, [n for n in llmopt.names() if n.startswith('heads.')])}")
    return made


def check_wanted(methods, correlate, ablate, output, plot) -> None:
    """Raise LlmoptError, before any work, for options that do not go together."""
    if correlate and len(methods) < 2:
        raise LlmoptError("--correlate compares scores: give --method at least twice")
    if correlate and ablate is not None:
        raise LlmoptError("--correlate and --ablate: one at a time")
    if (output or plot) and (len(methods) > 1 or isinstance(methods[0], str)):
        raise LlmoptError("--output and --plot take the scores of one --method that is measured now")
    for target in (output, plot):
        check_target(target)
    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise LlmoptError(f"{plot}: a plot is a .png, .pdf or .svg file")
    if output and output.suffix not in FILES:
        raise LlmoptError(f"{output}: scores are written to a .json or .safetensors file")


def check_tasks(tasks, trust):
    """Raise LlmoptError for a task that does not exist, or may not run its code, before the heads are scored."""
    from llmopt_evals.evaluate import check_names

    check_names(tasks, trust)


def costs(model, run, scores, ablate, how, asked, trust):
    """What masking the heads of each score costs, as llmopt_evals.ablate gives it."""
    from llmopt_evals import ablate as ablation

    from llmopt.calibration.head_scores import check_scores
    from llmopt.heads.masking import mean_outputs
    from llmopt.model.blocks import blocks

    tasks, limit, text, draws = asked
    for values in scores.values():
        check_scores(values, [block.heads for block in blocks(model)])
    count = ablation.heads_of(ablate, next(iter(scores.values())))
    named = tasks.split(",") if tasks else ablation.usual_tasks(run.tokenizer, text)
    wanted = ablation.Asked(tuple(named), limit, text, draws, trust=trust)
    means = mean_outputs(model, run) if how == "mean" else None
    return ablation.costs(model, run.tokenizer, scores, count, how, wanted, means, run.progress)
