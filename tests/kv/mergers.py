"""What the tests of reducers share."""
from dataclasses import replace

import torch
from torch.testing import assert_close

from llmopt import runtime
from llmopt.kv.reducers import Evict
from llmopt.runtime.cache_layer import Entries
from tests.tiny import ids, make


def at_random():
    """Two heads of 40 entries, the 12 best of each stay: entries, keep, scores."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 40, 8, generator=generator)
    scores = torch.rand(2, 40, generator=generator)
    keep = scores >= scores.topk(12, -1).values[:, -1:]
    return Entries(keys, values, torch.arange(40).expand(2, -1)), keep, scores


@torch.no_grad()
def cache_of(method, tokens, mask=None):
    """The cache behind a prompt, and the logits of what is read after it."""
    model = make("llama")
    with runtime.attached(model, method):
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 3)], 1)
        return cache, model(ids(len(tokens), 3, 9), attention_mask=mask, past_key_values=cache.fork()).logits


def assert_padded_rows_equal_rows_alone(method):
    """A short row behind padding keeps the same entries, keys, values and columns as it does alone."""
    tokens, pads = ids(2, 60), 17
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    both, _ = cache_of(method, tokens, mask)
    alone, _ = cache_of(method, tokens[1:, pads:])
    for padded, single in zip(both.layers, alone.layers, strict=True):
        where = torch.cat([torch.arange(w.start, w.stop) for row, _, w in padded.kept.heads() if row == 1])
        assert torch.equal(padded.kept.positions[where] - pads, single.kept.positions) and len(where) > 0
        for name in ("keys", "values"):
            assert_close(getattr(padded.kept, name)[where], getattr(single.kept, name), atol=1e-5, rtol=1e-4)
        for name, column in single.kept.carried.items():
            assert_close(padded.kept.carried[name][where], column, atol=1e-4, rtol=1e-4)


def assert_same_entries_as_evicted(method, keys=True):
    """The same positions as evicting keeps, as many bytes of keys and values, other values, finite logits."""
    tokens = ids(2, 60)
    (merged, logits), (evicted, _) = cache_of(method, tokens), cache_of(replace(method, reduce=Evict()), tokens)
    changed = 0
    for one, two in zip(merged.layers, evicted.layers, strict=True):
        assert one.keys.shape[2] == 0 and torch.equal(one.kept.positions, two.kept.positions)
        assert one.kept.keys.shape == two.kept.keys.shape and one.kept.values.shape == two.kept.values.shape
        changed += int((one.kept.values != two.kept.values).any(-1).sum())
        assert torch.equal(one.kept.keys, two.kept.keys) == keys
    assert changed > 0 and bool(logits.isfinite().all())
