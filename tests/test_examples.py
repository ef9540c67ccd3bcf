"""The examples at the end of every command's help run as they stand, one after the other, in one folder."""
import shlex

import click
import pytest

from llmopt.cli.commands import cli
from tests import hub
from tests.test_hub import RECIPE, run

SLOW = ("llmopt compress", "llmopt bench")          # the full tier's
FIRST = ["compress", "--recipe", "r.yaml", "--no-eval", "--output", "out"]


def commands(group: click.Group = cli) -> list[click.Command]:
    inner = [command for command in group.commands.values() if isinstance(command, click.Group)]
    return [*group.commands.values(), *(command for one in inner for command in commands(one))]


def words(line: str) -> list[str]:
    """The words behind `llmopt`, without comment and redirection; MODEL is any model."""
    found = shlex.split(line, comments=True)[1:]
    found = found[:found.index(">")] if ">" in found else found
    return ["llmopt/reference" if word == "MODEL" else word for word in found]


EXAMPLES = [line for command in (cli, *commands()) for line in command.examples]


def ran(folder, lines: list[str]) -> list[tuple[str, int, str]]:
    """(line, exit code, stderr) of each that did not end well."""
    (folder / "r.yaml").write_text(RECIPE)
    with hub.running() as server:
        results = run(folder, [FIRST, *map(words, lines)], HF_ENDPOINT=server.url,
                      LLMOPT_CACHE=str(folder / "cache"))
    done = zip(["first", *lines], results, strict=True)
    return [(line, result["code"], result["err"]) for line, result in done if result["code"]]


def test_every_command_has_examples():
    assert not [command.name for command in (cli, *commands()) if not getattr(command, "examples", ())]


def test_the_quick_examples_run(tmp_path):
    lines = [line for line in EXAMPLES if not line.startswith(SLOW) and "doctor" not in line]
    assert len(lines) > 10
    assert ran(tmp_path, lines) == []


@pytest.mark.full
@pytest.mark.parametrize("line", [line for line in EXAMPLES if line.startswith(SLOW)])
def test_a_slow_example_runs(line, tmp_path):
    assert ran(tmp_path, [line.replace("--output out", "--output other")]) == []
