"""Water-filling by hand, and traces against autograd on the weights themselves."""
import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy

from llmopt.heads import Hess
from llmopt.heads.hess import water_fill
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny


def test_water_filling_by_hand():
    assert water_fill(tensor([1., 1., 1., 1.]), 2).tolist() == [1, 1, 1, 1]
    assert water_fill(tensor([3., 1., 2., 2.]), 2).tolist() == [1.5, .5, 1, 1]
    assert water_fill(tensor([97., 1., 1., 1.]), 2).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    assert water_fill(tensor([90., 8., 1., 1.]), 1.5).tolist() == pytest.approx([1.5, 1.5, .5, .5])      # two rounds
    assert water_fill(tensor([5., 0., 0.]), 2).tolist() == pytest.approx([2, .5, .5])
    assert water_fill(tensor([0., 0.]), 2).tolist() == [1, 1] and water_fill(tensor([9., 1.]), 1).tolist() == [1, 1]
    assert water_fill(torch.zeros(0), 2).tolist() == []
    shares = water_fill(torch.rand(32).pow(6).double(), 3)
    assert float(shares.sum()) == pytest.approx(32) and float(shares.max()) <= 3 + 1e-9


@pytest.mark.parametrize("of", ["queries", "keys", "values"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_traces_are_squares_of_each_samples_own_gradient(family, of):
    model, ids = tiny.make(family), tiny.ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    run = Run(batches=[{"input_ids": ids, "attention_mask": mask}])
    Hess(of=of, root=False, cap=1000).apply(model, run)
    part, expected = of[0], [torch.zeros(4) for _ in range(3)]
    for row in (ids[:1, :12], ids[1:]):
        twin = tiny.make(family)
        cross_entropy(twin(row).logits[0, :-1], row[0, 1:]).backward()
        for block, total in zip(blocks(twin), expected, strict=True):
            projection, rows = block.part(part)
            slope = projection.module.weight.grad
            slope = slope.T if projection.transposed else slope
            for head in range(4):
                total[head] += slope[rows[head * len(rows) // 4]].square().sum()
    for found, total in zip(run.scores["heads.hess"], expected, strict=True):
        torch.testing.assert_close(found, 4 * total / total.sum(), atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
