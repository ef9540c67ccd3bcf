"""`llmopt push`: a checkpoint to the Hugging Face hub."""
from pathlib import Path

import click

from llmopt.cli.options import HomePath


@click.command()
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
