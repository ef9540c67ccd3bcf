"""CaM: values of what goes are spread over the kept entries behind it."""
from types import SimpleNamespace

import torch
from llmopt_kernels import NONE
from torch.testing import assert_close

from llmopt import kv
from llmopt.runtime.cache_layer import Entries
from tests.kv.mergers import assert_padded_rows_equal_rows_alone, assert_same_entries_as_evicted, at_random

KEEP = torch.tensor([[True, False, True, True, False, False]])


def given(scores):
    values = torch.tensor([[[1., 0.], [4., 8.], [0., 1.], [2., 2.], [7., 7.], [9., 9.]]])
    return Entries(values, values, torch.tensor([[0, 1, 2, 3, 4, NONE]])), KEEP, torch.tensor([scores])


def test_with_one_neighbour_and_a_sure_lot_it_moves_wholly():
    entries, keep, scores = given([1., 5., 1., 1., 5., -torch.inf])
    view = SimpleNamespace(layer=0, lengths=torch.tensor([5]), positions=entries.positions[None])
    for sampled in (True, False):
        left = kv.CaM(spread=1, sampled=sampled).reduce(view, entries, keep, scores)
        assert left.positions.tolist() == [[0, NONE, 2, 3, NONE, NONE]]
        assert_close(left.values[0, [0, 2, 3]], torch.tensor([[1., 0.], [4., 9.], [2., 2.]]))
        assert torch.equal(left.keys, entries.keys)


def test_a_part_of_the_value_by_hand():
    """The two behind it have 1 and 3, mean 2: p = .5, a quarter of the value for each; a wider spread finds no more."""
    entries, keep, scores = given([9., 1., 1., 3., 5., -torch.inf])
    for spread in (2, 32):
        left = kv.CaM(spread=spread, sampled=False).reduce(None, entries, keep, scores)
        assert_close(left.values[0, [0, 2, 3]], torch.tensor([[1., 0.], [1., 3.], [3., 4.]]))


def test_lots_give_the_part_on_average_and_repeat_themselves():
    entries, keep, scores = at_random()
    view = SimpleNamespace(layer=1, lengths=torch.tensor([40]), positions=entries.positions[None])
    wanted = kv.CaM(spread=4, sampled=False).reduce(view, entries, keep, scores).values
    drawn = [kv.CaM(spread=4, seed=seed).reduce(view, entries, keep, scores).values for seed in range(600)]
    assert_close(torch.stack(drawn).mean(0), wanted, atol=0.1, rtol=0)
    assert torch.equal(drawn[3], kv.CaM(spread=4, seed=3).reduce(view, entries, keep, scores).values)
    assert not torch.equal(drawn[3], drawn[4])


def test_padded_rows_equal_rows_alone_and_memory_is_freed():
    for how in ("cam", {"cam": {"spread": 3, "sampled": False}}):
        assert_padded_rows_equal_rows_alone(kv.H2O(budget=12, reduce=how))
        assert_same_entries_as_evicted(kv.H2O(budget=12, reduce=how))
