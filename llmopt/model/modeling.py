"""Per-layer shapes: the models behind AutoModel, and the file copied into checkpoints (torch + transformers only).

Of a stock model class this file makes a subclass under the stock name, when it is asked for. It is the stock model
unless its config carries one of our keys:

    per_layer_config   {layer: {num_attention_heads, num_key_value_heads, intermediate_size, skip: [attention, mlp]}}
    llmopt             runtime parts; attached after from_pretrained by llmopt.runtime, where llmopt is installed
"""
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import threading
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import MistralConfig, PreTrainedConfig

REMOTE_FILE = "modeling_llmopt.py"
MAX_TENSORS, MAX_VALUES = 10_000, 10**6        # of runtime parts, or as many values as the model has weights


class SkippedAttn(nn.Module):
    """Stands where a layer has lost its attention: adds nothing, but counts the tokens in this layer's cache."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None:
            batch, tokens, _ = hidden_states.shape
            marker = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(marker, marker, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedFFN(nn.Module):
    """Stands where a layer has lost its feed-forward part."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def is_skipped(module: nn.Module) -> bool:
    """True for a placeholder of a lost part; by name, as a trusted checkpoint brings its own copy of this file."""
    return type(module).__name__ in (SkippedAttn.__name__, SkippedFFN.__name__)


class Family(NamedTuple):
    """The place of a model_type's causal LM in transformers, and the norms that a skipped part takes with it."""

    package: str
    model: str
    layer: str
    attention: str = "self_attn"
    mlp: str | None = "mlp"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    width: str = "intermediate_size"        # the config's name for the FFN width


_SANDWICH = dict(attention_norms=("input_layernorm", "post_attention_layernorm"),
                 mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_BEHIND = dict(attention_norms=("post_attention_layernorm",), mlp_norms=("post_feedforward_layernorm",))

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", "LlamaDecoderLayer"),
    "mistral": Family("mistral", "MistralForCausalLM", "MistralDecoderLayer"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer"),
    "phi3": Family("phi3", "Phi3ForCausalLM", "Phi3DecoderLayer"),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", "Gemma2DecoderLayer", **_SANDWICH),
    "gemma3_text": Family("gemma3", "Gemma3ForCausalLM", "Gemma3DecoderLayer", **_SANDWICH),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", "Olmo2DecoderLayer", **_BEHIND),
    "olmo3": Family("olmo3", "Olmo3ForCausalLM", "Olmo3DecoderLayer", **_BEHIND),
    "exaone4": Family("exaone4", "Exaone4ForCausalLM", "Exaone4DecoderLayer", **_BEHIND),
    "ministral3": Family("ministral3", "Ministral3ForCausalLM", "Ministral3DecoderLayer"),
    "gemma": Family("gemma", "GemmaForCausalLM", "GemmaDecoderLayer"),
    "olmo": Family("olmo", "OlmoForCausalLM", "OlmoDecoderLayer"),
    # one norm in front of both parts, which stays as long as the layer does
    "cohere": Family("cohere", "CohereForCausalLM", "CohereDecoderLayer", attention_norms=(), mlp_norms=()),
    "cohere2": Family("cohere2", "Cohere2ForCausalLM", "Cohere2DecoderLayer", attention_norms=(), mlp_norms=()),
    "phi": Family("phi", "PhiForCausalLM", "PhiDecoderLayer", attention_norms=(), mlp_norms=()),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3DecoderLayer"),
    "granite": Family("granite", "GraniteForCausalLM", "GraniteDecoderLayer"),
    "ernie4_5": Family("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5DecoderLayer"),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1DecoderLayer"),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", "SeedOssDecoderLayer"),
    "helium": Family("helium", "HeliumForCausalLM", "HeliumDecoderLayer"),
    "glm": Family("glm", "GlmForCausalLM", "GlmDecoderLayer"),
    "cwm": Family("cwm", "CwmForCausalLM", "CwmDecoderLayer"),
    "glm4": Family("glm4", "Glm4ForCausalLM", "Glm4DecoderLayer",
                   attention_norms=("input_layernorm", "post_self_attn_layernorm"),
                   mlp_norms=("post_attention_layernorm", "post_mlp_layernorm")),
    "arcee": Family("arcee", "ArceeForCausalLM", "ArceeDecoderLayer"),
    "nemotron": Family("nemotron", "NemotronForCausalLM", "NemotronDecoderLayer"),
    "apertus": Family("apertus", "ApertusForCausalLM", "ApertusDecoderLayer",
                      attention_norms=("attention_layernorm",), mlp_norms=("feedforward_layernorm",)),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM", "Starcoder2DecoderLayer"),
    "stablelm": Family("stablelm", "StableLmForCausalLM", "StableLmDecoderLayer"),
    "qwen3_5_text": Family("qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5DecoderLayer"),
    "gpt_neox": Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXLayer", attention="attention"),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", "GPT2Block", attention="attn",
                   attention_norms=("ln_1",), mlp_norms=("ln_2",), width="n_inner"),
    "gpt_bigcode": Family("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeBlock", attention="attn",
                          attention_norms=("ln_1",), mlp_norms=("ln_2",), width="n_inner"),
    # OPT-350m normalises the residual stream itself: its norms stay where they are
    "opt": Family("opt", "OPTForCausalLM", "OPTDecoderLayer", mlp=None, attention_norms=(), mlp_norms=(),
                  width="ffn_dim"),
    # attention only: their experts are left alone, their layers always have stock shapes
    "mixtral": Family("mixtral", "MixtralForCausalLM", "MixtralDecoderLayer"),
    "qwen2_moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeDecoderLayer"),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeDecoderLayer"),
}


def skip_part(family: Family, layer: nn.Module, part: str, layer_idx: int) -> None:
    """Take `part` ("attention" or "mlp") and the norms that serve only it out of a decoder layer."""
    if part == "attention":
        setattr(layer, family.attention, SkippedAttn(layer_idx))
    elif part == "mlp" and family.mlp:
        setattr(layer, family.mlp, SkippedFFN())
    else:
        raise ValueError(f"{family.model} cannot skip {part!r} of a layer")
    for norm in family.attention_norms if part == "attention" else family.mlp_norms:
        setattr(layer, norm, nn.Identity())


def _stock(family: Family, name: str) -> type:
    return getattr(importlib.import_module(f"transformers.models.{family.package}.modeling_{family.package}"), name)


_BUILDING = threading.RLock()


@contextlib.contextmanager
def _layers_by_config(family: Family, config):
    """While a heterogeneous model is built, each decoder layer reads the config of its own index."""
    cls = _stock(family, family.layer)
    stock = cls.__init__

    def build(self, given, layer_idx, *args, **kwargs):
        own = given.per_layer_config[layer_idx]
        stock(self, own, layer_idx, *args, **kwargs)
        for part in own.skip:
            skip_part(family, self, part, layer_idx)
        for module in self.modules():       # set_attn_implementation() edits the model's one config, not copies of it
            if getattr(module, "config", None) is own:
                module.config = given

    with _BUILDING:
        cls.__init__ = build if config.is_heterogeneous else stock
        try:
            yield
        finally:
            cls.__init__ = stock


class _Saving:
    """A causal LM whose `save_pretrained` writes what was made of it: transformers would write dense weights."""

    def save_pretrained(self, *args, **kwargs):
        if importlib.util.find_spec("llmopt") is None:
            return super().save_pretrained(*args, **kwargs)
        save = importlib.import_module("llmopt.checkpoint.pretrained").save_pretrained
        return save(self, super().save_pretrained, *args, **kwargs)


class _Shaped(_Saving):
    """The mixin that `shaped` puts in front of a stock class."""

    _llmopt_family: Family | None
    _keys_to_ignore_on_load_unexpected = [r"^llmopt\."]

    def __init__(self, config, *args, **kwargs):
        family = self._llmopt_family
        with _layers_by_config(family, config) if family else contextlib.nullcontext():
            super().__init__(config, *args, **kwargs)
        declare_tensors(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as for the stock class: its files name their tensors (GPT-NeoX: embed_out) as that one's do."""
        return False

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded      # output_loading_info=True gives a pair
        if getattr(model.config, "llmopt", None):
            _attach(model)
        return loaded


def declare_tensors(model: nn.Module) -> None:
    """Make room for the runtime tensors that the config declares, so that from_pretrained fills them.

    config.llmopt["tensors"] = {"<step>.<name>": {"shape": [...], "dtype": "float32"}}; each becomes the buffer
    `llmopt.<step>.<name>` of the model.
    """
    for name, (shape, dtype) in _declared(model).items():
        put_tensor(model, name, torch.zeros(shape, dtype=dtype))


def _declared(model: nn.Module) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and type of each declared tensor; raises ValueError for what no method would ask for, before it is made."""
    described = getattr(model.config, "llmopt", None) or {}
    declared = described.get("tensors") or {} if isinstance(described, dict) else None
    if not isinstance(declared, dict) or len(declared) > MAX_TENSORS:
        raise ValueError(f"config.json: llmopt.tensors: a mapping of at most {MAX_TENSORS:,} tensors expected")
    room, found = max(MAX_VALUES, sum(p.numel() for p in model.parameters())), {}
    for name, layout in declared.items():
        shape, dtype = (layout.get("shape"), layout.get("dtype")) if isinstance(layout, dict) else (None, None)
        if not re.fullmatch(r"\d{1,3}(\.\w{1,100}){1,9}", name) or any(hasattr(nn.Module, p) for p in name.split(".")):
            raise ValueError(f"config.json: llmopt.tensors: {name[:80]!r} is no name such as 0.scores")
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8:
            raise ValueError(f"config.json: llmopt.tensors: {name}: {str(shape)[:80]} is no shape")
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"config.json: llmopt.tensors: {name}: {str(dtype)[:80]!r} is no dtype")
        room -= math.prod(shape)
        if room < 0:
            raise ValueError(f"config.json: llmopt.tensors: {name} makes them larger than the model")
        found[name] = shape, getattr(torch, dtype)
    return found


def put_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the buffer `llmopt.<name>` of the model, moved to the model's device; name: "<step>.<name>"."""
    *path, leaf = f"llmopt.{name}".split(".")
    holder = model
    for part in path:
        if part not in dict(holder.named_children()):
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    device = next(model.parameters()).device
    holder.register_buffer(leaf, tensor if device.type == "meta" else tensor.to(device))    # meta: weights to come


def tensors_below(model: nn.Module, step: str | None = None) -> dict[str, torch.Tensor]:
    """The runtime tensors of the model, or of one step, by their names from there on."""
    holder = model._modules.get("llmopt")
    if holder is not None and step is not None:
        holder = holder._modules.get(step)
    return {} if holder is None else dict(holder.named_buffers())


def drop_tensors(model: nn.Module, step: str | None = None) -> None:
    """Take the runtime tensors of the model, or of one step, off it."""
    if step is None:
        model._modules.pop("llmopt", None)
    elif "llmopt" in model._modules:
        model._modules["llmopt"]._modules.pop(step, None)


def _attach(model: nn.Module) -> None:
    if importlib.util.find_spec("llmopt") is None:
        warnings.warn("this checkpoint has runtime parts (config.llmopt), but the package llmopt is not installed: "
                      "the model runs with its plain attention and cache", stacklevel=3)
        return
    importlib.import_module("llmopt.runtime").attach_from_config(model)


@functools.cache
def shaped(stock: type) -> type:
    """The subclass of a stock model class that reads our keys of its config; per-layer shapes where it has a family."""
    keys = [*(stock._keys_to_ignore_on_load_unexpected or []), *_Shaped._keys_to_ignore_on_load_unexpected]
    return type(stock.__name__, (_Shaped, stock), {
        "__module__": __name__, "__doc__": stock.__doc__, "_llmopt_family": FAMILIES.get(stock.config_class.model_type),
        "_keys_to_ignore_on_load_unexpected": keys, **_experts_of(stock)})


def _experts_of(stock: type) -> dict[str, bool]:
    """What transformers finds in the source of a stock class and would not in this one: how experts may be computed."""
    told = getattr(stock, "_can_set_experts_implementation", None)
    return {"_can_set_experts_implementation_cached_value": told()} if told else {}


def __getattr__(name: str) -> type:
    """Remote code and pickle look classes up by name: those of transformers, `shaped` when they are asked for."""
    stock = getattr(transformers, name, None)
    if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel) and stock.config_class is not None:
        return shaped(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _saving_class(cls: type) -> type:
    """`cls`, or a subclass made here under its name, such that `_Saving` is a base."""
    if any(base.__name__ == _Saving.__name__ for base in cls.__mro__):      # by name: remote code brings its own copy
        return cls
    if cls.config_class.model_type in FAMILIES:
        return shaped(cls)
    return type(cls.__name__, (_Saving, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def let_save(model: nn.Module) -> None:
    """Make `save_pretrained` of a model that is being compressed write what it has become."""
    model.__class__ = _saving_class(type(model))


def remote_files(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """(files to put beside a checkpoint of `model`, its config's `auto_map`), which let trust_remote_code load it."""
    name, = saved_config(model)[0]["architectures"]
    source = inspect.getsource(sys.modules[__name__])
    return {REMOTE_FILE: source}, {"AutoModelForCausalLM": f"{REMOTE_FILE.removesuffix('.py')}.{name}"}


# ------------------------------------------------------------------------------------------------- the config on disk

def tied(model: nn.Module) -> bool:
    """True if the output head is the table of the input tokens again: by one weight, or one packed weight's codes."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and all(held(head) is held(table) for held in (
        lambda module: module._parameters.get("weight"), lambda module: module._modules.get("codes")))


def tell_tied(config: PreTrainedConfig, is_tied: bool) -> None:
    """Say in a config, and in that of its language part, whether the head is the table: either may be asked."""
    for told in (config, config.get_text_config()):
        told.tie_word_embeddings = is_tied


def saved_config(model: nn.Module) -> tuple[dict[str, Any], bool]:
    """(config.json of a checkpoint of `model`, whether it needs the code of this file to be read)."""
    config = copy.deepcopy(model.config)
    family = FAMILIES.get(config.model_type)
    config.architectures = [family.model if family else type(model).__name__]
    config.dtype = model.dtype
    if model.get_output_embeddings() is not None:
        tell_tied(config, tied(model))              # by hand, or by files that contradict their config
    config.__dict__.pop("auto_map", None)       # foreign code knows nothing of the shapes written here
    if family and not config.is_heterogeneous and not heads_fit(config, config.num_attention_heads):
        config = _as_mistral(config) if _is_plain_llama(config) else _heads_per_layer(config)
    config.validate()
    return json.loads(config.to_json_string(use_diff=True)), bool(family) and config.is_heterogeneous


def checks_heads(config) -> bool:
    """True if this config class refuses a hidden_size that is no multiple of num_attention_heads."""
    return type(config).validate_architecture is not PreTrainedConfig.validate_architecture


def heads_fit(config, heads: int) -> bool:
    """True if this config class accepts `heads` query heads for the whole model."""
    return not checks_heads(config) or config.hidden_size % heads == 0


def _is_plain_llama(config) -> bool:
    return config.model_type == "llama" and not config.attention_bias and not config.mlp_bias


def _as_mistral(config) -> PreTrainedConfig:
    """A Mistral config of the same model: that architecture takes any number of heads. Every tensor keeps its name."""
    fields = config.to_dict()
    for key in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version", "architectures"):
        fields.pop(key, None)
    return MistralConfig(**fields, sliding_window=None, architectures=["MistralForCausalLM"])


def _heads_per_layer(config) -> PreTrainedConfig:
    """A number of heads that the config class refuses, written layer by layer."""
    width = FAMILIES[config.model_type].width
    own = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
           width: getattr(config, width)}
    write_layers(config, [own] * config.num_hidden_layers)
    return config


def write_layers(config, layers: list[dict[str, Any]]) -> None:
    """Make `config` heterogeneous, such that stock transformers cannot build the model and fill it with random numbers.

    layers: per layer its width and, if they vary, its head counts. The model-wide width is one that no layer has, so
    every stock layer fails: with AmbiguousGlobalPerLayerAttributeError, or on the shape of its first tensor.
    """
    width = FAMILIES[config.model_type].width
    setattr(config, width, max(layer[width] for layer in layers) + 1)
    if checks_heads(config) and any("num_attention_heads" in layer for layer in layers):
        fits = range(config.num_attention_heads, config.hidden_size + 1)
        config.num_attention_heads = next(h for h in fits if config.hidden_size % h == 0)
        config.allow_global_per_layer_attribute_access = True      # its own check reads the model-wide head count
    config.per_layer_config = dict(enumerate(layers))
