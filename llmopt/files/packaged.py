"""Recipes and models that come with llmopt, by name."""
from pathlib import Path

REFERENCE = "llmopt/reference"
EMBEDDED = (REFERENCE, f"{REFERENCE}-moe")      # models, in llmopt_evals/world
PACKAGED = (Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes")  # the checkout's, the wheel's


def recipes() -> list[str]:
    """The names of the packaged recipes, in order."""
    return sorted({file.stem for folder in PACKAGED for file in folder.glob("*.yaml")})
