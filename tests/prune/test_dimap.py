"""prune.dimap: Imp by hand, its invariances, and kinds of units that are compared apart."""
import pytest
import torch

from llmopt.errors import FieldError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import DIMAP
from llmopt.prune.allocate import Units
from llmopt.prune.dimap import Apart, importance
from tests import tiny

CONTRACT = {"ratio": 0.5, "scope": "local"}           # some architectures keep their layers alike


def test_importance_by_hand():
    found = importance(torch.tensor([[3.0, 1.0], [-2.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1, 1 / 14], [4 / 13, 0]], dtype=torch.float64))
    ties = importance(torch.tensor([[2.0, -2.0, 1.0]]))                        # each counts in the other's sum
    torch.testing.assert_close(ties, torch.tensor([[0.5, 0.5, 1 / 9]], dtype=torch.float64))
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = importance(weight)
    assert found.max() == 1 and torch.equal(found.flatten().argsort(), weight.abs().flatten().argsort())
    torch.testing.assert_close(importance(weight * 0.01), found)
    assert bool((importance(torch.zeros(2, 2)) == 0).all())


def by_hand(block):
    weights = [block.part("gate")[0].weight, block.part("up")[0].weight, block.ffn_out.weight.T]
    return sum(importance(weight).sum(1) for weight in weights)


@torch.no_grad()
def test_a_channel_has_the_sum_over_its_weights_whatever_the_scale_of_their_matrix():
    model = tiny.make("llama")
    found = DIMAP().rate_all(model, Run())
    torch.testing.assert_close(found[1]["ffn"].double(), by_hand(blocks(model)[1]), rtol=1e-5, atol=1e-6)
    for module in (model.model.layers[1].mlp.up_proj, model.model.layers[1].self_attn.q_proj):
        module.weight *= 7
    again = DIMAP().rate_all(model, Run())
    for unit in ("ffn", "kv_groups"):
        torch.testing.assert_close(found[1][unit], again[1][unit])
    blocks(model)[2].ffn_out.weight[:, 5] = 0
    for module in (model.model.layers[2].mlp.up_proj, model.model.layers[2].mlp.gate_proj):
        module.weight[5] = 0
    plan, _ = DIMAP(ratio=0.1, units=["ffn"]).plan(model, Run())
    assert DIMAP(units=["ffn"]).rate_all(model, Run())[2]["ffn"][5] == 0 and 5 not in plan[2].ffn


@torch.no_grad()
def test_fused_matrices_are_taken_apart():
    fused, plain = tiny.make("phi3"), tiny.make("mistral", head_dim=16, sliding_window=None)
    for own, other in zip(blocks(fused), blocks(plain), strict=True):
        for part in ("q", "k", "v", "gate", "up"):
            projection, rows = own.part(part)
            other.part(part)[0].module.weight.copy_(projection.weight[rows.flatten()])
        other.attn_out.module.weight.copy_(own.attn_out.weight)
        other.ffn_out.module.weight.copy_(own.ffn_out.weight)
    for own, other in zip(DIMAP().rate_all(fused, Run()), DIMAP().rate_all(plain, Run()), strict=True):
        assert torch.equal(own["ffn"], other["ffn"]) and torch.equal(own["kv_groups"], other["kv_groups"])


def test_each_kind_loses_its_share_by_one_threshold_over_all_layers():
    def units(layer, kind, scores, cost):
        scores = torch.tensor(scores)
        return Units(layer, kind, scores, cost, tuple(range(len(scores), 0, -1)), torch.arange(len(scores))[:, None])

    given = [units(0, "ffn", [1.0, 2, 9, 9], 3), units(0, "kv_groups", [90.0, 80], 12),
             units(1, "ffn", [3.0, 9, 9, 9], 3), units(1, "kv_groups", [50.0, 95], 12)]
    assert Apart().guess(given, 0.375) == [2, 0, 1, 1]
    assert Apart().guess(given, 0.25) == [2, 0, 0, 1]
    record = DIMAP(ratio=0.5, refit=False).apply(tiny.make("llama"), Run()).meta
    assert record["removed_units"] == {"ffn": 144, "kv_groups": 3} and "weights alone" in record["notes"][0]


def test_what_cannot_be_is_named():
    with pytest.raises(FieldError, match="prune.dimap does not compare attention"):
        DIMAP(units=["attention"])
