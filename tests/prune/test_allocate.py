"""Planning on plain numbers: hand-computed plans, floors, rounding."""
import pytest
import torch
from torch import tensor

from llmopt.errors import BudgetError
from llmopt.prune.allocate import (
    Units,
    allowed_counts,
    check_reachable,
    globally,
    least_ratio,
    locally,
    normalise,
    survivors,
)
from llmopt.prune.base import _slices


def units(layer, scores, cost=1, counts=None, kind="ffn"):
    n = len(scores)
    return Units(layer, kind, tensor(scores), cost, counts or tuple(range(n, 0, -1)), torch.arange(n)[:, None])


def test_allowed_counts():
    assert allowed_counts(6, width=1, multiple=1, floor=3) == (6, 5, 4, 3)
    assert allowed_counts(100, width=1, multiple=32, floor=5) == (100, 96, 64, 32)
    assert allowed_counts(96, width=1, multiple=32, floor=33) == (96, 64)
    assert allowed_counts(4, width=32, multiple=64, floor=1) == (4, 2)
    assert allowed_counts(2, width=32, multiple=64, floor=1) == (2,)          # 64 fits, 32 would not
    assert allowed_counts(2, width=16, multiple=64, floor=1) == (2, 1)        # nothing fits anyway


def test_the_weakest_of_all_layers_leave_first():
    found = [units(0, [1.0, 5.0, 6.0]), units(1, [2.0, 3.0, 9.0])]
    assert globally(found, 0.5) == [1, 2]
    assert globally(found, 0.49) == [1, 1]          # fewer, never more
    assert globally(found, 0.0) == [0, 0]
    assert globally([units(0, [9.0, 9.0]), units(1, [1.0, 1.0])], 0.5) == [1, 1]      # the floor holds


def test_cost_counts_and_an_unaffordable_layer_is_closed():
    found = [units(0, [1.0, 2.0], cost=10), units(1, [3.0, 4.0, 5.0, 6.0], cost=1)]      # 24 in all
    assert globally(found, 0.5) == [1, 2]
    assert globally(found, 0.25) == [0, 3]          # 6 do not pay for a unit of 10; the cheap ones keep their floor


def test_from_the_least_ratio_on_something_leaves():
    found = [units(0, [1.0] * 7, cost=3, counts=(7, 5)), units(1, [2.0] * 3, counts=(3,)), units(1, [4.0] * 90)]
    for share_out, by_layer, least in ((globally, False, 1 / 114), (locally, True, 1 / 93)):
        told = least_ratio(found, by_layer)
        assert told - 1e-4 < least <= told and any(share_out(found, told))
        assert not any(share_out(found, told - 1e-4))
    assert least_ratio(found[:1], True) == pytest.approx(0.2858)              # 2 of 7: the rounding counts


def test_chunks_are_ranked_by_their_mean():
    found = [units(0, [0.0, 5.0, 8.0, 8.0], counts=(4, 2)), units(1, [1.0, 2.0, 8.0, 8.0], counts=(4, 2))]
    assert globally(found, 0.25) == [0, 2]


def test_local_takes_the_same_from_layers_of_the_same_shape():
    found = [u for layer in range(2) for u in
             (units(layer, [layer * 9.0, 1.0, 2.0, 3.0], cost=20, kind="kv_groups"),
              units(layer, list(map(float, range(20))), cost=4))]            # 80 + 80 parameters per layer
    assert locally(found, 0.25) == [1, 5, 1, 5]
    assert locally(found, 0.2) == [1, 3, 1, 3]      # a group is nearer to its share of 16 than none; the rest is 12
    assert locally(found, 0.1) == [0, 4, 0, 4]      # here none is, and the channels make up for it
    assert locally(found[:1], 0.2) == [0]


def test_normalising():
    torch.testing.assert_close(normalise(tensor([1.0, 3.0]), "layer"), tensor([0.5, 1.5]).double())
    lamp = normalise(tensor([2.0, 3.0, 1.0]), "lamp") / 3
    torch.testing.assert_close(lamp, tensor([2 / 5, 1, 1 / 6]).double())
    for how in ("layer", "lamp"):
        torch.testing.assert_close(normalise(tensor([2.0, 3.0, 1.0]) * 7, how), normalise(tensor([2.0, 3.0, 1.0]), how))
        assert normalise(tensor([0.0, 0.0]), how).isfinite().all()
    assert normalise(tensor([2.0]), "none").tolist() == [2.0]


def test_survivors_keep_their_order():
    assert survivors(units(0, [3.0, 1.0, 2.0]), 1).tolist() == [0, 2]
    assert survivors(units(0, [1.0, 1.0, 1.0]), 2).tolist() == [2]


def test_query_heads_leave_one_per_group():
    scores, index = _slices(tensor([[5.0, 1.0], [2.0, 4.0]]))       # groups of heads (0, 1) and (2, 3)
    assert scores.tolist() == [1.5, 4.5]
    assert index.tolist() == [[1, 2], [0, 3]]


def test_what_the_floors_forbid_is_an_error():
    found = [units(0, [1.0, 2.0]), units(1, [1.0, 2.0])]
    check_reachable(found, 0.5)
    with pytest.raises(BudgetError, match="0.500"):
        check_reachable(found, 0.9)
