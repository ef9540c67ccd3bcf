"""What the shell offers for a word that is being typed: recipes, methods, tasks, models; no library is imported for it.

A command names one of these functions as `shell_complete` of an option. Names that contain another word, as in
`--tasks a,b`, are completed behind the last comma.
"""
import re
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

REGISTERED = re.compile(r'^@register\("(\w+\.\w+)"\)', re.MULTILINE)


def recipes(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """The packaged recipes, or files where none of them begins so."""
    from llmopt.files.packaged import recipes as packaged

    return _matching(packaged(), typed) or [CompletionItem(typed, type="file")]


def methods(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Every method."""
    return _matching(method_names(), typed)


def schemes(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """The schemes, in either spelling of their letters."""
    from llmopt.recipe.schemes import SCHEMES

    return _matching(SCHEMES, typed.upper())


def head_scores(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """The methods that score heads."""
    return [item for item in methods(ctx, param, typed) if item.value.startswith("heads.")]


def tasks(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """The tasks that llmopt and lm-eval know, behind the last comma."""
    from llmopt_evals.task_names import task_names

    before, comma, last = typed.rpartition(",")
    return _matching(task_names(), last, before + comma)


def models(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """The embedded models once their name has begun, else folders."""
    from llmopt.files.packaged import EMBEDDED

    return (typed and _matching(EMBEDDED, typed)) or [CompletionItem(typed, type="dir")]


def _matching(names: Iterable[str], typed: str, before: str = "") -> list[CompletionItem]:
    return [CompletionItem(before + name) for name in names if name.startswith(typed)]


def method_names() -> list[str]:
    """The names that the files of the families register, read and not imported: that would take torch."""
    files = Path(__file__).parents[1].glob("*/*.py")
    return sorted(name for file in files for name in REGISTERED.findall(file.read_text(encoding="utf-8")))
