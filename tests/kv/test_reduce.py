"""What becomes of entries that are not kept."""
from dataclasses import replace

import pytest
import torch
from llmopt_kernels import NONE
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.kv import reduce
from llmopt.kv.reducers import Reducer
from llmopt.parts import _REGISTRY, names, register
from llmopt.runtime.cache_layer import Entries
from tests.tiny import ids, make


def entries(keys, values, positions=None):
    keys, values = torch.tensor([keys]), torch.tensor([values])
    place = torch.arange(keys.shape[1]) if positions is None else torch.tensor(positions)
    return Entries(keys, values, place.expand(1, -1))


def test_merge_by_hand():
    """The third joins the first (cosine .6, weight .6 * 2 / (2 + 3) = .24), the fourth none, the fifth is a hole."""
    given = entries([[1., 0.], [0., 1.], [3., -4.], [-1., -1.], [1., 0.]],
                    [[3., 0.], [0., 2.], [0., 2.], [5., 5.], [9., 9.]], [0, 1, 2, 3, NONE])
    left = reduce.merge(given, torch.tensor([[True, True, False, False, False]]))
    assert left.positions.tolist() == [[0, 1, NONE, NONE, NONE]]
    assert_close(left.values[0, :2], torch.tensor([[3 / 1.24, 0.48 / 1.24], [0., 2.]]))
    assert torch.equal(left.keys, given.keys) and given.values[0, 0].tolist() == [3., 0.]


def test_equal_entries_merge_into_themselves_and_chunks_do_not_matter(monkeypatch):
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 40, 8, generator=g), torch.randn(2, 40, 8, generator=g)
    keep = torch.rand(2, 40, generator=g) < 0.3
    given = Entries(keys, values, torch.arange(40).expand(2, -1))
    whole = reduce.merge(given, keep).values
    monkeypatch.setattr(reduce, "CHUNK", 3)
    assert_close(reduce.merge(given, keep).values, whole)
    same = Entries(keys[:, :1].expand(-1, 40, -1), values[:, :1].expand(-1, 40, -1), given.positions)
    assert_close(reduce.merge(same, keep).values, same.values)
    everything = torch.ones(2, 40, dtype=torch.bool)
    assert torch.equal(reduce.merge(given, everything).values, values)


REDUCERS = [*names("reducer"), {"ems_merge": {"tau": 0.1, "merge_keys": True, "count": True}}]


@pytest.mark.parametrize("how", REDUCERS, ids=str)
@torch.no_grad()
def test_a_padded_row_reads_on_over_several_turns_as_it_does_alone(how):
    """Every turn compresses anew what the turns before it have merged."""
    model, tokens, mask = make("llama"), ids(2, 72), torch.ones(2, 72, dtype=torch.long)
    mask[1, :17] = 0

    def last(rows, start):
        cache = None
        for first, end in ((start, 40), (40, 52), (52, 60), (60, 72)):
            seen = {} if start else {"attention_mask": mask[:, :end]}
            out = model(tokens[rows, first:end], past_key_values=cache, use_cache=True, **seen)
            cache = out.past_key_values
        return out.logits[-1]

    with runtime.attached(model, kv.H2O(budget=12, reduce=how)):
        padded, alone = last(slice(None), 0), last(slice(1, None), 17)
    assert_close(padded, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, last(slice(1, None), 17), atol=1e-3)           # it does drop what counts


@pytest.mark.parametrize("how", REDUCERS, ids=str)
@torch.no_grad()
def test_a_budget_for_all_changes_nothing(how):
    model, tokens = make("llama"), ids(2, 40)
    dense = model(tokens[:, 30:], past_key_values=model(tokens[:, :30], use_cache=True).past_key_values).logits
    with runtime.attached(model, kv.H2O(budget=40, reduce=how)):
        cache = model(tokens[:, :30], use_cache=True).past_key_values
        assert_close(model(tokens[:, 30:], past_key_values=cache).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("allocate", ["uniform", "ada", "global"])
def test_merging_keeps_the_same_entries_with_other_values(allocate):
    model, tokens = make("llama", torch.bfloat16), ids(2, 60)
    caches = []
    for how in ("evict", "merge"):
        with runtime.attached(model, kv.SnapKV(budget=12, window=4, allocate=allocate, reduce=how)):
            caches.append(model(tokens, use_cache=True).past_key_values)
            out = model(tokens[:, :1], past_key_values=caches[-1].fork()).logits
            assert bool(out.isfinite().all())
    evicted, merged = ([layer.kept for layer in cache.layers] for cache in caches)
    assert torch.equal(evicted[0].positions, merged[0].positions) and torch.equal(evicted[0].keys, merged[0].keys)
    assert not torch.equal(evicted[0].values, merged[0].values) and merged[0].values.dtype == torch.bfloat16


@dataclass(frozen=True)
class Fading(Reducer):
    """Evicts, and multiplies the values that stay by `by`, those of the lower half of the scores twice."""

    by: float = Field(0.5, gt=0, le=1)

    def reduce(self, kv, entries, keep, scores):
        assert torch.equal(kv.keys[0], entries.keys) and kv.queries.shape[2] == 4
        weak = scores < scores.masked_fill(~keep, torch.nan).nanmedian(-1, keepdim=True).values
        left = reduce.evict(entries, keep)
        return replace(left, values=left.values * torch.where(weak, self.by ** 2, self.by).unsqueeze(-1))


def test_a_reducer_has_fields_and_sees_the_view_and_the_scores():
    register("fading")(Fading)
    try:
        caches = []
        for how in ("evict", {"fading": {"by": 0.25}}):
            with runtime.attached(make("llama"), kv.SnapKV(budget=12, window=4, reduce=how)) as model:
                caches.append(model(ids(2, 60), use_cache=True).past_key_values)
        before, after = (torch.cat([layer.kept.values for layer in cache.layers]) for cache in caches)
        factor = after / before
        assert set(factor.mul(10000).round().unique().tolist()) == {625.0, 2500.0}
    finally:
        del _REGISTRY["reducer"]["fading"]
