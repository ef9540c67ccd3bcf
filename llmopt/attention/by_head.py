"""Budgets by head: a method that reads so many keys reads more of them in heads of larger scores.

    share_h = floor + (1 - floor) N w_h / sum w over the N heads of the model, none above `cap`

What a head cannot take goes to the others (water-filling, as in HeSS: arXiv:2603.25336). The shares have the mean 1, so
that as much is read as without them; by `heads.hess`, whose scores are shares of a layer, every layer keeps its part.
"""
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.attention.base import Selector, State
from llmopt.calibration.head_scores import find, water_fill
from llmopt.errors import LlmoptError
from llmopt.files.json_shapes import finite
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks


@dataclass(frozen=True)
class ByHead(Selector):
    """Base of what reads a number of keys that heads can share out. A method asks `shares` for this layer's."""

    meta_shape: ClassVar[Any] = {"shares?": [[finite]], str: object}

    heads: str | None = Field(None, description="head scores that share out what is read among all heads: the name of "
                                                "a score step, or a .json or .safetensors file; null: all alike")
    floor: float = Field(0.25, ge=0, lt=1, description="the least that a head gets, in even shares")
    cap: float = Field(8.0, ge=1, description="the most")

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"shares": [L][H]}; nothing where all heads are alike."""
        if self.heads is None:
            return Record()
        scores = find(self.heads, run, model)
        self.check_scores(scores, model)
        rest = 1 - self.floor
        shares = self.floor + rest * water_fill(torch.cat(scores).double(), (self.cap - self.floor) / rest)
        return Record({"shares": [part.tolist() for part in shares.split([*map(len, scores)])]})

    def check_scores(self, scores: list[Tensor], model: nn.Module) -> None:
        every = torch.cat(scores).double()
        if not len(every) or float(every.min()) < 0 or float(every.sum()) <= 0:
            raise LlmoptError(f"heads: {self.heads} holds scores below 0, or none above it, which are no shares; "
                              "heads.hess, heads.span and heads.retrieval give such")

    def check_record(self, model: nn.Module, record: Record) -> None:
        super().check_record(model, record)
        if "shares" not in record.meta:
            return
        given, present = record.meta["shares"], [block.heads for block in blocks(model)]
        every = [share for row in given for share in row]
        if [*map(len, given)] != present or min(every, default=-1) < 0 or not 0 < sum(every) <= 1.01 * len(every):
            raise LlmoptError(f"{self.name}: a share of 0 or more for each head of every layer expected, 1 on average, "
                              f"{present} heads by layer; shares for {[*map(len, given)]}")

    def shares(self, state: State) -> Tensor:
        """This layer's, float64 [H]; or [1], a 1 for all heads."""
        held = state.record.meta.get("shares")
        return torch.ones(1, dtype=torch.float64) if held is None else torch.tensor(held[state.layer],
                                                                                   dtype=torch.float64)

    def budget(self, count: int, state: State) -> Tensor:
        """int64 [H] or [1]: a number of keys, shared out."""
        return (count * self.shares(state)).round().long()
