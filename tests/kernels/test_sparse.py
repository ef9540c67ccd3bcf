"""Sparse attention against explicit loops over the keys that each row may read."""
from dataclasses import replace
from itertools import product

import pytest
import torch
from llmopt_kernels import (
    NONE,
    Partial,
    Pooled,
    Ragged,
    Rule,
    Stripes,
    dense_attention,
    flash,
    merged,
    ragged_partial,
    sparse_attention,
    sparse_partial,
    sunk,
)
from llmopt_kernels.sparse import by_gathering
from torch.testing import assert_close

from tests.kernels.test_reference import RULES, SUNK, draw, one_query


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


# ------------------------------------------------------------------ every kind of base and list, entry by entry

TOTAL, TILE, BLOCK, SINKS = 30, 8, 5, 2
TILES = 4
BASES = {
    "window": dict(window=4),
    "window by group": dict(window=torch.tensor([3, 9])),
    "window by head": dict(window=torch.tensor([3, 9, 3, 40])),
    "start": dict(start=torch.tensor([0, 3, 3, 14])),
    "start by group": dict(start=torch.tensor([[0, 3, 3, 14], [0, 8, 9, 14]])),
    "start by head": dict(start=torch.tensor([[0, 3, 3, 14], [0, 8, 9, 14], [2, 3, 20, 30], [0, 0, 0, 14]])),
}


def lists(columns, blocks):
    g, drawn = torch.Generator().manual_seed(5), {}
    for name, count, high in (("columns", columns, TOTAL), ("blocks", blocks, TOTAL // BLOCK)):
        if count:
            picked = [torch.randperm(high, generator=g)[:3] for _ in range(count * TILES)]
            drawn[name] = torch.stack(picked).view(count, TILES, 3)
            drawn[name][:, :, 1] = NONE
    return drawn


def visible_by_hand(stripes, rule, heads, tokens, total=TOTAL):
    """bool [heads, tokens, total], twice: of the base, and of everything; one entry after the other."""
    window, start, columns, blocks, diagonals, verticals = (
        None if x is None else torch.as_tensor(x).tolist() for x in (
            stripes.window, stripes.start, stripes.columns, stripes.blocks, stripes.diagonals, stripes.verticals))
    base, every = ([[[False] * total for _ in range(tokens)] for _ in range(heads)] for _ in range(2))

    def own(x, h, t):
        """The entry of a list [X, tiles] (or [tiles] of numbers) for head h and query t."""
        x = x if isinstance(x[0], int) else x[h * len(x) // heads]
        return x[t // stripes.tile]

    def reaches(distances, t, apart):
        """True if some row of the tile of query t is that far behind the key which t is `apart` from."""
        first = t // stripes.tile * stripes.tile
        return any(apart + row - t in distances and apart + row >= t
                   for row in range(first, min(first + stripes.tile, tokens)))

    for h, t in product(range(heads), range(tokens)):
        i = t + total - tokens
        width = window if not isinstance(window, list) else window[h * len(window) // heads]
        first = i + 1 - width if start is None else own(start, h, t)
        for j in range(max(0, i - (rule.window or 99) + 1), i + 1):
            base[h][t][j] = j < stripes.sinks or j >= first
            every[h][t][j] = bool(base[h][t][j] or (columns and j in own(columns, h, t))
                                  or (blocks and j // stripes.block in own(blocks, h, t))
                                  or (diagonals and reaches(diagonals[h * len(diagonals) // heads], t, i - j))
                                  or (verticals and j in verticals[h * len(verticals) // heads]))
    return torch.tensor(base), torch.tensor(every)


def masked(query, keys, values, visible, rule):
    """The plain formula: out [H, T, D] and lse [H, T] where only `visible` is seen."""
    group = len(query) // len(keys)
    logits = query @ keys.repeat_interleave(group, 0).mT * rule.scaling
    logits = rule.softcap * torch.tanh(logits / rule.softcap) if rule.softcap else logits
    logits = logits.masked_fill(~visible, -torch.inf)
    return Partial(logits.softmax(-1).nan_to_num(0.0) @ values.repeat_interleave(group, 0), logits.logsumexp(-1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("offset", [0, 5])
def test_every_base_with_every_list_equals_a_mask_built_entry_by_entry(rule, base, offset, monkeypatch):
    monkeypatch.setattr(flash, "ROWS", 3)
    tokens = TOTAL - offset
    query, keys, values = draw(4, tokens, 8), draw(2, TOTAL, 8, seed=1), draw(2, TOTAL, 8, seed=2)
    for columns, blocks, slashes, lines in ((0, 0, 0, 0), (2, 0, 0, 0), (4, 0, 2, 2), (0, 2, 4, 0), (4, 2, 0, 4),
                                            (2, 4, 4, 0), (0, 0, 2, 0), (0, 0, 0, 4), (0, 0, 4, 2), (0, 0, 2, 4)):
        diagonals = torch.tensor([[7, NONE, 3], [0, 11, 12], [5, 6, NONE], [13, 2, 1]])[:slashes] if slashes else None
        verticals = torch.tensor([[NONE, 9, 4], [1, 14, 2], [3, NONE, 99], [0, 5, 5]])[:lines] if lines else None
        stripes = Stripes(SINKS, tile=TILE, block=BLOCK, diagonals=diagonals, verticals=verticals, **BASES[base],
                          **lists(columns, blocks))
        near, every = visible_by_hand(stripes, rule, 4, tokens)
        want, done = (masked(query, keys, values, seen, rule) for seen in (every, near))
        for given in (stripes, replace(stripes, done=done)):
            got, pairs = sparse_partial(query, keys, values, given, rule)
            assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
            assert_close(got.lse, want.lse, atol=1e-5, rtol=1e-5)
            assert pairs.tolist() == every.sum((-1, -2)).tolist()


def test_a_base_that_is_done_is_not_computed_again():
    query, keys, values = draw(4, 30, 8), draw(2, 30, 8, seed=1), draw(2, 30, 8, seed=2)
    done = Partial(draw(4, 30, 8, seed=3), draw(4, 30, seed=4))
    got, pairs = sparse_attention(query, keys, values, Stripes(0, 6, tile=8, done=done), Rule(0.5))
    assert torch.equal(got, done.out)
    assert pairs.tolist() == [6 * 7 // 2 + 24 * 6] * 4


def test_the_base_is_a_window_or_a_start():
    for given in (dict(), dict(window=3, start=torch.tensor([0]))):
        with pytest.raises(ValueError, match="window and start"):
            Stripes(1, **given)


@pytest.mark.parametrize("rule", RULES + SUNK)
@pytest.mark.parametrize("biased", [False, True])
def test_kept_entries_and_new_tokens_merge_to_one_softmax(rule, biased):
    counts = torch.tensor([[5, 0]])
    bias = draw(5, seed=9) if biased else None
    carried = {} if bias is None else {"bias": bias}
    kept = Ragged(draw(5, 8, seed=3), draw(5, 8, seed=4), torch.tensor([0, 2, 3, 6, 8]).int(), counts, carried)
    query, keys, values = draw(4, 6, 8), draw(2, 6, 8, seed=1), draw(2, 6, 8, seed=2)
    new, _ = sparse_partial(query, keys, values, Stripes(0, 6), rule)
    old = ragged_partial(query[None], kept, 10, rule, block=4)
    got = sunk(merged(Partial(old.out[0], old.lse[0]), new), rule)
    for h, t in product(range(4), range(6)):
        reach = 10 + t - (rule.window or 99)
        past, near = (kept.positions > reach) & (h < 2), torch.arange(6) + 10 > reach
        near &= torch.arange(6) <= t
        more = torch.cat([bias[past], torch.zeros(int(near.sum()))]) if biased else None
        want = one_query(query[h, t], torch.cat([kept.keys[past], keys[h // 2, near]]),
                         torch.cat([kept.values[past], values[h // 2, near]]), rule, more, h)
        assert_close(got.out[h, t], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES + SUNK)
def test_gradients_are_those_of_dense_attention(rule):
    """Through the merge of a base that is done with listed keys; together they cover everything."""
    leaves = [x.requires_grad_() for x in (draw(4, 20, 8), draw(2, 20, 8, seed=1), draw(2, 20, 8, seed=2))]
    query, keys, values = leaves
    done, _ = sparse_partial(query, keys, values, Stripes(0, 3, tile=8), rule)
    got, _ = sparse_attention(query, keys, values, Stripes(0, 3, torch.arange(20).expand(2, 3, 20), 8, done=done), rule)
    want = dense_attention(query[None], keys[None], values[None], None, 0, rule)[0]
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)), strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------- the flash kernel, at lengths it is for

def some_blocks(heads, tiles, count, near):
    """int64 [heads, tiles, 3], of those before the block `near` tiles back; fewer in the second half of the heads."""
    g = torch.Generator().manual_seed(6)
    found = torch.stack([torch.randperm(count, generator=g)[:3] for _ in range(heads * tiles)]).view(heads, tiles, 3)
    found[heads // 2:, :, 1] = NONE
    return found.masked_fill(found > torch.arange(tiles)[:, None] - near, NONE)


TILES_64 = torch.arange(7) * 64
LONG = {
    "window": Stripes(5, 70), "windows": Stripes(3, torch.tensor([70, 9, 70, 200, 1, 9, 9, 400])),
    "start": Stripes(40, start=(TILES_64 - 40).clamp(min=0), tile=64),
    "starts": Stripes(7, start=torch.stack([TILES_64, (TILES_64 - 33).clamp(min=0)]), tile=64),
    "blocks": Stripes(64, start=TILES_64, tile=64, block=64, blocks=some_blocks(8, 7, 6, 1)),
    "blocks of a group": Stripes(0, start=(TILES_64 - 64).clamp(min=0), tile=64, block=64,
                                 blocks=some_blocks(2, 7, 6, 2)),
    "columns": Stripes(9, start=(TILES_64 - 50).clamp(min=0), tile=64,
                       columns=random_columns(8, 7, 400)),
    "columns and blocks": Stripes(9, start=TILES_64, tile=64, columns=random_columns(2, 7, 400), block=64,
                                  blocks=some_blocks(8, 7, 6, 1), diagonals=torch.tensor([[70, NONE], [3, 300]])),
    "lines": Stripes(9, start=(TILES_64 - 29).clamp(min=0), tile=64, verticals=random_columns(8, 1, 400)[:, 0],
                     diagonals=random_columns(8, 1, 400, seed=8)[:, 0]),
    "lines of a group": Stripes(0, start=TILES_64, tile=64, verticals=random_columns(2, 1, 90)[:, 0],
                                diagonals=torch.tensor([[70, NONE], [3, 300]])),
    "lines and blocks": Stripes(64, start=TILES_64, tile=64, verticals=random_columns(2, 1, 400)[:, 0], block=64,
                                blocks=some_blocks(8, 7, 6, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_the_flash_kernel_computes_what_is_meant(name, dtype):
    query, keys, values = (draw(n, 400, 64, seed=n + x).to(dtype) for x, n in enumerate((8, 2, 2)))
    stripes = LONG[name]
    assert flash.fits(query, keys, values, stripes, Rule(0.125))
    want, pairs = by_gathering(query.float(), keys.float(), values.float(), stripes, Rule(0.125))
    base = replace(stripes, columns=None, blocks=None, diagonals=None, verticals=None)
    done = by_gathering(query.float(), keys.float(), values.float(), base, Rule(0.125))[0]
    for given in (stripes, replace(stripes, done=done)):
        got, count = flash.flash_partial(query, keys, values, given, Rule(0.125))
        assert (got.out - want.out).norm() < (1e-5 if dtype == torch.float32 else 5e-3) * want.out.norm()
        assert_close(got.lse, want.lse, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)
        assert count.tolist() == pairs.tolist()


@pytest.mark.parametrize("name", LONG)
def test_a_prompt_in_pieces_reads_the_same(name):
    """The last 208 queries alone, whose tiles begin where those of the whole prompt do."""
    query, keys, values = draw(8, 400, 64, seed=1), draw(2, 400, 64, seed=2), draw(2, 400, 64, seed=3)
    stripes, tiles = LONG[name], slice(3, None)
    later = {field: getattr(stripes, field)[:, tiles] for field in ("columns", "blocks")
             if getattr(stripes, field) is not None}
    if stripes.start is not None:
        later["start"] = stripes.start[..., tiles]
    whole, _ = sparse_attention(query, keys, values, stripes, Rule(0.125))
    piece, _ = sparse_attention(query[:, 192:], keys, values, replace(stripes, **later), Rule(0.125))
    assert_close(piece, whole[:, 192:], atol=1e-5, rtol=1e-5)
