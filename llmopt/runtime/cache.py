"""A key-value cache whose layers may hold different entries per batch row and KV head, and free what they drop."""
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llmopt.errors import LlmoptError
from llmopt.runtime.cache_layer import Entries, RaggedLayer

__all__ = ["Entries", "LlmoptCache", "RaggedLayer"]


class LlmoptCache(Cache):
    """The cache of a whole model, whose layers have `groups` KV heads (0: no attention) and maybe sliding windows.

    mask: bool [B, seen], False at padding, or None while there is none. position_ids: [B, seen] as the model was given
    them, or None while they count the columns. pending: tokens since the last compression.
    """

    def __init__(self, groups: list[int], windows: list[int | None]):
        super().__init__(layers=[RaggedLayer(*shape) for shape in zip(groups, windows, strict=True)])
        self.mask: Tensor | None = None
        self.position_ids: Tensor | None = None
        self.pending = 0

    def fork(self) -> "LlmoptCache":
        """A copy to continue from, at no cost in memory until it grows; this one stays as it is."""
        twin = LlmoptCache([], [])
        twin.__dict__.update(self.__dict__, layers=[layer.fork() for layer in self.layers])
        return twin

    def without_last(self) -> "LlmoptCache":
        """A copy that has not seen the last token yet; what its coming made the method evict stays evicted."""
        twin = self.fork()
        twin.layers = [layer.without_last() for layer in self.layers]
        twin.mask, twin.position_ids = (None if x is None else x[:, :-1] for x in (self.mask, self.position_ids))
        return twin

    def reset(self) -> None:
        super().reset()
        self.mask = self.position_ids = None
        self.pending = 0

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
        self.mask, self.position_ids = (None if x is None else x[rows.to(x.device)]
                                        for x in (self.mask, self.position_ids))

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
        """Bytes of all tensors held: keys, values, positions, and queries waiting for the next compression."""
        tensors = [t for layer in self.layers for t in layer.tensors()]
        tensors += [x for x in (self.mask, self.position_ids) if x is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def dense_nbytes(self) -> int:
        """Bytes of keys and values that an uncompressed cache would hold now (a sliding layer: its window)."""
        total = 0
        for layer in (layer for layer in self.layers if layer.is_initialized):
            length = layer.seen if layer.window is None else min(layer.seen, layer.window - 1)
            for held in (layer.keys, layer.values):
                total += held.shape[0] * held.shape[1] * length * held.shape[3] * held.element_size()
        return total
