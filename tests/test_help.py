"""Help and shell completion: groups of options, examples, and the words that are offered."""
import click
import llmopt_evals.task_names as shipped
import pytest
from click.shell_completion import ShellComplete

import llmopt
from llmopt.cli import completion
from llmopt.cli.commands import cli
from llmopt.cli.help import Command


def offered(*words: str) -> list[tuple[str, str]]:
    """(type, value) of what click offers for the last word."""
    *before, typed = words
    items = ShellComplete(cli, {}, "llmopt", "_LLMOPT_COMPLETE").get_completions(before, typed)
    return [(item.type, item.value) for item in items]


@pytest.mark.parametrize(("words", "expected"), [
    (["methods", "quant.g"], ["quant.gptq"]),
    (["heads", "m", "--method", "heads.g"], ["heads.gradient"]),
    (["heads", "m", "--method", "quant"], []),
    (["eval", "out", "--tasks", "world_f"], ["world_facts"]),
    (["eval", "out", "--tasks", "world_ppl,arc_ea"], ["world_ppl,arc_easy"]),
    (["eval", "out", "--tasks", "fid"], ["fidelity"]),
    (["show", "llmopt/"], ["llmopt/reference", "llmopt/reference-moe"]),
    (["compress", "m", "--scheme", "w4"], ["W4A16", "W4A16_ASYM"]),
    (["compress", "--recipe", "quick"], ["quickstart"]),
])
def test_names_are_completed(words, expected):
    assert offered(*words) == [("plain", name) for name in expected]


@pytest.mark.parametrize(("words", "kind"), [(["eval", "ou"], "dir"),
                                             (["show", "./ou"], "dir")])
def test_where_no_name_fits_files_are_completed(words, kind):
    assert offered(*words) == [(kind, words[-1])]


def test_what_is_offered_is_what_there_is():
    assert completion.method_names() == sorted(llmopt.names())


def test_the_shipped_names_of_tasks_hold_ours_and_those_that_everybody_asks_for():
    names = set(shipped.task_names())
    assert {"world_ppl", "world_recall_160_agnostic", "text_ppl", "needles", "fidelity"} <= names
    assert {"arc_easy", "hellaswag", "mmlu", "gsm8k", "winogrande", "wikitext", "ifeval"} <= names
    assert len(names) > 10_000


@pytest.mark.full
def test_the_shipped_names_are_those_of_the_installed_lm_eval():
    assert shipped.task_names() == shipped.indexed_names()      # else: python -m llmopt_evals.task_names


@click.command(cls=Command, groups={"First": ("one",)}, examples=["llmopt x  # a long line " + "." * 99])
@click.option("--two", help="Second.")
@click.option("--one", help="First.")
def toy(**given) -> None:
    """A command."""


def test_help_has_groups_and_examples_that_are_not_wrapped():
    text = toy.get_help(click.Context(toy, info_name="toy"))
    assert text.count("--one") == 1
    assert text.index("First:") < text.index("--one") < text.index("Other options:") < text.index("--two")
    assert text.splitlines()[-1] == "  " + toy.examples[0]
