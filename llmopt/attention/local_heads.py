"""Local heads: those that look only near get a window, the others read everything.

Which heads, any head score tells: the `share` of all heads that score lowest (`heads.span`: the shortest mean distance
between a query and what it reads). Without training, as in DuoAttention (Xiao et al., 2024, arXiv:2410.10819); models
trained with such heads: arXiv:2505.15548. A cache is no smaller for it: kv methods with `allocate: heads` do that.
"""
from typing import Any, ClassVar

import torch
from llmopt_kernels import Stripes
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.attention.base import Selector, State
from llmopt.calibration.head_scores import check_chosen, find
from llmopt.method import Record, Run
from llmopt.parts import register


@register("attention.local_heads")
@dataclass(frozen=True)
class LocalHeads(Selector):
    """Decided once, from head scores."""

    meta_shape: ClassVar[Any] = {"local": [[int]], str: object}

    heads: str = Field("heads.span", description="head scores: name of a score step, or a .json or .safetensors file")
    share: float = Field(0.5, ge=0, le=1, description="of all heads, those that get a window")
    lowest: bool = Field(True, description="heads of the lowest scores; false: of the highest, to see the difference")
    window: int = Field(1024, ge=1, description="tokens that a local head reads before each one, itself included")
    sinks: int = Field(4, ge=0, description="first tokens that a local head reads, too")

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"local": by layer the heads with a window}."""
        scores = find(self.heads, run, model)
        order = torch.cat(scores).argsort(descending=not self.lowest, stable=True)
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:round(self.share * len(order))]] = True
        return Record({"local": [part.nonzero().flatten().tolist() for part in chosen.split([*map(len, scores)])]})

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        check_chosen(record.meta["local"], model, self.name)

    def select(self, q: Tensor, k: Tensor, state: State) -> Stripes:
        windows = torch.full((len(q),), k.shape[1], device=q.device)
        windows[state.record.meta["local"][state.layer]] = self.window
        return Stripes(self.sinks, windows)
