"""WAAD and FAI of maps written by hand, and of a model that attends evenly."""
import pytest
import torch

from llmopt.errors import FieldError, LlmoptError
from llmopt.heads import WaadFai
from llmopt.heads.waad_fai import clipped_distance, later_attention, later_queries
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.runtime.attention_rows import Rows
from tests import tiny


def rows(weights):
    count = len(weights)
    return Rows(0, weights[None, None], torch.arange(count), torch.arange(count), torch.ones(1, count).bool())


def test_by_hand():
    assert clipped_distance(rows(torch.eye(5)), 10).tolist() == [0]                 # it looks at itself
    first = torch.zeros(6, 6)
    first[:, 0] = 1                                                                 # all look at the first token
    assert clipped_distance(rows(first), 3).tolist() == [0 + 1 + 2 + 3 + 3 + 3]
    assert later_queries(6, (2, 3)).tolist() == [2, 2, 2, 1, 0, 0]
    assert later_attention(rows(first), later_queries(6, (2, 3)), (2, 3)).tolist() == [1]
    back = torch.diag(torch.ones(4), -2)                                            # each looks two tokens back
    assert later_attention(rows(back), later_queries(6, (2, 3)), (2, 3)).tolist() == [.5 + .5 + .5 + 1]
    assert later_attention(rows(back), later_queries(6, (3, 5)), (3, 5)).tolist() == [0]


@pytest.mark.parametrize("score", ["waad", "fai"])
@torch.no_grad()
def test_a_model_that_attends_evenly(score, monkeypatch):
    monkeypatch.setattr("llmopt.runtime.attention_rows.ENTRIES", 4 * 20 * 3)      # three queries a tile
    model, mask = tiny.make("llama"), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    for block in blocks(model):
        projection, queries = block.part("q")
        projection.weight[queries.flatten()] = 0
    run = Run(batches=[{"input_ids": tiny.ids(2, 20), "attention_mask": mask}])
    WaadFai(score=score, window=3, first=2, last=4).apply(model, run)
    total = tokens = 0
    for n in (20, 12):
        if score == "waad":
            total += sum(sum(min(t - s, 3) for s in range(t + 1)) / (t + 1) for t in range(n))
            tokens += n
        else:
            seen = [[1 / (t + 1) for t in range(s + 2, min(n - 1, s + 4) + 1)] for s in range(n - 2)]
            total += sum(sum(part) / len(part) for part in seen)
            tokens += n - 2
    for layer in run.scores["heads.waad_fai"]:
        assert layer.tolist() == pytest.approx([total / tokens] * 4, rel=1e-4)


def test_texts_that_are_too_short_and_a_span_that_ends_before_it_begins():
    run = Run(batches=[{"input_ids": tiny.ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}])
    with pytest.raises(LlmoptError, match="texts of at most 8 tokens: none stands 10 behind another"):
        WaadFai(score="fai").apply(tiny.make("llama"), run)
    with pytest.raises(FieldError, match="last: 5 given, at least first = 10"):
        WaadFai(last=5)
