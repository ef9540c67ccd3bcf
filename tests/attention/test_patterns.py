"""Selectors of sparse prefill: all of it is dense attention, and the formulas of each by hand."""
import math

import pytest
import torch
from llmopt_kernels import NONE, sparse_attention, sparse_partial
from torch.testing import assert_close

from llmopt import attention as a
from llmopt import runtime
from llmopt.attention.antidiagonal import antidiagonals, summed
from llmopt.attention.base import TRIAL, State
from llmopt.attention.flexprefill import distance
from llmopt.attention.grid import Grid, largest, listed, top
from llmopt.attention.neighborhood import starts, tile_bound
from llmopt.attention.sparge import cosines
from llmopt.attention.vertical_slash import along_diagonals
from llmopt.errors import FieldError
from llmopt.method import Record
from tests.kernels.test_reference import RULES, draw
from tests.kernels.test_sparse import masked, visible_by_hand
from tests.tiny import ids, make

H, G, D = 4, 2, 8
FULL = {
    "anchor": a.Anchor(block=8, step=2, theta=1e9), "columns": a.VerticalSlash(vertical=99, slash=1, tile=8),
    "slashes": a.VerticalSlash(vertical=1, slash=99, queries=16, tile=8), "block_topk": a.BlockTopK(block=8, keep=99),
    "over heads": a.BlockTopK(block=8, keep=99, over="head"), "mass": a.BlockTopK(block=8, threshold=1.0, keep=0),
    "flash_prefill": a.FlashPrefill(block=8, dense=99), "low alpha": a.FlashPrefill(block=8, alpha=1e-30, dense=0),
    "lines": a.FlexPrefill(block=8, gamma=1.0, tau=0), "pooled": a.FlexPrefill(block=8, gamma=1.0, tau=9),
    "xattention": a.XAttention(block=8, stride=4, threshold=1.0), "sparge": a.Sparge(block=8, mass=1.0),
    "mistrust": a.Sparge(block=8, mass=0.01, alike=1.0), "stem": a.Stem(block=8, stride=4, keep=1.0, decay=1.0),
    "tri_shape": a.TriShape(window=99), "asking": a.TriShape(window=1, dense=99),
    "neighborhood": a.Neighborhood(window=99, stride=1), "s2": a.ShiftedGroups(group=200),
    "core_context": a.CoreContext(window=99), "cores of one": a.CoreContext(group=1, window=5, tile=8),
    "local_heads": a.LocalHeads(window=99), "together": a.Anchor(block=8, step=2, theta=1e9, together=True),
    "sums": a.Anchor(block=8, step=2, theta=1e9, anchor="sum")}


def drawn(tokens, total, rule=RULES[0], seed=0):
    """q, k, v of one sequence, and what `select` is told."""
    q, k, v = draw(H, tokens, D, seed=seed), draw(G, total, D, seed=seed + 1), draw(G, total, D, seed=seed + 2)
    return q, k, v, State(0, rule, v, total - tokens, 0, Record({"local": [[0, 2]]}), {})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FULL)
def test_all_of_it_is_dense_attention(name, rule):
    for tokens, total in ((60, 60), (27, 60), (5, 43)):
        q, k, v, state = drawn(tokens, total, rule)
        if name == "mass":                      # the lowest score counts as nothing
            continue
        part, pairs = sparse_partial(q, k, v, FULL[name].select(q, k, state), rule)
        seen = rule.visible(torch.arange(total - tokens, total), torch.arange(total))
        want = masked(q, k, v, seen, rule)
        if not (name.startswith("core") and rule.window):           # pooled keys know no window
            assert_close(part.out, want.out, atol=1e-5, rtol=1e-5)
            assert_close(part.lse, want.lse, atol=1e-5, rtol=1e-5)
            assert pairs.tolist() == [int(seen.sum())] * H


@pytest.fixture
def chosen(monkeypatch) -> list[tuple[int, int]]:
    """(queries, keys) of every time that blocks have been chosen."""
    found, select = [], a.BlockTopK.select
    monkeypatch.setattr(a.BlockTopK, "select", lambda self, q, k, state: (
        found.append((q.shape[1], k.shape[1])), select(self, q, k, state))[1])
    return found


LONG = {"num_hidden_layers": 1, "max_position_embeddings": 4096}


@pytest.mark.parametrize("least", [8, 0])
@pytest.mark.parametrize("keep", [0, 99])
def test_what_is_no_faster_is_computed_densely(keep, least, chosen):
    model, tokens = make("llama", **LONG), ids(1, 4096)
    with torch.no_grad():
        want = model(tokens).logits
        with runtime.attached(model, a.BlockTopK(block=64, keep=keep, min_length=least)):
            got = model(tokens).logits
            density = float(runtime.attachment(model).stats[0].density.mean())
    middle = [(TRIAL, 2048)] if least else []                      # tried on a few rows first
    assert middle + ([(4096, 4096)] if keep == 0 or not least else []) == chosen
    assert density == (1.0 if keep else pytest.approx((4096 * 65 / 2 + 64 * 64 * 63) / (4096 * 4097 / 2)))
    assert torch.equal(got, want) == (keep > 0 and least > 0)


def test_lines_are_chosen_once(monkeypatch):
    """Looking at the last queries costs as much for a few in the middle."""
    lengths, lines = [], a.VerticalSlash.lines
    monkeypatch.setattr(a.VerticalSlash, "lines", lambda self, q, *more: (
        lengths.append(q.shape[1]), lines(self, q, *more))[1])
    with torch.no_grad(), runtime.attached(make("llama", **LONG), a.VerticalSlash(vertical=64, slash=40)) as model:
        model(ids(1, 4096))
        assert float(runtime.attachment(model).stats[0].density.max()) < 0.2
    assert lengths == [4096]


@pytest.mark.parametrize("name", FULL)
def test_pairs_are_known_about(name):
    q, k, v, state = drawn(40, 60)
    stripes = FULL[name].select(q, k, state)
    if stripes.pooled is None:
        _, pairs = sparse_attention(q, k, v, stripes, state.rule)
        assert stripes.about(40, 60) >= 0.99 * float(pairs.double().mean())
        if all(x is None for x in (stripes.diagonals, stripes.columns, stripes.verticals)):
            assert stripes.about(40, 60) <= 1.15 * float(pairs.double().mean())


# --------------------------------------------------------------------------------------------- what they have in common

def test_choosing_by_hand():
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert largest(scores, 0.8).tolist() == [[True, False, True, False], [True, True, True, True]]
    assert largest(scores, 0.75)[1].tolist() == [True, True, True, False]
    forced = torch.tensor([[False, True, False, False]] * 2)
    assert largest(scores, 0.55, forced).tolist() == [[True, True, False, False], [True, True, True, False]]
    assert top(scores, torch.tensor([1, 3])).tolist() == [[True, False, False, False], [True, True, True, False]]
    assert listed(torch.tensor([[True, False, True], [False, False, False]])).tolist() == [[0, 2], [NONE, NONE]]


def test_what_is_always_read():
    q, k, _, state = drawn(20, 60)
    grid = Grid(q, k, state.values, state.rule, 8, first=1, near=2)
    assert grid.start.tolist() == [32, 40, 48]                       # tiles begin at 40, 48, 56
    assert grid.far.nonzero()[:, 1].tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert grid.causal.sum(1).tolist() == [6, 7, 8]


def test_antidiagonal_means_by_hand():
    q, k, _, state = drawn(11, 17)
    grid = Grid(q, k, state.values, state.rule, 4, 0, 1)
    for head, (found, seen) in enumerate(antidiagonals(grid, 2)):
        keys = k[head // 2]
        assert found.shape == (6, 9)
        want = (q[head, 5] @ keys[6] + q[head, 4] @ keys[7]) / 2 * state.rule.scaling
        assert_close(found[2, 3], want, atol=1e-5, rtol=1e-5)
        assert seen[2].tolist() == [True] * 6 + [False] * 3           # rows 10 and 11; squares begin at 0, 2, ..., 16
    squares = torch.arange(15.0).view(3, 5)
    assert summed(squares, 2).tolist() == [[0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9], [10 + 11, 12 + 13, 14]]


# --------------------------------------------------------------------------------------------------------------- anchor

def by_hand(method, q, k, state):
    """bool [H, T, S]: the base and the stripes, key by key."""
    tokens, total = q.shape[1], k.shape[1]
    offset, rows = total - tokens, method.block * method.step
    logits = state.rule.logits(q.unflatten(0, (G, -1)), k.unsqueeze(1)).flatten(0, 1)
    seen = torch.zeros(H, tokens, total, dtype=torch.bool)
    for begin in range(0, tokens, rows):
        first = max(0, offset + begin - method.block)
        end = min(begin + rows, tokens)
        for t in range(begin, end):
            seen[:, t, :offset + t + 1] = True
            seen[:, t, method.block:max(first, method.block)] = False
        hit = torch.zeros(H, total, dtype=torch.bool)
        for at in range(begin, end, method.block):
            tile = slice(at, min(at + method.block, end))
            base = logits[:, tile].masked_fill(~seen[:, tile], -math.inf)
            anchor = (base.amax(-1) if method.anchor == "peak" else base.logsumexp(-1)).mean(-1)
            hit |= logits[:, tile].mean(1) + method.theta >= anchor[:, None]
        hit[:, :method.block] = hit[:, first:] = False
        seen[:, begin:end] |= hit[:, None]
    return seen


@pytest.mark.parametrize("anchor", [{"theta": 2.0}, {"anchor": "sum", "theta": 3.2}])
@pytest.mark.parametrize(("tokens", "total"), [(64, 64), (50, 64), (33, 70)])
def test_anchor_by_hand(tokens, total, anchor):
    q, k, v, state = drawn(tokens, total)
    method = a.Anchor(block=4, step=3, **anchor)
    part, pairs = sparse_partial(q, k, v, method.select(q, k, state), state.rule)
    seen = by_hand(method, q, k, state)
    want = masked(q, k, v, seen, state.rule)
    assert_close(part.out, want.out, atol=1e-5, rtol=1e-5)
    assert_close(part.lse, want.lse, atol=1e-5, rtol=1e-5)
    assert pairs.tolist() == seen.sum((1, 2)).tolist()
    assert 0.3 < float(pairs.sum()) / (H * (tokens * (2 * total - tokens + 1) / 2)) < 0.95


def test_a_vector_added_to_all_keys_changes_nothing():
    q, k, v, state = drawn(48, 48)
    method = a.Anchor(block=4, step=2, theta=1.0)
    before, after = (sparse_attention(q, keys, v, method.select(q, keys, state), state.rule)
                     for keys in (k, k + draw(G, 1, D, seed=9)))
    assert_close(before[0], after[0], atol=1e-5, rtol=1e-5)
    assert before[1].tolist() == after[1].tolist()


def test_a_larger_theta_reads_more():
    q, k, _, state = drawn(64, 64)
    counts = [(a.Anchor(block=4, step=2, theta=theta).select(q, k, state).columns != NONE).sum()
              for theta in (-1e9, 0.0, 1.0, 3.0)]
    assert counts[0] == 0 and all(less < more for less, more in zip(counts, counts[1:], strict=False))
    union = a.Anchor(block=4, step=2, theta=1.0, together=True).select(q, k, state).columns
    assert union.shape[0] == G


# ---------------------------------------------------------------------------------------------------------------- lines

def test_distances_line_up():
    weights = torch.zeros(1, 4, 10)
    for row in range(4):
        weights[0, row, 6 + row - 3] = row + 1.0                        # all at distance 3
    assert along_diagonals(weights)[0].tolist() == [0, 0, 0, 10, 0, 0, 0, 0, 0, 0]
    q, k, _, state = drawn(30, 30)
    total = along_diagonals(a.VerticalSlash().lines(q, k, state)[0].new_ones(1, 2, 5))
    assert total[0].tolist() == [2, 2, 2, 2, 1]


def test_a_planted_column_is_found_only_if_the_end_reads_it():
    q, k, _, state = drawn(40, 40)
    q[:, -4:] = q[:1, -1:]
    k[:, 11] = 5 * q[0, -1]
    method = a.VerticalSlash(vertical=3, slash=2, queries=4, always=1, tile=8)
    found = method.select(q, k, state)
    assert (found.verticals == 11).any(1).all() and found.verticals.shape == (H, 3)
    assert (found.verticals == 0).any(1).all() and found.start.tolist() == [0, 8, 16, 24, 32]
    assert (found.diagonals != NONE).sum(1).tolist() == [1] * H                        # besides the row's own place


def test_what_is_always_read_are_the_first_and_the_nearest():
    for tokens, begins in ((40, [0, 4, 12, 20, 28]), (16, [20, 28])):   # four before each tile, in a later turn too
        q, k, _, state = drawn(tokens, 40)
        found = a.VerticalSlash(vertical=1, slash=1, queries=4, always=5, tile=8).select(q, k, state)
        assert found.verticals.tolist() == [[0, 1, 2, 3, 4]] * H and found.diagonals is None
        assert found.start.tolist() == begins


def test_distances_between_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert_close(distance(p, p), torch.zeros(2))
    assert_close(distance(p[1], torch.tensor([0.0, 1.0, 0.0])), torch.tensor(math.sqrt(math.log(2))))


# --------------------------------------------------------------------------------------------------------------- blocks

def test_flash_prefill_by_hand():
    q, k, _, state = drawn(22, 30)
    method = a.FlashPrefill(block=4, first=0, near=1, alpha=0.6, dense=0)
    grid = Grid(q, k, state.values, state.rule, 4, 0, 1)
    found = method.picks(grid, state)
    for h in range(H):
        means = torch.stack([k[h // 2, n:n + 4].mean(0) for n in range(0, 30, 4)])
        for tile in range(6):
            shares = torch.zeros(8)
            for t in range(4 * tile, min(4 * tile + 4, 22)):
                for n in range(8):
                    if 4 * n + 3 <= t + 8:
                        shares[n] += (q[h, t] @ means[n] * state.rule.scaling).exp()
            assert found[h, tile].tolist() == ((shares >= 0.6 * shares.max()) & (shares > 0)).tolist()


def test_the_budget_of_stem_decays():
    q, k, _, state = drawn(64, 64)
    grid = Grid(q, k, state.values, state.rule, 8, 1, 1)
    assert a.Stem(block=8, stride=4, keep=1.0, decay=0.5).budgets(grid, torch.tensor([1.0, 0.5])).tolist() == [
        [max(0, math.ceil(share * (8 - 8 * 0.5 * t / 8)) - 2) for t in range(8)] for share in (1, 0.5)]
    state.values[:, 16:24] *= 1e6
    loud = a.Stem(block=8, stride=4, keep=0.4, decay=1.0, beta=100.0).picks(grid, state)
    assert loud[:, 4:, 2].all()                                         # what would be written counts


def test_blocks_of_unlike_tokens_are_not_trusted():
    x = torch.zeros(1, 6, 2)
    x[0] = torch.tensor([[1.0, 0], [3, 0], [1, 0], [-1, 0], [0, 2], [0, 1]])
    assert_close(cosines(x, 2), torch.tensor([[1.0, 0.0, 1.0]]))
    assert_close(cosines(x[:, :5], 2), torch.tensor([[1.0, 0.0, 1.0]]))


def test_what_pooled_keys_choose():
    q, k, _, state = drawn(32, 32)
    k[:, 8:12] = 10 * q.mean(1).view(G, 2, D).mean(1, keepdim=True)
    picked = a.BlockTopK(block=4, keep=1).picks(Grid(q, k, state.values, state.rule, 4, 1, 1), state)
    assert picked[:, 4:, 2].float().mean() > 0.6
    over = a.BlockTopK(block=4, keep=1, over="head").picks(Grid(q, k, state.values, state.rule, 4, 1, 1), state)
    assert over.sum((1, 2)).tolist() == [8] * H


@pytest.mark.parametrize("make", [lambda: a.XAttention(block=12, stride=8), lambda: a.Stem(block=10, stride=4),
                                  lambda: a.Neighborhood(window=4, stride=8)])
def test_strides_that_do_not_fit(make):
    with pytest.raises(FieldError, match="stride"):
        make()


# ------------------------------------------------------------------------------------------------------------ positions

def seen_by(method, tokens=48, total=48):
    q, k, _, state = drawn(tokens, total)
    return visible_by_hand(method.select(q, k, state), state.rule, H, tokens, total)[1]


def test_neighborhoods_by_hand():
    i, j = torch.arange(48)[:, None], torch.arange(48)
    assert torch.equal(seen_by(a.Neighborhood(window=7, stride=1))[0], (j <= i) & (i - j < 7))
    assert torch.equal(seen_by(a.Neighborhood(window=8, stride=8))[0], (j <= i) & (i // 8 == j // 8))
    run = seen_by(a.Neighborhood(window=12, stride=4))[0]
    assert run.sum(1)[16:20].tolist() == [9, 10, 11, 12]
    assert torch.equal(seen_by(a.Neighborhood(window=12, stride=4), 30, 48)[0], run[18:])         # read in two pieces
    apart = seen_by(a.Neighborhood(window=4, stride=2, dilation=3))[0]
    assert not (apart & ((i - j) % 3 != 0)).any() and apart.sum(1)[30:36].tolist() == [3, 3, 3, 4, 4, 4]
    assert starts(torch.arange(8), 4, 2).tolist() == [0, 0, 0, 0, 2, 2, 4, 4]


def test_a_stride_of_whole_tiles_wastes_nothing():
    bounds = {stride: tile_bound(8192, 1024, stride, 128, 128) for stride in (1, 128, 1024)}
    assert bounds[128][0] > bounds[1][0] and bounds[1024][0] > bounds[128][0]
    assert bounds[1][1] == pytest.approx(8192 * 8193 / 2 / (1024 * 1025 / 2 + 7168 * 1024))


def test_shifted_groups_by_hand():
    seen, i, j = seen_by(a.ShiftedGroups(group=8)), torch.arange(48)[:, None], torch.arange(48)
    assert torch.equal(seen[0], (j <= i) & (i // 8 == j // 8)) and torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], (j <= i) & ((i + 4) // 8 == (j + 4) // 8)) and torch.equal(seen[2], seen[3])
    assert torch.equal(seen_by(a.ShiftedGroups(group=8), 30, 48), seen[:, 18:])


def test_the_last_queries_read_everything():
    seen = seen_by(a.TriShape(sinks=2, window=6, dense=8, tile=4))[0]
    assert seen[40:].sum(1).tolist() == list(range(41, 49)) and seen[39].sum() == 2 + 6 + 3
    assert seen[36].sum() == 2 + 6


def test_cores_of_equal_tokens_stand_for_them_exactly():
    q, k, v, state = drawn(40, 40)
    for x in (k, v, state.values):
        x[:, :40] = x[:, ::4].repeat_interleave(4, 1)
    method = a.CoreContext(group=4, window=6, tile=4)
    part, _ = sparse_partial(q, k, v, method.select(q, k, state), state.rule)
    want = masked(q, k, v, state.rule.visible(torch.arange(40), torch.arange(40)), state.rule)
    assert_close(part.out, want.out, atol=1e-5, rtol=1e-5)
    assert_close(part.lse, want.lse, atol=1e-5, rtol=1e-5)


