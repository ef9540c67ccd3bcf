"""`llmopt export`: a checkpoint in the layout of other tools."""
from pathlib import Path

import click

from llmopt.cli.help import Command
from llmopt.cli.options import FILE, JSON, HomePath


@click.command(cls=Command, examples=("llmopt export out served --format nemotron-nas",))
@click.argument("folder", type=HomePath(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=FILE)
@click.option("--format", "layout", type=click.Choice(["nemotron-nas"]), required=True,
              help="nemotron-nas: per-layer widths and heads, for vLLM and SGLang.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@JSON
def export(folder, output, layout, max_shard_size, as_json) -> None:        # noqa: ARG001  there is one layout so far
    """Write the checkpoint in FOLDER anew to OUTPUT, in a layout that servers read."""
    from llmopt.cli.tables import human, print_json, quiet_libraries

    quiet_libraries()
    from llmopt.checkpoint import nemotron_nas

    done = nemotron_nas.export(folder, output, max_shard_size)
    if as_json:
        print_json(done)
        return
    click.echo(f"{done['folder']}: {done['layers']} layers, {human(done['bytes'])}; "
               f"vllm serve {done['folder']} --trust-remote-code")
    if done["filled_layers"]:
        click.echo(f"layers {', '.join(map(str, done['filled_layers']))} have been filled up with heads of zeros")
    if not done["widths_for_all"]:
        click.echo("some widths are no multiples of 256: vLLM reads them, SGLang and llama.cpp do not")
    if done["left_out"]:
        click.echo(f"left out, as only llmopt runs them: {', '.join(done['left_out'])}")
