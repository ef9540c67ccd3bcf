"""`llmopt push` and `llmopt pull`: checkpoints to and from the Hugging Face hub."""
from pathlib import Path

import click

from llmopt.cli.help import Command
from llmopt.cli.options import FILE, JSON, HomePath


@click.command(cls=Command, examples=("llmopt push out USER/REPO --private", "llmopt push out USER/REPO --json"))
@click.argument("folder", type=HomePath(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a repository that is not there yet a private one.")
@JSON
def push(folder, repo, private, as_json) -> None:
    """Upload a checkpoint that llmopt has written to a repository of the Hugging Face hub."""
    from llmopt.cli.tables import print_json, quiet_libraries

    quiet_libraries()
    from llmopt.checkpoint import exchange

    page = exchange.push(folder, repo, private)
    if as_json:
        print_json({"page": page})
    else:
        click.echo(page)


@click.command(cls=Command, examples=("llmopt pull USER/REPO", "llmopt pull USER/REPO copy --revision main"))
@click.argument("repo")
@click.argument("folder", type=FILE, required=False)
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint of llmopt in FOLDER.")
@JSON
def pull(repo, folder, revision, overwrite, as_json) -> None:
    """Download a model of the Hugging Face hub into FOLDER, by default the last part of its name.

    Cut off, the same command goes on with what has arrived.
    """
    from llmopt.cli.tables import human, print_json, quiet_libraries

    quiet_libraries(downloads=True)
    from llmopt.checkpoint import exchange

    place, commit = exchange.pull(repo, folder or Path(repo.rstrip("/").rpartition("/")[2]), revision, overwrite)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    if as_json:
        print_json({"folder": str(place), "commit": commit, "bytes": size})
    else:
        click.echo(f"{repo} at {commit}: {human(size)} of weights in {place}")
