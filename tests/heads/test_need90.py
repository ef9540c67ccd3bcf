"""The tokens that hold 90 % of a head's attention, by hand."""
import math

import pytest
import torch

from llmopt.heads import Need90
from llmopt.heads.need90 import needed
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny


def test_counts_by_hand():
    row = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    none, first = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[True, False, False, False]])
    assert [int(needed(row, none, share)) for share in (0.4, 0.5, 0.8, 0.9, 0.99)] == [1, 1, 2, 3, 4]
    assert [int(needed(row, first, share)) for share in (0.4, 0.5, 0.8, 0.9, 0.99)] == [0, 0, 1, 2, 3]
    assert int(needed(row.flip(-1), first.flip(-1), 0.9)) == 2          # by size, not by place


@torch.no_grad()
def test_a_model_that_attends_evenly(monkeypatch):
    """Of t + 1 equal weights, ceil(.9 (t + 1)) hold 90 %; the first token is a sink and is not counted."""
    model, rows = tiny.make("llama"), tiny.ids(2, 30)
    for block in blocks(model):
        projection, queries = block.part("q")
        projection.weight[queries.flatten()] = 0
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    run = Run(batches=[{"input_ids": rows, "attention_mask": mask}])
    monkeypatch.setattr("llmopt.runtime.attention_rows.ENTRIES", 4 * 30 * 7)      # seven queries a tile
    Need90().apply(model, run)
    counts = [math.ceil(0.9 * (t + 1) - 1e-9) - 1 for t in range(30)]
    for layer in run.scores["heads.need90"]:
        assert layer.tolist() == pytest.approx([(sum(counts) + sum(counts[:20])) / 50] * 4)
