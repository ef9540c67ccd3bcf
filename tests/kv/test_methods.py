"""kv methods: scores by hand, which entries stay, budgets, and errors that name the field."""
import json

import pytest
import torch
from llmopt_kernels import Rule
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.errors import FieldError, LlmoptError
from llmopt.kv.view import LayerKV
from llmopt.method import Run
from llmopt.parts import build
from tests.tiny import ids, make


def kept_positions(cache, layer=0, row=0):
    """Per KV head, the positions that a layer holds."""
    kept = cache.layers[layer].kept
    return [kept.positions[where].tolist() for r, _, where in kept.heads() if r == row]


def prefill(model, method, tokens, **kwargs):
    with runtime.attached(model, method, run=kwargs.pop("run", None)):
        return model(tokens, use_cache=True, **kwargs).past_key_values


def test_streaming_keeps_the_first_and_the_last():
    cache = prefill(make("llama"), kv.Streaming(budget=12), ids(1, 50))
    for layer in range(3):
        assert kept_positions(cache, layer) == [[0, 1, 2, 3, *range(42, 50)]] * 2


@pytest.mark.parametrize("ratio, length, kept", [
    (0.5, 50, 25), (0.9, 50, 7), (0.9, 5, 5), (0.25, 50, 38), (0.0, 50, 50), (0.99, 200, 7), (0.3, 33, 24)])
def test_ratio_is_the_fraction_removed(ratio, length, kept):
    cache = prefill(make("llama"), kv.Streaming(ratio=ratio), ids(1, length))
    assert [c.tolist() for c in cache.kept()] == [[[kept, kept]]] * 3


def test_sinks_and_window_shrink_to_fit():
    cache = prefill(make("llama"), kv.SnapKV(ratio=0.9, sinks=4, window=32), ids(1, 60))
    assert kept_positions(cache) == [[0, 1, 2, 3, 57, 58, 59]] * 2
    cache = prefill(make("llama"), kv.Streaming(ratio=0.9, minimum=3), ids(1, 20))
    assert kept_positions(cache) == [[0, 1, 19]] * 2


@pytest.mark.parametrize(("allocate", "first"), [("heads", 4), ({"heads": {"sinks": 0}}, 0)], ids=str)
def test_heads_that_scores_leave_next_to_nothing_keep_the_first_tokens(allocate, first):
    """Layer 0 has no score and keeps its floor of 7, the first tokens among them; the others share the rest."""
    method = kv.SnapKV(ratio=0.8, window=8, allocate=allocate, heads="s")
    run = Run(scores={"s": [torch.zeros(4), torch.ones(4), torch.ones(4)]})
    cache = prefill(make("llama"), method, ids(1, 60), run=run)
    assert kept_positions(cache) == [[*range(first), *range(53 + first, 60)]] * 2
    assert sum(int(c.sum()) for c in cache.kept()) == 6 * 12 and cache.kept()[1].min() >= 14


def test_noncausal_keeps_the_newest_whatever_looks_at_them(monkeypatch):
    monkeypatch.setattr(kv.NonCausal, "score", lambda self, seen: -seen.positions.float())
    cache = prefill(make("llama"), kv.NonCausal(budget=10), ids(1, 40))
    assert kept_positions(cache) == [[*range(6), *range(36, 40)]] * 2


@pytest.mark.parametrize(("allocate", "counts"), [("global", [6, 6]), ("ada", [18, 6])])
def test_first_tokens_that_slid_away_take_nothing(allocate, counts, monkeypatch):
    """The middle layer sees the last 20 tokens, all worth nothing: a head that others outbid keeps its window of 6."""
    monkeypatch.setattr(kv.Random, "score", lambda self, seen: (seen.positions + 1.0) * (seen.layer != 1))
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = make("gemma3_text", sliding_window=21, layer_types=kinds)
    cache = prefill(model, kv.Random(budget=12, sinks=4, window=6, minimum=1, allocate=allocate), ids(1, 60))
    held = kept_positions(cache, 1)
    assert all(places[-6:] == [*range(54, 60)] for places in held)
    assert [len(places) for places in held] == counts
    assert sum(int(c.sum()) for c in cache.kept()) == 6 * 12
    few = prefill(model, kv.Streaming(budget=8, sinks=4, minimum=1), ids(1, 60))
    assert kept_positions(few, 1) == [[*range(52, 60)]] * 2


def test_each_row_has_its_own_budget():
    tokens, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :20] = 0
    cache = prefill(make("llama"), kv.Streaming(ratio=0.5), tokens, attention_mask=mask)
    assert cache.kept()[0].tolist() == [[20, 20], [10, 10]]
    assert kept_positions(cache, row=1)[0] == [20, 21, 22, 23, *range(34, 40)]


@pytest.mark.parametrize("method", [kv.SnapKV(budget=16, window=8), kv.Expected(budget=16, window=8)])
def test_queries_wait_in_a_row_while_another_row_compresses(method):
    """The short row's first choice comes after a turn of 4 tokens; those before it vote, as they do alone."""
    model, tokens, mask = make("llama"), ids(2, 44), torch.ones(2, 44, dtype=torch.long)
    mask[1, :24] = 0

    def turns(rows, start):
        cache = None
        with runtime.attached(model, method):
            for first, end in ((start, 34), (34, 40), (40, 44)):
                seen = {} if start else {"attention_mask": mask[:, :end]}
                cache = model(tokens[rows, first:end], past_key_values=cache, use_cache=True, **seen).past_key_values
        return cache

    both, alone = turns(slice(None), 0), turns(slice(1, None), 24)
    held = [[[p - 24 for p in head] for head in kept_positions(both, layer, row=1)] for layer in range(3)]
    assert held == [kept_positions(alone, layer) for layer in range(3)]


def test_snapkv_score_by_hand():
    """Two queries, one key head: votes by an explicit softmax, pooled over three neighbours."""
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(1, 1, 6, 4, generator=g), torch.randn(1, 2, 2, 4, generator=g)
    place = torch.arange(6).view(1, 1, 6)
    view = LayerKV(keys, keys, queries, torch.tensor([[4, 5]]), place, torch.tensor([6]), 0, Rule(0.5))
    total = torch.zeros(6)
    for head in range(2):
        for row, position in enumerate((4, 5)):
            logits = (keys[0, 0, :position + 1] @ queries[0, head, row]) * 0.5
            total[:position + 1] += logits.softmax(0) / 4
    want = torch.stack([total[max(0, j - 1):j + 2].sum() / 3 for j in range(6)])
    assert_close(kv.SnapKV(budget=4, window=2, pool=3).score(view)[0, 0], want)
    assert_close(view.column_sums()[0].sum(0) / 4, total)


def test_snapkv_keeps_window_and_winners():
    model, tokens = make("llama"), ids(1, 50)
    cache = prefill(model, kv.SnapKV(budget=16, window=6, pool=1), tokens)
    assert all(p[-6:] == list(range(44, 50)) for p in kept_positions(cache))
    assert kept_positions(cache)[0] != kept_positions(cache)[1]
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions
    for layer in range(3):
        votes = weights[layer][0, :, -6:].mean(1).view(2, 2, -1).mean(1)[:, :44]
        for head in range(2):
            assert sorted(votes[head].topk(10).indices.tolist()) == kept_positions(cache, layer)[head][:10]


def test_second_turn_scores_only_what_is_left():
    model, tokens = make("llama"), ids(1, 60)
    with runtime.attached(model, kv.SnapKV(budget=16, window=6)):
        cache = model(tokens[:, :40], use_cache=True).past_key_values
        first = kept_positions(cache)
        model(tokens[:, 40:], past_key_values=cache)
    for old, new in zip(first, kept_positions(cache), strict=True):
        assert len(new) == 16 and set(new) <= set(old) | set(range(40, 60)) and new[-6:] == list(range(54, 60))


@pytest.mark.parametrize("allocate", ["uniform", "ada", "global", "pyramid", "prefix"])
def test_every_allocation_meets_its_budget(allocate):
    cache = prefill(make("llama"), kv.SnapKV(budget=20, window=4, allocate=allocate), ids(2, 80))
    counts = torch.stack(cache.kept())                                   # [L, B, G]
    assert counts.sum((0, 2)).tolist() == [20 * 3 * 2] * 2 and int(counts.min()) >= 7
    assert (allocate == "uniform") == bool((counts == 20).all())
    if allocate == "ada":
        assert counts.sum(2).tolist() == [[40, 40]] * 3


def test_an_allocator_with_fields_does_what_they_say():
    floors = []
    for given in ("prefix", {"prefix": {"floor": 2}}, {"prefix": {"floor": 15}}):
        cache = prefill(make("llama"), kv.SnapKV(budget=20, window=4, allocate=given), ids(2, 80))
        counts = torch.stack(cache.kept())
        assert counts.sum((0, 2)).tolist() == [20 * 3 * 2] * 2
        floors.append(int(counts.min()))
    assert floors[0] >= 7 and floors[2] >= 15
    one, two = (torch.stack(prefill(make("llama"), kv.SnapKV(budget=20, window=4, allocate={"pyramid": {"beta": b}}),
                                    ids(1, 80)).kept()).flatten().tolist() for b in (20, 2))
    assert one[0] > two[0] and sum(one) == sum(two)


def test_a_piece_comes_back_from_the_config_by_name_or_with_its_fields():
    for given, written in (("prefix", "prefix"), ({"ada": {"alpha": 0.5}}, {"ada": {"alpha": 0.5}})):
        model, other = make("llama"), make("llama")
        kv.SnapKV(budget=20, window=4, allocate=given).apply(model, Run())
        other.config.llmopt = json.loads(json.dumps(runtime.runtime_config(model)))
        assert other.config.llmopt["steps"][0]["method"]["kv.snapkv"]["allocate"] == written
        runtime.attach_from_config(other)
        assert runtime.attachment(other).method("evicting kv method") == kv.SnapKV(budget=20, window=4, allocate=given)


def test_heads_share_by_their_best_query_head(tmp_path):
    scores = [torch.tensor([0., 3., 0., 1.]), torch.zeros(4), torch.tensor([2., 0., 0., 0.])]
    method = kv.SnapKV(budget=20, window=4, allocate="heads", heads="heads.retrieval")
    cache = prefill(make("llama"), method, ids(1, 80), run=Run(scores={"heads.retrieval": scores}))
    found = torch.cat(cache.kept()).tolist()
    assert found == [[50, 16], [7, 7], [33, 7]]               # weights 3 1 | 0 0 | 2 0, floor 7, sum 120
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"scores": [s.tolist() for s in scores]}))
    again = prefill(make("llama"), kv.SnapKV(budget=20, window=4, allocate="heads", heads=str(path)), ids(1, 80))
    assert torch.cat(again.kept()).tolist() == found
    with pytest.raises(LlmoptError, match="no score step 'heads.retrieval'"):
        prefill(make("llama"), method, ids(1, 80))


def test_head_shares_travel_in_the_record():
    run = Run(scores={"s": [torch.rand(4) for _ in range(3)]})
    model = make("llama")
    record = kv.SnapKV(budget=20, window=4, allocate="heads", heads="s").apply(model, run)
    cache = model(ids(1, 80), use_cache=True).past_key_values
    other = make("llama")
    other.config.llmopt = json.loads(json.dumps(runtime.runtime_config(model)))
    runtime.attach_from_config(other)
    assert [len(row) for row in record.meta["shares"]] == [2, 2, 2]
    again = other(ids(1, 80), use_cache=True).past_key_values
    assert all(torch.equal(a, b) for a, b in zip(cache.kept(), again.kept(), strict=True))


@pytest.mark.parametrize("given, key", [
    (dict(ratio=1.0), "ratio"), (dict(ratio=-0.1), "ratio"), (dict(), "ratio"), (dict(ratio=0.5, budget=50), "ratio"),
    (dict(budget=31), "budget"), (dict(budget=0, window=1), "budget"), (dict(ratio=0.5, pool=4), "pool"),
    (dict(ratio=0.5, window=0), "window"), (dict(ratio=0.5, sinks=-1), "sinks"), (dict(ratio=0.5, every=0), "every"),
    (dict(ratio=0.5, minimum=0), "minimum"), (dict(ratio=0.5, allocate="best"), "allocate"),
    (dict(ratio=0.5, allocate="heads"), "heads"), (dict(ratio=0.5, heads="heads.retrieval"), "heads"),
    (dict(ratio="half"), "ratio"), (dict(ratio=0.5, reduce="sum"), "reduce")])
def test_a_bad_field_is_named(given, key):
    with pytest.raises(FieldError, match=key) as error:
        kv.SnapKV(**given)
    assert error.value.key == key
    with pytest.raises(LlmoptError, match=f"kv.snapkv: {key}"):
        build("kv.snapkv", given)


def test_streaming_needs_room_for_its_sinks():
    with pytest.raises(FieldError, match="budget"):
        kv.Streaming(budget=3)
    assert kv.Streaming(budget=4).share(100) == 4
