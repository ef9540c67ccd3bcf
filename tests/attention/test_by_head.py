"""Budgets by head: shares by water-filling, and how each method that has them reads by them."""
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from llmopt_kernels import NONE, sparse_partial
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import llmopt
from llmopt import attention as a
from llmopt import runtime
from llmopt.attention.a_shape import a_shape_pairs, window_for, windows
from llmopt.attention.grid import Grid
from llmopt.calibration.head_scores import save_scores
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Record, Run
from llmopt.runtime.compression import ATTENTION
from tests.attention.test_patterns import drawn
from tests.tiny import ids, make

SCORES = [torch.tensor(row) for row in ([4.0, 1.0, 0.0, 8.0], [7.0, 7.5, 6.0, 5.0], [2.0, 3.0, 10.0, 66.5])]
HALVES = [0.0, 0.5, 1.0, 2.5]


def sharing(method, shares=HALVES, tokens=64, total=64):
    """(q, k, the state of a method whose layer has these shares)."""
    q, k, v, state = drawn(tokens, total)
    state.record.meta.clear()
    state.record.meta["shares"] = [shares]
    return q, k, state


def planned(**fields):
    run = Run(scores={"heads.span": SCORES})
    return a.BlockTopK(heads="heads.span", **fields).plan(make("llama"), run).meta["shares"]


def test_shares_are_those_of_the_whole_model():
    left, found = 9 / 53.5, planned(floor=0.0, cap=3.0)             # 12 shares; the last head takes 3 and no more
    assert found == [pytest.approx(row) for row in (
        [4 * left, left, 0, 8 * left], [7 * left, 7.5 * left, 6 * left, 5 * left], [2 * left, 3 * left, 10 * left, 3])]
    assert planned(floor=0.25, cap=2.5) == [pytest.approx([0.25 + 0.75 * share for share in row]) for row in found]
    assert planned(cap=1.0) == [[1.0] * 4] * 3 and a.BlockTopK().plan(make("llama"), Run()).meta == {}


def test_blocks_are_shared_out():
    for over in ("tile", "head"):
        method = a.BlockTopK(block=4, keep=2, over=over, first=0, near=1)
        q, k, state = sharing(method)
        grid = Grid(q, k, state.values, state.rule, 4, 0, 1)
        counts = (method.picks(grid, state) & grid.far).sum((1, 2)) if over == "head" else \
            (method.picks(grid, state) & grid.far)[:, -1].sum(1)
        assert counts.tolist() == [round(share * 2 * (16 if over == "head" else 1)) for share in HALVES]


def test_lines_are_shared_out():
    q, k, state = sharing(a.VerticalSlash())
    found = a.VerticalSlash(vertical=8, slash=4, queries=4, always=1, tile=8).select(q, k, state)
    assert [int((row != NONE).sum()) for row in found.verticals] == [1, 4, 8, 20]        # one is always read
    assert [int((row != NONE).sum()) for row in found.diagonals] == [0, 1, 3, 9]         # and one is the row's own
    full = a.VerticalSlash(vertical=20, slash=10, queries=4, always=1, tile=8).select(q, k, drawn(64, 64)[-1])
    assert set(full.verticals[3].tolist()) == set(found.verticals[3].tolist())
    _, pairs = sparse_partial(q, k, state.values, found, state.rule)
    assert pairs.diff().gt(0).all()


def test_windows_are_shared_out_and_a_ratio_is_that_of_all_heads():
    q, k, state = sharing(a.AShape())
    assert a.AShape(sinks=2, window=8).select(q, k, state).window.tolist() == [1, 4, 8, 20]
    shares = torch.tensor(HALVES, dtype=torch.float64)
    window = window_for(64, 2, 0.3, shares)
    density, less = (a_shape_pairs(64, 2, windows(w, shares)).double().mean() / (64 * 65 / 2)
                     for w in (window, window - 1))
    assert less < 0.3 <= density
    assert a.AShape(sinks=2, ratio=0.7).select(q, k, state).window.tolist() == windows(window, shares).tolist()
    assert window_for(64, 2, 1.0, torch.tensor([0.0, 2.0])) > 0         # out of reach: a head without a share


def test_in_a_model_and_in_its_checkpoint(tmp_path):
    """Every head of every layer reads by its own share; a checkpoint has them too."""
    model, tokens = make("llama"), ids(1, 80)
    file = tmp_path / "heads.json"
    save_scores(file, "mine", SCORES, {})
    llmopt.compress(model, a.BlockTopK(block=4, keep=3, first=0, min_length=0, heads=str(file)), tokens)
    want, live = model(tokens).logits, runtime.attachment(model)
    found = torch.stack([live.stats[layer].computed for layer in range(3)])
    shares = torch.tensor(live.record(ATTENTION).meta["shares"])
    counts = (3 * shares).round()
    assert float(shares.min()) >= 0.25 and float(shares.mean()) == pytest.approx(1) and len(counts.unique()) > 3
    assert all((found[counts == more] > found[counts == less].max()).all()
               for more, less in pairwise(counts.unique().sort(descending=True).values))
    llmopt.save(model, tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, want)


EVERYTHING = {a.AShape(sinks=2, window=9): {"window": 999}, a.BlockTopK(block=4, keep=3): {"keep": 999},
              a.Stem(block=4, stride=4, keep=0.5): {"keep": 1.0, "decay": 1.0, "floor": 0.99},
              a.VerticalSlash(vertical=6, slash=4, queries=4, always=2, tile=4): {"vertical": 999, "slash": 999}}


@pytest.mark.parametrize(("method", "everything"), EVERYTHING.items(), ids=lambda given: getattr(given, "name", ""))
def test_a_padded_row_is_what_it_is_alone_and_enough_for_every_head_is_dense(method, everything):
    model, tokens, run = make("llama"), ids(2, 60), Run(scores={"heads.span": SCORES})
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0
    batch = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    dense = model(tokens, **batch).logits[mask.bool()]
    method = replace(method, heads="heads.span", min_length=0)
    with runtime.attached(model, method, run=run):
        found = model(tokens, **batch).logits
        assert_close(found[1:, 20:], model(tokens[1:, 20:]).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[mask.bool()], dense, atol=1e-3)
    with runtime.attached(model, replace(method, **everything), run=run):
        assert_close(model(tokens, **batch).logits[mask.bool()], dense, atol=1e-5, rtol=1e-5)


def test_a_ratio_with_shares_next_to_nothing():
    shares = torch.tensor([1e-300, 2.0], dtype=torch.float64)
    assert windows(window_for(64, 2, 0.3, shares), shares).tolist()[0] == 1
    assert windows(window_for(64, 2, 0.9, shares), shares).min() >= 1
    assert window_for(64, 2, 0.9, torch.tensor([5e-324, 2.0], dtype=torch.float64)) > 64


def test_scores_that_are_no_shares_are_refused():
    for scores in ([torch.tensor([2.0, -1.0])], [torch.zeros(4)]):
        rows = [scores[0].repeat(2)[:4]] * 3
        with pytest.raises(LlmoptError, match="scores below 0, or none above it"):
            a.Stem(heads="heads.span").plan(make("llama"), Run(scores={"heads.span": rows}))
    with pytest.raises(LlmoptError, match="no score step 'heads.span' ran before"):
        a.AShape(heads="heads.span").plan(make("llama"), Run())
    with pytest.raises(FieldError, match="no threshold beside it"):
        a.BlockTopK(heads="heads.span", threshold=0.9)


@pytest.mark.parametrize("shares", [[[1.0] * 4] * 2, [[1.0] * 4, [1.0] * 4, [1.0] * 3], [[1.0, 1.0, 1.0, -1.0]] * 3,
                                    [[0.0] * 4] * 3, [[1e29] * 4] * 3])
def test_a_record_of_other_heads_is_refused(shares):
    with pytest.raises(LlmoptError, match=r"attention\.stem: a share of 0 or more for each head"):
        a.Stem().restore(make("llama"), Record({"shares": shares}))
