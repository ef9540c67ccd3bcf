"""EMS' merging: what repeats a kept entry goes into its value, weighted by scores; what does not is lost."""
from dataclasses import replace

import pytest
import torch
from llmopt_kernels import NONE, Ragged, Rule, ragged_attention
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from llmopt import kv, runtime
from llmopt.kv import reduce
from llmopt.kv.listener import watch
from llmopt.runtime.cache_layer import Entries
from llmopt.runtime.rehearsal import cache_bytes
from tests.kv.mergers import assert_padded_rows_equal_rows_alone, assert_same_entries_as_evicted, at_random
from tests.tiny import make

ONE = torch.tensor([[True, True, False, False, False, False]])


def by_hand():
    """Two that stay; one near the first, one opposite in key and value, one near in its key alone, and a hole."""
    keys = torch.tensor([[[1., 0.], [0., 1.], [3., 4.], [-1., 0.], [4., 3.], [1., 0.]]])
    values = torch.tensor([[[1., 0.], [0., 1.], [4., 3.], [-1., 0.], [0., -1.], [9., 9.]]])
    scores = torch.tensor([[3., 2., 1., 0.5, 0.25, -torch.inf]])
    return Entries(keys, values, torch.tensor([[0, 1, 2, 3, 4, NONE]])), scores


def test_by_hand():
    """The third goes into the first (.6 * .8 ties with .8 * .6: the older) with weight 1 of 4; the others are lost."""
    given, scores = by_hand()
    left = kv.EMSMerge(tau=0.4, beta=2.0).reduce(None, given, ONE, scores)
    assert left.positions.tolist() == [[0, 1, NONE, NONE, NONE, NONE]]
    assert_close(left.values[0, :2], torch.tensor([[1.75, 0.75], [0., 1.]]))
    assert torch.equal(left.keys, given.keys)


def test_above_tau_only_and_the_best_candidates_only():
    given, keep, scores = at_random()
    evicted = reduce.evict(given, keep)
    for none in (kv.EMSMerge(tau=1.01), kv.EMSMerge(tau=0, beta=0)):
        left = none.reduce(None, given, keep, scores)
        assert torch.equal(left.positions, evicted.positions) and torch.equal(left.values, evicted.values)
    few, all_of_them = (kv.EMSMerge(tau=0, beta=beta).reduce(None, given, keep, scores) for beta in (0.2, 9.0))
    best = (scores.masked_fill(keep, -1.0) >= scores.masked_fill(keep, -1.0).topk(3, -1).values[:, -1:]) | keep
    alone = kv.EMSMerge(tau=0, beta=9.0).reduce(None, reduce.evict(given, best), keep, scores)
    assert_close(few.values[keep], alone.values[keep])
    assert not torch.equal(few.values, all_of_them.values)


def test_a_merged_value_lies_between_those_that_made_it_in_any_order():
    given, keep, scores = at_random()
    merger = kv.EMSMerge(tau=0, beta=9.0)
    left = merger.reduce(None, given, keep, scores)
    assert bool((left.values <= given.values.amax(1, keepdim=True)).all())
    assert bool((left.values >= given.values.amin(1, keepdim=True)).all())
    assert not torch.equal(left.values, given.values)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = replace(given, keys=given.keys[:, order], values=given.values[:, order])
    again = merger.reduce(None, shuffled, keep[:, order], scores[:, order])
    assert_close(again.values, left.values[:, order])


def test_entries_of_equal_keys_lose_nothing_when_they_are_counted():
    """Two kinds of keys, each with one value: what stays answers as all did, twice over."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 1, 2, 8, generator=generator)
    keys, values = kinds[:, :, [0, 1] + [0] * 7 + [1] * 3]
    keep, query = torch.zeros(1, 12, dtype=torch.bool), torch.randn(1, 2, 1, 8, generator=generator)
    keep[:, :2] = True
    given = Entries(keys, values, torch.arange(12).expand(1, -1))
    merger, scores = kv.EMSMerge(tau=0.9, beta=9.0, count=True), torch.rand(1, 12, generator=generator)
    first = merger.reduce(None, given, keep | (torch.arange(12) < 6), scores)
    left = merger.reduce(None, first, keep, scores.masked_fill(first.positions == NONE, -torch.inf))
    assert_close(left.carried["bias"][keep], torch.tensor([8., 4.]).log())
    assert_close(answer(left, query), answer(given, query))
    assert not torch.allclose(answer(replace(left, carried={}), query), answer(given, query), atol=1e-2)


def answer(entries, query):
    """Attention of a query [1, 2, 1, 8] behind all entries of one KV head."""
    there = entries.positions[0] != NONE
    carried = {name: column[0, there] for name, column in entries.carried.items()}
    kept = Ragged(entries.keys[0, there], entries.values[0, there], entries.positions[0, there].int(),
                  there.sum().view(1, 1), carried)
    tail = torch.zeros(2, 1, 1, 0, 8)
    return ragged_attention(query, kept, tuple(tail), None, 12, Rule(8 ** -0.5))


def test_keys_are_averaged_before_they_are_turned():
    """Keys that were equal before RoPE stay the key that was kept; plain averaging would shrink it."""
    model, seen = make("llama"), []
    watch(model, torch.full((6,), 7), seen.append)           # one token over and over: layer 0 has one key
    view = seen[0]
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[:, -1] = True
    given = Entries(view.keys[0], view.values[0], view.positions[0])
    left = kv.EMSMerge(tau=0, beta=9.0, merge_keys=True).reduce(view, given, keep, torch.ones(2, 6))
    assert_close(left.keys[keep], given.keys[keep])
    mixed = replace(view, keys=view.keys + torch.arange(6.).view(1, 1, 6, 1))
    given = replace(given, keys=mixed.keys[0])
    left = kv.EMSMerge(tau=0, beta=9.0, merge_keys=True).reduce(mixed, given, keep, torch.ones(2, 6))
    assert not torch.equal(left.keys[keep], given.keys[keep])


@pytest.mark.parametrize("fields", [{"tau": 0.1}, {"tau": 0.1, "merge_keys": True, "count": True}], ids=str)
def test_padded_rows_equal_rows_alone_and_memory_is_freed(fields):
    how = kv.EMS(budget=12, window=4, reduce={"ems_merge": fields})
    assert_padded_rows_equal_rows_alone(how)
    assert_same_entries_as_evicted(how, keys=not fields.get("merge_keys"))


def test_a_second_compression_while_decoding():
    how = kv.EMS(budget=12, window=4, every=2, reduce={"ems_merge": {"count": True}})
    with runtime.attached(make("llama"), how) as model:
        out = model.generate(torch.arange(40).view(1, -1), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 40


def test_a_dry_run_has_no_weights_to_turn_keys_by():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make("llama").config)
    how = kv.EMS(ratio=0.5, window=4, reduce={"ems_merge": {"tau": 0.0, "merge_keys": True}})
    with runtime.attached(model, how):
        assert cache_bytes(model, 64) > 0
