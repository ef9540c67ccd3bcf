"""The pieces that a recipe names in `budget`."""
import json

import pytest
import torch

from llmopt.errors import BudgetError, FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Magnitude, Tyr
from llmopt.prune.budgets import Latency, flops, prices, products, shape
from tests import tiny
from tests.prune.test_scopes import units


def parts(method, family="llama"):
    model = tiny.make(family)
    rated = [{kind: values.detach() for kind, values in method.score(block, None).items()} for block in blocks(model)]
    return model, method._all_units(blocks(model), rated, 1)


def test_flops_by_hand():
    """Llama: E 64, F 96, 4 heads of 16 in 2 groups."""
    model, found = parts(Magnitude(units=["ffn", "kv_groups"]))
    block, ffn, groups = blocks(model)[0], *found[:2]
    assert flops(block, ffn, 100) == 2 * 3 * 64
    assert flops(block, groups, 100) == 2 * (2 * 16 + 2 * 2 * 16) * 64 + 2 * 2 * 16 * 100
    assert products(block, ffn, 5) == [(64, 5), (64, 5), (5, 64)]
    assert products(block, groups, 1) == [(64, 32), (64, 16), (64, 16), (32, 64)]
    _, heads = parts(Magnitude(units=["q_heads"]))
    assert products(block, heads[0], 1) == [(64, 32), (32, 64)]         # one head of each group
    assert flops(block, heads[0], 100) == 2 * 2 * 32 * 64 + 2 * 2 * 16 * 100


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_share_of_the_flops_leaves(scope):
    """Long texts make attention dear, so that fewer parameters must leave where groups do."""
    told = [Magnitude(ratio=0.48, budget={"flops": {"length": length}}, scope=scope, refit=False).apply(
        tiny.make("llama"), Run()).meta for length in (1, 4096)]
    assert all(0.4 < one["removed_budget"] <= 0.48 for one in told)
    assert told[0]["removed_share"] == pytest.approx(told[0]["removed_budget"], abs=0.02)
    assert told[1]["removed_share"] < 0.4


def test_prices_lie_between_the_times_and_never_fall():
    some = units(0, [0.0] * 8, counts=(8, 6, 5, 4, 2))
    assert prices({"kept": [2, 4, 8], "nanoseconds": [30, 20, 100]}, some) == (100, 65, 48, 30, 30)


def test_latency_by_a_table_is_the_same_plan_again_and_a_wrong_table_is_named(tmp_path):
    method = dict(ratio=0.3, units=["ffn"], refit=False)
    model, found = parts(Magnitude(units=["ffn"]))
    name, file = shape(blocks(model)[0], found[0]), tmp_path / "times.json"
    assert name == "ffn: 96 of 64x1 64x1 1x64, 0 x 16"
    file.write_text(json.dumps({"latency": {name: {"kept": [1, 96], "nanoseconds": [600, 1000]}}}))
    told = Magnitude(budget={"latency": {"table": str(file)}}, **method).apply(model, Run()).meta
    assert told["removed_units"]["ffn"] == 3 * 71 and 0.29 < told["removed_budget"] <= 0.3
    assert Magnitude(budget={"latency": {"table": str(file)}}).reads == (str(file),)
    with pytest.raises(BudgetError, match="0.38. of the chosen units"):
        Magnitude(budget={"latency": {"table": str(file)}}, **method | {"ratio": 0.5}).apply(tiny.make("llama"), Run())
    with pytest.raises(LlmoptError, match="has no times of 'kv_groups"):
        Magnitude(budget={"latency": {"table": str(file)}}, refit=False).apply(tiny.make("llama"), Run())
    file.write_text(json.dumps({"latency": {name: {"kept": [1, 96], "nanoseconds": [600]}}}))
    with pytest.raises(LlmoptError, match="as many whole numbers each"):
        Magnitude(budget={"latency": {"table": str(file)}}, **method).apply(tiny.make("llama"), Run())
    with pytest.raises(LlmoptError, match="there is no file"):
        Magnitude(budget={"latency": {"table": "nowhere.json"}}, **method).apply(tiny.make("llama"), Run())


def test_times_are_measured_once_for_each_shape_and_told():
    model, found = parts(Magnitude())
    priced, told = Latency(length=8).priced(found, blocks(model), model, Run())
    assert len(told["latency"]) == 2 and all(min(row["nanoseconds"]) > 0 for row in told["latency"].values())
    assert all(list(u.prices) == sorted(u.prices, reverse=True) and len(u.prices) == len(u.allowed) for u in priced)
    guessed, _ = Latency(length=8).priced(found, blocks(model), model, None)
    assert guessed[0].prices[0] == 96 * flops(blocks(model)[0], found[0], 8)
    told = Magnitude(budget="latency", units=["ffn"], refit=False, ratio=0.2).apply(model, Run()).meta
    assert set(told["latency"]) and torch.tensor(told["removed_budget"]) <= 0.2


def test_who_counts_parameters_alone_says_so():
    with pytest.raises(FieldError, match="prune.tyr counts nothing else"):
        Tyr(budget="flops")
    with pytest.raises(FieldError, match="save neither"):
        Magnitude(budget="flops", units=["weights"])
