"""What transformers' own `from_pretrained` gives once llmopt is imported, whichever of the two is imported first.

`AutoModelForCausalLM` finds the classes of modeling.py: they build per-layer shapes and attach runtime parts. Any other
model class (`LlamaForCausalLM`, `AutoModel`, a subclass of one's own) makes its like of modeling.py where the config
has keys of ours, and itself where it has none. All of them, AutoConfig and AutoTokenizer know the names
of the embedded models, `llmopt/reference` among them. transformers takes seconds to import: what is not there yet is
changed at the moment when it comes.
"""
import functools
import importlib
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.packaged import EMBEDDED
from llmopt.model import packed_loading

CAUSAL = ("ForCausalLM", "LMHeadModel")         # how the classes of causal LMs end


def _extend_auto_model(auto: ModuleType) -> None:
    """Put the classes of modeling.py behind AutoModelForCausalLM; each is made when its model is built."""
    mapping = auto.AutoModelForCausalLM._model_mapping
    load = mapping._load_attr_from_module

    def extended(model_type: str, name: str) -> type:
        from llmopt.model.modeling import FAMILIES, shaped

        found, family = load(model_type, name), FAMILIES.get(model_type)
        return shaped(found) if family and family.model == name else found

    mapping._load_attr_from_module = extended
    plain = auto.AutoModelForCausalLM.from_pretrained.__func__

    @functools.wraps(plain)
    def bounded(cls, pretrained_model_name_or_path, *args, **kwargs):
        name = _place(pretrained_model_name_or_path)
        if os.path.isdir(name):
            from llmopt.files.checks import check_bounds

            check_bounds(Path(name))        # before transformers makes a billion layers of a config
        return plain(cls, name, *args, **kwargs)

    auto.AutoModelForCausalLM.from_pretrained = classmethod(bounded)


def _place(name: Any) -> Any:
    """The folder of an embedded model, whose name is none of the hub; any other name as it is."""
    if name not in EMBEDDED:
        return name
    from llmopt.model.loading import resolve

    return resolve(name)


def _know_reference(auto: type) -> None:
    """Let a class of transformers find the configuration or tokenizer of the embedded models."""
    stock = auto.from_pretrained.__func__

    @functools.wraps(stock)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(cls, _place(pretrained_model_name_or_path), *args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)


def _by_config(cls: type) -> type:
    """What from_pretrained calls in place of a model class: it makes a `cls`, or for our keys a `shaped(cls)`."""
    from llmopt.model.modeling import FAMILIES, shaped

    def make(_: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        ours = kind in FAMILIES and config.is_heterogeneous or getattr(config, "llmopt", None)
        model = (shaped(cls) if ours else cls)(config, *args, **kwargs)
        _refuse_strange_names(model)
        return model

    kind = getattr(cls.config_class, "model_type", None)
    if hasattr(cls, "_llmopt_family") or kind not in FAMILIES and not cls.__name__.endswith(CAUSAL):
        return cls
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, "__new__": make})


def _refuse_strange_names(model: Any) -> None:
    """Raise LlmoptError where compressed-tensors, which goes by full names, would leave all weights as random numbers.

    The names are those of the causal LM; in the decoder alone (AutoModel) they begin one level further down.
    """
    config, prefix = getattr(model.config, "quantization_config", None) or {}, f"{model.base_model_prefix}."
    groups = (config if isinstance(config, dict) else config.to_dict()).get("config_groups") or {}
    names = [name for group in groups.values() for name in group["targets"] if name.startswith(prefix)]
    if names and model.base_model is model:
        raise LlmoptError(f"{type(model).__name__} cannot read quantized weights, whose names ({names[0]}) are those "
                          f"of the causal LM; load that with AutoModelForCausalLM, and take its .{prefix[:-1]}")


def _extend_models(utilities: ModuleType) -> None:
    """Have every model class build what the config says, and attach runtime parts once the weights are there."""
    stock = utilities.PreTrainedModel.from_pretrained.__func__

    @functools.wraps(stock)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = stock(_by_config(cls), _place(pretrained_model_name_or_path), *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model.config, "llmopt", None):
            from llmopt.runtime import attach_from_config

            attach_from_config(model)
        if getattr(model, "hf_quantizer", None) is not None:
            packed_loading.finish(model, str(pretrained_model_name_or_path))
        return loaded

    utilities.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _extend_adapters(tuners: ModuleType) -> None:
    """Let peft find the weights that it puts adapters beside; of a model loaded packed the first forward makes them.

    Where they stay packed nothing can be merged into them.
    """
    stock, allowed = tuners.BaseTuner.inject_adapter, tuners.BaseTuner._check_merge_allowed

    @functools.wraps(stock)
    def inject_adapter(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(model, "hf_quantizer", None) is not None:
            from llmopt.model.loaded import unpack

            unpack(model)
        return stock(self, model, *args, **kwargs)

    def check_merge_allowed(self: Any) -> None:
        from llmopt.model.stay_packed import is_packed

        if any(map(is_packed, self.model.modules())):
            raise LlmoptError("the weights stay packed, so that no adapter can be merged into them; load the model "
                              "without packed=True (LLMOPT_PACKED), and the adapter onto that")
        allowed(self)

    tuners.BaseTuner.inject_adapter, tuners.BaseTuner._check_merge_allowed = inject_adapter, check_merge_allowed


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _extend_models,
    "transformers.models.auto.modeling_auto": _extend_auto_model,
    "transformers.quantizers.quantizer_compressed_tensors": packed_loading.extend_quantizer,
    "transformers.utils.quantization_config": packed_loading.extend_config,
    "peft.tuners.tuners_utils": _extend_adapters,
    "transformers.models.auto.configuration_auto": lambda module: _know_reference(module.AutoConfig),
    "transformers.models.auto.tokenization_auto": lambda module: _know_reference(module.AutoTokenizer),
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
