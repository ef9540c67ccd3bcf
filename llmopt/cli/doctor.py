"""`llmopt doctor`: whether this machine is fit for llmopt."""
import click

from llmopt.cli.help import Command
from llmopt.cli.options import JSON


@click.command(cls=Command, examples=("llmopt doctor", "llmopt doctor --json"))
@JSON
def doctor(as_json) -> None:
    """Look at Python, processor, memory, devices, packages and folders; exit code 2 if something is in the way."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt.cli.machine import examined

    found = examined()
    tables.show_findings(found, as_json)
    if any(finding.level == "problem" for finding in found):
        raise click.exceptions.Exit(2)
