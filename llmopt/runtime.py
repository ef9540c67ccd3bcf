"""What is in force while the model runs: one attention function, one mask function, one cache, attach and detach.

An attached model behaves as before (`generate`, `model(ids, use_cache=True)`); its attention modules call `llmopt`
instead of SDPA, its caches are `LlmoptCache`, and after each multi-token forward the attached kv method compresses.
"""
import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from llmopt_kernels import NONE, Rule, dense_attention, dense_visible, ragged_attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llmopt.blocks import attention_modules
from llmopt.cache import LlmoptCache, RaggedLayer
from llmopt.method import LlmoptError, Method, Record, Run, build

NAME = "llmopt"             # of the attention function
KEY = "_llmopt_runtime"     # where model and attention modules keep their attachment
OTHER_CACHES = ("static", "offloaded", "offloaded_static", "quantized")


class RuntimeMethod(Method):
    """A method that acts while the model runs. `place`: at most one attached method each."""

    stage = "runtime"
    place: ClassVar[str]

    def plan(self, model: nn.Module, run: Run) -> dict[str, Any]:
        """What is decided once, from head scores or calibration data; plain JSON."""
        return {}

    def apply(self, model: nn.Module, run: Run) -> Record:
        record = Record(self.plan(model, run))
        attach(model, self, record)
        return record

    def restore(self, model: nn.Module, record: Record) -> None:
        attach(model, self, record)


class CacheMethod(RuntimeMethod):
    """A method that makes the cache smaller after a forward."""

    place = "evicting kv method"
    every: int | None

    def queries(self) -> int | None:
        """How many of the last queries it wants to see in `layer.queries`; None: all since the last compression."""
        return 0

    @abstractmethod
    def compress(self, cache: LlmoptCache, live: "Attachment", meta: dict[str, Any]) -> None:
        """Drop entries of `cache` in place. live.rules[l] tells how layer l attends."""


class PrefillMethod(RuntimeMethod):
    """A method that computes attention over a prompt from fewer pairs."""

    place = "prefill selector"

    @abstractmethod
    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, real: Tensor, rule: Rule, layer: int,
                live: "Attachment") -> Tensor | None:
        """Attention of the last T tokens [B, H, T, D] over the last S [B, G, S, D]; None asks for dense.

        real: bool [B, tokens seen], False at padding.
        """


class Attachment:
    """All that `attach` adds to one model: its parts and what the present forward needs to know."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.parts: list[tuple[RuntimeMethod, Record]] = []
        self.frozen = False
        self.cache: LlmoptCache | None = None           # of the forward under way
        self.tokens = 0                                 # of the forward under way
        self.rules: dict[int, Rule] = {}
        self.stats: dict[int, Any] = {}                 # counters of a prefill selector, by layer
        self.before = model.config._attn_implementation
        self.modules = attention_modules(model)
        decoder = model.get_decoder()
        self.arguments = list(inspect.signature(decoder.forward).parameters)
        self._switch_on(decoder)

    def _switch_on(self, decoder: nn.Module) -> None:
        self.model.set_attn_implementation(NAME)
        if any(m.config._attn_implementation != NAME for m in self.modules if m is not None):
            raise LlmoptError(f"{type(self.model).__name__} does not let its attention be replaced")
        self.handles = [decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
                        decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True)]
        self.model.__dict__[KEY] = self
        self.model.__dict__["_prepare_cache_for_generation"] = self._prepare_cache
        for index, module in enumerate(self.modules):
            if module is not None:
                module.__dict__[KEY] = (self, index)

    def switch_off(self) -> None:
        """Leave the model as it was found."""
        for handle in self.handles:
            handle.remove()
        for module in (self.model, *(m for m in self.modules if m is not None)):
            module.__dict__.pop(KEY, None)
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        self.model.set_attn_implementation(self.before)

    def part(self, kind: type) -> tuple[Any, dict[str, Any]] | tuple[None, None]:
        """The attached method of a kind (CacheMethod, PrefillMethod) and its meta."""
        for method, record in self.parts:
            if isinstance(method, kind):
                return method, record.meta
        return None, None

    def new_cache(self) -> LlmoptCache:
        """An empty cache that fits the model."""
        return LlmoptCache([module is None for module in self.modules])

    def _prepare_cache(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """Stands in for the method of that name that `generate` calls."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation in OTHER_CACHES:
                raise LlmoptError(f"cache_implementation={generation_config.cache_implementation!r} cannot be combined "
                                  "with attached llmopt methods, which bring their own cache")
            model_kwargs["past_key_values"] = self.new_cache()

    # ------------------------------------------------------------------------------------------- around a forward

    def _enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = dict(zip(self.arguments, args, strict=False)) | kwargs
        given = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        self.tokens = given.shape[1]
        use = self.model.config.use_cache if named.get("use_cache") is None else named["use_cache"]
        if named.get("past_key_values") is None and use:
            named["past_key_values"] = self.new_cache()
        self.cache = named.get("past_key_values")
        if self.cache is not None:
            if not isinstance(self.cache, LlmoptCache):
                raise LlmoptError(f"a {type(self.cache).__name__} was passed to a model with attached llmopt methods; "
                                  "pass none, or the past_key_values that it returned")
            self._note_mask(named, given.shape[0])
        return (), named

    def _note_mask(self, named: dict, batch: int) -> None:
        """Keep the padding mask with the cache; a call without one continues with what is known."""
        mask, cache = named.get("attention_mask"), self.cache
        total = cache.get_seq_length() + self.tokens
        if mask is None and cache.mask is not None:
            mask = torch.cat([cache.mask, cache.mask.new_ones(batch, self.tokens)], 1)
            named["attention_mask"] = mask
        if mask is None or mask.ndim != 2:
            return
        if mask.shape[1] != total:
            raise LlmoptError(f"attention_mask has {mask.shape[1]} columns, {total} tokens were seen")
        cache.mask = None if bool(mask.all()) else mask.to(self.model.device).bool()

    def _leave(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache, self.cache = self.cache, None
        if cache is None or output is None:             # None: the forward has raised
            return
        cache.pending += self.tokens
        method, meta = self.part(CacheMethod)
        if method is None or self.frozen:
            return
        if self.tokens > 1 or (method.every is not None and cache.pending >= method.every):
            method.compress(cache, self, meta)
            cache.pending = 0

    # --------------------------------------------------------------------------------------------- inside a layer

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
               rule: Rule) -> Tensor:
        """Attention of layer `index`: [B, H, T, D] over the cache's tail [B, G, S, D] and what the layer has kept."""
        layer = None if self.cache is None else self.cache.layers[index]
        if mask is not None and mask.ndim == 4:
            return self._custom_mask(query, keys, values, mask, rule)
        self.rules[index] = rule
        seen = keys.shape[2] if layer is None else layer.seen
        if mask is not None and mask.shape[1] != seen:
            raise LlmoptError(f"attention_mask has {mask.shape[1]} columns, {seen} tokens were seen")
        first = seen - query.shape[2]
        if layer is not None:
            layer.window = rule.window
            self._record(layer, query, mask, first)
            if layer.kept is not None:
                visible = dense_visible(query, keys, mask, first, rule)
                return ragged_attention(query, layer.kept, (keys, values), visible, first, rule)
        selector, _ = self.part(PrefillMethod)
        if selector is not None and query.shape[2] > 1 and not self.frozen:
            real = query.new_ones(query.shape[0], seen, dtype=torch.bool) if mask is None else mask
            out = selector.prefill(query, keys, values, real, rule, index, self)
            if out is not None:
                return out
        return dense_attention(query, keys, values, mask, first, rule)

    def _record(self, layer: RaggedLayer, query: Tensor, mask: Tensor | None, first: int) -> None:
        method, _ = self.part(CacheMethod)
        if method is None or self.frozen or method.queries() == 0 or (query.shape[2] == 1 and method.every is None):
            return
        positions = torch.arange(first, layer.seen, device=query.device).expand(query.shape[0], -1)
        if mask is not None:
            positions = positions.masked_fill(~mask[:, first:], NONE)
        layer.record(query, positions, method.queries())

    def _custom_mask(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        if rule.softcap is not None or (self.cache is not None and self.part(CacheMethod)[0] is not None):
            raise LlmoptError("packed sequences and 4-D attention masks cannot be combined with an evicting kv method "
                              "or with softcap; pass a 2-D attention_mask")
        return scaled_dot_product_attention(query, keys, values, mask, scale=rule.scaling, enable_gqa=True)


def llmopt_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                     softcap: float | None = None, s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """The attention function: query [B, H, T, D], key and value [B, G, S, D] -> [B, T, H, D]."""
    if KEY not in module.__dict__:
        raise LlmoptError("attention 'llmopt' works on a model with attached methods only; see llmopt.attached")
    if s_aux is not None:
        raise LlmoptError("attention sinks (s_aux) are not supported")
    if dropout:
        raise LlmoptError("attention dropout is not supported while methods are attached; call model.eval()")
    live, index = module.__dict__[KEY]
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    out = live.attend(index, query, key, value, attention_mask, rule)
    return out.transpose(1, 2).contiguous(), None


def llmopt_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
                attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs) -> Tensor | None:
    """The mask function: the padding mask as it came, bool [B, seen], or None; a 4-D mask for packed sequences."""
    if not allow_is_causal_skip:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
                         allow_is_causal_skip=False, **kwargs)
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register(NAME, llmopt_attention)
AttentionMaskInterface.register(NAME, llmopt_mask)


# ------------------------------------------------------------------------------------------------- attach, detach

def attachment(model: nn.Module) -> Attachment | None:
    """What is attached to `model`."""
    return model.__dict__.get(KEY)


def attach(model: nn.Module, method: RuntimeMethod, record: Record | None = None) -> None:
    """Put `method` in force; a second one for the same place is refused."""
    live = attachment(model)
    for other, _ in live.parts if live else ():
        if other.place == method.place:
            raise LlmoptError(f"{other.name} is attached already; at most one {method.place} at a time")
    live = live or Attachment(model)
    live.parts.append((method, record or Record()))


def detach(model: nn.Module) -> None:
    """Take off all that is attached; the model is again as it was, bit by bit."""
    live = attachment(model)
    if live is not None:
        live.switch_off()


@contextmanager
def attached(model: nn.Module, *methods: RuntimeMethod, run: Run | None = None) -> Iterator[nn.Module]:
    """`with attached(model, llmopt.kv.SnapKV(budget=256)): ...`; afterwards the model is as before."""
    live = attachment(model)
    before = list(live.parts) if live else []
    try:
        for method in methods:
            method.apply(model, run or Run())
        yield model
    finally:
        live = attachment(model)
        if live is not None and before:
            live.parts = before
        elif live is not None:
            live.switch_off()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is compressed and new tokens attend densely to what the cache holds."""
    live = attachment(model)
    if live is None:
        yield
        return
    before, live.frozen = live.frozen, True
    try:
        yield
    finally:
        live.frozen = before


def new_cache(model: nn.Module) -> LlmoptCache:
    """An empty cache for a model with attached methods."""
    live = attachment(model)
    if live is None:
        raise LlmoptError("nothing is attached to this model")
    return live.new_cache()


def has_eviction(model: nn.Module) -> bool:
    """Whether an attached method drops cache entries."""
    live = attachment(model)
    return live is not None and live.part(CacheMethod)[0] is not None


def runtime_config(model: nn.Module) -> dict[str, Any]:
    """What config.json keeps of the attached methods under the key `llmopt`: {"steps": [{"method", "meta"}]}."""
    live = attachment(model)
    parts = live.parts if live else []
    return {"steps": [{"method": method.to_dict(), "meta": record.meta} for method, record in parts]}


def attach_from_config(model: nn.Module) -> None:
    """Attach what `model.config.llmopt` describes; nothing if it has been done."""
    if attachment(model) is not None:
        return
    for step in (model.config.to_dict().get("llmopt") or {}).get("steps", []):
        (name, given), = step["method"].items()
        build(name, given).restore(model, Record(step["meta"]))
