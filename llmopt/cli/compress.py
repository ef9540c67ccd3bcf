"""`llmopt compress`: a recipe applied to a model, written, verified and scored."""
from __future__ import annotations

from pathlib import Path

import click

from llmopt.cli import completion, log
from llmopt.cli.help import Command
from llmopt.cli.options import ANEW, COUNT, DATA, FILE, JSON, TRUST, WAYS, join, ways
from llmopt.cli.plans import check_words, one_model, plan_of
from llmopt.errors import LlmoptError
from llmopt.scale import launch

EXAMPLES = ("llmopt compress MODEL --scheme W4A16 --output out",
            "llmopt compress MODEL --bits 3.5 --output out           # on average over the blocks",
            "llmopt compress MODEL --scheme W4A16 --method snapkv --set ratio=0.5 --output out",
            "llmopt compress --recipe quickstart --output out        # all families on the embedded model",
            "llmopt compress MODEL --scheme W4A16 --dry-run          # size, memory and time beforehand")
GROUPS = {"What to do": ("scheme", "bits", "method", "group_size", "recipe_name", "sets"),
          "Model": ("model_option", "dtype", "device", "revision", *WAYS, "trust_remote_code"),
          "Calibration data": ("data", "samples", "length", "seed"),
          "The run": ("output", "dry_run", "overwrite", "resume", "no_eval", "anew", "stream", "activation_memory",
                      "max_blocks")}


@click.command(cls=Command, groups=GROUPS, examples=EXAMPLES)
@log.verbosity
@click.argument("models", metavar="[MODEL]", nargs=-1, shell_complete=completion.models)
@click.option("--scheme", shell_complete=completion.schemes,
              help="W2A16 ... W8A16, W8A8, FP8, NVFP4, MXFP4, ...: `llmopt methods quant.gptq` lists them.")
@click.option("--bits", type=float, help="2 to 8; a fraction such as 3.5 is an average over the blocks.")
@click.option("--method", multiple=True, shell_complete=completion.methods,
              help="quant.rtn, kv.snapkv, ..., or the last word of it; repeatable.  [default: quant.gptq]")
@click.option("--group-size", type=int, help="Inputs that share a scale.  [default: 128, or what fits the model]")
@click.option("--recipe", "recipe_name", help="A recipe file, or the name of a packaged one.",
              shell_complete=completion.recipes)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE",
              help="Set any key of the recipe, such as bits=3, steps.gptq.bits=3 or data.samples=64; repeatable.")
@click.option("--model", "model_option", help="Another way to say MODEL; with --recipe it replaces the recipe's.")
@click.option("--dtype", help="Load the model as fp32, bf16 or fp16.  [default: the checkpoint's]")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cpu]")
@click.option("--revision", help="Branch, tag or commit of a hub name.")
@ways
@TRUST
@DATA
@click.option("--samples", type=COUNT, help="Rows of data.  [default: 128]")
@click.option("--length", type=COUNT, help="Tokens of a row.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the data, and of every random draw.  [default: 0]")
@click.option("--output", type=FILE, help="Folder for the compressed checkpoint.")
@click.option("--dry-run", is_flag=True, help="Plan, size, memory and time; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint at --output.")
@click.option("--resume", is_flag=True, help="Go on with a run of the same recipe that was cut off.")
@click.option("--no-eval", is_flag=True, help="Do not score the dense and the compressed model.")
@click.option("--stream/--no-stream", default=None, help="One block in memory at a time; default: if needed.")
@click.option("--activation-memory", default="2GiB", show_default=True, help="Activations beyond it go to disk.")
@click.option("--max-blocks", type=COUNT, help="Stream the first N blocks only, to measure; the output is no model.")
@ANEW
@JSON
def compress(models, model_option, recipe_name, sets, output, dry_run, overwrite, resume, no_eval, stream,
             activation_memory, max_blocks, anew, trust_remote_code, as_json, **words) -> None:
    """Compress MODEL (a folder, a hub name or llmopt/reference), write the checkpoint, verify it, score it.

    What to do is said in words, such as --scheme W4A16, or by a recipe.
    """
    model = one_model((*models, *((model_option,) if model_option is not None else ())))
    check_words(model, recipe_name, words)
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt_evals import run

    from llmopt.files.shards import size_of
    from llmopt.run.dry_run import dry_run as rehearsed
    from llmopt.run.opening import Streaming

    streaming = Streaming(stream, size_of(activation_memory), max_blocks)
    plan = plan_of(model, recipe_name, sets, trust_remote_code, words)
    if output is None and not dry_run:
        raise LlmoptError("--output FOLDER is needed (or --dry-run)")
    options = run.Options(overwrite, resume, not no_eval, anew, streaming)
    tasks = run.tasks_of(plan, output or Path("OUTPUT"), options)
    if dry_run:
        if launch.is_main():
            tables.show_plan(rehearsed(plan, streaming), as_json)
        return
    team = join(plan.model.device)
    with log.progress() as progress:
        report = run.checkpoint(plan, output, options, progress, team)
    log.told()
    if max_blocks:
        tables.show_times(report.seconds, output, as_json)
        return
    run.score(plan, output, tasks, options, team, lambda facts: tables.show_result(
        facts | {"predictions": report.predictions()}, output, as_json))
