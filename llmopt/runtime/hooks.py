"""What `attach` puts into a model: hooks around each forward, and what its layers then do instead of attention."""
import inspect
import threading
from collections.abc import Iterable
from typing import Any

import torch
from llmopt_kernels import NONE, Rule, dense_attention, dense_visible, ragged_attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llmopt.errors import LlmoptError
from llmopt.method import Method, Record
from llmopt.model.blocks import attention_modules, blocks
from llmopt.model.modeling import drop_tensors, let_save, put_tensor, tensors_below
from llmopt.model.positions import attention_windows
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.cache_layer import RaggedLayer
from llmopt.runtime.interface import KEY, NAME
from llmopt.runtime.prompt import Prompt

EVICTOR, SELECTOR = "evicting kv method", "prefill selector"     # places: at most one attached method each
OTHER_CACHES = ("static", "offloaded", "offloaded_static", "quantized")


class Forward(threading.local):
    """What the forward under way needs to know: each thread has its own, and a copied model starts without one."""

    def __init__(self) -> None:
        self.cache: LlmoptCache | None = None
        self.tokens = 0
        self.due = False                                # it ends in a compression
        self.plan: dict[int, Any] = {}                  # what the kv method decides once, by batch row
        self.shared: dict[Any, Any] = {}                # what methods tell themselves from layer to layer

    def __reduce__(self) -> tuple:
        return Forward, ()


class Attachment:
    """All that is added to one model: its parts, by place, and what the present forward needs to know."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.parts: dict[str, tuple[Method, dict[str, Any]]] = {}    # place -> method, meta; in order of attachment
        self.frozen = False
        self.now = Forward()
        self.rules: dict[int, Rule] = {}
        self.stats: dict[int, Any] = {}                 # counters of a prefill selector, by layer
        self.before = model.config._attn_implementation
        self.modules = attention_modules(model)
        self.groups = [block.kv_heads for block in blocks(model)]
        decoder = model.get_decoder()
        self.arguments = list(inspect.signature(decoder.forward).parameters)
        self._switch_on(decoder)

    def _switch_on(self, decoder: nn.Module) -> None:
        self.model.set_attn_implementation(NAME)
        if any(m.config._attn_implementation != NAME for m in self.modules if m is not None):
            raise LlmoptError(f"{type(self.model).__name__} does not let its attention be replaced")
        self.kind = type(self.model)
        let_save(self.model)
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
        drop_tensors(self.model)
        self.model.__class__ = self.kind
        self.model.set_attn_implementation(self.before)

    # ----------------------------------------------------------------------------------------------------- parts

    def add(self, method: Method, record: Record) -> None:
        """Put a method into its place; its tensors become buffers `llmopt.<step>.<name>` and follow the model about."""
        if method.place in self.parts:
            other, _ = self.parts[method.place]
            raise LlmoptError(f"{other.name} is attached already; at most one {method.place} at a time")
        for name, tensor in record.tensors.items():
            put_tensor(self.model, f"{len(self.parts)}.{name}", tensor)
        self.parts[method.place] = (method, record.meta)

    def keep(self, parts: dict[str, tuple[Method, dict[str, Any]]]) -> None:
        """Take off all parts but these, the first ones that were attached."""
        for step in range(len(parts), len(self.parts)):
            drop_tensors(self.model, str(step))
        self.parts = parts

    def method(self, place: str) -> Any:
        """The method in a place, or None."""
        return self.parts[place][0] if place in self.parts else None

    def record(self, place: str) -> Record:
        """What the method in a place has recorded when it was applied."""
        step = list(self.parts).index(place)
        return Record(self.parts[place][1], tensors_below(self.model, str(step)))

    def new_cache(self) -> LlmoptCache:
        """An empty cache that fits the model."""
        return LlmoptCache(self.groups, attention_windows(self.model))

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
        self.now.tokens, self.now.due, self.now.plan, self.now.shared = given.shape[1], False, {}, {}
        use = self.model.config.use_cache if named.get("use_cache") is None else named["use_cache"]
        if named.get("past_key_values") is None and use:
            named["past_key_values"] = self.new_cache()
        self.now.cache = cache = named.get("past_key_values")
        if cache is not None:
            if not isinstance(cache, LlmoptCache):
                raise LlmoptError(f"a {type(cache).__name__} was passed to a model with attached llmopt methods; "
                                  "pass none, or the past_key_values that it returned")
            self._note_mask(named, given.shape[0])
            self._note_position_ids(named.get("position_ids"), given.shape[0])
            self.now.due = self._is_due()
        return (), named

    def _is_due(self) -> bool:
        method = self.method(EVICTOR)
        if method is None or self.frozen:
            return False
        tokens = self.now.tokens
        return tokens > 1 or (method.every is not None and self.now.cache.pending + tokens >= method.every)

    def _note_mask(self, named: dict, batch: int) -> None:
        """Keep the padding mask with the cache; a call without one continues with what is known."""
        mask, cache = named.get("attention_mask"), self.now.cache
        total = cache.get_seq_length() + self.now.tokens
        if mask is None and cache.mask is not None:
            mask = torch.cat([cache.mask, cache.mask.new_ones(batch, self.now.tokens)], 1)
            named["attention_mask"] = mask
        if mask is None or mask.ndim != 2:
            return
        if mask.shape[1] != total:
            raise LlmoptError(f"attention_mask has {mask.shape[1]} columns, {total} tokens were seen")
        cache.mask = None if bool(mask.all()) else mask.to(self.model.device).bool()

    def _note_position_ids(self, given: Tensor | None, batch: int) -> None:
        """Keep the position ids with the cache as soon as they are not simply the columns."""
        cache = self.now.cache
        seen = cache.get_seq_length()
        columns = torch.arange(seen + self.now.tokens, device=self.model.device)
        given = columns[None, seen:] if given is None or given.ndim != 2 else given
        if cache.position_ids is None and bool((given == columns[seen:]).all()):
            return
        before = columns[None, :seen] if cache.position_ids is None else cache.position_ids
        cache.position_ids = torch.cat([x.expand(batch, -1) for x in (before, given)], 1)

    def _leave(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache, self.now.cache, self.now.shared = self.now.cache, None, {}
        if cache is None or output is None:             # None: the forward has raised
            return
        cache.pending += self.now.tokens
        if self.now.due:
            method = self.method(EVICTOR)
            if not method.layer_by_layer:
                method.compress(cache, self, self.record(EVICTOR), cache.attending())
            cache.pending = 0

    @torch.no_grad()
    def rehearse(self, length: int, layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> LlmoptCache:
        """The cache after a prompt with these queries, keys and values in its layers: no weight is read."""
        cache = self.new_cache()
        self.now.cache, self.now.tokens, self.now.plan, self.now.shared = cache, length, {}, {}
        self.now.due = self._is_due()
        for index, (query, keys, values) in enumerate(layers):
            keys, values = cache.update(keys, values, index)
            if self.modules[index] is not None:
                rule = Rule(query.shape[-1] ** -0.5, None, cache.layers[index].window)
                self.attend(index, query, keys, values, None, rule)
        self._leave(self.model, (), {}, cache)
        return cache

    # --------------------------------------------------------------------------------------------- inside a layer

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
               rule: Rule) -> Tensor:
        """Attention of layer `index`: [B, H, T, D] over the cache's tail [B, G, S, D] and what the layer has kept.

        A kv method that can decide on this layer alone makes it smaller before the next layer fills its own.
        """
        layer = None if self.now.cache is None else self.now.cache.layers[index]
        seen = keys.shape[2] if layer is None else layer.seen
        prompt = Prompt(query, keys, values, None if layer is None else layer.kept, mask, seen, rule, index)
        if mask is not None and mask.ndim == 4:
            return self._custom_mask(prompt)
        self.rules[index] = rule
        if mask is not None and mask.shape[1] != seen:
            raise LlmoptError(f"attention_mask has {mask.shape[1]} columns, {seen} tokens were seen")
        if layer is None:
            return self._attention(prompt)
        layer.window = rule.window
        self._record(layer, query, mask)
        out = self._attention(prompt)
        if self.now.due and self.method(EVICTOR).layer_by_layer:
            self.method(EVICTOR).compress(self.now.cache, self, self.record(EVICTOR), [index])
        layer.slide()
        return out

    def _attention(self, prompt: Prompt) -> Tensor:
        """Attention of the newest tokens over all that a layer holds: by the prefill selector if there is one."""
        if self._is_selected(prompt):
            return self.method(SELECTOR).prefill(prompt, self)
        query, tail, first, rule = prompt.query, (prompt.keys, prompt.values), prompt.first, prompt.rule
        if prompt.kept is None:
            return dense_attention(query, *tail, prompt.mask, first, rule)
        visible = dense_visible(query, prompt.keys, prompt.mask, first, rule)
        return ragged_attention(query, prompt.kept, tail, visible, first, rule)

    def _is_selected(self, prompt: Prompt) -> bool:
        return self.method(SELECTOR) is not None and prompt.query.shape[2] > 1 and not self.frozen

    def _record(self, layer: RaggedLayer, query: Tensor, mask: Tensor | None) -> None:
        """Keep the queries that the kv method will ask for; of single tokens only if it compresses after them."""
        method = self.method(EVICTOR)
        if method is None or self.frozen or method.queries() == 0 or (query.shape[2] == 1 and method.every is None):
            return
        first = layer.seen - query.shape[2]
        positions = torch.arange(first, layer.seen, device=query.device).expand(query.shape[0], -1)
        if mask is not None:
            positions = positions.masked_fill(~mask[:, first:], NONE)
        layer.record(query, positions, method.queries(), holes=self.now.cache.mask is not None)

    def _custom_mask(self, prompt: Prompt) -> Tensor:
        """Attention under a 4-D mask, which a prefill selector must be able to read."""
        kept = prompt.kept is not None or (self.now.cache is not None and self.method(EVICTOR) is not None)
        selected = self._is_selected(prompt)
        if kept or (prompt.rule.softcap is not None and not selected):
            raise LlmoptError("packed sequences and 4-D attention masks cannot be combined with an evicting kv method "
                              "or with softcap; pass a 2-D attention_mask")
        if selected:
            return self.method(SELECTOR).prefill(prompt, self)
        return scaled_dot_product_attention(prompt.query, prompt.keys, prompt.values, prompt.mask,
                                            scale=prompt.rule.scaling, enable_gqa=True)
