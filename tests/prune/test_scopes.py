"""The pieces that a recipe names in `scope`."""
import pytest
import torch
from torch import tensor

from llmopt.errors import BudgetError, FieldError
from llmopt.method import Run
from llmopt.prune import Magnitude
from llmopt.prune.allocate import Units, check_reachable, globally, locally, normalise
from llmopt.prune.scopes import Demand, Scope
from tests import tiny


def units(layer, scores, cost=1, counts=None, kind="ffn", prices=None):
    n = len(scores)
    return Units(layer, kind, tensor(scores), cost, counts or tuple(range(n, 0, -1)), torch.arange(n)[:, None], prices)


def removed(scope, found, ratio, normalize="lamp"):
    return Scope.of(scope).removed(Demand(found, ratio, normalize, False, None, Run(), "test"))[0]


def test_global_lamp_and_flap_by_hand():
    found = [units(0, [10.0, 40.0, 70.0]), units(1, [1.0, 2.0, 3.0])]
    assert removed("global", found, 0.34, "none") == [0, 2]
    assert removed("lamp", found, 0.34) == removed("global", found, 0.34, "lamp") == [1, 1]     # 10 / 120, 1 / 6
    skewed = [units(0, [0.0, 3.0, 3.0]), units(1, [0.0, 4.0, 5.0])]             # z: -1.414, .707; -1.389, .463, .926
    torch.testing.assert_close(normalise(skewed[1].scores, "standard"), tensor([-1.38873, 0.46291, 0.92582]).double())
    assert removed("flap", skewed, 0.17) == [1, 0]
    assert removed("flap", skewed, 0.5) == [1, 2]
    assert normalise(tensor([2.0, 2.0]), "standard").tolist() == [0, 0]


@pytest.mark.parametrize("scope", ["local", "lamp", "flap", "nvit", "ecoflap", "pagcp", "measured"])
def test_less_than_one_unit_is_refused_before_any_long_work(scope, monkeypatch):
    monkeypatch.setattr(Scope.of(scope).__class__, "removed", None)
    with pytest.raises(BudgetError, match=r"less than one unit of ffn \(0.0\d+, rounding included; nothing"):
        Magnitude(ratio=0.001, units=["ffn"], scope=scope).apply(tiny.make("llama"), Run(
            [{"input_ids": tiny.ids(), "attention_mask": torch.ones_like(tiny.ids())}]))


def test_a_budget_that_is_no_multiple_of_the_units():
    """Prices of [4, 3, 2, 1] kept units: what the last units take is more than what the first do."""
    found = [units(0, [1.0, 2.0, 3.0, 4.0], prices=(10, 9, 7, 4)), units(1, [1.5, 2.5, 3.5, 4.5], prices=(10, 6, 5, 4))]
    assert found[0].total == 10 and found[0].freed(2) == 3 and found[0].most == 3
    assert locally(found, 0.4) == [2, 1]
    assert globally(found, 0.25) == [1, 1]
    with pytest.raises(BudgetError, match="0.600 of the chosen units"):
        check_reachable(found, 0.9)


def test_a_scope_is_a_name_or_a_piece_with_fields():
    assert Magnitude(scope="lamp").to_dict()["prune.magnitude"]["scope"] == "lamp"
    with pytest.raises(FieldError, match="did you mean 'lamp'"):
        Magnitude(scope="lam")
    with pytest.raises(FieldError, match="local or global"):
        Magnitude(scope="flap", units=["blocks"])


@pytest.mark.parametrize("scope", ["lamp", "flap"])
def test_every_scope_keeps_the_budget(scope):
    model = tiny.make("llama")
    told = Magnitude(ratio=0.3, scope=scope, refit=False).apply(model, Run()).meta
    assert 0.27 < told["removed_share"] <= 0.3
