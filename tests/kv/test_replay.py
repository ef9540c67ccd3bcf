"""A method that reads the context again before it drops any of it, against queries computed by hand."""
import pytest
import torch
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.kv.base import Scorer
from llmopt.runtime.rehearsal import cache_bytes
from tests.kv.test_carried import queries_and_keys
from tests.tiny import ids, make


class Zip(Scorer):
    """As KVzip: what the context itself looks at when it is read a second time, in halves."""

    name, replays = "kv.zip", True
    found: list

    def queries(self):
        return None

    def replay(self, tokens, record):
        yield from tokens.chunk(2)

    def score(self, view):
        assert view.source.model is not None and not view.lengths.ne(view.lengths[0]).any()
        self.found.append((view.layer, view.queries.shape[2], int(view.lengths[0])))
        return view.max_over_group(view.attention().amax(-2))


def method(**given):
    made = Zip(**given)
    object.__setattr__(made, "found", [])
    return made


@pytest.mark.parametrize("allocate", ["uniform", "global"])
@torch.no_grad()
def test_entries_are_judged_by_the_replayed_context(allocate):
    """Layer 0, by hand: the text once more behind itself, each half from the same place; a padded row as if alone."""
    model, tokens, pads = make("llama"), ids(2, 24), 7
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    zipped = method(budget=10, allocate=allocate)
    dense = model(tokens, attention_mask=mask, position_ids=places).logits
    with runtime.attached(model, zipped):
        filled = model(tokens, attention_mask=mask, position_ids=places, use_cache=True)
        cache = filled.past_key_values
        alone = model(tokens[1:, pads:], use_cache=True).past_key_values
    assert_close(filled.logits[mask.bool()], dense[mask.bool()], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a[1:], b) for a, b in zip(cache.kept(), alone.kept(), strict=True))
    assert zipped.found[:3] == [(0, 12, 24), (1, 12, 24), (2, 12, 24)] and all(x.queries is None for x in cache.layers)
    assert cache.ids.shape == (2, 24) and cache.get_seq_length() == 24
    if allocate == "global":
        return
    for row, kept in ((0, cache.layers[0].kept), (1, cache.layers[0].kept)):
        text = tokens[row, pads * row:]
        best = torch.zeros(2, len(text))
        _, keys = queries_and_keys(model, text[None], torch.arange(len(text))[None])
        for half in text.chunk(2):
            query, _ = queries_and_keys(model, half[None], torch.arange(len(text), len(text) + len(half))[None])
            weights = (query[0].unflatten(0, (2, 2)) @ keys[0, :, None].mT / 4).softmax(-1)     # [G, g, t, T]
            best = torch.maximum(best, weights.amax((1, 2)))
        for r, head, where in kept.heads():
            if r == row:
                want = best[head].topk(10).indices.sort().values + pads * row
                assert kept.positions[where].tolist() == want.tolist()


@torch.no_grad()
def test_a_second_turn_replays_all_ids_and_beams_follow():
    model, tokens, zipped = make("llama"), ids(2, 30), method(budget=10)
    with runtime.attached(model, zipped):
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1, 0]))
        zipped.found.clear()
        cache = model(tokens[[1, 0], 20:], past_key_values=cache).past_key_values
        assert torch.equal(cache.ids, tokens[[1, 0]]) and zipped.found[0] == (0, 15, 30)
        assert [c.tolist() for c in cache.kept()] == [[[10, 10]] * 2] * 3
        with pytest.raises(LlmoptError, match="input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=True)
        fresh = runtime.new_cache(model)
    with runtime.attached(model, kv.Streaming(budget=20)):
        model(tokens, past_key_values=fresh)
    with runtime.attached(model, zipped), pytest.raises(LlmoptError, match="begun without it and has not kept them"):
        model(tokens[:, :1], past_key_values=fresh)


@torch.no_grad()
def test_recording_while_frozen_and_a_rehearsal_that_asks_no_score():
    model, tokens, zipped = make("llama"), ids(1, 24), method(budget=10)
    with runtime.attached(model, kv.SnapKV(budget=10, window=4)):
        cache = model(tokens, use_cache=True).past_key_values
        for recording in (False, True):
            with runtime.frozen(model, recording=recording):
                copy = model(tokens[:, :6], past_key_values=cache.fork()).past_key_values
            assert (copy.layers[0].queries is not None) == recording and copy.kept()[0].tolist() == [[16, 16]]
        assert copy.layers[0].queries.shape[2] == 4
    with runtime.attached(model.to("meta"), zipped):
        bytes_held = cache_bytes(model, 64)
    assert not zipped.found and bytes_held == 3 * (2 * 10 * (2 * 16 * 4 + 4) + 2 * 8)
