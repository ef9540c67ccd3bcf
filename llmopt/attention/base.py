"""Base of sparse prefill: when it is worth it, padding, packed sequences, kept entries, counters.

A method writes `select` alone. Every sequence of the batch is served as if it were alone, so its result depends on no
other. Where a kv method has dropped tokens, `select` sees the run of newest tokens that all heads still hold; the
entries before that gap are what was worth keeping, and all queries read all of them.
"""
import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from llmopt_kernels import (
    Partial,
    Rule,
    Stripes,
    dense_attention,
    merged,
    ragged_partial,
    sparse_attention,
    sparse_partial,
    sunk,
)
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.sequences import Sequence, causal_pairs, numbered, sequences
from llmopt.errors import LlmoptError
from llmopt.method import Record
from llmopt.runtime.attach import PrefillMethod
from llmopt.runtime.compression import ATTENTION
from llmopt.runtime.hooks import Attachment
from llmopt.runtime.prompt import Prompt

DENSE_ABOVE = 0.75     # dense where more than this share of the causal pairs is expected, or has been chosen


@dataclasses.dataclass(frozen=True)
class State:
    """The context of `select` besides q and k.

    values: [G, S, D], for a base that the method computes itself (`Stripes.done`).
    offset: keys in front of the first query. dropped: tokens older than the first key, which slid out of the window or
    were evicted; `Stripes.sinks` counts them too, all else counts from the first key. record: what `plan` has recorded.
    shared: a dict of this sequence's, alive for one forward, from the first layer to the last.
    """

    layer: int
    rule: Rule
    values: Tensor
    offset: int
    dropped: int
    record: Record = dataclasses.field(default_factory=Record)
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Counter:
    """Pairs of one layer by query head, int64 [H], of all prompts: computed, and what dense attention would compute.

    Prompts that are too short to be sparse are in it, with all their pairs; forwards of one token are not.
    """

    computed: Tensor
    dense: Tensor

    @property
    def causal(self) -> int:
        """Pairs that dense attention would compute, mean over the heads."""
        return int(self.dense.double().mean())

    @property
    def density(self) -> Tensor:
        """Computed / causal pairs: [H]."""
        return self.computed / self.dense.clamp(min=1)


@dataclass(frozen=True)
class Selector(PrefillMethod):
    """Compute a prompt's attention from the selected keys only. Applies to every forward of more than one token."""

    min_length: int = Field(1024, ge=0, description="shorter prompts are computed densely, each row of a batch by its "
                                                    "own length; 0: none, however small the gain")
    last: int = Field(0, ge=0, description="last tokens of every forward, where questions stand, that read everything")

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        """The keys to read for q [H, T, D], k [G, S, D]: real tokens only, the queries are the last T of them."""

    def predict(self, length: int) -> float:
        """Expected share of the causal pairs for a prompt of this length, where it is known beforehand."""
        return 0.0

    def prefill(self, prompt: Prompt, live: Attachment) -> Tensor:
        if prompt.mask is None and prompt.kept is None and not self._is_sparse(prompt.seen):     # no row differs
            pairs = causal_pairs(prompt.first, prompt.seen, prompt.rule.window) * len(prompt.query)
            _count(live, prompt, pairs, pairs)
            return dense_attention(prompt.query, prompt.keys, prompt.values, None, prompt.first, prompt.rule)
        out = prompt.query.new_zeros(*prompt.query.shape[:3], prompt.values.shape[-1])
        for one in sequences(prompt, *self._numbered(prompt, live.now.shared)):
            out[one.number[0]][:, one.columns] = self._attention(one, prompt, live)
        return out

    def _is_sparse(self, length: int) -> bool:
        return not self.min_length or (length >= self.min_length and self.predict(length) <= DENSE_ABOVE)

    def _numbered(self, prompt: Prompt, shared: dict) -> tuple[Tensor, Rule]:
        """The sequence of each column; a 4-D mask, the same for many layers, is read once."""
        if prompt.mask is None or prompt.mask.ndim == 2:
            return numbered(prompt)
        key = ATTENTION, id(prompt.mask), prompt.rule
        try:
            if key not in shared:
                shared[key] = (prompt.mask, *numbered(prompt))       # the mask, so that its id stays its own
        except LlmoptError as fact:
            raise LlmoptError(f"{fact}, which {self.name} cannot follow; pass a 2-D attention_mask, position_ids that "
                              f"begin again with every packed sequence and use_cache=False, or detach it") from None
        sequence, within = shared[key][1:]
        return sequence, dataclasses.replace(within, sinks=prompt.rule.sinks)           # which each layer has its own

    def _attention(self, one: Sequence, prompt: Prompt, live: Attachment) -> Tensor:
        """One sequence by itself: [H, T, D]."""
        if len(one.columns) == 1:                           # no prompt, though a neighbour's may have come with it
            return one.dense()
        if not self._is_sparse(one.length) or len(one.columns) <= self.last:
            return _dense(one, prompt, live)
        early, late = one.divided(len(one.columns) - self.last)
        out = self._selected(early, prompt, live)
        return out if late is None else torch.cat([out, _dense(late, prompt, live)], 1)

    def _selected(self, one: Sequence, prompt: Prompt, live: Attachment) -> Tensor:
        """One sequence by selected keys, or densely where they are nearly all."""
        shared = live.now.shared.setdefault((ATTENTION, one.number), {})
        state = State(prompt.layer, one.rule, one.values, one.first - one.dropped, one.dropped,
                      live.record(ATTENTION), shared)
        stripes, dense = self.select(one.query, one.keys, state), one.dense_pairs()
        if self.min_length and not _saves(one, stripes, dense):
            return _dense(one, prompt, live)
        out, pairs = _sparse(one, dataclasses.replace(stripes, sinks=max(0, stripes.sinks - one.dropped)))
        _count(live, prompt, pairs, dense)
        return out


def _dense(one: Sequence, prompt: Prompt, live: Attachment) -> Tensor:
    """One sequence, all of it, which is counted."""
    pairs = one.dense_pairs()
    _count(live, prompt, pairs, pairs)
    return one.dense()


def _saves(one: Sequence, stripes: Stripes, dense: Tensor) -> bool:
    """False where so much has been chosen that dense attention is faster; dense: its pairs [H]."""
    total = one.keys.shape[1]
    if one.old is not None or (one.rule.window or total) < total:               # what is chosen is not all that counts
        return True
    return stripes.about(len(one.columns), total) <= DENSE_ABOVE * float(dense.double().mean())


def _sparse(one: Sequence, stripes: Stripes) -> tuple[Tensor, Tensor]:
    """Attention of one sequence by its selected keys and all old entries, [H, T, D], and the pairs [H]."""
    if one.old is None:
        return sparse_attention(one.query, one.keys, one.values, stripes, one.rule)
    new, pairs = sparse_partial(one.query, one.keys, one.values, stripes, one.rule)
    old = ragged_partial(one.query[None], one.old, one.first, one.rule)
    return sunk(merged(Partial(old.out[0], old.lse[0]), new), one.rule).out.to(one.query.dtype), pairs + one.old_pairs()


def _count(live: Attachment, prompt: Prompt, computed: Tensor | int, dense: Tensor | int) -> None:
    if prompt.layer not in live.stats:
        none = torch.zeros(prompt.query.shape[1], dtype=torch.long, device=prompt.query.device)
        live.stats[prompt.layer] = Counter(none, none)
    counter = live.stats[prompt.layer]
    counter.computed, counter.dense = counter.computed + computed, counter.dense + dense
