"""Sparse attention against explicit loops over the keys that each row may read."""
import pytest
import torch
from llmopt_kernels import NONE, Pooled, Rule, Stripes, dense_attention, sparse_attention
from torch.testing import assert_close

from tests.kernels.test_reference import RULES, draw, one_query


def random_columns(lists, tiles, tokens, seed=7):
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(tokens, generator=g)[:6] for _ in range(lists * tiles)]
    columns = torch.stack(drawn).view(lists, tiles, 6)
    columns[:, :, -1] = NONE
    return columns


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lists", [0, 2, 4])
@pytest.mark.parametrize("offset", [0, 11])
def test_sparse_attention_reads_what_is_listed(rule, lists, offset):
    total, tile = 50, 8
    tokens = total - offset
    query, keys, values = draw(4, tokens, 8), draw(2, total, 8, seed=1), draw(2, total, 8, seed=2)
    tiles = -(-tokens // tile)
    columns = random_columns(lists, tiles, total) if lists else None
    got, pairs = sparse_attention(query, keys, values, Stripes(2, 4, columns, tile), rule)
    wanted_pairs = torch.zeros(4, dtype=torch.int64)
    for h in range(4):
        for t in range(tokens):
            i = t + offset
            chosen = {j for j in range(i + 1) if j < 2 or i - j < 4}
            if lists:
                chosen |= {j for j in columns[h * lists // 4, t // tile].tolist() if 0 <= j <= i}
            chosen = sorted(j for j in chosen if i - j < (rule.window or 999))
            wanted_pairs[h] += len(chosen)
            assert_close(got[h, t], one_query(query[h, t], keys[h // 2, chosen], values[h // 2, chosen], rule),
                         atol=1e-5, rtol=1e-5)
    assert pairs.tolist() == wanted_pairs.tolist()


def test_sparse_attention_never_looks_ahead():
    query, keys, values = draw(4, 40, 8), draw(2, 40, 8, seed=1), draw(2, 40, 8, seed=2)
    stripes = Stripes(3, 5, random_columns(4, 5, 40), 8)
    before, _ = sparse_attention(query, keys, values, stripes, Rule(0.5))
    keys[:, 25:], values[:, 25:] = 7.0, -7.0
    after, _ = sparse_attention(query, keys, values, stripes, Rule(0.5))
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lists, columns", [(2, 0), (4, 0), (2, 4), (4, 2)])
@pytest.mark.parametrize("offset", [0, 11])
def test_blocks_equal_a_masked_dense_softmax(rule, lists, columns, offset):
    total, tile, block = 50, 8, 7                                    # the last block is cut, tiles and blocks overlap
    tokens, groups = total - offset, 2
    tiles = -(-tokens // tile)
    query, keys, values = draw(4, tokens, 8), draw(2, total, 8, seed=1), draw(2, total, 8, seed=2)
    g = torch.Generator().manual_seed(3)
    blocks = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(lists * tiles)]).view(lists, tiles, 3)
    blocks[:, :, 0] = NONE
    chosen = random_columns(columns, tiles, total) if columns else None
    visible = torch.zeros(4, tokens, total, dtype=torch.bool)
    for h in range(4):
        for t in range(tokens):
            for n in blocks[h * lists // 4, t // tile].tolist():
                visible[h, t, max(0, n) * block:(n + 1) * block] = True
            if columns:
                visible[h, t, [c for c in chosen[h * columns // 4, t // tile].tolist() if c >= 0]] = True
    i, j = torch.arange(offset, total)[:, None], torch.arange(total)
    visible = (visible | (j < 2) | (i - j < 4)) & rule.visible(i[:, 0], j)
    logits = rule.logits(query, keys.repeat_interleave(4 // groups, 0))
    want = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values.repeat_interleave(4 // groups, 0)
    got, pairs = sparse_attention(query, keys, values, Stripes(2, 4, chosen, tile, blocks, block), rule)
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert pairs.tolist() == visible.sum((-1, -2)).tolist()


def test_all_blocks_are_dense():
    query, keys, values = draw(4, 30, 8), draw(2, 30, 8, seed=1), draw(2, 30, 8, seed=2)
    blocks = torch.arange(5).expand(2, 4, 5)
    got, pairs = sparse_attention(query, keys, values, Stripes(0, 1, None, 8, blocks, 6), Rule(0.3))
    want = dense_attention(query[None], keys[None], values[None], None, 0, Rule(0.3))[0]
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert pairs.tolist() == [30 * 31 // 2] * 4


@pytest.mark.parametrize("lists", [2, 4])
def test_pooled_entries_weigh_as_much_as_the_keys_they_stand_for(lists):
    """Four equal keys and values give the same attention as one of them with log 4 added to its logit."""
    query = draw(4, 12, 8)
    keys, values = draw(2, 12, 8, seed=1), draw(2, 12, 8, seed=2)
    keys[:, :4], values[:, :4] = keys[:, :1].clone(), values[:, :1].clone()
    one = (x[:, :1].repeat_interleave(lists // 2, 0) for x in (keys, values))
    pooled = Pooled(*one, torch.full((lists, 1), 4.0).log(), torch.tensor([3]))
    got, pairs = sparse_attention(query, keys, values, Stripes(0, 5, tile=3, pooled=pooled), Rule(0.4))
    for t in range(12):
        seen = [j for j in range(12) if 0 <= t - j < 5 or (j < 4 and t - 3 >= 5)]
        for h in range(4):
            want = one_query(query[h, t], keys[h // 2, seen], values[h // 2, seen], Rule(0.4))
            assert_close(got[h, t], want, atol=1e-5, rtol=1e-5)
    assert pairs.tolist() == [sum(min(t + 1, 5) + (t >= 8) for t in range(12))] * 4
