"""The `llmopt` command.

Exit codes: 0 done, 2 bad input, 3 verification failed, 130 interrupted. torchrun makes 1 of all but 0.
"""
import sys

import click

from llmopt.cli import log
from llmopt.cli.bench import bench
from llmopt.cli.compress import compress
from llmopt.cli.doctor import doctor
from llmopt.cli.evaluate import evaluate
from llmopt.cli.export import export
from llmopt.cli.heads import heads
from llmopt.cli.help import Group
from llmopt.cli.interrupts import patient
from llmopt.cli.push import pull, push
from llmopt.cli.show import methods, schema, show
from llmopt.errors import LlmoptError, one_line
from llmopt.files.checks import panics
from llmopt.scale import launch
from llmopt.scale.gauge import whole_pages

SHARED = ("compress", "eval", "heads")         # whose work several processes divide; one alone does the rest


EXAMPLES = ("llmopt show llmopt/reference                      # what is inside a model, and what can be done to it",
            "llmopt methods                                    # what there is",
            "llmopt compress --recipe quickstart --dry-run     # size, memory and time beforehand; writes nothing")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, examples=EXAMPLES)
@click.version_option(package_name="llmopt")
@log.verbosity
@click.pass_context
def cli(context) -> None:
    """Compress Hugging Face language models from one recipe."""
    if launch.started_alone():
        click.echo("accelerate launch has started one process; for several: torchrun --nproc-per-node N -m llmopt ...",
                   err=True)
    if context.invoked_subcommand not in SHARED and not launch.is_main():
        context.exit()


for command in (compress, evaluate, heads, show, methods, schema, push, pull, export, doctor, bench):
    cli.add_command(command)


def main() -> None:
    """Entry point: one line for everything the user can mend, and the exit codes of the module's docstring."""
    with patient():
        code = _ended()
    sys.exit(code if isinstance(code, int) else 0)


def _ended() -> int | None:
    """The exit code of the command, its errors told."""
    if launch.count() == 1:              # two processes, waiting for each other's pages, are a tenth slower by it
        whole_pages()
    try:
        with launch.one_voice(), log.talking(launch.is_main()), panics():
            code = cli.main(prog_name="llmopt", standalone_mode=False)
    except click.exceptions.Exit as leave:
        code = leave.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        told = str(error.__cause__ or error)          # click puts an Abort around it
        click.echo(told or "interrupted; nothing half-written was left", err=True)
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        code = 2
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except launch.Lost as error:
        click.echo(f"error: {error}", err=True)
        code = 1
    except OSError as error:             # no permission, a disk in trouble: a fact about the machine
        click.echo(f"error: {error.filename or 'input/output'}: {error.strerror or error}", err=True)
        code = 2
    except (MemoryError, RecursionError) as error:
        fact = "a file is nested too deeply" if isinstance(error, RecursionError) else str(error) or "out of memory"
        click.echo(f"error: {fact}", err=True)
        code = 2
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):        # torch has no type for it
            raise
        click.echo(f"error: {one_line(f'out of memory: {error}')[:300]}", err=True)
        code = 2
    return code
