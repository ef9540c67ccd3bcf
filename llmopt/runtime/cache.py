"""A key-value cache whose layers may hold different entries per batch row and KV head, and free what they drop."""
import weakref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from llmopt.errors import LlmoptError
from llmopt.runtime.cache_layer import Entries, RaggedLayer
from llmopt.runtime.forward import Forward
from llmopt.runtime.states import copied, new_states, tensors_of

__all__ = ["Entries", "LlmoptCache", "RaggedLayer"]

NOTES = ("mask", "position_ids", "dropped", "ids")     # tensors [B, ...] that a cache knows of its tokens


class Owner:
    """The model that a cache belongs to, not kept alive by it; a cache read from a file has none."""

    def __init__(self, model: nn.Module | None = None):
        self.model = None if model is None else weakref.ref(model)

    def differs(self, model: nn.Module) -> bool:
        """True if it is known to be another model."""
        return self.model is not None and self.model() is not model

    def __deepcopy__(self, memo: dict) -> "Owner":
        return self

    def __reduce__(self) -> tuple:
        return Owner, ()


class LlmoptCache(Cache):
    """The cache of a whole model, whose layers have `groups` KV heads (0: no attention) and maybe sliding windows.

    states: what layers keep beside keys and values (states.py), or None; how many of each layer is given.
    mask: bool [B, seen], False at padding, or None while there is none. position_ids: [B, seen] as the model was given
    them, or None while they count the columns. ids: int64 [B, seen], where a method looks at them again. dropped: bool
    [B, seen then], the tokens that a mask hid when entries were last dropped, or None. pending: tokens since the last
    compression. counts: position ids are left open and count real tokens, see counted_positions. hides: the mask of
    this forward hides kept entries. forward: the forward that reads this cache now, or one that died. stirred: it has
    come to the states.
    """

    def __init__(self, groups: list[int], windows: list[int | None], model: nn.Module | None = None,
                 states: list[int] | None = None):
        super().__init__(layers=[RaggedLayer(*shape) for shape in zip(groups, windows, strict=True)])
        self.states: Cache | None = new_states(states) if states and any(states) else None
        self.owner = Owner(model)
        self._forget()

    def _forget(self) -> None:
        self.mask: Tensor | None = None
        self.position_ids: Tensor | None = None
        self.dropped: Tensor | None = None
        self.ids: Tensor | None = None
        self.counts = False
        self.pending = 0
        self.hides = self.stirred = False
        self.forward: Forward | None = None

    # ------------------------------------------------------------------------------------------- around a forward

    def begin(self, forward: Forward, model: nn.Module, batch: int) -> None:
        """A forward of `model` over `batch` rows begins to read; raises LlmoptError where this cache cannot serve."""
        if self.forward is not None:
            raise LlmoptError("a forward with this cache has failed in the middle, or is still under way in another "
                              "thread; begin with a new cache")
        if self.owner.differs(model):
            raise LlmoptError("this cache was filled by another model, whose keys and values it holds; pass none")
        if self.batch_size not in (-1, batch):
            raise LlmoptError(f"the cache holds {self.batch_size} rows, {batch} were given")
        self.forward, forward.cache, self.stirred = forward, self, False
        forward.before = self.get_seq_length(), *(getattr(self, name) for name in NOTES)

    def end(self, died: bool) -> None:
        """The forward is over. After one that died in the middle no other may read this cache."""
        seen, *notes = self.forward.before
        if died and (self.stirred or any(self.layers[index].seen != seen for index in self.attending())):
            return
        if died:
            self.__dict__.update(zip(NOTES, notes, strict=True))
        self.forward = None

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        self._check_reading()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_reading(self) -> None:
        if self.forward is None or self.forward.cache is not self:
            raise LlmoptError("this cache was filled by a model with attached llmopt methods, and the model that reads "
                              "it has none (detached?): attach them again, or pass no past_key_values")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._counting(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length, self._counting(layer_idx))

    def _counting(self, index: int) -> int:
        """The layer that counts tokens for layer `index`: itself if it attends, else the first one that does."""
        return index if self.layers[index].groups else next(iter(self.attending()), index)

    # ------------------------------------------------------------------------------- states beside keys and values

    def _stir(self) -> Cache:
        self._check_reading()
        self.stirred = True
        return self.states

    def get_conv_state(self, *args, **kwargs) -> Tensor | None:
        return self._stir().get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        return self._stir().update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args, **kwargs) -> Tensor | None:
        return self._stir().get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        return self._stir().update_recurrent_state(*args, **kwargs)

    def has_previous_state(self, *args, **kwargs) -> bool:
        return (super() if self.states is None else self.states).has_previous_state(*args, **kwargs)

    def note_mask(self, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """The padding mask [B, seen + tokens] of a call, kept; a call without one continues with what is known.

        Kept entries of tokens that it hides become invisible; tokens that were hidden at a compression stay hidden.
        """
        total = self.get_seq_length() + tokens
        if self.mask is not None and (mask is None or mask.ndim != 2):
            self.mask = torch.cat([self.mask, self.mask.new_ones(batch, tokens)], 1)
            mask = self.mask if mask is None else mask
        if mask is None or mask.ndim != 2:
            return mask
        if mask.shape[1] != total:
            raise LlmoptError(f"attention_mask has {mask.shape[1]} columns, {total} tokens were seen")
        if mask.shape[0] != batch:
            raise LlmoptError(f"attention_mask has {mask.shape[0]} rows, {batch} were given")
        self.hides = self._hides(mask.bool())
        self.mask = None if bool(mask.all()) else mask.bool()
        return mask

    def _hides(self, mask: Tensor) -> bool:
        """True if `mask` [B, total] hides a kept entry."""
        hidden = ~mask[:, :max(layer.folded for layer in self.layers)]
        if self.dropped is None:
            return bool(hidden.any())
        dropped = torch.zeros_like(hidden)
        dropped[:, :self.dropped.shape[1]] = self.dropped
        if bool((dropped & ~hidden).any()):
            raise LlmoptError("attention_mask shows tokens that were hidden when the cache was compressed; they are "
                              "gone")
        return bool((hidden & ~dropped).any())

    def note_ids(self, given: Tensor | None, tokens: int, method: str) -> None:
        """Keep the token ids [B, tokens] of a forward, for a method that looks at them again."""
        if given is None:
            raise LlmoptError(f"{method} looks at token ids again: give input_ids, not inputs_embeds")
        if (0 if self.ids is None else self.ids.shape[1]) != self.get_seq_length():
            raise LlmoptError(f"{method} looks at token ids again, and this cache was begun without it and has not "
                              "kept them; begin with a new one")
        self.ids = given if self.ids is None else torch.cat([self.ids, given], 1)

    def counted_positions(self, given: Tensor | None, tokens: int) -> Tensor | None:
        """Position ids [B, tokens] that a caller with padding on the left has left open, counted from the first real
        token; `given` where they are not open. A rotary model answers alike, and `generate`, which counts, can go on.

        Columns that are given to a cache which counts are taken for open ones.
        """
        seen, pads = self.get_seq_length(), None
        if seen == 0:
            pads = None if self.mask is None else (~self.mask).long().cumprod(1).sum(1)          # [B]
            self.counts = given is None and pads is not None and bool(pads.any())
        if not self.counts:
            return given
        pads = seen - 1 - self.position_ids[:, -1] if pads is None else pads
        columns = torch.arange(seen, seen + tokens, device=pads.device)
        open_ = given is None or given.ndim == 2 and bool((given == columns).all())
        return (columns - pads[:, None]).clamp(min=0) if open_ else given

    def note_position_ids(self, given: Tensor | None, batch: int, tokens: int) -> None:
        """Keep the position ids [B, tokens] as soon as they are not simply the columns."""
        seen = self.get_seq_length()
        device = given.device if given is not None else None if self.position_ids is None else self.position_ids.device
        if given is None and self.position_ids is None:
            return
        columns = torch.arange(seen + tokens, device=device)
        given = columns[None, seen:] if given is None or given.ndim != 2 else given
        if self.position_ids is None and bool((given == columns[seen:]).all()):
            return
        before = columns[None, :seen] if self.position_ids is None else self.position_ids
        self.position_ids = torch.cat([x.expand(batch, -1) for x in (before, given)], 1)

    def note_dropped(self) -> None:
        """A compression is done: where a layer dropped entries, what the mask hides now is gone for good."""
        if any(self.layers[index].folded == self.layers[index].seen for index in self.attending()):
            self.dropped = None if self.mask is None else ~self.mask

    # ------------------------------------------------------------------------------------------------ copies, rows

    def fork(self) -> "LlmoptCache":
        """A copy to continue from, at no cost in memory until it grows; this one stays as it is."""
        twin = LlmoptCache([], [])
        twin.__dict__.update(self.__dict__, layers=[layer.fork() for layer in self.layers],
                             states=None if self.states is None else copied(self.states))
        return twin

    def without_last(self) -> "LlmoptCache":
        """A copy that has not seen the last token yet; what its coming made the method evict stays evicted.

        Raises LlmoptError where layers keep states.
        """
        if self.states is not None:
            raise LlmoptError("layers with a state (convolutions, Mamba, linear attention) cannot take a token back; "
                              "fork the cache before its last token is read")
        twin = self.fork()
        twin.layers = [layer.without_last() for layer in self.layers]
        seen = self.get_seq_length() - 1
        for name in NOTES:
            noted = getattr(self, name)
            setattr(twin, name, None if noted is None else noted[:, :seen])
        return twin

    def reset(self) -> None:
        super().reset()
        if self.states is not None:
            self.states.reset()
        self._forget()

    def crop(self, *args, **kwargs) -> None:
        raise LlmoptError("assisted decoding (assistant_model, prompt_lookup_num_tokens) takes tokens back, and what "
                          "was evicted cannot be brought back: not with attached llmopt methods")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if rows.tolist() == list(range(self.batch_size)):
            return
        for layer in self.layers:
            layer.select_rows(rows)
        if self.states is not None:
            self.states.reorder_cache(rows)
        for name in NOTES:
            noted = getattr(self, name)
            setattr(self, name, None if noted is None else noted[rows.to(noted.device)])

    @property
    def batch_size(self) -> int:
        return max(layer.batch_size for layer in self.layers)

    def attending(self) -> list[int]:
        """Indices of the layers that have attention."""
        return [i for i, layer in enumerate(self.layers) if layer.groups > 0]

    def lengths(self) -> list[int]:
        """Real tokens seen by each row."""
        if self.mask is None:
            return [self.get_seq_length()] * self.batch_size
        return self.mask.sum(1).tolist()

    def real(self, row: int) -> Tensor | None:
        """bool [seen]: the row's real tokens; None if all are."""
        return None if self.mask is None else self.mask[row]

    def kept(self) -> list[Tensor]:
        """Per layer, the entries held: [B, G] (padding that has not been dropped yet included; [0, 0] if skipped)."""
        return [layer.counts() for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes of all tensors held: keys, values, positions, states, and queries waiting for the next compression."""
        tensors = [t for layer in self.layers for t in layer.tensors()]
        tensors += [] if self.states is None else tensors_of(self.states)
        tensors += [x for x in map(self.__dict__.get, NOTES) if x is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def entry_nbytes(self) -> int:
        """Bytes of the keys and values held, codes with their scales: without positions and what methods note."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.entries())

    def dense_nbytes(self) -> int:
        """Bytes of keys and values that an uncompressed cache would hold now (a sliding layer: its window)."""
        total = 0
        for layer in (layer for layer in self.layers if layer.is_initialized):
            length = layer.seen if layer.window is None else min(layer.seen, layer.window - 1)
            for held in (layer.keys, layer.values):
                total += held.shape[0] * held.shape[1] * length * held.shape[3] * held.element_size()
        return total
