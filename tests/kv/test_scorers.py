"""Cheap scorers: closed forms, and what stays of a text whatever else is in the batch."""
from dataclasses import replace

import pytest
import torch
from llmopt_kernels import Rule
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.kv.base import Scorer
from llmopt.kv.leverage import leverage_scores
from llmopt.kv.noncausal import chunk_sums, non_causal
from llmopt.kv.view import LayerKV, Source
from llmopt.parts import build
from llmopt.runtime.lots import mixed
from tests.kv.test_carried import queries_and_keys
from tests.test_runtime import padded, steps
from tests.tiny import ids, make


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def view(keys, values=None, queries=None, first=0, positions=None):
    """What a scorer sees of a layer with keys [G, T, D] and queries [H, W, D] at `first`, `first` + 1, ..."""
    heads, length, _ = keys.shape
    place = torch.arange(length).expand(1, heads, -1) if positions is None else torch.tensor(positions)[None]
    asked = None if queries is None else torch.arange(first, first + queries.shape[1])[None]
    values, queries = keys if values is None else values, None if queries is None else queries[None]
    return LayerKV(keys[None], values[None], queries, asked, place, torch.tensor([int(place.max()) + 1]), 0, Rule(0.5),
                   Source(None, None, place, asked, 0))


def explicit(query, keys, first):
    """[W, T]: causal attention of queries at `first`, `first` + 1, ... written out."""
    logits = query @ keys.T * 0.5
    later = torch.arange(len(keys)) > torch.arange(first, first + len(query))[:, None]
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def kept_of(model, method, tokens, **kwargs):
    with runtime.attached(model, method):
        return model(tokens, use_cache=True, **kwargs).past_key_values


NAMES = ("compactor", "critical", "dropkv", "ems", "h2o", "keydiff", "knorm", "leverage", "noncausal", "random", "tova")


@pytest.mark.parametrize(("name", "family"), [*((name, "qwen3") for name in NAMES),
                                              *((name, "gemma2") for name in ("ems", "leverage", "noncausal"))])
def test_a_padded_row_keeps_what_the_prompt_alone_keeps(name, family):
    """Through several turns, with heads that compete; keys of one size and keys in few dimensions are ties."""
    model, (tokens, mask) = make(family), padded()
    fields = {"budget": 12, "window": 3, "sinks": 2, "every": 2,
              "allocate": "uniform" if family == "gemma2" else "ada"}
    with runtime.attached(model, build(f"kv.{name}", fields)):
        batch, cache = steps(model, tokens, mask, [24, 1, 1, 9, 1])
        alone, single = steps(model, tokens[1:, 9:], mask[1:, 9:], [15, 1, 1, 9, 1])
    assert_close(batch[1:, 9:], alone, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a[1:], b) for a, b in zip(cache.kept(), single.kept(), strict=True))
    assert any(int(counts.sum()) < 108 for counts in single.kept())          # 27 tokens, at most 4 heads


# ------------------------------------------------------------------------------------------------------ keys alone

def test_keydiff_gives_twins_one_score_and_the_outlier_the_best():
    keys = torch.ones(1, 6, 4) + 0.1 * drawn(1, 6, 4)
    keys[0, 3], keys[0, 5] = keys[0, 1], torch.tensor([-1., 2., -3., 1.])
    scores = kv.KeyDiff(ratio=0.5).score(view(keys))[0, 0]
    assert scores[1] == scores[3] and int(scores.argmax()) == 5
    unit = keys[0] / keys[0].norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    assert_close(scores, -(unit @ mean) / mean.norm())
    holes = torch.cat([keys, torch.full((1, 2, 4), torch.nan)], 1)
    again = kv.KeyDiff(ratio=0.5).score(view(holes, positions=[[0, 1, 2, 3, 4, 5, -1, -1]]))
    assert_close(again[0, 0, :6], scores)


def test_knorm_keeps_small_keys():
    scores = kv.Knorm(ratio=0.5).score(view(torch.tensor([[[3., 4.], [0., 1.], [6., 8.]]])))
    assert scores[0, 0].tolist() == [-5.0, -1.0, -10.0]


def test_leverage_of_an_orthogonal_basis_is_even_and_an_outlier_has_all():
    scores = leverage_scores(torch.linalg.qr(drawn(8, 8)).Q)
    assert_close(scores, torch.ones(8), atol=1e-3, rtol=0)
    tall = torch.cat([torch.eye(3).repeat(4, 1), torch.zeros(12, 1)], 1)
    tall = torch.cat([tall, torch.tensor([[0., 0., 0., 5.]])])
    assert_close(leverage_scores(tall), torch.tensor([0.25] * 12 + [1.0]), atol=1e-3, rtol=0)
    assert torch.equal(leverage_scores(torch.zeros(1, 4, 3)), torch.zeros(1, 4))


def test_leverage_is_of_centred_keys_before_rope_and_a_sketch_comes_near():
    model, tokens, seen = make("llama"), ids(1, 60), {}

    class Heard(kv.Leverage):
        def score(self, view):
            return seen.setdefault(view.layer, super().score(view))

    kept_of(model, Heard(ratio=0.5), tokens)
    _, keys = queries_and_keys(model, tokens, torch.zeros(1, 60, dtype=torch.long))
    own = (keys - keys.mean(2, keepdim=True))[0].double()
    exact = (own @ torch.linalg.inv(own.mT @ own) @ own.mT).diagonal(dim1=1, dim2=2)
    assert_close(seen[0][0].double(), exact, atol=2e-3, rtol=2e-2)
    seen.clear()
    kept_of(model, Heard(ratio=0.5, dimensions=12), tokens)
    assert torch.corrcoef(torch.stack([seen[0][0, 0].double(), exact[0]]))[0, 1] > 0.5
    assert_close(seen[0].sum(-1), torch.full((1, 2), 12.0), atol=0.05, rtol=0)      # as many as there are dimensions
    kept = kept_of(model, kv.Leverage(ratio=0.8), tokens).layers
    assert all(layer.kept.positions[where].tolist()[:4] == [0, 1, 2, 3] for layer in kept
               for *_, where in layer.kept.heads())                                 # however alike their keys are


# ---------------------------------------------------------------------------------------------------------- by lot

def test_random_is_the_same_for_a_text_alone_and_in_a_batch():
    model, tokens, mask = make("llama"), ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :10] = 0
    kept = kept_of(model, kv.Random(ratio=0.5), tokens, attention_mask=mask).layers[0].kept
    alone = kept_of(model, kv.Random(ratio=0.5), tokens[1:, 10:]).layers[0].kept
    both = [kept.positions[where].tolist() for row, _, where in kept.heads() if row == 1]
    assert [[j - 10 for j in head] for head in both] == [alone.positions[w].tolist() for _, _, w in alone.heads()]
    assert both[0] != both[1]
    other = kept_of(model, kv.Random(ratio=0.5, seed=1), tokens[1:, 10:]).layers[0].kept
    assert other.positions.tolist() != alone.positions.tolist()


def test_random_is_fair():
    scores = kv.Random(ratio=0.5).score(view(drawn(4, 20_000, 1)))[0]
    assert_close(scores.mean(-1), torch.full((4,), 0.5), atol=0.01, rtol=0)
    assert_close(scores.var(-1), torch.full((4,), 1 / 12), atol=0.003, rtol=0)
    assert torch.corrcoef(scores).fill_diagonal_(0).abs().max() < 0.03
    assert abs(float(torch.corrcoef(torch.stack([scores[0, 1:], scores[0, :-1]]))[0, 1])) < 0.03
    assert int(mixed(torch.tensor(-1))) == 0 and int(mixed(torch.tensor(0))) == 0xE220A8397B1DCDAF - 2 ** 64


# ------------------------------------------------------------------------------------------------ attention so far

def test_tova_by_hand_gives_all_heads_one_score():
    keys, queries = drawn(2, 6, 4), drawn(4, 3, 4)
    scores = kv.TOVA(ratio=0.5).score(view(keys, queries=queries, first=3))
    want = sum(explicit(queries[h, -1:], keys[h // 2], 5)[0] for h in range(4)) / 4
    assert_close(scores[0, 0], want)
    assert torch.equal(scores[0, 0], scores[0, 1])


def test_tova_keeps_one_set_of_entries_in_every_head_through_turns():
    model, tokens = make("llama"), ids(1, 40)
    with runtime.attached(model, kv.TOVA(budget=8, every=1)):
        cache = model(tokens[:, :30], use_cache=True).past_key_values
        for at in range(30, 40):
            model(tokens[:, at:at + 1], past_key_values=cache)
            kept = cache.layers[1].kept
            one, two = (kept.positions[where].tolist() for _, _, where in kept.heads())
            assert one == two and one[-1] == at and len(one) == 8


@pytest.mark.parametrize("mean", [False, True])
@torch.no_grad()
def test_h2o_over_turns_is_the_whole_map_computed_at_once(mean):
    """The short row drops nothing: its sums, carried from turn to turn, are the column sums of the full map."""
    model, tokens, mask, found = make("llama"), ids(2, 30), torch.ones(2, 30, dtype=torch.long), {}
    mask[0, :18] = 0

    class Heard(kv.H2O):
        def score(self, view):
            return found.setdefault((view.layer, int(view.lengths)), super().score(view))

    with runtime.attached(model, Heard(budget=12, mean=mean, every=1)):
        cache = None
        for part in (slice(0, 20), slice(20, 21), slice(21, 30)):
            cache = model(tokens[:, part], attention_mask=mask[:, :part.stop], past_key_values=cache,
                          position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, part], use_cache=True).past_key_values
    assert {(0, 2), (0, 3), (0, 12)} <= found.keys()
    queries, keys = queries_and_keys(model, tokens[:1, 18:], torch.arange(12)[None])
    for head in range(2):
        maps = [explicit(queries[0, h] / 2, keys[0, head], 0) for h in (2 * head, 2 * head + 1)]    # scale 1/4, not 1/2
        want = sum(maps).sum(0) / 2 / (12 - torch.arange(12) if mean else 1)
        assert_close(found[0, 12][0, head], want, atol=1e-4, rtol=1e-4)


def test_h2o_gives_half_of_the_budget_to_the_newest():
    for recent, sure in ((0.5, 5), (0.0, 0), (1.0, 10)):
        kept = kept_of(make("llama"), kv.H2O(budget=10, recent=recent, window=0), ids(1, 60)).layers[0].kept
        heads = [kept.positions[where].tolist() for _, _, where in kept.heads()]
        assert all(len(head) == 10 and set(range(60 - sure, 60)) <= set(head) for head in heads)
        assert any(59 - sure not in head for head in heads)


def test_snapkv_whose_window_is_the_prompt_ranks_as_h2o_does():
    model, tokens, found = make("llama"), ids(1, 30), {}

    def heard(method):
        class Heard(type(method)):
            def score(self, view):
                return found.setdefault((type(method), view.layer), super().score(view))
        return Heard(**method.to_dict()[method.name])

    for method in (kv.SnapKV(ratio=0.1, window=30, pool=1, minimum=1), kv.H2O(ratio=0.1, minimum=1)):
        kept_of(model, heard(method), tokens)
    assert len(found) == 6
    for layer in range(3):
        assert_close(found[kv.SnapKV, layer] * 30, found[kv.H2O, layer], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- attention of the chunk

def test_noncausal_by_hand():
    keys, values, queries = drawn(1, 7, 4), drawn(1, 7, 3), drawn(2, 7, 4)
    seen = view(keys, values, queries)
    total = torch.zeros(2, 7)
    for head in range(2):
        for part in (slice(0, 4), slice(4, 7)):
            total[head, part] = (queries[head, part] @ keys[0, part].T).softmax(-1).sum(0)
    assert_close(chunk_sums(replace(seen, rule=replace(seen.rule, scaling=1.0)), 4)[0], total)
    votes = total.mean(0) * values[0].norm(dim=-1)
    want = torch.stack([votes[max(0, j - 1):j + 2].sum() / 3 for j in range(7)])
    assert_close(kv.NonCausal(ratio=0.5, chunk=4).score(seen)[0, 0], want)


@pytest.mark.parametrize("method", [kv.NonCausal, kv.Compactor, kv.EMS])
def test_an_entry_carries_into_the_next_turn_what_it_had(method):
    model, tokens, found = make("llama"), ids(1, 60), []

    class Heard(method):
        def carry(self, view, scores):
            found.append((view, super().carry(view, scores)))
            return found[-1][1]

    with runtime.attached(model, Heard(budget=40)):
        cache = model(tokens[:, :45], use_cache=True).past_key_values
        model(tokens[:, 45:], past_key_values=cache)
    (_, before), (seen, after) = found[0], found[3]
    name, = before
    old = seen.positions[0, 0][seen.positions[0, 0] < 45].long()
    was, now = before[name][0, 0, old], after[name][0, 0, :len(old)]
    if method is kv.EMS:
        assert bool((now > was).all())                           # the new queries look at it too
    else:
        assert torch.equal(was, now)


def test_compactor_is_both_halves_standardized():
    model, tokens, found = make("llama"), ids(1, 50), {}

    class Heard(kv.Compactor):
        def score(self, view):
            return found.setdefault(view.layer, (super().score(view), view))[0]

    kept_of(model, Heard(budget=20), tokens)
    scores, seen = found[1]
    halves = [non_causal(seen, 256), kv.Leverage(ratio=0.5).score(seen)]
    one, two = ((x - x.mean()) / x.std(correction=0) for x in halves)
    assert_close(scores, one + 0.6 * two, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------- values count as well

def test_dropkv_is_the_error_of_the_output_that_one_loss_makes():
    """Each entry is really left out: the squared change of the output, by hand."""
    keys, values, queries = drawn(1, 6, 4), drawn(1, 6, 3), drawn(2, 2, 4)
    want = torch.zeros(6)
    for head in range(2):
        p = explicit(queries[head], keys[0], 4)                                          # [2, 6]
        for gone in range(6):
            rest = p * (torch.arange(6) != gone)
            rest = rest / rest.sum(-1, keepdim=True)
            want[gone] += (rest @ values[0] - p @ values[0]).square().sum() / 2
    scores = kv.DropKV(budget=4, window=2, pool=1).score(view(keys, values, queries, first=4))
    assert_close(scores[0, 0], want, atol=1e-4, rtol=1e-3)


def test_critical_by_hand(monkeypatch):
    """Eight entries, a budget of five, the last always kept and one by votes; three by votes times |W_O v|."""
    votes = torch.tensor([[[.30, .25, .20, .10, .05, .04, .03, .03]]])
    monkeypatch.setattr(kv.SnapKV, "score", lambda self, seen: votes)
    values = torch.ones(1, 8, 2)
    values[0, 5], values[0, 2], values[0, 0] = 9.0, 0.1, 0.0
    weight = torch.stack([torch.tensor([[1., -1., 0.], [2., 0., 1.]]), torch.tensor([[0., 1., 0.], [0., 0., -1.]])])
    monkeypatch.setattr(LayerKV, "output_weight", lambda self: weight)
    scores = kv.Critical(budget=5, window=1, pool=1).score(view(values, values, values.repeat(2, 1, 1)))
    sizes = torch.stack([(values[0] @ w).abs().sum(-1) for w in weight]).mean(0)
    plain = (votes[0, 0] + 1e-4) * sizes
    top = float(plain.max())
    assert_close(scores[0, 0], plain + top * torch.tensor([1., 0, 0, 0, 0, 0, 0, 0]))
    kept = (scores[0, 0] + torch.tensor([0.] * 7 + [torch.inf])).topk(5).indices
    assert set(kept.tolist()) == {7, 0, 1, 5, 3}              # 0 by its votes alone: its value is zero


# ------------------------------------------------------------------------------------------------------------ EMS

def test_ems_brings_both_scores_to_one_mean():
    keys, queries = drawn(1, 9, 4), drawn(2, 9, 4)
    seen = view(keys, queries=queries)
    glo = sum(explicit(queries[h], keys[0], 0).sum(0) for h in range(2)) / 2
    loc = sum(explicit(queries[h], keys[0], 0)[-3:].sum(0) for h in range(2)) / 2
    for combine, join in (("max", torch.maximum), ("sum", torch.add)):
        scores = kv.EMS(budget=5, window=3, pool=1, combine=combine).score(seen)[0, 0]
        assert_close(scores, join(loc, glo * loc.mean() / glo.mean()))


# ---------------------------------------------------------------------------------------------------- protect

def test_protect_reserves_a_part_of_the_budget_at_each_end():
    class Middle(Scorer):
        name = "kv.middle"

        def score(self, seen):
            return -(seen.positions - 50.0).abs()

    for fields, first, last in (({"protect": 0.1}, 2, 2), ({"protect": 0.1, "sinks": 4, "window": 1}, 4, 2),
                                ({"protect": 0.5}, 10, 10), ({"protect": 0.5, "sinks": 15}, 10, 10), ({}, 0, 0)):
        kept = kept_of(make("llama"), Middle(budget=20, **fields), ids(1, 100)).layers[0].kept
        places = set(kept.positions[:20].tolist())
        assert len(places) == 20 and {*range(first), *range(100 - last, 100)} <= places
        assert first not in places and 99 - last not in places
