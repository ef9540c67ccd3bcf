"""The walk over weights: what each reads, as moments, sizes or rows, behind what was done to those before it."""
import pytest
import torch

from llmopt.calibration.inputs import Inputs, Moments, each_weight
from llmopt.calibration.walk import walk
from llmopt.method import Run
from llmopt.model.blocks import blocks
from tests import tiny
from tests.test_walk import batches


def names(model) -> list[str]:
    return [p.name for block in blocks(model) for p in block.projections()]


def test_the_mean_size_of_an_input_by_hand():
    found = Moments(size=True)
    found.add(torch.tensor([[1., -2.], [3., 0.]]))
    found.add(torch.tensor([[-1., 4.]]), torch.tensor([2.]))
    found.join(torch.empty(5, 2))
    assert found.size.tolist() == pytest.approx([(1 + 3 + 2) / 3, (2 + 0 + 8) / 3])
    assert torch.allclose(found.hessian, 2 / 3 * torch.tensor([[12., -10.], [-10., 36.]]))
    assert Moments().size is None and Moments(size=True).size is None


def test_rows_are_the_real_tokens_of_each_batch_and_moments_their_sums():
    model, data = tiny.make("llama"), batches()
    rows = {p.name: seen for p, seen in each_weight(model, Run(data), names(model), "x", Inputs("rows"), False)}
    sums = {p.name: seen for p, seen in each_weight(model, Run(data), names(model), "x", Inputs("moments", size=True),
                                                    False)}
    assert list(rows) == names(model)
    for visit in walk(model, data):
        for p in visit.block.projections():
            expected = []
            visit.observe({p.name: expected.append})
            assert all(torch.equal(a, b) for a, b in zip(rows[p.name], expected, strict=True))
            assert [len(x) for x in expected] == [41, 48]
            x = torch.cat(expected)
            torch.testing.assert_close(sums[p.name].hessian, 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(sums[p.name].size, x.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_tokens_of_weight_zero_are_as_if_dropped():
    """The weights of a visit reach the moments batch by batch, token by token."""
    model, data = tiny.make("llama"), batches()
    kept = [torch.arange(int(b["attention_mask"].sum())) % 3 == 0 for b in data]
    inputs = Inputs("moments", token_weights=lambda visit, run: [k.float() for k in kept])
    for p, seen in each_weight(model, Run(data), names(model)[:7], "x", inputs, False):
        rows = next(r for q, r in each_weight(model, Run(data), [p.name], "x", Inputs("rows"), False))
        x = torch.cat([r[k] for r, k in zip(rows, kept, strict=True)])
        torch.testing.assert_close(seen.hessian * seen.tokens, 2 * x.T @ x, rtol=1e-4, atol=1e-5)


def test_a_weight_sees_what_was_made_of_those_before_it():
    model, data, seen = tiny.make("llama"), batches(), {}
    for p, rows in each_weight(model, Run(data), names(model), "x", Inputs("rows")):
        seen[p.name] = rows
        if p.name.endswith("0.self_attn.v_proj"):
            p.write(torch.zeros_like(p.weight))
    assert not seen["model.layers.0.self_attn.o_proj"][0].any()
    assert seen["model.layers.0.mlp.down_proj"][0].any()


def test_without_data_nothing_is_collected():
    model = tiny.make("gpt2")
    found = list(each_weight(model, Run(), names(model)[2:5], "x"))
    assert [p.name for p, _ in found] == names(model)[2:5] and {seen for _, seen in found} == {None}
