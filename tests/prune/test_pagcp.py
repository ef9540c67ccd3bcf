"""scope: pagcp. Thresholds by hand, and losses that respect them."""
import math

import pytest
import torch

from llmopt.calibration.trials import sample
from llmopt.errors import BudgetError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Magnitude
from llmopt.prune.pagcp import Losses, given_back, greedy, nearest, thresholds
from llmopt.prune.stand_ins import StandIns
from tests import tiny
from tests.prune.test_ecoflap import demand
from tests.prune.test_inputs import data
from tests.prune.test_scopes import units


@pytest.mark.parametrize(("count", "growth", "first"), [(1, 1.2, 2.0), (2, 1.5, 2.0), (6, 3.0, 1.0), (30, 1.15, 2.0)])
def test_thresholds_fall_in_a_geometric_series_whose_product_is_the_growth(count, growth, first):
    found = thresholds(count, growth, first)
    assert math.prod(1 + t for t in found) == pytest.approx(growth, abs=1e-8)
    assert found[0] == pytest.approx(growth ** (min(count, first) / count) - 1)
    shrink = [b / a for a, b in zip(found, found[1:], strict=False) if b > 1e-12]
    assert all(s == pytest.approx(shrink[0]) and s <= 1 + 1e-12 for s in shrink)
    if first == 1:                                          # growth = (1 + t)^n: all alike
        assert found == pytest.approx([growth ** (1 / count) - 1] * count)


def test_what_is_too_much_is_given_back_where_it_cost_most():
    found = [units(n, [0.0] * 10) for n in range(3)]
    assert nearest(found[0], 0.3) == 3
    assert given_back(found, [5, 5, 5], [0.1, 0.5, 0.2], 0.4) == [5, 2, 5]
    assert given_back(found, [5, 5, 5], [0.1, 0.5, 0.2], 0.3) == [5, 0, 4]
    assert given_back(found, [5, 5, 5], [0.1, 0.5, 0.2], 0.5) == [5, 5, 5]


@torch.no_grad()
def loss(wanted, plan, rows) -> float:
    model = tiny.make("llama")
    for block in blocks(model):
        removed = {u.kind: n for u, n in zip(wanted.units, plan, strict=True) if u.layer == block.index}
        for name, weight in StandIns(block, wanted.units, Run(), None, {}).weights(removed).items():
            next(p for p in block.projections() if p.name == name).write(weight)
    return sum(float(model(row["input_ids"], labels=row["input_ids"]).loss) for row in rows) / len(rows)


def test_every_threshold_is_respected_and_losses_are_those_of_the_cut_model():
    wanted = demand(tiny.make("llama"))
    rows = sample(data(2), 0, 48)
    losses = Losses(wanted, rows)
    with torch.no_grad():
        told = greedy(losses, 1.2, 2.0)
    assert any(told["removed"]) and all(rise <= t for rise, t in zip(told["rises"], told["thresholds"], strict=True))
    grown = math.prod(1 + rise for rise in told["rises"])
    assert grown <= 1.2 and loss(wanted, told["removed"], rows) / loss(wanted, [0] * 6, rows) == pytest.approx(grown)
    with torch.no_grad():
        assert max(greedy(losses, 1 + 1e-12, 2.0)["rises"]) <= 1e-12           # no threshold, no loss


def test_the_least_growth_that_reaches_the_ratio_is_found_and_a_smaller_one_is_refused():
    model, run = tiny.make("llama"), Run(batches=data(2))
    told = Magnitude(ratio=0.3, scope="pagcp", units=["ffn"], refit=False).apply(model, run).meta
    assert 0.28 < told["removed_share"] <= 0.3 and told["growth"] > 1
    with pytest.raises(BudgetError, match="cannot be met with a growth of 1.0001: 0 to 0"):
        Magnitude(ratio=0.9, scope={"pagcp": {"growth": 1.0001}}, units=["ffn"], refit=False).apply(
            tiny.make("llama"), run)
