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
from llmopt.parts import _REGISTRY, register
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
