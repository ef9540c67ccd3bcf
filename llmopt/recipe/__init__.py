"""YAML -> Recipe, every error with its line."""
from llmopt.recipe.assign import values
from llmopt.recipe.reader import Recipe, check_order, find, load, parse

__all__ = ["Recipe", "check_order", "find", "load", "parse", "values"]
