"""What `attach` puts into a model: hooks around each forward, and what its layers then do instead of attention."""
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from llmopt_kernels import NONE, Ragged, Rule, dense_attention, dense_visible, ragged_attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llmopt.errors import LlmoptError
from llmopt.method import Method, Record
from llmopt.model.blocks import attention_modules, blocks, decoder, spec_of
from llmopt.model.levels import refuse_below
from llmopt.model.modeling import drop_tensors, let_save, put_tensor, tensors_below
from llmopt.model.positions import attention_windows, refuse_bidirectional, refuse_far
from llmopt.model.usable import check_wrapping
from llmopt.runtime.cache import LlmoptCache
from llmopt.runtime.cache_layer import RaggedLayer
from llmopt.runtime.compression import ATTENTION, EVICTOR, after_attention, after_forward, decide
from llmopt.runtime.forward import Forward
from llmopt.runtime.interface import KEY, NAME
from llmopt.runtime.lanes import lanes_attention
from llmopt.runtime.prompt import Attended, Prompt
from llmopt.runtime.states import states_by_layer

SERVED = (None, "dynamic")                                       # cache implementations of transformers


class Attachment:
    """All that is added to one model: its parts, by place, and what the present forward needs to know."""

    def __init__(self, model: nn.Module):
        check_wrapping(model)
        refuse_below(model, "run time", "what acts while the model runs")
        refuse_bidirectional(model)
        self.model = model
        self.parts: dict[str, tuple[Method, dict[str, Any]]] = {}    # place -> method, meta; in order of attachment
        self.now = Forward()
        self.rules: dict[int, Rule] = {}
        self.stats: dict[int, Any] = {}                 # counters of a prefill selector, by layer
        self.before = model.config._attn_implementation
        self.modules = attention_modules(model)
        self.rotary = spec_of(model).rotary is not None
        self.configs = list({id(m.config): m.config for m in self.modules if m is not None}.values())
        self.groups = [block.kv_heads for block in blocks(model)]
        self.states = None if spec_of(model).known else states_by_layer(model.config)
        self.looking: list = []                         # hooks that the methods ask for
        inner = decoder(model)
        self.arguments = list(inspect.signature(inner.forward).parameters)
        self._switch_on(inner)

    def _switch_on(self, decoder: nn.Module) -> None:
        self.model.set_attn_implementation(NAME)
        if any(config._attn_implementation != NAME for config in self.configs):
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
        for handle in self.handles + self.looking:
            handle.remove()
        for module in (self.model, *(m for m in self.modules if m is not None)):
            module.__dict__.pop(KEY, None)
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        self.now.cache = None
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
        self._look()

    def keep(self, parts: dict[str, tuple[Method, dict[str, Any]]]) -> None:
        """Take off all parts but these, the first ones that were attached."""
        for step in range(len(parts), len(self.parts)):
            drop_tensors(self.model, str(step))
        self.parts = parts
        self._look()

    def _look(self) -> None:
        """Put up what the methods ask for in the model's modules: for the evictor, what its attention reads."""
        for handle in self.looking:
            handle.remove()
        asked = self.method(EVICTOR) is not None and self.method(EVICTOR).hidden
        self.looking = [module.register_forward_pre_hook(self._see, with_kwargs=True)
                        for module in self.modules if asked and module is not None]
        self.looking += [handle for method, _ in self.parts.values() for handle in method.hooks(self)]

    def method(self, place: str) -> Any:
        """The method in a place, or None."""
        return self.parts[place][0] if place in self.parts else None

    def record(self, place: str) -> Record:
        """The record of the method in a place, made when it was applied."""
        step = list(self.parts).index(place)
        return Record(self.parts[place][1], tensors_below(self.model, str(step)))

    def new_cache(self) -> LlmoptCache:
        """An empty cache that fits the model."""
        return LlmoptCache(self.groups, attention_windows(self.model), self.model, self.states)

    def _prepare_cache(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """Stands in for the method of that name that `generate` calls."""
        kind, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if kind not in SERVED:
            raise LlmoptError(f"cache_implementation={kind!r} cannot be combined with attached llmopt methods, which "
                              "bring their own cache; set it to None")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()
        elif given is not None:
            _checked(given)._is_user_defined = True         # generate then leaves it in a state to go on from

    # ------------------------------------------------------------------------------------------- around a forward

    @torch.compiler.disable
    def _enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        named = dict(zip(self.arguments, args, strict=False)) | kwargs
        given = named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]
        self.now.begin(0 if given is None else given.shape[1])
        if given is None:
            return None                                     # the model says what is missing
        self._check_attention()
        self._bring_cache(decoder, named)
        if named.get("past_key_values") is not None:
            self._open(_checked(named["past_key_values"]), named, given.shape[0])
        return (), named

    def _check_attention(self) -> None:
        for config in self.configs:
            if not str(config._attn_implementation).startswith(NAME):
                raise LlmoptError(f"set_attn_implementation({config._attn_implementation!r}) has switched off the "
                                  f"attached methods; set it back to {NAME!r}, or call llmopt.runtime.detach")

    def _bring_cache(self, decoder: nn.Module, named: dict) -> None:
        """Put a new cache among the arguments of a forward that wants one; checkpointed layers take none."""
        if decoder.training and decoder.is_activation_checkpointing:
            if named.get("past_key_values") is not None:
                raise LlmoptError("gradient checkpointing cannot be combined with past_key_values")
            named["use_cache"] = False
        use = self.model.config.use_cache if named.get("use_cache") is None else named["use_cache"]
        if named.get("past_key_values") is None and use:
            named["past_key_values"] = self.new_cache()

    def _open(self, cache: LlmoptCache, named: dict, batch: int) -> None:
        """Let this forward read and fill the cache, which learns what is known of the new tokens."""
        cache.begin(self.now, self.model, batch)
        mask = named.get("attention_mask")
        mask = mask.to(self.model.device) if isinstance(mask, Tensor) else mask
        named["attention_mask"] = cache.note_mask(mask, batch, self.now.tokens)
        method = self.method(EVICTOR)
        if method is not None and (method.replays or method.reads_ids):
            cache.note_ids(named.get("input_ids"), self.now.tokens, method.name)
        if self.rotary and (given := cache.counted_positions(named.get("position_ids"), self.now.tokens)) is not None:
            named["position_ids"] = given
        if self.rotary and named.get("position_ids") is None and (seen := cache.get_seq_length()):
            named["position_ids"] = torch.arange(seen, seen + self.now.tokens, device=self.model.device)[None]
        if not self.rotary:
            refuse_far(self.model, named.get("position_ids"), cache.get_seq_length() + self.now.tokens, cache.mask)
        cache.note_position_ids(named.get("position_ids"), batch, self.now.tokens)
        decide(self)

    @torch.compiler.disable
    def _leave(self, decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache, self.now.cache = self.now.cache, None
        if cache is not None and output is not None:    # None: the forward has raised
            after_forward(self, cache)
        if cache is not None:
            cache.end(died=output is None)
        self.now.shared, self.now.replayed, self.now.hidden = {}, {}, None

    @torch.no_grad()
    def rehearse(self, length: int, layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> LlmoptCache:
        """The cache after a prompt with these queries, keys and values in its layers: no weight is read."""
        cache = self.new_cache()
        self.now.begin(length)
        cache.begin(self.now, self.model, 1)
        decide(self)
        self.now.rehearsing = True
        for index, (query, keys, values) in enumerate(layers):
            keys, values = cache.update(keys, values, index)
            if self.modules[index] is not None:
                rule = Rule(query.shape[-1] ** -0.5, None, cache.layers[index].window)
                self.attend(index, query, keys, values, None, rule)
        self._leave(self.model, (), {}, cache)
        return cache

    def finish(self, cache: LlmoptCache, found: dict[Any, Any]) -> None:
        """Make a cache smaller that has been read in full, as the methods would have done at the end of its forward.

        found: what of it has been read again before, and what comes to it; see Forward.
        """
        self.now.begin(cache.get_seq_length())
        cache.begin(self.now, self.model, cache.batch_size)
        self.now.replayed = found
        decide(self)
        for index in cache.attending():
            after_attention(self, index)
        self._leave(self.model, (), {}, cache)

    # --------------------------------------------------------------------------------------------- inside a layer

    @torch.compiler.disable
    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.now.hidden = args[0] if args else kwargs["hidden_states"]

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
               rule: Rule) -> Tensor:
        """Attention of layer `index`: [B, H, T, D] over the cache's tail [B, G, S, D] and what the layer has kept.

        A kv method that can decide on this layer alone makes it smaller before the next layer fills its own.
        """
        layer = None if self.now.cache is None else self.now.cache.layers[index]
        seen = keys.shape[2] if layer is None else layer.seen
        in_place = layer is not None and self._in_place(layer, query, mask)
        prompt = None if in_place else Prompt(query, *self._held(layer, keys, values, mask), mask, seen, rule, index)
        if mask is not None and mask.ndim == 4:
            return self._custom_mask(prompt)
        self.rules[index] = rule
        if mask is not None and mask.shape[1] != seen:
            raise LlmoptError(f"attention_mask has {mask.shape[1]} columns, {seen} tokens were seen")
        at = Attended(query, keys, values, layer, mask, seen, rule, index)
        if layer is None:
            return self._adjusted(self._attention(prompt), at)
        layer.window, layer.plain = rule.window, rule.window is None and rule.plain
        self._record(index, query, mask)
        out = self._over_lanes(layer, query, mask, rule) if in_place else self._attention(prompt)
        out = self._adjusted(out, at)
        after_attention(self, index)
        if not self.now.recording:                          # a replay asks for the keys of all that it has read
            layer.slide()
        return out

    def _in_place(self, layer: RaggedLayer, query: Tensor, mask: Tensor | None) -> bool:
        """True for a single token that attends to all that the lanes of its layer hold, kept entries among it."""
        return layer.joined and query.shape[2] == 1 and not self.now.cache.hides and (mask is None or mask.ndim == 2)

    def _held(self, layer: RaggedLayer | None, keys: Tensor, values: Tensor,
              mask: Tensor | None) -> tuple[Tensor, Tensor, Ragged | None]:
        """The tail, and the kept entries that the mask does not hide."""
        if layer is None or not layer.compressed:
            return keys, values, None
        hidden = self.now.cache.hides and mask is not None and mask.ndim == 2
        return layer.keys, layer.values, layer.shown(mask) if hidden else layer.kept

    def _over_lanes(self, layer: RaggedLayer, query: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
        """Attention of a single token over the lanes of its layer; of what the mask hides, only the tail has any."""
        return lanes_attention(query, layer.lanes, self.now.mask_from(layer.tail_start, mask), rule.scaling)

    def _attention(self, prompt: Prompt) -> Tensor:
        """Attention of the newest tokens over all that a layer holds: by the sparse method if there is one for them."""
        if self._is_selected(prompt):
            return self.method(ATTENTION).attention(prompt, self)
        query, tail, first, rule = prompt.query, (prompt.keys, prompt.values), prompt.first, prompt.rule
        if prompt.kept is None:
            return dense_attention(query, *tail, prompt.mask, first, rule)
        start = prompt.seen - prompt.keys.shape[2]
        hides = query.shape[2] > 1 or self.now.mask_from(start, prompt.mask) is not None
        visible = dense_visible(query, prompt.keys, prompt.mask if hides else None, first, rule)
        return ragged_attention(query, prompt.kept, tail, visible, first, rule)

    def _adjusted(self, out: Tensor, at: Attended) -> Tensor:
        """What the layer gives instead of `out` [B, H, T, D], where a method adjusts it."""
        method = self.method(ATTENTION)
        return method.adjust(out, at, self) if method is not None and method.adjusts else out

    def _is_selected(self, prompt: Prompt) -> bool:
        method, single = self.method(ATTENTION), prompt.query.shape[2] == 1
        if method is None or method.adjusts or self.now.frozen or method.decodes != single:
            return False
        two_axes = prompt.mask is None or prompt.mask.ndim == 2
        return not single or self.now.cache is not None and prompt.kept is None and two_axes

    def _record(self, index: int, query: Tensor, mask: Tensor | None) -> None:
        """Keep the queries that the kv method will ask for; of single tokens only if it compresses after them, or asks
        all since the last compression.
        """
        method, hidden, layer = self.method(EVICTOR), self.now.hidden, self.now.cache.layers[index]
        self.now.hidden = None
        last = 0 if method is None else None if method.hidden else method.queries()
        if last == 0 or (self.now.frozen or method.replays) and not self.now.recording:
            return
        if query.shape[2] == 1 and method.every is None and last is not None and not self.now.recording:
            return
        first = layer.seen - query.shape[2]
        positions = torch.arange(first, layer.seen, device=query.device).expand(query.shape[0], -1)
        if mask is not None:
            positions = positions.masked_fill(~mask[:, first:], NONE)
        query = query[..., :0] if method.queries() == 0 else query
        layer.record(query, positions, last, self.now.cache.mask is not None, self._condensed(index, hidden))

    def _condensed(self, index: int, hidden: Tensor | None) -> Tensor | None:
        """What the evictor keeps of a layer's hidden states."""
        if hidden is None:
            return None
        if self.now.record is None:
            self.now.record = self.record(EVICTOR)
        return self.method(EVICTOR).condense(hidden, index, self.now.record)

    def _custom_mask(self, prompt: Prompt) -> Tensor:
        """Attention under a 4-D mask, which a prefill selector must be able to read."""
        kept = prompt.kept is not None or (self.now.cache is not None and self.method(EVICTOR) is not None)
        selected = self._is_selected(prompt)
        if kept or not (prompt.rule.plain or selected):
            raise LlmoptError("packed sequences and 4-D attention masks cannot be combined with an evicting kv method, "
                              "softcap or attention sinks; pass a 2-D attention_mask")
        if selected:
            return self.method(ATTENTION).attention(prompt, self)
        if self.method(ATTENTION) is not None and self.method(ATTENTION).adjusts:
            raise LlmoptError(f"packed sequences and 4-D attention masks cannot be combined with "
                              f"{self.method(ATTENTION).name}; pass a 2-D attention_mask")
        return scaled_dot_product_attention(prompt.query, prompt.keys, prompt.values, prompt.mask,
                                            scale=prompt.rule.scaling, enable_gqa=True)


def _checked(cache: Any) -> LlmoptCache:
    if not isinstance(cache, LlmoptCache):
        raise LlmoptError(f"a {type(cache).__name__} was passed to a model with attached llmopt methods; "
                          "pass none, or the past_key_values that it returned")
    return cache
