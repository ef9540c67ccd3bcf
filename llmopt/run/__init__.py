"""The path of a run, and the run itself: `llmopt.run(recipe, output)` does what `llmopt compress` does.

The modules in here are the parts of a run up to the checkpoint that it writes.
"""
import importlib
import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    """This package, which is also the function `llmopt.run`: importing any part of it puts it under that name."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """See `llmopt_evals.run.run`."""
        return importlib.import_module("llmopt_evals.run").run(*args, **keywords)


sys.modules[__name__].__class__ = _Called
