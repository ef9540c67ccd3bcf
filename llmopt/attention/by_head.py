"""Budgets by head: by scores, or by numbers that were searched for (search.py).

By scores, a method that reads so many keys reads more of them in heads of larger ones:

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
from llmopt.attention.search import Numbers, first_row, searched
from llmopt.calibration.head_scores import find, water_fill
from llmopt.errors import FieldError, LlmoptError
from llmopt.files.json_shapes import finite
from llmopt.method import Record, Run, Sample
from llmopt.model.blocks import blocks


@dataclass(frozen=True)
class ByHead(Selector):
    """Base of what reads a number of keys that heads can share out. A method asks `number` for this layer's.

    tried: by the name of a field, what a search tries: shares of the tokens, or blocks, that there are.
    """

    meta_shape: ClassVar[Any] = {"shares?": [[finite]], "numbers?": {str: [[finite]]}, str: object}
    tried: ClassVar[dict[str, tuple[float, ...]]]

    heads: str | None = Field(None, description="head scores that share out what is read among all heads: the name of "
                                                "a score step, or a .json or .safetensors file; null: all alike")
    floor: float = Field(0.25, ge=0, lt=1, description="the least that a head gets, in even shares")
    cap: float = Field(8.0, ge=1, description="the most")
    density: float | None = Field(None, gt=0, lt=1, description="share of the causal pairs to compute: what each head "
                                                                "reads is then searched for on the recipe's data")
    rows: int = Field(4, ge=1, description="of the data that the search looks at, as long as prompts will be")

    @property
    def needs_data(self) -> bool:
        return self.density is not None

    def check(self) -> None:
        if self.density is not None and self.heads is not None:
            raise FieldError("density", self.density, "no heads beside it: a search measures what each head needs")

    def sample(self, run: Run) -> Sample:
        return super().sample(run) if self.density is None or not run.batches else first_row(run, self.rows)

    def plan(self, model: nn.Module, run: Run) -> Record:
        """{"shares": [L][H]} by scores, {"numbers": {field: [L][H]}} of a search, nothing where all heads are alike."""
        if self.density is not None:
            return Record(run.memory.remember("numbers", lambda: {"numbers": self._searched(model, run)}))
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
        if self.density is not None:
            self._check_numbers(model, record.meta.get("numbers", {}))
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

    def number(self, name: str, total: int, state: State, each: int = 1) -> Tensor:
        """int64 [H] or [1]: the field `name` times `each`, shared out; or that part of `total` which was found."""
        found = self.found(name, state)
        if found is None:
            return (getattr(self, name) * each * self.shares(state)).round().long()
        return (found * total).ceil().long()

    def found(self, name: str, state: State) -> Tensor | None:
        """What a search found for the field `name` and this layer, float64 [H]; None without one."""
        numbers = state.record.meta.get("numbers")
        return None if numbers is None else torch.tensor(numbers[name][state.layer], dtype=torch.float64)

    def _searched(self, model: nn.Module, run: Run) -> Numbers:
        return run.ranks.agree(searched(self, self.tried, self.density, self.rows, model, run))

    def _check_numbers(self, model: nn.Module, found: Numbers) -> None:
        present = [block.heads if block.attention is not None else 0 for block in blocks(model)]
        fits = found.keys() == self.tried.keys() and all([*map(len, rows)] == present for rows in found.values())
        if not fits or any(not 0 <= share <= 1 for rows in found.values() for row in rows for share in row):
            raise LlmoptError(f"{self.name}: numbers of {' and '.join(self.tried)} from 0 to 1 for each head of every "
                              f"layer expected, {present} heads by layer; found {', '.join(found) or 'none'}")
