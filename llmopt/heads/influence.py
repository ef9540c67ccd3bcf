"""Influence: how much worse the model predicts a text when one head attends evenly to all it can see.

    I(l, h) = mean_x (L(x; head h of layer l masked) - L(x)) / L(x)

L is the mean next-token cross-entropy of sample x. One forward pass for each head and sample, from the head's block on.

AttentionInfluence (arXiv:2505.07293) masks all important heads at once and scores samples with the same ratio; here it
is a head that is scored, one left out at a time. Left out: the choice of training data, the paper's purpose.
"""
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmopt.calibration.losses import row_losses
from llmopt.heads.base import Batch, HeadScore, single_rows
from llmopt.heads.masking import begun_at, block_inputs, masked, silenced
from llmopt.method import Record, Run
from llmopt.model.blocks import blocks, decoder
from llmopt.parts import register


@register("heads.influence")
@dataclass(frozen=True)
class Influence(HeadScore):
    """Relative loss without the head; as many forward passes as the model has heads, for each of a few rows."""

    mean_over: ClassVar = "samples"
    unit: ClassVar = "relative loss without the head"

    rows: int = Field(4, ge=1, description="of the data that are read; each takes as many forwards as there are heads")
    how: Literal["uniform", "zero"] = Field("uniform", description="a masked head attends evenly, or says nothing")

    def apply(self, model: nn.Module, run: Run) -> Record:
        return super().apply(model, replace(run, batches=single_rows(run.batches or [])[:self.rows]))

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run) -> dict[str, list[Tensor]]:
        totals = [torch.zeros(block.heads, dtype=torch.float64) for block in blocks(model)]
        rows = [{key: part[:, :int(row["attention_mask"].sum())].to(model.device) for key, part in row.items()}
                for row in run.batches]
        for number, row in enumerate(rows):
            with block_inputs(model) as hidden:
                before = self._loss(model, row)
            places = [(layer, head) for layer, total in enumerate(totals) for head in range(len(total))]
            for layer, head in run.progress(places, f"{self.name}: row {number + 1} of {len(rows)}"):
                with masked(model, silenced(totals, [(layer, head)]), self.how), begun_at(model, layer, hidden[layer]):
                    totals[layer][head] += (self._loss(model, row) - before) / before / len(rows)
        return {"scores": totals}

    @staticmethod
    def _loss(model: nn.Module, row: Batch) -> float:
        hidden = decoder(model)(**row, use_cache=False)[0]
        return float(row_losses(model, hidden, row["input_ids"], row["attention_mask"]))
