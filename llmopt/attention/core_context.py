"""Core context: far tokens are read as one key and value for each run of `group` tokens.

    w = softmax over a run of (query of its last token . its keys)        core = (sum w k, sum w v, log group)
    row i reads the cores of runs that end before its window, and every token from there on

Chen et al., 2024 (CCA, arXiv:2412.12465), which pools hidden states and trains; here keys (rotated as they are) and
values are pooled, without training, so runs should be short. The logarithm lets a core count for as many tokens as it
stands for. Of runs whose last query is gone (an earlier piece of the prompt), the plain mean stands in. A tile of rows
shares its first token that is read by itself.
"""
import torch
from llmopt_kernels import Pooled, Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from llmopt.attention.base import Selector, State
from llmopt.parts import register


@register("attention.core_context")
@dataclass(frozen=True)
class CoreContext(Selector):
    """Nothing is left out, but far tokens are blurred."""

    group: int = Field(8, ge=1, description="tokens that one core stands for")
    window: int = Field(512, ge=1, description="newest tokens that are read one by one, at least")
    tile: int = Field(64, ge=1, description="rows that share their first token that is read by itself")

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        runs = max(0, k.shape[1] - self.window) // self.group
        keys, values = (x[:, :runs * self.group].unflatten(1, (runs, self.group)).float() for x in (k, state.values))
        weights = self._weights(q, keys, state, runs)                                         # [H, runs, group]
        cores = [(weights.unsqueeze(-2) @ x.repeat_interleave(len(q) // len(k), 0)).squeeze(-2) for x in (keys, values)]
        ends = (torch.arange(runs, device=q.device) + 1) * self.group - 1
        stands_for = torch.full(cores[0].shape[:2], float(self.group), device=q.device).log()
        begins = torch.arange(0, q.shape[1], self.tile, device=q.device) + state.offset
        start = ((begins - self.window + 1).clamp(min=0) // self.group).clamp(max=runs) * self.group
        return Stripes(0, start=start, pooled=Pooled(*cores, stands_for, ends), tile=self.tile)

    def _weights(self, q: Tensor, keys: Tensor, state: State, runs: int) -> Tensor:
        """[H, runs, group] float32; keys [G, runs, group, D]."""
        last = (torch.arange(runs, device=q.device) + 1) * self.group - 1 - state.offset
        asked = q[:, last.clamp(min=0)].unflatten(0, (len(keys), -1)).unsqueeze(-2)            # [G, h, runs, 1, D]
        logits = state.rule.logits(asked, keys.unsqueeze(1)).squeeze(-2).flatten(0, 1)         # [H, runs, group]
        return logits.masked_fill((last < 0)[:, None], 0.0).softmax(-1)
