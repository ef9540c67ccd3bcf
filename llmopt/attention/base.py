"""Base of sparse prefill: when it is worth it, padding, counters. A method writes `select` alone."""
import dataclasses
from abc import abstractmethod

import torch
from llmopt_kernels import Rule, Stripes, sparse_attention
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.runtime.attach import PrefillMethod
from llmopt.runtime.hooks import Attachment

GAIN = 0.75     # dense where a method expects to compute more than this share of the causal pairs


@dataclasses.dataclass(frozen=True)
class State:
    """What `select` may know besides q and k."""

    layer: int
    rule: Rule
    offset: int         # keys in front of the first query
    dropped: int        # older tokens that a sliding-window layer holds no more; `sinks` counts them too


@dataclasses.dataclass
class Counter:
    """Pairs of one layer, per query head, summed over forwards: computed [H], causal (those a dense layer computes)."""

    computed: Tensor
    causal: int = 0

    @property
    def density(self) -> Tensor:
        """Computed / causal pairs: [H]."""
        return self.computed / max(1, self.causal)


@dataclass(frozen=True)
class Selector(PrefillMethod):
    """Compute a prompt's attention from the selected keys only. Applies to every forward of more than one token."""

    min_length: int = Field(1024, ge=0, description="shorter prompts are computed densely; 0: none, however small the "
                                                    "gain")

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        """The keys to read for q [H, T, D], k [G, S, D]: real tokens only, the queries are the last T of them."""

    def predict(self, length: int) -> float:
        """Expected share of the causal pairs for a prompt of this length, where it is known beforehand."""
        return 0.0

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, real: Tensor, rule: Rule, layer: int,
                live: Attachment) -> Tensor | None:
        length = real.shape[1]
        if self.min_length and (length < self.min_length or self.predict(length) > GAIN):
            return None
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        fresh = Counter(torch.zeros(query.shape[1], dtype=torch.int64, device=query.device))
        counter = live.stats.setdefault(layer, fresh)
        gone = length - keys.shape[2]
        for row in range(query.shape[0]):
            there, asked = real[row, gone:], real[row, length - query.shape[2]:]
            q, k, v = query[row][:, asked], keys[row][:, there], values[row][:, there]
            if q.shape[1] == 0:
                continue
            state = State(layer, rule, k.shape[1] - q.shape[1], int(real[row, :gone].sum()))
            out[row, :, asked] = self._one(q, k, v, state, counter)
        return out

    def _one(self, q: Tensor, k: Tensor, v: Tensor, state: State, counter: Counter) -> Tensor:
        """One row of the batch, without its padding: [H, T, D]."""
        stripes = self.select(q, k, state)
        stripes = dataclasses.replace(stripes, sinks=max(0, stripes.sinks - state.dropped))
        out, pairs = sparse_attention(q, k, v, stripes, state.rule)
        counter.computed += pairs
        counter.causal += causal_pairs(state.offset, k.shape[1], state.rule.window)
        return out


def causal_pairs(first: int, length: int, window: int | None = None) -> int:
    """Pairs (i, j) with first <= i < length, j <= i, and i - j < window."""
    reach = length if window is None else min(window, length)
    short = sum(range(first + 1, min(length, reach) + 1))
    return short + max(0, length - max(first, reach)) * reach
