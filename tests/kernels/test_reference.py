"""The definitions against explicit loops."""
import pytest
import torch
from llmopt_kernels import NONE, Ragged, Rule, Stripes, attention, column_sums, ragged_attention, sparse_attention
from torch.testing import assert_close

RULES = [Rule(0.5), Rule(0.3, softcap=2.0), Rule(0.5, window=6)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_query(query, keys, values, rule, bias=None):
    """The plain formula for one query [D] and the keys [S, D] that it sees."""
    logits = keys @ query * rule.scaling
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    return (logits if bias is None else logits + bias).softmax(0) @ values


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_ragged_attention(rule, even, merged):
    counts = torch.tensor([[3, 3], [3, 3]] if even else [[4, 1], [0, 5]])
    total, tokens, first = int(counts.sum()), 3, 12
    positions = torch.cat([torch.randperm(9)[:c].sort().values for c in counts.flatten().tolist()]).int()
    bias = draw(total, seed=9) if merged else None
    kept = Ragged(draw(total, 8, seed=1), draw(total, 8, seed=2), positions, counts, bias)
    query, tail = draw(2, 4, tokens, 8, seed=3), (draw(2, 2, 4, 8, seed=4), draw(2, 2, 4, 8, seed=5))
    where = torch.arange(first - 1, first + tokens)                  # one token of the tail is older than the queries
    visible = rule.visible(torch.arange(first, first + tokens), where)[None]
    got = ragged_attention(query, kept, tail, visible, first, rule)
    for row, head, part in kept.heads():
        for h in (2 * head, 2 * head + 1):
            for t in range(tokens):
                reach = first + t - (rule.window or 99)
                old, new = positions[part] > reach, (where <= first + t) & (where > reach)
                keys, values = (torch.cat([a[part][old], b[row, head][new]])
                                for a, b in ((kept.keys, tail[0]), (kept.values, tail[1])))
                extra = torch.cat([bias[part][old], torch.zeros(int(new.sum()))]) if merged else None
                want = one_query(query[row, h, t], keys, values, rule, extra)
                assert_close(got[row, h, t], want, atol=1e-5, rtol=1e-5)


def test_rows_can_be_reordered():
    kept = Ragged(draw(10, 4), draw(10, 4, seed=1), torch.arange(10).int(), torch.tensor([[4, 1], [0, 5]]))
    turned = kept.select_rows(torch.tensor([1, 0, 1]))
    assert turned.counts.tolist() == [[0, 5], [4, 1], [0, 5]]
    assert turned.positions.tolist() == [*range(5, 10), *range(5), *range(5, 10)]


@pytest.mark.parametrize("rule", RULES)
def test_attention_in_blocks_and_column_sums(rule):
    query, keys, values = draw(2, 4, 300, 8), draw(2, 2, 300, 8, seed=1), draw(2, 2, 300, 8, seed=2)
    place = torch.arange(300)
    out = attention(query, keys, values, rule.visible(place, place), rule)
    total = torch.zeros(300)
    for t in range(300):
        start = max(0, t + 1 - (rule.window or 999))
        assert_close(out[1, 3, t], one_query(query[1, 3, t], keys[1, 1, start:t + 1], values[1, 1, start:t + 1], rule),
                     atol=1e-5, rtol=1e-5)
        total[start:t + 1] += one_query(query[1, 3, t], keys[1, 1, start:t + 1], torch.eye(t + 1 - start), rule)
    sums = column_sums(query, keys, place.expand(2, -1), place.expand(2, 2, -1), rule, block=64)
    assert_close(sums[1, 3], total, atol=1e-4, rtol=1e-4)
    assert_close(sums.sum(-1), torch.full((2, 4), 300.), atol=1e-3, rtol=1e-4)


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
