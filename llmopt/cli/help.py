"""Help texts of the commands: options in groups, and examples at the end that run as they stand."""
from collections.abc import Sequence

import click


class Helpful:
    """What `--help` of a command and of a group has in common.

    groups: {heading: the names of its parameters}; those in none stand under the last heading, "Other options".
    examples: command lines, with a comment behind # where one helps.
    """

    def __init__(self, *args, groups: dict[str, Sequence[str]] | None = None, examples: Sequence[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.groups, self.examples = groups or {}, tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group; a group command lists its commands behind them."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        rows = {option.name: row for option in options if (row := option.get_help_record(ctx))}
        grouped = {name for names in self.groups.values() for name in names}
        rest = [name for name in rows if name not in grouped]
        for heading, names in {**self.groups, "Other options" if self.groups else "Options": rest}.items():
            if found := [rows[name] for name in names if name in rows]:
                with formatter.section(heading):
                    formatter.write_dl(found)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples: lines to be copied, which are not wrapped."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples))


class Command(Helpful, click.Command):
    """A command whose help has groups of options and examples."""


class Group(Helpful, click.Group):
    """A group of commands whose help has examples."""

    command_class = Command
