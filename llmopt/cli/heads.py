"""`llmopt heads`: the importance of every attention head of a model."""
import click

from llmopt.cli import completion, log
from llmopt.cli.help import Command
from llmopt.cli.options import COUNT, DATA, FILE, JSON, MODEL_GROUP, check_target, join, model_options
from llmopt.errors import LlmoptError, one_line

GROUPS = {"Scores": ("method", "sets"), "Calibration data": ("data", "samples", "length", "batch_size"),
          "Model": MODEL_GROUP, "Output": ("output", "plot", "as_json")}
EXAMPLES = ("llmopt heads llmopt/reference --samples 8",
            "llmopt heads llmopt/reference --method heads.gradient --samples 8 --output h.json --plot h.png")


@click.command(cls=Command, groups=GROUPS, examples=EXAMPLES)
@log.verbosity
@click.argument("model", shell_complete=completion.models)
@click.option("--method", default="heads.span", show_default=True, help="A heads.* method.",
              shell_complete=completion.head_scores)
@click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE", help="A field of the method; repeatable.")
@click.option("--output", type=FILE, help="Write the scores to this JSON file.")
@click.option("--plot", type=FILE, help="Write a heat map to this .png, .pdf or .svg file.")
@DATA
@click.option("--samples", type=COUNT, default=64, show_default=True)
@click.option("--length", type=COUNT, help="Tokens of a sample; default: 512, or the model's maximum.")
@click.option("--batch-size", type=COUNT, default=8, show_default=True)
@model_options
@JSON
def heads(model, method, sets, output, plot, data, samples, length, batch_size, as_json, **loading) -> None:
    """Score every attention head of a model."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    import llmopt
    from llmopt.calibration.head_scores import save_scores
    from llmopt.errors import nearest
    from llmopt.heads.base import plot as draw
    from llmopt.parts import build
    from llmopt.recipe.assign import values
    from llmopt.recipe.sources import source
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
    rows = DataSpec(**(source(data) if data is not None else {}), samples=samples, length=length,
                    batch_size=batch_size)
    with log.progress() as progress:
        team = join(loading["device"])
        scores, meta = score_heads(ModelSpec(id=model, **loading), step, rows, progress, team)
    if output and team.is_main:
        save_scores(output, step.name, scores, meta)
    if plot and team.is_main:
        draw(scores, plot, f"{step.name} of {one_line(model)}", step.unit or step.name)
    tables.show_heads({step.name: scores} | {key: meta[key] for key in step.beside}, as_json)
