"""YAML, or the words of a command line -> Recipe, every error with its place.

Each name is imported when it is first used: words can be checked, and schemes listed, without torch.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt.recipe.assign import values
    from llmopt.recipe.reader import Recipe, check_order, find, load, parse

__all__ = ["Recipe", "check_order", "find", "load", "parse", "values"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{'assign' if name == 'values' else 'reader'}"), name)
