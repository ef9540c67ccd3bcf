"""What transformers' own `from_pretrained` gives once llmopt is imported, whichever of the two is imported first.

`AutoModelForCausalLM` finds the classes of modeling.py: they build per-layer shapes and attach runtime parts.
transformers takes seconds to import: what is not there yet is changed at the moment when it comes.
"""
import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _extend_auto_model(auto: ModuleType) -> None:
    """Put the classes of modeling.py behind AutoModelForCausalLM; each is made when its model is built."""
    mapping = auto.AutoModelForCausalLM._model_mapping
    load = mapping._load_attr_from_module

    def extended(model_type: str, name: str) -> type:
        from llmopt.model.modeling import FAMILIES, shaped

        found, family = load(model_type, name), FAMILIES.get(model_type)
        return shaped(found) if family and family.model == name else found

    mapping._load_attr_from_module = extended


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.modeling_auto": _extend_auto_model,
}


class _AfterImport(MetaPathFinder):
    """Finds the modules of CHANGES where they are, and changes each as soon as it is imported."""

    def find_spec(self, name: str, path: list[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in CHANGES else None
        if spec is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                CHANGES[name](module)

            spec.loader.exec_module = executed
        return spec


def extend_transformers() -> None:
    """Change what is imported of transformers now, and the rest when it comes."""
    for name in CHANGES:
        if name in sys.modules:
            CHANGES[name](importlib.import_module(name))        # another thread may be at it: wait for the end
    sys.meta_path.insert(0, _AfterImport())
