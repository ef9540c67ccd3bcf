"""KVMerger: runs of like neighbours, pivots, and a mean that falls off with distance."""
from dataclasses import replace

import torch
from llmopt_kernels import NONE
from torch.testing import assert_close

from llmopt import kv
from llmopt.kv.kvmerger import pivots, runs
from llmopt.runtime.cache_layer import Entries
from tests.kv.mergers import assert_padded_rows_equal_rows_alone, assert_same_entries_as_evicted, at_random


def test_by_hand():
    """Squares of distances to the pivot (2, 0) are 1 and 4, mean 2.5; the third run has no pivot, the hole no run."""
    keys = torch.tensor([[[1., 0.], [2., 0.], [4., 0.], [0., 1.], [-1., 0.], [-1., 0.]]])
    values = torch.tensor([[[3., 0.], [0., 1.], [0., 6.], [2., 2.], [7., 7.], [9., 9.]]])
    given = Entries(keys, values, torch.tensor([[0, 1, 2, 3, 4, NONE]]))
    keep = torch.tensor([[False, True, False, True, False, False]])
    left = kv.KVMerger().reduce(None, given, keep, None)
    one, four = torch.tensor(-1 / 5).exp(), torch.tensor(-4 / 5).exp()
    total = 1 + one + four
    assert left.positions.tolist() == [[NONE, 1, NONE, 3, NONE, NONE]]
    assert_close(left.keys[0, [1, 3]], torch.stack([torch.stack([(2 + one + 4 * four) / total, one * 0]), keys[0, 3]]))
    assert_close(left.values[0, [1, 3]], torch.stack([torch.stack([3 * one, 1 + 6 * four]) / total, values[0, 3]]))
    alone = kv.KVMerger(merge_keys=False).reduce(None, given, keep, None)
    assert torch.equal(alone.keys, keys) and torch.equal(alone.values, left.values)


def test_runs_and_pivots():
    keys = torch.tensor([[[1., 0.], [1., 1.], [0., 1.], [0., 2.], [0., 1.], [0., 3.], [5., 0.]]])
    run = runs(keys, 0.75)
    assert run.tolist() == [[0, 1, 2, 2, 2, 2, 3]]
    target, found = pivots(run, torch.tensor([[True, False, True, False, True, False, False]]))
    assert target.tolist() == [[0, 1, 2, 2, 4, 4, 6]]
    assert found.tolist() == [[True, False, True, True, True, True, False]]


def test_equal_entries_stay_what_they_are():
    given, keep, scores = at_random()
    same = replace(given, keys=given.keys[:, :1].expand(-1, 40, -1), values=given.values[:, :1].expand(-1, 40, -1))
    left = kv.KVMerger().reduce(None, same, keep, scores)
    assert_close(left.keys, same.keys)
    assert_close(left.values, same.values)


def test_padded_rows_equal_rows_alone_and_memory_is_freed():
    assert_padded_rows_equal_rows_alone(kv.H2O(budget=12, reduce={"kvmerger": {"threshold": 0.0}}))
    assert_same_entries_as_evicted(kv.H2O(budget=12, reduce={"kvmerger": {"threshold": 0.0}}), keys=False)
    assert_same_entries_as_evicted(kv.H2O(budget=12, reduce={"kvmerger": {"threshold": 0.0, "merge_keys": False}}))
