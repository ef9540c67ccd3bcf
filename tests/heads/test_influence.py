"""Influence against the model's own losses; a head that already attends evenly has none."""
import pytest
import torch
from torch.nn.functional import cross_entropy

from llmopt.heads import Influence
from llmopt.heads.masking import begun_at, block_inputs, masked, silenced
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny

CONTRACT = {"rows": 2}


def scored(model, mask, **fields):
    run = Run(batches=[{"input_ids": tiny.ids(3, 24), "attention_mask": mask}])
    record = Influence(**fields).apply(model, run)
    return run.scores["heads.influence"], record


@pytest.mark.parametrize(("family", "how"), [("llama", "uniform"), ("gpt2", "zero"), ("gemma3_text", "uniform")])
@torch.no_grad()
def test_it_is_the_change_of_the_models_own_loss(family, how):
    model, mask = tiny.make(family), torch.ones(3, 24, dtype=torch.long)
    mask[0, 15:] = 0
    scores, record = scored(model, mask, rows=2, how=how)
    assert record.meta["samples"] == 2 and record.meta["tokens"] == 15 + 24

    def loss(ids):
        return float(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))

    rows = [tiny.ids(3, 24)[:1, :15], tiny.ids(3, 24)[1:2]]
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        before = [loss(row) for row in rows]
        with masked(model, silenced(scores, [(layer, head)]), how):
            after = [loss(row) for row in rows]
        expected = sum((b - a) / a for a, b in zip(before, after, strict=True)) / 2
        assert float(scores[layer][head]) == pytest.approx(expected, abs=1e-5, rel=1e-3)


@torch.no_grad()
def test_a_head_that_attends_evenly_already_has_no_influence():
    model = tiny.make("llama")
    projection, rows = blocks(model)[1].part("q")
    projection.weight[rows[2]] = 0
    scores, _ = scored(model, torch.ones(3, 24, dtype=torch.long), rows=1)
    assert abs(float(scores[1][2])) < 1e-6 < 1e-4 < min(float(scores[1][h].abs()) for h in (0, 1, 3))


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
@torch.no_grad()
def test_a_forward_that_begins_at_a_block_is_the_same(family):
    model, ids = tiny.make(family), tiny.ids(1, 20)
    with block_inputs(model) as hidden:
        expected = model(ids).logits
    for index in range(3):
        with begun_at(model, index, hidden[index]):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(ids).logits, expected)
    with begun_at(model, 1, hidden[1] + 1):
        assert not torch.allclose(model(ids).logits, expected)
