"""`llmopt bench`: what the figures of the README are measured with."""
import click

from llmopt.cli import log
from llmopt.cli.help import Group
from llmopt.cli.options import JSON
from llmopt.errors import LlmoptError


@click.group(cls=Group, examples=("llmopt bench scale --quick",))
def bench() -> None:
    """Measure llmopt itself: the figures of the README, each with the command that gives it."""


@bench.command(examples=("llmopt bench scale --quick",
                         "llmopt bench scale --shape llama-1b --blocks 4,8"))
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

    from llmopt.recipe.assign import values

    counts = values([f"blocks=[{blocks}]"])["blocks"]
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise LlmoptError(f"--blocks: {blocks!r} given, numbers such as 4,8,16,32 expected")
    with log.progress() as progress:
        found = measure(QUICK if quick else Plan(shape, tuple(counts), recipe_name, solve), progress)
    tables.show_scale(found, as_json)
