"""scope: measured. Plans by hand, and what stands in for a cut is what the cut and the refit leave."""
import itertools

import pytest
import torch

from llmopt.calibration.trials import sample
from llmopt.calibration.walk import visits
from llmopt.errors import BudgetError, FieldError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import OBS, Magnitude, Wanda
from llmopt.prune.measured import best_plans, choices, foretold, grid, lerp, tenths
from llmopt.prune.refit import refit
from llmopt.prune.stand_ins import StandIns
from llmopt.prune.surgery import LayerPlan, layer_plan
from tests import tiny
from tests.prune.test_inputs import data
from tests.prune.test_scopes import units
from tests.test_trials import divergence


def test_what_is_measured_and_what_lies_between():
    ten = units(0, [float(n) for n in range(100)])
    assert tenths(0.1) == (0.1, 0.2, 0.3, 0.4, 0.5) and tenths(0.5)[-1] == 0.7 and tenths(0.9)[-1] == 0.9
    assert grid(ten, (0.1, 0.2)) == [10, 20] and grid(units(0, [1.0]), (0.1,)) == []
    assert grid(units(0, [0.0] * 4), (0.1, 0.2, 0.5)) == [1, 2]           # the smallest step there is, at least
    row = {0: 0.0, 10: 1.0, 20: 5.0}
    assert choices(ten, row) == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20]
    assert lerp(row, 15) == 3.0 and lerp(row, 10) == 1.0
    assert foretold([row, row], [10, 15]) == 4.0 and foretold([row], [30]) is None


def test_the_best_plan_is_that_of_all_plans():
    few = [units(n, [0.0] * 8, cost=cost) for n, cost in enumerate((3, 3, 5))]
    noise = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).cumsum(1).tolist()
    table = [{0: 0.0, **dict(zip((1, 2, 3, 4), row, strict=True))} for row in noise]
    total = sum(u.total for u in few)
    for ratio in (0.1, 0.25, 0.4):
        able = [plan for plan in itertools.product(range(5), repeat=3)              # here every whole number is met
                if sum(u.freed(n) for u, n in zip(few, plan, strict=True)) == int(ratio * total)]
        want = min(able, key=lambda plan: foretold(table, plan))
        found = best_plans(few, ratio, table, 2)
        assert foretold(table, found[0]) == pytest.approx(foretold(table, want)) and len(set(map(tuple, found))) == 2
        assert all(tuple(plan) in able for plan in found)
    with pytest.raises(BudgetError, match="0 to 0.500 of the chosen units"):
        best_plans(few, 0.7, table, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stand_in_is_what_cut_and_refit_leave(family):
    model, run = tiny.make(family), Run(batches=data(16))
    index = {"ffn": torch.arange(96)[:, None], "kv_groups": torch.arange(2 if family == "llama" else 4)[:, None]}
    some = [units(0, [float(n) for n in range(len(each))], kind=kind, counts=(len(each), len(each) // 2))
            for kind, each in index.items()]
    found = {}
    for visit in visits(model, run, "test", edits=False):
        if visit.block.index == 0:
            for refitted in (True, False):
                seen = visit if refitted else None
                found[refitted] = [StandIns(visit.block, [u], run, seen, {}).weights({u.kind: u.most}) for u in some]
    for refitted in (False, True):
        for u, weights in zip(some, found[refitted], strict=True):
            model = tiny.make(family)
            plan = [layer_plan([(u, u.most)]), LayerPlan(), LayerPlan()]
            before = {name: p.clone() for name, p in model.state_dict().items()}
            if refitted:
                refit(model, run, plan, "refit")
            writer = blocks(model)[0].ffn_out if u.kind == "ffn" else blocks(model)[0].attn_out
            kept = weights[writer.name].any(0)
            assert kept.sum() == writer.in_features // 2
            torch.testing.assert_close(weights[writer.name][:, kept], writer.weight[:, kept])
            assert refitted != torch.equal(writer.weight, before[writer.key].T if writer.transposed
                                           else before[writer.key])
            if refitted and writer.bias is not None:
                torch.testing.assert_close(weights[f"{writer.path}.bias"], writer.bias.data)


def test_the_damage_is_that_of_the_cut_and_the_best_plan_is_kept():
    model, run = tiny.make("llama"), Run(batches=data(4))
    method = Magnitude(ratio=0.3, units=["ffn"], refit=False, scope={"measured": {"shares": [0.25, 0.5], "plans": 2}})
    told = method.apply(model, run).meta
    assert [[gone for gone, _ in row] for row in told["damage"]] == [[0, 24, 48]] * 3
    cut = tiny.make("llama")
    kept = Magnitude(ratio=0.5, units=["ffn"], refit=False).apply(tiny.make("llama"), Run()).meta["layers"][1]["ffn"]
    assert kept == 48
    scores = method.score(blocks(cut)[1], None)["ffn"]
    with torch.no_grad():
        blocks(cut)[1].ffn_out.weight[:, scores.argsort()[:48]] = 0
    rows = sample(run.batches, 0, 2048)
    assert told["damage"][1][2][1] == pytest.approx(divergence(tiny.make("llama"), cut, rows), rel=1e-3)
    best = min(plan["measured"] for plan in told["plans"])
    assert divergence(tiny.make("llama"), model, rows) == pytest.approx(best, rel=1e-3)
    assert 0.28 < told["removed_share"] <= 0.3


def test_a_whole_plan_is_measured_as_it_will_be_refitted():
    model, run = tiny.make("llama"), Run(batches=data(16))
    told = Magnitude(ratio=0.4, scope={"measured": {"shares": [0.5], "plans": 1}}).apply(model, run).meta
    best = min(plan["measured"] for plan in told["plans"])
    found = divergence(tiny.make("llama"), model, sample(run.batches, 0, 2048))
    assert found == pytest.approx(best, rel=0.02)           # its ridges may differ


def test_widths_by_measured_damage_with_any_criterion():
    dense = tiny.make("qwen3", norms=True)
    for method in (Wanda, OBS):
        model = tiny.make("qwen3", norms=True)
        told = method(ratio=0.25, scope={"measured": {"shares": [0.5]}}).apply(model, Run(batches=data(8))).meta
        assert 0.2 < told["removed_share"] <= 0.25 and len(told["damage"]) == 6
        assert divergence(dense, model, data(2)) < 1
    with pytest.raises(FieldError, match="rising numbers"):
        Wanda(scope={"measured": {"shares": [0.5, 0.1]}})
