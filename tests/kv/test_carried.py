"""Columns that entries carry: a method that needs them, against a dense oracle."""
import copy

import pytest
import torch
from llmopt_kernels import NONE, Ragged, rotate
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.kv.base import Scorer
from llmopt.kv.reduce import evict, merge
from llmopt.runtime.cache_layer import Entries, RaggedLayer
from tests.tiny import ids, make


class H2O(Scorer):
    """Heavy hitters: the attention that an entry has received so far (Zhang et al., 2023), in the base's words."""

    name = "kv.h2o"

    def queries(self):
        return None

    def score(self, view):
        return view.carried["mass"] + view.mean_over_group(view.column_sums())

    def carry(self, view, scores):
        return {"mass": scores}


class Oracle:
    """Plain H2O in layer 0 of one row, a KV head at a time, from the queries and keys of the whole text."""

    def __init__(self, budget):
        self.budget, self.kept, self.mass, self.done = budget, [[], []], [{}, {}], 0

    def compress(self, query, keys, real):
        """query [4, T, D], keys [2, T, D] of all T tokens seen; real: bool [T]."""
        new = [j for j in range(self.done, len(real)) if real[j]]
        self.done = len(real)
        for head in range(2):
            there = torch.tensor(self.kept[head] + new)
            logits = query[2 * head:2 * head + 2, new] @ keys[head, there].T / keys.shape[-1] ** 0.5
            logits = logits.masked_fill(there > torch.tensor(new)[:, None], -torch.inf)
            got = logits.softmax(-1).sum(1).mean(0)                                          # [entries]
            mass = {int(j): self.mass[head].get(int(j), 0.0) + float(g) for j, g in zip(there, got, strict=True)}
            best = sorted(mass, key=mass.get, reverse=True)[:self.budget]
            self.kept[head], self.mass[head] = sorted(best), {j: mass[j] for j in best}


def queries_and_keys(model, tokens, places):
    """Of layer 0, which depend on nothing that a cache holds: [B, 4, T, D] and [B, 2, T, D]."""
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
    cos, sin = (x[:, None] for x in model.model.rotary_emb(hidden, places))
    return [rotate(part(hidden).unflatten(-1, (-1, 16)).transpose(1, 2), cos, sin)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)]


@pytest.mark.parametrize("every", [None, 2])
@torch.no_grad()
def test_h2o_over_turns_padding_and_beams_equals_a_dense_oracle(every):
    model, tokens, pads = make("llama"), ids(2, 20), 5
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    oracles = [Oracle(10), Oracle(10)]
    with runtime.attached(model, H2O(budget=10, every=every)):
        cache, fed = None, 0
        for size in (0, 1, 1, 8, 1, 6):
            if size == 8:                                       # the rows part ways, as beams do
                rows = torch.tensor([1, 0, 1])
                cache.batch_select_indices(rows)
                tokens, mask, oracles = tokens[rows], mask[rows], [copy.deepcopy(oracles[r]) for r in rows]
            tokens = torch.cat([tokens, ids(len(tokens), size, 7 * size)], 1)
            mask = torch.cat([mask, mask.new_ones(len(tokens), size)], 1)
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            cache = model(tokens[:, fed:], attention_mask=mask, position_ids=places[:, fed:], past_key_values=cache,
                          use_cache=True).past_key_values
            due = size != 1 or cache.pending == 0
            fed = tokens.shape[1]
            if due:
                query, keys = queries_and_keys(model, tokens, places)
                for row, oracle in enumerate(oracles):
                    oracle.compress(query[row], keys[row], mask[row].bool())
                check(cache.layers[0].kept, oracles)
        last = cache.without_last().layers[0].kept
    assert set(last.carried) == {"mass"} and len(last.carried["mass"]) == len(last.positions)


def check(kept, oracles):
    for row, head, where in kept.heads():
        assert kept.positions[where].tolist() == oracles[row].kept[head]
        mass = [oracles[row].mass[head][j] for j in oracles[row].kept[head]]
        assert_close(kept.carried["mass"][where].tolist(), mass, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_that_keeps_all_carries_what_it_was_asked():
    """The short row has room; its mass must not be lost when the long one makes the layer fold."""
    model, tokens = make("llama"), ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    with runtime.attached(model, H2O(budget=10)):
        kept = model(tokens, attention_mask=mask, use_cache=True).past_key_values.layers[0].kept
    sums = [float(kept.carried["mass"][where].sum()) for row, _, where in kept.heads() if row == 1]
    assert_close(sums, [9.0, 9.0], atol=1e-4, rtol=1e-4)        # nine queries, each gives one
    with runtime.attached(model, kv.SnapKV(budget=10, window=4)):
        assert model(tokens, use_cache=True).past_key_values.layers[0].kept.carried == {}


def test_columns_follow_their_entries():
    """Through reducers, holes, folding, the join with a tail and a window; int columns stay int."""
    keys, place = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4).expand(2, -1)
    given = Entries(keys, keys, place, {"mass": place.float(), "visits": place * 10})
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for reducer in (evict, merge):
        layer = RaggedLayer(2, window=3)
        layer.update(keys[None].repeat(2, 1, 1, 1), keys[None].repeat(2, 1, 1, 1))
        bare = Entries(keys, keys, place)
        layer.fold([reducer(given, keep), bare])
        assert layer.kept.carried["visits"].tolist() == [0, 20, 30, 10] + [0] * 8
        assert layer.kept.carried["visits"].dtype == torch.int64
        layer.update(keys[None, :, :1].repeat(2, 1, 1, 1), keys[None, :, :1].repeat(2, 1, 1, 1))
        row = layer.row(0, None)
        assert row.positions.tolist() == [[3, 4], [4, NONE]]
        assert row.carried["mass"].tolist() == [[3.0, 0.0], [0.0, 0.0]]
    turned = layer.kept.select_rows(torch.tensor([1, 0]))
    assert isinstance(turned, Ragged) and turned.carried["visits"].tolist() == [0] * 8 + [0, 20, 30, 10]
    assert any(t is turned.carried["mass"] for t in turned.tensors())
