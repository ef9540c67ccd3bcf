"""The definitions against explicit loops."""
import pytest
import torch
from llmopt_kernels import Ragged, Rule, attention, column_sums, ragged, reference
from torch.testing import assert_close

RULES = [Rule(0.5), Rule(0.3, softcap=2.0), Rule(0.5, window=6)]
SUNK = [Rule(0.5, window=window, sinks=torch.tensor([1.0, -1.0, 3.0, 0.0])) for window in (None, 6)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_query(query, keys, values, rule, bias=None, head=0):
    """The plain formula for one query [D] of a head and the keys [S, D] that it sees."""
    logits = keys @ query * rule.scaling
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logits = logits if bias is None else logits + bias
    if rule.sinks is not None:
        logits = torch.cat([logits, rule.sinks[head:head + 1]])
        values = torch.cat([values, torch.zeros(1, values.shape[1])])
    return logits.softmax(0) @ values


@pytest.mark.parametrize("rule", RULES + SUNK)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("version", [reference, ragged])
def test_ragged_attention(rule, even, merged, version):
    counts = torch.tensor([[3, 3], [3, 3]] if even else [[4, 1], [0, 5]])
    total, tokens, first = int(counts.sum()), 3, 12
    positions = torch.cat([torch.randperm(9)[:c].sort().values for c in counts.flatten().tolist()]).int()
    bias = draw(total, seed=9) if merged else None
    carried = {} if bias is None else {"bias": bias}
    kept = Ragged(draw(total, 8, seed=1), draw(total, 8, seed=2), positions, counts, carried)
    query, tail = draw(2, 4, tokens, 8, seed=3), (draw(2, 2, 4, 8, seed=4), draw(2, 2, 4, 8, seed=5))
    where = torch.arange(first - 1, first + tokens)                  # one token of the tail is older than the queries
    visible = rule.visible(torch.arange(first, first + tokens), where)[None]
    got = version.ragged_attention(query, kept, tail, visible, first, rule)
    for row, head, part in kept.heads():
        for h in (2 * head, 2 * head + 1):
            for t in range(tokens):
                reach = first + t - (rule.window or 99)
                old, new = positions[part] > reach, (where <= first + t) & (where > reach)
                keys, values = (torch.cat([a[part][old], b[row, head][new]])
                                for a, b in ((kept.keys, tail[0]), (kept.values, tail[1])))
                extra = torch.cat([bias[part][old], torch.zeros(int(new.sum()))]) if merged else None
                want = one_query(query[row, h, t], keys, values, rule, extra, h)
                assert_close(got[row, h, t], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("even", [True, False])
def test_ragged_attention_in_half_precision(dtype, even):
    counts = torch.tensor([[30, 30]] if even else [[50, 10]])
    kept = Ragged(draw(60, 16).to(dtype), draw(60, 16, seed=1).to(dtype), torch.zeros(60).int(), counts)
    query, tail = draw(1, 8, 1, 16, seed=2).to(dtype), [draw(1, 2, 3, 16, seed=s).to(dtype) for s in (3, 4)]
    got = ragged.ragged_attention(query, kept, tuple(tail), None, 70, Rule(0.6))
    wide = Ragged(kept.keys.float(), kept.values.float(), kept.positions, counts)
    want = reference.ragged_attention(query.float(), wide, tuple(t.float() for t in tail), None, 70, Rule(0.6))
    assert got.dtype == dtype
    assert_close(got.float(), want, atol=1e-2, rtol=1e-2)


def test_a_query_that_sees_nothing_gives_zeros():
    kept = Ragged(draw(3, 8), draw(3, 8, seed=1), torch.zeros(3).int(), torch.tensor([[2, 1]]))
    query, tail = draw(1, 4, 2, 8, seed=2), (draw(1, 2, 2, 8, seed=3), draw(1, 2, 2, 8, seed=4))
    visible = torch.tensor([[[False, False], [False, True]]])
    for version in (reference, ragged):
        out = version.ragged_attention(query, kept, tail, visible, 50, Rule(0.5, window=6))
        assert bool((out[:, :, 0] == 0).all()) and bool(out.isfinite().all())
        assert_close(out[0, :, 1], tail[1][0, :, 1].repeat_interleave(2, 0))


def test_rows_can_be_reordered():
    kept = Ragged(draw(10, 4), draw(10, 4, seed=1), torch.arange(10).int(), torch.tensor([[4, 1], [0, 5]]))
    turned = kept.select_rows(torch.tensor([1, 0, 1]))
    assert turned.counts.tolist() == [[0, 5], [4, 1], [0, 5]]
    assert turned.positions.tolist() == [*range(5, 10), *range(5), *range(5, 10)]


@pytest.mark.parametrize("rule", RULES + SUNK)
def test_attention_in_blocks_and_column_sums(rule):
    query, keys, values = draw(2, 4, 300, 8), draw(2, 2, 300, 8, seed=1), draw(2, 2, 300, 8, seed=2)
    place = torch.arange(300)
    out = attention(query, keys, values, rule.visible(place, place), rule)
    total = torch.zeros(300)
    for t in range(300):
        start = max(0, t + 1 - (rule.window or 999))
        assert_close(out[1, 3, t], one_query(query[1, 3, t], keys[1, 1, start:t + 1], values[1, 1, start:t + 1], rule,
                                       head=3),
                     atol=1e-5, rtol=1e-5)
        total[start:t + 1] += one_query(query[1, 3, t], keys[1, 1, start:t + 1], torch.eye(t + 1 - start), rule, head=3)
    sums = column_sums(query, keys, place.expand(2, -1), place.expand(2, 2, -1), rule, block=64)
    assert_close(sums[1, 3], total, atol=1e-4, rtol=1e-4)
    if rule.sinks is None:
        assert_close(sums.sum(-1), torch.full((2, 4), 300.), atol=1e-3, rtol=1e-4)
