"""Base of sparse prefill: when it is worth it, padding, packed sequences, kept entries, counters.

A method writes `select` alone. Every sequence of the batch is served as if it were alone, so its result depends on no
other. Where a kv method has dropped tokens, `select` sees the run of newest tokens that all heads still hold; the
entries before that gap are what was worth keeping, and all queries read all of them.
"""
import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from llmopt_kernels import (
    Partial,
    Rule,
    Stripes,
    dense_attention,
    gain,
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

GAIN = 1.25             # dense where attention would not be so many times faster: 1.1 times, behind its selection
TRIAL = 64              # queries in the middle of a prompt for which is selected first, to see that


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

    Prompts that are too short to be sparse are in it, with all their pairs; forwards of one token only where the method
    decodes, which counts those in the place of prompts.
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
    """Compute a prompt's attention from the selected keys only. Applies to every forward of more than one token.

    tries: selects for a few queries first, to see what comes of it; not where that costs as much as for all of them.
    """

    tries: ClassVar[bool] = True

    min_length: int = Field(1024, ge=0, description="shorter prompts are computed densely, each row of a batch by its "
                                                    "own length; 0: none, however small the gain")
    last: int = Field(0, ge=0, description="last tokens of every forward, where questions stand, that read everything")

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        """The keys to read for q [H, T, D], k [G, S, D]: real tokens only, the queries are the last T of them."""

    def attention(self, prompt: Prompt, live: Attachment) -> Tensor:
        if prompt.mask is None and prompt.kept is None and prompt.seen < self.min_length:         # no row differs
            pairs = causal_pairs(prompt.first, prompt.seen, prompt.rule.window) * len(prompt.query)
            add_pairs(live, prompt, pairs, pairs)
            return dense_attention(prompt.query, prompt.keys, prompt.values, None, prompt.first, prompt.rule)
        out = prompt.query.new_zeros(*prompt.query.shape[:3], prompt.values.shape[-1])
        for one in sequences(prompt, *self._numbered(prompt, live.now.shared)):
            if len(one.columns) == 1:                       # no prompt, though a neighbour's may have come with it
                got = one.dense()
            else:
                shared = live.now.shared.setdefault((ATTENTION, one.number), {})
                got, pairs = self.attend(one, prompt.layer, live.record(ATTENTION), shared)
                add_pairs(live, prompt, pairs, one.dense_pairs())
            out[one.number[0]][:, one.columns] = got
        return out

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

    def attend(self, one: Sequence, layer: int, record: Record, shared: dict) -> tuple[Tensor, Tensor]:
        """One sequence by itself: attention [H, T, D], and the pairs computed, int64 [H]."""
        if one.length < self.min_length or len(one.columns) <= self.last:
            return one.dense(), one.dense_pairs()
        early, late = one.divided(len(one.columns) - self.last)
        out, pairs = self._selected(early, layer, record, shared)
        if late is None:
            return out, pairs
        return torch.cat([out, late.dense()], 1), pairs + late.dense_pairs()

    def _selected(self, one: Sequence, layer: int, record: Record, shared: dict) -> tuple[Tensor, Tensor]:
        """One sequence by selected keys, or densely where that is as fast."""
        def chosen(some: Sequence, shared: dict) -> Stripes:
            return self.select(some.query, some.keys, State(layer, some.rule, some.values, some.first - some.dropped,
                                                            some.dropped, record, shared))
        part = self._middle(one)
        if part is None or self._is_faster(part, chosen(part, dict(shared))):
            stripes = chosen(one, shared)
            if self._is_faster(one, stripes):
                return _sparse(one, dataclasses.replace(stripes, sinks=max(0, stripes.sinks - one.dropped)))
        return one.dense(), one.dense_pairs()

    def _middle(self, one: Sequence) -> Sequence | None:
        """Some queries from the middle of a long prompt, over all that they may read."""
        half = len(one.columns) // 2
        if not self.tries or not self.min_length or half < 8 * TRIAL:
            return None
        return one.divided(half)[0].divided(half - TRIAL)[1]

    def _is_faster(self, one: Sequence, stripes: Stripes) -> bool:
        """Where entries have been dropped, dense attention takes the long way, and is slower at any rate."""
        return (not self.min_length or one.old is not None
                or gain(one.query, one.keys, one.values, stripes, one.rule) >= GAIN)


def _sparse(one: Sequence, stripes: Stripes) -> tuple[Tensor, Tensor]:
    """Attention of one sequence by its selected keys and all old entries, [H, T, D], and the pairs [H]."""
    if one.old is None:
        return sparse_attention(one.query, one.keys, one.values, stripes, one.rule)
    new, pairs = sparse_partial(one.query, one.keys, one.values, stripes, one.rule)
    old = ragged_partial(one.query[None], one.old, one.first, one.rule)
    return sunk(merged(Partial(old.out[0], old.lse[0]), new), one.rule).out.to(one.query.dtype), pairs + one.old_pairs()


def add_pairs(live: Attachment, prompt: Prompt, computed: Tensor | int, dense: Tensor | int) -> None:
    """Add pairs [H] to what a layer has computed so far, and to what dense attention would have."""
    if prompt.layer not in live.stats:
        none = torch.zeros(prompt.query.shape[1], dtype=torch.long, device=prompt.query.device)
        live.stats[prompt.layer] = Counter(none, none)
    counter = live.stats[prompt.layer]
    counter.computed, counter.dense = counter.computed + computed, counter.dense + dense
