"""What a run of `llmopt compress` is to do: the recipe of a file, or one made of the words of the command line."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import LlmoptError
from llmopt.files.gguf_head import is_gguf
from llmopt.files.packaged import recipes
from llmopt.recipe.schemes import SCHEMES

if TYPE_CHECKING:
    from llmopt.recipe.reader import Recipe

COMMON = ("--scheme W4A16", "--bits 3.5", "--recipe quickstart")
KINDS = {".yaml": "a recipe goes behind --recipe", ".yml": "a recipe goes behind --recipe",
         ".safetensors": "give the folder that it lies in", ".bin": "give the folder that it lies in"}


def one_model(given: tuple[str, ...]) -> str | None:
    """The one model that was named, if any; raises LlmoptError for two, and for what is no model at first sight."""
    for name in given:
        if name.upper() in SCHEMES and not Path(name).exists():
            raise LlmoptError(f"{name} is a scheme, not a model: --scheme {name}")
    if len(given) > 1:
        raise LlmoptError(f"one MODEL expected, {len(given)} given: {', '.join(given)}")
    if not given:
        return None
    name, = given
    if name in recipes() and not Path(name).exists():
        raise LlmoptError(f"{name} is a packaged recipe, not a model: --recipe {name}")
    file = Path(name).expanduser()
    if file.is_file() and not is_gguf(file):
        kind = KINDS.get(file.suffix, "give the folder of the model")
        raise LlmoptError(f"{name}: not a model folder but a file; {kind}")
    return name


def check_words(model: str | None, recipe_name: str | None, words: dict[str, Any]) -> None:
    """Raise LlmoptError for what is wrong with the words of the command line, before torch is imported."""
    from llmopt.recipe.words import Words

    asked = Words(**words)
    if recipe_name and asked.steps:
        raise LlmoptError(f"--recipe and --{asked.steps[0]} both say what to do; give one of them, and change a recipe "
                          "with --set")
    if not recipe_name and not (model and asked.steps):
        lines = (f"llmopt compress {model or 'MODEL'} {common} --output out"
                 for common in (COMMON[:1] if asked.steps else COMMON))
        raise LlmoptError(f"{f'what is to be done with {model}?' if model else 'which model?'} Such as: "
                          f"{', or '.join(lines)}")


def plan_of(model: str | None, recipe_name: str | None, sets: tuple[str, ...], trust: bool,
            words: dict[str, Any]) -> Recipe:
    """The recipe of a file, changed by words and `sets`, or the one that the words ask for."""
    from llmopt.recipe.one_line import one_line
    from llmopt.recipe.reader import load
    from llmopt.recipe.words import Words

    if recipe_name:
        return load(recipe_name, (*Words(**words).assignments(), *sets), model, trust)
    return one_line(model, sets, trust, **words)
